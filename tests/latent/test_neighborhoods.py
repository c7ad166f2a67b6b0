"""Test where neighbors are, exact angles in Z and Mahalanobis distances in W, and the nearest training images."""

import numpy as np
import pytest
import torch

from dnnlib.cli import UserError
from generation.image_generator import SynthesisSettings, latents_of
from imagesets.writer import ImageSetWriter
from latent.neighborhoods import (
    NUM_UNRELATED,
    features_of,
    find_training_images,
    offsets_at,
    rotate,
    styles_around,
    unrelated_styles,
)
from metrics.detectors.registry import open_detector
from tests.helpers.disc_generator import disc_explorer
from tests.helpers.make_sets import png

pytestmark = pytest.mark.usefixtures("one_thread")


def normal(*shape, seed=0):
    return torch.from_numpy(np.random.RandomState(seed).randn(*shape))


def angles_to(z, others):
    return np.degrees(np.arccos(np.clip((others @ z / others.norm(dim=-1) / z.norm()).numpy(), -1, 1)))


@pytest.mark.parametrize("degrees", [0.5, 20, 90, 135])
def test_rotate_gives_latents_at_the_angle_and_of_the_same_length(degrees):
    z = 3 * normal(7)

    found = rotate(z, normal(5, 7, seed=1), degrees)

    np.testing.assert_allclose(angles_to(z, found), degrees, rtol=1e-9)
    np.testing.assert_allclose(found.norm(dim=1), z.norm(), rtol=1e-12)


def test_rotate_by_180_degrees_gives_the_opposite_in_every_direction():
    z = normal(7)

    np.testing.assert_allclose(rotate(z, normal(5, 7, seed=1), 180), -z.expand(5, -1), atol=1e-12)


@pytest.mark.parametrize("degrees", [30, 120])
def test_rotate_of_normal_latents_gives_normal_latents(degrees):
    count, size = 20_000, 4
    z, directions = normal(count, size), normal(count, size, seed=1)

    found = torch.cat([rotate(one, direction[None], degrees) for one, direction in zip(z, directions)]).numpy()

    error = 1 / np.sqrt(count)  # of a mean; of a variance sqrt(2) of it, of a fourth moment sqrt(96)
    assert np.abs(found.mean(axis=0)).max() < 4.5 * error
    assert np.abs(np.cov(found, rowvar=False) - np.eye(size)).max() < 4.5 * np.sqrt(2) * error
    assert np.abs((found**4).mean(axis=0) - 3).max() < 4.5 * np.sqrt(96) * error
    assert np.abs((found**3).mean(axis=0)).max() < 4.5 * np.sqrt(15) * error


@pytest.mark.parametrize("distance", [0.5, 3])
def test_offsets_at_have_the_mahalanobis_length(distance):
    root = normal(6, 6) * torch.tensor([1, 2, 5, 0.1, 1, 20])
    covariance = root @ root.T

    steps = offsets_at(covariance, normal(10, 6, seed=1), distance)

    found = np.sqrt(np.einsum("ni,ij,nj->n", steps, np.linalg.inv(covariance), steps))
    np.testing.assert_allclose(found, distance, rtol=1e-8)


def test_offsets_at_in_a_subspace_stay_in_it():
    root = normal(6, 2)
    covariance = root @ root.T

    steps = offsets_at(covariance, normal(10, 6, seed=1), 2)

    inside = steps @ torch.linalg.pinv(root).T @ root.T
    np.testing.assert_allclose(inside, steps, atol=1e-9)
    found = np.sqrt(np.einsum("ni,ij,nj->n", steps, np.linalg.pinv(covariance.numpy(), rcond=1e-9), steps))
    np.testing.assert_allclose(found, 2, rtol=1e-8)


def test_offsets_at_without_variance_are_refused():
    with pytest.raises(UserError, match=r"^--space is w, but all styles of this class are equal; use --space=z$"):
        offsets_at(torch.zeros(3, 3, dtype=torch.float64), normal(2, 3), 1)


def latents_in(explorer, ws):
    """Return the latents that the mapping of `disc_generator`, a rotation, made styles of."""
    offset = explorer.G.mapping.offsets[1] if len(explorer.G.mapping.offsets) else 0
    return ((ws[:, 0] - offset) @ explorer.G.mapping.axes.T).double()


