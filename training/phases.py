"""The forward passes of the four phases of an iteration.

Legend: n images of a micro-batch, L num_ws, K w_dim.
"""

from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor

from training import loss as losses
from training.config import LossConfig
from training.micro_batches import MicroBatch
from training.state import TrainingState


class _RunningSum:
    """The mean of values that come in parts."""

    def __init__(self):
        self.total: Tensor | float = 0.0
        self.count = 0

    def add(self, values: Tensor) -> None:
        """values: [n, ...]"""
        self.total = self.total + values.detach().sum(dim=0)
        self.count += len(values)

    def value(self, num_processes: int) -> Tensor:
        """Return the mean; `total` is the sum over that many processes with equal counts."""
        return self.total / (self.count * num_processes)


class PhaseWork:
    """The forward passes of the four phases; each method yields the losses to differentiate, one after the other.

    Running means move once a phase, by all its micro-batches, so that P micro-batches do what P processes do.
    """

    def __init__(self, state: TrainingState, loss: LossConfig):
        self.state = state
        self.loss = loss
        self.stats: dict[str, list[Tensor]] = defaultdict(list)
        self._w, self._lengths = _RunningSum(), _RunningSum()

    def running_sums(self) -> list[Tensor]:
        """Return the sums that `commit` divides, to be replaced in place by those over all processes."""
        return [running.total for running in (self._w, self._lengths) if running.count]

    def commit(self, finite: Tensor, num_processes: int = 1) -> None:
        """Move the running means of w and of path lengths, unless the phase was not `finite`: a bool on the device."""
        mapping = self.state.G.mapping
        if self._w.count and mapping.w_avg_beta is not None:
            self._move(mapping.w_avg, self._w.value(num_processes), 1 - mapping.w_avg_beta, finite)
        if self._lengths.count:
            self._move(self.state.pl_mean, self._lengths.value(num_processes), self.loss.pl_decay, finite)

    @staticmethod
    def _move(mean: Tensor, value: Tensor, rate: float, finite: Tensor) -> None:
        mean.copy_(torch.where(finite, mean.lerp(value.to(mean), rate), mean))

    def Gmain(self, part: MicroBatch) -> Iterator[Tensor]:
        logits = self._judge(self._generate(part), part.inputs.c, part, "fake")
        yield self._report("Loss/G/loss", losses.generator_losses(logits)).mean()

    def Greg(self, part: MicroBatch) -> Iterator[Tensor]:
        ws = self._latents(part, len(part.inputs.pl_noise))
        noise = part.inputs.pl_noise.to(ws.dtype) / part.inputs.pl_noise[0, 0].numel() ** 0.5
        lengths = losses.path_lengths(self.state.G, ws, noise, noise_mode=self.loss.noise_mode, generator=part.rng)
        self._lengths.add(lengths)
        penalty, _ = losses.path_length_penalty(lengths, self.state.pl_mean, self.loss.pl_decay)
        self._report("Loss/pl_penalty", penalty)
        yield self._report("Loss/G/reg", penalty * self.loss.pl_weight).mean() * self.loss.g_reg_interval

    def Dmain(self, part: MicroBatch) -> Iterator[Tensor]:
        with torch.no_grad():
            fakes = self._generate(part)
        # One graph at a time: half the memory.
        on_fakes = losses.fake_losses(self._judge(fakes, part.inputs.c, part, "fake"))
        yield on_fakes.mean()
        on_reals = losses.real_losses(self._judge(part.reals, part.labels, part, "real"))
        self._report("Loss/D/loss", on_fakes.detach() + on_reals.detach())
        yield on_reals.mean()

    def Dreg(self, part: MicroBatch) -> Iterator[Tensor]:
        reals = part.reals.detach().requires_grad_()
        penalty = losses.squared_gradient(self._judge(reals, part.labels, part, "real"), reals)
        self._report("Loss/r1_penalty", penalty)
        yield self._report("Loss/D/reg", penalty * (self.loss.r1_gamma / 2)).mean() * self.loss.d_reg_interval

    def _latents(self, part: MicroBatch, num: int | None = None) -> Tensor:
        """Map the first `num` latents of a micro-batch (None: all), styles mixed. [num, L, K]"""
        z, c, mix_z = (value if value is None else value[:num] for value in
                       (part.inputs.z, part.inputs.c, part.inputs.mix_z))
        if part.cutoff == self.state.G.num_ws:
            ws = self.state.G.mapping(z, c, skip_w_avg_update=True)
            self._w.add(ws[:, 0])
            return ws
        both = self.state.G.mapping(torch.cat([z, mix_z]), torch.cat([c, c]), skip_w_avg_update=True)
        ws, second = both.chunk(2)
        self._w.add(ws[:, 0])
        return torch.cat([ws[:, :part.cutoff], second[:, part.cutoff:]], dim=1)

    def _generate(self, part: MicroBatch) -> Tensor:
        return self.state.G.synthesis(self._latents(part), noise_mode=self.loss.noise_mode, generator=part.rng)

    def _judge(self, img: Tensor, c: Tensor, part: MicroBatch, kind: str) -> Tensor:
        """Return logits [n, 1] of augmented images, and report them."""
        if self.state.augment_pipe is not None:
            img = self.state.augment_pipe(img, generator=part.rng, host_generator=part.host_rng)
        logits = self.state.D(img, c)
        self._report(f"Loss/scores/{kind}", logits)
        self._report(f"Loss/signs/{kind}", logits.sign())
        return logits

    def _report(self, name: str, values: Tensor) -> Tensor:
        with torch.no_grad():
            self.stats[name].append(values.flatten())
        return values
