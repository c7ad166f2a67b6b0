"""Adapt the augmentation probability p to the discriminator's overfitting.

ADA paper: Karras et al. 2020, "Training Generative Adversarial Networks with Limited Data", section 3. The heuristic is
r_t = E[sign(D(real))]: near 0 without overfitting, near 1 when the discriminator has memorized its training images. p
rises at a fixed rate while r_t is above its target and falls while it is below.

`training.phases` counts the signs of each pass over reals, `training.step` calls `adapt_augmentation` after each step.
"""

import math

import torch
from torch import Tensor

from training.config import StepConfig
from training.state import TrainingState


def count_signs(logits: Tensor) -> Tensor:
    """Return (sum of the signs, number) of D's outputs on reals, as float64 [2] on their device.

    logits:  [N, 1], of augmented reals; a NaN makes the sum NaN

    Counts of micro-batches, phases and processes are added up, then passed to `mean_sign`.
    """
    values = logits.detach().double()
    signs = torch.where(values.isnan(), values, values.sign())  # PyTorch's sign of NaN is 0, which would hide it
    return torch.stack([signs.sum(), signs.new_full([], signs.numel())])


def mean_sign(counts: Tensor) -> float:
    """Return r_t from the sum of counts [2]. Raises ValueError if nothing was counted."""
    total, number = counts.tolist()
    if number < 1:
        raise ValueError(f"the sign statistic counts {number:g} outputs of the discriminator; expected at least 1")
    return total / number


def adapt_augmentation(state: TrainingState, config: StepConfig) -> None:
    """Every `interval` iterations, change p to move r_t, measured since the last change, towards its target."""
    ada, pipe = config.ada, state.augment_pipe
    if ada is None or pipe is None or state.iteration % ada.interval:
        return
    signs = state.ada_signs.cpu()
    if signs[1] > 0:  # 0 if every phase since was skipped
        pipe.p.fill_(next_p(pipe.p.item(), mean_sign(signs), ada.target, config.batch, ada.interval, ada.kimg))
    state.ada_signs.zero_()


def next_p(p: float, mean_sign: float, target: float, batch: int, interval: int, kimg: float) -> float:
    """Return p + sign(r_t - target) * batch * interval / (1000 * kimg), kept in [0, 1] (ADA paper, section 3).

    p:          the current probability of each augmentation
    mean_sign:  r_t since the last change
    target:     target of r_t, 0.6 in the paper
    batch:      total batch size, over all processes
    interval:   iterations between two changes
    kimg:       thousands of images in which p can move from 0 to 1

    Raises ValueError for values out of range, and if mean_sign is not finite, as when the discriminator has diverged.
    """
    _check("p", p, 0 <= p <= 1, "0 to 1")
    _check("mean sign of the discriminator", mean_sign, math.isfinite(mean_sign), "a finite number")
    _check("target", target, -1 <= target <= 1, "-1 to 1")
    _check("batch", batch, batch >= 1, "at least 1")
    _check("interval", interval, interval >= 1, "at least 1")
    _check("kimg", kimg, 0 < kimg < math.inf, "a finite number above 0")
    direction = (mean_sign > target) - (mean_sign < target)
    return min(max(p + direction * batch * interval / (kimg * 1000), 0.0), 1.0)


def _check(name: str, value: float, valid: bool, expected: str) -> None:
    if not valid:
        raise ValueError(f"ADA: {name} is {value}; expected {expected}")
