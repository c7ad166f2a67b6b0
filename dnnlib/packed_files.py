"""Recognize archives that have to be unpacked before they are read, and give the command that does it."""

import gzip
import lzma
import os
import shlex
import tarfile
import zlib
from pathlib import Path

# First bytes -> the kind, and the command that unpacks {file} into {folder}.
_ARCHIVES = {
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", "7z x {file} -o{folder}"),
    b"Rar!\x1a\x07": ("a rar archive", "unrar x {file} {folder}/"),
}
_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip -k {file}"),
    b"BZh": ("bzip2", "bunzip2 -k {file}"),
    b"\xfd7zXZ\x00": ("xz", "unxz -k {file}"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd {file}"),
}
_TAR, _UNTAR = "a tar archive", "mkdir -p {folder} && tar -xf {file} -C {folder}"
_TAR_NAME = (".tar", ".tgz", ".tbz", ".tbz2", ".txz", ".tzst")  # and .tar.gz and so on, whose last ending is taken off
_ENDINGS = (".gz", ".bz2", ".xz", ".zst", ".7z", ".rar", *_TAR_NAME)
_DAMAGED = (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)


def packed_names(names: list[str]) -> list[str]:
    """Return those of some file names that an archive has, zips among them."""
    return [name for name in names if name.lower().endswith((".zip", *_ENDINGS))]


def unpack_advice(path: str | os.PathLike) -> str | None:
    """Return what a packed file is and the command that unpacks it; None for other files, zips among these.

    The text goes on from the name of the file: "is a tar archive; unpack it: mkdir ...".
    """
    kind, command = _recognize(Path(path)) or (None, "")
    if kind is None:
        return None
    file, folder = shlex.quote(str(path)), shlex.quote(str(Path(path).parent / _stem(Path(path).name)))
    return f"is {kind}; unpack it: {command.format(file=file, folder=folder)}"


def _recognize(path: Path) -> tuple[str, str] | None:
    try:
        with open(path, "rb") as file:
            start = file.read(512)
    except OSError:  # opening it for its content says why
        return None
    for magic, archive in _ARCHIVES.items():
        if start.startswith(magic):
            return archive
    packed = next((entry for magic, entry in _COMPRESSED.items() if start.startswith(magic)), None)
    has_tar_name = _without_compression(path.name.lower()).endswith(_TAR_NAME)
    if start[257:262] == b"ustar" or (has_tar_name and packed is not None) or (packed is not None and _is_tar(path)):
        return _TAR, _UNTAR
    return None if packed is None else (f"a file compressed by {packed[0]}", packed[1])


def _is_tar(path: Path) -> bool:
    try:
        with tarfile.open(path) as archive:
            return archive.next() is not None  # reads the first header alone; zeros are an archive of nothing
    except _DAMAGED:
        return False


def _without_compression(name: str) -> str:
    return name.removesuffix(".gz").removesuffix(".bz2").removesuffix(".xz").removesuffix(".zst")


def _stem(name: str) -> str:
    """Return the name of a folder for the content: "images" of "images.tar.gz"."""
    stem = name
    for _ in range(2):
        root, ending = os.path.splitext(stem)
        stem = root if root and ending.lower() in _ENDINGS else stem
    return stem if stem != name else f"{name}-unpacked"
