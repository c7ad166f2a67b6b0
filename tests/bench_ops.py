"""Time the implementations of the ops against each other, interleaved in one process.

    python -m tests.bench_ops [--quick] [--threads N]

Prints one record a line, `<op>/<implementation>/<dtype>/<shape>/<pass>`, and the same as JSON in the last line. The
implementations take turns, so that whatever else the machine does meets all of them; the numbers are medians.
"""

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

from tests.op_cases import CPU_IMPLEMENTATIONS
from torch_utils.ops.bias_act import bias_act
from torch_utils.ops.upfirdn2d import downsample2d, filter2d, setup_filter, upsample2d

TAPS = [1, 3, 3, 1]
# (op, shape of the input); 4 taps, float32, NCHW
WORK = [
    ("upsample2d", (4, 64, 128, 128)),
    ("downsample2d", (4, 64, 256, 256)),
    ("filter2d", (4, 64, 256, 256)),
    ("upsample2d", (8, 256, 16, 16)),
    ("downsample2d", (8, 256, 32, 32)),
    ("filter2d", (16, 512, 16, 16)),
    ("bias_act", (4, 64, 256, 256)),
    ("bias_act", (16, 512, 16, 16)),
]
FILTERS = {"upsample2d": upsample2d, "downsample2d": downsample2d, "filter2d": filter2d}
# bias_act is one code under two names, and serves as a measure of what the clock can tell apart.


def build(op: str, shape: tuple[int, ...], impl: str, device: str) -> dict[str, Callable[[], object]]:
    """Return what is timed: the forward pass, and forward and backward together."""
    x = torch.randn(shape, device=device).requires_grad_()
    if op == "bias_act":
        b = torch.randn(shape[1], device=device).requires_grad_()
        inputs = (x, b)

        def run():
            return bias_act(x, b, act="lrelu", clamp=256, impl=impl)
    else:
        f = setup_filter(TAPS, device=device)
        inputs = (x,)

        def run():
            return FILTERS[op](x, f, impl=impl)

    weights = torch.randn_like(run())

    def forward():
        with torch.no_grad():
            run()

    return {"fwd": forward, "fwd+bwd": lambda: torch.autograd.grad(run(), inputs, weights)}


def measure(works: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Return the median milliseconds of each, taking turns after one warm-up."""
    times = {name: [] for name in works}
    for turn in range(repeats + 1):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            if turn > 0:
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def benchmark(repeats: int, quick: bool) -> list[dict]:
    """Time every piece of work with every implementation, printing as it goes."""
    records = []
    for op, shape in WORK:
        if quick:
            shape = (1, *shape[1:])
        built = {impl: build(op, shape, impl, "cpu") for impl in CPU_IMPLEMENTATIONS}
        for part in ("fwd", "fwd+bwd"):
            medians = measure({impl: works[part] for impl, works in built.items()}, repeats)
            for impl, median_ms in medians.items():
                name = f"{op}/{impl}/float32/{'x'.join(map(str, shape))}/{part}"
                ratio = medians["ref"] / median_ms
                print(f"{name:60} {median_ms:10.3f} ms  {ratio:6.2f} times as fast as ref", flush=True)
                records.append({"name": name, "median_ms": round(median_ms, 4), "ref_over_this": round(ratio, 3)})
    return records


def commit() -> str | None:
    """Return the commit that is checked out, or None outside a repository or before the first."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True,
                           text=True, check=False)
    return found.stdout.strip() if found.returncode == 0 else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one image a batch, three repeats")
    parser.add_argument("--threads", type=int, help="threads of the CPU, default: as torch chooses")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    repeats = 3 if options.quick else 11
    records = benchmark(repeats, options.quick)
    print(json.dumps({"records": records, "repeats": repeats, "threads": torch.get_num_threads(),
                      "device": platform.processor() or platform.machine(), "torch": torch.__version__,
                      "commit": commit()}))


if __name__ == "__main__":
    main()
