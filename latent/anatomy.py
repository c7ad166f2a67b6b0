"""What the parts of a generator do: noise, truncation, each layer's style, and the spread of w; `explore.py anatomy`.

StyleGAN: Karras et al. 2019, "A Style-Based Generator Architecture for Generative Adversarial Networks".

Legend: N seeds, L num_ws, K w_dim, C R channels and side of an image. Levels are pixel values from 0 to 255.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import click
import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from dnnlib.cli import UserError
from dnnlib.files import atomic_write
from generation.command import flag
from generation.image_generator import CLASS_CENTER, GLOBAL_CENTER, ImageGenerator
from generation.network import Label
from latent.anatomy_page import PAGE, ClassStyles, Exchange, Noise, Styles, Truncation, page_body, record_of
from latent.directions import RESOLUTIONS_OF, principal_components, resolutions_of_layers
from latent.exploration import (
    Explorer,
    ExploreRequest,
    make_explore_command,
    parse_numbers,
    pixel_differences,
    seeds_of,
)
from latent.exploration_page import thumbnail, write_page
from metrics.features import compute_rows
from torch_utils.seeding import generator_for, seed_for
from training.generator import noise_maps, truncate

RECORD = "anatomy.json"
ALL = "all"  # layers
PSIS = "0,0.25,0.5,0.75,1,1.25"

_PARTS = "Parts"  # heading of the help
_MOST_SEEDS, _MOST_PSIS, _LARGEST_PSI = 64, 16, 4
_NOISE_SEEDS, _SHOWN_SEEDS, _PAIRS = 4, 8, 8
_SHOWN_CLASSES, _COMPONENTS = 8, 3
_DEVIATIONS = (-2, -1, 0, 1, 2)

HELP = f"""Take a network apart on one page: noise, truncation, layers, and principal components of w.

\b
python explore.py anatomy --network=network-snapshot-001000.safetensors --outdir=anatomy

