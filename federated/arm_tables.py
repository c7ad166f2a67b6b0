"""What the arms of a comparison gave: their networks measured against held-out images, their costs, and the tables.

Measurements are kept as lines of results.jsonl, so that a repeated command computes only what is missing.
"""

import csv
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dnnlib.files import atomic_write, sha256_of
from dnnlib.lines import AppendFile, read_lines, to_line
from dnnlib.text import format_table
from federated.arm_runs import CENTRAL, FEDERATED, PlannedRun
from generation.network import open_network
from metrics.evaluation import Evaluator
from metrics.names import parse_metric
from metrics.result_tables import class_rows, rounding
from torch_utils.plots import save_curves
from training.run_folder import SERVER_FOLDER, RunFolder, list_snapshots
from training.snapshot import read_info

RESULTS, COMPARISON = "results.jsonl", "comparison"  # files in the folder of a comparison
UNION = "union"  # the reference that holds the held-out images of all institutions

_MIB = 2**20
_UP, _DOWN = "Exchange/bytes_up/", "Exchange/bytes_down/"  # of stats.jsonl, followed by the institution's name

Records = Mapping[str, Mapping[str, Any]]  # by metric, as Evaluator returns them


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Real images that were held out: those of an institution, or of all."""

    name: str  # of the institution, or UNION
    path: str
    content: str  # hash of the set
    num_images: int
    evaluator: Evaluator
    settings: Mapping[str, Any]  # that decide the values: metrics, detector, level, ...


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What a training took."""

    images: int  # summed over institutions
    sec_per_kimg: float | None  # training time per thousand images, without start-up and metrics; None = unknown
    bytes_up: Mapping[str, int] = field(default_factory=dict)  # sent by each institution in all rounds
    bytes_down: Mapping[str, int] = field(default_factory=dict)  # received

    @property
    def bytes_by_site(self) -> dict[str, int]:
        """Bytes that each institution exchanged."""
        return {site: self.bytes_up[site] + self.bytes_down.get(site, 0) for site in self.bytes_up}


@dataclass(frozen=True, kw_only=True)
class ArmResult:
    """What is known of an arm when its training is finished."""

    name: str
    run: Path
    snapshots: tuple[Path, ...]  # by number of images
    costs: Costs
    records: dict[str, Records] = field(default_factory=dict)  # of the last network, by reference
    curve: list[tuple[float, float]] = field(default_factory=list)  # (kimg, value) of each network


def read_arm(name: str, plan: PlannedRun) -> ArmResult:
    """Return the networks and costs of an arm's finished run."""
    folder = plan.folder / SERVER_FOLDER if name == FEDERATED else plan.folder
    snapshots = tuple(Path(path) for path in list_snapshots(folder))
    images = round(1000 * read_info(snapshots[-1])["kimg"]) if snapshots else 0
    return ArmResult(name=name, run=plan.folder, snapshots=snapshots,
                     costs=read_costs(read_lines(RunFolder(folder).stats), images))


def read_costs(lines: Sequence[Mapping[str, Any]], images: int) -> Costs:
    """Return the costs of a run from the lines of its stats.jsonl.

    images:  seen by the last network
    """
    before, seconds, timed = 0.0, 0.0, 0.0
    up, down = {}, {}
    for line in lines:
        kimg, speed = _mean(line, "Progress/kimg"), _mean(line, "Timing/sec_per_kimg")
        if None not in (kimg, speed):
            seconds += speed * (kimg - before)
            timed += kimg - before
        before = before if kimg is None else kimg
        for prefix, totals in ((_UP, up), (_DOWN, down)):
            for key in line:
                if key.startswith(prefix):
                    site = key.removeprefix(prefix)
                    totals[site] = totals.get(site, 0) + round(_mean(line, key) or 0)
    return Costs(images=images, sec_per_kimg=seconds / timed if timed > 0 else None, bytes_up=up, bytes_down=down)


def _mean(line: Mapping[str, Any], key: str) -> float | None:
    return (line.get(key) or {}).get("mean")


