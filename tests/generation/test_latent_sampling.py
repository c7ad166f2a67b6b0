"""generation.image_generator: a seed's image is the original's, whatever is made beside it."""

from pathlib import Path

import numpy as np
import pytest
import torch

from generation.image_generator import Look, Painter, choose_batch, latents_of, z_of_seed
from tests.helpers.generator_files import is_alike, lively_generator
from training.snapshot import load_network

DATA = Path(__file__).parent.parent / "data"
SEEDS = [3, 0, 4_294_967_295]


def paint(G, seeds=SEEDS, batch=1, label=0, **look):
    labels = torch.nn.functional.one_hot(torch.full([len(seeds)], label), 2).float() if G.c_dim else torch.zeros(
        len(seeds), 0)
    return torch.cat(list(Painter(G, Look(**look), batch=batch).paint(seeds, labels))).numpy()


def test_z_of_seed_is_that_of_numpy():
    assert np.array_equal(z_of_seed(5, 7), np.random.RandomState(5).randn(1, 7))


def test_latents_of_keeps_the_order_of_seeds():
    found = latents_of(SEEDS, 6)
    assert found.dtype == torch.float64
    assert np.array_equal(found.numpy(), np.concatenate([z_of_seed(seed, 6) for seed in SEEDS]))


@pytest.mark.parametrize(("resolution", "device", "expected"), [
    (16, "cpu", 1), (1024, "cpu", 1), (32, "cuda", 64), (256, "cuda:1", 32), (1024, "cuda", 2), (2048, "cuda", 1)])
def test_choose_batch_fits_the_memory(resolution, device, expected):
    assert choose_batch(resolution, device) == expected


@pytest.mark.parametrize("psi", [1.0, 0.7])
def test_paint_equals_the_pixels_of_the_original(psi):
    G = load_network(DATA / "sample_32_c2.stripped.pkl").G_ema
    reference = np.load(DATA / "net_sample_32_c2.npz")
    expected = np.stack([reference[f"generate_uint8_seed{seed}_class1_psi{psi}"] for seed in range(4)])
    for batch in (1, 3):
        found = paint(G, range(4), label=1, truncation=psi, batch=batch).transpose(0, 2, 3, 1)
        assert is_alike(found, expected)  # stored, of another machine


def test_alike_images_are_one_level_apart_in_few_pixels_alone():
    expected = np.full((16, 16, 3), 100, np.uint8)
    few, many, far = expected.copy(), expected + np.uint8(1), expected.copy()
    few[:2, 0, :] -= 1
    far[0, 0, 0] += 2
    assert [is_alike(found, expected) for found in (expected, few, many, far, expected[:8])] == [
        True, True, False, False, False]


@pytest.mark.parametrize("noise_mode", ["const", "random", "none"])
def test_paint_image_does_not_depend_on_its_neighbours(noise_mode):
    G = lively_generator()
    together = paint(G, noise_mode=noise_mode, batch=2)
    assert is_alike(paint(G, SEEDS[2:], noise_mode=noise_mode, batch=2), together[2:])
    alone = np.concatenate([paint(G, [seed], noise_mode=noise_mode) for seed in SEEDS])
    assert np.array_equal(alone, paint(G, noise_mode=noise_mode))
    assert is_alike(alone, together)


def test_paint_noise_modes_differ_and_random_noise_follows_the_seed():
    G = lively_generator()
    found = {mode: paint(G, noise_mode=mode) for mode in ("const", "random", "none")}
    assert not any(is_alike(found[a], found[b]) for a, b in (("const", "random"), ("const", "none"),
                                                            ("random", "none")))
    torch.manual_seed(99)
    assert np.array_equal(paint(G, noise_mode="random"), found["random"])


def test_paint_random_noise_of_equal_styles_differs_by_seed():
    G = lively_generator()
    painter = Painter(G, Look(noise_mode="random"), batch=2)
    pixels = painter.pixels(torch.zeros(2, G.num_ws, G.w_dim), [1, 2])
    assert not torch.equal(pixels[0], pixels[1])


def test_paint_truncation_zero_gives_one_image():
    G = lively_generator(c_dim=0)
    images = paint(G, truncation=0.0)
    assert np.array_equal(images[0], images[1])
    assert not np.array_equal(*paint(G, SEEDS[:2]))


def mean_of(G, label, seed=123):
    """Return the mean style of a label over the 10,000 latents of the original's projector, in one pass: [K]."""
    z = torch.from_numpy(np.random.RandomState(seed).randn(10_000, G.z_dim))
    with torch.no_grad():
        return G.mapping(z, label.expand(10_000, -1))[:, 0].double().mean(dim=0).float()


@pytest.mark.parametrize("label", [[1.0, 0.0], [0.0, 1.0], [0.5, 0.25]])
def test_class_center_is_the_mean_style_of_the_label_whatever_the_batch(label):
    G, label = lively_generator(), torch.tensor(label)
    painter = Painter(G, Look(truncation=0.3, center="class"), batch=2)
    found = painter.styles(SEEDS, label.expand(3, -1))
    ws, mean = Painter(G, Look(), batch=1).styles(SEEDS, label.expand(3, -1)), mean_of(G, label)
    assert torch.allclose(found, mean + 0.3 * (ws - mean), atol=1e-6)
    alone = torch.cat([painter.styles([seed], label[None]) for seed in SEEDS])
    assert torch.allclose(found, alone, atol=1e-6)
    again = Painter(G, Look(truncation=0.3, center="class"), batch=1).styles(SEEDS, label.expand(3, -1))
    assert torch.equal(found, again)


def test_class_center_keeps_each_label_of_a_batch_at_its_own_mean():
    G, labels = lively_generator(), torch.eye(2)[[0, 1, 0]]
    found = Painter(G, Look(truncation=0.0, center="class"), batch=3).styles(SEEDS, labels)
    for w, label in zip(found, labels, strict=True):
        assert torch.allclose(w, mean_of(G, label).expand_as(w), atol=1e-6)
    assert not torch.allclose(found[0], found[1], atol=1e-3)
    everywhere = Painter(G, Look(truncation=0.0), batch=3).styles(SEEDS, labels)
    assert torch.equal(everywhere[0], everywhere[1])  # the network's mean is that of all classes


def test_class_center_is_computed_once_for_each_label():
    G, passes = lively_generator(), []
    G.mapping.register_forward_pre_hook(lambda _, arguments: passes.append(len(arguments[0])))
    painter = Painter(G, Look(truncation=0.5, center="class"), batch=1)
    for _ in range(3):
        painter.styles(SEEDS, torch.eye(2)[[0, 1, 0]])
    assert sum(passes) == 2 * 10_000 + 3 * len(SEEDS)


def test_paint_without_truncation_is_the_same_whatever_the_center():
    G = lively_generator()
    assert np.array_equal(paint(G, center="class"), paint(G))


def test_paint_reports_each_batch():
    G = lively_generator(c_dim=0, img_channels=1)
    told = []
    shapes = [tuple(pixels.shape) for pixels in Painter(G, Look(), batch=2).paint(SEEDS, torch.zeros(3, 0),
                                                                                  told.append)]
    assert (told, shapes) == ([2, 1], [(2, 1, 8, 8), (1, 1, 8, 8)])


def test_painter_computes_half_precision_blocks_in_float32_on_a_cpu():
    kwargs = {"channel_base": 32, "channel_max": 4}
    half = lively_generator(synthesis_kwargs={**kwargs, "num_fp16_res": 4, "half_dtype": "bfloat16"})
    assert np.array_equal(paint(half), paint(lively_generator(synthesis_kwargs=kwargs)))
