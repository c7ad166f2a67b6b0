"""Time the conversion of images, and reading the result, against a plain loop over Pillow in one process.

    python -m tests.bench.bench_dataset_tool [--quick] [--images FOLDER] [--size 256]

Prints one record per line, `convert/<set>/<resolution>/<implementation>` or `load/...`, in images per second, and all
of them as JSON in the last line. The implementations take turns, so that other load on the machine affects all equally;
numbers are medians. Sets are synthetic, lesion-like with camera noise, or a folder of JPEGs.

plain:     the original's steps for each image, without its detour through arrays: open, convert("RGB"), crop to the
           center square, Lanczos, save(format="png", compress_level=0), and store in a zip
convert:   imagesets.convert.convert with all cores
exact:     the same with exact=True: the JPEG decoder does not downscale
one:       convert with one process
ceiling:   one plain loop per core, each on its share of the files: the most that the machine can do
"""

import argparse
import io
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image

from dnnlib.workers import usable_cores
from imagesets.convert import convert
from tests.helpers.image_files import encode, lesion_like
from training.dataset import ImageDataset

# (name, width, height, files, different images among them, side of the result)
SETS = [("small-200x150", 200, 150, 2000, 50, 128), ("small-600x450", 600, 450, 400, 20, 256),
        ("large-3000x2000", 3000, 2000, 24, 4, 256)]


def make_set(folder: Path, width: int, height: int, files: int, different: int) -> None:
    """Write JPEGs of quality 90."""
    folder.mkdir()
    images = [encode(lesion_like(width, height, seed), "JPEG", quality=90) for seed in range(different)]
    for index in range(files):
        (folder / f"{index:06d}.jpg").write_bytes(images[index % different])


def convert_plainly(source: Path, dest: Path, side: int, *, part: slice = slice(None)) -> None:
    with zipfile.ZipFile(dest, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(source.iterdir())[part]:
            image = PIL.Image.open(path).convert("RGB")
            edge = min(image.size)
            left, top = (image.width - edge) // 2, (image.height - edge) // 2
            image = image.crop((left, top, left + edge, top + edge))
            image = image.resize((side, side), PIL.Image.Resampling.LANCZOS)
            file = io.BytesIO()
            image.save(file, format="png", compress_level=0, optimize=False)
            archive.writestr(path.stem + ".png", file.getvalue())


def convert_plainly_on_all_cores(source: Path, dest: Path, side: int) -> None:
    cores = usable_cores()
    processes = [multiprocessing.Process(target=convert_plainly, args=(source, dest.with_suffix(f".{core}"), side),
                                         kwargs={"part": slice(core, None, cores)}) for core in range(cores)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


def read_plainly(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith(".png"):
                np.asarray(PIL.Image.open(io.BytesIO(archive.read(name))))


def read_by_dataset(path: Path) -> None:
    dataset = ImageDataset(path)
    for index in range(len(dataset)):
        dataset[index]


def rates(works: dict[str, Callable[[], None]], count: int, repeats: int) -> dict[str, float]:
    """Return images per second by the median time of each, taking turns."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - start)
    return {name: count / statistics.median(values) for name, values in times.items()}


def bench_set(name: str, source: Path, side: int, repeats: int) -> list[dict]:
    """Return the records of one set: its conversion, and reading the result."""
    count = len(list(source.iterdir()))
    plain, ours = source.with_name(f"{source.name}-plain.zip"), source.with_name(f"{source.name}-ours.zip")

    def by_us(**options) -> Callable[[], None]:
        silent = io.StringIO()
        return lambda: convert(source, ours, transform="center-crop", width=side, height=side, resize_filter="lanczos",
                               stream=silent, **options)

    found = rates({"plain": lambda: convert_plainly(source, plain, side), "convert": by_us(),
                   "exact": by_us(exact=True), "one": by_us(workers=1),
                   "ceiling": lambda: convert_plainly_on_all_cores(source, plain, side)}, count, repeats)
    records = [record(f"convert/{name}/{side}/{work}", rate, found["plain"]) for work, rate in found.items()]
    found = rates({"pillow": lambda: read_plainly(ours), "dataset": lambda: read_by_dataset(ours),
                   "pillow-on-plain": lambda: read_plainly(plain)}, count, repeats)
    return records + [record(f"load/{name}/{side}/{work}", rate, found["pillow"]) for work, rate in found.items()]


def record(name: str, rate: float, reference: float) -> dict:
    print(f"{name:45s} {rate:10.1f} images/s  {rate / reference:5.2f} times", flush=True)
    return {"name": name, "images_per_second": round(rate, 1), "times_reference": round(rate / reference, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the files, once")
    parser.add_argument("--images", type=Path, help="a folder of JPEGs to use instead")
    parser.add_argument("--size", type=int, default=256, help="side of the result for --images")
    arguments = parser.parse_args()
    records = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        if arguments.images is not None:
            (root / "set").symlink_to(arguments.images.absolute())
            records += bench_set(arguments.images.name, root / "set", arguments.size, 1 if arguments.quick else 3)
        else:
            for name, width, height, files, different, side in SETS:
                make_set(root / name, width, height, max(4, files // 10) if arguments.quick else files, different)
                records += bench_set(name, root / name, side, 1 if arguments.quick else 3)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    print(json.dumps({"records": records, "cores": usable_cores(), "load": os.getloadavg()[0],
                      "machine": platform.processor() or platform.machine(), "pillow": PIL.__version__,
                      "commit": commit.stdout.strip()}))


if __name__ == "__main__":
    main()
