"""Measure the lesion in an image: size, asymmetry, border and color, as in dermoscopy's ABCD rule (Stolz et al. 1994).

The segmentation is a simple one: skin is estimated from the outer part of the image, and lesion is what differs from
it in color (CIE Lab), by Otsu's threshold or a higher one, whichever gives the outline with the larger contrast. How
well that works on phantoms, whose outlines and colors are known, is printed by

    python -m pytest -s tests/latent/test_measurements.py -k phantoms

For 300 phantoms of all seven looks with hair, bubbles, rulers, ink, vignettes and frames, at 64x64 pixels, a lesion is
found in 99 %, and the median overlap (intersection over union) with the true one is 0.90. Correlations with the truth:
area with the diameter squared 0.97, diameter 0.96, mean L, a and b 0.99. Weak ones: asymmetry 0.52, border irregularity
0.55, color variety with the number of colors 0.55; the true outline would give 0.75, 0.89 and 0.59, since a phantom's
attributes only set the scale of random shapes. At 256x256 pixels, or without artifacts, all are the same within 0.1.

Of 140 phantoms whose diameter is 0.12 to 0.3 image widths, a lesion is found in 96 %, with a median overlap of 0.83; if
the pigment is also only 0.2 to 0.6 times as dense as usual, in 90 %, with 0.72. Of 140 without any lesion, something is
taken for one in 5 %, and in 15 % of those with hair, bubbles, rulers and vignettes.

Of 72 photographs of HAM10000 at 64x64 pixels, of all seven classes, the outline looked right in 58. LIMIT: a lesion
that fills the image, that is hardly darker or redder than the skin, or that is interrupted by white scales, dense hair
or ulceration is found in part or not at all, and so is a black one in a corner of the image; spots that touch it
are taken for parts of the lesion. A weak lesion may be outlined together with a pink part of the skin that touches it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from dnnlib.cli import UserError, UserPath
from generation.command import flag
from generation.network import OpenNetwork
from latent.exploration import ExploreRequest, ImageFunction, OpenClassifier
from metrics.features import on_main_first

# scikit-image and scipy take half a second to import: functions import them, so that programs start without.

EFFECTS = "Measured effects"  # heading of the help
_AUTO = "auto"  # a classifier's weights are looked for, as in study.py


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What a number is: its unit, and one line of text."""

    unit: str
    text: str


MEASUREMENTS: Mapping[str, Measurement] = MappingProxyType({
    "area": Measurement(unit="image areas", text="area of the lesion, as a share of the image"),
    "diameter": Measurement(unit="image widths", text="largest distance between two points of the outline"),
    "asymmetry": Measurement(
        unit="0 to 1", text="share of the lesion outside its mirror image, mean over both principal axes"),
    "border_irregularity": Measurement(
        unit="0 to 1", text="share of the convex hull that the lesion does not fill: 0 for a convex outline"),
    "color_l": Measurement(unit="Lab units", text="lightness L of the lesion's mean color: 0 black, 100 white"),
    "color_a": Measurement(unit="Lab units", text="red (positive) against green (negative) of the mean color"),
    "color_b": Measurement(unit="Lab units", text="yellow (positive) against blue (negative) of the mean color"),
    "color_variety": Measurement(
        unit="Lab units", text="root mean square distance of the lesion's colors, without its fringe, to their mean"),
})

_LARGEST_SIDE = 128  # pixels; larger images are reduced first: 256 takes 5 times as long and is not more accurate
# Lengths in image widths, so that an image gives the same numbers in every size.
_SMOOTHING = 1 / 80  # standard deviation of the Gaussian
_HAIR = 1 / 40  # dark lines that are thinner are taken for hairs
_OPENING = 1 / 32  # diameter of the disc whose passage decides whether a part belongs to a region
_MARGIN = 0.06  # diameter of the disc within which the edge of the lesion is looked for
_FRAME_MARGIN = 0.08  # the same for a black frame
_FRINGE = 1 / 32  # diameter of the disc that removes the blurred edge, whose colors are mixtures with skin
_CENTER_REACH = 0.22  # standard deviation of the weights of the pixels around the center
_OUTER = 0.33  # distance from the center beyond which skin is first looked for
_CORNERS = 0.55  # distance from the center beyond which pixels have no part in the threshold
_BAND = 0.14  # diameter of the disc within which the two sides of an outline are compared
_CENTRAL = 0.3  # distance from the center that a lesion reaches at least: ink and rulers lie further out
# Colors in units of Lab.
_BLACK = 14.0  # lightness below which corners belong to the frame of the field of view
_SATURATION = 15.0  # so that Otsu's threshold separates lesion from skin, and not black from brown within the lesion
_GLARE = 0.5  # weight of lighter than skin against darker: some lesions are white, but glare is more frequent
_EDGE_SATURATION = 8.0  # the same where outlines are compared: smaller, so that light brown counts almost as black does
_LEAST_CONTRAST = 3.5  # between the saturated distances of lesion and skin
# Shares.
_LEAST_AREA = 0.004  # of the image
_LEAST_VIEW = 0.2  # of the image, that the field of view covers
_LEAST_SKIN = 0.03  # of the field of view, from which shading can be estimated
_MOST_BORDER = 0.75  # of the border of the image, that a lesion may touch

