"""What the server and each site permit: NVIDIA FLARE's configuration in a kit.

Each machine's own program writes it anew at each start, so that neither whoever provisions nor who starts runs can
weaken it; a kit with other files, which NVIDIA FLARE would read as well, is refused.

fed_*.json          in the folder "startup": where the server is, mutual TLS, only jobs signed by an admin
log_config.json     log.txt in the kit
comm_config.json    in the kit itself: how soon a broken connection is noticed
resources.json      components of the machine itself, and the only classes that a job may build there
privacy.json        at sites: the filter that all results pass before they leave, in the only scope that there is
authorization.json  what an admin may do: start, stop and look at runs; never bring code, run shell commands or read
                    files of a site
"""

import json
from pathlib import Path
from typing import Any

from dnnlib.cli import UserError
from dnnlib.files import TEMPORARY, atomic_write
from federated.deployment.job import (
    CONTROLLER,
    EXECUTOR,
    FILTER,
    RELAUNCHER,
    SERVER_FILE,
    SITE_FILE,
    ServerSettings,
    SiteSettings,
    save_settings,
)
from federated.deployment.kits import SERVER, Kit

HEARTBEAT_SECONDS = 5  # between signs of life of a site
_NO_PROGRESS_SECONDS = 30.0  # of a message, after which it counts as lost
_PING_SECONDS = 15.0  # between two pings of a connection, and without an answer, after which it is made anew
LOG_BYTES, LOG_FILES = 10_000_000, 5  # of log.txt, before it starts anew, and how many older ones are kept
_NVFLARE = "nvflare.app_common"
_STOP = "federated.deployment.nvflare_process.StopOnSignal"
_GUARD = "federated.deployment.nvflare_process.MessageGuard"
_SERVER_RIGHTS = ("submit_job", "abort_job", "list_jobs", "list_job", "get_job_meta", "get_job_log", "app_command",
                  "check_status", "report_version", "remove_client", "disable_client", "enable_client")
_SITE_RIGHTS = ("submit_job", "abort_job", "abort", "check_status", "report_version")
# Rights that NVIDIA FLARE gives by category if they are not named; "none" states what is refused.
_REFUSED = ("byoc", "server-predeployed-flwr", "shell_commands", "clone_job", "download_job", "delete_job",
            "delete_workspace", "configure_job_log", "configure_site_log", "sys_info", "report_resources", "report_env",
            "show_errors", "reset_errors", "show_stats", "call", "restart", "shutdown", "set_timeout")


def write_server_policy(kit: Kit, settings: ServerSettings) -> None:
    """Write the server's settings and what it permits; raises UserError if the kit holds other files."""
    _refuse_other_files(kit)
    _write_connection(kit)
    server = {"admin_storage": "transfer", "max_num_clients": max(len(settings.sites), 1),
              "heart_beat_timeout": settings.site_timeout, "admin_timeout": 10.0}
    components = [
        # A run waits for the first site without end, and then for at most half a minute.
        _component("job_scheduler", f"{_NVFLARE}.job_schedulers.job_scheduler.DefaultJobScheduler", max_jobs=1,
                   max_schedule_count=1_000_000_000, min_schedule_interval=2.0, max_schedule_interval=30.0),
        _component("job_manager", "nvflare.apis.impl.job_def_manager.SimpleJobDefManager",
                   uri_root=str(kit.path / "jobs"), job_store_id="job_store"),
        _component("job_store", f"{_NVFLARE}.storages.filesystem_storage.FilesystemStorage"),
        _component("process_launcher", f"{_NVFLARE}.job_launcher.server_process_launcher.ServerProcessJobLauncher"),
        _component("relauncher", RELAUNCHER), _component("stop_on_signal", _STOP),
        _component("message_guard", _GUARD)]
    storage = {"path": f"{_NVFLARE}.storages.filesystem_storage.FilesystemStorage",
               "args": {"root_dir": str(kit.path / "snapshots"), "uri_root": "/"}}
    _write(kit.path / "local" / "resources.json", {
        **_allow(CONTROLLER), "servers": [server], "components": components,
        "snapshot_persistor": {"path": f"{_NVFLARE}.state_persistors.storage_state_persistor.StorageStatePersistor",
                               "args": {"uri_root": "/", "storage": storage}}})
    _write(kit.path / "local" / "authorization.json", _authorize(_SERVER_RIGHTS))
    save_settings(kit.path, settings)


def write_site_policy(kit: Kit, settings: SiteSettings) -> None:
    """Write the site's settings and what it permits; raises UserError if the kit holds other files."""
    _refuse_other_files(kit)
    _write_connection(kit)
    components = [
        _component("resource_manager", f"{_NVFLARE}.resource_managers.gpu_resource_manager.GPUResourceManager",
                   num_of_gpus=0, mem_per_gpu_in_GiB=0),
        _component("resource_consumer", f"{_NVFLARE}.resource_consumers.gpu_resource_consumer.GPUResourceConsumer"),
        _component("process_launcher", f"{_NVFLARE}.job_launcher.client_process_launcher.ClientProcessJobLauncher"),
        _component("stop_on_signal", _STOP)]
    _write(kit.path / "local" / "resources.json", {
        **_allow(EXECUTOR, FILTER), "allow_log_streaming": False, "components": components,
        # An empty site_config: otherwise all other settings of this file are sent to the server.
        # Messages that a broken connection lost are sent again after this time; long ones that progress go on.
        "client": {"retry_timeout": 30, "communication_timeout": _NO_PROGRESS_SECONDS,
                   "maint_msg_timeout": 2 * HEARTBEAT_SECONDS, "compression": "Gzip", "site_config": {}}})
    _write(kit.path / "local" / "privacy.json", {
        "scopes": [{"name": "all", "task_result_filters": [{"path": FILTER, "args": {}, "direction": "out"}]}],
        "default_scope": "all"})
    _write(kit.path / "local" / "authorization.json", _authorize(_SITE_RIGHTS))
    save_settings(kit.path, settings)


