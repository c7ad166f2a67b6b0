"""What --dry-run prints: a run's settings, sizes, memory and files, known before it starts.

Memory is estimated by running the phases of an iteration on PyTorch's meta device, where tensors have shapes but no
data, and tracking the peak of the bytes alive, forward and backward.
"""

import math
import weakref
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from torch_utils.checkpoint import CheckpointPair
from torch_utils.device import DeviceChoice, choose_precision
from torch_utils.ops.compiled import estimating
from training.augment import AugmentPipe
from training.config import RunSettings, TrainConfig
from training.dataset import ImageDataset, hash_content
from training.discriminator import Discriminator
from training.generator import Generator
from training.phases import MicroBatch, Phase, PhaseInputs, PhaseWork, active_phases, path_length_images
from training.presets import ADA_KIMG, ADA_KIMG_RESUMED
from training.run_folder import RunFolder, plan_run
from training.sampling import image_weights
from training.state import TrainingState
from training.step import GradientSum
from training.transfer import Transferred

BASIS = ("tensors of one forward and backward pass of the phase with the highest peak, counted on the meta device; "
         "augmentation measured on small images and scaled by area; not counted: PyTorch itself, convolution "
         "workspaces, data loading workers")

_AUGMENT_SIZE = 64  # pixels; below, padding by a fixed number of pixels would distort the estimate
_AUGMENT_BATCH = 4


def describe_run(config: TrainConfig, settings: RunSettings, dataset: ImageDataset, *, device: DeviceChoice,
                 transferred: Transferred | None = None) -> dict[str, Any]:
    """Return the settings under the names of `describe_settings`, and everything else known before the start.

    transferred:  what is taken from --resume

    "warnings" are lines to show to the user. Raises UserError if the run would not start.
    """
    content = hash_content(dataset, image_weights(settings.balance, dataset))
    run = plan_run(settings.outdir, config, content, **settings.asked(), classes=dataset.label_names or [])
    config = run.config
    state = meta_state(config)
    precision = choose_precision(settings.precision, device.name, config.precision)
    warnings = (precision.warning, run.left_alone, *run.not_continued)
    return {
        **describe_settings(config),
        "cfg": config.cfg,
        "gpus": config.gpus,
        "seed": config.seed,
        "micro_batch": config.step.micro_batch,
        "state_minutes": config.state_minutes,
        "num_workers": config.num_workers,
        "allow_tf32": config.allow_tf32,
        "cudnn_benchmark": config.cudnn_benchmark,
        "fp16_channels_last": config.generator.fp16_channels_last,
        "resume": config.resume,
        "resume_classes": config.resume_classes,
        "resume_partial": config.resume_partial,
        "resume_takes": [] if transferred is None else transferred.lines(),
        "resume_layers": None if transferred is None else transferred.to_dict(),
        "per_class": settings.per_class,
        "max_hours": settings.max_hours,
        "keep": settings.num_newest,
        "keep_best": None if settings.keep_best is None else settings.keep_best.key,
        "new": settings.new,
        "data": _describe_data(settings, dataset),
        "device": {"name": device.name, "reason": device.reason},
        "precision": {"name": precision.name, "reason": precision.reason},
        "parameters": {"G": count_parameters(state.G), "D": count_parameters(state.D)},
        "memory_per_process": estimate_memory(config, state).to_dict(),
        "run_folder": str(run.path),
        "continues": run.continues,
        "already_finished": run.left_alone is not None,
        "snapshots": _count_snapshots(config, settings, state_bytes(state)["network-snapshot"]),
        "files": _describe_files(config, settings, state_bytes(state)),
        "notes": [*settings.notes, *run.notes],
        "warnings": [line for line in warnings if line is not None],
    }


