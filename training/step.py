"""One training iteration: its phases, the moving average, and the adaptive augmentation.

All randomness is in the inputs, all that changes is in the state. What each phase minimizes stands in phases.py.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from torch_utils.distributed import Processes
from training.ada import adapt_augmentation
from training.config import StepConfig
from training.phases import MicroBatch, Phase, PhaseWork, StepInputs, active_phases, cut
from training.state import TrainingState, ema_beta


@dataclass(kw_only=True)
class StepResult:
    """What an iteration has to report."""

    # phase -> statistic (TensorBoard name) -> one value per image of this process, on the training device
    stats: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    # phase -> tensors whose loss or gradient was not finite; the phase's step was left out
    skipped: dict[str, list[str]] = field(default_factory=dict)


def train_step(state: TrainingState, batch: StepInputs, config: StepConfig,
               processes: Processes | None = None) -> StepResult:
    """Run one iteration in place: the phases that are due, then the moving average, then the augmentation.

        for Gmain, Greg, Dmain, Dreg:  one step of Adam on the gradients of all micro-batches of all processes
        G_ema <- beta * G_ema + (1 - beta) * G,  beta as in `training.state.ema_beta`
        every ada.interval iterations:  p <- p +- batch * ada.interval / (1000 * ada.kimg) (ADA paper, section 3)

    batch:      this process's share of the images
    processes:  those that take the step together, from equal states, and end with equal states; None for one alone

    Raises ValueError, before anything changes, when the inputs do not fit the state or the configuration.
    """
    if processes is not None and len(batch.reals) * processes.count != config.batch:
        raise ValueError(f"a step got {len(batch.reals)} images on each of {processes.count} processes; expected "
                         f"{config.batch} in all")
    plan: dict[Phase, list[MicroBatch]] = {}
    for phase in active_phases(state.iteration, config.loss):
        if phase not in batch.phases:
            raise ValueError(f"iteration {state.iteration} runs phase {phase}; expected inputs for it")
        plan[phase] = cut(phase, batch, config, state)
    result, norms = StepResult(), {}
    for phase, parts in plan.items():
        result.stats[phase.value], norms[phase] = _run_phase(phase, parts, state, config, processes)
    _update_average(state, ema_beta(config.batch, state.nimg, config.ema.kimg, config.ema.rampup))
    state.nimg += config.batch
    state.iteration += 1
    adapt_augmentation(state, config)
    result.skipped = _name_non_finite(norms, state)  # last, since it waits for the device
    return result


class GradientSum:
    """Gradients of the parameters of a network, added up over losses.

    As `backward` adds them up, in fewer operators, and without the gradients of what else the losses depend on: the
    images of a gradient penalty have one, which takes a pass through the whole augmentation.
    """

    def __init__(self, parameters: list[Tensor]):
        self.parameters = parameters
        self.sums: list[Tensor | None] = [None] * len(parameters)

    def add(self, loss: Tensor) -> None:
        """Add the gradients of a loss, and let go of its graph."""
        seen = set()  # two parameters may get one tensor, e.g. two biases of a sum
        places, values = [], []
        for i, gradient in enumerate(torch.autograd.grad(loss, self.parameters, allow_unused=True)):
            if gradient is None:
                continue
            if self.sums[i] is not None:
                places.append(self.sums[i])
                values.append(gradient)
            elif gradient.data_ptr() in seen or gradient.stride() != self.parameters[i].stride():
                self.sums[i] = torch.empty_like(self.parameters[i]).copy_(gradient)
            else:
                self.sums[i] = gradient
                seen.add(gradient.data_ptr())
        if places:
            torch._foreach_add_(places, values)

    def hand_over(self) -> None:
        """Let each parameter have its sum as its `grad`."""
        for parameter, total in zip(self.parameters, self.sums):
            # None for e.g. the last bias in a gradient penalty: its second moment decays all the same
            parameter.grad = torch.zeros_like(parameter) if total is None else total


def _run_phase(phase: Phase, parts: list[MicroBatch], state: TrainingState, config: StepConfig,
               processes: Processes | None) -> tuple[dict[str, Tensor], Tensor]:
    """Accumulate the gradients of all micro-batches, of all processes, then take the step if all is finite.

    Whether it is, stays on the device until the iteration is at its end: nothing here waits for it. Returns the
    statistics of the phase, and the norm of each gradient, and last the magnitude of the loss.
    """
    network = phase.network(state)
    optimizer = state.g_adam if network is state.G else state.d_adam
    work = PhaseWork(phase, state, config.loss)
    losses = []
    gradients = GradientSum([*network.parameters()])
    network.requires_grad_(True)
    try:
        for part in parts:
            for loss in work.losses(part):
                gradients.add(loss)
                losses.append(loss.detach())
    finally:
        network.requires_grad_(False)
    gradients.hand_over()

    total = torch.stack(losses).sum()
    sums = [parameter.grad for parameter in gradients.parameters]
    if processes is not None:
        # Gradients add up over processes as they do over micro-batches. Dividing by the number of processes, as the
        # original does, would be another run: Adam is blind to the scale of gradients except where they come near its
        # eps. A value that is not finite in one process is not finite in the sum: all leave the step out together.
        processes.sum([*sums, total, *work.sums()])
    # Norms are finite where gradients and the sums of their squares, which Adam averages, are. The largest magnitude
    # would tell as much, and takes CPUs 13 times as long.
    norms = torch.stack([*torch._foreach_norm(sums), total.abs()])
    finite = norms.amax() < math.inf  # not so for NaN
    # The fused Adam leaves its step out where this is 1, without waiting for the device. torch.amp.GradScaler uses it,
    # and no documentation promises it: test_pytorch_still_honors_the_undocumented_found_inf_of_a_fused_adam.
    optimizer.found_inf = (~finite).float()
    optimizer.step()
    work.commit(finite, 1 if processes is None else processes.count)
    optimizer.zero_grad(set_to_none=True)
    return {name: torch.cat(values) for name, values in work.stats.items()}, norms


def _name_non_finite(norms: dict[Phase, Tensor], state: TrainingState) -> dict[str, list[str]]:
    """Return, by phase, the names of gradients that were not finite; "loss" when only the loss was not.

    norms: what `_run_phase` returned, by phase. Reads one flag back to the host, and more only when it says so.
    """
    if torch.cat(list(norms.values())).amax().item() < math.inf:
        return {}
    odd = {}
    for phase, values in norms.items():
        *gradients, loss = values.isfinite().tolist()
        if not all([*gradients, loss]):
            names = [name for name, _ in phase.network(state).named_parameters()]
            odd[phase.value] = [name for name, finite in zip(names, gradients) if not finite] or ["loss"]
    return odd


@torch.no_grad()
def _update_average(state: TrainingState, beta: float) -> None:
    """G_ema <- beta * G_ema + (1 - beta) * G (Progressive GAN: Karras et al. 2018, appendix A).

    Buffers are copied, so that its w_avg is the generator's.
    """
    averaged, current = ([*network.parameters()] for network in (state.G_ema, state.G))
    torch._foreach_lerp_(averaged, current, 1 - beta)
    torch._foreach_copy_([*state.G_ema.buffers()], [*state.G.buffers()])
