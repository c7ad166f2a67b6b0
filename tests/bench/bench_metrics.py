"""Time the metrics against other implementations on the same features, interleaved in one process.

    python -m tests.bench.bench_metrics [--quick] [--threads N] [--repeats N]
    python -m tests.bench.bench_metrics --large [--threads N]

Prints one record per line, `<metric>/<implementation>/<dtype>/<shape>`, and all of them as JSON in the last line. The
implementations take turns, so that other load on the machine affects all equally; numbers are medians after a warm-up.
The features are float32, as from detectors; `apart` is the difference between the two results. --large computes
precision, recall, density and coverage once, of two memory-mapped sets of 50,000 images, and prints the largest memory.
"""

import argparse
import json
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from metrics.frechet import FeatureStats, frechet_distance
from metrics.kernel import kernel_distance, kernel_jackknife
from metrics.precision_recall import neighborhoods, precision_recall
from tests.bench.bench_ops import commit, measure

SUBSETS, SUBSET_SIZE, NEIGHBORS = 100, 1000, 3
DENSITY_NEIGHBORS = 5


def features(count: int, num_features: int, seed: int, shift: float | None = None) -> Tensor:
    """Return float32 [count, num_features] like a detector's: correlated, never negative, with unequal variances.

    shift:  of all values; None = one for each seed
    """
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(64, num_features, generator=torch.Generator().manual_seed(0)) / 8
    x = torch.randn(count, 64, generator=generator) @ mix + 0.3 * torch.randn(count, num_features, generator=generator)
    return (x + (0.02 * seed if shift is None else shift)).clamp(min=0)


def frechet_works(num_features: int) -> dict[str, Callable[[], object]]:
    """Return the distance of two full-rank Gaussians, ours and from scipy's root of the product of covariances."""
    stats = [FeatureStats.of(features(2 * num_features, num_features, seed)) for seed in (1, 2)]
    (mu1, cov1), (mu2, cov2) = ((part.mean, part.covariance()) for part in stats)

    def by_sqrtm():
        root = scipy.linalg.sqrtm(cov1 @ cov2).real
        return [((mu1 - mu2) ** 2).sum() + np.trace(cov1 + cov2 - 2 * root)]

    return {"ours": lambda: [frechet_distance(mu1, cov1, mu2, cov2)], "sqrtm": by_sqrtm}


