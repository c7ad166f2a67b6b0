"""Compare images by structural similarity (SSIM) after alignment: a copy that was turned, shifted or cropped counts.

Of two gray images at 64x64, the first is turned, then scaled and shifted so that the two correlate best where they
overlap; SSIM there is the result. All sums are of integers that float32 or float64 holds exactly, so a pair has the
same result, bit for bit, in every batch and on every machine.

LIMIT: rotations by other angles than 90 degrees, warps, and shifts by over 10 % of the side are not undone. Details
finer than 1/64 of the side are not seen, and colors count as gray levels only.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from analysis.near_duplicates import LUMA, ORIENTATIONS, orient

SIDE = 64  # pixels of an image that is compared
COLOR_SIDE = 16  # pixels of a color thumbnail
MOST_SHIFT = 6  # pixels of SIDE: 10 % of it
# Of the first image, least change first: a copy from which 10 % of the side were cropped needs 0.9. Steps of 5 %: half
# a step moves the border by less than a pixel of SIDE.
SCALES = (1.0, 0.95, 1.05, 0.9, 1.11, 0.85, 1.17, 0.8, 1.25)
WINDOW = 7  # pixels of the side of the uniform window of SSIM
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2  # Wang et al. 2004, section III.B
_COARSE = SIDE // 2  # where scale and shift are searched for
_COARSE_SHIFT = MOST_SHIFT // 2
_SSIM_STEPS = 2**30  # SSIM is summed over windows in integers
_PAIRS = 32  # that are compared at once: about 20 MB


@dataclass(frozen=True, kw_only=True, eq=False)
class SmallImages:
    """What is compared of N images.

    gray:   uint8 [N, SIDE, SIDE], luma
    color:  float32 [N, 3, COLOR_SIDE, COLOR_SIDE], means of areas, 0..255
    """

    gray: Tensor
    color: Tensor

    def __len__(self) -> int:
        return len(self.gray)

    @classmethod
    def concatenate(cls, parts: Sequence[Self]) -> Self:
        """Return the images of all parts, in order."""
        return cls(gray=torch.cat([part.gray for part in parts]), color=torch.cat([part.color for part in parts]))

    def select(self, rows: np.ndarray | Tensor | Sequence[int]) -> Self:
        """Return the images of these rows. rows: int64 [M]"""
        chosen = torch.as_tensor(rows, dtype=torch.int64)
        return SmallImages(gray=self.gray[chosen], color=self.color[chosen])


class Alignment(NamedTuple):
    """How similar pairs of images are, and how the first one was changed for that."""

    ssim: Tensor  # float32 [P], -1 to 1
    shift: Tensor  # int64 [P, 2], pixels of SIDE down and to the right, after scaling about the center
    scale: Tensor  # float32 [P], one of SCALES


def prepare_images(pixels: Tensor) -> SmallImages:
    """Prepare images for comparison. pixels: uint8 [N, 3, H, W]"""
    levels = pixels.to(torch.float32)
    luma = sum(weight * levels[:, channel] for channel, weight in enumerate(LUMA))[:, None]
    return SmallImages(gray=_resize(luma, SIDE)[:, 0].round().clamp(0, 255).to(torch.uint8),
                       color=_round_color(_resize(levels, COLOR_SIDE)))


def enlarge_thumbnails(color: Tensor, scale: float) -> Tensor:
    """Return the parts of thumbnails about their centers, enlarged: float32 [N, 3, S, S].

    color:  float32 [N, 3, S, S], as of SmallImages
    scale:  1 or more
    """
    matrix, _ = _scaling(color.shape[-1], scale)
    return _round_color(matrix @ color @ matrix.T)


def aligned_ssim(gray_a: Tensor, gray_b: Tensor, orientations: Tensor) -> Alignment:
    """Return the similarity of pairs of images after alignment of the first with the second.

    gray_a, gray_b:  uint8 [P, SIDE, SIDE]
    orientations:    int64 [P], index in ORIENTATIONS of what turns the first image

    SSIM is that of Wang et al. 2004, eq. 13, with uniform windows of 7x7 that lie inside the overlap, and population
    variances. Before, the difference of the mean gray levels is removed: copies in other colors or brightness count.
    """
    parts = [_align(gray_a[start:start + _PAIRS], gray_b[start:start + _PAIRS], orientations[start:start + _PAIRS])
             for start in range(0, len(gray_a), _PAIRS)]
    if not parts:
        return Alignment(torch.empty(0), torch.empty([0, 2], dtype=torch.int64), torch.empty(0))
    return Alignment(*(torch.cat(values) for values in zip(*parts, strict=True)))


def _resize(levels: Tensor, side: int) -> Tensor:
    """Return images [N, C, side, side]: means of areas where these are whole pixels, otherwise bilinear."""
    if levels.shape[2] % side == 0 and levels.shape[3] % side == 0:
        return interpolate(levels, size=[side, side], mode="area")
    return interpolate(levels, size=[side, side], mode="bilinear", antialias=True)


def _round_color(color: Tensor) -> Tensor:
    """Return multiples of 1 / 16 level: sums over a thumbnail are exact in float32."""
    return (color * 16).round() / 16


def _align(gray_a: Tensor, gray_b: Tensor, orientations: Tensor) -> Alignment:
    """Do what `aligned_ssim` promises for few pairs."""
    tables = _tables()
    turned = gray_a.flatten(1).gather(1, tables.oriented[orientations]).view(-1, SIDE, SIDE)
    a, b = turned.to(torch.float32), gray_b.to(torch.float32)
    scales, shifts = _coarse_alignment(tables, a, b)
    matrices = tables.scaling[scales]
    a, inside = (matrices @ a @ matrices.mT).round_(), tables.inside[scales]
    shifts, b, overlap = _fine_alignment(a, b, inside, shifts)
    area = overlap.sum(dim=(1, 2))
    offset = ((b.sum(dim=(1, 2)) - (a * overlap).sum(dim=(1, 2))) / area).round_()[:, None, None]
    return Alignment(_ssim((a + offset) * overlap, b, overlap), shifts, torch.tensor(SCALES)[scales])


def _coarse_alignment(tables: "_Tables", a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return where the correlation at half the side is highest: index in SCALES int64 [P], shift at SIDE int64 [P, 2].

    a, b:  float32 [P, SIDE, SIDE] of integers 0..255

    Sums of 32 * 32 products of integers -128..127 fit into the 24 bits of a float32, in whatever order they are taken.
    """
    ours = (tables.coarse.view(-1, SIDE) @ a).view(len(a), len(SCALES), _COARSE, SIDE) @ tables.coarse.mT
    ours = ours.round_().sub_(128).flatten(2)
    theirs = pad((tables.coarse[0] @ b @ tables.coarse[0].T).round_().sub_(128), [_COARSE_SHIFT] * 4)
    scales, shifts = _best(_correlation(ours, _moves(theirs, _COARSE), tables.coarse_inside, tables.covered))
    return scales, 2 * shifts


