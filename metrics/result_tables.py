"""Show results to people: a table of values with intervals and floors, by class or by item, and the figure of it."""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from dnnlib.text import fitted, format_table
from metrics.assessment import FEWEST_TO_JUDGE
from metrics.intervals import holm
from torch_utils.plots import Dot, save_intervals

Record = Mapping[str, Any]

_WIDTH = 120  # of a table, in characters
_NAME = 40  # ... and of a class or an item in it, unless two would become equal
_ALL = "all"  # the row of all classes together


class Row(NamedTuple):
    """A line of a table: all images, a class, or an item that is compared."""

    name: str
    records: Mapping[str, Record]  # by metric: results, numbers of images, ci, floor; or the reason why there is none
    worst: frozenset[str] = frozenset()  # keys in which it is the worst class


def class_rows(found: Mapping[str, Record]) -> list[Row]:
    """Return a row for all images (or for the class that was chosen), and one for each class.

    found:  records by metric, as `Evaluator` returns them
    """
    whole = next((record["class"] for record in found.values() if record.get("class") is not None), _ALL)
    names = dict.fromkeys(name for record in found.values() for name in record.get("per_class") or {})
    rows = [Row(whole, found)]
    for name in names:
        worst = {key for record in found.values() for key, each in (record.get("worst_class") or {}).items()
                 if each["class"] == name}
        rows.append(Row(name, {metric: record["per_class"][name] for metric, record in found.items()
                               if name in (record.get("per_class") or {})}, frozenset(worst)))
    return rows


def result_table(rows: Sequence[Row], first: str) -> list[str]:
    """Return lines of at most 120 characters, if one value fits: a group of columns for each value; others below.

    first:  title of the first column
    """
    short = [fitted(row.name, _NAME, len) for row in rows]
    if len(set(short)) == len(short):
        rows = [row._replace(name=name) for row, name in zip(rows, short, strict=True)]
    keys = dict.fromkeys((metric, key) for row in rows for metric, record in row.records.items()
                         for key in record.get("results", ()))
    lines, together = [], []
    for metric, key in keys:
        wider = [*together, (metric, key)]
        # Numbers of images stand once in a row: only metrics of equal numbers share a table.
        is_equal = all(_counts(row, metric) == _counts(row, other) for row in rows for other, _ in together[:1])
        if together and not (is_equal and max(map(len, _block(rows, wider, first))) <= _WIDTH):
            lines += [*_block(rows, together, first), ""]
            wider = [(metric, key)]
        together = wider
    return [*lines, *_block(rows, together, first), *_notes(rows)]


def save_figure(path: str | os.PathLike, rows: Sequence[Row]) -> None:
    """Draw the values of a table, with a panel for each key. Raises OSError."""
    keys = {key: metric for row in rows for metric, record in row.records.items() for key in record.get("results", ())}
    levels = {each["level"] for row in rows for record in row.records.values()
              for each in (record.get("ci") or {}).values() if "level" in each}
    legend = {"value": "value", "marked": "value of the worst class",
              "interval": f"{_percent(max(levels, default=0))} interval, and the estimate that it is about",
              "floor": "floor: held-out against other real images",
              "at_floor": "value for as many images as the floor"}
    save_intervals(path, [(row.name, _numbers(row)) for row in rows],
                   {key: [_dot(row, metric, key) for row in rows] for key, metric in keys.items()}, legend)


def rounding(interval: Record) -> Callable[[float | None], str]:
    """Return a function that writes a number with two digits of half the interval's width; with four, if it has none.

    interval:  its record, or {"reason": ...}, or {}
    """
    half = (interval["high"] - interval["low"]) / 2 if "low" in interval else 0
    decimals = min(max(1 - math.floor(math.log10(half)), 0), 9) if half > 0 and math.isfinite(half) else None

    def show(number: float | None) -> str:
        if number is None or not math.isfinite(number):
            return "-"
        text = f"{number:.4g}" if decimals is None else f"{number:.{decimals}f}"
        return text if text.strip("-0.") else text.removeprefix("-")  # 0, not -0

    return show


