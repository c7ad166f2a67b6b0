"""Time the compiled operators against the reference, the best composition of PyTorch operators, and copying memory.

    python -m tests.bench.bench_ops [--quick] [--threads N] [--seconds S] [--tune-malloc BOOL] [--device cpu]

Shapes are those of training at 32, 64 and 256. Implementations take turns in one process, so that other load on the
machine affects all equally. A record is one JSON line; the last line is a summary. Times are medians in ms.

fwd is the result, grad only the first derivative, grad2 the derivative of the gradient by its incoming gradient.
over_composition: speed relative to the faster of PyTorch's depthwise convolutions, one with 4 x 4 taps or two with 4;
                  for bias_act relative to its chain of elementwise operators
of_copy:          bytes that must be read and written per second, relative to copy_ into allocated memory
"""

import argparse
import json
import math
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from torch_utils.device import tune_malloc
from torch_utils.ops.bias_act import bias_act
from torch_utils.ops.compiled import describe, make_ready
from torch_utils.ops.upfirdn2d import setup_filter, upfirdn2d

TAPS = [1, 3, 3, 1]
UP, DOWN, SAME = {"up": 2, "padding": [2, 1, 2, 1], "gain": 4}, {"down": 2, "padding": 1}, {"padding": [2, 1, 2, 1]}
PASSES = ("fwd", "grad", "grad2")
GOALS = {"upfirdn2d": {"fwd": 3, "grad": 3, "grad2": 3}, "bias_act": {"fwd": 4, "grad": 8}}  # over_composition
COPY_GOAL, LARGE = 0.6, 1 << 22  # of_copy, on tensors with at least this many elements


@dataclass(frozen=True)
class Work:
    """One operator at one shape of its input."""

    name: str
    op: str
    shape: tuple[int, ...]
    arguments: dict | None = None


