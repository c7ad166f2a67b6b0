"""What `study.py authenticity` works on: its options, and the images and networks that they name, opened, checked."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import click
import numpy as np

from analysis.authenticity_measures import StudyImages
from analysis.authenticity_results import DEFAULT_TEST_LEVEL
from analysis.leak_tests import NUM_TESTS
from analysis.planted_copies import NUM_DRAWS
from analysis.protocol import TEST, TRAIN, VAL, Protocol, open_part, open_unchanged
from analysis.synthetic_sets import GeneratedSet, check_network, check_reference, open_generated
from dnnlib.cli import UserError, UserPath, split_paths
from dnnlib.text import listed
from dnnlib.workers import usable_cores
from generation.command import flag
from generation.network import OpenNetwork, open_network
from imagesets.classes import CLASS, class_name
from imagesets.pixel_hashes import read_pixel_hashes
from imagesets.reader import ImageSet, describe_shape
from metrics.detectors.efficientnet_lite0 import EfficientNetLite0
from metrics.detectors.registry import DETECTOR_FORMS
from metrics.image_sources import SelectedImages, SetImages
from metrics.intervals import DEFAULT_LEVEL, group_numbers
from torch_utils.device import DEVICE_HELP, TUNE_MALLOC_HELP, check_counts
from training.dataset import history_of, parts_of_source

COPIES = "copies"  # --fail-on
EXIT_COPIES = 10
HELD_OUT = (VAL, TEST)  # parts that no network may have seen
_STUDY, _OUTPUT, _PROJECTION, _TESTS, _SPEED = ("Study", "Output", "Projection", "Tests", "Speed and devices")


@dataclass(frozen=True, kw_only=True)
class AuthenticityRequest:
    """The options of `study.py authenticity`. Raises UserError if one is missing or out of range."""

    protocol: str | None = flag(_STUDY, "FILE", "File of study.py protocol. Required.", type=UserPath())
    network: str | None = flag(
        _STUDY, "FILE", "Network that was trained on the training part of the protocol, with its discriminator.",
        type=UserPath())
    synthetic: str | None = flag(_STUDY, "PATH", "Synthetic images, made by generate.py --zip.", type=UserPath())
    reference: str | None = flag(
        _STUDY, "FILE", "Network trained on other images of the same kind: in test 3, distances to the synthetic "
        "images are compared with those to its images.", type=UserPath())
    heldout: str = flag(_STUDY, "PART,...", "Parts of the protocol that no network has seen.",
                        default=",".join(HELD_OUT))
    unverified_synthetic: bool = flag(
        _STUDY, None, "Accept a network, or synthetic images of one, that is not known to be trained on the training "
        "part alone; all results say so.", default=False)

    outdir: str | None = flag(_OUTPUT, "DIR", "Folder for the results. Required.", type=UserPath())
    no_real_images: bool = flag(
        _OUTPUT, None, "Write the page without pictures of real images, and of synthetic images that may be copies.",
        default=False)
    fail_on: str | None = flag(
        _OUTPUT, COPIES, f"Exit with code {EXIT_COPIES} if test 2 finds copies, or a synthetic image equals a training "
        "image.", type=click.Choice([COPIES]))

    projections: tuple[str, ...] | None = flag(
        _PROJECTION, "DIR,...", "Results of projector.py --data for the training part and for held-out parts, instead "
        "of projecting images here. Can be repeated.", type=UserPath(), multiple=True, callback=split_paths)
    count: int = flag(_PROJECTION, "INT", "Number of training images to project, and as many held-out ones of the same "
                      "classes; 0 = skip test 1.", default=64)
    num_steps: int = flag(_PROJECTION, "INT", "Optimization steps per projection.", default=1000)

    detector: str = flag(_TESTS, "NAME", f"Feature detector: {DETECTOR_FORMS}.", default=EfficientNetLite0.name)
    detector_weights: str | None = flag(_TESTS, "PATH", "File with the detector's weights, instead of downloading "
                                        "them.", type=UserPath())
    level: float = flag(_TESTS, "LEVEL", "Significance level of all tests together: the chance of a false alarm.",
                        default=DEFAULT_TEST_LEVEL)
    ci: float = flag(_TESTS, "LEVEL", "Confidence level of the intervals.", default=DEFAULT_LEVEL)
    resamples: int = flag(_TESTS, "N", "Number of bootstrap resamples and of permutations of groups.", default=2000)
    draws: int = flag(_TESTS, "N", "Number of times that copies are planted for each share and transformation, to find "
                      "out what the tests would have found; 0 skips this.", default=NUM_DRAWS)
    seed: int = flag(_TESTS, "INT", "Random seed.", default=0)

    device: str = flag(_SPEED, "NAME", DEVICE_HELP, default="auto")
    gpus: int | None = flag(_SPEED, "INT", "Number of processes: one per GPU, or several on a CPU.", shown="1")
    workers: int | None = flag(_SPEED, "INT", "Number of processes that decode images, for each process.",
                               shown="its share of the CPU cores, at most 8")
    no_cache: bool = flag(_SPEED, None, "Neither read nor write the cache of image features.", default=False)
    tune_malloc: bool = flag(_SPEED, "BOOL", TUNE_MALLOC_HELP, default=True)
    verbose: bool = flag(_SPEED, "BOOL", "Show progress.", default=True)

    def __post_init__(self) -> None:
        for name, example in (("protocol", "protocol.json"), ("outdir", "authenticity")):
            if not getattr(self, name):
                raise UserError(f"--{name} is missing; expected one, such as --{name}={example}, or see --help")
        if self.network is None and self.synthetic is None:
            raise UserError("--network and --synthetic are both missing; expected one of them, or better both: a "
                            "network file, and images made from it by generate.py --zip")
        if self.reference is not None and self.synthetic is None:
            raise UserError("--reference is given without --synthetic, whose distances it calibrates; expected both: "
                            "leave --reference out")
        if self.projections is not None and self.network is None:
            raise UserError("--projections is given without --network, which made them; expected both: leave "
                            "--projections out")
        for name in ("level", "ci"):
            if not 0 < getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name):g}; expected a number between 0 and 1")
        check_counts(gpus=self.gpus, workers=self.workers, resamples=self.resamples, **{"num-steps": self.num_steps})
        for name in ("count", "draws"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name} is {getattr(self, name)}; expected 0 or more")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"--seed is {self.seed}; expected a number from 0 to {2**32 - 1}")
        least = math.ceil(NUM_TESTS / self.level) - 1
        if self.resamples < least:
            raise UserError(f"--resamples is {self.resamples}, with which p-values are too coarse for {NUM_TESTS} "
                            f"tests at --level={self.level:g}; expected at least {least}")
        unknown = [name for name in self.heldout_names if name == TRAIN or not name]
        if unknown or len(set(self.heldout_names)) < len(self.heldout_names):
            raise UserError(f"--heldout is {self.heldout or 'empty'}; expected names of parts that no network has "
                            f"seen, each once, such as {','.join(HELD_OUT)}")

    @property
    def heldout_names(self) -> list[str]:
        return [name.strip() for name in self.heldout.split(",")]


@dataclass(frozen=True, kw_only=True, eq=False)
class Opened:
    """What a study is about, opened and checked."""

    protocol: Protocol
    training: StudyImages
    heldout: StudyImages
    network: OpenNetwork | None
    reference: OpenNetwork | None
    synthetic: StudyImages | None
    equal_images: Sequence[tuple[str, str]]  # names of synthetic and training images
    notes: Sequence[str]
    is_verified: bool


def open_all(request: AuthenticityRequest) -> Opened:
    """Open the protocol's parts, the synthetic set and the networks. Raises UserError if something does not fit."""
    protocol, workers = Protocol.read(request.protocol), request.workers or usable_cores()
    names = {name: protocol.part(name).name for name in request.heldout_names}
    external = [name for name in names if protocol.part(name).role not in HELD_OUT]
    if external:
        raise UserError(f"--heldout has {external[0]}, an external set, whose images are of another kind than training "
                        f"images; expected some of {','.join(HELD_OUT)}")
    options = {"allow_unverified": request.unverified_synthetic, "workers": workers}
    network = reference = generated = None
    notes, verified = [], True
    if request.network is not None:
        network = open_network(request.network, "cpu")
        found = check_network(network, protocol, **options)
        notes.append(f"network: {found.reason}")
        verified &= found.is_verified
    if request.synthetic is not None:
        generated = open_generated(request.synthetic, protocol, **options)
        notes.append(f"synthetic set: {generated.reason}")
        verified &= generated.is_verified
    if request.reference is not None:
        reference = open_network(request.reference, "cpu", "--reference")
        found = check_reference(reference, network, protocol, workers=workers)
        notes.append(f"reference network: {found.reason}")
    notes += _mismatches(network, generated, protocol)
    training = _study_images(protocol, [TRAIN], "training images", workers)
    heldout = _study_images(protocol, list(names), "held-out images", workers)
    shape = training.sets[0].images.shape
    if shape[1] != shape[2]:
        raise UserError(f"the training part has images of {describe_shape(shape)}; expected square ones: convert them "
                        "with dataset_tool.py --transform=center-crop")
    synthetic, equal = None, []
    if generated is not None:
        synthetic = _synthetic_images(generated.data, workers)
        names = open_unchanged(protocol, TRAIN).names
        equal = [(generated.data.names[row], names[other]) for row, other in generated.equal_rows]
    for what, found in (("--heldout", heldout), ("--synthetic", synthetic)):
        for images in () if found is None else found.sets:
            if images.images.shape != shape:
                raise UserError(f"{what} has images of {describe_shape(images.images.shape)} ({images.images.path}), "
                                f"the training part of {describe_shape(shape)}; expected equal sizes: convert them "
                                "with dataset_tool.py --resolution")
    for option, found in (("--network", network), ("--reference", reference)):
        if found is not None and (found.G.img_channels, *[found.G.img_resolution] * 2) != tuple(shape):
            raise UserError(f"{option} makes images of {found.G.img_resolution}x{found.G.img_resolution} pixels with "
                            f"{found.G.img_channels} channels, the training part has {describe_shape(shape)}; expected "
                            "equal sizes: choose a network of such images, or parts of its size")
    return Opened(protocol=protocol, training=training, heldout=heldout, network=network, reference=reference,
                  synthetic=synthetic, equal_images=equal, notes=notes, is_verified=verified)


