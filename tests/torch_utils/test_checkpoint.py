"""torch_utils.checkpoint: damage to a state is detected, and one intact state always exists."""

import json
import os
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers.full_disk import needs_mount
from torch_utils.checkpoint import CheckpointPair, DamagedCheckpoint, read_checkpoint, write_checkpoint

ROOT = Path(__file__).parent.parent.parent
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64,
          torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]  # fmt: skip
NAMES = ["training-state.pt", "training-state.prev.pt"]


def bits(tensor):
    """Return everything that distinguishes two tensors, including NaNs and signs of zero."""
    return tensor.dtype, tensor.shape, tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def special_values(dtype):
    if dtype.is_floating_point:
        return torch.tensor([0.0, -0.0, float("nan"), float("inf"), 1 / 3, -1e-7], dtype=dtype)
    return torch.tensor([0, 1, 2, 100, 3, 127]).to(dtype)


def small_state(value=0):
    return {"weights": torch.full((50,), float(value)), "step": value, "nested": {"names": ["a", "b"], "rate": 0.1}}


def script(code, *arguments, **options):
    """Run Python code in a fresh process, in the project's root."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, env=environment,
                          capture_output=True, text=True, check=False, **options)


# ---- what goes in comes out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_checkpoint_every_dtype_comes_back_bit_for_bit(tmp_path, dtype):
    values = special_values(dtype)
    state = {"vector": values, "matrix": values.reshape(2, 3), "transposed": values.reshape(2, 3).t(),
             "strided": values[::2], "expanded": values[:1].expand(4), "scalar": values[4].clone(), "row": values[5],
             "empty": values[:0], "empty_matrix": torch.empty(0, 3, dtype=dtype)}
    write_checkpoint(tmp_path / "a.pt", state)
    loaded = read_checkpoint(tmp_path / "a.pt")
    assert {name: bits(tensor) for name, tensor in loaded.items()} == {name: bits(t) for name, t in state.items()}


def test_checkpoint_plain_values_come_back_with_their_types(tmp_path):
    state = {"int": -(2**63), "seed": 2**64 - 1, "float": 0.1, "inf": float("inf"), "yes": True, "none": None,
             "text": "m\u00e9lanome\n", "list": [1, 2.0, [True, "a"], {}], "": {"": []}}
    write_checkpoint(tmp_path / "a.pt", state)
    loaded = read_checkpoint(tmp_path / "a.pt")
    assert loaded == state
    assert list(loaded) == list(state)
    assert [type(value) for value in loaded["list"]] == [int, float, list, dict]
    assert loaded["yes"] is True


def test_checkpoint_opens_with_torch_and_is_a_sound_archive(tmp_path):
    write_checkpoint(tmp_path / "a.pt", small_state(3))
    opened = torch.load(tmp_path / "a.pt", weights_only=True)
    assert (opened["step"], bits(opened["weights"])) == (3, bits(torch.full((50,), 3.0)))
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        assert archive.testzip() is None
        assert archive.comment.startswith(b"checkpoint-1 sha256 ")


def test_checkpoint_a_part_of_a_large_tensor_is_written_alone(tmp_path):
    write_checkpoint(tmp_path / "a.pt", {"row": torch.zeros(1000, 1000)[3]})
    assert (tmp_path / "a.pt").stat().st_size < 10_000


def test_checkpoint_gradients_are_not_carried_over(tmp_path):
    write_checkpoint(tmp_path / "a.pt", {"w": torch.ones(2, requires_grad=True) * 3})
    loaded = read_checkpoint(tmp_path / "a.pt")["w"]
    assert (loaded.requires_grad, loaded.tolist()) == (False, [3.0, 3.0])


@pytest.mark.parametrize(("value", "message"), [
    (np.float64(1), "state.a.b is a float64; expected a plain tensor, number, string, list or dict"),
    (np.zeros(2), "state.a.b is a ndarray; expected a plain tensor, number, string, list or dict"),
    ((1, 2), "state.a.b is a tuple; expected a plain tensor, number, string, list or dict"),
    ([1, {2}], "state.a.b[1] is a set; expected a plain tensor, number, string, list or dict"),
    (b"x", "state.a.b is a bytes; expected a plain tensor, number, string, list or dict"),
    (OrderedDict(x=1), "state.a.b is a OrderedDict; expected a plain tensor, number, string, list or dict"),
    (torch.nn.Parameter(torch.ones(1)),
     "state.a.b is a Parameter; expected a plain tensor, number, string, list or dict"),
    (torch.ones(2).to_sparse(),
     "state.a.b is a cpu tensor, torch.sparse_coo; expected a plain tensor, number, string, list or dict"),
    (torch.empty(2, device="meta"),
     "state.a.b is a meta tensor, torch.strided; expected a plain tensor, number, string, list or dict"),
    ({3: 1}, "state.a.b has the key 3; expected string keys"),
    (10**700, "state.a.b is an integer of 2326 bits; expected at most 64"),
])
def test_write_checkpoint_anything_else_is_named_and_nothing_written(tmp_path, value, message):
    with pytest.raises(TypeError) as error:
        write_checkpoint(tmp_path / "a.pt", {"ok": 1, "a": {"b": value}})
    assert str(error.value) == message
    assert os.listdir(tmp_path) == []


def test_write_checkpoint_a_state_that_is_no_dict_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"^the state is a list; expected a dict$"):
        write_checkpoint(tmp_path / "a.pt", [1])


def test_write_checkpoint_takes_no_second_copy_of_the_state(tmp_path):
    code = """