def describe_settings(config: TrainConfig) -> dict[str, Any]:
    """Return the settings that a user compares between runs, under short names, as plain JSON types."""
    generator, discriminator, loss, ada = config.generator, config.discriminator, config.step.loss, config.step.ada
    idle_ada_kimg = ADA_KIMG if config.resume is None else ADA_KIMG_RESUMED
    is_fixed = bool(config.augment.strengths) and ada is None
    return {
        "run_name": config.run_name,
        "batch": config.batch,
        "batch_gpu": config.batch_gpu,
        "mbstd_group": discriminator.mbstd_group_size,
        "channel_base": generator.channel_base,
        "channel_max": generator.channel_max,
        "num_fp16_res": generator.num_fp16_res,
        "conv_clamp": generator.conv_clamp,
        "lr": config.g_adam.lr,
        "r1_gamma": loss.gamma,  # its name in NVIDIA's files, with which these settings are compared
        "ema_kimg": config.step.ema.kimg,
        "ema_rampup": config.step.ema.rampup,
        "map_layers": generator.mapping_layers,
        "kimg": config.kimg,
        "pl_weight": loss.pl_weight,
        "style_mixing_prob": loss.style_mixing_prob,
        "d_architecture": discriminator.architecture,
        "ada_target": ada.target if ada else None,
        "ada_kimg": ada.kimg if ada else idle_ada_kimg,
        "image_snapshot_ticks": config.image_snapshot_ticks,
        "network_snapshot_ticks": config.network_snapshot_ticks,
        "kimg_per_tick": config.kimg_per_tick,
        "augment": dict(config.augment.strengths),
        "augment_p": config.augment.p if is_fixed else None,
        "metrics": list(config.metrics),
        "dataset": {
            "use_labels": config.dataset.use_labels,
            "max_size": config.dataset.max_size,
            "xflip": config.dataset.xflip,
            "resolution": config.dataset.resolution,
        },
        "freeze_layers": discriminator.freeze_layers,
    }


def _describe_data(settings: RunSettings, dataset: ImageDataset) -> dict[str, Any]:
    return {
        "path": settings.data,
        "images": dataset.num_images,
        "items": len(dataset),  # including mirrored images
        "channels": dataset.num_channels,
        "resolution": dataset.resolution,
        "label_kind": dataset.label_kind,
        "label_length": dataset.label_dim if dataset.use_labels else 0,
        "classes": dataset.classes if dataset.use_labels else None,
        "balance": settings.balance,
        "valid": settings.valid,
    }


