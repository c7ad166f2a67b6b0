"""Write what a study of classifiers found: results.json, predictions.csv, table.md and plots."""

import csv
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from analysis.classification_plots import save_calibration, save_confusion, save_precision_recall, save_roc
from analysis.classification_scores import METRICS, PartScores, Thresholds, scored_labels
from analysis.classification_tables import DIFFERENCE, compact_table, interval_text, markdown, shown
from analysis.protocol import TEST
from analysis.study_results import PartPredictions, ScoredPart, StudyResults, score_study
from dnnlib.files import atomic_write
from dnnlib.text import plural

RESULTS, PREDICTIONS, TABLE = "results.json", "predictions.csv", "table.md"
FORMAT, VERSION = "classifier-study", 1


def write_report(outdir: str | os.PathLike, results: StudyResults,
                 beat: Callable[[], None] = lambda: None) -> list[str]:
    """Score all parts, write the files of a report, and return lines for the terminal.

    beat:  called now and then, as `score_study` does

    Files that are there are replaced. Parts without scores, because a label has too few groups, have no plots.

    Raises OSError, and ValueError if probabilities are not finite.
    """
    folder = Path(outdir)
    folder.mkdir(parents=True, exist_ok=True)
    parts = score_study(results, beat)
    with atomic_write(folder / RESULTS, text=True) as file:
        file.write(json.dumps(results_record(results, parts), indent=1, allow_nan=False) + "\n")
    write_predictions(folder / PREDICTIONS, results)
    with atomic_write(folder / TABLE, text=True) as file:
        file.write(_encodable(markdown(results, parts)))
    files = [RESULTS, PREDICTIONS, TABLE]
    for name, part in zip(_file_names([part.part.name for part in parts]), parts, strict=True):
        if part.scores is not None:
            files += _save_plots(folder, name, results, part)
    main = next((part for part in parts if part.part.role == TEST), parts[0])
    return [*results.notes, *compact_table(results, main), "", f"{folder}: {', '.join(files)}"]


def results_record(results: StudyResults, parts: Sequence[ScoredPart]) -> dict[str, Any]:
    """Return the content of results.json: plain values of strict JSON."""
    stamp = {"verified": results.is_verified, "notes": list(results.notes)}
    return {
        "format": FORMAT, "version": VERSION, **stamp, "protocol": dict(results.protocol),
        "settings": dict(results.settings), "labels": list(results.labels), "seeds": list(results.seeds),
        "level": results.level, "resamples": results.resamples,
        "definitions": {metric: {"title": title, "definition": text} for metric, (title, text) in METRICS.items()},
        "interval": interval_text(results), "difference": DIFFERENCE,
        "conditions": [{
            **vars(each.condition), "seeds": list(results.seeds_of(each.name)),
            "num_real": list(map(dict, each.num_real)), "num_synthetic": list(map(dict, each.num_synthetic)),
            "thresholds": [_threshold_record(found, results.labels) for found in results.thresholds[each.name]]}
            for each in results.conditions],
        "parts": [{"part": part.part.name, "role": part.part.role, **_counts(part),
                   **({} if part.reason is None else {"reason": part.reason})} for part in parts],
        "results": [{**record, **stamp} for part in parts for record in _score_records(results, part)],
        "differences": [{**record, **stamp} for part in parts for record in _difference_records(part)],
        "confusion": [{**record, **stamp} for part in parts for record in _confusion_records(results, part)],
        "subgroups": [{**record, **stamp} for part in parts for record in _subgroup_records(results, part)],
        "subgroups_left_out": [{"part": part.part.name, "column": column, "values": list(values)}
                               for part in parts for column, values in part.left_out.items()],
    }


def _counts(part: ScoredPart) -> dict[str, Any]:
    return {"num_images": len(part.part.images), "num_groups": part.num_groups,
            "images_by_label": dict(part.images_by_label), "groups_by_label": dict(part.groups_by_label)}


def _threshold_record(found: Thresholds, labels: Sequence[str]) -> dict[str, Any]:
    names = [labels[label] for label in scored_labels(len(labels))]
    return {"balanced": found.balanced, "at_90": dict(zip(names, found.at_90, strict=True)),
            "at_95": dict(zip(names, found.at_95, strict=True))}


def _score_records(results: StudyResults, part: ScoredPart) -> Iterator[dict[str, Any]]:
    if part.scores is not None:
        for record in _records_of(results, part.scores):
            yield {"part": part.part.name, "role": part.part.role, **record, **_counts(part)}


def _records_of(results: StudyResults, scores: PartScores) -> Iterator[dict[str, Any]]:
    for condition, of_condition in scores.scores.items():
        for metric, score in of_condition.items():
            interval = score.interval.as_record()
            yield {"condition": condition, "metric": metric, "value": interval.pop("estimate"), **interval,
                   "sd_over_seeds": score.sd, "values": list(score.values),
                   "seeds": list(results.seeds_of(condition))}


