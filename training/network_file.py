"""Find the network file that an option names, and recognize its kind by its first bytes."""
import glob
import os
import stat
from enum import Enum
from pathlib import Path

from dnnlib.cli import UserError
from dnnlib.files import retrying, unpack_advice
from training.run_folder import list_snapshots

# What an option that names a network file accepts, for help texts and messages: kinds of files, ...
NETWORK_KINDS = "a .safetensors of a run, or a .pkl of NVIDIA's code"
# ... and what can be given in place of a path.
OTHER_NAMES = "a pattern that matches one file, or the folder of a run, for its newest network snapshot"


class FileKind(Enum):
    """The two kinds of network files."""
    SAFETENSORS = "safetensors"
    PICKLE = "pickle"


# First bytes of other files -> what they are.
_FOREIGN = {
    b"PK\x03\x04": "a zip archive (a data set, or a checkpoint of torch.save)",
    b"version https://git-lfs": "a git-lfs pointer, not the file itself: fetch it with `git lfs pull`",
    b"\x89HDF": "an HDF5 file",
    b"\x89PNG": "a PNG image",
}
_MAX_HEADER = 100_000_000  # bytes; safetensors' own limit
_SHOWN = 5  # matches of a pattern that a message lists


def find_network(text: str, option: str) -> str:
    """Return the path of the network file that an option names.

    text:    a path; a pattern such as runs/00000-*/network-snapshot-025000.safetensors that matches one file; or a
             run's folder, or a pattern that matches one, for its newest network snapshot
    option:  for messages, such as "--network"

    Raises UserError, naming what was found, if the file does not exist, a pattern matches none or several files, or a
    folder has no network snapshot.
    """
    path = find_path(text, option, "a network file or the folder of a run")
    try:
        is_folder = stat.S_ISDIR(retrying(lambda: os.stat(path), path).st_mode)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{option} is {text}, which does not exist; expected a network file: "
                        f"{NETWORK_KINDS}") from error
    if not is_folder:
        return path
    found = list_snapshots(path)
    if not found:
        what = f"{path}, a folder" if path == text else f"{text}, which matches the folder {path}"
        raise UserError(f"{option} is {what} without network-snapshot-*.safetensors; expected a network file "
                        f"({NETWORK_KINDS}), or the folder of a run")
    return found[-1]


def network_files(text: str) -> list[str]:
    """Return all network files that `text`, as in `find_network`, matches, by path and number of images."""
    if os.path.isdir(text):
        return list_snapshots(text)
    if os.path.lexists(text) or not glob.has_magic(text):
        return [text]
    found = sorted(glob.glob(text, recursive=True))
    return [file for path in found for file in (list_snapshots(path) if os.path.isdir(path) else [path])]


def find_path(text: str, option: str, expected: str) -> str:
    """Return the one path that a pattern matches; text that is an existing path or not a pattern is returned as it is.

    expected:  what the pattern should match, for the message

    Raises UserError if it matches none or several.
    """
    if os.path.lexists(text) or not glob.has_magic(text):
        return text
    found = sorted(glob.glob(text, recursive=True))
    if len(found) == 1:
        return found[0]
    if not found:
        raise UserError(f"{option} is {text}, which matches nothing; expected a pattern that matches {expected}")
    more = f", and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    raise UserError(f"{option} is {text}, which matches {len(found)} paths: {', '.join(found[:_SHOWN])}{more}; "
                    f"expected a pattern that matches one, {expected}")


def recognize(path: str | os.PathLike) -> FileKind:
    """Return the kind of the file at `path`.

    Raises FileNotFoundError, or ValueError with one line that describes the file when it is of neither kind.
    """
    if Path(path).is_dir():
        raise ValueError(f"{path} is a folder; expected a network file (.safetensors or NVIDIA .pkl)")

    def read_start() -> bytes:
        with open(path, "rb") as file:
            return file.read(256)

    start = retrying(read_start, path)
    # safetensors: header size (8 bytes, little-endian), then JSON. Before pickles: a size may begin with 80.
    header = int.from_bytes(start[:8], "little")
    if start[8:9] == b"{" and header <= _MAX_HEADER:
        return FileKind.SAFETENSORS
    if start[8:10] == b'{"':
        raise ValueError(f"{path} declares a safetensors header of {header:,} bytes; expected at most {_MAX_HEADER:,}: "
                         "the file is damaged, copy it again")
    if start[:1] == b"\x80":
        return FileKind.PICKLE
    what = unpack_advice(path) or f"is {_describe(start)}"
    raise ValueError(f"{path} {what}; expected a network file (.safetensors or NVIDIA .pkl)")


def _describe(start: bytes) -> str:
    if not start:
        return "empty"
    for magic, description in _FOREIGN.items():
        if start.startswith(magic):
            return description
    if start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        return "a web page (HTML or XML), perhaps from a failed download"
    return f"of an unknown kind (it starts with {start[:8].hex(' ')})"