def _fine_alignment(a: Tensor, b: Tensor, inside: Tensor, shifts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the best shifts among the neighbors of these, b moved back by them and 0 outside, and where it overlaps.

    a, b:    float32 [P, SIDE, SIDE] of integers 0..255, a after scaling
    inside:  float32 [P, SIDE, SIDE], 1 where a has pixels
    shifts:  int64 [P, 2]

    Levels are halved for the correlation, so that sums of 64 * 64 products of integers fit into 24 bits.
    """
    margin = MOST_SHIFT + 1
    rows, columns = (shifts[:, axis, None] + torch.arange(-1, SIDE + 1) for axis in (0, 1))
    within = [((each >= 0) & (each < SIDE)).to(torch.float32) for each in (rows, columns)]
    frame = within[0][:, :, None] * within[1][:, None]  # [P, SIDE + 2, SIDE + 2]
    framed = pad(b, [margin] * 4)[torch.arange(len(b))[:, None, None], rows[:, :, None] + margin,
                                  columns[:, None] + margin]
    halved, covered = _moves(((framed / 2).floor_() - 64) * frame, SIDE), _moves(frame, SIDE)
    _, steps = _best(_correlation(((a / 2).floor_() - 64).flatten(1)[:, None], halved, inside.flatten(1)[:, None],
                                  covered.mT))
    chosen = torch.arange(len(b)), 3 * (steps[:, 0] + 1) + steps[:, 1] + 1
    overlap = inside * covered[chosen].view(-1, SIDE, SIDE)
    return shifts + steps, _moves(framed, SIDE)[chosen].view(-1, SIDE, SIDE) * overlap, overlap


def _moves(framed: Tensor, side: int) -> Tensor:
    """Return all parts of images, row by row: [P, K, side ** 2] of [P, side + n, side + n], where K = (n + 1) ** 2."""
    framed = framed.contiguous()
    moves, strides = framed.shape[1] - side + 1, framed.stride()
    sizes = [len(framed), moves, moves, side, side]
    return framed.as_strided(sizes, [strides[0], *strides[1:], *strides[1:]]).flatten(3).flatten(1, 2)


def _correlation(ours: Tensor, moved: Tensor, inside: Tensor, covered: Tensor) -> Tensor:
    """Return correlations of S scaled images with K moved ones where they overlap, float64 [P, S, K].

    ours:     [P, S, n] of integers
    inside:   [S, n] or [P, S, n], 1 where a scaled image has pixels
    moved:    [P, K, n] of integers, 0 where the moved image has no pixels
    covered:  [n, K] or [P, n, K], 1 where it has
    """
    ours, moved = ours * inside, moved.mT
    area, x, y, xx, yy, xy = (each.double() for each in (
        inside @ covered, ours @ covered, inside @ moved, (ours * ours) @ covered, inside @ (moved * moved),
        ours @ moved))
    spread = (area * xx - x * x) * (area * yy - y * y)
    return torch.where(spread > 0, (area * xy - x * y) / spread.clamp(min=1).sqrt(), 0)


def _best(correlation: Tensor) -> tuple[Tensor, Tensor]:
    """Return scale, int64 [P], and shift, int64 [P, 2], of the highest correlation; of equal ones the least change.

    correlation:  float64 [P, S, K], of all shifts by at most (sqrt(K) - 1) / 2 pixels, row by row
    """
    size = math.isqrt(correlation.shape[2])
    shifts = torch.cartesian_prod(*[torch.arange(size) - size // 2] * 2)
    order = shifts.square().sum(dim=1).argsort(stable=True)
    best = correlation[:, :, order].flatten(1).numpy().argmax(axis=1)  # NumPy takes the first of equal ones
    return torch.from_numpy(best // len(order)), shifts[order[best % len(order)]]


def _ssim(x: Tensor, y: Tensor, overlap: Tensor) -> Tensor:
    """Return the mean SSIM of the windows inside the overlap, float32 [P].

    x, y:     float32 [P, SIDE, SIDE] of integers -255..510, 0 outside of the overlap
    overlap:  float32 [P, SIDE, SIDE], 1 inside
    """
    band = _tables().band
    sums = band @ torch.stack([x, y, x * x, y * y, x * y, overlap]) @ band.T  # below 2^24: exact
    mean_x, mean_y, square_x, square_y, product, area = sums.double() / WINDOW**2
    variances = square_x - mean_x**2 + square_y - mean_y**2
    similarity = ((2 * mean_x * mean_y + _C1) * (2 * (product - mean_x * mean_y) + _C2)
                  / ((mean_x**2 + mean_y**2 + _C1) * (variances + _C2)))
    whole = area == 1
    total = torch.where(whole, similarity * _SSIM_STEPS, 0).round().to(torch.int64).sum(dim=(1, 2))
    return (total.double() / (whole.sum(dim=(1, 2)) * _SSIM_STEPS)).to(torch.float32)


def _scaling(side: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return what scales an axis about its center, bilinearly, and where it has pixels then: [side, side] and [side].

    Weights are multiples of 1 / 64, so that products with levels are exact in float32.
    """
    places, center = torch.arange(side), (side - 1) / 2
    source = (places - center).double() / scale + center
    within = source.clamp(0, side - 1)
    low = within.floor().to(torch.int64)
    weight = ((within - low) * 64).round() / 64
    matrix = torch.zeros(side, side, dtype=torch.float64)
    matrix[places, low] += 1 - weight
    matrix[places, (low + 1).clamp(max=side - 1)] += weight
    return matrix.to(torch.float32), (source == within).to(torch.float32)


class _Tables(NamedTuple):
    """What all pairs have in common."""

    oriented: Tensor  # int64 [8, SIDE ** 2], where each pixel of an oriented image is taken from
    scaling: Tensor  # float32 [S, SIDE, SIDE], matrices that scale an axis about its center, bilinearly
    inside: Tensor  # float32 [S, SIDE, SIDE], 1 where a scaled image has pixels
    coarse: Tensor  # float32 [S, SIDE / 2, SIDE], matrices that scale an axis and halve its length
    coarse_inside: Tensor  # float32 [S, n], n = (SIDE / 2) ** 2 pixels
    covered: Tensor  # float32 [n, K], 1 where an image at half the side has pixels after each of K shifts
    band: Tensor  # float32 [SIDE - WINDOW + 1, SIDE], sums over windows


@cache
def _tables() -> _Tables:
    places, pixels = torch.arange(SIDE), torch.arange(SIDE**2).view(SIDE, SIDE)
    scaling, inside = zip(*[_scaling(SIDE, scale) for scale in SCALES], strict=True)
    scaling, inside = torch.stack(scaling), torch.stack(inside)
    coarse = scaling.view(-1, _COARSE, 2, SIDE).mean(dim=2)
    coarse_inside = inside.view(-1, _COARSE, 2).amin(dim=2)
    moved = torch.arange(_COARSE) + torch.arange(-_COARSE_SHIFT, _COARSE_SHIFT + 1)[:, None]
    within = ((moved >= 0) & (moved < _COARSE)).to(torch.float32)  # [shifts of an axis, SIDE / 2]
    covered = torch.einsum("iy,jx->yxij", within, within).reshape(_COARSE**2, -1)
    windows = places - torch.arange(SIDE - WINDOW + 1)[:, None]
    return _Tables(
        oriented=torch.stack([orient(pixels, orientation).flatten() for orientation in ORIENTATIONS]),
        scaling=scaling, inside=inside[:, :, None] * inside[:, None], coarse=coarse,
        coarse_inside=(coarse_inside[:, :, None] * coarse_inside[:, None]).flatten(1), covered=covered,
        band=((windows >= 0) & (windows < WINDOW)).to(torch.float32))
