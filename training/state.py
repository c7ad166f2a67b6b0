"""The training state: everything that changes during training, and so must be saved for a run to continue."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from training.augment import AugmentPipe
from training.config import AdamConfig, LossConfig, TrainConfig
from training.discriminator import Discriminator
from training.generator import Generator

STATE_VERSION = 1
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def ema_beta(batch: int, nimg: int, ema_kimg: float, rampup: float | None) -> float:
    """Return the decay of the averaged generator for a step of `batch` images after `nimg` (StyleGAN2-ADA's code).

        beta = 0.5^(batch / half_life),  half_life = min(1000 * ema_kimg, rampup * nimg) images

    rampup:  None keeps the half-life at 1000 * ema_kimg
    """
    half_life = ema_kimg * 1000
    if rampup is not None:
        half_life = min(half_life, nimg * rampup)
    return 0.5 ** (batch / max(half_life, 1e-8))


def lazy_adam(adam: AdamConfig, interval: int) -> dict[str, Any]:
    """Return Adam's arguments for a network with an extra regularization step every k = `interval` iterations.

    With c = k / (k + 1): lr * c, beta1^c and beta2^c, so that the extra steps do not speed training up (StyleGAN2,
    appendix B).
    """
    ratio = interval / (interval + 1)
    return {"lr": adam.lr * ratio, "betas": (adam.beta1**ratio, adam.beta2**ratio), "eps": adam.eps}


@dataclass(kw_only=True)
class TrainingState:
    """The networks, their optimizers, and every running statistic."""

    G: nn.Module
    D: nn.Module
    G_ema: nn.Module
    g_adam: torch.optim.Adam
    d_adam: torch.optim.Adam
    augment_pipe: AugmentPipe | None  # its buffer p changes; None = no augmentation
    pl_mean: Tensor  # scalar, running mean of path lengths
    ada_signs: Tensor  # [2]: sum and number of D's signs on reals since p last changed
    iteration: int = 0
    nimg: int = 0  # images seen, over all processes

    @classmethod
    def create(cls, config: TrainConfig, device: torch.device | str) -> "TrainingState":
        """Build networks with random weights, the same for the same config.seed."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(config.seed)  # only the CPU's: weights are drawn there
            G = Generator(**config.generator.init_kwargs())
            D = Discriminator(**config.discriminator.init_kwargs())
        pipe = AugmentPipe(**config.augment.strengths) if config.augment.strengths else None
        if pipe is not None:
            pipe.p.fill_(config.augment.p)
        return cls.from_networks(G.to(device), D.to(device), copy.deepcopy(G).to(device), g_adam=config.g_adam,
                                 d_adam=config.d_adam, loss=config.step.loss,
                                 augment_pipe=None if pipe is None else pipe.to(device))

    @classmethod
    def from_networks(cls, G: nn.Module, D: nn.Module, G_ema: nn.Module, *, g_adam: AdamConfig, d_adam: AdamConfig,
                      loss: LossConfig, augment_pipe: AugmentPipe | None = None) -> "TrainingState":
        """Start training from given networks, at image 0. Training changes them in place."""
        if G is G_ema:
            raise ValueError("G and G_ema are the same object; expected two: the average needs its own weights")
        G.train().requires_grad_(False)
        D.train().requires_grad_(False)
        G_ema.eval().requires_grad_(False)
        parameter = next(G.parameters())
        return cls(
            G=G, D=D, G_ema=G_ema, augment_pipe=augment_pipe,
            g_adam=torch.optim.Adam(G.parameters(), **lazy_adam(g_adam, loss.g_reg_interval), fused=True),
            d_adam=torch.optim.Adam(D.parameters(), **lazy_adam(d_adam, loss.d_reg_interval), fused=True),
            pl_mean=torch.zeros([], dtype=parameter.dtype, device=parameter.device),
            ada_signs=torch.zeros(2, dtype=torch.float64, device=parameter.device))

    @property
    def device(self) -> torch.device:
        return self.pl_mean.device

    def state_dict(self) -> dict[str, Any]:
        """Return only tensors, numbers, strings and dicts, so that it loads with weights_only=True.

        The tensors are not copied: save or copy them before the next step.
        """
        return {
            "version": STATE_VERSION, "iteration": self.iteration, "nimg": self.nimg,
            "pl_mean": self.pl_mean, "ada_signs": self.ada_signs,
            "augment": {} if self.augment_pipe is None else {"p": self.augment_pipe.p},
            **{name: dict(getattr(self, name).state_dict()) for name in ("G", "D", "G_ema")},
            "g_adam": _moments(self.g_adam, self.G), "d_adam": _moments(self.d_adam, self.D),
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned, on this state's device.

        Raises ValueError, with this state unchanged, if the version, a name or a shape differs.
        """
        version = saved.get("version") if isinstance(saved, Mapping) else None
        if version != STATE_VERSION:
            raise ValueError(f"training state has version {version!r}; expected {STATE_VERSION}")
        _check_layout(saved, {**self.state_dict(), "g_adam": None, "d_adam": None}, "training state")
        for name, network in (("g_adam", self.G), ("d_adam", self.D)):
            _check_moments(saved[name], network, f"training state: {name}")
        for name in ("G", "D", "G_ema"):
            getattr(self, name).load_state_dict(saved[name])
        _set_moments(self.g_adam, self.G, saved["g_adam"])
        _set_moments(self.d_adam, self.D, saved["d_adam"])
        for name in ("pl_mean", "ada_signs"):
            getattr(self, name).copy_(saved[name])
        if self.augment_pipe is not None:
            self.augment_pipe.p.copy_(saved["augment"]["p"])
        self.iteration, self.nimg = saved["iteration"], saved["nimg"]


def _moments(optimizer: torch.optim.Adam, network: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Return Adam's moments by parameter name; parameters that took no step yet have none."""
    return {name: {key: optimizer.state[parameter][key] for key in _MOMENTS}
            for name, parameter in network.named_parameters() if parameter in optimizer.state}


def _set_moments(optimizer: torch.optim.Adam, network: nn.Module, saved: Mapping[str, Mapping[str, Tensor]]) -> None:
    optimizer.state.clear()
    for name, parameter in network.named_parameters():
        if name in saved:
            step, *averages = (saved[name][key] for key in _MOMENTS)
            # The fused step needs moments with their parameter's memory layout, on its device.
            averages = [torch.empty_like(parameter).copy_(average) for average in averages]
            step = step.detach().to(parameter.device, copy=True)
            optimizer.state[parameter] = dict(zip(_MOMENTS, [step, *averages]))


def _check_moments(saved: Any, network: nn.Module, where: str) -> None:
    """Raise ValueError unless these are moments of the network's parameters; parameters may lack them."""
    if not isinstance(saved, Mapping):
        raise ValueError(f"{where} is {type(saved).__name__}; expected names with values")
    parameters = dict(network.named_parameters())
    for name, moments in saved.items():
        if name not in parameters:
            raise ValueError(f"{where} has moments of {name}; expected parameters of the network")
        shape = parameters[name].shape
        _check_layout(moments, {"step": torch.zeros([]), "exp_avg": torch.empty(shape, device="meta"),
                                "exp_avg_sq": torch.empty(shape, device="meta")}, f"{where}.{name}")


def _check_layout(saved: Any, mine: Any, where: str) -> None:
    """Raise ValueError unless names, nesting and tensor shapes agree."""
    if isinstance(mine, dict):
        if not isinstance(saved, Mapping):
            raise ValueError(f"{where} is {type(saved).__name__}; expected names with values")
        odd = sorted(saved.keys() ^ mine.keys())
        if odd:
            raise ValueError(f"{where} differs in {', '.join(odd[:3])}{' ...' if len(odd) > 3 else ''}; expected the "
                             f"names of these networks: continue with the options of the run that saved it")
        for name in mine:
            _check_layout(saved[name], mine[name], f"{where}{'.' if ':' in where else ': '}{name}")
    elif isinstance(mine, int) and (type(saved) is not int or saved < 0):
        raise ValueError(f"{where} is {saved!r}; expected a whole number >= 0")
    elif isinstance(mine, Tensor) and (not isinstance(saved, Tensor) or saved.shape != mine.shape):
        found = list(saved.shape) if isinstance(saved, Tensor) else type(saved).__name__
        raise ValueError(f"{where} is {found}; expected a tensor {list(mine.shape)}")
