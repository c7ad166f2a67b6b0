"""training.run_output: which images and latents a run shows, and that every cell is in its place."""

import numpy as np
import PIL.Image
import pytest
import torch

from tests.helpers.generator_files import is_alike
from tests.helpers.make_sets import make_set, pixels_of
from tests.helpers.small_networks import small_generator
from torch_utils.images import to_pixels
from training.dataset import ImageDataset
from training.run_output import LARGE_SCREEN, SMALL_SCREEN, Screen, choose_grid, save_fakes, save_reals, screen_for


def screen(columns, rows):
    return Screen(width=1, height=1, fewest=(columns, rows), most=(columns, rows))


def open_set(tmp_path, count=20, **options):
    labels = options.pop("labels", None)
    path = make_set(tmp_path / "set.zip", count, size=16, labels=labels, classes=options.pop("classes", None))
    return ImageDataset(path, use_labels=labels is not None, **options)


def cells(path, columns, rows, size=16):
    """Return the cells of a grid, row by row, without the column of names: uint8 [columns * rows, size, size, 3]."""
    pixels = np.asarray(PIL.Image.open(path))[:, -columns * size:]
    return pixels.reshape(rows, size, columns, size, 3).swapaxes(1, 2).reshape(-1, size, size, 3)


@pytest.mark.parametrize(("chosen", "resolution", "expected"), [
    (SMALL_SCREEN, 16, (12, 8)), (SMALL_SCREEN, 64, (12, 8)), (SMALL_SCREEN, 128, (6, 4)), (SMALL_SCREEN, 256, (4, 2)),
    (SMALL_SCREEN, 1024, (4, 2)), (LARGE_SCREEN, 32, (32, 32)), (LARGE_SCREEN, 256, (30, 16)),
    (LARGE_SCREEN, 1024, (7, 4)), (LARGE_SCREEN, 2048, (7, 4)),
])
def test_screen_cells_follow_the_resolution(chosen, resolution, expected):
    assert chosen.cells(resolution) == expected


def test_screen_for_is_small_without_a_gpu():
    assert screen_for("cpu") is SMALL_SCREEN
    assert screen_for("cuda:1") is LARGE_SCREEN


def test_choose_grid_without_labels_shows_different_images_drawn_by_the_seed(tmp_path):
    dataset = open_set(tmp_path, 20, xflip=True)
    grid = choose_grid(dataset, z_dim=5, seed=3, screen=screen(4, 3))
    assert (grid.columns, grid.rows, grid.row_names) == (4, 3, None)
    assert len(set(grid.items.tolist())) == 12
    assert set(grid.items.tolist()) < set(range(20))  # no mirrored ones
    assert grid.items.tolist() != sorted(grid.items.tolist())
    assert (tuple(grid.labels.shape), tuple(grid.z.shape)) == ((12, 0), (12, 5))
    assert abs(grid.z.std().item() - 1) < 0.3
    again, other = (choose_grid(dataset, z_dim=5, seed=seed, screen=screen(4, 3)) for seed in (3, 4))
    assert (again.items == grid.items).all()
    assert (again.z == grid.z).all()
    assert not (other.items == grid.items).all()
    assert not (other.z == grid.z).any()


def test_choose_grid_small_set_takes_no_more_rows_than_it_fills(tmp_path):
    grid = choose_grid(open_set(tmp_path, 6), z_dim=5, seed=0, screen=screen(4, 3))
    assert (grid.columns, grid.rows) == (4, 2)
    assert sorted(grid.items[:6].tolist()) == list(range(6))
    assert grid.items[6:].tolist() == [-1, -1]


