"""What server and site check before they start: the other side's certificate, the port, and who else uses the kit."""

import socket
import ssl
import threading
from contextlib import contextmanager

import pytest

from dnnlib.cli import UserError
from dnnlib.process_lock import ProcessLock
from federated.deployment.job import ServerSettings
from federated.deployment.kits import ADMIN, SERVER, SITE, provision, read_kit

pytest.importorskip("nvflare", reason="the processes are NVIDIA FLARE's, of the extra federated")


@contextmanager
def listening(kit, port):
    """A stand-in for NVIDIA FLARE's server: mutual TLS with the certificate of a kit, then HTTP/2's first bytes."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(kit / "startup" / "server.crt", kit / "startup" / "server.key")
    context.load_verify_locations(kit / "startup" / "rootCA.pem")
    context.verify_mode = ssl.CERT_REQUIRED

    def answer():
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:  # closed
                return
            try:
                with context.wrap_socket(connection, server_side=True) as secure:
                    secure.sendall(b"\x00")
            except OSError:
                connection.close()

    with socket.create_server(("127.0.0.1", port)) as listener:
        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        yield
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(5)


@pytest.fixture
def port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def made(tmp_path, port):
    """Folders of two federations whose server would be the same."""
    for name in ("one", "other"):
        provision(["a", "b"], "localhost", tmp_path / name, port=port)
    return tmp_path


def test_site_accepts_the_server_of_its_federation_and_waits_when_there_is_none(made):
    from federated.deployment.processes import probe_server

    kit = read_kit(made / "one" / "a", SITE)
    assert probe_server(kit) == "connection refused"
    with listening(made / "one" / SERVER, kit.port):
        assert probe_server(kit) is None


def test_site_refuses_the_server_of_another_federation(made):
    from federated.deployment.processes import probe_server

    kit = read_kit(made / "one" / "a", SITE)
    with listening(made / "other" / SERVER, kit.port), pytest.raises(UserError) as error:
        probe_server(kit)
    assert str(error.value).startswith(
        f"the server localhost:{kit.port} is not that of this kit: its certificate is not valid here (")


def test_server_refuses_a_port_and_a_kit_that_are_in_use(made, tmp_path):
    from federated.deployment.processes import run_server

    kit = read_kit(made / "one" / SERVER, SERVER)
    settings = ServerSettings(outdir=str(tmp_path / "runs"), sites=kit.sites)
    with socket.create_server(("127.0.0.1", kit.port)), pytest.raises(UserError) as error:
        run_server(kit, settings)
    assert str(error.value).startswith(f"port {kit.port} of this machine is not free (")
    with ProcessLock(kit.path / ".lock"), pytest.raises(UserError) as error:
        run_server(kit, settings)
    assert str(error.value).startswith(f"--kit={kit.path} is in use by process ")


def test_admin_of_another_federation_is_told_whose_certificate_is_refused(made):
    from federated.deployment.processes import probe_server

    kit = read_kit(made / "one" / "admin", ADMIN)
    own, other = (made / name / SERVER / "startup" / "rootCA.pem" for name in ("one", "other"))
    own.write_bytes(other.read_bytes())  # the server trusts the other authority only, the admin the server's own
    with listening(made / "one" / SERVER, kit.port), pytest.raises(UserError) as error:
        probe_server(kit)
    assert str(error.value).startswith(f"the server localhost:{kit.port} refuses the certificate of admin "
                                       "admin@federation.local (")
