"""Does a network copy its training images? Tests with controls and known power: `study.py authenticity`.

The training part of the protocol is what the network saw; the validation and test parts are what it did not see, images
of the same kind. Whatever a test measures of training images or synthetic ones, it measures of held-out images too.

In --outdir:

    work/              what was measured of images; the same command continues
    projections/PART   projections of images of a part, as projector.py writes them
    results.json       all numbers
    page.html          the same as a page, with the most similar pairs of images
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from analysis.authenticity_inputs import COPIES, EXIT_COPIES, AuthenticityRequest, Opened, open_all
from analysis.authenticity_measures import (
    Measured,
    Measurer,
    StudyImages,
    Work,
    discriminator_scores,
    real_features,
)
from analysis.authenticity_page import write_authenticity_page
from analysis.authenticity_report import describe, write_results
from analysis.authenticity_results import (
    NEAREST,
    AuthenticityResults,
    GalleryPair,
    LeakTest,
    PlantedPower,
    adjust,
)
from analysis.discriminator_scores import label_rows, match_classes, open_discriminator
from analysis.leak_statistics import Scores
from analysis.leak_tests import (
    DISCRIMINATOR,
    DISTANCE,
    BatterySettings,
    Sides,
    distance_scores,
    matched_control,
    membership_not_run,
    membership_tests,
    nearest_not_run,
    nearest_tests,
    power_of_nearest,
    powers_of_distance,
    projection_not_run,
    projection_test,
    secondary_numbers,
    with_power,
)
from analysis.near_duplicates import ORIENTATIONS, orient
from analysis.planted_copies import NUM_ORIGINALS, PLANTED_VERSION, SHARES, TRANSFORMATIONS, PlantedCopies
from analysis.projection_gap import (
    ProjectedPart,
    choose_matched,
    combine,
    projection_problem,
    read_projections,
    run_projections,
)
from analysis.protocol import TRAIN, open_part, open_unchanged
from dnnlib.cli import GroupedCommand, UserError, check_outdir
from dnnlib.process_lock import LockHeld, ProcessLock
from generation.command import flags_of
from generation.network import require_same
from metrics.detectors.base import Detector
from metrics.detectors.registry import open_detector
from metrics.features import from_main, measuring, on_main_first, on_main_for_long
from metrics.image_sources import FakeLabels, GeneratedImages
from torch_utils.device import find_project_version, settle_device
from torch_utils.distributed import Place, Processes, join
from torch_utils.launch import launch
from training.run_record import software_versions

NUM_OTHERS = 1000  # training images in the second control of test 2, at most
NUM_PAIRS = 20  # in each gallery
_NONE_IN_COMMON = "no class has both training and held-out images that the network knows"  # why test 1 does not run

HELP = f"""Test whether a network, or a set of synthetic images, gives away its training images.

\b
python study.py authenticity --protocol=protocol.json --network=network-snapshot-001000.safetensors \\
    --synthetic=synthetic.zip --outdir=authenticity
python study.py authenticity --protocol=protocol.json --synthetic=synthetic.zip --outdir=authenticity \\
    --fail-on=copies --no-real-images

Tests: 1. Are training images nearer to their projections than held-out ones? 2. Are synthetic images nearer to training
images than held-out ones are? 3. Does the discriminator, or the nearest synthetic image, tell training images from
held-out ones? Test 1 and the discriminator need --network, the rest needs --synthetic. p-values are corrected for all
tests together, and copies are planted to find out what the tests would have found.

