"""Films between images: straight lines in w, great circles in z, and noise that drifts.

Legend: P points, L num_ws, K w_dim, Z z_dim, R side of an image; t runs from 0 to 1 between two points.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import click
import numpy as np
import torch
from torch import Tensor, nn

from dnnlib.cli import UserError
from dnnlib.files import atomic_write
from dnnlib.text import shorten
from generation.command import flag
from generation.image_generator import ImageGenerator, SynthesisSettings, latents_of, save_projected_w
from generation.network import Label, OpenNetwork
from latent.exploration import NETWORK, Explorer, make_explore_command
from latent.films import FilmRequest, describe_film, film_frames, originals_of, styles_of_points
from latent.points import EXAMPLE, Point, labels_of_points, parse_points
from latent.video import Film, parse_formats, tile
from torch_utils.images import MOST_PIXELS, save_grid
from torch_utils.seeding import generator_for, seed_for
from training.generator import noise_maps

MOTION = "Motion"  # heading of the help
SPACES, EASINGS, NOISES = ("z", "w"), ("linear", "smooth"), ("const", "none", "drift")
W, SMOOTH, DRIFT = "w", "smooth", "drift"
STEM = "interpolation"  # of the files in --outdir
POINTS_SHEET = "points.png"

_PARALLEL = 1e-9  # sine of an angle below which two directions count as equal or opposite


# Paths between two points


def ease(t: float) -> float:
    """Return 3 t^2 - 2 t^3, which starts and ends at rest."""
    return t * t * (3 - 2 * t)


def straight_line(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Return (1 - t) a + t b, exactly a and b at the ends; computed in float64, of a's dtype."""
    if t in (0, 1):
        return b if t else a
    return ((1 - t) * a.double() + t * b.double()).to(a.dtype)


