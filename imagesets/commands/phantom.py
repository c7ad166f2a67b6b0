"""The command that renders phantoms."""

import click

from dnnlib.cli import UserPath
from imagesets.conversion.options import parse_resolution
from imagesets.phantom import TABLE, write_phantoms
from imagesets.phantoms.options import MAX_SIDE, check_square, parse_bias, parse_classes
from imagesets.phantoms.scene import ARTEFACT_RATES
from imagesets.resolutions import MIN_RESOLUTION


@click.command()
@click.option("--dest", required=True, type=UserPath(), metavar="PATH",
              help="The data set to write: a name ending in .zip, or a new folder.")
@click.option("--count", type=int, default=2000, show_default=True, metavar="INT", help="Number of images.")
@click.option("--resolution", default="64x64", show_default=True, metavar="WxH",
              help=f"Square, a power of two from {MIN_RESOLUTION} to {MAX_SIDE}.")
@click.option("--classes", default="benign:0.87,melanoma:0.13", show_default=True, metavar="NAME:SHARE,...",
              help="Classes and their shares of the images, which add up to 1; exact to one image.")
@click.option("--seed", type=int, default=0, show_default=True, metavar="INT", help="Equal seeds give equal images.")
@click.option("--bias", multiple=True, metavar="NAME=P:P:...", help="Probability of an artefact in each class, in the "
              f"order of --classes; may be repeated. Names: {', '.join(ARTEFACT_RATES)}.")
@click.option("--workers", type=int, metavar="INT", help="Processes; one a core if not given.")
def phantom_command(dest: str, count: int, resolution: str, classes: str, seed: int, bias: tuple[str, ...],
                    workers: int | None) -> None:
    """Render drawings of skin lesions with known attributes, for tests and demonstrations.

    They are no data: dataset.json says so. The class shows in the border, the symmetry and the colours of a lesion;
    looks are known for benign, melanoma, bkl, bcc, akiec, vasc, df and their other names, any other name gets one of
    its own. All other attributes are independent of the class unless --bias says otherwise. phantom.csv in the zip
    lists them for each image. Some patients have two or three images of one lesion.

    \b
    python dataset_tool.py phantom --dest=phantom.zip --count=2000 --resolution=64x64 --seed=0
    python dataset_tool.py phantom --dest=biased.zip --classes=benign:0.5,melanoma:0.5 --bias=frame=0.02:0.4
    """
    width, height = parse_resolution(resolution)
    check_square(width, height)
    counts = write_phantoms(dest, count=count, resolution=width, classes=parse_classes(classes), seed=seed,
                            bias=parse_bias(bias), workers=workers)
    shares = ", ".join(f"{name} {number}" for name, number in counts.items())
    click.echo(f"{dest}: {count} phantoms of {width}x{width} pixels ({shares}); their attributes are in {TABLE}")
