"""Project one image: write the files of the original's projector, and distances; with an MP4 of all steps."""

import errno
import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dnnlib.files import atomic_write
from dnnlib.progress import Progress
from generation.image_generator import ImageGenerator, SynthesisSettings, choose_batch, save_projected_w
from generation.network import Label, OpenNetwork
from generation.pictures import save_picture
from latent.pivotal_tuning import TuningSettings, save_tuned, tune
from latent.projection import (
    COLUMNS,
    PERCEPTUAL,
    Projection,
    Projector,
    StyleStatistics,
    finish,
    measure_pairs,
    measure_styles,
    read_operators,
)
from torch_utils.images import to_unit_range
from torch_utils.ops.compiled import auto_means_as_before

# Importing PyAV takes a while: functions import it, so that programs without video do not.
if TYPE_CHECKING:
    from av.container import OutputContainer

# The files in --outdir.
TARGET, PROJECTION, STYLES = "target.png", "proj.png", "projected_w.npz"
VIDEO, RECORD = "proj.mp4", "projection.json"
TUNED_PROJECTION, TUNED_NETWORK = "proj-pti.png", "network-pti.safetensors"
STATES, LOCK = "projection-state-*.pt", "lock"

_LEAST_HEIGHT = 256  # of a frame, in pixels
# Constant quality: enlarged 64x64 phantoms with noise of 6 levels change by at most 3 levels on average.
_CODECS = {
    "libx264": {"crf": "18"},
    "mpeg4": {"qmin": "2", "qmax": "2"},  # for builds without libx264; files are twice as large
}
# ffmpeg's numbers of the usual color space: matrix, primaries and curve of BT.709, levels from 16 to 235.
_BT709, _LIMITED = 1, 1


@dataclass(frozen=True, kw_only=True)
class Nearest:
    """The projection with the smallest distance."""

    statistics: StyleStatistics  # of its start
    label: Label  # of its start
    ws: Tensor  # [1, L, K] float32 on the CPU
    pixels: Tensor  # uint8 [C, R, R], made with the network's own noise maps
    distances: dict[str, float]  # by COLUMNS
    path: list[Tensor] | None  # its styles after each step, [S, K] each
    tried: dict[Label, float]  # perceptual distance by class


