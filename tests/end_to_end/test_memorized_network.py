"""A network that memorized its training images is caught, and is not where images it never saw stand for them.

train.py trains networks of 32 channels on 20 pictures of random colors, with a high learning rate and without
augmentation, until its images are like these. It knows nothing of 100 other such pictures.
"""

import json
import shutil
import urllib.error
from dataclasses import replace

import numpy as np
import PIL.Image
import pytest

import generate
import projector
import train
from analysis.authenticity_results import DEFAULT_TEST_LEVEL, MEMBERSHIP, NEAREST, PROJECTION_GAP
from dnnlib.cli import run
from imagesets.reader import ImageSet
from imagesets.writer import ImageSetWriter
from tests.helpers.make_sets import png
from tests.helpers.small_studies import make_protocol, study
from training.presets import FIXED_PRESETS, choose_preset

CLASSES = ("even", "odd")  # by index, which the pictures do not depend on
SIZE = 16
PARTS = {"train": 20, "val": 50, "test": 50}  # images, each of a group of its own
NUM_SYNTHETIC = 400
NUM_STEPS = 60  # of projections
PRESET = "stylegan2"  # name of the preset that the one below takes the place of
# Without its strong regularization, the discriminator tells its 20 images from all others before the generator comes
# near to them.
CHANGES = {"channel_base": 512, "channel_max": 32, "latent_dim": 16, "lr": 0.01, "pl_weight": 0,
           "style_mixing_prob": 0, "gamma": 0.5}
KIMG = 10  # about a minute; test 2 finds copies from 6 on, in 420 phantoms instead of these pictures from 20 on

pytestmark = pytest.mark.slow


def random_picture(seed):
    """Return a smooth picture of random colors, uint8 [SIZE, SIZE, 3]."""
    colors = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.asarray(PIL.Image.fromarray(colors).resize((SIZE, SIZE), PIL.Image.Resampling.BICUBIC))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, one_thread):
    """A folder with the parts of a study, a network that was trained on its training part, and synthetic images."""
    folder = tmp_path_factory.mktemp("memorized")

    def refuse(*_, **__):
        raise urllib.error.URLError("no network")

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DNNLIB_CACHE_DIR", str(folder / "cache"))
        patch.setattr("urllib.request.urlopen", refuse)
        first = 0
        for name, count in PARTS.items():
            with ImageSetWriter(folder / f"{name}.zip", classes=list(CLASSES)) as writer:
                for index in range(first, first + count):
                    label = index % len(CLASSES)
                    writer.add(png(random_picture(index)), label, f"patient {index}")
            first += count
        patch.setitem(FIXED_PRESETS, PRESET, replace(choose_preset("tiny", SIZE, 1), **CHANGES))
        command = [f"--outdir={folder / 'runs'}", f"--data={folder / 'train.zip'}", f"--cfg={PRESET}", "--batch=8",
                   f"--kimg={KIMG}", "--tick=5", "--aug=noaug", "--metrics=none", "--workers=0", "--precision=fp32",
                   "--device=cpu", "--tune-malloc=0"]
        assert run(train.main, command) == 0
        newest = max(folder.glob("runs/*/network-snapshot-*.safetensors"))
        shutil.copy(newest, folder / "network.safetensors")
        assert run(generate.main, [f"--network={folder / 'network.safetensors'}", f"--zip={folder / 'synthetic.zip'}",
                                   f"--count={NUM_SYNTHETIC}", "--device=cpu"]) == 0
        yield folder


def find_leaks(folder, parts, *flags):
    """Run the tests of the network with the parts of a study in another folder; return the p-values by key of test."""
    network = f"--network={folder / 'network.safetensors'}"
    projections = [parts / f"projected-{name}" for name in ("train", "val")]
    for name, projected in zip(("train", "val"), projections, strict=True):
        assert run(projector.main, [network, f"--data={parts / name}.zip", f"--outdir={projected}",
                                    f"--count={PARTS['train']}", f"--num-steps={NUM_STEPS}", "--detector=pixels",
                                    "--device=cpu"]) == 0
    protocol = make_protocol(parts, positive=CLASSES[1])
    assert study("authenticity", f"--protocol={protocol}", network, f"--synthetic={folder / 'synthetic.zip'}",
                 f"--projections={','.join(map(str, projections))}", "--detector=random-conv", "--draws=0",
                 f"--outdir={parts / 'out'}", "--workers=1", "--device=cpu", "--tune-malloc=0", *flags) == 0
    results = json.loads((parts / "out" / "results.json").read_text())
    assert results["level"] == DEFAULT_TEST_LEVEL
    return results["tests"]


def numbers_found(tests):
    return {test["number"] for test in tests if test["found"]}


def deal(folder, dest, order):
    """Write parts of the same sizes with all images in another order. order: int [number of images]"""
    sets = {name: ImageSet(folder / f"{name}.zip") for name in PARTS}
    images = [(data, row) for data in sets.values() for row in range(len(data))]
    dest.mkdir()
    places = iter(order)
    for name, count in PARTS.items():
        with ImageSetWriter(dest / f"{name}.zip", classes=list(CLASSES)) as writer:
            for _ in range(count):
                data, row = images[next(places)]
                writer.add(data.read(data.names[row]), int(data.labels[row]), data.groups[row])
    return dest


def test_memorized_network_with_its_parts_is_found(folder):
    tests = find_leaks(folder, folder)
    assert all(test["ran"] for test in tests)
    assert NEAREST in numbers_found(tests)
    assert numbers_found(tests) & {PROJECTION_GAP, MEMBERSHIP}


def test_memorized_network_with_unseen_images_as_training_part_is_not_found(folder):
    """The memorized images are among the held-out ones, and as many random images of these take their place."""
    random = np.random.default_rng(0)
    unseen = random.permutation(np.arange(PARTS["train"], sum(PARTS.values())))
    training, others = np.split(unseen, [PARTS["train"]])
    heldout = random.permutation([*range(PARTS["train"]), *others])
    tests = find_leaks(folder, deal(folder, folder / "exchanged", [*training, *heldout]), "--unverified-synthetic")
    assert all(test["ran"] for test in tests)
    assert numbers_found(tests) == set()


def test_memorized_network_with_all_images_dealt_at_random_has_no_gap_and_no_members(folder):
    """Test 2 is right to find those of the memorized images that are dealt to the training part."""
    order = np.random.default_rng(1).permutation(sum(PARTS.values()))
    tests = find_leaks(folder, deal(folder, folder / "dealt", order), "--unverified-synthetic")
    assert not numbers_found(tests) & {PROJECTION_GAP, MEMBERSHIP}
