"""Choosing the device and the number format; GPUs are pretended."""

import pytest
import torch

from training import device
from training.config import ConfigError
from training.device import Choice, choose_device, choose_precision


@pytest.fixture
def gpus(monkeypatch):
    def pretend(count):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
    return pretend


@pytest.fixture
def speed(monkeypatch):
    def pretend(ratio):
        monkeypatch.setattr(device, "half_speed", lambda *_, **__: ratio)
    return pretend


@pytest.mark.parametrize(("count", "name", "chosen"), [
    (0, "auto", Choice("cpu", "no CUDA device is available")),
    (2, "auto", Choice("cuda", "a CUDA device is available")),
    (2, "cpu", Choice("cpu", "--device=cpu")), (1, "cuda", Choice("cuda", "--device=cuda")),
    (2, "cuda:1", Choice("cuda:1", "--device=cuda:1"))])
def test_device_is_chosen_with_its_reason(count, name, chosen, gpus):
    gpus(count)
    assert choose_device(name) == chosen


@pytest.mark.parametrize(("count", "name", "processes", "message"), [
    (0, "cuda", 1, "--device is cuda, but PyTorch finds no CUDA device; expected a working GPU and driver, or "
                   "--device=cpu"),
    (0, "cuda:0", 1, "--device is cuda:0, but PyTorch finds no CUDA device; expected a working GPU and driver, or "
                     "--device=cpu"),
    (2, "tpu", 1, "--device is tpu; expected auto, cpu, cuda, or one GPU as cuda:1"),
    (2, "cpu:0", 1, "--device is cpu:0; expected auto, cpu, cuda, or one GPU as cuda:1"),
    (2, "cuda:", 1, "--device is cuda:; expected auto, cpu, cuda, or one GPU as cuda:1"),
    (2, "cuda:-1", 1, "--device is cuda:-1; expected auto, cpu, cuda, or one GPU as cuda:1"),
    (2, "", 1, "--device is ; expected auto, cpu, cuda, or one GPU as cuda:1"),
    (2, "cuda:2", 1, "--device is cuda:2; expected at most cuda:1: this machine has 2"),
    (2, "cuda:1", 2, "--device is cuda:1 with --gpus=2; expected --device=cuda: each process takes the GPU of its "
                     "number"),
    (2, "cuda", 4, "--gpus is 4; expected at most 2, the GPUs of this machine"),
    (2, "auto", 4, "--gpus is 4; expected at most 2, the GPUs of this machine")])
def test_device_that_is_not_there_is_refused(count, name, processes, message, gpus):
    gpus(count)
    with pytest.raises(ConfigError) as caught:
        choose_device(name, processes)
    assert str(caught.value) == message


def test_cuda_without_support_in_pytorch_says_so(gpus, monkeypatch):
    gpus(0)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ConfigError, match="--device is cuda, but this PyTorch is built without CUDA; expected"):
        choose_device("cuda")


@pytest.mark.parametrize(("ratio", "chosen"), [
    (0.01, Choice("fp32", "bf16 convolutions are 0.01 times as fast as fp32 on this CPU; 1.5 times would be worth "
                          "bf16")),
    (1.49, Choice("fp32", "bf16 convolutions are 1.49 times as fast as fp32 on this CPU; 1.5 times would be worth "
                          "bf16")),
    (2.1, Choice("bf16", "bf16 convolutions are 2.1 times as fast as fp32 on this CPU, and 1.5 times is worth it"))])
def test_auto_precision_on_a_cpu_follows_the_measurement(ratio, chosen, speed):
    speed(ratio)
    assert choose_precision("auto", "cpu") == chosen


def test_auto_precision_needs_no_measurement_elsewhere(monkeypatch):
    monkeypatch.setattr(device, "half_speed", None)  # calling it would fail
    assert choose_precision("auto", "cuda").name == "fp16"
    assert choose_precision("auto", "cpu", processes=2).name == "fp32"
    assert choose_precision("fp32", "cpu") == Choice("fp32", "--precision=fp32")
    assert choose_precision("bf16", "cpu", processes=2, is_main=False) == Choice("bf16", "--precision=bf16")
    assert choose_precision("fp16", "cuda", processes=2) == Choice("fp16", "--precision=fp16")


