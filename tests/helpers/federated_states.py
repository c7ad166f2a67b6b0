"""Small training states of a federated run, and a round of messages between a server and a site."""

import copy
import hashlib
import json

import pytest
import safetensors.torch
import torch

from federated.agreement import Agreement, constants_hash, load_tensors, local_tensors, tensors_hash
from federated.exchange import (
    Refused,
    SiteNumbers,
    decode_global,
    decode_update,
    encode_global,
    encode_update,
    hash_of_global,
)
from tests.helpers.tiny_networks import discriminator, generator
from training.config import AdamConfig, LossConfig
from training.state import TrainingState

NUMBERS = SiteNumbers(
    num_images=1008, num_iterations=63, images_of_class=(900, 100), augment_p=0.125, seconds=12.5,
    statistics={"Loss/G/loss": {"num": 1008, "mean": 0.75, "std": 0.1},
                "Trouble/skipped/Dreg": {"num": 4, "mean": 0.0, "std": 0.0}})


def tiny_state(seed=0, D=None, **G):
    """Return a state of 8x8 networks, with w_avg as after some training, and D of the arguments `D`."""
    mine, adam = generator(seed, **G), AdamConfig(lr=0.002)
    torch.nn.init.normal_(mine.mapping.w_avg)
    return TrainingState.from_networks(mine, discriminator(seed, **(D or {})), copy.deepcopy(mine), g_adam=adam,
                                       d_adam=adam, loss=LossConfig(gamma=1))


def agreement_of(state, **changes):
    return Agreement.of(state, **{"share": "G,D", "ema": "sites", "payload": "float32", "classes": ("nv", "mel"),
                                  "label_kind": "class", **changes})


@torch.no_grad()
def trained(state, seed, step=0.01):
    """Return a copy of a state after pretended training: every parameter and w_avg moved by about `step`."""
    state, rng = copy.deepcopy(state), torch.Generator().manual_seed(seed)
    for network in (state.G, state.D, state.G_ema):
        for parameter in network.parameters():
            parameter += step * torch.randn(parameter.shape, generator=rng)
    state.G.mapping.w_avg += step
    state.G_ema.mapping.w_avg += step
    return state


class Round:
    """Round 7 between a server and site b: the messages, and both ends of the wire."""

    def __init__(self, numbers=NUMBERS, step=0.01, **changes):
        self.server = tiny_state()
        self.agreement = agreement_of(self.server, **changes)
        self.base = local_tensors(self.server, self.agreement)
        self.constants = constants_hash(self.server)
        self.down = encode_global(self.agreement, self.base, round=7, constants_hash=self.constants)
        self.received = decode_global(self.down, self.agreement, constants_hash=self.constants, round=7)
        start = tiny_state()
        load_tensors(start, self.received.tensors)
        self.site = trained(start, seed=1, step=step)
        self.up = encode_update(self.agreement, local_tensors(self.site, self.agreement), self.received, site="b",
                                constants_hash=self.constants, numbers=numbers)

    def read_global(self, data, agreement=None, **changes):
        return decode_global(data, agreement or self.agreement,
                             **{"constants_hash": self.constants, "round": 7, **changes})

    def read_update(self, data, agreement=None, **changes):
        return decode_update(data, agreement or self.agreement, **{
            "site": "b", "round": 7, "base": self.base, "base_hash": hash_of_global(self.agreement, self.base),
            "constants_hash": self.constants, **changes})


def compact(value):
    return json.dumps(value, separators=(",", ":"))


def forged(data, change=lambda header: None, tensors=None, metadata=None):
    """Return a message whose header was changed by one who knows the protocol: its checksums are correct."""
    layout = json.loads(data[8:8 + int.from_bytes(data[:8], "little")])
    header = json.loads(layout["__metadata__"]["federated"])
    tensors = {**safetensors.torch.load(data), **(tensors or {})}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    header["tensors"] = tensors_hash(tensors)
    del header["seal"]
    change(header)
    header["seal"] = hashlib.sha256(compact(header).encode()).hexdigest()
    return safetensors.torch.save(tensors, metadata={"federated": compact(header), **(metadata or {})})


def refusal(read, *args, **kwargs):
    with pytest.raises(Refused) as caught:
        read(*args, **kwargs)
    text = str(caught.value)
    assert text.isascii()
    assert "\n" not in text
    return text
