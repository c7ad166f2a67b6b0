"""What `federate.py simulate --dry-run` prints: rounds, bytes, hours and files, known before the start.

Hours are estimated by timing the iterations of one micro-batch on the device at hand.
"""

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch

from federated.aggregate import make_server_optimizer, trained
from federated.agreement import Agreement, bytes_of
from federated.institutions import Institution, PreparedFederation
from federated.privacy import describe_privacy
from federated.schedule import Schedule
from torch_utils.checkpoint import CheckpointPair
from torch_utils.device import choose_precision, ran_out_of_memory
from torch_utils.ops.compiled import make_ready
from training.config import FederationConfig, StepConfig, TrainConfig
from training.dry_run import count_parameters, describe_settings, estimate_memory, meta_state, state_bytes
from training.phases import StepInputs, draw_phases
from training.run_folder import SERVER_FOLDER, RunFolder, plan_run
from training.sampling import LabelDistribution
from training.state import TrainingState
from training.step import train_step

_LARGE = 10_000_000  # trained weights from which on an iteration may take many seconds on a CPU
_REPEATS = 3  # of an iteration that is timed
_BASIS = ("iterations of one micro-batch of random images, timed on this device, with each regularization as often as "
          "it is due; not counted: loading images, averaging, files, metrics and D's scores on --valid")


def describe_simulation(prepared: PreparedFederation) -> dict[str, Any]:
    """Return the settings under the names of `describe_settings`, and everything else known before the start.

    "warnings" are lines to show to the user. Raises UserError if the simulation would not start.
    """
    settings, datasets = prepared.settings, [each.dataset for each in prepared.institutions]
    run = plan_run(settings.outdir, prepared.config, prepared.content_hash, **settings.asked(),
                   classes=datasets[0].label_names or [])
    config, federation = run.config, run.config.federation
    schedule = Schedule(federation, sizes=[dataset.num_images for dataset in datasets], batch=config.batch)
    prepared = replace(prepared, config=config, schedule=schedule)
    state = meta_state(config)
    precision = choose_precision(settings.precision, prepared.device.name, config.precision)
    agreement = Agreement.of(state, share=federation.share, ema=federation.ema, payload=federation.payload,
                             classes=datasets[0].label_names, label_kind=datasets[0].label_kind,
                             privacy=federation.privacy())
    sites = [_describe_site(each, schedule) for each in prepared.institutions]
    warnings = (precision.warning, run.left_alone, *run.not_continued)
    return {
        **describe_settings(config),
        "rounds": federation.rounds,
        "images": sum(site["images_in_all"] for site in sites),
        "sites": sites,
        "federation": federation.to_dict(),
        "privacy": _describe_privacy(agreement, federation, schedule),
        "bytes": _describe_bytes(agreement, sites, resumes=config.resume is not None),
        "hours": _describe_hours(prepared),
        "memory_per_process": _describe_memory(prepared, state),
        "files": _describe_files(prepared, state, agreement),
        "cfg": config.cfg,
        "gpus": prepared.num_processes,
        "seed": config.seed,
        "resume": config.resume,
        "resume_takes": [] if prepared.transferred is None else prepared.transferred.lines(),
        "balance": settings.balance,
        "valid": settings.valid,
        "holdout": prepared.holdout,
        "share_statistics": prepared.share_statistics,
        "device": {"name": prepared.device.name, "reason": prepared.device.reason},
        "precision": {"name": precision.name, "reason": precision.reason},
        "parameters": {"G": count_parameters(state.G), "D": count_parameters(state.D)},
        "run_folder": str(run.path),
        "continues": run.continues,
        "already_finished": run.left_alone is not None,
        "notes": [*settings.notes, *run.notes],
        "warnings": [line for line in warnings if line is not None],
    }


def is_large(config: TrainConfig) -> bool:
    """Return whether an iteration may take many seconds."""
    state = meta_state(config)
    return count_parameters(state.G) + count_parameters(state.D) > _LARGE


def _describe_site(each: Institution, schedule: Schedule) -> dict[str, Any]:
    """Return a site's data and rounds."""
    rounds = [number for number in range(1, schedule.rounds + 1) if each.name in schedule.members(number)]
    images = [schedule.num_images(each.name, number) for number in rounds]
    return {"name": each.name, "data": each.path, "images": each.dataset.num_images,
            "items": len(each.dataset),  # including mirrored images
            "classes": each.dataset.label_names, "rounds": len(rounds), "first_round": min(rounds, default=None),
            "last_round": max(rounds, default=None), "images_of_a_round": sorted(set(images)),
            "images_in_all": sum(images)}


def _describe_privacy(agreement: Agreement, federation: FederationConfig,
                      schedule: Schedule) -> dict[str, Any] | None:
    """Return what --dp guarantees after all rounds, and how much larger than an update its noise is; None without.

    The norm of the noise on d weights is close to its standard deviation times sqrt(d); that of an update is at most
    the clip, and so is that of the mean of n updates, whose noise is sqrt(n) times smaller.
    """
    found = describe_privacy(federation, schedule, federation.rounds)
    if found is None:
        return None
    num_weights, deviation = sum(map(math.prod, agreement.tensors.values())), federation.dp_noise * federation.dp_clip
    ratio = federation.dp_noise * math.sqrt(num_weights)
    return {**found, "noise_std": deviation, "num_weights": num_weights, "noise_norm": deviation * num_weights**0.5,
            "noise_to_update": ratio, "noise_to_update_in_the_mean": ratio / math.sqrt(len(federation.sites))}


