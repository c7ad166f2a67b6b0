"""Write frames as an MP4 file that browsers and players show."""

import errno
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dnnlib.files import atomic_write

# PyAV takes a while to import, which programs that write no video do not spend: functions import it.
if TYPE_CHECKING:
    from av.container import OutputContainer

_LEAST_HEIGHT = 256  # pixels
# Of constant quality: drawn lesions of 64x64 with noise of 6 levels, enlarged, come back within 3 levels on average.
_CODECS = {
    "libx264": {"crf": "18"},
    "mpeg4": {"qmin": "2", "qmax": "2"},  # for builds without libx264; files of twice the size
}
# ffmpeg's numbers of what players take for granted: the matrix, primaries and curve of BT.709, levels from 16 to 235.
_BT709, _LIMITED = 1, 1


class Video:
    """A file of frames, H.264; use it as a context: the file appears whole at the end, or not at all on an error.

    path:  where; the folder exists. Another file of that name is replaced.

    Frames lower than 256 pixels are enlarged by whole factors, and odd sizes made even by repeating the last line.
    All methods raise OSError with the file's name when the system refuses something.
    """

    def __init__(self, path: str | os.PathLike, *, frames_per_second: int = 30):
        if frames_per_second < 1:
            raise ValueError(f"frames_per_second is {frames_per_second}; expected 1 or more")
        self._path = Path(path)
        self._rate = frames_per_second
        self._stack = ExitStack()
        self._stream = None
        self._shape: list[int] = []
        self._count = 0

    def __enter__(self) -> "Video":
        with _naming(self._path):
            self._container = self._stack.enter_context(_whole_container(self._path))
        self._stack.push(self._finish)
        return self

    def __exit__(self, *failure) -> bool | None:
        # What the block raises comes out as it is: the stack raises only what went wrong since.
        try:
            with _naming(self._path):
                return self._stack.__exit__(*failure)
        finally:
            self._container = self._stream = None  # with their threads, which would outlive the block

    def add(self, frame: Tensor) -> None:
        """Append a frame: uint8 [1 or 3, H, W], of the first one's shape. Raises ValueError for others."""
        import av

        pixels = self._checked(frame).expand(3, -1, -1).permute(1, 2, 0).cpu().numpy()  # [H, W, 3]
        factor = -(-_LEAST_HEIGHT // pixels.shape[0])
        pixels = pixels.repeat(factor, axis=0).repeat(factor, axis=1)
        height, width = pixels.shape[:2]
        # The colours of a picture are stored at half the size: two lines have one.
        pixels = np.pad(pixels, [(0, height % 2), (0, width % 2), (0, 0)], mode="edge")
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
        picture = picture.reformat(format="yuv420p", dst_colorspace=_BT709, dst_color_range=_LIMITED)
        picture.pts = self._count
        with _naming(self._path):
            if self._stream is None:
                self._open_stream(picture.width, picture.height)
            self._container.mux(self._stream.encode(picture))
        self._count += 1

    def _checked(self, frame: Tensor) -> Tensor:
        if frame.dtype != torch.uint8 or frame.ndim != 3 or frame.shape[0] not in (1, 3) or not frame.numel():
            raise ValueError(f"a frame is {frame.dtype} {list(frame.shape)}; expected uint8 [1 or 3, H, W]")
        self._shape = self._shape or list(frame.shape)
        if list(frame.shape) != self._shape:
            raise ValueError(f"frame {self._count} is {list(frame.shape)}; expected {self._shape} like the first")
        return frame

    def _open_stream(self, width: int, height: int) -> None:
        import av

        codec = next(name for name in _CODECS if name in av.codecs_available)
        stream = self._container.add_stream(codec, rate=self._rate, options=_CODECS[codec])
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = _LIMITED
        self._stream = stream

    def _finish(self, kind: type[BaseException] | None, *_) -> None:
        """Write the frames that the encoder keeps back."""
        if kind is not None:
            return
        if self._stream is None:
            raise ValueError(f"{self._path} has no frames; expected one or more")
        self._container.mux(self._stream.encode())


@contextmanager
def _whole_container(path: Path) -> Iterator["OutputContainer"]:
    """Give an MP4 file to write to; it takes the place of `path` at the end, unless there is an error."""
    import av

    with atomic_write(path) as file:
        # By its name: to move the index to the front, where players want it, ffmpeg reads the file again.
        container = av.open(file.name, "w", format="mp4", container_options={"movflags": "faststart"})
        try:
            yield container
        except BaseException:
            with suppress(OSError, av.FFmpegError):
                container.close()
            raise
        container.close()


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Let the system's errors name the file that was asked for instead of a temporary one."""
    try:
        yield
    except OSError as error:
        code = error.errno or (errno.EISDIR if isinstance(error, IsADirectoryError) else errno.EIO)
        raise OSError(code, os.strerror(code), os.fspath(path)) from error