def _mismatches(network: OpenNetwork | None, generated: GeneratedSet | None, protocol: Protocol) -> Iterator[str]:
    """Yield sentences about what is not wrong, but changes what results mean."""
    if network is not None and generated is not None:
        others = {str(source.get("network")) for source in parts_of_source(generated.data.source)
                  if source.get("network_sha256") not in (None, network.sha256)}
        if others:
            yield f"the synthetic set is of {listed(sorted(others))}, another network file than {network.name}"
    if network is not None:
        numbers = [_num_images(record) for record in history_of(network.training)]
        num_training = protocol.part(TRAIN).num_images
        if numbers and all(number is not None and number < num_training for number in numbers):
            yield (f"{network.name} saw at most {max(numbers)} of the {num_training} training images; tests 1 and 3 "
                   "count all of them as training images, which hides what it remembers: make a protocol of those")


def _num_images(record: Any) -> int | None:
    """Return the number of training images of a record, of all sites together; None if it is not known."""
    if not isinstance(record, Mapping):
        return None
    sites = record.get("sites")
    numbers = [site.get("num_images") if isinstance(site, Mapping) else None
               for site in (sites.values() if isinstance(sites, Mapping) else [record])]
    return sum(numbers) if all(isinstance(number, int) for number in numbers) else None


