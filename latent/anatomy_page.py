"""The page and the record of `explore.py anatomy`, and what they are made from.

Legend: N seeds, L num_ws, K w_dim, C R channels and side of an image. Levels are pixel values from 0 to 255.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from latent.exploration import mean_with_interval
from latent.exploration_page import (
    Cell,
    captioned,
    describe_mean,
    figure,
    heading,
    image_tag,
    paragraph,
    picture_table,
    sortable_table,
    thumbnail,
)
from torch_utils import plots

PAGE = "anatomy.html"

_SHARE = 0.9  # of the variance
_COLORS = "magma"  # of matplotlib
_TOP = 0.995  # quantile of a map's values that is the end of its scale
_FIRST = 10  # components in the record
_NO_NUMBER = "-"


@dataclass(frozen=True, kw_only=True)
class Noise:
    """What noise adds to images."""

    seeds: tuple[int, ...]
    draws: int
    inputs: Mapping[str, tuple[str, ...]]  # the names of the noise maps that were drawn, by group of layers
    maps: Mapping[str, Tensor]  # by group, float32 [N, R, R]: standard deviation of pixels in levels, mean of channels
    constant: Tensor  # uint8 [N, C, R, R], the images with the network's constant noise
    means: Tensor  # uint8 [N, C, R, R], the mean images over draws for all layers

    def means_of(self, group: str) -> list[float]:
        """Return the mean standard deviation in the image of each seed, in levels."""
        return self.maps[group].double().mean(dim=(1, 2)).tolist()


@dataclass(frozen=True, kw_only=True)
class Truncation:
    """Images from psi 0 to 1, towards one center."""

    center: str
    psis: tuple[float, ...]
    same_class: tuple[float | None, ...]  # at each psi, mean difference between images of a class, in levels
    other_class: tuple[float | None, ...]  # ... of different classes
    pictures: tuple[tuple[str, list[str]], ...]  # name of a row, and images as HTML


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """How images change if one layer takes the style of another seed."""

    pairs: tuple[tuple[int, int], ...]
    resolutions: tuple[int, ...]  # of each layer
    changes: np.ndarray  # float64 [pairs, L], mean absolute differences in levels
    pixels: Tensor  # of the first pair, uint8 [1 + L + 1, C, R, R]: unchanged, with each layer, the other seed

    def differences(self) -> list[Tensor]:
        """Return the absolute differences to the unchanged image, mean of channels: L + 1 of float32 [R, R]."""
        own = self.pixels[0].float()
        return [(image.float() - own).abs().mean(dim=0) for image in self.pixels[1:]]


@dataclass(frozen=True, kw_only=True)
class ClassStyles:
    """Principal components of the styles of a class."""

    name: str  # "" for unconditional networks
    vectors: Tensor  # float32 [num, K]
    deviations: np.ndarray  # float64 [num], from large to small
    pictures: Sequence[Sequence[str]] = ()  # along the first components, images as HTML

    def with_pictures(self, pictures: Sequence[Sequence[str]]) -> "ClassStyles":
        return replace(self, pictures=pictures)

    @property
    def shares(self) -> np.ndarray:
        """The share of the variance along each component: float64 [num]; zeros if there is no variance."""
        variances = np.square(self.deviations)
        return variances / variances.sum() if variances.sum() > 0 else np.zeros_like(variances)

    @property
    def num_for_most(self) -> int:
        """The number of components that have 90 % of the variance."""
        return min(int((self.shares.cumsum() < _SHARE - 1e-12).sum()) + 1, len(self.shares))


@dataclass(frozen=True, kw_only=True)
class Styles:
    """How w is spread."""

    classes: tuple[ClassStyles, ...]
    together: ClassStyles | None  # of all classes, each with equal weight; None if there is one
    between: float | None  # share of the variance of w that is between classes

    def cosines(self) -> np.ndarray:
        """Return |cosine| of the first components of each two classes: float64 [classes, classes]."""
        first = torch.stack([one.vectors[0] for one in self.classes]).double()
        return (first @ first.T).abs().numpy()


def record_of(noise: Noise | None, truncation: Sequence[Truncation], exchange: Exchange,
              styles: Styles) -> dict[str, Any]:
    """Return all numbers as JSON values."""
    return {
        "noise": None if noise is None else {
            "seeds": list(noise.seeds), "draws": noise.draws,
            "layers": {group: {"inputs": list(noise.inputs[group]), "std_by_seed": noise.means_of(group),
                               "std": float(np.mean(noise.means_of(group)))} for group in noise.maps}},
        "centers": {one.center: [{"psi": psi, "same_class": same, "other_class": other} for psi, same, other in
                                    zip(one.psis, one.same_class, one.other_class, strict=True)]
                       for one in truncation},
        "exchange": {"pairs": [list(pair) for pair in exchange.pairs],
                     "layers": [{"layer": layer, "resolution": resolution,
                                 "change": mean_with_interval(exchange.changes[:, layer])}
                                for layer, resolution in enumerate(exchange.resolutions)]},
        "styles": {"between_classes": styles.between, "classes": [_style_record(one) for one in styles.classes],
                   "all_classes": None if styles.together is None else _style_record(styles.together),
                   "cosines_of_first_components": styles.cosines().tolist()},
    }


def _style_record(one: ClassStyles) -> dict[str, Any]:
    return {"class": one.name, "components_for_90_percent": one.num_for_most,
            "deviations": one.deviations[:_FIRST].tolist(), "shares": one.shares[:_FIRST].tolist()}


def page_body(record: Mapping[str, Any], noise: Noise | None, truncation: Sequence[Truncation], exchange: Exchange,
              styles: Styles) -> str:
    """Return the page as HTML. record: see `record_of`"""
    return (paragraph("Differences between images are mean absolute differences of pixels in levels, from 0 to 255. "
                      "Intervals are of 95 %, over pairs of seeds."
                      + (f" Styles are truncated with psi {record['truncation']:g} where noise and layers are "
                         "explored, and nowhere else." if record["truncation"] != 1 else ""))
            + _noise_part(record, noise) + _truncation_part(record, truncation) + _exchange_part(record, exchange)
            + _styles_part(styles))


def _noise_part(record: Mapping[str, Any], noise: Noise | None) -> str:
    body = heading("What noise adds")
    if noise is None:
        return body + paragraph("This network has no noise inputs: an image follows from its style alone.")
    top = max(_end_of_scale(values) for maps in noise.maps.values() for values in maps)
    rows = []
    for index, seed in enumerate(noise.seeds):
        maps = [captioned(thumbnail(colored(values[index], top), f"noise of {group} layers, seed {seed}"),
                          f"{noise.means_of(group)[index]:.3g} levels") for group, values in noise.maps.items()]
        pictures = [thumbnail(noise.constant[index], f"constant noise, seed {seed}"),
                    thumbnail(noise.means[index], f"mean image, seed {seed}")]
        rows.append((f"seed {seed}", [*pictures, *maps]))
    table = [[Cell(group), Cell(f"{len(entry['inputs'])}", len(entry["inputs"])),
              Cell(f"{entry['std']:.3g}", entry["std"])] for group, entry in record["noise"]["layers"].items()]
    return (body + paragraph(
        f"The standard deviation of each pixel over {noise.draws} draws of noise, for the noise of all layers, and of "
        "the coarse (4x4, 8x8), middle (16x16, 32x32) and fine ones (from 64x64 on) alone, while the others keep the "
        f"network's constant noise. Black is 0, the brightest color {top:.3g} levels or more.")
        + picture_table(["constant noise", "mean image", *(f"{group} layers" for group in noise.maps)], rows)
        + sortable_table(["layers", "noise inputs", "mean standard deviation, levels"], table))


def _truncation_part(record: Mapping[str, Any], truncation: Sequence[Truncation]) -> str:
    body = heading("Truncation: psi")
    if not truncation:
        return body + paragraph("This network has no mean style and no classes: it has nothing to truncate towards.")
    body += paragraph("Each style is pulled towards a mean style: psi 0 gives the image of that style, 1 the image of "
                      "the seed, and larger values exaggerate. global: the mean style of all images; class: that of "
                      "the image's own class.")
    for one in truncation:
        body += heading(f"Towards the {one.center} center", 3)
        kinds = {"images of the same class": one.same_class, "images of different classes": one.other_class}
        rows = [[Cell(name), *(Cell(_NO_NUMBER if value is None else f"{value:.3g}", value) for value in values)]
                for name, values in kinds.items() if any(value is not None for value in values)]
        columns = [f"psi {psi:g}" for psi in one.psis]
        body += picture_table(columns, one.pictures) + sortable_table(
            ["mean difference, levels", *columns], rows, "How much images of different seeds differ from each other: "
            f"means over the pairs of {len(record['seeds'])} seeds.")
    return body


def _exchange_part(record: Mapping[str, Any], exchange: Exchange) -> str:
    (own, other), num = exchange.pairs[0], len(exchange.resolutions)
    differences = exchange.differences()
    top = max(_end_of_scale(values) for values in differences[:num])
    names = [f"layer {layer}, {side}x{side}" for layer, side in enumerate(exchange.resolutions)]
    titles = [f"seed {own}", *names, f"seed {other}"]
    images = [thumbnail(pixels, title) for pixels, title in zip(exchange.pixels, titles, strict=True)]
    maps = ["", *(captioned(thumbnail(colored(values, top), f"change by {title}"), f"{values.mean():.3g} levels")
                  for values, title in zip(differences, titles[1:], strict=True))]
    entries = record["exchange"]["layers"]
    most = max(max(entry["change"]["mean"] for entry in entries), 1e-12)
    table = [[Cell(str(entry["layer"]), entry["layer"]), Cell(f"{entry['resolution']}", entry["resolution"]),
              Cell(describe_mean(entry["change"]), entry["change"]["mean"], shade=entry["change"]["mean"] / most)]
             for entry in entries]
    pairs = ", ".join(f"{one} and {two}" for one, two in exchange.pairs)
    return (heading("One layer's style exchanged") + paragraph(
        f"The image of seed {own} with the style of seed {other} in one layer at a time, and in all of them. Below: "
        "the absolute difference to the first image, mean of channels; the brightest color is "
        f"{top:.3g} levels or more. A layer is an index of w: it drives one convolution, and the first one of a "
        "resolution also ToRGB of the resolution before, if there is one; the last index drives ToRGB alone.")
        + picture_table(titles, [("image", images), ("change", maps)])
        + sortable_table(["layer", "resolution", "mean change, levels"], table,
                         f"Means over the pairs of seeds {pairs}."))


def _styles_part(styles: Styles) -> str:
    every = [*styles.classes, *([] if styles.together is None else [styles.together])]
    table = [[Cell(_title(one)), Cell(str(one.num_for_most), one.num_for_most),
              *(Cell(f"{share:.1%}", share) for share in _padded(one.shares, 3)),
              Cell(f"{np.sqrt(np.square(one.deviations).sum()):.3g}", float(np.sqrt(np.square(one.deviations).sum())))]
             for one in every]
    body = heading("Principal components of w") + paragraph(
        "Of the styles of 10,000 random latents of each class. A component is a direction of W that is orthogonal to "
        "those before it and along which styles vary most; its standard deviation is the unit of the images below, "
        "which start at the mean style of the class and move in all layers.")
    if styles.between is not None:
        body += paragraph(f"Of the variance of w, {styles.between:.1%} is between the means of the classes, and "
                          f"{1 - styles.between:.1%} within classes, each class with equal weight.")
    body += sortable_table(["class", "components for 90 % of the variance", "share of 1st", "share of 2nd",
                            "share of 3rd", "standard deviation of w"], table)
    body += figure(image_tag(draw_shares(every), "cumulative share of the variance of w"),
                   "Share of the variance of w in the first components; the line is at 90 %.")
    if len(styles.classes) > 1:
        cosines = styles.cosines()
        rows = [[Cell(_title(one)), *(Cell(f"{value:.2f}", float(value), shade=float(value)) for value in line)]
                for one, line in zip(styles.classes, cosines, strict=True)]
        body += sortable_table(["class", *map(_title, styles.classes)], rows,
                               "Cosine, without its sign, between the first components of each two classes: 1 if they "
                               "are the same direction, 0 if orthogonal.")
    for one in styles.classes:
        if one.pictures:
            names = [f"component {index} ({share:.1%})" for index, share in enumerate(one.shares[:len(one.pictures)])]
            body += heading(_title(one), 3) + picture_table(["-2 sd", "-1 sd", "mean", "1 sd", "2 sd"],
                                                            list(zip(names, one.pictures, strict=True)))
    hidden = sum(not one.pictures for one in styles.classes)
    return body + (paragraph(f"Images of {hidden} further classes are left out; name classes with --class.")
                   if hidden else "")


@plots.own_style()
def draw_shares(classes: Sequence[ClassStyles]) -> PIL.Image.Image:
    """Return a plot of the cumulative share of the variance over the number of components."""
    most = max(2, min(max(2 * one.num_for_most for one in classes), len(classes[0].shares)))
    lines, width = len(classes), 720
    image = plots.make_figure(width, 360 + 20 * lines)
    axes = image.add_axes((0.09, 50 / (360 + 20 * lines), 0.88, 300 / (360 + 20 * lines)))
    entries = []
    for index, one in enumerate(classes):
        shares = one.shares.cumsum()[:most]
        color, style = plots.COLORS[index % len(plots.COLORS)], "-" if index < len(plots.COLORS) else "--"
        (line,) = axes.plot(np.arange(1, len(shares) + 1), shares, color=color, linestyle=style, linewidth=1.5)
        entries.append((line, f"{plots.printable(_title(one), 300)}: {one.num_for_most} for 90 %"))
    axes.axhline(_SHARE, color="#606060", linewidth=1, linestyle=":")
    axes.set_ylim(0, 1.02)
    axes.set_xlim(0.5, most + 0.5)
    axes.set_xlabel("components", loc="right")
    plots.draw_legend(image, entries, at=(0.09, 1 - 4 / (360 + 20 * lines)))
    return plots.render_figure(image)


def _end_of_scale(values: Tensor) -> float:
    return float(np.quantile(values.numpy(), _TOP))


def colored(values: Tensor, top: float) -> Tensor:
    """Return a map as an image: uint8 [3, H, W]; 0 is black, `top` and more the brightest color. values: [H, W]"""
    from matplotlib import colormaps  # here: it takes a second to import

    scaled = (values.double() / top).clamp(0, 1).numpy() if top > 0 else np.zeros(values.shape)
    return torch.from_numpy((colormaps[_COLORS](scaled)[..., :3] * 255).round().astype(np.uint8)).permute(2, 0, 1)


def _title(one: ClassStyles) -> str:
    return one.name or "all images"


def _padded(values: np.ndarray, count: int) -> list[float]:
    return [*values[:count].tolist(), *[0.0] * max(0, count - len(values))]
