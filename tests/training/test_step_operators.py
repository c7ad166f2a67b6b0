"""A training step synchronizes with its device only in documented places.

A device works asynchronously. Reading a value from it waits until all its work is done, and then the device waits for
new work. These tests run whole iterations and find every such read. They need no device: "meta" tensors have no values,
so that every read is detected, and gets an invented value.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.bench import bench_train
from tests.helpers.small_networks import ada_config, small_config, small_discriminator, small_generator, small_inputs
from training import phases
from training.augment import AugmentPipe
from training.config import AdamConfig
from training.phases import PhaseInputs, StepInputs
from training.state import TrainingState
from training.step import train_step

ROOT = Path(__file__).resolve().parents[2]
aten = torch.ops.aten
# Operators that wait: their result is a number of the program, or has a size that depends on values.
WAITING = {aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.allclose, aten.nonzero, aten.masked_select,
           aten.unique_dim, aten._unique2, aten.unique_consecutive, aten.repeat_interleave, aten.bincount,
           aten._assert_async}
BGC = dict.fromkeys(["xflip", "rotate90", "xint", "scale", "rotate", "aniso", "xfrac", "brightness", "contrast",
                     "lumaflip", "hue", "saturation"], 1.0)
EVERYTHING = {**BGC, "imgfilter": 1, "noise": 1, "cutout": 1}

# Where an iteration waits: place -> why.
DOCUMENTED = {
    "training/step.py:_name_non_finite": "once, at the end: were all gradients finite",
    "training/ada.py:adapt_augmentation": "every few iterations: the mean sign, to move p",
}


class Readings(TorchDispatchMode):
    """Context manager that counts reads of values from the device, by place in the project's code."""

    def __init__(self, device):
        super().__init__()
        self.device = device
        self.places = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket
        # Part of torch.tensor(...), which on a device copies and waits. torch.from_numpy(...) has it too, on the host.
        made = name == aten.lift_fresh and self.device != "cpu" and on(args[0], self.device)
        if made or waits(name, args, kwargs, self.device):
            self.places[place()] += 1
            if self.device == "meta" and name in (aten._local_scalar_dense, aten._to_copy) and on(args[0], "meta"):
                return 1.0 if name == aten._local_scalar_dense else torch.ones(args[0].shape)
        return func(*args, **kwargs)


def waits(name, args, kwargs, device):
    """Tell whether an operator with these arguments synchronizes with the device."""
    if name == aten._to_copy:
        return copy_waits(args[0].device, kwargs.get("device", args[0].device), kwargs.get("non_blocking"), device)
    if name == aten.copy_:
        return copy_waits(args[1].device, args[0].device, args[2:] == (True,) or kwargs.get("non_blocking"), device)
    tensors = [value for value in tree_leaves((args, kwargs)) if on(value, device)]
    masked = name == aten.index and any(value.dtype in (torch.bool, torch.uint8) for value in tensors[1:])
    return bool(tensors) and (name in WAITING or masked)


def copy_waits(source, target, non_blocking, device):
    """A copy to the device can return at once; a copy from it is made for its values."""
    arrives = target.type == device
    return source.type != target.type and not (arrives and non_blocking)


def on(value, device):
    return isinstance(value, torch.Tensor) and value.device.type == device


def place():
    """Return the innermost running function of the project, as "file:function"."""
    frame = sys._getframe(2)
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(ROOT) and file.relative_to(ROOT).parts[0] in ("training", "torch_utils"):
            return f"{file.relative_to(ROOT)}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"


def start(device, strengths, **loss):
    config = small_config(batch=4, micro_batch=2, ada=ada_config(interval=4), **loss)
    pipe = AugmentPipe(**strengths).to(device)
    pipe.p.fill_(0.5)
    G, D, G_ema = (network.to(device) for network in (small_generator(), small_discriminator(), small_generator()))
    state = TrainingState.from_networks(G, D, G_ema, g_adam=AdamConfig(lr=0.002), d_adam=AdamConfig(lr=0.002),
                                        loss=config.loss, augment_pipe=pipe)
    return state, config


def inputs_on(device, state, config):
    """Draw an iteration's inputs, on the device."""
    inputs = small_inputs(state, config)
    phases = {name: PhaseInputs(**{key: value.to(device) if isinstance(value, torch.Tensor) else value
                                   for key, value in vars(phase).items()}) for name, phase in inputs.phases.items()}
    return StepInputs(reals=inputs.reals.to(device), labels=inputs.labels.to(device), phases=phases)


@pytest.fixture
def meta(monkeypatch):
    """Let a step run on "meta", which has no generators and no fused Adam."""
    monkeypatch.setattr(phases, "generator_for", lambda seed, device="cpu": (
        None if torch.device(device).type == "meta" else torch.Generator().manual_seed(seed)))
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: None)


@pytest.mark.parametrize("strengths", [BGC, EVERYTHING], ids=["bgc", "everything"])
def test_step_reads_values_of_its_device_where_documented_alone(strengths, meta):
    state, config = start("meta", strengths, g_reg_interval=2, d_reg_interval=4)
    found = []
    for _ in range(4):
        inputs = inputs_on("meta", state, config)
        with Readings("meta") as readings:
            result = train_step(state, inputs, config)
        assert not result.skipped
        found.append(dict(readings.places))
    finite, adapt = DOCUMENTED
    assert found == [{finite: 1}, {finite: 1}, {finite: 1}, {finite: 1, adapt: 1}]


def test_step_on_the_host_has_no_other_operators_that_wait():
    state, config = start("cpu", BGC, g_reg_interval=2, d_reg_interval=4)
    inputs = inputs_on("cpu", state, config)
    with Readings("cpu") as readings:
        train_step(state, inputs, config)
    # p is always on the host. 2 micro-batches: Gmain 1, Dmain 2, Dreg 1 of each.
    assert readings.places == {"training/step.py:_name_non_finite": 1, "training/augment.py:_augment": 8}


def test_readings_sees_what_it_is_for():
    values = torch.ones(3, device="meta")
    with Readings("meta") as readings:
        values.sum().item()
        values.cpu()
        torch.zeros(3).to("meta")
        torch.zeros(3).to("meta", non_blocking=True)
    assert readings.places == {"elsewhere": 3}


def test_step_takes_few_operators_for_what_every_parameter_needs():
    # Optimizer, moving average and the check of the gradients handle all parameters at once, so that a deeper network
    # has more operators for its layers alone.
    state, config = start("cpu", {}, pl_weight=0, gamma=0)
    inputs = inputs_on("cpu", state, config)
    train_step(state, inputs, config)
    seen = Counter()

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen[func.overloadpacket] += 1
            return func(*args, **(kwargs or {}))

    with Names():
        train_step(state, inputs, config)
    assert {name: seen[getattr(aten, name)] for name in ("_fused_adam_", "_foreach_norm", "_foreach_lerp_",
                                                         "_foreach_copy_")} == \
        {"_fused_adam_": 2, "_foreach_norm": 2, "_foreach_lerp_": 1, "_foreach_copy_": 1}


@pytest.mark.slow
def test_iteration_takes_half_the_operators_of_the_original():
    config = bench_train.configure(argparse.Namespace(cfg="auto", batch=None), resolution=32)
    total = 0
    cycle = bench_train.cycle(config)
    for kind, iterate in bench_train.build_iterations(config, images=1, device="cpu").items():
        iterate()  # to make the optimizers' state
        total += cycle[kind] * bench_train.count(iterate).operators
    assert total / cycle.total() <= 4223 / 2  # the original's, on average of the same iterations
