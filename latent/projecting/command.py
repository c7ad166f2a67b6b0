"""The command line of projector.py."""

from typing import Any

import click

from latent.projecting.flags import FLAGS
from latent.projecting.jobs import do_job
from latent.projecting.request import ProjectRequest
from training.flags import GroupedCommand

HELP = """Find the latents whose images are nearest to given ones; keep images, latents and distances.

\b
python projector.py --network=network-snapshot-001000.safetensors --target=lesion.jpg --class=melanoma --outdir=out
python projector.py --network=N.safetensors --target=lesion.jpg --class=auto --space=w+ --outdir=out
python projector.py --network=N.safetensors --target=lesion.jpg --class=nevus --pti-steps=350 --outdir=out
python projector.py --network=N.safetensors --data=heldout.zip --count=64 --group-by-class --outdir=heldout
torchrun --nproc-per-node=8 projector.py --network=N.safetensors --data=heldout.zip --outdir=heldout

generate.py --projected-w makes images of what was found.
"""


def _project(**flags: Any) -> int:
    return do_job(ProjectRequest(**flags))


def make_command() -> click.Command:
    """Return the command of projector.py."""
    return GroupedCommand(None, callback=_project, params=list(FLAGS), help=HELP,
                          context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
