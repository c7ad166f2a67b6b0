import math

import numpy as np
import pytest
import torch

from dnnlib.cli import UserError
from latent.directions import (
    Directions,
    choose_style_layers,
    deviations_along,
    factorize,
    is_direction,
    parse_direction,
    principal_components,
    read_directions,
    save_directions,
)
from tests.helpers.disc_generator import ATTRIBUTES, CHANNELS, angle_between, axis_of, disc_generator, disc_network
from tests.helpers.small_networks import small_generator
from training.generator import Generator

pytestmark = pytest.mark.usefixtures("one_thread")


def network_of(resolution, architecture="skip"):
    return Generator(4, 0, 6, resolution, 3, {"num_layers": 1},
                     {"channel_base": 4 * resolution, "channel_max": 4, "architecture": architecture})


def some_directions(network, names=("area", "3"), **changes):
    vectors = torch.eye(network.G.w_dim)[:len(names)]
    return Directions(**{"names": tuple(names), "vectors": vectors, "deviations": torch.tensor([0.5, 2.0])[:len(names)],
                         "layers": (0, 2), "method": "boundary", "network_sha256": network.sha256, **changes})


# Factorization.


def test_factorize_finds_the_axes_in_order_of_the_channels_that_they_drive():
    G = disc_generator()
    vectors, values = factorize(G, range(G.num_ws), 6)
    for vector, attribute in zip(vectors, ATTRIBUTES):
        assert angle_between(vector, axis_of(G, attribute)) < 5
    # |A n|^2 is the number of rows of unit length along n: 7 layers of 6, 5, 3 and 2.
    np.testing.assert_allclose(values[:4]**2, [7 * CHANNELS[name] for name in ATTRIBUTES], rtol=0.3)
    assert (values[4:] < values[3] / 5).all()
    assert (values.diff() <= 0).all()
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(6))


def test_factorize_gives_the_gain_of_each_direction():
    G = small_generator()
    vectors, values = factorize(G, [1, 2], 5)
    rows = torch.cat([G.synthesis.b8.conv0.affine.weight, G.synthesis.b8.conv1.affine.weight]).detach()
    rows = rows / rows.norm(dim=1, keepdim=True)
    torch.testing.assert_close((rows @ vectors.T).norm(dim=0), values)


def test_factorize_ignores_the_scale_of_rows_and_rows_of_zeros():
    G = small_generator()
    before = factorize(G, range(4), 5)
    with torch.no_grad():
        for layer in (G.synthesis.b4.conv1, G.synthesis.b8.conv1):
            layer.affine.weight *= torch.rand(len(layer.affine.weight), 1) * 100 + 0.01
    for found, expected in zip(factorize(G, range(4), 5), before):
        torch.testing.assert_close(found, expected)
    with torch.no_grad():
        G.synthesis.b8.conv0.affine.weight[:3] = 0
    assert factorize(G, range(4), 5)[0].isfinite().all()


def test_factorize_makes_the_largest_entry_positive():
    vectors, _ = factorize(small_generator(), range(4), 8)
    assert (vectors.gather(1, vectors.abs().argmax(dim=1, keepdim=True)) > 0).all()


def test_factorize_reads_only_the_chosen_layers():
    G = small_generator()
    before = factorize(G, [1], 3)[0]
    with torch.no_grad():
        for layer in (G.synthesis.b4.conv1, G.synthesis.b8.conv1, G.synthesis.b4.torgb):
            layer.affine.weight.normal_()
    torch.testing.assert_close(factorize(G, [1], 3)[0], before, rtol=0, atol=0)
    with torch.no_grad():
        G.synthesis.b8.conv0.affine.weight.normal_()
    assert not torch.allclose(factorize(G, [1], 3)[0], before)


@pytest.mark.parametrize(("architecture", "last_only"), [("skip", False), ("resnet", True), ("orig", True)])
def test_factorize_with_torgb_adds_the_layers_that_share_an_index(architecture, last_only):
    G = network_of(16, architecture)

    def rows_of(layers, torgb):  # the squares of all singular values add up to the number of rows
        return round(float((factorize(G, layers, min(6, 4 * len(layers)), torgb=torgb)[1]**2).sum()))

    assert rows_of([1], torgb=False) == 4  # b8.conv0
    assert G.num_ws == 6
    if last_only:
        np.testing.assert_allclose(factorize(G, [1], 4, torgb=True)[1], factorize(G, [1], 4)[1])
    else:  # b4.torgb
        assert float((factorize(G, [1], 6, torgb=True)[1]**2).sum()) == pytest.approx(8, rel=1e-4)
    assert float((factorize(G, [5], 4, torgb=True)[1]**2).sum()) == pytest.approx(4, rel=1e-4)


