"""The four phases of a training iteration: their random inputs, micro-batches and losses.

A training step is a function of its state and of the random inputs drawn here.

Legend: B images of this process, N of a micro-batch, C image channels, R resolution, Z z_dim, L num_ws, K w_dim.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor, nn

from torch_utils.seeding import generator_for, seed_for
from training import loss as losses
from training.ada import count_signs
from training.config import LossConfig, StepConfig
from training.sampling import LabelDistribution
from training.state import TrainingState


class Phase(StrEnum):
    """A phase of an iteration. Members are in the order in which phases run; statistics and logs use their names."""

    Gmain = "Gmain"
    Greg = "Greg"
    Dmain = "Dmain"
    Dreg = "Dreg"

    def network(self, state: TrainingState) -> nn.Module:
        """Return the network that the phase trains."""
        return state.G if self in (Phase.Gmain, Phase.Greg) else state.D


PHASES = tuple(Phase)


@dataclass(frozen=True, kw_only=True)
class PhaseInputs:
    """All random inputs of one phase."""

    z: Tensor | None = None  # [B, Z]; Dreg needs none
    c: Tensor | None = None  # [B, c_dim], labels of the fakes
    mix_z: Tensor | None = None  # [B, Z], second latents for style mixing; None = no mixing
    mix_cutoffs: Sequence[int] = ()  # per micro-batch: first layer with ws from mix_z; L = no mixing
    pl_noise: Tensor | None = None  # Greg: N(0, 1), [N // pl_batch_shrink, C, R, R] per micro-batch, concatenated
    seeds: Sequence[int] = ()  # per micro-batch: for layer noise and augmentation


@dataclass(frozen=True, kw_only=True)
class StepInputs:
    """The inputs of one process in one iteration."""

    reals: Tensor  # [B, C, R, R], [-1, 1]
    labels: Tensor  # [B, c_dim]
    phases: Mapping[str, PhaseInputs]  # by phase name


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """The inputs of one forward and backward pass."""

    reals: Tensor  # [N, C, R, R]
    labels: Tensor  # [N, c_dim]
    inputs: PhaseInputs  # its tensors are cut to this micro-batch
    cutoff: int  # first layer with ws from the second latents; L = no mixing
    rng: torch.Generator | None  # for layer noise and other large draws, on the training device
    host_rng: torch.Generator | None  # on the host, for augmentation's decisions per image; on a CPU `rng` itself


def active_phases(iteration: int, loss: LossConfig) -> list[Phase]:
    """Return the phases of an iteration, in order: regularization is lazy (StyleGAN2, section 3.1)."""
    active = {Phase.Gmain: True,
              Phase.Greg: loss.pl_weight > 0 and iteration % loss.g_reg_interval == 0,
              Phase.Dmain: True,
              Phase.Dreg: loss.gamma > 0 and iteration % loss.d_reg_interval == 0}
    return [phase for phase in PHASES if active[phase]]


def path_length_images(micro_batch: int, loss: LossConfig) -> int:
    """Return the number of latents in a micro-batch that are used for path lengths: at least one."""
    return max(micro_batch // loss.pl_batch_shrink, 1)


def draw_phases(config: StepConfig, *, seed: int, nimg: int, iteration: int, microbatches: range, z_dim: int,
                num_ws: int, label_law: LabelDistribution, image_shape: Sequence[int],
                device: torch.device | str = "cpu") -> dict[str, PhaseInputs]:
    """Draw the inputs of every phase of an iteration.

    nimg:         images seen before the iteration
    microbatches: indices, over all processes, of the micro-batches that this process computes
    label_law:    the distribution of the labels of training images, from which those of fakes are drawn
    image_shape:  (C, R, R)

    Depends only on the arguments: a micro-batch gets the same numbers on any process.
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
        if phase is Phase.Greg:
            shape = (path_length_images(size, loss), *image_shape)
            noise = torch.cat([torch.randn(shape, device=device, generator=generator_for(
                seed_for(seed, nimg, index, f"{phase}/path_length"), device)) for index in microbatches])
        phases[phase.value] = PhaseInputs(
            z=torch.cat(z).to(device), c=torch.cat(c).to(device), pl_noise=noise,
            mix_z=torch.cat(mix_z).to(device) if loss.style_mixing_prob > 0 else None, mix_cutoffs=cutoffs,
            seeds=[seed_for(seed, nimg, index, f"{phase}/noise") for index in microbatches])
    return phases


