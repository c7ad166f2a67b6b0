"""Explore the latent space of a network: directions and what they change, films, neighbors."""

import sys

import click
import numpy as np
import torch
from torch import Tensor

from analysis.classifier import open_classifier
from dnnlib.cli import UserError, run
from latent.anatomy import make_anatomy_command
from latent.boundary_command import make_boundary_command
from latent.direction_search import make_sefa_command
from latent.editing import make_edit_command
from latent.exploration import CONTEXT, ImageFunction
from latent.interpolation import make_interpolate_command
from latent.neighbors import make_neighbors_command
from metrics.image_sources import to_rgb

HELP = """Explore the latent space of a network: directions and what they change, films, neighbors.

\b
python explore.py sefa --network=network-snapshot-001000.safetensors --layers=coarse --outdir=directions
python explore.py boundary --network=N.safetensors --attribute=area,color_l --outdir=boundaries
python explore.py edit --network=N.safetensors --target=projected_w.npz --direction=boundaries/directions.npz:area \\
    --outdir=edit
python explore.py interpolate --network=N.safetensors --points=a/projected_w.npz,b/projected_w.npz --loop --outdir=film
python explore.py neighbors --network=N.safetensors --seed=7 --data=train.zip --outdir=neighbors
python explore.py anatomy --network=N.safetensors --outdir=anatomy
"""


def open_probabilities(path: str, weights: str, device: torch.device) -> ImageFunction:
    """Return the probabilities of a classifier of study.py. weights: as for `open_classifier`

    Raises UserError.
    """
    try:
        classifier = open_classifier(path, weights=weights, device=device)
    except UserError as error:
        raise UserError(f"--classifier: {error}") from error

    def compute(pixels: Tensor) -> np.ndarray:
        return classifier.probabilities(to_rgb(pixels.to(device))).cpu().numpy()

    return ImageFunction(names=classifier.labels, compute=compute)


# Each command is registered here.
main = click.Group("explore", help=HELP, context_settings=CONTEXT, no_args_is_help=False, commands=[
    make_sefa_command(open_probabilities), make_boundary_command(open_probabilities),
    make_edit_command(open_probabilities), make_interpolate_command(), make_neighbors_command(),
    make_anatomy_command()])

if __name__ == "__main__":
    sys.exit(run(main))