def test_factorize_of_the_last_index_alone_is_refused():
    with pytest.raises(UserError) as caught:
        factorize(network_of(16), [5], 2)
    assert str(caught.value) == ("--layers is 5, which only drives a ToRGB layer; expected other layers, or --torgb")


@pytest.mark.parametrize("num", [0, 7])
def test_factorize_refuses_more_directions_than_w_has_numbers(num):
    with pytest.raises(UserError) as caught:
        factorize(network_of(16), [0, 1, 2], num)
    assert str(caught.value) == (f"--num is {num}; expected 1 to 6: these layers have 12 style channels, and w has 6 "
                                 "numbers")


# Principal components.


def test_principal_components_of_an_anisotropic_gaussian_are_its_axes():
    random = np.random.RandomState(0)
    axes = np.linalg.qr(random.randn(5, 5))[0]
    styles = (random.randn(20_000, 5) * [4, 3, 2, 1, 0.5]) @ axes.T + 7
    vectors, deviations = principal_components(torch.from_numpy(styles), 4)
    np.testing.assert_allclose(deviations, [4, 3, 2, 1], rtol=0.03)
    for vector, axis in zip(vectors, axes.T):
        assert angle_between(vector, axis) < 3
    assert (vectors.gather(1, vectors.abs().argmax(dim=1, keepdim=True)) > 0).all()


def test_principal_components_agree_with_a_singular_value_decomposition_and_the_deviations_along_them():
    styles = torch.from_numpy(np.random.RandomState(1).randn(50, 6) @ np.diag([1, 2, 3, 4, 5, 6.0]))
    vectors, deviations = principal_components(styles, 6)
    singular = np.linalg.svd((styles - styles.mean(dim=0)).numpy(), compute_uv=False)
    np.testing.assert_allclose(deviations, singular / math.sqrt(49), rtol=1e-5)
    np.testing.assert_allclose(deviations_along(styles, vectors), deviations, rtol=1e-5)


def test_principal_components_refuse_more_than_w_has_numbers():
    with pytest.raises(UserError, match=r"^--num is 4; expected 1 to 3: w has 3 numbers$"):
        principal_components(torch.randn(9, 3, dtype=torch.float64), 4)


# Layers by name.


@pytest.mark.parametrize(("resolution", "text", "expected"), [
    (32, "coarse", [0, 1, 2]),
    (32, "middle", [3, 4, 5, 6, 7]),  # the last index counts to the last block
    (64, "middle", [3, 4, 5, 6]),
    (64, "fine", [7, 8, 9]),
    (256, "fine", [7, 8, 9, 10, 11, 12, 13]),
    (256, "coarse,middle", [0, 1, 2, 3, 4, 5, 6]),
    (64, "all", list(range(10))),
    (64, "9, coarse", [0, 1, 2, 9]),
    (64, "0,5-7,6", [0, 5, 6, 7]),
])
def test_layers_are_chosen_by_name_and_number(resolution, text, expected):
    assert choose_style_layers(text, network_of(resolution)) == expected


@pytest.mark.parametrize(("text", "message"), [
    ("fine", "--layers has fine, but this network of 32x32 pixels has no such layers; expected coarse, middle, all, or "
             "indices from 0 to 7"),
    ("rough", "--layers has 'rough'; expected coarse, middle, fine, all, or indices, such as 0,1,5-9"),
    ("coarse,8", "--layers has 8; the largest layer of this network is 7"),
    ("", "--layers has ''; expected coarse, middle, fine, all, or indices, such as 0,1,5-9"),
])
def test_layers_that_the_network_does_not_have_are_refused(text, message):
    with pytest.raises(UserError) as caught:
        choose_style_layers(text, network_of(32))
    assert str(caught.value) == message


# Files.


def test_directions_survive_the_file(tmp_path):
    network = disc_network()
    saved = some_directions(network, extras={"distance": np.array([3.5])})
    save_directions(tmp_path / "d.npz", saved)
    found = read_directions(tmp_path / "d.npz", network)
    assert (found.names, found.layers, found.method) == (("area", "3"), (0, 2), "boundary")
    assert torch.equal(found.vectors, saved.vectors)
    assert torch.equal(found.deviations, saved.deviations)
    assert found.extras.keys() == {"distance"}
    assert found.extras["distance"] == [3.5]


@pytest.mark.parametrize(("which", "expected"), [("area", "area"), ("0", "area"), ("1", "3"), ("3", "3")])
def test_one_direction_is_chosen_by_name_or_index(tmp_path, which, expected):
    network = disc_network()
    path = tmp_path / "a:b.npz"
    save_directions(path, some_directions(network))
    found = parse_direction(f"{path}:{which}", network)
    assert found.names == (expected,)
    assert found.vectors.shape == (1, network.G.w_dim)
    assert found.deviations.shape == (1,)


