"""Compare time and memory of several workloads with and without allocator tuning (see torch_utils.device).

    python -m tests.bench.bench_allocator [--works clone,generate,train] [--resolution 64] [--cfg tiny] [--threads N]
                                    [--repeats N]

clone copies a float32 tensor [4, 64, 256, 256]; generate makes 32 images in batches of 16; train is an iteration with
all phases, on one micro-batch of the preset. Tuning lasts as long as a process, so each measurement runs in its own
process, alternating; times are medians, memory is the peak of all processes. Prints one record per line, and all of
them as JSON in the last line. Variables such as MALLOC_ARENA_MAX must not be set.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from generation.image_generator import ImageGenerator, SynthesisSettings
from tests.bench.bench_ops import commit
from tests.bench.bench_train import build_iterations, configure
from torch_utils.device import tune_malloc
from training.state import TrainingState

ROOT = Path(__file__).parent.parent.parent
WARM_UP_SECONDS, SECONDS = 2, 5


def build(work: str, options: argparse.Namespace) -> Callable[[], object]:
    """Return a workload."""
    if work == "clone":
        x = torch.randn(4, 64, 256, 256)
        return lambda: x.clone()
    config = configure(options, options.resolution)
    if work == "generate":
        generator = ImageGenerator(TrainingState.create(config, "cpu").G_ema, SynthesisSettings(), batch=16)
        labels = torch.eye(generator.G.c_dim)[:1].expand(32, -1)
        return lambda: list(generator.generate(range(32), labels))
    return next(iter(build_iterations(config, config.step.micro_batch, "cpu").values()))  # the first has all phases


def measure(options: argparse.Namespace) -> dict:
    """Measure one workload in this process."""
    tuning = tune_malloc(options.tuned)
    if tuning.is_done != options.tuned:
        sys.exit(tuning.note)
    work = build(options.works, options)
    times: list[float] = []
    run_for(WARM_UP_SECONDS, work, [])
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    run_for(SECONDS, work, times)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {"ms": times, "faults": (usage.ru_minflt - faults) / len(times), "peak_mb": usage.ru_maxrss / 1024}


def run_for(seconds: float, work: Callable[[], object], times: list[float]) -> None:
    """Repeat a workload for `seconds`, at least three times, and add the milliseconds of each time."""
    start = time.perf_counter()
    done = 0
    while done < 3 or time.perf_counter() - start < seconds:
        before = time.perf_counter()
        work()
        times.append((time.perf_counter() - before) * 1e3)
        done += 1


def compare(work: str, options: argparse.Namespace) -> dict:
    """Measure a workload in processes with and without tuning, and print the record."""
    found: dict[bool, list[dict]] = {True: [], False: []}
    for _ in range(options.repeats):
        for tuned, results in found.items():
            results.append(in_a_process(work, tuned, options))
    record = {"name": work if work == "clone" else f"{work}/{options.cfg}{options.resolution}"}
    for tuned, results in found.items():
        prefix = "tuned" if tuned else "left"
        record[f"{prefix}_ms"] = round(statistics.median(ms for result in results for ms in result["ms"]), 2)
        record[f"{prefix}_faults"] = round(statistics.median(result["faults"] for result in results))
        record[f"{prefix}_peak_mb"] = round(max(result["peak_mb"] for result in results))
    record["ratio"] = round(record["left_ms"] / record["tuned_ms"], 3)
    print("  ".join(f"{key} {value}" if key != "name" else f"{value:20}" for key, value in record.items()), flush=True)
    return record


def in_a_process(work: str, tuned: bool, options: argparse.Namespace) -> dict:
    command = [sys.executable, "-m", "tests.bench.bench_allocator", f"--works={work}", f"--cfg={options.cfg}",
               f"--resolution={options.resolution}", f"--threads={options.threads}", f"--tuned={int(tuned)}"]
    return json.loads(subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--works", default="clone,generate,train", help="separated by commas (default: all)")
    for name, standard, text in (("resolution", 64, "of the networks"),
                                 ("threads", torch.get_num_threads(), "of the CPU"),
                                 ("repeats", 3, "processes of each kind")):
        parser.add_argument(f"--{name}", type=int, default=standard, help=f"{text} (default: {standard})")
    parser.add_argument("--cfg", default="tiny", help="preset of the networks (default: tiny)")
    parser.add_argument("--tuned", type=lambda text: bool(int(text)), help="measure one workload in this process")
    return parser.parse_args()


def main() -> None:
    options = parse()
    options.batch = None  # the preset's
    torch.set_num_threads(options.threads)
    if options.tuned is not None:
        print(json.dumps(measure(options)))
        return
    records = [compare(work, options) for work in options.works.split(",")]
    print(json.dumps({"records": records, "repeats": options.repeats, "threads": options.threads,
                      "device": platform.processor() or platform.machine(), "torch": torch.__version__,
                      "libc": " ".join(platform.libc_ver()), "commit": commit()}))


if __name__ == "__main__":
    main()
