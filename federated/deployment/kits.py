"""Start-up kits: a folder for the server, each site and the admin, with what each needs to know and trust the others.

`federate.py provision` is a certificate authority of its own (with NVIDIA FLARE's provisioner): each kit holds a
certificate that it has signed, the certificate's private key, and the authority's certificate, by which each side
recognizes the other. The authority's private key stays in the folder "ca", with whoever provisions.

With `--csr` no private key leaves the machine that uses it:

1. a site makes kit-a/startup/client.key and kit-a/a.csr:  federate.py provision --csr --sites=a --outdir=kit-a
2. whoever provisions signs FOLDER/*.csr; these kits come without a private key:
   federate.py provision --sites=a,b,c --server=HOST --requests=FOLDER --outdir=kits
3. the site copies the files of kits/a into kit-a, where its private key is:  cp -r kits/a/. kit-a
"""

import functools
import importlib.util
import ipaddress
import json
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from dnnlib.cli import UserError, check_outdir
from dnnlib.files import atomic_write
from dnnlib.process_lock import ProcessLock
from dnnlib.text import listed_with_and

SERVER, SITE, ADMIN = "server", "site", "admin"  # the kinds of kits
CA = "ca"  # folder of the authority
SERVER_JOB = "server_job"  # how NVIDIA FLARE calls the sender of a job's messages at the server
PORT = 8002  # NVIDIA FLARE's; sites and admins use the same
DAYS = 360  # validity of certificates; NVIDIA FLARE's
FEDERATION = "federation"
ADMIN_NAME = "admin@federation.local"  # NVIDIA FLARE wants an address
ORG = "federation"
DISABLED_FILE = "disabled_clients.json"  # in the server's kit, where NVIDIA FLARE's server keeps it
_FACTS = "federation.json"  # in a kit's folder "startup", and in the folder of the authority
_BASENAME = {SERVER: "server", SITE: "client", ADMIN: "client"}  # of a kit's certificate and key
_SITE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?)*")
_FEDERATION_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


@dataclass(frozen=True, kw_only=True)
class Federation:
    """What all kits of a federation agree on."""

    federation: str
    host: str  # of the server, as sites and admins reach it
    port: int
    sites: tuple[str, ...]  # in the order of `provision --sites`; known to the server and whoever provisions


@dataclass(frozen=True, kw_only=True)
class Kit:
    """A kit whose certificate and key were checked."""

    kind: str  # SERVER, SITE or ADMIN
    name: str
    federation: str
    host: str
    port: int
    path: Path  # absolute
    sites: tuple[str, ...]  # of a server; others know none
    expires: datetime  # end of the certificate, or of the authority's

    def describe(self) -> str:
        """Return a line about the kit."""
        who = f"{self.kind} {self.name}" if self.kind == SITE else self.kind
        return (f"{who} of {self.federation} at {self.host}:{self.port}; its certificate ends on "
                f"{self.expires:%Y-%m-%d}")


def require_nvflare() -> None:
    """Raise UserError unless NVIDIA FLARE is installed."""
    if importlib.util.find_spec("nvflare") is None:
        raise UserError("federated training over a network needs the package nvflare, which is not installed: "
                        'pip install -e ".[federated]"')


# Making kits


def provision(sites: Sequence[str], server: str | None, outdir: Path, *, port: int | None = None,
              name: str | None = None, days: int = DAYS, requests: Path | None = None) -> list[str]:
    """Make the kits of a federation in `outdir`, or of further sites of one that was made there; return their names.

    sites:     names of sites; those that have kits are left alone
    server:    host name or IPv4 address at which sites and admin reach the server; None = as before
    port:      of the server; None = as before, or PORT
    name:      of the federation; None = as before, or FEDERATION
    days:      validity of the certificates, which end with that of the authority
    requests:  folder with NAME.csr for sites that keep their private key

    Raises UserError for what cannot be provisioned; no existing file is overwritten, but the server's list of sites.
    """
    require_nvflare()
    check_outdir(str(outdir))
    before = _read_authority(outdir)
    wanted = _check_sites(sites, () if before is None else before.sites)
    given = Federation(federation=name or "", host=server or "", port=port or 0, sites=wanted)
    federation = _settle(before, given, outdir)
    if days < 1:
        raise UserError(f"--days is {days}; expected a positive number of days")
    new = [each for each in federation.sites if before is None or each not in before.sites]
    signing = _read_requests(requests, new)
    made = [*((SERVER, ADMIN) if before is None else ()), *new]
    for each in made:
        if (outdir / each).exists():
            raise UserError(f"--outdir={outdir} has a folder {each}, which is not a kit of this federation; choose a "
                            "new folder, or remove it")
    outdir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=outdir, prefix=".tmp-") as work:  # readable by this user alone
        authority = _load_authority(outdir, federation, days)
        built = _build(Path(work), federation, new, authority, days, signing)
        _save_facts(outdir / CA / _FACTS, federation)
        for each in made:
            (built / each).chmod(0o700)
            os.rename(built / each, outdir / each)
    if (outdir / SERVER).is_dir():
        _save_facts(outdir / SERVER / "startup" / _FACTS, federation, kind=SERVER, name=SERVER)
    return made


