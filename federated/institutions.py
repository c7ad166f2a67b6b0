"""The institutions of a decentralized training: open and check their data sets, and resolve the settings they share.

Everything that can be checked is checked before anything is written, as `training.command` does for train.py: each
institution is a "site" with a name and a data set of its own, and all of them train the same networks.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from dnnlib.cli import UserError
from dnnlib.text import listed, plural, shorten
from federated.privacy import epsilons, find_noise
from federated.schedule import Schedule, default_round_kimg
from federated.shared_statistics import FEWEST_IMAGES, parse_shared_metrics
from imagesets.classes import CLASS, LABELS, VECTOR
from imagesets.reader import describe_shape
from metrics.evaluation import Evaluator
from metrics.names import needed_detectors, parse_metrics, require_detectors
from metrics.perceptual_path import check_path_requests
from torch_utils.device import DeviceChoice, check_counts
from torch_utils.distributed import Place
from training.command import (
    ChooseMetrics,
    check_held_out,
    check_images,
    check_per_class,
    check_resume_weights,
    check_valid,
    find_equal_images,
    find_shared_groups,
    hashing_workers,
    note_on_empty_classes,
    parse_flags,
)
from training.config import NAME, NAME_FORM, DatasetFacts, FederationConfig, RunSettings, TrainConfig
from training.dataset import ImageDataset, hash_content
from training.sampling import image_weights
from training.snapshot_metrics import Evaluate
from training.transfer import Transferred

# Settings of server optimizers: by field of FederationConfig, the optimizers that use it.
_USED_BY = {"server_lr": ("fedavgm", "fedadam"), "server_momentum": ("fedavgm", "fedadam"),
            "server_beta2": ("fedadam",), "server_tau": ("fedadam",)}
_OF_PRIVACY = ("dp_clip", "dp_noise", "dp_epsilon", "dp_delta")  # settings of --dp
# Flags that describe metrics, and so need images to compare with.
_OF_METRICS = ("metrics", "detector", "detector_weights", "keep_best", "per_class")
_REFERENCES = "--holdout=SET, a data set that no site trains on, or --share-statistics: add one"


@dataclass(frozen=True, kw_only=True, eq=False)
class Institution:
    """One of the institutions, and its images."""

    name: str
    index: int  # in the order of --data
    path: str
    dataset: ImageDataset
    weights: np.ndarray | None  # of training.sampling.image_weights

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 of the images, labels and weights in use."""
        return hash_content(self.dataset, self.weights)

    @property
    def label(self) -> str:
        """Its data set and name, for messages."""
        return f"{self.path} (site {self.name})"


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedFederation:
    """A decentralized training that can start: its inputs were checked."""

    config: TrainConfig  # of all sites; one process trains a site, so gpus is 1
    settings: RunSettings  # data are the paths, separated by commas
    institutions: tuple[Institution, ...]  # in the order of --data
    schedule: Schedule
    holdout: str | None  # path of the images that metrics compare with
    share_statistics: bool  # metrics compare with feature statistics of the sites' images
    num_processes: int  # that train sites at the same time
    device: DeviceChoice
    warnings: tuple[str, ...]  # on choices made for the user; also in settings.notes
    alerts: tuple[str, ...] = ()  # the warnings that are always shown on standard error
    transferred: Transferred | None = None  # what is taken from --resume; None without it

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 of what the sites of the first round train on: others may join while a run is going on."""
        first = self.schedule.members(1)
        parts = sorted((each.name, each.content_hash) for each in self.institutions if each.name in first)
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def sites_of_processes(self) -> list[list[str]]:
        """Return the names of the sites that each process trains, sorted: the work is shared out evenly."""
        work, sites = [0] * self.num_processes, [[] for _ in range(self.num_processes)]
        images = {site: self.schedule.end_nimg(site, self.schedule.rounds) for site in self.schedule.sites}
        for site in sorted(images, key=lambda site: -images[site]):
            place = work.index(min(work))
            work[place] += images[site]
            sites[place].append(site)
        return [sorted(names) for names in sites]


def prepare_federation(flags: dict[str, Any], choose_metrics: ChooseMetrics, *,
                       dry_run: bool = False) -> PreparedFederation:
    """Check everything that can be checked before the training starts, and tune the CPU allocator for it.

    flags:    values by the names of `federated.command.FLAGS`, None if not given
    dry_run:  do not decode images for the hashes of their pixels

    Raises UserError, one line, if it cannot work; nothing is written then.
    """
    place = Place.from_environment()
    paths = _check_paths(flags)
    federation = parse_federation(flags, name_sites(flags["sites"], paths))
    check_reference(flags)
    check_counts(gpus=flags["gpus"])
    num_processes = place.processes(flags["gpus"])
    if num_processes > len(paths):
        raise UserError(f"--gpus is {num_processes} for {plural(len(paths), 'site')}; expected at most {len(paths)}: "
                        "one process trains a site")
    parsed = parse_flags(train_flags(flags, paths), choose_metrics, place, num_processes)
    options, settings, is_main = parsed.options, parsed.settings, place.rank == 0
    if flags["share_statistics"] and options.metrics:
        parse_shared_metrics(options.metrics)
    datasets = [ImageDataset(path, use_labels=options.get("cond"), xflip=options.get("mirror")) for path in paths]
    institutions = tuple(Institution(name=federation.sites[index], index=index, path=paths[index], dataset=dataset,
                                     weights=image_weights(settings.balance, dataset))
                         for index, dataset in enumerate(datasets))
    for each in institutions:
        _check_suitable(each, shares_statistics=flags["share_statistics"])
        check_alike(institutions[0], each)
    config = parsed.resolve(_joint_facts(datasets))
    check_per_class(settings, use_labels=config.dataset.use_labels)
    sizes = [dataset.num_images for dataset in datasets]
    config, schedule = plan_rounds(config, federation, sizes, is_given=flags["round_kimg"] is not None)
    config, resume_note = parsed.settle_resume(config)

    held_out = {f"--{name}": ImageDataset(flags[name], use_labels=options.get("cond"), classes=datasets[0].classes)
                for name in ("valid", "holdout") if flags[name] is not None}
    alerts, transferred, label_notes = [], None, []
    if is_main:
        for dataset in datasets:
            check_images(dataset)
        label_notes = [_check_apart(held, institutions, name) for name, held in held_out.items()]
        transferred = check_resume_weights(config, datasets[0])
        alerts = _check_overlap(institutions, held_out, compute=not dry_run, workers=hashing_workers(config))
    empty_note = note_on_empty_classes(datasets, "no institution has") if config.dataset.use_labels else None
    found = (parsed.warning, resume_note, *notes_on_rounds(config.federation, schedule), empty_note, *label_notes,
             *alerts)
    warnings = tuple(line for line in found if line is not None)
    return PreparedFederation(
        config=config, settings=replace(settings, notes=(*parsed.notes, *warnings)), institutions=institutions,
        schedule=schedule, holdout=flags["holdout"], share_statistics=flags["share_statistics"],
        num_processes=num_processes, device=parsed.device, warnings=warnings, alerts=tuple(alerts),
        transferred=transferred)


def make_evaluate(config: TrainConfig, settings: RunSettings, holdout: str | None) -> Evaluate | None:
    """Return the function that computes a run's metrics.

    None without metrics, and if they are to be compared with statistics of the sites (holdout is None): see
    `federated.simulation.collect_statistics`. Raises UserError if they cannot be computed.
    """
    if not config.metrics:
        return None
    check_path_requests(parse_metrics(config.metrics), config.dataset.resolution)
    detectors = needed_detectors(config.metrics, settings.detector, settings.detector_weights)
    if Place.from_environment().rank == 0:
        require_detectors(detectors)
    if holdout is None:
        return None
    evaluator = Evaluator(config.metrics, data=holdout, detector=settings.detector, weights=detectors,
                          mirror=config.dataset.xflip, seed=config.seed, per_class=settings.per_class)
    return evaluator.evaluate


# Flags


def _check_paths(flags: dict[str, Any]) -> tuple[str, ...]:
    """Return the paths of --data."""
    for name in ("outdir", "data", "rounds"):
        if flags[name] is None or flags[name] == "":
            raise UserError(f"--{name} is missing; expected --outdir, --data and --rounds, such as --outdir=runs "
                            "--data=a.zip,b.zip,c.zip --rounds=100: see --help")
    refuse_kimg(flags["kimg"])
    paths = flags["data"]
    for index, path in enumerate(paths):
        if Path(path).resolve() in [Path(other).resolve() for other in paths[:index]]:
            raise UserError(f"--data names {path} twice; expected another data set for each institution")
    return paths


def refuse_kimg(kimg: str | None) -> None:
    """Raise UserError if the flag of train.py for the length of the training is given."""
    if kimg is not None:
        raise UserError(f"--kimg is {kimg}; expected --rounds and --round-kimg, which set the length of the training: "
                        "leave --kimg out")


def name_sites(sites: str | None, paths: Sequence[str]) -> tuple[str, ...]:
    """Return a name for each path: those of --sites, or the names of the files. They become names of folders."""
    if sites is None:
        names = tuple(Path(path).name.removesuffix(".zip") for path in paths)
        where, advice = "--data", ": name the sites with --sites, such as --sites=a,b,c"
    else:
        names, where, advice = tuple(name.strip() for name in sites.split(",")), f"--sites={sites}", ""
        if len(names) != len(paths):
            raise UserError(f"{where} has {plural(len(names), 'name')} for {plural(len(paths), 'data set')}; expected "
                            "one name for each data set of --data")
    for index, name in enumerate(names):
        if not NAME.fullmatch(name):
            raise UserError(f"{where} names a site {name!r}; expected {NAME_FORM}{advice}")
        if name.lower() in [other.lower() for other in names[:index]]:  # some systems ignore the case of folders
            raise UserError(f"{where} names two sites {name}; expected different names, also without regard to "
                            f"case{advice}")
    return names


def parse_federation(flags: dict[str, Any], names: tuple[str, ...]) -> FederationConfig:
    """Return the settings of the rounds, which last one image if --round-kimg is not given: see `plan_rounds`."""
    given = {field.name: flags[field.name] for field in fields(FederationConfig) if flags[field.name] is not None}
    implied = {"ema": "server"} if given.get("dp") else {}
    if given.get("dp") or given.get("aggregation", "mean") != "mean":
        implied["weights"] = "equal"
    if "dp_noise" in given:
        implied["dp_epsilon"] = None
    if given.get("dp") and "dp_clip" not in given:
        raise UserError("--dp-clip is missing; expected it with --dp=1: Update/norm/NAME in server/stats.jsonl of a "
                        "run without --dp, on phantoms or public images, shows which norms are usual")
    federation = FederationConfig(**{"round_kimg": 0.001, **implied, **given, "sites": names})
    for name, optimizers in _USED_BY.items():
        if name in given and federation.server_optimizer not in optimizers:
            flag = federation.label(name)
            raise UserError(f"{flag} is {given[name]:g} with --server-optimizer={federation.server_optimizer}; "
                            f"expected {' or '.join(optimizers)}: set it, or leave {flag} out")
    if "trim" in given and federation.aggregation != "trimmed-mean":
        raise UserError(f"--trim is {given['trim']:g} with --aggregation={federation.aggregation}; expected "
                        "trimmed-mean: set it, or leave --trim out")
    if federation.aggregation != "mean" and len(names) < 3:
        raise UserError(f"--aggregation is {federation.aggregation} for {plural(len(names), 'site')}; expected at "
                        "least 3 sites, since of fewer it is the mean: leave it out")
    for name in _OF_PRIVACY:
        if name in given and not federation.dp:
            flag = federation.label(name)
            raise UserError(f"{flag} is {given[name]:g} without --dp=1; expected differential privacy: add --dp=1, or "
                            f"leave {flag} out")
    if "dp_noise" in given and "dp_epsilon" in given:
        raise UserError(f"--dp-epsilon is {given['dp_epsilon']:g} with --dp-noise={given['dp_noise']:g}; expected one "
                        "of the two, since either follows from the other: leave one out")
    if federation.dp and flags["share_statistics"]:
        raise UserError("--share-statistics is given with --dp=1, which does not cover what it sends; expected "
                        "--holdout=SET in its place, or no --dp")
    return federation


def check_reference(flags: dict[str, Any], source: str = _REFERENCES) -> None:
    """Raise UserError unless metrics are given with the images that they need, and these with metrics.

    source:  where such images come from, for messages
    """
    holdout, shares = flags["holdout"], flags["share_statistics"]
    is_none = flags["metrics"] is not None and flags["metrics"].strip().lower() == "none"
    if holdout is None and not shares:
        for name in _OF_METRICS:
            if flags[name] and not (name == "metrics" and is_none):
                flag = f"--{name.replace('_', '-')}"
                raise UserError(f"{flag} is given without images to compare with; expected {source}, or leave {flag} "
                                "out")
        return
    given = "--share-statistics" if holdout is None else f"--holdout={holdout}"
    if is_none:
        raise UserError(f"{given} is given with --metrics=none; expected metrics that use it, such as "
                        "--metrics=fid50k_full: leave out one of the two")
    if shares and holdout is not None:
        raise UserError(f"--share-statistics is given with {given}; expected one of the two, since --metrics compare "
                        "with either")
    if shares and flags["per_class"]:
        raise UserError("--per-class is true with --share-statistics, which are of all classes together; expected "
                        "--holdout=SET in its place, or no --per-class")


def train_flags(flags: dict[str, Any], paths: Sequence[str]) -> dict[str, Any]:
    """Return the flags of train.py for one site."""
    has_reference = flags["holdout"] is not None or flags["share_statistics"]
    return {**flags, "data": ",".join(paths), "gpus": 1, "subset": None,
            "snap": 1 if flags["snap"] is None else flags["snap"],
            "metrics": flags["metrics"] if has_reference else "none"}


def _joint_facts(datasets: Sequence[ImageDataset]) -> DatasetFacts:
    """Return the facts of the union of data sets; each must be suitable itself."""
    facts = [dataset.facts() for dataset in datasets]
    return replace(facts[0], name=plural(len(facts), "site").replace(" ", ""),
                   num_images=sum(each.num_images for each in facts))


def plan_rounds(config: TrainConfig, federation: FederationConfig, sizes: Sequence[int], *,
                is_given: bool) -> tuple[TrainConfig, Schedule]:
    """Return the configuration with its rounds, and their schedule.

    sizes:     number of images of each site
    is_given:  the length of a round was given
    """
    if not is_given:
        federation = replace(federation, round_kimg=default_round_kimg(sizes, federation.local))
    schedule = Schedule(federation, sizes=sizes, batch=config.batch)
    if federation.dp and federation.dp_noise is None:
        longest = max(schedule.num_rounds(site, federation.rounds) for site in federation.sites)
        federation = replace(federation, dp_noise=find_noise(federation.dp_epsilon, longest, federation.dp_delta))
    return replace(config, federation=federation, kimg=max(schedule.total_images(federation.rounds) // 1000, 1),
                   image_snapshot_ticks=1,
                   dataset=replace(config.dataset, name="+".join(federation.sites))), schedule


def notes_on_rounds(federation: FederationConfig, schedule: Schedule) -> list[str]:
    """Return notes for the user on what the settings of the rounds bring with them."""
    found = (_note_on_averages(federation, schedule), _note_on_robustness(federation, schedule),
             _note_on_privacy(federation, schedule))
    return [line for line in found if line is not None]


def _note_on_averages(federation: FederationConfig, schedule: Schedule) -> str | None:
    """Return a note if the mean of the sites' moving averages is not that of the mean of their networks, else None.

    In a round each average is a sum of its common start and of the site's networks after each iteration, with factors
    that depend on batch and iteration alone. So it is exact where all sites take equally many iterations, for any
    weights of the mean, and whichever images they see.
    """
    if federation.ema != "sites":
        return None
    if federation.aggregation != "mean":
        return (f"note: with --aggregation={federation.aggregation}, that of the sites' moving averages of the "
                "generator is only approximately the moving average of the server's generator; with --ema=server it is "
                "updated once per round")
    if federation.local == "equal":
        return None
    lengths = [{schedule.num_images(site, number) for site in schedule.members(number)}
               for number in range(1, federation.rounds + 1)]
    if all(len(each) == 1 for each in lengths):  # data sets of equal size
        return None
    return ("note: with --local=proportional the sites take different numbers of iterations in a round, so that the "
            "mean of their moving averages of the generator is only approximately the moving average of the mean "
            "generator; with --local=equal it is exact")


def _note_on_robustness(federation: FederationConfig, schedule: Schedule) -> str | None:
    """Return a note if a median or trimmed mean is the mean in some round, else None."""
    few = [number for number in range(1, federation.rounds + 1) if len(schedule.members(number)) < 3]
    if federation.aggregation == "mean" or not few:
        return None
    return (f"note: --aggregation={federation.aggregation} is the mean in {plural(len(few), 'round')} (the first is "
            f"round {few[0]}), where fewer than three sites take part")


def _note_on_privacy(federation: FederationConfig, schedule: Schedule) -> str | None:
    """Return a note on the noise of --dp, and on what continues the run; None without. Raises UserError."""
    if not federation.dp:
        return None
    largest = max(epsilons(federation, schedule, federation.rounds).values())
    if federation.dp_epsilon is None:
        return (f"note: --dp-noise={federation.dp_noise:g} spends epsilon {largest:.4g} (delta "
                f"{federation.dp_delta:g}) in {plural(federation.rounds, 'round')}; more --rounds spend more")
    return (f"note: --dp-noise={federation.dp_noise:g} follows from --dp-epsilon={federation.dp_epsilon:g} and the "
            "rounds of the sites; with other --rounds it is another, which starts another run, while "
            f"--dp-noise={federation.dp_noise:g} in place of --dp-epsilon continues this one and spends more")


# Data sets


def _check_suitable(each: Institution, *, shares_statistics: bool) -> None:
    """Raise UserError if the images or labels of an institution cannot be used."""
    dataset = each.dataset
    if dataset.label_kind == VECTOR:
        raise UserError(f"--data: {each.label} has {LABELS[VECTOR]}; expected {LABELS[CLASS]}, since decentralized "
                        "training takes classes: leave --cond out")
    if shares_statistics and dataset.num_images < FEWEST_IMAGES:
        raise UserError(f"--data: {each.label} has {plural(dataset.num_images, 'image')}; expected at least "
                        f"{FEWEST_IMAGES} with --share-statistics, since the statistics of fewer tell too much about "
                        "each")


def check_alike(first: Institution, other: Institution, flag: str = "--data: ") -> None:
    """Raise UserError unless two institutions have images of one size, and the same classes if these are used.

    flag:  that gives their data sets, for messages, which begin with it
    """
    mine, theirs = first.dataset, other.dataset
    if mine.image_shape != theirs.image_shape:
        sizes = mine.resolution != theirs.resolution
        raise UserError(f"{flag}{first.label} is {describe_shape(mine.image_shape)}, but {other.label} "
                        f"{describe_shape(theirs.image_shape)}; expected "
                        + ("one resolution: convert both with dataset_tool.py and the same --resolution" if sizes else
                           "images that are all gray or all RGB"))
    if not mine.use_labels:
        return
    advice = "convert both with dataset_tool.py and the same --classes"
    if (mine.classes is None) != (theirs.classes is None):
        nameless, named = (first, other) if mine.classes is None else (other, first)
        raise UserError(f"{flag}{nameless.label} does not name its classes, but {named.label} does "
                        f"({listed(named.dataset.classes)}); expected the same names: {advice}")
    if mine.classes != theirs.classes:
        same = "order" if sorted(mine.classes) == sorted(theirs.classes) else "names, in the same order"
        raise UserError(f"{flag}{first.label} has the classes {listed(mine.classes)}, but {other.label} "
                        f"{listed(theirs.classes)}; expected the same {same}: {advice}")
    if mine.label_dim != theirs.label_dim:
        raise UserError(f"{flag}{first.label} has {mine.label_dim} classes without names, but {other.label} "
                        f"{theirs.label_dim}; expected the same: {advice}, which names them")


def _check_apart(held: ImageDataset, institutions: Sequence[Institution], name: str) -> str | None:
    """Check a held-out data set as `check_valid` does, which also returns a note; name: of its flag."""
    same = [each.dataset for each in institutions if each.dataset.path.resolve() == held.path.resolve()]
    return check_valid(held, [*same, institutions[0].dataset][0], name=name)


def _check_overlap(institutions: Sequence[Institution], held_out: dict[str, ImageDataset], *, compute: bool,
                   workers: int) -> list[str]:
    """Raise UserError if an image or group is at two institutions, or an image held out is also trained on.

    held_out:          by the flag that gives it
    compute, workers:  as for `training.command.find_equal_images`

    Return warnings, also on groups that are held out and trained on.
    """
    lines = []
    split = "dataset_tool.py split --institutions keeps the images of a patient or lesion together"
    for first, other in combinations(institutions, 2):
        mine, theirs = first.dataset, other.dataset
        equal, by_files = find_equal_images(theirs, mine, compute=compute, workers=workers)
        if equal:
            there, here = equal[0]
            raise UserError(f"--data: {len(equal)} of {theirs.num_images} images of {other.label} are also in "
                            f"{first.label}, such as {theirs.image_names()[there]}, which is "
                            f"{mine.image_names()[here]} there (apart from order, labels and mirroring); expected each "
                            f"image at one institution: {split}")
        shared = find_shared_groups(theirs, mine)
        if shared:
            groups = list(dict.fromkeys(shared))
            raise UserError(f"--data: {plural(len(groups), 'group')} (patients or lesions) of {other.label} are also "
                            f"in {first.label} ({shorten(groups)}), with {len(shared)} of {theirs.num_images} images; "
                            f"expected each at one institution: {split}; if different ones have the same name, give "
                            "them different names")
        if by_files:
            lines.append("--data: institutions are compared file by file only, since pixel hashes are not recorded; "
                         "training decodes all images, and rejects equal images in different files")
    for name, held in held_out.items():
        for each in institutions:
            lines += check_held_out(held, each.dataset, compute=compute, workers=workers, name=name)
    return list(dict.fromkeys(lines))
