"""Programs that tests run as several processes: `python -m tests.helpers.process_programs NAME FOLDER`."""

import importlib
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch

from dnnlib.cli import UserError
from tests.helpers.small_networks import ada_config, small_config, small_inputs, small_state
from torch_utils import distributed, launch
from torch_utils.distributed import Processes
from training.augment import AugmentPipe
from training.dataset import ImageDataset
from training.phases import StepInputs, draw_phases
from training.sampling import LabelDistribution, TrainingOrder, iterate_batches
from training.step import train_step

DATA = Path(__file__).parent.parent / "data"


def train_golden(processes: Processes) -> dict:
    """Train from the golden run's start, with two of its batches of 8 an iteration, for 5 iterations in float64."""
    from tests.helpers.parity_checks import golden_start, one_hot, randn  # here: other programs start faster without it

    state, config = golden_start(DATA)
    config = type(config)(batch=16, micro_batch=8, loss=config.loss, ema=config.ema)
    rows = processes.share(16)
    rows = slice(rows.start, rows.stop)
    labels = one_hot(torch.arange(16).numpy() % 2).double()
    for iteration in range(5):
        phases = draw_phases(config, seed=3, nimg=state.nimg, iteration=iteration, microbatches=processes.share(2),
                             z_dim=64, num_ws=state.G.num_ws, label_law=LabelDistribution(labels.float()),
                             image_shape=(3, 32, 32))
        reals = (0.5 * randn(iteration, 16, 3, 32, 32)).clamp(-1, 1)
        result = train_step(state, StepInputs(reals=reals[rows], labels=labels[rows], phases=phases), config, processes)
        assert not result.skipped
    return state.state_dict()


def train_augmented(processes: Processes) -> dict:
    """Train for 7 iterations with style mixing, layer noise, augmentation and ADA, four micro-batches each."""
    pipe = AugmentPipe(xflip=1, rotate=1, hue=1, noise=1)
    pipe.p.fill_(0.5)
    config = small_config(batch=16, micro_batch=4, ada=ada_config(kimg=2))
    state = small_state(config, augment=pipe, dtype=torch.float64)
    for _ in range(7):
        train_step(state, small_inputs(state, config, microbatches=processes.share(4)), config, processes)
    return state.state_dict()


def train_with_bad_values(processes: Processes) -> dict:
    """Train two iterations; in the first one the last process gets bad latents in Gmain and bad images."""
    config = small_config(batch=8, micro_batch=4)
    state = small_state(config)
    skipped = []
    for iteration in range(2):
        inputs = small_inputs(state, config, microbatches=processes.share(2))
        if iteration == 0 and processes.rank == processes.count - 1:
            inputs.phases["Gmain"].z[-1] = float("nan")
            inputs.reals[-1] = float("inf")
        skipped.append(train_step(state, inputs, config, processes).skipped)
    return {"skipped": skipped, "state": state.state_dict()}


def read_images(processes: Processes) -> dict:
    """Read what 5 iterations of 4 images see."""
    dataset = ImageDataset(Path(sys.argv[2]) / "images.zip", use_labels=True, xflip=True)
    order = TrainingOrder(len(dataset), seed=5)
    batches = iterate_batches(dataset, order, nimg=8, batch=4, rows=processes.share(4), num_workers=processes.count - 1)
    pixels, labels = zip(*(next(batches) for _ in range(5)))
    batches.close()
    return {"pixels": list(pixels), "labels": list(labels)}


def tensors_of(index: int) -> list[torch.Tensor]:
    """Return tensors of many kinds, other values in each process."""
    rng = torch.Generator().manual_seed(index)
    floats = [torch.randn(shape, generator=rng, dtype=dtype) for shape, dtype in (
        ((3, 5), torch.float32), ((), torch.float64), ((7,), torch.bfloat16), ((0,), torch.float32),
        ((100, 90), torch.float32), ((4, 4), torch.float16), ((2, 3, 4, 5), torch.float32), ((1000,), torch.float64))]
    floats[6] = floats[6].to(memory_format=torch.channels_last)
    floats[0] = floats[0].t()
    return [*floats, torch.randint(-2**40, 2**40, (5,), generator=rng)]


