"""explore.py edit: styles move along a direction, in some layers, and by as much as asked."""

import csv

import numpy as np
import pytest
import torch

from dnnlib.cli import run
from generation.image_generator import save_projected_w
from generation.pictures import save_picture
from latent.directions import Directions, save_directions
from latent.editing import make_edit_command
from latent.exploration import ImageFunction
from latent.walks import parse_strength
from tests.helpers.explore_commands import (
    attempt,
    cells_of,
    differ_by,
    frames_of,
    images_of_seeds,
    images_of_styles,
    opened,
    record_of,
    refuse,
    styles_of,
    succeed,
)
from tests.helpers.projector_commands import contents, working_in

pytestmark = pytest.mark.usefixtures("one_thread")

SIDE = 8
QUICK = ("--direction=directions.npz:1", "--measure=0", "--frames=2", "--outdir=out")
LAYERS, DEVIATIONS = (0, 2), (0.5, 2.0)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    with working_in(tmp_path, monkeypatch) as path:
        network, _ = opened()
        save_directions("directions.npz", Directions(
            names=("0", "1"), vectors=torch.eye(network.G.w_dim)[[3, 5]], deviations=torch.tensor(DEVIATIONS),
            layers=LAYERS, method="sefa", network_sha256=network.sha256))
        yield path


def save_styles(path, count=1, seed=0):
    """Write styles that differ by layer, as of projector.py --space=w+; return them."""
    G = opened()[0].G
    ws = torch.randn(count, G.num_ws, G.w_dim, generator=torch.Generator().manual_seed(seed))
    save_projected_w(path, ws.numpy())
    return ws


def moved(ws, strength, layers=LAYERS, index=5, deviation=DEVIATIONS[1]):
    result = ws.clone()
    result[:, list(layers), index] += strength * deviation
    return result


def test_edit_moves_chosen_layers_linearly_and_keeps_the_rest(folder, capsys):
    ws = save_styles("target.npz", 2)
    succeed(capsys, "edit", "--target=target.npz", "--steps=5", "--strength=-2..2", "--originals=none", *QUICK)
    found = styles_of("out/edit.npz").unflatten(0, (2, 5))
    for step, strength in enumerate((-2, -1, 0, 1, 2)):
        torch.testing.assert_close(found[:, step], moved(ws, strength))
        assert torch.equal(found[:, step, [1, 3]], ws[:, [1, 3]])
    assert torch.equal(found[:, 2], ws)
    with np.load("out/edit.npz") as arrays:
        assert arrays["target"].tolist() == ["target.npz:0"] * 5 + ["target.npz:1"] * 5
        assert arrays["step"].tolist() == [-2, -1, 0, 1, 2] * 2


def test_edit_layers_option_wins_over_the_file(folder, capsys):
    ws = save_styles("target.npz")
    succeed(capsys, "edit", "--target=target.npz", "--layers=1,3", "--strength=0..1", "--steps=2",
            "--originals=none", *QUICK)
    torch.testing.assert_close(styles_of("out/edit.npz"), torch.cat([ws, moved(ws, 1, (1, 3))]))
    assert record_of("out/edit.json")["layers"] == [1, 3]


def test_edit_sheet_shows_generated_images_of_all_steps(folder, capsys):
    out = succeed(capsys, "edit", "--target=4,7", "--class=nv,mel", "--trunc=0.5", "--steps=3", "--strength=-1..1",
                  *QUICK)
    assert out == ("out/edit.png: 2 targets at 3 strengths from -1 to 1 standard deviations along 1\n"
                   "out/edit.mp4: 3 frames, 0.1 s, 2 films\n")
    _, images = images_of_seeds([4, 7], [0, 1], truncation=0.5)
    cells = cells_of("out/edit.png", SIDE, 3, rows=2)
    assert torch.equal(cells[1], images[0])
    assert torch.equal(cells[4], images[1])
    made = images_of_styles(styles_of("out/edit.npz"))
    assert all(torch.equal(cell, image) for cell, image in zip(cells, made, strict=True))
    assert not torch.equal(cells[0], cells[2])


@pytest.mark.parametrize("loop", [False, True])
def test_edit_film_leads_from_low_to_high(folder, capsys, loop):
    ws = save_styles("target.npz")
    succeed(capsys, "edit", "--target=target.npz", "--direction=directions.npz:1", "--measure=0", "--frames=4",
            "--strength=-3..1", "--originals=none", "--outdir=out", *(["--loop"] if loop else []))
    frames, _ = frames_of("out/edit.mp4")
    strengths = (-3, -2, -1, 0, 1, 0, -1, -2) if loop else (-3, -2, -1, 0, 1)
    images = [images_of_styles(moved(ws, strength))[0] for strength in strengths]
    assert len(frames) == len(images) == record_of("out/edit.json")["num_frames"]
    for frame, image in zip(frames, images, strict=True):
        assert differ_by(frame, image) < 4
    assert differ_by(frames[0], images[4]) > 6


