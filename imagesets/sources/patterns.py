"""Choose files of a folder or zip by their names: --include and --exclude."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import translate
from typing import Any

import numpy as np

from dnnlib.cli import UserError
from imagesets.sources.files import labels_of_folders
from imagesets.sources.source import Items, Source
from imagesets.text_table import plural

_SHOWN = 3
_TAIL = re.compile(r"_[a-z]+\.[a-z0-9]+$")  # what masks add to the name of their image, such as _segmentation.png


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
    """Return the sources with those of their images that fit a pattern of `include`, if any, and none of `exclude`.

    Patterns are the shell's (* ? [...]). One without "/" is compared with the name of a file; one with "/" with the end
    of its path below the source, from any folder on; "masks/" takes a folder. Upper and lower case are the same, but
    for files that nothing else tells apart: where HAM/1.jpg lies beside ham/1.jpg, "ham/*" is the second. Of several
    sources the path begins with the source's name in `titles`, as in messages.

    Raises UserError for a pattern that fits no image, when a source keeps none, and for archives of arrays.
    """
    if not include and not exclude:
        return list(sources)
    for source in sources:
        if not source.has_files:
            raise UserError(f"--{'include' if include else 'exclude'}: {source.name} ({source.kind}) holds no files; "
                            "leave the option out")
    paths = [[f"{title}/{name}" for name in source.names] for source, title in zip(sources, titles, strict=True)
             ] if titles else [source.names for source in sources]
    titles = titles or [source.name for source in sources]
    names = [name for part in paths for name in part]
    chosen = np.full(len(names), not include)
    for option, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns:
            fits = _matches(pattern, names)
            if not fits.any():
                raise UserError(f'--{option}="{pattern}" fits none of {_what_is_there(titles, names)}'
                                f"{_advice(pattern, names)}")
            chosen[fits] = option == "include"
    parts = np.split(chosen, np.cumsum([len(source) for source in sources])[:-1])
    for title, part, inside in zip(titles, parts, paths):
        if not part.any():
            advice = "change them, or leave this --source out" if len(sources) > 1 else "change them"
            raise UserError(f"--include and --exclude leave none of {_what_is_there([title], inside)}; expected "
                            f"patterns that leave some: {advice}")
    return [_keep(source, part) for source, part in zip(sources, parts)]


def patterns_of(unwanted: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """Return up to three patterns that fit all names of one kind and none of the other; [] where names do not tell.

    Such as "*_superpixels.png" for masks that lie among their images, or "*.png" where images are JPEG files.
    """
    for tail_of in (_tail, file_ending) if wanted else ():
        tails = {tail_of(name) for name in unwanted}
        if "" not in tails and len(tails) <= _SHOWN and tails.isdisjoint(map(tail_of, wanted)):
            return [f"*{tail}" for tail in sorted(tails)]
    return []


def masks_among(names: Sequence[str]) -> str | None:
    """Return advice where images are named as others are but for the ending, or with a word added, as masks are."""
    stems = {name: name[:len(name) - len(file_ending(name))] for name in names}
    known = Counter(stems.values())
    named_alike = [name for name in names if known[stems[name]] > 1]
    named_after = [name for name in names if (tail := _tail(name)) and known[name[:-len(tail)]]]
    if named_after:
        patterns = " ".join(f'--exclude="*{tail}"' for tail in sorted(set(map(_tail, named_after)))[:_SHOWN])
        return (f"{plural(len(named_after), 'image is', 'images are')} named after others ("
                f"{', '.join(named_after[:_SHOWN])}); if they are masks, leave them out by {patterns}")
    if named_alike:
        return (f"{len(named_alike)} images differ by the ending of their names only ({', '.join(named_alike[:2])}); "
                f'if some are masks, leave them out, such as by --exclude="*{file_ending(named_alike[1])}"')
    return None


def file_ending(name: str) -> str:
    """Return ".jpg" of "x/ISIC_1.JPG", "" where there is none."""
    stem, dot, ending = name.rpartition("/")[2].rpartition(".")
    return f".{ending.lower()}" if stem and dot else ""


def _tail(name: str) -> str:
    found = _TAIL.search(name.lower())
    return found[0] if found else ""


def _matches(pattern: str, names: Sequence[str]) -> np.ndarray:
    """Return bool [N]: which names fit."""
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
    meant = {name for name, fits in zip(lower, as_given) if fits}  # the others of such a name are not
    return as_given | (in_any_case & np.array([name not in meant for name in lower]))


def _keep(source: Source, chosen: np.ndarray) -> Source:
    rows = np.flatnonzero(chosen).tolist()
    names = [source.names[row] for row in rows]
    if source.is_ready:
        labels, classes = None if source.labels is None else source.labels[chosen], source.classes
    else:  # a folder that was left out is no class
        labels, classes = labels_of_folders(names)
    return replace(source, names=names, items=_ChosenItems(source.items, chosen), labels=labels, classes=classes,
                   groups=None if source.groups is None else [source.groups[row] for row in rows],
                   not_chosen=[source.names[row] for row in np.flatnonzero(~chosen)])


def _what_is_there(titles: Sequence[str], names: Sequence[str]) -> str:
    """Return "the 20 images of lesions (.jpg 10, .png 10; mel/a.jpg, ...)"."""
    endings = Counter(file_ending(name) or "without an ending" for name in names).most_common()
    counts = ", ".join(f"{ending} {count}" for ending, count in endings[:_SHOWN])
    examples = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
    return f"the {plural(len(names), 'image')} of {' + '.join(titles)} ({counts}; {examples})"


def _advice(pattern: str, names: Sequence[str]) -> str:
    folders = {folder.lower() for name in names for folder in name.split("/")[:-1]}
    if pattern.lower() in folders:
        return f'; the folder of that name is "{pattern}/"'
    return "; expected a pattern of names, such as \"*.jpg\", or of a folder, such as \"masks/*\""
