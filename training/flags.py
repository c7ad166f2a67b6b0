"""The options of train.py: names, types, help texts, and the groups they are shown in."""

from collections.abc import Iterable

import click

from dnnlib.cli import UserPath, join_values
from training.config import RESUME_CLASSES
from training.device import PRECISION_NAMES
from training.file_kind import OTHER_NAMES
from training.options import AUGMENT_MODES
from training.presets import AUGPIPES, CFG_NAMES

RUN, DATA, MODEL, AUGMENT, START, SPEED = (
    "What and where", "Data", "Networks and training", "Augmentation", "Starting from a trained network",
    "Speed and devices")


TUNE_MALLOC_HELP = (
    "On a CPU with Linux and glibc, keep freed memory for reuse: faster, and the program's memory never shrinks. Left "
    "alone where the environment has settings of its own: MALLOC_*, GLIBC_TUNABLES, another allocator in LD_PRELOAD.")


class Flag(click.Option):
    """An option that knows the group it is shown in."""

    def __init__(self, declarations: Iterable[str], *, group: str, **attributes):
        super().__init__(list(declarations), **attributes)
        self.group = group


def _flag(names: str, kind: object, group: str, text: str, standard: str | None = None, metavar: str | None = None,
          **attributes) -> Flag:
    """Declare an option; `standard` says what holds where it is not given, in words since much comes from --cfg."""
    if isinstance(kind, click.Choice):
        metavar = "NAME"
        text = f"{text} One of: {', '.join(kind.choices)}."
    shown = text if standard is None else f"{text} [default: {standard}]"
    return Flag(names.split(), group=group, type=kind, help=shown, metavar=metavar, **attributes)


