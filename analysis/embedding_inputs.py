"""What `study.py embed` works on: its options, and the sets of images that they name, opened and checked."""

import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path
from typing import Any

from analysis.embedding_layouts import MAPS
from analysis.embedding_points import PROJECTED, REAL, SYNTHETIC, Points, PointSet
from dnnlib.cli import UserError, UserPath, check_outdir, split_paths
from dnnlib.text import listed, plural
from generation.command import flag
from generation.pictures import check_file
from imagesets.classes import CLASS, LABELS, VECTOR, class_name
from imagesets.metadata import may_be_redistributed
from imagesets.reader import ImageSet
from latent.neighbors import DEFAULT_DETECTOR
from metrics.detectors.registry import DETECTOR_FORMS, is_detector
from metrics.image_sources import SetImages
from metrics.intervals import DEFAULT_LEVEL
from torch_utils.device import DEVICE_HELP, TUNE_MALLOC_HELP, check_counts
from training.dataset import is_generated, parts_of_source

LEAST_REALS = 50
NUMBERS_FORMAT = "lesion-embedding"  # "format" of the numbers beside a page
STYLES = "w"  # --features
CLASSIFIER_ENDING = ".safetensors"  # of --features
_SIDES, _MOST_NEIGHBORS = (16, 256), 100
_DATA, _FEATURES, _MAP, _PAGE, _SPEED = ("Data", "Features", "Map", "Page", "Speed and devices")
_PERMIT = "if they may, convert the set with dataset_tool.py --redistribution=yes"


