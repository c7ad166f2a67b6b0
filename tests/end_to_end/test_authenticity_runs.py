"""Whole studies of authenticity: planted copies are found, fresh images pass, several processes, killed commands."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from analysis import authenticity_study
from analysis.authenticity_inputs import EXIT_COPIES
from analysis.authenticity_measures import Measured, Measurer, Work, real_features
from analysis.leak_tests import nearest_tests
from analysis.nearest_training import NearestTraining
from analysis.planted_copies import ANY, TRANSFORMATIONS, make_copy
from imagesets.phantoms.make import render_phantom
from imagesets.pixel_hashes import hash_pixels
from imagesets.reader import channels_first
from imagesets.writer import ImageSetWriter
from metrics.detectors.registry import open_detector
from tests.helpers.authenticity_commands import (
    FRESH,
    arguments,
    authenticity,
    make_protocol,
    make_study,
    records_in,
    results_in,
)
from tests.helpers.make_sets import png
from tests.helpers.study_images import study_images
from tests.helpers.study_parts import make_synthetic
from tests.helpers.training_runs import environment
from torch_utils.distributed import Processes

ROOT = Path(__file__).parent.parent.parent
# Phantoms of each part, each of another lesion. If 1 % of 1,000 synthetic images are copies, all of them beyond 1,500
# held-out images, p is 0.0004.
COUNTS = {"train": 200, "val": 750, "test": 750, "isic": 8, "fresh": 990}
COPIES = 10  # of each transformation: 1 % of 1,000
MIXED = 300  # synthetic images of the set of which 2 % are copies
NUM_TESTS = 5  # that run without a network
WHOLE = ("--network=net.safetensors", "--synthetic=copy.zip", "--unverified-synthetic",
         "--reference=other.safetensors", "--count=0", "--draws=1", "--fail-on=copies")

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


# Copies


def draw(row):
    """Return a phantom by number, uint8 [64, 64, 3]; each is of another lesion."""
    return render_phantom(0, row, class_name=("benign", "melanoma")[row % 2], lesion_number=row)[0]


def write_phantoms(path, rows):
    with ImageSetWriter(path, classes=["rest", "mel"]) as writer:
        for row in rows:
            pixels = draw(row)
            writer.add(png(pixels), row % 2, f"patient{row}", hash_pixels(channels_first(pixels)))
    return path


def write_pictures(path, pictures):
    with ImageSetWriter(path) as writer:
        for pixels in pictures:
            writer.add(png(pixels))
    return path


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    """A folder with parts of phantoms, their protocol, and fresh phantoms."""
    folder, start = tmp_path_factory.mktemp("phantoms"), 0
    for name, count in COUNTS.items():
        write_phantoms(folder / f"{name}.zip", range(start, start + count))
        start += count
    make_protocol(folder)
    return folder


@pytest.fixture(scope="module")
def copies():
    """Changed copies of training images by transformation, COPIES of each."""
    originals = [draw(row) for row in range(COPIES)]
    return {way: [make_copy(pixels, way, seed) for seed, pixels in enumerate(originals)] for way in TRANSFORMATIONS}


def study_of(folder, synthetic, out, *flags):
    """Run the command; few training images are the second control, which decides nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(authenticity_study, "NUM_OTHERS", 50)
        return authenticity(folder, f"--synthetic={synthetic}", "--unverified-synthetic", *flags, outdir=out)


@pytest.fixture(scope="module")
def clean(phantoms, tmp_path_factory):
    """Study fresh phantoms; return the folder, the exit code, and what test 2 was given."""
    out, given = tmp_path_factory.mktemp("clean"), []

    def spy(*measured):
        given.append(measured)
        return nearest_tests(*measured)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(authenticity_study, "nearest_tests", spy)
        code = study_of(phantoms, phantoms / "fresh.zip", out, "--fail-on=copies")
    return out, code, given[0]


def test_fresh_phantoms_pass(clean):
    out, code, _ = clean
    assert code == 0
    assert not any(test["found"] for test in records_in(out).values())
    assert sum(test["ran"] for test in records_in(out).values()) == NUM_TESTS
    assert results_in(out)["conclusion"][0].startswith("No leak found by these tests")


def joined(first, second):
    """Return what was measured of two sets together."""
    nearest = {field.name: np.concatenate([getattr(each.nearest, field.name) for each in (first, second)])
               for field in fields(NearestTraining)}
    return Measured(nearest=NearestTraining(**nearest), features=np.concatenate([first.features, second.features]))