def cut(phase: Phase, batch: StepInputs, config: StepConfig, state: TrainingState) -> list[MicroBatch]:
    """Return the micro-batches of a phase. Raises ValueError for inputs of the wrong size."""
    size, inputs, images, num_ws = config.micro_batch, batch.phases[phase], len(batch.reals), state.G.num_ws
    if images == 0 or images % size:
        raise ValueError(f"a step got {images} images; expected a multiple of micro_batch, {size}")
    num = images // size
    rows = {"z": images, "c": images, "mix_z": images, "pl_noise": num * path_length_images(size, config.loss)}
    needed = [] if phase is Phase.Dreg else ["z", "c", "pl_noise"] if phase is Phase.Greg else ["z", "c"]
    for name in needed:
        if getattr(inputs, name) is None:
            raise ValueError(f"{phase}: {name} is missing; expected {rows[name]} rows")
    for name, value in {"labels": batch.labels, **{name: getattr(inputs, name) for name in rows}}.items():
        expected = rows.get(name, images)
        if value is not None and len(value) != expected:
            raise ValueError(f"{phase}: {name} has {len(value)} rows; expected {expected}")
    cutoffs = [num_ws] * num if inputs.mix_z is None else list(inputs.mix_cutoffs)
    if len(cutoffs) != num or not all(1 <= cutoff <= num_ws for cutoff in cutoffs):
        raise ValueError(f"{phase}: mix_cutoffs are {cutoffs}; expected {num} from 1 to {num_ws}")
    draws_noise = config.loss.noise_mode == "random" and phase is not Phase.Dreg
    if len(inputs.seeds) != num and (inputs.seeds or draws_noise or state.augment_pipe is not None):
        raise ValueError(f"{phase}: there are {len(inputs.seeds)} seeds; expected {num}, for layer noise and "
                         "augmentation")

    columns = {name: [None] * num if getattr(inputs, name) is None else getattr(inputs, name).chunk(num)
               for name in rows}
    rngs = [generator_for(seed, state.device) for seed in inputs.seeds] or [None] * num
    host_rngs = rngs if state.device.type == "cpu" else [generator_for(seed) for seed in inputs.seeds] or [None] * num
    return [MicroBatch(
        reals=batch.reals[index * size:(index + 1) * size], labels=batch.labels[index * size:(index + 1) * size],
        inputs=PhaseInputs(**{name: values[index] for name, values in columns.items()}),
        cutoff=cutoffs[index], rng=rngs[index], host_rng=host_rngs[index]) for index in range(num)]


def mix_styles(mapping: nn.Module, z: Tensor, c: Tensor, mix_z: Tensor | None, cutoff: int) -> tuple[Tensor, Tensor]:
    """Map z to styles, with those of mix_z from layer `cutoff` on (mixing regularization: StyleGAN, section 3.1).

    z, mix_z:  [N, Z];  c: [N, c_dim], of both
    cutoff:    1 to L; with L there is no mixing, and mix_z is not used

    Returns the mixed styles [N, L, K], and w [N, K] of z alone, which w_avg follows.
    """
    if cutoff == mapping.num_ws:
        ws = mapping(z, c, skip_w_avg_update=True)
        return ws, ws[:, 0]
    first, second = mapping(torch.cat([z, mix_z]), torch.cat([c, c]), skip_w_avg_update=True).chunk(2)
    return torch.cat([first[:, :cutoff], second[:, cutoff:]], dim=1), first[:, 0]


class _RunningSum:
    """The mean of values that are added batch by batch."""

    def __init__(self):
        self.total: Tensor | float = 0.0
        self.count = 0

    def add(self, values: Tensor) -> None:
        """values: [N, ...]"""
        self.total = self.total + values.detach().sum(dim=0)
        self.count += len(values)

    def value(self, num_processes: int) -> Tensor:
        """Return the mean; `total` is the sum over `num_processes` processes with equal counts."""
        return self.total / (self.count * num_processes)


