"""Recognise by its first bytes what kind of network file a file is."""
import os
from enum import Enum
from pathlib import Path


class FileKind(Enum):
    """The two kinds that can be read."""
    SAFETENSORS = "safetensors"
    PICKLE = "pickle"


# First bytes -> what such a file is.
_FOREIGN = {
    b"PK\x03\x04": "a zip archive (a data set, or a checkpoint of torch.save)",
    b"version https://git-lfs": "a git-lfs pointer, not the file itself: fetch it with `git lfs pull`",
    b"\x1f\x8b": "a gzip archive",
    b"\x89HDF": "an HDF5 file",
    b"\x89PNG": "a PNG image",
}
_MAX_HEADER = 100_000_000  # bytes; safetensors' own limit


def recognise(path: str | os.PathLike) -> FileKind:
    """Return the kind of the file at `path`.

    Raises FileNotFoundError, or ValueError with one line that says what the file is, when it is of neither kind.
    """
    if Path(path).is_dir():
        raise ValueError(f"{path} is a folder; expected a network file (.safetensors or NVIDIA .pkl)")
    with open(path, "rb") as file:
        start = file.read(256)
    # safetensors: header size (8 bytes, little-endian), then JSON. Before pickles: a size may begin with 80.
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= _MAX_HEADER:
        return FileKind.SAFETENSORS
    if start[:1] == b"\x80":
        return FileKind.PICKLE
    raise ValueError(f"{path} is {_describe(start)}; expected a network file (.safetensors or NVIDIA .pkl)")


def _describe(start: bytes) -> str:
    if not start:
        return "empty"
    for magic, description in _FOREIGN.items():
        if start.startswith(magic):
            return description
    if start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        return "a web page (an HTML or XML text), perhaps a failed download"
    return f"of an unknown kind (it starts with {start[:8].hex(' ')})"
