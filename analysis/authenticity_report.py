"""Write what the tests of authenticity found as results.json, and put it into sentences.

The sentences are for readers who have to decide whether a network or its images may be shared. They never claim that
there is no leak: tests that find nothing show what they would have found, and nothing else.
"""

import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from analysis.authenticity_results import (
    FOUND_IN,
    MEMBERSHIP,
    NEAREST,
    PROJECTION_GAP,
    TITLES,
    AuthenticityResults,
    GalleryPair,
    LeakTest,
    PlantedPower,
    SecondaryNumber,
)
from dnnlib.files import atomic_write
from dnnlib.lines import strict
from dnnlib.text import format_table, listed_with_and, plural
from metrics.intervals import Interval

RESULTS = "results.json"
FORMAT, VERSION = "authenticity", 1
QUANTILES = (0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1)  # of distances
_NAMED = 5  # equal images in a sentence; results.json has all
# What a test has found, for readers who are no statisticians.
_FINDINGS = {
    PROJECTION_GAP: "the network can reproduce the images it was trained on more closely than comparable images that "
                    "it has never seen",
    NEAREST: "synthetic images are closer to training images than real images that the network has never seen are",
    MEMBERSHIP: "whoever has an image could tell better than by guessing whether it was used for training",
}
NOT_SHOWN = "This does not show that there is none."
UNVERIFIED = ("Unverified: the network, or that of the synthetic set, is not known to have been trained on the "
              "training part of this protocol and on nothing else. If it was not, the tests compared the wrong images, "
              "and finding nothing means nothing.")
LIMITS = (
    "Rare copies: a few copies among thousands of images may not change any statistic. The table of power has the "
    "smallest shares that were found; the most similar pairs have to be looked at.",
    "Copies of a part of an image, such as a tattoo, a ruler or a pattern of hairs, in an image that is otherwise new.",
    "Copies after other changes than those of the table of power, such as turning by 45 degrees, strong cropping or "
    "warping.",
    "Stronger attacks on membership: with many reference networks, with gradients, or with knowledge that only an "
    "insider has.",
    "What a network gives away about the group of patients as a whole, such as how common a diagnosis is.",
    "Other networks and other synthetic images: the results hold for these files only. A network can make images that "
    "are not in the synthetic set.",
    "Relations that the protocol does not know: if one patient is in the training part and, under another name, in a "
    "held-out part, the control looks like copying, and hides it.",
)


def write_results(folder: str | os.PathLike, results: AuthenticityResults) -> None:
    """Write results.json: strict JSON, whole or not at all. Raises OSError."""
    with atomic_write(Path(folder) / RESULTS, text=True) as file:
        file.write(json.dumps(results_record(results), indent=1, allow_nan=False) + "\n")


def results_record(results: AuthenticityResults) -> dict[str, Any]:
    """Return the content of results.json: plain values of strict JSON; null stands for what is not finite."""
    return strict({
        "format": FORMAT, "version": VERSION, "verified": results.is_verified, "notes": results.notes,
        "conclusion": conclusion(results), "limits": LIMITS, "protocol": results.protocol,
        "settings": results.settings, "level": results.level, "ci": results.ci, "counts": results.counts,
        "num_tests": num_ran(results), "correction": "Holm",
        "tests": [_test_record(test, results.level) for test in results.tests],
        "equal_images": [{"image": image, "training_image": training} for image, training in results.equal_images],
        "distances": {quantity: {name: summarize(values) for name, values in by_set.items()}
                      for quantity, by_set in results.distances.items()},
        "pairs": {kind: [_pair_record(pair) for pair in pairs] for kind, pairs in results.pairs.items()},
        "secondary": [_secondary_record(number) for number in results.secondary],
        "power": [_power_record(power) for power in results.power],
    })


def summarize(values: np.ndarray) -> dict[str, Any]:
    """Return number and quantiles of values, such as {"count": 2, "omitted": 0, "quantiles": {"0.5": 1.5, ...}}.

    values:  float [N]; values that are not finite are omitted, and counted
    """
    given = np.asarray(values, dtype=np.float64)
    finite = given[np.isfinite(given)]
    quantiles = np.quantile(finite, QUANTILES).tolist() if len(finite) else [None] * len(QUANTILES)
    return {"count": len(finite), "omitted": len(given) - len(finite),
            "quantiles": dict(zip(map(str, QUANTILES), quantiles, strict=True))}


