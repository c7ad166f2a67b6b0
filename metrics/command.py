"""The command line of calc_metrics.py: measure one network, all of a run, or a set of images; write the results."""

import os
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import click

from dnnlib.cli import UserError, UserPath, join_values
from dnnlib.lines import AppendFile, to_line
from generation.network import NETWORK_HELP, OpenNetwork, choose_network, open_network
from metrics.detectors.registry import DETECTOR_NAMES
from metrics.evaluation import Evaluator
from metrics.features import OtherProcessFailed
from metrics.image_sources import SetImages
from metrics.names import DEFAULT_METRIC, DESCRIPTIONS, FORMS, KNOWN_NAMES, USUAL_DETECTORS, needed_detectors
from torch_utils.device import DEVICE_HELP, TUNE_MALLOC_HELP, check_counts, settle_device
from torch_utils.distributed import Place, Processes, ProcessLost, any_process, broadcast_object, is_main, join
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
                "generated ones, flipped ones included if training used them. fid_full, kid_full and pr_full, without "
                "a number, take all images of --generated, or as many from a network as there are real ones; the "
                "results record how many.")
        formatter.write_paragraph()
        formatter.write("".join(f"  {line}\n" for line in textwrap.wrap(text, _WIDTH - 4)))


def _options() -> list[click.Option]:
    detectors = ", ".join(DETECTOR_NAMES)
    return [
        _option("--network", UserPath(), f"{NETWORK_HELP} In the folder of a run, results are also added to its "
                "metric-NAME.jsonl.", "FILE"),
        _option("--generated", UserPath(), "Folder or zip of generated images to measure.", "PATH"),
        _option("--run", UserPath(),
                "Folder of a run, or a pattern that matches one: measure all its snapshots, add the results to its "
                "metric-NAME.jsonl, and plot them in measured-NAME.png.", "DIR"),
        _option("--metrics", str, "Metrics, separated by commas; see below. May be given several times.", "LIST",
                default=(DEFAULT_METRIC,), multiple=True, callback=join_values),
        _option("--data", UserPath(),
                "Data set of real images to compare with: the training set, or a held-out one.", "PATH"),
        _option("--mirror", bool, "Include horizontally flipped real images in metrics without _full.", "BOOL",
                shown="as in training"),
        _option("--class", str, "Measure images of one class only.", "NAME|NUMBER", name="chosen"),
        _option("--detector", str, f"Feature detector to use instead of the usual one: {detectors}. Values from "
                "different detectors cannot be compared.", "NAME",
                shown=f"{USUAL_DETECTORS['fid']}; {USUAL_DETECTORS['pr']} for pr, {USUAL_DETECTORS['ppl']} for ppl"),
        _option("--detector-weights", UserPath(named=True),
                "File with the detector's weights, instead of downloading them; NAME=FILE if several detectors are "
                "needed, and lpips-vgg16=FOLDER with the two files that ppl needs. May be given several times.",
                "FILE", multiple=True),
        _option("--seed", int, "Random seed.", "INT", default=0),
        _option("--batch", int, "Batch size. Results depend on it slightly, since noise inputs are drawn per batch.",
                "INT", shown="chosen by resolution"),
        _option("--device", str, DEVICE_HELP, "NAME", default="auto"),
        _option("--gpus", int, "Number of processes: one per GPU, or several on a CPU.", "INT", shown="1"),
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


def _run(gpus: int | None, device: str, tune_malloc: bool, **flags: Any) -> int:
    settings = MeasureSettings(**flags).found()
    place = Place.from_environment()
    check_counts(gpus=gpus)
    count = place.processes(gpus)
    device = settle_device(device, place, count, tunes_malloc=tune_malloc)
    if count > 1 and not place.is_started:
        return launch(count)
    with join(device) as processes:
        try:
            measure(settings, processes)
        except OtherProcessFailed as error:  # the other process prints its error
            raise ProcessLost(str(error)) from error
    return 0


@dataclass(frozen=True, kw_only=True)
class MeasureSettings:
    """The options of calc_metrics.py that decide what is measured, and how."""

    network: str | None
    generated: str | None
    run: str | None
    metrics: str
    data: str | None
    mirror: bool | None
    detector: str | None
    detector_weights: tuple[str, ...]
    chosen: str | None
    seed: int
    batch: int | None
    use_cache: bool
    verbose: bool

    def __post_init__(self):
        given = [f"--{name}" for name in ("network", "generated", "run") if getattr(self, name) is not None]
        if len(given) != 1:
            found = "none of --network, --generated and --run is" if not given else f"{' and '.join(given)} are"
            raise UserError(f"{found} given; expected exactly one of them")
        needed_detectors(self.metrics, self.detector, self.detector_weights)

    def found(self) -> Self:
        """Return a copy with the paths that --network and --run stand for. Raises UserError."""
        return replace(self, network=None if self.network is None else choose_network(self.network),
                       run=None if self.run is None else find_path(self.run, "--run", "the folder of a run"))

    @property
    def run_folder(self) -> Path | None:
        """The folder of the run that is measured, or that holds the network; None if there is none."""
        if self.run is not None:
            return Path(self.run)
        if self.network is not None:
            folder = Path(self.network).parent
            return folder if RunFolder(folder).options.exists() and read_record(folder) is not None else None
        return None


def measure(settings: MeasureSettings, processes: Processes) -> None:
    """Measure, print one JSON line per result, and add it to the run's folder if there is one.

    Raises UserError if a network, a data set or a metric cannot be used, or they do not fit together.
    """
    if settings.generated is not None:
        _measure_images(settings, processes)
        return
    # A run may write another one meanwhile: all processes measure the snapshots that the main process found.
    snapshots = broadcast_object([Path(settings.network)] if settings.run is None else _snapshots(settings.run))
    network = open_network(snapshots[-1], processes.device)
    evaluator = _evaluator(settings, processes, mirror=_mirror(settings, network.info))
    curves: dict[str, dict[str, list[tuple[float, float]]]] = {}  # metric -> key -> (kimg, value)
    for number, path in enumerate(snapshots):
        if len(snapshots) > 1 and (network := _open_if_there(path, processes)) is None:
            _log(settings, f"{path.name} was removed in the meantime, as train.py --keep does; it is skipped")
            continue
        _log(settings, f"{path.name} ({number + 1} of {len(snapshots)})")
        kimg = network.info.get("kimg")
        kimg = float(kimg) if isinstance(kimg, (int, float)) else None
        for name, result in evaluator.evaluate(network.G, network.info).items():
            _write(name, result, processes, settings.run_folder, snapshot=network.name, kimg=kimg,
                   network_sha256=network.sha256)
            for key, value in result["results"].items():
                if kimg is not None:
                    curves.setdefault(name, {}).setdefault(key, []).append((kimg, value))
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


def _mirror(settings: MeasureSettings, info: dict[str, Any]) -> bool:
    """Return --mirror, or whether training flipped images, as the run or the network file records."""
    if settings.mirror is not None:
        return settings.mirror
    record = None if settings.run_folder is None else read_record(settings.run_folder)
    if record is not None:
        return record.config.dataset.xflip
    training_set = info.get("training_set")
    return isinstance(training_set, dict) and training_set.get("xflip") is True


def _measure_images(settings: MeasureSettings, processes: Processes) -> None:
    images = SetImages(settings.generated, settings.chosen)
    evaluator = _evaluator(settings, processes, mirror=bool(settings.mirror))
    reals = evaluator.reference.images
    shared = images.num_shared(reals) if reals is not None and is_main() else 0
    if shared:
        click.echo(f"warning: {shared} of {len(images)} images of --generated={images.path} are also in "
                   f"--data={reals.path}; the metrics compare these images with themselves", err=True)
    found = evaluator.evaluate_images(images)
    if is_main():
        more = {"generated": images.path.name, "generated_sha256": images.select().content_hash()}
        for name, result in found.items():
            _write(name, result, processes, None, snapshot=None, **more)


def _evaluator(settings: MeasureSettings, processes: Processes, *, mirror: bool) -> Evaluator:
    return Evaluator(settings.metrics, data=settings.data, detector=settings.detector,
                     weights=needed_detectors(settings.metrics, settings.detector, settings.detector_weights),
                     mirror=mirror, chosen=settings.chosen, seed=settings.seed, batch=settings.batch,
                     device=processes.device, use_cache=settings.use_cache,
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
