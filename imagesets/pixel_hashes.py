"""Identify images: hash their pixels, find equal images, and the groups that these link.

Hashes of pixels identify images regardless of file format, name, order, label and horizontal flips. dataset_tool.py
writes the hash of each image into dataset.json, with the size and CRC-32 of its file: if the file has changed since,
the hash is ignored. Missing hashes are computed once and cached.
"""

import hashlib
import sys
from collections.abc import Hashable, Iterable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np

from dnnlib.cache import cache_folder
from dnnlib.files import atomic_write
from dnnlib.progress import Progress
from dnnlib.workers import ordered_map
from imagesets.metadata import PIXEL_HASH
from imagesets.reader import ImageSet, load_pixels

DIGEST_SIZE = 32  # bytes of a sha256
_VERSION = 1  # of cached hashes; raise it when hash_pixels gives others, and rename the field of dataset.json
_DIGEST_BYTES = 16  # as imagesets.metadata.PIXEL_HASH has it
_CHUNK = 32  # images that a worker takes at a time; one of 64x64 pixels takes half a millisecond


def hash_pixels(pixels: np.ndarray) -> str:
    """Return 32 hexadecimal digits that an image shares with its horizontally flipped copy, but with no other image.

    pixels: uint8 [C, H, W]; gray differs from RGB with equal channels
    """
    return min(hashlib.blake2b(f"{pixels.shape}".encode() + np.ascontiguousarray(side).tobytes(),
                               digest_size=_DIGEST_BYTES).hexdigest() for side in (pixels, pixels[:, :, ::-1]))


def hash_set(hashes: Iterable[str]) -> str:
    """Return a sha256 of images by their hashes, regardless of their order."""
    return hashlib.sha256("\n".join(sorted(hashes)).encode()).hexdigest()


def read_pixel_hashes(images: ImageSet, rows: Sequence[int] | None = None, *, workers: int = 1,
                      stream: IO[str] | None = None) -> list[str]:
    """Return the hash of each image, or of those of `rows`: recorded, cached, or computed and then cached.

    workers: processes that decode images
    stream:  where progress is shown, None for standard error

    Raises UserError, naming the image, when one cannot be read or decoded.
    """
    hashes, missing, path = _find(images, range(len(images)) if rows is None else rows)
    if missing:
        names = [images.names[row] for row in missing.values()]
        with (Progress(len(names), f"images of {images.path.name} hashed", stream=stream) as progress,
              closing(ordered_map(partial(_hash_member, images), names, workers if len(names) > _CHUNK else 1,
                                  chunk=_CHUNK)) as results):
            for place, found in zip(missing, results, strict=True):
                hashes[place] = found
                progress.advance()
        _keep(path, [hashes[place] for place in missing], sys.stderr if stream is None else stream)
    return hashes


def known_pixel_hashes(images: ImageSet, rows: Sequence[int] | None = None) -> list[str] | None:
    """Return the result of `read_pixel_hashes`, or None if images would have to be decoded."""
    hashes, missing, _ = _find(images, range(len(images)) if rows is None else rows)
    return None if missing else hashes


def equal_images(hashes: Sequence[Hashable], others: Sequence[Hashable]) -> list[tuple[int, int]]:
    """Return (index, index of its first copy among the others) of each image that also occurs there."""
    first: dict[Hashable, int] = {}
    for place, found in enumerate(others):
        first.setdefault(found, place)
    return [(place, first[found]) for place, found in enumerate(hashes) if found in first]


def equal_files(images: ImageSet, rows: Sequence[int], others: ImageSet,
                other_rows: Sequence[int]) -> list[tuple[int, int]]:
    """Return as `equal_images` does the images of `rows` whose files are equal to others'.

    Only files of equal size and CRC-32 are read. These alone do not tell: PNGs contain the CRC-32 of their data, so
    that the whole file's takes only 2**16 values, and without compression all sizes are equal.
    """
    sides = (images, rows), (others, other_rows)
    checksums = [[each.checksums()[row] for row in some] for each, some in sides]
    common = set(checksums[0]).intersection(checksums[1])
    return equal_images(*(
        [hashlib.sha256(each.read(each.names[row])).digest() if checksum in common else checksum
         for row, checksum in zip(some, found, strict=True)]
        for (each, some), found in zip(sides, checksums, strict=True)))


def _find(images: ImageSet, rows: Sequence[int]) -> tuple[list[str | None], dict[int, int], Path]:
    """Return the known hashes, {index in rows: row} of the missing ones, and the cache file for these."""
    checksums = images.checksums()
    hashes = [images.recorded_hash(images.names[row], *checksums[row]) for row in rows]
    missing = {place: row for place, row in enumerate(rows) if hashes[place] is None}
    path = cache_folder() / "pixel_hashes" / f"{images.content_hash(f'{_VERSION}', missing.values())}.txt"
    cached = _read(path, len(missing)) if missing else None
    if cached is not None:
        for place, found in zip(missing, cached, strict=True):
            hashes[place] = found
        missing = {}
    return hashes, missing, path


def _read(path: Path, count: int) -> list[str] | None:
    """Return cached hashes; None if there are none, or the file is damaged."""
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return None
    return lines if len(lines) == count and all(map(PIXEL_HASH.fullmatch, lines)) else None


def _keep(path: Path, hashes: Sequence[str], stream: IO[str]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, text=True) as file:
            file.writelines(f"{found}\n" for found in hashes)
    except OSError as error:
        print(f"pixel hashes cannot be cached in {path.parent} ({error.strerror or error}); they will be computed "
              "again next time", file=stream)


def _hash_member(images: ImageSet, name: str) -> str:
    return hash_pixels(load_pixels(images, name))


def identical_sets(digests: np.ndarray) -> list[np.ndarray]:
    """Return the rows of equal digests, as ascending int64 arrays of two or more, in the order of their first rows.

    digests: uint8 [N, B], B a multiple of 8
    """
    words = np.ascontiguousarray(digests).view(np.uint64)  # [N, B / 8]
    order = np.lexsort(words.T)  # stable, so that equal rows stay ascending
    changes = (words[order][1:] != words[order][:-1]).any(axis=1)
    runs = np.split(order, np.flatnonzero(changes) + 1)
    return sorted((run for run in runs if len(run) > 1), key=lambda run: run[0])


def number_values(texts: Sequence[Hashable]) -> np.ndarray:
    """Number values in the order in which they first appear: int64 [N]."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(text, len(numbers)) for text in texts], dtype=np.int64)


def link_groups(groups: Sequence[str], identical: Sequence[np.ndarray]) -> tuple[np.ndarray, int]:
    """Return the unit of each image, int64 [N], and how many groups joined the unit of another.

    A unit is a group, or several that share an image, directly or in a chain. Units are numbered by their first image.

    groups:    one text per image
    identical: rows of images that must be in one unit, such as byte-identical ones
    """
    group_of = number_values(groups)
    if not len(identical):
        return group_of, 0
    # Here, because it takes 0.2 s, which --help and training would pay too.
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    starts = group_of[np.repeat([rows[0] for rows in identical], [len(rows) for rows in identical])]
    ends = group_of[np.concatenate(identical)]
    num_groups = int(group_of.max()) + 1
    links = coo_array((np.ones(len(ends), dtype=bool), (starts, ends)), shape=(num_groups, num_groups))
    num_units, unit_of_group = connected_components(links, directed=False)
    return number_values(unit_of_group[group_of].tolist()), num_groups - num_units
