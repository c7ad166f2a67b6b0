"""Find directions of W in the network itself, and measure what they do: `explore.py sefa`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from dnnlib.cli import UserError, UserPath
from dnnlib.text import plural
from generation.command import flag
from generation.network import OpenNetwork
from latent.attribute_values import Samples, read_samples, samples_of_seeds
from latent.directions import (
    FILE,
    PCA,
    SEFA,
    Directions,
    choose_style_layers,
    deviations_along,
    factorize,
    mapping_sha256,
    principal_components,
    save_directions,
)
from latent.exploration import NETWORK, OUTPUT, Explorer, OpenClassifier, make_explore_command, seeds_of
from latent.measurements import EFFECTS, MeasuredRequest
from latent.walks import parse_strength, place_steps, remove_walks, walk_directions, write_walks
from torch_utils.device import check_counts

_DIRECTIONS = "Directions"  # heading of the help
_SEEDS = "0-31"

HELP = f"""Find directions of W in a network's weights, and measure what they change in the images.

\b
python explore.py sefa --network=N.safetensors --outdir=directions --layers=coarse --num=8
python explore.py sefa --network=N.safetensors --outdir=components --method=pca --class=melanoma --num=20
python explore.py sefa --network=N.safetensors --outdir=lesions --projected-w=projected_w.npz --layers=middle,fine

Images are moved along each direction, and the lesion in each is measured: area, diameter, asymmetry, border, color. The
change for each standard deviation of w is printed with its 95 % interval over the images; only changes are named that
differ from 0 after Holm's correction for all directions and quantities. Writes {FILE}, which explore.py edit opens, a
sheet for each direction, index.html to sort and compare them, effects.csv and effects.json.
"""


@dataclass(frozen=True, kw_only=True)
class SefaRequest(MeasuredRequest):
    """The options of `explore.py sefa`. Raises UserError if one is missing or out of range."""

    seeds: str | None = flag(NETWORK, "LIST", "Random seeds of the images that are moved, such as 0,1,5-9.",
                             shown=_SEEDS)
    projected_w: str | None = flag(
        NETWORK, "FILE", "Instead of --seeds, move the images in this file of projector.py; --trunc does not change "
        "them.", type=UserPath())
    layers: str = flag(_DIRECTIONS, "LIST", "Layers that the directions are found in and act on, such as 0,1,5-9, or "
                       "coarse (4 to 8 pixels), middle (16 to 32), fine (64 and up) or all.", default="all")
    num: int = flag(_DIRECTIONS, "INT", "Number of directions.", default=8)
    method: str = flag(
        _DIRECTIONS, f"{SEFA}|{PCA}", f"{SEFA}: directions that change the styles of the layers most, from the weights "
        f"alone (closed-form factorization). {PCA}: principal components of w, of 10,000 latents (GANSpace).",
        type=click.Choice((SEFA, PCA)), default=SEFA)
    torgb: bool = flag(_DIRECTIONS, None, f"With --method={SEFA}, include the styles of ToRGB layers.", default=False)
    strength: str = flag(EFFECTS, "LOW..HIGH", "How far images move, in standard deviations of w along a direction.",
                         default="-3..3")
    steps: int = flag(EFFECTS, "INT", "Steps from LOW to HIGH: columns of the sheets.", default=7)
    rows: int = flag(OUTPUT, "INT", "Images in each sheet.", default=8)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(num=self.num, rows=self.rows)
        if None not in (self.seeds, self.projected_w):
            raise UserError("--seeds and --projected-w are both given; expected one of them")
        if self.torgb and self.method != SEFA:
            raise UserError(f"--torgb is given, but only works with --method={SEFA}; leave it out")
        _ = self.places  # checks

    @property
    def chosen_seeds(self) -> list[int]:
        """The seeds, each once."""
        return seeds_of(_SEEDS if self.seeds is None else self.seeds)

    @property
    def places(self) -> list[float]:
        """The steps, in standard deviations of w."""
        return place_steps(*parse_strength(self.strength), self.steps)

    def check(self, network: OpenNetwork) -> None:
        super().check(network)
        G = network.G
        layers = choose_style_layers(self.layers, G)
        if self.method == SEFA:
            factorize(G, layers, self.num, torgb=self.torgb)
        elif self.num > G.w_dim:
            raise UserError(f"--num is {self.num}; expected 1 to {G.w_dim}: w has {G.w_dim} numbers")
        if self.projected_w is not None:
            read_samples(self.projected_w, G)
        else:
            _ = self.chosen_seeds  # checks


def find_directions(explorer: Explorer, request: SefaRequest) -> tuple[Directions, list[str]]:
    """Return directions, and how strong each is by the method: "singular value 12.3"."""
    layers, styles = choose_style_layers(request.layers, explorer.G), explorer.reference_styles()
    if request.method == SEFA:
        vectors, values = factorize(explorer.G, layers, request.num, torgb=request.torgb)
        deviations = deviations_along(styles, vectors)
        extras = {"singular_values": values.numpy()}
        details = [f"singular value {value:.4g}" for value in values.tolist()]
    else:
        vectors, deviations = principal_components(styles, request.num)
        shares = deviations.double()**2 / styles.var(dim=0).sum()
        extras = {"variance_shares": shares.numpy()}
        details = [f"{100 * share:.2g} % of the variance" for share in shares.tolist()]
    return Directions(names=tuple(map(str, range(len(vectors)))), vectors=vectors, deviations=deviations,
                      layers=tuple(layers), method=request.method, network_sha256=mapping_sha256(explorer.network),
                      extras=extras), details


def run_sefa(explorer: Explorer, request: SefaRequest, open_classifier: OpenClassifier) -> None:
    """Find directions and write them, then walk along them."""
    functions = request.functions(open_classifier, explorer.generator.device)
    directions, details = find_directions(explorer, request)
    if explorer.is_main:
        remove_walks(explorer.outdir)
        save_directions(explorer.outdir / FILE, directions)
    moved, record = _samples_of(explorer, request)
    reports = walk_directions(explorer, directions, moved.ws, moved.names, steps=request.places, functions=functions,
                              groups=moved.groups, details=details, num_shown=request.rows)
    layers = ", ".join(map(str, directions.layers))
    write_walks(explorer, reports, title=f"Directions in {explorer.network.name}", notes=[
        f"{plural(len(reports), 'direction')} ({request.method}) that act on layers {layers} of w, measured on "
        f"{plural(len(moved), 'image')} at {plural(request.steps, 'step')} from {request.places[0]:g} to "
        f"{request.places[-1]:g} standard deviations."],
        record={**record, "method": request.method, "layers": list(directions.layers), "torgb": request.torgb,
                "classifier": None if request.classifier is None else Path(request.classifier).name})


def _samples_of(explorer: Explorer, request: SefaRequest) -> tuple[Samples, dict[str, Any]]:
    """Return the images to move, and entries for the record."""
    if request.projected_w is not None:
        samples = read_samples(request.projected_w, explorer.G)
        return samples, {"projected_w": Path(request.projected_w).name, "images": list(samples.names)}
    return samples_of_seeds(explorer, request.chosen_seeds), {"seeds": request.chosen_seeds}


def make_sefa_command(open_classifier: OpenClassifier) -> click.Command:
    """Return the command `explore.py sefa`. open_classifier: opens a file of --classifier"""
    def work(explorer: Explorer, request: SefaRequest) -> None:
        run_sefa(explorer, request, open_classifier)

    return make_explore_command("sefa", SefaRequest, work, HELP, "Find directions by factorization of weights, or PCA.")
