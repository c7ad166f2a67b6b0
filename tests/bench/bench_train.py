"""Time training iterations against reference operators, and against plain convolutions, in one run.

    python -m tests.bench.bench_train [--resolutions 32,64,256] [--cfg auto] [--device cpu] [--images N] [--seconds S]
                                [--tune-malloc BOOL]

Iterations are real ones, on random images. Regularization is lazy, so a cycle has several kinds of iterations, with
different phases; each kind is timed, in turns with the convolutions, and weighted by its number in a cycle.
If a batch takes too long on a CPU, an iteration gets one micro-batch of a few images, and the time of a whole batch is
extrapolated. Prints one record per line, and all of them as JSON in the last line; times are medians.

over_ref: time of a cycle, divided by that with impl="ref" for filters and activations; everything else is the same
share: floating point operations per second of the convolutions and matrix products in an iteration, divided by the rate
       of the forward pass of a 3x3 convolution at each resolution of the networks. Filters, activations, augmentation,
       optimizers and the rest of an iteration take time, but do not count as operations.
"""

import argparse
import dataclasses
import json
import math
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import conv_flop_count, flop_registry

from tests.bench.bench_ops import commit
from torch_utils.device import tune_malloc
from torch_utils.ops.compiled import auto_means, describe, make_ready
from training.config import DatasetFacts, TrainConfig
from training.options import TrainOptions, resolve
from training.phases import StepInputs, active_phases, draw_phases
from training.sampling import LabelDistribution
from training.state import TrainingState
from training.step import train_step

CLASSES = 2
SHORT_MS = 300


def backward_flops(grad: Tensor, x: Tensor, w: Tensor, *args: Any, out_val: object) -> int:
    """Count a convolution's backward pass: each of its two gradients costs as much as the forward pass."""
    _bias, _stride, _padding, _dilation, transposed, _output_padding, _groups, output_mask = args
    return conv_flop_count(x.shape, w.shape, grad.shape, transposed) * (output_mask[0] + output_mask[1])


# PyTorch's own formula of the backward pass overcounts grouped convolutions. Its FlopCounterMode cannot be used, since
# its module hooks break torch.autograd.grad.
FORMULAS = {**flop_registry, torch.ops.aten.convolution_backward: backward_flops}