_NUM_THRESHOLDS = 5  # that are compared; more take longer, and are not more accurate


def lesion_measurements() -> ImageFunction:
    """Return the measurements as a function of images. Raises UserError if scikit-image is not installed."""
    try:
        import skimage  # noqa: F401
    except ImportError as error:
        raise UserError("the lesion cannot be measured because scikit-image is not installed; install it "
                        "(pip install scikit-image), or use --measure=0") from error

    def compute(pixels: Tensor) -> np.ndarray:
        return measure(pixels.numpy())

    return ImageFunction(names=tuple(MEASUREMENTS), compute=compute)


@dataclass(frozen=True, kw_only=True)
class MeasuredRequest(ExploreRequest):
    """The options of commands that measure images.

    Raises UserError if they contradict each other.
    """

    measure: bool = flag(EFFECTS, "BOOL", "Measure the lesion in each image.", default=True)
    classifier: str | None = flag(
        EFFECTS, "FILE", "Also compute the probabilities of a classifier of study.py classify.", type=UserPath())
    weights: str = flag(
        EFFECTS, "FILE", "File with the weights of the classifier's backbone, if only its head was trained and they "
        f"are not on this machine; {_AUTO} looks for them, and downloads them.", default=_AUTO, type=UserPath())

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights != _AUTO and self.classifier is None:
            raise UserError("--weights is given, but only works with --classifier; add that, or leave --weights out")

    def check(self, network: OpenNetwork) -> None:
        super().check(network)
        if self.measure:
            lesion_measurements()

    def functions(self, open_classifier: OpenClassifier, device: torch.device) -> list[ImageFunction]:
        """Return the functions that measure images; all processes call it. Raises UserError if one is not available."""
        found = [lesion_measurements()] if self.measure else []
        if self.classifier is None:
            return found
        return [*found, on_main_first(lambda: open_classifier(self.classifier, self.weights, device))]


def measure(pixels: np.ndarray) -> np.ndarray:
    """Return the numbers of MEASUREMENTS, in this order, for each image: float64 [N, M]; nan where no lesion is found.

    pixels: uint8 [N, C, H, W], gray or RGB
    """
    rows = [_measure_one(image) for image in pixels]
    return np.stack(rows) if rows else np.zeros((0, len(MEASUREMENTS)))


def segment(pixels: np.ndarray) -> np.ndarray:
    """Return which pixels are lesion: bool [H, W]; all False where none is found.

    pixels: uint8 [C, H, W], gray or RGB
    """
    height, width = pixels.shape[1:]
    reduced, factor = _reduce(pixels)
    lesion = _find_lesion(_without_hair(_to_lab(reduced)))
    return lesion.repeat(factor, axis=0).repeat(factor, axis=1)[:height, :width]


def _measure_one(pixels: np.ndarray) -> np.ndarray:
    lab = _to_lab(_reduce(pixels)[0])
    smooth = _without_hair(lab)
    lesion = _find_lesion(smooth)
    if not lesion.any():
        return np.full(len(MEASUREMENTS), math.nan)
    hull_area, diameter = _hull(lesion)
    numbers = {
        "area": lesion.mean(),
        "diameter": diameter / lesion.shape[1],
        "asymmetry": _asymmetry(lesion),
        "border_irregularity": max(0.0, 1 - lesion.sum() / hull_area),
        **dict(zip(("color_l", "color_a", "color_b"), lab[lesion].mean(axis=0, dtype=np.float64))),
        "color_variety": _variety(smooth, lesion),
    }
    return np.array([numbers[name] for name in MEASUREMENTS], dtype=np.float64)


# The numbers.


def _hull(lesion: np.ndarray) -> tuple[float, float]:
    """Return the area of the convex hull and its largest (Feret) diameter, in pixels. lesion: bool [H, W], not empty"""
    from scipy.spatial import ConvexHull

    rows = np.flatnonzero(lesion.any(axis=1))
    first = lesion[rows].argmax(axis=1)
    last = lesion.shape[1] - lesion[rows, ::-1].argmax(axis=1)
    # The corners of the outermost pixels of each row: others cannot be corners of the hull.
    corners = np.concatenate([np.stack([side, edge], axis=1) for side in (first, last) for edge in (rows, rows + 1)])
    hull = ConvexHull(corners)
    outline = corners[hull.vertices]
    return hull.volume, float(np.sqrt(np.square(outline[:, None] - outline).sum(axis=-1).max()))


