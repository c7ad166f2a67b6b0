"""Train a run from wherever it was left: read images, step, and write statistics, pictures, networks and states.

A tick is the span between two lines of statistics; files are due every so many ticks. Beside it stand what the loop
watches: steps that fail again and again, the discriminator's scores of images that are never learned from, and memory
that runs out.
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
from torch_utils.distributed import Processes, any_process, any_process_each, broadcast_object, first_text, join
from torch_utils.images import to_unit_range
from torch_utils.ops.compiled import auto_implementation
from torch_utils.stats import Collector
from training.config import RunSettings, TrainConfig
from training.dataset import ImageDataset, choose_subset, hash_content
from training.phases import StepInputs, draw_phases
from training.presets import largest_pass
from training.run_folder import RunFolder, choose_run
from training.run_output import RunOutput
from training.run_report import SKIPPED_PREFIX, describe
from training.sampling import LabelDistribution, TrainingOrder, image_weights, iterate_batches
from training.snapshot_metrics import Evaluate
from training.state import TrainingState
from training.step import StepResult, train_step
from training.transfer import transfer_for

EXIT_DONE = 0  # OutOfMemory has another code, 4
EXIT_DIVERGED = 3  # steps kept failing; the last state is that of before
EXIT_STOPPED = EXIT_TEMPORARY  # stopped before its end, with a state: the same command continues

LOOP_VERSION = 1
MOST_SKIPPED_IN_A_ROW = 10
MOST_IMAGES = 256  # of a validation: a tick is to spend seconds on them


def train(config: TrainConfig, settings: RunSettings, dataset: ImageDataset, evaluate: Evaluate | None = None) -> int:
    """Train or continue a run; return its exit code.

    evaluate:  computes metrics of the averaged generator at snapshots; a failure of it is reported, and no more, as
               long as the device works

    A run that did what is asked for is left alone, with a line that tells so.
    Raises UserError when the processes that joined are not as many as config.gpus, or the run cannot be chosen or
    continued, and OutOfMemory when it cannot be held in memory.
    """
    weights = image_weights(settings.balance, dataset)
    with join(settings.device) as processes, StopRequest(settings.max_hours) as stop:
        if processes.count != config.gpus:
            raise UserError(f"{processes.count} processes are in the run, and gpus is {config.gpus}; expected the same "
                            "number: start it with train.py --gpus or torchrun")
        run, config = _open_run(config, settings, dataset, weights, processes)
        if run.left_alone is not None:
            if processes.rank == 0:
                print(run.left_alone, flush=True)
            return EXIT_DONE
        torch.backends.cudnn.benchmark = config.cudnn_benchmark
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.allow_tf32
        loop = None
        try:
            loop = _Loop(config, settings, dataset, weights, processes, run, stop, evaluate)
            return loop.train()
        except Exception as error:  # memory may run out anywhere, and PyTorch has several ways to say it
            if not ran_out_of_memory(error):
                raise
            has_begun = loop is not None and loop.has_begun
            raise OutOfMemory(describe_out_of_memory(config, error, settings.same_command,
                                                     has_begun=has_begun)) from error
        finally:
            if processes.rank == 0:
                run.release()


def _open_run(config: TrainConfig, settings: RunSettings, dataset: ImageDataset, weights: np.ndarray | None,
              processes: Processes) -> tuple[RunFolder, TrainConfig]:
    """Let the main process choose the run's folder; return it with the configuration that the run goes on with."""
    run = None
    if processes.rank == 0:
        run = choose_run(settings.outdir, config, hash_content(dataset, weights), **settings.asked(),
                         classes=dataset.label_names or [])
    chosen = None if run is None else (str(run.path), run.continues, run.left_alone, run.record.config)
    path, continues, left_alone, config = broadcast_object(chosen)
    return run or RunFolder(path, continues=continues, left_alone=left_alone), config


