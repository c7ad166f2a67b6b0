"""generation.image_generator: a seed's image is the original's, whatever is made beside it; lists of seeds."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dnnlib.cli import UserError
from generation.image_generator import (
    ImageGenerator,
    SynthesisSettings,
    choose_batch,
    latents_of,
    parse_first_seed,
    parse_ranges,
    parse_seeds,
)
from tests.helpers.generator_files import is_alike, lively_generator
from training.snapshot import load_network

DATA = Path(__file__).parent.parent / "data"
SEEDS = [3, 0, 4_294_967_295]


def pixels_of(G, seeds=SEEDS, batch=1, label=0, **settings):
    labels = torch.nn.functional.one_hot(torch.full([len(seeds)], label), 2).float() if G.c_dim else torch.zeros(
        len(seeds), 0)
    images = ImageGenerator(G, SynthesisSettings(**settings), batch=batch)
    return torch.cat(list(images.generate(seeds, labels))).numpy()


def test_latents_of_a_seed_are_those_of_numpy():
    assert np.array_equal(latents_of([5], 7).numpy(), np.random.RandomState(5).randn(1, 7))


def test_latents_of_keeps_the_order_of_seeds():
    found = latents_of(SEEDS, 6)
    assert found.dtype == torch.float64
    assert np.array_equal(found.numpy(), np.concatenate([latents_of([seed], 6).numpy() for seed in SEEDS]))


@pytest.mark.parametrize(("resolution", "device", "expected"), [
    (16, "cpu", 1), (1024, "cpu", 1), (32, "cuda", 64), (256, "cuda:1", 32), (1024, "cuda", 2), (2048, "cuda", 1)])
def test_choose_batch_fits_the_memory(resolution, device, expected):
    assert choose_batch(resolution, device) == expected


@pytest.mark.parametrize("psi", [1.0, 0.7])
def test_generate_equals_the_pixels_of_the_original(psi):
    G = load_network(DATA / "sample_32_c2.stripped.pkl").G_ema
    reference = np.load(DATA / "net_sample_32_c2.npz")
    expected = np.stack([reference[f"generate_uint8_seed{seed}_class1_psi{psi}"] for seed in range(4)])
    for batch in (1, 3):
        found = pixels_of(G, range(4), label=1, truncation=psi, batch=batch).transpose(0, 2, 3, 1)
        assert is_alike(found, expected)  # stored, of another machine


def test_alike_images_are_one_level_apart_in_few_pixels_alone():
    expected = np.full((16, 16, 3), 100, np.uint8)
    few, many, far = expected.copy(), expected + np.uint8(1), expected.copy()
    few[:2, 0, :] -= 1
    far[0, 0, 0] += 2
    assert [is_alike(found, expected) for found in (expected, few, many, far, expected[:8])] == [
        True, True, False, False, False]


@pytest.mark.parametrize("noise_mode", ["const", "random", "none"])
def test_generate_image_does_not_depend_on_its_neighbors(noise_mode):
    G = lively_generator()
    together = pixels_of(G, noise_mode=noise_mode, batch=2)
    assert is_alike(pixels_of(G, SEEDS[2:], noise_mode=noise_mode, batch=2), together[2:])
    alone = np.concatenate([pixels_of(G, [seed], noise_mode=noise_mode) for seed in SEEDS])
    assert np.array_equal(alone, pixels_of(G, noise_mode=noise_mode))
    assert is_alike(alone, together)


def test_generate_noise_modes_differ_and_random_noise_follows_the_seed():
    G = lively_generator()
    found = {mode: pixels_of(G, noise_mode=mode) for mode in ("const", "random", "none")}
    assert not any(is_alike(found[a], found[b]) for a, b in (("const", "random"), ("const", "none"),
                                                            ("random", "none")))
    torch.manual_seed(99)
    assert np.array_equal(pixels_of(G, noise_mode="random"), found["random"])


def test_generate_random_noise_of_equal_styles_differs_by_seed():
    G = lively_generator()
    images = ImageGenerator(G, SynthesisSettings(noise_mode="random"), batch=2)
    pixels = images.render(torch.zeros(2, G.num_ws, G.w_dim), [1, 2])
    assert not torch.equal(pixels[0], pixels[1])


def test_generate_truncation_zero_gives_one_image():
    G = lively_generator(c_dim=0)
    images = pixels_of(G, truncation=0.0)
    assert np.array_equal(images[0], images[1])
    assert not np.array_equal(*pixels_of(G, SEEDS[:2]))


def mean_of(G, label, seed=123):
    """Return the mean style of a label over the 10,000 latents of the original's projector, in one pass: [K]."""
    z = torch.from_numpy(np.random.RandomState(seed).randn(10_000, G.z_dim))
    with torch.no_grad():
        return G.mapping(z, label.expand(10_000, -1))[:, 0].double().mean(dim=0).float()