import resource, sys, torch
from torch_utils.checkpoint import write_checkpoint
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
write_checkpoint(sys.argv[1], {"warm": torch.ones(10)})
state = {"a": torch.ones(24 << 20), "b": torch.ones(5000, 1000).t()}
before = peak()
write_checkpoint(sys.argv[1], state)
print(peak() - before)
"""
    done = script(code, tmp_path / "a.pt")
    assert (done.returncode, done.stderr) == (0, "")
    assert int(done.stdout) < 10  # MiB; the state has 115


# ---- damage is found


def damaged(path, change):
    data = bytearray(path.read_bytes())
    path.write_bytes(bytes(change(data)))


def test_read_checkpoint_any_flipped_bit_is_found(tmp_path):
    path = tmp_path / "a.pt"
    write_checkpoint(path, {"a": torch.arange(3), "b": "text"})
    original = path.read_bytes()
    for position in range(len(original)):
        changed = bytearray(original)
        changed[position] ^= 1 << (position % 8)
        path.write_bytes(changed)
        with pytest.raises(DamagedCheckpoint, match=r"is damaged: "):
            read_checkpoint(path)
    path.write_bytes(original)
    assert read_checkpoint(path)["b"] == "text"


def test_read_checkpoint_any_missing_or_zeroed_end_is_found(tmp_path):
    path = tmp_path / "a.pt"
    write_checkpoint(path, {"a": torch.arange(3), "b": "text"})
    original = path.read_bytes()
    for length in [*range(0, len(original), 7), *range(len(original) - 30, len(original))]:
        for changed in (original[:length], original[:length] + bytes(len(original) - length)):
            path.write_bytes(changed)
            with pytest.raises(DamagedCheckpoint, match=r"is damaged: "):
                read_checkpoint(path)


@pytest.mark.parametrize(("change", "reason"), [
    (lambda data: data[:-1], "it does not end with a checksum"),
    (lambda data: data[: len(data) // 2], "it does not end with a checksum"),
    (lambda data: b"", "it does not end with a checksum"),
    (lambda data: data[:10], "it does not end with a checksum"),
    (lambda data: bytes(len(data)), "it does not end with a checksum"),
    (lambda data: data[:-600] + bytes(600), "it does not end with a checksum"),
    (lambda data: data + b"\0", "it does not end with a checksum"),
    (lambda data: data + data, "its content does not match its checksum"),
    (lambda data: data[1:], "its content does not match its checksum"),
    (lambda data: data[:300] + bytes(100) + data[400:], "its content does not match its checksum"),
    (lambda data: data[:-1] + b"g", "its content does not match its checksum"),
])
def test_read_checkpoint_damage_gives_one_line(tmp_path, change, reason):
    path = tmp_path / "a.pt"
    write_checkpoint(path, small_state())
    damaged(path, change)
    with pytest.raises(DamagedCheckpoint) as error:
        read_checkpoint(path)
    assert str(error.value) == f"{path} is damaged: {reason}"


def test_read_checkpoint_a_file_without_checksum_is_refused(tmp_path):
    torch.save({"a": 1}, tmp_path / "a.pt")
    with pytest.raises(DamagedCheckpoint, match=r"a.pt is damaged: it does not end with a checksum$"):
        read_checkpoint(tmp_path / "a.pt")


def test_read_checkpoint_a_foreign_content_with_a_checksum_runs_nothing(tmp_path, monkeypatch):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    monkeypatch.setattr("torch_utils.checkpoint._plain", lambda value, where: value)
    write_checkpoint(tmp_path / "a.pt", {"a": Bomb()})
    with pytest.raises(DamagedCheckpoint, match=r"a.pt contains more than tensors, numbers and strings; not opened$"):
        read_checkpoint(tmp_path / "a.pt")
    assert os.listdir(tmp_path) == ["a.pt"]


def test_read_checkpoint_missing_file_raises_file_not_found(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_checkpoint(tmp_path / "a.pt")


# ---- the newest and the one before


def steps(folder):
    return {name: read_checkpoint(folder / name)["step"] for name in sorted(os.listdir(folder))}


def test_pair_without_states_loads_none(tmp_path):
    assert CheckpointPair(tmp_path).load() is None


def test_pair_keeps_the_last_two_states(tmp_path):
    pair = CheckpointPair(tmp_path)
    pair.save(small_state(1))
    assert steps(tmp_path) == {"training-state.pt": 1}
    for value in (2, 3):
        pair.save(small_state(value))
        assert steps(tmp_path) == {"training-state.pt": value, "training-state.prev.pt": value - 1}
    state, message = CheckpointPair(tmp_path).load()
    assert (state["step"], message) == (3, None)


def test_pair_damaged_newest_is_passed_over_and_said(tmp_path):
    for value in (1, 2):
        CheckpointPair(tmp_path).save(small_state(value))
    newest = tmp_path / NAMES[0]
    damaged(newest, lambda data: data[:-5])
    pair = CheckpointPair(tmp_path)
    state, message = pair.load()
    assert state["step"] == 1
    assert message == f"{newest} is damaged: it does not end with a checksum; training-state.prev.pt is used instead"
    pair.save(small_state(7))  # does not put the damaged one in the place of the good one
    assert steps(tmp_path) == {"training-state.pt": 7, "training-state.prev.pt": 1}
    pair.save(small_state(8))
    assert steps(tmp_path) == {"training-state.pt": 8, "training-state.prev.pt": 7}


def test_pair_missing_newest_is_said(tmp_path):
    for value in (1, 2):
        CheckpointPair(tmp_path).save(small_state(value))
    (tmp_path / NAMES[0]).unlink()
    state, message = CheckpointPair(tmp_path).load()
    assert (state["step"], message) == (1, f"{tmp_path / NAMES[0]} is missing; training-state.prev.pt is used instead")


def test_pair_both_damaged_raises_one_line(tmp_path):
    for value in (1, 2):
        CheckpointPair(tmp_path).save(small_state(value))
    for name in NAMES:
        damaged(tmp_path / name, lambda data: data[:100])
    with pytest.raises(DamagedCheckpoint) as error:
        CheckpointPair(tmp_path).load()
    reason = "is damaged: it does not end with a checksum"
    assert str(error.value) == (f"{tmp_path / NAMES[0]} {reason}; {tmp_path / NAMES[1]} {reason}; expected one intact "
                                "state: restore one from a backup, or start from scratch")


def test_pair_a_state_that_cannot_be_written_leaves_both(tmp_path):
    pair = CheckpointPair(tmp_path)
    for value in (1, 2):
        pair.save(small_state(value))
    with pytest.raises(TypeError):
        pair.save({"a": object()})
    assert steps(tmp_path) == {"training-state.pt": 2, "training-state.prev.pt": 1}


# ---- kills

KILLED = """
# Save states 1, 2, ... in forked children that die at any moment; print for each what was surely saved and what loads.
import json, os, random, signal, sys, time
import torch
from torch_utils.checkpoint import CheckpointPair
torch.set_num_threads(1)
folder, rounds, exact = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "calls"
saved = os.path.join(folder, "..", "saved")
make = lambda value: {"step": value, "many": {str(i): torch.full((2000,), float(value)) for i in range(4)}}

