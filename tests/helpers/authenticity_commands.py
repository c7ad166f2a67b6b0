"""Run `study.py authenticity` in this process, on small sets of random images."""

import json

from tests.helpers.generator_files import lively_generator
from tests.helpers.small_studies import study
from tests.helpers.study_parts import CLASSES, data_of, make_part, make_synthetic
from tests.helpers.tiny_networks import discriminator
from training.snapshot import Networks, save_network

# Numbers of the images of each part, as tests.helpers.make_sets.pixels_of knows them; two images have one lesion.
ROWS = {"train": range(24), "val": range(24, 74), "test": range(74, 124), "isic": range(124, 132)}
FRESH = range(200, 230)  # of the synthetic set
USUAL = ("--detector=random-conv", "--draws=0", "--resamples=800", "--workers=1", "--device=cpu", "--tune-malloc=0",
         "--no-cache", "--verbose=0")


def make_study(folder):
    """Write the parts, their protocol, a synthetic set and networks into a folder, and return it.

    net.safetensors is of the training part, generator.safetensors has no discriminator, other.safetensors is of other
    images, large.safetensors makes larger ones; synthetic.zip is known to be made by the first, unknown.zip by none.
    """
    paths = {name: str(make_part(folder / f"{name}.zip", rows)) for name, rows in ROWS.items()}
    make_protocol(folder)
    record = {"training_data": data_of(paths["train"]), "training_data_before": []}
    make_synthetic(folder / "synthetic.zip", record, images=FRESH)
    make_synthetic(folder / "unknown.zip", None, images=FRESH)
    elsewhere = {"training_data": data_of(paths["isic"]), "training_data_before": []}
    save(folder / "net.safetensors", record)
    save(folder / "generator.safetensors", record, has_discriminator=False)
    save(folder / "other.safetensors", elsewhere, seed=1)
    save(folder / "large.safetensors", record, img_resolution=16)
    return folder


def make_protocol(folder, *flags, out="protocol.json"):
    parts = [f"--{name}={folder / name}.zip" for name in ("train", "val", "test")]
    assert study("protocol", *parts, f"--external={folder}/isic.zip", "--positive=mel", "--workers=1", *flags,
                 f"--out={folder / out}") == 0


def save(path, record, *, has_discriminator=True, **changes):
    G = lively_generator(**changes)
    D = discriminator(**changes) if has_discriminator else None
    save_network(path, Networks(G=G if has_discriminator else None, D=D, G_ema=G, config={
        "info": {"classes": CLASSES, "label_kind": "class", **record}}))


def arguments(folder, *flags, outdir="out", protocol="protocol.json"):
    """Return the arguments of study.py; flags replace the usual ones, and a file is one of the folder."""
    given = {flag.partition("=")[0] for flag in flags}
    usual = (f"--protocol={folder / protocol}", f"--outdir={folder / outdir}", *USUAL)
    return ["authenticity", *(flag for flag in usual if flag.partition("=")[0] not in given), *flags]


def authenticity(folder, *flags, **options):
    """Run the command as `arguments` gives it; return the exit code."""
    return study(*arguments(folder, *flags, **options))


def results_in(folder):
    """Return the content of results.json."""
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def records_in(folder):
    """Return the records of the tests by key."""
    return {test["key"]: test for test in results_in(folder)["tests"]}
