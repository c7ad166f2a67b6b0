"""Look at the headers of all images: are there colours, and of what size will they be?"""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np

from dnnlib.cli import UserError
from dnnlib.progress import Progress
from imagesets.conversion.options import ConvertOptions, is_usable_side, nearest_power
from imagesets.pixels.decode import BadImage, PixelSpec, probe
from imagesets.sources.source import Loader, Source
from imagesets.workers import ordered_map

_HEADER_BYTES = 1 << 16  # where most headers end
_CHUNK = 32

Size = tuple[int, int]
Header = tuple[int, int, int]  # width, height, channels


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


def survey(source: Source, wanted: np.ndarray, options: ConvertOptions, workers: int, progress: Progress) -> PixelSpec:
    """Return how to convert the wanted images: in colour if any has colour by its header, else in grey.

    wanted: bool [N]

    Reads no further than to the first image with colour, unless the size of the result is to be found out, too.
    Raises UserError when no size is given and the images differ, or are not square with a power of two a side.
    """
    needs_size = options.width is None
    channels, first = 1, None
    with closing(_headers(source, wanted, workers, progress)) as headers:
        for name, (width, height, found) in headers:
            channels = 3 if found > 1 else channels
            if needs_size:
                size = _natural_size(width, height, options.transform)
                first = first or (name, size)
                if size != first[1]:
                    raise _mixed_sizes(first, (name, size))
            elif channels == 3:
                break
    if first is not None:
        _check_natural_size(*first)
    return PixelSpec(width=options.width, height=options.height, transform=options.transform, channels=channels,
                     resize_filter=options.resize_filter, exact=options.exact)


def _headers(source: Source, wanted: np.ndarray, workers: int, progress: Progress) -> Iterator[tuple[str, Header]]:
    """Yield the name and header of each image that can be read."""
    indices = np.flatnonzero(wanted)
    if source.shape is not None:
        yield source.names[indices[0]], source.shape
        return
    read = ordered_map(ReadHeader(load=source.load), source.items(wanted), workers, chunk=_CHUNK)
    with closing(read):
        for index, header in zip(indices, read):
            progress.advance()
            if header is not None:
                yield source.names[index], header


def _natural_size(width: int, height: int, transform: str | None) -> Size:
    return (width, height) if transform is None else (min(width, height),) * 2


def _mixed_sizes(first: tuple[str, Size], other: tuple[str, Size]) -> UserError:
    sizes = " but ".join(f"{name} is {size[0]}x{size[1]}" for name, size in (first, other))
    near = nearest_power(min(*first[1], *other[1]))
    return UserError(f"images differ in size: {sizes}; expected one size: give --resolution={near}x{near}, with "
                     "--transform=center-crop if their shapes are not to be stretched")


def _check_natural_size(name: str, size: Size) -> None:
    width, height = size
    if width != height or not is_usable_side(width):
        near = nearest_power(min(size))
        raise UserError(f"images are {width}x{height} ({name} for example); expected squares with a power of two a "
                        f"side: give --transform=center-crop --resolution={near}x{near}")
