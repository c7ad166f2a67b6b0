"""Test the pictures of a map: thumbnails of sets, their order, and sheets of them."""

import base64
import io

import numpy as np
import PIL.Image
import pytest

from analysis.embedding_pictures import (
    curve_order,
    make_sprites,
    picture_tag,
    quantize,
    thumbnail_side,
)
from analysis.embedding_pictures import make_thumbnails as reduce_images
from analysis.embedding_points import REAL, SYNTHETIC, Points, PointSet
from metrics.image_sources import SetImages
from tests.helpers.html_pages import HOSTILE, Tags
from tests.helpers.made_embedding import make_thumbnails
from tests.helpers.make_archives import make_folder
from tests.helpers.make_sets import make_set, pixels_of, png


def open_set(path, kind=REAL, shows_pictures=True):
    images = SetImages(path).select()
    names = [str(index) for index in range(len(images))]
    return PointSet(name=path.name, kind=kind, images=images, names=names, classes=[""] * len(names),
                    groups=[None] * len(names), shows_pictures=shows_pictures)


def reduced(*sets, side=64, workers=1):
    counts = []
    thumbnails, pictured = reduce_images(Points(sets=sets), side, workers, counts.append)
    assert sum(counts) == len(thumbnails) == len(pictured)
    return thumbnails, pictured.tolist()


def decode(file):
    return np.asarray(PIL.Image.open(io.BytesIO(file)).convert("RGB"))


def write_images(folder, *images):
    return make_folder(folder, {f"{index}.png": png(image) for index, image in enumerate(images)})


def test_thumbnails_of_images_of_that_size_are_their_pixels_and_hidden_sets_have_none(tmp_path):
    first = open_set(make_set(tmp_path / "a.zip", 3, size=16))
    hidden = open_set(make_set(tmp_path / "b.zip", 4, size=16), shows_pictures=False)
    last = open_set(make_set(tmp_path / "c.zip", 2, size=16), SYNTHETIC)
    thumbnails, pictured = reduced(first, hidden, last, side=16)
    assert pictured == [0, 1, 2, 7, 8]
    assert np.array_equal(thumbnails, [pixels_of(index, 16) for index in (0, 1, 2, 0, 1)])


def test_thumbnails_without_shown_sets_are_none(tmp_path):
    thumbnails, pictured = reduced(open_set(make_set(tmp_path / "a.zip"), shows_pictures=False), side=64)
    assert thumbnails.shape == (0, 64, 64, 3)
    assert pictured == []


def test_thumbnails_of_larger_images_keep_what_they_show(tmp_path):
    image = np.full((64, 64, 3), 200, dtype=np.uint8)
    image[:, 32:] = [10, 20, 30]
    thumbnails, _ = reduced(open_set(write_images(tmp_path / "set", image)), side=16)
    assert thumbnails.shape == (1, 16, 16, 3)
    assert abs(thumbnails[0, :, :6].astype(int) - 200).max() <= 2
    assert abs(thumbnails[0, :, 10:].astype(int) - [10, 20, 30]).max() <= 2


def test_thumbnails_of_wide_images_show_all_of_them_between_gray_bars(tmp_path):
    image = np.full((32, 64, 3), 250, dtype=np.uint8)
    thumbnails, _ = reduced(open_set(write_images(tmp_path / "set", image)), side=32)
    assert (thumbnails[0, 8:24] == 250).all()
    assert (thumbnails[0, :8] == 128).all()
    assert (thumbnails[0, 24:] == 128).all()


def test_thumbnails_of_gray_images_have_three_equal_channels(tmp_path):
    thumbnails, _ = reduced(open_set(make_set(tmp_path / "a.zip", 2, size=48, channels=1)), side=32)
    assert thumbnails.shape == (2, 32, 32, 3)
    assert (thumbnails == thumbnails[..., :1]).all()
    assert thumbnails.std() > 0


def test_thumbnails_do_not_depend_on_the_number_of_processes(tmp_path):
    one = open_set(make_set(tmp_path / "a.zip", 300, size=32))
    assert np.array_equal(reduced(one, side=16, workers=1)[0], reduced(one, side=16, workers=2)[0])


@pytest.mark.parametrize(("side", "shapes", "expected"), [
    (64, [(3, 256, 256)], 64), (64, [(3, 256, 256), (1, 32, 32)], 32), (100, [(3, 256, 256)], 96),
    (64, [(3, 30, 50)], 48), (64, [(3, 8, 8)], 16), (64, [], 64)])
