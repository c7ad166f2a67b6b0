"""Several processes: they compute what one computes, and end together."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dnnlib.cli import UserError
from tests.helpers import process_programs
from tests.helpers.make_sets import make_set
from tests.helpers.small_networks import small_config, small_inputs, small_state
from torch_utils import distributed
from torch_utils.distributed import Place, Processes
from training.step import train_step

ROOT = Path(__file__).parent.parent.parent
ALONE = Processes(rank=0, count=1, device=torch.device("cpu"))
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
             "TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT")


def start(count, programs, folder, *arguments):
    """Start processes as torchrun does, but without its supervision."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    place = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    environment |= {name: str(value) for name, value in place.items()}
    command = [sys.executable, "-m", "tests.helpers.process_programs", programs, str(folder), *map(str, arguments)]
    return [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                             env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(count)]


def finish(processes, timeout=60):
    """Return (exit code, standard output, standard error) of each; fail when one does not end."""
    try:
        return [(process.wait(timeout), *process.communicate()) for process in processes]
    finally:
        for process in processes:
            process.kill()


def differences(found, expected, path=""):
    """Yield (name, largest difference relative to the largest value) of every number in nested dicts."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name in expected:
            yield from differences(found[name], expected[name], f"{path}/{name}")
    else:
        found, expected = (torch.as_tensor(value).double() for value in (found, expected))
        assert found.shape == expected.shape
        scale = expected.abs().max().clamp(min=1e-300) if expected.numel() else torch.ones([])
        yield path, ((found - expected).abs().max() / scale).item() if expected.numel() else 0.0


def run_together(names, folder):
    """Let two processes run programs that end well; return program -> [result of each]."""
    assert finish(start(2, "+".join(names), folder), timeout=120) == [(0, "", "")] * 2
    return {name: [torch.load(folder / f"{name}-{rank}of2.pt") for rank in range(2)] for name in names}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    make_set(folder / "images.zip", 7, labels=[0, 1, 2, 0, 1, 2, 0])
    return run_together(["train_augmented", "train_with_bad_values", "read_images", "add_up", "talk"], folder)


def check_states(found, alone, tolerance):
    first, second = found
    assert set(dict(differences(first, second)).values()) == {0.0}  # bit for bit
    assert max(differences(first, alone), key=lambda item: item[1])[1] < tolerance


@pytest.mark.slow
def test_two_processes_train_the_golden_networks_as_one_that_accumulates(tmp_path):
    # 5 iterations of the golden run's networks in float64; sums in another order are all that differs.
    found = run_together(["train_golden"], tmp_path)["train_golden"]
    check_states(found, process_programs.train_golden(ALONE), 1e-9)


def test_two_processes_augment_and_adapt_as_one(results):
    found, alone = results["train_augmented"], process_programs.train_augmented(ALONE)
    assert found[0]["augment"]["p"] == alone["augment"]["p"] != 0.5
    assert found[0]["ada_signs"].tolist() == alone["ada_signs"].tolist() != [0, 0]
    check_states(found, alone, 1e-9)


def test_two_processes_see_the_images_of_one(results, tmp_path, monkeypatch):
    make_set(tmp_path / "images.zip", 7, labels=[0, 1, 2, 0, 1, 2, 0])
    monkeypatch.setattr(sys, "argv", ["", "", str(tmp_path)])
    alone = process_programs.read_images(ALONE)
    for name in ("pixels", "labels"):
        for iteration in range(5):
            joined = torch.cat([found[name][iteration] for found in results["read_images"]])
            assert torch.equal(joined, alone[name][iteration])


def test_bad_values_in_one_process_skip_the_step_in_all(results):
    first, second = results["train_with_bad_values"]
    assert first["skipped"] == second["skipped"]
    assert [set(skipped) for skipped in first["skipped"]] == [{"Gmain", "Dmain", "Dreg"}, set()]
    assert set(dict(differences(first["state"], second["state"])).values()) == {0.0}
    values = [first["state"][name] for name in ("G", "D", "G_ema", "g_adam", "d_adam", "ada_signs", "pl_mean")]
    assert all(torch.isfinite(torch.as_tensor(value)).all() for value in leaves(values))


def leaves(values):
    for value in values.values() if isinstance(values, dict) else values:
        if isinstance(value, dict):
            yield from leaves(value)
        else:
            yield value


def test_sum_equals_a_plain_sum_whatever_the_buckets(results):
    # Two numbers have one sum, however it is computed; so the bits are known.
    expected = [a + b for a, b in zip(process_programs.tensors_of(0), process_programs.tensors_of(1), strict=True)]
    for found in results["add_up"]:
        for name in ("usual", "small"):
            assert [tensor.dtype for tensor in found[name]] == [tensor.dtype for tensor in expected]
            assert all(torch.equal(a, b) for a, b in zip(found[name], expected, strict=True))


def test_sums_travel_in_buckets_of_one_type_up_to_the_limit(monkeypatch):
    buckets = []
    monkeypatch.setattr(distributed, "_BUCKET_BYTES", 40)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.all_reduce", lambda flat: buckets.append((flat.numel(), flat.dtype)))
    tensors = [torch.zeros(size, dtype=dtype) for size, dtype in (
        (5, torch.float32), (1, torch.float64), (5, torch.float32), (1, torch.float32), (90, torch.float32))]
    Processes(rank=0, count=2, device=torch.device("cpu")).sum(tensors)
    assert buckets == [(10, torch.float32), (1, torch.float32), (90, torch.float32), (1, torch.float64)]


def test_processes_talk(results):
    first, second = results["talk"]
    assert [found["rank"] for found in (first, second)] == [0, 1]
    assert [found["is_main"] for found in (first, second)] == [True, False]
    for found in (first, second):
        assert found["world_size"] == 2
        assert found["threads"] == 1  # half of the 2 that one would use
        assert found["any"] == found["any_each"] == [True, True, False, True]
        assert found["object"] == {"from": 0, "list": [1, "two"]}


def test_one_process_needs_no_others():
    with distributed.join("cpu") as processes:
        tensor = torch.ones(2)
        processes.sum([tensor])
        assert tensor.tolist() == [1, 1]
        assert (processes.rank, processes.count, processes.device) == (0, 1, torch.device("cpu"))
        assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
        assert [distributed.any_process(flag) for flag in (True, False)] == [True, False]
        assert distributed.any_process_each([False, True]) == [False, True]
        assert distributed.broadcast_object("x") == "x"
        distributed.barrier()
    assert not torch.distributed.is_initialized()


def test_share_gives_each_process_its_part():
    parts = [Processes(rank=rank, count=3, device=torch.device("cpu")).share(12) for rank in range(3)]
    assert parts == [range(4), range(4, 8), range(8, 12)]
    with pytest.raises(ValueError, match=r"^10 items cannot be divided among 3 processes; expected a multiple of 3$"):
        Processes(rank=0, count=3, device=torch.device("cpu")).share(10)


def test_step_refuses_a_share_that_does_not_make_the_batch():
    config = small_config(batch=8, micro_batch=4)
    state = small_state(config)
    processes = Processes(rank=0, count=2, device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"^a step got 8 images on each of 2 processes; expected 8 in total$"):
        train_step(state, small_inputs(state, config), config, processes)


@pytest.mark.parametrize(("changes", "message"), [
    ({"MASTER_PORT": None}, "MASTER_PORT is not set, but other torchrun variables are; expected RANK, "
     "WORLD_SIZE, MASTER_ADDR and MASTER_PORT: use torchrun, or unset RANK and WORLD_SIZE"),
    ({"RANK": "one"}, "RANK is 'one'; expected a whole number >= 0, as set by torchrun"),
    ({"RANK": "2"}, "RANK is 2; expected less than WORLD_SIZE (2)"),
])
def test_place_refuses_an_environment_that_makes_no_sense(changes, message, monkeypatch):
    valid = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for name, value in {**dict.fromkeys(VARIABLES), **valid, **changes}.items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        Place.from_environment()


def test_place_comes_from_the_environment(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert Place.from_environment() == Place()
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "host", "MASTER_PORT": "1",
                        "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RESTART_COUNT": "5"}.items():
        monkeypatch.setenv(name, value)
    assert Place.from_environment() == Place(rank=3, count=4, local_rank=1, local_count=2, address="host", port=1,
                                             attempt=5, is_started=True)


@pytest.mark.parametrize(("variables", "is_started", "count"), [
    ({}, False, 1),
    ({"SLURM_PROCID": "1", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1"}, False, 1),
    ({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "host", "MASTER_PORT": "1"}, False, 1),
    ({"RANK": "0", "WORLD_SIZE": "1"}, True, 1),  # a group of one meets nobody: it needs no address
    ({"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "host", "MASTER_PORT": "1", "SLURM_NTASKS": "2"}, True, 4),
])
def test_place_is_part_of_a_group_by_rank_and_world_size_alone(variables, is_started, count, monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    place = Place.from_environment()
    assert (place.is_started, place.count) == (is_started, count)
    assert place.processes(None) == count
    assert place.processes(count) == count
    if not is_started:
        assert place.processes(3) == 3
        return
    message = (f"--gpus is 3, but WORLD_SIZE (set by torchrun) is {count}; expected the same number: leave --gpus "
               "out, or unset RANK and WORLD_SIZE to let --gpus=3 start 3 processes")
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        place.processes(3)


@pytest.mark.parametrize(("variables", "missing"), [
    ({"RANK": "0"}, "WORLD_SIZE"), ({"WORLD_SIZE": "1"}, "RANK"), ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_PORT")])
def test_place_of_a_part_of_the_variables_is_refused(variables, missing, monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"^{missing} is not set, but other torchrun variables are"):
        Place.from_environment()


def check_end(end, message):
    code, out, err = end
    assert (code, out) == (1, "")
    # PyTorch may warn of a broken connection before.
    lines = err.splitlines()
    assert [line for line in lines if line.startswith("error")] == [f"error: {message}"] == lines[-1:]


GONE = "stopped responding; it may have been killed, for example because memory ran out"


@pytest.mark.parametrize(("who", "message"), [
    (1, f"process 1 of 2 {GONE}"),
    # Process 0 keeps the store.
    pytest.param(0, "lost the connection to the process that connects the others", marks=pytest.mark.slow),
])
def test_killed_process_ends_the_other_with_a_message(who, message, tmp_path):
    processes = start(2, "run_forever", tmp_path, "killed", who)
    ends = finish(processes, timeout=60)
    assert ends[who][0] == -signal.SIGKILL
    check_end(ends[1 - who], message)


@pytest.mark.parametrize("who", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_killed_process_ends_one_that_waits_for_something_else(who, tmp_path):
    started = time.monotonic()
    ends = finish(start(2, "wait_elsewhere", tmp_path, "killed", who))
    assert time.monotonic() - started < 50  # it would sleep for 100 s
    message = f"process 1 of 2 {GONE}" if who else "lost the connection to the process that connects the others"
    check_end(ends[1 - who], message)


@pytest.mark.parametrize(("deed", "who", "code", "last_line", "told"), [
    ("fails", 1, 1, "[rank1]: luck", "ArithmeticError: no luck"),
    pytest.param("fails", 0, 1, "[rank0]: luck", "ArithmeticError: no luck", marks=pytest.mark.slow),
    pytest.param("refuses", 1, 2, "error: --luck is 0; more", "--luck is 0; more", marks=pytest.mark.slow),
    pytest.param("leaves", 1, 9, "", "SystemExit: 9", marks=pytest.mark.slow),
])
def test_failing_process_ends_the_other_with_its_error(deed, who, code, last_line, told, tmp_path):
    ends = finish(start(2, "run_forever", tmp_path, deed, who))
    assert ends[who][0] == code
    assert ["", *ends[who][2].splitlines()][-1] == last_line
    assert ends[1 - who] == (1, "", f"error: process {who} of 2 failed: {told}\n")


@pytest.mark.slow
def test_processes_that_part_leave_no_thread_of_gloo(tmp_path):
    # Such a thread aborts the process now and then, when it lets go of a tensor while Python shuts down.
    assert finish(start(2, "import_late", tmp_path), timeout=120) == [(0, "", "")] * 2


@pytest.mark.slow
def test_processes_that_fail_alike_keep_one_error(tmp_path):
    ends = finish(start(2, "fail_alike", tmp_path))
    assert sorted(code for code, _, _ in ends) == [1, 2]
    (_, _, own), (_, _, other) = sorted(ends, key=lambda end: -end[0])
    assert own == "error: the same mistake in all\n"
    assert re.fullmatch(r"error: process [01] of 2 failed: the same mistake in all\n", other)


def torchrun(folder, *arguments):
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m",
               "tests.helpers.process_programs", arguments[0], str(folder), *arguments[1:]]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, env=environment, check=False)


@pytest.mark.slow
def test_torchrun_joins_processes(tmp_path):
    assert torchrun(tmp_path, "talk").returncode == 0
    found = [torch.load(tmp_path / f"talk-{rank}of2.pt") for rank in range(2)]
    assert [(result["rank"], result["world_size"], result["object"]["from"]) for result in found] == [
        (0, 2, 0), (1, 2, 0)]


@pytest.mark.slow
def test_torchrun_with_a_failing_process_ends_and_names_its_error(tmp_path):
    result = torchrun(tmp_path, "run_forever", "fails", "1")
    assert result.returncode != 0
    assert "[rank1]: ArithmeticError: no" in result.stderr
    for rank in range(2):
        assert not Path(f"/proc/{(tmp_path / f'running-{rank}').read_text()}").exists()
