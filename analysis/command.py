"""The commands of study.py: their flags, and what they print."""

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from analysis.authenticity_study import make_authenticity_command
from analysis.backbones import DEFAULT_MODEL
from analysis.classifier import ALL, HEAD
from analysis.classifier_jobs import ClassifySettings
from analysis.classify import classify
from analysis.embed import make_embed_command
from analysis.fine_tuning import FineTuneSettings
from analysis.make_protocol import ProtocolRequest, make_protocol
from analysis.prediction import make_predict_command
from analysis.protocol import TRAIN, Protocol
from analysis.regimes import BALANCE, BOTH, REAL, REGIMES, parse_regimes, parse_shares
from analysis.study_results import StudyResults
from dnnlib.cli import Flag, GroupedCommand, UserError, UserPath, check_outdir, join_values, split_paths
from dnnlib.text import format_table, listed, plural
from dnnlib.workers import usable_cores
from generation.pictures import check_file
from imagesets.reader import describe_shape
from metrics.intervals import DEFAULT_LEVEL
from torch_utils.device import DEVICE_HELP, TUNE_MALLOC_HELP, check_counts, settle_device
from torch_utils.distributed import Place, join
from torch_utils.launch import launch
from training.options import DATA, SPEED, make_flag, show_value

GROUP_HELP = """Test what synthetic images are worth, and whether they copy training images.

\b
python study.py protocol --train=isic-train.zip --val=isic-val.zip --test=isic-test.zip --positive=mel \\
    --out=protocol.json
python study.py classify --protocol=protocol.json --synthetic=synthetic.zip --outdir=classifiers
python study.py predict --model=classifiers/models/real-seed0.safetensors --data=images.zip --out=probabilities.csv
python study.py authenticity --protocol=protocol.json --network=network-snapshot-001000.safetensors \\
    --synthetic=synthetic.zip --outdir=authenticity
python study.py embed --sets=isic-train.zip,synthetic.zip --out=map.html
"""
PROTOCOL_HELP = """Fix the data sets and labels of a study, and check that no image or patient is in two parts.

Data sets are zips or folders made by dataset_tool.py, with classes as labels. Parts that share an image, also mirrored
or under another name, or a patient or lesion are refused. Images that resemble a training image as a changed copy does
are listed.

\b
python study.py protocol --train=ham-train.zip --val=ham-val.zip --test=ham-test.zip --external=isic.zip \\
    --positive=mel,melanoma --attributes=HAM10000_metadata.csv --out=protocol.json
python study.py protocol --train=ham-train.zip --val=ham-val.zip --test=ham-test.zip --multiclass \\
    --subset=ham-site1.zip,ham-site2.zip --out=protocol.json
"""
CLASSIFY_HELP = """Train classifiers on real images, synthetic ones, or both, and test them on held-out real images.

\b
python study.py classify --protocol=protocol.json --synthetic=synthetic.zip --outdir=classifiers \\
    --model=efficientnet-lite0
python study.py classify --protocol=protocol.json --synthetic=synthetic.zip --outdir=tuned --finetune=all \\
    --fraction=0.1,1 --dose=0.5,1 --num-seeds=3 --gpus=4

Regimes: real (train on real images, test on real ones), synthetic (train on synthetic images, test on real ones),
real+synthetic (train on both), real-on-synthetic (train on real images, test on synthetic ones). All are validated on
the real validation part.

The same command again continues where it stopped; with more regimes, doses, fractions or seeds, it adds to what is
there. BOOL is 1 or 0, true or false, yes or no.
"""
_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
TASK, OUTPUT = "Task", "Output"  # headings of the help
STUDY, IMAGES, CLASSIFIER, TUNING = "Study", "Training images", "Classifier", "With --finetune=all"
_MOST_SHOWN = 5  # near-duplicates that are printed


def _require(flags: dict[str, Any], **expected: str) -> None:
    """Raise UserError for the first of these flags that is not given."""
    for name, what in expected.items():
        if flags[name] is None:
            raise UserError(f"--{name} is missing; expected {what}")


# study.py protocol


