"""Project the images of a set, pass by pass; a pass that is stopped goes on where its last state was saved."""

import hashlib
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dnnlib.cli import UserError
from dnnlib.progress import Progress
from imagesets.pixels.decode import BadImage
from imagesets.pixels.resize import PixelSpec
from imagesets.reader import ImageSet
from latent.classes import Label
from latent.network import OpenNetwork
from latent.pieces import Pieces
from latent.projecting.distances import COLUMNS, measure_pairs
from latent.projecting.kept_state import finish
from latent.projecting.projection import Projector, Start, find_start
from latent.projecting.set_targets import TargetImage
from latent.projecting.target_image import prepare
from latent.sampling import Look, Painter, choose_batch


class Lane(NamedTuple):
    """A projection among those of a pass: an image, and the label that it starts from."""

    target: int  # index among the targets
    start: Label


@dataclass(frozen=True, kw_only=True)
class ProjectionPlan:
    """What is projected, in which passes.

    targets:  the images
    size:     projections of a pass; the last pass is filled up, so that all are computed alike
    """

    targets: Sequence[TargetImage]
    size: int

    @cached_property
    def lanes(self) -> list[Lane]:
        return [Lane(index, start) for index, target in enumerate(self.targets) for start in target.starts]

    @property
    def num_passes(self) -> int:
        return -(-len(self.lanes) // self.size)

    def lanes_of(self, number: int) -> list[Lane]:
        return self.lanes[number * self.size:(number + 1) * self.size]


class SetWorker:
    """Computes passes of a plan, and keeps them as pieces:

        w          [n, S, K] float32, the styles          targets      [n, C, R, R] uint8
        reasons    [n] texts, why there is nothing, or "" projections  [n, C, R, R] uint8
        distances  [n, 4] float32, as distances.COLUMNS
    """

    def __init__(self, images: ImageSet, spec: PixelSpec, network: OpenNetwork, projector: Projector,
                 plan: ProjectionPlan):
        self._images, self._spec, self._network, self._projector, self._plan = images, spec, network, projector, plan
        G = network.G
        # As generate.py --projected-w does it, so that its images are the same.
        self._painter = Painter(G, Look(), batch=choose_batch(G.img_resolution, projector.device))
        self._starts: dict[Label, Start] = {}

    def make(self, pieces: Pieces, numbers: Sequence[int], *, shown: bool) -> None:
        """Compute passes and keep them. shown: whether to show progress"""
        steps = len(numbers) * self._projector.settings.num_steps
        with Progress(steps, f"steps of {self._plan.size} images") if shown else nullcontext() as progress:
            for number in numbers:
                pieces.save(number, self._make_piece(pieces, number, progress.advance if shown else _ignore))

    def _make_piece(self, pieces: Pieces, number: int, on_steps: Callable[[int], None]) -> dict[str, np.ndarray]:
        lanes = self._plan.lanes_of(number)
        targets = self._read_all(lanes)
        good = [slot for slot, target in enumerate(targets) if isinstance(target, Tensor)]
        G, styles = self._network.G, 1 if self._projector.settings.space == "w" else self._network.G.num_ws
        shape = (len(lanes), G.img_channels, G.img_resolution, G.img_resolution)
        reasons = ["" if isinstance(target, Tensor) else target for target in targets]
        piece = {"w": np.zeros((len(lanes), styles, G.w_dim), np.float32), "reasons": np.array(reasons),
                 "targets": np.zeros(shape, np.uint8), "projections": np.zeros(shape, np.uint8),
                 "distances": np.full((len(lanes), len(COLUMNS)), np.nan, np.float32)}
        if not good:
            on_steps(self._projector.settings.num_steps)
            return piece
        filled = good + good[:1] * (self._plan.size - len(good))  # all passes are of one size
        pixels = torch.stack([targets[slot] for slot in filled])
        projection = self._projector.begin(pixels, [self._start(lanes[slot].start) for slot in filled])
        with pieces.writing():
            finish(projection, pieces.state_path(number), hashlib.sha256(pixels.numpy()).hexdigest(), on_steps)
        ws = projection.styles().clone()
        lost = ~ws.isfinite().all(dim=(1, 2))
        ws[lost] = 0
        projected = torch.cat(list(self._painter.show(ws)))
        distances = measure_pairs(pixels, projected, self._projector.similarity)
        distances[lost] = torch.inf  # farther than that of another class
        for name, values in (("w", ws[:, :styles]), ("targets", pixels), ("projections", projected),
                             ("distances", distances)):
            piece[name][good] = values[:len(good)].numpy()
        for slot, is_lost in zip(good, lost.tolist()):
            reasons[slot] = "its distance became no finite number" if is_lost else ""
        return {**piece, "reasons": np.array(reasons)}

    def _read_all(self, lanes: Sequence[Lane]) -> list[Tensor | str]:
        """Return what `_read` does for each lane; say which images are left out."""
        read = {index: self._read(self._plan.targets[index]) for index in dict.fromkeys(lane.target for lane in lanes)}
        for index, found in read.items():
            target = self._plan.targets[index]
            if isinstance(found, str) and Lane(index, target.starts[0]) in lanes:  # told once
                print(f"{target.name} is left out: {found}", file=sys.stderr)
        return [read[lane.target] for lane in lanes]

    def _read(self, target: TargetImage) -> Tensor | str:
        """Return the pixels, uint8 [C, R, R], or in a few words why there are none."""
        try:
            return prepare(self._images.read(target.name), self._spec)
        except BadImage as error:
            return f"{error.reason}: it {error.detail}" if error.detail else error.reason
        except UserError as error:  # a damaged member of a zip, a file without permission
            return str(error)

    def _start(self, label: Label) -> Start:
        if label not in self._starts:
            self._starts[label] = find_start(self._network.G, self._network.classes.labels([label])[0])
        return self._starts[label]


def _ignore(count: int) -> None:
    pass
