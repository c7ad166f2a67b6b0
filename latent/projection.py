"""Project images: find the styles of similar ones, several at a time (Karras et al. 2020, StyleGAN2, appendix D).

A projection saves its state regularly, so that it can continue after an interruption. It minimizes a similarity of
metrics.detectors; final distances are measured on the saved pixels, see COLUMNS.

Legend: N images, C channels, R resolution, K w_dim, L num_ws, S styles per image that are optimized: 1 in W, L in W+.
"""

import copy
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import avg_pool2d, cosine_similarity, interpolate

from dnnlib.cache import FetchError
from dnnlib.cli import StopRequest, Terminated, UserError
from generation.image_generator import styles_of_label
from metrics.detectors.base import exact_float32
from metrics.detectors.registry import SIMILARITY_NAMES, open_similarity, similarity_at_hand
from metrics.detectors.similarity import Similarity
from metrics.image_sources import to_rgb
from torch_utils.checkpoint import DamagedCheckpoint, read_checkpoint, write_checkpoint
from torch_utils.distributed import Processes, broadcast_object
from torch_utils.images import to_unit_range
from torch_utils.seeding import generator_for, seed_for
from training.generator import noise_maps

SPACES = ("w", "w+")
STATE_SECONDS = 120.0  # between two saved states: the most that a crash loses

# perceptual:      the distance that the projection minimizes, in units of its similarity
# pixel_l2:        root of the mean squared difference of pixels, in levels of 0 to 255
# psnr:            20 log10(255 / pixel_l2), in dB; inf for equal images
# feature_cosine:  cosine of the angle between the feature vectors of the two images
COLUMNS = ("perceptual", "pixel_l2", "psnr", "feature_cosine")
PERCEPTUAL = COLUMNS.index("perceptual")

LARGEST_SIDE = 256  # pixels; larger images are downsampled, as similarities were trained on small images
USUAL_SIMILARITY, OFFLINE, LAST = "lpips-vgg16", "efficientnet-lite0", "pixels"

_LEARNING_RATE, _RAMP_UP, _RAMP_DOWN = 0.1, 0.05, 0.25  # ramps as shares of all steps
_STYLE_NOISE, _STYLE_NOISE_RAMP = 0.05, 0.75
_MAP_WEIGHT, _SMALLEST_MAP = 1e5, 8
_BETAS = (0.9, 0.999)
_MOST_PIXELS, _MOST_IMAGES = {"cpu": 1 << 19, "cuda": 1 << 20}, {"cpu": 8, "cuda": 32}  # per batch


@dataclass(frozen=True, kw_only=True)
class ProjectionSettings:
    """The settings of a projection, apart from images, network and similarity."""

    space: str = "w"  # "w": one style for all layers of an image; "w+": one for each layer
    num_steps: int = 1000
    seed: int = 303

    def __post_init__(self):
        if self.space not in SPACES:
            raise UserError(f"--space is {self.space}; expected {' or '.join(SPACES)}")
        if self.num_steps < 1:
            raise UserError(f"--num-steps is {self.num_steps}; expected at least 1")
        if self.seed < 0:
            raise UserError(f"--seed is {self.seed}; expected at least 0")


def learning_rate(step: int, num_steps: int) -> float:
    """Return Adam's learning rate for a step (from 0): linear ramp up, cosine ramp down."""
    t = step / num_steps
    down = min((1 - t) / _RAMP_DOWN, 1)
    return _LEARNING_RATE * (0.5 - 0.5 * math.cos(math.pi * down)) * min(t / _RAMP_UP, 1)


def style_noise(step: int, num_steps: int) -> float:
    """Return the standard deviation of the noise that a step adds to styles, as a multiple of sigma_w."""
    return _STYLE_NOISE * max(0, 1 - step / num_steps / _STYLE_NOISE_RAMP) ** 2


def map_penalty(maps: Sequence[Tensor]) -> Tensor:
    """Return, for each image, the penalty that keeps its noise maps from encoding the image: [N].

    maps:  each [N, 1, r, r]

    It sums the squared autocorrelations at shift 1 in x and y, over each map and its 2x2 averages down to a side of 8.
    """
    total = maps[0].new_zeros(len(maps[0]))
    for level in maps:
        while True:
            for axis in (2, 3):
                total = total + (level * level.roll(1, axis)).mean(dim=(1, 2, 3)).square()
            if level.shape[2] <= _SMALLEST_MAP:
                break
            level = avg_pool2d(level, 2)
    return total


