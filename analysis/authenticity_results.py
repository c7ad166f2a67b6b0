"""What the tests of authenticity found: plain data from which the report and the page are written.

A test has a p-value that is small where the network, or the synthetic set, knows training images better than held-out
ones. p-values of all tests that ran are corrected together (Holm), so that the level holds for the whole battery.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor

from metrics.intervals import DEFAULT_LEVEL, Interval, holm

FOUND_IN = 0.9  # of the draws, in which a test must find planted copies: its power
DEFAULT_TEST_LEVEL = 0.01  # at which a test finds something, over all tests together
PROJECTION_GAP, NEAREST, MEMBERSHIP = 1, 2, 3  # numbers of the tests
TITLES = {PROJECTION_GAP: "Projection gap", NEAREST: "Nearest training image", MEMBERSHIP: "Membership"}


@dataclass(frozen=True, kw_only=True)
class LeakTest:
    """One test, whether it ran or not."""

    number: int  # PROJECTION_GAP, NEAREST or MEMBERSHIP; a number may have several tests
    key: str  # in results.json, such as "nearest-ssim"
    title: str  # such as "structural similarity"
    question: str  # what is compared with what: a sentence
    statistic: str = ""  # what `estimate` is, such as "area under the ROC curve"
    expected: float | None = None  # value of the statistic without a leak; None if it has no fixed one
    estimate: Interval | None = None
    p_value: float | None = None  # one-sided; None if the test did not run
    adjusted: float | None = None  # by Holm's method for all tests that ran, see `adjust`
    control: str = ""  # what the control gave: a sentence
    power: str = ""  # what the test would have found: a sentence
    counts: Mapping[str, int] = field(default_factory=dict)  # such as {"training images": 64, "training groups": 60}
    details: Mapping[str, Any] = field(default_factory=dict)  # further plain JSON values for results.json
    reason: str | None = None  # why it did not run

    def is_found(self, level: float) -> bool:
        """Tell whether the test found a leak."""
        return self.adjusted is not None and self.adjusted <= level


def adjust(tests: Sequence[LeakTest]) -> list[LeakTest]:
    """Return the tests with p-values adjusted for the number of those that ran."""
    ran = [test for test in tests if test.p_value is not None]
    values = dict(zip((test.key for test in ran), holm([test.p_value for test in ran]), strict=True))
    return [replace(test, adjusted=values.get(test.key)) for test in tests]


@dataclass(frozen=True, kw_only=True)
class GalleryPair:
    """An image, and the training image that it is most similar to."""

    name: str  # of the image in its data set
    training_name: str
    image: Tensor  # uint8 [C, H, W]
    training_image: Tensor  # uint8 [C, H, W]
    similarity: float  # SSIM after alignment
    ratio: float  # of its distance to that of the most similar image of another group: 1 = no nearer, 0 = equal
    alignment: str  # how the image was aligned, such as "mirrored, turned by 90 degrees, shifted by 3, 0 pixels"


@dataclass(frozen=True, kw_only=True)
class SecondaryNumber:
    """A number that is reported, but decides nothing."""

    name: str  # such as "AuthPct"
    value: float | None
    interval: Interval | None = None
    control: float | None = None  # the same number of held-out images, where that is meaningful
    meaning: str  # what it is, and the value to expect: a sentence
    weakness: str  # why it decides nothing: a sentence
    reason: str | None = None  # why there is none


@dataclass(frozen=True, kw_only=True)
class PlantedPower:
    """How often a test found copies that were planted into the synthetic set."""

    key: str  # of the test
    shares: Sequence[float]  # of the set that are copies
    num_draws: int
    found: Mapping[str, Sequence[int]]  # by transformation of the copies: number of draws in which they were found

    def smallest_share(self, transformation: str) -> float | None:
        """Return the smallest share from which on copies were found in FOUND_IN of the draws; None if none was."""
        enough = [count >= FOUND_IN * self.num_draws for count in self.found[transformation]]
        place = len(enough)
        while place and enough[place - 1]:
            place -= 1
        return self.shares[place] if place < len(enough) else None


@dataclass(frozen=True, kw_only=True)
class AuthenticityResults:
    """All that results.json and the page are written from."""

    protocol: Mapping[str, Any]  # a summary, of plain JSON values
    settings: Mapping[str, Any]  # network, synthetic set, detector, seeds, versions: plain JSON values
    counts: Mapping[str, Mapping[str, int]]  # by set, such as {"training": {"images": 8011, "groups": 5988}}
    tests: Sequence[LeakTest]  # adjusted, in order of number
    level: float = DEFAULT_TEST_LEVEL
    ci: float = DEFAULT_LEVEL
    equal_images: Sequence[tuple[str, str]] = ()  # names of synthetic and training images that are equal pixel by pixel
    distances: Mapping[str, Mapping[str, np.ndarray]] = field(default_factory=dict)  # by quantity and set; histograms
    pairs: Mapping[str, Sequence[GalleryPair]] = field(default_factory=dict)  # "synthetic" and "control": most similar
    secondary: Sequence[SecondaryNumber] = ()
    power: Sequence[PlantedPower] = ()
    notes: Sequence[str] = ()  # sentences that belong to all results, such as why a set is not verified
    is_verified: bool = True

    @property
    def found(self) -> list[LeakTest]:
        """The tests that found a leak."""
        return [test for test in self.tests if test.is_found(self.level)]

    @property
    def has_copies(self) -> bool:
        """Whether the nearest training images show copies in the synthetic set, or images are equal to theirs."""
        return bool(self.equal_images) or any(test.number == NEAREST for test in self.found)
