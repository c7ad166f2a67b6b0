"""The options of projector.py: names, types, help texts, and the groups they are shown in."""

import click

from dnnlib.cli import UserPath
from imagesets.conversion.options import FILTERS
from latent.projecting.projection import SPACES
from latent.projecting.target_image import DEFAULT_TRANSFORM, TARGET_TRANSFORMS
from metrics.detectors.opening import SIMILARITY_NAMES
from training.file_kind import OTHER_NAMES
from training.flags import TUNE_MALLOC_HELP, Flag

WHAT, HOW, NEAR, IMAGES, SPEED = ("What to project", "How", "What is near", "How images are read", "Speed and devices")

FLAGS = [
    Flag(["--network"], group=WHAT, type=UserPath(), metavar="FILE", help="Network file: a .safetensors of a run, or a "
         f".pkl of the original; also {OTHER_NAMES}. Must be given."),
    Flag(["--target"], group=WHAT, type=UserPath(), metavar="FILE",
         help="Image to find in the latent space, of any size and kind."),
    Flag(["--data"], group=WHAT, type=UserPath(), metavar="PATH", help="Set of images in place of one: a data set, or "
         "any zip or folder of images. The same command continues where it was stopped."),
    Flag(["--outdir"], group=WHAT, type=UserPath(), metavar="DIR", help="Folder for the results. Must be given."),
    Flag(["--class", "class_"], group=WHAT, metavar="NAME", help="Class whose mean style is the start, by name or "
         "number, where the network knows classes; auto tries each and keeps the nearest. With --data also the class "
         "of the images to take, where the set has classes. [default with --data: the class of each image]"),
    Flag(["--label"], group=WHAT, metavar="LIST", help="Label whose mean style is the start, as the numbers that the "
         "network is told, such as 0,1,0.5: where it learned labels that are no classes. [default with --data: the "
         "label of each image]"),
    Flag(["--count"], group=WHAT, type=int, metavar="INT", help="So many images of --data, drawn by --seed. "
         "[default: all]"),
    Flag(["--group-by-class"], group=WHAT, is_flag=True, default=None, help="Take equally many images of each class of "
         "--data, and show classes apart on sheet and histogram."),

    Flag(["--num-steps"], group=HOW, type=int, metavar="INT", default=1000, help="Steps of a projection. "
         "[default: 1000]"),
    Flag(["--seed"], group=HOW, type=int, metavar="INT", default=303, help="Number that all random choices follow "
         "from. [default: 303]"),
    Flag(["--space"], group=HOW, metavar="|".join(SPACES), default="w", help="w: one style for all layers; w+: one for "
         "each layer, which comes nearer, and is less like what the network makes by itself. [default: w]"),
    Flag(["--pti-steps"], group=HOW, type=int, metavar="INT", help="After it, tune a copy of the network so many steps "
         "to show --target at the style that was found (pivotal tuning; 350 is usual). [default: 0]"),
    Flag(["--save-video"], group=HOW, type=bool, metavar="BOOL", help="Write proj.mp4, a frame for each step. "
         "[default: true with --target]"),

    Flag(["--detector"], group=NEAR, metavar="NAME", help="What images are compared by: "
         f"{', '.join(SIMILARITY_NAMES)}. Distances of different ones do not compare. [default: lpips-vgg16; where "
         "its weights cannot be had, what needs no download]"),
    Flag(["--detector-weights"], group=NEAR, type=UserPath(), metavar="PATH", help="Its weights in place of downloaded "
         "ones; for lpips-vgg16 a folder with its two files."),

    Flag(["--transform"], group=IMAGES, type=click.Choice(TARGET_TRANSFORMS), default=DEFAULT_TRANSFORM, metavar="NAME",
         help="What makes images square, as in dataset_tool.py: center-crop, center-crop-wide, or none, which "
         "stretches. [default: center-crop]"),
    Flag(["--resize-filter"], group=IMAGES, type=click.Choice(FILTERS), default="lanczos", metavar="NAME",
         help="lanczos or box. [default: lanczos]"),
    Flag(["--exact"], group=IMAGES, is_flag=True, default=False, help="Decode JPEG files at full size."),
    Flag(["--depth"], group=IMAGES, type=int, metavar="BITS", help="Bits of the numbers in images of more than 8 bits, "
         "as in dataset_tool.py: 12 makes 4095 white. [default: 16, or by the values]"),

    Flag(["--device"], group=SPEED, metavar="NAME", default="auto", help="auto (a CUDA device where there is one), "
         "cpu, cuda, or one GPU as cuda:1. [default: auto]"),
    Flag(["--gpus"], group=SPEED, type=int, metavar="INT", help="Processes that share the work of --data: one a GPU, "
         "or several on a CPU. [default: 1]"),
    Flag(["--batch"], group=SPEED, type=int, metavar="INT", help="Projections of one pass. An image's result does not "
         "depend on the others in it; passes of other sizes round otherwise. [default: by resolution and device, such "
         "as 8; with --target the classes that are tried]"),
    Flag(["--tune-malloc"], group=SPEED, type=bool, metavar="BOOL", default=True, help=f"{TUNE_MALLOC_HELP} "
         "[default: true]"),
]
