"""Pool values by name over iterations and processes: number, mean and standard deviation."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


class Collector:
    """Adds up number, sum and sum of squares under names, in float64 and without waiting for the device.

    device:         where sums are kept and handed to `reduce`
    reduce:         adds a tensor up over all processes and returns the sum; None where there is one process
    rank:           number of this process
    num_processes:  how many there are

    With several processes `flush` and `state_dict` are collective: all call them, having added the same names.
    """

    def __init__(self, device: torch.device | str = "cpu", *, reduce: Callable[[Tensor], Tensor] | None = None,
                 rank: int = 0, num_processes: int = 1):
        if (reduce is None) != (num_processes == 1):
            raise ValueError(f"there are {num_processes} processes {'with' if reduce else 'without'} a sum over them; "
                             "expected one exactly where there are several")
        if not 0 <= rank < num_processes:
            raise ValueError(f"rank is {rank} of {num_processes} processes; expected 0 to {num_processes - 1}")
        self.device, self.rank, self.num_processes = torch.device(device), rank, num_processes
        self._reduce = reduce
        self._moments: dict[str, Tensor] = {}  # name -> float64 [3]: number, sum, sum of squares

    def add(self, name: str, values: Tensor) -> None:
        """Take values of any shape and number into account; equal names are pooled."""
        values = values.detach().to(self.device, torch.float64)
        # The number is made on the device: a number from the host would have to be copied there.
        moments = torch.stack([values.new_full([], values.numel()), values.sum(), values.square().sum()])
        held = self._moments.get(name)
        self._moments[name] = moments if held is None else held + moments

    def flush(self) -> dict[str, dict[str, float]]:
        """Return {name: {"num", "mean", "std"}} of all processes' values, names in order, and start anew.

        std is that of the values themselves (divided by num). Names without a value are left out; values that are not
        finite make mean and std so.
        """
        names, moments = self._gather()
        self._moments.clear()
        found = {}
        # Rows are added in the order of processes, so that the last digit does not depend on how a sum travels.
        for name, (num, total, squares) in zip(names, moments.sum(dim=0)):
            if num > 0:
                mean = total / num
                std = (squares / num - mean.square()).clamp(min=0).sqrt()  # rounding can bring it below 0
                found[name] = {"num": int(num), "mean": mean.item(), "std": std.item()}
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return what was added since the last flush: {"names": [...], "moments": float64 [processes, names, 3]}."""
        names, moments = self._gather()
        return {"names": names, "moments": moments}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take the place of what was saved, by the same number of processes or another.

        Raises ValueError when it is something else.
        """
        names, moments = saved.get("names"), saved.get("moments")
        if not (isinstance(names, list) and isinstance(moments, Tensor) and moments.ndim == 3
                and moments.shape[1:] == (len(names), 3)):
            raise ValueError("saved statistics hold no list of names with sums [processes, names, 3]; expected what "
                             "state_dict returned")
        if len(moments) != self.num_processes:  # the first process takes all
            everything = moments.sum(dim=0, keepdim=True)
            moments = torch.cat([everything, everything.new_zeros(self.num_processes - 1, *everything.shape[1:])])
        mine = moments[self.rank].to(self.device, torch.float64, copy=True)
        self._moments = dict(zip(names, mine.unbind()))

    def _gather(self) -> tuple[list[str], Tensor]:
        """Return the names in order, and all processes' sums on the CPU: float64 [processes, names, 3]."""
        names = sorted(self._moments)
        moments = torch.zeros(self.num_processes, len(names), 3, dtype=torch.float64, device=self.device)
        if names:
            moments[self.rank] = torch.stack([self._moments[name] for name in names])
            if self._reduce is not None:
                moments = self._reduce(moments)  # every row has one owner: adding zeros to it gathers it
        return names, moments.cpu()