def add_up(processes: Processes) -> dict:
    """Sum tensors of many kinds, in buckets of usual size and in small ones."""
    found = []
    for size in (distributed._BUCKET_BYTES, 100):
        distributed._BUCKET_BYTES = size
        tensors = tensors_of(processes.rank)
        layouts = [(tensor.data_ptr(), tensor.stride()) for tensor in tensors]
        processes.sum(tensors)
        assert layouts == [(tensor.data_ptr(), tensor.stride()) for tensor in tensors]
        found.append(tensors)
    repeated = tensors_of(processes.rank)
    processes.sum(repeated)
    assert all(torch.equal(a, b) for a, b in zip(repeated, found[1], strict=True))
    return {"usual": found[0], "small": found[1]}


def talk(processes: Processes) -> dict:
    """Use everything that is not a sum."""
    last = processes.rank == processes.count - 1
    return {"rank": distributed.rank(), "world_size": distributed.world_size(), "is_main": distributed.is_main(),
            "threads": torch.get_num_threads(),
            "any": [distributed.any_process(flag) for flag in (last, not last, False, True)],
            "any_each": distributed.any_process_each([last, not last, False, True]),
            "object": distributed.broadcast_object({"from": processes.rank, "list": [1, "two"]})}


def import_late(processes: Processes) -> None:
    """Import what PyTorch itself imports when it first needs it, as when a network is built on "meta"."""
    importlib.import_module("torch._dynamo")
    importlib.import_module("torch.distributed.nn.functional")
    distributed.barrier()


def run_forever(processes: Processes) -> None:
    for iteration in range(10**9):
        (Path(sys.argv[2]) / f"running-{processes.rank}").write_text(str(os.getpid()))
        act(iteration, processes)
        distributed.any_process(False)
        time.sleep(0.02)


def act(iteration: int, processes: Processes) -> None:
    """Do what argument 3 says, in the process that argument 4 names, in the third iteration."""
    if iteration != 3 or processes.rank != int(sys.argv[4]):
        return
    if sys.argv[3] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif sys.argv[3] == "fails":
        raise ArithmeticError("no\nluck")
    elif sys.argv[3] == "refuses":
        raise UserError("--luck is 0; more")
    elif sys.argv[3] == "leaves":
        sys.exit(9)


def wait_elsewhere(processes: Processes) -> None:
    """Wait for nothing that breaks when another process is killed, as with NCCL; with shorter delays than usual."""
    distributed.barrier()
    if processes.rank == int(sys.argv[4]):
        time.sleep(1)  # until the others know that all have come
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(100)


def fail_alike(processes: Processes) -> None:
    distributed.barrier()
    raise UserError("the same mistake in all")


def save_result(processes: Processes, program) -> None:
    result = program(processes)
    torch.save(result, Path(sys.argv[2]) / f"{program.__name__}-{processes.rank}of{processes.count}.pt")


def main() -> int:
    torch.set_num_threads(2)
    programs = [globals()[name] for name in sys.argv[1].split("+")]
    if programs == [wait_elsewhere]:
        launch.HEARTBEAT_SECONDS, launch.SILENT_SECONDS, launch.WATCH_GRACE_SECONDS = 0.3, 2, 1
    try:
        with distributed.join("cpu") as processes:
            for program in programs:
                save_result(processes, program)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(*threads_of_gloo(), sep="\n", end="", file=sys.stderr)  # nothing, where the processes have parted
    return 0


def threads_of_gloo() -> list[str]:
    """Return the names of the threads that gloo runs in this process; none on other systems than Linux."""
    names = []
    for path in Path("/proc/self/task").glob("*/comm"):
        with suppress(OSError):  # it has just ended
            names.append(path.read_text().strip())
    return [name for name in names if "gloo" in name]


if __name__ == "__main__":
    sys.exit(main())
