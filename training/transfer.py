"""Start a run from the weights of a trained network: --resume.

Classes are compared by name. A class is a column of the embeddings mapping.embed.weight, [E, c_dim], of G, D and G_ema.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dnnlib.cli import UserError
from imagesets.class_names import VECTOR, class_order, label_kind_of, named_classes
from imagesets.naming import listed
from training.config import TrainConfig
from training.dataset import ImageDataset, history_of
from training.snapshot import load_network, read_info
from training.state import TrainingState

_EMBED, _FIRST = "mapping.embed.", "mapping.fc0.weight"  # the first layer takes z beside the embedded class


@dataclass(frozen=True, kw_only=True)
class Labels:
    """What a network is told of an image."""

    c_dim: int  # 0 = nothing
    names: Sequence[str] | None = None  # of the classes, or of the numbers of a vector
    kind: str | None = None  # as imagesets.class_names.label_kind_of; None = not known

    @classmethod
    def of_network(cls, c_dim: int, info: Mapping[str, Any]) -> "Labels":
        """Take what a network file says; names that are not as many as its classes count as not given."""
        return cls(c_dim=c_dim, names=named_classes(info, c_dim), kind=label_kind_of(info, c_dim))

    def __str__(self) -> str:
        if self.c_dim == 0:
            return "without classes"
        named = "" if self.names is None else f" {listed(self.names)}"
        if self.kind == VECTOR:
            return f"with vectors of {self.c_dim} numbers{named}"
        return f"with the classes{named}" if named else f"with {self.c_dim} classes"


@dataclass(frozen=True)
class Transferred:
    """What was taken from a network file."""

    taken: dict[str, int]  # network -> number of tensors
    kept: dict[str, list[str]]  # network -> tensors that the file has not: they keep their random start
    unused: dict[str, list[str]]  # network -> tensors of the file that the run's network has not
    anew: dict[str, list[str]] = field(default_factory=dict)  # network -> those of classes that keep their random start
    note: str | None = None  # on the classes

    def lines(self) -> list[str]:
        """Say it, a line on classes where there is something to say, and a line a network."""
        lines = [] if self.note is None else [self.note]
        for role, count in self.taken.items():
            line = f"{role}: {count} tensors taken"
            for names, what in ((self.anew.get(role), "start anew"),
                                (self.kept[role], "not in the file, start at random"), (self.unused[role], "not used")):
                if names:
                    line += f"; {len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            lines.append(line)
        return lines


def transfer_for(state: TrainingState, config: TrainConfig, dataset: ImageDataset) -> Transferred:
    """Do what `transfer_weights` does for a run. Raises UserError."""
    labels = Labels(c_dim=config.dataset.c_dim, names=dataset.label_names, kind=dataset.label_kind)
    return transfer_weights(state, config.resume, labels, new_classes=config.resume_classes == "new")


def transfer_weights(state: TrainingState, path: str | os.PathLike, labels: Labels | None = None, *,
                     new_classes: bool = False) -> Transferred:
    """Copy parameters and buffers of equal names into the networks of `state`: weights only, from image 0 on.

    labels:       of the run; classes of the same names keep their weights, whatever their numbers. None: by number
    new_classes:  let what belongs to classes keep its random start, however many there are here and in the file

    A file without G or D gives its G_ema to G, and leaves D at random.
    Raises UserError, with the state as it was, when the file cannot be read, its classes are others, or a tensor has
    another shape.
    """
    try:
        networks = load_network(path, device="cpu")
    except (ValueError, FileNotFoundError) as error:
        raise UserError(f"--resume={path}: {error}") from error
    theirs = Labels.of_network(networks.G_ema.c_dim, networks.config.get("info") or {})
    mine = Labels(c_dim=state.G_ema.c_dim) if labels is None else labels
    order = None if new_classes else class_order(theirs.names, mine.names)
    sources = {"G": networks.G if networks.G is not None else networks.G_ema, "D": networks.D, "G_ema": networks.G_ema}
    found = Transferred({}, {}, {}, {}, _note(theirs, mine, new=new_classes, compared=labels is not None))
    copies: list[tuple[Tensor, Tensor]] = []
    for role, source in sources.items():
        if source is None:
            continue
        given, target = source.state_dict(), getattr(state, role).state_dict()
        of_classes = _class_tensors(role, theirs, mine, new=new_classes)
        shared = [name for name in target if name in given and not name.startswith(of_classes)]
        pairs = {name: (target[name], given[name]) for name in shared}
        if _FIRST in given and _FIRST in target and _FIRST not in pairs and role != "D":
            # The columns of z come first. With classes the sum has twice as many terms and half their weight, so that
            # it keeps its spread.
            pairs[f"{_FIRST}[z]"] = target[_FIRST][:, :state.G.z_dim], given[_FIRST][:, :source.z_dim]
        for name, (tensor, value) in pairs.items():
            _check_shape(path, role, name, value, tensor)
            copies.append((tensor, value[:, order] if order is not None and name == f"{_EMBED}weight" else value))
        found.taken[role] = len(pairs)
        found.anew[role] = [f"{name} but for z" if name == _FIRST else name for name in target if name in given
                            and name.startswith(of_classes) and not (name == _FIRST and mine.c_dim == 0)]
        found.kept[role] = [name for name in target if name not in given]
        found.unused[role] = [name for name in given if name not in target]
    _check_classes(path, theirs, mine, new_classes)
    with torch.no_grad():
        for tensor, value in copies:
            tensor.copy_(value)
    return found


def read_history(path: str | os.PathLike | None) -> list[Any]:
    """Return what the network of --resume learned from, as `training.dataset.history_of`; [] without one."""
    if path is None:
        return []
    try:
        return history_of(read_info(path))
    except (ValueError, OSError) as error:
        raise UserError(f"--resume={path}: {error}") from error


def _class_tensors(role: str, theirs: Labels, mine: Labels, *, new: bool) -> tuple[str, ...]:
    """Return how the names of tensors begin that are not taken since they belong to classes."""
    if not new and theirs.c_dim == mine.c_dim:
        return ()
    if (theirs.c_dim == 0) == (mine.c_dim == 0):
        return (_EMBED,)
    return (_EMBED, "b4.out.") if role == "D" else (_EMBED, _FIRST)


def _check_classes(path: str | os.PathLike, theirs: Labels, mine: Labels, new_classes: bool) -> None:
    """Raise UserError where classes are to be taken from the network and are others there."""
    if new_classes:
        if theirs.c_dim == mine.c_dim == 0:
            raise UserError(f"--resume-classes is new, but neither {path} nor this run has classes; leave it out")
        return
    kinds_differ = None not in (theirs.kind, mine.kind) and theirs.kind != mine.kind
    names_differ = None not in (theirs.names, mine.names) and class_order(theirs.names, mine.names) is None
    if theirs.c_dim != mine.c_dim or kinds_differ or names_differ:
        raise UserError(f"--resume={path}: the network was trained {theirs}, and this run trains {mine}; expected the "
                        "same: --resume-classes=new lets the class embedding start anew and takes all else")


def _note(theirs: Labels, mine: Labels, *, new: bool, compared: bool) -> str | None:
    """Return a line on how the classes of network and run go together; None where they are simply the same."""
    if new:
        return f"classes: the embedding starts anew; the network was trained {theirs}, and this run trains {mine}"
    if not compared or theirs.c_dim == 0 or mine.c_dim == 0:
        return None
    if None in (theirs.names, mine.names):
        who = "the network file" if theirs.names is None else "the data set"
        return f"classes: taken by number, since {who} does not name its own; make sure that their order is the same"
    if list(theirs.names) != list(mine.names):
        return f"classes: taken by name; {listed(mine.names)} are {listed(theirs.names)} in the network file"
    return None


def _check_shape(path: str | os.PathLike, role: str, name: str, given: Tensor, mine: Tensor) -> None:
    if given.shape != mine.shape:
        raise UserError(f"--resume={path}: {role}.{name} is {list(given.shape)} in the file and {list(mine.shape)} in "
                        "this run; expected networks of one resolution, size (--cfg) and number of channels")