def _difference_records(part: ScoredPart) -> Iterator[dict[str, Any]]:
    for each in [] if part.scores is None else part.scores.differences:
        interval = each.interval.as_record()
        yield {"part": part.part.name, "role": part.part.role, "metric": each.metric, "condition": each.first,
               "baseline": each.second, "difference": interval.pop("estimate"), **interval, "p_value": each.p_value,
               "p_holm": each.p_holm, "num_tests": each.num_tests, "sd_over_seeds": each.sd,
               "values": list(each.values), **_counts(part)}


def _confusion_records(results: StudyResults, part: ScoredPart) -> Iterator[dict[str, Any]]:
    for condition, counts in part.confusion.items():
        for seed, found, matrix in zip(results.seeds_of(condition), results.thresholds[condition], counts, strict=True):
            yield {"part": part.part.name, "role": part.part.role, "condition": condition, "seed": seed,
                   "threshold": found.balanced, "labels_by_predicted": matrix.astype(int).tolist(), **_counts(part)}


def _subgroup_records(results: StudyResults, part: ScoredPart) -> Iterator[dict[str, Any]]:
    for each in part.subgroups:
        names = {"part": part.part.name, "role": part.part.role, "column": each.column,
                 "subgroup": each.value}
        counts = {"images_by_label": dict(each.images_by_label), "groups_by_label": dict(each.groups_by_label)}
        if each.scores is None:
            yield {**names, "reason": each.reason, **counts}
        else:
            for record in _records_of(results, each.scores):
                yield {**names, **record, "num_images": each.scores.num_images, "num_groups": each.scores.num_groups,
                       **counts}


def write_predictions(path: str | os.PathLike, results: StudyResults) -> None:
    """Write a line for each image, classifier and part, also of the validation part, to a CSV file.

    Columns: image, group, label, probability (of the positive label; of more than two labels probability_NAME for
    each), regime (the name of the condition), seed and part. Texts are in quotes, numbers have all digits.
    """
    names = results.labels
    columns = ["probability"] if len(names) == 2 else [f"probability_{name}" for name in names]
    with atomic_write(path, text=True) as file:
        # All texts in quotes: otherwise "\r" in a name would start a new line for a reader.
        writer = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
        writer.writerow(map(_encodable, ["image", "group", "label", *columns, "regime", "seed", "part"]))
        for part in (results.validation, *results.parts):
            writer.writerows(_prediction_rows(results, part))


def _prediction_rows(results: StudyResults, part: PartPredictions) -> Iterator[list[Any]]:
    images, groups = map(_encodable, part.images), map(_encodable, part.groups)
    starts = list(zip(images, groups, (_encodable(results.labels[label]) for label in part.labels), strict=True))
    shown_labels = list(scored_labels(len(results.labels)))
    for condition, by_seed in part.probabilities.items():
        for seed, probabilities in zip(results.seeds_of(condition), by_seed, strict=True):
            end = [_encodable(condition), seed, _encodable(part.name)]
            for start, row in zip(starts, probabilities[:, shown_labels].tolist(), strict=True):
                yield [*start, *row, *end]


def _save_plots(folder: Path, name: str, results: StudyResults, part: ScoredPart) -> list[str]:
    """Write the plots of a part and return their names."""
    title = f"{part.part.name}: {plural(len(part.part.images), 'image')} of {plural(part.num_groups, 'group')}"
    title += "" if results.is_verified else "; UNVERIFIED synthetic images"
    files = []
    for kind, save, metric in (("roc", save_roc, "auc"), ("pr", save_precision_recall, "average_precision"),
                               ("calibration", save_calibration, "ece")):
        mean = "macro " if len(results.labels) > 2 and kind != "calibration" else ""
        values = {condition: f"{mean}{METRICS[metric][0]} {shown(part.scores.scores[condition][metric].interval)}"
                  for condition in part.part.probabilities}
        files.append(f"{kind}-{name}.png")
        save(folder / files[-1], title, part.part.labels, results.labels, part.part.probabilities, values)
    files.append(f"confusion-{name}.png")
    save_confusion(folder / files[-1], title, results.labels, part.confusion)
    return files


def _file_names(names: Sequence[str]) -> list[str]:
    """Return different names that every file system takes."""
    found: dict[str, None] = {}
    for name in names:
        plain = re.sub(r"[^A-Za-z0-9._-]+", "_", name)[:100]
        options = (plain if number == 1 else f"{plain}-{number}" for number in range(1, len(names) + 1))
        taken = {each.lower() for each in found}
        found[next(each for each in options if each.lower() not in taken)] = None
    return list(found)


def _encodable(text: str) -> str:
    """Replace bytes of a file name that are not UTF-8 by escapes, such as \\udcff."""
    return text.encode(errors="backslashreplace").decode()