FLAGS = [
    _flag("--outdir", UserPath(), RUN, "Folder for the folders of runs; each run gets a numbered one. The same "
          "command again continues its newest run there. Must be given.", metavar="DIR"),
    _flag("--new", bool, RUN, "Start a new run, even where one could be continued: not for commands that are repeated "
          "to continue their run.", is_flag=True, default=False),
    _flag("--name", str, RUN, "Name of the run's folder after its number.", "made from data and flags", "TEXT"),
    _flag("--kimg", int, RUN, "Length of the training, in thousands of real images. A larger one continues a finished "
          "run.", "25000; 100000 with --cfg=cifar", "INT"),
    _flag("--tick", float, RUN, "Thousands of images from one line of statistics (a tick) to the next.", "4", "KIMG"),
    _flag("--snap", int, RUN, "Ticks from one network file and sheet of examples to the next.", "50", "TICKS"),
    _flag("--keep", int, RUN, "Keep the N newest network files, and remove older ones once a newer one is written. "
          "Those of the end of a run, those that another run in --outdir began from, and those whose metrics are still "
          "to be computed stay.", "all stay", "N"),
    _flag("--keep-best", str, RUN, "Keep the best network file by one of --metrics too; of pr name the value, such as "
          "pr50k3_full_recall. Without --keep, the best and the newest stay.", "none", "METRIC"),
    _flag("--state-minutes", float, RUN, "At most so long between two saved states to continue from.", "10",
          "MINUTES"),
    _flag("--max-hours", float, RUN, "After that long, save the state and stop; the same command continues later. "
          "Metrics that would take longer are left out, and computed with a later network file.", "no limit", "HOURS"),
    _flag("--metrics", str, RUN, "Quality metrics to compute with each network file, separated by commas, or none. May "
          "be given several times.", "fid50k_full where its detector is at hand, else none", "LIST", multiple=True,
          callback=join_values),
    _flag("--detector", str, RUN, "Network that metrics look through, in place of the usual ones; see calc_metrics.py "
          "--help.", "inception-v3; vgg16 for pr", "NAME"),
    _flag("--detector-weights", UserPath(named=True), RUN,
          "File of its weights; NAME=FILE where several networks are needed, and "
          "lpips-vgg16=FOLDER with the two files that ppl needs. May be given several times.", "downloaded ones",
          "FILE", multiple=True),
    _flag("--seed", int, RUN, "Number that all random choices follow from.", "0", "INT"),
    _flag("-n --dry-run", bool, RUN, "Write nothing: print settings, sizes, memory and files as JSON, then stop.",
          is_flag=True, default=False),

    _flag("--data", UserPath(), DATA, "Data set to learn from: a zip or folder from dataset_tool.py. Must be given.",
          metavar="PATH"),
    _flag("--cond", bool, DATA, "Learn classes: the networks are told the label of each image, a class or a list of "
          "numbers.", "false", "BOOL"),
    _flag("--subset", int, DATA, "Use so many images, drawn by --seed.", "all", "INT"),
    _flag("--mirror", bool, DATA, "Use each image a second time, left and right exchanged.", "false", "BOOL"),
    _flag("--balance", UserPath(), DATA,
          "How often images are seen: none (each equally often), classes (each class equally "
          "often), or a CSV file with the columns class,weight or file,weight.", "none", "none|classes|FILE",
          default="none"),
    _flag("--valid", UserPath(), DATA,
          "Data set that is never learned from: the discriminator's scores on it are reported "
          "beside those on --data, which shows overfitting.", "none", "PATH"),

    _flag("--cfg", click.Choice(CFG_NAMES), MODEL, "Preset that sizes and settings come from: auto fits resolution and "
          "number of processes; tiny is for CPUs and first tries; the others are those of the papers.", "auto"),
    _flag("--gamma", float, MODEL, "Weight of the R1 penalty, which keeps the discriminator smooth.", "from --cfg",
          "FLOAT"),
    _flag("--batch", int, MODEL, "Images of one iteration, over all processes.", "from --cfg", "INT"),
    _flag("--batch-gpu", int, MODEL, "Images that a process takes in one pass; smaller values need less memory, and "
          "continue a run that ran out of it.", "that of the run that is continued, else its share of the batch, or "
          "from --cfg", "INT"),

    _flag("--aug", click.Choice(AUGMENT_MODES), AUGMENT, "What sets the probability of augmentations. ada: it follows "
          "the overfitting; fixed: it is --p; noaug: there are none.", "ada"),
    _flag("--p", float, AUGMENT, "Probability of each augmentation with --aug=fixed, from 0 to 1; must be given there.",
          metavar="FLOAT"),
    _flag("--target", float, AUGMENT, "Overfitting that --aug=ada allows: mean sign of the discriminator on reals.",
          "0.6", "FLOAT"),
    _flag("--augpipe", click.Choice(AUGPIPES), AUGMENT, "Kinds of augmentation: b(lit), g(eom), c(olor), f(ilter), "
          "n(oise), c(utout).", "bgc"),

    _flag("--resume", UserPath(), START, "Network file whose weights training starts from: a .safetensors of a run, or "
          f"a .pkl of the original; also {OTHER_NAMES}. To continue a stopped run, repeat its command instead.",
          "noresume: random weights", "FILE|noresume"),
    _flag("--resume-classes", click.Choice(RESUME_CLASSES), START, "same: the network's classes are those of --data, "
          "by name, in any order. new: the class embedding starts anew and all else is taken, for other classes, for "
          "an unconditional network with --cond=1, or a conditional one without.", "same"),
    _flag("--resume-partial", bool, START, "Where resolutions, mapping layers or numbers of channels differ, take the "
          "layers that are the same, and let the others begin anew; without it such a network is refused.", "false",
          "BOOL"),
    _flag("--freezed", int, START, "Number of the discriminator's layers, counted from the image, that do not learn; "
          "for --resume.", "0", "INT"),

    _flag("--device", str, SPEED, "auto (a CUDA device where there is one), cpu, cuda, or one GPU as cuda:1.", "auto",
          "NAME", default="auto"),
    _flag("--gpus", int, SPEED, "Number of processes that share the work: one a GPU, or several on a CPU.", "1", "INT"),
    _flag("--precision", click.Choice(PRECISION_NAMES), SPEED, "Number format of the highest resolutions. auto: fp16 "
          "on a GPU, fp32 on a CPU; a run that is continued keeps what it began with.", "auto"),
    _flag("--fp32", bool, SPEED, "As --precision=fp32; false as --precision=fp16.", "not given", "BOOL"),
    _flag("--nhwc", bool, SPEED, "Keep the channels of a pixel together in half precision.", "false", "BOOL"),
    _flag("--allow-tf32", bool, SPEED, "Let a GPU round the factors of float32 products to TF32.", "true", "BOOL"),
    _flag("--nobench", bool, SPEED, "Do not let cuDNN try which of its convolutions is fastest.", "false", "BOOL"),
    _flag("--workers", int, SPEED, "Processes that read images, for each process of the run.", "3", "INT"),
    _flag("--tune-malloc", bool, SPEED, TUNE_MALLOC_HELP, "true", "BOOL", default=True),
]


class GroupedCommand(click.Command):
    """A command whose help shows its options in groups."""

    def format_options(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for option in self.get_params(context):
            record = option.get_help_record(context)
            if record is not None:
                groups.setdefault(getattr(option, "group", "Other"), []).append(record)
        for title, records in groups.items():
            with formatter.section(title):
                formatter.write_dl(records)
