"""Time how fast metrics get the images of a set, by number of decoding processes, interleaved in one run.

    python -m tests.bench.bench_decoding [--quick] [--workers 1,2] [--detector random-conv] [--repeats N]

Draws phantoms of 64x64 and 256x256, then times their decoding alone, and features of the 64x64 ones. Prints one record
per line, `<what>/<resolution>/<count>`: `images_per_s` by number of processes, the `speedup` over decoding in the main
process, and `main_cpu_ms`, the time per image that the main process computes, which a detector on a GPU waits for; all
of them as JSON in the last line. Numbers are medians after a warm-up.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import torch

from dnnlib.workers import usable_cores
from imagesets.phantoms.make import write_phantoms
from metrics.detectors.registry import open_detector
from metrics.features import FeatureRequest, choose_batch, compute_features
from metrics.image_sources import SelectedImages, SetImages
from tests.bench.bench_ops import commit, measure


def decode(images: SelectedImages, workers: int) -> None:
    batch = choose_batch(images.images.shape[1])
    ranges = [range(start, min(start + batch, len(images))) for start in range(0, len(images), batch)]
    with closing(images.batches(ranges, workers)) as batches:
        for _ in batches:
            pass


def compare(name: str, count: int, works: dict[int, Callable[[], object]], repeats: int) -> dict:
    """Time works by number of processes, and print their record."""
    cpu = {workers: [] for workers in works}

    def counted(workers: int) -> None:
        begin = time.process_time()
        works[workers]()
        cpu[workers].append((time.process_time() - begin) * 1e3 / count)

    medians = measure({workers: lambda workers=workers: counted(workers) for workers in works}, repeats)
    record = {"name": name, "images_per_s": {workers: round(1e3 * count / ms) for workers, ms in medians.items()},
              "speedup": {workers: round(medians[1] / ms, 2) for workers, ms in medians.items()},
              "main_cpu_ms": {workers: round(sorted(found)[len(found) // 2], 3) for workers, found in cpu.items()}}
    print(json.dumps(record), flush=True)
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a third of the images")
    parser.add_argument("--workers", default="1,2", help="numbers of processes, the first 1 (default: 1,2)")
    parser.add_argument("--detector", default="random-conv", help="for features (default: random-conv)")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each (default: 5)")
    options = parser.parse_args()
    numbers = [int(number) for number in options.workers.split(",")]
    records = []
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for side, count in ((256, 800), (64, 3000)):
            count, path = count // (3 if options.quick else 1), Path(folder) / f"{side}.zip"
            with open(os.devnull, "w") as quiet:
                write_phantoms(path, stream=quiet, count=count, resolution=side)
            images = SetImages(path).select()
            records.append(compare(f"decode/{side}/{count}", count, {
                workers: lambda images=images, workers=workers: decode(images, workers) for workers in numbers},
                options.repeats))
        request = FeatureRequest(detector=open_detector(options.detector, device=torch.device("cpu"), weights=None),
                                 count=count)
        records.append(compare(f"features of {options.detector}/64/{count}", count, {
            workers: lambda workers=workers: compute_features(images, [request], batch=choose_batch(64), device="cpu",
                                                              workers=workers) for workers in numbers},
            options.repeats))
    print(json.dumps({"records": records, "repeats": options.repeats, "cores": usable_cores(),
                      "threads": torch.get_num_threads(), "torch": torch.__version__, "commit": commit()}))


if __name__ == "__main__":
    main()
