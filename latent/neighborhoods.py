"""Images in the neighborhood of an image: where their latents are, and which training images are nearest to them.

In Z a neighbor is at a given angle: latents of a network are drawn from N(0, I), nearly all of them at about the same
distance from 0, so that a straight step away from z would leave where the network was trained; a rotation does not. In
W a neighbor is at a given Mahalanobis distance, in the covariance of the styles of the image's class: where styles vary
little a step of length 1 is shorter than where they vary much.

Legend: A radii, M neighbors at each radius, K w_dim, L num_ws, Z z_dim, F features.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dnnlib.cache import cache_folder
from dnnlib.cli import UserError
from generation.image_generator import latents_of
from generation.network import Label
from imagesets.classes import CLASS
from imagesets.reader import ImageSet
from latent.exploration import Explorer, ImageFunction, pixel_differences
from metrics.detectors.base import Detector
from metrics.distances import FeatureSet, Screen, nearest
from metrics.feature_tensors import as_features
from metrics.features import FeatureCache, FeatureRequest, cached_features, choose_batch, on_main
from metrics.image_sources import SelectedImages, SetImages, to_rgb
from torch_utils.seeding import generator_for, seed_for

Z, W = "z", "w"
NUM_UNRELATED = 32  # images of other seeds, for comparison

_UNRELATED_SEED = 3_000_000_000  # far from the seeds that users name
# Smaller eigenvalues, relative to the largest, are rounding errors of float32: styles do not vary in these directions.
_LEAST_VARIANCE = 1e-8


def rotate(z: Tensor, directions: Tensor, degrees: float) -> Tensor:
    """Return latents at an angle to z, of its length: cos(a) z + sin(a) |z| u, where u is orthogonal to z.

    z:           float64 [Z]
    directions:  float64 [M, Z], whose parts orthogonal to z, scaled to unit length, are u

    If z and the directions are from N(0, I), so are the results. Returns float64 [M, Z].
    """
    across = directions - (directions @ z / z.square().sum())[:, None] * z
    across = across / across.norm(dim=1, keepdim=True)
    angle = math.radians(degrees)
    return math.cos(angle) * z + math.sin(angle) * z.norm() * across


def offsets_at(covariance: Tensor, directions: Tensor, distance: float) -> Tensor:
    """Return steps of a Mahalanobis length d, sqrt(s^T C^-1 s) = d: s = d C^(1/2) u with unit vectors u.

    covariance:  float64 [K, K], C
    directions:  float64 [M, K], scaled to unit vectors in the subspace in which C is not 0

    Returns float64 [M, K]. Raises UserError if C is 0.
    """
    variances, axes = np.linalg.eigh(covariance.numpy())
    varies = variances > _LEAST_VARIANCE * variances[-1]
    if not variances[-1] > 0:
        raise UserError("--space is w, but all styles of this class are equal; use --space=z")
    axes, deviations = torch.from_numpy(axes[:, varies]), torch.from_numpy(np.sqrt(variances[varies]))
    units = directions @ axes
    units = units / units.norm(dim=1, keepdim=True)
    return distance * (units * deviations) @ axes.T


def styles_around(explorer: Explorer, seed: int, label: Label, *, space: str, radii: Sequence[float],
                  num: int) -> Tensor:
    """Return the style of a seed, then those of its neighbors at each distance: float32 [1 + A * M, L, K].

    Neighbor i has the same direction at all distances. Styles are truncated as --trunc says; in w a step is too, so
    that the distance is in the covariance of truncated styles.
    """
    G, center = explorer.G, explorer.styles([seed], [label])
    size = G.z_dim if space == Z else G.w_dim
    directions = torch.stack([torch.randn(size, dtype=torch.float64, generator=generator_for(
        seed_for(seed, index, 0, f"explore/neighbors/{space}"))) for index in range(num)])
    if space == W:
        styles = explorer.reference_styles([label]).numpy()
        covariance = torch.from_numpy(np.cov(styles, rowvar=False)).reshape(size, size)
        psi = explorer.generator.settings.truncation
        steps = torch.cat([offsets_at(covariance, directions, radius) for radius in radii])
        return torch.cat([center, (center.double() + psi * steps[:, None]).float()])
    z, row = latents_of([seed], G.z_dim)[0], explorer.network.classes.labels([label])
    # One at a time: the style of a neighbor does not depend on the others.
    return torch.cat([center, *(explorer.generator.map_latents(one[None], row).cpu()
                                for radius in radii for one in rotate(z, directions, radius))])


def unrelated_styles(explorer: Explorer, label: Label) -> Tensor:
    """Return the styles of seeds that no user would name: float32 [NUM_UNRELATED, L, K]."""
    return explorer.styles([_UNRELATED_SEED + index for index in range(NUM_UNRELATED)], [label] * NUM_UNRELATED)


@dataclass(frozen=True, kw_only=True)
class TrainingImage:
    """A training image that is near an image."""

    name: str
    class_name: str  # "" if it has none
    is_mirrored: bool
    distance: float
    pixels: Tensor  # uint8 [C, R, R]

    def as_record(self) -> dict[str, Any]:
        return {"image": self.name, "class": self.class_name, "is_mirrored": self.is_mirrored,
                "distance": self.distance}


def find_training_images(explorer: Explorer, detector: Detector, features: np.ndarray, *, data: str, count: int,
                         mirror: bool, use_cache: bool = True) -> list[list[TrainingImage]]:
    """Return the training images nearest to each image, from near to far; [] except on the main process.

    features:   float32 [N, F], of the images
    data:       data set
    count:      number of training images for each image
    mirror:     also look among flipped copies; these count as their image, which is found once
    use_cache:  keep the features of the training images on this machine

    Raises UserError if an image cannot be read.
    """
    opened = ImageSet(data)
    source = SetImages(opened).select(mirror=mirror)
    found = cached_features(
        source, [FeatureRequest(detector=detector, count=len(source))], batch=choose_batch(explorer.G.img_resolution),
        device=explorer.generator.device, showing=lambda total: explorer.showing(total, "training images"),
        cache=FeatureCache(cache_folder() / "features" if use_cache else None,
                           lambda line: print(line, file=sys.stderr)))
    # Through on_main: an image that cannot be read ends all processes.
    return on_main(lambda: _nearest_images(opened, source, found[0].values, features, count)) or []


def _nearest_images(opened: ImageSet, source: SelectedImages, among: np.ndarray, features: np.ndarray,
                    count: int) -> list[list[TrainingImage]]:
    """Return the images of a set that are nearest to each row of features. among: float32, features of `source`"""
    images, classes = source.images, opened.class_names() if opened.label_kind == CLASS else None
    points, others = FeatureSet(torch.from_numpy(features)), FeatureSet(as_features(among))
    copies = len(source) // len(images)  # 2 with flipped copies
    near = nearest(Screen(points, others), points, min(copies * count, len(source)), others)

    def describe(item: int, square: float) -> TrainingImage:
        place = item % len(images)
        label = None if classes is None else opened.label(place)
        return TrainingImage(name=opened.names[place], class_name="" if label is None else classes[label],
                             is_mirrored=item >= len(images), distance=math.sqrt(square),
                             pixels=torch.from_numpy(images.item(item).transpose(2, 0, 1).copy()))

    lists = []
    for squares, rows in zip(near.squares.tolist(), near.indices.tolist(), strict=True):
        first: dict[int, tuple[int, float]] = {}  # the nearer of an image and its flipped copy
        for row, square in zip(rows, squares, strict=True):
            item = int(source.items[row])
            first.setdefault(item % len(images), (item, square))
        lists.append([describe(*one) for one in list(first.values())[:count]])
    return lists


@dataclass(frozen=True, kw_only=True)
class Neighborhood:
    """What was found around one image."""

    seed: int
    class_name: str
    pixels: Tensor  # uint8 [1 + A * M, C, R, R], the center first
    features: np.ndarray  # float64 [A, M], distances of the neighbors to the center
    levels: np.ndarray  # float64 [A, M], mean absolute differences of pixels, 0 to 255
    unrelated: np.ndarray  # float64 [n], distances of images of other seeds of this class to the center
    training: list[list[TrainingImage]]  # of each image; [] without a training set

    @classmethod
    def of(cls, seed: int, class_name: str, pixels: Tensor, features: np.ndarray, unrelated: np.ndarray,
           training: list[list[TrainingImage]], num_radii: int) -> "Neighborhood":
        """Compare the images around one with it.

        features, unrelated:  float32 [1 + A * M, F], [n, F], of the images and of those of other seeds
        """
        center, own = features[0].astype(np.float64), features[1:].astype(np.float64)
        return cls(seed=seed, class_name=class_name, pixels=pixels, training=training,
                   features=np.linalg.norm(own - center, axis=1).reshape(num_radii, -1),
                   levels=pixel_differences(pixels[1:], pixels[0]).reshape(num_radii, -1),
                   unrelated=np.linalg.norm(unrelated.astype(np.float64) - center, axis=1))

    @property
    def title(self) -> str:
        return f"seed {self.seed}" + (f", {self.class_name}" if self.class_name else "")


def features_of(detector: Detector, explorer: Explorer) -> ImageFunction:
    """Return the features of images as an `ImageFunction`. detector: on the device of the generator"""
    device = explorer.generator.device
    return ImageFunction(names=tuple(f"feature {index}" for index in range(detector.num_features)),
                         compute=lambda pixels: detector(to_rgb(pixels.to(device))).cpu().numpy())
