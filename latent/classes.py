"""Find the classes of a network by name or number, and the images that each is to have."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dnnlib.cli import UserError
from imagesets.class_names import find_class, known_classes
from imagesets.class_shares import class_counts

_COUNTS_SYNTAX = "expected NAME:COUNT,NAME:COUNT,..., such as benign:5000,melanoma:5000"


class Classes:
    """The classes that a network makes images of; none where it is unconditional.

    count:            number of classes, c_dim
    names:            of the classes, or None when they have numbers alone
    training_counts:  images of each class that the network learned from, or None when the file does not say
    """

    def __init__(self, c_dim: int, info: Mapping[str, Any]):
        """Take what a network file says of its classes; what does not fit its number of classes counts as not said."""
        self.count = c_dim
        names, counts = info.get("classes"), info.get("class_counts")
        self.names = list(names) if _is_list_of(names, str, c_dim) and len(set(names)) == c_dim else None
        self.training_counts = list(counts) if _is_list_of(counts, int, c_dim) and sum(counts) > 0 else None

    def name(self, index: int) -> str:
        return str(index) if self.names is None else self.names[index]

    def find(self, flag: str, text: str) -> int:
        """Return the number of a class. A name wins over a number. Raises UserError."""
        return find_class(text.strip(), self.names, self.count, flag=flag)

    def choose(self, text: str | None) -> list[int | None]:
        """Return the classes of --class: one, several with commas between them, or all; [None] when there are none.

        Raises UserError, also when a class is missing or not to be given.
        """
        if self.count == 0:
            if text is not None:
                raise UserError(f"--class is {text}, but this network was trained without classes; leave --class out")
            return [None]
        if text is None:
            raise UserError("--class is missing, and this network makes images of a class; expected "
                            f"{known_classes(self.names, self.count)}")
        if self.names is not None and text.strip() in self.names:
            return [self.names.index(text.strip())]
        if text.strip() == "all":
            return list(range(self.count))
        chosen = [self.find("--class", part) for part in text.split(",")]
        if len(set(chosen)) < len(chosen):
            raise UserError(f"--class={text} names a class twice; expected each once")
        return chosen

    def labels(self, classes: Sequence[int | None]) -> Tensor:
        """Return one-hot labels: float32 [N, c_dim]; [N, 0] of an unconditional network."""
        labels = torch.zeros(len(classes), self.count)
        for row, index in enumerate(classes):
            if index is not None:
                labels[row, index] = 1
        return labels

    def divide(self, count: int | None, text: str | None) -> list[int] | None:
        """Return the images of each class in a set, [c_dim]; None of an unconditional network.

        count:  --count, images in all; None for the sum of --classes
        text:   --classes; None for the shares of training, by largest remainder

        Raises UserError where the two do not tell how many, or contradict each other.
        """
        if count is not None and count < 1:
            raise UserError(f"--count is {count}; expected at least 1")
        if self.count == 0:
            if text is not None:
                raise UserError(f"--classes is {text}, but this network was trained without classes; leave it out")
            if count is None:
                raise UserError("--count is missing; expected the number of images for --zip, such as --count=10000")
            return None
        if text is not None:
            return self._given_counts(count, text)
        if count is None:
            raise UserError("--count is missing; expected the number of images for --zip, such as --count=10000, or "
                            "--classes with the number of each class")
        if self.training_counts is None:
            raise UserError("--classes is missing, and the network file does not say how many images of each class it "
                            f"learned from; {_COUNTS_SYNTAX}")
        return class_counts(self.training_counts, count)

    def _given_counts(self, count: int | None, text: str) -> list[int]:
        counts = [0] * self.count
        seen = set()
        for part in text.split(","):
            name, _, number = part.rpartition(":")
            if not name or not re.fullmatch(r"[0-9]{1,12}", number.strip()):
                raise UserError(f"--classes has {part.strip()!r}; {_COUNTS_SYNTAX}")
            index = self.find("--classes", name)
            if index in seen:
                raise UserError(f"--classes names {self.name(index)} twice; expected each class once")
            seen.add(index)
            counts[index] = int(number)
        total = sum(counts)
        if total == 0:
            raise UserError(f"--classes is {text}, which is no image at all; {_COUNTS_SYNTAX}")
        if count not in (None, total):
            raise UserError(f"--count is {count}, and --classes adds up to {total}; expected the same: leave --count "
                            "out")
        return counts


def _is_list_of(value: Any, kind: type, length: int) -> bool:
    return (isinstance(value, list) and len(value) == length > 0
            and all(type(item) is kind for item in value) and (kind is str or min(value) >= 0))