@pytest.mark.parametrize(("rows", "expected"), [
    (3, ["a", "b", "c"]), (4, ["a", "b", "c"]), (7, ["a", "a", "b", "b", "c", "c"]),
])
def test_choose_grid_classes_share_the_rows(tmp_path, rows, expected):
    labels = [0, 1, 1, 2, 2] * 4
    dataset = open_set(tmp_path, 20, labels=labels, classes=["a", "b", "c"])
    grid = choose_grid(dataset, z_dim=5, seed=0, screen=screen(4, rows))
    assert list(grid.row_names) == expected
    assert grid.rows == len(expected)
    shown = grid.items[grid.items >= 0].tolist()
    assert len(set(shown)) == len(shown)
    for cell, item in enumerate(grid.items):
        name = expected[cell // 4]
        assert grid.labels[cell].tolist() == [float(name == other) for other in "abc"]
        if item >= 0:
            assert "abc"[labels[item]] == name


def test_choose_grid_more_classes_than_rows_shows_the_largest(tmp_path):
    labels = [0, 1, 1, 1, 3, 3, 4, 4, 4, 4]
    grid = choose_grid(open_set(tmp_path, 10, labels=labels), z_dim=5, seed=0, screen=screen(2, 3))
    assert grid.row_names == ("class 1", "class 3", "class 4")


def test_choose_grid_label_vectors_are_those_of_the_images(tmp_path):
    labels = [[index / 8, 1 - index / 8] for index in range(5)]
    grid = choose_grid(open_set(tmp_path, 5, labels=labels), z_dim=5, seed=0, screen=screen(3, 2))
    assert grid.row_names is None
    assert grid.items[5] == -1
    assert grid.labels[:5].tolist() == [labels[item] for item in grid.items[:5]]
    assert grid.labels[5].tolist() in labels


def test_save_reals_shows_each_image_at_its_cell_and_white_where_a_class_ends(tmp_path):
    dataset = open_set(tmp_path, 8, labels=[0, 0, 1, 1, 1, 1, 1, 1], classes=["mel", "nv"])
    grid = choose_grid(dataset, z_dim=5, seed=0, screen=screen(4, 2))
    save_reals(tmp_path / "reals.png", grid, dataset)
    assert (grid.items[:4] >= 0).tolist() == [True, True, False, False]
    for cell, item in zip(cells(tmp_path / "reals.png", 4, 2), grid.items):
        assert (cell == (255 if item < 0 else pixels_of(item, 16))).all()
    assert PIL.Image.open(tmp_path / "reals.png").width > 4 * 16  # names at the left


def test_save_fakes_shows_each_latent_at_its_cell_whatever_the_batch(tmp_path):
    dataset = open_set(tmp_path, 12, labels=[0, 1] * 6, classes=["mel", "nv"])
    G = small_generator().eval()
    grid = choose_grid(dataset, z_dim=G.z_dim, seed=0, screen=screen(3, 2))
    before = torch.get_rng_state()
    save_fakes(tmp_path / "fakes.png", grid, G, batch=4)
    assert (torch.get_rng_state() == before).all()
    with torch.no_grad():
        for index, cell in enumerate(cells(tmp_path / "fakes.png", 3, 2)):
            img = G(grid.z[index:index + 1], grid.labels[index:index + 1], noise_mode="const")
            assert is_alike(to_pixels(img)[0].permute(1, 2, 0), cell)  # sums of another batch size round otherwise


def test_save_fakes_twice_gives_equal_bytes(tmp_path):
    dataset = open_set(tmp_path, 6)
    G = small_generator(c_dim=0).eval()
    for name in ("a.png", "b.png"):
        save_fakes(tmp_path / name, choose_grid(dataset, z_dim=G.z_dim, seed=1, screen=screen(3, 2)), G, batch=2)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_grids_of_gray_images_are_gray(tmp_path):
    dataset = ImageDataset(make_set(tmp_path / "set.zip", 6, size=16, channels=1))
    G = small_generator(channels=1, c_dim=0).eval()
    grid = choose_grid(dataset, z_dim=G.z_dim, seed=1, screen=screen(3, 2))
    save_reals(tmp_path / "reals.png", grid, dataset)
    save_fakes(tmp_path / "fakes.png", grid, G, batch=6)
    reals, fakes = (PIL.Image.open(tmp_path / name) for name in ("reals.png", "fakes.png"))
    assert (reals.mode, reals.size, fakes.mode, fakes.size) == ("L", (48, 32), "L", (48, 32))
    assert (np.asarray(reals)[:16, :16] == pixels_of(grid.items[0], 16, 1)).all()