@dataclass(frozen=True, kw_only=True)
class StyleStatistics:
    """Mean and standard deviation of the styles of a class: a projection starts from the mean."""

    mean: Tensor  # [K] float32
    deviation: float  # sigma_w


def measure_styles(G: nn.Module, label: Tensor) -> StyleStatistics:
    """Return mean and standard deviation of the styles of 10,000 latents. label: [c_dim]; c_dim may be 0"""
    w = styles_of_label(G, label)
    mean = w.mean(dim=0)
    return StyleStatistics(mean=mean.float(), deviation=float(((w - mean).square().sum() / len(w)).sqrt()))


def choose_pass(resolution: int, device: torch.device | str) -> int:
    """Return how many images of a set are projected at a time."""
    kind = torch.device(device).type
    return min(max(_MOST_PIXELS[kind] // resolution**2, 1), _MOST_IMAGES[kind])


class Projector:
    """Projects images into the latent space of a generator.

    G:           the averaged generator (G_ema), on the device to use; it is not changed
    similarity:  the distance to minimize, on the same device

    Everything is computed in float32: half precision is too coarse for the gradients of a small distance.
    """

    def __init__(self, G: nn.Module, similarity: Similarity, settings: ProjectionSettings):
        self.similarity, self.settings = similarity, settings
        # In train mode, the images of a batch share the kernel of modulated convolutions; with a kernel per image, each
        # would need a gradient. The mode changes nothing else in a synthesis network.
        self._synthesis = copy.deepcopy(G.synthesis).train().requires_grad_(False)
        self.device = next(G.parameters()).device
        self.num_ws, self.w_dim = G.num_ws, G.w_dim
        self._map_sides = {name: len(values) for name, values in noise_maps(self._synthesis).items()}

    def first_maps(self) -> dict[str, Tensor]:
        """Return the initial noise maps of every image, [1, 1, r, r] by name."""
        return {name: self._draw(index, "projector/maps", 1, 1, side, side)
                for index, (name, side) in enumerate(self._map_sides.items())}

    def draw_style_noise(self, step: int) -> Tensor:
        """Return standard normal noise for the styles of an image, the same for all images: [1, S, K]."""
        styles = 1 if self.settings.space == "w" else self.num_ws
        return self._draw(step, "projector/styles", 1, styles, self.w_dim)

    def synthesize(self, ws: Tensor, maps: Mapping[str, Tensor]) -> Tensor:
        """Return images [N, C, R, R] for ws [N, L, K], each with its own noise maps."""
        return functional_call(self._synthesis, dict(maps), (ws,), dict(noise_mode="const", force_fp32=True))

    def embed(self, images: Tensor) -> list[Tensor]:
        return self.similarity.embed(to_similarity_input(images, self.similarity))

    def _draw(self, index: int, stream: str, *shape: int) -> Tensor:
        """Return noise that only depends on seed, index and stream, not on the batch of an image."""
        generator = generator_for(seed_for(self.settings.seed, index, 0, stream))  # CPU: the same on every device
        return torch.randn(shape, generator=generator).to(self.device)


class Projection:
    """The running projection of a batch of images.

    Images are independent, up to rounding. On a CPU, with equal batch sizes, the result of an image is the same bit for
    bit at any position and beside any other images.

    targets:    uint8 [N, C, R, R]
    starts:     the statistics that each image starts from
    keep_path:  record `path`

    step:  number of finished steps
    w:     styles, float32 [N, S, K]
    path:  w after each step, [N, S, K] each on the CPU, or None
    """

    def __init__(self, projector: Projector, targets: Tensor, starts: Sequence[StyleStatistics], *,
                 keep_path: bool = False):
        self._projector = projector
        self.path: list[Tensor] | None = [] if keep_path else None
        device, styles = projector.device, 1 if projector.settings.space == "w" else projector.num_ws
        self.step = 0
        self.w = torch.stack([start.mean for start in starts]).to(device)[:, None].repeat(1, styles, 1)
        self._deviations = torch.tensor([start.deviation for start in starts], device=device)[:, None, None]
        self._maps = {name: values.repeat(len(starts), 1, 1, 1) for name, values in projector.first_maps().items()}
        self._parameters = {"w": self.w, **self._maps}
        for parameter in self._parameters.values():
            parameter.requires_grad_()
        self._adam = torch.optim.Adam(self._parameters.values(), betas=_BETAS)
        with torch.no_grad():
            self._targets = projector.embed(to_unit_range(targets.to(device)))

    @property
    def is_done(self) -> bool:
        return self.step >= self._projector.settings.num_steps

    def advance(self) -> Tensor:
        """Do one step; return the distances before it, [N]. Raises UserError if none is finite."""
        projector, num_steps = self._projector, self._projector.settings.num_steps
        for group in self._adam.param_groups:
            group["lr"] = learning_rate(self.step, num_steps)
        noise = projector.draw_style_noise(self.step) * (self._deviations * style_noise(self.step, num_steps))
        with exact_float32():
            images = projector.synthesize((self.w + noise).expand(-1, projector.num_ws, -1), self._maps)
            distances = projector.similarity.compare(self._targets, projector.embed(images))
            penalty = map_penalty(list(self._maps.values())) if self._maps else 0
            self._adam.zero_grad(set_to_none=True)
            (distances + _MAP_WEIGHT * penalty).sum().backward()
        self._adam.step()
        self._normalize_maps()
        self.step += 1
        if self.path is not None:
            self.path.append(self.w.detach().cpu().clone())
        # Not at each step, since this makes a GPU wait.
        if (self.is_done or self.step == 1) and not distances.isfinite().any():
            raise UserError("the distance of the network's images to the targets is not finite, perhaps because its "
                            "training diverged; expected a network that works: try an earlier snapshot")
        return distances.detach()

    def styles(self) -> Tensor:
        """Return the styles for generate.py: float32 [N, L, K] on the CPU."""
        return self.w.detach().cpu().expand(-1, self._projector.num_ws, -1)

    def state_dict(self) -> dict[str, Any]:
        """Return the resumable state: tensors, numbers and dicts."""
        moments = {name: self._adam.state[parameter] for name, parameter in self._parameters.items()}
        return {"step": self.step, "path": None if not self.path else torch.stack(self.path),
                "values": {name: parameter.detach() for name, parameter in self._parameters.items()},
                "first_moments": {name: moment["exp_avg"] for name, moment in moments.items()},
                "second_moments": {name: moment["exp_avg_sq"] for name, moment in moments.items()}}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state of the same images and settings."""
        self.step = state["step"]
        if self.path is not None:
            self.path = [] if state["path"] is None else list(state["path"])
        for name, parameter in self._parameters.items():
            parameter.copy_(state["values"][name])
            self._adam.state[parameter] = {"step": torch.tensor(float(self.step)),
                                           "exp_avg": state["first_moments"][name].to(parameter.device, copy=True),
                                           "exp_avg_sq": state["second_moments"][name].to(parameter.device, copy=True)}

    @torch.no_grad()
    def _normalize_maps(self) -> None:
        for values in self._maps.values():
            values -= values.mean(dim=(1, 2, 3), keepdim=True)
            values *= values.square().mean(dim=(1, 2, 3), keepdim=True).rsqrt()


def finish(projection: Projection, path: str | os.PathLike, identity: str,
           on_steps: Callable[[int], None] = lambda count: None, operators: str | None = None) -> None:
    """Do all remaining steps, continuing from the state at `path` if its identity is the same.

    path:      file of the resumable state; the last one is kept, since later work may be interrupted too
    identity:  identifies everything that the projection depends on, except its settings; other states are ignored
    on_steps:  called with the number of steps that were done
    operators: their implementation, for `read_operators`

    After a signal, the current step is finished and its state saved before the signal is raised; a second Ctrl-C is
    raised immediately. Raises OSError if a state cannot be written, UserError as Projection.advance does.
    """
    if (state := _read_state(path, identity, tells_damage=True)) is not None:
        projection.load_state_dict(state["projection"])
        on_steps(projection.step)
    saved = time.monotonic()
    with StopRequest() as stop:
        while not (projection.is_done or stop.wanted()):
            projection.advance()
            on_steps(1)
            if projection.is_done or stop.wanted() or time.monotonic() - saved >= STATE_SECONDS:
                write_checkpoint(path, {"identity": identity, "operators": operators,
                                        "projection": projection.state_dict()})
                saved = time.monotonic()
    if stop.wanted():
        raise KeyboardInterrupt if stop.reason.startswith("SIGINT") else Terminated


def read_operators(path: str | os.PathLike, identity: str) -> str | None:
    """Return the implementation of operators of a state; None if there is no state to continue."""
    state = _read_state(path, identity, tells_damage=False)
    return None if state is None else state.get("operators")


def _read_state(path: str | os.PathLike, identity: str, *, tells_damage: bool) -> dict[str, Any] | None:
    """Return the state of this identity; None if there is none, or it is damaged."""
    try:
        state = read_checkpoint(path)
    except FileNotFoundError:
        return None
    except DamagedCheckpoint as error:
        if tells_damage:
            print(f"{error}; starting from scratch", file=sys.stderr)
        return None
    return state if state.get("identity") == identity else None


def choose_similarity(name: str | None, weights: str | None, processes: Processes) -> Similarity:
    """Return the similarity on the device of this process; all processes of a run call it together.

    name:     --detector; None = LPIPS if its weights are given, on this machine or can be downloaded, else one that
              needs no download, with a line on standard error
    weights:  --detector-weights

    Raises UserError if the name is not known, or files or packages are missing.
    """
    if name is not None and name not in SIMILARITY_NAMES:
        raise UserError(f"--detector is {name}; expected one of {', '.join(SIMILARITY_NAMES)}")
    similarity = None
    if processes.rank == 0:  # it downloads what the others then find
        similarity = _open_similarity(name, weights, processes)
    chosen = broadcast_object(None if similarity is None else similarity.name)
    return similarity or open_similarity(chosen, device=processes.device, weights=weights)


def _open_similarity(name: str | None, weights: str | None, processes: Processes) -> Similarity:
    if name is not None or weights is not None:
        return open_similarity(name or USUAL_SIMILARITY, device=processes.device, weights=weights)
    try:
        return open_similarity(USUAL_SIMILARITY, device=processes.device)
    except FetchError as error:
        other = OFFLINE if similarity_at_hand(OFFLINE) else LAST
        print(f"{error}. Using {other} instead, whose distances cannot be compared with those of {USUAL_SIMILARITY}; "
              f"projector.py --detector=NAME chooses one of {', '.join(SIMILARITY_NAMES)}", file=sys.stderr)
        return open_similarity(other, device=processes.device)


def to_similarity_input(images: Tensor, similarity: Similarity) -> Tensor:
    """Resize images for a similarity: [N, 3, h, w] of their dtype; gradients flow.

    images:  [N, 1 or 3, R, R] floating point in [-1, 1]; R at most 256, or a multiple of it

    Sides above 256 are average-pooled to 256, sides below the similarity's least_size enlarged to it; gray is repeated
    to RGB. Images are independent of each other. Raises ValueError for other images.
    """
    side = images.shape[-1]
    if images.ndim != 4 or images.shape[1] not in (1, 3) or images.shape[2] != side or not images.is_floating_point():
        raise ValueError(f"images are {images.dtype} {list(images.shape)}; expected floating point "
                         "[N, 1 or 3, R, R]")
    if side > LARGEST_SIDE:
        if side % LARGEST_SIDE:
            raise ValueError(f"images are {side}x{side}; expected sides of at most {LARGEST_SIDE}, or of a multiple")
        images = avg_pool2d(images, side // LARGEST_SIDE)
    elif side < similarity.least_size:
        # LIMIT: on a GPU, the gradient of this is summed in no fixed order, so that results repeat only up to rounding.
        size = (similarity.least_size, similarity.least_size)
        images = interpolate(images, size, mode="bilinear", align_corners=False)
    return to_rgb(images)


@torch.no_grad()
def measure_pairs(targets: Tensor, projections: Tensor, similarity: Similarity) -> Tensor:
    """Return the distances of pairs of images: float32 [N, 4] on the CPU, columns as COLUMNS.

    targets, projections:  uint8 [N, C, R, R], on any device
    similarity:            they are compared on its device
    """
    device = next(chain(similarity.parameters(), similarity.buffers()), torch.empty(0)).device
    a, b = (to_similarity_input(to_unit_range(pixels.to(device)), similarity) for pixels in (targets, projections))
    perceptual = similarity(a, b)
    cosine = cosine_similarity(similarity.describe(a), similarity.describe(b))
    squares = (targets.to(device).double() - projections.to(device)).square().mean(dim=(1, 2, 3))
    pixel_l2 = squares.sqrt()
    psnr = 20 * (math.log10(255) - pixel_l2.log10())
    return torch.stack([column.float().cpu() for column in (perceptual, pixel_l2, psnr, cosine)], dim=1)
