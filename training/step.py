"""One training iteration: its phases, the moving average, and the adaptive augmentation.

All randomness comes from the inputs, and everything that changes is in the state. The losses are in phases.py.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from torch_utils.distributed import Processes
from training.ada import adapt_augmentation
from training.config import StepConfig
from training.phases import MicroBatch, Phase, PhaseWork, StepInputs, active_phases, cut
from training.state import TrainingState, ema_beta


@dataclass(kw_only=True)
class StepResult:
    """The statistics of an iteration, and its skipped steps."""

    # phase -> statistic (TensorBoard name) -> one value per image of this process, on the training device
    stats: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    # phase -> names of tensors whose gradient was not finite, or "loss"; the phase's step was skipped
    skipped: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Proximal:
    """The proximal term of FedProx, (mu / 2) * ||w - anchor||^2 (Li et al. 2020, "Federated Optimization", eq. 2).

    It is added to the losses of Gmain and Dmain, whose gradients are sums over micro-batches: once for each of them.
    """

    mu: float
    anchors: dict[str, list[Tensor]]  # "G", "D" -> values like those of its parameters, in their order; may lack one

    def add_gradients(self, phase: Phase, network: nn.Module, gradients: list[Tensor], count: int) -> None:
        """Add count * mu * (w - anchor) to the gradients of a main phase, in place; nothing without anchors."""
        anchors = {"Gmain": self.anchors.get("G"), "Dmain": self.anchors.get("D")}.get(phase.value)
        if anchors is not None:
            apart = torch._foreach_sub([parameter.detach() for parameter in network.parameters()], anchors)
            torch._foreach_add_(gradients, apart, alpha=count * self.mu)


def train_step(state: TrainingState, batch: StepInputs, config: StepConfig, processes: Processes | None = None,
               proximal: Proximal | None = None) -> StepResult:
    """Run one iteration in place: the phases that are due, then the moving average, then the augmentation.

        for Gmain, Greg, Dmain, Dreg:  one Adam step on the gradients of all micro-batches of all processes
        G_ema <- beta * G_ema + (1 - beta) * G,  beta as in `training.state.ema_beta`
        every ada.interval iterations:  p <- p +- batch * ada.interval / (1000 * ada.kimg) (ADA paper, section 3)

    batch:      this process's share of the images
    processes:  the processes that take the step together, with equal states before and after; None for a single one
    proximal:   holds the networks near given ones; None does not

    Raises ValueError, before anything changes, if the inputs do not fit the state or the configuration.
    """
    if processes is not None and len(batch.reals) * processes.count != config.batch:
        raise ValueError(f"a step got {len(batch.reals)} images on each of {processes.count} processes; expected "
                         f"{config.batch} in total")
    plan: dict[Phase, list[MicroBatch]] = {}
    for phase in active_phases(state.iteration, config.loss):
        if phase not in batch.phases:
            raise ValueError(f"iteration {state.iteration} runs phase {phase}; expected inputs for it")
        plan[phase] = cut(phase, batch, config, state)
    result, norms = StepResult(), {}
    for phase, parts in plan.items():
        result.stats[phase.value], norms[phase] = _run_phase(phase, parts, state, config, processes,
                                                              proximal)
    _update_average(state, ema_beta(config.batch, state.nimg, config.ema.kimg, config.ema.rampup))
    state.nimg += config.batch
    state.iteration += 1
    adapt_augmentation(state, config)
    result.skipped = _name_non_finite(norms, state)  # last, since it synchronizes with the device
    return result


class GradientSum:
    """Accumulates the gradients of a network's parameters over losses.

    Equivalent to `backward`, with fewer operators, and without the gradients of other inputs: that of the images of a
    gradient penalty would take a pass through the whole augmentation.
    """

    def __init__(self, parameters: list[Tensor]):
        self.parameters = parameters
        self.sums: list[Tensor | None] = [None] * len(parameters)

    def add(self, loss: Tensor) -> None:
        """Add the gradients of a loss, and free its graph."""
        seen = set()  # two parameters may share one gradient tensor, e.g. two biases of a sum
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
        """Set the `grad` of each parameter to its sum."""
        for parameter, total in zip(self.parameters, self.sums):
            # None e.g. for the last bias in a gradient penalty: with zeros its second moment still decays
            parameter.grad = torch.zeros_like(parameter) if total is None else total


def _run_phase(phase: Phase, parts: list[MicroBatch], state: TrainingState, config: StepConfig,
               processes: Processes | None, proximal: Proximal | None) -> tuple[dict[str, Tensor], Tensor]:
    """Accumulate the gradients of all micro-batches and processes, then take the step if all values are finite.

    The result of that check stays on the device until the end of the iteration, so that nothing here synchronizes.
    Returns the statistics of the phase, and a tensor of the norm of each gradient, followed by the magnitude of the
    loss.
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
        # Gradients are summed over processes as over micro-batches, so that both give the same results. NVIDIA's code
        # divides by the number of processes, which matters only where gradients come near Adam's eps. A value that is
        # not finite in one process is not finite in the sum, so all processes skip the step together.
        processes.sum([*sums, total, *work.sums()])
    if proximal is not None:
        proximal.add_gradients(phase, network, sums, config.batch // config.micro_batch)
    # Norms are finite if gradients and the sums of their squares, which Adam averages, are. The largest magnitude
    # would do too, but takes 13 times as long on CPUs.
    norms = torch.stack([*torch._foreach_norm(sums), total.abs()])
    finite = norms.amax() < math.inf  # False for NaN
    # The fused Adam skips its step if this is 1, without synchronizing. torch.amp.GradScaler uses it, but it is not
    # documented: see test_pytorch_still_honors_the_undocumented_found_inf_of_a_fused_adam.
    optimizer.found_inf = (~finite).float()
    optimizer.step()
    work.commit(finite, 1 if processes is None else processes.count)
    optimizer.zero_grad(set_to_none=True)
    return {name: torch.cat(values) for name, values in work.stats.items()}, norms


def _name_non_finite(norms: dict[Phase, Tensor], state: TrainingState) -> dict[str, list[str]]:
    """Return, by phase, the names of gradients that were not finite; "loss" if only the loss was not.

    norms: returned by `_run_phase`, by phase. One flag is copied to the host, and more only if it is set.
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

    Buffers are copied, so that G_ema has the w_avg of G.
    """
    averaged, current = ([*network.parameters()] for network in (state.G_ema, state.G))
    torch._foreach_lerp_(averaged, current, 1 - beta)
    torch._foreach_copy_([*state.G_ema.buffers()], [*state.G.buffers()])
