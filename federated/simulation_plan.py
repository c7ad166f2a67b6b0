"""What `federate.py simulate --dry-run` prints: rounds, bytes, hours and files, known before the start.

Hours are estimated by timing the iterations of one micro-batch on the device at hand.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from federated.agreement import Agreement, bytes_of
from federated.institutions import Institution, PreparedFederation
from torch_utils.checkpoint import CheckpointPair
from torch_utils.device import ran_out_of_memory
from torch_utils.ops.compiled import make_ready
from training.config import StepConfig, TrainConfig
from training.dry_run import count_parameters, describe_settings, meta_state, state_bytes
from training.phases import StepInputs, draw_phases
from training.run_folder import SERVER_FOLDER, RunFolder
from training.sampling import LabelDistribution
from training.state import TrainingState
from training.step import train_step

_LARGE = 10_000_000  # trained weights from which on an iteration may take many seconds on a CPU
_BASIS = ("iterations of one micro-batch of random images, timed once each on this device, with each regularization as "
          "often as it is due; not counted: loading images, averaging, files, metrics and D's scores on --valid")


def describe_simulation(prepared: PreparedFederation) -> dict[str, Any]:
    """Return the settings under the names of `describe_settings`, and everything else known before the start.

    As plain JSON types. Raises UserError if the simulation would not start.
    """
    config, federation, schedule = prepared.config, prepared.config.federation, prepared.schedule
    state, agreement = meta_state(config), agree(prepared)
    rounds = range(1, federation.rounds + 1)
    sites = [_describe_site(each, prepared) for each in prepared.institutions]
    parts = sum(site["rounds"] for site in sites)  # one site in one round
    seconds = time_iteration(config, prepared.settings.device)
    return {
        **describe_settings(config),
        "gpus": prepared.num_processes,
        "seed": config.seed,
        "device": {"name": prepared.device.name, "reason": prepared.device.reason},
        "parameters": {"G": count_parameters(state.G), "D": count_parameters(state.D)},
        "federation": federation.to_dict(),
        "sites": sites,
        "images": schedule.total_images(federation.rounds),
        "balance": prepared.settings.balance,
        "valid": prepared.settings.valid,
        "holdout": prepared.holdout,
        "share_statistics": prepared.share_statistics,
        "bytes": {
            "of_a_round": {"to_a_site": agreement.num_bytes, "from_a_site": agreement.num_bytes},
            "at_the_start_to_a_site": 0 if config.resume is None else bytes_of(agreement.start, torch.float32),
            "in_all": 2 * parts * agreement.num_bytes
                      + (0 if config.resume is None else len(sites) * bytes_of(agreement.start, torch.float32)),
        },
        "hours": _describe_hours(prepared, seconds, rounds),
        "files": _describe_files(prepared, state_bytes(state)),
        "notes": list(prepared.settings.notes),
        "warnings": list(prepared.warnings),
    }


def is_large(config: TrainConfig) -> bool:
    """Return whether an iteration may take many seconds."""
    state = meta_state(config)
    return count_parameters(state.G) + count_parameters(state.D) > _LARGE


def agree(prepared: PreparedFederation) -> Agreement:
    """Return what the server and the sites agree on."""
    federation, dataset = prepared.config.federation, prepared.institutions[0].dataset
    return Agreement.of(meta_state(prepared.config), share=federation.share, ema=federation.ema,
                        payload=federation.payload, classes=dataset.label_names, label_kind=dataset.label_kind)


def _describe_site(each: Institution, prepared: PreparedFederation) -> dict[str, Any]:
    """Return a site's data and rounds."""
    schedule, dataset = prepared.schedule, each.dataset
    rounds = [number for number in range(1, schedule.rounds + 1) if each.name in schedule.members(number)]
    images = [schedule.num_images(each.name, number) for number in rounds]
    return {"name": each.name, "path": each.path, "images": dataset.num_images,
            "items": len(dataset),  # including mirrored images
            "classes": dataset.label_names, "images_of_a_round": [min(images, default=0), max(images, default=0)],
            "rounds": len(rounds), "first_round": min(rounds, default=None), "last_round": max(rounds, default=None),
            "kimg": sum(images) / 1000}