def conclusion(results: AuthenticityResults) -> list[str]:
    """Return sentences: what was found, what was not tested and why, and what the tests would have found."""
    quiet = [test for test in results.tests if test.p_value is not None and not test.is_found(results.level)]
    has_leak = bool(results.found or results.equal_images)
    sentences = [_headline(results), *([NOT_SHOWN] if quiet and not has_leak else []),
                 *([] if results.is_verified else [UNVERIFIED])]
    if results.equal_images:
        pairs = [f"{image} = {training}" for image, training in results.equal_images[:_NAMED]]
        rest = len(results.equal_images) - len(pairs)
        sentences.append(
            f"{plural(len(results.equal_images), 'synthetic image is', 'synthetic images are')} equal to a training "
            f"image, pixel by pixel: {', '.join(pairs)}{f', and {rest} more' if rest else ''}.")
    sentences += [_describe_finding(results, test) for test in results.found]
    if quiet and has_leak:
        sentences.append(f"No leak found by {_quiet_names(quiet, results.found)}. {NOT_SHOWN}")
    return [*sentences, *_describe_missing(results),
            *(describe_power(results, test) for test in _most_powerful(results, quiet))]


def _most_powerful(results: AuthenticityResults, tests: Sequence[LeakTest]) -> Iterator[LeakTest]:
    """Yield, of the tests of a number for which copies were planted, that which finds the smallest share of them in all
    transformations; then those for which none were planted."""
    planted = {power.key: power for power in results.power if power.found}

    def largest(test: LeakTest) -> float:
        shares = [planted[test.key].smallest_share(name) for name in planted[test.key].found]
        return max(math.inf if share is None else share for share in shares)

    for number in sorted({test.number for test in tests}):
        of_number = [test for test in tests if test.number == number]
        yield from sorted((test for test in of_number if test.key in planted), key=largest)[:1]
        yield from (test for test in of_number if test.key not in planted)


def describe(results: AuthenticityResults) -> Iterator[str]:
    """Yield lines for the terminal: notes, a table of the tests with their controls, and the conclusion."""
    yield from results.notes
    rows = [("test", "statistic", "value", "without a leak", "p", "adjusted p", "leak found")]
    for test in results.tests:
        found = "not run" if test.p_value is None else "yes" if test.is_found(results.level) else "no"
        rows.append((f"{test.number} {TITLES[test.number]}: {test.title}", test.statistic or "-",
                     describe_interval(test.estimate), describe_number(test.expected), describe_p(test.p_value),
                     describe_p(test.adjusted), found))
    yield from format_table(rows, left=(0, 1))
    yield f"Adjusted by Holm's method for {plural(num_ran(results), 'test')}; level {results.level:g}."
    for test in results.tests:
        if test.control:
            yield f"Control of {test.number}, {test.title}: {test.control}"
    yield ""
    yield from conclusion(results)


def describe_power(results: AuthenticityResults, test: LeakTest, subject: str | None = None) -> str:
    """Return what a test would have found, as a sentence. subject: of the sentence; None = number and title"""
    planted = next((power for power in results.power if power.key == test.key), None)
    name = subject or _name(test)
    if planted is None or not planted.found:
        known = test.power if subject else f"{name}: {test.power}"
        return known if test.power else f"{name}: it is not known what it would have found."
    smallest = {name: planted.smallest_share(name) for name in planted.found}
    missed = [name for name, share in smallest.items() if share is None]
    draws = f"in {share_text(FOUND_IN)} of {plural(planted.num_draws, 'draw')}"
    largest = share_text(max(planted.shares))
    if len(missed) == len(smallest):
        return f"{name} would have missed copies even at a share of {largest}: it would not have found them {draws}."
    if missed:
        shares = ", ".join(f"{share_text(share)} {name}" for name, share in smallest.items() if share is not None)
        return (f"{name} would have found copies from these shares on, {draws}: {shares}. Even at a share of {largest} "
                f"it would have missed these: {', '.join(missed)}.")
    return (f"{name} would have found copies from a share of {share_text(max(smallest.values()))} on, in each "
            f"transformation, {draws}.")


def num_ran(results: AuthenticityResults) -> int:
    """Return the number of tests that ran."""
    return sum(test.p_value is not None for test in results.tests)


def describe_interval(interval: Interval | None) -> str:
    """Return "0.61 (0.58 to 0.64)", or "-"."""
    return "-" if interval is None else f"{interval.estimate:.3g} ({interval.low:.3g} to {interval.high:.3g})"