def great_circle(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Return the point at t on the great circle from a to b (Shoemake 1985, slerp), exactly a and b at the ends.

    a, b:  of any shape, the same, not 0; they count as one vector

    The direction turns with constant angular speed, and the norm changes linearly (a mapping network normalizes z, so
    that only the direction matters to it). Between opposite directions, where every way is equally long, the way leads
    past the coordinate axis that is nearest to a right angle.
    """
    if t in (0, 1):
        return b if t else a
    start, end = a.double().flatten(), b.double().flatten()
    norms = start.norm(), end.norm()
    start, end = start / norms[0], end / norms[1]
    angle = _angle(start, end)
    side = end - (start @ end) * start  # at a right angle to start
    if side.norm() < _PARALLEL:
        side = torch.zeros_like(start)
        side[start.abs().argmin()] = 1
        side = side - (start @ side) * start
    side = side / side.norm()
    direction = math.cos(t * angle) * start + math.sin(t * angle) * side
    return (((1 - t) * norms[0] + t * norms[1]) * direction).reshape(a.shape).to(a.dtype)


def angle_between(a: Tensor, b: Tensor) -> float:
    """Return the angle between two vectors of the same shape, in radians."""
    start, end = a.double().flatten(), b.double().flatten()
    return _angle(start / start.norm(), end / end.norm())


def _angle(start: Tensor, end: Tensor) -> float:
    """Return the angle between unit vectors, accurate near 0 and pi too (Kahan 2006, section 12)."""
    return 2 * math.atan2(float((start - end).norm()), float((start + end).norm()))


@dataclass(frozen=True)
class Moment:
    """A place on the way through points: between points `start` and `end`, at t."""

    start: int
    end: int
    t: float


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """The frames of a way through points, each segment with the same number of frames.

    Frame 0 is the first point. Without a loop, the last frame is the last point; with a loop, a segment leads from the
    last point back to the first, whose frame is not repeated.
    """

    points: int  # 2 or more
    frames: int  # per segment
    easing: str = "linear"
    loop: bool = False

    @property
    def segments(self) -> list[tuple[int, int]]:
        """The first and last point of each segment."""
        last = self.points if self.loop else self.points - 1
        return [(start, (start + 1) % self.points) for start in range(last)]

    def __len__(self) -> int:
        return len(self.segments) * self.frames + (not self.loop)

    def at(self, frame: int) -> Moment:
        """Return where a frame is."""
        segment = min(frame // self.frames, len(self.segments) - 1)
        t = (frame - segment * self.frames) / self.frames
        return Moment(*self.segments[segment], ease(t) if self.easing == SMOOTH else t)

    def frame_of(self, point: int) -> int:
        """Return the frame that shows a point itself."""
        return point * self.frames


class StyleTrack:
    """Straight lines between styles [P, L, K]."""

    def __init__(self, styles: Tensor):
        self.styles = styles

    def at(self, moment: Moment) -> Tensor:
        """Return a style, float32 [L, K]."""
        return straight_line(self.styles[moment.start], self.styles[moment.end], moment.t)

    def measure(self, start: int, end: int) -> dict[str, float]:
        """Return how far apart two points are: root mean square over the layers of |w - w'|."""
        difference = self.styles[start].double() - self.styles[end].double()
        return {"distance": float(difference.square().sum(dim=1).mean().sqrt())}


class LatentTrack:
    """Great circles between the latents of seeds, mapped to styles; labels change along straight lines.

    labels: float32 [P, c_dim]
    """

    def __init__(self, generator: ImageGenerator, seeds: Sequence[int], labels: Tensor):
        self._generator, self._labels = generator, labels
        self.latents = latents_of(seeds, generator.G.z_dim)  # float64 [P, Z]
        # Halfway between two labels, the center of truncation is halfway between theirs.
        self._centers = generator.centers_of(labels).cpu() if generator.pulls_to_class else None

    def at(self, moment: Moment) -> Tensor:
        """Return a style, float32 [L, K] on the CPU."""
        z = great_circle(self.latents[moment.start], self.latents[moment.end], moment.t)
        label, center = (None if rows is None else straight_line(rows[moment.start], rows[moment.end], moment.t)[None]
                         for rows in (self._labels, self._centers))
        return self._generator.map_latents(z[None], label, center)[0].cpu()

    def measure(self, start: int, end: int) -> dict[str, float]:
        """Return the angle between the latents of two points."""
        return {"angle_degrees": math.degrees(angle_between(self.latents[start], self.latents[end]))}


class NoiseDrift:
    """Noise maps that move on great circles between random maps, one set for each point.

    All maps, at all times, have mean 0 and variance 1 exactly, as the network saw in training on average.
    """

    def __init__(self, synthesis: nn.Module):
        self._sides = {name: len(values) for name, values in noise_maps(synthesis).items()}
        self._device = next(synthesis.parameters()).device
        self._maps = lru_cache(maxsize=2)(self._draw)  # of the segment's ends; those of 1024x1024 take 11 MB a point

    def _draw(self, point: int) -> dict[str, Tensor]:
        maps = {}
        for name, side in self._sides.items():
            stream = generator_for(seed_for(0, 0, point, f"interpolation/{name}"))
            drawn = torch.randn(side, side, generator=stream, dtype=torch.float64)
            drawn -= drawn.mean()
            maps[name] = drawn / drawn.square().mean().sqrt()
        return maps

    def at(self, moment: Moment) -> dict[str, Tensor]:
        """Return the maps by their names in the synthesis network: float32 [1, 1, r, r] on its device."""
        start, end = self._maps(moment.start), self._maps(moment.end)
        return {name: great_circle(start[name], end[name], moment.t).float().to(self._device)[None, None]
                for name in self._sides}


# The command


@dataclass(frozen=True, kw_only=True)
class InterpolateRequest(FilmRequest):
    """The options of explore.py interpolate.

    Raises UserError if they contradict each other, one is missing, or a number is out of range.
    """

    points: tuple[str, ...] | None = flag(
        NETWORK, "LIST", f"Points of the film: seeds, and npz files with styles, such as {EXAMPLE}, in any mix. Can be "
        "repeated: the films of several lists are shown as a grid. --trunc does not change the styles of files.",
        type=str, multiple=True)
    seeds: str | None = flag(NETWORK, "LIST", "The same as --points, for seeds.")
    class_: str | None = flag(
        NETWORK, "LIST", "Class of the seeds, by name or number, if the network is class-conditional: one for all, or "
        "one for each point, such as nv,mel,nv. Between two classes, the film passes through mixes of them.")
    space: str = flag(
        MOTION, "|".join(SPACES), "w: straight lines between styles. z: great circles between latents, only for seeds.",
        type=click.Choice(SPACES), default=W)
    easing: str = flag(
        MOTION, "|".join(EASINGS), "linear: constant speed. smooth: the film rests at each point.",
        type=click.Choice(EASINGS), default=EASINGS[0])
    loop: bool | None = flag(MOTION, None, "Lead back to the first point, for a film that repeats without a jump.")
    noise_mode: str = flag(
        MOTION, "|".join(NOISES), "Noise inputs, which add fine detail: const, the network's own; none; drift, noise "
        "that changes slowly, so that texture moves too.", type=click.Choice(NOISES), default=NOISES[0])

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.points and self.seeds is not None:
            raise UserError("--points and --seeds are both given; expected one of them")
        if not self.points and self.seeds is None:
            raise UserError(f"--points is missing; expected seeds and npz files with styles, such as {EXAMPLE}")

    @property
    def settings(self) -> SynthesisSettings:
        return SynthesisSettings(truncation=self.trunc, center=self.trunc_center,
                                 noise_mode="const" if self.noise_mode == DRIFT else self.noise_mode)

    def lists(self, network: OpenNetwork) -> list[list[Point]]:
        """Return the points of each film. Raises UserError if films differ in their number, or have only one."""
        option = "--points" if self.points else "--seeds"
        lists = [parse_points(text, network.G, option) for text in self.points or (self.seeds,)]
        for points in lists:
            if len(points) < 2:
                raise UserError(f"{option} names only {points[0].name}; expected 2 points or more, such as {EXAMPLE}")
            if len(points) != len(lists[0]):
                raise UserError(f"{option} has lists of {len(lists[0])} and {len(points)} points; expected equally "
                                "many in all films of a grid")
            saved = next((point for point in points if point.seed is None), None)
            if self.space != W and saved is not None:
                raise UserError(f"--space is {self.space}, but {saved.name} is a saved style, which has no latent; "
                                f"expected --space={W}, or only seeds")
        return lists

    def choose_labels(self, network: OpenNetwork) -> tuple[Label, ...]:
        """Return the label of all seeds, or one for each place in the lists of points. Raises UserError."""
        return tuple(labels_of_points(self.lists(network), network.classes, self.class_, self.label))

    def check(self, network: OpenNetwork) -> None:
        lists = self.lists(network)
        self.check_frame(network, len(lists), [point for points in lists for point in points], sides=2)


def run_interpolate(explorer: Explorer, request: InterpolateRequest) -> None:
    """Make the film, and write it with its points."""
    lists = request.lists(explorer.network)
    labels = explorer.labels_of(len(lists[0]))
    timeline = Timeline(points=len(lists[0]), frames=request.frames, easing=request.easing, loop=bool(request.loop))
    styles = [styles_of_points(explorer, points, labels) for points in lists]  # [P, L, K] each
    rows = explorer.network.classes.labels(labels)
    tracks = [StyleTrack(ws) if request.space == W else
              LatentTrack(explorer.generator, [point.seed for point in points], rows)
              for points, ws in zip(lists, styles, strict=True)]
    drift = NoiseDrift(explorer.G.synthesis) if request.noise_mode == DRIFT else None
    frames = film_frames(explorer, len(timeline), len(tracks), lambda frame, cell: tracks[cell].at(timeline.at(frame)),
                         None if drift is None else lambda frame: drift.at(timeline.at(frame)))
    if not explorer.is_main:
        for _ in frames:  # take part in making them
            pass
        return
    originals = originals_of(explorer.network, request, lists)
    point_at = {timeline.frame_of(point): point for point in range(timeline.points)}
    shown: list[list[Tensor]] = []  # the images of each point, in all films
    with Film(explorer.outdir / STEM, parse_formats(request.formats), frames_per_second=request.fps) as film:
        for number, images in enumerate(frames):
            moment = timeline.at(number)
            film.add(tile(images if originals is None else [
                torch.cat([own[moment.start], image, own[moment.end]], dim=2)
                for image, own in zip(images, originals, strict=True)]))
            if number in point_at and len(shown) < _most_shown(images):
                shown.append(images)
    names = [[_describe_point(explorer, point, label) for point, label in zip(points, labels, strict=True)]
             for points in lists]
    alone = len(lists) == 1
    save_grid(explorer.outdir / POINTS_SHEET, [image for cell in zip(*shown, strict=True) for image in cell],
              columns=len(shown), rows=len(lists), headings=names[0][:len(shown)] if alone else None,
              labels=None if alone else [f"film {number}" for number in range(len(lists))])
    save_projected_w(explorer.outdir / f"{STEM}.npz", torch.cat(styles).numpy(),
                     film=np.repeat(np.arange(len(lists)), timeline.points),
                     point=np.array([name for some in names for name in some]))
    record = {**explorer.describe(), "space": request.space, "easing": request.easing, "loop": timeline.loop,
              "noise_mode": request.noise_mode, "frames_per_segment": request.frames, "frames_per_second": request.fps,
              "num_frames": len(timeline), "originals": originals is not None, "films": [
                  {"points": some, "segments": [{"from": some[start], "to": some[end], **track.measure(start, end)}
                                                for start, end in timeline.segments]}
                  for some, track in zip(names, tracks, strict=True)]}
    with atomic_write(explorer.outdir / f"{STEM}.json", text=True) as file:
        file.write(json.dumps(record, indent=1, allow_nan=False) + "\n")
    for path in film.paths:
        click.echo(f"{path}: {describe_film(len(timeline), request.fps, len(lists))} through {shorten(names[0])}")


def _describe_point(explorer: Explorer, point: Point, label: Label) -> str:
    """Return "seed 5 mel", or the name of a saved style."""
    return point.name if point.seed is None else f"{point.name} {explorer.name_of(label)}".strip()


def _most_shown(images: Sequence[Tensor]) -> int:
    """Return how many points fit on a sheet."""
    return max(MOST_PIXELS // (len(images) * images[0].shape[1] * images[0].shape[2]), 1)


HELP = """Make a film between images: seeds, or real images that projector.py projected.

\b
python explore.py interpolate --network=N.safetensors --points=0,7,3 --class=melanoma --loop --outdir=film
python explore.py interpolate --network=N.safetensors --points=0,1,2 --class=nv,mel,bkl --space=z --outdir=film
python explore.py interpolate --network=N.safetensors --points=a/projected_w.npz,b/projected_w.npz --outdir=film
python explore.py interpolate --network=N.safetensors --points=latents.npz:0-3 --originals=heldout.zip --outdir=film

Writes interpolation.mp4, points.png with the points, interpolation.npz with their styles (for generate.py
--projected-w), and interpolation.json. The frame of a seed is the image that generate.py makes of it, unless noise
drifts.
"""


def make_interpolate_command() -> click.Command:
    """Return the command explore.py interpolate."""
    return make_explore_command("interpolate", InterpolateRequest, run_interpolate, HELP,
                                "Make a film between seeds or projected images.")