def _count_snapshots(config: TrainConfig, settings: RunSettings, size: int) -> dict[str, int]:
    """Return the number and bytes of the network snapshots that a run writes and keeps; size: bytes of one."""
    end = math.ceil(config.kimg * 1000 / config.batch) * config.batch
    tick = math.ceil(config.kimg_per_tick * 1000 / config.batch) * config.batch  # the first tick is one iteration
    at = (*range(config.batch, end, tick * config.network_snapshot_ticks), end)  # images seen
    # File names count thousands of images: snapshots in the same thousand replace each other.
    written = kept = len({nimg // 1000 for nimg in at})
    if settings.num_newest is not None:  # the oldest is removed once a newer one is written
        kept = min(written, settings.num_newest + (settings.keep_best is not None) + 1)
    return {"written": written, "bytes_each": size, "bytes_written": written * size, "kept": kept,
            "bytes_kept": kept * size}


def _describe_files(config: TrainConfig, settings: RunSettings, sizes: dict[str, int]) -> dict[str, str]:
    """Return when each file of the run's folder is written; KKKKKK stands for a number of thousands of images."""
    snapshot, images = (f"every {ticks} ticks ({ticks * config.kimg_per_tick:g} kimg)" for ticks in (
        config.network_snapshot_ticks, config.image_snapshot_ticks))
    state = (f"with each network snapshot, and at least every {config.state_minutes:g} minutes; "
             f"{_in_units(sizes['training-state'])}")
    tick = f"a line every {config.kimg_per_tick:g} kimg"
    run, states = RunFolder(""), CheckpointPair("")
    count = _count_snapshots(config, settings, sizes["network-snapshot"])
    networks = f"{count['written']} in total, {_in_units(count['bytes_written'])}"
    if settings.num_newest is not None:
        networks += f"; {settings.keep_flags} keeps {count['kept']} at a time, {_in_units(count['bytes_kept'])}"
    return {
        run.options.name: "at the start",
        run.log.name: tick,
        run.stats.name: tick,
        "events.*": "for TensorBoard",
        run.reals.name: "at the start",
        run.fakes_init.name: "at the start",
        run.fakes(None).name: images,
        run.snapshot(None).name: f"{snapshot}; {_in_units(sizes['network-snapshot'])} each; {networks}",
        states.newest.name: state,
        states.previous.name: "the state before that",
        **{run.metric(name).name: "a line for each network snapshot" for name in config.metrics},
    }


def _in_units(size: int) -> str:
    if size >= 10e9:
        return f"{size / 1e9:.0f} GB"
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB" if size >= 10e6 else f"{size / 1e6:.1f} MB"


# Sizes and memory.


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Peak memory of one process, in bytes."""

    weights: int  # of G and D
    averaged_generator: int  # G_ema
    adam: int  # both moments of both networks
    gradients: int  # of the network that `phase` trains
    activations: int
    phase: str  # the phase with the highest peak

    @property
    def total(self) -> int:
        return self.weights + self.averaged_generator + self.adam + self.gradients + self.activations

    def to_dict(self) -> dict[str, Any]:
        """Return the parts, their total and what was counted, as plain JSON types."""
        return {**asdict(self), "total": self.total, "unit": "bytes", "basis": BASIS}


def estimate_memory(config: TrainConfig, state: TrainingState | None = None) -> MemoryEstimate:
    """Return the peak memory of one process of the run. state: from `meta_state`, if there is one already"""
    state = meta_state(config) if state is None else state
    peaks = {phase: _phase_peak(phase, state, config) for phase in active_phases(0, config.step.loss)}
    gradients = {phase: _parameter_bytes(phase.network(state)) for phase in peaks}
    phase = max(peaks, key=lambda phase: peaks[phase] + gradients[phase])
    return MemoryEstimate(
        weights=_bytes(state.G) + _bytes(state.D), averaged_generator=_bytes(state.G_ema),
        adam=2 * (_parameter_bytes(state.G) + _parameter_bytes(state.D)), gradients=gradients[phase],
        activations=peaks[phase] + augment_bytes(config), phase=phase.value)


def meta_state(config: TrainConfig) -> TrainingState:
    """Return the state of a run on the meta device, quickly: shapes without data, and no augmentation."""
    with torch.device("meta"):
        G, G_ema = (Generator(**config.generator.init_kwargs()) for _ in range(2))
        D = Discriminator(**config.discriminator.init_kwargs())
    # Filters are always made on the CPU.
    return TrainingState.from_networks(G.to("meta"), D.to("meta"), G_ema.to("meta"), g_adam=config.g_adam,
                                       d_adam=config.d_adam, loss=config.step.loss)


def _phase_peak(phase: Phase, state: TrainingState, config: TrainConfig) -> int:
    """Return the peak bytes in a micro-batch of a phase, without weights and their gradients."""
    network = phase.network(state)
    gradients = GradientSum([*network.parameters()])
    gradients.sums = [torch.empty_like(parameter) for parameter in gradients.parameters]  # as after a first micro-batch
    network.requires_grad_(True)
    try:
        with LiveBytes() as tracker:
            for loss in PhaseWork(phase, state, config.step.loss).losses(_meta_micro_batch(state, config)):
                gradients.add(loss)
    finally:
        network.requires_grad_(False)
    return tracker.peak


def _meta_micro_batch(state: TrainingState, config: TrainConfig) -> MicroBatch:
    G, size = state.G, config.step.micro_batch
    image = (G.img_channels, G.img_resolution, G.img_resolution)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta")

    inputs = PhaseInputs(z=empty(size, G.z_dim), c=empty(size, G.c_dim), mix_z=empty(size, G.z_dim),
                         pl_noise=empty(path_length_images(size, config.step.loss), *image))
    return MicroBatch(reals=empty(size, *image), labels=empty(size, G.c_dim), inputs=inputs, cutoff=1, rng=None,
                      host_rng=None)


def augment_bytes(config: TrainConfig) -> int:
    """Return the approximate bytes that augmenting a micro-batch takes at p = 1, forward and backward."""
    if not config.augment.strengths:
        return 0
    resolution, channels = config.dataset.resolution, config.dataset.channels
    size = min(resolution, _AUGMENT_SIZE)
    pipe = AugmentPipe(**config.augment.strengths)
    images = torch.zeros(_AUGMENT_BATCH, channels, size, size, requires_grad=True)
    with estimating(), LiveBytes() as tracker:
        pipe(images, generator=torch.Generator().manual_seed(0)).sum().backward()
    return round(tracker.peak / _AUGMENT_BATCH * config.step.micro_batch * (resolution / size) ** 2)


class LiveBytes(TorchDispatchMode):
    """Context manager that tracks the bytes of the tensors created inside: alive now, and their peak."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._note, result)
        return result

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()  # all views share this object, until the last one is gone
        key, size = id(storage), storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            weakref.finalize(storage, self._forget, key, size)
            self.live += size
            self.peak = max(self.peak, self.live)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def count_parameters(network: nn.Module) -> int:
    """Return the number of trainable weights."""
    return sum(parameter.numel() for parameter in network.parameters())


def state_bytes(state: TrainingState) -> dict[str, int]:
    """Return the approximate sizes in bytes of a network snapshot and of a resumable state."""
    snapshot = _bytes(state.G) + _bytes(state.G_ema) + _bytes(state.D)
    return {"network-snapshot": snapshot,
            "training-state": snapshot + 2 * (_parameter_bytes(state.G) + _parameter_bytes(state.D))}


def _bytes(network: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in network.state_dict().values())


def _parameter_bytes(network: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in network.parameters())
