"""Test `explore.py anatomy`: noise of known strength, truncation, layers that matter or do not, components of w."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dnnlib.cli import run
from generation.image_generator import ImageGenerator, SynthesisSettings
from latent.anatomy import (
    describe_styles,
    draw_noise,
    exchanged_styles,
    make_anatomy_command,
    mean_of_pairs,
    measure_layers,
    measure_noise,
    measure_styles,
    measure_truncation,
    noise_inputs,
    noise_statistics,
)
from latent.anatomy_page import colored
from tests.helpers.disc_generator import CLASS_OFFSET, disc_explorer
from tests.helpers.generator_files import lively_generator, save_generator
from tests.helpers.small_networks import small_generator
from tests.helpers.training_runs import replaced

HOSTILE = "<script>alert(1)</script>"
USUAL = ("--network=net.safetensors", "--outdir=out", "--device=cpu", "--seeds=0-3", "--draws=3")

pytestmark = pytest.mark.usefixtures("one_thread")


def explorer_of(tmp_path, G):
    """Return an Explorer of an unconditional generator."""
    explorer = disc_explorer(tmp_path)
    return replace(explorer, network=replace(explorer.network, G=G),
                   generator=ImageGenerator(G, SynthesisSettings(), batch=1))


def generator_with_strengths(strength, resolution=16, **changes):
    """Return a small generator whose noise has a strength, by the name of its layer, in each."""
    G = small_generator(resolution, c_dim=0, **changes).eval().requires_grad_(False)
    for name, parameter in G.synthesis.named_parameters():
        if name.endswith("noise_strength"):
            parameter.fill_(strength(name))
    return G


# Noise.


def test_noise_of_strength_zero_adds_nothing(tmp_path):
    explorer = explorer_of(tmp_path, generator_with_strengths(lambda name: 0.0))

    found = measure_noise(explorer, [0, 1], 4)

    assert list(found.maps) == ["all", "coarse", "middle"]
    assert all(float(values.abs().max()) == 0 for values in found.maps.values())
    assert (found.means.int() - found.constant.int()).abs().max() <= 1  # which are rounded in another way


def test_noise_of_coarse_layers_alone_leaves_the_other_groups_at_zero(tmp_path):
    explorer = explorer_of(tmp_path, generator_with_strengths(lambda name: 0.5 * name.startswith(("b4.", "b8."))))

    found = measure_noise(explorer, [0], 4)

    assert found.means_of("middle") == [0]
    assert found.means_of("coarse")[0] > 0.1
    assert torch.equal(found.maps["coarse"], found.maps["all"])


def test_noise_statistics_equal_numpys_over_images_with_drawn_maps():
    G = generator_with_strengths(lambda name: 0.3)
    generator, names = ImageGenerator(G, SynthesisSettings(), batch=1), noise_inputs(G)["middle"]
    w = generator.map_seeds([5], torch.zeros(1, 0))

    mean, std = noise_statistics(generator, w, 5, names, 6)

    images = []
    for draw in range(6):
        maps = draw_noise(G, names, 5, draw)
        saved = {name: G.synthesis.get_buffer(name).clone() for name in names}
        for name in names:
            G.synthesis.get_buffer(name).copy_(maps[name][0, 0])
        images.append(G.synthesis(w, noise_mode="const")[0].double().clamp(-1, 1).numpy() * 127.5 + 127.5)
        for name in names:
            G.synthesis.get_buffer(name).copy_(saved[name])
    np.testing.assert_allclose(mean, np.mean(images, axis=0), atol=1e-3)
    np.testing.assert_allclose(std, np.std(images, axis=0, ddof=1), atol=1e-3)
    assert std.max() > 1


def test_noise_of_the_last_layer_has_the_standard_deviation_of_its_strength():
    """Where the last activation is far above 0, and ToRGB takes the mean of its channels, an image has its noise."""
    G = generator_with_strengths(lambda name: 0.1 * name.startswith("b16.conv1"))
    block = G.synthesis.b16
    block.conv1.bias.fill_(50.0)
    channels = block.torgb.weight.shape[1]
    block.torgb.weight.fill_(0.01 / channels)
    block.torgb.affine.weight.fill_(0.0)
    block.torgb.affine.bias.fill_(1 / block.torgb.style_gain)
    block.torgb.bias.fill_(-0.01 * 50 * math.sqrt(2))
    for name in ("b4", "b8"):
        getattr(G.synthesis, name).torgb.weight.fill_(0.0)
    generator = ImageGenerator(G, SynthesisSettings(), batch=1)

    _, std = noise_statistics(generator, generator.map_seeds([0], torch.zeros(1, 0)), 0, noise_inputs(G)["all"], 200)

    expected = 0.1 * math.sqrt(2) * 0.01 * 127.5  # strength, gain of the activation, weight, levels
    assert abs(float(std.mean()) / expected - 1) < 0.02


def test_noise_inputs_of_a_network_without_noise_are_none(tmp_path):
    G = small_generator(16, c_dim=0, use_noise=False).eval()

    assert noise_inputs(G) == {}
    assert measure_noise(explorer_of(tmp_path, G), [0], 4) is None


def test_draw_noise_of_a_layer_does_not_depend_on_the_others():
    G = small_generator(16)
    names = noise_inputs(G)["all"]

    alone, together = draw_noise(G, names[2:3], 3, 1), draw_noise(G, names, 3, 1)

    assert torch.equal(alone[names[2]], together[names[2]])
    assert not torch.equal(draw_noise(G, names, 3, 2)[names[2]], together[names[2]])
    values = torch.cat([draw_noise(G, names[-1:], 3, draw)[names[-1]].flatten() for draw in range(50)])
    assert abs(float(values.mean())) < 5 / math.sqrt(len(values))
    assert abs(float(values.std()) - 1) < 5 / math.sqrt(2 * len(values))


# Truncation.


def test_truncation_to_psi_zero_gives_one_image_for_all_seeds_of_a_class(tmp_path):
    explorer = disc_explorer(tmp_path, ["nv", "mel"])

    by_center = {one.center: one for one in measure_truncation(explorer, range(6), [0, 1])}

    assert list(by_center) == ["global", "class"]
    assert [by_center[center].same_class[0] for center in by_center] == [0, 0]
    assert by_center["global"].other_class[0] == 0
    assert by_center["class"].other_class[0] > 5  # the classes' discs have other sizes
    pictures = {center: [row[0].split(" alt")[0] for _, row in one.pictures] for center, one in by_center.items()}
    assert len(set(pictures["global"])) == 1
    assert pictures["class"][0] == pictures["class"][2] == pictures["class"][4] != pictures["class"][1]


def test_truncation_at_psi_one_has_the_distances_of_the_seeds_themselves(tmp_path):
    explorer = disc_explorer(tmp_path, ["nv", "mel"])

    found = measure_truncation(explorer, range(5), [0.5, 1])

    images = explorer.render(explorer.styles(range(5))).double().numpy()
    pairs = {True: [], False: []}
    for first in range(5):
        for second in range(first):
            pairs[(first - second) % 2 == 0].append(np.abs(images[first] - images[second]).mean())
    for one in found:
        assert one.same_class[1] == pytest.approx(np.mean(pairs[True]), rel=1e-9)
        assert one.other_class[1] == pytest.approx(np.mean(pairs[False]), rel=1e-9)
        assert one.same_class[0] < one.same_class[1]


def test_truncation_of_networks_without_classes_or_mean_style_has_only_what_there_is(tmp_path):
    explorer = disc_explorer(tmp_path)

    assert [one.center for one in measure_truncation(explorer, range(2), [0])] == ["global"]
    explorer.G.mapping.w_avg_beta = None
    assert measure_truncation(explorer, range(2), [0]) == []


def test_truncation_at_psi_one_is_independent_of_trunc(tmp_path):
    usual, truncated = (measure_truncation(disc_explorer(tmp_path, settings=SynthesisSettings(truncation=psi)),
                                           range(3), [1]) for psi in (1, 0.3))

    assert usual == truncated


def test_mean_of_pairs_takes_each_pair_once_and_no_image_with_itself():
    distances = np.array([[9.0, 1, 2], [1, 9, 4], [2, 4, 9]])

    assert mean_of_pairs(distances, np.ones((3, 3), dtype=bool)) == pytest.approx(7 / 3)
    assert mean_of_pairs(distances, np.array([[True, True, False]] * 2 + [[False, False, True]])) == 1
    assert mean_of_pairs(distances, np.eye(3, dtype=bool)) is None


# Layers.


def test_exchanged_styles_have_one_layer_of_the_other_seed_each():
    own, other = torch.zeros(4, 3), torch.ones(4, 3)

    found = exchanged_styles(own, other)

    assert torch.equal(found[0], own)
    assert torch.equal(found[-1], other)
    assert torch.equal(found[1:-1].mean(dim=2), torch.eye(4))


def test_exchange_in_a_network_with_one_layer_that_matters_changes_only_there(tmp_path):
    G = generator_with_strengths(lambda name: 0.0)
    matters = 3  # the index of w of b16.conv0, and of ToRGB in b8
    index = 0
    for resolution in (4, 8, 16):
        block = getattr(G.synthesis, f"b{resolution}")
        for layer in ([block.conv1] if block.is_first else [block.conv0, block.conv1]):
            if index != matters:
                layer.affine.weight.fill_(0.0)
            index += 1
        if index != matters:
            block.torgb.affine.weight.fill_(0.0)

    found = measure_layers(explorer_of(tmp_path, G), [0, 1, 2])

    changes = found.changes.mean(axis=0)
    assert changes[matters] > 1
    assert np.delete(changes, matters).tolist() == [0] * (G.num_ws - 1)
    assert found.resolutions == (4, 8, 8, 16, 16, 16)
    assert found.pairs == ((0, 1), (1, 2), (2, 0))
    expected = (found.pixels[1:].double() - found.pixels[0].double()).abs().mean(dim=1)
    torch.testing.assert_close(torch.stack(found.differences()).double(), expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found.changes[0], expected[:-1].mean(dim=(1, 2)))


# Principal components.


def test_styles_along_known_axes_have_their_variances(tmp_path):
    scales = [4.0, 3.0, 2.0] + [0.0] * 9
    explorer = disc_explorer(tmp_path, ["nv", "mel"], scales=scales)

    found = measure_styles(explorer)

    for one in found.classes:
        np.testing.assert_allclose(one.deviations[:3], scales[:3], rtol=0.03)
        np.testing.assert_allclose(one.shares[:3], np.square(scales[:3]) / 29, rtol=0.06)
        assert one.num_for_most == 3  # 16 / 29 and 25 / 29 are below 90 %
        assert [len(row) for row in one.pictures] == [5, 5, 5]
    np.testing.assert_allclose(found.cosines(), 1, atol=1e-2)
    assert found.between == pytest.approx(CLASS_OFFSET**2 / (CLASS_OFFSET**2 + 29), rel=0.05)
    assert found.together.deviations[0] == pytest.approx(math.sqrt(16 + CLASS_OFFSET**2), rel=0.03)


def test_styles_shares_equal_numpys():
    styles = torch.from_numpy(np.random.RandomState(0).randn(200, 5) @ np.random.RandomState(1).randn(5, 5))

    found = describe_styles("", styles)

    variances = np.sort(np.linalg.eigvalsh(np.cov(styles.numpy(), rowvar=False)))[::-1]
    np.testing.assert_allclose(found.shares, variances / variances.sum(), rtol=1e-5)
    assert found.num_for_most == 1 + np.argmax(np.cumsum(variances) / variances.sum() >= 0.9)


def test_styles_without_variance_have_no_shares():
    found = describe_styles("", torch.ones(20, 3, dtype=torch.float64))

    assert found.shares.tolist() == [0, 0, 0]


def test_colored_maps_go_from_black_to_the_brightest_color():
    found = colored(torch.tensor([[0.0, 1.0, 2.0, 5.0]]), 2)

    brightness = found.double().mean(dim=0)[0]
    assert brightness[0] < 3
    assert brightness[0] < brightness[1] < brightness[2] == brightness[3]
    assert torch.equal(colored(torch.zeros(1, 1), 0), colored(torch.zeros(1, 1), 1))


# The command.


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Work in an empty folder with networks of two classes, and of none."""
    monkeypatch.chdir(tmp_path)
    save_generator("net.safetensors", {"classes": [HOSTILE, "mel"]})
    save_generator("plain.safetensors", c_dim=0)
    return tmp_path