def test_names_of_directions_may_contain_colons(tmp_path):
    network = disc_network()
    save_directions(tmp_path / "d.npz", some_directions(network, ("class:mel", "class:nv")))
    assert parse_direction(f"{tmp_path}/d.npz:class:nv", network).names == ("class:nv",)


def test_tilde_in_a_file_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    network = disc_network()
    save_directions(tmp_path / "d.npz", some_directions(network))
    assert parse_direction("~/d.npz:area", network).names == ("area",)


@pytest.mark.parametrize(("text", "expected"), [
    ("missing.npz:0", True), ("missing.npz:class:mel", True), ("class:mel", False), ("mel", False), ("d.npz", False)])
def test_a_file_with_a_name_is_told_from_an_attribute(text, expected):
    assert is_direction(text) is expected


@pytest.mark.parametrize(("which", "message"), [
    ("2", "--direction is {path}:2, but {path} has 2; expected an index from 0 to 1"),
    ("aera", "--direction is {path}:aera, but {path} has no direction aera (did you mean area?); it has area, 3"),
    ("-1", "--direction is {path}:-1, but {path} has no direction -1; it has area, 3"),
    ("", "--direction is {path}:; expected FILE:INDEX or FILE:NAME, such as directions.npz:0"),
])
def test_a_direction_that_the_file_does_not_have_is_refused(tmp_path, which, message):
    network = disc_network()
    path = tmp_path / "d.npz"
    save_directions(path, some_directions(network))
    with pytest.raises(UserError) as caught:
        parse_direction(f"{path}:{which}", network)
    assert str(caught.value) == message.format(path=path)


def test_directions_of_another_network_are_refused(tmp_path):
    save_directions(tmp_path / "d.npz", some_directions(disc_network()))
    with pytest.raises(UserError) as caught:
        read_directions(tmp_path / "d.npz", disc_network(sha256="e" * 64))
    assert str(caught.value) == (
        f"--direction={tmp_path}/d.npz has directions of another network (SHA-256 dddddddddddd..., but "
        "disc.safetensors has eeeeeeeeeeee...); expected directions of this one")


def test_directions_fit_a_network_that_was_tuned_from_theirs(tmp_path):
    save_directions(tmp_path / "d.npz", some_directions(disc_network()))
    tuned = disc_network(sha256="e" * 64, info={"pivotal_tuning": {"network_sha256": "d" * 64}})
    assert read_directions(tmp_path / "d.npz", tuned).names == ("area", "3")


_EXPECTED = "expected an .npz file of directions, as explore.py sefa and explore.py boundary write it"


@pytest.mark.parametrize(("changes", "message"), [
    ({"layers": None}, f"does not have an array layers (it has directions, deviations, names, method, network_sha256); "
                       f"{_EXPECTED}"),
    ({"directions": np.eye(3, 7)}, "has directions of shape [3, 7]; expected [num, 12] for this network"),
    ({"directions": np.zeros((0, 12))}, "has directions of shape [0, 12]; expected [num, 12] for this network"),
    ({"directions": 2 * np.eye(2, 12)}, "has directions of other lengths than 1; expected unit vectors"),
    ({"directions": np.full((2, 12), np.nan)},
     "has directions of type float64 and values that are not finite numbers; expected finite numbers"),
    ({"deviations": np.ones(3)}, "has deviations of shape [3]; expected [2], one for each direction"),
    ({"names": np.array(["a"])}, "has names of shape [1]; expected [2], one for each direction"),
    ({"layers": np.array([0, 8])}, "has layers that this network does not have; expected indices from 0 to 7"),
    ({"layers": np.array([0.5])}, "has layers that this network does not have; expected indices from 0 to 7"),
])
def test_files_of_other_content_are_refused(tmp_path, changes, message):
    network = disc_network()
    save_directions(tmp_path / "good.npz", some_directions(network))
    with np.load(tmp_path / "good.npz") as good:
        arrays = {name: value for name, value in {**good, **changes}.items() if value is not None}
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(UserError) as caught:
        read_directions(tmp_path / "bad.npz", network)
    assert str(caught.value) == f"--direction={tmp_path}/bad.npz {message}"


@pytest.mark.parametrize(("content", "message"), [
    (None, f"does not exist; {_EXPECTED}"),
    (b"0,1\n", f"is not an npz file; {_EXPECTED}"),
])
def test_files_that_are_no_directions_are_refused(tmp_path, content, message):
    path = tmp_path / "d.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_directions(path, disc_network())
    assert str(caught.value) == f"--direction={path} {message}"