class Measurements:
    """Measures networks; each is measured once, also by several programs one after the other.

    path:         of the file of results
    device:       of the networks
    before_each:  called before a network is measured; may raise an error to stop
    log:          called with a line for the user
    """

    def __init__(self, path: str | os.PathLike, *, device: str, before_each: Callable[[], Any],
                 log: Callable[[str], None]):
        self._file = AppendFile(path, durable=True, shared=True)
        self._lines = read_lines(path)
        self._device, self._before_each, self._log = device, before_each, log

    def measure(self, arm: str, network: Path, references: Sequence[Reference]) -> dict[str, Records]:
        """Return the records of a network by reference, from the file if they are there."""
        sha256, opened, found = sha256_of(network), None, {}
        for reference in references:
            key = {"network_sha256": sha256, "reference_sha256": reference.content,
                   "settings": dict(reference.settings)}
            known = next((line for line in self._lines if all(line.get(name) == value for name, value in key.items())),
                         None)
            if known is None:
                self._before_each()
                self._log(f"{arm}: {network.name} against {reference.name}")
                opened = opened or open_network(network, self._device, f"the network of {arm}")
                records = reference.evaluator.evaluate(opened.G, opened.info)
                line = to_line({"arm": arm, "network": network.name, "kimg": opened.info["kimg"],
                                "reference": reference.name, **key, "records": records})
                self._file.append(line)
                known = json.loads(line)
                self._lines.append(known)
            found[reference.name] = known["records"]
        return found


def measure_arms(arms: Sequence[ArmResult], references: Sequence[Reference], curve: Reference | None,
                 measurements: Measurements) -> None:
    """Fill in the records and curves of arms.

    curve:  the union, with the metric of the curves alone, which has one value; None draws none
    """
    for arm in arms:
        arm.records.update(measurements.measure(arm.name, arm.snapshots[-1], references))
    for arm in arms if curve is not None else ():
        name = curve.evaluator.requests[0].name
        for network in arm.snapshots[:-1]:
            records = measurements.measure(arm.name, network, [curve])[curve.name]
            arm.curve.append((read_info(network)["kimg"], records[name]["results"][name]))
        arm.curve.append((arm.costs.images / 1000, arm.records[curve.name][name]["results"][name]))