def _block(rows: Sequence[Row], keys: Sequence[tuple[str, str]], first: str) -> list[str]:
    """Return one table, with a line for each row. Above the titles stand the keys, if each has several columns."""
    metrics = list(dict.fromkeys(metric for metric, _ in keys))
    records = [row.records.get(metric, {}) for row in rows for metric in metrics]
    has_interval = any("low" in (record.get("ci") or {}).get(key, {}) for record in records for _, key in keys)
    has_floor = any(record.get("floor") for record in records)
    has_worst = any(row.worst for row in rows)  # and room for the mark
    titles, left, starts = [first, "real", "fake", *(["held-out"] if has_floor else [])], [0], []
    for _, key in keys:
        starts.append(len(titles))
        titles.append("value" + " " * has_worst if has_interval or has_floor else key + " " * has_worst)
        if has_interval:
            left.append(len(titles))
            titles.append("interval")
        if has_floor:
            titles += ["at its n", "floor"]
    table, reasons = [titles], [""]
    for row in rows:
        cells = [row.name, *map(_text, _counts(row, metrics[0]))]
        if has_floor:
            cells.append(_text((row.records.get(metrics[0], {}).get("floor") or {}).get("num_fake")))
        for metric, key in keys:
            value, interval, at_floor, floor = _cells(row, metric, key)
            mark = "*" if key in row.worst else " " * has_worst
            cells += [value + mark, *([interval] if has_interval else []), *([at_floor, floor] if has_floor else [])]
        table.append(cells)
        found = dict.fromkeys(record["reason"] for metric in metrics
                              if "reason" in (record := row.records.get(metric, {})))
        reasons.append("; ".join(found))
    return [*_titles_above(table, starts, keys, has_interval or has_floor),
            *(f"{line}  {reason}" if reason else line
              for line, reason in zip(format_table(table, left=left), reasons, strict=True))]


def _titles_above(table: list[list[str]], starts: Sequence[int], keys: Sequence[tuple[str, str]],
                  is_wide: bool) -> Iterator[str]:
    """Yield the line of keys above their groups of columns, which are widened in the table to fit them."""
    if not is_wide:
        return
    ends = [*starts[1:], len(table[0])]
    line = ""
    for start, end, (_, key) in zip(starts, ends, keys, strict=True):
        widths = [max(len(row[column]) for row in table) for column in range(end)]
        group = sum(widths[start:]) + 2 * (end - start - 1)
        table[0][start] = table[0][start].rjust(widths[start] + max(0, len(key) - group))
        line = line.ljust(sum(widths[:start]) + 2 * start) + key
    yield line


def _cells(row: Row, metric: str, key: str) -> tuple[str, str, str, str]:
    """Return a value, its interval, the value for as many images as the floor, and the floor."""
    record = row.records.get(metric, {})
    if key not in record.get("results", {}):
        return "", "", "", ""
    value, interval, floor = record["results"][key], (record.get("ci") or {}).get(key, {}), record.get("floor") or {}
    show = rounding(interval)
    numbers = show(value), show((floor.get("at_equal_size") or {}).get(key)), show(floor.get("results", {}).get(key))
    between = ""
    if "low" in interval:
        between = f"[{show(interval['low'])}, {show(interval['high'])}]"
        if show(interval["estimate"]) != show(value):
            between += f" of {show(interval['estimate'])}"
    return numbers[0], between, numbers[1], numbers[2]


def _counts(row: Row, metric: str) -> tuple[int | None, int | None]:
    record = row.records.get(metric, {})
    return record.get("num_real"), record.get("num_fake")


def _text(number: int | None) -> str:
    return "" if number is None else str(number)


def _percent(level: float) -> str:
    return f"{100 * level:.6g}%"