def die_at(call):
    # Count what changes the file system, and die before the call-th such call.
    left = [call]
    def counted(function):
        def run(*arguments, **named):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **named)
        return run
    for name in ("replace", "rename", "unlink", "fsync", "open", "link"):
        setattr(os, name, counted(getattr(os, name)))
    import dnnlib.files, builtins
    plain = builtins.open
    def opened(*arguments, **named):
        file = counted(plain)(*arguments, **named)
        if "x" in arguments[1]:
            file = Counting(file)
        return file
    class Counting:
        def __init__(self, file): self.file = file
        def write(self, data): return counted(self.file.write)(data)
        def __enter__(self): return self
        def __exit__(self, *a): return self.file.__exit__(*a)
        def __getattr__(self, name): return getattr(self.file, name)
    dnnlib.files.open = opened

def child(round, first):
    pair = CheckpointPair(folder)
    if exact:
        pair.save(make(first))
        open(saved, "w").write(str(first))
        die_at(round)
        pair.save(make(first + 1))
        os._exit(0)
    for value in range(first, first + 100000):
        pair.save(make(value))
        with open(saved + ".tmp", "w") as file:
            file.write(str(value))
        os.replace(saved + ".tmp", saved)

random.seed(0)
newest = 0
for round in range(rounds):
    pid = os.fork()
    if pid == 0:
        child(round, newest + 1)
    if not exact:
        time.sleep(random.uniform(0.002, 0.05))
        os.kill(pid, signal.SIGKILL)
    code = os.waitpid(pid, 0)[1]
    sure = int(open(saved).read()) if os.path.exists(saved) else 0
    found = CheckpointPair(folder).load()
    if found is None:
        print(json.dumps({"sure": sure, "step": 0, "message": None, "code": code}))
        continue
    state, message = found
    assert all((tensor == state["step"]).all() and len(tensor) == 2000 for tensor in state["many"].values())
    print(json.dumps({"sure": sure, "step": state["step"], "message": message, "code": code}))
    newest = max(newest, state["step"])
    if exact and code == 0:
        break  # no call was left to die at
    for name in os.listdir(folder):
        if name.startswith(".tmp-"):
            os.unlink(os.path.join(folder, name))
