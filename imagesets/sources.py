"""Recognize the kind of an archive of images and open it; choose files by name; join several folders and zips.

Each kind becomes a `Source`: names and labels of all images, stored compactly, and the images themselves one after the
other, so that archives of any size can be read. --include and --exclude choose files of a folder or zip. Several
folders and zips can form one source: HAM10000, for example, is published as two.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import translate
from pathlib import Path
from typing import Any

import numpy as np

from dnnlib.cli import UserError
from dnnlib.files import retrying, unpack_advice
from dnnlib.text import listed, plural, shorten
from imagesets.arrays import open_cifar, open_mnist, open_npz
from imagesets.classes import NO_LABEL, no_labels, numbers_of, order_classes
from imagesets.folders import (
    Items,
    Loader,
    Source,
    class_folders,
    enclosing_folders,
    is_numbered,
    labels_of_folders,
    open_folder,
    open_zip,
)

SPLITS = ("train", "val", "test", "all")
_GZIP, _ZIP = b"\x1f\x8b", b"PK"
_EXPECTED = ("expected a folder or a zip of images, a MedMNIST .npz, the CIFAR-10 python archive (.tar.gz), or MNIST "
             "images (-images-idx3-ubyte.gz)")
_SHOWN = 3
_TAIL = re.compile(r"_[a-z]+\.[a-z0-9]+$")  # what masks add to the name of their image, such as _segmentation.png


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
            raise UserError(f"--source={inner} is inside --source={outer}, which is read with all its subfolders; "
                            "leave one of the two out")


def _short_names(paths: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the paths that differ: "part1" and "part2", or "a/images" and "b/images"."""
    parts = [Path(os.path.abspath(path)).parts for path in paths]
    for length in range(1, max(map(len, parts))):
        names = ["/".join(one[-length:]) for one in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def open_source(path: str | os.PathLike, *, split: str | None = None) -> Source:
    """Open an archive of images, recognized by its name and first bytes.

    split:  "train", "val", "test" or "all", for MedMNIST and CIFAR-10; None for "train" there

    Raises UserError when the path is missing, of an unknown kind, damaged or empty, or has no splits.
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
    raise UserError(f"--source={path} {unpack_advice(path) or f'is of an unknown kind; {_EXPECTED}'}")


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


# Choosing files by --include and --exclude


@dataclass(frozen=True)
class _ChosenItems:
    items: Items
    chosen: np.ndarray  # bool [number of images before the choice]

    def __call__(self, wanted: np.ndarray) -> Iterator[Any]:
        all_wanted = np.zeros(len(self.chosen), dtype=bool)
        all_wanted[self.chosen] = wanted
        return self.items(all_wanted)


def choose_files(sources: Sequence[Source], include: Sequence[str], exclude: Sequence[str],
                 titles: Sequence[str] = ()) -> list[Source]:
    """Return the sources with only those images that match a pattern of `include`, if any, and none of `exclude`.

    Patterns are the shell's (* ? [...]). One without "/" is compared with file names; one with "/" with the end of the
    path below the source, starting at any folder; "masks/" is a folder. Case is ignored, except between files that
    differ in nothing else: if there are HAM/1.jpg and ham/1.jpg, "ham/*" is only the second. With several sources a
    path begins with the source's name in `titles`, as in messages.

    Raises UserError for a pattern that matches no image, if no image of a source is left, and for archives of arrays.
    """
    if not include and not exclude:
        return list(sources)
    for source in sources:
        if not source.has_files:
            raise UserError(f"--{'include' if include else 'exclude'}: {source.name} ({source.kind}) does not consist "
                            "of files; leave the option out")
    paths = [[f"{title}/{name}" for name in source.names] for source, title in zip(sources, titles, strict=True)
             ] if titles else [source.names for source in sources]
    titles = titles or [source.name for source in sources]
    names = [name for part in paths for name in part]
    chosen = np.full(len(names), not include)
    for option, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns:
            fits = _matches(pattern, names)
            if not fits.any():
                is_folder = pattern.lower() in {folder.lower() for name in names for folder in name.split("/")[:-1]}
                advice = (f'the folder of that name is "{pattern}/"' if is_folder else
                          'expected a pattern of names, such as "*.jpg", or of a folder, such as "masks/*"')
                raise UserError(f'--{option}="{pattern}" matches none of {_what_is_there(titles, names)}; {advice}')
            chosen[fits] = option == "include"
    parts = np.split(chosen, np.cumsum([len(source) for source in sources])[:-1])
    for title, part, inside in zip(titles, parts, paths):
        if not part.any():
            advice = "change them, or leave this --source out" if len(sources) > 1 else "change them"
            raise UserError(f"--include and --exclude leave none of {_what_is_there([title], inside)}; expected "
                            f"patterns that leave some: {advice}")
    return [_keep(source, part) for source, part in zip(sources, parts)]


def patterns_of(unwanted: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """Return up to three patterns that match all unwanted names and no wanted one; [] if there are none.

    Examples: "*_superpixels.png" for masks among their images, or "*.png" if the images are JPEG files.
    """
    for tail_of in (_tail, file_ending) if wanted else ():
        tails = {tail_of(name) for name in unwanted}
        if "" not in tails and len(tails) <= _SHOWN and tails.isdisjoint(map(tail_of, wanted)):
            return [f"*{tail}" for tail in sorted(tails)]
    return []


def masks_among(names: Sequence[str]) -> str | None:
    """Return advice if names differ only in the ending, or by an added word, as those of images and masks do."""
    stems = {name: name[:len(name) - len(file_ending(name))] for name in names}
    known = Counter(stems.values())
    named_alike = [name for name in names if known[stems[name]] > 1]
    named_after = [name for name in names if (tail := _tail(name)) and known[name[:-len(tail)]]]
    if named_after:
        patterns = " ".join(f'--exclude="*{tail}"' for tail in sorted(set(map(_tail, named_after)))[:_SHOWN])
        return (f"{plural(len(named_after), 'image is', 'images are')} named after others ("
                f"{', '.join(named_after[:_SHOWN])}); if they are masks, leave them out with {patterns}")
    if named_alike:
        return (f"the names of {len(named_alike)} images differ only in the ending ({', '.join(named_alike[:2])}); if "
                f'some are masks, leave them out, for example with --exclude="*{file_ending(named_alike[1])}"')
    return None


def file_ending(name: str) -> str:
    """Return ".jpg" for "x/ISIC_1.JPG", "" if there is none."""
    stem, dot, ending = name.rpartition("/")[2].rpartition(".")
    return f".{ending.lower()}" if stem and dot else ""


def _tail(name: str) -> str:
    found = _TAIL.search(name.lower())
    return found[0] if found else ""


def _matches(pattern: str, names: Sequence[str]) -> np.ndarray:
    """Return which names match: bool [N]."""
    whole = pattern.replace("\\", "/").removeprefix("./")
    if whole.endswith("/"):
        whole += "*"
    regex = ("(?:.*/)?" if "/" in whole else "") + translate(whole)
    compared = names if "/" in whole else [name.rpartition("/")[2] for name in names]
    in_any_case, as_given = (np.array([re.match(regex, name, flags) is not None for name in compared], dtype=bool)
                             for flags in (re.IGNORECASE, 0))
    if not (in_any_case & ~as_given).any() or not as_given.any():
        return in_any_case
    lower = [name.lower() for name in names]
    meant = {name for name, fits in zip(lower, as_given) if fits}  # others that differ only in case do not match
    return as_given | (in_any_case & np.array([name not in meant for name in lower]))


def _keep(source: Source, chosen: np.ndarray) -> Source:
    rows = np.flatnonzero(chosen).tolist()
    names = [source.names[row] for row in rows]
    if source.is_ready:
        labels, classes = None if source.labels is None else source.labels[chosen], source.classes
    else:  # a folder that was left out is not a class
        labels, classes = labels_of_folders(names)
    return replace(source, names=names, items=_ChosenItems(source.items, chosen), labels=labels, classes=classes,
                   groups=None if source.groups is None else [source.groups[row] for row in rows],
                   not_chosen=[source.names[row] for row in np.flatnonzero(~chosen)])


def _what_is_there(titles: Sequence[str], names: Sequence[str]) -> str:
    """Return "the 20 images of lesions (.jpg 10, .png 10; mel/a.jpg, ...)"."""
    endings = Counter(file_ending(name) or "without an ending" for name in names).most_common()
    counts = ", ".join(f"{ending} {count}" for ending, count in endings[:_SHOWN])
    return f"the {plural(len(names), 'image')} of {' + '.join(titles)} ({counts}; {shorten(names, _SHOWN)})"


# Joining sources


@dataclass(frozen=True)
class _JoinedItems:
    """An item is (number of the source, item there)."""
    parts: Sequence[tuple[int, Items]]  # number of images, items

    def __call__(self, wanted: np.ndarray) -> Iterator[tuple[int, Any]]:
        start = 0
        for number, (count, items) in enumerate(self.parts):
            for item in items(wanted[start:start + count]):
                yield number, item
            start += count


@dataclass(frozen=True)
class _JoinedLoader:
    loaders: Sequence[Loader]

    def __call__(self, item: tuple[int, Any], limit: int | None = None) -> bytes | np.ndarray:
        number, inner = item
        return self.loaders[number](inner, limit)


def join(sources: Sequence[Source], names: Sequence[str]) -> Source:
    """Return the images of all sources, one after the other, each named by its source and its name there.

    names: of the sources, all different

    Classes with the same name are one class. Data sets (with a dataset.json) must have the same classes, and folders
    joined with them no others; if not, this becomes the `fault`, not an error, as a table may give other labels. Groups
    with the same name are one group. Raises UserError for sources that do not consist of files.
    """
    for source, name in zip(sources, names, strict=True):
        if not source.has_files:
            raise UserError(f"--source: {name} ({source.kind}) cannot be joined with others; expected folders or zips "
                            "of images: convert it separately")
    fault = next((source.fault for source in sources if source.fault is not None), None)
    labels, classes = None, None
    if fault is None:
        try:
            labels, classes = _join_labels(sources, names)
        except UserError as error:
            fault = str(error)
    origins = {name: dict(source.origin) for source, name in zip(sources, names) if source.origin}
    phantom = any(source.origin.get("phantom") for source in sources)
    return Source(
        kind=" + ".join(dict.fromkeys(source.kind for source in sources)), name=" + ".join(names),
        names=[f"{name}/{image}" for source, name in zip(sources, names) for image in source.names],
        items=_JoinedItems([(len(source), source.items) for source in sources]),
        load=_JoinedLoader([source.load for source in sources]), labels=labels, classes=classes,
        groups=_join_groups(sources, names), has_files=True,
        ignored=[f"{name}/{file}" for source, name in zip(sources, names) for file in source.ignored],
        not_chosen=[f"{name}/{file}" for source, name in zip(sources, names) for file in source.not_chosen],
        origin=({"sources": origins} if origins else {}) | ({"phantom": True} if phantom else {}),
        hints=[*(f"{name}: {hint}" for source, name in zip(sources, names) for hint in source.hints),
               *_hints_on_folders(sources, labels)],
        fault=fault, parts=[replace(source, name=name) for source, name in zip(sources, names)])


def repeated_names(source: Source) -> list[str]:
    """Return the names that occur in several parts, except the numbered names of data sets."""
    counts = Counter(name for part in source.parts if not is_numbered(part.names) for name in part.names)
    return [name for name, count in counts.items() if count > 1]


def _join_groups(sources: Sequence[Source], names: Sequence[str]) -> list[str | None] | None:
    if all(source.groups is None for source in sources):
        return None
    groups: list[str | None] = []
    for source, name in zip(sources, names):
        # A group may have the name of its first image, which may be another image in another source.
        own = set(source.names)
        known = [None] * len(source) if source.groups is None else source.groups
        groups += [f"{name}/{group}" if group in own else group for group in known]
    return groups


def _join_labels(sources: Sequence[Source], names: Sequence[str]) -> tuple[np.ndarray | None, list[str] | None]:
    """Return the labels of all images, in order. Raises UserError if the sources have different classes."""
    ready = [(source, name) for source, name in zip(sources, names) if source.is_ready and source.labels is not None]
    for source, name in ready[1:]:
        _check_same_classes(*ready[0], source, name)
    folders = _class_folders(sources, ready[0][0].classes if ready else None)
    found = order_classes({folder for part in folders if part is not None for folder in part if folder is not None})
    if ready and found:
        source, name = ready[0]
        other = next((folder for folder in found if folder not in (source.classes or [])), None)
        if source.has_vectors or other is not None:
            kind = (f"lists of {source.labels.shape[1]} numbers" if source.has_vectors else
                    f"the classes {listed(source.classes)}" if source.classes else "numbers of classes without names")
            raise UserError(f"{name} has {kind} as labels, but the folders of other sources are named {listed(found)}; "
                            "expected the same classes in all: convert each separately, or give --labels")
    if not ready and not found:
        return None, None
    classes = ready[0][0].classes if ready else found
    shape = ready[0][0].labels.shape[1:] if ready else ()
    return np.concatenate([_labels_of(source, part, classes, shape) for source, part in zip(sources, folders)]), classes


def _check_same_classes(first: Source, first_name: str, source: Source, name: str) -> None:
    if first.labels.shape[1:] != source.labels.shape[1:]:
        kinds = [f"lists of {one.labels.shape[1]} numbers" if one.has_vectors else "classes" for one in (first, source)]
        raise UserError(f"the labels of {first_name} are {kinds[0]}, those of {name} {kinds[1]}; expected one kind: "
                        "convert each separately, or give --labels")
    one, other = first.classes, source.classes
    same = one == other or (one and other and not first.has_vectors and set(one) == set(other))
    if not same:
        what = [listed(classes) if classes else "numbers without names" for classes in (one, other)]
        raise UserError(f"the classes of {first_name} are {what[0]}, those of {name} {what[1]}; expected the same in "
                        "both: make both with the same --classes, or give --labels")


def _class_folders(sources: Sequence[Source], known: Sequence[str] | None) -> list[list[str | None] | None]:
    """Return the class folder of each image for each source, None for a source without class folders.

    known: classes of data sets among the sources

    If all images of a source are in one folder, it is a class if others have this class, or class folders at its depth.
    """
    found = [None if source.is_ready else class_folders(source.names) for source in sources]
    depths = {len(enclosing_folders(source.names)) for source, part in zip(sources, found) if part is not None}
    classes = {*(known or []), *(folder for part in found if part is not None for folder in part)}
    for number, source in enumerate(sources):
        if source.is_ready or found[number] is not None or is_numbered(source.names):
            continue
        around = enclosing_folders(source.names)
        folder = next((name for name in reversed(around) if name in classes), None)
        if folder is None and depths == {len(around) - 1}:
            folder = around[-1]
        found[number] = None if folder is None else [folder] * len(source)
    return found


def _labels_of(source: Source, folders: Sequence[str | None] | None, classes: Sequence[str] | None,
               shape: tuple[int, ...]) -> np.ndarray:
    """Return the labels of a source as numbers of `classes`, or lists of numbers of this shape."""
    if folders is not None:
        return numbers_of(folders, classes)
    if not source.is_ready or source.labels is None:
        return no_labels(len(source), shape)
    if classes is None or source.has_vectors:
        return source.labels
    new_number = np.array([*(classes.index(name) for name in source.classes), NO_LABEL], dtype=np.int64)
    return new_number[source.labels]  # NO_LABEL is -1 and takes the last


def _hints_on_folders(sources: Sequence[Source], labels: np.ndarray | None) -> Iterator[str]:
    around = [[] if source.is_ready or is_numbered(source.names) else enclosing_folders(source.names)
              for source in sources]
    if labels is None and all(around) and len({tuple(folders) for folders in around}) > 1:
        yield (f"the folders {listed([folders[-1] for folders in around])} are not taken as classes because each "
               "source has only one; if they are classes, put them into one folder, or give --labels=FILE")
