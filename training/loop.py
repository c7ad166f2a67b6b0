"""Train a run from where it stopped: read images, step, and write statistics, sample grids, snapshots and states.

A tick is the interval between two lines of statistics; files are written at multiples of ticks. This file also holds
what the loop watches: repeatedly failing steps, the discriminator's scores on held-out images, and running out of
memory.
"""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dnnlib.cli import StopRequest, UserError
from dnnlib.files import EXIT_TEMPORARY, DiskFailure
from dnnlib.lines import read_lines
from dnnlib.workers import usable_cores
from torch_utils.checkpoint import CheckpointPair, DamagedCheckpoint
from torch_utils.device import SIGNS_OF_READERS, OutOfMemory, ran_out_of_memory
from torch_utils.distributed import Processes, join
from torch_utils.images import to_unit_range
from torch_utils.ops.compiled import auto_implementation
from torch_utils.stats import Collector
from training.config import RunSettings, TrainConfig
from training.dataset import ImageDataset, choose_subset, hash_content
from training.phases import StepInputs, draw_phases
from training.presets import largest_pass
from training.run_folder import RunFolder, choose_run
from training.run_output import RunOutput
from training.run_report import SKIPPED_PREFIX, error_text
from training.sampling import LabelDistribution, TrainingOrder, image_weights, iterate_batches
from training.snapshot_metrics import Evaluate
from training.state import TrainingState
from training.step import Proximal, StepResult, train_step
from training.transfer import transfer_for

EXIT_DONE = 0  # the code of OutOfMemory is 4
EXIT_DIVERGED = 3  # steps kept failing; the last state was saved before that
EXIT_STOPPED = EXIT_TEMPORARY  # stopped before the end with a resumable state: the same command continues

LOOP_VERSION = 1
MOST_SKIPPED_IN_A_ROW = 10
MOST_IMAGES = 256  # of a validation, so that it takes seconds per tick


def train(config: TrainConfig, settings: RunSettings, dataset: ImageDataset, evaluate: Evaluate | None = None) -> int:
    """Train or continue a run; return its exit code.

    evaluate:  computes metrics of the averaged generator at network snapshots; its failures are only logged, as long as
               the device works

    A run that is already finished is left alone, with a message.
    Raises UserError if the number of processes is not config.gpus, or the run cannot be chosen or continued, and
    OutOfMemory if memory runs out.
    """
    weights = image_weights(settings.balance, dataset)
    with join(settings.device) as processes, StopRequest(settings.max_hours) as stop:
        if processes.count != config.gpus:
            raise UserError(f"the run has {processes.count} processes, but gpus is {config.gpus}; expected the same "
                            "number: start it with train.py --gpus or torchrun")
        run, config = _open_run(config, settings, dataset, weights, processes)
        if run.left_alone is not None:
            if processes.rank == 0:
                print(run.left_alone, flush=True)
            return EXIT_DONE
        set_backends(config)
        loop = None
        try:
            loop = TrainingLoop(config, settings, dataset, weights, processes, run, stop, evaluate)
            return loop.train()
        except Exception as error:  # memory may run out anywhere, and PyTorch reports it in several ways
            if not ran_out_of_memory(error):
                raise
            has_started = loop is not None and loop.has_started
            raise OutOfMemory(describe_out_of_memory(config, error, settings.same_command,
                                                     has_started=has_started)) from error
        finally:
            if processes.rank == 0:
                run.release()


def set_backends(config: TrainConfig) -> None:
    """Set what PyTorch may do on GPUs."""
    torch.backends.cudnn.benchmark = config.cudnn_benchmark
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.allow_tf32


def _open_run(config: TrainConfig, settings: RunSettings, dataset: ImageDataset, weights: np.ndarray | None,
              processes: Processes) -> tuple[RunFolder, TrainConfig]:
    """Let the main process choose the run's folder; return it with the configuration to train with."""
    run = None
    if processes.rank == 0:
        run = choose_run(settings.outdir, config, hash_content(dataset, weights), **settings.asked(),
                         classes=dataset.label_names or [])
    chosen = None if run is None else (str(run.path), run.continues, run.left_alone, run.record.config)
    path, continues, left_alone, config = processes.broadcast(chosen)
    return run or RunFolder(path, continues=continues, left_alone=left_alone), config