@dataclass(frozen=True, kw_only=True)
class EmbedRequest:
    """The options of `study.py embed`. Raises UserError if one is missing or out of range."""

    sets: tuple[str, ...] | None = flag(
        _DATA, "PATH,...", "Data sets: first one of real images, then synthetic images (generate.py --zip) and "
        "projections (projector.py --data). Can be repeated. Required.", type=UserPath(), multiple=True,
        callback=split_paths)
    real: tuple[str, ...] | None = flag(
        _DATA, "PATH,...", "Further sets of real images, such as those of other institutions; the map is made from all "
        "real images. Can be repeated.", type=UserPath(), multiple=True, callback=split_paths)
    attributes: str | None = flag(
        _DATA, "FILE", "Table of attributes of the real images (CSV), such as age or body site, to color images by. "
        "Its rows are found by file names, or by patients or lesions.", type=UserPath())
    classifier: str | None = flag(
        _DATA, "FILE", "Classifier, a .safetensors file of study.py classify: color images by its probabilities, and "
        "by whether it is right.", type=UserPath())
    max_images: int | None = flag(
        _DATA, "INT", "Use a random subset of this many images of each set (chosen by --seed).", shown="all")

    features: str = flag(
        _FEATURES, "NAME|FILE", f"What images are compared by: a feature detector ({DETECTOR_FORMS}); a .safetensors "
        f"file of study.py classify, for the features that its last layer takes; or {STYLES}, the styles of synthetic "
        "and projected images, in which projections stand for real images.", default=DEFAULT_DETECTOR, type=UserPath())
    weights: str | None = flag(
        _FEATURES, "FILE", "File with the weights of the detector, or of the classifier's backbone, instead of "
        "downloading them.", type=UserPath())
    network: str | None = flag(
        _FEATURES, "FILE", f"Network that made the synthetic images, for --features={STYLES}.", type=UserPath())

    maps: str | None = flag(_MAP, "LIST", f"Kinds of maps, the first one is shown first: some of {', '.join(MAPS)}.",
                            shown="all whose packages are installed")
    perplexity: float = flag(_MAP, "NUMBER", "Perplexity of t-SNE: about how many neighbors of each image count.",
                             default=30.0)
    neighbors: int = flag(_MAP, "INT", "Number of nearest images in the numbers beside the map.", default=10)
    ci: float = flag(_MAP, "LEVEL", "Confidence level of the intervals.", default=DEFAULT_LEVEL)
    seed: int = flag(_MAP, "INT", "Random seed.", default=0)

    out: str | None = flag(_PAGE, "FILE.html", "The page; its numbers are written to FILE.json. An existing page and "
                           "its numbers are replaced. Required.", type=UserPath())
    table: str | None = flag(_PAGE, "FILE.csv", "Also write a table of all images with what is known of them and their "
                             "places on the maps.", type=UserPath())
    tensorboard: str | None = flag(_PAGE, "DIR", "Also write the files of TensorBoard's Projector to this folder.",
                                   type=UserPath())
    no_real_images: bool = flag(
        _PAGE, None, "Draw all real and projected images as dots. Without this flag, their pictures are shown for sets "
        "whose dataset.json records that they may be redistributed.", default=False)
    thumbnail: int = flag(_PAGE, "INT", "Side of the pictures in pixels, at most; they are never enlarged.", default=64)
    title: str | None = flag(_PAGE, "TEXT", "Title of the page.", shown="the names of the sets")

    device: str = flag(_SPEED, "NAME", DEVICE_HELP, default="auto")
    gpus: int | None = flag(_SPEED, "INT", "Number of processes: one per GPU, or several on a CPU.", shown="1")
    workers: int | None = flag(_SPEED, "INT", "Number of processes that decode images, for each process.",
                               shown="its share of the CPU cores, at most 8")
    no_cache: bool = flag(_SPEED, None, "Neither read nor write the cache of image features.", default=False)
    tune_malloc: bool = flag(_SPEED, "BOOL", TUNE_MALLOC_HELP, default=True)
    verbose: bool = flag(_SPEED, "BOOL", "Show progress.", default=True)

    def __post_init__(self) -> None:
        for name, example in (("sets", "real.zip,synthetic.zip"), ("out", "map.html")):
            if not getattr(self, name):
                raise UserError(f"--{name} is missing; expected one, such as --{name}={example}, or see --help")
        self._check_paths()
        check_counts(gpus=self.gpus, workers=self.workers)
        if not 0 < self.ci < 1:
            raise UserError(f"--ci is {self.ci:g}; expected a number between 0 and 1")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"--seed is {self.seed}; expected a number from 0 to {2**32 - 1}")
        if not (math.isfinite(self.perplexity) and self.perplexity > 1):
            raise UserError(f"--perplexity is {self.perplexity:g}; expected a number above 1, such as 30")
        for name, low, high in (("thumbnail", *_SIDES), ("neighbors", 1, _MOST_NEIGHBORS)):
            if not low <= getattr(self, name) <= high:
                raise UserError(f"--{name} is {getattr(self, name)}; expected a number from {low} to {high}")
        if self.max_images is not None and self.max_images < LEAST_REALS:
            raise UserError(f"--max-images is {self.max_images}; expected at least {LEAST_REALS}")
        self._check_features()
        _ = self.map_names  # checks

    def _check_paths(self) -> None:
        seen: dict[str, str] = {}
        for option, path in self.all_sets:
            place = os.path.realpath(path)
            if place in seen:
                also = "" if seen[place] == path else f" as {seen[place]}"
                raise UserError(f"{option} has {path}, which is already there{also}; expected each set once")
            seen[place] = path
        check_file("--out", self.out, ".html")
        _check_numbers(self.out, self.numbers)
        if self.table is not None:
            check_file("--table", self.table, ".csv")
            for name in ("attributes", "classifier", "weights", "network", "features"):
                path = getattr(self, name)
                if path is not None and os.path.realpath(path) == os.path.realpath(self.table):
                    raise UserError(f"--table is {self.table}, which is also --{name}; choose another name")
        if self.tensorboard is not None:
            check_outdir(self.tensorboard, "--tensorboard")

    def _check_features(self) -> None:
        features, uses_styles = self.features, self.features == STYLES
        if not (uses_styles or is_detector(features) or features.endswith(CLASSIFIER_ENDING)):
            raise UserError(f"--features is {features}; expected one of {DETECTOR_FORMS}, {STYLES}, or a "
                            f"{CLASSIFIER_ENDING} file of study.py classify")
        for name in ("features", "classifier"):
            path = getattr(self, name) or ""
            if (name == "classifier" or path.endswith(CLASSIFIER_ENDING)) and path and not os.path.isfile(path):
                raise UserError(f"--{name} is {path}, which does not exist; expected a {CLASSIFIER_ENDING} file of "
                                "study.py classify")
        if self.network is not None and not uses_styles:
            raise UserError(f"--network is given, but only works with --features={STYLES}; leave --network out")
        if self.weights is not None and uses_styles and self.classifier is None:
            raise UserError(f"--weights is given, but --features={STYLES} uses none; leave --weights out")

    @property
    def numbers(self) -> Path:
        """The file beside the page that gets its numbers."""
        return Path(self.out).with_suffix(".json")

    @property
    def all_sets(self) -> list[tuple[str, str]]:
        """(option, path) of each set, those of real images first."""
        first, *others = self.sets
        real = [("--real", path) for path in self.real or ()]
        return [("--sets", first), *real, *(("--sets", path) for path in others)]

    @property
    def map_names(self) -> list[str]:
        """The kinds of maps in order. Raises UserError if one is unknown, named twice or cannot be made here."""
        if self.maps is None:
            possible = [name for name, (module, _) in MAPS.items() if find_spec(module) is not None]
            if not possible:
                raise UserError("no map can be made: none of the packages is installed that make them; expected one: "
                                f"pip install {' '.join(package for _, package in MAPS.values())}")
            return possible
        names = [name.strip() for name in self.maps.split(",")]
        if not set(names) <= set(MAPS) or len(set(names)) < len(names):
            raise UserError(f"--maps is {self.maps or 'empty'}; expected some of {', '.join(MAPS)}, each once")
        for name in names:
            module, package = MAPS[name]
            if find_spec(module) is None:
                raise UserError(f"--maps has {name}, which needs the package {package}, which is not installed: "
                                f"pip install {package}")
        return names

    def shown_title(self, points: Points) -> str:
        """Return --title, or one made of the sets' names."""
        return self.title or f"Map of {listed([one.name for one in points.sets])}"


