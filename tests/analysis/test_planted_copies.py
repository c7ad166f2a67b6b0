"""analysis.planted_copies: what is done to copies, how many there are, and how often a test finds them."""

import io

import numpy as np
import PIL.Image
import pytest

from analysis.planted_copies import (
    ANY,
    SHARES,
    TRANSFORMATIONS,
    PlantedCopies,
    make_copy,
    num_planted,
    planted_power,
)
from imagesets.phantoms.make import render_phantom
from metrics.image_sources import SelectedImages, SetImages
from tests.helpers.make_sets import make_set, pixels_of

NUM_ORIGINALS = 40
WAYS = [*TRANSFORMATIONS, ANY]


@pytest.fixture(scope="module")
def phantom():
    return render_phantom(0, 1, lesion_number=1, resolution=40)[0]


def test_transformations_are_the_six_in_order():
    assert list(TRANSFORMATIONS) == ["plain", "mirrored", "rotated", "JPEG 70", "color-shifted", "cropped by 10 %"]


@pytest.mark.parametrize("way", TRANSFORMATIONS)
@pytest.mark.parametrize("size", [1, 8, 37])
def test_copy_of_any_size_has_shape_and_type_of_its_original_and_follows_from_the_seed(way, size):
    pixels = pixels_of(0, size)
    before = pixels.tobytes()
    copies = [make_copy(pixels, way, seed) for seed in (5, 5)]
    assert (copies[0].shape, copies[0].dtype) == (pixels.shape, np.uint8)
    assert copies[0].tobytes() == copies[1].tobytes()
    copies[0][:] = 0  # a copy shares no memory with its original
    assert pixels.tobytes() == before


def test_plain_and_mirrored_copies_are_exact(phantom):
    assert make_copy(phantom, "plain", 0).tobytes() == phantom.tobytes()
    assert make_copy(phantom, "mirrored", 0).tobytes() == phantom[:, ::-1].tobytes()


def test_rotated_copies_are_turned_by_each_right_angle(phantom):
    turns = [np.rot90(phantom, turn).tobytes() for turn in range(4)]
    assert {turns.index(make_copy(phantom, "rotated", seed).tobytes()) for seed in range(20)} == {1, 2, 3}


def test_compressed_copy_is_that_of_a_jpeg_of_quality_70(phantom):
    file = io.BytesIO()
    PIL.Image.fromarray(phantom).save(file, "jpeg", quality=70)
    copy = make_copy(phantom, "JPEG 70", 0)
    assert copy.tobytes() == np.asarray(PIL.Image.open(file)).tobytes()
    assert 0 < np.abs(copy.astype(float) - phantom).mean() < 10


def test_color_shifted_copy_changes_each_channel_by_at_most_a_tenth_and_ten_levels():
    ramp = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2)
    seen = []
    for seed in range(30):
        copy = make_copy(ramp, "color-shifted", seed).reshape(256, 3).astype(float)
        assert (np.abs(copy - ramp.reshape(256, 3)) <= 0.1 * ramp.reshape(256, 3) + 10.5).all()
        for channel in copy.T:
            inside = (channel > 0) & (channel < 255)
            gain, offset = np.polyfit(np.arange(256)[inside], channel[inside], 1)
            assert np.abs(gain * np.arange(256)[inside] + offset - channel[inside]).max() < 1.1  # a line, but rounded
            seen.append((gain, offset))
    assert len({round(gain, 4) for gain, _ in seen}) > 80  # channels change on their own
    assert np.ptp([gain for gain, _ in seen]) > 0.15
    assert np.ptp([offset for _, offset in seen]) > 15


def test_cropped_copy_is_a_part_of_nine_tenths_enlarged(phantom):
    size, kept = 40, 36
    places = {(top, left): np.asarray(PIL.Image.fromarray(phantom[top:top + kept, left:left + kept]).resize(
        (size, size), PIL.Image.Resampling.LANCZOS)).tobytes() for top in range(5) for left in range(5)}
    parts = list(places.values())
    found = {parts.index(make_copy(phantom, "cropped by 10 %", seed).tobytes()) for seed in range(60)}
    assert len(found) > 15  # anywhere


