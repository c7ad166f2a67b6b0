"""Collect values by name over iterations and processes: number, mean and standard deviation."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


class Collector:
    """Accumulates number, sum and sum of squares by name, in float64 and without synchronizing with the device.

    device:         where sums are kept and passed to `reduce`
    reduce:         returns the sum of a tensor over all processes; None for a single process
    rank:           of this process
    num_processes:  number of processes

    With several processes `flush` and `state_dict` are collective: all must call them, with the same names added.
    """

    def __init__(self, device: torch.device | str = "cpu", *, reduce: Callable[[Tensor], Tensor] | None = None,
                 rank: int = 0, num_processes: int = 1):
        if (reduce is None) != (num_processes == 1):
            raise ValueError(f"num_processes is {num_processes} {'with' if reduce else 'without'} reduce; expected "
                             "reduce exactly when there are several processes")
        if not 0 <= rank < num_processes:
            raise ValueError(f"rank is {rank} of {num_processes} processes; expected 0 to {num_processes - 1}")
        self.device, self.rank, self.num_processes = torch.device(device), rank, num_processes
        self._reduce = reduce
        self._moments: dict[str, Tensor] = {}  # name -> float64 [3]: number, sum, sum of squares

    def add(self, name: str, values: Tensor) -> None:
        """Add values of any shape; values with the same name are pooled."""
        values = values.detach().to(self.device, torch.float64)
        # The count is created on the device: one from the host would have to be copied there.
        moments = torch.stack([values.new_full([], values.numel()), values.sum(), values.square().sum()])
        held = self._moments.get(name)
        self._moments[name] = moments if held is None else held + moments

    def flush(self) -> dict[str, dict[str, float]]:
        """Return {name: {"num", "mean", "std"}} over all processes, sorted by name, and reset.

        std is the population standard deviation (divided by num). Names without a value are omitted; non-finite values
        make mean and std non-finite.
        """
        names, moments = self._gather()
        self._moments.clear()
        found = {}
        # Rows are added in rank order, so that rounding does not depend on the order of communication.
        for name, (num, total, squares) in zip(names, moments.sum(dim=0)):
            if num > 0:
                mean = total / num
                std = (squares / num - mean.square()).clamp(min=0).sqrt()  # rounding can make it negative
                found[name] = {"num": int(num), "mean": mean.item(), "std": std.item()}
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return what was added since the last flush: {"names": [...], "moments": float64 [processes, names, 3]}."""
        names, moments = self._gather()
        return {"names": names, "moments": moments}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned, also with another number of processes.

        Raises ValueError when `saved` has another form.
        """
        names, moments = saved.get("names"), saved.get("moments")
        if not (isinstance(names, list) and isinstance(moments, Tensor) and moments.ndim == 3
                and moments.shape[1:] == (len(names), 3)):
            raise ValueError("saved statistics have no names with moments [processes, names, 3]; expected the output "
                             "of state_dict")
        if len(moments) != self.num_processes:  # the first process takes all
            everything = moments.sum(dim=0, keepdim=True)
            moments = torch.cat([everything, everything.new_zeros(self.num_processes - 1, *everything.shape[1:])])
        mine = moments[self.rank].to(self.device, torch.float64, copy=True)
        self._moments = dict(zip(names, mine.unbind()))

    def _gather(self) -> tuple[list[str], Tensor]:
        """Return the sorted names, and the sums of all processes on the CPU: float64 [processes, names, 3]."""
        names = sorted(self._moments)
        moments = torch.zeros(self.num_processes, len(names), 3, dtype=torch.float64, device=self.device)
        if names:
            moments[self.rank] = torch.stack([self._moments[name] for name in names])
            if self._reduce is not None:
                moments = self._reduce(moments)  # each row is zero on all other ranks, so that the sum gathers it
        return names, moments.cpu()