def anatomy(*arguments):
    return run(make_anatomy_command(), replaced(USUAL, arguments))


def files():
    return {path.name: path.read_bytes() for path in sorted(Path("out").iterdir())}


@pytest.mark.usefixtures("folder")
def test_anatomy_writes_a_page_that_shows_a_hostile_class_name_as_text_and_the_same_again():
    assert anatomy() == 0
    first = files()
    assert anatomy() == 0

    assert files() == first
    assert set(first) == {"anatomy.html", "anatomy.json"}
    page = first["anatomy.html"].decode()
    assert HOSTILE not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    record = json.loads(first["anatomy.json"])
    assert record["seeds"] == [0, 1, 2, 3]
    assert list(record["centers"]) == ["global", "class"]
    assert [entry["psi"] for entry in record["centers"]["class"]] == [0, 0.25, 0.5, 0.75, 1, 1.25]
    assert len(record["exchange"]["layers"]) == lively_generator().num_ws
    assert [one["class"] for one in record["styles"]["classes"]] == [HOSTILE, "mel"]


@pytest.mark.usefixtures("folder")
def test_anatomy_of_an_unconditional_network_has_one_center_and_no_comparison_of_classes():
    assert anatomy("--network=plain.safetensors", "--psi=0,1", "--seeds=4-5", "--trunc=0.5") == 0

    record = json.loads(Path("out/anatomy.json").read_text())
    assert record["truncation"] == 0.5
    assert "truncated with psi 0.5 where noise and layers" in Path("out/anatomy.html").read_text()
    assert list(record["centers"]) == ["global"]
    assert [entry["other_class"] for entry in record["centers"]["global"]] == [None, None]
    assert record["styles"]["between_classes"] is None
    assert record["styles"]["all_classes"] is None


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(("arguments", "message"), [
    (["--seeds=3"], "--seeds is 3, which is 1; expected at least 2 different seeds"),
    (["--seeds=0-64"], "--seeds names 65 seeds; expected at most 64 on one page"),
    (["--draws=1"], "--draws is 1; expected at least 2, for a standard deviation"),
    (["--psi=0,half"], "--psi has 'half'; expected values of psi, at most 4, such as "
                         "--psi=0,0.25,0.5,0.75,1,1.25"),
    (["--psi=nan"], "--psi has 'nan'; expected values of psi, at most 4, such as --psi=0,0.25,0.5,0.75,1,1.25"),
    (["--class=nevus"], f"--class names the class 'nevus'; expected one of {HOSTILE}, mel, or a number from 0 to 1"),
])
def test_anatomy_with_bad_options_is_refused(capsys, arguments, message):
    code = anatomy(*arguments)

    captured = capsys.readouterr()
    assert (code, captured.out, captured.err) == (2, "", f"error: {message}\n")
    assert not Path("out").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("folder")
def test_anatomy_in_two_processes_gives_the_same_files():
    options = ["--seeds=0-1", "--psi=0,1", "--draws=2"]
    assert anatomy(*options) == 0
    single = files()

    program = Path(__file__).parents[2] / "explore.py"
    subprocess.run([sys.executable, str(program), "anatomy", *replaced(USUAL, options), "--gpus=2"], check=True,
                   env={**os.environ, "OMP_NUM_THREADS": "1"})

    assert files() == single