With --fail-on=copies the exit code is {EXIT_COPIES} if test 2 finds copies or an image equals a training image;
otherwise it is 0 whatever is found. The same command again continues where it stopped. BOOL is 1 or 0, true or false,
yes or no.
"""


def make_authenticity_command() -> click.Command:
    """Return the command `study.py authenticity`."""
    return GroupedCommand("authenticity", callback=_run, params=flags_of(AuthenticityRequest), help=HELP,
                          short_help="Test whether a network or synthetic images give away training images.",
                          context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})


def _run(**flags: Any) -> int:
    request, place = AuthenticityRequest(**flags), Place.from_environment()
    count = place.processes(request.gpus)
    check_outdir(request.outdir)
    device = settle_device(request.device, place, count, tunes_malloc=request.tune_malloc)
    if count > 1 and not place.is_started:
        return launch(count)
    with join(device) as processes:
        has_copies = run_authenticity(request, processes)
    return EXIT_COPIES if has_copies and request.fail_on == COPIES else 0


def run_authenticity(request: AuthenticityRequest, processes: Processes) -> bool:
    """Run the tests, write and print what they find; return whether test 2 found copies. All processes call this."""
    opened, outdir, is_main = open_all(request), Path(request.outdir), processes.rank == 0
    for network in (opened.network, opened.reference):
        if network is not None:
            require_same(network, processes)
    # Before anything is measured or written: test 1 may take hours until the detector is needed.
    detector = None if opened.synthetic is None else _open_detector(request, processes)
    projected = None
    if request.projections is not None:
        projected = from_main(lambda: read_projections(request.projections, opened.protocol, opened.network))
    with _held(outdir) if is_main else nullcontext():
        battery = Battery(request, opened, detector, projected,
                          Work(outdir / "work", processes, verbose=request.verbose))
        results = battery.run()

        def write() -> bool:
            write_results(outdir, results)
            write_authenticity_page(outdir, results, real_images=not request.no_real_images)
            for line in describe(results):
                click.echo(line)
            return results.has_copies

        return from_main(write)


def _open_detector(request: AuthenticityRequest, processes: Processes) -> Detector:
    return on_main_first(lambda: open_detector(request.detector, device=processes.device,
                                               weights=request.detector_weights))


@contextmanager
def _held(outdir: Path) -> Iterator[None]:
    """Create --outdir and lock it; if this program is stopped, print that its work so far is kept."""
    outdir.mkdir(parents=True, exist_ok=True)
    try:
        with ProcessLock(outdir / "lock"):
            yield
    except LockHeld as error:
        raise UserError(f"--outdir={outdir} is in use by {error}; wait for it, or choose another folder") from error
    except KeyboardInterrupt:
        click.echo(f"the work so far is kept in {outdir}; the same command continues", err=True)
        raise


class Battery:
    """Measures what the tests need, and runs them. All processes call its methods together."""

    def __init__(self, request: AuthenticityRequest, opened: Opened, detector: Detector | None,
                 projected: Sequence[ProjectedPart] | None, work: Work):
        self.request, self.opened, self.detector, self.projected, self.work = request, opened, detector, projected, work
        self.device = work.processes.device
        training, heldout = opened.training, opened.heldout
        strata = {name: number for number, name in enumerate(sorted({*training.classes, *heldout.classes}))}
        self.sides = Sides(train_groups=training.groups, heldout_groups=heldout.groups,
                           train_strata=np.array([strata[name] for name in training.classes]),
                           heldout_strata=np.array([strata[name] for name in heldout.classes]))
        self.settings = BatterySettings(level=request.level, ci=request.ci, resamples=request.resamples,
                                     draws=request.draws, seed=request.seed)
        self.distances: dict[str, dict[str, np.ndarray]] = {}  # for histograms
        self.scores: dict[str, tuple[Scores, Scores]] = {}  # by key of a test of training against held-out images

    def run(self) -> AuthenticityResults | None:
        """Return the results; None except on the main process."""
        tests = [*self._projection_gap(), *self._discriminator()]
        measured = self._measure()
        tests += on_main_for_long(lambda beat: self._nearest(measured)) or []
        return on_main_for_long(lambda beat: self._finish(tests, measured, beat))

    # Test 1

    def _projection_gap(self) -> list[LeakTest]:
        request, opened = self.request, self.opened
        reason = None
        if opened.network is None:
            reason = "no --network is given"
        elif request.count == 0 and request.projections is None:
            reason = "--count=0 is given"
        else:
            reason = projection_problem(opened.network)
        if reason is not None:
            return [projection_not_run(reason)]
        found = self.projected
        if found is None:
            parts = {name: open_part(opened.protocol, name) for name in (TRAIN, *request.heldout_names)}
            known = set.intersection(*(set(match_classes(opened.network.classes, images.classes, images.known_classes))
                                       for images in (opened.training, opened.heldout)))
            matched = choose_matched(parts, request.count, seed=request.seed, known=known)
            if not matched.count:
                return [projection_not_run(_NONE_IN_COMMON)]
            if matched.count < matched.wanted and self.work.is_main:
                click.echo(f"only {matched.count} training images, fewer than --count={matched.wanted}, can be matched "
                           "with held-out images of their class, each of another group", err=True)
            folders = run_projections(
                Path(request.outdir) / "projections", request.network, opened.network,
                {name: (open_unchanged(opened.protocol, name), matched.rows[name]) for name in parts},
                num_steps=request.num_steps, processes=self.work.processes)
            found = from_main(lambda: read_projections(list(folders.values()), opened.protocol, opened.network))
        sides = combine(found)
        if not all(len(side.values) for side in sides):
            return [projection_not_run(_NONE_IN_COMMON)]
        members, heldout = (Scores(values=side.values, groups=side.groups, strata=side.strata) for side in sides)
        self.scores["projection-gap"] = members, heldout
        self.distances["distance to the projection"] = {"training images": -members.values,
                                                        "held-out images": -heldout.values}
        setup = {name: value for name, value in found[0].settings.items()
                 if isinstance(value, (str, int, float)) and name in ("detector", "num_steps", "space", "seed")}
        return on_main_for_long(lambda beat: [projection_test(members, heldout, self.settings, setup)]) or []

    # Test 2, and what test 3 and the power need of the synthetic images

    def _measure(self) -> "Measurements | None":
        """Measure synthetic images, the controls and planted copies; None without synthetic images, and on others."""
        request, opened, work = self.request, self.opened, self.work
        if opened.synthetic is None:
            return None
        real = [real_features(work, self.detector, images, use_cache=not request.no_cache, workers=request.workers)
                for images in (opened.training, opened.heldout)]
        reals = np.concatenate(real) if work.is_main else None
        reals_key = f"{opened.training.content}/{opened.heldout.content}"
        measurer = Measurer(work, self.detector, opened.training, real[0], workers=request.workers)
        synthetic = measurer.measure("synthetic images", opened.synthetic, {"images": opened.synthetic.content},
                                     reals=reals, reals_key=reals_key)
        heldout = measurer.measure("held-out images", opened.heldout, {"images": opened.heldout.content})
        rows = self._random_training_rows(min(len(opened.heldout), NUM_OTHERS))
        others = opened.training.select(rows, "training images among other groups")
        of_others = measurer.measure(others.title, others, {"images": others.content}, own_groups=others.groups)
        planted = to_reference = None
        if request.draws:
            originals = opened.training.select(self._random_training_rows(NUM_ORIGINALS), "copied training images")
            copies = PlantedCopies(originals, request.seed)
            planted = measurer.measure("planted copies", copies, {"images": originals.content, "seed": request.seed,
                                                                  "planted": PLANTED_VERSION},
                                       reals=reals, reals_key=reals_key, of_each=True)
        if opened.reference is not None:
            generated = self._reference_images(len(opened.synthetic))
            with measuring(opened.reference.G, self.device):
                to_reference = measurer.distances("images of the reference network", generated, {
                    "network": opened.reference.sha256, "seed": generated.seed,
                    "labels": hashlib.sha256(generated.labels.table.numpy().tobytes()).hexdigest()}, reals, reals_key)
        if not work.is_main:
            return None
        return Measurements(features=real, synthetic=synthetic, heldout=heldout, others=of_others, other_images=others,
                            planted=planted, to_reference=to_reference)

    def _random_training_rows(self, count: int) -> np.ndarray:
        """Return the rows of random training images, each of another group as far as possible."""
        order = np.random.RandomState(self.request.seed).permutation(len(self.opened.training))
        first = np.unique(self.opened.training.groups[order], return_index=True)[1]
        is_first = np.isin(np.arange(len(order)), first)
        return order[np.argsort(~is_first, kind="stable")][:count]

    def _reference_images(self, count: int) -> GeneratedImages:
        """Return `count` images of the reference network, with the classes of the training part."""
        network, training = self.opened.reference, self.opened.training
        table = label_rows(network.classes, training.classes, training.known_classes)
        table = table[~table.isnan().any(dim=1)]
        if not len(table):
            raise UserError("--reference has none of the classes of the training part; expected a network of images of "
                            "the same kind")
        return GeneratedImages(network.G.to(self.device), FakeLabels(table), count=count,
                               seed=self.request.seed, device=self.device)

    def _nearest(self, measured: "Measurements | None") -> list[LeakTest]:
        """Return test 2, and the part of test 3 that needs no network; called by the main process."""
        opened, settings = self.opened, self.settings
        if measured is None:
            reason = "no --synthetic is given"
            return [*nearest_not_run(reason), *membership_not_run(DISTANCE, reason)]
        tests = list(nearest_tests(measured.synthetic, measured.heldout, measured.others, opened.heldout.groups,
                                   measured.other_images.groups, settings, *self._control))
        titles = {"synthetic images": measured.synthetic, "held-out images": measured.heldout,
                  "training images among other groups": measured.others}
        for text, values in (
                ("1 - SSIM with the most similar training image, after alignment", lambda nearest: 1 - nearest.ssim),
                ("1 - SSIM, as a share of that with the next group", lambda nearest: nearest.ratio),
                ("feature distance to the nearest training image", lambda nearest: nearest.feature_distance),
                ("feature distance, as a share of that to the next group", lambda nearest: nearest.feature_ratio),
                ("distance of 16x16 pixels, in levels of 255", lambda nearest: nearest.pixel_distance),
                ("distance of 16x16 pixels, as a share of that to the next group",
                 lambda nearest: nearest.pixel_ratio)):
            self.distances[text] = {title: values(each.nearest) for title, each in titles.items()}
        train, heldout = np.split(measured.synthetic.to_reals, [len(opened.training)])
        self.distances["feature distance of real images to the nearest synthetic image"] = {
            "training images": train, "held-out images": heldout}
        return tests + self._membership(DISTANCE, *np.split(
            distance_scores(measured.synthetic.to_reals, measured.to_reference), [len(opened.training)]))

    @cached_property
    def _control(self) -> tuple[np.ndarray, str]:
        """The held-out images that synthetic ones are compared with, and a sentence about them."""
        synthetic, heldout = self.opened.synthetic, self.opened.heldout
        return matched_control(synthetic.classes, heldout.classes, heldout.groups, self.settings.seed)

    def _membership(self, name: str, train: np.ndarray, heldout: np.ndarray) -> list[LeakTest]:
        tests = membership_tests(name, self.sides, train, heldout, self.settings)
        if tests[0].p_value is not None:
            self.scores[tests[0].key] = self.sides.scores(train, heldout)
        return tests

    # Test 3

    def _discriminator(self) -> list[LeakTest]:
        opened, work = self.opened, self.work
        if opened.network is None:
            return membership_not_run(DISCRIMINATOR, "no --network is given")
        D = open_discriminator(self.request.network, opened.network, opened.training.sets[0].images.shape,
                               device=self.device)
        if isinstance(D, str):
            return membership_not_run(DISCRIMINATOR, D)
        scores = [discriminator_scores(work, D, opened.network.classes, images,
                                       f"{images.title} scored by the discriminator",
                                       {"network": opened.network.sha256})
                  for images in (opened.training, opened.heldout)]
        if work.is_main:
            self.distances["score of the discriminator"] = {
                "training images": scores[0][~np.isnan(scores[0])], "held-out images": scores[1][~np.isnan(scores[1])]}
        return on_main_for_long(lambda beat: self._membership(DISCRIMINATOR, *scores)) or []

    # Results

    def _finish(self, tests: list[LeakTest], measured: "Measurements | None",
                beat: Callable[[], None]) -> AuthenticityResults:
        """Add power, secondary numbers and pictures; called by the main process."""
        opened, settings = self.opened, self.settings
        tests = adjust(sorted(tests, key=lambda test: test.number))
        power, secondary, pairs = [], [], {}
        planted = None if measured is None else measured.planted
        if settings.draws:  # where copies are planted, they show the power of a distance
            scores = {key: sides for key, sides in self.scores.items() if planted is None or DISTANCE not in key}
            tests = with_power(tests, scores, settings, beat)
        if planted is not None:
            power = self._planted_power(tests, measured, beat)
        if measured is not None:
            secondary = list(secondary_numbers(*measured.features, measured.synthetic.features, self.sides, settings))
            pairs = {"synthetic": self._pairs(opened.synthetic, measured.synthetic),
                     "control": self._pairs(opened.heldout, measured.heldout)}
        return AuthenticityResults(
            protocol=self._describe_protocol(), settings=self._describe_settings(), counts=self._counts(),
            tests=tests, level=settings.level, ci=settings.ci, equal_images=opened.equal_images,
            distances=self.distances, pairs=pairs, secondary=secondary, power=power, notes=opened.notes,
            is_verified=opened.is_verified)

    def _planted_power(self, tests: list[LeakTest], measured: "Measurements",
                       beat: Callable[[], None]) -> list[PlantedPower]:
        opened, settings, planted = self.opened, self.settings, measured.planted
        nearest = [test for test in tests if test.number == NEAREST and test.p_value is not None]
        distance = [test for test in tests if DISTANCE in test.key and test.p_value is not None]
        total = (len(nearest) + len(distance)) * (len(TRANSFORMATIONS) + 1) * len(SHARES) * settings.draws
        with self.work.showing(total, "tests with planted copies") as advance:
            def tick() -> None:
                beat()
                advance(1)

            return [*(power_of_nearest(test, measured.synthetic, measured.heldout, planted, opened.heldout.groups,
                                       self._control[0], tests, settings, tick) for test in nearest),
                    *powers_of_distance(distance, self.sides, measured.synthetic.to_reals, planted.to_reals,
                                        measured.to_reference, len(opened.synthetic), tests, settings, tick)]

    def _pairs(self, images: StudyImages, measured: Measured) -> list[GalleryPair]:
        """Return the images that are most like copies, each turned as its training image is."""
        nearest, training = measured.nearest, self.opened.training
        scores = nearest.copy_scores()["ssim-ratio"]
        order = np.argsort(-scores, kind="stable")[:NUM_PAIRS]
        pictures = []
        for index in order[nearest.row[order] >= 0].tolist():
            row = int(nearest.row[index])
            image, other = (torch.from_numpy(one.transpose(2, 0, 1).copy())
                            for one in (images.item(index), training.item(row)))
            pictures.append(GalleryPair(
                name=images.names[index], training_name=training.names[row],
                image=orient(image, ORIENTATIONS[nearest.orientation[index]]).contiguous(), training_image=other,
                similarity=float(nearest.ssim[index]), ratio=float(nearest.ratio[index]),
                alignment=nearest.describe_alignment(index)))
        return pictures

    def _counts(self) -> dict[str, dict[str, int]]:
        opened = self.opened
        found = {images.title: {"images": len(images), "groups": images.num_groups}
                 for images in (opened.training, opened.heldout)}
        return found if opened.synthetic is None else found | {"synthetic images": {"images": len(opened.synthetic)}}

    def _describe_protocol(self) -> dict[str, Any]:
        protocol = self.opened.protocol
        return {"sha256": protocol.sha256, "held_out": self.request.heldout_names,
                "num_near_duplicates": protocol.num_near_duplicates}

    def _describe_settings(self) -> dict[str, Any]:
        request, opened = self.request, self.opened
        networks = {name: None if network is None else {
            "name": network.name, "sha256": network.sha256, "kimg": network.info.get("kimg")}
            for name, network in (("network", opened.network), ("reference", opened.reference))}
        synthetic = None if opened.synthetic is None else {
            "name": Path(request.synthetic).name, "images": len(opened.synthetic), "content": opened.synthetic.content}
        return {**networks, "synthetic": synthetic, "detector": request.detector, "count": request.count,
                "num_steps": request.num_steps, "resamples": request.resamples, "draws": request.draws,
                "seed": request.seed, "device": self.device.type, "version": find_project_version(),
                "software": software_versions()}


@dataclass(frozen=True, kw_only=True, eq=False)
class Measurements:
    """What was measured, on the main process."""

    features: Sequence[np.ndarray]  # of training and of held-out images
    synthetic: Measured
    heldout: Measured
    others: Measured
    other_images: StudyImages
    planted: Measured | None
    to_reference: np.ndarray | None  # float32 [R], distance of each real image to the nearest image of the reference
