"""Look at the headers of all images: are there colours, and of what size will they be?"""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np

from dnnlib.cli import UserError
from dnnlib.progress import Progress
from imagesets.conversion.options import ConvertOptions
from imagesets.pixels.decode import BadImage, Header, PixelSpec, may_need_range, probe, probe_range
from imagesets.pixels.depth import Depth, widen
from imagesets.resolutions import RESOLUTIONS, is_resolution, nearest_resolution
from imagesets.sources.source import Loader, Source
from imagesets.workers import ordered_map

_HEADER_BYTES = 1 << 16  # where most headers end
_CHUNK = 32

Size = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class ReadHeader:
    """Returns the header of an image, None for one that cannot be read."""
    load: Loader

    def __call__(self, item: Any) -> Header | None:
        for limit in (_HEADER_BYTES, None):
            try:
                return probe(self.load(item, limit))
            except BadImage:
                pass  # With the whole file it is bad indeed; the conversion will say so.
        return None


@dataclass(frozen=True, kw_only=True)
class ReadRange:
    """Returns the kind and the range of the values of an image (see probe_range), None for one that cannot be read."""
    load: Loader

    def __call__(self, item: Any) -> tuple[str, float, float] | None:
        try:
            return probe_range(self.load(item))
        except BadImage:
            return None


def survey(source: Source, wanted: np.ndarray, options: ConvertOptions, workers: int,
           progress: Progress) -> tuple[PixelSpec, np.ndarray]:
    """Return how to convert the wanted images, in color if any has color by its header, else in gray; and bool [N]:
    which images are scaled by the values of all of their kind, which read_ranges finds.

    wanted: bool [N]

    Reads no further than to the first image with color, unless the size of the result is to be found out, too; beyond
    it only files whose names let such values be expected.
    Raises UserError when no size is given and the images differ, or are not square with a power of two a side.
    """
    needs_size = options.width is None
    channels, first = 1, None
    deep = np.zeros(len(source), dtype=bool)
    with closing(_headers(source, wanted, workers, progress)) as headers:
        for index, header in headers:
            channels = 3 if header.channels > 1 else channels
            deep[index] = header.needs_range
            if needs_size:
                name, size = source.names[index], _natural_size(header.width, header.height, options.transform)
                first = first or (name, size)
                if size != first[1]:
                    raise _mixed_sizes(first, (name, size))
            elif channels == 3:
                rest = wanted & (np.arange(len(source)) > index)
                break
        else:
            rest = np.zeros(len(source), dtype=bool)
    if first is not None:
        _check_natural_size(*first)
    if rest.any() and source.shape is None:
        rest &= np.array([may_need_range(name) for name in source.names])
        with closing(_headers(source, rest, workers, progress)) as headers:
            for index, header in headers:
                deep[index] = header.needs_range
    spec = PixelSpec(width=options.width, height=options.height, transform=options.transform, channels=channels,
                     resize_filter=options.resize_filter, exact=options.exact,
                     depth=Depth(bits=options.depth, ranges={}))
    return spec, deep


def read_ranges(source: Source, deep: np.ndarray, workers: int, progress: Progress) -> dict[str, tuple[float, float]]:
    """Return the smallest and the largest value of all images of each kind, without those that cannot be read.

    deep: bool [N], from survey
    """
    ranges: dict[str, tuple[float, float]] = {}
    with closing(ordered_map(ReadRange(load=source.load), source.items(deep), workers)) as results:
        for found in results:
            progress.advance()
            if found is not None:
                widen(ranges, *found)
    return ranges


def _headers(source: Source, wanted: np.ndarray, workers: int, progress: Progress) -> Iterator[tuple[int, Header]]:
    """Yield the index and header of each image that can be read."""
    indices = np.flatnonzero(wanted)
    if source.shape is not None:
        yield indices[0], Header(*source.shape)
        return
    read = ordered_map(ReadHeader(load=source.load), source.items(wanted), workers, chunk=_CHUNK)
    with closing(read):
        for index, header in zip(indices, read):
            progress.advance()
            if header is not None:
                yield index, header


def _natural_size(width: int, height: int, transform: str | None) -> Size:
    return (width, height) if transform is None else (min(width, height),) * 2


def _mixed_sizes(first: tuple[str, Size], other: tuple[str, Size]) -> UserError:
    sizes = " but ".join(f"{name} is {size[0]}x{size[1]}" for name, size in (first, other))
    near = nearest_resolution(min(*first[1], *other[1]))
    return UserError(f"images differ in size: {sizes}; expected one size: give --resolution={near}x{near}, with "
                     "--transform=center-crop if their shapes are not to be stretched")


def _check_natural_size(name: str, size: Size) -> None:
    width, height = size
    if width != height or not is_resolution(width):
        near = nearest_resolution(min(size))
        raise UserError(f"images are {width}x{height} ({name} for example); expected squares with a side of "
                        f"{RESOLUTIONS}: give --transform=center-crop --resolution={near}x{near}")
