"""What a running federation refuses: connections without its certificates, jobs with code, and hostile sites."""

import json
import shutil
import socket
import ssl
from types import SimpleNamespace

import pytest

from federated.deployment.job import StartRequest, write_job
from federated.deployment.kits import ADMIN_NAME
from federated.deployment.processes import probe_server
from tests.helpers.deployments import SITES, federate, running
from tests.helpers.hostile_sites import ROUNDS

pytest.importorskip("nvflare", reason="the deployment needs the extra federated")
pytestmark = pytest.mark.slow

HOSTILE = "import sys\nif 'job' in sys.orig_argv:\n    from tests.helpers.hostile_sites import become_hostile\n" \
          "    become_hostile()\n"


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    """A federation of which site c is hostile."""
    folder = tmp_path_factory.mktemp("federation")
    (folder / "python").mkdir()
    (folder / "python" / "sitecustomize.py").write_text(HOSTILE)
    with running(folder) as federation:
        federation.start_server()
        for name in SITES:
            federation.start_site(name, until="", environment={"PYTHONPATH": str(folder / "python")} if name == "c"
                                  else None)
        for name in SITES:
            federation.programs[name].wait_for("connected to the server")
        yield federation


def test_hostile_updates_are_refused_with_a_reason_and_the_round_goes_on(federation):
    federation.start_run("attacked", f"--rounds={len(ROUNDS)}")
    federation.wait_for_state("attacked", "finished", 300)
    log = federation.log_of("attacked")
    reasons = {}
    for line in log.splitlines():
        where, found, reason = line.partition(": the update of c is refused: ")
        if found:
            reasons[ROUNDS[int(where.rsplit(" ", 1)[-1]) - 1]] = reason
    assert list(reasons) == list(ROUNDS)
    assert reasons["not finite"].endswith("has values that are not finite")
    assert reasons["extra tensor"] == 'the tensor "G.extra" is not among those that were agreed'
    assert "has the shape [3]; expected" in reasons["another shape"]
    assert reasons["JSON"].startswith("it is not in the safetensors format")
    assert "Ann" not in log
    assert "the update of a is refused" not in log
    assert "the update of b is refused" not in log
    assert f"finished after {len(ROUNDS)} rounds" in log


def is_closed(secure):
    try:
        return secure.recv(1) == b""
    except (ssl.SSLError, ConnectionError):
        return True


def test_connection_without_certificate_is_refused(federation):
    context = ssl.create_default_context(cafile=federation.folder / "kits" / "a" / "startup" / "rootCA.pem")
    context.set_alpn_protocols(["h2"])
    with (socket.create_connection(("localhost", federation.port), timeout=10) as plain,
          context.wrap_socket(plain, server_hostname="localhost") as secure):
        # In TLS 1.3 the handshake succeeds on our side; a server that lets us in would send HTTP/2's settings.
        assert is_closed(secure)
    with socket.create_connection(("localhost", federation.port), timeout=10) as plain:
        plain.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert b"HTTP/1" not in plain.recv(1000)


def test_kit_of_another_federation_with_the_same_names_is_refused(federation, tmp_path):
    federate("provision", "--sites=a,b,c", "--server=localhost", f"--port={federation.port}", "--outdir=kits",
             cwd=tmp_path)
    done = federate("site", "--kit=kits/a", f"--data={federation.folder / 'a.zip'}", cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert (f"the server localhost:{federation.port} is not that of this kit: its certificate is not valid here"
            in done.stderr)
    # One that trusts the server's authority, but has a certificate of its own.
    startup = tmp_path / "kits" / "a" / "startup"
    shutil.copy(federation.folder / "kits" / "a" / "startup" / "rootCA.pem", startup / "rootCA.pem")
    kit = SimpleNamespace(path=tmp_path / "kits" / "a", host="localhost", port=federation.port, name="a")
    assert probe_server(kit) == "it closes the connection, as if it did not accept this kit"
    kit.path = federation.folder / "kits" / "a"
    assert probe_server(kit) is None


def test_job_with_code_or_another_class_does_not_run(federation, tmp_path):
    from nvflare.fuel.flare_api.flare_api import new_secure_session

    kit, mark = federation.folder / "kits" / "admin", tmp_path / "it-ran"
    code = f"from pathlib import Path\nPath({str(mark)!r}).touch()\n"

    def job(name, change):
        folder = tmp_path / name
        folder.mkdir()
        write_job(folder, StartRequest(name=name))
        change(folder)
        return folder

    def bring_code(folder):
        (folder / "app" / "custom").mkdir()
        (folder / "app" / "custom" / "x.py").write_text(code)

    def name_class(folder):
        file = folder / "app" / "config" / "config_fed_client.json"
        found = json.loads(file.read_text())
        found["executors"][0]["executor"] = {"path": "subprocess.Popen", "args": {"args": ["touch", str(mark)]}}
        file.write_text(json.dumps(found))

    session = new_secure_session(ADMIN_NAME, str(kit), timeout=30)
    try:
        for name, change in (("code", bring_code), ("class", name_class)):
            try:
                number = session.submit_job(str(job(name, change)))
                session.monitor_job(number, timeout=60)
                state = session.get_job_meta(number)["status"]
            except Exception as error:  # whichever NVIDIA FLARE raises
                state = f"refused: {error}"
            assert state.startswith(("refused", "FINISHED:"))
            assert state != "FINISHED:COMPLETED"
            assert not mark.exists()
    finally:
        session.close()
