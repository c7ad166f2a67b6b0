"""Time image generation by batch size.

    python -m tests.bench.bench_generate [--resolutions 64,256] [--cfg auto,tiny] [--batches 1,4,16,32] [--device cpu]
                                   [--threads N] [--repeats N] [--tune-malloc BOOL] [--forms] [--cpu-time]

The networks are those of train.py's --cfg at each resolution, untrained: weights do not change what is computed.
Operators and memory settings are those of generate.py. Batch sizes take turns, and in each turn all make as many images
as the largest batch; times are medians. Prints one record per line, `generate/<cfg>/<device>/<resolution>/batch<N>`,
and all of them as JSON in the last line.
With --forms, each batch size is also timed with a kernel per image in all modulated convolutions, and with one shared
kernel: `.../batch<N>/per_image` and `.../batch<N>/shared`. The automatic choice should be as fast as the faster one.

over_batch1: images per second, divided by those of batch size 1
"""

import argparse
import json
import platform
import time
from functools import partial

import torch
from torch import Tensor

from generation.image_generator import ImageGenerator, SynthesisSettings
from tests.bench.bench_ops import commit, measure
from torch_utils.device import tune_malloc
from torch_utils.images import to_pixels
from torch_utils.ops.compiled import describe, make_ready
from training.config import DatasetFacts
from training.options import TrainOptions, resolve
from training.state import TrainingState

FORMS = {"per_image": True, "shared": False}


def benchmark(resolution: int, cfg: str, batches: list[int], options: argparse.Namespace) -> list[dict]:
    """Time all batch sizes of a preset at a resolution, printing as it goes."""
    device = options.device
    facts = DatasetFacts(name="noise", resolution=resolution, channels=3, num_images=1, c_dim=0)
    config = resolve(TrainOptions(cfg=cfg, precision="fp32" if device == "cpu" else None, metrics=()), facts)
    G = TrainingState.create(config, device).G_ema
    count = max(batches)
    seeds, labels = range(count), torch.zeros(count, 0)
    works = {}
    for batch in sorted({1, *batches}):
        generator = ImageGenerator(G, SynthesisSettings(), batch=batch)
        works[f"batch{batch}"] = lambda generator=generator: list(generator.generate(seeds, labels))
        for form, fused in FORMS.items() if options.forms else ():
            works[f"batch{batch}/{form}"] = partial(generate_in_form, generator, seeds, labels, fused)
    medians = measure(works, options.repeats, clock=time.process_time if options.cpu_time else time.perf_counter)
    records = []
    for which, median_ms in medians.items():
        name, rate = f"generate/{cfg}/{device}/{resolution}/{which}", count / median_ms * 1000
        ratio = medians["batch1"] / median_ms
        print(f"{name:40} {rate:9.2f} images/s  {ratio:5.2f} times that of batch 1", flush=True)
        records.append({"name": name, "images_per_second": round(rate, 3), "over_batch1": round(ratio, 3)})
    return records


@torch.no_grad()
def generate_in_form(generator: ImageGenerator, seeds: range, labels: Tensor, fused_modconv: bool) -> None:
    """Do what `ImageGenerator.generate` does, with all modulated convolutions in one form."""
    for start in seeds[::generator.batch]:
        rows = slice(start, start + generator.batch)
        images = generator.G.synthesis(generator.map_seeds(seeds[rows], labels[rows]), noise_mode="const",
                                       force_fp32=generator.fp32, fused_modconv=fused_modconv)
        assert images.isfinite().all()
        to_pixels(images).cpu()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--resolutions", default="64,256", help="separated by commas (default: 64,256)")
    parser.add_argument("--cfg", default="auto", help="presets of the networks, separated by commas (default: auto)")
    parser.add_argument("--batches", default="1,4,16,32", help="batch sizes; 1 is always included "
                                                               "(default: 1,4,16,32)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's)")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each (default: 3)")
    parser.add_argument("--tune-malloc", type=lambda text: text.lower() in ("1", "true", "yes"), default=True,
                        help="as in the programs (default: true)")
    parser.add_argument("--forms", action="store_true", help="also time both forms of the modulated convolutions")
    parser.add_argument("--cpu-time", action="store_true", help="measure the process's time on the CPU, summed over "
                                                                "threads: for ratios on a machine that others use")
    options = parser.parse_args()
    memory = tune_malloc(options.tune_malloc).note
    make_ready(torch.device(options.device).type)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    batches = [int(batch) for batch in options.batches.split(",")]
    records = [record for cfg in options.cfg.split(",") for resolution in options.resolutions.split(",")
               for record in benchmark(int(resolution), cfg, batches, options)]
    print(json.dumps({"records": records, "repeats": options.repeats, "threads": torch.get_num_threads(),
                      "clock": "cpu" if options.cpu_time else "wall",
                      "operators": describe(torch.device(options.device).type), "memory": memory,
                      "device": platform.processor() or platform.machine(), "torch": torch.__version__,
                      "commit": commit()}))


if __name__ == "__main__":
    main()
