"""Join the processes of a run: the one module that knows ranks.

A process learns its place from the environment that torchrun, or torch_utils.launch, gives it: every program asks
`Place.from_environment` who started it. Without one it is alone, and everything here does nothing. NCCL carries what
lies on GPUs, gloo what lies on the CPU.
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

# How long a process that started may wait for one that did not (yet).
JOIN_TIMEOUT = timedelta(minutes=5)
# How long a process may wait for one that lives but does something else, such as write a state to a slow disk. Dead
# ones are noticed within a minute by torch_utils.launch.
COLLECTIVE_TIMEOUT = timedelta(minutes=30)

# Large enough that the time goes into the transfer, small enough not to double the memory of the gradients.
_BUCKET_BYTES = 32 << 20

_watch: ProcessWatch | None = None


class ProcessLost(SystemExit):
    """Another process of the run failed, so that this one cannot go on.

    Like an interrupt it is nothing that the code in between could handle: it ends the program, with one line.
    """

    def __init__(self, reason: str):
        super().__init__(LOST_EXIT_CODE if find_launcher() is not None else f"error: {reason}")
        self.reason = reason


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a process stands among those of its run, and where they meet."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0  # among the processes of this machine
    local_count: int = 1
    address: str = ""
    port: int = 0
    attempt: int = 0  # torchrun --max-restarts starts the processes anew, with the same store
    is_started: bool = False  # as a part of a group, be it of one: this process does not start others
    launcher: int | None = None  # process id of torch_utils.launch, where that started it

    @classmethod
    def from_environment(cls) -> "Place":
        """Read who started this process, and how many there are, from what torchrun and torch_utils.launch set.

        RANK and WORLD_SIZE alone make a process part of a group. A batch system's own variables (SLURM_*), or
        LOCAL_RANK by itself, do not: a process that was started with these is alone, and --gpus starts the others.
        Raises UserError when a part is missing or no number.
        """
        names = {"rank": "RANK", "count": "WORLD_SIZE", "port": "MASTER_PORT"}
        if not any(name in os.environ for name in ("RANK", "WORLD_SIZE")):
            return cls()
        is_one = os.environ.get("WORLD_SIZE") == "1"  # which meets nobody
        needed = ("RANK", "WORLD_SIZE") if is_one else (*names.values(), "MASTER_ADDR")
        missing = [name for name in needed if name not in os.environ]
        if missing:
            raise UserError(f"{missing[0]} is not set, but others of torchrun's variables are; expected RANK, "
                            "WORLD_SIZE, MASTER_ADDR and MASTER_PORT: use torchrun, or unset RANK and WORLD_SIZE")
        found = {field: _number(name) for field, name in names.items() if name in needed}
        local_rank = _number("LOCAL_RANK", found["rank"])
        place = cls(**found, local_rank=local_rank, local_count=_number("LOCAL_WORLD_SIZE", found["count"]),
                    address=os.environ.get("MASTER_ADDR", ""), attempt=_number("TORCHELASTIC_RESTART_COUNT", 0),
                    is_started=True, launcher=find_launcher())
        if place.rank >= place.count:
            raise UserError(f"RANK is {place.rank}; expected less than WORLD_SIZE, {place.count}")
        return place

    def processes(self, gpus: int | None) -> int:
        """Return how many processes do the work: those that were started, else those that --gpus asks to start.

        gpus:  --gpus, None where not given

        Raises UserError where both are known and differ.
        """
        if not self.is_started:
            return gpus or 1
        if gpus not in (None, self.count):
            raise UserError(f"--gpus is {gpus}, but WORLD_SIZE is {self.count}, as torchrun sets it for the processes "
                            f"that it started; expected the same number: leave --gpus out, or unset RANK and "
                            f"WORLD_SIZE, and --gpus={gpus} starts {gpus}")
        return self.count

    @property
    def holds_store(self) -> bool:
        """Tell whether this process keeps the store in which all meet; torchrun and torch_utils.launch may do it."""
        return self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def is_first_process() -> bool:
    """Tell whether this process prints for all of its run, also before they meet; unlike `Place`, never raises."""
    return os.environ.get("RANK", "0") == "0"


@dataclass(frozen=True, kw_only=True)
class Processes:
    """The processes that compute one run together, seen from one of them."""

    rank: int
    count: int
    device: torch.device  # this process's

    @torch.no_grad()
    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their sums over all processes, in place. Raises ProcessLost.

        tensors:  of any shapes, number types and devices, the same ones in the same order on every process

        All processes get the same bits, and get them again when the sum is repeated: tensors of one type and device go
        in flat buckets, whose limits follow from the shapes alone.
        LIMIT: does not overlap with the backward pass. Two processes on a CPU sum 25 million float32 in 0.1 s, where
        one pass through networks of that size takes seconds; between GPUs nobody has measured it yet.
        """
        if world_size() == 1:
            return
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            with _others_needed():
                dist.all_reduce(flat)
            for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
                tensor.copy_(part.view(tensor.shape))

    def share(self, total: int) -> range:
        """Return which of `total` things are this process's: images of a batch, or micro-batches."""
        if total % self.count:
            raise ValueError(f"{total} things are to be shared by {self.count} processes; expected a multiple of them")
        size = total // self.count
        return range(self.rank * size, (self.rank + 1) * size)


