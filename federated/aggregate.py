"""The server's mathematics: means and medians of the sites' tensors, server optimizers, norms of updates, refusals.

All functions act on tensors alone, so that a simulation on one machine and a server of real sites share them. Tensors
have the names "G.<name>", "D.<name>" and "G_ema.<name>", with the names of the networks' state dicts.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from dnnlib.text import plural
from federated.agreement import W_AVG
from training.config import SERVER_LR, EmaConfig, FederationConfig
from training.state import ema_beta

# [E, c_dim] each: column k embeds class k. That of G_ema is the moving average of G's.
LABEL_EMBEDDINGS = ("G.mapping.embed.weight", "D.mapping.embed.weight", "G_ema.mapping.embed.weight")
NORM_ROUNDS = 5  # earlier rounds whose norms an update is compared with


@dataclass(frozen=True, kw_only=True)
class Contribution:
    """What a site sends after a round."""

    tensors: Mapping[str, Tensor]
    num_images: int  # real images that it saw in the round
    images_of_class: tuple[int, ...] = ()  # those of each class, [c_dim]; () where labels are not classes


def aggregate(contributions: Mapping[str, Contribution], federation: FederationConfig) -> dict[str, Tensor]:
    """Return the mean of the sites' tensors, or what --aggregation puts in its place."""
    if federation.aggregation == "mean":
        return average(contributions, federation.weights)
    return trimmed_mean(contributions, federation.trim if federation.aggregation == "trimmed-mean" else None)


def average(contributions: Mapping[str, Contribution], weights: str = "images") -> dict[str, Tensor]:
    """Return the weighted mean of the sites' tensors (FedAvg: McMahan et al. 2017, algorithm 1).

        mean = sum(n_i * x_i) / sum(n_i),  in float64, in the order of the sites' names, rounded to the tensors' dtype

    contributions:  by site, all with equal names and shapes
    weights:        "images": n_i is the number of images that site i saw in the round; "equal": n_i = 1

    Column k of a label embedding is weighted by the site's images of class k, with either kind of weights: a site that
    never saw a class returns its column as it was, and would hold the others back. Where no site saw the class, n_i is
    as for all other tensors.

    Equal float32 tensors give themselves, bit for bit: for whole numbers n_i of a sum below 2^29 all products and sums
    are exact, and so is the quotient.
    """
    sites = sorted(contributions)
    parts = [contributions[site] for site in sites]
    plain = torch.tensor([part.num_images if weights == "images" else 1 for part in parts], dtype=torch.float64)
    if plain.sum() <= 0:
        raise ValueError(f"the sites {', '.join(sites) or '(none)'} saw no images; expected at least one")
    _check_alike(contributions)
    by_class = torch.tensor([part.images_of_class for part in parts], dtype=torch.float64)  # [sites, c_dim]
    by_class = torch.where(by_class.sum(dim=0) > 0, by_class, plain[:, None])
    mean = {}
    for name in parts[0].tensors:
        has_columns = name in LABEL_EMBEDDINGS and by_class.shape[1] > 0
        mean[name] = _weighted_mean([part.tensors[name] for part in parts], by_class if has_columns else plain)
    return mean


def _check_alike(contributions: Mapping[str, Contribution]) -> None:
    """Raise ValueError unless all have the same tensors and classes, with a column for each class."""
    first = min(contributions)
    tensors, num_classes = contributions[first].tensors, len(contributions[first].images_of_class)
    for site, part in sorted(contributions.items()):
        if part.tensors.keys() != tensors.keys() or len(part.images_of_class) != num_classes:
            raise ValueError(f"site {site} sends other tensors or another number of classes than site {first}; "
                             f"expected the same")
    columns = {tensors[name].shape[-1] for name in LABEL_EMBEDDINGS if name in tensors and num_classes} - {num_classes}
    if columns:
        raise ValueError(f"a label embedding has {columns.pop()} columns; expected {num_classes}, one per class")


