"""Plan a labelled set of images: which seed, which class and which piece of the work each image belongs to."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dnnlib.cli import UserError
from latent.network import OpenNetwork
from latent.sampling import LARGEST_SEED, Painter

# Of a piece: what a sudden end costs at most. Larger pieces would be lost more often, smaller ones are many files.
_PIECE_IMAGES, _PIECE_BYTES = 256, 16 << 20


@dataclass(frozen=True, kw_only=True)
class SetPlan:
    """What a labelled set holds. Images are numbered from 0; image i is that of seed first_seed + i.

    first_seed:  of image 0
    count:       images in all
    counts:      images of each class, [c_dim], one class after the other; None of an unconditional network
    piece:       images that are computed and kept together
    """

    first_seed: int
    count: int
    counts: tuple[int, ...] | None
    piece: int

    def __post_init__(self):
        if self.first_seed + self.count - 1 > LARGEST_SEED:
            raise UserError(f"--seeds is {self.first_seed}, and the last seed of {self.count} images would be "
                            f"{self.first_seed + self.count - 1}; the largest seed is {LARGEST_SEED}: start lower, or "
                            "make fewer images")

    @property
    def num_pieces(self) -> int:
        return -(-self.count // self.piece)

    def images(self, piece: int) -> range:
        """Return the numbers of the images of a piece."""
        return range(piece * self.piece, min((piece + 1) * self.piece, self.count))

    def seeds(self, images: range) -> list[int]:
        return [self.first_seed + image for image in images]

    def classes(self, images: range) -> list[int | None]:
        """Return the class of each of some images."""
        if self.counts is None:
            return [None] * len(images)
        found, end = [], 0
        for label, count in enumerate(self.counts):
            start, end = end, end + count
            found += [label] * max(min(end, images.stop) - max(start, images.start), 0)
        return found


def piece_size(shape: Sequence[int], batch: int) -> int:
    """Return the images of a piece, whole batches. shape: of an image, C R R."""
    channels, height, width = shape
    images = min(_PIECE_IMAGES, _PIECE_BYTES // (channels * height * width))
    return max(images // batch, 1) * batch


def describe_origin(network: OpenNetwork, plan: SetPlan, painter: Painter) -> dict[str, Any]:
    """Return what dataset.json says of the images' origin: all that they follow from."""
    classes, look = network.classes, painter.look
    origin = {
        "generated": True,
        "network": network.name,
        "network_sha256": network.sha256,
        "network_kimg": network.info.get("kimg"),
        "seeds": [plan.first_seed, plan.first_seed + plan.count - 1],
        "truncation": look.truncation,
        "noise_mode": look.noise_mode,
        "fp32": painter.fp32,
        "device": painter.device.type,
        "batch": painter.batch,
        "classes": None if plan.counts is None else {classes.name(i): n for i, n in enumerate(plan.counts)},
    }
    if network.info.get("phantom") is True:
        origin["phantom"] = True
    return origin
