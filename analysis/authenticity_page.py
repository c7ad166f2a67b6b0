"""Write what the tests of authenticity found as a page, for readers who decide whether a network may be shared.

What matters comes first: the conclusion, the tests, the most similar pairs, the power; then distances, what decides
nothing, what such tests cannot see, and how it was computed. Images are inside the page, which loads nothing.
"""

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from analysis.authenticity_report import (
    LIMITS,
    conclusion,
    describe_interval,
    describe_number,
    describe_p,
    describe_power,
    num_ran,
    share_text,
    summarize,
)
from analysis.authenticity_results import (
    FOUND_IN,
    TITLES,
    AuthenticityResults,
    GalleryPair,
    LeakTest,
    PlantedPower,
    SecondaryNumber,
)
from dnnlib.text import plural
from latent.exploration_page import (
    Cell,
    bullet_list,
    captioned,
    figure,
    heading,
    image_tag,
    paragraph,
    picture_table,
    sortable_table,
    thumbnail,
    write_page,
)
from torch_utils.plots import histogram_figure, render_figure

PAGE = "page.html"
TITLE = "Authenticity: does the network copy its training images?"
MOST_PAIRS = 20  # of each kind: what a reader looks at
_SIDE = 128  # pixels of an image in a gallery: two pairs fit beside each other on a small screen
# Columns of galleries, in this order; others follow with their own names.
_KINDS = {"synthetic": "synthetic | training image", "control": "control: held-out | training image"}
_COLUMNS = {"0": "smallest", "0.01": "1 %", "0.05": "5 %", "0.5": "median", "0.95": "95 %"}  # quantiles that are shown
_NO_PICTURES = ("No pictures are shown, because --no-real-images was given: the training image of a pair is a real "
                "image, and a synthetic image that nearly equals one shows it too. The names of the most similar pairs "
                "are in results.json.")


def write_authenticity_page(folder: str | os.PathLike, results: AuthenticityResults, *, real_images: bool) -> None:
    """Write page.html, whole or not at all. Raises OSError.

    real_images:  False = without any picture of a pair
    """
    headline, *sentences = conclusion(results)
    sections = [
        heading(headline), bullet_list(sentences),
        heading("The tests"), _describe_tests(results),
        heading("The most similar pairs"), *(_describe_pairs(results.pairs) if real_images
                                             else [paragraph(_NO_PICTURES)]),
        heading("What each test asked"), *(_describe_test(results, test) for test in results.tests),
        heading("What the tests would have found: power"), *_describe_planted(results),
        heading("Distances and scores"), *_describe_distances(results.distances),
        heading("Other numbers, which decide nothing"), _describe_secondary(results.secondary),
        heading("What these tests cannot see"), bullet_list(LIMITS),
        heading("How it was computed"), *_describe_settings(results),
    ]
    write_page(Path(folder) / PAGE, TITLE, "".join(sections))


def _describe_tests(results: AuthenticityResults) -> str:
    text = ("Held-out images are real images that were not used for training. A p-value is the probability that "
            "chance alone gives a value as extreme as this one, if there is no leak. Several tests find something by "
            f"chance more often than one, so p-values are adjusted for the {plural(num_ran(results), 'test')} that ran "
            f"(Holm's method); a test finds a leak if its adjusted p-value is at most {results.level:g}. Behind a "
            f"value is its {share_text(results.ci)} interval: the range of values that are compatible with the data. "
            "AUC is how often a training image has a larger score than a held-out one of its class: 0.5 is as good as "
            "guessing. TPR is the share of training images that are recognized where a share FPR of the held-out ones "
            "is taken for training images. n is the number of images, and of groups of images of one patient or "
            "lesion.")
    columns = ["test", "leak found", "what is measured", f"value ({share_text(results.ci)} interval)", "without a leak",
               "p", "adjusted p", "n"]
    return paragraph(text) + sortable_table(columns, [_test_row(test, results.level) for test in results.tests])


def _test_row(test: LeakTest, level: float) -> list[Cell]:
    is_found = test.is_found(level)
    return [Cell(_test_name(test)),
            Cell("not run" if test.p_value is None else "yes" if is_found else "no", shade=1.0 if is_found else None),
            Cell(test.statistic or "-"),
            Cell(describe_interval(test.estimate), sort=math.nan if test.estimate is None else test.estimate.estimate),
            Cell(describe_number(test.expected), sort=_sortable(test.expected)),
            Cell(describe_p(test.p_value), sort=_sortable(test.p_value)),
            Cell(describe_p(test.adjusted), sort=_sortable(test.adjusted)),
            Cell(_counts_text(test.counts), is_long=True)]


def _describe_test(results: AuthenticityResults, test: LeakTest) -> str:
    sentences = [test.question]
    if test.p_value is None:
        sentences.append(f"Did not run: {test.reason or 'no reason was recorded'}")
    else:
        sentences.append(f"Control: {test.control}" if test.control else "It has no control.")
        sentences.append(f"Power: {describe_power(results, test, 'It')}")
        if test.counts:
            sentences.append(f"n: {_counts_text(test.counts)}.")
    return heading(_test_name(test), 3) + bullet_list(sentences)


