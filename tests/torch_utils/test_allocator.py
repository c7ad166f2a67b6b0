"""torch_utils.device: what it changes, seen in page faults, and what makes it leave the allocator alone."""

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.helpers.generator_files import save_generator
from torch_utils import device
from torch_utils.device import Tuning, tune_malloc

ROOT = Path(__file__).parent.parent.parent
PAGES = 64 * 2**20 // os.sysconf("SC_PAGE_SIZE")  # of a tensor
TUNED = "memory: freed memory is kept for reuse (mallopt; --tune-malloc=false leaves it)"
VARIABLES = ("GLIBC_TUNABLES", "THP_MEM_ALLOC_ENABLE", "LD_PRELOAD")
needs_glibc = pytest.mark.skipif(sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"),
                                 reason="only Linux with glibc has what is tested")


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch):
    """Settings of whoever runs the tests say nothing here."""
    for name in [*VARIABLES, *(name for name in os.environ if name.startswith("MALLOC_"))]:
        monkeypatch.delenv(name, raising=False)


def measure(wanted, **environment):
    """Return of a program of its own: the note, page faults of making a large tensor again, and its sha256."""
    code = f"""
import hashlib, json, resource
from torch_utils.device import tune_malloc
note = tune_malloc({wanted}).note
import torch
torch.set_num_threads(1)
x = torch.linspace(-1, 1, 2**24)
for _ in range(12):
    y = None
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    y = x.mul(3).add(1)
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(json.dumps([note, faults, hashlib.sha256(y.numpy()).hexdigest()]))
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
    assert (note, faults >= 2 * PAGES) == ("memory: the allocator is left as it is (--tune-malloc=false)", True)
    assert digest == same


@needs_glibc
def test_allocator_with_settings_of_the_user_behaves_as_these_say():
    note, faults, _ = measure(True, MALLOC_MMAP_THRESHOLD_="100000")
    assert (note, faults >= 2 * PAGES) == (
        "memory: the allocator is left as it is (MALLOC_MMAP_THRESHOLD_ is set)", True)


@pytest.mark.parametrize(("name", "value", "reason"), [
    ("MALLOC_ARENA_MAX", "4", "MALLOC_ARENA_MAX is set"), ("MALLOC_CONF", "narenas:1", "MALLOC_CONF is set"),
    ("GLIBC_TUNABLES", "glibc.cpu.x86_ibt=on:glibc.malloc.hugetlb=1", "GLIBC_TUNABLES sets glibc.malloc"),
    ("THP_MEM_ALLOC_ENABLE", "1", "THP_MEM_ALLOC_ENABLE is set"),
    ("LD_PRELOAD", "/usr/lib/libgomp.so.1 /usr/lib/libjemalloc.so.2", "LD_PRELOAD names libjemalloc.so.2"),
    ("LD_PRELOAD", "libtcmalloc_minimal.so.4:libiomp5.so", "LD_PRELOAD names libtcmalloc_minimal.so.4")])
def test_settings_of_the_user_are_left_alone(name, value, reason, monkeypatch):
    monkeypatch.setattr(device.ctypes, "CDLL", None)  # calling it would fail
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
    monkeypatch.setattr(device.sys, "platform", platform)
    monkeypatch.setattr(device.ctypes, "CDLL", lambda name: found)
    return calls


@pytest.mark.parametrize("platform", ["darwin", "win32", "linux"])
def test_other_c_libraries_are_left_alone_in_silence(platform, monkeypatch):
    pretend(monkeypatch, platform)  # on Linux this is musl
    found = tune_malloc(True)
    assert found.note == "memory: the allocator is left as it is (only that of Linux with glibc is tuned)"
    assert not found.is_foreign


def test_allocator_that_refuses_is_said(monkeypatch):
    calls = pretend(monkeypatch, "linux", works=0)
    found = tune_malloc(True)
    assert (found.note, found.is_foreign) == ("memory: the allocator is left as it is (mallopt refused)", True)
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