def test_edit_film_of_more_targets_than_fit_shows_the_first_and_styles_are_of_all(folder, capsys, monkeypatch):
    monkeypatch.setattr("latent.editing._FRAME_PIXELS", 2 * 2 * SIDE * SIDE)
    save_styles("p.npz", count=3)
    assert attempt("edit", "--target=p.npz", "--steps=2", "--strength=-1..1", *QUICK) == 0
    assert capsys.readouterr().err.splitlines()[-1] == "the film shows the first 2 of 3 targets"
    assert frames_of("out/edit.mp4")[0][0].shape == (256, 512, 3)
    assert len(styles_of("out/edit.npz")) == 3 * 2


def test_edit_original_is_shown_beside(folder, capsys):
    save_styles("projected_w.npz")
    target = torch.full((3, SIDE, SIDE), 90, dtype=torch.uint8)
    save_picture("target.png", target)
    succeed(capsys, "edit", "--target=projected_w.npz", "--steps=3", *QUICK)
    frame = frames_of("out/edit.mp4")[0][0]
    assert frame.shape == (256, 512, 3)
    assert differ_by(frame[:, 16:240], target[:, :, :7]) < 3
    cells = cells_of("out/edit.png", SIDE, 4)
    assert torch.equal(cells[0], target)


@pytest.mark.parametrize("targets", ["4,7", "4"])
def test_edit_measures_each_image(folder, capsys, targets):
    """By a stand-in for a classifier, which knows how red an image is."""
    seeds = [int(seed) for seed in targets.split(",")]
    command = make_edit_command(lambda path, weights, device: ImageFunction(
        names=("red", "area"), compute=lambda pixels: pixels[:, :2].float().mean(dim=(2, 3)).numpy()))
    assert run(command, ["--network=net.safetensors", "--device=cpu", f"--target={targets}", "--class=nv", "--steps=3",
                         "--strength=0..2", "--direction=directions.npz:0", "--frames=1", "--outdir=out",
                         "--classifier=any.safetensors"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    with open("out/effects.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["target"], float(row["step"])) for row in rows] == [
        (f"seed {seed} nv", step) for seed in seeds for step in (0, 1, 2)]
    assert {"area", "color_l", "red", "classifier:area"} < set(rows[0])
    images = images_of_styles(styles_of("out/edit.npz")).float()
    assert [float(row["red"]) for row in rows] == pytest.approx(images[:, 0].mean(dim=(1, 2)).tolist(), rel=1e-6)
    effect, = (one for one in record_of("out/edit.json")["effects"] if one["quantity"] == "red")
    red = np.array([float(row["red"]) for row in rows]).reshape(len(seeds), 3)
    slopes = (red[:, 2] - red[:, 0]) / 2  # least squares over three steps
    assert effect["slope"] == pytest.approx(slopes.mean(), rel=1e-5)
    assert effect["means"] == pytest.approx(red.mean(axis=0), rel=1e-5)
    lines = captured.out.splitlines()
    summary, = (line for line in lines if line.startswith("direction 0: "))
    assert (f"red {slopes[0]:+.3g}" in summary) is (len(seeds) == 1)
    low, _, high = red.mean(axis=0)
    assert f"red: {low:.3g} at 0, {high:.3g} at 2{' (mean of 2 targets)' if len(seeds) > 1 else ''}" in lines


@pytest.mark.parametrize(("strength", "places"), [("-2..2", (-2, 0, 2)), ("1..3", (0, 1, 3))])
def test_edit_prints_the_means_at_the_ends_and_at_zero(folder, capsys, strength, places):
    """By a stand-in for a classifier, whose second quantity is not found in some images, and the third in none."""
    ws, unmoved = images_of_seeds([1, 4, 7], [0, 0, 0])
    limit = unmoved[:, 2].double().mean(dim=(1, 2)).median().item()

    def compute(pixels):
        blue = pixels[:, 2].double().mean(dim=(1, 2)).numpy()
        return np.stack([blue, np.where(blue <= limit, blue, np.nan), np.full_like(blue, np.nan)], axis=1)

    command = make_edit_command(lambda *_: ImageFunction(names=("blue", "some", "never"), compute=compute))
    assert run(command, ["--network=net.safetensors", "--device=cpu", "--target=1,4,7", "--class=nv", "--steps=3",
                         f"--strength={strength}", "--direction=directions.npz:1", "--frames=1", "--outdir=out",
                         "--measure=0", "--classifier=any.safetensors"]) == 0
    lines = capsys.readouterr().out.splitlines()
    blue = [images_of_styles(moved(ws, place))[:, 2].double().mean(dim=(1, 2)).numpy() for place in places]
    some = [values[values <= limit] for values in blue]
    assert len(some[places.index(0)]) == 2
    texts = [f"{v.mean():.3g} at {place}" for v, place in zip(blue, places)]
    assert f"blue: {', '.join(texts)} (mean of 3 targets)" in lines
    texts = [f"{v.mean():.3g} at {place}" if len(v) else f"not found at {place}" for v, place in zip(some, places)]
    assert f"some: {', '.join(texts)} (means of {', '.join(str(len(v)) for v in some)} of 3 targets)" in lines
    assert f"never: {', '.join(f'not found at {place}' for place in places)}" in lines


def test_edit_projections_of_one_group_count_once(folder, capsys):
    G = opened()[0].G
    ws = torch.randn(4, G.num_ws, G.w_dim, generator=torch.Generator().manual_seed(0))
    command = make_edit_command(lambda path, weights, device: ImageFunction(
        names=("red",), compute=lambda pixels: pixels[:, :1].float().mean(dim=(2, 3)).numpy()))
    for name, groups, expected in (("p", ["x", "x", "", "y"], 3), ("q", ["", "", "", ""], 4)):
        save_projected_w(f"{name}.npz", ws.numpy(), group=np.array(groups))
        assert run(command, ["--network=net.safetensors", "--device=cpu", f"--target={name}.npz", "--measure=0",
                             "--direction=directions.npz:0", "--frames=1", f"--outdir={name}", "--originals=none",
                             "--classifier=any.safetensors"]) == 0
        assert record_of(f"{name}/edit.json")["effects"][0]["num_units"] == expected


def test_edit_equal_commands_give_equal_files(folder, capsys):
    for name in "ab":
        succeed(capsys, "edit", "--target=1", "--class=mel", "--direction=directions.npz:0", "--frames=3",
                "--formats=mp4,webp", f"--outdir={name}")
    assert contents("a") == contents("b")
    assert set(contents("a")) == {"edit.json", "edit.mp4", "edit.npz", "edit.png", "edit.webp", "effects.csv"}


@pytest.mark.parametrize(("text", "ends"), [("-3..3", (-3, 3)), ("0..2.5", (0, 2.5)), (" -1 .. -0.5 ", (-1, -0.5)),
                                            ("+1..2", (1, 2))])
def test_strength_is_a_range(text, ends):
    assert parse_strength(text) == ends


@pytest.mark.parametrize(("arguments", "message"), [
    (["--target="], "--target is missing; expected seeds or npz files with styles, such as 0,5-9 or projected_w.npz or "
     "latents.npz:3"),
    (["--seeds=3"], "--target and --seeds are both given; expected one of them"),
    (["--direction="], "--direction is missing; expected one, such as --direction=directions.npz:0"),
    (["--strength=3..-3"], "--strength is 3..-3; expected LOW..HIGH in standard deviations, LOW below HIGH, such as "
     "-3..3"),
    (["--strength=3"], "--strength is 3; expected LOW..HIGH in standard deviations, LOW below HIGH, such as -3..3"),
    (["--strength=1.2.3..4"], "--strength is 1.2.3..4; expected LOW..HIGH in standard deviations, LOW below HIGH, such "
     "as -3..3"),
    ([f"--strength=0..{'9' * 400}"], f"--strength is 0..{'9' * 400}; expected LOW..HIGH in standard deviations, LOW "
     "below HIGH, such as -3..3"),
    (["--steps=1"], "--steps is 1; expected 2 to 1000"),
    (["--direction=directions.npz:2"], "--direction is directions.npz:2, but directions.npz has 2; expected an index "
     "from 0 to 1"),
    (["--layers=9"], "--layers has 9; the largest layer of this network is 3"),
    (["--target=other.npz"], "--target=other.npz has w of shape [1, 4, 16]; expected [M, 4, 8] for this network"),
    (["--weights=w.pt"], "--weights is given, but only works with --classifier; add that, or leave --weights out"),
])
def test_edit_mistakes_are_refused_in_one_line(folder, capsys, arguments, message):
    save_projected_w("other.npz", np.zeros((1, 4, 16), np.float32))
    usual = {"--target": "0", "--class": "nv", "--direction": "directions.npz:0", "--outdir": "new"}
    for argument in arguments:
        name, _, value = argument.partition("=")
        usual[name] = value
    assert refuse(capsys, "edit", *(f"{name}={value}" for name, value in usual.items() if value)) == message


def test_edit_direction_of_another_network_is_refused(folder, capsys):
    found = refuse(capsys, "edit", "--target=0", "--direction=directions.npz:0", "--outdir=new",
                   network="plain.safetensors")
    assert "has directions of another network" in found


def test_edit_seeds_of_conditional_network_need_a_class_but_styles_do_not(folder, capsys):
    assert refuse(capsys, "edit", "--target=0", "--direction=directions.npz:0", "--outdir=new") == (
        "--class is missing, but this network is class-conditional; expected one of nv, mel, or a number from 0 to 1")
    save_styles("target.npz")
    assert attempt("edit", "--target=target.npz", *QUICK) == 0
    assert capsys.readouterr().err == (
        "the original of target.npz is not shown, since there is no target.png of it beside the file; --originals=PATH "
        "names the images that were projected\n")
