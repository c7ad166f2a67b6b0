"""torch_utils.device: device and precision, the allocator, and the meaning of errors."""

import ctypes
import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import calc_metrics
import generate
import projector
from dnnlib.cli import UserError, run
from dnnlib.typed_config import ConfigError
from tests.helpers.generator_files import save_generator
from torch_utils.device import (
    DeviceChoice,
    PrecisionChoice,
    Tuning,
    choose_device,
    choose_precision,
    ran_out_of_memory,
    settle_device,
    tune_malloc,
)
from torch_utils.distributed import Place

FOREIGN = Tuning(is_done=False, reason="MALLOC_ARENA_MAX is set", is_foreign=True)
ROOT = Path(__file__).parent.parent.parent
PAGES = 64 * 2**20 // os.sysconf("SC_PAGE_SIZE")  # of a tensor
TUNED = "memory: freed memory is kept for reuse (mallopt; disable with --tune-malloc=false)"
VARIABLES = ("GLIBC_TUNABLES", "THP_MEM_ALLOC_ENABLE", "LD_PRELOAD")
needs_glibc = pytest.mark.skipif(sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"),
                                 reason="only Linux with glibc has what is tested")
KILLED = "DataLoader worker (pid 7) is killed by signal: Killed. "


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
    (0, "auto", DeviceChoice("cpu", "no CUDA device is available")),
    (2, "auto", DeviceChoice("cuda", "a CUDA device is available")),
    (2, "cpu", DeviceChoice("cpu", "--device=cpu")), (1, "cuda", DeviceChoice("cuda", "--device=cuda")),
    (2, "cuda:1", DeviceChoice("cuda:1", "--device=cuda:1"))])
def test_device_is_chosen_with_its_reason(count, name, chosen, gpus):
    gpus(count)
    assert choose_device(name) == chosen


@pytest.mark.parametrize(("count", "name", "processes", "message"), [
    (0, "cuda", 1, "--device is cuda, but PyTorch finds no CUDA device; expected a working GPU and driver, or "
                   "--device=cpu"),
    (0, "cuda:0", 1, "--device is cuda:0, but PyTorch finds no CUDA device; expected a working GPU and driver, or "
                     "--device=cpu"),
    (2, "tpu", 1, "--device is tpu; expected auto, cpu, cuda, or a single GPU such as cuda:1"),
    (2, "cpu:0", 1, "--device is cpu:0; expected auto, cpu, cuda, or a single GPU such as cuda:1"),
    (2, "cuda:", 1, "--device is cuda:; expected auto, cpu, cuda, or a single GPU such as cuda:1"),
    (2, "cuda:-1", 1, "--device is cuda:-1; expected auto, cpu, cuda, or a single GPU such as cuda:1"),
    (2, "", 1, "--device is ; expected auto, cpu, cuda, or a single GPU such as cuda:1"),
    (2, "cuda:2", 1, "--device is cuda:2; expected at most cuda:1: this machine has 2 GPUs"),
    (2, "cuda:1", 2, "--device is cuda:1 with --gpus=2; expected --device=cuda: each process uses a GPU of its "
                     "own"),
    (2, "cuda", 4, "--gpus is 4; expected at most 2, the number of GPUs of this machine"),
    (2, "auto", 4, "--gpus is 4; expected at most 2, the number of GPUs of this machine")])
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
    ("cpu", PrecisionChoice("fp32", "the default on a CPU", None)),
    ("cuda", PrecisionChoice("fp16", "fp16 at the highest resolutions is the default on a GPU", None)),
    ("cuda:1", PrecisionChoice("fp16", "fp16 at the highest resolutions is the default on a GPU", None))])
def test_auto_precision_follows_a_rule_whatever_the_cpu(device, chosen, instructions, cpu):
    cpu(*instructions)
    assert choose_precision("auto", device) == chosen


@pytest.mark.parametrize("name", ["fp32", "fp16", "bf16"])
def test_auto_precision_of_a_run_that_goes_on_is_that_of_its_record(name, cpu):
    cpu("avx512_bf16", "avx512_fp16")
    for device, usual in (("cpu", "fp32"), ("cuda", "fp16")):
        found = choose_precision("auto", device, recorded=name)
        assert found == (choose_precision("auto", device) if name == usual else
                         PrecisionChoice(name, "chosen when the run was started", None))
        assert choose_precision("fp32", device, recorded=name) == PrecisionChoice("fp32", "--precision=fp32", None)


@pytest.mark.parametrize(("name", "instructions", "missing"), [
    ("bf16", [], "AVX512-BF16 nor AMX-BF16"), ("bf16", ["amx_fp16"], "AVX512-BF16 nor AMX-BF16"),
    ("bf16", ["avx512_bf16"], None), ("bf16", ["amx_bf16"], None),
    ("fp16", ["avx512_bf16"], "AVX512-FP16 nor AMX-FP16"), ("fp16", ["avx512_fp16"], None), ("fp32", [], None)])
