"""Time the projection of images in batches of 8, against one process per image as in the original.

    python -m tests.bench.bench_projector [--resolutions 64] [--cfg tiny] [--detector efficientnet-lite0]
        [--num-steps 200]
        [--device cpu] [--repeats N]

The networks are those of train.py's --cfg at each resolution, untrained, and the images are noise: neither changes what
is computed. Both ways run projector.py from start to end, without video, with equally many steps, and take turns.
Prints one record per line, `project/<cfg>/<detector>/<device>/<resolution>/...`, and all of them as JSON at the end.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from imagesets.writer import ImageSetWriter, encode_png
from tests.bench.bench_ops import commit
from training.config import DatasetFacts
from training.options import TrainOptions, resolve
from training.snapshot import Networks, save_network
from training.state import TrainingState

IMAGES = 8
ROOT = Path(__file__).parent.parent.parent


def benchmark(resolution: int, options: argparse.Namespace) -> list[dict]:
    """Time both ways at a resolution, printing as it goes."""
    with tempfile.TemporaryDirectory() as folder:
        make_inputs(Path(folder), resolution, options.cfg)
        times = {"batch8": [], "processes": []}
        for repeat in range(options.repeats):
            for way, run in (("batch8", project_together), ("processes", project_one_by_one)):
                start = time.perf_counter()
                run(Path(folder), f"{way}-{repeat}", options)
                times[way].append(time.perf_counter() - start)
    records = []
    for way, seconds in times.items():
        name = f"project/{options.cfg}/{options.detector}/{options.device}/{resolution}/{way}"
        rate = IMAGES * 60 / statistics.median(seconds)
        ratio = statistics.median(times["processes"]) / statistics.median(seconds)
        print(f"{name:60} {rate:8.2f} images/min  {ratio:5.2f} times one process per image", flush=True)
        records.append({"name": name, "images_per_minute": round(rate, 3), "over_processes": round(ratio, 3)})
    return records


def make_inputs(folder: Path, resolution: int, cfg: str) -> None:
    """Write a network, a set of 8 images, and each of them as a file."""
    facts = DatasetFacts(name="noise", resolution=resolution, channels=3, num_images=IMAGES, c_dim=0)
    state = TrainingState.create(resolve(TrainOptions(cfg=cfg, precision="fp32", metrics=()), facts), "cpu")
    save_network(folder / "network.safetensors", Networks(G=None, D=None, G_ema=state.G_ema))
    random = np.random.RandomState(0)
    with ImageSetWriter(folder / "set.zip") as writer:
        for index in range(IMAGES):
            png = encode_png(random.randint(0, 256, (resolution, resolution, 3), dtype=np.uint8))
            writer.add(png)
            (folder / f"{index}.png").write_bytes(png)


def project_together(folder: Path, name: str, options: argparse.Namespace) -> None:
    run_projector(folder, options, f"--data={folder / 'set.zip'}", f"--outdir={folder / name}", f"--batch={IMAGES}")


def project_one_by_one(folder: Path, name: str, options: argparse.Namespace) -> None:
    for index in range(IMAGES):
        run_projector(folder, options, f"--target={folder / f'{index}.png'}", f"--outdir={folder / name / str(index)}",
                      "--save-video=0")


def run_projector(folder: Path, options: argparse.Namespace, *arguments: str) -> None:
    subprocess.run([sys.executable, "projector.py", f"--network={folder / 'network.safetensors'}",
                    f"--detector={options.detector}", f"--num-steps={options.num_steps}", f"--device={options.device}",
                    *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--resolutions", default="64", help="separated by commas (default: 64)")
    parser.add_argument("--cfg", default="tiny", help="preset of the networks (default: tiny)")
    parser.add_argument("--detector", default="efficientnet-lite0", help="default: efficientnet-lite0")
    parser.add_argument("--num-steps", type=int, default=200, help="steps per projection (default: 200)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=1, help="measurements of each (default: 1)")
    options = parser.parse_args()
    records = [record for resolution in options.resolutions.split(",")
               for record in benchmark(int(resolution), options)]
    print(json.dumps({"records": records, "num_steps": options.num_steps, "repeats": options.repeats,
                      "threads": os.environ.get("OMP_NUM_THREADS", torch.get_num_threads()),
                      "device": platform.processor() or platform.machine(), "torch": torch.__version__,
                      "commit": commit()}))


if __name__ == "__main__":
    main()
