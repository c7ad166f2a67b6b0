"""The command line of generate.py."""

from typing import Any

import click

from latent.flags import FLAGS
from latent.jobs import do_job
from latent.request import Request
from training.flags import GroupedCommand

HELP = """Make images with a trained network: files, a sheet, a labelled data set, or mixed styles.

\b
python generate.py --network=network-snapshot-001000.safetensors --seeds=0-63 --class=melanoma --outdir=out
python generate.py --network=N.safetensors --seeds=0-9 --class=all --trunc=0.7 --grid=sheet.png
python generate.py --network=N.safetensors --zip=synthetic.zip --count=10000
python generate.py --network=N.safetensors --zip=balanced.zip --classes=benign:5000,melanoma:5000
python generate.py --network=N.safetensors --zip=drawn.zip --labels-from=set.zip
python generate.py --network=N.safetensors --projected-w=projected_w.npz --outdir=out
python generate.py --network=N.safetensors --style-mix --rows=85,100 --cols=55,821 --outdir=out

A seed gives the same image each time: that of the original's generate.py, for its networks.
"""


def _generate(**flags: Any) -> int:
    return do_job(Request(**flags))


def make_command() -> click.Command:
    """Return the command of generate.py."""
    return GroupedCommand(None, callback=_generate, params=list(FLAGS), help=HELP,
                          context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
