"""One training iteration: its phases, the moving average, and the adaptive augmentation.

All randomness is in the inputs, all that changes is in the state.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from torch_utils.distributed import Processes
from training.ada import count_signs, mean_sign, next_p
from training.config import StepConfig
from training.gradients import GradientSum
from training.micro_batches import MicroBatch, cut
from training.phases import PhaseWork
from training.state import TrainingState, ema_beta
from training.step_inputs import StepInputs, active_phases


@dataclass(kw_only=True)
class StepResult:
    """What an iteration has to report."""

    # phase -> statistic (TensorBoard name) -> one value per image of this process, on the training device
    stats: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    # phase -> tensors whose loss or gradient was not finite; the phase's step was left out
    skipped: dict[str, list[str]] = field(default_factory=dict)


def train_step(state: TrainingState, batch: StepInputs, config: StepConfig,
               processes: Processes | None = None) -> StepResult:
    """Run one iteration (Gmain, Greg, Dmain, Dreg, then the moving average, then the augmentation) in place.

    batch:      this process's share of the images
    processes:  those that take the step together, from equal states, and end with equal states; None for one alone

    Raises ValueError, before anything changes, when the inputs do not fit the state or the configuration.
    """
    if processes is not None and len(batch.reals) * processes.count != config.batch:
        raise ValueError(f"a step got {len(batch.reals)} images on each of {processes.count} processes; expected "
                         f"{config.batch} in all")
    result = StepResult()
    plan = {}
    for phase in active_phases(state.iteration, config.loss):
        if phase not in batch.phases:
            raise ValueError(f"iteration {state.iteration} runs phase {phase}; expected inputs for it")
        plan[phase] = cut(phase, batch, config, num_ws=state.G.num_ws, augments=state.augment_pipe is not None,
                          device=state.device)
    norms = {phase: _run_phase(phase, parts, state, config, processes, result) for phase, parts in plan.items()}
    _update_average(state, ema_beta(config.batch, state.nimg, config.ema.kimg, config.ema.rampup))
    state.nimg += config.batch
    state.iteration += 1
    _adapt_augmentation(state, config)
    result.skipped = _name_non_finite(norms, state)  # last, since it waits for the device
    return result


def _run_phase(phase: str, parts: list[MicroBatch], state: TrainingState, config: StepConfig,
               processes: Processes | None, result: StepResult) -> Tensor:
    """Accumulate the gradients of all micro-batches, of all processes, then take the step if all is finite.

    Whether it is, stays on the device until the iteration is at its end: nothing here waits for it. Returns the norm of
    each gradient, and last the magnitude of the loss.
    """
    network, optimizer = (state.G, state.g_adam) if phase.startswith("G") else (state.D, state.d_adam)
    work = PhaseWork(state, config.loss)
    losses = []
    parameters = [*network.parameters()]
    gradients = GradientSum(parameters)
    network.requires_grad_(True)
    try:
        for part in parts:
            for loss in getattr(work, phase)(part):
                gradients.add(loss)
                losses.append(loss.detach())
    finally:
        network.requires_grad_(False)
    gradients.hand_over()

    result.stats[phase] = {name: torch.cat(values) for name, values in work.stats.items()}
    signs = count_signs(result.stats[phase]["Loss/scores/real"]) if phase.startswith("D") else None
    total = torch.stack(losses).sum()
    if processes is not None:
        _join_processes(processes, parameters, total, work, signs)
    norms = torch.stack([*_norms([parameter.grad for parameter in parameters]), total.abs()])
    finite = norms.amax() < math.inf  # not so for NaN
    # The fused Adam leaves its step out where this is 1, without waiting for the device. torch.amp.GradScaler uses it,
    # and no documentation promises it: test_pytorch_still_honors_the_undocumented_found_inf_of_a_fused_adam.
    optimizer.found_inf = (~finite).float()
    optimizer.step()
    work.commit(finite, 1 if processes is None else processes.count)
    if signs is not None:
        state.ada_signs += torch.where(finite, signs, 0)
    optimizer.zero_grad(set_to_none=True)
    return norms


def _join_processes(processes: Processes, parameters: list[Tensor], loss: Tensor, work: PhaseWork,
                    signs: Tensor | None) -> None:
    """Replace what a phase has gathered by its sums over all processes, so that all of them then do the same.

    Gradients add up over processes as they do over micro-batches. Dividing by the number of processes, as the original
    does, would be another run: Adam is blind to the scale of gradients except where they come near its eps. A value
    that is not finite in one process is not finite in the sum, and all leave the step out together.
    """
    gradients = [parameter.grad for parameter in parameters]
    processes.sum([*gradients, loss, *work.running_sums(), *([] if signs is None else [signs])])


def _norms(gradients: list[Tensor]) -> Sequence[Tensor]:
    """Return numbers that are finite where gradients are, and so are the sums of their squares, which Adam averages.

    The largest magnitude would tell as much, and takes CPUs 13 times as long.
    """
    return torch._foreach_norm(gradients)


def _name_non_finite(norms: dict[str, Tensor], state: TrainingState) -> dict[str, list[str]]:
    """Return, by phase, the names of gradients that were not finite; "loss" when only the loss was not.

    norms: what `_run_phase` returned, by phase. Reads one flag back to the host, and more only when it says so.
    """
    if torch.cat(list(norms.values())).amax().item() < math.inf:
        return {}
    odd = {}
    for phase, values in norms.items():
        network = state.G if phase.startswith("G") else state.D
        *gradients, loss = values.isfinite().tolist()
        if not all([*gradients, loss]):
            names = [name for name, _ in network.named_parameters()]
            odd[phase] = [name for name, finite in zip(names, gradients) if not finite] or ["loss"]
    return odd


@torch.no_grad()
def _update_average(state: TrainingState, beta: float) -> None:
    """Move G_ema towards G; buffers are copied, so that its w_avg is the generator's."""
    averaged, current = ([*network.parameters()] for network in (state.G_ema, state.G))
    torch._foreach_lerp_(averaged, current, 1 - beta)
    torch._foreach_copy_([*state.G_ema.buffers()], [*state.G.buffers()])


def _adapt_augmentation(state: TrainingState, config: StepConfig) -> None:
    """Move p towards the target sign every few iterations (StyleGAN2-ADA, section 3.1)."""
    ada, pipe = config.ada, state.augment_pipe
    if ada is None or pipe is None or state.iteration % ada.interval:
        return
    signs = state.ada_signs.cpu()
    if signs[1] > 0:  # none where every phase since was skipped
        pipe.p.fill_(next_p(pipe.p.item(), mean_sign(signs), ada.target, config.batch, ada.interval, ada.kimg))
    state.ada_signs.zero_()