def test_precision_that_a_cpu_has_no_instructions_for_warns(name, instructions, missing, cpu):
    cpu(*instructions)
    warning = None if missing is None else (
        f"warning: {name} may be many times slower than fp32 on this CPU, which has neither {missing}; a new run is "
        "faster with --precision=fp32")
    assert choose_precision(name, "cpu") == PrecisionChoice(name, f"--precision={name}", warning)
    assert choose_precision("auto", "cpu", recorded=name).warning == warning
    assert choose_precision(name, "cuda").warning is None


def test_capabilities_of_this_cpu_are_named_as_expected():
    """torch renames these rarely; if it did, nobody would be warned, or everybody."""
    names = torch.cpu.get_capabilities()
    if names["architecture"] == "x86_64":
        assert {"avx512_bf16", "amx_bf16", "avx512_fp16", "amx_fp16"} <= names.keys()


# Processes that share a machine


@pytest.fixture
def tuning(monkeypatch):
    """Return the calls to a fake allocator; pretend that this machine has no GPU."""
    wishes = []
    monkeypatch.setattr("torch_utils.device.tune_malloc", lambda wanted: wishes.append(wanted) or FOREIGN)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return wishes


def test_allocator_of_another_is_said_in_one_line(tuning, capsys):
    assert settle_device("auto", Place(), 1, tunes_malloc=True) == "cpu"
    assert tuning == [True]
    assert capsys.readouterr() == ("", "memory: the allocator is not tuned (MALLOC_ARENA_MAX is set)\n")


@pytest.mark.parametrize("found", [Tuning(is_done=True, reason="mallopt"), Tuning(is_done=False, reason="as asked")])
def test_allocator_as_it_was_asked_for_is_not_spoken_of(found, tuning, monkeypatch, capsys):
    monkeypatch.setattr("torch_utils.device.tune_malloc", lambda wanted: found)
    settle_device("cpu", Place(), 1, tunes_malloc=True)
    assert capsys.readouterr() == ("", "")


def test_process_that_starts_others_leaves_its_allocator_alone(tuning, monkeypatch, capsys):
    assert settle_device("cpu", Place(), 2, tunes_malloc=True) == "cpu"
    assert tuning == []
    assert settle_device("cpu", Place(rank=1, count=2, is_started=True), 2, tunes_malloc=True) == "cpu"
    assert tuning == [True]
    assert capsys.readouterr() == ("", "")  # the first process speaks


def test_allocator_matters_on_a_cpu_alone(tuning, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert settle_device("auto", Place(), 2, tunes_malloc=True) == "cuda"
    assert tuning == []
    # Started processes look at the GPUs of their own machine.
    assert settle_device("cuda", Place(count=4, local_count=2, is_started=True), 4, tunes_malloc=True) == "cuda"
    with pytest.raises(ConfigError, match="--gpus is 4; expected at most 2, the number of GPUs of this machine"):
        settle_device("cuda", Place(), 4, tunes_malloc=True)


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("program", [generate, projector, calc_metrics], ids=lambda module: module.__name__)
def test_programs_have_the_flag(program, wanted, tuning, tmp_path, capsys):
    data = [] if program is generate else ["--data=gone.zip"]
    where = ["--metrics=kid5_full"] if program is calc_metrics else [f"--outdir={tmp_path / 'out'}"]
    more = ["--seeds=0"] if program is generate else []
    flags = [] if wanted else ["--tune-malloc=0"]  # by default it is wanted
    network = tmp_path / "odd.safetensors"
    network.write_text("no network")
    assert run(program.main, [f"--network={network}", *data, *where, *more, *flags]) == 2
    assert tuning == [wanted]
    assert capsys.readouterr().err.startswith(FOREIGN.note + "\nerror: --network")


# The allocator, seen in page faults, and what makes it be left alone


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch):
    """Ignore the settings of the user who runs the tests."""
    for name in [*VARIABLES, *(name for name in os.environ if name.startswith("MALLOC_"))]:
        monkeypatch.delenv(name, raising=False)