def _component(name: str, path: str, **arguments: Any) -> dict[str, Any]:
    return {"id": name, "path": path, "args": arguments}


def _allow(*classes: str) -> dict[str, Any]:
    """Return the settings by which a job, which ships no code, may build these classes and no others."""
    return {"format_version": 2, "class_list_enforcement_mode": "enforce", "class_allow_list": list(classes)}


def _authorize(rights: tuple[str, ...]) -> dict[str, Any]:
    """Return a policy that gives rights to the admin of `federate.py provision`, and none to anybody else."""
    given = {**dict.fromkeys(_REFUSED, "none"), **dict.fromkeys(rights, "any")}
    return {"format_version": "1.0", "permissions": {"project_admin": given}}


def _write(file: Path, content: dict[str, Any]) -> None:
    file.parent.mkdir(exist_ok=True)
    with atomic_write(file, text=True) as opened:
        json.dump(content, opened, indent=1)
        opened.write("\n")


def _refuse_other_files(kit: Kit) -> None:
    """Raise UserError if a kit holds files in which NVIDIA FLARE would find further components or code."""
    allowed = {"startup": {"federation.json", "rootCA.pem", *(
        ("fed_server.json", "server.crt", "server.key") if kit.kind == SERVER
        else ("fed_client.json", "client.crt", "client.key"))},
        "local": {"resources.json", "authorization.json", "privacy.json", "log_config.json", SITE_FILE, SERVER_FILE}}
    for name, files in allowed.items():
        folder = kit.path / name
        for found in folder.iterdir() if folder.is_dir() else ():
            if found.name not in files and not TEMPORARY.fullmatch(found.name):
                raise UserError(f"{found} does not belong to a kit made by federate.py provision; remove it: it could "
                                "bring code or loosen what this machine permits")


def _write_connection(kit: Kit) -> None:
    """Write how to connect, and what is logged."""
    identity = {"ssl_root_cert": "rootCA.pem", "connection_security": "mtls"}
    server = {"name": kit.federation, "service": {"target": f"{kit.host}:{kit.port}", "scheme": "grpc"}}
    signed = {"format_version": 2, "require_signed_jobs": True}
    if kit.kind == SERVER:
        _write(kit.path / "startup" / "fed_server.json", {**signed, "servers": [{
            **server, **identity, "admin_server": SERVER, "admin_port": kit.port, "ssl_private_key": "server.key",
            "ssl_cert": "server.crt"}]})
    else:
        client = {**identity, "ssl_private_key": "client.key", "ssl_cert": "client.crt", "fqsn": kit.name,
                  "is_leaf": True}
        _write(kit.path / "startup" / "fed_client.json",
               {**signed, "servers": [{**server, "identity": SERVER}], "client": client})
    # NVIDIA FLARE takes the first comm_config.json that it finds in the kit: this one, never one that a job brings,
    # which could name a folder with drivers to import.
    milliseconds = round(1000 * _PING_SECONDS)
    _write(kit.path / "comm_config.json", {"grpc": {"options": [
        ["grpc.max_send_message_length", -1], ["grpc.max_receive_message_length", -1],  # NVIDIA FLARE has its own
        ["grpc.keepalive_time_ms", milliseconds], ["grpc.keepalive_timeout_ms", milliseconds],
        ["grpc.keepalive_permit_without_calls", 1], ["grpc.http2.max_pings_without_data", 0],
        ["grpc.http2.min_recv_ping_interval_without_data_ms", milliseconds // 2]]}})
    formatter = {"()": "nvflare.fuel.utils.log_utils.BaseFormatter",
                 "fmt": "%(asctime)s - %(name)s - %(levelname)s - %(fl_ctx)s - %(message)s"}
    console = {"class": "logging.StreamHandler", "formatter": "base", "stream": "ext://sys.stdout"}
    file = {"class": "logging.handlers.RotatingFileHandler", "formatter": "base", "filename": "log.txt", "mode": "a",
            "maxBytes": LOG_BYTES, "backupCount": LOG_FILES}
    formatters, handlers = {"base": formatter}, {"console": console, "logFileHandler": file}
    if kit.kind == SERVER:  # what federated.deployment.admin reads of a job
        formatters["json"] = {"()": "nvflare.fuel.utils.log_utils.JsonFormatter",
                              "fmt": "%(asctime)s - %(name)s - %(fullName)s - %(levelname)s - %(message)s"}
        handlers["jsonFileHandler"] = {**file, "formatter": "json", "filename": "log.json"}
    _write(kit.path / "local" / "log_config.json", {
        "version": 1, "disable_existing_loggers": False, "formatters": formatters, "handlers": handlers,
        "loggers": {"root": {"level": "INFO", "handlers": list(handlers)}}})