def _describe_distances(distances: Mapping[str, Mapping[str, np.ndarray]]) -> Iterator[str]:
    if not distances:
        yield paragraph("No distances were measured.")
        return
    yield paragraph("If synthetic images were copies, their distances to training images would be smaller than those "
                    "of held-out images, and most of all their smallest ones, on the left. Dashed lines are medians, "
                    "with half of the values on either side. Plain distances decide nothing: smooth synthetic images "
                    "are near to everything. The tests use the distance as a share of that to the next group.")
    for quantity, by_set in distances.items():
        found = {name: summarize(values) for name, values in by_set.items()}
        counts = ", ".join(f"{name} {summary['count']}" for name, summary in found.items())
        plot = render_figure(histogram_figure(dict(by_set), quantity=quantity))
        yield figure(image_tag(plot, f"Histograms of {quantity}: {', '.join(by_set)}"), f"{quantity}; n: {counts}")
        rows = [[Cell(name), Cell(str(summary["count"]), sort=summary["count"]),
                 *(Cell(describe_number(summary["quantiles"][key]), sort=_sortable(summary["quantiles"][key]))
                   for key in _COLUMNS)] for name, summary in found.items()]
        yield sortable_table(["images", "n", *_COLUMNS.values()], rows,
                             "That share of the images has at most this value.")


def _describe_pairs(pairs: Mapping[str, Sequence[GalleryPair]]) -> Iterator[str]:
    if not any(pairs.values()):
        yield paragraph("No pairs were compared.")
        return
    yield paragraph("Look at these pairs before the network or its images are shared: no statistic replaces it. "
                    "Copying is likely where a synthetic image and its training image agree in details that do not "
                    "belong to the disease, such as hairs, bubbles or scale marks, and where the control has no such "
                    "pairs. The images of the control were not used for training: where one shows the same lesion as "
                    "its training image, that lesion is in two parts of the study under two names.")
    yield paragraph("SSIM is structural similarity after alignment: 1 for equal images, near 0 for unrelated ones. The "
                    "ratio compares the distance to that training image with the distance to the most similar training "
                    "image of another patient or lesion: 1 is no nearer, 0 is equal.")
    kinds = sorted((kind for kind in pairs if pairs[kind]), key=[*_KINDS, *pairs].index)
    rows = []
    for index in range(min(MOST_PAIRS, max(len(pairs[kind]) for kind in kinds))):
        rows.append((str(index + 1), [_show_pair(pairs[kind][index]) if index < len(pairs[kind]) else ""
                                      for kind in kinds]))
    yield picture_table([_KINDS.get(kind, kind) for kind in kinds], rows)


def _show_pair(pair: GalleryPair) -> str:
    images = (f"{thumbnail(pair.image, pair.name, _SIDE)} "
              f"{thumbnail(pair.training_image, f'training image {pair.training_name}', _SIDE)}")
    return captioned(images, f"SSIM {pair.similarity:.3f}, ratio {pair.ratio:.2f}; {pair.alignment}; {pair.name} | "
                             f"{pair.training_name}")


def _describe_planted(results: AuthenticityResults) -> Iterator[str]:
    if not results.power:
        yield paragraph("No copies were planted: it is not known how many copies the tests would have found.")
        return
    names = {test.key: _test_name(test) for test in results.tests}
    draws = " or ".join(map(str, sorted({power.num_draws for power in results.power})))
    yield paragraph("Copies of training images were planted into the synthetic set, and the tests were repeated. The "
                    f"first table has the smallest share that each test would have found in {share_text(FOUND_IN)} of "
                    f"{draws} draws. At a share of 1 %, one in a hundred synthetic images is a copy.")
    transformations = list(dict.fromkeys(name for power in results.power for name in power.found))
    rows = [[Cell(names.get(power.key, power.key)), *(_smallest_cell(power, name) for name in transformations)]
            for power in results.power]
    yield sortable_table(["test", *transformations], rows)
    for power in results.power:
        yield heading(names.get(power.key, power.key), 3)
        rows = [[Cell(name), *(Cell(f"{count} of {power.num_draws}", sort=count, shade=-count / power.num_draws)
                               for count in counts)] for name, counts in power.found.items()]
        yield sortable_table(["copies", *map(share_text, power.shares)], rows,
                             f"In how many of {plural(power.num_draws, 'draw')} the copies were found, by their share.")


def _smallest_cell(power: PlantedPower, transformation: str) -> Cell:
    if transformation not in power.found:
        return Cell("not tried", sort=math.nan)
    share = power.smallest_share(transformation)
    return Cell(f"none up to {share_text(max(power.shares))}" if share is None else share_text(share),
                sort=math.inf if share is None else share)


def _describe_secondary(numbers: Sequence[SecondaryNumber]) -> str:
    if not numbers:
        return paragraph("None were computed.")
    rows = [[Cell(number.name), Cell(describe_number(number.value) if number.interval is None
                                     else describe_interval(number.interval), sort=_sortable(number.value)),
             Cell(describe_number(number.control), sort=_sortable(number.control)), Cell(number.meaning, is_long=True),
             Cell(number.weakness if number.reason is None else f"Not computed: {number.reason}", is_long=True)]
            for number in numbers]
    return sortable_table(["number", "value", "of held-out images", "meaning", "why it decides nothing"], rows)


def _describe_settings(results: AuthenticityResults) -> Iterator[str]:
    yield bullet_list(results.notes)
    rows = [[Cell(name), Cell(_counts_text(counts))] for name, counts in results.counts.items()]
    if rows:
        yield sortable_table(["set", "n"], rows, "Images, and groups of images of one patient or lesion")
    for caption, values in (("Protocol", results.protocol), ("Settings and versions", results.settings)):
        yield sortable_table(["name", "value"], [[Cell(name), Cell(text)] for name, text in _flat(values)], caption)


def _flat(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """Yield names and texts of nested settings, such as ("versions, torch", "2.5")."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{name}, ")
        elif isinstance(value, Iterable) and not isinstance(value, str):
            yield f"{above}{name}", ", ".join(map(str, value))
        else:
            yield f"{above}{name}", "-" if value is None else str(value)


def _test_name(test: LeakTest) -> str:
    return f"{test.number} {TITLES[test.number]}: {test.title}"


def _counts_text(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "-"


def _sortable(value: float | None) -> float:
    return math.nan if value is None else value
