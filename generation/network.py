"""Open the file of --network; find its classes by name or number, or parse label vectors."""

import math
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dnnlib.cli import UserError
from dnnlib.files import sha256_of
from dnnlib.text import listed
from imagesets.classes import (
    VECTOR,
    class_counts,
    class_name,
    find_class,
    known_classes,
    label_kind_of,
    named_classes,
    split_names,
)
from torch_utils.distributed import Place, Processes, broadcast_object
from training.network_file import NETWORK_KINDS, OTHER_NAMES, find_network
from training.snapshot import load_network

# What --network takes, for the help of all programs that have it.
NETWORK_HELP = f"Network file: {NETWORK_KINDS}; also {OTHER_NAMES}."

# The label of an image: the number of its class, a vector of c_dim numbers, or None for unconditional networks.
Label = int | tuple[float, ...] | None

_LARGEST_NUMBER = float(torch.finfo(torch.float32).max)
_COUNTS_SYNTAX = "expected NAME:COUNT,NAME:COUNT,..., such as benign:5000,melanoma:5000"


@dataclass(frozen=True, kw_only=True)
class OpenNetwork:
    """A generator with the metadata of its file."""

    G: nn.Module  # the averaged generator, in eval mode
    name: str  # of the file, without its folder, whose name may contain names of people or places
    sha256: str
    info: dict[str, Any]
    classes: "Classes"

    @property
    def training(self) -> dict[str, Any]:
        """The training data that the file records, under the file's keys; empty if there is no record."""
        return {name: self.info[name] for name in ("training_data", "training_data_before") if name in self.info}


def open_network(text: str | os.PathLike, device: torch.device | str, option: str = "--network") -> OpenNetwork:
    """Read the network that an option names. Raises UserError if it is missing, damaged or another kind of file."""
    path = choose_network(os.fspath(text), option)
    try:
        networks = load_network(path, device)
        sha256 = sha256_of(path)
    except OSError as error:
        raise UserError(f"{option} is {path}, which cannot be read ({error.strerror}); expected a network "
                        "file") from error
    except ValueError as error:
        raise UserError(f"{option}: {error}") from error
    info = networks.config.get("info") or {}
    return OpenNetwork(G=networks.G_ema, name=Path(path).name, sha256=sha256, info=info,
                       classes=Classes(networks.G_ema.c_dim, info))


def choose_network(text: str, option: str = "--network") -> str:
    """Return the path of the file that an option stands for, see `find_network`; print it if it differs."""
    path = find_network(text, option)
    place = Place.from_environment()
    # In processes started by torch_utils.launch, the launching process has printed it.
    if path != text and place.rank == 0 and place.launcher is None:
        print(f"{option}: {path}", file=sys.stderr)
    return path


def require_same(network: OpenNetwork, processes: Processes) -> None:
    """Raise UserError unless all processes opened the same file: a run may have written a newer one in between."""
    if broadcast_object(network.sha256) != network.sha256:
        raise UserError(f"--network is another file in process {processes.rank} ({network.name}) than in the first; "
                        "expected the same file: repeat the command, or name the file itself")