def test_planted_copies_are_way_by_way_and_do_not_depend_on_how_they_are_read(tmp_path):
    originals = SelectedImages(SetImages(make_set(tmp_path / "set.zip", 6)), np.array([4, 1, 5]))
    copies = PlantedCopies(originals, seed=3)
    assert len(copies) == 18
    pixels = copies.pixels(range(18))
    assert (pixels.shape, str(pixels.dtype)) == ((18, 3, 8, 8), "torch.uint8")
    for row in range(18):
        expected = make_copy(pixels_of([4, 1, 5][row % 3]), list(TRANSFORMATIONS)[row // 3], 3 + row)
        assert copies.pixels(range(row, row + 1))[0].permute(1, 2, 0).numpy().tobytes() == expected.tobytes()
        assert pixels[row].permute(1, 2, 0).numpy().tobytes() == expected.tobytes()
    others = PlantedCopies(originals, seed=4).pixels(range(18))
    assert (pixels[:6] == others[:6]).all()  # plain and mirrored ones have nothing random
    assert (pixels[12:] != others[12:]).any()


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("count", [500, 1000, 10015, 50000])
def test_number_of_copies_gives_their_share_of_the_whole_set(share, count):
    planted = num_planted(share, count)
    assert planted / (count + planted) == pytest.approx(share, abs=0.6 / count)


def test_at_least_one_copy_is_planted():
    assert [num_planted(0.002, count) for count in (1, 10, 100, 1000)] == [1, 1, 1, 2]
    assert num_planted(0.01, 990) == 10


def test_power_counts_the_draws_in_which_the_test_finds_copies():
    found = planted_power("nearest", 990, NUM_ORIGINALS, lambda rows: len(rows) >= 10, seed=0, num_draws=4)
    assert (found.key, found.shares, found.num_draws) == ("nearest", SHARES, 4)
    assert found.found == {way: [0, 0, 4, 4, 4] for way in WAYS}
    assert [found.smallest_share(way) for way in WAYS] == [0.01] * len(WAYS)


def test_power_of_small_set_has_no_share_of_less_than_one_copy():
    planted = {count: planted_power("nearest", count, NUM_ORIGINALS, lambda rows: True, seed=0, num_draws=1).shares
               for count in (4, 30, 200, 3000)}
    assert planted == {4: (0.2,), 30: (0.05,), 200: (0.005, 0.01, 0.02, 0.05), 3000: SHARES}


def test_power_of_a_test_that_sees_one_transformation_is_that_of_copies_changed_so():
    place = WAYS.index("rotated")
    found = planted_power("nearest", 990, NUM_ORIGINALS, seed=0, num_draws=3, shares=(0.01, 0.05), finds=lambda rows: (
        rows // NUM_ORIGINALS == place).any())
    assert found.found == {way: [3, 3] if way in ("rotated", ANY) else [0, 0] for way in WAYS}
    assert [found.smallest_share(way) for way in ("plain", "rotated")] == [None, 0.01]


def draws_of(num_images, shares, num_draws=3, seed=0):
    """Return the originals and the ways of all draws, by way and share."""
    drawn, beats = [], []

    def finds(rows):
        assert rows.dtype.kind == "i"
        drawn.append((rows % NUM_ORIGINALS, rows // NUM_ORIGINALS))
        return False

    planted_power("nearest", num_images, NUM_ORIGINALS, finds, seed=seed, num_draws=num_draws, shares=shares,
                  beat=lambda: beats.append(1))
    assert len(beats) == len(drawn) == len(WAYS) * len(shares) * num_draws
    return drawn


def test_each_original_is_drawn_once_before_one_is_drawn_twice():
    for count, rows in ((10, 190), (40, 760), (50, 950), (100, 1900)):
        draws = draws_of(rows, (0.05,))
        assert {len(originals) for originals, _ in draws} == {count}
        for originals, _ in draws:
            times = np.bincount(originals, minlength=NUM_ORIGINALS)
            assert set(times) <= {count // NUM_ORIGINALS, -(-count // NUM_ORIGINALS)}


def test_draws_differ_and_follow_from_the_seed():
    first, again, other = ([tuple(originals) for originals, _ in draws_of(190, (0.02, 0.05), seed=seed)]
                           for seed in (0, 0, 1))
    assert first == again != other
    assert len(set(first)) == len(first)


def test_mixture_has_as_many_copies_of_each_way():
    draws = draws_of(24 * 19, (0.05,))
    for place in range(len(TRANSFORMATIONS)):
        assert all((ways == place).all() for _, ways in draws[3 * place:3 * place + 3])
    for originals, ways in draws[-3:]:
        assert np.bincount(ways).tolist() == [4] * len(TRANSFORMATIONS)
        assert len(set(originals)) == 24
