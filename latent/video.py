"""Write films: MP4 (H.264) and animated WebP, each whole or not at all."""

import errno
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dnnlib.cli import UserError
from dnnlib.files import atomic_write

# Importing PyAV takes a while: functions import it, so that programs without video do not.
if TYPE_CHECKING:
    from av.container import OutputContainer

MP4, WEBP = "mp4", "webp"
FORMATS = (MP4, WEBP)
FRAMES_PER_SECOND = 30

_HIGHEST_RATE = 240  # frames per second; WebP counts in whole milliseconds
_LONGEST_SIDE = 16383  # pixels, of WebP
_LEAST_HEIGHT = 256  # of a frame, in pixels
# Codecs with their options, the preferred one first. Constant quality: enlarged 64x64 phantoms with noise of 6 levels
# change by at most 3 levels on average.
_CODECS = {
    MP4: {
        "libx264": {"crf": "18"},
        "mpeg4": {"qmin": "2", "qmax": "2"},  # for builds without libx264; files are twice as large
    },
    WEBP: {"libwebp_anim": {"quality": "90"}},
}
_CONTAINERS = {
    MP4: {"movflags": "faststart"},
    WEBP: {"loop": "0"},  # forever
}
# ffmpeg's numbers of the usual color space: matrix, primaries and curve of BT.709, levels from 16 to 235.
_BT709, _LIMITED = 1, 1


class Video:
    """A video file; a context manager: the file appears at the end, complete, or not at all after an error.

    path:  in an existing folder; an existing file is replaced
    form:  MP4 (H.264), or WEBP (an animated picture that repeats forever)

    Frames lower than 256 pixels are enlarged by integer factors, and odd sizes made even by repeating the last line.
    All methods raise OSError with the file's name if the system reports an error.
    """

    def __init__(self, path: str | os.PathLike, *, frames_per_second: int = FRAMES_PER_SECOND, form: str = MP4):
        if frames_per_second < 1:
            raise ValueError(f"frames_per_second is {frames_per_second}; expected 1 or more")
        self._path = Path(path)
        self._rate, self._form = frames_per_second, form
        self._stack = ExitStack()
        self._stream = None
        self._shape: list[int] = []
        self._count = 0

    def __enter__(self) -> "Video":
        with _naming(self._path):
            self._container = self._stack.enter_context(_whole_container(self._path, self._form))
        self._stack.push(self._finish)
        return self

    def __exit__(self, *failure) -> bool | None:
        # Errors of the block pass unchanged: the stack only raises later ones.
        try:
            with _naming(self._path):
                return self._stack.__exit__(*failure)
        finally:
            self._container = self._stream = None  # ends their threads, which would outlive the block

    def add(self, frame: Tensor) -> None:
        """Append a frame: uint8 [1 or 3, H, W], shaped like the first one. Raises ValueError for others."""
        import av

        if frame.dtype != torch.uint8 or frame.ndim != 3 or frame.shape[0] not in (1, 3) or not frame.numel():
            raise ValueError(f"a frame is {frame.dtype} {list(frame.shape)}; expected uint8 [1 or 3, H, W]")
        self._shape = self._shape or list(frame.shape)
        if list(frame.shape) != self._shape:
            raise ValueError(f"frame {self._count} is {list(frame.shape)}; expected {self._shape} like the first")
        pixels = frame.expand(3, -1, -1).permute(1, 2, 0).cpu().numpy()  # [H, W, 3]
        factor = _enlargement(pixels.shape[0])
        pixels = pixels.repeat(factor, axis=0).repeat(factor, axis=1)
        height, width = pixels.shape[:2]
        # Color is stored at half the resolution, so that sizes have to be even.
        pixels = np.pad(pixels, [(0, height % 2), (0, width % 2), (0, 0)], mode="edge")
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
        if self._form == MP4:
            picture = picture.reformat(format="yuv420p", dst_colorspace=_BT709, dst_color_range=_LIMITED)
        else:
            picture = picture.reformat(format="bgra")  # which the encoder converts as the format demands
        picture.pts = self._count
        with _naming(self._path):
            if self._stream is None:
                self._open_stream(picture.width, picture.height)
            self._container.mux(self._stream.encode(picture))
        self._count += 1

    def _open_stream(self, width: int, height: int) -> None:
        import av

        codecs = _CODECS[self._form]
        codec = next(name for name in codecs if name in av.codecs_available)
        stream = self._container.add_stream(codec, rate=self._rate, options=codecs[codec])
        stream.width, stream.height, stream.pix_fmt = width, height, "bgra"
        if self._form == MP4:
            context = stream.codec_context
            context.pix_fmt = "yuv420p"
            context.colorspace = context.color_primaries = context.color_trc = _BT709
            context.color_range = _LIMITED
        self._stream = stream

    def _finish(self, kind: type[BaseException] | None, *_) -> None:
        """Write the frames that the encoder still buffers."""
        if kind is not None:
            return
        if self._stream is None:
            raise ValueError(f"{self._path} has no frames; expected one or more")
        self._container.mux(self._stream.encode())


