"""What server and sites permit, by NVIDIA FLARE's own judgment of the files that are written."""

import json
import os
import shlex
import sys
from types import SimpleNamespace
from unittest.mock import MagicMock, Mock

import pytest

from dnnlib.cli import UserError
from federated.deployment.job import CONTROLLER, EXECUTOR, FILTER, ServerSettings, SiteSettings, load_settings
from federated.deployment.kits import ADMIN_NAME, ORG, SERVER, SITE, provision, read_kit
from federated.deployment.policy import write_server_policy, write_site_policy

pytest.importorskip("nvflare", reason="the policies are NVIDIA FLARE's, of the extra federated")

AT_SERVER = ServerSettings(outdir="/runs", sites=("a", "b"), site_timeout=45)
AT_SITE = SiteSettings(data="/data/secret.zip", outdir="/states")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Kits with the files that server and site a write."""
    folder = tmp_path_factory.mktemp("kits")
    provision(["a", "b"], "localhost", folder)
    write_server_policy(read_kit(folder / SERVER, SERVER), AT_SERVER)
    write_site_policy(read_kit(folder / "a", SITE), AT_SITE)
    return folder


def local(kit, name):
    return json.loads((kit / "local" / name).read_text())


@pytest.mark.parametrize(("kit", "allowed"), [(SERVER, [CONTROLLER]), ("a", [EXECUTOR, FILTER])])
def test_job_may_build_the_named_classes_and_no_others(made, kit, allowed):
    from nvflare.apis.fl_exception import UnsafeComponentError
    from nvflare.apis.workspace import Workspace
    from nvflare.app_common.widgets.component_path_authorizer import ComponentPathAuthorizer

    workspace, authorizer = Workspace(str(made / kit)), ComponentPathAuthorizer()
    for path in allowed:
        authorizer.authorize_component_config({"path": path}, workspace=workspace)
    others = {CONTROLLER, EXECUTOR, FILTER} - set(allowed)
    for path in [*others, "subprocess.Popen", "nvflare.app_common.np.np_trainer.NPTrainer", f"{allowed[0]}2"]:
        with pytest.raises(UnsafeComponentError, match="is not in allow_list"):
            authorizer.authorize_component_config({"path": path}, workspace=workspace)


def authorizes(kit, right, role):
    from nvflare.fuel.sec.authz import AuthzContext, Person
    from nvflare.security.security import FLAuthorizer

    who = Person(ADMIN_NAME, ORG, role)
    return FLAuthorizer(ORG, local(kit, "authorization.json")).authorize(AuthzContext(right, who, who))[0]


def test_admin_may_start_and_stop_runs_and_do_nothing_that_reads_files_or_brings_code(made):
    rights = {"submit_job", "abort_job", "check_status"}
    refused = {"byoc", "cat", "ls", "head", "tail", "grep", "pwd", "shell_commands", "download_job", "clone_job",
               "delete_job", "sys_info", "report_env", "report_resources", "configure_site_log", "configure_job_log",
               "shutdown", "restart", "show_stats", "show_errors", "call", "server-predeployed-flwr"}
    for kit in (made / SERVER, made / "a"):
        assert {right for right in rights | refused if authorizes(kit, right, "project_admin")} == rights
        assert not any(authorizes(kit, right, role) for right in rights | refused
                       for role in ("lead", "org_admin", "member", ""))
    assert authorizes(made / SERVER, "get_job_log", "project_admin")
    assert not authorizes(made / "a", "get_job_log", "project_admin")


@pytest.mark.parametrize("scope", ["", "all"])
def test_results_pass_the_filter_in_the_only_scope_there_is(made, scope):
    from nvflare.apis.workspace import Workspace
    from nvflare.private.fed.app.fl_conf import create_privacy_manager

    manager = create_privacy_manager(Workspace(str(made / "a")), names_only=False)
    filters = manager.get_scope(scope).task_result_filters
    assert [type(each).__name__ for each in filters["out"]] == [FILTER.rsplit(".", 1)[1]]
    assert manager.get_scope("another") is None


def test_site_tells_the_server_nothing_of_its_settings(made):
    resources = local(made / "a", "resources.json")
    assert resources["client"]["site_config"] == {}  # sent at registration in place of the file's other settings
    files = [made / "a" / "local" / name for name in ("resources.json", "privacy.json", "authorization.json")]
    assert not any("secret" in file.read_text() for file in files)
    assert load_settings(made / "a", SiteSettings) == AT_SITE


def test_neither_sites_nor_server_stream_logs(made):
    assert local(made / "a", "resources.json")["allow_log_streaming"] is False
    for kit in (SERVER, "a"):
        assert not [each for each in local(made / kit, "resources.json")["components"] if "logging" in each["path"]]


def test_server_keeps_jobs_in_its_kit_and_notices_lost_sites_in_time(made):
    resources = local(made / SERVER, "resources.json")
    assert resources["servers"][0]["heart_beat_timeout"] == 45
    assert "/tmp/nvflare" not in json.dumps(resources)
    assert json.dumps(resources).count(str(made / SERVER)) == 2
    assert load_settings(made / SERVER, ServerSettings) == AT_SERVER


def test_what_whoever_provisions_may_have_loosened_is_written_anew(made):
    kit = read_kit(made / "a", SITE)
    kept = {path: path.read_bytes() for path in kit.path.rglob("*.json")}
    startup = kit.path / "startup" / "fed_client.json"
    startup.write_text(startup.read_text().replace('"require_signed_jobs": true', '"require_signed_jobs": false'))
    (kit.path / "local" / "resources.json").write_text('{"class_allow_list": ["*"]}')
    (kit.path / "local" / "authorization.json").unlink()
    assert {path for path in kept if not path.exists() or path.read_bytes() != kept[path]} == {
        startup, kit.path / "local" / "resources.json", kit.path / "local" / "authorization.json"}
    write_site_policy(kit, AT_SITE)
    assert {path: path.read_bytes() for path in kept} == kept


@pytest.mark.parametrize("name", ["local/custom", "local/extra__resources.json", "startup/more__p_resources.json",
                                  "local/comm_config.json", "startup/signature.json"])
def test_kit_with_further_configuration_or_code_is_refused(made, name):
    kit = read_kit(made / "a", SITE)
    extra = kit.path / name
    if name.endswith("custom"):
        extra.mkdir()
    else:
        extra.write_text("{}")
    try:
        with pytest.raises(UserError) as error:
            write_site_policy(kit, AT_SITE)
    finally:
        if extra.is_dir():
            extra.rmdir()
        else:
            extra.unlink()
    assert str(error.value) == (f"{extra} does not belong to a kit made by federate.py provision; remove it: it could "
                                "bring code or loosen what this machine permits")


@pytest.fixture
def limited(monkeypatch):
    """Limit what this process, as one of a site, answers and tells; all is put back after the test."""
    from nvflare.app_common.job_launcher import client_process_launcher
    from nvflare.private.fed import authenticator
    from nvflare.private.fed.client import admin, admin_commands, client_req_processors, fed_client_base

    for where, name in ((authenticator, "_get_client_ip"), (fed_client_base, "NetAgent"),
                        (admin.FedAdminAgent, "_dispatch_request"),
                        (client_process_launcher, "generate_client_command")):
        monkeypatch.setattr(where, name, getattr(where, name))
    processors, commands = client_req_processors.ClientRequestProcessors, admin_commands.AdminCommands
    monkeypatch.setattr(processors, "request_processors", list(processors.request_processors))
    monkeypatch.setattr(commands, "commands", list(commands.commands))
    from federated.deployment.nvflare_process import limit_site

    limit_site()


def test_site_answers_no_questions_about_files_or_its_system(limited):
    from nvflare.private.defs import SysCommandTopic, TrainingTopic
    from nvflare.private.fed.client.admin_commands import AdminCommands
    from nvflare.private.fed.client.client_req_processors import ClientRequestProcessors

    topics = {topic for each in ClientRequestProcessors.request_processors for topic in each.get_topics()}
    assert {SysCommandTopic.SHELL, SysCommandTopic.SYS_INFO, SysCommandTopic.REPORT_ENV,
            SysCommandTopic.CONFIGURE_SITE_LOG, TrainingTopic.SHUTDOWN, TrainingTopic.DELETE_RUN}.isdisjoint(topics)
    assert {TrainingTopic.DEPLOY, TrainingTopic.START_JOB, TrainingTopic.ABORT} <= topics
    assert {each.get_command_name() for each in AdminCommands.commands} == {
        "check_status", "abort", "abort_task", "shutdown"}


def test_site_tells_neither_its_address_nor_about_connections_and_settings(limited):
    from nvflare.private.fed import authenticator
    from nvflare.private.fed.client import fed_client_base

    assert authenticator._get_client_ip() == ""
    cell = Mock()
    fed_client_base.NetAgent(cell).close()
    assert cell.mock_calls == []  # no request is registered


def test_errors_at_a_site_stay_in_its_log(limited, caplog):
    from nvflare.fuel.f3.cellnet.utils import new_cell_message
    from nvflare.private.admin_defs import Message, error_reply, ok_reply
    from nvflare.private.fed.client.admin import FedAdminAgent, RequestProcessor

    def answer(reply):
        agent = FedAdminAgent.__new__(FedAdminAgent)
        agent.auditor, agent.app_ctx = None, MagicMock()
        processor = Mock(spec=RequestProcessor)
        processor.process.side_effect = reply if isinstance(reply, Exception) else None
        processor.process.return_value = reply
        agent.processors = {"train.deploy": processor}
        found = agent._dispatch_request(new_cell_message({}, Message("train.deploy", None))).payload
        return found.body, found.get_meta()

    withheld = "NVFLARE_ERROR: the site refused or failed; its log tells why"
    for reply in (OSError("cannot read /home/ann/lesions.zip"), error_reply("/home/ann", meta={"info": "/home/ann"}),
                  Message("reply", "NVFLARE_ERROR: /home/ann")):
        caplog.clear()
        assert answer(reply) == (withheld, None)
        assert "train.deploy: " in caplog.text
        assert "/home/ann" in caplog.text
    assert answer(ok_reply(body="deployed app to a")) == ("deployed app to a", None)


def test_jobs_of_a_site_run_in_processes_with_the_same_limits(limited):
    from nvflare.apis.fl_constant import FLContextKey
    from nvflare.apis.fl_context import FLContext
    from nvflare.apis.job_launcher_spec import JobProcessArgs
    from nvflare.app_common.job_launcher.client_process_launcher import ClientProcessJobLauncher

    context = FLContext()
    context.set_prop(FLContextKey.JOB_PROCESS_ARGS, {
        JobProcessArgs.EXE_MODULE: ("-m", "nvflare.private.fed.app.client.worker_process"),
        JobProcessArgs.WORKSPACE: ("-m", "/kits/a")}, private=True)
    assert shlex.split(ClientProcessJobLauncher().get_command({}, context)) == [
        sys.executable, "-c", "import sys; from federated.deployment.nvflare_process import main; main(sys.argv[1:])",
        str(os.getpid()), "job", "-m", "/kits/a"]


def test_server_takes_no_commands_that_act_on_its_network(monkeypatch):
    from nvflare.fuel.f3.cellnet.net_manager import NetManager

    from federated.deployment.nvflare_process import limit_commands

    monkeypatch.setattr(NetManager, "get_spec", NetManager.get_spec)  # is put back after the test
    assert "stop_net" in {each.name for each in NetManager(None).get_spec().cmd_specs}
    limit_commands()
    assert NetManager(None).get_spec().cmd_specs == []


@pytest.mark.parametrize(("name", "target", "is_revoked", "passes"), [
    ("a", "server.job", False, True), ("a", "b", False, False), ("a", "b.job", False, False),
    ("a", "server.job", True, False), ("server_job", "b.job", False, True), ("server", "b", False, True)])
def test_server_forwards_nothing_from_site_to_site_and_nothing_of_revoked_sites(name, target, is_revoked, passes):
    from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey
    from nvflare.fuel.f3.message import Message
    from nvflare.private.defs import CellMessageHeaderKeys

    from federated.deployment.nvflare_process import MessageGuard

    filters = []
    manager = SimpleNamespace(is_client_disabled=lambda site: is_revoked and site == "a")
    server = SimpleNamespace(client_manager=manager, cell=SimpleNamespace(core_cell=SimpleNamespace(
        add_incoming_filter=lambda channel, topic, cb: filters.append(cb))))
    MessageGuard().install(SimpleNamespace(server=server))
    message = Message({CellMessageHeaderKeys.CLIENT_NAME: name, MessageHeaderKey.DESTINATION: target,
                       MessageHeaderKey.TOPIC: "any"}, None)
    assert (filters[0](message) is None) == passes


@pytest.mark.parametrize("damaged", ["", "[]", '{"disabled_clients": 3}'])
def test_server_goes_on_following_the_list_of_revoked_sites_after_it_was_damaged(damaged, tmp_path, monkeypatch):
    from federated.deployment import nvflare_process

    class Ended(BaseException):
        pass

    file, refused = tmp_path / "disabled_clients.json", set()
    contents = [damaged, '{"disabled_clients": ["b"]}', damaged, '{"disabled_clients": ["c"]}']
    seen = []

    def look(seconds):
        seen.append(sorted(refused))
        if not contents:
            raise Ended
        file.write_text(contents.pop(0))

    monkeypatch.setattr(nvflare_process, "time", SimpleNamespace(sleep=look))
    manager = SimpleNamespace(disabled_clients=refused, get_clients=dict)
    guard = nvflare_process.MessageGuard()
    guard.install(SimpleNamespace(
        enable_clients=refused.difference_update, disable_clients=refused.update,
        server=SimpleNamespace(client_manager=manager, cell=SimpleNamespace(core_cell=SimpleNamespace(
            add_incoming_filter=lambda channel, topic, cb: None)))))
    with pytest.raises(Ended):
        guard._follow(tmp_path)
    assert seen == [[], [], ["b"], ["b"], ["c"]]
