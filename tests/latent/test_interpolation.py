"""explore.py interpolate: frames of points are the points, ways are straight or round, loops close."""

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from generation.image_generator import latents_of, save_projected_w
from generation.pictures import save_picture
from imagesets.writer import ImageSetWriter
from latent.interpolation import (
    LatentTrack,
    Moment,
    NoiseDrift,
    StyleTrack,
    Timeline,
    angle_between,
    ease,
    great_circle,
    straight_line,
)
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
from tests.helpers.make_sets import pixels_of, png
from tests.helpers.projector_commands import as_image, contents, working_in

pytestmark = pytest.mark.usefixtures("one_thread")

SIDE = 8  # of the images of the networks here
QUICK = ("--frames=3", "--outdir=out")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    with working_in(tmp_path, monkeypatch) as path:
        yield path


def random_tensors(count, *shape, seed=0):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def save_styles(path, count=1, seed=0, **columns):
    """Write styles that differ by layer, as of projector.py --space=w+; return them."""
    network, _ = opened()
    ws = random_tensors(count, network.G.num_ws, network.G.w_dim, seed=seed).float()
    Path(path).parent.mkdir(exist_ok=True)
    save_projected_w(path, ws.numpy(), **columns)
    return ws


# Paths


def test_great_circle_ends_are_the_points():
    a, b = random_tensors(2, 512)
    assert torch.equal(great_circle(a, b, 0), a)
    assert torch.equal(great_circle(a, b, 1), b)
    assert torch.equal(great_circle(a.float(), b.float(), 1.0), b.float())


@pytest.mark.parametrize("size", [2, 8, 512])
def test_great_circle_has_constant_angular_speed_and_linear_norm(size):
    a, b = random_tensors(2, size)
    path = [great_circle(a, b, step / 7) for step in range(8)]
    angles = [angle_between(one, other) for one, other in itertools.pairwise(path)]
    assert angles == pytest.approx([angle_between(a, b) / 7] * 7, abs=1e-9)
    norms = [float(z.norm()) for z in path]
    assert norms == pytest.approx(np.linspace(float(a.norm()), float(b.norm()), 8), rel=1e-12)
    for z in path:  # in the plane of the two points
        rest = z - torch.linalg.lstsq(torch.stack([a, b], 1), z[:, None]).solution[:, 0] @ torch.stack([a, b])
        assert rest.norm() < 1e-9


def test_great_circle_opposite_points_takes_half_a_turn():
    a = random_tensors(1, 64)[0]
    path = [great_circle(a, -2 * a, step / 10) for step in range(11)]
    assert [angle_between(one, other) for one, other in itertools.pairwise(path)] == pytest.approx([math.pi / 10] * 10,
                                                                                               abs=1e-9)


@pytest.mark.parametrize("factor", [1, 3])
def test_great_circle_equal_directions_stay(factor):
    a = random_tensors(1, 64)[0]
    torch.testing.assert_close(great_circle(a, factor * a, 0.5), a * (1 + factor) / 2)


def test_great_circle_of_nearly_equal_points_is_accurate():
    a, b = random_tensors(2, 64)
    near = a + 1e-7 * b
    torch.testing.assert_close(great_circle(a, near, 0.25), 0.75 * a + 0.25 * near, rtol=0, atol=1e-12)


def test_straight_line_is_linear_with_exact_ends():
    a, b = random_tensors(2, 4, 8).float()
    assert torch.equal(straight_line(a, b, 0), a)
    assert torch.equal(straight_line(a, b, 1), b)
    torch.testing.assert_close(straight_line(a, b, 0.25), 0.75 * a + 0.25 * b)


def test_ease_rests_at_both_ends_and_is_symmetric():
    assert (ease(0), ease(0.5), ease(1)) == (0, 0.5, 1)
    assert ease(1e-4) / 1e-4 < 1e-3
    assert (1 - ease(1 - 1e-4)) / 1e-4 < 1e-3
    assert ease(0.2) + ease(0.8) == pytest.approx(1)
    assert all(ease(t / 100) < ease((t + 1) / 100) for t in range(100))