class PhaseWork:
    """The forward passes of a phase: `losses` yields the losses to differentiate, one at a time.

    Updates of running means are collected over all micro-batches, and applied once per phase by `commit`, so that P
    micro-batches are equivalent to P processes.
    """

    def __init__(self, phase: Phase, state: TrainingState, loss: LossConfig):
        self.phase, self.state, self.loss = phase, state, loss
        self.stats: dict[str, list[Tensor]] = defaultdict(list)
        self.signs: Tensor | None = None  # of D's logits on reals, as `count_signs` returns them; None = no reals seen
        self._w, self._lengths = _RunningSum(), _RunningSum()

    def losses(self, part: MicroBatch) -> Iterator[Tensor]:
        """Yield the losses of a micro-batch, scalars."""
        return {Phase.Gmain: self.Gmain, Phase.Greg: self.Greg, Phase.Dmain: self.Dmain,
                Phase.Dreg: self.Dreg}[self.phase](part)

    def Gmain(self, part: MicroBatch) -> Iterator[Tensor]:
        """E[softplus(-D(G(z)))]"""
        logits = self._judge(self._generate(part), part.inputs.c, part, "fake")
        yield self._report("Loss/G/loss", losses.generator_losses(logits)).mean()

    def Greg(self, part: MicroBatch) -> Iterator[Tensor]:
        """g_reg_interval * pl_weight * E[(||J_w^T y||_2 - a)^2], on a part of the micro-batch: StyleGAN2, eq. 4"""
        ws = self._styles(part, len(part.inputs.pl_noise))
        noise = part.inputs.pl_noise.to(ws.dtype) / part.inputs.pl_noise[0, 0].numel() ** 0.5
        lengths = losses.path_lengths(self.state.G, ws, noise, noise_mode=self.loss.noise_mode, generator=part.rng)
        self._lengths.add(lengths)
        penalty = losses.path_length_penalty(lengths, self.state.pl_mean, self.loss.pl_decay)
        self._report("Loss/pl_penalty", penalty)
        yield self._report("Loss/G/reg", penalty * self.loss.pl_weight).mean() * self.loss.g_reg_interval

    def Dmain(self, part: MicroBatch) -> Iterator[Tensor]:
        """E[softplus(D(G(z)))] + E[softplus(-D(x))]"""
        with torch.no_grad():
            fakes = self._generate(part)
        # Keeping one graph at a time halves the memory.
        on_fakes = losses.fake_losses(self._judge(fakes, part.inputs.c, part, "fake"))
        yield on_fakes.mean()
        on_reals = losses.real_losses(self._judge_reals(part.reals, part))
        self._report("Loss/D/loss", on_fakes.detach() + on_reals.detach())
        yield on_reals.mean()

    def Dreg(self, part: MicroBatch) -> Iterator[Tensor]:
        """d_reg_interval * (gamma / 2) * E[||grad_x D(x)||^2]"""
        reals = part.reals.detach().requires_grad_()
        squared_norms = losses.squared_gradient(self._judge_reals(reals, part), reals)
        self._report("Loss/r1_penalty", squared_norms)
        penalty = losses.r1_penalty(squared_norms, gamma=self.loss.gamma)
        yield self._report("Loss/D/reg", penalty).mean() * self.loss.d_reg_interval

    def sums(self) -> list[Tensor]:
        """Return the sums that `commit` uses; the caller sums them over all processes in place."""
        return [*(running.total for running in (self._w, self._lengths) if running.count),
                *([] if self.signs is None else [self.signs])]

    def commit(self, finite: Tensor, num_processes: int = 1) -> None:
        """Update the running means of w and of path lengths, and add the signs of D's logits on reals to the state.

        finite:  bool on the device; if False, nothing changes
        """
        mapping, pl_mean = self.state.G.mapping, self.state.pl_mean
        if self._w.count and mapping.w_avg_beta is not None:
            w = self._w.value(num_processes).to(mapping.w_avg)
            mapping.w_avg.copy_(torch.where(finite, mapping.w_avg.lerp(w, 1 - mapping.w_avg_beta), mapping.w_avg))
        if self._lengths.count:
            length = self._lengths.value(num_processes).to(pl_mean)
            moved = losses.path_length_mean(pl_mean, length, self.loss.pl_decay)
            pl_mean.copy_(torch.where(finite, moved, pl_mean))
        if self.signs is not None:
            self.state.ada_signs += torch.where(finite, self.signs, 0)

    def _styles(self, part: MicroBatch, num: int | None = None) -> Tensor:
        """Map the first `num` latents of a micro-batch (None: all) to styles, with mixing. [num, L, K]"""
        z, c, mix_z = (value if value is None else value[:num] for value in
                       (part.inputs.z, part.inputs.c, part.inputs.mix_z))
        ws, w = mix_styles(self.state.G.mapping, z, c, mix_z, part.cutoff)
        self._w.add(w)
        return ws

    def _generate(self, part: MicroBatch) -> Tensor:
        return self.state.G.synthesis(self._styles(part), noise_mode=self.loss.noise_mode, generator=part.rng)

    def _judge(self, img: Tensor, c: Tensor, part: MicroBatch, kind: str) -> Tensor:
        """Return logits [N, 1] of augmented images, and report them."""
        if self.state.augment_pipe is not None:
            img = self.state.augment_pipe(img, generator=part.rng, host_generator=part.host_rng)
        logits = self.state.D(img, c)
        self._report(f"Loss/scores/{kind}", logits)
        self._report(f"Loss/signs/{kind}", logits.sign())
        return logits

    def _judge_reals(self, reals: Tensor, part: MicroBatch) -> Tensor:
        logits = self._judge(reals, part.labels, part, "real")
        signs = count_signs(logits)
        self.signs = signs if self.signs is None else self.signs + signs
        return logits

    def _report(self, name: str, values: Tensor) -> Tensor:
        with torch.no_grad():
            self.stats[name].append(values.flatten())
        return values