def kernel_works(count: int, num_features: int) -> dict[str, Callable[[], object]]:
    """Return ours and torch-fidelity's, which multiplies in float32, for the same subsets."""
    from torch_fidelity.metric_kid import kid_features_to_metric
    real, fake = features(count, num_features, 1), features(count, num_features, 2)
    size = min(count // 2, SUBSET_SIZE)

    def theirs():
        found = kid_features_to_metric(real, fake, kid_subsets=SUBSETS, kid_subset_size=size, rng_seed=0, verbose=False)
        return [found["kernel_inception_distance_mean"]]

    return {"ours": lambda: [kernel_distance(real, fake, SUBSETS, size, 0)], "torch-fidelity": theirs}


def kernel_jackknife_works(count: int, num_features: int) -> dict[str, Callable[[], object]]:
    """Return the distance from all pairs and without each of groups of four real images, and that from subsets."""
    real, fake = features(count, num_features, 1), features(count, num_features, 2)
    size, groups = min(count // 2, SUBSET_SIZE), np.arange(count) // 4
    return {"ours": lambda: [kernel_jackknife(real, fake, groups).estimate],
            "distance": lambda: [kernel_distance(real, fake, SUBSETS, size, 0)]}


def precision_recall_works(count: int, num_features: int) -> dict[str, Callable[[], object]]:
    """Return ours and torch-fidelity's form that works in blocks, since its other one needs whole matrices."""
    from torch_fidelity.metric_prc import prc_features_to_metric
    real, fake = features(count, num_features, 1), features(count, num_features, 2)

    def theirs():
        found = prc_features_to_metric(fake, real, prc_neighborhood=NEIGHBORS, prc_batch_size=2048, save_cpu_ram=True,
                                       verbose=False)
        return [found["precision"], found["recall"]]

    return {"ours": lambda: list(precision_recall(real, fake, NEIGHBORS)), "torch-fidelity": theirs}


def density_coverage_works(count: int, num_features: int) -> dict[str, Callable[[], object]]:
    """Return all four metrics for both numbers of neighbors, with and without jackknives, and precision and recall."""
    real, fake = features(count, num_features, 1), features(count, num_features, 2)
    ks = [NEIGHBORS, DENSITY_NEIGHBORS]

    def of_all(**options: bool) -> list[float]:
        found = neighborhoods(real, fake, ks, **options)[NEIGHBORS]
        return [found.precision, found.recall]

    return {"ours": of_all, "precision-recall": lambda: list(precision_recall(real, fake, NEIGHBORS)),
            "with-jackknives": lambda: of_all(jackknife=True)}


def compare(name: str, works: dict[str, Callable[[], object]], repeats: int) -> list[dict]:
    """Time one metric with every implementation, whose name replaces the {} in `name`."""
    values = {}

    def keeping(implementation: str) -> Callable[[], None]:
        return lambda: values.update({implementation: works[implementation]()})

    medians = measure({implementation: keeping(implementation) for implementation in works}, repeats)
    mine, *others = values.values()
    apart = max(abs(a - b) for other in others for a, b in zip(mine, other))
    records = []
    for implementation, median_ms in medians.items():
        full_name = name.format(implementation)
        ratio = median_ms / medians["ours"]
        print(f"{full_name:60} {median_ms:12.1f} ms  {ratio:6.2f} times the time of ours, apart {apart:.2g}",
              flush=True)
        records.append({"name": full_name, "median_ms": round(median_ms, 2), "this_over_ours": round(ratio, 3),
                        "value": [float(value) for value in values[implementation]]})
    return records


def benchmark(repeats: int, quick: bool) -> list[dict]:
    """Time every metric, printing as it goes."""
    num_features = 256 if quick else 2048
    records = compare(f"frechet/{{}}/float64/{num_features}", frechet_works(num_features), repeats)
    for count in (500, 1000) if quick else (2000, 10000):
        shape = f"float32/2x{count}x{num_features}"
        records += compare(f"kernel/{{}}/{shape}", kernel_works(count, num_features), repeats)
        records += compare(f"kernel_jackknife/{{}}/{shape}", kernel_jackknife_works(count, num_features), repeats)
        records += compare(f"precision_recall/{{}}/{shape}", precision_recall_works(count, num_features), repeats)
        records += compare(f"density_coverage/{{}}/{shape}", density_coverage_works(count, num_features), repeats)
    return records


def measure_large(count: int, num_features: int) -> dict:
    """Compare two sets of this size once; return seconds, results and the largest memory in GiB, maps included."""
    chunk = 1000
    with tempfile.TemporaryDirectory() as folder:
        sets = []
        for side in (1, 2):
            path = Path(folder) / f"{side}.bin"
            with open(path, "wb") as file:
                for start in range(0, count, chunk):
                    file.write(features(chunk, num_features, side * count + start, shift=0.02 * side).numpy().tobytes())
            sets.append(np.memmap(path, np.float32, "r", shape=(count, num_features)))
        began = time.perf_counter()
        found = neighborhoods(*sets, (NEIGHBORS, DENSITY_NEIGHBORS))
        seconds = time.perf_counter() - began
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
    return {"name": f"neighborhoods/ours/float32/2x{count}x{num_features}", "seconds": round(seconds, 1),
            "largest_memory_gib": round(largest, 2),
            "value": [found[NEIGHBORS].precision, found[NEIGHBORS].recall, found[DENSITY_NEIGHBORS].density,
                      found[DENSITY_NEIGHBORS].coverage]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="at most 1000 images of 256 features")
    parser.add_argument("--large", action="store_true", help="only the memory for 50,000 images: minutes")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's)")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each (default: 3)")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    records = [measure_large(50_000, 2048)] if options.large else benchmark(options.repeats, options.quick)
    print(json.dumps({"records": records, "repeats": options.repeats, "threads": torch.get_num_threads(),
                      "device": platform.processor() or platform.machine(), "torch": torch.__version__,
                      "commit": commit()}))


if __name__ == "__main__":
    main()
