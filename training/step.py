"""One training iteration: its phases, the moving average, and the adaptive augmentation.

All randomness is in the inputs, all that changes is in the state. Legend: n images of a micro-batch, L num_ws.
"""

from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from torch_utils.seeding import generator_for
from training import loss as losses
from training.ada import count_signs, mean_sign, next_p
from training.config import StepConfig
from training.state import TrainingState, ema_beta
from training.step_inputs import PhaseInputs, StepInputs, active_phases, path_length_images


@dataclass(kw_only=True)
class StepResult:
    """What an iteration has to report."""

    # phase -> statistic (TensorBoard name) -> one value per image, on the training device
    stats: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    # phase -> tensors whose loss or gradient was not finite; the phase's step was left out
    skipped: dict[str, list[str]] = field(default_factory=dict)


@dataclass(kw_only=True)
class _MicroBatch:
    """One forward and backward pass."""

    reals: Tensor
    labels: Tensor
    inputs: PhaseInputs
    cutoff: int | None
    rng: torch.Generator | None


def train_step(state: TrainingState, batch: StepInputs, config: StepConfig) -> StepResult:
    """Run one iteration (Gmain, Greg, Dmain, Dreg, then the moving average, then the augmentation) in place.

    Raises ValueError when the inputs do not fit the state or the configuration.
    """
    result = StepResult()
    for phase in active_phases(state.iteration, config.loss):
        if phase not in batch.phases:
            raise ValueError(f"iteration {state.iteration} runs phase {phase}; expected inputs for it")
        _run_phase(phase, state, batch, config, result)
    _update_average(state, ema_beta(config.batch, state.nimg, config.ema.kimg, config.ema.rampup))
    state.nimg += config.batch
    state.iteration += 1
    _adapt_augmentation(state, config)
    return result


def _run_phase(phase: str, state: TrainingState, batch: StepInputs, config: StepConfig, result: StepResult) -> None:
    """Accumulate the gradients of all micro-batches, then take the step if all is finite."""
    network, optimizer = (state.G, state.g_adam) if phase.startswith("G") else (state.D, state.d_adam)
    work = _PhaseWork(state, config)
    optimizer.zero_grad(set_to_none=True)
    network.requires_grad_(True)
    total = torch.zeros([], device=state.device)
    for part in _micro_batches(phase, state, batch, config):
        loss = getattr(work, phase)(part)
        loss.backward()
        total = total + loss.detach()
    network.requires_grad_(False)
    for parameter in network.parameters():
        if parameter.grad is None:  # e.g. the last bias in a gradient penalty: its second moment decays all the same
            parameter.grad = torch.zeros_like(parameter)

    result.stats[phase] = {name: torch.cat(values) for name, values in work.stats.items()}
    odd = _non_finite(total, network)
    if odd:
        result.skipped[phase] = odd
    else:
        optimizer.step()
        state.pl_mean.copy_(work.pl_mean)
        if phase.startswith("D"):
            state.ada_signs += count_signs(result.stats[phase]["Loss/scores/real"])
    optimizer.zero_grad(set_to_none=True)


def _micro_batches(phase: str, state: TrainingState, batch: StepInputs, config: StepConfig) -> list[_MicroBatch]:
    """Cut the inputs of a phase into micro-batches."""
    size, inputs = config.micro_batch, batch.phases[phase]
    if len(batch.reals) % size:
        raise ValueError(f"a step got {len(batch.reals)} images; expected a multiple of micro_batch, {size}")
    num = len(batch.reals) // size

    def split(name: str) -> list:
        value = getattr(inputs, name)
        if value is None:
            return [None] * num
        if len(value) % num or (name != "pl_noise" and len(value) != num * size):
            raise ValueError(f"{phase}: {name} has {len(value)} rows; expected {num * size}, as reals")
        return list(value.chunk(num))

    columns = {name: split(name) for name in ("z", "c", "mix_z", "pl_noise")}
    parts = []
    for index in range(num):
        parts.append(_MicroBatch(
            reals=batch.reals[index * size:(index + 1) * size], labels=batch.labels[index * size:(index + 1) * size],
            inputs=PhaseInputs(**{name: values[index] for name, values in columns.items()}),
            cutoff=inputs.mix_cutoffs[index] if inputs.mix_z is not None else None,
            rng=generator_for(inputs.seeds[index], state.device) if inputs.seeds else None))
    return parts


