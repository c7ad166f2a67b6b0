"""Join the processes of a run into a process group: the only module that knows about ranks.

`Place.from_environment` reads rank and world size from the environment variables of torchrun or torch_utils.launch.
Without these a process is alone, and everything here does nothing. NCCL transfers tensors on GPUs, gloo those on the
CPU.
"""

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dnnlib.cli import UserError
from dnnlib.files import DiskFailure
from torch_utils import launch
from torch_utils.launch import LOST_EXIT_CODE, ProcessWatch, find_launcher, follow_launcher

# How long a process waits for others that have not started yet.
JOIN_TIMEOUT = timedelta(minutes=5)
# How long a process waits for one that is alive but busy, such as writing a state to a slow disk. Dead processes are
# detected within a minute by torch_utils.launch.
COLLECTIVE_TIMEOUT = timedelta(minutes=30)

# Large enough that transfer dominates the overhead, small enough not to double the memory for gradients.
_BUCKET_BYTES = 32 << 20

_watch: ProcessWatch | None = None


class ProcessLost(SystemExit):
    """Another process of the run failed, so this one cannot continue.

    Like an interrupt it is not for other code to handle: it ends the program, with one line.
    """

    def __init__(self, reason: str):
        super().__init__(LOST_EXIT_CODE if find_launcher() is not None else f"error: {reason}")
        self.reason = reason


class OtherProcessFailed(RuntimeError):
    """Work failed on another process, which raises the error itself; this one carries its message."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """The rank of a process in its run, and the address where the processes meet."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0  # among the processes of this machine
    local_count: int = 1
    address: str = ""
    port: int = 0
    attempt: int = 0  # torchrun --max-restarts restarts the processes, with the same store
    is_started: bool = False  # as part of a group, even of one: this process does not start others
    launcher: int | None = None  # process id of torch_utils.launch, if that started it

    @classmethod
    def from_environment(cls) -> "Place":
        """Read the place of this process from the environment variables of torchrun or torch_utils.launch.

        Only RANK and WORLD_SIZE make a process part of a group. The variables of a batch system (SLURM_*), or
        LOCAL_RANK alone, do not: a process that was started with these is alone, and --gpus starts the others.
        Raises UserError when a variable is missing or not a number.
        """
        names = {"rank": "RANK", "count": "WORLD_SIZE", "port": "MASTER_PORT"}
        if not any(name in os.environ for name in ("RANK", "WORLD_SIZE")):
            return cls()
        is_one = os.environ.get("WORLD_SIZE") == "1"  # which does not meet others
        needed = ("RANK", "WORLD_SIZE") if is_one else (*names.values(), "MASTER_ADDR")
        missing = [name for name in needed if name not in os.environ]
        if missing:
            raise UserError(f"{missing[0]} is not set, but other torchrun variables are; expected RANK, "
                            "WORLD_SIZE, MASTER_ADDR and MASTER_PORT: use torchrun, or unset RANK and WORLD_SIZE")
        found = {field: _number(name) for field, name in names.items() if name in needed}
        local_rank = _number("LOCAL_RANK", found["rank"])
        place = cls(**found, local_rank=local_rank, local_count=_number("LOCAL_WORLD_SIZE", found["count"]),
                    address=os.environ.get("MASTER_ADDR", ""), attempt=_number("TORCHELASTIC_RESTART_COUNT", 0),
                    is_started=True, launcher=find_launcher())
        if place.rank >= place.count:
            raise UserError(f"RANK is {place.rank}; expected less than WORLD_SIZE ({place.count})")
        return place

    def processes(self, gpus: int | None) -> int:
        """Return how many processes do the work: those that were started, else --gpus.

        gpus:  --gpus, None when not given

        Raises UserError when both are known and differ.
        """
        if not self.is_started:
            return gpus or 1
        if gpus not in (None, self.count):
            raise UserError(f"--gpus is {gpus}, but WORLD_SIZE (set by torchrun) is {self.count}; expected the same "
                            f"number: leave --gpus out, or unset RANK and WORLD_SIZE to let --gpus={gpus} start "
                            f"{gpus} processes")
        return self.count

    @property
    def holds_store(self) -> bool:
        """Return whether this process hosts the shared store; torchrun or torch_utils.launch may host it instead."""
        return self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def is_first_process() -> bool:
    """Return whether this process prints for all, also before the group is joined; unlike `Place`, never raises."""
    return os.environ.get("RANK", "0") == "0"


