"""Perceptual path length: how much images change along paths between latents (Karras et al. 2019, eq. 2 and 3)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dnnlib.cli import UserError
from metrics.detectors.lpips import PerceptualDistance
from metrics.detectors.similarity import Similarity
from metrics.image_sources import FakeLabels, draw_latents, to_rgb
from metrics.intervals import Jackknife
from metrics.names import MetricRequest
from torch_utils.seeding import generator_for, seed_for

EPSILON = 1e-4  # the paper's step, as a share of the path
_SMALLEST = PerceptualDistance.least_size  # side in pixels
_LARGEST = 256  # side in pixels to which images are downsampled, as the similarity was trained on small images
_LOWEST, _HIGHEST = 0.01, 0.99  # distances outside these quantiles are ignored


class PathSteps:
    """Pairs of images a step of EPSILON apart on random paths, by number.

    G:         with mapping, synthesis, z_dim and img_resolution, in eval mode
    labels:    of the paths, the same at both ends
    space:     "z": great circles between latents; "w": straight lines between styles
    sampling:  "full": anywhere on the path; "end": at its beginning
    crop:      compare the middle of the images only
    seed:      with the number of the pair, it determines latents and places; with that of the batch, the noise
    """

    def __init__(self, G: nn.Module, labels: FakeLabels, *, space: str, sampling: str, crop: bool, seed: int,
                 device: torch.device | str):
        self.G, self.labels, self.space, self.sampling, self.crop = G, labels, space, sampling, crop
        self.seed, self.device = seed, device

    @torch.no_grad()
    def distances(self, rows: range, similarity: Similarity) -> Tensor:
        """Return the distances of pairs, divided by EPSILON^2: float32 [n]. rows: numbers of the pairs"""
        first, second = (self._images(ws, rows.start) for ws in self._styles(rows))
        return similarity(first, second).float() / EPSILON**2

    def _styles(self, rows: range) -> tuple[Tensor, Tensor]:
        z0, z1 = (draw_latents(rows, self.G.z_dim, self.seed, f"metrics/path/{end}").double() for end in (0, 1))
        places = torch.zeros(len(rows), 1, dtype=torch.float64)
        if self.sampling == "full":
            places = torch.stack([torch.rand(1, dtype=torch.float64, generator=generator_for(
                seed_for(self.seed, row, 0, "metrics/path/place"))) for row in rows])
        c = self.labels.draw(rows, self.seed).to(self.device)
        if self.space == "z":
            return tuple(self._map(along_circle(z0, z1, place), c) for place in (places, places + EPSILON))
        w0, w1 = self._map(z0, c), self._map(z1, c)
        places = places.to(w0.device, w0.dtype)[:, :, None]
        return w0.lerp(w1, places), w0.lerp(w1, places + EPSILON)

    def _map(self, z: Tensor, c: Tensor) -> Tensor:
        return self.G.mapping(z.to(self.device), c)

    def _images(self, ws: Tensor, first: int) -> Tensor:
        """Return images [N, 3, H, W]; the noise depends on the first pair of the batch."""
        noise = generator_for(seed_for(self.seed, first, 0, "metrics/path/noise"), self.device)
        # In half precision, rounding would exceed the change of a step of EPSILON.
        images = self.G.synthesis(ws, noise_mode="random", force_fp32=True, generator=noise)
        return prepare(images, self.G.img_resolution, self.crop)


def prepare(images: Tensor, resolution: int, crop: bool) -> Tensor:
    """Crop and downsample images [N, C, R, R] of a network of `resolution` for the comparison: [N, 3, H, W].

    The paper crops images of FFHQ to the face: in its authors' program 3/8 to 7/8 of the height and 2/8 to 6/8 of
    the width. Images above 256x256 are average-pooled by resolution / 256.
    """
    if crop:
        eighth = images.shape[2] // 8
        images = images[:, :, 3 * eighth:7 * eighth, 2 * eighth:6 * eighth]
    if resolution > _LARGEST:
        images = nn.functional.avg_pool2d(images, resolution // _LARGEST)
    return to_rgb(images)


def check_path_requests(requests: Sequence[MetricRequest], resolution: int) -> None:
    """Raise UserError if a path length cannot be measured at a network's resolution."""
    for request in requests:
        if request.kind == "ppl" and resolution // (2 if request.crop else 1) < _SMALLEST:
            raise UserError(f"metric {request.name} needs images of at least {_SMALLEST}x{_SMALLEST}"
                            f"{' after cropping' if request.crop else ''}, but the network makes "
                            f"{resolution}x{resolution}; expected larger ones, or another metric")


def along_circle(a: Tensor, b: Tensor, place: Tensor) -> Tensor:
    """Interpolate spherically from the direction of a to that of b: unit vectors [N, Z]; place [N, 1]."""
    a, b = (nn.functional.normalize(end, dim=1) for end in (a, b))
    cosine = (a * b).sum(dim=1, keepdim=True)
    angle = place * cosine.clamp(-1, 1).acos()
    across = nn.functional.normalize(b - cosine * a, dim=1)
    return a * angle.cos() + across * angle.sin()


def path_length(distances: Tensor) -> float:
    """Return the mean of the distances [N] from their 1st to their 99th percentile, without interpolation."""
    distances = distances.double()
    low, high = distances.sort().values[_kept_ranks(len(distances))]
    return distances[(distances >= low) & (distances <= high)].mean().item()


def path_length_jackknife(distances: Tensor) -> Jackknife:
    """Return the path length, and that without each of the distances [N], the percentiles being those without it."""
    ordered = distances.double().cpu().sort().values
    places = torch.arange(len(ordered))
    # Without one distance, those above it move down by a rank.
    low, high = (ordered[(rank + (places <= rank)).clamp(max=len(ordered) - 1)]
                 for rank in _kept_ranks(max(len(ordered) - 1, 1)))
    first, end = torch.searchsorted(ordered, low), torch.searchsorted(ordered, high, right=True)
    sums = torch.nn.functional.pad(ordered.cumsum(0), (1, 0))
    inside = (first <= places) & (places < end)
    others = (sums[end] - sums[first] - inside * ordered) / (end - first - inside.long())
    return Jackknife(estimate=path_length(distances), without={"fake": others.numpy()}, least=0.0, unit="pair",
                     method="jackknife")


def _kept_ranks(count: int) -> list[int]:
    """Return the places of the 1st and 99th percentile among `count` ordered values, away from the middle."""
    return [math.floor(_LOWEST * (count - 1)), math.ceil(_HIGHEST * (count - 1))]