@contextmanager
def join(device: torch.device | str) -> Iterator[Processes]:
    """Meet the other processes of the run, and leave together with them.

    device:  of several processes on "cuda" each takes the GPU of its local rank

    An error within the block is told to the others, which end with `ProcessLost`; of several processes that fail at
    once one keeps its error. Raises UserError when the environment makes no sense or the others do not come.
    """
    place = Place.from_environment()
    device = torch.device(device)
    if device.type == "cuda":
        device = device if device.index is not None else torch.device("cuda", place.local_rank)
        torch.cuda.set_device(device)
    if place.count == 1:
        yield Processes(rank=0, count=1, device=device)
        return
    # Processes of one machine share the cores that one would use.
    torch.set_num_threads(max(1, torch.get_num_threads() // place.local_count))
    follow_launcher()
    watch = _meet(place, device)
    try:
        yield Processes(rank=place.rank, count=place.count, device=device)
        barrier()  # nobody leaves while another one may still need it
    except BaseException as error:
        _fail(error, place, watch, device)
        raise
    _leave(watch)
    dist.destroy_process_group()


def rank() -> int:
    """Return the number of this process among those that met in `join`."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return how many processes met in `join`."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Tell whether this process is the one that writes and prints."""
    return rank() == 0


def barrier() -> None:
    """Wait until all processes are here. Raises ProcessLost."""
    any_process(False)


def any_process(flag: bool) -> bool:
    """Tell every process whether one of them says yes, such as to a wish to stop. Raises ProcessLost."""
    return any_process_each([flag])[0]


def any_process_each(flags: Sequence[bool]) -> list[bool]:
    """Answer several questions of `any_process` in one exchange. Raises ProcessLost."""
    if world_size() == 1:
        return list(flags)
    found = torch.tensor(flags, dtype=torch.int32)
    with _others_needed():
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return [bool(value) for value in found.tolist()]


def broadcast_object(value: Any) -> Any:
    """Return what the main process passes, on every process. Raises ProcessLost.

    The object is pickled; it comes from a process of the same run.
    """
    if world_size() == 1:
        return value
    values = [value]
    with _others_needed():
        dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
    return values[0]


def first_text(text: str) -> str:
    """Return on all processes the text of the first of them that passes one, "" where none does. Raises ProcessLost."""
    line = f"{' '.join(text.split())}\n" if text else ""
    lines = gather_rows(torch.tensor(list(line.encode(errors="backslashreplace")), dtype=torch.uint8))
    return broadcast_object(None if lines is None else bytes(lines.tolist()).decode().split("\n", 1)[0])


@torch.no_grad()
def gather_rows(rows: Tensor) -> Tensor | None:
    """Return the rows of all processes, those of rank 0 first, on the main process's CPU; None on the others.

    rows:  [n, ...], any device; n differs from process to process and may be 0, type and the other sizes are the same

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
    """Return an error as the last line of a traceback would; a user's mistake or a failing disk without its type."""
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


def _meet(place: Place, device: torch.device) -> ProcessWatch:
    global _watch
    # Its functions take the group of all processes at the time of the import as a default argument, and torch._dynamo
    # imports it in the middle of a run. That would keep the group, with gloo's threads, beyond destroy_process_group:
    # a thread that then lets go of a collective's tensor while Python shuts down wants the GIL, and the process aborts.
    from torch.distributed.nn import functional  # noqa: F401

    try:
        store = _connect(place, JOIN_TIMEOUT, holds_store=place.holds_store)
        watch_store = _connect(place, timedelta(seconds=launch.WATCH_GRACE_SECONDS), holds_store=False)
        watch = ProcessWatch(watch_store, rank=place.rank, count=place.count, end=_end_now)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", store=store,
                                rank=place.rank, world_size=place.count, timeout=COLLECTIVE_TIMEOUT)
    except RuntimeError as error:
        raise UserError(f"process {place.rank} of {place.count} could not join the others at {place.address}:"
                        f"{place.port} ({' '.join(str(error).split())[:200]}); expected all of them to start within "
                        f"{JOIN_TIMEOUT.seconds // 60} minutes, and the port to be free") from error
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
    """Leave because of an error. Raises ProcessLost instead when another process failed before."""
    earlier = None
    _leave(watch)
    if not isinstance(error, ProcessLost):
        earlier = watch.post_failure(describe_error(error))
        if earlier is None and place.holds_store:  # the others have to read it before the store goes
            time.sleep(1.5 * launch.HEARTBEAT_SECONDS)
    if device.type == "cpu":  # NCCL would wait for operations that never end; there the process's end is enough
        dist.destroy_process_group()
    if earlier is not None:
        raise ProcessLost(earlier) from error


@contextmanager
def _others_needed() -> Iterator[None]:
    """Turn torch's account of a broken connection into what became of the other process."""
    try:
        yield
    except RuntimeError as error:
        reason = None if _watch is None else _watch.find_reason()
        raise ProcessLost(reason or f"processes cannot reach each other: {describe_error(error)}") from error


def _end_now(reason: str) -> None:
    """End this process, whatever its main thread waits for."""
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
        raise UserError(f"{name} is {text!r}; expected a number >= 0, as torchrun sets it")
    return value