@dataclass(frozen=True, kw_only=True)
class Processes:
    """The processes of a run, seen from one of them; `count` 1 communicates with no other, also within a group."""

    rank: int
    count: int
    device: torch.device  # this process's

    @torch.no_grad()
    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their sums over all processes, in place. Raises ProcessLost.

        tensors:  of any shapes, number types and devices, the same ones in the same order on every process

        All processes get the same bits, also when the sum is repeated: tensors of one type and device are flattened
        into buckets whose limits depend only on the shapes.
        LIMIT: does not overlap with the backward pass. Two processes on a CPU sum 25 million float32 in 0.1 s, while
        one pass through networks of that size takes seconds; not yet measured between GPUs.
        """
        if self.count == 1:
            return
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            with _others_needed():
                dist.all_reduce(flat)
            for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
                tensor.copy_(part.view(tensor.shape))

    def any(self, flag: bool) -> bool:
        """Return on every process whether `flag` is set on any, as `any_process` does. Raises ProcessLost."""
        return flag if self.count == 1 else any_process(flag)

    def any_each(self, flags: Sequence[bool]) -> list[bool]:
        """Reduce several flags as `any` does, in one exchange. Raises ProcessLost."""
        return list(flags) if self.count == 1 else any_process_each(flags)

    def broadcast(self, value: Any) -> Any:
        """Return the main process's value on every process, as `broadcast_object` does. Raises ProcessLost."""
        return value if self.count == 1 else broadcast_object(value)

    def first_text(self, text: str) -> str:
        """Return on all processes the first text that is not empty, in one line, "" if there is none."""
        return " ".join(text.split()) if self.count == 1 else first_text(text)

    def share(self, total: int) -> range:
        """Return this process's share of `total` items: images of a batch, or micro-batches."""
        if total % self.count:
            raise ValueError(f"{total} items cannot be divided among {self.count} processes; expected a multiple of "
                             f"{self.count}")
        size = total // self.count
        return range(self.rank * size, (self.rank + 1) * size)


@contextmanager
def join(device: torch.device | str, *, patience: timedelta = COLLECTIVE_TIMEOUT) -> Iterator[Processes]:
    """Join the process group of the run, and leave it together with the others.

    device:    several processes on "cuda" each use the GPU of their local rank
    patience:  how long a process waits for one that is alive but busy; one that died is noticed in any case

    An error within the block is passed on to the others, which end with `ProcessLost`; of several processes that fail
    at once, one keeps its error. Raises UserError when the environment is invalid or the others do not join in time.
    """
    place = Place.from_environment()
    device = torch.device(device)
    if device.type == "cuda":
        device = device if device.index is not None else torch.device("cuda", place.local_rank)
        torch.cuda.set_device(device)
    if place.count == 1:
        yield Processes(rank=0, count=1, device=device)
        return
    # Processes on one machine share its cores.
    torch.set_num_threads(max(1, torch.get_num_threads() // place.local_count))
    follow_launcher()
    watch = _meet(place, device, patience)
    try:
        yield Processes(rank=place.rank, count=place.count, device=device)
        barrier()  # no process leaves while another may still need it
    except OtherProcessFailed as error:  # the other process prints its error
        lost = ProcessLost(str(error))
        _fail(lost, place, watch, device)
        raise lost from error
    except BaseException as error:
        _fail(error, place, watch, device)
        raise
    _leave(watch)
    dist.destroy_process_group()


def rank() -> int:
    """Return the rank of this process in the group; 0 without one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes in the group; 1 without one."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Return whether this process is the one that writes and prints."""
    return rank() == 0


def barrier() -> None:
    """Wait until all processes get here. Raises ProcessLost."""
    any_process(False)


def any_process(flag: bool) -> bool:
    """Return on every process whether `flag` is set on any, such as a request to stop. Raises ProcessLost."""
    return any_process_each([flag])[0]


def any_process_each(flags: Sequence[bool]) -> list[bool]:
    """Reduce several flags as `any_process` does, in one exchange. Raises ProcessLost."""
    if world_size() == 1:
        return list(flags)
    found = torch.tensor(flags, dtype=torch.int32)
    with _others_needed():
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return [bool(value) for value in found.tolist()]


def broadcast_object(value: Any) -> Any:
    """Return the main process's value on every process. Raises ProcessLost.

    The object is pickled; it comes from a process of the same run.
    """
    if world_size() == 1:
        return value
    values = [value]
    with _others_needed():
        dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
    return values[0]


def first_text(text: str) -> str:
    """Return on all processes the first text that is not empty, "" if there is none. Raises ProcessLost."""
    line = f"{' '.join(text.split())}\n" if text else ""
    lines = gather_rows(torch.tensor(list(line.encode(errors="backslashreplace")), dtype=torch.uint8))
    return broadcast_object(None if lines is None else bytes(lines.tolist()).decode().split("\n", 1)[0])


@torch.no_grad()
def gather_rows(rows: Tensor) -> Tensor | None:
    """Return the rows of all processes, those of rank 0 first, on the main process's CPU; None on the others.

    rows:  [n, ...], any device; n may differ between processes and be 0, dtype and other sizes are the same

    Raises ProcessLost.
    """
    rows = rows.detach().to("cpu").contiguous()
    if world_size() == 1:
        return rows
    counts = torch.zeros(world_size(), dtype=torch.int64)
    counts[rank()] = len(rows)
    with _others_needed():
        dist.all_reduce(counts)
        padded = torch.cat([rows, rows.new_zeros(int(counts.max()) - len(rows), *rows.shape[1:])])
        parts = [torch.empty_like(padded) for _ in counts] if is_main() else None
        dist.gather(padded, parts)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)]) if is_main() else None


