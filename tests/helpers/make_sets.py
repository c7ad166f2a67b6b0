"""Make small data sets in tests."""

import io
import zipfile

import numpy as np
import PIL.Image

from imagesets.pixel_hashes import hash_pixels
from imagesets.reader import ImageSet, channels_first
from imagesets.writer import ImageSetWriter
from tests.helpers.make_archives import make_folder, make_zip


def png(pixels) -> bytes:
    """Encode uint8 [H, W] or [H, W, 3]."""
    file = io.BytesIO()
    PIL.Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(file, "png")
    return file.getvalue()


def pixels_of(index: int, size: int = 8, channels: int = 3) -> np.ndarray:
    """Return the pixels of the index-th image of `make_set`: uint8 [H, W] or [H, W, 3], different for each image."""
    shape = (size, size) if channels == 1 else (size, size, channels)
    return np.random.RandomState(index).randint(0, 256, shape, dtype=np.uint8)


def make_set(path, count=6, *, size=8, channels=3, labels=None, classes=None, groups=None, images=None, mirror=False,
             hashes=True, source=None):
    """Write a data set of `count` images with labels and groups by index; return its path.

    images:  which ones, as `pixels_of` numbers them, in place of the first `count`;  mirror: left and right exchanged
    hashes:  record the hashes of pixels, as dataset_tool.py does
    """
    with ImageSetWriter(path, classes=classes, source=source) as writer:
        for index, image in enumerate(range(count) if images is None else images):
            pixels = pixels_of(image, size, channels)[:, ::-1 if mirror else 1]
            writer.add(png(pixels), None if labels is None else labels[index],
                       None if groups is None else groups[index],
                       hash_pixels(channels_first(pixels)) if hashes else None)
    return path


def enclose(path, dest, folder="set", more=None):
    """Copy a data set into a subfolder of `dest`, a zip or a folder, with the files `more` beside that subfolder."""
    images = ImageSet(path)
    files = {f"{folder}/{name}": images.read(name) for name in [*images.names, *images.other_members]} | (more or {})
    return make_zip(dest, files, zipfile.ZIP_DEFLATED) if dest.suffix == ".zip" else make_folder(dest, files)