_PROTOCOL_FLAGS = [
    make_flag("--train", UserPath(), DATA, "Training part: the only real images that classifiers learn from, and that "
              "the networks of verified synthetic images saw. Required.", "PATH"),
    make_flag("--val", UserPath(), DATA, "Validation part, for early stopping and thresholds. Required.", "PATH"),
    make_flag("--test", UserPath(), DATA, "Test part, for results only. Required.", "PATH"),
    make_flag("--external", UserPath(), DATA, "Test sets of other origin, separated by commas. Can be repeated.",
              "PATH,...", multiple=True, callback=split_paths),
    make_flag("--subset", UserPath(), DATA, "Subsets of the training part on which networks were trained, such as the "
              "data of institutions, separated by commas. Can be repeated.", "PATH,...", multiple=True,
              callback=split_paths),
    make_flag("--attributes", UserPath(), DATA, "Table (CSV) with attributes of the images, such as sex or body site, "
              "by patient, lesion or file name; results are also given by attribute.", "FILE"),
    make_flag("--positive", str, TASK, "One label against the rest: class names that are positive in any of the parts, "
              "separated by commas.", "NAME,..."),
    make_flag("--multiclass", bool, TASK, "All classes of the training part as labels.", is_flag=True, default=False),
    make_flag("--out", UserPath(), OUTPUT, "File to write, which all later commands take as --protocol. Required.",
              "FILE"),
    make_flag("--workers", click.IntRange(min=1), SPEED, "Number of processes that decode images.", "N",
              standard="one per CPU core"),
]


def run_protocol(**flags: Any) -> int:
    """Make, print and write a protocol. Raises UserError as `make_protocol` does, and if --out is not writable."""
    _require(flags, train="the data set that classifiers learn from", val="a data set for thresholds",
             test="a data set for results", out="a file name such as protocol.json")
    out, workers = flags.pop("out"), flags.pop("workers")
    check_file("--out", out, ".json")
    for name in ("external", "subset"):
        flags[name] = flags[name] or ()
    protocol = make_protocol(ProtocolRequest(**flags), out, workers=workers or usable_cores())
    note = _write_protocol(protocol, out)
    for line in (*describe_protocol(protocol), note):
        click.echo(line)
    return 0


def describe_protocol(protocol: Protocol) -> Iterator[str]:
    """Yield a protocol as text lines."""
    task = protocol.task
    yield f"task: {' against '.join(reversed(task.labels)) if task.is_binary else listed(task.labels)}"
    yield ""
    yield from format_table([["part", "size", "images", "groups", *task.labels], *(
        [part.name, describe_shape(part.shape), str(part.num_images), str(part.num_groups),
         *(str(part.label_counts[label]) for label in task.labels)] for part in protocol.parts)], left=(0, 1))
    if task.is_binary:
        yield ""
        for part in protocol.parts:
            classes = [f"{name} ({count}) = {task.labels[part.class_labels[name]]}"
                       for name, count in part.class_counts.items()]
            yield f"{part.name}: {listed(classes)}"
    yield ""
    for subset in protocol.subsets:
        yield f"subset {subset.name}: {plural(subset.num_images, 'image')} of the training part"
    yield "no image and no named group (patient, lesion) is in two parts"
    yield from _describe_near_duplicates(protocol)
    if (table := protocol.attributes) is not None:
        found = ", ".join(f"{part.name} {table.matched[part.name]} of {part.num_images}" for part in protocol.parts)
        left_out = f"; not used: {listed(table.left_out)}" if table.left_out else ""
        yield f"attributes {listed(table.columns)}, by {table.key} ({table.key_column}){left_out}"
        yield f"images with attributes: {found}"


def _describe_near_duplicates(protocol: Protocol) -> Iterator[str]:
    if not protocol.num_near_duplicates:
        yield "no image resembles a training image as a changed copy does"
        return
    yield (f"{plural(protocol.num_near_duplicates, 'image resembles', 'images resemble')} a training image as a "
           "changed copy does; look at them, and leave them out if they are the same picture:")
    for one in protocol.near_duplicates[:_MOST_SHOWN]:
        yield (f"    {one.part} {one.image}, {one.orientation}, and {TRAIN} {one.training_image}: correlation "
               f"{one.correlation:.3f}")
    if protocol.num_near_duplicates > _MOST_SHOWN:
        yield f"    ... ({protocol.num_near_duplicates - _MOST_SHOWN} more in the file)"


def _write_protocol(protocol: Protocol, out: str) -> str:
    """Write a protocol unless it is there; return a line about it. Raises UserError if another file is there."""
    if Path(out).exists():
        try:
            before = Protocol.read(out)
        except UserError as error:
            raise UserError(f"--out is {out}, which exists and is not a readable protocol; choose another name, or "
                            "remove it") from error
        if before.sha256 != protocol.sha256:
            raise UserError(f"--out is {out}, which holds another protocol; choose another name, or remove it")
        if before == protocol:
            return f"{out} holds this protocol already"
    protocol.write(out)
    return f"written to {out}"