def _describe_hours(prepared: PreparedFederation, seconds: float | None, rounds: Sequence[int]) -> dict[str, Any]:
    """Return the estimated hours of the simulation; seconds: of an iteration, None if memory ran out."""
    if seconds is None:
        return {"in_turn": None, "with_gpus": None, "seconds_per_kimg": None, "basis": "memory ran out"}
    per_image = seconds / prepared.config.batch
    in_turn = together = 0.0
    for number in rounds:
        times = [per_image * prepared.schedule.num_images(site, number) for site in prepared.schedule.members(number)]
        in_turn += sum(times)
        together += max(sum(times[rank::prepared.num_processes]) for rank in range(prepared.num_processes))
    shared = "; processes on a CPU share its cores, so that several save less time" if (
        prepared.device.name == "cpu" and prepared.num_processes > 1) else ""
    return {"in_turn": in_turn / 3600, "with_gpus": together / 3600, "seconds_per_kimg": 1000 * per_image,
            "basis": _BASIS + shared}


def _describe_files(prepared: PreparedFederation, sizes: dict[str, int]) -> dict[str, dict[str, Any]]:
    """Return when each file of the run's folder is written, and its bytes; KKKKKK stands for thousands of images.

    sizes:  of `training.dry_run.state_bytes`
    """
    config, schedule, states = prepared.config, prepared.schedule, CheckpointPair("")
    server, site = RunFolder(SERVER_FOLDER), RunFolder("site-NAME")
    snap = config.network_snapshot_ticks
    # File names count thousands of images: snapshots in the same thousand replace each other.
    snapshots = len({schedule.mean_end_nimg(number) // 1000 for number in range(1, schedule.rounds + 1)
                     if number % snap == 0 or number == schedule.rounds})
    when = "after each round" if snap == 1 else f"after every {snap} rounds, and at the end"
    files = {
        server.log: ("a line for each round", None),
        server.stats: ("a line for each round", None),
        server.path / "events.*": ("for TensorBoard", None),
        server.fakes(None): ("after each round", None),
        server.snapshot(None): (f"{when}: {snapshots} in all", sizes["network-snapshot"]),
        **{server.metric(name): ("a line for each network snapshot", None) for name in config.metrics},
        site.log: ("a line for each tick", None),
        site.stats: ("a line for each tick", None),
        site.path / states.newest.name: ("after each round of the site", sizes["training-state"]),
        site.path / states.previous.name: ("the state before that", sizes["training-state"]),
    }
    return {str(path): {"written": when, "bytes": size} for path, (when, size) in files.items()}


def time_iteration(config: TrainConfig, device: str) -> float | None:
    """Return the mean seconds of an iteration on this device, None if memory runs out.

    With g, d the intervals of the regularizations, and t the times of iterations in which only some phases run:

        t(Gmain, Dmain) + (t(Gmain, Greg, Dmain) - t(Gmain, Dmain)) / g + (t(all) - t(Gmain, Greg, Dmain)) / d
    """
    make_ready(torch.device(device).type)
    step, loss = replace(config.step, batch=config.step.micro_batch), config.step.loss
    at = {"none": 1, "Greg": loss.g_reg_interval, "all": 0}
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=config.cudnn_benchmark, allow_tf32=config.allow_tf32):
            state = TrainingState.create(config, device)
            _time_step(state, step, 0)  # warms up all phases
            times = {name: _time_step(state, step, iteration) for name, iteration in at.items()}
    except Exception as error:  # PyTorch raises several types
        if not ran_out_of_memory(error):
            raise
        return None
    mean = (times["none"] + max(times["Greg"] - times["none"], 0) / loss.g_reg_interval
            + max(times["all"] - times["Greg"], 0) / loss.d_reg_interval)
    return mean * (config.batch // config.step.micro_batch)


def _time_step(state: TrainingState, step: StepConfig, iteration: int) -> float:
    """Return the seconds of an iteration; it ends when the device has done it."""
    G, rng = state.G, torch.Generator().manual_seed(0)
    shape = (G.img_channels, G.img_resolution, G.img_resolution)
    labels = torch.eye(G.c_dim) if G.c_dim else torch.zeros(1, 0)
    phases = draw_phases(step, seed=0, nimg=state.nimg, iteration=iteration, microbatches=range(1), z_dim=G.z_dim,
                         num_ws=G.num_ws, label_law=LabelDistribution(labels), image_shape=shape, device=state.device)
    inputs = StepInputs(reals=(2 * torch.rand(step.batch, *shape, generator=rng) - 1).to(state.device),
                        labels=labels[torch.arange(step.batch) % len(labels)].to(state.device), phases=phases)
    state.iteration = iteration
    started = time.monotonic()
    train_step(state, inputs, step)
    return time.monotonic() - started
