"""Train a generator at several institutions on one machine: a server and its sites, round by round.

    RUN/server/        network snapshots, statistics, grids: all that the server of a deployment would have
    RUN/site-NAME/     what would be on the disk of an institution

Sites train in turn in one process, or at the same time in several processes, each with its sites and its GPU. Messages
are encoded, checked and decoded as if they were sent.
"""

import pickle
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

import torch

from dnnlib.cli import StopRequest
from federated.exchange import Refused
from federated.institutions import PreparedFederation
from federated.schedule import Schedule
from federated.server import Server, SiteFacts
from federated.shared_statistics import SharedStatistics, SiteStatistics, StatisticsEvaluator, site_statistics
from federated.site import Site, SiteStopped
from metrics.names import needed_detectors
from torch_utils.device import OutOfMemory, ran_out_of_memory
from torch_utils.distributed import Processes, gather_rows, join
from training.config import TrainConfig
from training.dataset import ImageDataset
from training.loop import EXIT_DIVERGED, EXIT_DONE, EXIT_STOPPED, describe_out_of_memory, set_backends
from training.run_folder import SERVER_FOLDER, RunFolder, choose_run
from training.snapshot_metrics import Evaluate

# A process that has trained its sites waits for the others: a round may take hours. One that died is noticed anyway.
_PATIENCE = timedelta(days=30)

Answer = bytes | str | int  # an update, why there is none, or the exit code of a site that was stopped


def simulate(prepared: PreparedFederation, evaluate: Evaluate | None = None) -> int:
    """Train or continue a run; return its exit code, as training.loop.train does.

    evaluate:  computes metrics of the averaged generator at network snapshots; not needed where sites share statistics

    Raises UserError if the run cannot be chosen or continued, and OutOfMemory if memory runs out.
    """
    settings = prepared.settings
    with join(settings.device, patience=_PATIENCE) as processes, StopRequest(settings.max_hours) as stop:
        run, config = _open_run(prepared, processes)
        if run.left_alone is not None:
            if processes.rank == 0:
                print(run.left_alone, flush=True)
            return EXIT_DONE
        set_backends(config)
        try:
            if prepared.share_statistics and config.metrics:
                evaluate = collect_statistics(prepared, processes).evaluate
            return _Simulation(prepared, config, processes, run, stop, evaluate).train()
        except Exception as error:  # memory may run out anywhere, and PyTorch reports it in several ways
            if not ran_out_of_memory(error):
                raise
            raise OutOfMemory(describe_out_of_memory(config, error, settings.same_command,
                                                     has_started=True)) from error
        finally:
            if processes.rank == 0:
                run.release()


def _open_run(prepared: PreparedFederation, processes: Processes) -> tuple[RunFolder, TrainConfig]:
    """Let the main process choose the run's folder; return it with the configuration to train with."""
    run = None
    if processes.rank == 0:
        run = choose_run(prepared.settings.outdir, prepared.config, prepared.content_hash,
                         **prepared.settings.asked(), classes=prepared.institutions[0].dataset.label_names or [])
    chosen = None if run is None else (str(run.path), run.continues, run.left_alone, run.record.config)
    path, continues, left_alone, config = processes.broadcast(chosen)
    return run or RunFolder(path, continues=continues, left_alone=left_alone), config


def collect_statistics(prepared: PreparedFederation, processes: Processes) -> StatisticsEvaluator:
    """Let each site compute its statistics; return what measures the generator with these."""
    config, settings = prepared.config, prepared.settings
    weights = needed_detectors(config.metrics, settings.detector, settings.detector_weights)
    found = []
    for each in prepared.institutions:
        own = site_statistics(each.name, each.path, c_dim=config.dataset.c_dim, classes=each.dataset.label_names,
                              detector=settings.detector, weights=weights, device=processes.device)
        data = processes.broadcast(None if own is None else own.to_bytes())  # all that leaves the site
        found.append(SiteStatistics.from_bytes(data, each.name))
    return StatisticsEvaluator(config.metrics, SharedStatistics(found), weights=weights, seed=config.seed,
                               device=processes.device)


