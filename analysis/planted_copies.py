"""Power of the tests of authenticity: plant changed copies of training images, and count how often they are found.

A test that finds nothing says something only if it would have found what was there. So copies of random training images
are added to the synthetic set until they are a given share of it, and the tests are run again, in several draws for
each share and each way to change a copy. What is measured of a copy does not depend on the rest of the set, so each
copy is measured once, however many draws it is in.

LIMIT: power is that for copies like these. A copy that is changed in other ways, or a network that blends several
training images, may be missed.
"""

import io
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from analysis.authenticity_results import PlantedPower
from metrics.image_sources import SelectedImages

SHARES = (0.002, 0.005, 0.01, 0.02, 0.05)  # of a set that are copies
NUM_DRAWS = 20
NUM_ORIGINALS = 128  # training images that are copied, at most; a larger number of copies repeats some
PLANTED_VERSION = 1  # of how copies are made; changing it makes their measurements useless
ANY = "any"  # each copy changed in another of the ways

_JPEG_QUALITY = 70
_GAIN, _OFFSET = 0.1, 10.0  # most that a color channel is multiplied by more or less than 1, and shifted, in levels
_KEPT = 0.9  # of each side, where a copy is cropped


def _plain(pixels: np.ndarray, random: np.random.RandomState) -> np.ndarray:
    return pixels


def _mirrored(pixels: np.ndarray, random: np.random.RandomState) -> np.ndarray:
    return pixels[:, ::-1]


def _rotated(pixels: np.ndarray, random: np.random.RandomState) -> np.ndarray:
    return np.rot90(pixels, random.randint(1, 4))


def _compressed(pixels: np.ndarray, random: np.random.RandomState) -> np.ndarray:
    with io.BytesIO() as file:
        PIL.Image.fromarray(pixels).save(file, "jpeg", quality=_JPEG_QUALITY)
        return np.asarray(PIL.Image.open(file))


def _color_shifted(pixels: np.ndarray, random: np.random.RandomState) -> np.ndarray:
    gain, offset = random.uniform(1 - _GAIN, 1 + _GAIN, 3), random.uniform(-_OFFSET, _OFFSET, 3)
    return np.clip(np.rint(pixels * gain + offset), 0, 255).astype(np.uint8)


def _cropped(pixels: np.ndarray, random: np.random.RandomState) -> np.ndarray:
    height, width = pixels.shape[:2]
    rows, columns = max(round(height * _KEPT), 1), max(round(width * _KEPT), 1)
    top, left = random.randint(height - rows + 1), random.randint(width - columns + 1)
    part = PIL.Image.fromarray(np.ascontiguousarray(pixels[top:top + rows, left:left + columns]))
    return np.asarray(part.resize((width, height), PIL.Image.Resampling.LANCZOS))


# Ways to change a copy: uint8 [H, W, 3] to uint8 of the same shape, with random choices.
TRANSFORMATIONS: Mapping[str, Callable[[np.ndarray, np.random.RandomState], np.ndarray]] = {
    "plain": _plain, "mirrored": _mirrored, "rotated": _rotated, f"JPEG {_JPEG_QUALITY}": _compressed,
    "color-shifted": _color_shifted, "cropped by 10 %": _cropped}


def make_copy(pixels: np.ndarray, transformation: str, seed: int) -> np.ndarray:
    """Return a changed copy of an image.

    pixels:  uint8 [H, W, 3], square
    seed:    of random choices, such as the angle; below 2^32
    """
    return np.array(TRANSFORMATIONS[transformation](pixels, np.random.RandomState(seed)))


class PlantedCopies:
    """Copies of training images, each changed in all ways; an image source: way by way, original by original."""

    def __init__(self, originals: SelectedImages, seed: int):
        self._originals, self._seed = originals, seed

    def __len__(self) -> int:
        return len(TRANSFORMATIONS) * len(self._originals)

    def pixels(self, rows: range) -> Tensor:
        """Return copies by number: uint8 [n, 3, H, W]."""
        copies = []
        for row in rows:
            way, original = divmod(row, len(self._originals))
            pixels = self._originals.pixels(range(original, original + 1))[0].permute(1, 2, 0).numpy()
            copies.append(make_copy(pixels, list(TRANSFORMATIONS)[way], (self._seed + row) % 2**32))
        return torch.from_numpy(np.stack(copies)).permute(0, 3, 1, 2)


def num_planted(share: float, num_images: int) -> int:
    """Return how many copies make this share of a set to which they are added, at least 1."""
    return max(round(share * num_images / (1 - share)), 1)


def planted_power(key: str, num_images: int, num_originals: int, finds: Callable[[np.ndarray], bool], *, seed: int,
                  num_draws: int = NUM_DRAWS, shares: Sequence[float] = SHARES,
                  beat: Callable[[], None] = lambda: None) -> PlantedPower:
    """Return how often a test finds planted copies, for each way to change them and for a mixture of all.

    key:            of the test
    num_images:     in the synthetic set, without copies
    num_originals:  training images that were copied
    finds:          runs the test with copies in the set: takes their numbers in `PlantedCopies`, int64 [copies]
    beat:           called after each run

    Shares of less than one copy are left out; of a set that is too small for any of them, one copy is planted.
    """
    shares = [share for share in shares if share * num_images / (1 - share) >= 1] or [1 / (num_images + 1)]
    found: dict[str, list[int]] = {}
    for place, way in enumerate([*TRANSFORMATIONS, ANY]):
        found[way] = []
        for number, share in enumerate(shares):
            random = np.random.RandomState([seed, place, number])
            times = 0
            for _ in range(num_draws):
                times += finds(_draw(place, num_planted(share, num_images), num_originals, random))
                beat()
            found[way].append(times)
    return PlantedPower(key=key, shares=tuple(shares), num_draws=num_draws, found=found)


def _draw(place: int, count: int, num_originals: int, random: np.random.RandomState) -> np.ndarray:
    """Return the numbers of random copies: each original once, then each twice, and so on."""
    rounds = [random.permutation(num_originals) for _ in range(math.ceil(count / num_originals))]
    originals = np.concatenate(rounds)[:count]
    ways = np.full(count, place)
    if place == len(TRANSFORMATIONS):
        ways = random.permutation(np.arange(count) % len(TRANSFORMATIONS))
    return ways * num_originals + originals