class _Loop:
    """One process's part in a run."""

    def __init__(self, config: TrainConfig, settings: RunSettings, dataset: ImageDataset,
                 weights: np.ndarray | None, processes: Processes, run: RunFolder, stop: StopRequest,
                 evaluate: Evaluate | None):
        self.config, self.dataset, self.processes, self.run, self.stop = config, dataset, processes, run, stop
        self.same_command = settings.same_command
        self.order = TrainingOrder(len(dataset), seed=config.seed, weights=weights)
        self.labels = LabelDistribution(dataset.label_table(),
                                        None if weights is None else weights[:dataset.num_images])
        self.state = TrainingState.create(config, processes.device)
        several = {"reduce": self._sum, "rank": processes.rank, "num_processes": processes.count}
        self.collector = Collector(processes.device, **(several if processes.count > 1 else {}))
        self.valid = None
        if settings.valid is not None:
            held_out = ImageDataset(settings.valid, use_labels=config.dataset.use_labels, classes=dataset.classes)
            group = min(config.discriminator.mbstd_group_size, config.step.micro_batch)
            self.valid = Validation(held_out, group=group, seed=config.seed)
        self.skipped = SkippedSteps()
        self.checkpoints = CheckpointPair(run.path)
        self.tick = 0  # the next one to end
        self.extra_ticks = 0  # among those before: cut short by the end of a run that was continued later
        self.ends: list[int] = []  # images seen at each end that the run reached, with a network file of it
        self.tick_start_nimg = 0
        self.has_begun = self.has_stepped = False  # in this process: the state is there; an iteration was done
        self.output = RunOutput(config, settings, dataset, self.state, processes, run, evaluate, stop)

    def train(self) -> int:
        """Train to the end, or until the run is to stop."""
        self._begin()
        if self._is_done():
            return self._finish()
        # As many readers as were asked for, as far as there are cores besides those of the training processes.
        num_workers = min(self.config.num_workers, max(usable_cores() // self.processes.count - 1, 1))
        batches = iterate_batches(self.dataset, self.order, nimg=self.state.nimg, batch=self.config.batch,
                                  rows=self.processes.share(self.config.batch), num_workers=num_workers,
                                  pin_memory=self.processes.device.type == "cuda")
        batch, failure = _read_batch(batches)
        if any_process(failure is not None):
            return self._stop_for_failure(failure)
        while True:
            failing = self._step(*batch)
            if failing is not None:
                self.output.log(f"stopped: {failing}; {self._advise_other_run()}")
                return EXIT_DIVERGED
            if self._tick_is_full() or self._is_done():
                self._end_tick()
            if self._is_done():
                return self._finish()
            # Read before the processes exchange what they wish, so that all know whether each has its next images.
            batch, failure = _read_batch(batches)
            stops, saves, fails = any_process_each([self.stop.wanted(), self.output.state_is_due(),
                                                    failure is not None])
            # A state of this moment may be there: one is written before metrics, which end early where the run stops.
            if (stops or saves or fails) and any_process(self.output.state_is_older()):
                self._save_state()
            if fails:
                return self._stop_for_failure(failure)
            if stops:
                reason = self.stop.reason or "another process was asked to"
                self.output.log(f"stopped after {self.state.nimg} images ({reason}); {self.output.continuation()}")
                return EXIT_STOPPED

    def _stop_for_failure(self, failure: DiskFailure | None) -> int:
        """Log what failed, in this process or another one, once the state is saved."""
        reason = first_text("" if failure is None else str(failure))
        self.output.log(f"stopped after {self.state.nimg} images: {reason}; {self.output.continuation()}")
        return EXIT_STOPPED

    def _begin(self) -> None:
        """Take up the newest state, or start. Raises UserError when the run had a state once, and has none now."""
        try:
            found = self.checkpoints.load()
        except DamagedCheckpoint as error:
            raise UserError(f"{error} (--new does so)") from error
        if found is None:
            ticks = read_lines(self.run.stats) if self.run.continues else []
            if len(ticks) > 1:  # the first one ends before there is a state; to begin anew would wipe all out
                raise UserError(f"{self.run.path} has trained {len(ticks)} ticks, and its state is gone; expected "
                                f"{self.checkpoints.newest.name} or {self.checkpoints.previous.name}: copy one back, "
                                "or begin another run with --new")
            self.output.start([] if self.config.resume is None else
                              transfer_for(self.state, self.config, self.dataset).lines())
        else:
            saved, message = found
            self._load(saved)
            self.output.resume(self.tick, saved["seconds"], [] if message is None else [message],
                               operators=saved.get("operators"))
        self.has_begun = True

    def _advise_other_run(self) -> str:
        """Return how to go on after steps kept failing, and lose nothing."""
        newest = self.run.newest_snapshot()
        keeps = "" if newest is None else f"; --resume={newest} lets it start from the weights learned here"
        return (f"the last state is that of before, and {self.same_command} tries again from there; a larger --gamma "
                f"or --precision=fp32 begins another run{keeps}")

    def _load(self, saved: dict[str, Any]) -> None:
        if saved.get("loop_version") != LOOP_VERSION:
            raise UserError(f"{self.checkpoints.newest} has version {saved.get('loop_version')!r}; expected "
                            f"{LOOP_VERSION}: continue with the program that wrote it, or start anew with --new")
        try:
            self.state.load_state_dict(saved["training"])
            self.collector.load_state_dict(saved["collected"])
        except ValueError as error:
            raise UserError(f"{self.checkpoints.newest}: {error}") from error
        self.skipped.load_state_dict(saved["skipped"])
        self.tick, self.tick_start_nimg = saved["reported_ticks"], saved["tick_start_nimg"]
        self.extra_ticks = saved.get("extra_ticks", 0)  # states of earlier programs have none
        end = saved.get("end_nimg")  # of earlier programs, which remember the last one
        self.ends = saved.get("ends", [] if end is None else [end])
        self.output.metrics.load_state_dict(saved.get("missing_metrics", {}))

    def _step(self, pixels: Tensor, labels: Tensor) -> str | None:
        """Run one iteration; return a message when the run had better stop."""
        device, state, config = self.processes.device, self.state, self.config
        microbatches = self.processes.share(config.batch // config.step.micro_batch)
        reals = to_unit_range(pixels.to(device, non_blocking=True))
        phases = draw_phases(config.step, seed=config.seed, nimg=state.nimg, iteration=state.iteration,
                             microbatches=microbatches, z_dim=state.G.z_dim, num_ws=state.G.num_ws,
                             label_law=self.labels, image_shape=reals.shape[1:], device=device)
        inputs = StepInputs(reals=reals, labels=labels.to(device, non_blocking=True), phases=phases)
        nimg = state.nimg
        result = train_step(state, inputs, config.step, self.processes)
        if not self.has_stepped:
            self.has_stepped = True
            self.output.note_pass(nimg)
        self._collect(result)
        return self.skipped.add(result)

    def _collect(self, result: StepResult) -> None:
        for phase, named in result.stats.items():
            failed = phase in result.skipped
            counted = [float(failed)] if self.processes.rank == 0 else []  # once, not by every process
            self.collector.add(f"{SKIPPED_PREFIX}{phase}", torch.tensor(counted, device=self.state.device))
            for name, values in named.items():
                if not failed:  # one value that is not finite would hide all others of the tick
                    self.collector.add(name, values)
            if failed:
                names = describe_tensors(result.skipped[phase])
                self.output.log(f"{phase} left out before image {self.state.nimg}: not finite: {names}")

    def _is_done(self) -> bool:
        return self.state.nimg >= self.config.kimg * 1000

    def _tick_is_full(self) -> bool:
        """The first tick is the first iteration, so that a run shows early that it works."""
        return self.tick == 0 or self.state.nimg >= self.tick_start_nimg + self.config.kimg_per_tick * 1000

    def _end_tick(self) -> None:
        """Report a tick, and write what is due.

        A tick that the end of the run cuts short is an extra one: if the run is continued later, the others end, and
        files are written, where they would have without it. Only files of the end itself are not replaced by those of
        a few images later, which have the same names: other runs and sets of images may have begun from them.
        """
        self._score_valid()
        self.output.report(self.tick, self.collector.flush())
        is_done, number = self._is_done(), self.tick - self.extra_ticks
        is_named_anew = is_done or self.run.snapshot(self.state.nimg) not in map(self.run.snapshot, self.ends)
        if is_named_anew and (is_done or number % self.config.image_snapshot_ticks == 0):
            self.output.save_images()
        saves = is_done or number % self.config.network_snapshot_ticks == 0
        if saves and is_named_anew:
            self.output.metrics.make_up_replaced(self.state.nimg)
            self.output.save_networks()
            self.output.metrics.expect(self.tick, self.state.nimg)
        if self._tick_is_full():
            self.tick_start_nimg = self.state.nimg
        else:
            self.extra_ticks += 1
        self.tick += 1
        if is_done and self.output.network_failure is None and self.state.nimg not in self.ends:
            self.ends.append(self.state.nimg)
        if saves:
            self._save_state()
        if saves and is_named_anew:
            self.output.evaluate()
            self.output.remove_networks(self.ends)
        self.output.begin_tick()

    def _score_valid(self) -> None:
        """Report D's scores on images that are never learned from; the main process computes them."""
        if self.valid is None:
            return
        scores = torch.zeros(0)
        if self.processes.rank == 0:
            try:
                scores = self.valid.score(self.state.D, self.processes.device)
            except DiskFailure as error:  # training does not need them
                self.output.log(f"warning: --valid is not scored: {error}; training goes on")
        self.collector.add("Loss/scores/valid", scores)
        self.collector.add("Loss/signs/valid", scores.sign())

    def _save_state(self) -> None:
        """Write a state that continues exactly here; a full disk gives a warning and leaves the one before."""
        state = {"loop_version": LOOP_VERSION, "operators": auto_implementation(self.processes.device.type),
                 "training": self.state.state_dict(),
                 "collected": self.collector.state_dict(), "skipped": self.skipped.state_dict(),
                 "reported_ticks": self.tick, "extra_ticks": self.extra_ticks, "ends": list(self.ends),
                 "missing_metrics": self.output.metrics.state_dict(), "tick_start_nimg": self.tick_start_nimg,
                 "seconds": self.output.clock.total()}
        self.output.save_state(self.checkpoints, state)

    def _finish(self) -> int:
        """Mark the run as finished, once its last files are on the disk: what is not there has to be made again."""
        self.output.complete_networks()
        if not self.has_stepped:  # otherwise they were computed, as far as there was time, with the last network
            self.output.metrics.make_up()
        if self._metrics_go_on_later():
            return EXIT_STOPPED
        self.output.remove_networks(self.ends)
        missing = self._mark_finished() if self.processes.rank == 0 else None
        if any_process(missing is not None):
            self.output.log(f"not finished after {self.state.nimg} images: {missing}; once it can be, "
                            f"{self.same_command} continues at image {self.output.saved_nimg or 0}")
            return EXIT_STOPPED
        self.output.log(f"finished after {self.state.nimg} images")
        return EXIT_DONE

    def _metrics_go_on_later(self) -> bool:
        """Tell, and log, whether the same command computes metrics that there was no time for; else the run is over.

        Those that do not end within the whole time of a command are left to calc_metrics.py, and so those that fail.
        """
        metrics = self.output.metrics
        is_signal = any_process(self.stop.wanted() and self.stop.seconds_left() != 0)
        if not metrics.missing:
            return False
        kimg = ", ".join(f"{missing.nimg / 1000:.1f}" for missing in metrics.missing)
        if metrics.left_out is not None and (is_signal or self.has_stepped or metrics.has_computed):
            self.output.log(f"stopped after {self.state.nimg} images ({metrics.left_out}); {self.same_command} "
                            f"computes the metrics at kimg {kimg}")
            self._save_state()
            return True
        self.output.log(f"warning: the metrics at kimg {kimg} are not computed; calc_metrics.py --run={self.run.path} "
                        "computes them")
        return False

    def _mark_finished(self) -> str | None:
        """Return what could not be written; the run is marked as finished where that is nothing."""
        output = self.output
        for what, reason in (("network file", output.network_failure), ("state", output.state_failure)):
            if reason is not None:
                return f"its last {what} could not be written ({reason})"
        try:
            self.run.mark_finished()
        except OSError as error:
            return f"its options could not be written ({describe(error)})"
        return None

    def _sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes."""
        self.processes.sum([tensor])
        return tensor


def _read_batch(batches: Iterator[tuple[Tensor, Tensor]]) -> tuple[tuple[Tensor, Tensor] | None, DiskFailure | None]:
    """Return the next images and labels, or why they cannot be read."""
    try:
        return next(batches), None
    except DiskFailure as error:
        return None, error


class SkippedSteps:
    """Counts, phase by phase, how often in a row a step was left out."""

    def __init__(self):
        self.in_a_row: dict[str, int] = defaultdict(int)

    def add(self, result: StepResult) -> str | None:
        """Take an iteration into account; return a message once a phase failed too often in a row."""
        for phase in result.stats:
            self.in_a_row[phase] = self.in_a_row[phase] + 1 if phase in result.skipped else 0
        for phase, names in result.skipped.items():
            if self.in_a_row[phase] >= MOST_SKIPPED_IN_A_ROW:
                return (f"{phase} had a loss or gradient that is not finite {self.in_a_row[phase]} times in a row "
                        f"({describe_tensors(names)}); look at the data")
        return None

    def state_dict(self) -> dict[str, int]:
        return dict(self.in_a_row)

    def load_state_dict(self, saved: dict[str, int]) -> None:
        self.in_a_row = defaultdict(int, saved)


class Validation:
    """D's logits on a data set's images, or a fixed choice of MOST_IMAGES, without augmentation.

    Of images that are never learned from: where the discriminator overfits, their scores part from those of reals.

    group:  images of a group of the minibatch standard deviation, as in training: a score depends on its neighbors
    seed:   of the choice and of the groups

    Images and groups depend neither on the batch nor on the number of processes. They are mixed at random, as those of
    training are: sets may come class by class. A last group that is not full is filled up with images of the first
    ones, whose logits in it do not count.
    """

    def __init__(self, dataset: ImageDataset, *, group: int, seed: int):
        self.dataset = dataset
        chosen = choose_subset(dataset.num_images, MOST_IMAGES, seed)
        self.rows = np.random.RandomState(seed % 2**31).permutation(chosen)  # of the data set; each once
        num_groups = -(-len(self.rows) // group)
        self._groups = np.resize(self.rows, (num_groups, group))  # repeats from the beginning

    @torch.no_grad()
    def score(self, D: nn.Module, device: torch.device) -> Tensor:
        """Return logits [len(rows)], in their order. Raises UserError when an image cannot be read."""
        logits = []
        for rows in self._groups:
            items = [self.dataset[row] for row in rows]
            pixels, labels = (torch.stack([torch.tensor(item[part]) for item in items]).to(device) for part in (0, 1))
            logits.append(D(to_unit_range(pixels), labels).flatten())
        return torch.cat(logits)[:len(self.rows)]


def describe_out_of_memory(config: TrainConfig, error: BaseException, same_command: str, *, has_begun: bool) -> str:
    """Return what to do when memory ran out; it continues the run.

    same_command:  see RunSettings.same_command
    has_begun:     networks and optimizers are in memory, so that smaller passes help
    """
    larger = (f"free memory on the device or take one that has more, and {same_command} continues the run (a smaller "
              "--cfg or resolution begins another one)")
    if any(sign in str(error) for sign in SIGNS_OF_READERS):
        return (f"a process that reads images was killed, as the system does when memory runs out; {same_command} "
                "with --workers=1 continues the run")
    if not has_begun:
        return f"out of memory before the first image, where networks and optimizers have to fit; {larger}"
    smaller, size = smaller_batch_gpu(config), config.step.micro_batch
    if smaller is None:
        return f"out of memory with one image a pass (--batch-gpu={size}); {larger}"
    return (f"out of memory with --batch-gpu={size}; {same_command} with --batch-gpu={smaller} continues the run from "
            "its last state: the same batch in smaller passes")


def smaller_batch_gpu(config: TrainConfig) -> int | None:
    """Return the largest --batch-gpu up to half of this run's that it could take, or None when there is none."""
    return largest_pass(config.batch // config.gpus, config.discriminator.mbstd_group_size,
                        config.step.micro_batch // 2)


def describe_tensors(names: list[str]) -> str:
    """Return the first names of a list."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
