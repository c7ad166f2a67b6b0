"""Keep count of what became of each image, in a few bytes an image."""

import hashlib
from array import array
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from imagesets.duplicates import DIGEST_SIZE
from imagesets.pixels.depth import Values

TOO_SMALL = "smaller than the wide crop"  # as it is called where images are decoded; such an image is readable
_UNSEEN = -1


class Tally:
    """What became of the images of a source that were converted, by their index there."""

    def __init__(self, num_images: int):
        self._codes = np.full(num_images, _UNSEEN, dtype=np.int16)
        self._outcomes: dict[tuple[str | None, tuple[str, ...]], int] = {}  # (reason it is bad, notes) -> code
        self._digests = bytearray()
        self._hash = hashlib.sha256()
        self.kept = array("q")
        self.values: dict[str, Values] = {}  # kind -> what the kept images of more than 8 bits held
        self.details: dict[int, str] = {}  # of bad images whose reason does not say all, see BadImage
        self.side: int | None = None  # pixels of the kept images, which are squares of one size

    def add_kept(self, index: int, side: int, digest: bytes, notes: tuple[str, ...],
                 values: Values | None = None) -> None:
        """digest: sha256 of the source's bytes"""
        self.side = side
        self._codes[index] = self._code(None, notes)
        self._digests += digest
        self._hash.update(digest)
        self.kept.append(index)
        if values is not None:
            so_far = self.values.get(values.kind, replace(values, count=0))
            self.values[values.kind] = replace(so_far, largest=max(so_far.largest, values.largest),
                                               count=so_far.count + 1)

    def add_bad(self, index: int, reason: str, detail: str = "") -> None:
        self._codes[index] = self._code(reason, ())
        if detail:
            self.details[index] = detail

    @property
    def digests(self) -> np.ndarray:
        """uint8 [kept, 32]"""
        return np.frombuffer(bytes(self._digests), dtype=np.uint8).reshape(-1, DIGEST_SIZE)

    @property
    def content_hash(self) -> str:
        """sha256 of the kept images' digests in order."""
        return self._hash.hexdigest()

    def unreadable(self) -> dict[str, int]:
        """Return reasons, sorted, with the number of their images."""
        return {reason: len(indices) for reason, indices in self.bad() if reason != TOO_SMALL}

    def bad(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield reasons, sorted, with the ascending indices of their images."""
        for reason in sorted({reason for reason, _ in self._outcomes if reason is not None}):
            yield reason, self._where(lambda outcome, reason=reason: outcome[0] == reason)

    def notes(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield notes, sorted, with the ascending indices of their images."""
        for note in sorted({note for _, notes in self._outcomes for note in notes}):
            yield note, self._where(lambda outcome, note=note: note in outcome[1])

    def _code(self, reason: str | None, notes: tuple[str, ...]) -> int:
        return self._outcomes.setdefault((reason, notes), len(self._outcomes))

    def _where(self, matches: Callable[[tuple[str | None, tuple[str, ...]]], bool]) -> np.ndarray:
        codes = [code for outcome, code in self._outcomes.items() if matches(outcome)]
        return np.flatnonzero(np.isin(self._codes, codes))