def _asymmetry(lesion: np.ndarray) -> float:
    """Return the share of the lesion that its reflection does not cover, mean over its principal axes."""
    from scipy.ndimage import map_coordinates

    points = np.argwhere(lesion).astype(np.float64)
    center = points.mean(axis=0)
    points -= center
    _, axes = np.linalg.eigh(points.T @ points)
    cover = lesion.astype(np.float64)
    shares = []
    for axis in axes.T:
        mirrored = points - 2 * np.outer(points @ axis, axis) + center
        shares.append(1 - map_coordinates(cover, mirrored.T, order=1, mode="constant").mean())
    return float(np.clip(np.mean(shares), 0, 1))


def _variety(lab: np.ndarray, lesion: np.ndarray) -> float:
    from scipy.ndimage import binary_erosion

    inner = binary_erosion(lesion, _disc(_FRINGE * lesion.shape[1]), border_value=1)
    colors = lab[inner if inner.any() else lesion].astype(np.float64)
    return float(np.sqrt(np.square(colors - colors.mean(axis=0)).sum(axis=1).mean()))


# The segmentation.


def _reduce(pixels: np.ndarray) -> tuple[np.ndarray, int]:
    """Return a large image averaged over squares of pixels, and their side."""
    from PIL import Image

    factor = math.ceil(max(pixels.shape[1:]) / _LARGEST_SIDE)
    if factor == 1:
        return pixels, 1
    return np.stack([np.asarray(Image.fromarray(channel).reduce(factor)) for channel in pixels]), factor


def _to_lab(pixels: np.ndarray) -> np.ndarray:
    """Return CIE Lab, float32 [H, W, 3], of uint8 [C, H, W]."""
    from skimage.color import rgb2lab

    rgb = np.broadcast_to(pixels, (3, *pixels.shape[1:])).transpose(1, 2, 0)
    return rgb2lab(rgb.astype(np.float32) / np.float32(255))


def _without_hair(lab: np.ndarray) -> np.ndarray:
    """Return colors [H, W, 3] without thin dark lines, slightly blurred."""
    from scipy.ndimage import gaussian_filter, grey_closing

    width = lab.shape[1]
    side = 2 * max(round(_HAIR * width / 2), 1) + 1
    light = grey_closing(lab[..., 0], size=(side, side), mode="nearest")
    return np.stack([gaussian_filter(channel, _SMOOTHING * width, mode="nearest", truncate=3)
                     for channel in (light, lab[..., 1], lab[..., 2])], axis=-1)


def _find_lesion(lab: np.ndarray) -> np.ndarray:
    """Return which pixels are lesion: bool [H, W]; all False where none is found.

    lab: [H, W, 3], smooth

    A first segmentation compares each pixel with the median of the brighter half of the outer pixels; the second one
    with the skin around the first, whose lightness may vary over the image as a quadratic function of the position,
    as shading and vignettes do (Cavalcanti and Scharcanski 2011), and whose a and b as a linear one.
    """
    from scipy.ndimage import binary_dilation
    from skimage.filters import threshold_otsu

    height, width = lab.shape[:2]
    distance, terms = _positions(height, width)
    nothing = np.zeros((height, width), dtype=bool)
    view = _field_of_view(lab[..., 0])
    outer = view & (distance > _OUTER)
    if view.mean() < _LEAST_VIEW or not outer.any():
        return nothing
    skin = outer & (lab[..., 0] >= np.median(lab[outer, 0]))
    expected = np.broadcast_to(np.median(lab[skin], axis=0), lab.shape)
    for is_last in (False, True):
        distance_to_skin = _distance_to_skin(lab, expected)
        unlike = _SATURATION * -np.expm1(-distance_to_skin / _SATURATION)
        threshold = threshold_otsu(unlike[view & (distance < _CORNERS)])
        lesion = _central_region((unlike > threshold) & view, distance)
        if not lesion.any():
            return nothing
        skin = view & (unlike < threshold) & ~binary_dilation(lesion, _disc(_MARGIN * width))
        if is_last or skin.sum() < _LEAST_SKIN * view.sum():
            break
        expected = np.empty_like(lab)
        for channel, count in enumerate((6, 3, 3)):
            known = terms[skin, :count]
            fit = np.linalg.lstsq(known.T @ known, known.T @ lab[skin, channel], rcond=None)[0]
            expected[..., channel] = terms[..., :count] @ fit
    top = unlike[view & (distance < _CORNERS)].max()
    lesion = _sharpest(distance_to_skin, unlike, np.linspace(threshold, top, _NUM_THRESHOLDS, endpoint=False), view)
    if not lesion.any() or distance[lesion].min() > _CENTRAL:
        return nothing
    border = np.concatenate([lesion[0], lesion[-1], lesion[:, 0], lesion[:, -1]])
    rest = view & ~lesion
    if not rest.any() or lesion.mean() < _LEAST_AREA or border.mean() > _MOST_BORDER:
        return nothing
    contrast = np.median(unlike[lesion]) - np.median(unlike[rest])
    return lesion if contrast >= _LEAST_CONTRAST else nothing