class TargetProjection:
    """The projection of one image, from the first step to the last file.

    size:      projections per pass; passes are padded to it
    settings:  everything that the result depends on, for the record
    """

    def __init__(self, outdir: Path, network: OpenNetwork, projector: Projector, target: Tensor, *, size: int,
                 settings: dict[str, Any]):
        self._outdir, self._network, self._projector, self._target = outdir, network, projector, target
        self._size, self._settings = size, settings
        # The settings of generate.py --projected-w, which then makes proj.png from projected_w.npz.
        self._generator = ImageGenerator(network.G, SynthesisSettings(),
                                         batch=choose_batch(network.G.img_resolution, projector.device))
        self._operators = "auto"
        self._identity = hashlib.sha256(json.dumps(settings).encode()).hexdigest()

    def project(self, candidates: Sequence[Label], *, keep_path: bool, pti_steps: int) -> dict[str, Any]:
        """Find the nearest projection and write its files; return the record. Raises UserError, OSError.

        An interrupted projection continues with the operators that it began with.
        """
        passes = [candidates[first:first + self._size] for first in range(0, len(candidates), self._size)]
        kept = (read_operators(self._state_path(number), self._identity_of(labels, keep_path))
                for number, labels in enumerate(passes))
        before = next((operators for operators in kept if operators is not None), None)
        device = self._projector.device.type
        with auto_means_as_before(before, device, f"the projection in {self._outdir}") as self._operators:
            return self._write(self._find(passes, keep_path=keep_path), pti_steps=pti_steps)

    def _find(self, passes: Sequence[Sequence[Label]], *, keep_path: bool) -> Nearest:
        """Project from the mean style of each class, or of a label; return the nearest."""
        steps = len(passes) * self._projector.settings.num_steps
        best, tried = None, {}
        with Progress(steps, "steps") as progress:
            for number, labels in enumerate(passes):
                found = self._find_among(number, labels, progress, keep_path=keep_path)
                tried |= {one.label: one.distances[COLUMNS[PERCEPTUAL]] for one in found}
                best = min([*([best] if best else []), *found], key=lambda one: one.distances[COLUMNS[PERCEPTUAL]])
        return replace(best, tried=tried)

    def _find_among(self, number: int, labels: Sequence[Label], progress: Progress, *,
                    keep_path: bool) -> list[Nearest]:
        starts = [measure_styles(self._network.G, self._network.classes.labels([label])[0]) for label in labels]
        filled = starts + starts[:1] * (self._size - len(starts))
        targets = self._target.expand(len(filled), -1, -1, -1)
        projection = Projection(self._projector, targets, filled, keep_path=keep_path)
        finish(projection, self._state_path(number), self._identity_of(labels, keep_path), progress.advance,
               operators=self._operators)
        ws = projection.styles()
        pixels = torch.cat(list(self._generator.render_all(ws)))
        distances = measure_pairs(targets, pixels, self._projector.similarity).tolist()
        return [Nearest(statistics=starts[slot], label=label, ws=ws[slot:slot + 1], pixels=pixels[slot], tried={},
                        distances=dict(zip(COLUMNS, distances[slot], strict=True)),
                        path=None if projection.path is None else [w[slot] for w in projection.path])
                for slot, label in enumerate(labels)]

    def _identity_of(self, labels: Sequence[Label], keep_path: bool) -> str:
        """Return the identity of a pass, which its saved states record."""
        return f"{self._identity} {labels} {keep_path}"

    def _write(self, nearest: Nearest, *, pti_steps: int) -> dict[str, Any]:
        """Write all files, after tuning the network if requested; return the record."""
        for name in (RECORD, VIDEO, TUNED_PROJECTION, TUNED_NETWORK):  # from an earlier command
            (self._outdir / name).unlink(missing_ok=True)
        save_picture(self._outdir / TARGET, self._target)
        save_picture(self._outdir / PROJECTION, nearest.pixels)
        save_projected_w(self._outdir / STYLES, nearest.ws.numpy())
        if nearest.path is not None:
            self._write_video(nearest.path)
        tuning = self._tune(nearest, pti_steps) if pti_steps else None
        record = self._record(nearest, tuning)
        with atomic_write(self._outdir / RECORD, text=True) as file:
            file.write(json.dumps(record, indent=1, allow_nan=False) + "\n")
        for path in self._outdir.glob(STATES):
            path.unlink()
        return record

    def _write_video(self, path: Sequence[Tensor]) -> None:
        """Show the target beside the image after each step."""
        with Progress(len(path), "frames") as progress, Video(self._outdir / VIDEO) as video:
            for first in range(0, len(path), self._generator.batch):
                ws = torch.stack(path[first:first + self._generator.batch]).expand(-1, self._network.G.num_ws, -1)
                for image in self._generator.render(ws, range(len(ws))):
                    video.add(torch.cat([self._target, image], dim=2))
                    progress.advance()

    def _tune(self, nearest: Nearest, steps: int) -> dict[str, Any]:
        settings = TuningSettings(num_steps=steps, seed=self._projector.settings.seed,
                                  locality_distance=nearest.statistics.deviation)
        with Progress(steps, "tuning steps") as progress:
            tuned = tune(self._network.G, nearest.ws, to_unit_range(self._target[None]),
                         self._projector.similarity, settings, lambda step, distance: progress.advance(),
                         label=nearest.label if isinstance(nearest.label, tuple) else None)
        save_tuned(self._outdir / TUNED_NETWORK, tuned, self._network, settings)
        pixels = ImageGenerator(tuned.G, SynthesisSettings(), batch=1).render(nearest.ws, [0])
        save_picture(self._outdir / TUNED_PROJECTION, pixels[0])
        distances = measure_pairs(self._target[None], pixels, self._projector.similarity)[0].tolist()
        return {"num_steps": steps, **_finite(dict(zip(COLUMNS, distances, strict=True)))}

    def _record(self, nearest: Nearest, tuning: dict[str, Any] | None) -> dict[str, Any]:
        classes = self._network.classes
        mean = nearest.statistics.mean.expand(1, self._network.G.num_ws, -1)
        start = measure_pairs(self._target[None], self._generator.render(mean, [0]), self._projector.similarity)[0]
        is_vector = isinstance(nearest.label, tuple)
        record = {**self._settings, "operators": self._operators,
                  "class": None if is_vector or nearest.label is None else classes.name(nearest.label),
                  **({"label": list(nearest.label)} if is_vector else {}), "distances": _finite(nearest.distances),
                  "distances_of_start": _finite(dict(zip(COLUMNS, start.tolist(), strict=True)))}
        if len(nearest.tried) > 1:
            record["perceptual_by_class"] = _finite({classes.name(i): value for i, value in nearest.tried.items()})
        if tuning is not None:
            record["pivotal_tuning"] = tuning
        return record

    def _state_path(self, number: int) -> Path:
        return self._outdir / STATES.replace("*", str(number))


def _finite(values: dict[str, float]) -> dict[str, float | None]:
    """Replace values that JSON cannot hold with null, such as the PSNR of equal images."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


class Video:
    """An H.264 video file; a context manager: the file appears at the end, complete, or not at all after an error.

    path:  in an existing folder; an existing file is replaced

    Frames lower than 256 pixels are enlarged by integer factors, and odd sizes made even by repeating the last line.
    All methods raise OSError with the file's name if the system reports an error.
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
        factor = -(-_LEAST_HEIGHT // pixels.shape[0])
        pixels = pixels.repeat(factor, axis=0).repeat(factor, axis=1)
        height, width = pixels.shape[:2]
        # Color is stored at half the resolution, so that sizes have to be even.
        pixels = np.pad(pixels, [(0, height % 2), (0, width % 2), (0, 0)], mode="edge")
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
        picture = picture.reformat(format="yuv420p", dst_colorspace=_BT709, dst_color_range=_LIMITED)
        picture.pts = self._count
        with _naming(self._path):
            if self._stream is None:
                self._open_stream(picture.width, picture.height)
            self._container.mux(self._stream.encode(picture))
        self._count += 1

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
        """Write the frames that the encoder still buffers."""
        if kind is not None:
            return
        if self._stream is None:
            raise ValueError(f"{self._path} has no frames; expected one or more")
        self._container.mux(self._stream.encode())


@contextmanager
def _whole_container(path: Path) -> Iterator["OutputContainer"]:
    """Open a temporary MP4 file; it is renamed to `path` at the end, unless there is an error."""
    import av

    with atomic_write(path) as file:
        # By name, since ffmpeg reads the file again to move the index to the front.
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
    """Make errors of the system name `path` instead of a temporary file."""
    try:
        yield
    except OSError as error:
        code = error.errno or (errno.EISDIR if isinstance(error, IsADirectoryError) else errno.EIO)
        raise OSError(code, os.strerror(code), os.fspath(path)) from error