def _describe_bytes(agreement: Agreement, sites: Sequence[dict[str, Any]], *, resumes: bool) -> dict[str, int]:
    """Return the bytes of the tensors that are sent.

    sites:    as `_describe_site` returns them
    resumes:  the server sends the constants of --resume to each site, once
    """
    start = bytes_of(agreement.start, torch.float32) if resumes else 0
    return {"to_a_site_in_a_round": agreement.num_bytes, "from_a_site_in_a_round": agreement.num_bytes,
            "to_a_site_at_its_start": start,
            "in_all": sum(2 * site["rounds"] * agreement.num_bytes + (start if site["rounds"] else 0)
                          for site in sites)}


def _describe_hours(prepared: PreparedFederation) -> dict[str, Any]:
    """Return the estimated hours of the training, of all sites in turn and with the processes of --gpus."""
    schedule, seconds = prepared.schedule, time_iteration(prepared.config, prepared.settings.device)
    if seconds is None:
        return {"in_turn": None, "with_gpus": None, "seconds_per_kimg": None, "basis": "memory ran out"}
    in_turn = together = 0  # images, of which the slowest process decides
    for number in range(1, schedule.rounds + 1):
        images = {site: schedule.num_images(site, number) for site in schedule.members(number)}
        in_turn += sum(images.values())
        together += max(sum(images.get(site, 0) for site in sites) for sites in prepared.sites_of_processes())
    per_image = seconds / prepared.config.batch
    shares_cores = prepared.device.name == "cpu" and prepared.num_processes > 1
    return {"in_turn": in_turn * per_image / 3600, "with_gpus": together * per_image / 3600,
            "seconds_per_kimg": 1000 * per_image,
            "basis": _BASIS + ("; processes on a CPU share its cores and save less time" if shares_cores else "")}


def _describe_memory(prepared: PreparedFederation, state: TrainingState) -> dict[str, Any]:
    """Return the peak memory of the process with the most sites, one of which trains at a time."""
    site = estimate_memory(prepared.config, state)
    networks = site.weights + site.averaged_generator
    others = max(len(sites) for sites in prepared.sites_of_processes()) - 1
    return {**site.to_dict(), "other_sites": others * (networks + site.adam), "server": networks,
            "total": site.total + others * (networks + site.adam) + networks}


def _describe_files(prepared: PreparedFederation, state: TrainingState,
                    agreement: Agreement) -> dict[str, dict[str, Any]]:
    """Return when each file of the run's folder is written, and its bytes; KKKKKK stands for thousands of images."""
    config, schedule, states, sizes = prepared.config, prepared.schedule, CheckpointPair(""), state_bytes(state)
    server, site, snap = RunFolder(SERVER_FOLDER), RunFolder("site-NAME"), config.network_snapshot_ticks
    snapshot = sizes["network-snapshot"]
    if config.federation.share == "G":  # D stays at the sites
        snapshot -= sum(tensor.nbytes for tensor in state.D.state_dict().values())
    moments = len(make_server_optimizer(config.federation).MOMENTS)
    server_state = sizes["network-snapshot"] + moments * bytes_of(
        {name: agreement.tensors[name] for name in trained(agreement.tensors)}, torch.float32)
    # File names count thousands of images of all sites: snapshots in the same thousand replace each other.
    ends = accumulate(sum(schedule.num_images(name, number) for name in schedule.members(number))
                      for number in range(1, schedule.rounds + 1))
    written = len({end // 1000 for number, end in enumerate(ends, start=1)
                   if number % snap == 0 or number == schedule.rounds})
    due = "after each round" if snap == 1 else f"after every {snap} rounds, and at the end"
    tick = f"a line every {config.kimg_per_tick:g} kimg of the site, and at the end of a round"
    at_sites = f"after each round, and at least every {config.state_minutes:g} minutes"
    files = {
        RunFolder("").options: ("at the start", None),
        server.options: ("at the start", None),
        server.log: ("a line for each round", None),
        server.stats: ("a line for each round", None),
        server.path / "events.*": ("for TensorBoard", None),
        server.fakes_init: ("at the start", None),
        server.fakes(None): ("after each round", None),
        server.snapshot(None): (f"{due}; {written} in all", snapshot),
        **{server.metric(name): ("a line for each network snapshot", None) for name in config.metrics},
        server.path / states.newest.name: ("after each round", server_state),
        server.path / states.previous.name: ("the state before that", server_state),
        site.options: ("at the start of the site", None),
        site.log: (tick, None),
        site.stats: (tick, None),
        site.path / "events.*": ("for TensorBoard", None),
        site.reals: ("at the start of the site", None),
        site.fakes_init: ("at the start of the site", None),
        site.path / states.newest.name: (at_sites, sizes["training-state"]),
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
    """Return the seconds of an iteration, the median of several if these are short."""
    G, rng = state.G, torch.Generator().manual_seed(0)
    shape = (G.img_channels, G.img_resolution, G.img_resolution)
    labels = torch.eye(G.c_dim) if G.c_dim else torch.zeros(1, 0)
    phases = draw_phases(step, seed=0, nimg=state.nimg, iteration=iteration, microbatches=range(1), z_dim=G.z_dim,
                         num_ws=G.num_ws, label_law=LabelDistribution(labels), image_shape=shape, device=state.device)
    inputs = StepInputs(reals=(2 * torch.rand(step.batch, *shape, generator=rng) - 1).to(state.device),
                        labels=labels[torch.arange(step.batch) % len(labels)].to(state.device), phases=phases)
    times: list[float] = []
    while len(times) < _REPEATS and sum(times) < 1:
        state.iteration = iteration
        started = time.monotonic()
        train_step(state, inputs, step)  # it waits for the device
        times.append(time.monotonic() - started)
    return statistics.median(times)
