"""Feed a process of a run with its share of images, read ahead by worker processes."""

import os
import signal
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from dnnlib.cli import UserError
from dnnlib.disk_failures import DiskFailure
from training.dataset import ImageDataset
from training.sampling import TrainingOrder
from training.stopping import SIGNALS


class _Share(torch.utils.data.Sampler):
    """The item numbers of one process: one list an iteration, from any image counter on, without end."""

    def __init__(self, order: TrainingOrder, nimg: int, batch: int, rows: range):
        self.order, self.nimg, self.batch, self.rows = order, nimg, batch, rows

    def __iter__(self) -> Iterator[list[int]]:
        nimg = self.nimg
        while True:
            yield self.order.items(nimg + self.rows.start, len(self.rows)).tolist()
            nimg += self.batch


def iterate_batches(dataset: ImageDataset, order: TrainingOrder, *, nimg: int, batch: int, rows: range,
                    num_workers: int = 0, pin_memory: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (pixels uint8 [len(rows), C, R, R], labels float32 [len(rows), c_dim]) for each iteration from `nimg` on.

    nimg:   images seen before the first one that is wanted
    batch:  images of an iteration, over all processes
    rows:   which of them this process computes

    Image i of a run is the same for any number of processes and workers. Raises UserError, naming the file, when an
    image cannot be read, and DiskFailure.
    """
    loader = torch.utils.data.DataLoader(dataset, batch_sampler=_Share(order, nimg, batch, rows),
                                         num_workers=num_workers, pin_memory=pin_memory,
                                         worker_init_fn=_leave_stopping_to_the_parent)
    try:
        yield from map(tuple, loader)
    except (UserError, DiskFailure) as error:
        # A worker's exception arrives with its traceback in the message; the last line is what was raised.
        kind = type(error)
        text = str(error).strip().splitlines()[-1].removeprefix(f"{kind.__module__}.{kind.__qualname__}: ")
        raise kind(text) from None


def _leave_stopping_to_the_parent(_: int) -> None:
    """Ignore the signals that ask a whole run to stop: it still needs images to finish an iteration.

    SIGTERM from the parent itself, which ends its workers in this way, is obeyed.
    """
    for number in set(SIGNALS) - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # LIMIT: elsewhere a SIGTERM to all processes ends the workers
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_the_parent, args=(os.getppid(),), daemon=True).start()


def _obey_the_parent(parent: int) -> None:
    """Wait for SIGTERM, and end this process when the parent sent it."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def to_unit_range(pixels: Tensor) -> Tensor:
    """Map uint8 0..255 to float32 -1..1."""
    return pixels.float() / 127.5 - 1
