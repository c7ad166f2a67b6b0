"""analysis.near_duplicates: changed copies are found in every orientation, other pictures are not."""

import io

import numpy as np
import PIL.Image
import pytest

from analysis.near_duplicates import (
    LEAST_CORRELATION,
    ORIENTATIONS,
    SIDE,
    find_near_duplicates,
    make_thumbnails,
    read_thumbnails,
)
from imagesets.phantoms.make import render_phantom
from imagesets.reader import ImageSet
from imagesets.writer import ImageSetWriter
from tests.helpers.make_sets import png


@pytest.fixture(scope="module")
def lesions():
    """Return drawings of 24 different lesions: uint8 [64, 64, 3] each."""
    return [render_phantom(0, index, lesion_number=index)[0] for index in range(24)]


def jpeg(pixels, quality=70):
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return np.asarray(PIL.Image.open(buffer))


def resized(pixels, side):
    return np.asarray(PIL.Image.fromarray(pixels).resize((side, side), PIL.Image.Resampling.LANCZOS))


def thumbnails_of(path, images):
    with ImageSetWriter(path) as writer:
        for pixels in images:
            writer.add(png(pixels))
    return read_thumbnails(ImageSet(path))


CHANGES = {
    "same": lambda pixels: pixels,
    "re-encoded": jpeg,
    "mirrored and re-encoded": lambda pixels: jpeg(np.ascontiguousarray(pixels[:, ::-1])),
    "turned": lambda pixels: np.rot90(pixels),
    "turned and mirrored": lambda pixels: np.rot90(pixels, 3)[::-1],
    "smaller": lambda pixels: resized(pixels, 48),
    "resized twice": lambda pixels: resized(resized(pixels, 56), 64),
    "brighter": lambda pixels: np.clip(pixels * 1.05, 0, 255).astype(np.uint8),
    "redder": lambda pixels: np.clip(pixels * np.array([1.1, 1, 0.9]), 0, 255).astype(np.uint8),
    "gray": lambda pixels: np.asarray(PIL.Image.fromarray(pixels).convert("L")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_copies_are_found(lesions, change, tmp_path):
    before = thumbnails_of(tmp_path / "before.zip", lesions)
    after = thumbnails_of(tmp_path / "after.zip", [CHANGES[change](pixels) for pixels in lesions])
    found = find_near_duplicates(after, before)
    assert [(match.row, match.other) for match in found] == [(row, row) for row in range(len(lesions))]
    assert min(match.correlation for match in found) >= LEAST_CORRELATION


def test_other_lesions_are_not_found(lesions, tmp_path):
    assert find_near_duplicates(thumbnails_of(tmp_path / "a.zip", lesions[:12]),
                                thumbnails_of(tmp_path / "b.zip", lesions[12:])) == []


def gray_images(count, seed=0):
    return np.random.RandomState(seed).rand(count, SIDE, SIDE).astype(np.float32) * 255


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_orientation_turns_the_first_image_into_the_second(orientation):
    gray = gray_images(3)
    turned, mirrored, flipped = orientation
    other = gray.transpose(0, 2, 1) if turned else gray
    other = other[:, ::-1] if flipped else other
    other = other[:, :, ::-1] if mirrored else other
    found = find_near_duplicates(make_thumbnails(gray), make_thumbnails(other))
    assert [(match.row, match.other, match.orientation) for match in found] == [
        (row, row, orientation) for row in range(3)]
    assert [match.correlation for match in found] == pytest.approx([1] * 3, abs=1e-5)


def test_copy_with_the_highest_correlation_is_chosen():
    gray, noise = gray_images(1), gray_images(3, seed=1) - 127.5
    others = gray + np.array([0.05, 0.02, 0.1], dtype=np.float32)[:, None, None] * noise
    (match,) = find_near_duplicates(make_thumbnails(gray), make_thumbnails(others))
    assert match.other == 1
    # Independent noise of the same spread as the image, times 0.02.
    assert match.correlation == pytest.approx(1 / np.sqrt(1 + 0.02 ** 2), abs=1e-3)


def test_images_without_contrast_resemble_nothing():
    flat = np.full((2, SIDE, SIDE), 200, dtype=np.float32)
    flat[:, :16] += 0.5
    assert find_near_duplicates(make_thumbnails(flat), make_thumbnails(flat)) == []


def test_result_does_not_depend_on_brightness_and_contrast():
    gray = gray_images(4)
    (first, second) = (find_near_duplicates(make_thumbnails(changed), make_thumbnails(gray))
                       for changed in (gray, gray * 0.3 + 50))
    assert [(match.row, match.other) for match in first] == [(match.row, match.other) for match in second]
    assert [match.correlation for match in second] == pytest.approx([1] * 4, abs=1e-5)
