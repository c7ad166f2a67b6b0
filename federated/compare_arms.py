"""The command `federate.py compare`: what decentralized training costs the institutions, at equal numbers of images.

The arms are training on the union of the institutions' images, each institution alone, and decentralized training.
Everything that can be checked is checked before the first of them starts.
"""

import copy
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from dnnlib.cli import GroupedCommand, UserError, UserPath, check_outdir, join_values
from dnnlib.files import atomic_write, remove_abandoned, sha256_of
from dnnlib.text import listed, plural
from dnnlib.workers import usable_cores
from federated.arm_runs import ALONE, CENTRAL, FEDERATED, Arm, ArmStopped, Limits, PlannedRun, plan_arm, run_arms
from federated.arm_tables import (
    COMPARISON,
    RESULTS,
    UNION,
    ArmResult,
    Measurements,
    Reference,
    measure_arms,
    read_arm,
    write_comparison,
)
from federated.command import FLAGS as SIMULATE_FLAGS
from federated.command import ROUNDS
from federated.institutions import name_sites
from imagesets.classes import CLASS
from imagesets.metadata import METADATA
from imagesets.reader import ImageSet
from metrics.evaluation import Evaluator
from metrics.image_sources import SetImages
from metrics.intervals import DEFAULT_LEVEL
from metrics.names import needed_detectors, parse_metrics, require_detectors
from torch_utils.device import check_counts, choose_device
from training.command import check_held_out, check_valid
from training.dataset import ImageDataset
from training.options import DATA, RUN, SPEED, make_flag, show_value
from training.options import FLAGS as TRAIN_FLAGS

DEFAULT_METRICS = "kid_full,pr_full,dc_full"
DEFAULT_POINTS = 4

_HELP = """Compare training on all images, at each institution alone, and decentralized, at equal numbers of images.

\b
python federate.py compare --data=a.zip,b.zip,c.zip --outdir=comparison --kimg=20 --rounds=14 \\
    --holdout=a-test.zip,b-test.zip,c-test.zip --cfg=tiny --cond=1

Each arm is a run in a folder below --outdir: central, alone-NAME for each institution, and federated. The same command
again continues them where they stopped, and measures only what was not measured before. BOOL is 1 or 0, true or false,
yes or no.

\b
Exit codes: 0 compared; otherwise that of the arm that stopped, see train.py --help; 75 stopped early, the
same command continues.
"""

# Flags of train.py and of simulate that compare does not take, and why.
_REFUSED = {
    "new": "would train one arm anew and leave the others; use another --outdir",
    "name": "would give all arms one name",
    "tick": "is set by --points",
    "snap": "is set by --points",
    "keep": "would remove networks that the curves need",
    "keep_best": "would remove networks that the curves need",
    "subset": "would let the arms train on different images; make smaller data sets with dataset_tool.py",
    "per_class": "is implied by --cond=1",
    "round_kimg": "is set by --kimg and --rounds",
    "join": "would give the institutions different numbers of images",
    "leave": "would give the institutions different numbers of images",
    "share_statistics": "has no use here: --metrics compare with --holdout",
}
_OWN = ("outdir", "data", "sites", "kimg", "rounds", "holdout", "metrics", "detector", "detector_weights", "gpus",
        "device", "max_hours", "dry_run")
_BY_NAME = {flag.name: flag for flag in (*TRAIN_FLAGS, *SIMULATE_FLAGS)}
_PASSED = [flag for name, flag in _BY_NAME.items() if name not in (*_OWN, *_REFUSED)]


def make_compare_command(programs: Path = Path(__file__).parent.parent) -> click.Command:
    """Return the command. programs: folder of train.py and federate.py, which are started for the arms"""
    @click.pass_context
    def callback(context: click.Context, **flags: Any) -> int:
        given = [name for name in flags if context.get_parameter_source(name) is not ParameterSource.DEFAULT]
        return compare(_settings(flags, given), programs)

    return GroupedCommand("compare", callback=callback, params=[*_own_flags(), *_PASSED, *_refused_flags()],
                          help=_HELP, short_help="Compare centralized, local and decentralized training.",
                          context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})


