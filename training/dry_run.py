"""What --dry-run prints: settings, sizes, memory and files of a run, as plain JSON types."""

from typing import Any

from training.balance import image_weights
from training.config import TrainConfig
from training.dataset import ImageDataset
from training.device import Choice, choose_precision
from training.estimate import count_parameters, count_snapshots, estimate_memory, meta_state, state_bytes
from training.presets import describe
from training.run_content import content_of
from training.run_folder import plan_run
from training.run_settings import RunSettings
from training.transfer import Transferred


def describe_run(config: TrainConfig, settings: RunSettings, dataset: ImageDataset, *, device: Choice,
                 transferred: Transferred | None = None) -> dict[str, Any]:
    """Return the settings under the names of `presets.describe`, and beside them what is known before the start.

    transferred:  what --resume gives

    "warnings" are lines that the user should see. Raises UserError where the run would not start.
    """
    content = content_of(dataset, image_weights(settings.balance, dataset))
    run = plan_run(settings.outdir, config, content, **settings.asked(), classes=dataset.label_names or [])
    config = run.config
    state = meta_state(config)
    precision = choose_precision(settings.precision, device.name, config.precision)
    warnings = (precision.warning, run.left_alone, *run.not_continued)
    return {
        **describe(config),
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


def _describe_data(settings: RunSettings, dataset: ImageDataset) -> dict[str, Any]:
    return {
        "path": settings.data,
        "images": dataset.num_images,
        "items": len(dataset),  # mirrored ones included
        "channels": dataset.num_channels,
        "resolution": dataset.resolution,
        "label_kind": dataset.label_kind,
        "label_length": dataset.label_dim if dataset.use_labels else 0,
        "classes": dataset.classes if dataset.use_labels else None,
        "balance": settings.balance,
        "valid": settings.valid,
    }


def _count_snapshots(config: TrainConfig, settings: RunSettings, size: int) -> dict[str, int]:
    """Return how many network files a whole run writes and keeps, and how many bytes they take."""
    written = kept = count_snapshots(config)
    if settings.num_newest is not None:  # the oldest goes once a newer one is written
        kept = min(written, settings.num_newest + (settings.keep_best is not None) + 1)
    return {"written": written, "bytes_each": size, "bytes_written": written * size, "kept": kept,
            "bytes_kept": kept * size}


def _describe_files(config: TrainConfig, settings: RunSettings, sizes: dict[str, int]) -> dict[str, str]:
    """Return when each file of the run's folder is written; KKKKKK stands for thousands of images."""
    snapshot = f"every {config.network_snapshot_ticks} ticks ({_kimg(config, config.network_snapshot_ticks)} kimg)"
    images = f"every {config.image_snapshot_ticks} ticks ({_kimg(config, config.image_snapshot_ticks)} kimg)"
    state = f"with each network, and every {config.state_minutes:g} minutes; {_in_units(sizes['training-state'])}"
    tick = f"a line every {config.kimg_per_tick:g} kimg"
    count = _count_snapshots(config, settings, sizes["network-snapshot"])
    networks = f"{count['written']} in all, {_in_units(count['bytes_written'])}"
    if settings.num_newest is not None:
        networks += f"; {settings.keep_flags} keeps {count['kept']} at a time, {_in_units(count['bytes_kept'])}"
    return {
        "training_options.json": "at the start",
        "log.txt": tick,
        "stats.jsonl": tick,
        "events.*": "for TensorBoard",
        "reals.png": "at the start",
        "fakes_init.png": "at the start",
        "fakesKKKKKK.png": images,
        "network-snapshot-KKKKKK.safetensors": f"{snapshot}; {_in_units(sizes['network-snapshot'])} each; {networks}",
        "training-state.pt": state,
        "training-state.prev.pt": "the state before",
        **{f"metric-{name}.jsonl": "a line with each network" for name in config.metrics},
    }


def _kimg(config: TrainConfig, ticks: int) -> str:
    return f"{ticks * config.kimg_per_tick:g}"


def _in_units(size: int) -> str:
    if size >= 10e9:
        return f"{size / 1e9:.0f} GB"
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB" if size >= 10e6 else f"{size / 1e6:.1f} MB"
