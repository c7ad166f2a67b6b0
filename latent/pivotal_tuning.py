"""Fine-tune a copy of a generator to show an image at its projected style (Roich et al. 2021)."""

import copy
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dnnlib.cli import UserError
from generation.network import OpenNetwork
from latent.projection import to_similarity_input
from metrics.detectors.base import exact_float32
from metrics.detectors.similarity import Similarity
from torch_utils.seeding import generator_for, seed_for
from training.snapshot import Networks, save_network

USUAL_STEPS = 350

_BETAS = (0.9, 0.999)  # of Adam


@dataclass(frozen=True, kw_only=True)
class TuningSettings:
    """How a generator is tuned; the paper's symbols are in parentheses.

    num_steps:          Adam steps
    seed:               random seed of the latents in the locality term
    locality_distance:  distance from the pivot, in W, at which images are held in place (alpha). The paper's 30 depends
                        on the scale of its network's W; sigma_w of the network and class does not
    l2_weight:          of the pixel distance at the pivot, relative to the perceptual one (lambda_L2)
    locality_weight:    of the locality term (lambda_R); 0 disables it
    locality_l2_weight: of the pixel distance in the locality term (its own lambda_L2)

    Raises UserError for values from a user's options or network, ValueError for the others.
    """

    num_steps: int
    seed: int
    locality_distance: float
    learning_rate: float = 3e-4
    # Ours, after the paper's experiments.
    l2_weight: float = 1.0
    locality_weight: float = 0.1
    locality_l2_weight: float = 1.0

    def __post_init__(self) -> None:
        if type(self.num_steps) is not int or self.num_steps < 1:
            raise UserError(f"--pti-steps is {self.num_steps}; expected at least 1, usually about {USUAL_STEPS}")
        if not 0 < self.locality_distance < math.inf:  # also refuses nan
            raise UserError(f"--pti-steps: the spread of the network's styles is {self.locality_distance:g}; expected "
                            "more than 0 and finite: try an earlier snapshot")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate is {self.learning_rate:g}; expected more than 0")
        for name in ("l2_weight", "locality_weight", "locality_l2_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name):g}; expected at least 0")


@dataclass(frozen=True, kw_only=True)
class Distances:
    """How far the image at the pivot is from the target."""

    perceptual: float
    pixel: float  # mean squared difference of images in [-1, 1]


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """A tuned generator, and its distances before and after."""

    G: nn.Module  # in eval mode, without gradients; only the parameters of its synthesis network have changed
    before: Distances
    after: Distances
    num_steps: int
    similarity: str
    similarity_sha256: str  # of its weights


def tune(G: nn.Module, w: Tensor, target: Tensor, similarity: Similarity, settings: TuningSettings,
         on_step: Callable[[int, float], None] = lambda step, distance: None, *,
         label: Sequence[float] | None = None) -> Tuned:
    """Return a copy of a generator, tuned to show `target` at the pivot `w`.

    G:        is not changed; tuning runs on its device, in float32, with its own noise maps ("const")
    w:        [1, L, K]
    target:   [1, C, R, R] in [-1, 1]
    on_step:  called with the number of each step and the perceptual distance before it
    label:    [c_dim], of the images that are held in place; None = of all classes

    Equal arguments give equal weights, bit for bit on a CPU. Raises UserError if the loss is not finite, ValueError for
    tensors of other shapes.
    """
    shapes = [1, G.num_ws, G.w_dim], [1, G.img_channels, G.img_resolution, G.img_resolution]
    if (list(w.shape), list(target.shape)) != shapes:
        raise ValueError(f"w is {list(w.shape)} and target is {list(target.shape)}; expected {shapes[0]} and "
                         f"{shapes[1]}")
    device = next(G.parameters()).device
    w = w.detach().to(device)
    tuned = copy.deepcopy(G).eval().requires_grad_(False)
    # Around the whole loop, since backward passes need these settings too.
    with exact_float32(), torch.enable_grad():
        wanted = _Wanted(target.to(device), similarity)
        before = wanted.measure(tuned.synthesis, w)
        locality = _Locality(tuned, w, similarity, settings, label) if settings.locality_weight > 0 else None
        # In train mode, the images of a batch share one kernel, which makes gradients cheaper.
        synthesis = tuned.synthesis.train().requires_grad_(True)
        adam = torch.optim.Adam(synthesis.parameters(), lr=settings.learning_rate, betas=_BETAS)
        for step in range(settings.num_steps):
            perceptual, pixel = wanted.distances(_show(synthesis, w))
            loss = perceptual + settings.l2_weight * pixel
            if locality is not None:
                loss = loss + settings.locality_weight * locality.loss(synthesis, step)
            _check_finite(loss.item(), step, settings)
            on_step(step, perceptual.item())
            adam.zero_grad()
            loss.backward()
            adam.step()
        adam.zero_grad()
        tuned.eval().requires_grad_(False)
        after = wanted.measure(tuned.synthesis, w)
    _check_finite(after.perceptual + after.pixel, settings.num_steps, settings)
    return Tuned(G=tuned, before=before, after=after, num_steps=settings.num_steps, similarity=similarity.name,
                 similarity_sha256=similarity.weights_sha256)


