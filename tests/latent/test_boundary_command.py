"""Test `explore.py boundary`: what it finds, prints and writes, and that bad options are one line."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dnnlib.cli import UserError, run
from generation.image_generator import SynthesisSettings
from latent.boundary_command import BoundaryRequest, make_boundary_command, run_boundary
from latent.directions import Directions, read_directions, save_directions
from latent.exploration import ImageFunction
from tests.helpers.disc_generator import CLASS_OFFSET, angle_between, axis_of, disc_explorer
from tests.helpers.generator_files import pixels_in, save_generator

pytestmark = pytest.mark.usefixtures("one_thread")

HOSTILE = "<script>alert(1)</script>"
REDNESS = ImageFunction(names=("red",), compute=lambda pixels: pixels[:, :1].float().mean(dim=(2, 3)).numpy() / 255)


def no_classifier(path, weights, device):
    raise AssertionError("no classifier was asked for")


def red_classifier(path, weights, device):
    return REDNESS


def request_of(**options):
    return BoundaryRequest(**{"network": "disc", "outdir": "out", "seeds": "0-199", "measure": False,
                              "permutations": 21, "steps": 3, **options})


def explore(explorer, open_classifier=no_classifier, **options):
    run_boundary(explorer, request_of(**options), open_classifier)


def write_values(path, explorer, seeds, **columns):
    """Write a table of attributes of the discs: weights of w's axes by column."""
    styles = explorer.styles(seeds)
    names = explorer.G.synthesis.attributes(styles)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["seed", *columns])
        for index, seed in enumerate(seeds):
            writer.writerow([seed, *(sum(float(names[name][index]) * weight for name, weight in weights.items())
                                     for weights in columns.values())])
    return str(path)


def record(folder):
    return json.loads((folder / "boundary.json").read_text())


# Directions.


def test_boundary_of_a_measurement_is_the_axis_that_changes_it(tmp_path, capsys):
    explorer = disc_explorer(tmp_path / "out", resolution=32)
    explore(explorer, attribute="area", measure=True, seeds="0-399", layers="0,1")
    found = read_directions(tmp_path / "out" / "directions.npz", explorer.network)
    assert (found.names, found.method, found.layers) == (("area",), "boundary", (0, 1))
    assert angle_between(found.vectors[0], axis_of(explorer.G, "radius")) < 10
    assert found.vectors[0] @ axis_of(explorer.G, "radius") > 0
    torch.testing.assert_close(found.deviations, torch.ones(1), rtol=0.05, atol=0)  # w is a standard Gaussian

    lines = capsys.readouterr().out.splitlines()
    entry = record(tmp_path / "out")["directions"][0]
    auc = entry["auc"]
    assert auc["estimate"] > 0.95
    assert lines[0] == (f"area: AUC {auc['estimate']:.3f} [{auc['low']:.3f}, {auc['high']:.3f}] by 5-fold "
                        f"cross-validation on {entry['samples']} samples, p = 0.045 (21 permutations)")
    assert lines[1].startswith("direction area: +1 sd of w: ")
    effects = {row["quantity"]: row for row in csv.DictReader((tmp_path / "out" / "effects.csv").open())}
    assert float(effects["area"]["low"]) > 0
    assert pixels_in(tmp_path / "out" / "direction-00-area.png").shape[0] >= 8 * 32