@pytest.mark.parametrize("processes", [1, 2])
def test_half_precision_that_is_slower_warns_with_the_ratio(processes, speed):
    speed(0.01)
    slower = "convolutions in bf16 take 100 times as long as in fp32 on this CPU"
    assert choose_precision("bf16", "cpu", processes) == Choice(
        "bf16", f"--precision=bf16; {slower}", f"{slower} (measured); try --precision=fp32")


def test_half_precision_that_is_faster_does_not_warn(speed):
    speed(2.0)
    assert choose_precision("fp16", "cuda") == Choice(
        "fp16", "--precision=fp16; its convolutions are 2 times as fast as fp32 here")


class Rates:
    """Lets half precision compute at given rates, relative to fp32, forward and with gradients; notes what was run."""

    def __init__(self, monkeypatch, forward, training):
        self.now, self.runs = 0.0, []
        seconds = {"forward": 1 / forward, "forward_and_backward": 1 / training}
        for kind, slow in seconds.items():
            monkeypatch.setattr(device._Convolution, kind, self._run(kind, slow))
        monkeypatch.setattr(device.time, "perf_counter", lambda: self.now)

    def _run(self, kind, slow):
        def run(convolution):
            is_half, is_nhwc = (convolution._w.dtype != torch.float32,
                                not convolution._w.is_contiguous())
            self.now += 0.002 * (slow if is_half else 1)
            self.runs.append((kind, is_half, is_nhwc))
        return run


def test_measurement_stops_at_a_format_that_is_hopeless(monkeypatch):
    rates = Rates(monkeypatch, forward=1 / 125, training=2)
    assert device.half_speed("cpu", "bf16") == pytest.approx(1 / 125)
    assert rates.runs.count(("forward", True, False)) == 2  # of a quarter of a second each
    assert rates.runs.count(("forward", False, False)) >= 20
    assert len(rates.runs) < 40
    assert rates.now < 0.6


@pytest.mark.parametrize("training", [0.7, 1.6])
def test_measurement_is_decided_by_a_pass_as_in_training(training, monkeypatch):
    rates = Rates(monkeypatch, forward=3, training=training)
    assert device.half_speed("cpu", "bf16") == pytest.approx(training)
    assert rates.now < 0.8
    chosen = choose_precision("auto", "cpu")
    assert (chosen.name, f"{training} times as fast" in chosen.reason) == ("bf16" if training > 1.5 else "fp32", True)


@pytest.mark.parametrize("name", ["auto", "bf16"])
def test_measurement_has_the_layout_that_is_asked_for(name, monkeypatch):
    rates = Rates(monkeypatch, forward=3, training=2)
    assert choose_precision(name, "cpu", nhwc=True).name == "bf16"
    assert {(is_half, is_nhwc) for _, is_half, is_nhwc in rates.runs} == {(False, False), (True, True)}


def test_measurement_takes_turns_and_the_fastest_run(monkeypatch):
    now, order = [0.0], []
    durations = {"a": iter([9.0, 0.02, 0.05, 0.04] + [0.05] * 9), "b": iter([7.0, 0.2, 0.1, 0.3] + [0.3] * 9)}

    def run(name):
        order.append(name)
        now[0] += next(durations[name])

    monkeypatch.setattr(device.time, "perf_counter", lambda: now[0])
    assert device._compare(lambda: run("a"), lambda: run("b")) == pytest.approx(0.02 / 0.2)
    assert order == ["a", "b", "a", "a", "b"]  # 0.02 seconds are less than a turn


def test_measurement_works_on_this_machine():
    assert 0 < device.half_speed("cpu", "bf16") < 1000


@pytest.mark.parametrize("nhwc", [False, True])
def test_measured_convolutions_are_those_of_a_layer(nhwc):
    made = device._Convolution("cpu", torch.bfloat16, device._LARGE, nhwc=nhwc)
    layout = torch.channels_last if nhwc else torch.contiguous_format
    assert (made._x.shape, made._w.shape) == ((4, 256, 16, 16), (256, 256, 3, 3))
    assert made._x.is_contiguous(memory_format=layout)
    assert made._w.is_contiguous(memory_format=layout)
    assert made._w.dtype == torch.bfloat16