def measure(wanted, **environment):
    """Run a separate program; return the note, the page faults of allocating a large tensor again, and its sha256."""
    code = f"""
import hashlib, json, resource, statistics
from torch_utils.device import tune_malloc
note = tune_malloc({wanted}).note
import torch
torch.set_num_threads(1)
x = torch.linspace(-1, 1, 2**24)
faults = []  # the median counts: now and then something small comes to lie where the tensor lay
for _ in range(12):
    y = None
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    y = x.mul(3).add(1)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(json.dumps([note, statistics.median(faults), hashlib.sha256(y.numpy()).hexdigest()]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **environment},
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@needs_glibc
def test_tuned_allocator_has_a_freed_tensors_memory_at_hand_and_changes_no_value():
    note, faults, digest = measure(True)
    assert (note, faults < PAGES // 100) == (TUNED, True)
    note, faults, same = measure(False)
    assert (note, faults >= 2 * PAGES) == ("memory: the allocator is not tuned (--tune-malloc=false)", True)
    assert digest == same


@needs_glibc
def test_allocator_with_settings_of_the_user_behaves_as_these_say():
    note, faults, _ = measure(True, MALLOC_MMAP_THRESHOLD_="100000")
    assert (note, faults >= 2 * PAGES) == (
        "memory: the allocator is not tuned (MALLOC_MMAP_THRESHOLD_ is set)", True)


@pytest.mark.parametrize(("name", "value", "reason"), [
    ("MALLOC_ARENA_MAX", "4", "MALLOC_ARENA_MAX is set"), ("MALLOC_CONF", "narenas:1", "MALLOC_CONF is set"),
    ("GLIBC_TUNABLES", "glibc.cpu.x86_ibt=on:glibc.malloc.hugetlb=1", "GLIBC_TUNABLES sets glibc.malloc"),
    ("THP_MEM_ALLOC_ENABLE", "1", "THP_MEM_ALLOC_ENABLE is set"),
    ("LD_PRELOAD", "/usr/lib/libgomp.so.1 /usr/lib/libjemalloc.so.2", "LD_PRELOAD names libjemalloc.so.2"),
    ("LD_PRELOAD", "libtcmalloc_minimal.so.4:libiomp5.so", "LD_PRELOAD names libtcmalloc_minimal.so.4")])
def test_settings_of_the_user_are_left_alone(name, value, reason, monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", None)  # calling it would fail
    monkeypatch.setenv(name, value)
    assert tune_malloc(True) == Tuning(is_done=False, reason=reason, is_foreign=True)
    assert tune_malloc(False) == Tuning(is_done=False, reason="--tune-malloc=false")


@pytest.mark.parametrize(("name", "value"), [
    ("MALLOC_ARENA_MAX", ""), ("GLIBC_TUNABLES", "glibc.cpu.x86_ibt=on"), ("THP_MEM_ALLOC_ENABLE", "0"),
    ("LD_PRELOAD", "/opt/malloc/libiomp5.so"), ("PYTHONMALLOC", "malloc")])
def test_settings_of_other_things_do_not_matter(name, value, monkeypatch):
    calls = pretend(monkeypatch, "linux", works=1)
    monkeypatch.setenv(name, value)
    assert tune_malloc(True).note == TUNED
    assert calls == [(-4, 0), (-1, -1)]  # M_MMAP_MAX, M_TRIM_THRESHOLD


def pretend(monkeypatch, platform, **library):
    """Pretend a platform and its C library; return the list of calls of mallopt."""
    calls = []

    def mallopt(name, value):
        calls.append((name, value))
        return library["works"]

    found = SimpleNamespace(**({"mallopt": mallopt, "gnu_get_libc_version": None} if library else {}))
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: found)
    return calls


@pytest.mark.parametrize("platform", ["darwin", "win32", "linux"])
def test_other_c_libraries_are_left_alone_in_silence(platform, monkeypatch):
    pretend(monkeypatch, platform)  # on Linux this is musl
    found = tune_malloc(True)
    assert found.note == "memory: the allocator is not tuned (only glibc on Linux is supported)"
    assert not found.is_foreign


def test_allocator_that_refuses_is_said(monkeypatch):
    calls = pretend(monkeypatch, "linux", works=0)
    found = tune_malloc(True)
    assert (found.note, found.is_foreign) == ("memory: the allocator is not tuned (mallopt failed)", True)
    assert calls == [(-4, 0)]


@pytest.mark.slow
@needs_glibc
def test_generated_files_are_the_same_with_and_without(tmp_path):
    network = save_generator(tmp_path / "net.safetensors", {}, c_dim=0)
    found = {}
    for tuned in ("true", "false"):
        folder = tmp_path / tuned
        done = subprocess.run([sys.executable, ROOT / "generate.py", f"--network={network}", "--seeds=0-7", "--batch=8",
                               f"--outdir={folder}", "--device=cpu", f"--tune-malloc={tuned}"], capture_output=True,
                              text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        found[tuned] = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len(found["true"]) == 8
    assert found["true"] == found["false"]


# What errors mean


@pytest.mark.parametrize(("error", "expected"), [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
    (MemoryError(), True),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried "
                  "to allocate 8 bytes. Error code 12 (Cannot allocate memory)"), True),
    (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."), True),
    (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
    (RuntimeError("CUDA error: out of memory"), True),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
    (RuntimeError(KILLED), True),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Segmentation fault. "), False),
    (OSError(errno.ENOSPC, "No space left on device"), False),
    (RuntimeError("shape '[4]' is invalid for input of size 3"), False),
    (ValueError("out of memory"), False)])
def test_out_of_memory_is_recognized_whoever_says_it(error, expected):
    assert ran_out_of_memory(error) == expected


def test_out_of_memory_of_this_cpu_is_recognized():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert ran_out_of_memory(caught.value)


def test_more_processes_than_a_cpu_can_use_are_refused(monkeypatch):
    monkeypatch.setattr("torch_utils.device.usable_cores", lambda: 4)
    assert settle_device("cpu", Place(), 16, tunes_malloc=False) == "cpu"
    with pytest.raises(UserError) as caught:
        settle_device("cpu", Place(), 17, tunes_malloc=False)
    assert str(caught.value) == (
        "--gpus is 17, on a CPU with 4 cores; expected at most 16 processes: more only fill the memory")
