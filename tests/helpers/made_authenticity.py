"""Results of tests of authenticity that are made up."""

from dataclasses import replace

import numpy as np
import torch

from analysis.authenticity_results import (
    MEMBERSHIP,
    NEAREST,
    PROJECTION_GAP,
    AuthenticityResults,
    GalleryPair,
    LeakTest,
    PlantedPower,
    SecondaryNumber,
    adjust,
)
from metrics.intervals import Interval

P_VALUES = {"projection": 0.3, "nearest": 0.2, "membership": 0.6}  # no leak


def make_interval(estimate, reach=0.05):
    return Interval(estimate=estimate, low=estimate - reach, high=estimate + reach, level=0.95, std_error=reach / 2,
                    method="bootstrap, 1000 resamples", unit="group", num_units={"groups": 60})


def make_test(key, p_value, reason=None):
    """Return one of three tests. key: projection, nearest or membership; p_value: None = it did not run"""
    number, title, question, statistic, expected, estimate = {
        "projection": (PROJECTION_GAP, "perceptual distance", "Are training images nearer to their projections (the "
                       "images that the network can make of them) than held-out images of the same class?",
                       "difference of mean distances", 0.0, 0.01),
        "nearest": (NEAREST, "structural similarity", "Are synthetic images nearer to their nearest training images "
                    "than held-out images are?", "share of near copies", 0.01, 0.013),
        "membership": (MEMBERSHIP, "score of the discriminator", "Does the part of the network that tells real images "
                       "from synthetic ones score training images higher than held-out ones?",
                       "area under the ROC curve", 0.5, 0.51),
    }[key]
    test = LeakTest(number=number, key=key, title=title, question=question)
    if p_value is None:
        return replace(test, reason=reason)
    return replace(test, statistic=statistic, expected=expected, p_value=p_value,
                   estimate=make_interval(estimate + (0.2 if p_value < 0.01 else 0.0)),
                   control="Two halves of the held-out images differ by 0.002.",
                   power="" if key == "nearest" else "A difference of 0.05 would have been found.",
                   counts={"training images": 64, "training groups": 60, "held-out images": 64})


def make_power(key="nearest", **found):
    """Return the power of a test at four shares. found: by transformation, draws of 20 in which copies were found"""
    return PlantedPower(key=key, shares=(0.002, 0.005, 0.01, 0.05), num_draws=20,
                        found=found or {"plain": (9, 19, 20, 20), "mirrored": (2, 17, 20, 20)})


def make_pair(index, kind, side=64):
    """Return a pair of which the images resemble each other less with growing index."""
    random = np.random.RandomState(index)
    y, x = np.mgrid[:side, :side] / side - 0.5
    spot = np.exp(-((x - 0.1 * random.randn()) ** 2 + (y - 0.1 * random.randn()) ** 2) / 0.04)
    skin = np.array([225, 180, 160])[:, None, None] - np.array([90, 100, 110])[:, None, None] * spot
    images = [torch.from_numpy(np.clip(skin + (2 + 3 * index) * random.randn(3, side, side), 0, 255).astype(np.uint8))
              for _ in range(2)]
    return GalleryPair(name=f"{kind}/img{index:05d}.png", training_name=f"train/ISIC_{index:07d}.jpg", image=images[0],
                       training_image=images[1], similarity=0.95 - 0.03 * index, ratio=0.4 + 0.03 * index,
                       alignment="mirrored, shifted by 3, 0 pixels" if index % 2 else "as it is")


def make_results(p_values=P_VALUES, reasons=(), pairs=2, **fields):
    """Return results.

    p_values:  by test, see `make_test`
    reasons:   by test, why it did not run
    pairs:     number of each kind, or the pairs by kind
    fields:    of AuthenticityResults
    """
    random = np.random.RandomState(0)
    reasons = dict(reasons)
    tests = adjust([make_test(key, p_value, reasons.get(key)) for key, p_value in p_values.items()])
    return AuthenticityResults(**{
        "protocol": {"sha256": "ab" * 32, "task": "dx"},
        "settings": {"network": "network.pt", "seeds": [0, 1], "versions": {"torch": "2.5.1"}, "reference": None},
        "counts": {"training": {"images": 64, "groups": 60}, "held-out": {"images": 64, "groups": 61}},
        "tests": tests, "power": (make_power(),),
        "distances": {"1 - SSIM": {"synthetic": 0.4 + 0.1 * random.rand(200), "held-out": 0.5 + 0.1 * random.rand(64),
                                   "training, among other groups": 0.5 + 0.1 * random.rand(64)}},
        "pairs": pairs if isinstance(pairs, dict) else {
            kind: [make_pair(index, kind) for index in range(pairs)] for kind in ("synthetic", "control")},
        "secondary": (
            SecondaryNumber(name="AuthPct", value=0.71, interval=make_interval(0.71), control=0.74,
                            meaning="The share of synthetic images that are farther from their nearest training image "
                                    "than that is from its own nearest one.",
                            weakness="It falls where images are good, too."),
            SecondaryNumber(name="C_T", value=None, meaning="Below 0 where images are too near to training images.",
                            weakness="It depends on the features.", reason="there are too few held-out images")),
        **fields})
