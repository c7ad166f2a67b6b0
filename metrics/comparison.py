"""Compare networks and sets pair by pair: find what --compare names, and which differences chance does not explain.

All items are compared with the same real images, so what a real image happens to add to one distance it adds to the
other as well, and the difference of two values is known better than either. Networks also get the same latents.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from dnnlib.cli import UserError
from dnnlib.text import format_table, plural
from generation.network import choose_network
from metrics.intervals import SHARED_SIDES, Interval, Jackknife, TooFew, holm
from metrics.names import MetricRequest
from metrics.result_tables import rounding
from training.run_folder import RunFolder, list_snapshots


class Item(NamedTuple):
    """One of --compare."""

    name: str
    path: str  # of a network file or a set of images

    @property
    def is_network(self) -> bool:
        return os.path.isfile(self.path) and not self.path.lower().endswith(".zip")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """An item, and what was measured of it."""

    name: str
    is_network: bool
    records: Mapping[str, Mapping[str, Any]]  # by metric
    jackknives: Mapping[str, Mapping[str, Jackknife]]  # by metric and key, of values that have one


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A value of the first item minus that of the second."""

    metric: str
    key: str
    first: str
    second: str
    paired: tuple[str, ...] = ()  # sides on which both have the same images or latents
    interval: Interval | None = None  # of this difference alone
    p_value: float | None = None
    p_holm: float | None = None  # adjusted for all tests of the comparison
    num_tests: int = 0
    reason: str | None = None  # why there is no interval

    @property
    def is_named(self) -> bool:
        """Whether the difference is distinguishable from 0, all tests of the comparison taken together."""
        return self.p_holm is not None and self.p_holm < 1 - self.interval.level

    def as_record(self) -> dict[str, Any]:
        """Return the difference as plain JSON values."""
        record = {"metric": self.metric, "key": self.key, "first": self.first, "second": self.second}
        if self.interval is None:
            return {**record, "reason": self.reason}
        interval = self.interval.as_record()
        return {**record, "difference": interval.pop("estimate"), **interval, "paired": list(self.paired),
                "p_value": self.p_value, "p_holm": self.p_holm, "num_tests": self.num_tests,
                "distinguishable": self.is_named}


def find_items(texts: Sequence[str], requests: Sequence[MetricRequest]) -> list[Item]:
    """Return the networks and sets that --compare names: runs stand for their newest network.

    requests:  the metrics; a set does not have all of them

    Raises UserError if one is missing, named twice, or a set that a metric cannot measure.
    """
    files = []
    for text in texts:
        if not os.path.lexists(text):
            raise UserError(f"--compare is {text}, which does not exist; expected a run, a network file or a set of "
                            "images")
        is_run = os.path.isdir(text) and (list_snapshots(text) or RunFolder(text).options.exists())
        files.append(choose_network(text, "--compare") if is_run else text)
        if os.path.realpath(files[-1]) in map(os.path.realpath, files[:-1]):
            raise UserError(f"--compare names {files[-1]} twice; expected different networks or sets")
    items = [Item(*each) for each in zip(_names(texts), files, strict=True)]
    for request in requests:
        for item in items:
            if request.kind == "ppl" and not item.is_network:
                raise UserError(f"metric {request.name} needs networks, but --compare names {item.path}, a set; "
                                "expected networks, or other metrics")
    return items


def differences(items: Sequence[Measured], level: float) -> list[Difference]:
    """Return the difference of each value between each pair of items, with p-values adjusted for all of them.

    level:  of the intervals; also, a difference is named if its adjusted p-value is below 1 - level
    """
    found = []
    for first, second in combinations(items, 2):
        for metric, record in first.records.items():
            for key in record["results"]:
                names = {"metric": metric, "key": key, "first": first.name, "second": second.name}
                pair = [item.jackknives[metric].get(key) for item in (first, second)]
                if None in pair:
                    found.append(Difference(**names, reason=_reason(key, (first, second), metric)))
                elif not set(pair[0].without) <= {"real"}:  # else it measures the reals alone
                    found.append(_difference(*pair, first.is_network and second.is_network, level, names))
    tested = [each for each in found if each.p_value is not None]
    adjusted = iter(holm([each.p_value for each in tested]))
    return [each if each.p_value is None else
            Difference(**{**vars(each), "p_holm": next(adjusted), "num_tests": len(tested)}) for each in found]


def difference_table(found: Sequence[Difference], level: float) -> list[str]:
    """Return lines on the differences that are distinguishable from 0, and on how many are not."""
    tested = [each for each in found if each.p_value is not None]
    named = sorted((each for each in tested if each.is_named), key=lambda each: each.p_holm)
    lines = []
    if named:
        lines = [f"Differences distinguishable from 0 (Holm's correction for {plural(len(tested), 'test')}, "
                 f"{100 * level:.6g}% intervals):"]
        lines += format_table([["first", "second", "value", "first - second", "interval", "p"], *(
            [each.first, each.second, each.key, *_shown(each.interval), f"{each.p_holm:.2g}"] for each in named)],
            left=(0, 1, 2, 4))
    rest = len(tested) - len(named)
    if rest:
        what = "difference is" if rest == 1 else f"{rest} differences are"
        lines.append(f"The {'other ' * bool(named)}{what} not distinguishable from 0.")
    reasons: dict[tuple[str, str], int] = {}
    for each in found:
        if each.p_value is None:
            reasons[each.key, each.reason] = reasons.get((each.key, each.reason), 0) + 1
    lines += [f"{plural(count, 'difference')} of {key} not tested: {reason}"
              for (key, reason), count in reasons.items()]
    return lines


def _names(paths: Sequence[str]) -> list[str]:
    """Return the shortest ends of different paths that tell them apart: the last part, or more if needed.

    Folders above are left out, since their names may be those of people or places.
    """
    parts = [Path(os.path.abspath(path)).parts for path in paths]
    return ["/".join(next(each[-count:] for count in range(1, len(each) + 1)
                          if sum(other[-count:] == each[-count:] for other in parts) == 1)) for each in parts]


def _difference(first: Jackknife, second: Jackknife, are_networks: bool, level: float,
                names: Mapping[str, str]) -> Difference:
    paired = tuple(side for side, values in first.without.items()
                   if len(values) == len(second.without[side]) and (are_networks or side in SHARED_SIDES))
    difference = first.minus(second, paired)
    try:
        return Difference(**names, paired=paired, interval=difference.interval(level), p_value=difference.p_value())
    except TooFew as error:
        return Difference(**names, reason=str(error))


def _reason(key: str, pair: Sequence[Measured], metric: str) -> str:
    """Return why one of two items has no interval of a value."""
    for item in pair:
        interval = (item.records[metric].get("ci") or {}).get(key) or {}
        if "reason" in interval:
            return interval["reason"]
    return "it has no interval"


def _shown(interval: Interval) -> tuple[str, str]:
    show = rounding(interval.as_record())
    return show(interval.estimate), f"[{show(interval.low)}, {show(interval.high)}]"
