"""What every archive of images looks like to the conversion."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from imagesets.reader import NO_LABEL


class Loader(Protocol):
    """Turns an item into an image, in any process; picklable and small."""

    def __call__(self, item: Any, limit: int | None = None) -> bytes | np.ndarray:
        """Return an encoded image, or the pixels uint8/uint16 [H, W] or [H, W, C]; raises BadImage.

        limit: so many bytes of an encoded image are enough
        """


class Items(Protocol):
    """The items of the wanted images, in their order; small where the archive can be read anywhere."""

    def __call__(self, wanted: np.ndarray) -> Iterator[Any]:
        """wanted: bool [N]"""


@dataclass(frozen=True, kw_only=True)
class Source:
    """The N images of an archive, in the order in which they are numbered.

    kind:      for people, as "image folder"
    name:      of the file or folder, without its path
    names:     of the images inside
    labels:    None, int64 [N] with NO_LABEL where there is none, or float32 [N, D] with NaN there
    classes:   names of the integer labels, or None
    groups:    None, or what must not be split; None for an image alone
    items:     what `load` takes
    shape:     (width, height, channels) of all images where the archive says so
    has_files: its images are files, which a table may name
    ignored:   other members, which are no images by their names
    not_chosen: images that --include and --exclude leave out
    left_out:  images of other splits, by split
    origin:    what a ready data set says of its own origin
    hints:     advice on what was found beside the images
    is_ready:  a data set with a dataset.json, from which labels and groups come
    fault:     why labels cannot be taken from it: where its dataset.json lies, or other classes in another part
    parts:     of several folders and zips that were joined: they themselves, in order
    """
    kind: str
    name: str
    names: Sequence[str]
    items: Items
    load: Loader
    labels: np.ndarray | None = None
    classes: list[str] | None = None
    groups: Sequence[str | None] | None = None
    shape: tuple[int, int, int] | None = None
    has_files: bool = False
    ignored: Sequence[str] = ()
    not_chosen: Sequence[str] = ()
    left_out: Mapping[str, int] = field(default_factory=dict)
    origin: Mapping[str, Any] = field(default_factory=dict)
    hints: Sequence[str] = ()
    is_ready: bool = False
    fault: str | None = None
    parts: Sequence["Source"] = ()

    def __len__(self) -> int:
        return len(self.names)

    @property
    def has_vectors(self) -> bool:
        return self.labels is not None and self.labels.ndim == 2

    def unlabelled(self) -> np.ndarray:
        """Return bool [N]: which images have no label."""
        return missing_labels(self.labels, len(self))


def missing_labels(labels: np.ndarray | None, count: int) -> np.ndarray:
    """Return bool [count]: which labels are missing, all where there are none."""
    if labels is None:
        return np.ones(count, dtype=bool)
    return labels == NO_LABEL if labels.ndim == 1 else np.isnan(labels).any(axis=1)
