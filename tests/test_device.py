"""Choosing the device and the number format; GPUs are pretended."""

import time

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
        monkeypatch.setattr(device, "half_speed", lambda *_: ratio)
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
    assert choose_precision("bf16", "cpu", processes=2) == Choice("bf16", "--precision=bf16")


def test_half_precision_that_is_slower_warns_with_the_ratio(speed):
    speed(0.01)
    slower = "convolutions in bf16 take 100 times as long as in fp32 on this CPU"
    assert choose_precision("bf16", "cpu") == Choice(
        "bf16", f"--precision=bf16; {slower}", f"{slower} (measured); try --precision=fp32")


def test_half_precision_that_is_faster_does_not_warn(speed):
    speed(2.0)
    assert choose_precision("fp16", "cuda") == Choice(
        "fp16", "--precision=fp16; its convolutions are 2 times as fast as fp32 here")


def test_measurement_compares_the_formats_in_bounded_time(monkeypatch):
    seconds = {torch.float32: 0.02, torch.bfloat16: 0.2}
    formats = []

    def convolve(x, w, padding):
        formats.append(x.dtype)
        time.sleep(seconds[x.dtype])

    monkeypatch.setattr(device.F, "conv2d", convolve)
    # A busy machine sleeps longer than asked, rarely by as much as a half.
    assert device.half_speed("cpu", "bf16") == pytest.approx(0.1, rel=0.5)
    assert formats.count(torch.bfloat16) == 2
    assert 2 <= formats.count(torch.float32) <= 8


def test_measurement_works_on_this_machine():
    assert 0 < device.half_speed("cpu", "bf16") < 1000