class _PhaseWork:
    """The forward passes of the four phases; each method returns the loss to differentiate."""

    def __init__(self, state: TrainingState, config: StepConfig):
        self.state = state
        self.loss = config.loss
        self.pl_mean = state.pl_mean
        self.stats: dict[str, list[Tensor]] = defaultdict(list)

    def Gmain(self, part: _MicroBatch) -> Tensor:
        logits = self._judge(self._generate(part), part.inputs.c, part, "fake")
        return self._report("Loss/G/loss", losses.generator_losses(logits)).mean()

    def Greg(self, part: _MicroBatch) -> Tensor:
        num = path_length_images(len(part.reals), self.loss)
        ws = self._latents(part, num)
        noise = part.inputs.pl_noise
        if noise is None or len(noise) != num:
            found = "missing" if noise is None else f"for {len(noise)} images"
            raise ValueError(f"Greg: path length noise is {found}; expected {num} images a micro-batch")
        noise = noise.to(ws.dtype) / noise[0, 0].numel() ** 0.5
        lengths = losses.path_lengths(self.state.G, ws, noise, noise_mode=self.loss.noise_mode, generator=part.rng)
        penalty, self.pl_mean = losses.path_length_penalty(lengths, self.pl_mean, self.loss.pl_decay)
        self._report("Loss/pl_penalty", penalty)
        regularisation = self._report("Loss/G/reg", penalty * self.loss.pl_weight)
        return regularisation.mean() * self.loss.g_reg_interval

    def Dmain(self, part: _MicroBatch) -> Tensor:
        with torch.no_grad():
            fakes = self._generate(part)
        fake_logits = self._judge(fakes, part.inputs.c, part, "fake")
        real_logits = self._judge(part.reals, part.labels, part, "real")
        return self._report("Loss/D/loss", losses.discriminator_losses(real_logits, fake_logits)).mean()

    def Dreg(self, part: _MicroBatch) -> Tensor:
        reals = part.reals.detach().requires_grad_()
        penalty = losses.squared_gradient(self._judge(reals, part.labels, part, "real"), reals)
        self._report("Loss/r1_penalty", penalty)
        regularisation = self._report("Loss/D/reg", penalty * (self.loss.r1_gamma / 2))
        return regularisation.mean() * self.loss.d_reg_interval

    def _latents(self, part: _MicroBatch, num: int | None = None) -> Tensor:
        """Map the first `num` latents of a micro-batch (None: all), styles mixed. [num, L, K]"""
        z, c, mix_z = (value if value is None else value[:num] for value in
                       (part.inputs.z, part.inputs.c, part.inputs.mix_z))
        ws = self.state.G.mapping(z, c)
        if mix_z is not None and part.cutoff < ws.shape[1]:
            second = self.state.G.mapping(mix_z, c, skip_w_avg_update=True)
            ws = torch.cat([ws[:, :part.cutoff], second[:, part.cutoff:]], dim=1)
        return ws

    def _generate(self, part: _MicroBatch) -> Tensor:
        return self.state.G.synthesis(self._latents(part), noise_mode=self.loss.noise_mode, generator=part.rng)

    def _judge(self, img: Tensor, c: Tensor, part: _MicroBatch, kind: str) -> Tensor:
        """Return logits [n, 1] of augmented images, and report them."""
        if self.state.augment_pipe is not None:
            img = self.state.augment_pipe(img, generator=part.rng)
        logits = self.state.D(img, c)
        self._report(f"Loss/scores/{kind}", logits)
        self._report(f"Loss/signs/{kind}", logits.sign())
        return logits

    def _report(self, name: str, values: Tensor) -> Tensor:
        self.stats[name].append(values.detach().flatten())
        return values


def _non_finite(loss: Tensor, network: nn.Module) -> list[str]:
    """Return the names of gradients that are not finite; "loss" when only the loss is not."""
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    largest = torch.nn.utils.get_total_norm(gradients.values(), norm_type=float("inf"))
    if (torch.isfinite(largest) & torch.isfinite(loss)).item():
        return []
    return [name for name, gradient in gradients.items() if not torch.isfinite(gradient).all()] or ["loss"]


@torch.no_grad()
def _update_average(state: TrainingState, beta: float) -> None:
    """Move G_ema towards G; buffers are copied, so that its w_avg is the generator's."""
    for averaged, current in zip(state.G_ema.parameters(), state.G.parameters(), strict=True):
        averaged.copy_(torch.lerp(current, averaged, beta))
    for averaged, current in zip(state.G_ema.buffers(), state.G.buffers(), strict=True):
        averaged.copy_(current)


def _adapt_augmentation(state: TrainingState, config: StepConfig) -> None:
    """Move p towards the target sign every few iterations (StyleGAN2-ADA, section 3.1)."""
    ada, pipe = config.ada, state.augment_pipe
    if ada is None or pipe is None or state.iteration % ada.interval:
        return
    if state.ada_signs[1] > 0:  # none where every phase since was skipped
        sign = mean_sign(state.ada_signs)
        pipe.p.fill_(next_p(pipe.p.item(), sign, ada.target, config.batch, ada.interval, ada.kimg))
    state.ada_signs.zero_()