def test_orthogonal_direction_leaves_the_other_column_as_it_is(tmp_path, capsys):
    explorer = disc_explorer(tmp_path / "out")
    table = write_values(tmp_path / "t.csv", explorer, range(600), size={"radius": 1, "color": 0.8}, tone={"color": 1})
    explore(explorer, attribute="size", orthogonal_to="tone", values=table, seeds="0-599", permutations=41)
    found = read_directions(tmp_path / "out" / "directions.npz", explorer.network)
    assert found.names == ("size", "tone", "size orthogonal to tone")
    color, radius = axis_of(explorer.G, "color"), axis_of(explorer.G, "radius")
    assert found.vectors[0] @ color > 0.5
    assert abs(found.vectors[2] @ color) < 0.12
    assert angle_between(found.vectors[2], radius) < 12
    written = record(tmp_path / "out")
    entry = written["directions"][2]
    assert entry["degrees_to_own_direction"] == pytest.approx(angle_between(found.vectors[0], found.vectors[2]),
                                                              abs=1e-3)
    other = entry["other_aucs"]["tone"]
    assert other["low"] < 0.5 < other["high"]
    np.testing.assert_allclose(written["cosines"]["values"], found.vectors @ found.vectors.T, atol=1e-6)
    assert written["cosines"]["values"][1][2] == pytest.approx(0, abs=1e-6)
    rows = list(csv.reader((tmp_path / "out" / "correlations.csv").open()))
    assert rows[0] == ["attribute", "values:size", "values:tone"]
    assert float(rows[1][2]) == pytest.approx(0.8 / (1 + 0.64)**0.5, abs=0.08)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("samples, p = 0.048 (41 permutations, corrected for 2 attributes)")
    assert lines[2].startswith("size orthogonal to tone: AUC ")


def test_attributes_can_all_be_made_orthogonal_to_each_other(tmp_path):
    explorer = disc_explorer(tmp_path / "out")
    table = write_values(tmp_path / "t.csv", explorer, range(200), size={"radius": 1, "color": 0.8}, tone={"color": 1})
    explore(explorer, attribute="size,tone", orthogonal_to="size,tone", values=table, permutations=41)
    found = read_directions(tmp_path / "out" / "directions.npz", explorer.network)
    assert found.names == ("size", "tone", "size orthogonal to tone", "tone orthogonal to size")
    assert record(tmp_path / "out")["tests"] == 2
    for without, other in ((2, 1), (3, 0)):
        assert float(found.vectors[without] @ found.vectors[other]) == pytest.approx(0, abs=1e-6)


def test_direction_of_a_file_is_taken_out_too(tmp_path):
    explorer = disc_explorer(tmp_path / "out")
    table = write_values(tmp_path / "t.csv", explorer, range(200), size={"radius": 1, "color": 0.8}, tone={"color": 1})
    explore(explorer, attribute="tone", values=table)
    other = tmp_path / "tone.npz"
    (tmp_path / "out" / "directions.npz").rename(other)
    explore(explorer, attribute="size", values=table, orthogonal_to=f"{other}:tone")
    found = read_directions(tmp_path / "out" / "directions.npz", explorer.network)
    assert found.names == ("size", "size orthogonal to tone.npz:tone")
    assert float(found.vectors[1] @ read_directions(other, explorer.network).vectors[0]) == pytest.approx(0, abs=1e-6)


def test_directions_of_two_files_of_one_name_are_both_taken_out_by_names_with_colons(tmp_path):
    explorer = disc_explorer(tmp_path / "out")
    texts = []
    for index, name in enumerate(("color", "x")):
        (tmp_path / str(index)).mkdir()
        save_directions(tmp_path / str(index) / "d.npz", Directions(
            names=("class:mel",), vectors=axis_of(explorer.G, name)[None], deviations=torch.ones(1), layers=(0,),
            method="boundary", network_sha256=explorer.network.sha256))
        texts.append(f"{tmp_path / str(index) / 'd.npz'}:class:mel")
    table = write_values(tmp_path / "t.csv", explorer, range(200), size={"radius": 1, "color": 0.8, "x": 0.8})
    explore(explorer, attribute="size", values=table, orthogonal_to=",".join(texts))
    found = read_directions(tmp_path / "out" / "directions.npz", explorer.network)
    assert found.names == ("size", f"size orthogonal to d.npz:class:mel and {texts[1]}")
    for name in ("color", "x"):
        assert float(found.vectors[0] @ axis_of(explorer.G, name)) > 0.3
        assert float(found.vectors[1] @ axis_of(explorer.G, name)) == pytest.approx(0, abs=1e-6)