def training_work() -> list[Work]:
    """Return the cases of the networks of cfg auto at 32, 64 and 256 with 16, 8 and 4 images."""
    works = []
    for res, batch in ((32, 16), (64, 8), (256, 4)):
        channels = min(16384 // res, 512)
        wide = (batch, channels, res, res)
        works += [
            Work("after the transposed convolution", "upfirdn2d", (batch, channels, res + 1, res + 1), {"padding": 1}),
            Work("before the strided convolution", "upfirdn2d", wide, {"padding": 2}),
            Work("downsample2d", "upfirdn2d", wide, DOWN),
            Work("upsample2d of images", "upfirdn2d", (batch, 3, res // 2, res // 2), UP),
            Work("bias_act lrelu", "bias_act", wide),
        ]
    return works


WORK = [
    Work("upsample2d", "upfirdn2d", (4, 64, 128, 128), UP),
    Work("downsample2d", "upfirdn2d", (4, 64, 256, 256), DOWN),
    Work("filter2d", "upfirdn2d", (4, 64, 256, 256), SAME),
    Work("upsample2d", "upfirdn2d", (8, 256, 16, 16), UP),
    Work("downsample2d", "upfirdn2d", (8, 256, 32, 32), DOWN),
    Work("filter2d", "upfirdn2d", (16, 512, 16, 16), SAME),
    Work("filter2d", "upfirdn2d", (16, 512, 8, 8), SAME),
    Work("bias_act lrelu", "bias_act", (16, 512, 16, 16)),
    *training_work(),
]


def build(work: Work, impl: str, device: str, separable: bool = False) -> dict[str, Callable[[], object]]:
    """Return the passes of one implementation, by name.

    separable: the filter as 4 taps for each axis, rather than as 4 x 4 (upfirdn2d)
    """
    x = torch.randn(work.shape, device=device).requires_grad_()
    inputs = [x]
    if work.op == "bias_act":
        b = torch.randn(work.shape[1], device=device).requires_grad_()
        inputs.append(b)

        def run() -> Tensor:
            return bias_act(x, b, act="lrelu", impl=impl)
    else:
        f = setup_filter(TAPS, device=device, separable=separable)

        def run() -> Tensor:
            return upfirdn2d(x, f, **work.arguments, impl=impl)

    y = run()
    weights = torch.randn_like(y).requires_grad_()
    first, = torch.autograd.grad(y, x, weights, create_graph=True)
    again = torch.randn_like(first)

    def forward() -> Tensor:
        with torch.no_grad():
            return run()

    plain = weights.detach()
    return {"fwd": forward, "grad": lambda: torch.autograd.grad(y, inputs, plain, retain_graph=True),
            "grad2": lambda: torch.autograd.grad(first, weights, again, retain_graph=True)}


def bytes_moved(work: Work, which: str) -> int:
    """Return the bytes that a pass has to read and write, of float32 numbers."""
    into = math.prod(work.shape)
    if work.op == "bias_act":
        return 4 * into * (2 if which == "fwd" else 3)  # the derivatives read the result too
    return 4 * (into + output_size(work))


def output_size(work: Work) -> int:
    y = upfirdn2d(torch.empty(work.shape, device="meta"), setup_filter(TAPS, device="meta", separable=False),
                  **work.arguments)
    return y.numel()


def measure(works: dict[str, Callable[[], object]], repeats: int, seconds: float = math.inf,
            clock: Callable[[], float] = time.perf_counter) -> dict[str, float]:
    """Return the median milliseconds of each, taking turns after one warm-up; fewer turns, three at least, in time."""
    times = {name: [] for name in works}
    start = time.perf_counter()
    for turn in range(repeats + 1):
        if turn > 3 and time.perf_counter() - start > seconds:
            break
        for name, work in works.items():
            begin = clock()
            work()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            if turn > 0:
                times[name].append((clock() - begin) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def benchmark(work: Work, which: str, built: dict, repeats: int, seconds: float, device: str) -> dict:
    """Time one pass of one operator, and print its record."""
    elements = max(bytes_moved(work, which) // 8, 1)
    source, target = torch.ones(elements, device=device), torch.empty(elements, device=device)
    passes = {name: passes[which] for name, passes in built.items()}
    medians = measure({**passes, "copy": lambda: target.copy_(source)}, repeats, seconds)
    best = min(ms for name, ms in medians.items() if name.startswith("composed"))
    ours = medians["auto"]
    over, of_copy = best / ours, medians["copy"] / ours
    goal = GOALS[work.op].get(which)
    is_large = elements >= LARGE and work.op == "upfirdn2d"
    record = {"name": f"{work.name}/float32/{'x'.join(map(str, work.shape))}/{which}", "median_ms": round(ours, 4),
              "over_composition": round(over, 2), "over_ref": round(medians["ref"] / ours, 2),
              "of_copy": round(of_copy, 2), "gb_per_s": round(bytes_moved(work, which) / ours / 1e6, 1),
              "goal": goal, "met": (goal is None or over >= goal) and (not is_large or of_copy >= COPY_GOAL)}
    print(json.dumps(record), flush=True)
    return record


def commit() -> str | None:
    """Return the commit that is checked out, or None outside a repository or before the first."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent,
                           capture_output=True,
                           text=True, check=False)
    return found.stdout.strip() if found.returncode == 0 else None


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="only the small shapes, three turns")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's)")
    parser.add_argument("--seconds", type=float, default=2, help="for each record, after three turns (default: 2)")
    parser.add_argument("--tune-malloc", type=lambda text: text.lower() in ("1", "true", "yes"), default=True,
                        help="as in the programs (default: true)")
    parser.add_argument("--device", default="cpu", help="default: cpu")
    return parser.parse_args()


def main() -> None:
    options = parse()
    memory = tune_malloc(options.tune_malloc).note
    make_ready(torch.device(options.device).type)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    records = []
    for work in WORK:
        if options.quick and math.prod(work.shape) > LARGE:
            continue
        built = {"auto": build(work, "auto", options.device), "composed": build(work, "composed", options.device),
                 "ref": build(work, "ref", options.device)}
        if work.op == "upfirdn2d":
            built["composed of 4"] = build(work, "composed", options.device, separable=True)
        records += [benchmark(work, which, built, 3 if options.quick else 25, options.seconds, options.device)
                    for which in PASSES]
    print(json.dumps({"records": len(records), "met": sum(record["met"] for record in records),
                      "operators": describe(torch.device(options.device).type), "memory": memory,
                      "threads": torch.get_num_threads(), "device": platform.processor() or platform.machine(),
                      "torch": torch.__version__, "commit": commit()}))


if __name__ == "__main__":
    main()
