"""What runs at the server in NVIDIA FLARE's job process: the rounds, with the simulation's `Server`.

The controller asks the connected sites for their facts, plans the run, and then sends each round's messages as tasks.
Updates are averaged in the order of the sites' names, whichever arrives first. A site without a sign of life for
--site-timeout is lost for the round; when it registers again, `federated.deployment.relaunch` starts the job anew, and
the round begins again from the same networks: sites that had finished it send the same update again.
"""

import contextlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from nvflare.apis.client import Client
from nvflare.apis.controller_spec import ClientTask, Task
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.controller import Controller
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal

from dnnlib.cli import UserError
from dnnlib.lines import read_lines
from dnnlib.text import listed
from dnnlib.workers import watch_parent
from federated.deployment.admin_command import START_FLAGS
from federated.deployment.executor import FACTS, FAILURE, FAILURES, GLOBAL, PLAN, QUESTIONS, UPDATE, AbortRequest
from federated.deployment.job import (
    DECLARE,
    RUN_LOGGER,
    STATUS_LOGGER,
    STATUS_TOPIC,
    TRAIN,
    RunProgress,
    ServerSettings,
    load_settings,
    read_request,
)
from federated.deployment.plan import DeclaredFacts, PlannedRun, SitePlan, Unsuitable, plan_run, questions
from federated.exchange import max_bytes
from federated.institutions import make_evaluate
from federated.privacy import epsilons
from federated.server import Server
from metrics.names import choose_metrics
from torch_utils.device import OutOfMemory, ran_out_of_memory
from torch_utils.distributed import Processes
from training.dataset import ImageDataset
from training.loop import EXIT_DIVERGED, EXIT_DONE, EXIT_STOPPED, describe_out_of_memory, set_backends
from training.run_folder import SERVER_FOLDER, RunFolder, choose_run

_POLL = 0.2  # seconds
_MOST_FACTS = 2**20  # bytes of a site's declared facts
_SAME = "federate.py start with the same --name and flags"  # what continues a run