class Film:
    """One video in several formats at once; a context manager like `Video`.

    stem:   path of the files without their endings
    forms:  some of FORMATS
    """

    def __init__(self, stem: str | os.PathLike, forms: Sequence[str], *, frames_per_second: int = FRAMES_PER_SECOND):
        self.paths = [Path(f"{os.fspath(stem)}.{form}") for form in forms]
        self._videos = [Video(path, frames_per_second=frames_per_second, form=form)
                        for path, form in zip(self.paths, forms, strict=True)]
        self._stack = ExitStack()

    def __enter__(self) -> "Film":
        with ExitStack() as stack:
            for video in self._videos:
                stack.enter_context(video)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *failure) -> bool | None:
        return self._stack.__exit__(*failure)

    def add(self, frame: Tensor) -> None:
        """Append a frame: uint8 [1 or 3, H, W], shaped like the first one. Raises ValueError for others."""
        for video in self._videos:
            video.add(frame)


def parse_formats(text: str, option: str = "--formats") -> list[str]:
    """Return the formats of a list such as "mp4,webp", each once. Raises UserError."""
    import av

    found = list(dict.fromkeys(part.strip().lower() for part in text.split(",")))
    for form in found:
        if form not in FORMATS:
            raise UserError(f"{option} has {form!r}; expected {' or '.join(FORMATS)}, or both separated by a comma")
        if not any(codec in av.codecs_available for codec in _CODECS[form]):
            raise UserError(f"{option} has {form}, but the installed PyAV cannot write it; expected the other format")
    return found


def check_film(fps: int, width: int, height: int) -> None:
    """Raise UserError if a film of this frame rate, of frames of this size in pixels, cannot be written."""
    if not 1 <= fps <= _HIGHEST_RATE:
        raise UserError(f"--fps is {fps}; expected 1 to {_HIGHEST_RATE} frames per second, usually {FRAMES_PER_SECOND}")
    width, height = (side * _enlargement(height) for side in (width, height))
    if max(width, height) > _LONGEST_SIDE:
        raise UserError(f"a frame of the film would be {width}x{height} pixels; expected at most {_LONGEST_SIDE} each "
                        "way: show fewer films in one")


def _enlargement(height: int) -> int:
    """Return the integer factor by which frames of this height are enlarged."""
    return -(-_LEAST_HEIGHT // height)


def tile(images: Sequence[Tensor]) -> Tensor:
    """Put images side by side, row by row, near to a square; missing cells stay white. uint8 [C, H, W] each"""
    columns, rows = grid_of(len(images), *images[0].shape[1:])
    blank = torch.full_like(images[0], 255)
    cells = [*images, *[blank] * (columns * rows - len(images))]
    return torch.cat([torch.cat(cells[row * columns:(row + 1) * columns], dim=2) for row in range(rows)], dim=1)


def grid_of(count: int, height: int, width: int) -> tuple[int, int]:
    """Return columns and rows of `count` images of a height and width, near to a square."""
    columns = min(max(math.ceil(math.sqrt(count * height / width)), 1), count)
    return columns, -(-count // columns)


@contextmanager
def _whole_container(path: Path, form: str) -> Iterator["OutputContainer"]:
    """Open a temporary video file; it is renamed to `path` at the end, unless there is an error."""
    import av

    with atomic_write(path) as file:
        # By name, since ffmpeg reads the file again to move the index to the front.
        container = av.open(file.name, "w", format=form, container_options=_CONTAINERS[form])
        try:
            yield container
        except BaseException:
            with suppress(OSError, av.FFmpegError):
                container.close()
            raise
        container.close()


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Make errors of the system name `path` instead of a temporary file."""
    try:
        yield
    except OSError as error:
        code = error.errno or (errno.EISDIR if isinstance(error, IsADirectoryError) else errno.EIO)
        raise OSError(code, os.strerror(code), os.fspath(path)) from error