def _study_images(protocol: Protocol, names: Sequence[str], title: str, workers: int) -> StudyImages:
    """Return the images of parts of the protocol, each sorted by pixels."""
    sets, texts, classes, groups, used, known = [], [], [], [], 0, None
    for name in names:
        part, opened = open_part(protocol, name), open_unchanged(protocol, name)
        order, hashes = _order_by_pixels(opened, workers)
        sets.append(SelectedImages(part.images, order))
        texts += [f"{name} {part.names[row]}" if len(names) > 1 else part.names[row] for row in order]
        classes += [part.classes[row] for row in order]
        groups.append(used + _join_groups(part.groups[order], hashes))
        used = int(groups[-1].max()) + 1
        known = known or part.images.classes
    return StudyImages(title=title, sets=sets, names=texts, classes=classes, known_classes=known,
                       groups=np.concatenate(groups))


def _synthetic_images(data: ImageSet, workers: int) -> StudyImages:
    order, _ = _order_by_pixels(data, workers)
    has_classes = data.label_kind == CLASS and not data.missing_labels().any()
    return StudyImages(title="synthetic images", sets=[SelectedImages(SetImages(data), order)],
                       names=[data.names[row] for row in order], known_classes=data.classes,
                       classes=[class_name(data.label(row), data.classes) if has_classes else "" for row in order],
                       groups=np.arange(len(data)))


def _order_by_pixels(data: ImageSet, workers: int) -> tuple[np.ndarray, list[str]]:
    """Return an order of the images that does not depend on that of the set, int64 [N], and their hashes in it."""
    hashes = read_pixel_hashes(data, workers=workers)
    order = sorted(range(len(data)), key=lambda row: (hashes[row], data.names[row]))
    return np.array(order), [hashes[row] for row in order]


def _join_groups(groups: np.ndarray, hashes: Sequence[str]) -> np.ndarray:
    """Return the groups numbered from 0 in order of the images, int64 [N]; those that share an image become one.

    groups:  int64 [N], from 0
    hashes:  of the images, equal ones beside each other

    A training image that is there twice, under two names, is remembered first of all. If it were its own next image of
    another group, no copy of it would be nearer to one than to the other.

    LIMIT: images that are nearly equal, such as two files of one photograph, still keep their groups apart.
    """
    from scipy.sparse import coo_array  # here: importing it takes 0.3 s
    from scipy.sparse.csgraph import connected_components

    same = np.flatnonzero([one == other for one, other in pairwise(hashes)])
    count = int(groups.max()) + 1
    links = coo_array((np.ones(len(same)), (groups[same], groups[same + 1])), shape=(count, count))
    return group_numbers(connected_components(links, directed=False)[1][groups], len(groups))