"""


def kill_rounds(tmp_path, rounds, how):
    (tmp_path / "run").mkdir()
    done = script(KILLED, tmp_path / "run", rounds, how)
    assert (done.returncode, done.stderr) == (0, "")
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.skipif(os.name != "posix", reason="forks and kills")
def test_pair_killed_at_random_moments_always_loads_a_whole_state(tmp_path):
    results = kill_rounds(tmp_path, 40, "moments")
    assert len(results) == 40
    before = 0
    for result in results:
        assert result["message"] is None
        # At most one state is newer than the last one that a child reported, or that existed when it started.
        assert result["sure"] <= result["step"] <= max(result["sure"], before) + 1
        before = result["step"]
    assert results[-1]["step"] >= 5  # the children did save


@pytest.mark.skipif(os.name != "posix", reason="forks and kills")
def test_pair_killed_before_any_system_call_keeps_the_newest_or_the_next(tmp_path):
    *killed, last = kill_rounds(tmp_path, 200, "calls")
    assert 30 < len(killed) < 199  # the number of system calls of a save
    assert {result["code"] for result in killed} == {9}
    assert {result["message"] for result in killed} == {None}
    assert {result["step"] - result["sure"] for result in killed} == {0, 1}
    assert last == {"sure": last["step"] - 1, "step": last["step"], "message": None, "code": 0}


# ---- full disks

FULL = """
import os, sys, torch
from torch_utils.checkpoint import CheckpointPair
pair = CheckpointPair(sys.argv[1])
pair.save({"step": 1, "a": torch.ones(10)})
pair.save({"step": 2, "a": torch.ones(10)})
for size in (1 << 20, 100_000):
    try:
        pair.save({"step": 3, **{str(i): torch.ones(size // 16) for i in range(16)}})
    except OSError as error:
        print(type(error).__name__, error.strerror)
    state, message = CheckpointPair(sys.argv[1]).load()
    print(state["step"], message, *sorted(os.listdir(sys.argv[1])))
pair.save({"step": 4})
print(CheckpointPair(sys.argv[1]).load()[0]["step"], *sorted(os.listdir(sys.argv[1])))
"""


def expected_when_full(reason):
    return "".join(f"OSError {reason}\n2 None training-state.prev.pt training-state.pt\n" for _ in range(2)) \
        + "4 training-state.prev.pt training-state.pt\n"


@needs_mount
def test_pair_full_disk_raises_and_leaves_the_states_as_they_were(tmp_path):
    mount = 'mount -t tmpfs -o size=200k tmpfs "$1"; shift; exec "$@"'
    done = subprocess.run(["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, "sh", str(tmp_path),
                           sys.executable, "-c", FULL, str(tmp_path)],
                          cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == expected_when_full("No space left on device")


@pytest.mark.skipif(os.name != "posix", reason="limits file sizes by ulimit")
def test_pair_file_size_limit_raises_and_leaves_the_states_as_they_were(tmp_path):
    done = subprocess.run(["sh", "-c", 'ulimit -f 200; exec "$@"', "sh", sys.executable, "-c", FULL, str(tmp_path)],
                          cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == expected_when_full("File too large")