class RoundsController(Controller):
    """Trains the rounds of a run; NVIDIA FLARE builds it from a job.

    request:  as `federated.deployment.job.write_job` writes it; raises ValueError for another, or unknown flags
    """

    def __init__(self, request: str):
        super().__init__(task_check_period=_POLL)
        self.request = read_request(request)
        unknown = self.request.flags.keys() - ({flag.name for flag in START_FLAGS} - {"kit", "name", "on_lost"})
        if unknown:
            raise ValueError(f"federate.py start does not have {listed(sorted(unknown))}")
        self.state: RunProgress | None = None

    def start_controller(self, fl_ctx: FLContext) -> None:
        """Let administrators ask for the state of the run; end with the server."""
        watch_parent(lambda: os._exit(EXIT_STOPPED))
        kit = Path(fl_ctx.get_prop(FLContextKey.WORKSPACE_OBJECT).get_root_dir())
        self.state = RunProgress(kit, self.request.name, fl_ctx.get_job_id())
        fl_ctx.get_engine().register_app_command(STATUS_TOPIC, lambda topic, data, fl_ctx: self.state.to_dict())

    def control_flow(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        """Train until the run is finished, refused, or stopped."""
        lines = _LogLines(logging.getLogger(RUN_LOGGER))
        try:
            with contextlib.redirect_stdout(lines), contextlib.redirect_stderr(lines):
                self._train(abort_signal, fl_ctx)
        finally:
            logging.getLogger(STATUS_LOGGER).info(json.dumps(self.state.to_dict()))

    def stop_controller(self, fl_ctx: FLContext) -> None:
        """Do nothing: `control_flow` releases what it holds."""

    def process_result_of_unknown_task(self, client: Client, task_name: str, client_task_id: str, result: Shareable,
                                       fl_ctx: FLContext) -> None:
        """Drop an answer that comes after its site was given up; it is asked again in a later round."""
        self.log_warning(fl_ctx, f"the answer of {client.name} to {task_name} came too late")

    def _train(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        kit = Path(fl_ctx.get_prop(FLContextKey.WORKSPACE_OBJECT).get_root_dir())
        try:
            rounds = _Rounds(self, kit, abort_signal, fl_ctx)
            code = rounds.train()
        except UserError as error:
            self.state.change("refused", str(error))
            print(f"refused: {error}")
            return
        except Exception as error:
            self.state.change("failed", f"{type(error).__name__}: {error}".splitlines()[0])
            raise
        if not abort_signal.triggered:  # by an admin, or because the job is started anew
            self.state.change("finished" if code == EXIT_DONE else "stopped", rounds.last_line)


class _LogLines:
    """A text stream whose lines go to the job's log, from which administrators read them."""

    encoding = "utf-8"

    def __init__(self, logger: logging.Logger):
        self._logger, self._rest = logger, ""

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._logger.info(line)
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return False


class _Rounds:
    """A run in one job: from the sites' facts to the last round."""

    def __init__(self, controller: RoundsController, kit: Path, abort_signal: Signal, fl_ctx: FLContext):
        self.controller, self.request, self.state = controller, controller.request, controller.state
        self.settings: ServerSettings = load_settings(kit, ServerSettings)
        self.abort, self.fl_ctx, self.stop = abort_signal, fl_ctx, AbortRequest(abort_signal)
        self.started = time.monotonic()
        self.last_line = ""

    def train(self) -> int:
        """Train the rounds that are left; return an exit code of training.loop."""
        facts = self._collect_facts()
        if facts is None:
            return EXIT_STOPPED
        planned = plan_run(self.request, self.settings, facts, choose_metrics)
        asked = planned.settings.asked()
        if self.state.token == self.request.token:  # this start has its run already
            asked["new"] = False
        run = choose_run(planned.settings.outdir, planned.config, planned.content_hash, **asked,
                         classes=planned.first.classes or [], same_name=True)
        self.state.run, self.state.token = run.path.name, self.request.token
        if run.left_alone is not None:
            print(run.left_alone)
            self.last_line = run.left_alone
            return EXIT_DONE
        try:
            set_backends(planned.config)
            return self._train(planned, run)
        except Exception as error:  # PyTorch reports a lack of memory in several ways
            if not ran_out_of_memory(error):
                raise
            raise OutOfMemory(describe_out_of_memory(planned.config, error, _SAME, has_started=True)) from error
        finally:
            run.release()

    def _train(self, planned: PlannedRun, run: RunFolder) -> int:
        config, settings = run.record.config, planned.settings
        processes = Processes(rank=0, count=1, device=torch.device(settings.device))
        valid = None if planned.valid is None else ImageDataset(
            planned.valid, use_labels=config.dataset.use_labels, classes=planned.first.classes)
        server = Server(config, settings, run=run.inside(SERVER_FOLDER), schedule=planned.schedule,
                        shape=planned.first.image_shape,
                        facts={name: facts.site_facts for name, facts in planned.facts.items()},
                        classes=planned.first.classes, processes=processes, stop=self.stop,
                        evaluate=make_evaluate(config, settings, planned.holdout), valid=valid)
        server.start()
        known = {name.split("/")[1] for line in read_lines(server.run.stats) for name in line
                 if name.startswith("Sites/")}
        new = {*planned.schedule.sites} - known
        plan = SitePlan(run=run.path.name, balance=settings.balance, config=config,
                        sizes=tuple(planned.facts[name].num_images for name in planned.schedule.sites),
                        new=tuple(sorted(new))).to_text()
        server.output.begin_tick()
        with server.output.reporter.surviving(f"write {run.options.name}"):
            run.note_pass(server.state.nimg, config.step.micro_batch)
        rounds = config.federation.rounds
        began, first = time.monotonic(), server.rounds
        while server.rounds < rounds:
            number, done = server.rounds + 1, server.rounds - first
            self.state.begin_round(
                number, rounds, {name: server.schedule.start_nimg(name, number)
                                 for name in server.schedule.members(number)},
                (time.monotonic() - began) / done * (rounds - server.rounds) if done else None,
                members=[name for name in server.schedule.sites if server.schedule.last_round(name) >= number])
            answers = self._ask_sites(server, number, plan, new)
            if self.stop.wanted():
                return self._stopped(server, f"in round {number}", self.stop.reason)
            failure = server.finish_round(answers)
            if failure is not None:
                server.output.log(failure)
                self.last_line = failure
                return EXIT_DIVERGED
            self.state.epsilon = max(epsilons(config.federation, server.schedule, number).values(), default=None)
            new -= {name for name, answer in answers.items() if isinstance(answer, bytes)}
            failure = server.write_files()
            if failure is None and self.stop.wanted() and number < rounds:
                failure = self.stop.reason
            if failure is not None:
                return self._stopped(server, f"after round {number}", failure)
        code = server.complete(run, _SAME)
        self.last_line = f"finished after {server.rounds} rounds" if code == EXIT_DONE else "not finished, see the log"
        return code

    def _stopped(self, server: Server, where: str, reason: str) -> int:
        self.last_line = f"stopped {where} ({reason}); {_SAME} continues"
        server.output.log(self.last_line)
        return EXIT_STOPPED

    def _connected(self) -> set[str]:
        """Return the names of the sites of this job that are connected."""
        names = {client.name for client in self.fl_ctx.get_engine().get_clients()}
        return {name for name in names if self.controller.get_client_disconnect_time(name) is None}

    # Facts

    def _collect_facts(self) -> dict[str, DeclaredFacts] | None:
        """Return the facts of all sites, waiting for those that never declared any; None if the run was stopped."""
        is_new = self.request.flags.get("new") is True and self.state.token != self.request.token
        asked = questions(self.request)
        known, sites = {} if is_new else self.state.load_facts(asked), self.settings.sites
        while not self.abort.triggered:
            missing = [name for name in sites if name not in known and name not in self._connected()]
            self.state.change("waiting",
                              f"waits for {listed(missing)}" if missing else "asks the sites for their facts")
            if not missing:
                break
            self._say(f"waits for {listed(missing)} to connect for the first time")
            time.sleep(_POLL)
        present = sorted(self._connected() & set(sites))
        data = {QUESTIONS: json.dumps(asked)}
        answers = self._ask({name: data for name in present}, DECLARE)
        if self.abort.triggered:
            return None
        facts = {}
        for name in sites:
            answer = answers.get(name)
            if isinstance(answer, Mapping) and FACTS in answer:
                facts[name] = self._check_facts(name, answer[FACTS], known.get(name))
            elif name in known and (answer is None or name not in present):
                facts[name] = DeclaredFacts.from_bytes(known[name])
            else:
                raise UserError(f"site {name} cannot take part: {_reason(answer)}; see its log")
        self.state.save_facts({name: each.to_bytes() for name, each in facts.items()}, asked)
        return facts

    def _check_facts(self, name: str, data: bytes, before: bytes | None) -> DeclaredFacts:
        try:
            if not isinstance(data, bytes) or len(data) > _MOST_FACTS:
                raise Unsuitable(f"expected at most {_MOST_FACTS} bytes")
            found = DeclaredFacts.from_bytes(data)
        except Unsuitable as error:
            raise UserError(f"the facts that site {name} declares are refused: {error}") from error
        if before is not None:
            then = DeclaredFacts.from_bytes(before)
            if then.training_data["pixels_sha256"] != found.training_data["pixels_sha256"]:
                raise UserError(f"the images of site {name} are not those that run {self.request.name} began with; "
                                "expected the same: add --new, or choose another --name, to start another run")
        return found

    # Rounds

    def _ask_sites(self, server: Server, number: int, plan: str, new: Collection[str]) -> dict[str, bytes | str]:
        """Send a round's messages; return updates, and reasons why there is none. Lost sites are left out."""
        messages, schedule = server.messages(number, new), server.schedule
        limit = max_bytes(server.agreement)
        present = self._wait_for_members(server, number, sorted(messages))
        found = self._ask({name: {PLAN: plan, GLOBAL: messages[name]} for name in present}, TRAIN,
                          lambda name, seconds: self.state.site_took(name, schedule.end_nimg(name, number), seconds))
        answers: dict[str, bytes | str] = {}
        for name in [] if self.stop.wanted() else present:  # a site without an answer then is not lost
            answer = found.get(name)
            if answer is None:
                self._lose(server, number, name)
            elif isinstance(answer.get(UPDATE), bytes) and len(answer[UPDATE]) <= limit:
                answers[name] = answer[UPDATE]
            elif isinstance(answer.get(UPDATE), bytes):
                answers[name] = f"its update has {len(answer[UPDATE])} bytes; expected at most {limit}"
                self.state.sites_are([name], "refused")
            else:
                answers[name] = f"{_reason(answer)}; see the log of the site"
                self.state.sites_are([name], "refused")
        return answers

    def _wait_for_members(self, server: Server, number: int, members: list[str]) -> list[str]:
        """Return the members that are connected; wait for the others as long as a lost site is waited for."""
        while not self.abort.triggered:
            absent = [name for name in members if name not in self._connected()]
            if not absent or (self.request.on_lost == "continue" and len(absent) < len(members)
                              and time.monotonic() - self.started > self.settings.site_timeout):
                break
            self.state.sites_are(absent, "absent")
            self._say(f"round {number} waits for {listed(absent)}")
            time.sleep(_POLL)
        present = [name for name in members if name in self._connected()]
        for name in members:
            if name not in present and not self.abort.triggered:
                self._lose(server, number, name)
        return present

    def _lose(self, server: Server, number: int, name: str) -> None:
        self.state.sites_are([name], "lost")
        server.output.log(f"round {number}: site {name} is lost (it ended, or gave no sign of life for "
                          f"{self.settings.site_timeout:g} seconds); the round goes on without it")

    def _say(self, line: str) -> None:
        """Log a line, unless it is the one before."""
        if line != self.last_line:
            print(line)
        self.last_line = line

    def _ask(self, data: Mapping[str, Mapping[str, Any]], task_name: str,
             note: Callable[[str, float], None] | None = None) -> dict[str, Mapping[str, Any] | None]:
        """Send a task to each site, and return the answers; None of a site that is lost, {} of one that failed.

        note:  called with the name of a site that sent an update and the seconds that it took

        With --on-lost=wait a lost site is waited for until the job is started anew.
        """
        answers: dict[str, Mapping[str, Any] | None] = {}
        lock, asked = threading.Lock(), time.monotonic()

        def receive(client_task: ClientTask, fl_ctx: FLContext) -> None:
            result, client_task.result = client_task.result, None  # which may be large
            content = {key: value for key, value in result.items() if isinstance(key, str) and key in _ANSWERS}
            with lock:
                answers[client_task.client.name] = content
            if note is not None and UPDATE in content:
                note(client_task.client.name, time.monotonic() - asked)

        def send(name: str) -> None:
            shareable = Shareable()
            shareable.update(data[name])
            tasks[name] = Task(task_name, shareable, result_received_cb=receive)
            self.controller.broadcast(tasks[name], self.fl_ctx, targets=[name], min_responses=1)

        tasks: dict[str, Task] = {}
        for name in data:
            send(name)
        while not self.abort.triggered:
            with lock:
                left = [name for name in tasks if name not in answers]
            lost = [name for name in left if self.controller.get_client_disconnect_time(name) is not None]
            for name in left:  # NVIDIA FLARE drops the task of a lost site, which may be back with its job
                if name not in lost and tasks[name].completion_status is not None and name not in answers:
                    send(name)
            if task_name == TRAIN:
                self.state.sites_are(lost, "lost")
                self.state.sites_are([name for name in left if name not in lost and name not in answers], "training")
            if self.request.on_lost == "wait" and task_name == TRAIN and lost:
                self._say(f"waits for the lost {'site' if len(lost) == 1 else 'sites'} {listed(lost)} (--on-lost=wait)")
            elif len(lost) == len(left):
                break
            time.sleep(_POLL)
        for name in tasks:
            if name not in answers:
                self.controller.cancel_task(tasks[name])
                answers[name] = None
        return answers


_ANSWERS = (FACTS, UPDATE, FAILURE)


def _reason(answer: Mapping[str, Any] | None) -> str:
    """Return why a site has no update, in words of this program: those of a site are not repeated."""
    if answer is None:
        return "it is not connected"
    return FAILURES.get(answer.get(FAILURE), FAILURES["failed"])