def test_one_percent_of_copies_is_found_whatever_was_done_to_them(phantoms, clean, copies, tmp_path):
    """The copies are measured as the command does; nothing that is measured of an image depends on the others."""
    path = write_pictures(tmp_path / "copies.zip", [pixels for pictures in copies.values() for pixels in pictures])
    work = Work(tmp_path / "work", Processes(rank=0, count=1, device=torch.device("cpu")), verbose=False)
    detector, training = open_detector("random-conv", device="cpu"), study_images(phantoms / "train.zip", "training")
    features = real_features(work, detector, training, use_cache=False, workers=1)
    measurer = Measurer(work, detector, training, features, workers=1)
    synthetic, *controls = clean[2]
    p_values = {}
    images = study_images(path, "copies")
    for number, way in enumerate(copies):
        some = images.select(range(number * COPIES, (number + 1) * COPIES), way)
        measured = measurer.measure(way, some, {})
        assert measured.nearest.row.tolist() == list(range(COPIES))
        p_values[way] = [test.p_value for test in nearest_tests(joined(synthetic, measured), *controls)]
    print(p_values)
    assert max(map(min, p_values.values())) <= 0.01 / NUM_TESTS


def test_two_percent_of_copies_fail_the_command(phantoms, clean, copies, tmp_path):
    planted = [pictures[0] for pictures in copies.values()]
    assert len(planted) == 0.02 * MIXED
    start = sum(COUNTS.values()) - COUNTS["fresh"]
    path = write_pictures(tmp_path / "mixed.zip", [
        *map(draw, range(start, start + MIXED - len(planted))), *planted])
    assert study_of(phantoms, path, clean[0], "--fail-on=copies") == EXIT_COPIES
    results = results_in(clean[0])
    assert {test["number"] for test in results["tests"] if test["found"]} == {2}
    assert {pair["training_image"] for pair in results["pairs"]["synthetic"][:len(planted)]} == {
        "00000/img00000000.png"}
    assert [one["training_image"] for one in results["equal_images"]] == 2 * ["00000/img00000000.png"]  # and mirrored


# Processes


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder with a small study, and a set with a training image."""
    folder = make_study(tmp_path_factory.mktemp("small"))
    make_synthetic(folder / "copy.zip", {}, images=[*FRESH, 7])
    return folder


@pytest.fixture(scope="module")
def unbroken(small, tmp_path_factory):
    """Bytes of results.json of one process."""
    out = tmp_path_factory.mktemp("unbroken")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(small)
        assert authenticity(small, *WHOLE, outdir=out) == EXIT_COPIES
    return (out / "results.json").read_bytes()


def start_two(folder, outdir):
    """Start the command in a process of its own, which starts two others."""
    command = [sys.executable, str(ROOT / "study.py"), *arguments(folder, *WHOLE, "--gpus=2", outdir=outdir)]
    return subprocess.Popen(command, cwd=folder, env=environment(), text=True, stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, start_new_session=True)


def test_power_is_told_of_all_tests_that_ran(unbroken):
    results = json.loads(unbroken)
    assert {power["test"] for power in results["power"]} == {
        "nearest-ssim", "nearest-features", "nearest-pixels", "membership-synthetic-distance",
        "membership-synthetic-distance-tpr"}
    assert {tuple(power["found"]) for power in results["power"]} == {(*TRANSFORMATIONS, ANY)}
    assert all(test["power"] for test in results["tests"] if test["key"].startswith("membership-discriminator"))


def test_two_killed_processes_continue_and_give_the_results_and_exit_code_of_one(small, unbroken, tmp_path):
    process = start_two(small, tmp_path)
    while process.poll() is None and len(list(tmp_path.glob("work/*.npz"))) < 3:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    kept = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("work/*.npz")}
    assert kept
    assert not (tmp_path / "results.json").exists()
    process = start_two(small, tmp_path)
    _, errors = process.communicate(timeout=300)
    assert (process.returncode, errors) == (EXIT_COPIES, "")
    assert (tmp_path / "results.json").read_bytes() == unbroken
    # The scores of the discriminator, one table for each part, are not computed again; if the processes were killed
    # between tables of one chunk, all of that chunk are.
    assert sum((tmp_path / "work" / name).stat().st_mtime_ns == when for name, when in kept.items()) >= 2