@pytest.mark.parametrize("easing", ["linear", "smooth"])
@pytest.mark.parametrize("frames", [1, 2, 60])
def test_timeline_visits_every_point(easing, frames):
    open_, loop = (Timeline(points=4, frames=frames, easing=easing, loop=loop) for loop in (False, True))
    assert (len(open_), len(loop)) == (3 * frames + 1, 4 * frames)
    for timeline in (open_, loop):
        for point in range(4):
            moment = timeline.at(timeline.frame_of(point))
            assert (moment.start if moment.t == 0 else moment.end, moment.t in (0, 1)) == (point, True)
    assert open_.at(len(open_) - 1) == Moment(2, 3, 1)
    assert loop.segments == [(0, 1), (1, 2), (2, 3), (3, 0)]


def test_timeline_of_equal_distances_steps_equally_and_closes():
    corners = torch.tensor([[0.0, 0], [1, 0], [1, 1], [0, 1]])[:, None]  # of a square
    timeline, track = Timeline(points=4, frames=5, loop=True), StyleTrack(corners)
    path = [track.at(timeline.at(frame)) for frame in range(len(timeline))]
    steps = [float((one - other).norm()) for one, other in zip(path, [*path[1:], path[0]], strict=True)]
    assert steps == pytest.approx([0.2] * 20)


def test_latent_track_mixes_labels_and_centers(folder):
    network, generator = opened(truncation=0.5, center="class")
    rows = network.classes.labels([0, 1])
    track = LatentTrack(generator, [3, 4], rows)
    z = great_circle(*latents_of([3, 4], network.G.z_dim), 0.25)
    label = torch.tensor([[0.75, 0.25]])
    w = network.G.mapping(z[None], label)[0]
    nv, mel = generator.centers_of(rows)
    torch.testing.assert_close(track.at(Moment(0, 1, 0.25)), 0.5 * w + 0.5 * (0.75 * nv + 0.25 * mel))


# Noise


def test_noise_drift_keeps_mean_and_variance_at_all_times(folder):
    drift = NoiseDrift(opened()[0].G.synthesis)
    for t in (0, 0.1, 0.5, 0.9, 1):
        maps = drift.at(Moment(0, 1, t))
        assert set(maps) == {"b4.conv1.noise_const", "b8.conv0.noise_const", "b8.conv1.noise_const"}
        for one in maps.values():
            assert float(one.mean()) == pytest.approx(0, abs=1e-6)
            assert float(one.square().mean()) == pytest.approx(1, abs=1e-6)


def test_noise_drift_is_continuous_and_closes(folder):
    drift, timeline = NoiseDrift(opened()[0].G.synthesis), Timeline(points=3, frames=50, loop=True)
    for name in drift.at(timeline.at(0)):
        path = [drift.at(timeline.at(frame))[name] for frame in range(len(timeline))]
        speeds = [angle_between(one, other) * 50 for one, other in zip(path, [*path[1:], path[0]], strict=True)]
        for segment in (speeds[:50], speeds[50:100], speeds[100:]):  # the last leads back to the first frame
            assert segment == pytest.approx([segment[0]] * 50, rel=1e-3)
        assert min(speeds) > 0.5  # radians from point to point
        assert torch.equal(drift.at(Moment(2, 0, 1))[name], path[0])


def test_film_drifting_noise_changes_texture_only_and_repeats(folder, capsys):
    common = ("--points=1,1", "--class=nv", "--frames=4", "--formats=webp")  # the style stays
    for name, more in (("const", ()), ("drift", ("--noise-mode=drift",)), ("again", ("--noise-mode=drift",))):
        succeed(capsys, "interpolate", *common, *more, f"--outdir={name}")
    assert contents("drift") == contents("again")
    assert len(frames_of("const/interpolation.webp")[0]) == 1  # WebP merges equal frames
    frames, seconds = frames_of("drift/interpolation.webp")
    assert (len(frames), round(seconds * 30)) == (5, 5)
    assert np.array_equal(styles_of("const/interpolation.npz"), styles_of("drift/interpolation.npz"))


# The command