def test_styles_around_in_z_are_of_latents_at_the_angles_in_the_same_directions(tmp_path):
    explorer = disc_explorer(tmp_path, ["nv", "mel"])

    ws = styles_around(explorer, 7, 1, space="z", radii=[10, 60], num=3)

    z = latents_of([7], explorer.G.z_dim)[0]
    found = latents_in(explorer, ws)
    assert torch.equal(ws[0], explorer.styles([7], [1])[0])
    np.testing.assert_allclose(found[0], z, atol=1e-5)
    np.testing.assert_allclose(angles_to(z, found[1:]), [10] * 3 + [60] * 3, atol=1e-3)
    across = [(found[rows] - np.cos(np.radians(angle)) * z) / np.sin(np.radians(angle)) / z.norm()
              for rows, angle in ((slice(1, 4), 10), (slice(4, 7), 60))]
    np.testing.assert_allclose(across[0], across[1], atol=1e-4)
    assert (across[0] @ across[0].T).fill_diagonal_(0).abs().max() < 0.9  # different directions


@pytest.mark.parametrize("psi", [1, 0.5])
def test_styles_around_in_w_are_at_mahalanobis_distances_of_the_class(tmp_path, psi):
    scales = [float(number) for number in np.linspace(0.2, 3, 12)]
    explorer = disc_explorer(tmp_path, ["nv", "mel"], SynthesisSettings(truncation=psi), scales=scales)

    ws = styles_around(explorer, 7, 1, space="w", radii=[0.5, 4], num=3)

    covariance = psi**2 * np.cov(explorer.reference_styles([1]).numpy(), rowvar=False)
    steps = (ws[1:, 0] - ws[0, 0]).double().numpy()
    found = np.sqrt(np.einsum("ni,ij,nj->n", steps, np.linalg.inv(covariance), steps))
    np.testing.assert_allclose(found, [0.5] * 3 + [4] * 3, rtol=1e-4)
    assert torch.equal(ws[0], explorer.styles([7], [1])[0])
    assert torch.equal(ws, ws[:, :1].expand_as(ws))  # the same in all layers


@pytest.mark.parametrize("space", ["z", "w"])
def test_styles_around_with_more_neighbors_keep_the_first_ones(tmp_path, space):
    explorer = disc_explorer(tmp_path)

    few, many = (styles_around(explorer, 3, None, space=space, radii=[2], num=num) for num in (2, 5))

    torch.testing.assert_close(many[:3], few, rtol=0, atol=1e-6)


def features_in(explorer, detector, ws):
    return explorer.evaluate(ws, [features_of(detector, explorer)])[0]


def write_images(path, images):
    with ImageSetWriter(path, classes=["nv", "mel"]) as writer:
        for index, pixels in enumerate(images):
            writer.add(png(pixels.permute(1, 2, 0).numpy()), index % 2)
    return path


def test_training_images_with_the_generated_one_itself_find_it_at_distance_zero(tmp_path):
    explorer, detector = disc_explorer(tmp_path), open_detector("random-conv", device="cpu")
    ws = explorer.styles(range(6))
    path = write_images(tmp_path / "train.zip", explorer.render(ws))

    found = find_training_images(explorer, detector, features_in(explorer, detector, ws[[4, 1]]), data=str(path),
                                 count=3, mirror=False, use_cache=False)

    assert [[image.name.endswith(f"{index:08d}.png") for image in images[:1]]
            for index, images in zip((4, 1), found, strict=True)] == [[True], [True]]
    features = features_in(explorer, detector, ws).astype(np.float64)
    for index, images in zip((4, 1), found, strict=True):
        expected = np.sort(np.linalg.norm(features - features[index], axis=1))[:3]
        np.testing.assert_allclose([image.distance for image in images], expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(images[0].pixels, explorer.render(ws[[index]])[0])
    assert [images[0].class_name for images in found] == ["nv", "mel"]


def test_training_images_with_the_flipped_one_find_it_only_with_mirror(tmp_path):
    explorer, detector = disc_explorer(tmp_path), open_detector("random-conv", device="cpu")
    ws = explorer.styles(range(4))
    path = write_images(tmp_path / "train.zip", explorer.render(ws).flip(3))
    features = features_in(explorer, detector, ws[[2]])

    (plain,), (mirrored,) = (find_training_images(explorer, detector, features, data=str(path), count=4, mirror=mirror,
                                                  use_cache=False) for mirror in (False, True))

    assert mirrored[0].is_mirrored
    assert mirrored[0].name.endswith("00000002.png")
    assert mirrored[0].distance < 1e-3 < plain[0].distance
    assert len({image.name for image in mirrored}) == 4  # each once, flipped or not
    assert not any(image.is_mirrored for image in plain)


def test_unrelated_styles_are_of_other_latents_than_the_first_seeds(tmp_path):
    explorer = disc_explorer(tmp_path, ["nv", "mel"])

    found = unrelated_styles(explorer, 1)

    z = latents_in(explorer, found)
    assert z.shape == (NUM_UNRELATED, explorer.G.z_dim)
    others = latents_of(range(100), explorer.G.z_dim)
    assert torch.cdist(z, others).min() > 0.1