Writes {PAGE}, which holds all images, and {RECORD} with the numbers: the standard deviation that noise gives pixels;
images from psi 0 to 1 and beyond, towards the mean style of all images and of each class; what changes if one layer
takes another seed's style; and the principal components of w in each class.
"""


@dataclass(frozen=True, kw_only=True)
class AnatomyRequest(ExploreRequest):
    """The options of `explore.py anatomy`. Raises UserError if one is missing or out of range."""

    seeds: str = flag(_PARTS, "LIST", "Random seeds of the images, at least two, such as 0,1,5-9.", default="0-15")
    psi: str = flag(_PARTS, "LIST", "Values of psi that images are truncated with.", default=PSIS)
    draws: int = flag(_PARTS, "INT", "Random draws of noise that its standard deviation is computed from.", default=32)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.draws < 2:
            raise UserError(f"--draws is {self.draws}; expected at least 2, for a standard deviation")
        count = len(seeds_of(self.seeds, least=2))
        if count > _MOST_SEEDS:
            raise UserError(f"--seeds names {count} seeds; expected at most {_MOST_SEEDS} on one page")
        _ = self.psis  # checks

    @property
    def psis(self) -> list[float]:
        """The values of --psi, from small to large. Raises UserError."""
        found = parse_numbers("--psi", self.psi, lambda psi: abs(psi) <= _LARGEST_PSI,
                              f"values of psi, at most {_LARGEST_PSI}", example=PSIS)
        if len(found) > _MOST_PSIS:
            raise UserError(f"--psi has {len(found)} values; expected at most {_MOST_PSIS}")
        return found


# Noise.


def noise_inputs(G: nn.Module) -> dict[str, list[str]]:
    """Return the names of the noise maps in G.synthesis by group of layers: all, and coarse, middle and fine.

    Groups without noise are left out; networks without noise have none.
    """
    maps, groups = noise_maps(G.synthesis), {ALL: range(2**30), **RESOLUTIONS_OF}
    found = {group: [name for name, values in maps.items() if len(values) in range_]
             for group, range_ in groups.items()}
    return {group: some for group, some in found.items() if some}


def draw_noise(G: nn.Module, names: Sequence[str], seed: int, draw: int) -> dict[str, Tensor]:
    """Return random noise maps [1, 1, r, r] by name; a map depends on its name, the seed and the draw alone."""
    maps = noise_maps(G.synthesis)
    return {name: torch.randn(1, 1, *maps[name].shape, generator=generator_for(
        seed_for(seed, draw, 0, f"explore/noise/{name}"))).to(maps[name]) for name in names}


@torch.no_grad()
def noise_statistics(generator: ImageGenerator, w: Tensor, seed: int, names: Sequence[str],
                     draws: int) -> tuple[Tensor, Tensor]:
    """Return the mean image over draws of noise, and the standard deviation of each value (StyleGAN, figure 4).

    w:      [1, L, K]
    names:  of the noise maps that are drawn; the others stay constant

    Images are not rounded to whole levels, only limited to 0 to 255. Returns two float64 [C, R, R] in levels.
    """
    mean, squares = None, None
    for draw in range(draws):
        maps = draw_noise(generator.G, names, seed, draw)
        image = functional_call(generator.G.synthesis, maps, (w.to(generator.device),),
                                {"noise_mode": "const", "force_fp32": generator.fp32})[0]
        levels = (image.double().clamp(-1, 1) * 127.5 + 127.5).cpu()
        if mean is None:
            mean, squares = torch.zeros_like(levels), torch.zeros_like(levels)
        step = levels - mean  # Welford's sums, which do not cancel
        mean = mean + step / (draw + 1)
        squares = squares + step * (levels - mean)
    return mean, (squares / (draws - 1)).sqrt()


def measure_noise(explorer: Explorer, seeds: Sequence[int], draws: int) -> Noise | None:
    """Return what noise adds to the images of seeds; None without noise, and except on the main process."""
    groups = noise_inputs(explorer.G)
    if not groups:
        return None
    ws, units = explorer.styles(seeds), [(index, group) for index in range(len(seeds)) for group in groups]
    # First, since it refuses images that are not finite.
    constant = torch.cat(list(explorer.images(ws, "images with constant noise")))
    R, C = explorer.G.img_resolution, explorer.G.img_channels

    def compute(rows: range) -> list[Tensor]:
        maps, means = [torch.zeros(0, R * R)], [torch.zeros(0, C * R * R)]
        for row in rows:
            index, group = units[row]
            mean, std = noise_statistics(explorer.generator, ws[index:index + 1], seeds[index], groups[group], draws)
            maps.append(std.mean(dim=0).float().reshape(1, -1))
            means.append(mean.float().reshape(1, -1))
        return [torch.cat(maps), torch.cat(means)]

    with explorer.showing(len(units) * draws, "images with noise") as advance:
        tables = compute_rows(len(units), 1, [(len(units), R * R), (len(units), C * R * R)], compute,
                              lambda count: advance(count * draws))
    if tables is None:
        return None
    maps = tables[0].reshape(len(seeds), len(groups), R, R)
    means = tables[1].reshape(len(seeds), len(groups), C, R, R)[:, list(groups).index(ALL)]
    return Noise(seeds=tuple(seeds), draws=draws, constant=constant,
                 inputs={group: tuple(some) for group, some in groups.items()},
                 maps={group: maps[:, index] for index, group in enumerate(groups)},
                 means=means.round().clamp(0, 255).to(torch.uint8))


# Truncation.


def truncation_centers(explorer: Explorer, labels: Sequence[Label]) -> dict[str, Tensor]:
    """Return the mean styles that a network can truncate towards, one for each label: [N, K] on the CPU, by name."""
    G, found = explorer.G, {}
    if G.mapping.w_avg_beta is not None:
        found[GLOBAL_CENTER] = G.mapping.w_avg.detach().cpu().expand(len(labels), -1)
    if G.c_dim > 0:
        found[CLASS_CENTER] = explorer.generator.centers_of(explorer.network.classes.labels(labels)).cpu()
    return found


def measure_truncation(explorer: Explorer, seeds: Sequence[int], psis: Sequence[float]) -> list[Truncation]:
    """Return images of seeds at each psi, and how much they differ from each other, for each center."""
    labels, found = explorer.labels_of(len(seeds)), []
    ws = explorer.styles(seeds, truncated=False)
    names = [f"seed {seed}" + (f", {explorer.name_of(label)}" if label is not None else "")
             for seed, label in zip(seeds, labels, strict=True)]
    is_same = np.array([[one == other for other in labels] for one in labels])
    for center, styles in truncation_centers(explorer, labels).items():
        rows, same, others = [[] for _ in seeds[:_SHOWN_SEEDS]], [], []
        for psi in psis:
            made = torch.cat(list(explorer.images(truncate(ws, styles[:, None], psi), f"images, {center} center")))
            if explorer.is_main:
                distances = np.stack([pixel_differences(made, one) for one in made])
                same.append(mean_of_pairs(distances, is_same))
                others.append(mean_of_pairs(distances, ~is_same))
                for row, name, pixels in zip(rows, names, made, strict=False):
                    row.append(thumbnail(pixels, f"{name}, psi {psi:g}"))
        found.append(Truncation(center=center, psis=tuple(psis), same_class=tuple(same), other_class=tuple(others),
                                pictures=tuple(zip(names, rows, strict=False))))
    return found


def mean_of_pairs(distances: np.ndarray, chosen: np.ndarray) -> float | None:
    """Return the mean distance of the chosen pairs of different images; None if there are none. Both [N, N]"""
    pairs = distances[np.triu(chosen, 1)]
    return float(pairs.mean()) if len(pairs) else None


# Layers.


def measure_layers(explorer: Explorer, seeds: Sequence[int]) -> Exchange | None:
    """Return how much an image changes if one layer takes another seed's style; None except on the main process.

    A seed is paired with the next one, which gets the same class.
    """
    pairs = [(seed, seeds[(index + 1) % len(seeds)]) for index, seed in enumerate(seeds)][:_PAIRS]
    changes, shown = [], None
    for pair, label in zip(pairs, explorer.labels_of(len(pairs)), strict=True):
        own, other = explorer.styles(pair, [label] * 2)
        pixels = torch.cat(list(explorer.images(exchanged_styles(own, other), f"images of seeds {pair[0]}, {pair[1]}")))
        if explorer.is_main:
            changes.append(pixel_differences(pixels[1:-1], pixels[0]))
            shown = pixels if shown is None else shown
    if shown is None:
        return None
    return Exchange(pairs=tuple(pairs), resolutions=tuple(resolutions_of_layers(explorer.G)), changes=np.stack(changes),
                    pixels=shown)


def exchanged_styles(own: Tensor, other: Tensor) -> Tensor:
    """Return own, then own with each single layer of other, then other: [1 + L + 1, L, K]. own, other: [L, K]"""
    mixed = own.repeat(len(own), 1, 1)
    layers = torch.arange(len(own))
    mixed[layers, layers] = other
    return torch.cat([own[None], mixed, other[None]])


# Principal components of w.


def measure_styles(explorer: Explorer) -> Styles:
    """Return how w is spread in each class, and images along its principal components."""
    classes, means, within = [], [], []
    for index, label in enumerate(explorer.labels):
        styles = explorer.reference_styles([label])
        means.append(styles.mean(dim=0))
        within.append(float(styles.var(dim=0).sum()))
        found = describe_styles(explorer.name_of(label), styles)
        if index < _SHOWN_CLASSES:
            found = found.with_pictures(_along_components(explorer, styles, found))
        classes.append(found)
    if len(classes) == 1:
        return Styles(classes=tuple(classes), together=None, between=None)
    between = float(torch.stack(means).var(dim=0, correction=0).sum())
    total = between + float(np.mean(within))
    return Styles(classes=tuple(classes), together=describe_styles("all classes", explorer.reference_styles()),
                  between=between / total if total > 0 else None)


def describe_styles(name: str, styles: Tensor) -> ClassStyles:
    """Return the principal components of styles. styles: float64 [N, K]"""
    vectors, deviations = principal_components(styles, min(styles.shape[1], len(styles) - 1))
    return ClassStyles(name=name, vectors=vectors, deviations=deviations.double().numpy())


def _along_components(explorer: Explorer, styles: Tensor, found: ClassStyles) -> list[list[str]]:
    """Return images from the mean style along the first components, as HTML: a row for each component."""
    count = min(_COMPONENTS, len(found.vectors))
    steps = torch.tensor(_DEVIATIONS, dtype=torch.float64)[:, None]
    ws = torch.cat([styles.mean(dim=0) + steps * found.deviations[index] * found.vectors[index].double()
                    for index in range(count)])
    layers = ws.float()[:, None].expand(-1, explorer.G.num_ws, -1)
    pixels = torch.cat(list(explorer.images(layers, f"images along components {found.name}".rstrip())))
    if not explorer.is_main:
        return []
    return [[thumbnail(one, f"component {index}, {step} sd") for one, step in zip(row, _DEVIATIONS, strict=True)]
            for index, row in enumerate(pixels.unflatten(0, (count, -1)))]


# The command.


def explore_anatomy(explorer: Explorer, request: AnatomyRequest) -> None:
    """Do the work of `explore.py anatomy`."""
    seeds = seeds_of(request.seeds, least=2)
    noise = measure_noise(explorer, seeds[:_NOISE_SEEDS], request.draws)
    truncation = measure_truncation(explorer, seeds, request.psis)
    exchange = measure_layers(explorer, seeds)
    styles = measure_styles(explorer)
    if not explorer.is_main:
        return
    record = {**explorer.describe(), "seeds": seeds, **record_of(noise, truncation, exchange, styles)}
    with atomic_write(explorer.outdir / RECORD, text=True) as file:
        file.write(json.dumps(record, indent=1, allow_nan=False) + "\n")
    write_page(explorer.outdir / PAGE, f"Anatomy of {explorer.network.name}",
               page_body(record, noise, truncation, exchange, styles))
    click.echo(f"{explorer.outdir / PAGE}")


def make_anatomy_command() -> click.Command:
    """Return the command `explore.py anatomy`."""
    return make_explore_command("anatomy", AnatomyRequest, explore_anatomy, HELP,
                                "Take a network apart: noise, truncation, layers, principal components.")
