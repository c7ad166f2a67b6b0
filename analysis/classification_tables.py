"""Show scores of classifiers to people: Markdown tables of all parts, and a compact table for the terminal."""

import html
import re
from collections.abc import Iterator, Mapping, Sequence

from analysis.classification_scores import METRICS, PairedDifference, PartScores
from analysis.protocol import SYNTHETIC
from analysis.study_results import ScoredPart, StudyResults, Subgroup, TrainedCondition
from dnnlib.text import format_table, listed, plural
from metrics.intervals import Interval

SHOWN = ("auc", "average_precision", "balanced_accuracy", "f1", "sensitivity_at_90", "sensitivity_at_95", "brier",
         "ece")
INTERVAL = ("An interval is of the mean over seeds, from {resamples} resamples of the part's groups of images with "
            "replacement, at a level of {level}. It says how the score would vary with other test images, and holds "
            "the trained networks fixed; how it varies with training is the spread over seeds.")
DIFFERENCE = ("A difference is that of the means over seeds, with the interval from the same resamples for both sides; "
              "p is two-sided, adjusted by Holm's correction for the differences of the same metric on the same part. "
              "It counts the resamples on the other side of 0 and one more: before the correction it is at least 2 / "
              "(resamples + 1), and more for few groups. Like the interval, it holds the trained networks fixed: a "
              "difference that is small beside its spread over seeds may come from training alone.")
TWO_LABELS = ("Thresholds are chosen on validation images only: of balanced accuracy and F1, the one that maximizes "
              "balanced accuracy there;")
MORE_LABELS = ("AUC, AP, sens@90 and sens@95 are means over labels, each against the rest; balanced accuracy, F1 and "
               "ECE are of the most probable label. Thresholds are chosen on validation images only:")
THRESHOLDS = ("of sens@90 and sens@95, the smallest with a specificity of 90 and 95 % there (the specificity that is "
              "reached on the part follows the sensitivity). Best values of Brier and ECE are the lowest ones. "
              "results.json has the definitions and all digits.")
_OF_COMPACT = ("auc", "average_precision", "balanced_accuracy", "f1")


def interval_text(results: StudyResults) -> str:
    """Return what the intervals of a study mean."""
    return INTERVAL.format(resamples=f"{results.resamples:,}", level=f"{100 * results.level:.6g} %")


def shown(interval: Interval, sign: str = "") -> str:
    """Return "0.832 [0.790, 0.871]", or "+0.012 [-0.003, +0.027]" with the sign "+"."""
    value, low, high = (_rounded(number, sign) for number in (interval.estimate, interval.low, interval.high))
    return f"{value} [{low}, {high}]"


def _rounded(number: float, sign: str = "") -> str:
    return f"{round(number, 3) + 0.0:{sign}.3f}"  # + 0.0: no -0


def markdown(results: StudyResults, parts: Sequence[ScoredPart]) -> str:
    """Return the text of table.md."""
    lines = ["# Classifiers of real and synthetic images", "", *(f"**{escaped(note)}**\n" for note in results.notes),
             interval_text(results), "", DIFFERENCE, "",
             f"{TWO_LABELS if len(results.labels) == 2 else MORE_LABELS} {THRESHOLDS}", ""]
    for part in parts:
        lines += _part_section(results, part)
    return "\n".join(lines)


def escaped(text: str) -> str:
    """Return a text of one line that is shown as it is in a cell of a Markdown table."""
    # Backslashes first, then characters that start formatting, links or cells; < and & become entities.
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def compact_table(results: StudyResults, part: ScoredPart) -> list[str]:
    """Return lines for the terminal: the scores of a part, and how the AUC differs from that of the baseline."""
    if part.scores is None:
        return [f"{part.part.name}: no scores: {part.reason}"]
    apart = {each.first: each for each in part.scores.differences if each.metric == "auc"}
    titles = ["condition", "real", "synthetic", *(METRICS[metric][0] for metric in _OF_COMPACT)]
    rows = [[*titles, *(["AUC - baseline", "p (Holm)"] if apart else [])]]
    for trained in _conditions(results, part.scores):
        scores = part.scores.scores[trained.name]
        row = [trained.name, _total(trained.num_real), _total(trained.num_synthetic),
               shown(scores["auc"].interval), *(_rounded(scores[metric].interval.estimate)
                                                for metric in _OF_COMPACT[1:])]
        if apart:
            found = apart.get(trained.name)
            row += ["", ""] if found is None else [shown(found.interval, "+"), f"{found.p_holm:.2g}"]
        rows.append(row)
    return [f"{part.part.name}: {_numbers(part)}; [...]: {100 * results.level:.6g} % intervals over groups",
            *format_table(rows)]


def _part_section(results: StudyResults, part: ScoredPart) -> Iterator[str]:
    name = escaped(part.part.name)
    yield from (f"## {name}", "", f"{escaped(_numbers(part))}.", "")
    if part.scores is None:
        yield from (f"No scores: {escaped(part.reason)}.", "")
    else:
        what = ("Classifiers of real images, tested on the synthetic ones (TRTS)" if part.part.role == SYNTHETIC else
                f"Scores on {name}")
        yield from _table(_caption(results, what), _score_rows(results, part.scores))
        if any(score.sd is not None for scores in part.scores.scores.values() for score in scores.values()):
            yield from _table(_caption(results, f"Standard deviation over seeds, on {name}"),
                              _spread_rows(results, part.scores))
        if part.scores.differences:
            mark = f"bold: p below {1 - results.level:.2g}"
            yield from _table(_caption(results, f"Paired differences on {name}; {mark}"),
                              _difference_rows(part.scores.differences, 1 - results.level))
    for column in dict.fromkeys(each.column for each in part.subgroups):
        of_column = [each for each in part.subgroups if each.column == column]
        if all(each.scores is None for each in of_column):  # such as the diagnosis itself
            yield from (f"No scores by {escaped(column)}: no value has two groups of each label.", "")
            continue
        yield from _table(_caption(results, f"AUC on {name} by {escaped(column)}"), _subgroup_rows(results, of_column))
        rest = part.left_out.get(column, ())
        if rest:
            yield from (f"{plural(len(rest), 'further value')} of {escaped(column)} with fewer images: "
                        f"{escaped(listed(rest))}.", "")


