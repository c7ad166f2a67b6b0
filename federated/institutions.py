"""The institutions of a decentralized training: open and check their data sets, and resolve the settings they share.

Everything that can be checked is checked before anything is written, as `training.command` does for train.py: each
institution is a "site" with a name and a data set of its own, and all of them train the same networks.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from dnnlib.cli import UserError
from dnnlib.text import listed, plural, shorten
from federated.schedule import Schedule, default_round_kimg
from federated.shared_statistics import FEWEST_IMAGES, parse_shared_metrics
from imagesets.classes import CLASS, LABELS, VECTOR
from imagesets.reader import describe_shape
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
    parse_flags,
)
from training.config import DatasetFacts, FederationConfig, RunSettings, TrainConfig
from training.dataset import ImageDataset, hash_content
from training.sampling import image_weights
from training.transfer import Transferred

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_NAME_FORM = "letters, digits, '.', '_' and '-', starting with a letter or digit"
# Settings of server optimizers: by field of FederationConfig, the optimizers that use it.
_USED_BY = {"server_lr": ("fedavgm", "fedadam"), "server_momentum": ("fedavgm", "fedadam"),
            "server_beta2": ("fedadam",), "server_tau": ("fedadam",)}
# Flags that describe metrics, and so need images to compare with.
_OF_METRICS = ("metrics", "detector", "detector_weights", "keep_best", "per_class")


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
    federation = _parse_federation(flags, name_sites(flags["sites"], paths))
    _check_reference(flags)
    check_counts(gpus=flags["gpus"])
    num_processes = place.processes(flags["gpus"])
    if num_processes > len(paths):
        raise UserError(f"--gpus is {num_processes} for {plural(len(paths), 'site')}; expected at most {len(paths)}: "
                        "one process trains a site")
    parsed = parse_flags(_train_flags(flags, paths), choose_metrics, place, num_processes)
    options, settings, is_main = parsed.options, parsed.settings, place.rank == 0
    if flags["share_statistics"] and options.metrics:
        parse_shared_metrics(options.metrics)
    datasets = [ImageDataset(path, use_labels=options.get("cond"), xflip=options.get("mirror")) for path in paths]
    institutions = tuple(Institution(name=federation.sites[index], index=index, path=paths[index], dataset=dataset,
                                     weights=image_weights(settings.balance, dataset))
                         for index, dataset in enumerate(datasets))
    for each in institutions:
        _check_suitable(each, shares_statistics=flags["share_statistics"])
        _check_alike(institutions[0], each)
    config = parsed.resolve(_joint_facts(datasets))
    check_per_class(settings, use_labels=config.dataset.use_labels)
    config, schedule = _plan_rounds(config, federation, datasets, is_given=flags["round_kimg"] is not None)
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
    found = (parsed.warning, resume_note, _note_on_averages(federation, schedule), *label_notes, *alerts)
    warnings = tuple(line for line in found if line is not None)
    return PreparedFederation(
        config=config, settings=replace(settings, notes=(*parsed.notes, *warnings)), institutions=institutions,
        schedule=schedule, holdout=flags["holdout"], share_statistics=flags["share_statistics"],
        num_processes=num_processes, device=parsed.device, warnings=warnings, alerts=tuple(alerts),
        transferred=transferred)


# Flags


def _check_paths(flags: dict[str, Any]) -> tuple[str, ...]:
    """Return the paths of --data."""
    for name in ("outdir", "data", "rounds"):
        if flags[name] is None or flags[name] == "":
            raise UserError(f"--{name} is missing; expected --outdir, --data and --rounds, such as --outdir=runs "
                            "--data=a.zip,b.zip,c.zip --rounds=100: see --help")
    if flags["kimg"] is not None:
        raise UserError(f"--kimg is {flags['kimg']}; expected --rounds and --round-kimg, which set the length of the "
                        "training: leave --kimg out")
    paths = flags["data"]
    for index, path in enumerate(paths):
        if Path(path).resolve() in [Path(other).resolve() for other in paths[:index]]:
            raise UserError(f"--data names {path} twice; expected another data set for each institution")
    return paths


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
        if not _NAME.fullmatch(name):
            raise UserError(f"{where} names a site {name!r}; expected {_NAME_FORM}{advice}")
        if name.lower() in [other.lower() for other in names[:index]]:  # some systems ignore the case of folders
            raise UserError(f"{where} names two sites {name}; expected different names, also without regard to "
                            f"case{advice}")
    return names


def _parse_federation(flags: dict[str, Any], names: tuple[str, ...]) -> FederationConfig:
    """Return the settings of the rounds, which last one image if --round-kimg is not given: see `_plan_rounds`."""
    given = {field.name: flags[field.name] for field in fields(FederationConfig) if flags[field.name] is not None}
    federation = FederationConfig(**{"round_kimg": 0.001, **given, "sites": names})
    for name, optimizers in _USED_BY.items():
        if name in given and federation.server_optimizer not in optimizers:
            flag = federation.label(name)
            raise UserError(f"{flag} is {given[name]:g} with --server-optimizer={federation.server_optimizer}; "
                            f"expected {' or '.join(optimizers)}: set it, or leave {flag} out")
    return federation


def _check_reference(flags: dict[str, Any]) -> None:
    """Raise UserError unless metrics are given with the images that they need, and these with metrics."""
    holdout, shares = flags["holdout"], flags["share_statistics"]
    is_none = flags["metrics"] is not None and flags["metrics"].strip().lower() == "none"
    if holdout is None and not shares:
        for name in _OF_METRICS:
            if flags[name] and not (name == "metrics" and is_none):
                flag = f"--{name.replace('_', '-')}"
                raise UserError(f"{flag} is given without images to compare with; expected --holdout=SET, a data set "
                                f"that no site trains on, or --share-statistics: add one, or leave {flag} out")
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


def _train_flags(flags: dict[str, Any], paths: Sequence[str]) -> dict[str, Any]:
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


def _plan_rounds(config: TrainConfig, federation: FederationConfig, datasets: Sequence[ImageDataset], *,
                 is_given: bool) -> tuple[TrainConfig, Schedule]:
    """Return the configuration with its rounds, and their schedule.

    is_given:  the length of a round was given
    """
    sizes = [dataset.num_images for dataset in datasets]
    if not is_given:
        federation = replace(federation, round_kimg=default_round_kimg(sizes, federation.local))
    schedule = Schedule(federation, sizes=sizes, batch=config.batch)
    return replace(config, federation=federation, kimg=max(schedule.total_images(federation.rounds) // 1000, 1),
                   image_snapshot_ticks=1,
                   dataset=replace(config.dataset, name="+".join(federation.sites))), schedule


def _note_on_averages(federation: FederationConfig, schedule: Schedule) -> str | None:
    """Return a note if the mean of the sites' moving averages is not that of the mean of their networks, else None.

    In a round each average is a sum of its common start and of the site's networks after each iteration, with factors
    that depend on batch and iteration alone. So it is exact where all sites take equally many iterations, for any
    weights of the mean, and whichever images they see.
    """
    if federation.ema != "sites" or federation.local == "equal":
        return None
    lengths = [{schedule.num_images(site, number) for site in schedule.members(number)}
               for number in range(1, federation.rounds + 1)]
    if all(len(each) == 1 for each in lengths):  # data sets of equal size
        return None
    return ("note: with --local=proportional the sites take different numbers of iterations in a round, so that the "
            "mean of their moving averages of the generator is only approximately the moving average of the mean "
            "generator; with --local=equal it is exact")


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


def _check_alike(first: Institution, other: Institution) -> None:
    """Raise UserError unless two institutions have images of one size, and the same classes if these are used."""
    mine, theirs = first.dataset, other.dataset
    if mine.image_shape != theirs.image_shape:
        sizes = mine.resolution != theirs.resolution
        raise UserError(f"--data: {first.label} is {describe_shape(mine.image_shape)}, but {other.label} "
                        f"{describe_shape(theirs.image_shape)}; expected "
                        + ("one resolution: convert both with dataset_tool.py and the same --resolution" if sizes else
                           "images that are all gray or all RGB"))
    if not mine.use_labels:
        return
    advice = "convert both with dataset_tool.py and the same --classes"
    if (mine.classes is None) != (theirs.classes is None):
        nameless, named = (first, other) if mine.classes is None else (other, first)
        raise UserError(f"--data: {nameless.label} does not name its classes, but {named.label} does "
                        f"({listed(named.dataset.classes)}); expected the same names: {advice}")
    if mine.classes != theirs.classes:
        same = "order" if sorted(mine.classes) == sorted(theirs.classes) else "names, in the same order"
        raise UserError(f"--data: {first.label} has the classes {listed(mine.classes)}, but {other.label} "
                        f"{listed(theirs.classes)}; expected the same {same}: {advice}")
    if mine.label_dim != theirs.label_dim:
        raise UserError(f"--data: {first.label} has {mine.label_dim} classes without names, but {other.label} "
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
