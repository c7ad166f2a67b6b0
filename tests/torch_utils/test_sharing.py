"""torch_utils.device: the device of a program, and the allocator of the processes that work on a CPU."""

import pytest
import torch

import calc_metrics
import generate
import projector
from dnnlib.cli import run
from torch_utils import device
from torch_utils.device import Tuning, settle_device
from torch_utils.distributed import Place
from training.config import ConfigError

FOREIGN = Tuning(is_done=False, reason="MALLOC_ARENA_MAX is set", is_foreign=True)


@pytest.fixture
def tuning(monkeypatch):
    """The wishes that reach the allocator, which another one has taken the place of; this machine has no GPU."""
    wishes = []
    monkeypatch.setattr(device, "tune_malloc", lambda wanted: wishes.append(wanted) or FOREIGN)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return wishes


def test_allocator_of_another_is_said_in_one_line(tuning, capsys):
    assert settle_device("auto", Place(), 1, tunes_malloc=True) == "cpu"
    assert tuning == [True]
    assert capsys.readouterr() == ("", "memory: the allocator is left as it is (MALLOC_ARENA_MAX is set)\n")


@pytest.mark.parametrize("found", [Tuning(is_done=True, reason="mallopt"), Tuning(is_done=False, reason="as asked")])
def test_allocator_as_it_was_asked_for_is_not_spoken_of(found, tuning, monkeypatch, capsys):
    monkeypatch.setattr(device, "tune_malloc", lambda wanted: found)
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
    with pytest.raises(ConfigError, match="--gpus is 4; expected at most 2, the GPUs of this machine"):
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
