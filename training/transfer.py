"""Start a run from the weights of a trained network: --resume."""

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dnnlib.cli import UserError
from training.dataset import history_of
from training.snapshot import load_network, read_info
from training.state import TrainingState


@dataclass(frozen=True)
class Transferred:
    """What was taken from a network file."""

    taken: dict[str, int]  # network -> number of tensors
    kept: dict[str, list[str]]  # network -> tensors that the file has not: they keep their random start
    unused: dict[str, list[str]]  # network -> tensors of the file that the run's network has not

    def lines(self) -> list[str]:
        """Say it, a line a network."""
        lines = []
        for role, count in self.taken.items():
            line = f"{role}: {count} tensors taken"
            for names, what in ((self.kept[role], "not in the file, start at random"), (self.unused[role], "not used")):
                if names:
                    line += f"; {len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            lines.append(line)
        return lines


def transfer_weights(state: TrainingState, path: str | os.PathLike) -> Transferred:
    """Copy parameters and buffers of equal names into the networks of `state`: weights only, from image 0 on.

    A file without G or D gives its G_ema to G, and leaves D at random.
    Raises UserError, with the state as it was, when the file cannot be read or a tensor has another shape.
    """
    try:
        networks = load_network(path, device="cpu")
    except (ValueError, FileNotFoundError) as error:
        raise UserError(f"--resume={path}: {error}") from error
    sources = {"G": networks.G if networks.G is not None else networks.G_ema, "D": networks.D, "G_ema": networks.G_ema}
    pairs = {role: (source, getattr(state, role)) for role, source in sources.items() if source is not None}
    for role, (source, target) in pairs.items():
        _check_shapes(path, role, source, target)
    found = Transferred({}, {}, {})
    for role, (source, target) in pairs.items():
        given, mine = source.state_dict(), target.state_dict()
        shared = [name for name in mine if name in given]
        with torch.no_grad():
            for name in shared:
                mine[name].copy_(given[name])
        found.taken[role] = len(shared)
        found.kept[role] = [name for name in mine if name not in given]
        found.unused[role] = [name for name in given if name not in mine]
    return found


def read_history(path: str | os.PathLike | None) -> list[Any]:
    """Return what the network of --resume learned from, as `training.dataset.history_of`; [] without one."""
    if path is None:
        return []
    try:
        return history_of(read_info(path))
    except (ValueError, OSError) as error:
        raise UserError(f"--resume={path}: {error}") from error


def _check_shapes(path: str | os.PathLike, role: str, source: nn.Module, target: nn.Module) -> None:
    given = source.state_dict()
    for name, tensor in target.state_dict().items():
        if name in given and given[name].shape != tensor.shape:
            raise UserError(f"--resume={path}: {role}.{name} is {list(given[name].shape)} in the file and "
                            f"{list(tensor.shape)} in this run; expected networks of one resolution, size (--cfg), "
                            "number of channels and labels (--cond)")