protocol_command = GroupedCommand("protocol", callback=run_protocol, params=list(_PROTOCOL_FLAGS), help=PROTOCOL_HELP,
                                  short_help="Fix and check the data sets of a study.", context_settings=_CONTEXT)


# study.py classify


def _classify_flags() -> list[Flag]:
    standard = FineTuneSettings()
    return [
        make_flag("--protocol", UserPath(), STUDY, "File of study.py protocol. Required.", "FILE"),
        make_flag("--synthetic", UserPath(), STUDY, "Labeled set of synthetic images, made by generate.py --zip. "
                  "Needed by all regimes but real.", "PATH"),
        make_flag("--unverified-synthetic", bool, STUDY, "Accept synthetic images of a network that is not known to be "
                  "trained on the protocol's training part alone; all results say so.", is_flag=True, default=False),
        make_flag("--outdir", UserPath(), STUDY, "Folder for classifiers and results. Required.", "DIR"),
        make_flag("--ci", float, STUDY, "Level of intervals.", "LEVEL", standard=show_value(DEFAULT_LEVEL),
                  default=DEFAULT_LEVEL),
        make_flag("--resamples", int, STUDY, "Number of bootstrap resamples of groups.", "N",
                  standard=show_value(StudyResults.resamples), default=StudyResults.resamples),
        make_flag("-n --dry-run", bool, STUDY, "Check everything, print what each classifier would be trained on, and "
                  "exit, without writing anything.", is_flag=True, default=False),

        make_flag("--regimes", str, IMAGES, f"Some of {', '.join(REGIMES)}. Can be repeated.", "LIST", multiple=True,
                  callback=join_values, standard="all with --synthetic, else real"),
        make_flag("--fraction", str, IMAGES, "Shares of the real training images to use, by group; each is a part of "
                  "the larger ones. Can be repeated.", "LIST", multiple=True, callback=join_values, standard="1"),
        make_flag("--dose", str, IMAGES, "For real+synthetic: number of synthetic images, as shares of the number of "
                  "real ones in use; drawn at random from the set. Can be repeated.", "LIST", multiple=True,
                  callback=join_values, standard="1, or none with --fill"),
        make_flag("--fill", click.Choice([BALANCE]), IMAGES, "For real+synthetic: add synthetic images of the rarer "
                  "labels until all have equally many images.", standard="none"),
        make_flag("--num-seeds", int, IMAGES, "Number of classifiers per condition. Seeds decide which images are "
                  "drawn and, with --finetune=all, the course of the training; where both are fixed, one is trained.",
                  "N", standard="3", default=3),
        make_flag("--seed", int, IMAGES, "The first seed.", "INT", standard="0", default=0),

        make_flag("--model", str, CLASSIFIER, "Network: any classifier of torchvision, or efficientnet-lite0, whose "
                  "ImageNet weights need no download.", "NAME", standard=DEFAULT_MODEL, default=DEFAULT_MODEL),
        make_flag("--weights", UserPath(), CLASSIFIER, "Its ImageNet weights: auto (torchvision's, from its cache or "
                  "downloaded), a file, or none.", "auto|none|FILE", standard="auto", default="auto"),
        make_flag("--finetune", click.Choice([HEAD, ALL]), CLASSIFIER, "What is trained. head: a logistic regression "
                  "on the features of the network, seconds on a CPU; all: all layers.", standard=HEAD, default=HEAD),
        make_flag("--size", int, CLASSIFIER, "Resize images to SIZE x SIZE pixels, without a crop.", "SIZE",
                  standard="as the weights were trained"),
        make_flag("--class-weights", bool, CLASSIFIER, "Weight labels in the loss inversely to their numbers. Changes "
                  "probabilities, so that Brier score and ECE get worse.", "BOOL", standard="false", default=False),

        make_flag("--epochs", int, TUNING, "Most epochs; the best one by validation AUC is kept.", "N",
                  standard=show_value(standard.epochs)),
        make_flag("--patience", int, TUNING, "Stop after N epochs without a better validation AUC.", "N",
                  standard=show_value(standard.patience)),
        make_flag("--batch", int, TUNING, "Batch size.", "N", standard=show_value(standard.batch)),
        make_flag("--lr", float, TUNING, "Learning rate of AdamW after the first epoch.", "FLOAT",
                  standard=show_value(standard.lr)),

        make_flag("--device", str, SPEED, DEVICE_HELP, "NAME", standard="auto", default="auto"),
        make_flag("--gpus", int, SPEED, "Number of processes: one per GPU, or several on a CPU. With --finetune=all "
                  "each trains other classifiers; with head they compute features together.", "INT", standard="1"),
        make_flag("--workers", int, SPEED, "Number of processes that decode images, for each process.", "INT",
                  standard="its share of the CPU cores, at most 8"),
        make_flag("--tune-malloc", bool, SPEED, TUNE_MALLOC_HELP, "BOOL", standard="true", default=True),
        make_flag("--no-cache", bool, SPEED, "Neither read nor write the cache of image features.", is_flag=True,
                  default=False),
        make_flag("--verbose", bool, SPEED, "Show progress.", "BOOL", standard="true", default=True),
    ]