def request_certificate(name: str, outdir: Path) -> Path:
    """Make the private key of a site in a kit's folder and return a request for its certificate, NAME.csr.

    Raises UserError when the folder has a private key.
    """
    require_nvflare()
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from nvflare.lighter.utils import generate_keys, serialize_pri_key, x509_name

    _check_site_names([name])
    check_outdir(str(outdir))
    key, _ = generate_keys()
    path = outdir / "startup" / "client.key"
    outdir.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.parent.mkdir(exist_ok=True)
    try:
        _write_private(path, serialize_pri_key(key))
    except FileExistsError as error:
        raise UserError(f"--outdir={outdir} has a private key, {path}; choose a new folder, or send the request that "
                        "was made with it") from error
    request = x509.CertificateSigningRequestBuilder().subject_name(x509_name(name, ORG)).sign(key, hashes.SHA256())
    file = outdir / f"{name}.csr"
    with atomic_write(file) as opened:
        opened.write(request.public_bytes(serialization.Encoding.PEM))
    return file


def _check_sites(given: Sequence[str], before: Sequence[str]) -> tuple[str, ...]:
    """Return the names of all sites, in order; raises UserError."""
    _check_site_names(given)
    names = (*before, *(each for each in given if each not in before))
    _check_site_names(names)  # those that differ in case only
    if len(names) < 2:
        raise UserError(f"--sites={','.join(given)} is one site; expected two or more: the mean of one site's networks "
                        "is that site's networks, which would then be given away. To add a site, give the --outdir of "
                        f"its federation, with the folder {CA}")
    return names


def _check_site_names(names: Sequence[str]) -> None:
    from federated.institutions import name_sites  # imports PyTorch, which reading a kit does not need

    name_sites(",".join(names), names)
    for name in names:
        if not _SITE_NAME.fullmatch(name) or len(name) > 64:
            raise UserError(f"--sites names a site {name!r}; expected at most 64 letters, digits, '_' and '-', "
                            "starting with a letter or digit")
        if name.lower() in (SERVER, ADMIN, CA, SITE, SERVER_JOB):
            raise UserError(f"--sites names a site {name!r}, which stands for something else; choose another name")


def _settle(before: Federation | None, given: Federation, outdir: Path) -> Federation:
    """Return the facts of the federation, which are given the first time and stay; raises UserError."""
    flags = {"federation": "--federation", "host": "--server", "port": "--port"}
    if before is not None:
        for field, flag in flags.items():
            value, was = getattr(given, field), getattr(before, field)
            if value and value != was:
                raise UserError(f"{flag} is {value}, but the federation in --outdir={outdir} has {was}; leave {flag} "
                                "out, or choose a new folder for a new federation")
        return replace(before, sites=given.sites)
    if not given.host:
        raise UserError("--server is missing; expected the host name or IPv4 address of the server")
    if not _HOST.fullmatch(given.host) or len(given.host) > 253 or _is_wrong_address(given.host):
        raise UserError(f"--server is {given.host}; expected a host name or IPv4 address at which sites reach the "
                        "server, without a port")
    found = replace(given, federation=given.federation or FEDERATION, port=given.port or PORT)
    if not _FEDERATION_NAME.fullmatch(found.federation):
        raise UserError(f"--federation is {found.federation!r}; expected letters, digits, '_' and '-', starting with a "
                        "letter or digit")
    if not 0 < found.port < 65536:
        raise UserError(f"--port is {found.port}; expected 1 to 65535")
    return found


def _is_wrong_address(host: str) -> bool:
    """Return whether a host looks like an IPv4 address but is none."""
    if not re.fullmatch(r"[0-9.]+", host):
        return False
    try:
        return ipaddress.ip_address(host) == ipaddress.ip_address("0.0.0.0")
    except ValueError:
        return True