class Work(TorchDispatchMode):
    """A context that counts operators, and the floating point operations of convolutions and matrix products.

    Operators are all that PyTorch dispatches, and `launches` those that compute: they are none of the views, which only
    look at the same memory in another way.
    """

    def __init__(self):
        super().__init__()
        self.flops = self.operators = self.launches = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.operators += 1
        self.launches += not is_view(func)
        formula = FORMULAS.get(func.overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
        return result


def is_view(func: torch._ops.OpOverload) -> bool:
    """Tell whether a result shares the memory of an argument that is not changed."""
    aliases = [result.alias_info for result in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def count(work: Callable[[], object]) -> Work:
    """Return the cost of a workload."""
    with Work() as counted:
        work()
    return counted


def configure(options: argparse.Namespace, resolution: int) -> TrainConfig:
    facts = DatasetFacts(name="random", resolution=resolution, channels=3, num_images=1000, c_dim=CLASSES)
    return resolve(TrainOptions(cfg=options.cfg, cond=True, batch=options.batch, precision="fp32"), facts)


def build_iterations(config: TrainConfig, images: int, device: str) -> dict[tuple[str, ...], Callable[[], object]]:
    """Return an iteration of each kind, by its phases, with one micro-batch of the given size."""
    state = TrainingState.create(config, device)
    step = dataclasses.replace(config.step, batch=images, micro_batch=images)
    shape = (3, config.dataset.resolution, config.dataset.resolution)
    reals = torch.rand(images, *shape, device=device) * 2 - 1
    labels = F.one_hot(torch.arange(images) % CLASSES, CLASSES).float()

    def iterate(iteration: int) -> None:
        state.iteration = iteration
        phases = draw_phases(step, seed=0, nimg=state.nimg, iteration=iteration, microbatches=range(1),
                             z_dim=state.G.z_dim, num_ws=state.G.num_ws, label_law=LabelDistribution(labels),
                             image_shape=shape, device=device)
        train_step(state, StepInputs(reals=reals, labels=labels.to(device), phases=phases), step)

    kinds = {}
    for iteration in range(cycle(config).total()):
        kinds.setdefault(tuple(active_phases(iteration, step.loss)), lambda iteration=iteration: iterate(iteration))
    return kinds


def cycle(config: TrainConfig) -> Counter:
    """Return the number of iterations of each kind, by its phases, in one cycle."""
    loss = config.step.loss
    return Counter(tuple(active_phases(iteration, loss)) for iteration in
                   range(math.lcm(loss.g_reg_interval, loss.d_reg_interval)))


def referring(work: Callable[[], object]) -> Callable[[], object]:
    """Return the same workload with the reference operators."""
    def run() -> None:
        with auto_means("ref"):
            work()

    return run


def build_convolutions(config: TrainConfig, images: int, device: str) -> dict[tuple[int, ...], Callable[[], object]]:
    """Return the 3x3 convolution of each resolution of the networks, by the shape of its input."""
    works, resolution = {}, 4
    while resolution <= config.dataset.resolution:
        channels = min(config.generator.channel_base // resolution, config.generator.channel_max)
        x = torch.randn(images, channels, resolution, resolution, device=device)
        w = torch.randn(channels, channels, 3, 3, device=device)

        def convolve(x=x, w=w) -> None:
            with torch.no_grad():
                F.conv2d(x, w, padding=1)

        works[tuple(x.shape)] = convolve
        resolution *= 2
    return works


def timed(work: Callable[[], object]) -> float:
    """Return the milliseconds of a workload."""
    start = time.perf_counter()
    work()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def measure(works: dict, seconds: float) -> tuple[dict, int]:
    """Return the median milliseconds of each, and the number of turns: as many as fit into `seconds`, at least one.

    Short workloads are repeated within a turn.
    """
    times = {name: [] for name in works}
    start = time.perf_counter()
    turns = 0
    while turns == 0 or time.perf_counter() - start < seconds * turns / (turns + 1):  # is there time for one more?
        for name, work in works.items():
            found = [timed(work)]
            while sum(found) < SHORT_MS:
                found.append(timed(work))
            times[name] += found
        turns += 1
    return {name: statistics.median(values) for name, values in times.items()}, turns


def benchmark(options: argparse.Namespace, resolution: int) -> list[dict]:
    """Time one resolution, and print its records."""
    config = configure(options, resolution)
    images = options.images or default_images(config, options.device)
    iterations, convolutions = (build(config, images, options.device) for build in
                                (build_iterations, build_convolutions))
    counts = {name: count(work) for name, work in {**iterations, **convolutions}.items()}  # this warms up too
    with_ref = {("ref", *kind): referring(iterate) for kind, iterate in iterations.items()}
    for iterate in with_ref.values():
        iterate()  # to warm up
    medians, turns = measure({**iterations, **with_ref, **convolutions}, options.seconds)
    title = f"train/{options.cfg}{resolution}/float32"
    records = []
    for name, work in counts.items():
        kind = f"{title}/{images} images/{'+'.join(name)}" if name in iterations else \
            f"conv2d/3x3/float32/{'x'.join(map(str, name))}/fwd"
        records.append({"name": kind, "median_ms": round(medians[name], 3), "gflop": round(work.flops / 1e9, 3),
                        "gflop_per_s": round(work.flops / medians[name] / 1e6, 2), "operators": work.operators,
                        "launches": work.launches})
    records.append({"name": title, "turns": turns, **summarize(config, images, medians, counts, convolutions)})
    for record in records:
        print("  ".join(f"{key} {value}" if key != "name" else f"{value:60}" for key, value in record.items()),
              flush=True)
    return records


def default_images(config: TrainConfig, device: str) -> int:
    """Return the number of images of a measured iteration: on a CPU few enough for some turns in minutes."""
    most = min(max(512 // config.dataset.resolution, 4), 16) if device == "cpu" else config.step.micro_batch
    return min(config.step.micro_batch, most)


def summarize(config: TrainConfig, images: int, medians: dict, counts: dict, convolutions: dict) -> dict:
    """Return the time of a cycle from those of its kinds of iterations."""
    kinds = cycle(config)
    length = kinds.total()
    milliseconds = sum(medians[kind] * times for kind, times in kinds.items())
    with_ref = sum(medians["ref", *kind] * times for kind, times in kinds.items())
    rate = sum(counts[kind].flops * times for kind, times in kinds.items()) / milliseconds / 1e6
    plain = sum(counts[shape].flops for shape in convolutions) / sum(medians[shape] for shape in convolutions) / 1e6
    passes = config.batch // images
    return {
        "sec_per_kimg": round(milliseconds / (length * images), 2), "images_measured": images, "batch": config.batch,
        # Optimizers and the moving average run once per batch, but are counted here in each micro-batch.
        "extrapolated": f"at most that, from 1 of {passes} passes" if passes > 1 else "no",
        "over_ref": round(milliseconds / with_ref, 3),
        "gflop_per_image": round(rate * milliseconds / 1e3 / (length * images), 2), "gflop_per_s": round(rate, 2),
        "conv2d_gflop_per_s": round(plain, 2), "share": round(rate / plain, 3),
        **{f"{name}_per_iteration": round(sum(getattr(counts[kind], name) * times for kind, times in kinds.items())
                                          / length) for name in ("operators", "launches")},
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--resolutions", type=lambda text: [int(part) for part in text.split(",")],
                        default=[32, 64, 256], help="default: 32,64,256")
    parser.add_argument("--cfg", default="auto", help="preset (default: auto)")
    parser.add_argument("--batch", type=int, help="batch size (default: the preset's)")
    parser.add_argument("--images", type=int, help="images of a measured iteration, one micro-batch (default: on a CPU "
                        "512 / resolution, 4 to 16, elsewhere the preset's pass)")
    parser.add_argument("--device", default="cpu", help="default: cpu")
    parser.add_argument("--seconds", type=float, default=30, help="for each resolution, without warm-up (default: "
                        "30)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's)")
    parser.add_argument("--tune-malloc", type=lambda text: text.lower() in ("1", "true", "yes"), default=True,
                        help="as in the programs (default: true)")
    return parser.parse_args()


def main() -> None:
    options = parse()
    memory = tune_malloc(options.tune_malloc).note
    make_ready(torch.device(options.device).type)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    records = [record for resolution in options.resolutions for record in benchmark(options, resolution)]
    name = torch.cuda.get_device_name(options.device) if options.device != "cpu" else \
        platform.processor() or platform.machine()
    print(json.dumps({"records": records, "memory": memory, "operators": describe(torch.device(options.device).type),
                      "threads": torch.get_num_threads(), "device": name,
                      "torch": torch.__version__, "commit": commit()}))


if __name__ == "__main__":
    main()