class _Simulation:
    """One process's part: the server, and its sites."""

    def __init__(self, prepared: PreparedFederation, config: TrainConfig, processes: Processes, run: RunFolder,
                 stop: StopRequest, evaluate: Evaluate | None):
        self.prepared, self.config, self.processes, self.run, self.stop = prepared, config, processes, run, stop
        self.same_command = prepared.settings.same_command
        self.schedule = Schedule(config.federation, sizes=[each.dataset.num_images for each in prepared.institutions],
                                 batch=config.batch)
        first, settings = prepared.institutions[0].dataset, prepared.settings
        valid = None
        if settings.valid is not None and processes.rank == 0:
            valid = ImageDataset(settings.valid, use_labels=config.dataset.use_labels, classes=first.classes)
        folder = run.inside(SERVER_FOLDER) if processes.rank == 0 else RunFolder(run.path / SERVER_FOLDER)
        self.server = Server(config, settings, run=folder, schedule=self.schedule, shape=first.image_shape,
                             facts={each.name: SiteFacts.of(each.dataset) for each in prepared.institutions},
                             classes=first.label_names, processes=processes, stop=stop, evaluate=evaluate, valid=valid)
        self.sites: dict[str, Site] = {}  # of this process, once they take part

    def train(self) -> int:
        """Train all rounds that are left, or until a process is asked to stop; return the exit code."""
        try:
            self.server.start()
            self.server.output.begin_tick()
            if self.processes.rank == 0:
                with self.server.output.reporter.surviving(f"write {self.run.options.name}"):
                    self.run.note_pass(self.server.state.nimg, self.config.step.micro_batch)
            while self.server.rounds < self.config.federation.rounds:
                code = self._train_round(self.server.rounds + 1)
                if code is not None:
                    return code
            return self.server.complete(self.run, self.same_command)
        finally:
            for site in self.sites.values():
                site.close()

    def _train_round(self, number: int) -> int | None:
        """Train a round at all sites; return the exit code if the run stops in it, else None."""
        server, is_main = self.server, self.processes.rank == 0
        messages = self.processes.broadcast(server.messages(number) if is_main else None)
        mine: dict[str, Answer] = {}
        for name in self.prepared.sites_of_processes()[self.processes.rank]:
            if name in messages and EXIT_STOPPED not in mine.values():
                mine[name] = self._answer(self._site(name), messages[name])
        answers = _gathered(mine, self.processes)
        code = self.processes.broadcast(self._finish_round(number, answers) if is_main else None)
        if code is not None:
            return code
        failure = server.write_files()
        if failure is None and self.processes.any(self.stop.wanted()) and number < self.config.federation.rounds:
            failure = self.stop.reason or "another process was asked to stop"
        return None if failure is None else self._log_stop(f"after round {number}", failure)

    def _finish_round(self, number: int, answers: Mapping[str, Answer]) -> int | None:
        stopped = [name for name, answer in answers.items() if answer == EXIT_STOPPED]
        if stopped:
            return self._log_stop(f"in round {number}", self.stop.reason or (
                f"site {stopped[0]} was stopped, see {self._folder(stopped[0]) / 'log.txt'}"))
        usable = {name: f"its training failed, see {self._folder(name) / 'log.txt'}" if answer == EXIT_DIVERGED
                  else answer for name, answer in answers.items()}
        stopped = self.server.finish_round(usable)
        if stopped is None:
            return None
        self.server.output.log(stopped)
        return EXIT_DIVERGED

    def _log_stop(self, where: str, reason: str) -> int:
        self.server.output.log(f"stopped {where} ({reason}); {self.same_command} continues")
        return EXIT_STOPPED

    def _answer(self, site: Site, message: bytes) -> Answer:
        try:
            return site.train_round(message)
        except SiteStopped as stopped:
            return stopped.exit_code
        except Refused as error:
            return str(error)

    def _site(self, name: str) -> Site:
        """Return a site of this process; it is opened in its first round here."""
        if name not in self.sites:
            found = next(each for each in self.prepared.institutions if each.name == name)
            self.sites[name] = Site(name, config=self.config, settings=self.prepared.settings, schedule=self.schedule,
                                    dataset=found.dataset, weights=found.weights, folder=self._folder(name),
                                    device=self.processes.device, stop=self.stop)
        return self.sites[name]

    def _folder(self, name: str) -> Path:
        return self.run.path / f"site-{name}"


def _gathered(mine: Mapping[str, Answer], processes: Processes) -> dict[str, Answer]:
    """Return the answers of all processes on the main one; {} on the others."""
    if processes.count == 1:
        return dict(mine)
    data = pickle.dumps([*mine.items()])  # read by a process of the same run
    rows = gather_rows(torch.frombuffer(bytearray(len(data).to_bytes(8, "little") + data), dtype=torch.uint8))
    if rows is None:
        return {}
    found, text = {}, rows.numpy().tobytes()
    while text:
        size = int.from_bytes(text[:8], "little")
        found |= dict(pickle.loads(text[8:8 + size]))
        text = text[8 + size:]
    return found
