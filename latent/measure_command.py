"""The command line of calc_metrics.py."""

import textwrap
from typing import Any

import click

from dnnlib.cli import UserPath, join_values
from latent.measuring import MeasureSettings, measure
from latent.sharing import check_counts, settle_device
from metrics.blocks import OtherProcessFailed
from metrics.detectors.opening import DETECTOR_NAMES
from metrics.names import DEFAULT_METRIC, DESCRIPTIONS, FORMS, KNOWN_NAMES
from torch_utils.distributed import Place, ProcessLost, join
from training.file_kind import OTHER_NAMES
from training.flags import TUNE_MALLOC_HELP
from training.launch import launch

_HELP = """Measure how good generated images are; print one JSON line for each metric.

\b
python calc_metrics.py --network=runs/00007-isic256/network-snapshot-000200.safetensors --data=isic256.zip
python calc_metrics.py --run=runs/00007-isic256 --data=heldout.zip --metrics=kid5k_full,pr2k3_full
python calc_metrics.py --generated=synthetic.zip --data=isic256.zip --metrics=kid_full,pr_full --class=melanoma
"""
_WIDTH = 106


class MetricsCommand(click.Command):
    """A command whose help tells of each metric."""

    def format_epilog(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Metrics"):
            formatter.write_dl(list(DESCRIPTIONS.items()))
        text = (f"Names are {', '.join(KNOWN_NAMES)}, and the same with other numbers of generated images: {FORMS}. "
                "With _full all real images are compared with, otherwise as many as generated ones, mirrored ones too "
                "where the training saw them. fid_full, kid_full and pr_full, without a number, take all images of "
                "--generated too, and of a network as many as there are real ones; the line says how many.")
        formatter.write_paragraph()
        formatter.write("".join(f"  {line}\n" for line in textwrap.wrap(text, _WIDTH)))


def make_command() -> click.Command:
    """Return the command of calc_metrics.py."""
    return MetricsCommand(None, callback=_run, params=_options(), help=_HELP,
                          context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})


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
        except OtherProcessFailed as error:  # that one tells the user
            raise ProcessLost(str(error)) from error
    return 0


def _options() -> list[click.Option]:
    detectors = ", ".join(DETECTOR_NAMES)
    return [
        _option("--network", UserPath(), "Network file to measure: a .safetensors of a run, or a .pkl of the original; "
                f"also {OTHER_NAMES}. In a run's folder, results are also added to its metric-NAME.jsonl.", "FILE"),
        _option("--generated", UserPath(), "Folder or zip of generated images to measure.", "PATH"),
        _option("--run", UserPath(),
                "Folder of a run, or a pattern that matches one: measure all its network files, add the results to its "
                "metric-NAME.jsonl, and draw measured-NAME.png.", "DIR"),
        _option("--metrics", str, "Metrics, separated by commas; see below. May be given several times. [default: "
                f"{DEFAULT_METRIC}]", "LIST", default=(DEFAULT_METRIC,), multiple=True, callback=join_values),
        _option("--data", UserPath(),
                "Data set of real images to compare with: the training's, or a held-out part.", "PATH"),
        _option("--mirror", bool, "Metrics without _full take mirrored real images too. [default: as in the training]",
                "BOOL"),
        _option("--class", str, "Measure images of one class only.", "NAME|NUMBER", name="chosen"),
        _option("--detector", str, f"Network that images are looked at with, in place of the usual one: {detectors}. "
                "Its numbers compare with none of another one. [default: inception-v3; vgg16 for pr, lpips-vgg16 for "
                "ppl]", "NAME"),
        _option("--detector-weights", UserPath(named=True),
                "File of weights in place of a downloaded one; NAME=FILE where several "
                "networks are needed, and lpips-vgg16=FOLDER with the two files that ppl needs. May be given several "
                "times.", "FILE", multiple=True),
        _option("--seed", int, "Number that latents and all random choices follow from. [default: 0]", "INT",
                default=0),
        _option("--batch", int, "Images at a time; part of the result, since the noise within a network follows from "
                "it. [default: by resolution]", "INT"),
        _option("--device", str, "auto (a CUDA device where there is one), cpu, cuda, or one GPU as cuda:1. "
                "[default: auto]", "NAME", default="auto"),
        _option("--gpus", int, "Number of processes that share the work. [default: 1]", "INT"),
        _option("--tune-malloc", bool, f"{TUNE_MALLOC_HELP} [default: true]", "BOOL", default=True),
        _option("--verbose", bool, "Show how far the work is. [default: true]", "BOOL", default=True),
        click.Option(["--no-cache", "use_cache"], is_flag=True, flag_value=False, default=True,
                     help="Compute features of image sets anew, and keep none."),
    ]


def _option(flag: str, kind: object, text: str, metavar: str, name: str | None = None,
            **attributes: Any) -> click.Option:
    return click.Option([flag, *([name] if name else [])], type=kind, help=text, metavar=metavar, **attributes)
