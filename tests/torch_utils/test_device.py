"""Choosing the device and the number format; GPUs are pretended."""

import pytest
import torch

from torch_utils.device import Choice, choose_device, choose_precision
from training.config import ConfigError


@pytest.fixture
def gpus(monkeypatch):
    def pretend(count):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
    return pretend


@pytest.fixture
def cpu(monkeypatch):
    def pretend(*instructions):
        found = {"avx2": True, "f16c": True, "avx512_bf16": False, "amx_bf16": False, "avx512_fp16": False,
                 "amx_fp16": False, "l2_cache_size": 1048576, **dict.fromkeys(instructions, True)}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
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


@pytest.mark.parametrize("instructions", [[], ["avx512_bf16"], ["amx_bf16", "amx_fp16"]])
@pytest.mark.parametrize(("device", "chosen"), [
    ("cpu", Choice("fp32", "the standard on a CPU")),
    ("cuda", Choice("fp16", "the highest resolutions in fp16 are the standard on a GPU")),
    ("cuda:1", Choice("fp16", "the highest resolutions in fp16 are the standard on a GPU"))])
def test_auto_precision_follows_a_rule_whatever_the_cpu(device, chosen, instructions, cpu):
    cpu(*instructions)
    assert choose_precision("auto", device) == chosen


@pytest.mark.parametrize("name", ["fp32", "fp16", "bf16"])
def test_auto_precision_of_a_run_that_goes_on_is_that_of_its_record(name, cpu):
    cpu("avx512_bf16", "avx512_fp16")
    for device, usual in (("cpu", "fp32"), ("cuda", "fp16")):
        found = choose_precision("auto", device, recorded=name)
        assert found == (choose_precision("auto", device) if name == usual else
                         Choice(name, "chosen when the run began"))
        assert choose_precision("fp32", device, recorded=name) == Choice("fp32", "--precision=fp32")


@pytest.mark.parametrize(("name", "instructions", "missing"), [
    ("bf16", [], "AVX512-BF16 nor AMX-BF16"), ("bf16", ["amx_fp16"], "AVX512-BF16 nor AMX-BF16"),
    ("bf16", ["avx512_bf16"], None), ("bf16", ["amx_bf16"], None),
    ("fp16", ["avx512_bf16"], "AVX512-FP16 nor AMX-FP16"), ("fp16", ["avx512_fp16"], None), ("fp32", [], None)])
def test_precision_that_a_cpu_has_no_instructions_for_warns(name, instructions, missing, cpu):
    cpu(*instructions)
    warning = None if missing is None else (
        f"warning: {name} may be many times slower than fp32 on this CPU, which has neither {missing}; a new run is "
        "faster with --precision=fp32")
    assert choose_precision(name, "cpu") == Choice(name, f"--precision={name}", warning)
    assert choose_precision("auto", "cpu", recorded=name).warning == warning
    assert choose_precision(name, "cuda").warning is None


def test_capabilities_of_this_cpu_are_named_as_expected():
    """torch renames them rarely; where it does, nobody would be warned, or all."""
    names = torch.cpu.get_capabilities()
    if names["architecture"] == "x86_64":
        assert {"avx512_bf16", "amx_bf16", "avx512_fp16", "amx_fp16"} <= names.keys()