@pytest.mark.parametrize("label", [[1.0, 0.0], [0.0, 1.0], [0.5, 0.25]])
def test_class_center_is_the_mean_style_of_the_label_whatever_the_batch(label):
    G, label = lively_generator(), torch.tensor(label)
    images = ImageGenerator(G, SynthesisSettings(truncation=0.3, center="class"), batch=2)
    found = images.map_seeds(SEEDS, label.expand(3, -1))
    ws, mean = ImageGenerator(G, SynthesisSettings(), batch=1).map_seeds(SEEDS, label.expand(3, -1)), mean_of(G, label)
    assert torch.allclose(found, mean + 0.3 * (ws - mean), atol=1e-6)
    alone = torch.cat([images.map_seeds([seed], label[None]) for seed in SEEDS])
    assert torch.allclose(found, alone, atol=1e-6)
    again = ImageGenerator(G, images.settings, batch=1).map_seeds(SEEDS, label.expand(3, -1))
    assert torch.equal(found, again)


def test_class_center_keeps_each_label_of_a_batch_at_its_own_mean():
    G, labels = lively_generator(), torch.eye(2)[[0, 1, 0]]
    found = ImageGenerator(G, SynthesisSettings(truncation=0.0, center="class"), batch=3).map_seeds(SEEDS, labels)
    for w, label in zip(found, labels, strict=True):
        assert torch.allclose(w, mean_of(G, label).expand_as(w), atol=1e-6)
    assert not torch.allclose(found[0], found[1], atol=1e-3)
    everywhere = ImageGenerator(G, SynthesisSettings(truncation=0.0), batch=3).map_seeds(SEEDS, labels)
    assert torch.equal(everywhere[0], everywhere[1])  # the network's mean is that of all classes


def test_class_center_is_computed_once_for_each_label():
    G, passes = lively_generator(), []
    G.mapping.register_forward_pre_hook(lambda _, arguments: passes.append(len(arguments[0])))
    images = ImageGenerator(G, SynthesisSettings(truncation=0.5, center="class"), batch=1)
    for _ in range(3):
        images.map_seeds(SEEDS, torch.eye(2)[[0, 1, 0]])
    assert sum(passes) == 2 * 10_000 + 3 * len(SEEDS)


def test_map_latents_takes_any_latents_and_centers():
    G, labels = lively_generator(), torch.eye(2)
    images = ImageGenerator(G, SynthesisSettings(truncation=0.25, center="class"), batch=1)
    z = latents_of([1, 2], G.z_dim)
    assert torch.equal(images.map_latents(z, labels), images.map_seeds([1, 2], labels))
    assert torch.equal(images.map_latents(z, labels, images.centers_of(labels)), images.map_seeds([1, 2], labels))
    centers = torch.linspace(-1, 1, 2 * G.w_dim).reshape(2, -1)
    with torch.no_grad():
        ws = G.mapping(z, labels)
    assert torch.allclose(images.map_latents(z, labels, centers), 0.25 * ws + 0.75 * centers[:, None], atol=1e-6)


