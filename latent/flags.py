"""The options of generate.py: names, types, help texts, and the groups they are shown in."""

import click

from dnnlib.cli import UserPath
from latent.sampling import MEAN_LATENTS, TRUNC_CENTERS
from training.config import NOISE_MODES
from training.file_kind import OTHER_NAMES
from training.flags import TUNE_MALLOC_HELP, Flag

IMAGES, FILES, SET, MIX, SPEED = ("Which images", "Where they go", "A labelled data set", "Mixed styles",
                                  "Speed and devices")
BESIDE_FILES = ""  # the value of --grid without a name

FLAGS = [
    Flag(["--network"], group=IMAGES, type=UserPath(), metavar="FILE", help="Network file: a .safetensors of a run, or "
         f"a .pkl of the original; also {OTHER_NAMES}. Must be given."),
    Flag(["--seeds"], group=IMAGES, metavar="LIST", help="Numbers that images follow from, such as 0,1,5-9. With --zip "
         "the first one [default: 0]."),
    Flag(["--class", "class_"], group=IMAGES, metavar="NAME", help="Class of the images, by name or number, where the "
         "network knows classes. For --grid several, such as melanoma,nevus, or all."),
    Flag(["--label"], group=IMAGES, metavar="LIST", help="Label of the images as the numbers that the network is told, "
         "such as 0,1,0.5: where it learned labels that are no classes. Of classes it is a mix, such as 0.5,0.5 of "
         "two, which the network never learned from."),
    Flag(["--trunc"], group=IMAGES, type=float, metavar="PSI", help="Truncation: smaller values give more usual and "
         "less varied images; 0 gives the mean image. [default: 1]"),
    Flag(["--trunc-center"], group=IMAGES, type=click.Choice(TRUNC_CENTERS), metavar="NAME", help="What --trunc pulls "
         "towards: global, the mean style of all images, in which frequent classes weigh most; class, that of the "
         f"image's own class, or of its label, over {MEAN_LATENTS} latents: right for a class that is rare in the "
         "training set. [default: global]"),
    Flag(["--noise-mode"], group=IMAGES, type=click.Choice(NOISE_MODES), metavar="NAME", help="Noise that fine detail "
         "follows from: const, the network's own; random, drawn by the seed of each image; none. [default: const]"),
    Flag(["--projected-w"], group=IMAGES, type=UserPath(), metavar="FILE",
         help="Make images of the styles in an .npz file, instead of "
         "seeds."),

    Flag(["--outdir"], group=FILES, type=UserPath(), metavar="DIR",
         help="Folder for seedNNNN.png (or projNN.png). Files of these names "
         "are replaced."),
    Flag(["--grid"], group=FILES, is_flag=False, flag_value=BESIDE_FILES, type=UserPath(), metavar="[FILE]",
         help="Show all images on "
         "one sheet, a row for each of several classes; without a name it is grid.png in --outdir."),

    Flag(["--zip"], group=SET, type=UserPath(), metavar="FILE",
         help="Write a data set with labels, as dataset_tool.py does. Image i is "
         "that of seed FIRST + i. The same command continues where it was stopped; a file that is there is never "
         "replaced."),
    Flag(["--count"], group=SET, type=int, metavar="INT", help="Number of images; of classes in the shares that the "
         "network was trained with, or those of --classes."),
    Flag(["--classes"], group=SET, metavar="LIST", help="Number of images of each class, such as "
         "benign:5000,melanoma:5000, in the order of the network's classes."),
    Flag(["--labels-from"], group=SET, type=UserPath(), metavar="PATH",
         help="Data set to draw labels from, in place of numbers of each "
         "class: in random order, by the first seed, each once before one comes again. Classes are matched by name. "
         "[default of --count: the number of its images]"),

    Flag(["--style-mix"], group=MIX, is_flag=True, default=None, help="Write ROW-COLUMN.png for all pairs of seeds: "
         "the row's image with layers of the column's style; and grid.png."),
    Flag(["--rows"], group=MIX, metavar="LIST", help="Seeds of the rows, such as 85,100,75."),
    Flag(["--cols"], group=MIX, metavar="LIST", help="Seeds of the columns."),
    Flag(["--styles"], group=MIX, metavar="LIST", help="Layers taken from the column; from 0, the coarsest. [default: "
         "0-6; the first half where there are no more]"),

    Flag(["--device"], group=SPEED, metavar="NAME", default="auto", help="auto (a CUDA device where there is one), "
         "cpu, cuda, or one GPU as cuda:1. [default: auto]"),
    Flag(["--gpus"], group=SPEED, type=int, metavar="INT", help="Processes that share the work of --zip: one a GPU, or "
         "several on a CPU. [default: 1]"),
    Flag(["--batch"], group=SPEED, type=int, metavar="INT", help="Images of one pass. Larger batches are faster; "
         "they move some pixels by one level. [default: 1 on a CPU, by resolution on a GPU]"),
    Flag(["--fp32"], group=SPEED, is_flag=True, default=None, help="Compute all in float32, also what the network "
         "computes in half precision on a GPU."),
    Flag(["--tune-malloc"], group=SPEED, type=bool, metavar="BOOL", default=True, help=f"{TUNE_MALLOC_HELP} "
         "[default: true]"),
]
