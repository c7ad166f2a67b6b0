"""The command line of calc_metrics.py: measure a network, all of a run, a set of images, or several; write the results.

Results are JSON lines on standard output. Tables for people go to standard error, also with --verbose=0: they are
results that an option asks for, not progress.
"""

import os
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import click

from dnnlib.cli import UserError, UserPath, join_values
from dnnlib.lines import AppendFile, to_line
from generation.network import NETWORK_HELP, OpenNetwork, choose_network, open_network
from metrics.comparison import Item, Measured, difference_table, differences, find_items
from metrics.detectors.registry import DETECTOR_FORMS
from metrics.evaluation import Evaluator
from metrics.image_sources import SetImages
from metrics.intervals import DEFAULT_LEVEL
from metrics.names import (
    DEFAULT_METRIC,
    DESCRIPTIONS,
    FORMS,
    KNOWN_NAMES,
    USUAL_DETECTORS,
    needed_detectors,
    parse_metrics,
)
from metrics.result_tables import Row, class_rows, result_table, save_figure
from torch_utils.device import DEVICE_HELP, TUNE_MALLOC_HELP, check_counts, settle_device
from torch_utils.distributed import Place, Processes, any_process, broadcast_object, is_main, join
from torch_utils.launch import launch
from torch_utils.plots import save_curves
from training.network_file import find_path
from training.run_folder import RunFolder, list_snapshots
from training.run_record import read_record
from training.run_report import metric_record

_HELP = """Measure the quality of generated images; print one JSON line per metric.

\b
python calc_metrics.py --network=runs/00007-isic256/network-snapshot-000200.safetensors --data=isic256.zip
python calc_metrics.py --run=runs/00007-isic256 --data=heldout.zip --metrics=kid5k_full,pr2k3_full
python calc_metrics.py --generated=synthetic.zip --data=isic256.zip --metrics=kid_full,pr_full --class=melanoma
python calc_metrics.py --generated=synthetic.zip --data=isic256.zip --metrics=kid_full --per-class --ci=0.95
python calc_metrics.py --compare runs/00007-isic256 runs/00008-isic256 synthetic.zip --data=isic256.zip
"""
_WIDTH = 110  # of the help, in characters


def make_command() -> click.Command:
    """Return the command of calc_metrics.py."""
    return MetricsCommand(None, callback=_run, params=_options(), help=_HELP,
                          context_settings={"help_option_names": ["-h", "--help"], "max_content_width": _WIDTH})