def _notes(rows: Sequence[Row]) -> Iterator[str]:
    """Yield lines that explain what occurs in a table."""
    records = [record for row in rows for record in row.records.values()]
    intervals = [(each, record["results"].get(key)) for record in records
                 for key, each in (record.get("ci") or {}).items() if "low" in each]
    if intervals:
        level = _percent(intervals[0][0]["level"])
        differ = any(rounding(each)(each["estimate"]) != rounding(each)(value) for each, value in intervals)
        yield f"interval: {level}" + (
            "; [...] of E: about an estimate E that leaves out pairs of images within a group (kid), or is for "
            "infinitely many images (fid)" if differ else "")
    if any(record.get("floor") for record in records):
        yield ("floor: held-out images against the other real ones; at its n: the value for as many fakes as held-out "
               "images")
    yield from _permutation_notes(rows)
    if any(row.worst for row in rows):
        yield f"*: the worst of the classes with at least {FEWEST_TO_JUDGE} images on each side"
    missing: dict[str, dict[str, str]] = {}  # what there is not -> row -> reason
    for row in rows:
        for metric, record in row.records.items():
            for what, each in [*((f"interval of {key}", each) for key, each in (record.get("ci") or {}).items()),
                               (f"floor of {metric}", record.get("floor") or {})]:
                if "reason" in each:
                    missing.setdefault(what, {})[row.name] = each["reason"]
    for what, reasons in missing.items():
        name, reason = next(iter(reasons.items()))
        if len(set(reasons.values())) == 1:
            yield f"no {what} ({', '.join(reasons)}): {reason}"
        else:
            yield f"no {what} ({', '.join(reasons)}); of {name}: {reason}"


def _permutation_notes(rows: Sequence[Row]) -> Iterator[str]:
    """Yield a line for each metric on whether the held-out images differ from the other real ones beyond chance."""
    found: dict[str, dict[str, tuple[float, float]]] = {}  # metric -> row -> p-value, and the smallest one by chance
    for row in rows:
        for metric, record in row.records.items():
            test, intervals = (record.get("floor") or {}).get("permutation") or {}, record.get("ci") or {}
            levels = [each["level"] for each in intervals.values() if "level" in each]
            if "p_value" in test and levels:
                found.setdefault(metric, {})[row.name] = test["p_value"], 1 - levels[0]
    for metric, tests in found.items():
        adjusted = holm([p_value for p_value, _ in tests.values()])
        below = [f"{name}: p = {p:.2g}" for (name, (_, limit)), p in zip(tests.items(), adjusted, strict=True)
                 if p < limit]
        if below:
            yield (f"floor of {metric}: held-out and other real images differ more than random parts of them do "
                   f"({', '.join(below)}); then the floor is too high: were they split at random?")
        else:
            yield (f"floor of {metric}: held-out and other real images differ no more than random parts of them do "
                   f"(permutation of groups, {'smallest ' * (len(tests) > 1)}p = "
                   f"{min(p_value for p_value, _ in tests.values()):.2g})")


def _numbers(row: Row) -> str:
    """Return "n 1000 real, 500 fake"; where metrics differ, their smallest and largest numbers."""
    parts = []
    for index, side in enumerate(("real", "fake")):
        # A metric that does not use the reals has none.
        numbers = {_counts(row, metric)[index] for metric in row.records} - {None, 0}
        if numbers:
            low, high = min(numbers), max(numbers)
            parts.append(f"{low} {side}" if low == high else f"{low}-{high} {side}")
    return f"n {', '.join(parts)}" if parts else "too few images"


def _dot(row: Row, metric: str, key: str) -> Dot | None:
    record = row.records.get(metric, {})
    value = record.get("results", {}).get(key)
    if value is None or not math.isfinite(value):
        return None
    interval = (record.get("ci") or {}).get(key, {})
    floor = record.get("floor") or {}
    at_floor = (floor.get("at_equal_size") or {}).get(key)
    numbers = [math.nan if number is None else number for number in (
        interval.get("low"), interval.get("high"), interval.get("estimate"), floor.get("results", {}).get(key),
        None if at_floor == value else at_floor)]
    return Dot(value, *numbers, is_marked=key in row.worst)