@pytest.mark.parametrize("space", ["w", "z"])
@pytest.mark.parametrize(("options", "settings"), [
    ((), {}), (("--trunc=0.6",), {"truncation": 0.6}),
    (("--trunc=0.6", "--trunc-center=class"), {"truncation": 0.6, "center": "class"}),
    (("--noise-mode=none",), {"noise_mode": "none"}),
])
def test_film_points_are_images_of_generate(folder, capsys, space, options, settings):
    succeed(capsys, "interpolate", "--points=3,5-6", "--class=nv,mel,nv", f"--space={space}", *options, *QUICK)
    ws, images = images_of_seeds([3, 5, 6], [0, 1, 0], **settings)
    assert torch.equal(styles_of("out/interpolation.npz"), ws)
    cells = cells_of("out/points.png", SIDE, 3)  # frames of the film
    assert all(torch.equal(cell, image) for cell, image in zip(cells, images, strict=True))


def test_film_frames_are_counted_and_between_the_points(folder, capsys):
    out = succeed(capsys, "interpolate", "--points=0,1,2", "--class=mel", "--frames=4", "--fps=10", "--outdir=out",
                  "--formats=mp4,webp")
    assert out == ("out/interpolation.mp4: 9 frames, 0.9 s through seed 0 mel, seed 1 mel, seed 2 mel\n"
                   "out/interpolation.webp: 9 frames, 0.9 s through seed 0 mel, seed 1 mel, seed 2 mel\n")
    ws, images = images_of_seeds([0, 1, 2], [1] * 3)
    between = images_of_styles(0.75 * ws[:1] + 0.25 * ws[1:2])
    for form in ("mp4", "webp"):
        frames, seconds = frames_of(f"out/interpolation.{form}")
        assert (len(frames), round(seconds, 3)) == (9, 0.9)
        for number, image in ((0, images[0]), (1, between[0]), (4, images[1]), (8, images[2])):
            assert differ_by(frames[number], image) < 4
            assert differ_by(frames[number - 2], image) > 8


def test_film_loop_ends_before_its_start(folder, capsys):
    succeed(capsys, "interpolate", "--points=0,1", "--class=nv", "--loop", "--outdir=out", "--frames=6")
    frames, _ = frames_of("out/interpolation.mp4")
    record = record_of("out/interpolation.json")
    assert (len(frames), record["num_frames"], record["loop"]) == (12, 12, True)
    assert [(one["from"], one["to"]) for one in record["films"][0]["segments"]] == [
        ("seed 0 nv", "seed 1 nv"), ("seed 1 nv", "seed 0 nv")]
    ws, _ = images_of_seeds([0, 1], [0, 0])
    image, = images_of_styles(ws[:1] + (ws[1:] - ws[:1]) / 6)
    assert differ_by(frames[1], image) < 4
    assert differ_by(frames[11], image) < 4  # on the way back


def test_film_record_measures_segments(folder, capsys):
    succeed(capsys, "interpolate", "--points=0,1", "--class=nv", "--space=z", *QUICK)
    a, b = latents_of([0, 1], 8).numpy()
    cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    record = record_of("out/interpolation.json")
    assert record["films"][0]["segments"][0]["angle_degrees"] == pytest.approx(math.degrees(math.acos(cosine)))
    succeed(capsys, "interpolate", "--points=0,1", "--class=nv", *QUICK)
    ws, _ = images_of_seeds([0, 1], [0, 0])
    assert record_of("out/interpolation.json")["films"][0]["segments"][0]["distance"] == pytest.approx(
        float((ws[0, 0] - ws[1, 0]).norm()))


def test_film_several_lists_are_a_grid(folder, capsys):
    succeed(capsys, "interpolate", "--points=0,1", "--points=2,3", "--points=4,5", "--class=nv", *QUICK)
    _, images = images_of_seeds(range(6), [0] * 6)
    cells = cells_of("out/points.png", SIDE, 2, rows=3)
    assert all(torch.equal(cell, image) for cell, image in zip(cells, images, strict=True))
    frames, _ = frames_of("out/interpolation.mp4")
    assert len(frames) == 4
    white = torch.full_like(images[0], 255)
    for number, shown in ((0, (0, 2, 4)), (3, (1, 3, 5))):
        first, second, third = (images[index] for index in shown)
        tiled = torch.cat([torch.cat([first, second], 2), torch.cat([third, white], 2)], 1)
        assert differ_by(frames[number], tiled) < 4
    assert styles_of("out/interpolation.npz").shape[0] == 6
    with np.load("out/interpolation.npz") as arrays:
        assert arrays["film"].tolist() == [0, 0, 1, 1, 2, 2]
        assert arrays["point"].tolist()[1:3] == ["seed 1 nv", "seed 2 nv"]


