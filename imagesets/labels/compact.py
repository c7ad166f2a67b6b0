"""Hold many short texts in little memory."""

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence


class CompactTexts(Sequence[str]):
    """Texts one after the other in one buffer: their UTF-8 bytes and 8 more each, where a str takes 50 more."""

    def __init__(self, texts: Iterable[str] = ()):
        self._buffer = bytearray()
        self._ends = array("q", [0])
        for text in texts:
            self.append(text)

    def append(self, text: str) -> None:
        self._buffer += text.encode()
        self._ends.append(len(self._buffer))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        """Return one text; slices are not offered."""
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(f"text {index} of {len(self)}")
        return self._buffer[self._ends[index]:self._ends[index + 1]].decode()

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))

    def find_sorted(self, text: str) -> int | None:
        """Return where `text` stands, or None; the texts must be in ascending order."""
        index = bisect_left(self, text)
        return index if index < len(self) and self[index] == text else None
