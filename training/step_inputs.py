"""What one training iteration draws, as values: a step is a function of its state and these inputs.

Legend: B images of this process, n of a micro-batch, Z z_dim, C image channels, R resolution, L num_ws.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_utils.seeding import generator_for, seed_for
from training.config import LossConfig, StepConfig
from training.sampling import LabelLaw

PHASES = ("Gmain", "Greg", "Dmain", "Dreg")


@dataclass(frozen=True, kw_only=True)
class PhaseInputs:
    """Everything random in one phase."""

    z: Tensor | None = None  # [B, Z]; Dreg needs none
    c: Tensor | None = None  # [B, c_dim], labels of the fakes
    mix_z: Tensor | None = None  # [B, Z], second latents of style mixing; None mixes nothing
    mix_cutoffs: Sequence[int] = ()  # per micro-batch: ws from here on come from mix_z; L mixes nothing
    pl_noise: Tensor | None = None  # Greg: N(0, 1), [n // pl_batch_shrink, C, R, R] of each micro-batch in turn
    seeds: Sequence[int] = ()  # per micro-batch: for layer noise and augmentation


@dataclass(frozen=True, kw_only=True)
class StepInputs:
    """One iteration's share of one process."""

    reals: Tensor  # [B, C, R, R], [-1, 1]
    labels: Tensor  # [B, c_dim]
    phases: Mapping[str, PhaseInputs]


def active_phases(iteration: int, loss: LossConfig) -> list[str]:
    """Return the phases of an iteration in their order: regularisation is lazy (StyleGAN2, section 3.1)."""
    active = {"Gmain": True,
              "Greg": loss.pl_weight > 0 and iteration % loss.g_reg_interval == 0,
              "Dmain": True,
              "Dreg": loss.r1_gamma > 0 and iteration % loss.d_reg_interval == 0}
    return [name for name in PHASES if active[name]]


def path_length_images(micro_batch: int, loss: LossConfig) -> int:
    """Return how many of a micro-batch's latents path lengths are taken on: at least one."""
    return max(micro_batch // loss.pl_batch_shrink, 1)


def draw_phases(config: StepConfig, *, seed: int, nimg: int, iteration: int, microbatches: range, z_dim: int,
                num_ws: int, label_law: LabelLaw, image_shape: Sequence[int], device="cpu") -> dict[str, PhaseInputs]:
    """Draw the inputs of every phase of an iteration.

    nimg:         images seen before the iteration
    microbatches: indices, over all processes, of the micro-batches that this process computes
    label_law:    how often each label occurs among the images that the run sees; fakes follow it
    image_shape:  (C, R, R)

    Depends on nothing but the arguments: a micro-batch gets the same numbers on whichever process it runs.
    """
    loss, size = config.loss, config.micro_batch

    def draw(phase: str, microbatch: int) -> tuple:
        rng = generator_for(seed_for(seed, nimg, microbatch, f"{phase}/latents"))
        z = torch.randn(size, z_dim, generator=rng)
        c = label_law.draw(size, rng)
        mix_z = torch.randn(size, z_dim, generator=rng)
        mixes = torch.rand([], generator=rng).item() < loss.style_mixing_prob
        cutoff = torch.randint(1, num_ws, [], generator=rng).item() if num_ws > 1 else 1
        return z, c, mix_z, cutoff if mixes else num_ws

    phases = {}
    for phase in active_phases(iteration, loss):
        z, c, mix_z, cutoffs = zip(*(draw(phase, index) for index in microbatches))
        noise = None
        if phase == "Greg":
            shape = (path_length_images(size, loss), *image_shape)
            noise = torch.cat([torch.randn(shape, device=device, generator=generator_for(
                seed_for(seed, nimg, index, f"{phase}/path_length"), device)) for index in microbatches])
        phases[phase] = PhaseInputs(
            z=torch.cat(z).to(device), c=torch.cat(c).to(device), pl_noise=noise,
            mix_z=torch.cat(mix_z).to(device) if loss.style_mixing_prob > 0 else None, mix_cutoffs=cutoffs,
            seeds=[seed_for(seed, nimg, index, f"{phase}/noise") for index in microbatches])
    return phases