def _own_flags() -> list[click.Option]:
    lists = {"multiple": True, "callback": join_values}
    return [
        make_flag("--outdir", UserPath(), RUN, "Folder of the comparison. Required.", "DIR"),
        make_flag("--points", int, RUN, "Number of points of the curves, after that of the start.", "N",
                  standard=show_value(DEFAULT_POINTS), default=DEFAULT_POINTS),
        make_flag("--metrics", str, RUN, "Metrics to compare by, separated by commas, see calc_metrics.py --help. The "
                  "first kernel distance (kid) among them is also drawn as curves. Can be repeated.", "LIST",
                  standard=DEFAULT_METRICS, default=(DEFAULT_METRICS,), **lists),
        make_flag("--ci", float, RUN, "Level of intervals.", "LEVEL", standard=show_value(DEFAULT_LEVEL),
                  default=DEFAULT_LEVEL),
        _BY_NAME["detector"],
        _BY_NAME["detector_weights"],
        make_flag("--max-hours", float, RUN, "Stop after N hours; the same command continues later.", "N",
                  standard="no limit"),
        make_flag("-n --dry-run", bool, RUN, "Check everything except the central arm, print the commands of the arms "
                  "as JSON and exit, without writing anything.", is_flag=True, default=False),
        _BY_NAME["data"],
        make_flag("--holdout", UserPath(), DATA, "Held-out images of each institution, in the order of --data and "
                  "separated by commas, or one data set for all. Can be repeated. Required.", "PATH,...", multiple=True,
                  callback=_BY_NAME["data"].callback),
        make_flag("--kimg", int, ROUNDS, "Thousands of images that each arm trains on, summed over the institutions. "
                  "Required.", "INT"),
        make_flag("--rounds", int, ROUNDS, "Number of rounds of the federated arm. Required.", "N"),
        _BY_NAME["sites"],
        _BY_NAME["device"],
        make_flag("--gpus", int, SPEED, "Number of arms that train at the same time, each on a GPU of its own if there "
                  "are GPUs; and of processes of the federated arm, at most one per institution.", "INT", standard="1",
                  default=1),
    ]


def _refused_flags() -> list[click.Option]:
    """Return options that are refused with a reason; they are not in the help."""
    flags = [copy.copy(_BY_NAME[name]) for name in _REFUSED]
    for flag in flags:
        flag.hidden = True
    return flags


@dataclass(frozen=True, kw_only=True)
class CompareSettings:
    """The flags of compare."""

    outdir: Path
    data: tuple[str, ...]  # training sets of the institutions
    sites: tuple[str, ...]  # their names
    holdout: tuple[str, ...]  # of each institution, or one for all
    kimg: int
    rounds: int
    points: int
    metrics: str
    ci: float
    detector: str | None
    weights: tuple[str, ...]
    gpus: int
    device: str
    deadline: float | None  # of time.monotonic()
    dry_run: bool
    is_conditional: bool
    mirror: bool
    for_all: tuple[str, ...]  # flags of train.py that are passed on to all arms
    for_federated: tuple[str, ...]  # flags of simulate

    @property
    def union(self) -> Path:
        """Path of the training images of all institutions."""
        return self.outdir / f"{UNION}.zip"

    @property
    def holdout_union(self) -> Path:
        """Path of the held-out images of all institutions."""
        return self.outdir / f"holdout-{UNION}.zip" if len(self.holdout) > 1 else Path(self.holdout[0])

    @property
    def round_kimg(self) -> float:
        """Thousands of images of an institution in a round."""
        return self.kimg / (len(self.data) * self.rounds)

    def arms(self, programs: Path) -> list[Arm]:
        """Return the arms, the federated one last."""
        train = (str(programs / "train.py"),)
        shared = (f"--kimg={self.kimg}", "--metrics=none", f"--tick={self.kimg / self.points:g}", "--snap=1",
                  *self.for_all)
        sets = {CENTRAL: str(self.union), **{f"{ALONE}{site}": path for site, path in zip(self.sites, self.data)}}
        found = [Arm(name=name, program=train, flags=(f"--outdir={self.outdir / name}", f"--data={path}", *shared))
                 for name, path in sets.items()]
        processes = min(self.gpus, len(self.data))
        return [*found, Arm(name=FEDERATED, program=(str(programs / "federate.py"), "simulate"), flags=(
            f"--outdir={self.outdir / FEDERATED}", f"--data={','.join(self.data)}", f"--sites={','.join(self.sites)}",
            f"--rounds={self.rounds}", f"--round-kimg={self.round_kimg!r}",
            f"--snap={max(1, self.rounds // self.points)}", "--metrics=none",
            *([f"--gpus={processes}"] if processes > 1 else []), *self.for_all, *self.for_federated))]


