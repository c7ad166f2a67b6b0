"""What the server and the institutions ("sites") of a federated run agree on: networks, classes, and what travels.

Tensors are named as in a network file: "G.synthesis.b4.const". In every round travel the trainable parameters of G, of
D (unless only G is shared) and of G_ema (if the sites average), and the mean style w_avg. All other buffers, with the
frozen layers of D, are constants, equal for equal seeds; their hash is compared in every round.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from imagesets.classes import CLASS
from training.state import TrainingState

PAYLOADS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
W_AVG = "G.mapping.w_avg"  # the only buffer that training changes; that of G_ema is always equal


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """What the server and all sites have agreed on before the first round."""

    networks: Mapping[str, Any]  # {"G": constructor arguments, "D": ...}, JSON types
    classes: tuple[str, ...] | None  # names, in the order of their numbers; None = no names
    label_kind: str | None  # as imagesets.classes.label_kind_of
    share: str  # this and the next two: see training.config.FederationConfig
    ema: str
    payload: str
    tensors: Mapping[str, tuple[int, ...]]  # name -> shape of what travels in every round, as "G.mapping.fc0.weight"
    start: Mapping[str, tuple[int, ...]]  # of all others: constants, and weights that stay where they are
    privacy: Mapping[str, float] | None = None  # as FederationConfig.privacy returns it; None = no --dp

    @classmethod
    def of(cls, state: TrainingState, *, share: str, ema: str, payload: str, classes: Iterable[str] | None,
           label_kind: str | None, privacy: Mapping[str, float] | None = None) -> "Agreement":
        """Make the agreement on the networks of `state`, which may be on the meta device.

        Raises ValueError for weights other than float32.
        """
        every, constant = _tensors_of(state), constants(state)
        for name, tensor in every.items():
            if tensor.dtype != torch.float32:
                raise ValueError(f"{name} is {tensor.dtype}; expected torch.float32")
        roles = {*share.split(","), *(["G_ema"] if ema == "sites" else [])}
        travels = {name: name not in constant and name.partition(".")[0] in roles for name in every}
        shapes = {name: tuple(tensor.shape) for name, tensor in every.items()}
        return cls(networks={role: json.loads(json.dumps(getattr(state, role).init_kwargs)) for role in ("G", "D")},
                   classes=None if classes is None else tuple(classes), label_kind=label_kind, share=share, ema=ema,
                   payload=payload, tensors={name: shapes[name] for name in every if travels[name]},
                   start={name: shapes[name] for name in every if not travels[name]}, privacy=privacy)

    @property
    def num_classes(self) -> int:
        """Number of classes whose images are counted; 0 without labels, with vectors as labels, and with privacy."""
        return self.networks["G"]["c_dim"] if self.label_kind == CLASS and self.privacy is None else 0

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors of a message, without those that are sent once."""
        return bytes_of(self.tensors, PAYLOADS[self.payload])

    def facts(self) -> dict[str, Any]:
        """Return what a message states, and its receiver compares."""
        return {**self.networks, "classes": None if self.classes is None else list(self.classes),
                "label_kind": self.label_kind, "share": self.share, "ema": self.ema, "payload": self.payload,
                "privacy": None if self.privacy is None else dict(self.privacy)}


def local_tensors(state: TrainingState, agreement: Agreement) -> dict[str, Tensor]:
    """Return the tensors that travel in every round, by agreed name; they share memory with the networks."""
    every = _tensors_of(state)
    return {name: every[name] for name in agreement.tensors}


def start_tensors(state: TrainingState, agreement: Agreement) -> dict[str, Tensor]:
    """Return all other tensors: a server sends them once, if its run does not start at the weights of the seed."""
    every = _tensors_of(state)
    return {name: every[name] for name in agreement.start}


@torch.no_grad()
def load_tensors(state: TrainingState, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors, those of a round or those of the start, into the networks; buffers of G also into G_ema.

    Networks without a tensor here keep what they have, such as G_ema with the averages at the server.
    """
    every = _tensors_of(state)
    for name, tensor in tensors.items():
        every[name].copy_(tensor)
    for averaged, current in zip(state.G_ema.buffers(), state.G.buffers()):
        averaged.copy_(current)


def constants(state: TrainingState) -> dict[str, Tensor]:
    """Return the buffers that training never changes, with the frozen layers of D: equal for equal seeds.

    Those of G_ema are left out: training copies them from G.
    """
    found = {f"{role}.{name}": buffer for role in ("G", "D") for name, buffer in getattr(state, role).named_buffers()}
    found.pop(W_AVG, None)
    return found


def constants_hash(state: TrainingState) -> str:
    return tensors_hash(constants(state))


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 of names, dtypes, shapes and values; the order of the names does not matter."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def bytes_of(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> int:
    """Return the bytes of tensors with these shapes, by name."""
    return sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize


def _tensors_of(state: TrainingState) -> dict[str, Tensor]:
    """Return all tensors of the networks by name, in a fixed order, but for the buffers of G_ema, which follow G's."""
    found = {f"{role}.{name}": tensor for role in ("G", "D")
             for name, tensor in getattr(state, role).state_dict().items()}
    return found | {f"G_ema.{name}": parameter.detach() for name, parameter in state.G_ema.named_parameters()}
