"""explore.py sefa: the directions it finds, what it measures and writes, and what it refuses."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from generation.image_generator import save_projected_w
from latent.direction_search import SefaRequest, run_sefa
from latent.directions import factorize, principal_components, read_directions
from latent.exploration import ImageFunction
from latent.measurements import MEASUREMENTS
from tests.helpers.disc_generator import ATTRIBUTES, angle_between, axis_of, disc_explorer
from tests.helpers.explore_commands import attempt, opened, record_of, refuse
from tests.helpers.generator_files import pixels_in, save_generator
from tests.helpers.projector_commands import contents

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = ("--num=2", "--steps=3", "--outdir=out")
# A network of 8x8 pixels shows no lesions.
UNMEASURED = ("--measure=0", "--seeds=0-3", *QUICK)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_generator("net.safetensors", {"classes": ["nv", "mel"], "label_kind": "class"})
    return tmp_path


def no_classifier(path, weights, device):
    raise AssertionError("no classifier was named")


def explored(folder, open_classifier=no_classifier, **options):
    """Run the command on the generator whose image is a disc; return its Explorer."""
    explorer = disc_explorer(folder, resolution=options.pop("resolution", 32))
    run_sefa(explorer, SefaRequest(network="disc.safetensors", outdir=str(folder), **options), open_classifier)
    return explorer


def test_directions_are_the_axes_of_the_generator_and_described_by_what_they_do(tmp_path, capsys):
    explorer = explored(tmp_path, num=4, seeds="0-7", steps=5, rows=2, strength="-2..2", resolution=64)
    found = read_directions(tmp_path / "directions.npz", explorer.network)
    for vector, attribute in zip(found.vectors, ATTRIBUTES, strict=True):
        assert angle_between(vector, axis_of(explorer.G, attribute)) < 5
    torch.testing.assert_close(found.deviations, torch.ones(4), atol=0.05, rtol=0)
    lines = capsys.readouterr().out.splitlines()
    assert "area" in lines[0]
    assert "color_l" in lines[1]
    assert lines[0].startswith(f"direction 0 (singular value {found.extras['singular_values'][0]:.4g}): +1 sd of w: ")
    assert [line.split()[1] for line in lines[:4]] == ["0", "1", "2", "3"]
    assert "a lesion was found in 160 of 160 images" in lines


def test_factorization_writes_what_it_found_and_for_which_layers(folder, capsys):
    succeed_quietly(capsys, "--layers=0-2", *UNMEASURED)
    network, _ = opened()
    found = read_directions("out/directions.npz", network)
    vectors, values = factorize(network.G, [0, 1, 2], 2)
    assert torch.equal(found.vectors, vectors)
    assert np.array_equal(found.extras["singular_values"], values.numpy())
    assert (found.layers, found.method, found.names) == ((0, 1, 2), "sefa", ("0", "1"))
    assert sorted(contents("out")) == ["direction-00.png", "direction-01.png", "directions.npz", "effects.csv",
                                       "effects.json", "index.html"]
    record = record_of("out/effects.json")
    assert record["seeds"] == [0, 1, 2, 3]
    assert record["layers"] == [0, 1, 2]
    assert [direction["steps"] for direction in record["directions"]] == [[-3, 0, 3]] * 2


def succeed_quietly(capsys, *arguments):
    """Run the command to its end; progress may be shown on standard error."""
    code = attempt("sefa", *arguments)
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out


def test_sheets_of_an_earlier_command_are_removed_and_nothing_else(folder, capsys):
    assert attempt("sefa", *UNMEASURED[:2], "--num=3", *QUICK[1:]) == 0
    Path("out/direction-notes.txt").write_text("notes")
    assert attempt("sefa", *UNMEASURED) == 0
    assert [name for name in contents("out") if name.startswith("direction-")] == [
        "direction-00.png", "direction-01.png", "direction-notes.txt"]


def test_components_are_those_of_reference_styles(tmp_path, capsys):
    explorer = explored(tmp_path, method="pca", num=3, seeds="0-1", steps=2, measure=False)
    found = read_directions(tmp_path / "directions.npz", explorer.network)
    vectors, deviations = principal_components(explorer.reference_styles(), 3)
    assert torch.equal(found.vectors, vectors)
    assert torch.equal(found.deviations, deviations)
    assert found.method == "pca"
    assert "% of the variance): nothing measured" in capsys.readouterr().out


def test_to_rgb_weights_change_the_directions(folder, capsys):
    found = []
    for options in ((), ("--torgb",)):
        succeed_quietly(capsys, *UNMEASURED, *options)
        found.append(read_directions("out/directions.npz", opened()[0]).vectors)
    assert not torch.allclose(*found)


def test_seeds_take_the_classes_in_turn_and_name_the_rows(folder, capsys):
    succeed_quietly(capsys, *UNMEASURED, "--rows=2", "--class=mel")
    one = pixels_in("out/direction-00.png")
    succeed_quietly(capsys, *UNMEASURED, "--rows=2")
    both = pixels_in("out/direction-00.png")
    assert record_of("out/effects.json")["labels"] == ["nv", "mel"]
    # The second seed is of the class mel in both sheets, the first is not: look at the step 0.
    assert np.array_equal(one[-8:, -16:-8], both[-8:, -16:-8])
    assert not np.array_equal(one[-16:-8, -16:-8], both[-16:-8, -16:-8])


def test_projections_are_moved_with_their_names_and_groups(tmp_path, capsys):
    explorer = disc_explorer(tmp_path / "source")
    ws = explorer.styles(list(range(6)))
    save_projected_w(tmp_path / "w.npz", ws.numpy(), image=np.array(list("abcdef")), group=np.array(list("xxyyzz")))
    explored(tmp_path / "out", projected_w=str(tmp_path / "w.npz"), num=1, steps=3, resolution=32)
    record = json.loads((tmp_path / "out/effects.json").read_text())
    rows = list(csv.DictReader((tmp_path / "out/effects.csv").read_text().splitlines()))
    assert record["images"] == list("abcdef")
    assert record["projected_w"] == "w.npz"
    assert {row["num_units"] for row in rows if row["quantity"] == "area"} == {"3"}


def test_projections_without_a_group_are_independent(tmp_path, capsys):
    ws = disc_explorer(tmp_path / "source").styles(list(range(4)))
    save_projected_w(tmp_path / "w.npz", ws.numpy(), group=np.array(["x", "x", "", ""]))
    explored(tmp_path / "out", projected_w=str(tmp_path / "w.npz"), num=1, steps=3, resolution=32)
    rows = list(csv.DictReader((tmp_path / "out/effects.csv").read_text().splitlines()))
    assert {row["num_units"] for row in rows if row["quantity"] == "area"} == {"3"}


def test_classifier_adds_its_probabilities(tmp_path, capsys):
    asked = []

    def open_classifier(path, weights, device):
        asked.append((path, weights, device.type))
        return ImageFunction(names=("nv", "mel"), compute=lambda pixels: torch.stack(
            [pixels.float().mean(dim=(1, 2, 3)) / 255, 1 - pixels.float().mean(dim=(1, 2, 3)) / 255], dim=1).numpy())

    explored(tmp_path, open_classifier, classifier="c.safetensors", num=2, seeds="0-5", steps=3)
    rows = list(csv.DictReader((tmp_path / "effects.csv").read_text().splitlines()))
    assert asked == [("c.safetensors", "auto", "cpu")]
    assert [row["quantity"] for row in rows[:10]] == [*MEASUREMENTS, "nv", "mel"]
    assert rows[8]["unit"] == "probability"
    assert float(rows[8]["slope"]) == pytest.approx(-float(rows[9]["slope"]), rel=1e-4)


@pytest.mark.slow
def test_two_processes_write_the_files_of_one(folder):
    save_generator("net.safetensors", img_resolution=32)
    for count in (1, 2):
        process = subprocess.run(
            [sys.executable, Path(__file__).parents[2] / "explore.py", "sefa", "--network=net.safetensors",
             "--device=cpu", "--seeds=0-9", "--num=2", "--steps=3", f"--gpus={count}", f"--outdir=out{count}"],
            capture_output=True, text=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert process.returncode == 0, process.stderr
    for path in sorted(Path("out1").iterdir()):
        assert path.read_bytes() == (Path("out2") / path.name).read_bytes(), path.name
    assert any(effect["slope"] for direction in record_of("out1/effects.json")["directions"]
               for effect in direction["effects"])


@pytest.mark.parametrize(("options", "message"), [
    (["--num=0"], "--num is 0; expected at least 1"),
    (["--num=9"], "--num is 9; expected 1 to 8: these layers have 12 style channels, and w has 8 numbers"),
    (["--num=9", "--method=pca"], "--num is 9; expected 1 to 8: w has 8 numbers"),
    (["--steps=1"], "--steps is 1; expected 2 to 1000"),
    (["--method=pca", "--torgb"], "--torgb is given, but only works with --method=sefa; leave it out"),
    (["--weights=w.pt"], "--weights is given, but only works with --classifier; add that, or leave --weights out"),
    (["--seeds=0", "--projected-w=w.npz"], "--seeds and --projected-w are both given; expected one of them"),
    (["--projected-w=w.npz"], "--projected-w=w.npz does not exist; expected an .npz file with an array w of shape "
                              "[M, 4, 8], as projector.py writes it"),
    (["--strength=3..-3"], "--strength is 3..-3; expected LOW..HIGH in standard deviations, LOW below HIGH, such as "
                           "-3..3"),
    (["--layers=fine"], "--layers has fine, but this network of 8x8 pixels has no such layers; expected coarse, all, "
                        "or indices from 0 to 3"),
], ids=lambda value: value[0] if isinstance(value, list) else "")
def test_bad_options_are_refused_in_one_line(folder, capsys, options, message):
    assert refuse(capsys, "sefa", "--outdir=out", *options) == message