def test_side_is_a_multiple_of_16_and_enlarges_nothing_above_16(side, shapes, expected):
    assert thumbnail_side(side, shapes) == expected


def test_curve_visits_each_cell_of_a_grid_after_a_neighbor():
    grid = np.stack(np.meshgrid(np.arange(16.0), np.arange(16.0)), axis=-1).reshape(-1, 2)
    random = np.random.RandomState(0).permutation(len(grid))
    order = curve_order(grid[random])
    assert sorted(order) == list(range(256))
    steps = np.abs(np.diff(grid[random][order], axis=0)).sum(axis=1)
    assert steps.tolist() == [1] * 255


def test_curve_keeps_the_order_of_points_at_one_place():
    assert curve_order(np.ones((5, 2))).tolist() == [0, 1, 2, 3, 4]
    assert curve_order(np.empty((0, 2))).tolist() == []


def test_quantized_coordinates_have_one_scale_and_the_shorter_axis_in_the_middle():
    found = quantize(np.array([[-10.0, 1.0], [10.0, 6.0], [0.0, 3.5]]))
    assert found.dtype == np.uint16
    assert found[:, 0].tolist() == [0, 65535, 32768]
    assert found[1, 1].astype(int) - found[0, 1] == pytest.approx(65535 / 4, abs=1)
    assert found[1, 1].astype(int) + found[0, 1] == pytest.approx(65535, abs=1)


@pytest.mark.parametrize("coordinates", [np.ones((3, 2)), np.array([[1.0, 5.0]]), np.array([[1e300, 0], [-1e300, 0]])])
def test_quantized_coordinates_of_extreme_maps_are_in_range(coordinates):
    found = quantize(coordinates).astype(int)
    assert found.min() >= 0
    assert found.max() <= 65535


def test_sprites_have_the_thumbnails_in_order_by_rows_of_16():
    thumbnails = make_thumbnails(300, 32)
    order = np.random.RandomState(0).permutation(300)
    sheets = [decode(sprite) for sprite in make_sprites(thumbnails, order, 1)]
    assert [sheet.shape for sheet in sheets] == [(512, 512, 3), (96, 512, 3)]
    for tile, row in enumerate(order.tolist()):
        y, x = divmod(tile % 256, 16)
        shown = sheets[tile // 256][32 * y:32 * y + 32, 32 * x:32 * x + 32].astype(float)
        errors = ((thumbnails - shown) ** 2).mean(axis=(1, 2, 3))
        assert errors.argmin() == row


def test_sprites_do_not_blur_over_the_borders_of_tiles():
    thumbnails = np.zeros((256, 16, 16, 3), dtype=np.uint8)
    thumbnails[::2] = 255
    sheet = decode(next(iter(make_sprites(thumbnails, np.arange(256), 1)))).astype(int)
    tiles = sheet.reshape(16, 16, 16, 16, 3).transpose(0, 2, 1, 3, 4).reshape(256, 16, 16, 3)
    assert np.abs(tiles - thumbnails).max() <= 12


def test_sprites_are_the_same_bytes_by_several_processes():
    thumbnails, order = make_thumbnails(600, 16), np.arange(600)[::-1]
    assert list(make_sprites(thumbnails, order, 1)) == list(make_sprites(thumbnails, order, 2))


def test_sprites_of_no_thumbnails_are_none():
    assert list(make_sprites(np.empty((0, 64, 64, 3), dtype=np.uint8), np.arange(0), 4)) == []


def test_sprites_of_lesions_take_few_bytes_and_look_like_them():
    thumbnails = make_thumbnails(512, 64)
    sprites = list(make_sprites(thumbnails, np.arange(512), 1))
    assert sum(map(len, sprites)) < 512 * 330
    sheet = decode(sprites[0]).reshape(16, 64, 16, 64, 3).transpose(0, 2, 1, 3, 4).reshape(256, 64, 64, 3)
    error = ((sheet.astype(float) - thumbnails[:256]) ** 2).mean()
    assert 10 * np.log10(255**2 / error) > 30


def test_picture_in_a_page_shows_the_thumbnail_and_a_hostile_text():
    thumbnail = make_thumbnails(1, 32)[0]
    image, = Tags(picture_tag(thumbnail, HOSTILE)).all("img")
    assert (image["alt"], image["width"], image["height"]) == (HOSTILE, "96", "96")
    kind, data = image["src"].split(",")
    assert kind == "data:image/webp;base64"
    assert ((decode(base64.b64decode(data)).astype(float) - thumbnail) ** 2).mean() < 60
