"""The server of a decentralized training: it sends the networks, takes the mean of the updates, and writes the results.

It holds no images. Its folder has the files of a run: log, statistics (a line per round), TensorBoard events, grids of
samples, network snapshots, metrics and a resumable state. Images are counted over all sites.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch

from dnnlib.cli import StopRequest, UserError
from dnnlib.files import DiskFailure
from dnnlib.lines import read_lines
from federated.aggregate import (
    NORM_ROUNDS,
    Contribution,
    aggregate,
    cosines,
    is_running_average,
    make_server_optimizer,
    refuse_by_norm,
    round_beta,
    server_average,
    trained,
    update_norm,
)
from federated.agreement import Agreement, constants_hash, load_tensors, local_tensors, start_tensors
from federated.exchange import Refused, SiteUpdate, decode_update, encode_global, hash_of_global
from federated.privacy import describe_privacy, epsilons
from federated.round_report import RoundReport, pool_statistics
from federated.schedule import Schedule
from imagesets.classes import CLASS
from imagesets.reader import Shape
from torch_utils.checkpoint import CheckpointPair, DamagedCheckpoint
from torch_utils.distributed import Processes
from torch_utils.stats import Collector
from training.config import RunSettings, TrainConfig
from training.dataset import ImageDataset
from training.loop import EXIT_DONE, EXIT_STOPPED, Validation
from training.run_folder import SERVER_FOLDER, RunFolder
from training.run_output import RunOutput
from training.run_report import error_text
from training.snapshot import Networks
from training.snapshot_metrics import Evaluate
from training.state import TrainingState
from training.transfer import Labels, transfer_weights

STATE_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class SiteFacts:
    """What a site declares about its images before the first round."""

    num_images: int
    class_counts: tuple[int, ...]  # () without classes
    training_data: Mapping[str, Any]  # as ImageDataset.training_data
    is_phantom: bool

    @classmethod
    def of(cls, dataset: ImageDataset) -> "SiteFacts":
        counts: tuple[int, ...] = ()
        if dataset.label_kind == CLASS:
            counts = tuple(np.bincount(dataset.class_indices(), minlength=dataset.label_dim).tolist())
        return cls(num_images=dataset.num_images, class_counts=counts, training_data=dataset.training_data(),
                   is_phantom=dataset.source.get("phantom") is True)


@dataclass(frozen=True, kw_only=True)
class PooledFacts:
    """What `RunOutput` needs to know about training images, of the images of all sites, which are elsewhere."""

    sites: Mapping[str, SiteFacts]
    image_shape: Shape
    classes: Sequence[str] | None
    label_dim: int  # of the networks; 0 = labels are not used
    xflip: bool
    path: ClassVar[str] = "images at the sites"

    @property
    def num_images(self) -> int:
        return sum(site.num_images for site in self.sites.values())

    @property
    def resolution(self) -> int:
        return self.image_shape[1]

    @property
    def use_labels(self) -> bool:
        return self.label_dim > 0

    @property
    def label_kind(self) -> str | None:
        return CLASS if self.use_labels else None

    @property
    def source(self) -> dict[str, Any]:
        return {"phantom": all(site.is_phantom for site in self.sites.values())}

    def class_indices(self) -> np.ndarray | None:
        """Return the class of each image, those of one class together; None without classes."""
        if not self.use_labels:
            return None
        counts = np.sum([site.class_counts for site in self.sites.values()], axis=0)
        return np.repeat(np.arange(self.label_dim), counts)

    def label_table(self) -> torch.Tensor:
        """Return labels of unconditional networks, float32 [num_images, 0]."""
        return torch.zeros(self.num_images, 0)

    def training_data(self) -> dict[str, Any]:
        """Return what a network snapshot records about its training images, by site."""
        groups = [site.training_data.get("num_groups") for site in self.sites.values()]
        return {"num_images": self.num_images, "num_groups": None if None in groups else sum(groups),
                "sites": {name: dict(site.training_data) for name, site in sorted(self.sites.items())}}


class ServerOutput(RunOutput):
    """Writes the files of the server: those of a run, without images of the sites."""

    privacy: Mapping[str, Any] | None = None  # of the networks as they are now; None without --dp

    @property
    def run_name(self) -> str:
        return self.run.path.parent.name

    def networks(self) -> Networks:
        """Return what a network snapshot holds; a discriminator that stays at the sites is in none."""
        found = super().networks()
        return replace(found, D=None) if self.config.federation.share == "G" else found

    def training_info(self) -> dict[str, Any]:
        found = super().training_info()
        return found if self.privacy is None else {**found, "privacy": self.privacy}

    def _save_reals(self) -> None:
        """Draw nothing: the images are at the sites, which draw their own grids."""

    def save_round_images(self, number: int) -> None:
        """Write a grid of fakes, named by the round: rounds may be shorter than the thousands that `fakes` counts."""
        if self.is_main:
            with self.reporter.surviving("write a sample grid"):
                self._save_fakes(self.run.path / f"fakes-round{number:05d}.png")


@dataclass(kw_only=True)
class _Sent:
    """What the sites got in the round that runs."""

    number: int
    tensors: dict[str, torch.Tensor]  # copies of the server's, before they were rounded
    base_hash: str
    constants_hash: str
    bytes_down: dict[str, int] = field(default_factory=dict)


class Server:
    """The networks of all sites, round by round.

    Every process has one: the main process does the work, the others take part in `write_files` and `finish`.

    run:    the folder of the server's files
    facts:  by site, of its images
    shape:  of an image
    valid:  held-out images on which D is scored; None = not
    """

    def __init__(self, config: TrainConfig, settings: RunSettings, *, run: RunFolder, schedule: Schedule,
                 facts: Mapping[str, SiteFacts], shape: Shape, classes: Sequence[str] | None, processes: Processes,
                 stop: StopRequest, evaluate: Evaluate | None, valid: ImageDataset | None = None):
        self.config, self.schedule, self.run, self.processes = config, schedule, run, processes
        federation = config.federation
        self.state = TrainingState.create(config, processes.device)
        pooled = PooledFacts(sites=facts, image_shape=shape, classes=None if classes is None else list(classes),
                             label_dim=config.dataset.c_dim, xflip=config.dataset.xflip)
        self.agreement = Agreement.of(self.state, share=federation.share, ema=federation.ema,
                                      payload=federation.payload, classes=classes, label_kind=pooled.label_kind,
                                      privacy=federation.privacy())
        self.optimizer = make_server_optimizer(federation)
        self.rounds = 0  # that are finished
        self.norms: list[list[float]] = []  # per local step, of the updates in the means of the last rounds
        self.plans: list[dict[str, int]] = []  # of each round: site -> its image counter at the end
        self.ends: list[int] = []  # images seen at each end that the run reached
        self.checkpoints = CheckpointPair(run.path)
        self._stop, self._has_trained = stop, False  # a round, in this process
        self._sent: _Sent | None = None
        self._valid = None
        if valid is not None and federation.share != "G":
            group = min(config.discriminator.mbstd_group_size, config.step.micro_batch)
            self._valid = Validation(valid, group=group, seed=config.seed)
        self.output = ServerOutput(config, settings, pooled, self.state, processes, run, evaluate, stop)
        self.output.clock.total_nimg = schedule.total_images(federation.rounds)
        self._labels = Labels(c_dim=config.dataset.c_dim, names=classes, kind=pooled.label_kind)

    def start(self) -> None:
        """Continue from the newest state, or start from the networks of --resume, or of the seed."""
        found = None
        if self.processes.rank == 0:
            try:
                found = self.checkpoints.load()
            except DamagedCheckpoint as error:
                raise UserError(f"{error} (--new does so)") from error
            rounds = read_lines(self.run.stats) if found is None and self.run.continues else []
            if len(rounds) > 1:  # the first line is written before a state; starting again would lose the others
                raise UserError(f"{self.run.path} has trained {len(rounds)} rounds, but its resumable state is "
                                f"missing; expected {self.checkpoints.newest.name} or "
                                f"{self.checkpoints.previous.name}: copy one back, or start another run with --new")
        if self.processes.broadcast(found is None):
            lines = self._resume() if self.config.resume is not None else []
            self.output.start([*self._introduction(), *lines, "starts at round 1"])
            return
        saved, message = found or ({}, None)
        if self.processes.rank == 0:
            self._load(saved)
        self.rounds = self.processes.broadcast(self.rounds)
        self.output.metrics.load_state_dict(saved.get("missing_metrics", {}))
        self.output.resume(self.rounds + 1, saved.get("seconds", 0.0),
                           [*self._introduction(), *([] if message is None else [message]),
                            f"continues at round {self.rounds + 1}"])

    def _introduction(self) -> list[str]:
        federation, number = self.config.federation, self.rounds + 1
        sites = [f"{name} ({self.output.dataset.sites[name].num_images} images, "
                 f"{self.schedule.num_images(name, number)} in round {number})" for name in federation.sites]
        mebibytes = self.agreement.num_bytes / 2**20
        robust = "" if federation.aggregation == "mean" else f"{federation.aggregation}, "
        return [f"sites: {', '.join(sites)}",
                f"rounds: {federation.rounds}; {robust}{federation.server_optimizer} over {federation.share}, "
                f"{federation.payload}, {mebibytes:.1f} MiB to and from each site in a round"]

    def _resume(self) -> list[str]:
        """Take the weights of --resume; return lines for the log."""
        config = self.config
        return transfer_weights(self.state, config.resume, self._labels, new_classes=config.resume_classes == "new",
                                partial=config.resume_partial).lines()

    def messages(self, number: int, new: Collection[str] = ()) -> dict[str, bytes]:
        """Return what the sites get at the start of a round, by name.

        new:  sites that may begin with this round, as those that join do
        """
        members, federation = self.schedule.members(number), self.config.federation
        if federation.dp:
            before, after = (epsilons(federation, self.schedule, last) for last in (number - 1, number))
            spent = ", ".join(f"{name} {before.get(name, 0):.4g} -> {after[name]:.4g}" for name in members)
            self.output.log(f"round {number} begins: epsilon {spent} (delta {federation.dp_delta:g})")
        tensors = {name: tensor.detach().to("cpu", copy=True)
                   for name, tensor in local_tensors(self.state, self.agreement).items()}
        self._sent = _Sent(number=number, tensors=tensors, base_hash=hash_of_global(self.agreement, tensors),
                           constants_hash=constants_hash(self.state))
        starts = {name: self.config.resume is not None and (name in new or self.schedule.first_round(name) == number)
                  for name in members}
        by_kind = {with_start: encode_global(
            self.agreement, tensors, round=number, constants_hash=self._sent.constants_hash,
            start=start_tensors(self.state, self.agreement) if with_start else None)
            for with_start in {*starts.values()}}
        self._sent.bytes_down = {name: len(by_kind[starts[name]]) for name in members}
        return {name: by_kind[starts[name]] for name in members}

    def finish_round(self, answers: Mapping[str, bytes | str]) -> str | None:
        """Take the mean of the updates, and write what is due; return why the run stops, or None.

        answers:  by site, its update, or the reason why there is none
        """
        sent, federation = self._sent, self.config.federation
        refused = {name: answer for name, answer in answers.items() if isinstance(answer, str)}
        updates: dict[str, SiteUpdate] = {}
        for name, answer in sorted(answers.items()):
            if name not in refused:
                try:
                    updates[name] = decode_update(
                        answer, self.agreement, site=name, round=sent.number, base=sent.tensors,
                        base_hash=sent.base_hash, constants_hash=sent.constants_hash)
                    self._check_length(updates[name])
                except Refused as error:
                    refused[name] = str(error)
                    updates.pop(name, None)
        names = trained(self.agreement.tensors)
        norms = {name: update_norm(update.tensors, sent.tensors, names) for name, update in updates.items()}
        steps = {name: norms[name] / updates[name].numbers.num_iterations for name in updates}
        refused |= refuse_by_norm(steps, self.norms, federation.max_update_norm)
        averages = [name for name in self.agreement.tensors if is_running_average(name)]
        refused |= refuse_by_norm({name: update_norm(update.tensors, sent.tensors, averages)
                                   / update.numbers.num_iterations for name, update in updates.items()
                                   if name not in refused}, [], federation.max_update_norm, "of the moving averages ")
        for name, reason in sorted(refused.items()):
            self.output.log(f"round {sent.number}: the update of {name} is refused: {reason}")
        updates = {name: update for name, update in updates.items() if name not in refused}
        if not updates or (refused and federation.on_refused == "stop"):
            why = "no update is left" if not updates else "--on-refused=stop"
            return f"stopped in round {sent.number} ({why}); the networks are those of round {self.rounds}"
        self._update(updates)
        self.norms = [*self.norms, [steps[name] for name in sorted(updates)]][-NORM_ROUNDS:]
        self.plans.append(self._plan(sent.number))
        self.rounds = sent.number
        self._report(updates, refused, norms, {name: len(answer) for name, answer in answers.items()
                                               if not isinstance(answer, str)})
        return None

    def _check_length(self, update: SiteUpdate) -> None:
        """Raise Refused unless a site trained as long as planned: its weight in the mean depends on that."""
        planned, numbers = self.schedule.num_images(update.site, update.round), update.numbers
        if (numbers.num_images, numbers.num_iterations) != (planned, planned // self.config.batch):
            raise Refused(f"it was trained on {numbers.num_images} images in {numbers.num_iterations} iterations; "
                          f"expected {planned} in {planned // self.config.batch}, as planned")

    def _update(self, updates: Mapping[str, SiteUpdate]) -> None:
        """Replace the networks."""
        sent, federation, batch = self._sent, self.config.federation, self.config.batch
        mean = aggregate({name: Contribution(tensors=update.tensors, num_images=update.numbers.num_images,
                                             images_of_class=update.numbers.images_of_class)
                          for name, update in updates.items()}, federation)
        mean = {name: tensor.float() for name, tensor in mean.items()}
        after = self.optimizer.step(sent.tensors, mean)
        averaged = {f"G_ema.{name}": value.detach().cpu() for name, value in self.state.G_ema.named_parameters()}
        load_tensors(self.state, after)
        if federation.ema == "server":
            beta = round_beta(self.config.step.ema, batch=batch,
                              start_nimg=self.schedule.mean_end_nimg(sent.number - 1),
                              end_nimg=self.schedule.mean_end_nimg(sent.number))
            current = {f"G.{name}": value.detach().cpu() for name, value in self.state.G.named_parameters()}
            load_tensors(self.state, server_average(averaged, current, beta))
        self.state.nimg += sum(update.numbers.num_images for update in updates.values())

    def _report(self, updates: Mapping[str, SiteUpdate], refused: Mapping[str, str], norms: Mapping[str, float],
                bytes_up: Mapping[str, int]) -> None:
        """Report the round."""
        sent, output, nimg = self._sent, self.output, self.state.nimg
        found = {f"Sites/{name}/{statistic}": dict(entry) for name, update in updates.items()
                 for statistic, entry in update.numbers.statistics.items()}
        found |= pool_statistics([update.numbers.statistics for update in updates.values()])
        found |= self._score_valid()
        output.reporter.tick(RoundReport(
            number=sent.number, nimg=nimg, times=output.clock.end(nimg), updates=updates, refused=refused,
            norms=norms, cosines=cosines({name: update.tensors for name, update in updates.items()}, sent.tensors,
                                         trained(self.agreement.tensors)),
            bytes_down=sent.bytes_down, bytes_up=bytes_up,
            site_nimg={name: self.schedule.end_nimg(name, sent.number) for name in updates},
            epsilons=epsilons(self.config.federation, self.schedule, sent.number)), found)

    def write_files(self) -> str | None:
        """Write what is due after a round, and compute metrics; all processes call this.

        Returns why the run has to stop, or None: from a state of an earlier round than the sites' it could not go on.
        """
        output, metrics, self._has_trained = self.output, self.output.metrics, True
        self.rounds, self.state.nimg = self.processes.broadcast((self.rounds, self.state.nimg))
        output.save_round_images(self.rounds)
        is_due = (self.rounds == self.config.federation.rounds
                  or self.rounds % self.config.network_snapshot_ticks == 0)
        if is_due:
            metrics.make_up_replaced(self.state.nimg)
            output.privacy = describe_privacy(self.config.federation, self.schedule, self.rounds)
            output.save_networks()
            metrics.expect(self.rounds, self.state.nimg)
        if self.rounds == self.config.federation.rounds:
            self.ends.append(self.state.nimg)
        self.save_state()
        if is_due and metrics.wanted:
            averaged = {name: value.cpu() for name, value in self.state.G_ema.state_dict().items()}
            self.state.G_ema.load_state_dict(self.processes.broadcast(averaged))
            output.evaluate()
            if metrics.has_given_up:  # a state remembers how long they took: the next command may have no time either
                self.save_state()
        output.remove_networks(self.ends)
        output.begin_tick()
        failure = self.processes.broadcast(output.state_failure)
        return None if failure is None else f"the server's state could not be saved: {failure}"

    def finish(self) -> str | None:
        """Write the last files again if that failed; return what is missing, or None.

        Metrics that take longer than a whole command may run are left to calc_metrics.py, as are those that fail.
        """
        output, metrics = self.output, self.output.metrics
        output.privacy = describe_privacy(self.config.federation, self.schedule, self.rounds)
        output.complete_networks()
        metrics.make_up()
        output.remove_networks(self.ends)
        is_signal = self.processes.any(self._stop.wanted() and self._stop.seconds_left() != 0)
        for what, reason in (("network snapshot", output.network_failure), ("state", output.state_failure)):
            if reason is not None:
                return f"the last {what} could not be written ({reason})"
        if metrics.missing and metrics.left_out is not None and (is_signal or self._has_trained
                                                                 or metrics.has_computed):
            self.save_state()
            return f"metrics are missing ({metrics.left_out})"
        if metrics.missing:
            kimg = ", ".join(f"{missing.nimg / 1000:.1f}" for missing in metrics.missing)
            output.log(f"warning: the metrics at kimg {kimg} were not computed; compute them with calc_metrics.py "
                       f"--run={self.run.path}")
        return None

    def complete(self, run: RunFolder, same_command: str) -> int:
        """Mark a run as finished once its last files are written; return the exit code.

        run:           the folder around that of the server
        same_command:  what continues the run, for the log
        """
        missing = self.finish()
        if missing is None and self.processes.rank == 0:
            try:
                run.mark_finished()
                run.inside(SERVER_FOLDER)  # with the record as it is now
            except OSError as error:
                missing = f"its options could not be written ({error_text(error)})"
        if self.processes.any(missing is not None):
            self.output.log(f"not finished after {self.rounds} rounds: {missing}; once that is fixed, {same_command} "
                            "continues")
            return EXIT_STOPPED
        self.output.log(f"finished after {self.rounds} rounds and {self.state.nimg} images")
        return EXIT_DONE

    def save_state(self) -> None:
        """Save a resumable state; if the disk is full, log a warning and keep the previous state."""
        state = self.state
        self.output.save_state(self.checkpoints, {
            "version": STATE_VERSION, "rounds": self.rounds, "nimg": state.nimg, "norms": self.norms,
            "plans": self.plans, "ends": self.ends, "optimizer": self.optimizer.state_dict(),
            **{role: dict(getattr(state, role).state_dict()) for role in ("G", "D", "G_ema")},
            "missing_metrics": self.output.metrics.state_dict(), "seconds": self.output.clock.total()})

    def _load(self, saved: dict[str, Any]) -> None:
        if saved.get("version") != STATE_VERSION:
            raise UserError(f"{self.checkpoints.newest} has version {saved.get('version')!r}; expected "
                            f"{STATE_VERSION}: continue with the program that wrote it, or start from scratch with "
                            "--new")
        for number, plan in enumerate(saved["plans"], start=1):
            if plan != self._plan(number):
                there, here = (", ".join(f"{name} up to image {nimg}" for name, nimg in each.items())
                               for each in (plan, self._plan(number)))
                raise UserError(f"round {number} of {self.run.path.parent} was trained by {there}, but --sites, "
                                f"--join, --leave and --local now plan {here}; expected changes in later rounds only, "
                                "or --new to start another run")
        try:
            for role in ("G", "D", "G_ema"):
                getattr(self.state, role).load_state_dict(saved[role])
            self.optimizer.load_state_dict(saved["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{self.checkpoints.newest}: {error}") from error
        self.rounds, self.state.nimg = saved["rounds"], saved["nimg"]
        self.norms, self.plans, self.ends = saved["norms"], saved["plans"], saved["ends"]

    def _plan(self, number: int) -> dict[str, int]:
        """Return the image counters of the sites of a round at its end."""
        return {name: self.schedule.end_nimg(name, number) for name in self.schedule.members(number)}

    def _score_valid(self) -> dict[str, dict[str, float]]:
        """Return the statistics of D's scores on the held-out images; {} without."""
        if self._valid is None:
            return {}
        collector = Collector()
        try:
            scores = self._valid.score(self.state.D, self.processes.device)
        except DiskFailure as error:  # training does not depend on them
            self.output.log(f"warning: failed to score --valid: {error}; training continues")
            return {}
        collector.add("Loss/scores/valid", scores)
        collector.add("Loss/signs/valid", scores.sign())
        return collector.flush()