class TrainingLoop:
    """One process's part in a run.

    A site of a decentralized training (federated/site.py) calls `train_until` for each round instead of `train`.

    state:  before the first iteration; None creates one
    title:  starts each line on the screen
    """

    def __init__(self, config: TrainConfig, settings: RunSettings, dataset: ImageDataset,
                 weights: np.ndarray | None, processes: Processes, run: RunFolder, stop: StopRequest,
                 evaluate: Evaluate | None, *, state: TrainingState | None = None, title: str = ""):
        self.config, self.dataset, self.processes, self.run, self.stop = config, dataset, processes, run, stop
        self.same_command = settings.same_command
        self.order = TrainingOrder(len(dataset), seed=config.seed, weights=weights)
        self.labels = LabelDistribution(dataset.label_table(),
                                        None if weights is None else weights[:dataset.num_images])
        self.state = TrainingState.create(config, processes.device) if state is None else state
        self.proximal: Proximal | None = None
        self.end_nimg = config.kimg * 1000
        several = {"reduce": self._sum, "rank": processes.rank, "num_processes": processes.count}
        self.collector = Collector(processes.device, **(several if processes.count > 1 else {}))
        self.valid = None
        if settings.valid is not None:
            held_out = ImageDataset(settings.valid, use_labels=config.dataset.use_labels, classes=dataset.classes)
            group = min(config.discriminator.mbstd_group_size, config.step.micro_batch)
            self.valid = Validation(held_out, group=group, seed=config.seed)
        self.skipped = SkippedSteps()
        self.checkpoints = CheckpointPair(run.path)
        self.tick = 0  # number of the current tick
        self.extra_ticks = 0  # earlier ticks that were cut short by the end of the run, before it was continued
        self.ends: list[int] = []  # images seen at each end that the run reached with a network snapshot
        self.tick_start_nimg = 0
        self.has_started = self.has_stepped = False  # in this process: the state is loaded; an iteration was done
        self.output = RunOutput(config, settings, dataset, self.state, processes, run, evaluate, stop, title=title)

    def train(self) -> int:
        """Train to the end, or until the run is asked to stop; return the exit code."""
        self.start()
        code = self.train_until(self.config.kimg * 1000)
        return self._finish() if code is None else code

    def train_until(self, nimg: int) -> int | None:
        """Run iterations until this many images are seen; return the exit code if the run stops before, else None."""
        self.end_nimg = nimg
        if self._is_done():
            return None
        # No more data loading workers than cores that the training processes leave free, but at least one.
        num_workers = min(self.config.num_workers, max(usable_cores() // self.processes.count - 1, 1))
        batches = iterate_batches(self.dataset, self.order, nimg=self.state.nimg, batch=self.config.batch,
                                  rows=self.processes.share(self.config.batch), num_workers=num_workers,
                                  pin_memory=self.processes.device.type == "cuda")
        batch, failure = _read_batch(batches)
        if self.processes.any(failure is not None):
            return self._stop_for_failure(failure)
        while True:
            failing = self._step(*batch)
            if failing is not None:
                self.output.log(f"stopped: {failing}; {self._advise_other_run()}")
                return EXIT_DIVERGED
            if self._tick_is_full() or self._is_done():
                self.end_tick()
            if self._is_done():
                return None
            # Read before the processes exchange flags, so that all know whether each has its next images.
            batch, failure = _read_batch(batches)
            stops, saves, fails = self.processes.any_each([self.stop.wanted(), self.output.state_is_due(),
                                                           failure is not None])
            # The state may be saved already: that happens before metrics, which end early when the run stops.
            if (stops or saves or fails) and self.processes.any(self.output.state_is_older()):
                self.save_state()
            if fails:
                return self._stop_for_failure(failure)
            if stops:
                reason = self.stop.reason or "another process was asked to stop"
                self.output.log(f"stopped after {self.state.nimg} images ({reason}); {self.output.continuation()}")
                return EXIT_STOPPED

    def _stop_for_failure(self, failure: DiskFailure | None) -> int:
        """Log what failed, in this process or another one; the state is saved already."""
        reason = self.processes.first_text("" if failure is None else str(failure))
        self.output.log(f"stopped after {self.state.nimg} images: {reason}; {self.output.continuation()}")
        return EXIT_STOPPED

    def start(self) -> None:
        """Continue from the newest state, or start from scratch. Raises UserError if the run's state is missing."""
        try:
            found = self.checkpoints.load()
        except DamagedCheckpoint as error:
            raise UserError(f"{error} (--new does so)") from error
        if found is None:
            ticks = read_lines(self.run.stats) if self.run.continues else []
            if len(ticks) > 1:  # the first tick ends before a state is saved; starting from scratch would lose the rest
                raise UserError(f"{self.run.path} has trained {len(ticks)} ticks, but its resumable state is "
                                f"missing; expected {self.checkpoints.newest.name} or "
                                f"{self.checkpoints.previous.name}: copy one back, or start another run with --new")
            self.output.start([] if self.config.resume is None else
                              transfer_for(self.state, self.config, self.dataset).lines())
        else:
            saved, message = found
            self.load_state_dict(saved)
            self.output.resume(self.tick, saved["seconds"], [] if message is None else [message],
                               operators=saved.get("operators"))
        self.has_started = True

    def _advise_other_run(self) -> str:
        """Return, for the log, how to continue after steps kept failing, without losing anything."""
        newest = self.run.newest_snapshot()
        keeps = "" if newest is None else f"; --resume={newest} starts it from the weights learned here"
        return (f"the last state was saved before that, and {self.same_command} tries again from there; a larger "
                f"--gamma or --precision=fp32 starts another run{keeps}")

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned. Raises UserError if it does not fit this run."""
        if saved.get("loop_version") != LOOP_VERSION:
            raise UserError(f"{self.checkpoints.newest} has version {saved.get('loop_version')!r}; expected "
                            f"{LOOP_VERSION}: continue with the program that wrote it, or start from scratch with "
                            "--new")
        try:
            self.state.load_state_dict(saved["training"])
            self.collector.load_state_dict(saved["collected"])
        except ValueError as error:
            raise UserError(f"{self.checkpoints.newest}: {error}") from error
        self.skipped.load_state_dict(saved["skipped"])
        self.tick, self.tick_start_nimg = saved["reported_ticks"], saved["tick_start_nimg"]
        self.extra_ticks = saved.get("extra_ticks", 0)  # missing in states of earlier versions
        end = saved.get("end_nimg")  # in states of earlier versions, which recorded the last end only
        self.ends = saved.get("ends", [] if end is None else [end])
        self.output.metrics.load_state_dict(saved.get("missing_metrics", {}))

    def _step(self, pixels: Tensor, labels: Tensor) -> str | None:
        """Run one iteration; return a message if the run should stop."""
        device, state, config = self.processes.device, self.state, self.config
        microbatches = self.processes.share(config.batch // config.step.micro_batch)
        reals = to_unit_range(pixels.to(device, non_blocking=True))
        phases = draw_phases(config.step, seed=config.seed, nimg=state.nimg, iteration=state.iteration,
                             microbatches=microbatches, z_dim=state.G.z_dim, num_ws=state.G.num_ws,
                             label_law=self.labels, image_shape=reals.shape[1:], device=device)
        inputs = StepInputs(reals=reals, labels=labels.to(device, non_blocking=True), phases=phases)
        nimg = state.nimg
        result = train_step(state, inputs, config.step, self.processes, self.proximal)
        if not self.has_stepped:
            self.has_stepped = True
            self.output.note_pass(nimg)
        self._collect(result)
        return self.skipped.add(result)

    def _collect(self, result: StepResult) -> None:
        for phase, named in result.stats.items():
            failed = phase in result.skipped
            counted = [float(failed)] if self.processes.rank == 0 else []  # once, not in every process
            self.collector.add(f"{SKIPPED_PREFIX}{phase}", torch.tensor(counted, device=self.state.device))
            for name, values in named.items():
                if not failed:  # one value that is not finite would spoil the mean of the tick
                    self.collector.add(name, values)
            if failed:
                names = describe_tensors(result.skipped[phase])
                self.output.log(f"{phase} skipped before image {self.state.nimg}: not finite: {names}")

    def _is_done(self) -> bool:
        return self.state.nimg >= self.end_nimg

    def _tick_is_full(self) -> bool:
        """The first tick is a single iteration, so that a run shows early that it works."""
        return self.tick == 0 or self.state.nimg >= self.tick_start_nimg + self.config.kimg_per_tick * 1000

    def end_tick(self) -> None:
        """Report a tick, and write the files that are due.

        A tick that is cut short by the end of the run is extra: if the run is continued later, the other ticks end, and
        files are written, as if there had been no such tick. But files from an end of the run are not replaced by files
        of the same name a few images later: other runs and image sets may depend on them.
        """
        self.report_tick()
        is_done, number = self._is_done(), self.tick - self.extra_ticks
        has_new_name = is_done or self.run.snapshot(self.state.nimg) not in map(self.run.snapshot, self.ends)
        if has_new_name and (is_done or number % self.config.image_snapshot_ticks == 0):
            self.output.save_images()
        saves = is_done or number % self.config.network_snapshot_ticks == 0
        if saves and has_new_name:
            self.output.metrics.make_up_replaced(self.state.nimg)
            self.output.save_networks()
            self.output.metrics.expect(self.tick, self.state.nimg)
        self.count_tick()
        if is_done and self.output.network_failure is None and self.state.nimg not in self.ends:
            self.ends.append(self.state.nimg)
        if saves:
            self.save_state()
        if saves and has_new_name:
            self.output.evaluate()
            self.output.remove_networks(self.ends)
        self.output.begin_tick()

    def report_tick(self) -> dict[str, dict[str, float]]:
        """Report the statistics of a tick that just ended; return them."""
        self._score_valid()
        found = self.collector.flush()
        self.output.report(self.tick, found)
        return found

    def count_tick(self) -> None:
        """Begin to count the images of the next tick."""
        if self._tick_is_full():
            self.tick_start_nimg = self.state.nimg
        else:
            self.extra_ticks += 1
        self.tick += 1

    def _score_valid(self) -> None:
        """Report D's scores on the held-out images; the main process computes them."""
        if self.valid is None:
            return
        scores = torch.zeros(0)
        if self.processes.rank == 0:
            try:
                scores = self.valid.score(self.state.D, self.processes.device)
            except DiskFailure as error:  # training does not depend on them
                self.output.log(f"warning: failed to score --valid: {error}; training continues")
        self.collector.add("Loss/scores/valid", scores)
        self.collector.add("Loss/signs/valid", scores.sign())

    def save_state(self) -> None:
        """Save a resumable state; if the disk is full, log a warning and keep the previous state."""
        self.output.save_state(self.checkpoints, self.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """Return all that a continuation needs, for `write_checkpoint`."""
        return {"loop_version": LOOP_VERSION, "operators": auto_implementation(self.processes.device.type),
                "training": self.state.state_dict(),
                "collected": self.collector.state_dict(), "skipped": self.skipped.state_dict(),
                "reported_ticks": self.tick, "extra_ticks": self.extra_ticks, "ends": list(self.ends),
                "missing_metrics": self.output.metrics.state_dict(), "tick_start_nimg": self.tick_start_nimg,
                "seconds": self.output.clock.total()}

    def _finish(self) -> int:
        """Mark the run as finished once its last files are written; return the exit code."""
        self.output.complete_networks()
        if not self.has_stepped:  # otherwise they were computed with the last network, if there was time
            self.output.metrics.make_up()
        if self._metrics_are_postponed():
            return EXIT_STOPPED
        self.output.remove_networks(self.ends)
        missing = self._mark_finished() if self.processes.rank == 0 else None
        if self.processes.any(missing is not None):
            self.output.log(f"not finished after {self.state.nimg} images: {missing}; once that is fixed, "
                            f"{self.same_command} continues at image {self.output.saved_nimg or 0}")
            return EXIT_STOPPED
        self.output.log(f"finished after {self.state.nimg} images")
        return EXIT_DONE

    def _metrics_are_postponed(self) -> bool:
        """Tell, and log, whether the same command has to compute metrics for which there was no time.

        Metrics that take longer than a whole command may run are left to calc_metrics.py, as are those that fail.
        """
        metrics = self.output.metrics
        is_signal = self.processes.any(self.stop.wanted() and self.stop.seconds_left() != 0)
        if not metrics.missing:
            return False
        kimg = ", ".join(f"{missing.nimg / 1000:.1f}" for missing in metrics.missing)
        if metrics.left_out is not None and (is_signal or self.has_stepped or metrics.has_computed):
            self.output.log(f"stopped after {self.state.nimg} images ({metrics.left_out}); {self.same_command} "
                            f"computes the metrics at kimg {kimg}")
            self.save_state()
            return True
        self.output.log(f"warning: the metrics at kimg {kimg} were not computed; compute them with calc_metrics.py "
                        f"--run={self.run.path}")
        return False

    def _mark_finished(self) -> str | None:
        """Mark the run as finished, or return which of its files could not be written."""
        output = self.output
        for what, reason in (("network snapshot", output.network_failure), ("state", output.state_failure)):
            if reason is not None:
                return f"its last {what} could not be written ({reason})"
        try:
            self.run.mark_finished()
        except OSError as error:
            return f"its options could not be written ({error_text(error)})"
        return None

    def _sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes."""
        self.processes.sum([tensor])
        return tensor


def _read_batch(batches: Iterator[tuple[Tensor, Tensor]]) -> tuple[tuple[Tensor, Tensor] | None, DiskFailure | None]:
    """Return the next images and labels, or the error that prevents reading them."""
    try:
        return next(batches), None
    except DiskFailure as error:
        return None, error


class SkippedSteps:
    """Counts, for each phase, how many steps in a row were skipped."""

    def __init__(self):
        self.in_a_row: dict[str, int] = defaultdict(int)

    def add(self, result: StepResult) -> str | None:
        """Count an iteration; return a message once a phase failed too often in a row."""
        for phase in result.stats:
            self.in_a_row[phase] = self.in_a_row[phase] + 1 if phase in result.skipped else 0
        for phase, names in result.skipped.items():
            if self.in_a_row[phase] >= MOST_SKIPPED_IN_A_ROW:
                return (f"the loss or a gradient of {phase} was not finite {self.in_a_row[phase]} times in a row "
                        f"({describe_tensors(names)}); check the data")
        return None

    def state_dict(self) -> dict[str, int]:
        return dict(self.in_a_row)

    def load_state_dict(self, saved: dict[str, int]) -> None:
        self.in_a_row = defaultdict(int, saved)


class Validation:
    """D's logits on held-out images, without augmentation: all of the data set, or a fixed subset of MOST_IMAGES.

    When the discriminator overfits, these scores diverge from those on the training images.

    group:  images of a minibatch standard deviation group, as in training: a score depends on the others of its group
    seed:   of the subset and of the groups

    Images and groups depend neither on the batch size nor on the number of processes. Images are shuffled, as in
    training, since a data set may be sorted by class. The last group is filled up with images of the first ones, whose
    logits in it are discarded.
    """

    def __init__(self, dataset: ImageDataset, *, group: int, seed: int):
        self.dataset = dataset
        chosen = choose_subset(dataset.num_images, MOST_IMAGES, seed)
        self.rows = np.random.RandomState(seed % 2**31).permutation(chosen)  # of the data set; each once
        num_groups = -(-len(self.rows) // group)
        self._groups = np.resize(self.rows, (num_groups, group))  # repeats from the start

    @torch.no_grad()
    def score(self, D: nn.Module, device: torch.device) -> Tensor:
        """Return logits [len(rows)], in their order. Raises UserError if an image cannot be read."""
        logits = []
        for rows in self._groups:
            items = [self.dataset[row] for row in rows]
            pixels, labels = (torch.stack([torch.tensor(item[part]) for item in items]).to(device) for part in (0, 1))
            logits.append(D(to_unit_range(pixels), labels).flatten())
        return torch.cat(logits)[:len(self.rows)]


def describe_out_of_memory(config: TrainConfig, error: BaseException, same_command: str, *, has_started: bool) -> str:
    """Return a message on how to continue the run after memory ran out.

    same_command:  see RunSettings.same_command
    has_started:   networks and optimizers are in memory, so that smaller passes help
    """
    larger = (f"free memory on the device or use one that has more, and {same_command} continues the run (a smaller "
              "--cfg or resolution starts another one)")
    if any(sign in str(error) for sign in SIGNS_OF_READERS):
        return (f"a data loading worker was killed, probably because memory ran out; {same_command} "
                "with --workers=1 continues the run")
    if not has_started:
        return f"out of memory before the first image, while creating networks and optimizers; {larger}"
    smaller, size = smaller_batch_gpu(config), config.step.micro_batch
    if smaller is None:
        return f"out of memory with one image per pass (--batch-gpu={size}); {larger}"
    return (f"out of memory with --batch-gpu={size}; {same_command} with --batch-gpu={smaller} continues the run from "
            "its last state: the same batch in smaller passes")


def smaller_batch_gpu(config: TrainConfig) -> int | None:
    """Return the largest --batch-gpu, up to half of this run's, that is valid; None if there is none."""
    return largest_pass(config.batch // config.gpus, config.discriminator.mbstd_group_size,
                        config.step.micro_batch // 2)


def describe_tensors(names: list[str]) -> str:
    """Return the first names of a list, and the number of others."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