def _settings(flags: Mapping[str, Any], given: Sequence[str]) -> CompareSettings:
    """Return the settings, checked as far as possible without the data. Raises UserError.

    given:  names of the flags that the user gave
    """
    for name in given:
        if name in _REFUSED:
            flag = _BY_NAME[name].opts[-1]
            raise UserError(f"{flag} is given, but {flag} {_REFUSED[name]}: leave it out")
    for name in ("outdir", "data", "holdout", "kimg", "rounds"):
        if flags[name] is None:
            raise UserError(f"--{name} is missing; expected --outdir, --data, --holdout, --kimg and --rounds, such as "
                            "--outdir=comparison --data=a.zip,b.zip --holdout=a-test.zip,b-test.zip --kimg=20 "
                            "--rounds=10: see --help")
    check_counts(kimg=flags["kimg"], rounds=flags["rounds"], points=flags["points"], gpus=flags["gpus"])
    hours, data, holdout = flags["max_hours"], flags["data"], flags["holdout"]
    if hours is not None and not hours > 0:
        raise UserError(f"--max-hours is {hours:g}; expected a number > 0")
    check_outdir(flags["outdir"])
    if len(data) < 2:
        raise UserError(f"--data is {data[0]} alone; expected the data sets of at least two institutions, separated by "
                        "commas")
    if len(holdout) not in (1, len(data)):
        raise UserError(f"--holdout has {len(holdout)} data sets and --data {len(data)}; expected one for each "
                        "institution, in the order of --data, or one for all")
    sites = name_sites(flags["sites"], data)
    if UNION in sites:
        raise UserError(f"--sites names a site {UNION}, which is the name of all images together; expected another "
                        "name")
    needed_detectors(flags["metrics"], flags["detector"], flags["detector_weights"])
    passed = [(flag.name, f"{flag.opts[-1]}={show_value(flags[flag.name])}") for flag in _PASSED if flag.name in given]
    of_train = {flag.name for flag in TRAIN_FLAGS}
    return CompareSettings(
        outdir=Path(flags["outdir"]), data=data, sites=sites, holdout=holdout,
        **{name: flags[name] for name in ("kimg", "rounds", "points", "metrics", "ci", "detector", "gpus", "dry_run")},
        weights=tuple(flags["detector_weights"]), device=choose_device(flags["device"], flags["gpus"]).name,
        deadline=None if hours is None else time.monotonic() + 3600 * hours,
        is_conditional=bool(flags["cond"]), mirror=bool(flags["mirror"]),
        for_all=tuple(text for name, text in passed if name in of_train),
        for_federated=tuple(text for name, text in passed if name not in of_train))


def compare(settings: CompareSettings, programs: Path) -> int:
    """Train what is not trained yet, measure what is not measured yet, write and print the comparison."""
    check_holdouts(settings)
    require_detectors(needed_detectors(settings.metrics, settings.detector, settings.weights))
    arms = settings.arms(programs)
    plans = {arm.name: plan_arm(arm, settings.device) for arm in arms[1:-1]}  # central has no data yet
    check_rounds(settings, batch=plans[arms[1].name].batch)
    plans[FEDERATED] = plan_arm(arms[-1], settings.device)
    if settings.dry_run:
        click.echo(json.dumps({arm.name: arm.describe(plans.get(arm.name)) for arm in arms}, indent=1))
        return 0
    settings.outdir.mkdir(parents=True, exist_ok=True)
    remove_abandoned(settings.outdir)
    tool = programs / "dataset_tool.py"
    write_union(settings.union, settings.data, tool)
    if len(settings.holdout) > 1:
        write_union(settings.holdout_union, settings.holdout, tool)
    references, curve = open_references(settings)
    plans[CENTRAL] = plan_arm(arms[0], settings.device)
    limits = Limits(slots=settings.gpus, device=settings.device, deadline=settings.deadline)
    for some, limit in ((arms[:-1], limits), (arms[-1:], replace(limits, slots=1))):
        run_arms([arm for arm in some if not plans[arm.name].is_finished], limit)
    results = [read_arm(arm.name, plans[arm.name]) for arm in arms]
    check_equal(results, plans, settings)
    measure_arms(results, references, curve, Measurements(
        settings.outdir / RESULTS, device=settings.device, before_each=limits.hours_left, log=click.echo))
    for line in write_comparison(settings.outdir, results, references, curve, _describe(settings)):
        click.echo(line)
    click.echo(f"written to {settings.outdir / COMPARISON}.json, .txt, .csv{', .png' if curve is not None else ''}")
    return 0


def check_holdouts(settings: CompareSettings) -> None:
    """Raise UserError unless the held-out sets fit the networks and have no image or group that is trained on."""
    options = {"use_labels": settings.is_conditional}
    first = ImageDataset(settings.data[0], **options)
    for path in settings.holdout:
        held = ImageDataset(path, classes=first.classes, **options)
        for data in settings.data:
            dataset = ImageDataset(data, classes=first.classes, **options)
            note = check_valid(held, dataset, name="--holdout")
            if note is not None:
                click.echo(note, err=True)
            check_held_out(held, dataset, compute=True, workers=usable_cores(), name="--holdout")
            groups, count = SetImages(path).shared_groups(SetImages(data))
            if groups:
                raise UserError(f"--holdout={path}: {plural(len(groups), 'group')} (patients or lesions) are also in "
                                f"--data={data} ({listed(groups[:3])}), with {count} of {held.num_images} images; "
                                "expected groups that are not trained on: hold out part of one data set with "
                                "dataset_tool.py split")