def make_classify_command() -> click.Command:
    """Return the command that trains and tests classifiers."""
    return GroupedCommand("classify", callback=_run_classify, params=_classify_flags(), help=CLASSIFY_HELP,
                          short_help="Train classifiers on real and synthetic images, and test them.",
                          context_settings=_CONTEXT)


def _run_classify(device: str, gpus: int | None, tune_malloc: bool, dry_run: bool, **flags: Any) -> int:
    settings = _classify_settings(flags)
    place = Place.from_environment()
    check_counts(gpus=gpus)
    count = 1 if dry_run else place.processes(gpus)
    device = settle_device(device, place, count, tunes_malloc=tune_malloc)
    if count > 1 and not place.is_started:
        return launch(count)
    with join(device) as processes:
        classify(settings, processes, dry_run=dry_run)
    return 0


def _classify_settings(flags: Mapping[str, Any]) -> ClassifySettings:
    """Return the settings, checked as far as possible without the data. Raises UserError."""
    if find_spec("sklearn") is None:
        raise UserError("scikit-learn is not installed, which study.py classify needs: pip install scikit-learn")
    _require(flags, protocol="a file of study.py protocol", outdir="a folder for classifiers and results")
    check_counts(**{name.replace("_", "-"): flags[name] for name in ("num_seeds", "resamples", "size", "epochs",
                                                                    "patience", "batch", "workers")})
    if not 0 < flags["ci"] < 1:
        raise UserError(f"--ci is {flags['ci']:g}; expected a level between 0 and 1, such as {DEFAULT_LEVEL:g}")
    check_outdir(flags["outdir"])
    has_set = flags["synthetic"] is not None
    regimes = parse_regimes(
        ",".join(REGIMES if has_set else (REAL,)) if flags["regimes"] is None else flags["regimes"])
    if not has_set and regimes != (REAL,):
        raise UserError(f"--regimes has {next(name for name in regimes if name != REAL)}, but --synthetic is missing; "
                        "expected a labeled set of synthetic images, made by generate.py --zip")
    for name in ("dose", "fill"):
        if flags[name] is not None and BOTH not in regimes:
            raise UserError(f"--{name} is given without the regime {BOTH}; expected --regimes with {BOTH}: add it, or "
                            f"leave --{name} out")
    tuning = {name: flags[name] for name in ("epochs", "patience", "batch", "lr") if flags[name] is not None}
    if tuning and flags["finetune"] == HEAD:
        raise UserError(f"--{next(iter(tuning))} is given with --finetune={HEAD}, which fits a logistic regression; "
                        f"expected it with --finetune={ALL}: leave it out")
    return ClassifySettings(
        protocol=flags["protocol"], outdir=Path(flags["outdir"]), synthetic=flags["synthetic"],
        allow_unverified=flags["unverified_synthetic"], regimes=regimes,
        fractions=parse_shares("1" if flags["fraction"] is None else flags["fraction"], "--fraction", most=1),
        doses=() if flags["dose"] is None else parse_shares(flags["dose"], "--dose"), fill=flags["fill"],
        seeds=tuple(range(flags["seed"], flags["seed"] + flags["num_seeds"])), model=flags["model"],
        weights=flags["weights"], finetune=flags["finetune"], size=flags["size"],
        class_weights=flags["class_weights"],
        tuning=FineTuneSettings(**tuning),
        ci=flags["ci"], resamples=flags["resamples"], workers=flags["workers"], use_cache=not flags["no_cache"],
        verbose=flags["verbose"])


def make_group() -> click.Group:
    """Return the command line of study.py."""
    commands = [protocol_command, make_classify_command(), make_predict_command(),  # each command is registered here
                make_authenticity_command(), make_embed_command()]
    return click.Group("study", commands=commands, help=GROUP_HELP, context_settings=_CONTEXT,
                       no_args_is_help=False)  # which is no one line