def _caption(results: StudyResults, what: str) -> str:
    return " ".join([f"*{what}.*", *(f"**{escaped(note)}**" for note in results.notes)])


def _table(caption: str, rows: Sequence[Sequence[str]]) -> list[str]:
    """Return lines: the first column aligned on the left, the others on the right."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [caption, "", lines[0], "|---|" + "---:|" * (len(rows[0]) - 1), *lines[1:], ""]


def _score_rows(results: StudyResults, scores: PartScores) -> list[list[str]]:
    rows = [["condition", *(METRICS[metric][0] for metric in SHOWN), "real", "synthetic"]]
    for trained in _conditions(results, scores):
        cells = []
        for metric in SHOWN:
            reached = scores.scores[trained.name].get(metric.replace("sensitivity", "specificity"))
            cells.append(shown(scores.scores[trained.name][metric].interval) + (
                f" at {_rounded(reached.interval.estimate)}" if metric.startswith("sensitivity") else ""))
        rows.append([escaped(trained.name), *cells, _by_label(trained.num_real), _by_label(trained.num_synthetic)])
    return rows


def _spread_rows(results: StudyResults, scores: PartScores) -> list[list[str]]:
    rows = [["condition", "seeds", *(METRICS[metric][0] for metric in SHOWN)]]
    for trained in _conditions(results, scores):
        of_condition = scores.scores[trained.name]
        rows.append([escaped(trained.name), str(len(of_condition["auc"].values)), *(
            "-" if of_condition[metric].sd is None else _rounded(of_condition[metric].sd) for metric in SHOWN)])
    found = {(each.first, each.second, each.metric): each for each in scores.differences}
    for first, second in dict.fromkeys((each.first, each.second) for each in scores.differences):
        of_pair = [found[first, second, metric] for metric in SHOWN]
        rows.append([f"{escaped(first)} - {escaped(second)}", str(len(of_pair[0].values)), *(
            "-" if each.sd is None else _rounded(each.sd) for each in of_pair)])
    return rows


def _difference_rows(differences: Sequence[PairedDifference], limit: float) -> list[list[str]]:
    found: dict[tuple[str, str], dict[str, str]] = {}
    for each in differences:
        text = f"{shown(each.interval, '+')}, p {each.p_holm:.2g}"
        pair = found.setdefault((each.first, each.second), {})
        pair[each.metric] = f"**{text}**" if each.p_holm < limit else text
    return [["difference", *(METRICS[metric][0] for metric in SHOWN)], *(
        [f"{escaped(first)} - {escaped(second)}", *(cells[metric] for metric in SHOWN)]
        for (first, second), cells in found.items())]


def _subgroup_rows(results: StudyResults, subgroups: Sequence[Subgroup]) -> list[list[str]]:
    with_scores = next(each.scores for each in subgroups if each.scores is not None)
    names = [trained.name for trained in _conditions(results, with_scores)]
    rows = [[escaped(subgroups[0].column), *(f"images of {escaped(label)}" for label in results.labels),
             *map(escaped, names), "without scores"]]
    for each in subgroups:
        cells = ["-" if each.scores is None else shown(each.scores.scores[name]["auc"].interval) for name in names]
        rows.append([escaped(each.value), *map(str, each.images_by_label.values()), *cells,
                     "" if each.reason is None else f"too few: {escaped(each.reason)}"])
    if all(each.reason is None for each in subgroups):
        rows = [row[:-1] for row in rows]
    return rows


def _conditions(results: StudyResults, scores: PartScores) -> list[TrainedCondition]:
    """Return the conditions that have scores, in the order of the study."""
    return [trained for trained in results.conditions if trained.name in scores.scores]


def _numbers(part: ScoredPart) -> str:
    labels = ", ".join(f"{' '.join(name.split())} {count} ({plural(part.groups_by_label[name], 'group')})"
                       for name, count in part.images_by_label.items())
    return f"{plural(len(part.part.images), 'image')} of {plural(part.num_groups, 'group')}: {labels}"


def _total(by_seed: Sequence[Mapping[str, int]]) -> str:
    """Return the number of images, or "10 to 12" where it differs between seeds."""
    return _range([sum(counts.values()) for counts in by_seed])


def _by_label(by_seed: Sequence[Mapping[str, int]]) -> str:
    """Return "8011 (rest 6898, mel 1113)"; the names escaped."""
    labels = [f"{escaped(label)} {_range([counts.get(label, 0) for counts in by_seed])}" for label in by_seed[0]]
    total = _total(by_seed)
    return total if total == "0" else f"{total} ({', '.join(labels)})"


def _range(numbers: Sequence[int]) -> str:
    return str(min(numbers)) if min(numbers) == max(numbers) else f"{min(numbers)} to {max(numbers)}"