def _read_requests(folder: Path | None, sites: Sequence[str]) -> dict[str, Any]:
    """Return the requests (x509.CertificateSigningRequest) of sites; raises UserError."""
    if folder is None:
        return {}
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import rsa

    found = {}
    for file in sorted(folder.glob("*.csr")) if folder.is_dir() else ():
        try:
            request = x509.load_pem_x509_csr(file.read_bytes())
            is_sound = request.is_signature_valid and isinstance(request.public_key(), rsa.RSAPublicKey)
        except ValueError:
            is_sound = False
        if not is_sound:
            raise UserError(f"{file} is not a request for a certificate; expected a file made by federate.py provision "
                            "--csr: ask its site for it again")
        name = _common_name(request)
        if name != file.stem:
            raise UserError(f"{file} is a request of {name!r}; expected one of {file.stem!r}, as the file is named")
        found[name] = request
    missing = [name for name in sites if name not in found]
    if not found or len(missing) == len(sites):
        raise UserError(f"--requests is {folder}, which has no request of {listed_with_and(sites) or 'a new site'}; "
                        "expected NAME.csr, made by federate.py provision --csr at each site")
    return {name: request for name, request in found.items() if name in sites}


def _read_authority(outdir: Path) -> Federation | None:
    file = outdir / CA / _FACTS
    if not file.exists():
        return None
    found = json.loads(file.read_text())
    return Federation(**{**found, "sites": tuple(found["sites"])})


def _save_facts(file: Path, federation: Federation, **more: str) -> None:
    with atomic_write(file, text=True) as opened:
        json.dump({**more, **asdict(federation)}, opened, indent=1)
        opened.write("\n")


def _load_authority(outdir: Path, federation: Federation, days: int) -> tuple[Any, Any]:
    """Return the authority's certificate and private key, made if there are none."""
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization
    from nvflare.lighter.utils import Identity, generate_cert, generate_keys, serialize_cert, serialize_pri_key

    folder = outdir / CA
    key_file, cert_file = folder / "rootCA.key", folder / "rootCA.pem"
    if not cert_file.exists():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        key, public = generate_keys()
        me = Identity(federation.federation)
        cert = generate_cert(me, me, key, public, valid_days=days, ca=True)
        key_file.unlink(missing_ok=True)  # of an attempt that was interrupted: nothing is signed with it
        _write_private(key_file, serialize_pri_key(key))
        with atomic_write(cert_file) as opened:
            opened.write(serialize_cert(cert))
    cert = x509.load_pem_x509_certificate(cert_file.read_bytes())
    key = serialization.load_pem_private_key(key_file.read_bytes(), password=None)
    if cert.not_valid_after_utc <= datetime.now(UTC):
        raise UserError(f"the authority in --outdir={outdir} ended on {cert.not_valid_after_utc:%Y-%m-%d}; provision "
                        "the federation anew in another folder")
    return cert, key