def test_orthogonal_to_an_attribute_without_a_direction_leaves_nothing_out(tmp_path, capsys):
    explorer = disc_explorer(tmp_path / "out")
    table = write_values(tmp_path / "t.csv", explorer, range(200), size={"radius": 1}, luck={})
    lines = Path(table).read_text().splitlines()
    random = np.random.RandomState(0)
    rows = [f"{line.rpartition(',')[0]},{random.randn()}" for line in lines[1:]]
    Path(table).write_text("\n".join([lines[0], *rows]))
    explore(explorer, attribute="size", values=table, orthogonal_to="luck", permutations=41)
    assert read_directions(tmp_path / "out" / "directions.npz", explorer.network).names == ("size",)
    assert ("no direction of --orthogonal-to was found, so that there is nothing to leave out"
            in capsys.readouterr().out.splitlines())


def test_values_without_a_direction_give_none(tmp_path, capsys):
    explorer = disc_explorer(tmp_path / "out")
    for name in ("directions.npz", "direction-00-size.png"):
        (tmp_path / "out" / name).write_bytes(b"of an earlier command")
    random = np.random.RandomState(0)
    (tmp_path / "t.csv").write_text("seed,luck\n" + "".join(f"{seed},{random.randn()}\n" for seed in range(200)))
    explore(explorer, attribute="luck", values=str(tmp_path / "t.csv"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("luck: no direction found: AUC 0.")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "boundary.json", "correlations.csv", "effects.csv", "effects.json", "index.html"}
    entry = record(tmp_path / "out")["directions"][0]
    assert entry["found"] is False
    assert entry["auc"]["low"] < 0.5 < entry["auc"]["high"]
    assert "no direction found" in (tmp_path / "out" / "index.html").read_text()


def test_classes_and_probabilities_of_a_classifier_are_attributes(tmp_path, capsys):
    explorer = disc_explorer(tmp_path / "out", [HOSTILE, "mel"])
    explore(explorer, red_classifier, attribute="mel,red", classifier="c.safetensors", permutations=41)
    found = read_directions(tmp_path / "out" / "directions.npz", explorer.network)
    # The class moves the radius alone. Large discs of dark color make an image less red.
    assert angle_between(found.vectors[0], axis_of(explorer.G, "radius")) < 12
    assert found.vectors[1] @ axis_of(explorer.G, "radius") < -0.5
    written = record(tmp_path / "out")
    assert written["rank_correlations"]["names"] == [f"class:{HOSTILE}", "class:mel", "classifier:red"]
    matrix = np.array(written["rank_correlations"]["values"])
    assert matrix[0, 1] == pytest.approx(-1)
    assert matrix[1, 2] < -0.5
    assert HOSTILE not in (tmp_path / "out" / "index.html").read_text()
    assert "p = 0.048 (41 permutations, corrected for 2 attributes)" in capsys.readouterr().out


def test_projections_keep_their_groups_together(tmp_path, capsys):
    explorer = disc_explorer(tmp_path / "out")
    random = np.random.RandomState(0)
    groups = np.repeat(np.arange(60), 2)
    w = (random.randn(60, 12)[groups] + 0.1 * random.randn(120, 12)).astype(np.float32)
    kinds = np.where(w @ axis_of(explorer.G, "x").numpy() > 0, "mel", "nv")
    np.savez(tmp_path / "p.npz", w=np.repeat(w[:, None], 8, axis=1), group=np.array([f"g{i}" for i in groups]),
             image=np.array([f"{i}.png" for i in range(120)]), **{"class": kinds})
    explore(explorer, attribute="mel", seeds=None, projected_w=str(tmp_path / "p.npz"))
    entry = record(tmp_path / "out")["directions"][0]
    assert entry["auc"]["unit"] == "group"
    assert 40 <= entry["groups"] <= 60
    assert f"samples of {entry['groups']} groups, p = 0.045" in capsys.readouterr().out


# The line between classes.


def test_line_between_classes_is_that_of_their_means(tmp_path, capsys):
    explorer = disc_explorer(tmp_path / "out", ["nv", "bcc", "mel"], labels=[0, 2], resolution=32)
    explore(explorer, red_classifier, from_="nv", to="mel", classifier="c", seeds="0-9", steps=5, strength="-0.5..1.5")
    found = read_directions(tmp_path / "out" / "directions.npz", explorer.network)
    assert (found.names, found.method) == (("nv to mel",), "class line")
    assert angle_between(found.vectors[0], axis_of(explorer.G, "radius")) < 1e-2
    assert found.extras["distance"] == pytest.approx(2 * CLASS_OFFSET, rel=1e-5)
    # In this network the classes differ in their mean only: at 1, an image is that of the same seed as the other class.
    red = json.loads((tmp_path / "out" / "line.json").read_text())["quantities"][0]
    along = {entry["step"]: entry for entry in red["along"]}
    assert along.keys() == {-0.5, 0, 0.5, 1, 1.5}
    assert along[1]["mean"] == pytest.approx(red["images_of_end"]["mean"], abs=1e-4)
    expected = REDNESS.compute(explorer.render(explorer.styles(range(10), [0] * 10)))
    assert along[0]["mean"] == pytest.approx(expected.mean(), abs=1e-6)
    assert along[0]["low"] < along[0]["mean"] < along[0]["high"]
    assert along[-0.5]["mean"] > along[0]["mean"] > along[0.5]["mean"] > along[1.5]["mean"]
    rows = list(csv.DictReader((tmp_path / "out" / "line.csv").open()))
    assert [row["step"] for row in rows] == ["-0.5", "0.0", "0.5", "1.0", "1.5", "images of end"]
    # The row of the mean style, and of 8 seeds; 5 steps, and the images of the other class.
    sheet = pixels_in(tmp_path / "out" / "line.png")
    assert sheet.shape[0] >= 9 * 32
    assert sheet.shape[1] >= 6 * 32
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "nv to mel: distance 4 in w, 10 seeds"


def test_line_between_classes_of_the_same_mean_is_refused(tmp_path):
    explorer = disc_explorer(tmp_path / "out", ["nv", "mel"])
    explorer.G.mapping.offsets.zero_()
    with pytest.raises(UserError) as caught:
        explore(explorer, from_="nv", to="mel", attribute=None, seeds="0-9")
    assert str(caught.value) == ("nv and mel have the same mean style in this network, so that there is no line "
                                 "between them; expected other classes")


# Bad options.


@pytest.mark.parametrize(("options", "message"), [
    ({"attribute": None}, "--attribute is missing; expected one, such as --attribute=area, or two classes, such as "
                          "--from=nv --to=mel"),
    ({"attribute": None, "from_": "nv"}, "--from is given without --to; expected both, such as --from=nv --to=mel"),
    ({"attribute": None, "to": "nv"}, "--to is given without --from; expected both, such as --from=nv --to=mel"),
    ({"from_": "nv", "to": "mel"}, "--attribute and --from are both given; expected one of them"),
    ({"projected_w": "p.npz"}, "--seeds and --projected-w are both given; expected one of them"),
    ({"extremes": 0.6}, "--extremes is 0.6; expected a share above 0, at most 0.5"),
    ({"permutations": 0}, "--permutations is 0; expected at least 1, such as 200"),
    ({"steps": 1}, "--steps is 1; expected 2 to 1000"),
    ({"strength": "3"}, "--strength is 3; expected LOW..HIGH in standard deviations, LOW below HIGH, such as -3..3"),
    ({"weights": "w.pth"}, "--weights is given, but only works with --classifier; add that, or leave --weights out"),
])
def test_options_that_contradict_each_other_are_refused(options, message):
    with pytest.raises(UserError) as caught:
        request_of(**{"attribute": "area", **options})
    assert str(caught.value) == message


@pytest.mark.parametrize(("options", "message"), [
    ({"attribute": "arae"}, "--attribute has arae; expected one of class:nv, class:mel"),
    ({"attribute": "nv", "orthogonal_to": "class:nv"},
     "--orthogonal-to has class:nv, which is also the only --attribute; expected another one"),
    ({"attribute": "nv", "orthogonal_to": "mel,mel"}, "--orthogonal-to=mel,mel names an attribute twice; expected each "
                                                      "once"),
    ({"attribute": "nv,mel", "permutations": 39},
     "--permutations is 39, too few for a test of 2 attributes: the smallest p-value would be 0.05; expected at least "
     "40"),
    ({"attribute": "nv", "seeds": "0-29"}, "nv has 15 samples with less and 15 with more of it; expected at least 20 "
                                           "of each: take more samples"),
])
def test_attributes_that_do_not_fit_are_refused_before_an_image_is_made(tmp_path, monkeypatch, options, message):
    explorer = disc_explorer(tmp_path / "out", ["nv", "mel"])
    monkeypatch.setattr(explorer.G.synthesis, "forward", None)
    with pytest.raises(UserError) as caught:
        explore(explorer, **options)
    assert str(caught.value) == message
    assert not list((tmp_path / "out").iterdir())


def test_an_attribute_of_one_class_is_refused(tmp_path):
    explorer = disc_explorer(tmp_path / "out", ["nv", "mel"], labels=[1])
    with pytest.raises(UserError) as caught:
        explore(explorer, attribute="mel")
    assert str(caught.value) == ("mel has the same value for all samples; expected an attribute that differs between "
                                 "them: take more samples, of other classes, or another attribute")


@pytest.mark.parametrize(("classes", "arguments", "message"), [
    (2, ["--from=0", "--to=0"], "--from and --to are both 0; expected two different classes"),
    (2, ["--from=0", "--to=7"], "--to names the class '7'; expected a number from 0 to 1"),
    (0, ["--from=0", "--to=1"], "--from and --to are given, but this network was trained without classes; expected "
                                "--attribute"),
    (0, ["--attribute=area", "--layers=fine"],
     "--layers has fine, but this network of 8x8 pixels has no such layers; expected coarse, all, or indices from 0 to "
     "3"),
    (0, ["--attribute=area", "--projected-w=p.npz"],
     "--projected-w=p.npz does not exist; expected an .npz file with an array w of shape [M, 4, 8], as projector.py "
     "writes it"),
])
def test_options_that_do_not_fit_the_network_are_one_line(tmp_path, monkeypatch, capsys, classes, arguments, message):
    monkeypatch.chdir(tmp_path)
    save_generator("net.safetensors", c_dim=classes)
    command = make_boundary_command(no_classifier)
    code = run(command, ["--network=net.safetensors", "--outdir=out", "--device=cpu", *arguments])
    assert (code, capsys.readouterr().err) == (2, f"error: {message}\n")
    assert not Path("out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    ["--attribute=mel", "--seeds=0-99", "--measure=0", "--permutations=39", "--steps=3"],
    ["--from=nv", "--to=mel", "--seeds=0-9", "--steps=3"],
])
def test_two_processes_write_the_same_files(tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    save_generator("net.safetensors", {"classes": ["nv", "mel"]}, c_dim=2)
    options = ["--network=net.safetensors", "--device=cpu", *options]
    assert run(make_boundary_command(no_classifier), [*options, "--outdir=out1"]) == 0
    program = Path(__file__).parents[2] / "explore.py"
    subprocess.run([sys.executable, str(program), "boundary", *options, "--outdir=out2", "--gpus=2"], check=True,
                   env={**os.environ, "OMP_NUM_THREADS": "1"})
    first, second = ({path.name: path.read_bytes() for path in sorted(Path(name).iterdir())}
                     for name in ("out1", "out2"))
    assert first == second


def test_truncated_samples_give_the_same_axis(tmp_path):
    explorer = disc_explorer(tmp_path / "out", settings=SynthesisSettings(truncation=0.5))
    table = write_values(tmp_path / "t.csv", explorer, range(200), size={"y": 1})
    explore(explorer, attribute="size", values=table)
    found = read_directions(tmp_path / "out" / "directions.npz", explorer.network)
    assert angle_between(found.vectors[0], axis_of(explorer.G, "y")) < 12
    torch.testing.assert_close(found.deviations, torch.ones(1), rtol=0.05, atol=0)  # of w untruncated