def check_rounds(settings: CompareSettings, *, batch: int) -> None:
    """Raise UserError if an institution would not get an iteration in each round."""
    images = 1000 * settings.round_kimg
    if images < batch:
        most = 1000 * settings.kimg // (len(settings.data) * batch)
        raise UserError(f"--rounds is {settings.rounds}, so each institution would see {images:.4g} images in a round; "
                        f"expected at least one iteration of --batch={batch}: "
                        + (f"try --rounds={most}" if most else "use a larger --kimg or a smaller --batch"))


def write_union(dest: Path, sources: Sequence[str], tool: Path) -> None:
    """Join the images of several sets in this order, unless `dest` was made from the same sets.

    tool:  the script dataset_tool.py
    """
    record = dest.with_suffix(".json")
    made = [{"name": Path(path).name, "content": hash_set_file(path)} for path in sources]
    if dest.exists() and _read_json(record) == {"sources": made, "content": hash_set_file(dest)}:
        return
    code = subprocess.run([sys.executable, str(tool), *(f"--source={path}" for path in sources), f"--dest={dest}"],
                          stdin=subprocess.DEVNULL, check=False).returncode
    if code:
        raise ArmStopped(f"{dest} was not written, see above; expected data sets that dataset_tool.py can join: "
                         f"{listed(sources)}", code if code > 0 else 128 - code)
    with atomic_write(record, text=True) as file:
        file.write(json.dumps({"sources": made, "content": hash_set_file(dest)}, indent=1) + "\n")


def hash_set_file(path: str | Path) -> str:
    """Return a sha256 of a data set: of the file, or of a folder's images and dataset.json."""
    if Path(path).is_file():
        return sha256_of(path)
    images = ImageSet(path)
    metadata = images.read(METADATA) if METADATA in images.other_members else b""
    return images.content_hash(metadata.decode(errors="replace"), range(len(images)))


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # missing or damaged: it is made again
        return None


def open_references(settings: CompareSettings) -> tuple[list[Reference], Reference | None]:
    """Return the held-out sets to measure against, the union last; and the union for the curves, if there are some.

    Raises UserError if they do not suit the metrics.
    """
    union = settings.holdout_union
    paths = dict(zip(settings.sites, settings.holdout)) if len(settings.holdout) > 1 else {}
    kernel = next((request.name for request in parse_metrics(settings.metrics) if request.kind == "kid"), None)
    has_classes = settings.is_conditional and ImageSet(union).label_kind == CLASS
    references = [_reference(name, path, settings, settings.metrics, ci=settings.ci, per_class=False)
                  for name, path in paths.items()]
    references.append(_reference(UNION, union, settings, settings.metrics, ci=settings.ci, per_class=has_classes))
    if kernel is None:
        return references, None
    return references, _reference(UNION, union, settings, kernel, ci=None, per_class=False)


def _reference(name: str, path: str | Path, settings: CompareSettings, metrics: str, *, ci: float | None,
               per_class: bool) -> Reference:
    weights = needed_detectors(settings.metrics, settings.detector, settings.weights)
    how = {"detector": settings.detector, "mirror": settings.mirror, "ci": ci, "per_class": per_class}
    evaluator = Evaluator(metrics, data=path, weights=weights, device=settings.device,
                          log=lambda line: click.echo(line, err=True), progress=True, **how)
    return Reference(name=name, path=str(path), content=hash_set_file(path),
                     num_images=len(evaluator.reference.images), evaluator=evaluator,
                     settings={**how, "metrics": metrics, "weights": list(settings.weights), "seed": evaluator.seed,
                               "device": settings.device.partition(":")[0]})


def check_equal(results: Sequence[ArmResult], plans: Mapping[str, PlannedRun], settings: CompareSettings) -> None:
    """Raise UserError if an arm's last network has not seen the images that were asked for, up to whole iterations."""
    for arm in results:
        beyond = arm.costs.images - 1000 * settings.kimg
        # Each institution rounds up to whole iterations.
        if not 0 <= beyond < len(settings.data) * plans[arm.name].batch:
            raise UserError(f"the newest network in {arm.run} is of {arm.costs.images} images, but --kimg is "
                            f"{settings.kimg}; expected all arms at the same number: use another --outdir")


def _describe(settings: CompareSettings) -> dict[str, Any]:
    return {"sites": list(settings.sites), "data": list(settings.data), "kimg": settings.kimg,
            "rounds": settings.rounds, "round_kimg": settings.round_kimg, "points": settings.points,
            "metrics": settings.metrics, "ci": settings.ci, "flags": [*settings.for_all, *settings.for_federated],
            "gpus": settings.gpus, "device": settings.device}