def test_film_mixes_seeds_files_and_rows(folder, capsys):
    one, many = save_styles("one.npz"), save_styles("many.npz", 4, seed=1)
    succeed(capsys, "interpolate", "--points=7,one.npz,many.npz:3,many.npz:0-1", "--class=mel", *QUICK,
            "--originals=none")
    seed, _ = images_of_seeds([7], [1])
    ws = torch.cat([seed, one, many[3:], many[:2]])
    assert torch.equal(styles_of("out/interpolation.npz"), ws)
    assert record_of("out/interpolation.json")["films"][0]["points"] == [
        "seed 7 mel", "one.npz", "many.npz:3", "many.npz:0", "many.npz:1"]
    cells = cells_of("out/points.png", SIDE, 5)
    assert all(torch.equal(cell, image) for cell, image in zip(cells, images_of_styles(ws), strict=True))


def test_film_of_seeds_option_is_that_of_points(folder, capsys):
    succeed(capsys, "interpolate", "--points=4-6", "--frames=2", "--outdir=a", network="plain.safetensors")
    succeed(capsys, "interpolate", "--seeds=4-6", "--frames=2", "--outdir=b", network="plain.safetensors")
    assert contents("a") == contents("b")


def test_film_of_a_gray_network(folder, capsys):
    succeed(capsys, "interpolate", "--points=0,1", *QUICK, network="gray.safetensors")
    _, images = images_of_seeds([0, 1], [None, None], network="gray.safetensors")
    assert torch.equal(cells_of("out/points.png", SIDE, 2)[1], images[1])


def test_film_label_is_a_mix_of_classes(folder, capsys):
    succeed(capsys, "interpolate", "--points=0,1", "--label=0.5,0.5", *QUICK)
    ws, _ = images_of_seeds([0, 1], [(0.5, 0.5)] * 2)
    assert torch.equal(styles_of("out/interpolation.npz"), ws)


# Originals


def test_film_shows_targets_beside(folder, capsys):
    targets = []
    for name, seed in (("a", 1), ("b", 2), ("c", 3)):
        save_styles(f"{name}/projected_w.npz", seed=seed)
        targets.append(torch.full((3, SIDE, SIDE), 60 * seed, dtype=torch.uint8))
        save_picture(f"{name}/target.png", targets[-1])
    succeed(capsys, "interpolate", "--points=a/projected_w.npz,b/projected_w.npz,c/projected_w.npz", *QUICK)
    frames, _ = frames_of("out/interpolation.mp4")
    assert frames[0].shape == (256, 768, 3)
    for number, left, right in ((0, 0, 1), (2, 0, 1), (3, 1, 2), (6, 1, 2)):
        assert differ_by(frames[number][:, 16:240], targets[left][:, :, :7]) < 3
        assert differ_by(frames[number][:, 528:752], targets[right][:, :, :7]) < 3
    assert record_of("out/interpolation.json")["films"][0]["points"] == [
        f"{name}/projected_w.npz" for name in "abc"]
    succeed(capsys, "interpolate", "--points=a/projected_w.npz,b/projected_w.npz", "--originals=none", *QUICK)
    assert frames_of("out/interpolation.mp4")[0][0].shape == (256, 256, 3)


def test_film_originals_of_a_set_are_found_by_name(folder, capsys):
    with ImageSetWriter("set.zip") as writer:
        names = [writer.add(png(pixels_of(index))) for index in range(3)]
    save_styles("latents.npz", 2, image=np.array([names[2], names[0]]))
    points = "--points=latents.npz,5"
    succeed(capsys, "interpolate", points, "--class=nv", "--originals=set.zip", *QUICK)
    frames, _ = frames_of("out/interpolation.mp4")
    second, first = (as_image(pixels_of(index)) for index in (2, 0))
    assert frames[0].shape == (256, 768, 3)
    assert differ_by(frames[0][:, :256], second) < 6
    assert differ_by(frames[0][:, 512:], first) < 6
    assert frames[-1][:, 520:].mean() > 250  # a seed has no original
    code = attempt("interpolate", points, "--class=nv", *QUICK)
    assert (code, capsys.readouterr().err) == (
        0, "the originals of 2 saved styles are not shown, since there is no target.png of them beside their files; "
        "--originals=PATH names the images that were projected\n")
    save_styles("latents.npz", 2, image=np.array([names[2], "no.png"]))
    assert refuse(capsys, "interpolate", points, "--class=nv", "--originals=set.zip", "--outdir=new") == (
        "--originals is set.zip, which does not hold no.png, the original of latents.npz:1; expected the data set that "
        "was projected")