class Classes:
    """The classes of a network, or the layout of its label vectors; count is 0 for an unconditional network.

    count:            c_dim: the number of classes, or the length of a label vector
    kind:             of the labels in training, CLASS or VECTOR; None if the file has no record
    names:            of the classes, or of the entries of a vector; None if they have none
    training_counts:  number of training images of each class; None if the file has no record
    """

    def __init__(self, c_dim: int, info: Mapping[str, Any]):
        """Take the metadata of a network file; entries that do not fit its number of classes are ignored."""
        self.count = c_dim
        self.kind = label_kind_of(info, c_dim)
        self.names = named_classes(info, c_dim)
        counts = info.get("class_counts")
        fits = isinstance(counts, list) and len(counts) == c_dim > 0 and all(type(n) is int and n >= 0 for n in counts)
        self.training_counts = list(counts) if fits and sum(counts) > 0 else None

    def name(self, label: int | tuple[float, ...]) -> str:
        """Return the name of a class, or its number; for a vector, its numbers as --label takes them."""
        if isinstance(label, tuple):
            return ",".join(f"{number:.9g}" for number in label)
        return class_name(label, self.names)

    def find(self, flag: str, text: str) -> int:
        """Return the number of a class. A name wins over a number. Raises UserError."""
        return find_class(text.strip(), self.names, self.count, flag=flag)

    def match(self, label: int, names: Sequence[str] | None) -> int | None:
        """Return the network's class for a class of a data set, matched by name if both have names, else by number.

        names:  of the data set's classes

        Returns None if the network has no such class.
        """
        if self.names is None or names is None:
            return label if label < self.count else None
        return self.names.index(names[label]) if names[label] in self.names else None

    def choose(self, text: str | None, label: str | None = None, *, repeated: bool = False) -> list[Label]:
        """Return the labels to make images of; [None] for an unconditional network.

        text:      --class: one class, several separated by commas, or all
        label:     --label: the numbers of one vector. A network trained with classes also takes one: a mix of classes
        repeated:  whether a class may be named twice

        Raises UserError if the value is wrong, missing, or given where the network takes none.
        """
        if label is not None:
            if text is not None:
                raise UserError(f"--class={text} and --label={label} are both given; expected one of them")
            return [self._parse_label(label)]
        if self.kind == VECTOR:
            raise UserError(f"{'--label is missing' if text is None else f'--class is {text}'}, but this network's "
                            f"labels are vectors, not classes; expected {self.known_labels()}")
        if self.count == 0:
            if text is not None:
                raise UserError(f"--class is {text}, but this network was trained without classes; leave --class out")
            return [None]
        if text is None:
            unknown = self.kind is None and self.names is None  # as in all files of the original
            raise UserError("--class is missing, but this network is class-conditional; expected "
                            f"{known_classes(self.names, self.count)}"
                            + (f", or {self.known_labels()} if its labels are vectors" if unknown else ""))
        if self.names is not None and text.strip() in self.names:
            return [self.names.index(text.strip())]
        if text.strip() == "all":
            return list(range(self.count))
        chosen = [self.find("--class", part) for part in split_names(text, self.names or ())]
        if len(set(chosen)) < len(chosen) and not repeated:
            raise UserError(f"--class={text} names a class twice; expected each once")
        return chosen

    def known_labels(self) -> str:
        """Return "--label with 3 numbers (age, size, hair), such as --label=0,1,0.5", for messages."""
        names = "" if self.names is None else f" ({listed(self.names)})"
        example = ",".join(["0", "1", "0.5"][:self.count]) + (",..." if self.count > 3 else "")
        return f"--label with {self.count} numbers{names}, such as --label={example}"

    def note_on_untrained(self, labels: Iterable[Label]) -> str | None:
        """Return a note on classes that the training set had no images of; None if there are none, or no record."""
        names = [self.name(label) for label in dict.fromkeys(labels)
                 if isinstance(label, int) and self.training_counts is not None and self.training_counts[label] == 0]
        return (f"the training set of this network has no images of class {listed(names)}: images made for it may not "
                "show it") if names else None

    def labels(self, labels: Sequence[Label]) -> Tensor:
        """Return labels as network inputs, classes as one-hot vectors: float32 [N, c_dim]."""
        rows = torch.zeros(len(labels), self.count)
        for row, label in zip(rows, labels, strict=True):
            if isinstance(label, tuple):
                row.copy_(torch.tensor(label))
            elif label is not None:
                row[label] = 1
        return rows

    def divide(self, count: int | None, text: str | None) -> list[int] | None:
        """Return the number of images of each class in a data set, [c_dim]; None for an unconditional network.

        count:  --count, the total; None for the sum of --classes
        text:   --classes; None for the same shares as in training, rounded by largest remainder

        Raises UserError if the two leave the numbers open or contradict each other, and for label vectors.
        """
        if self.kind == VECTOR:
            raise UserError(f"{'--labels-from is missing' if text is None else f'--classes is {text}'}, but this "
                            "network's labels are vectors, not classes; expected a data set with labels of "
                            f"{self.count} numbers, such as --labels-from=set.zip")
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
            raise UserError("--classes is missing, and the network file does not record how many training images each "
                            f"class had; {_COUNTS_SYNTAX}")
        return class_counts(self.training_counts, count)

    def _parse_label(self, text: str) -> tuple[float, ...]:
        if self.count == 0:
            raise UserError(f"--label is {text}, but this network was trained without labels; leave --label out")
        numbers = []
        for part in text.split(","):
            try:
                number = float(part)
            except ValueError:
                number = math.nan
            if not abs(number) <= _LARGEST_NUMBER:  # also refuses nan
                raise UserError(f"--label has {part.strip()!r}, which is not a finite number; expected "
                                f"{self.known_labels()}")
            numbers.append(number)
        if len(numbers) != self.count:
            raise UserError(f"--label is {text}, {len(numbers)} numbers; expected {self.known_labels()}")
        return tuple(numbers)

    def _given_counts(self, count: int | None, text: str) -> list[int]:
        counts = [0] * self.count
        seen = set()
        # A name may contain commas.
        whole = [part for name in self.names or () for part in re.findall(rf"{re.escape(name)}:[0-9]+", text)]
        for part in split_names(text, whole):
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
            raise UserError(f"--classes is {text}, which asks for no images; {_COUNTS_SYNTAX}")
        if count not in (None, total):
            raise UserError(f"--count is {count}, but --classes adds up to {total}; expected the same number: leave "
                            "--count out")
        return counts