def open_points(request: EmbedRequest) -> tuple[Points, list[str]]:
    """Open all sets; return their images, and notes for the user.

    LIMIT: a group of one name is one patient or lesion in all sets, which is wrong for phantoms of different seeds.

    Raises UserError if a set cannot be read or plays another part than its option gives it, if there are too few real
    images, or if --features=w is given and a set has no styles.
    """
    sets, sources, notes = [], [], []
    names = _name_sets([path for _, path in request.all_sets])
    num_real = 1 + len(request.real or ())
    for number, ((option, path), name) in enumerate(zip(request.all_sets, names, strict=True)):
        data = ImageSet(path)
        if request.features == STYLES:
            _check_has_styles(option, path, data.source, request)
        kind = SYNTHETIC
        if number < num_real:
            _check_is_real(option, path, data.source, request, is_first=number == 0)
            kind = REAL
        elif is_projected(data.source):
            kind = PROJECTED
        one, found = _open_set(data, name, kind, request)
        sets.append(one)
        sources.append(data)
        notes += found
    points = Points(sets=sets)
    if points.num_real < LEAST_REALS:
        raise UserError(f"there are {plural(points.num_real, 'real image')}; expected at least {LEAST_REALS}: name "
                        "larger sets with --sets and --real")
    nameless = [one.name for one in sets if one.images.images.label_kind == CLASS and one.images.images.classes is None]
    if nameless and any(one.images.images.classes is not None for one in sets):
        notes.append(f"{listed(nameless)} does not name its classes, which are shown by number; other sets name theirs")
    notes += _shared_images(sets)
    if request.maps is None and "tsne" not in request.map_names:
        notes.append("there is no t-SNE map, since openTSNE is not installed: pip install openTSNE")
    return points, notes


def _check_numbers(out: str, path: Path) -> None:
    """Raise UserError if the numbers of a page would replace another file, such as a protocol."""
    if not path.exists():
        return
    try:
        is_ours = json.loads(path.read_text(encoding="utf-8")).get("format") == NUMBERS_FORMAT
    except (OSError, ValueError, AttributeError):  # a folder, or other files
        is_ours = False
    if not is_ours:
        raise UserError(f"--out is {out}, whose numbers are written to {path.name}, where there is something else; "
                        "choose another name")


def is_projected(source: Mapping[str, Any]) -> bool:
    """Return whether all images of a data set are projections of others, by its `source`."""
    return all(is_generated(part) and part.get("projected") is True for part in parts_of_source(source))


def _name_sets(paths: Sequence[str]) -> list[str]:
    """Return the names of files without .zip; where two are equal, with as many folders as tell them apart."""
    places = [Path(os.path.abspath(path)).parts for path in paths]
    names = [parts[-1].removesuffix(".zip") for parts in places]
    for depth in range(1, max(map(len, places)) + 1):
        count = Counter(names)
        names = [name if count[name] == 1 else "/".join(parts[-depth:])
                 for name, parts in zip(names, places, strict=True)]
    return names