def describe(arms: Sequence[ArmResult], references: Sequence[Reference], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return everything that is known, as plain JSON values."""
    return {
        "settings": dict(settings),
        "references": {each.name: {"path": each.path, "sha256": each.content, "images": each.num_images,
                                   "settings": dict(each.settings)} for each in references},
        "arms": {arm.name: {
            "run": str(arm.run), "network": arm.snapshots[-1].name, "images": arm.costs.images,
            "sec_per_kimg": arm.costs.sec_per_kimg, "bytes_up": dict(arm.costs.bytes_up),
            "bytes_down": dict(arm.costs.bytes_down), "bytes": sum(arm.costs.bytes_by_site.values()),
            "results": arm.records, "curve": arm.curve} for arm in arms},
    }


def write_comparison(folder: Path, arms: Sequence[ArmResult], references: Sequence[Reference], curve: Reference | None,
                     settings: Mapping[str, Any]) -> list[str]:
    """Write comparison.json, .txt, .csv and, with a curve, .png; return the lines of the text."""
    lines = text_tables(arms, references)
    everything = json.loads(to_line(describe(arms, references, settings)))
    cells = io.StringIO()
    csv.writer(cells, lineterminator="\n").writerows(csv_rows(arms, references))
    for ending, text in ((".json", json.dumps(everything, indent=1) + "\n"), (".txt", "\n".join(lines) + "\n"),
                         (".csv", cells.getvalue())):
        with atomic_write(folder / f"{COMPARISON}{ending}", text=True) as file:
            file.write(text)
    if curve is not None:
        name = curve.evaluator.requests[0].name
        save_curves(folder / f"{COMPARISON}.png", {f"{arm.name} {name}": arm.curve for arm in arms})
    return lines


def text_tables(arms: Sequence[ArmResult], references: Sequence[Reference]) -> list[str]:
    """Return a table of each value, with arms as rows and references as columns; of costs; and of classes."""
    lines = []
    for metric, key in _keys(arms):
        titles = [f"{each.name} (n {each.num_images})" for each in references]
        lines += [_title(metric, key), *format_table([["arm", *titles], *(
            [arm.name, *(_cell(arm.records[each.name][metric], key) for each in references)] for arm in arms)],
            left=range(len(references) + 1)), ""]
    lines += [*_cost_table(arms), "", *_class_tables(arms), *_notes(arms)]
    return lines


def _cost_table(arms: Sequence[ArmResult]) -> list[str]:
    sites = list(dict.fromkeys(site for arm in arms for site in arm.costs.bytes_up))
    rows = [["arm", "images", "sec/kimg", *(f"MiB of {site}" for site in sites), "MiB in all"]]
    for arm in arms:
        sent = arm.costs.bytes_by_site
        speed = "-" if arm.costs.sec_per_kimg is None else f"{arm.costs.sec_per_kimg:.2f}"
        rows.append([arm.name, str(arm.costs.images), speed,
                     *(f"{sent[site] / _MIB:.1f}" if site in sent else "-" for site in sites),
                     f"{sum(sent.values()) / _MIB:.1f}" if sent else "-"])
    moved = ["MiB: networks sent and received in all rounds"] if sites else []
    if any(arm.name == CENTRAL for arm in arms):
        moved.append("central needs the images of all institutions in one place")
    return [*format_table(rows), *moved]


def _class_tables(arms: Sequence[ArmResult]) -> list[str]:
    """Return for each value a table against the union, with classes as rows and arms as columns."""
    by_arm = {arm.name: {row.name: row.records for row in class_rows(arm.records[UNION])[1:]} for arm in arms}
    lines = []
    for metric, key in _keys(arms):
        counts = {name: records[metric].get("num_real", 0) for classes in by_arm.values()
                  for name, records in classes.items()}
        if counts:
            lines += [f"{_title(metric, key)}, by class, against {UNION}", *format_table([["class", *by_arm], *(
                [f"{name} (n {count})", *(_cell(classes.get(name, {}).get(metric, {}), key)
                                          for classes in by_arm.values())]
                for name, count in counts.items())], left=range(len(by_arm) + 1)), ""]
    return lines


def csv_rows(arms: Sequence[ArmResult], references: Sequence[Reference]) -> list[list[Any]]:
    """Return titles, and a row for each arm: its costs, and each value with its interval and numbers of images."""
    sites = list(dict.fromkeys(site for arm in arms for site in arm.costs.bytes_up))
    titles = ["arm", "images", "sec_per_kimg", *(f"bytes {site}" for site in sites), "bytes"]
    rows = [[arm.name, arm.costs.images, arm.costs.sec_per_kimg, *(arm.costs.bytes_by_site.get(site) for site in sites),
             sum(arm.costs.bytes_by_site.values())] for arm in arms]
    for each in references:
        for metric, key in _keys(arms):
            titles += [f"{each.name} {key}{more}" for more in ("", " low", " high", " reals", " fakes")]
            for row, arm in zip(rows, arms, strict=True):
                record = arm.records[each.name][metric]
                interval = (record.get("ci") or {}).get(key, {})
                row += [record["results"].get(key), interval.get("low"), interval.get("high"), record.get("num_real"),
                        record.get("num_fake")]
    return [titles, *rows]


def _keys(arms: Sequence[ArmResult]) -> list[tuple[str, str]]:
    """Return the values that were measured: (metric, key)."""
    return list(dict.fromkeys((metric, key) for arm in arms for records in arm.records.values()
                              for metric, record in records.items() for key in record.get("results", ())))


def _title(metric: str, key: str) -> str:
    lower = parse_metric(metric).lower_is_better.get(key)
    return key if lower is None else f"{key} ({'lower' if lower else 'higher'} is better)"


def _cell(record: Mapping[str, Any], key: str) -> str:
    """Return "0.0123 [0.0101, 0.0145]", followed by what the interval is about if that is not the value."""
    value, interval = record.get("results", {}).get(key), (record.get("ci") or {}).get(key, {})
    show = rounding(interval)
    if "low" not in interval:
        return show(value)
    about = "" if show(interval["estimate"]) == show(value) else f" of {show(interval['estimate'])}"
    return f"{show(value)} [{show(interval['low'])}, {show(interval['high'])}]{about}"


def _notes(arms: Sequence[ArmResult]) -> list[str]:
    """Return lines that explain intervals, and where there are none."""
    records = [record for arm in arms for by_metric in arm.records.values() for whole in by_metric.values()
               for record in (whole, *(whole.get("per_class") or {}).values())]
    intervals = [each for record in records for each in (record.get("ci") or {}).values()]
    lines = [f"[...]: {100 * each['level']:.6g}% interval; [...] of E: about an estimate E that leaves out pairs of "
             "images within a group (kid), or is for infinitely many images (fid)"
             for each in intervals if "level" in each][:1]
    if any("reason" in each for each in (*records, *intervals)):
        lines.append(f"without [...], and -: too few images or groups; {COMPARISON}.json has the reasons")
    return lines
