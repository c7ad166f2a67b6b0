"""Time the making of images by batch size.

    python -m tests.bench_generate [--resolutions 64,256] [--cfg auto,tiny] [--batches 1,4,16,32] [--device cpu]
                                   [--threads N] [--repeats N] [--tune-malloc BOOL]

The networks are those of train.py's --cfg at each resolution, untrained: weights do not change what is computed.
Operators and memory are those of generate.py. Batch sizes take turns, and each makes as many images in a turn as the
largest has; times are medians. Prints one record a line, `generate/<cfg>/<device>/<resolution>/batch<N>`, and all of
them as JSON in the last line.

over_batch1: images a second by those of one image a pass
"""

import argparse
import json
import platform

import torch

from latent.sampling import Look, Painter
from tests.bench_ops import commit, measure
from torch_utils.allocator import tune_malloc
from torch_utils.ops.compiled import describe, make_ready
from training.options import DatasetFacts, TrainOptions
from training.presets import resolve
from training.state import TrainingState


def benchmark(resolution: int, cfg: str, batches: list[int], device: str, repeats: int) -> list[dict]:
    """Time all batch sizes at a resolution, printing as it goes."""
    facts = DatasetFacts(name="noise", resolution=resolution, channels=3, num_images=1, c_dim=0)
    config = resolve(TrainOptions(cfg=cfg, precision="fp32" if device == "cpu" else None, metrics=()), facts)
    G = TrainingState.create(config, device).G_ema
    count = max(batches)
    seeds, labels = range(count), torch.zeros(count, 0)
    painters = {batch: Painter(G, Look(), batch=batch) for batch in sorted({1, *batches})}
    medians = measure({batch: lambda painter=painter: list(painter.paint(seeds, labels))
                       for batch, painter in painters.items()}, repeats)
    records = []
    for batch, median_ms in medians.items():
        name, rate = f"generate/{cfg}/{device}/{resolution}/batch{batch}", count / median_ms * 1000
        ratio = medians[1] / median_ms
        print(f"{name:40} {rate:9.2f} images/s  {ratio:5.2f} times that of batch 1", flush=True)
        records.append({"name": name, "images_per_second": round(rate, 3), "over_batch1": round(ratio, 3)})
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--resolutions", default="64,256", help="separated by commas (default: 64,256)")
    parser.add_argument("--cfg", default="auto", help="presets of the networks, separated by commas (default: auto)")
    parser.add_argument("--batches", default="1,4,16,32", help="images of a pass; 1 is among them in any case "
                                                               "(default: 1,4,16,32)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="threads of the CPU, default: as torch chooses")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each (default: 3)")
    parser.add_argument("--tune-malloc", type=lambda text: text.lower() in ("1", "true", "yes"), default=True,
                        help="as of the programs (default: true)")
    options = parser.parse_args()
    memory = tune_malloc(options.tune_malloc).note
    make_ready(torch.device(options.device).type)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    batches = [int(batch) for batch in options.batches.split(",")]
    records = [record for cfg in options.cfg.split(",") for resolution in options.resolutions.split(",")
               for record in benchmark(int(resolution), cfg, batches, options.device, options.repeats)]
    print(json.dumps({"records": records, "repeats": options.repeats, "threads": torch.get_num_threads(),
                      "operators": describe(torch.device(options.device).type), "memory": memory,
                      "device": platform.processor() or platform.machine(), "torch": torch.__version__,
                      "commit": commit()}))


if __name__ == "__main__":
    main()
