"""What runs in NVIDIA FLARE's own process at the server and at each site, started by `federate.py server` or `site`.

The processes of a site answer no other requests than those that run and end a job, and tell nobody about the machine:
NVIDIA FLARE itself would tell its address, and in answers and texts of errors its paths.
"""

import importlib
import logging
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey, ReturnCode
from nvflare.fuel.f3.cellnet.net_manager import NetManager
from nvflare.fuel.f3.cellnet.utils import make_reply as make_cellnet_reply
from nvflare.fuel.f3.message import Message
from nvflare.fuel.f3.mpm import MainProcessMonitor
from nvflare.fuel.hci.reg import CommandModuleSpec
from nvflare.private.defs import CellChannelTopic, CellMessageHeaderKeys
from nvflare.private.fed.app.utils import version_check

from dnnlib.workers import end_with_parent
from federated.deployment.kits import SERVER, SERVER_JOB, SITE, changing_revoked, read_revoked

_JOB = "job"  # of a site; in the place of the kind of a kit
_MODULES = {SERVER: "nvflare.private.fed.app.server.server_train", SITE: "nvflare.private.fed.app.client.client_train",
            _JOB: "nvflare.private.fed.app.client.worker_process"}
_LOOK_SECONDS = 2
# What the server may ask of a site's process, by NVIDIA FLARE's classes: everything that runs and ends a job. Left out
# are shell commands (ls, cat, tail, grep), questions about the system and its packages, statistics, and changes of the
# log: whether those need a right is decided by the server's message, not by the site's authorization.json.
NEEDED = ("ClientStatusProcessor", "ScopeInfoProcessor", "AbortAppProcessor", "DeployProcessor", "AbortTaskProcessor",
          "StartJobProcessor", "CheckResourceProcessor", "CancelResourceProcessor", "ReportVersionProcessor",
          "NotifyJobStatusProcessor")
# The same for the process of a site's job.
NEEDED_COMMANDS = ("CheckStatusCommand", "AbortCommand", "AbortTaskCommand", "ByeCommand")
WITHHELD = "the site refused or failed; its log tells why"  # instead of texts of errors


class StopOnSignal(FLComponent):
    """Ends the process in order when SIGTERM arrives: a server aborts its jobs, a site takes leave of the server."""

    def __init__(self):
        super().__init__()
        self._engine: Any = None

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Take charge of the signal once the process has started; in the process of a job that never happens."""
        if event_type == EventType.SYSTEM_START and self._engine is None:
            self._engine = fl_ctx.get_engine()
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        threading.Thread(target=self._end, name="stop", daemon=True).start()  # it waits for other threads

    def _end(self) -> None:
        if hasattr(self._engine, "shutdown_server"):
            self._engine.shutdown_server()
            return
        # A sign of life that arrives after the leave would be taken for a return.
        self._engine.client.communicator.heartbeat_done = True
        time.sleep(1)
        self._engine.shutdown()


class MessageGuard(FLComponent):
    """Refuses messages at the server: of sites that were revoked, also while it runs, and from site to site.

    NVIDIA FLARE reads the list of revoked sites when it starts, and lets the job process of a site that is revoked
    later take part in its run: its token remains valid. It also forwards what a site sends to another one, which would
    take it for a request of the server.
    """

    def __init__(self):
        super().__init__()
        self._engine: Any = None

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Begin once the server has started; in the process of a job that never happens."""
        if event_type == EventType.SYSTEM_START and self._engine is None:
            self.install(fl_ctx.get_engine())
            kit = Path(fl_ctx.get_prop(FLContextKey.WORKSPACE_OBJECT).get_root_dir())
            threading.Thread(target=self._follow, args=(kit,), name="revoked sites", daemon=True).start()

    def install(self, engine: Any) -> None:
        """Look at all messages that reach a server's engine, also those that it forwards."""
        self._engine = engine
        engine.server.cell.core_cell.add_incoming_filter(channel="*", topic="*", cb=self._refuse)

    def _refuse(self, message: Message) -> Message | None:
        """Return a refusal, None to let a message pass; the sender's name was verified with its token before."""
        name = message.get_header(CellMessageHeaderKeys.CLIENT_NAME)
        topic = message.get_header(MessageHeaderKey.TOPIC)
        if name is None or name in (SERVER, SERVER_JOB):
            return None
        target = message.get_header(MessageHeaderKey.DESTINATION) or ""
        if target.split(".")[0] != SERVER:
            return _refusal(f"{name} may send to the server only")
        # NVIDIA FLARE refuses the two itself, and tells the site; what is refused here gets no answer.
        if topic in (CellChannelTopic.Register, CellChannelTopic.HEART_BEAT):
            return None
        if self._engine.server.client_manager.is_client_disabled(name):
            return _refusal(f"{name} was revoked")
        return None

    def _follow(self, kit: Path) -> None:
        manager = self._engine.server.client_manager
        while True:
            time.sleep(_LOOK_SECONDS)
            try:
                if set(read_revoked(kit)) != manager.disabled_clients:
                    with changing_revoked(kit):  # NVIDIA FLARE writes the list with each change
                        self._apply(set(read_revoked(kit)), manager)
            except Exception as error:  # whatever it is: without this thread no site can be revoked
                self.logger.error(f"the list of revoked sites could not be applied: {error}")

    def _apply(self, wanted: set[str], manager: Any) -> None:
        """Refuse the sites of a list, and no others."""
        for name in wanted - manager.disabled_clients:
            clients = [each for each in [*manager.get_clients().values()] if each.name == name]
            self._engine.disable_clients([name])
            for client in clients:  # their runs go on without them
                self._engine.server.notify_dead_client(client)
        back = [*(manager.disabled_clients - wanted)]
        if back:
            self._engine.enable_clients(back)