def _check_is_real(option: str, path: str, source: Mapping[str, Any], request: EmbedRequest, *,
                   is_first: bool) -> None:
    """Raise UserError if images of a set that should be real are generated; with styles, projections stand for them."""
    made = [part for part in parts_of_source(source) if is_generated(part)]
    if not made or (request.features == STYLES and is_projected(source)):
        return
    verb = "begins with" if is_first else "has"
    expected = "expected real images" if option == "--real" else "expected the real images first"
    if request.features == STYLES:
        expected = "expected projections of real images (projector.py --data), which stand for them"
    raise UserError(f"{option} {verb} {path}, which {made[0].get('network') or 'a network'} generated; {expected}")


def _check_has_styles(option: str, path: str, source: Mapping[str, Any], request: EmbedRequest) -> None:
    """Raise UserError unless the styles of a set's images are known, or can be computed by --network."""
    if not any(is_generated(part) for part in parts_of_source(source)):
        raise UserError(f"{option} has {path}, which has no styles: it does not record that a network generated it; "
                        f"expected with --features={STYLES} sets of generate.py --zip, and projections for real "
                        "images: project them with projector.py --data")
    if not is_generated(source) or "split" in source:
        raise UserError(f"{option} has {path}, which dataset_tool.py has changed, so that it is not known which style "
                        f"belongs to which image; expected with --features={STYLES} the file that generate.py or "
                        "projector.py wrote")
    if not is_projected(source) and request.network is None:
        raise UserError(f"--network is missing; expected with --features={STYLES} the network that made the images of "
                        f"{path}: {source.get('network')}")


def _open_set(data: ImageSet, name: str, kind: str, request: EmbedRequest) -> tuple[PointSet, list[str]]:
    """Return a set, or a random subset of it, and notes for the user."""
    notes = []
    images = SetImages(data).select(request.max_images, seed=request.seed)
    rows = images.items.tolist()
    if data.label_kind == VECTOR:
        notes.append(f"{name} has {LABELS[VECTOR]}; its images are shown without a class")
    classes = [""] * len(rows)
    if data.label_kind == CLASS:
        missing = data.missing_labels()
        classes = ["" if missing[row] else class_name(data.labels[row], data.classes) for row in rows]
    groups = data.named_groups()
    made = [is_generated(part) for part in parts_of_source(data.source)]
    if kind == SYNTHETIC and not all(made):
        notes.append(f"{name} does not record that a network generated {'all of ' if any(made) else ''}its images; "
                     "they are shown as synthetic ones; name sets of real images with --real")
    if kind == REAL and all(made):
        notes.append(f"{name} has projections, which stand for the real images: photographs have no styles")
    why_not = _why_not(name, kind, data.source, request.no_real_images)
    if why_not:
        notes.append(why_not)
    return PointSet(name=name, kind=kind, images=images, names=[data.names[row] for row in rows], classes=classes,
                    groups=[groups[row] for row in rows], shows_pictures=not why_not, why_not=why_not), notes


def _why_not(name: str, kind: str, source: Mapping[str, Any], no_real_images: bool) -> str:
    """Return why the pictures of a set are not shown, a sentence; "" if they are.

    Projections are as near to their originals as the network can make them, so the same holds for them; and for sets
    that are not known to be generated.
    """
    permission, parts = may_be_redistributed(source), list(parts_of_source(source))
    projected = any(part.get("projected") is True for part in parts)
    is_synthetic = kind == SYNTHETIC and all(map(is_generated, parts)) and not projected
    near = ", which are as near as possible to real images," if projected else ""
    start = f"pictures of {name}{near} are not shown: "
    if permission is False:
        return f"{start}its dataset.json records that they may not be redistributed"
    if is_synthetic:
        return ""
    if no_real_images:
        return f"{start}--no-real-images is given"
    return "" if permission else (f"{start}its dataset.json does not record that they may be redistributed; {_PERMIT}")


def _shared_images(sets: Sequence[PointSet]) -> Iterator[str]:
    """Yield notes about equal images of two sets, of which one is real."""
    for one, other in combinations(sets, 2):
        if one.kind == REAL:
            count = other.images.num_shared(one.images)
            if count:
                yield f"{plural(count, 'image')} of {other.name} {'is' if count == 1 else 'are'} also in {one.name}"
