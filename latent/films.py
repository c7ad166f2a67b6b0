"""What the commands of explore.py that make films share: their options, and frames made in all processes.

Legend: L num_ws, K w_dim, C R channels and side of an image.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dnnlib.cli import UserError, UserPath
from dnnlib.text import plural
from generation.command import flag
from generation.network import Label, OpenNetwork
from latent.exploration import Explorer, ExploreRequest
from latent.points import NO_ORIGINALS, Point, blank_like, find_originals
from latent.video import FORMATS, FRAMES_PER_SECOND, MP4, check_film, grid_of, parse_formats

FILM = "Film"  # heading of the help

_MOST_FRAMES = 1_000_000


@dataclass(frozen=True, kw_only=True)
class FilmRequest(ExploreRequest):
    """The options of commands that make films.

    Raises UserError if one is out of range.
    """

    frames: int = flag(FILM, "INT", "Frames from one point to the next.", default=60)
    fps: int = flag(FILM, "INT", "Frames per second.", default=FRAMES_PER_SECOND)
    formats: str = flag(FILM, "LIST", f"Formats of the film: {', '.join(FORMATS)}.", default=MP4)
    originals: str | None = flag(
        FILM, "PATH", "Images that saved styles are projections of, shown beside the film: the data set that "
        f"projector.py projected; {NO_ORIGINALS} shows none. [default: target.png beside a file of projector.py "
        "--target]",
        type=UserPath())

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.frames <= _MOST_FRAMES:
            raise UserError(f"--frames is {self.frames}; expected 1 to {_MOST_FRAMES}, usually 60")
        parse_formats(self.formats)
        check_film(self.fps, 1, 1)

    def check_frame(self, network: OpenNetwork, cells: int, points: Sequence[Point], *, sides: int) -> None:
        """Raise UserError if frames would be too large for a film, or an original cannot be shown.

        cells:  films in a frame
        sides:  originals beside each
        """
        side = network.G.img_resolution
        width = side * (1 + sides * (originals_of(network, self, [points], quiet=True) is not None))
        columns, rows = grid_of(cells, side, width)
        check_film(self.fps, columns * width, rows * side)


def styles_of_points(explorer: Explorer, points: Sequence[Point], labels: Sequence[Label]) -> Tensor:
    """Return the styles of points, those of seeds truncated as --trunc says: float32 [P, L, K] on the CPU.

    labels: one per point; only seeds use theirs
    """
    return torch.cat([explorer.styles([point.seed], [label]) if point.style is None else point.style[None]
                      for point, label in zip(points, labels, strict=True)])


def originals_of(network: OpenNetwork, request: FilmRequest, lists: Sequence[Sequence[Point]], *,
                 quiet: bool = False) -> list[list[Tensor]] | None:
    """Return the original of each point of each film, uint8 [C, R, R], white for none; None if there are none at all.

    Prints a note on those not found, unless `quiet`. Raises UserError if one was asked for and is missing.
    """
    found, notes = find_originals([point for points in lists for point in points], request.originals, network.G)
    for note in [] if quiet else notes:
        print(note, file=sys.stderr)
    if all(image is None for image in found):
        return None
    images = iter(blank_like(found))
    return [[next(images) for _ in points] for points in lists]


def describe_film(num_frames: int, fps: int, cells: int) -> str:
    """Return "181 frames, 6.0 s", or "181 frames, 6.0 s, 4 films"."""
    several = "" if cells == 1 else f", {cells} films"
    return f"{plural(num_frames, 'frame')}, {num_frames / fps:.1f} s{several}"


def film_frames(explorer: Explorer, num_frames: int, num_cells: int, style: Callable[[int, int], Tensor],
                maps: Callable[[int], Mapping[str, Tensor]] | None = None) -> Iterator[list[Tensor]]:
    """Yield the images of all cells of each frame on the main process, uint8 [C, R, R] each; nothing on others.

    style:  takes the numbers of a frame and a cell, returns a style [L, K]
    maps:   takes the number of a frame, returns its noise maps, [1, 1, r, r] by name; None = the network's own

    No more than a few frames are in memory.
    """
    def render(rows: range) -> Tensor:
        places = [divmod(row, num_cells) for row in rows]
        ws = torch.stack([style(*place) for place in places])
        if maps is None:
            return explorer.render(ws)
        batch, parts = explorer.generator.batch, []
        for first in range(0, len(ws), batch):
            each = [maps(frame) for frame, _ in places[first:first + batch]]
            noise = {name: torch.cat([one[name] for one in each]) for name in each[0]}
            some = ws[first:first + batch]
            parts.append(explorer.generator.render(some, range(len(some)), noise))
        return torch.cat(parts)

    pending: list[Tensor] = []
    for images in explorer.images_of(num_frames * num_cells, render, "images"):
        pending += images.unbind()
        while len(pending) >= num_cells:
            yield pending[:num_cells]
            del pending[:num_cells]
