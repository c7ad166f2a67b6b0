"""Start-up kits: what they hold, who gets a private key, and which kits are refused."""

import json
import shutil
import ssl
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

import federate
from dnnlib.cli import UserError, run
from federated.deployment import kits
from federated.deployment.kits import ADMIN, SERVER, SITE, provision, read_kit, read_revoked, request_certificate

pytest.importorskip("nvflare", reason="provisioning needs the extra federated")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Kits of two sites at fl.example.org."""
    folder = tmp_path_factory.mktemp("kits") / "kits"
    assert provision(["a", "b"], "fl.example.org", folder, port=9000, days=30) == [SERVER, ADMIN, "a", "b"]
    return folder


@pytest.fixture
def copied(made, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(made, tmp_path / "kits")


def certificate(kit: Path, name: str = "client"):
    from cryptography import x509

    return x509.load_pem_x509_certificate((kit / "startup" / f"{name}.crt").read_bytes())


def refusal(call, *arguments, **named) -> str:
    with pytest.raises(UserError) as error:
        call(*arguments, **named)
    return str(error.value)


def test_kit_of_each_kind_tells_who_it_is_of_and_where_the_server_is(made):
    server, site, admin = read_kit(made / SERVER, SERVER), read_kit(made / "a", SITE), read_kit(made / ADMIN, ADMIN)
    assert (server.sites, site.sites, site.name, admin.name) == (("a", "b"), (), "a", kits.ADMIN_NAME)
    for kit in (server, site, admin):
        assert (kit.federation, kit.host, kit.port) == ("federation", "fl.example.org", 9000)
        assert abs(kit.expires - datetime.now(UTC) - timedelta(days=30)) < timedelta(minutes=10)
    assert site.describe() == ("site a of federation at fl.example.org:9000; its certificate ends on "
                               f"{site.expires:%Y-%m-%d}")


def test_private_keys_are_readable_by_their_owner_alone_and_the_authoritys_is_in_no_kit(made):
    keys = sorted(str(path.relative_to(made)) for path in made.rglob("*.key"))
    assert keys == ["a/startup/client.key", "admin/startup/client.key", "b/startup/client.key", "ca/rootCA.key",
                    "server/startup/server.key"]
    assert {stat.S_IMODE((made / key).stat().st_mode) for key in keys} == {0o600}
    authority = (made / "ca" / "rootCA.key").read_bytes()
    assert not [path for path in made.rglob("*") if path.is_file() and path.name != "rootCA.key"
                and authority in path.read_bytes()]


def test_site_certificate_can_neither_sign_others_nor_pass_for_a_server(made):
    from cryptography import x509

    extensions = certificate(made / "a").extensions
    assert not extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert not extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign
    assert list(extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [
        x509.oid.ExtendedKeyUsageOID.CLIENT_AUTH]


@pytest.mark.parametrize(("host", "kind"), [("localhost", "DNSName"), ("192.0.2.7", "IPAddress")])
def test_server_certificate_names_the_host_in_the_way_tls_expects(host, kind, tmp_path):
    from cryptography import x509

    provision(["a", "b"], host, tmp_path)
    names = certificate(tmp_path / SERVER, "server").extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert [str(value) for value in names.value.get_values_for_type(getattr(x509, kind))] == [host]
    context = ssl.create_default_context(cafile=tmp_path / "a" / "startup" / "rootCA.pem")
    context.load_cert_chain(tmp_path / SERVER / "startup" / "server.crt", tmp_path / SERVER / "startup" / "server.key")


def test_later_site_gets_a_kit_of_the_same_authority_and_others_stay_as_they_were(copied):
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    assert provision(["a", "c"], None, copied) == ["c"]
    assert read_kit(copied / "c", SITE).port == 9000
    assert read_kit(copied / SERVER, SERVER).sites == ("a", "b", "c")
    changed = {str(path.relative_to(copied)) for path, content in before.items() if path.read_bytes() != content}
    assert changed == {"ca/federation.json", "server/startup/federation.json"}
    assert provision(["a", "b", "c"], None, copied) == []


def test_kit_that_was_handed_over_is_not_made_again(copied):
    shutil.rmtree(copied / "a")
    assert provision(["a", "b"], None, copied) == []
    assert not (copied / "a").exists()


def test_site_that_sends_a_request_keeps_its_private_key(copied, tmp_path):
    mine = tmp_path / "kit-c"
    request = request_certificate("c", mine)
    assert request == mine / "c.csr"
    assert mine.stat().st_mode & 0o077 == 0
    assert b"PRIVATE" not in request.read_bytes()
    assert provision(["c"], None, copied, requests=mine) == ["c"]
    assert not (copied / "c" / "startup" / "client.key").exists()
    assert refusal(read_kit, copied / "c", SITE) == (
        f"--kit is {copied}/c, whose file startup/client.key is missing: copy the files of the kit into the folder in "
        "which federate.py provision --csr made the key")
    shutil.copytree(copied / "c", mine, dirs_exist_ok=True)
    assert read_kit(mine, SITE).name == "c"
    assert refusal(request_certificate, "c", mine).startswith(
        f"--outdir={mine} has a private key, {mine}/startup/client.key; choose a new folder")


def test_request_of_another_name_than_its_file_is_refused(copied, tmp_path):
    request_certificate("c", tmp_path / "c").rename(tmp_path / "d.csr")
    assert refusal(provision, ["d"], None, copied, requests=tmp_path) == (
        f"{tmp_path}/d.csr is a request of 'c'; expected one of 'd', as the file is named")
    (tmp_path / "d.csr").write_text("nothing")
    assert "is not a request for a certificate" in refusal(provision, ["d"], None, copied, requests=tmp_path)
    assert not (copied / "d").exists()


@pytest.mark.parametrize(("sites", "server", "message"), [
    ("a", "h", "--sites=a is one site; expected two or more: the mean of one site's networks is that site's networks, "
               "which would then be given away. To add a site, give the --outdir of its federation, with the folder "
               "ca"),
    ("a,b.c", "h", "--sites names a site 'b.c'; expected at most 64 letters, digits, '_' and '-', starting with a "
                   "letter or digit"),
    ("a,A", "h", "--sites=a,A names two sites A; expected different names, also without regard to case"),
    ("a,Server", "h", "--sites names a site 'Server', which stands for something else; choose another name"),
    ("a,server_job", "h", "--sites names a site 'server_job', which stands for something else; choose another name"),
    ("a,b", None, "--server is missing; expected the host name or IPv4 address of the server"),
    ("a,b", "h:8002", "--server is h:8002; expected a host name or IPv4 address at which sites reach the server, "
                      "without a port"),
    ("a,b", "1.2.3", "--server is 1.2.3; expected a host name or IPv4 address at which sites reach the server, without "
                     "a port"),
    ("a,b", "0.0.0.0", "--server is 0.0.0.0; expected a host name or IPv4 address at which sites reach the server, "
                       "without a port")])
def test_federation_that_cannot_work_is_refused_and_nothing_is_made(sites, server, message, tmp_path):
    assert refusal(provision, sites.split(","), server, tmp_path / "kits") == message
    assert not (tmp_path / "kits").exists()


def test_other_facts_than_before_are_refused(copied):
    assert refusal(provision, ["c"], "other.org", copied) == (
        f"--server is other.org, but the federation in --outdir={copied} has fl.example.org; leave --server out, or "
        "choose a new folder for a new federation")
    assert "--port is 1, but" in refusal(provision, ["c"], None, copied, port=1)


def test_folder_with_kits_of_an_unknown_authority_is_refused(copied):
    shutil.rmtree(copied / "ca")
    assert refusal(provision, ["a", "b"], "h", copied) == (
        f"--outdir={copied} has a folder server, which is not a kit of this federation; choose a new folder, or remove "
        "it")


def test_kit_of_another_kind_and_other_folders_are_refused(made, tmp_path):
    assert refusal(read_kit, made / ADMIN, SITE) == (
        f"--kit is {made}/admin, the kit of an admin; expected that of a site")
    assert refusal(read_kit, tmp_path, SERVER) == (
        f"--kit is {tmp_path}, which is not a kit; expected the folder of a server, made by federate.py provision")


def test_certificate_of_another_federation_is_refused(copied, tmp_path):
    provision(["a", "b"], "fl.example.org", tmp_path / "other")
    shutil.copy(tmp_path / "other" / "a" / "startup" / "rootCA.pem", copied / "a" / "startup" / "rootCA.pem")
    assert refusal(read_kit, copied / "a", SITE) == (
        f"--kit is {copied}/a, whose certificate startup/client.crt was not issued by its authority "
        "startup/rootCA.pem: get a new kit from whoever provisions the federation")


def test_key_or_name_that_is_not_the_certificates_is_refused(copied):
    shutil.copy(copied / "b" / "startup" / "client.key", copied / "a" / "startup" / "client.key")
    assert "whose private key startup/client.key is not that of its certificate" in refusal(
        read_kit, copied / "a", SITE)
    shutil.copy(copied / "b" / "startup" / "client.crt", copied / "a" / "startup" / "client.crt")
    assert "whose certificate is that of 'b', not of 'a'" in refusal(read_kit, copied / "a", SITE)


def test_certificate_that_ended_is_refused(copied, monkeypatch):
    end = read_kit(copied / "a", SITE).expires

    class Later(datetime):
        @classmethod
        def now(cls, tz=None):
            return end + timedelta(seconds=1)

    monkeypatch.setattr(kits, "datetime", Later)
    assert refusal(read_kit, copied / "a", SITE) == (
        f"--kit is {copied}/a, whose certificate ended on {end:%Y-%m-%d}: get a new kit from whoever provisions the "
        "federation")


def test_site_is_revoked_and_readmitted_in_the_file_that_nvflare_reads(copied, capsys):
    command = ["revoke", f"--kit={copied / SERVER}", "--site=b"]
    assert run(federate.main, command) == 0
    assert json.loads((copied / SERVER / "disabled_clients.json").read_text()) == {"disabled_clients": ["b"]}
    assert run(federate.main, [*command, "--readmit"]) == 0
    assert read_revoked(copied / SERVER) == []
    assert run(federate.main, [*command, "--readmit"]) == 2
    assert capsys.readouterr().err == "error: --site is b, which is not a revoked site; expected one of: none\n"
    assert run(federate.main, ["revoke", f"--kit={copied / SERVER}", "--site=x"]) == 2
    assert capsys.readouterr().err == (
        "error: --site is x, which is not a site of this federation; expected one of: a, b\n")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"disabled_clients": 1}', '{"disabled_clients": [1]}'])
def test_damaged_list_of_revoked_sites_is_not_overwritten(copied, capsys, content):
    file = copied / SERVER / "disabled_clients.json"
    file.write_text(content)
    with pytest.raises(ValueError):
        read_revoked(copied / SERVER)
    assert run(federate.main, ["revoke", f"--kit={copied / SERVER}", "--site=b"]) == 2
    assert capsys.readouterr().err == (
        f"error: {file} is damaged; expected the list of revoked sites: restore it from a backup, or remove it and "
        "revoke each site again\n")
    assert file.read_text() == content


def test_missing_package_gives_advice(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert refusal(read_kit, tmp_path, SITE) == (
        "federated training over a network needs the package nvflare, which is not installed: "
        'pip install -e ".[federated]"')


def test_command_makes_the_kits_and_says_what_stays(tmp_path, capsys):
    assert run(federate.main, ["provision", "--sites=a, b", "--server=localhost", f"--outdir={tmp_path}"]) == 0
    assert capsys.readouterr().out == f"{tmp_path}: made server, admin, a and b; folder ca stays here\n"
    assert run(federate.main, ["provision", "--csr", "--sites=c", "--server=h", f"--outdir={tmp_path}"]) == 2
    assert capsys.readouterr().err == (
        "error: --csr is given with --server; expected --csr --sites=NAME --outdir=DIR alone, at the site\n")


@pytest.mark.parametrize(("flags", "reason"), [
    (["--holdout=none.zip"], "none.zip"), (["--valid=none.zip"], "none.zip"),
    (["--detector-weights=w.pt"], "--detector-weights is given without --holdout; expected images that metrics compare "
                                  "with: add --holdout=SET, or leave --detector-weights out")])
def test_server_with_data_sets_that_cannot_be_used_does_not_start(copied, tmp_path, monkeypatch, capsys, flags, reason):
    monkeypatch.setattr("federated.deployment.processes.run_server", lambda *_: pytest.fail("it starts"))
    assert run(federate.main, ["server", f"--kit={copied / SERVER}", f"--outdir={tmp_path / 'runs'}", *flags]) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ")
    assert reason in text