def _write_private(file: Path, content: bytes) -> None:
    """Write a new file that only this user can read; raises FileExistsError."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as opened:
        opened.write(content)
        opened.flush()
        os.fsync(descriptor)


def _build(work: Path, federation: Federation, sites: Sequence[str], authority: tuple[Any, Any], days: int,
           requests: dict[str, Any]) -> Path:
    """Let NVIDIA FLARE build kits of server, admin and sites; return the folder that holds them."""
    import logging

    from nvflare.lighter.constants import AdminRole, CtxKey, PropKey
    from nvflare.lighter.entity import Project
    from nvflare.lighter.impl.static_file import StaticFileBuilder
    from nvflare.lighter.impl.workspace import WorkspaceBuilder
    from nvflare.lighter.provisioner import Provisioner
    from nvflare.lighter.utils import serialize_cert

    cert, key = authority
    project = Project(federation.federation, "", serialized_root_cert=serialize_cert(cert), root_private_key=key)
    # No admin_port: NVIDIA FLARE then uses one port for sites and admins, with mutual TLS for all.
    project.set_server(SERVER, ORG, {PropKey.DEFAULT_HOST: federation.host,
                                     PropKey.FED_LEARN_PORT: federation.port})
    for name in sites:
        project.add_client(name, ORG, {PropKey.ALLOW_LOG_STREAMING: False})
    project.add_admin(ADMIN_NAME, ORG, {PropKey.ROLE: AdminRole.PROJECT_ADMIN})
    builders = [WorkspaceBuilder(), StaticFileBuilder(config_folder="config", scheme="grpc"),
                _certificate_builder()(days, requests)]
    logger = logging.getLogger(__name__)
    context = Provisioner(str(work), builders).provision(project, logger=logger)
    if context.get(CtxKey.BUILD_ERROR):
        raise RuntimeError(f"NVIDIA FLARE could not build the kits: {'; '.join(context.get_errors())}")
    built = Path(context.get_result_location())
    os.rename(built / ADMIN_NAME, built / ADMIN)
    _save_facts(built / ADMIN / "startup" / _FACTS, replace(federation, sites=()), kind=ADMIN, name=ADMIN_NAME)
    for name in sites:
        _save_facts(built / name / "startup" / _FACTS, replace(federation, sites=()), kind=SITE, name=name)
    for each in (SERVER, ADMIN, *sites):
        _remove_unused(built / each)
    return built


def _remove_unused(folder: Path) -> None:
    """Remove what `federate.py` does instead: scripts that start, and local files that are written at each start."""
    for file in [*folder.glob("startup/*.sh"), *folder.glob("startup/*.ipynb"), *folder.glob("local/*.sample"),
                 *folder.glob("local/*.default"), *folder.glob("readme.txt")]:
        file.unlink()
    shutil.rmtree(folder / "transfer", ignore_errors=True)


@functools.cache
def _certificate_builder() -> type:
    """Return the class that writes certificates; a function, as its base is of an optional package."""
    from cryptography import x509
    from nvflare.lighter.constants import ParticipantType, PropKey
    from nvflare.lighter.impl.cert import CertBuilder
    from nvflare.lighter.utils import Identity, generate_cert, generate_keys, serialize_cert

    class Certificates(CertBuilder):
        """Signs certificates that say what they are good for, which NVIDIA FLARE's own leaves open.

        So that a site's certificate can neither sign others nor pass for a server's.
        """

        def __init__(self, days: int, requests: dict[str, Any]):
            super().__init__()
            self._days, self._requests = days, requests

        def get_pri_key_cert(self, participant):
            request = self._requests.get(participant.name)
            key, public = (None, request.public_key()) if request is not None else generate_keys()
            is_server = participant.type == ParticipantType.SERVER
            role = participant.get_prop(PropKey.ROLE) if participant.type == ParticipantType.ADMIN else None
            usage = dict.fromkeys(("content_commitment", "data_encipherment", "key_agreement", "key_cert_sign",
                                   "crl_sign", "encipher_only", "decipher_only"), False)
            uses = x509.oid.ExtendedKeyUsageOID
            end = min(datetime.now(UTC) + timedelta(days=self._days), self.root_cert.not_valid_after_utc)
            cert = generate_cert(
                Identity(participant.subject, participant.org, role), Identity(self.issuer), self.pri_key, public,
                server_default_host=participant.get_default_host() if is_server else None,
                not_valid_after=end, extra_extensions=[
                    (x509.BasicConstraints(ca=False, path_length=None), True),
                    (x509.KeyUsage(digital_signature=True, key_encipherment=True, **usage), True),
                    (x509.ExtendedKeyUsage([uses.SERVER_AUTH, uses.CLIENT_AUTH] if is_server
                                           else [uses.CLIENT_AUTH]), False)])
            return key, cert

        def _build_write_cert_pair(self, participant, base_name, ctx):
            if participant.name not in self._requests:
                super()._build_write_cert_pair(participant, base_name, ctx)
                return
            folder = Path(ctx.get_kit_dir(participant))
            _, cert = self.get_pri_key_cert(participant)
            (folder / f"{base_name}.crt").write_bytes(serialize_cert(cert))
            (folder / "rootCA.pem").write_bytes(self.serialized_cert)

    return Certificates


# Reading kits


def read_kit(path: str | Path, kind: str) -> Kit:
    """Return a kit of a kind; raises UserError unless it is one whose certificate is valid."""
    require_nvflare()
    folder = Path(path).absolute()
    shown = f"--kit is {path}"
    try:
        facts = json.loads((folder / "startup" / _FACTS).read_text())
        kit = Kit(kind=facts["kind"], name=facts["name"], federation=facts["federation"],
                  host=facts["host"], port=facts["port"], path=folder, sites=tuple(facts["sites"]),
                  expires=datetime.max.replace(tzinfo=UTC))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{shown}, which is not a kit; expected the folder of a {kind}, made by federate.py provision"
                        ) from error
    if kit.kind != kind:
        raise UserError(f"{shown}, the kit of {'an' if kit.kind == ADMIN else 'a'} {kit.kind}; expected that of "
                        f"{'an' if kind == ADMIN else 'a'} {kind}")
    return replace(kit, expires=_check_certificate(kit, shown))


def _check_certificate(kit: Kit, shown: str) -> datetime:
    """Return when the certificate of a kit ends; raises UserError unless it is valid, its own and of its authority."""
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import serialization

    startup = kit.path / "startup"
    base = _BASENAME[kit.kind]
    found = {}
    for name in (f"{base}.crt", "rootCA.pem", f"{base}.key"):
        try:
            content = (startup / name).read_bytes()
        except FileNotFoundError as error:
            advice = ("copy the files of the kit into the folder in which federate.py provision --csr made the key"
                      if name.endswith(".key") else "get the kit from whoever provisions the federation")
            raise UserError(f"{shown}, whose file startup/{name} is missing: {advice}") from error
        try:
            found[name] = (serialization.load_pem_private_key(content, password=None) if name.endswith(".key")
                           else x509.load_pem_x509_certificate(content))
        except (ValueError, TypeError) as error:
            raise UserError(f"{shown}, whose file startup/{name} is damaged; get the kit from whoever provisions the "
                            "federation") from error
    cert, root, key = found.values()
    again = "get a new kit from whoever provisions the federation"
    try:
        cert.verify_directly_issued_by(root)
    except (InvalidSignature, ValueError, TypeError) as error:
        raise UserError(f"{shown}, whose certificate startup/{base}.crt was not issued by its authority "
                        f"startup/rootCA.pem: {again}") from error
    if cert.public_key() != key.public_key():
        raise UserError(f"{shown}, whose private key startup/{base}.key is not that of its certificate; use the key "
                        "with which the certificate was requested")
    if _common_name(cert) != kit.name:
        raise UserError(f"{shown}, whose certificate is that of {_common_name(cert)!r}, not of {kit.name!r}: {again}")
    for each, which in ((cert, "certificate"), (root, "authority's certificate")):
        if each.not_valid_after_utc <= datetime.now(UTC):
            raise UserError(f"{shown}, whose {which} ended on {each.not_valid_after_utc:%Y-%m-%d}: {again}")
        if each.not_valid_before_utc > datetime.now(UTC):
            raise UserError(f"{shown}, whose {which} is valid from {each.not_valid_before_utc:%Y-%m-%d %H:%M} UTC; set "
                            "the clock of this machine")
    return min(cert.not_valid_after_utc, root.not_valid_after_utc)


def _common_name(signed: Any) -> str:
    """Return the name in a certificate or a request; empty if there is none."""
    from cryptography.x509.oid import NameOID

    found = signed.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return found[0].value if len(found) == 1 else ""


# Revoked sites


def read_revoked(kit: Path) -> list[str]:
    """Return the names of the sites that a server refuses, although their certificates are valid.

    Raises ValueError if the file is damaged.
    """
    file = kit / DISABLED_FILE
    if not file.exists():
        return []
    content = json.loads(file.read_text())
    found = content.get("disabled_clients") if isinstance(content, dict) else None
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise ValueError(f"{file} is not a list of disabled_clients")
    return found


def changing_revoked(kit: Path) -> AbstractContextManager[None]:
    """Return the context in which the list of a server's kit is read and written, by one process at a time."""
    return ProcessLock.beside(kit / DISABLED_FILE).awaited("waiting for {holder}, which changes the list")


def revoke_site(kit: Kit, name: str, *, readmit: bool = False) -> None:
    """Let a server refuse a site, or accept it again; one that runs does so within seconds.

    Raises UserError if there is no such site, or nothing to change.
    """
    with changing_revoked(kit.path):
        _change_revoked(kit, name, readmit)


def _change_revoked(kit: Kit, name: str, readmit: bool) -> None:
    try:
        revoked = read_revoked(kit.path)
    except ValueError as error:
        raise UserError(f"{kit.path / DISABLED_FILE} is damaged; expected the list of revoked sites: restore it from a "
                        "backup, or remove it and revoke each site again") from error
    if name not in (revoked if readmit else kit.sites):
        known = ", ".join(revoked if readmit else kit.sites) or "none"
        what = "a revoked site" if readmit else "a site of this federation"
        raise UserError(f"--site is {name}, which is not {what}; expected one of: {known}")
    changed = set(revoked) - {name} if readmit else {*revoked, name}
    with atomic_write(kit.path / DISABLED_FILE, text=True) as opened:  # in the form of NVIDIA FLARE's server
        json.dump({"disabled_clients": sorted(changed)}, opened, indent=2)
