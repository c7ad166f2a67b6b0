"""Project one image: write the files of the original's projector, and distances; with an MP4 of all steps."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

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
from latent.video import Video
from torch_utils.images import to_unit_range
from torch_utils.ops.compiled import auto_means_as_before

# The files in --outdir.
TARGET, PROJECTION, STYLES = "target.png", "proj.png", "projected_w.npz"
VIDEO, RECORD = "proj.mp4", "projection.json"
TUNED_PROJECTION, TUNED_NETWORK = "proj-pti.png", "network-pti.safetensors"
STATES, LOCK = "projection-state-*.pt", "lock"


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