def _refusal(why: str) -> Message:
    return make_cellnet_reply(ReturnCode.UNAUTHENTICATED, error=why)


def limit_commands() -> None:
    """Let a server take no commands that act on its network, such as stop_net: they need no right."""
    NetManager.get_spec = lambda self: CommandModuleSpec(name="cellnet", cmd_specs=[])


def limit_site() -> None:
    """Let a process of a site answer NEEDED and NEEDED_COMMANDS alone, and tell nothing of its machine."""
    from nvflare.app_common.job_launcher import client_process_launcher
    from nvflare.private.fed import authenticator
    from nvflare.private.fed.client import admin, fed_client_base
    from nvflare.private.fed.client.admin_commands import AdminCommands
    from nvflare.private.fed.client.client_req_processors import ClientRequestProcessors

    _keep(ClientRequestProcessors.request_processors, NEEDED)
    _keep(AdminCommands.commands, NEEDED_COMMANDS)
    authenticator._get_client_ip = str  # "" instead of this machine's address
    # The agent that answers any admin's questions about connections, settings and threads of a process.
    fed_client_base.NetAgent = _NoAgent
    admin.FedAdminAgent._dispatch_request = _without_errors(admin.FedAdminAgent._dispatch_request)
    client_process_launcher.generate_client_command = _limited_job(client_process_launcher.generate_client_command)


class _NoAgent:
    def __init__(self, cell: Any):
        del cell

    def close(self) -> None:
        pass


def _keep(found: list[Any], names: tuple[str, ...]) -> None:
    kept = [each for each in found if type(each).__name__ in names]
    if len(kept) != len(names):
        missing = set(names) - {type(each).__name__ for each in kept}
        raise RuntimeError(f"this version of nvflare does not have {', '.join(sorted(missing))}")
    found[:] = kept


def _without_errors(dispatch: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the method that answers the server's requests: texts of errors, which may hold paths, go to the log."""
    from nvflare.private.admin_defs import MsgHeader, ReturnCode
    from nvflare.private.defs import ERROR_MSG_PREFIX

    def answer(agent: Any, request: Any) -> Any:
        message = dispatch(agent, request)
        reply = message.payload
        is_error = reply.get_header(MsgHeader.RETURN_CODE) == ReturnCode.ERROR
        if is_error or (isinstance(reply.body, str) and reply.body.startswith(ERROR_MSG_PREFIX)):
            logging.getLogger(__name__).error("%s: %s", request.payload.topic, reply.body)
            reply.body = f"{ERROR_MSG_PREFIX}: {WITHHELD}"
            reply.headers.pop(MsgHeader.META, None)
        return message

    return answer


def _limited_job(make_command: Callable[[Any], str]) -> Callable[[Any], str]:
    """Wrap the function that returns the command of a job's process, so that it comes through `main` below."""

    def command(fl_ctx: Any) -> str:
        python, found, rest = make_command(fl_ctx).partition(f" -m {_MODULES[_JOB]} ")
        if not found:
            raise RuntimeError(f"this version of nvflare does not run jobs by {_MODULES[_JOB]}")
        program = f"import sys; from {__name__} import main; main(sys.argv[1:])"
        return f"{python} -c {shlex.quote(program)} {os.getpid()} {_JOB} {rest}"

    return command


def main(arguments: list[str]) -> None:
    """Run NVIDIA FLARE's server, client or a job of the client until it ends, or the parent process does.

    arguments: process id of the parent, kind of the kit or _JOB, and NVIDIA FLARE's arguments
    """
    parent, kind, *rest = arguments
    if kind != _JOB:  # NVIDIA FLARE's process of a job looks after its parent itself
        end_with_parent(int(parent))
    if kind == SERVER:
        limit_commands()
    else:
        limit_site()
    program = importlib.import_module(_MODULES[kind])
    sys.argv[1:] = rest
    version_check()
    options = program.parse_arguments()
    folder = os.path.join(options.workspace, options.job_id) if kind == _JOB else options.workspace
    sys.exit(MainProcessMonitor.run(main_func=program.main, run_dir=folder, args=options))