def _weighted_mean(values: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Return sum(weights[i] * values[i]) / sum(weights[i]) in the dtype of the values.

    weights: [sites] float64, or [sites, columns] for values [..., columns]
    """
    total = weights[0] * values[0].double()  # not zeros + ..., which would turn -0.0 into 0.0
    for weight, value in zip(weights[1:], values[1:], strict=True):
        total += weight * value.double()
    return (total / weights.sum(dim=0)).to(values[0].dtype)


def trimmed_mean(contributions: Mapping[str, Contribution], trim: float | None) -> dict[str, Tensor]:
    """Return the trimmed mean of each coordinate of the sites' tensors (Yin et al. 2018, definitions 1 and 2).

    Of n sites' values of a number, the k smallest and the k largest are left out, and the mean of the others is taken:

        k = min(ceil(trim * n), floor((n - 1) / 2));    trim = None is the median, k = floor((n - 1) / 2)

    A result lies between two values of honest sites if at most k sites are not. Of one or two sites it is the mean.

    contributions:  by site, all with equal names and shapes
    trim:           share that is left out at each end, > 0 and < 0.5

    Sites have no weights, but column k of a label embedding is that of the sites that saw images of class k, if there
    are some: as with `average`, one of three sites that saw a class would be overruled by the others, which return its
    column as it was. LIMIT: so a class that few sites saw is protected as far as these are many.

    Equal float32 tensors give themselves, bit for bit, for the reasons in `average`.
    """
    if not contributions:
        raise ValueError("there are no sites; expected at least one")
    _check_alike(contributions)
    parts = [part for _, part in sorted(contributions.items())]
    found = {}
    for name in parts[0].tensors:
        values = [part.tensors[name] for part in parts]
        if name not in LABEL_EMBEDDINGS or not parts[0].images_of_class:
            found[name] = _trimmed_mean(values, trim)
            continue
        columns = []
        for label in range(len(parts[0].images_of_class)):
            saw = [part.tensors[name][:, label] for part in parts if part.images_of_class[label] > 0]
            columns.append(_trimmed_mean(saw or [value[:, label] for value in values], trim))
        found[name] = torch.stack(columns, dim=1)
    return found


def _trimmed_mean(values: Sequence[Tensor], trim: float | None) -> Tensor:
    most = (len(values) - 1) // 2
    cut = most if trim is None else min(math.ceil(Fraction(str(trim)) * len(values)), most)
    kept = torch.stack([*values]).sort(dim=0, stable=True).values[cut:len(values) - cut]
    return _weighted_mean(kept, torch.ones(len(kept), dtype=torch.float64))


def is_running_average(name: str) -> bool:
    """Return whether a tensor is an average over training, not a parameter that training optimizes."""
    return name.startswith("G_ema.") or name == W_AVG


def trained(names: Iterable[str]) -> list[str]:
    """Return the names of the trained parameters of G and D."""
    return [name for name in names if not is_running_average(name)]


class ServerOptimizer:
    """Turns the networks of the last round and the mean of the sites' into those of the next round.

    Running averages always become the mean. For each trained parameter x a subclass turns delta = mean - x into the
    change of x, with the help of its moments. All is computed in float64. Moments are kept in the dtype of x: delta
    carries the rounding of the mean to that dtype, so more digits would hold no information.
    """

    MOMENTS: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.moments: dict[str, dict[str, Tensor]] = {name: {} for name in self.MOMENTS}  # moment -> parameter -> value

    def step(self, current: Mapping[str, Tensor], mean: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the next tensors, with the names of `mean`; the arguments stay unchanged."""
        return {name: value if is_running_average(name) else self._step(name, current[name], value)
                for name, value in mean.items()}

    def change(self, delta: Tensor, *moments: Tensor | float) -> tuple[Tensor, ...]:
        """Return the change of a parameter, followed by its new moments; all float64."""
        raise NotImplementedError

    def initial(self) -> tuple[float, ...]:
        """Return the values of the moments before the first step."""
        return tuple(0.0 for _ in self.MOMENTS)

    def _step(self, name: str, current: Tensor, mean: Tensor) -> Tensor:
        before = [self.moments[moment][name].double() if name in self.moments[moment] else value
                  for moment, value in zip(self.MOMENTS, self.initial(), strict=True)]
        change, *after = self.change(mean.double() - current.double(), *before)
        for moment, value in zip(self.MOMENTS, after, strict=True):
            self.moments[moment][name] = value.to(current.dtype)
        return (current.double() + change).to(current.dtype)

    def state_dict(self) -> dict[str, Any]:
        """Return the moments, {moment: {parameter: tensor}}. The next step does not change these tensors."""
        return {moment: dict(values) for moment, values in self.moments.items()}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned. Raises ValueError if it is of another optimizer."""
        if saved.keys() != self.moments.keys():
            raise ValueError(f"the state of the server optimizer has the moments {', '.join(saved) or '(none)'}; "
                             f"expected {', '.join(self.MOMENTS) or 'none'}")
        self.moments = {moment: dict(saved[moment]) for moment in self.MOMENTS}


class FedAvg(ServerOptimizer):
    """x <- mean, without any arithmetic (McMahan et al. 2017)."""

    def _step(self, name: str, current: Tensor, mean: Tensor) -> Tensor:
        return mean


class FedAvgM(ServerOptimizer):
    """v <- momentum * v + delta,  x <- x + lr * v,  v starts at 0 (Hsu et al. 2019).

    The paper has lr = 1. A constant delta moves x by lr * delta / (1 - momentum) per round in the end.
    """

    MOMENTS = ("v",)

    def __init__(self, *, lr: float, momentum: float):
        super().__init__()
        self.lr, self.momentum = lr, momentum

    def change(self, delta: Tensor, v: Tensor | float) -> tuple[Tensor, ...]:
        v = self.momentum * v + delta
        return self.lr * v, v


class FedAdam(ServerOptimizer):
    """Adam on the sites' mean update (Reddi et al. 2021, algorithm 2).

        m <- beta1 * m + (1 - beta1) * delta
        v <- beta2 * v + (1 - beta2) * delta^2
        x <- x + lr * m / (sqrt(v) + tau)

    m starts at 0, and v at tau^2, the least that the algorithm allows. As there, m and v are not corrected for their
    start. Weights whose mean updates are well above tau all move by about lr in a round, whatever the updates' size.
    """

    MOMENTS = ("m", "v")

    def __init__(self, *, lr: float, beta1: float, beta2: float, tau: float):
        super().__init__()
        self.lr, self.beta1, self.beta2, self.tau = lr, beta1, beta2, tau

    def initial(self) -> tuple[float, ...]:
        return 0.0, self.tau**2

    def change(self, delta: Tensor, m: Tensor | float, v: Tensor | float) -> tuple[Tensor, ...]:
        m = self.beta1 * m + (1 - self.beta1) * delta
        v = self.beta2 * v + (1 - self.beta2) * delta.square()
        return self.lr * m / (v.sqrt() + self.tau), m, v


def make_server_optimizer(federation: FederationConfig) -> ServerOptimizer:
    """Return the server optimizer of a run, before its first step."""
    kind, beta = federation.server_optimizer, federation.server_momentum
    lr = SERVER_LR[kind] if federation.server_lr is None else federation.server_lr
    return {
        "fedavg": FedAvg(),
        "fedavgm": FedAvgM(lr=lr, momentum=beta),
        "fedadam": FedAdam(lr=lr, beta1=beta, beta2=federation.server_beta2, tau=federation.server_tau),
    }[kind]


def round_beta(ema: EmaConfig, *, batch: int, start_nimg: int, end_nimg: int) -> float:
    """Return the decay of the averaged generator over a whole round: the product of those of its iterations.

    start_nimg, end_nimg:  images that a site has seen before and after the round, whole iterations of `batch`

    Without ramp-up this is 0.5^(images of the round / half-life). With it the half-life grows within the round, so
    `ema_beta` for one step of all its images would be too small.
    """
    return math.prod(ema_beta(batch, nimg, ema.kimg, ema.rampup) for nimg in range(start_nimg, end_nimg, batch))


def server_average(averaged: Mapping[str, Tensor], current: Mapping[str, Tensor], beta: float) -> dict[str, Tensor]:
    """Return the next tensors of G_ema, where the server keeps it: beta * G_ema + (1 - beta) * G, in float64.

    averaged:  tensors "G_ema.<name>";  current: tensors of the new networks, "G.<name>" among them
    beta:      see `round_beta`

    w_avg is a running average itself, and copied. LIMIT: networks within a round do not enter, so the average follows
    the last network of each round more closely than one that is updated after each iteration.
    """
    after = {}
    for name, value in averaged.items():
        source = f"G.{name.removeprefix('G_ema.')}"
        newest = current[source]
        after[name] = newest if source == W_AVG else torch.lerp(newest.double(), value.double(), beta).to(value.dtype)
    return after


def update_norm(tensors: Mapping[str, Tensor], base: Mapping[str, Tensor], names: Iterable[str]) -> float:
    """Return the 2-norm of tensors - base over all named tensors together, in float64. See `trained` for names."""
    return math.hypot(*(torch.linalg.vector_norm(_difference(tensors, base, name)).item() for name in names))


def cosines(updates: Mapping[str, Mapping[str, Tensor]], base: Mapping[str, Tensor],
            names: Iterable[str]) -> dict[tuple[str, str], float]:
    """Return the cosine between the updates x - base of each pair of sites, over all named tensors together.

    updates:  by site, the tensors x after a round

    Keys are pairs of names in order. A site whose update is 0 has no direction: its cosines are NaN.
    """
    sites, names = sorted(updates), list(names)
    pairs = [*((site, site) for site in sites), *combinations(sites, 2)]
    products: dict[tuple[str, str], list[float]] = {pair: [] for pair in pairs}
    for name in names:
        deltas = {site: _difference(updates[site], base, name) for site in sites}
        for one, other in pairs:
            # Not torch.dot: with MKL its last bit depends on where in memory the numbers are.
            products[one, other].append((deltas[one] * deltas[other]).sum().item())
    sums = {pair: math.fsum(values) for pair, values in products.items()}
    found = {}
    for one, other in combinations(sites, 2):
        lengths = math.sqrt(sums[one, one]) * math.sqrt(sums[other, other])
        found[one, other] = min(max(sums[one, other] / lengths, -1.0), 1.0) if lengths > 0 else math.nan
    return found


def _difference(tensors: Mapping[str, Tensor], base: Mapping[str, Tensor], name: str) -> Tensor:
    return (tensors[name].double() - base[name].double()).flatten()


def refuse_by_norm(norms: Mapping[str, float], history: Sequence[Sequence[float]], limit: float,
                   of: str = "") -> dict[str, str]:
    """Return {site: reason} for updates whose norm per local step is more than `limit` times the median.

    norms:    by site, norm of the update divided by the site's iterations in the round
    history:  those of accepted updates, by round, oldest first; the last `NORM_ROUNDS` count
    limit:    --max-update-norm
    of:       what the norms are of, if not of all trained parameters; for the reason

    The median is over the sites of this round and those of the last rounds. Norms of 0 are left out of it: they tell
    nothing about the size of a step, and a median of 0 would refuse every site that moved.
    """
    recent = history[-NORM_ROUNDS:]
    scale = [norm for norm in [*norms.values(), *(norm for entry in recent for norm in entry)] if norm > 0]
    if not scale:
        return {}
    # The lower of the two in the middle, not their mean: in the first round of two sites, the mean of 1 and 100 is
    # 50.5, and the update that is a hundredfold too large would be less than ten times that.
    median = statistics.median_low(scale)
    earlier = f" and the last {plural(len(recent), 'round')}" if len(recent) > 1 else " and the last round"
    return {site: f"its norm {of}per local step is {norm:.3g}, more than {limit:g} times the median {median:.3g} of "
                  f"this round's sites{earlier if recent else ''} (--max-update-norm)"
            for site, norm in norms.items() if norm > limit * median}