def test_render_noise_maps_replace_the_networks_own():
    G = lively_generator()
    images = ImageGenerator(G, SynthesisSettings(), batch=1)
    ws = images.map_seeds([1, 2], torch.eye(2))
    own = {name: buffer for name, buffer in G.synthesis.named_buffers() if name.endswith("noise_const")}
    stacked = {name: torch.stack([one, one.flip(0)])[:, None] for name, one in own.items()}
    plain, found = images.render(ws, [0, 0]), images.render(ws, [0, 0], stacked)
    assert torch.equal(found[0], plain[0])
    assert not torch.equal(found[1], plain[1])
    assert torch.equal(images.render(ws, [0, 0]), plain)  # the network keeps its own


def test_generate_without_truncation_is_the_same_whatever_the_center():
    G = lively_generator()
    assert np.array_equal(pixels_of(G, center="class"), pixels_of(G))


def test_generate_reports_each_batch():
    G = lively_generator(c_dim=0, img_channels=1)
    told = []
    images = ImageGenerator(G, SynthesisSettings(), batch=2)
    shapes = [tuple(pixels.shape) for pixels in images.generate(SEEDS, torch.zeros(3, 0), told.append)]
    assert (told, shapes) == ([2, 1], [(2, 1, 8, 8), (1, 1, 8, 8)])


def test_generate_computes_half_precision_blocks_in_float32_on_a_cpu():
    kwargs = {"channel_base": 32, "channel_max": 4}
    half = lively_generator(synthesis_kwargs={**kwargs, "num_fp16_res": 4, "half_dtype": "bfloat16"})
    assert np.array_equal(pixels_of(half), pixels_of(lively_generator(synthesis_kwargs=kwargs)))


@pytest.mark.parametrize(("text", "expected"), [
    ("0,1,5-9", [0, 1, 5, 6, 7, 8, 9]), ("7", [7]), ("3-3", [3]), (" 4 , 2 ", [4, 2]), ("2,2", [2, 2]),
    ("4294967295", [2**32 - 1])])
def test_parse_seeds_keeps_the_order(text, expected):
    assert parse_seeds("--seeds", text) == expected


@pytest.mark.parametrize(("text", "message"), [
    ("3-", "--seeds has '3-'; expected numbers and ranges, such as 0,1,5-9"),
    ("a", "--seeds has 'a'; expected numbers and ranges, such as 0,1,5-9"),
    ("-1", "--seeds has '-1'; expected numbers and ranges, such as 0,1,5-9"),
    ("", "--seeds has ''; expected numbers and ranges, such as 0,1,5-9"),
    ("1,,2", "--seeds has ''; expected numbers and ranges, such as 0,1,5-9"),
    ("\u0663", "--seeds has '\u0663'; expected numbers and ranges, such as 0,1,5-9"),
    ("9" * 5000, f"--seeds has '{'9' * 5000}'; expected numbers and ranges, such as 0,1,5-9"),
    ("1.5", "--seeds has '1.5'; expected numbers and ranges, such as 0,1,5-9"),
    ("9-3", "--seeds has the range 9-3, which runs backwards; expected 3-9"),
    ("4294967296", "--seeds has 4294967296; the largest seed is 4294967295"),
    ("0-4000000000",
     "--seeds names 4000000001 seeds; expected at most 1000000: for more images use generate.py --zip and --count"),
])
def test_parse_seeds_says_what_is_wrong(text, message):
    with pytest.raises(UserError) as caught:
        parse_seeds("--seeds", text)
    assert str(caught.value) == message


def test_parse_ranges_names_what_is_numbered():
    with pytest.raises(UserError, match=r"^--styles has 9; the largest layer is 3$"):
        parse_ranges("--styles", "0-9", largest=3, what="layer")


def test_parse_first_seed_takes_one_number():
    assert parse_first_seed("--seeds", "12") == 12
    for text in ("0,1", "0-9"):
        with pytest.raises(UserError) as caught:
            parse_first_seed("--seeds", text)
        assert str(caught.value) == (f"--seeds is {text}; expected only the first seed with --zip, such as --seeds=0: "
                                     f"--count sets the number of images")