def _distance_to_skin(lab: np.ndarray, skin: np.ndarray) -> np.ndarray:
    """Return how far colors are from the skin, [H, W], in units of Lab."""
    light, red, yellow = np.moveaxis(lab - skin, -1, 0)
    light = np.where(light > 0, _GLARE * light, light)
    return np.sqrt(light**2 + red**2 + yellow**2)


def _sharpest(distance_to_skin: np.ndarray, unlike: np.ndarray, thresholds: np.ndarray, view: np.ndarray) -> np.ndarray:
    """Return the region, of those above some thresholds of `unlike`, whose outline has the largest contrast.

    Otsu's threshold, the first one, is right for lesions that cover much of the image. It falls among the variations
    of the skin if a lesion is small or weak, and then the region is too large, or stretches along these.
    """
    from scipy.ndimage import binary_dilation, binary_erosion

    distance, _ = _positions(*view.shape)
    band = _disc(_BAND * view.shape[1])
    relative = -np.expm1(-distance_to_skin / _EDGE_SATURATION)
    best, most = np.zeros_like(view), 0.0
    for threshold in thresholds:
        region = _tighten(_central_region((unlike > threshold) & view, distance), distance_to_skin, distance)
        inner = region & ~binary_erosion(region, band, border_value=1)
        outer = binary_dilation(region, band) & ~region & view
        if region.mean() < _LEAST_AREA or not inner.any() or not outer.any():
            continue
        contrast = relative[inner].mean() - relative[outer].mean()
        if contrast > most:
            best, most = region, contrast
    return best


def _tighten(lesion: np.ndarray, distance_to_skin: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """Return a region without the outer half of its blurred edge: where colors are nearer to skin than to lesion."""
    from scipy.ndimage import binary_erosion, maximum_filter

    disc = _disc(_MARGIN * lesion.shape[1])
    level = maximum_filter(np.where(lesion, distance_to_skin, 0), footprint=disc)
    inner = binary_erosion(lesion, disc, border_value=1)
    return _central_region(lesion & (inner | (distance_to_skin >= level / 2)), distance)


def _field_of_view(light: np.ndarray) -> np.ndarray:
    """Return which pixels are not in a black frame, nor close to one: bool [H, W]. light: L [H, W]"""
    from scipy.ndimage import binary_dilation, label

    dark = light < _BLACK
    if not dark.any():
        return ~dark
    regions, _ = label(dark)
    frame = dark & np.isin(regions, regions[[0, 0, -1, -1], [0, -1, 0, -1]])
    return ~binary_dilation(frame, _disc(_FRAME_MARGIN * light.shape[1])) if frame.any() else ~frame


def _central_region(inside: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """Return the region with the largest sum of weights around the center, its holes filled: bool [H, W]."""
    from scipy.ndimage import binary_opening, label

    regions, count = label(binary_opening(inside, _disc(_OPENING * inside.shape[1])))
    if not count:
        return np.zeros_like(inside)
    sums = np.bincount(regions.ravel(), weights=np.exp(-0.5 * (distance / _CENTER_REACH) ** 2).ravel())
    region = regions == 1 + sums[1:].argmax()
    outside, _ = label(~region)
    border = np.concatenate([outside[0], outside[-1], outside[:, 0], outside[:, -1]])
    return ~np.isin(outside, border[border > 0])


@lru_cache(maxsize=8)
def _disc(diameter: float) -> np.ndarray:
    """Return a disc, at least 3 pixels across: bool [D, D] of odd D."""
    radius = max(diameter / 2, 1)
    offsets = np.arange(-int(radius), int(radius) + 1)
    return np.hypot(offsets, offsets[:, None]) <= radius


@lru_cache(maxsize=4)
def _positions(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the distances of pixels from the center, [H, W] in image widths, and 1, x, y, x^2, xy, y^2, [H, W, 6]."""
    x = np.broadcast_to((np.arange(width) + 0.5 - width / 2) / width, (height, width))
    y = np.broadcast_to(((np.arange(height) + 0.5 - height / 2) / width)[:, None], (height, width))
    return np.hypot(x, y), np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], axis=-1)