class MetricsCommand(click.Command):
    """A command whose help describes each metric."""

    def format_epilog(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Metrics"):
            formatter.write_dl(list(DESCRIPTIONS.items()))
        text = (f"Names are {', '.join(KNOWN_NAMES)}, and the same with other numbers of generated images, such as "
                f"{FORMS}. Names with _full compare with all real images, the others with as many as there are "
                "generated ones, flipped ones included if training used them. Names without a number, such as "
                "kid_full and dc_full, take all images of --generated, or as many from a network as there are real "
                "ones; the results record how many.")
        formatter.write_paragraph()
        formatter.write("".join(f"  {line}\n" for line in textwrap.wrap(text, _WIDTH - 4)))


def _options() -> list[click.Option]:
    return [
        _option("--network", UserPath(), f"{NETWORK_HELP} In the folder of a run, results are also added to its "
                "metric-NAME.jsonl.", "FILE"),
        _option("--generated", UserPath(), "Folder or zip of generated images to measure.", "PATH"),
        _option("--run", UserPath(),
                "Folder of a run, or a pattern that matches one: measure all its snapshots, add the results to its "
                "metric-NAME.jsonl, and plot them in measured-NAME.png.", "DIR"),
        _option("--compare", UserPath(),
                "Runs (for their newest network), network files, and sets of generated images to compare with each "
                "other: further ones follow without the option's name.", "RUN|FILE|SET", multiple=True),
        click.Argument(["further"], type=UserPath(), nargs=-1, metavar="[--compare PATH PATH...]"),
        _option("--metrics", str, "Metrics, separated by commas; see below. May be given several times.", "LIST",
                default=(DEFAULT_METRIC,), multiple=True, callback=join_values),
        _option("--data", UserPath(),
                "Data set of real images to compare with: the training set, or a held-out one.", "PATH"),
        _option("--mirror", bool, "Include horizontally flipped real images in metrics without _full.", "BOOL",
                shown="as in training"),
        _option("--class", str, "Measure images of one class only.", "NAME|NUMBER", name="chosen"),
        _option("--per-class", bool,
                "Also measure each class of --data: its real images with generated ones of the class.", "BOOL",
                default=False, is_flag=False, flag_value=True),  # --per-class alone is enough
        _option("--ci", float, "Level of intervals, such as 0.95: give an interval for each value.", "LEVEL",
                shown=f"no intervals; {DEFAULT_LEVEL} with --compare"),
        _option("--holdout", UserPath(),
                "Data set of other real images: also measure these, as a floor that no generator can be shown to be "
                "better than.", "PATH"),
        _option("--figure", UserPath(), "Draw the values, with intervals and floor, by class or by item.", "FILE.png"),
        _option("--detector", str, f"Feature detector to use instead of the usual one: {DETECTOR_FORMS}. Values from "
                "different detectors cannot be compared.", "NAME",
                shown=f"{USUAL_DETECTORS['fid']}; {USUAL_DETECTORS['pr']} for pr and dc, {USUAL_DETECTORS['ppl']} for "
                      "ppl"),
        _option("--detector-weights", UserPath(named=True),
                "File with the detector's weights, instead of downloading them; those of timm:NAME are never "
                "downloaded. NAME=FILE if several detectors are needed, and lpips-vgg16=FOLDER with the two files that "
                "ppl needs. May be given several times.",
                "FILE", multiple=True),
        _option("--seed", int, "Random seed.", "INT", default=0),
        _option("--batch", int, "Batch size. Results depend on it slightly, since noise inputs are drawn per batch.",
                "INT", shown="chosen by resolution"),
        _option("--device", str, DEVICE_HELP, "NAME", default="auto"),
        _option("--gpus", int, "Number of processes: one per GPU, or several on a CPU.", "INT", shown="1"),
        _option("--workers", int, "Number of processes that decode the images of sets, for each process.", "INT",
                shown="its share of the CPU cores, at most 8"),
        _option("--tune-malloc", bool, TUNE_MALLOC_HELP, "BOOL", default=True),
        _option("--verbose", bool, "Show progress.", "BOOL", default=True),
        click.Option(["--no-cache", "use_cache"], is_flag=True, flag_value=False, default=True,
                     help="Neither read nor write the cache of image features."),
    ]


def _option(flag: str, kind: object, text: str, metavar: str, name: str | None = None, *, default: Any = None,
            shown: str | None = None, **attributes: Any) -> click.Option:
    """Return an option whose help ends with its default, or with `shown` if the default is None."""
    if default is not None:
        attributes["default"] = default
        shown = ",".join(default) if isinstance(default, tuple) else str(default).lower()
    return click.Option([flag, *([name] if name else [])], type=kind, metavar=metavar,
                        help=text if shown is None else f"{text} [default: {shown}]", **attributes)


def _run(gpus: int | None, device: str, tune_malloc: bool, compare: tuple[str, ...], further: tuple[str, ...],
         **flags: Any) -> int:
    if further and not compare:
        raise UserError(f"{further[0]} is given without an option; expected --network, --generated, --run or --compare "
                        "before it")
    settings = MeasureSettings(**flags, compare=(*compare, *further)).found()
    place = Place.from_environment()
    check_counts(gpus=gpus)
    count = place.processes(gpus)
    device = settle_device(device, place, count, tunes_malloc=tune_malloc)
    if count > 1 and not place.is_started:
        return launch(count)
    with join(device) as processes:
        measure(settings, processes)
    return 0


@dataclass(frozen=True, kw_only=True)
class MeasureSettings:
    """The options of calc_metrics.py that decide what is measured, and how."""

    network: str | None
    generated: str | None
    run: str | None
    compare: tuple[str, ...]
    metrics: str
    data: str | None
    mirror: bool | None
    per_class: bool
    ci: float | None
    holdout: str | None
    figure: str | None
    detector: str | None
    detector_weights: tuple[str, ...]
    chosen: str | None
    seed: int
    batch: int | None
    use_cache: bool
    workers: int | None
    verbose: bool

    def __post_init__(self):
        given = [f"--{name}" for name in ("network", "generated", "run", "compare") if getattr(self, name)]
        if len(given) != 1:
            found = ("none of --network, --generated, --run and --compare is" if not given else
                     f"{' and '.join(given)} are")
            raise UserError(f"{found} given; expected exactly one of them")
        if len(self.compare) == 1:
            raise UserError(f"--compare is {self.compare[0]} alone; expected at least two runs, network files or sets")
        if self.figure is not None:
            self._check_figure()
        needed_detectors(self.metrics, self.detector, self.detector_weights)

    def found(self) -> Self:
        """Return a copy with the paths that --network, --run and --compare stand for. Raises UserError."""
        return replace(self, network=None if self.network is None else choose_network(self.network),
                       run=None if self.run is None else find_path(self.run, "--run", "the folder of a run"),
                       compare=tuple(find_path(text, "--compare", "a run, a network file or a set of images")
                                     for text in self.compare))

    def _check_figure(self) -> None:
        """Raise UserError unless the file of --figure can be written."""
        folder = Path(self.figure).absolute().parent
        if self.run is not None:
            raise UserError("--figure is given with --run, which draws measured-NAME.png; expected --network, "
                            "--generated or --compare")
        if Path(self.figure).suffix.lower() != ".png":
            raise UserError(f"--figure is {self.figure}; expected the name of a PNG, such as classes.png")
        if not folder.is_dir():
            raise UserError(f"--figure is {self.figure}, but {folder} is not a folder; choose an existing folder")
        if os.path.isdir(self.figure) or not os.access(folder, os.W_OK | os.X_OK):
            what = "is a folder" if os.path.isdir(self.figure) else "is not writable"
            raise UserError(f"--figure is {self.figure}, which {what}; choose another file")

    @property
    def run_folder(self) -> Path | None:
        """The folder of the run that is measured, or that holds the network; None if there is none."""
        if self.run is not None:
            return Path(self.run)
        return None if self.network is None else _folder_of_run(self.network)


def _folder_of_run(network: str) -> Path | None:
    """Return the folder of the run that wrote a network file; None if it is not in one."""
    folder = Path(network).parent
    return folder if RunFolder(folder).options.exists() and read_record(folder) is not None else None


def measure(settings: MeasureSettings, processes: Processes) -> None:
    """Measure, print one JSON line per result, and add it to the run's folder if there is one.

    Raises UserError if a network, a data set or a metric cannot be used, or they do not fit together.
    """
    if settings.compare:
        _compare(settings, processes)
        return
    if settings.generated is not None:
        _measure_images(settings, processes)
        return
    # A run may write another one meanwhile: all processes measure the snapshots that the main process found.
    snapshots = broadcast_object([Path(settings.network)] if settings.run is None else _snapshots(settings.run))
    network = open_network(snapshots[-1], processes.device)
    evaluator = _evaluator(settings, processes, mirror=_mirror(settings, network.info, settings.run_folder))
    curves: dict[str, dict[str, list[tuple[float, float]]]] = {}  # metric -> key -> (kimg, value)
    for number, path in enumerate(snapshots):
        if len(snapshots) > 1 and (network := _open_if_there(path, processes)) is None:
            _log(settings, f"{path.name} was removed in the meantime, as train.py --keep does; it is skipped")
            continue
        _log(settings, f"{path.name} ({number + 1} of {len(snapshots)})")
        kimg = network.info.get("kimg")
        kimg = float(kimg) if isinstance(kimg, (int, float)) else None
        found = evaluator.evaluate(network.G, network.info)
        for name, result in found.items():
            _write(name, result, processes, settings.run_folder, snapshot=network.name, kimg=kimg,
                   network_sha256=network.sha256)
            for key, value in result["results"].items():
                if kimg is not None:
                    curves.setdefault(name, {}).setdefault(key, []).append((kimg, value))
        _show(settings, class_rows(found), "class", f"{path.name}:" if len(snapshots) > 1 else None)
    if settings.run is not None and is_main():
        for name, found in curves.items():
            save_curves(RunFolder(settings.run).measured(name), found)


def _open_if_there(path: Path, processes: Processes) -> OpenNetwork | None:
    """Open a snapshot of a run; return None, in all processes, if its file was removed in the meantime."""
    network = None
    try:
        network = open_network(path, processes.device)
    except UserError:
        if path.exists():
            raise
    return None if any_process(network is None) else network


def _snapshots(run: str) -> list[Path]:
    found = [Path(path) for path in list_snapshots(run)] if os.path.isdir(run) else []
    if not found:
        what = "has no network files" if os.path.isdir(run) else "is not a folder"
        raise UserError(f"--run is {run}, which {what}; expected the folder of a run, such as "
                        "runs/00007-isic256-cond-auto1")
    return found


def _mirror(settings: MeasureSettings, info: dict[str, Any], folder: Path | None) -> bool:
    """Return --mirror, or whether training flipped images, as the run in a folder or the network file records."""
    if settings.mirror is not None:
        return settings.mirror
    record = None if folder is None else read_record(folder)
    if record is not None:
        return record.config.dataset.xflip
    training_set = info.get("training_set")
    return isinstance(training_set, dict) and training_set.get("xflip") is True


def _measure_images(settings: MeasureSettings, processes: Processes) -> None:
    images = SetImages(settings.generated, settings.chosen)
    evaluator = _evaluator(settings, processes, mirror=bool(settings.mirror))
    _warn_of_shared(images, evaluator, "--generated")
    found = evaluator.evaluate_images(images)
    more = _origin_of(images)
    for name, result in found.items():
        _write(name, result, processes, None, snapshot=None, **more)
    _show(settings, class_rows(found), "class")


def _origin_of(images: SetImages) -> dict[str, Any]:
    """Return the fields of records that tell which images were measured; {} except on the main process."""
    return {"generated": images.path.name, "generated_sha256": images.select().content_hash()} if is_main() else {}


def _warn_of_shared(images: SetImages, evaluator: Evaluator, option: str) -> None:
    reals = evaluator.reference.images
    shared = images.num_shared(reals) if reals is not None and is_main() else 0
    if shared:
        click.echo(f"warning: {shared} of {len(images)} images of {option}={images.path} are also in "
                   f"--data={reals.path}; the metrics compare these images with themselves", err=True)


def _compare(settings: MeasureSettings, processes: Processes) -> None:
    """Measure several networks and sets with the same reals and seeds; print their results and the differences."""
    items = broadcast_object(find_items(settings.compare, parse_metrics(settings.metrics)))
    level = DEFAULT_LEVEL if settings.ci is None else settings.ci
    evaluator = _evaluator(replace(settings, ci=level), processes, mirror=_common_mirror(settings, items, processes))
    for item in items:
        with _naming(item):
            _check_item(item, evaluator, settings, processes)
    measured = []
    for number, item in enumerate(items):
        _log(settings, f"{item.name} ({number + 1} of {len(items)})")
        with _naming(item):
            if item.is_network:
                network = open_network(item.path, processes.device, "--compare")
                found = evaluator.evaluate(network.G, network.info)
                more = {"network_sha256": network.sha256}
            else:
                images = SetImages(item.path, settings.chosen)
                found = evaluator.evaluate_images(images)
                more = _origin_of(images)
        for name, result in found.items():
            _write(name, result, processes, None, snapshot=network.name if item.is_network else None, item=item.name,
                   **more)
        if settings.per_class and is_main():
            _print_lines([f"{item.name}:", *result_table(class_rows(found), "class"), ""])
        measured.append(Measured(name=item.name, is_network=item.is_network, records=found,
                                 jackknives=found.jackknives))
    if is_main():
        found = differences(measured, level)
        for difference in found:
            click.echo(to_line(difference.as_record()).decode(), nl=False)
        _show(settings, [Row(each.name, each.records) for each in measured], "item")
        _print_lines(["", *difference_table(found, level)])


def _common_mirror(settings: MeasureSettings, items: Sequence[Item], processes: Processes) -> bool:
    """Return --mirror, or whether the training of all networks flipped images.

    Raises UserError if they differ and a metric depends on it, since all are compared with the same reals.
    """
    if all(request.full or not request.needs_reals for request in parse_metrics(settings.metrics)):
        return False
    by_name = {item.name: _mirror(settings, open_network(item.path, processes.device, "--compare").info,
                                  _folder_of_run(item.path))
               for item in items if settings.mirror is None and item.is_network}
    if len(set(by_name.values())) > 1:
        one, other = (next(name for name, flipped in by_name.items() if flipped == kind) for kind in (True, False))
        raise UserError(f"--compare names {one}, which was trained with flipped images, and {other}, which was not; "
                        "expected --mirror=0 or --mirror=1, which decides for all, or metrics with _full")
    return bool(settings.mirror) or True in by_name.values()


def _check_item(item: Item, evaluator: Evaluator, settings: MeasureSettings, processes: Processes) -> None:
    """Raise UserError if an item cannot be measured, before the first of them takes its time."""
    if item.is_network:
        network = open_network(item.path, processes.device, "--compare")
        evaluator.check_network(network.G, network.info)
        return
    images = SetImages(item.path, settings.chosen)
    evaluator.check_images(images)
    _warn_of_shared(images, evaluator, "--compare")


@contextmanager
def _naming(item: Item) -> Iterator[None]:
    """Name an item in the message of an error."""
    try:
        yield
    except UserError as error:
        text = str(error)
        raise UserError(text if item.path in text else f"{item.name}: {text}") from error


def _show(settings: MeasureSettings, rows: Sequence[Row], first: str, title: str | None = None) -> None:
    """Print the table that an option asks for, and draw the figure."""
    if not is_main():
        return
    if settings.compare or settings.per_class or settings.ci is not None or settings.holdout is not None:
        _print_lines([*([] if title is None else [title]), *result_table(rows, first)])
    if settings.figure is not None:
        save_figure(settings.figure, rows)


def _print_lines(lines: Sequence[str]) -> None:
    for line in lines:
        click.echo(line, err=True)


def _evaluator(settings: MeasureSettings, processes: Processes, *, mirror: bool) -> Evaluator:
    return Evaluator(settings.metrics, data=settings.data, detector=settings.detector,
                     weights=needed_detectors(settings.metrics, settings.detector, settings.detector_weights),
                     mirror=mirror, chosen=settings.chosen, seed=settings.seed, batch=settings.batch,
                     device=processes.device, use_cache=settings.use_cache, workers=settings.workers, ci=settings.ci,
                     holdout=settings.holdout, per_class=settings.per_class,
                     log=lambda line: click.echo(line, err=True), progress=settings.verbose)


def _write(name: str, found: Mapping[str, Any], processes: Processes, folder: Path | None, *, snapshot: str | None,
           **more: Any) -> None:
    """Print one result as a JSON line, the original's fields first, then ours; append it to a run's file.

    found:     what `Evaluator` returned for the metric: results, total_time and further fields
    folder:    of the run; None only prints
    snapshot:  name of the network file; None if images were measured
    """
    line = to_line({**metric_record(name, found, num_gpus=processes.count, snapshot=snapshot), **more})
    click.echo(line.decode(), nl=False)
    if folder is not None:
        # A training run may be writing to the same file.
        AppendFile(RunFolder(folder).metric(name), durable=True, shared=True).append(line)


def _log(settings: MeasureSettings, line: str) -> None:
    if settings.verbose and is_main():
        click.echo(line, err=True)
