"""Recognise what an archive of images is, and open it.

Each kind answers with a `Source`: names and labels of all images, kept compact, and the images themselves one after
the other, so that an archive of any size passes through.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from dnnlib.cli import UserError
from dnnlib.disk_failures import retrying
from dnnlib.packed_files import unpack_advice
from imagesets.sources.arrays import open_mnist, open_npz
from imagesets.sources.cifar import open_cifar
from imagesets.sources.files import open_folder, open_zip
from imagesets.sources.joining import join
from imagesets.sources.patterns import choose_files
from imagesets.sources.source import Source

SPLITS = ("train", "val", "test", "all")
_GZIP, _ZIP = b"\x1f\x8b", b"PK"
_EXPECTED = ("expected a folder or a zip of images, a MedMNIST .npz, the CIFAR-10 python archive (.tar.gz), or MNIST "
             "images (-images-idx3-ubyte.gz)")


def open_sources(paths: Sequence[str | os.PathLike], *, split: str | None = None, include: Sequence[str] = (),
                 exclude: Sequence[str] = ()) -> Source:
    """Open an archive of images, or several folders and zips of one set, one after the other, as one source.

    include, exclude: patterns of file names, see choose_files

    Raises UserError as open_source() and choose_files() do, and when a folder or an archive would be read twice.
    """
    paths = [Path(path) for path in paths]
    sources = [open_source(path, split=split) for path in paths]
    if len(sources) == 1:
        return choose_files(sources, include, exclude)[0]
    for index, path in enumerate(paths):
        for earlier in paths[:index]:
            _refuse_repeated(path, earlier)
    names = _short_names(paths)
    return join(choose_files(sources, include, exclude, names), names)


def _refuse_repeated(path: Path, earlier: Path) -> None:
    if path.samefile(earlier):
        raise UserError(f"--source={path} is given twice{'' if path == earlier else f', also as {earlier}'}; expected "
                        "each folder or archive once")
    for outer, inner in ((path, earlier), (earlier, path)):
        if inner.is_dir() and inner.resolve().is_relative_to(outer.resolve()):
            raise UserError(f"--source={inner} lies in --source={outer}, which is read with all its folders; leave one "
                            "of the two out")


def _short_names(paths: Sequence[Path]) -> list[str]:
    """Return as much of the paths' ends as tells them apart: "part1" and "part2", or "a/images" and "b/images"."""
    parts = [Path(os.path.abspath(path)).parts for path in paths]
    for length in range(1, max(map(len, parts))):
        names = ["/".join(one[-length:]) for one in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def open_source(path: str | os.PathLike, *, split: str | None = None) -> Source:
    """Open an archive of images, recognised by its name and its first bytes.

    split:  "train", "val", "test" or "all", for MedMNIST and CIFAR-10; None for "train" there

    Raises UserError when the path is missing, is of no known kind, is damaged or empty, or knows no splits.
    """
    path = Path(path)
    if split is not None and split not in SPLITS:
        raise UserError(f"--split={split}; expected one of {', '.join(SPLITS)}")
    if not path.exists():
        raise UserError(f"--source={path} does not exist; {_EXPECTED}")
    if path.is_dir():
        return _without_split(open_folder(path), split)
    if not path.is_file():
        raise UserError(f"--source={path} is neither a file nor a folder; {_EXPECTED}")
    start, name = _first_bytes(path), path.name.lower()
    if name.endswith(".npz"):
        return open_npz(path, split or "train")
    if start.startswith(_GZIP) and "idx" in name:
        return _without_split(open_mnist(path), split)
    if start.startswith(_GZIP) and name.endswith((".tar.gz", ".tgz")):
        return open_cifar(path, split or "train")
    if start.startswith(_ZIP) or name.endswith(".zip"):
        return _without_split(open_zip(path), split)
    raise UserError(f"--source={path} {unpack_advice(path) or f'is of no known kind; {_EXPECTED}'}")


def _first_bytes(path: Path) -> bytes:
    def read() -> bytes:
        with open(path, "rb") as file:
            return file.read(4)

    try:
        start = retrying(read, path)
    except OSError as error:
        raise UserError(f"--source={path} cannot be opened: {error.strerror}") from error
    if not start:
        raise UserError(f"--source={path} is empty (0 bytes); {_EXPECTED}")
    return start


def _without_split(source: Source, split: str | None) -> Source:
    if split is not None:
        raise UserError(f"--split={split}: {source.name} ({source.kind}) has no splits; only MedMNIST and CIFAR-10 do: "
                        "leave the option out")
    return source