def describe_error(error: BaseException) -> str:
    """Return an error like the last line of a traceback; a user's mistake or a failing disk without its type."""
    text = " ".join(str(error).split())
    if isinstance(error, (UserError, DiskFailure)):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Group tensors by type and device, in lists of limited size."""
    groups: dict[tuple, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for group in groups.values():
        bucket, size = [], 0
        for tensor in group:
            if bucket and size + tensor.nbytes > _BUCKET_BYTES:
                yield bucket
                bucket, size = [], 0
            bucket.append(tensor)
            size += tensor.nbytes
        yield bucket


def _meet(place: Place, device: torch.device, patience: timedelta) -> ProcessWatch:
    global _watch
    # Imported early: its functions bind the default process group at import time, and torch._dynamo would import it in
    # the middle of a run. That would keep the group, with gloo's threads, alive after destroy_process_group; a thread
    # that then frees a collective's tensor while Python shuts down needs the GIL, and the process aborts.
    from torch.distributed.nn import functional  # noqa: F401

    try:
        store = _connect(place, JOIN_TIMEOUT, holds_store=place.holds_store)
        watch_store = _connect(place, timedelta(seconds=launch.WATCH_GRACE_SECONDS), holds_store=False)
        watch = ProcessWatch(watch_store, rank=place.rank, count=place.count, end=_end_now)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", store=store,
                                rank=place.rank, world_size=place.count, timeout=patience)
    except RuntimeError as error:
        raise UserError(f"process {place.rank} of {place.count} could not join the others at {place.address}:"
                        f"{place.port} ({' '.join(str(error).split())[:200]}); expected all of them to start within "
                        f"{JOIN_TIMEOUT.seconds // 60} minutes, and a free port") from error
    watch.start()
    _watch = watch
    return watch


def _connect(place: Place, timeout: timedelta, *, holds_store: bool) -> dist.Store:
    store = dist.TCPStore(place.address, place.port, is_master=holds_store, wait_for_workers=False, timeout=timeout)
    return dist.PrefixStore(f"lesion-stylegan2-ada/{place.attempt}", store)


def _leave(watch: ProcessWatch) -> None:
    global _watch
    watch.stop()
    _watch = None


def _fail(error: BaseException, place: Place, watch: ProcessWatch, device: torch.device) -> None:
    """Leave the group because of an error. Raises ProcessLost instead when another process failed earlier."""
    earlier = None
    _leave(watch)
    if not isinstance(error, ProcessLost):
        earlier = watch.post_failure(describe_error(error))
        if earlier is None and place.holds_store:  # the others must read it before the store is gone
            time.sleep(1.5 * launch.HEARTBEAT_SECONDS)
    if device.type == "cpu":  # NCCL would wait for operations that never end; ending the process is enough
        dist.destroy_process_group()
    if earlier is not None:
        raise ProcessLost(earlier) from error


@contextmanager
def _others_needed() -> Iterator[None]:
    """Turn torch's error about a broken connection into what happened to the other process."""
    try:
        yield
    except RuntimeError as error:
        reason = None if _watch is None else _watch.find_reason()
        raise ProcessLost(reason or f"processes cannot reach each other: {describe_error(error)}") from error


def _end_now(reason: str) -> None:
    """End this process, whatever its main thread is waiting for."""
    code = ProcessLost(reason).code
    if isinstance(code, str):
        print(code, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code if isinstance(code, int) else 1)


def _number(name: str, default: int | None = None) -> int:
    text = os.environ.get(name, default)
    try:
        value = int(text)
    except ValueError:
        value = -1
    if value < 0:
        raise UserError(f"{name} is {text!r}; expected a whole number >= 0, as set by torchrun")
    return value