def describe_number(value: float | None) -> str:
    """Return "0.5", or "-" where there is none."""
    return "-" if value is None else f"{value:.3g}"


def describe_p(value: float | None) -> str:
    """Return a p-value with two digits, or "-"."""
    return "-" if value is None else f"{value:.2g}"


def share_text(share: float) -> str:
    """Return "0.5 %"."""
    return f"{100 * share:.3g} %"


def _headline(results: AuthenticityResults) -> str:
    ran = sorted({test.number for test in results.tests if test.p_value is not None})
    found = sorted({test.number for test in results.found})
    equal = "synthetic images that are equal to training images"
    if found:
        return f"Leak found by {_listed_tests(found)}{f', and by {equal}' if results.equal_images else ''}."
    if results.equal_images:
        return f"Leak found: there are {equal}."
    if not ran:
        return "No test ran: it is not known whether there is a leak."
    return f"No leak found by {'these tests' if len(ran) > 1 else 'this test'} ({listed_with_and(map(str, ran))})."


def _describe_finding(results: AuthenticityResults, test: LeakTest) -> str:
    value = ""
    if test.estimate is not None:
        expected = "" if test.expected is None else f"; without a leak {test.expected:.3g}"
        low, high = test.estimate.low, test.estimate.high
        value = (f"{test.statistic or 'value'} {test.estimate.estimate:.3g} ({share_text(test.estimate.level)} "
                 f"interval {low:.3g} to {high:.3g}{expected}), ")
    control = f" Control: {test.control}" if test.control else ""
    return (f"{_name(test)} found a leak: {_FINDINGS[test.number]}; {value}p = {describe_p(test.adjusted)} adjusted "
            f"for {plural(num_ran(results), 'test')}.{control}")


def _describe_missing(results: AuthenticityResults) -> Iterator[str]:
    """Yield a sentence for each test that did not run; one for all of a number where their reasons are equal."""
    for number in sorted({test.number for test in results.tests}):
        of_number = [test for test in results.tests if test.number == number]
        missing = [test for test in of_number if test.p_value is None]
        reasons = {(test.reason or "no reason was recorded").rstrip(".") for test in missing}
        if len(missing) == len(of_number) and len(reasons) == 1:
            yield f"Test {number} ({TITLES[number].lower()}) did not run: {reasons.pop()}."
        else:
            for test in missing:
                yield f"{_name(test)} did not run: {(test.reason or 'no reason was recorded').rstrip('.')}."


def _name(test: LeakTest) -> str:
    return f"Test {test.number} ({TITLES[test.number].lower()}: {test.title})"


def _quiet_names(quiet: Sequence[LeakTest], found: Sequence[LeakTest]) -> str:
    """Return the tests that found nothing: by number, with the title where others of the number found a leak."""
    numbers = {test.number for test in found}
    names = {f"test {test.number}{f' ({test.title})' if test.number in numbers else ''}": None for test in quiet}
    return listed_with_and(names)


def _listed_tests(numbers: Sequence[int]) -> str:
    return f"test{'s' if len(numbers) > 1 else ''} {listed_with_and(map(str, numbers))}"


def _test_record(test: LeakTest, level: float) -> dict[str, Any]:
    return {"number": test.number, "key": test.key, "name": TITLES[test.number], "title": test.title,
            "definition": test.question, "statistic": test.statistic, "expected": test.expected,
            "estimate": None if test.estimate is None else test.estimate.as_record(), "p_value": test.p_value,
            "p_adjusted": test.adjusted, "found": test.is_found(level), "ran": test.p_value is not None,
            "reason": test.reason, "control": test.control, "power": test.power, "counts": test.counts,
            "details": test.details}


def _pair_record(pair: GalleryPair) -> dict[str, Any]:
    return {"image": pair.name, "training_image": pair.training_name, "similarity": pair.similarity,
            "ratio": pair.ratio, "alignment": pair.alignment}


def _secondary_record(number: SecondaryNumber) -> dict[str, Any]:
    return {"name": number.name, "value": number.value,
            "interval": None if number.interval is None else number.interval.as_record(), "control": number.control,
            "meaning": number.meaning, "weakness": number.weakness, "reason": number.reason}


def _power_record(power: PlantedPower) -> dict[str, Any]:
    return {"test": power.key, "num_draws": power.num_draws, "shares": power.shares, "found": power.found,
            "found_in": FOUND_IN, "smallest_shares": {name: power.smallest_share(name) for name in power.found}}
