"""Keep the features of image sets on the disk, under a name that follows from all that they depend on."""

import hashlib
import json
import os
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from dnnlib.disk_failures import DiskFailure, retrying
from dnnlib.files import atomic_write
from metrics.features import Features

_TROUBLE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)


class FeatureCache:
    """Features in files of one folder; each file appears whole or not at all.

    folder:  made when something is written; None keeps nothing
    say:     takes a line for the user

    A file that is damaged is said to be so, and counts as missing; one that cannot be written is said to be so.
    """

    def __init__(self, folder: str | os.PathLike | None, say: Callable[[str], None] = lambda line: None):
        self._folder = None if folder is None else Path(folder)
        self._say = say

    def path(self, key: Mapping[str, object]) -> Path | None:
        """Return the file for a key, plain JSON values by name; None where nothing is kept."""
        return None if self._folder is None else self._folder / f"{hashlib.sha256(_text(key)).hexdigest()}.npz"

    def read(self, key: Mapping[str, object], *, count: int, classes: bool) -> Features | None:
        """Return the features of `count` images, with probabilities where `classes`; None when they are not there."""
        path = self.path(key)
        if path is None:
            return None
        names = ("key", "values", "probabilities") if classes else ("key", "values")

        def load() -> dict[str, np.ndarray]:
            with np.load(path, allow_pickle=False) as file:  # reading a member to its end checks its CRC
                return {name: file[name] for name in names}

        try:
            arrays = retrying(load, path)
        except FileNotFoundError:
            return None
        except DiskFailure as error:  # slow, but no reason to end what may have taken hours
            self._say(f"{error}; its features are computed again")
            return None
        except _TROUBLE as error:
            self._say(f"{path} is damaged ({error}); its features are computed again")
            return None
        tables = [arrays[name] for name in names[1:]]
        if arrays["key"].tobytes() != _text(key) or any(
                table.dtype != np.float32 or table.ndim != 2 or len(table) != count for table in tables):
            self._say(f"{path} holds something else; its features are computed again")
            return None
        return Features(values=arrays["values"], probabilities=arrays.get("probabilities"))

    def write(self, key: Mapping[str, object], features: Features) -> None:
        """Keep features under a key."""
        path = self.path(key)
        if path is None:
            return
        arrays = {"key": np.frombuffer(_text(key), dtype=np.uint8), "values": features.values}
        if features.probabilities is not None:
            arrays["probabilities"] = features.probabilities
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as file:
                np.savez(file, **arrays)
        except OSError as error:
            self._say(f"features cannot be kept in {path.parent} ({error.strerror or error}); they will be computed "
                      "again the next time")


def _text(key: Mapping[str, object]) -> bytes:
    return json.dumps(key, sort_keys=True, allow_nan=False).encode()