# Mistakes


@pytest.mark.parametrize(("arguments", "message"), [
    (["--points=3"], "--points names only seed 3; expected 2 points or more, such as 0,5-9 or projected_w.npz or "
     "latents.npz:3"),
    (["--seeds=3"], "--seeds names only seed 3; expected 2 points or more, such as 0,5-9 or projected_w.npz or "
     "latents.npz:3"),
    ([], "--points is missing; expected seeds and npz files with styles, such as 0,5-9 or projected_w.npz or "
     "latents.npz:3"),
    (["--points=0,1", "--seeds=3"], "--points and --seeds are both given; expected one of them"),
    (["--points=0,x"], "--points has 'x'; expected seeds and npz files with styles, such as 0,5-9 or projected_w.npz "
     "or latents.npz:3"),
    (["--points=0,other.npz"], "--points=other.npz has w of shape [1, 4, 16]; expected [M, 4, 8] for this network"),
    (["--points=0,one.npz:1"], "--points has one.npz:1, but the file has only row 0; expected one of these"),
    (["--points=0,two.npz:1-2"], "--points has two.npz:1-2, but the file has rows 0 to 1; expected one of these"),
    (["--points=0,two.npz:1-0"], "--points has two.npz:1-0, which runs backwards; expected two.npz:0-1"),
    (["--points=0,two.npz:1", "--space=z"], "--space is z, but two.npz:1 is a saved style, which has no latent; "
     "expected --space=w, or only seeds"),
    (["--points=0,1", "--points=0-2"], "--points has lists of 2 and 3 points; expected equally many in all films of a "
     "grid"),
    (["--points=0-3", "--class=nv,mel"], "--class=nv,mel names 2 classes for 4 points; expected one class, or one for "
     "each"),
    (["--points=0-2", "--class=all"], "--class=all names 2 classes for 3 points; expected one class, or one for each"),
    (["--points=0,1", "--class="], "--class is missing, but this network is class-conditional; expected one of nv, "
     "mel, or a number from 0 to 1"),
    (["--points=two.npz", "--class=nv"], "--class is nv, but all points are saved styles, which need none; leave "
     "--class out"),
    (["--points=0,1", "--frames=0"], "--frames is 0; expected 1 to 1000000, usually 60"),
    (["--points=0,1", "--fps=0"], "--fps is 0; expected 1 to 240 frames per second, usually 30"),
    (["--points=0,1", "--formats=gif"], "--formats has 'gif'; expected mp4 or webp, or both separated by a comma"),
    (["--points=two.npz", "--originals=set.zip", "--class="], "set.zip does not exist"),
])
def test_interpolate_mistakes_are_refused_in_one_line(folder, capsys, arguments, message):
    save_styles("one.npz")
    save_styles("two.npz", 2)
    save_projected_w("other.npz", np.zeros((1, 4, 16), np.float32))
    given = [argument for argument in arguments if argument != "--class="]
    usual = [] if any(argument.startswith("--class") for argument in arguments) else ["--class=nv"]
    found = refuse(capsys, "interpolate", *given, *usual, "--outdir=new")
    assert found.startswith(message) if message.endswith("exist") else found == message


@pytest.mark.slow
def test_film_two_processes_write_the_same_files(folder):
    program = Path(__file__).parents[2] / "explore.py"
    for count in (1, 2):
        subprocess.run([sys.executable, str(program), "interpolate", "--network=net.safetensors", "--device=cpu",
                        "--points=0-3", "--points=4-7", "--class=nv,mel,nv,mel", "--space=z", "--frames=9",
                        "--noise-mode=drift", "--trunc=0.7", f"--gpus={count}", f"--outdir=out{count}",
                        "--formats=mp4,webp"], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert contents("out1") == contents("out2")
    assert len(contents("out1")) == 5