def save_tuned(path: str | os.PathLike, tuned: Tuned, network: OpenNetwork, settings: TuningSettings) -> None:
    """Write a tuned generator as a network file, with the original's metadata and a record of the tuning.

    network:  the original

    Raises OSError.
    """
    record = {
        "network": network.name, "network_sha256": network.sha256, "num_steps": tuned.num_steps, "seed": settings.seed,
        "learning_rate": settings.learning_rate, "l2_weight": settings.l2_weight,
        "locality_distance": settings.locality_distance, "locality_weight": settings.locality_weight,
        "locality_l2_weight": settings.locality_l2_weight,
        "similarity": tuned.similarity, "similarity_sha256": tuned.similarity_sha256,
        **{when: {"perceptual": distances.perceptual, "pixel": distances.pixel}
           for when, distances in (("before", tuned.before), ("after", tuned.after))},
    }
    info = {**network.info, "pivotal_tuning": record}
    save_network(path, Networks(G=None, D=None, G_ema=tuned.G, config={"info": info}))


def draw_locality(G: nn.Module, seed: int, step: int,
                  label: Sequence[float] | None = None) -> tuple[Tensor, Tensor]:
    """Return the latent and the label of a step's locality term: float32 [1, Z] and [1, c_dim], on the CPU.

    label:  None draws a class, one-hot; all classes are equally likely, since the images of all should stay in place.
            For networks with label vectors, whose distribution is unknown, it is that of the projection
    """
    stream = generator_for(seed_for(seed, step, 0, "projector/pti"))
    z, c = torch.randn(1, G.z_dim, generator=stream), torch.zeros(1, G.c_dim)
    if label is not None:
        c = torch.tensor([list(label)])
    elif G.c_dim > 0:
        c[0, torch.randint(G.c_dim, (), generator=stream)] = 1
    return z, c


def step_towards(pivot: Tensor, w: Tensor, distance: float) -> Tensor:
    """Return the styles at `distance` from the pivot in the direction of `w`, layer by layer: all [N, L, K]."""
    return pivot + distance * nn.functional.normalize(w - pivot, dim=2)


class _Wanted:
    """Images that others should resemble.

    images:  [N, C, R, R]
    """

    def __init__(self, images: Tensor, similarity: Similarity):
        self.images, self.similarity = images.detach().float(), similarity
        with torch.no_grad():
            self.maps = similarity.embed(to_similarity_input(self.images, similarity))

    def distances(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the perceptual distance and the mean squared difference of images [N, C, R, R]: two scalars."""
        maps = self.similarity.embed(to_similarity_input(images, self.similarity))
        return self.similarity.compare(maps, self.maps).mean(), (images - self.images).square().mean()

    @torch.no_grad()
    def measure(self, synthesis: nn.Module, w: Tensor) -> Distances:
        perceptual, pixel = self.distances(_show(synthesis, w))
        return Distances(perceptual=perceptual.item(), pixel=pixel.item())


class _Locality:
    """Keeps the images around the pivot unchanged (Roich et al. 2021, section 3.3)."""

    def __init__(self, G: nn.Module, w: Tensor, similarity: Similarity, settings: TuningSettings,
                 label: Sequence[float] | None):
        self.G, self.w, self.similarity, self.settings, self.label = G, w, similarity, settings, label
        # In train mode like the tuned copy, so that equal weights give equal images, bit for bit.
        self.original = copy.deepcopy(G.synthesis).train()

    def loss(self, synthesis: nn.Module, step: int) -> Tensor:
        """Return the term of a step, a scalar."""
        with torch.no_grad():
            z, c = draw_locality(self.G, self.settings.seed, step, self.label)
            near = step_towards(self.w, self.G.mapping(z.to(self.w.device), c.to(self.w.device)),
                                self.settings.locality_distance)
            wanted = _Wanted(_show(self.original, near), self.similarity)
        perceptual, pixel = wanted.distances(_show(synthesis, near))
        return perceptual + self.settings.locality_l2_weight * pixel


def _show(synthesis: nn.Module, ws: Tensor) -> Tensor:
    return synthesis(ws, noise_mode="const", force_fp32=True).float()


def _check_finite(loss: float, step: int, settings: TuningSettings) -> None:
    """Raise UserError unless the loss after `step` steps is finite."""
    if math.isfinite(loss):
        return
    if step == 0:
        raise UserError("--pti-steps: the loss is not finite before the first step, perhaps because the network's "
                        "training diverged; expected a network that works: try an earlier snapshot")
    fewer = f"try --pti-steps={step // 2}" if step > 1 else "leave --pti-steps out"
    raise UserError(f"--pti-steps is {settings.num_steps}, but the loss is not finite after {step} of them; expected "
                    f"a finite one: {fewer}")
