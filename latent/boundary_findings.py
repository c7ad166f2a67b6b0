"""What `explore.py boundary` found about each attribute, in lines, in records, and on the page."""

import csv
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dnnlib.files import atomic_write
from dnnlib.progress import Progress
from dnnlib.text import plural
from latent.attribute_values import Attribute
from latent.boundaries import Boundary, ChosenSamples, auc_interval, choose_samples, find_boundary
from latent.exploration_page import Cell, heading, paragraph, sortable_table
from metrics.intervals import Interval, holm


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What was found about one attribute, or about its direction without others."""

    name: str  # of the direction
    attribute: Attribute
    chosen: ChosenSamples
    boundary: Boundary
    adjusted: float  # the p-value, corrected for the number of attributes
    angle: float | None = None  # degrees to the attribute's own direction, of directions without others
    other_aucs: tuple[tuple[str, Interval], ...] = ()  # of other attributes, along this direction

    @property
    def is_found(self) -> bool:
        return self.boundary.is_found(self.adjusted)


def find_all(attributes: Sequence[Attribute], styles: np.ndarray, groups: np.ndarray | None, extremes: float,
             permutations: int, known: Sequence[Attribute] = (), on_fit: Callable[[], None] = lambda: None
             ) -> list[Finding]:
    """Return what is found about each attribute, with p-values corrected for their number (Holm). Raises UserError.

    styles: float64 [N, K];  groups: int64 [N] or None
    known:  all attributes; a direction has the kind in its name, such as class:mel, if two of them have the same name
    on_fit: called after each permutation
    """
    chosen = [choose_samples(attribute.name, attribute.values, groups, extremes) for attribute in attributes]
    every = [attribute.name for attribute in known or attributes]
    names = [one.name if every.count(one.name) == 1 else one.key for one in attributes]
    with Progress(permutations * len(attributes), "permutations") as progress:
        def advance() -> None:
            progress.advance()
            on_fit()

        boundaries = [find_boundary(styles, some, permutations=permutations, on_fit=advance) for some in chosen]
    adjusted = holm([boundary.p_value for boundary in boundaries])
    return [Finding(name=name, attribute=attribute, chosen=some, boundary=boundary, adjusted=p)
            for name, attribute, some, boundary, p in zip(names, attributes, chosen, boundaries, adjusted, strict=True)]


def find_without(findings: Sequence[Finding], styles: np.ndarray, others: Sequence[Finding],
                 away: dict[str, np.ndarray], permutations: int,
                 on_fit: Callable[[], None] = lambda: None) -> list[Finding]:
    """Return the findings for directions without what each shares with others; none where there are no others.

    away:  directions [K] of files, by their texts

    Each has a permutation test of its own, in which the others are taken out too; p-values are corrected as in
    `find_all`.
    """
    apart = [(finding, [other for other in others if other is not finding]) for finding in findings]
    apart = [(finding, rest) for finding, rest in apart if rest or away]
    found = []
    with Progress(permutations * len(apart), "permutations") as progress:
        def advance() -> None:
            progress.advance()
            on_fit()

        for finding, rest in apart:
            boundary = find_boundary(styles, finding.chosen, permutations=permutations, on_fit=advance,
                                     others=[*(other.boundary.normal for other in rest), *away.values()])
            along = [(other.name, auc_interval(styles[other.chosen.rows] @ boundary.normal, other.chosen.positive,
                                               other.chosen.groups)) for other in rest]
            cosine = float(np.clip(boundary.normal @ finding.boundary.normal, -1, 1))
            name = f"{finding.name} orthogonal to {' and '.join([*(other.name for other in rest), *away])}"
            found.append(replace(finding, name=name, boundary=boundary, angle=math.degrees(math.acos(cosine)),
                                 other_aucs=tuple(along)))
    adjusted = holm([one.boundary.p_value for one in found])
    return [replace(one, adjusted=p) for one, p in zip(found, adjusted, strict=True)]


def describe(finding: Finding, tests: int, permutations: int) -> str:
    """Return "area: AUC 0.93 [0.91, 0.95] by 5-fold cross-validation on 1000 samples, p = 0.005 (...)"."""
    chosen = finding.chosen
    groups = "" if chosen.groups is None else f" of {plural(chosen.num_groups, 'group')}"
    corrected = "" if tests == 1 else f", corrected for {tests} attributes"
    nothing = "" if finding.is_found else "no direction found: "
    return (f"{finding.name}: {nothing}{_auc_text(finding.boundary.auc)} by 5-fold cross-validation on "
            f"{len(chosen.rows)} samples{groups}, p = {finding.adjusted:.2g} ({permutations} permutations{corrected})")


def describe_without(finding: Finding) -> str:
    """Return "area orthogonal to color_l: AUC ..., 23 degrees from area; along it, color_l has AUC ..."."""
    nothing = "" if finding.is_found else "no direction found: "
    along = ", ".join(f"{name} has {_auc_text(interval)}" for name, interval in finding.other_aucs)
    return (f"{finding.name}: {nothing}{_auc_text(finding.boundary.auc)}, p = {finding.adjusted:.2g}, "
            f"{finding.angle:.0f} degrees from the direction of {finding.attribute.name} alone"
            f"{f'; along it, {along}' if along else ''}")


def describe_findings(record: dict[str, Any]) -> str:
    """Return the part of the page about the directions, as HTML. record: the content of boundary.json"""
    rows = [[Cell(one["name"]), Cell("yes" if one["found"] else "no direction found"),
             Cell(_auc_text(Interval(**one["auc"])).removeprefix("AUC "), sort=one["auc"]["estimate"]),
             Cell(f"{one['p_adjusted']:.2g}", sort=one["p_adjusted"]),
             Cell(str(one["samples"]), sort=one["samples"]), Cell(one["between"]),
             Cell("; ".join(f"{name}: {_auc_text(Interval(**interval)).removeprefix('AUC ')}"
                            for name, interval in one["other_aucs"].items()))] for one in record["directions"]]
    matrix = record["rank_correlations"]
    cosines = record["cosines"]
    parts = [
        heading("Directions"),
        paragraph("The AUC is that of samples which the direction was not found from (5-fold cross-validation), with "
                  "its 95 % interval. The p-value is that of a permutation test"
                  + (f", corrected for {record['tests']} attributes (Holm)" if record["tests"] > 1 else "")
                  + ("; for directions orthogonal to others, for the number of these."
                     if any(one["degrees_to_own_direction"] is not None for one in record["directions"]) else ".")),
        sortable_table(["direction", "found", "AUC", "p", "samples", "compared", "AUC of others along it"], rows),
        heading("Rank correlations of the attributes"),
        paragraph(f"Spearman's, over {plural(record['samples'], 'sample')}: attributes that vary together are hard to "
                  "change apart from each other."),
        _matrix_table(matrix["names"], matrix["values"])]
    if len(cosines["names"]) > 1:
        parts += [heading("Cosines of the directions"), _matrix_table(cosines["names"], cosines["values"])]
    if cosines["names"]:
        parts.append(heading("What the directions change"))
    return "\n".join(parts)


def record_of(finding: Finding) -> dict[str, Any]:
    words, chosen = finding.attribute.words, finding.chosen
    between = (f"{words[0]} and {words[1]}" if words else f"up to {chosen.low:.4g} and from {chosen.high:.4g}")
    return {"name": finding.name, "attribute": finding.attribute.key, "found": finding.is_found,
            "unknown": int(np.isnan(finding.attribute.values).sum()), "samples": len(chosen.rows),
            "groups": chosen.num_groups, "between": between,
            "low": chosen.low, "high": chosen.high, **finding.boundary.as_record(),
            "p_adjusted": finding.adjusted, "degrees_to_own_direction": finding.angle,
            "other_aucs": {name: interval.as_record() for name, interval in finding.other_aucs}}


def _auc_text(interval: Interval) -> str:
    return f"AUC {interval.estimate:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def _matrix_table(names: Sequence[str], values: Sequence[Sequence[float | None]]) -> str:
    rows = [[Cell(name), *(Cell("") if value is None else Cell(f"{value:.2f}", sort=value, shade=value)
                           for value in row)] for name, row in zip(names, values, strict=True)]
    return sortable_table(["", *names], rows)


def write_matrix(path: os.PathLike, names: Sequence[str], values: np.ndarray) -> None:
    with atomic_write(path, text=True) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["attribute", *names])
        writer.writerows([name, *("" if math.isnan(value) else f"{value:.6g}" for value in row)]
                         for name, row in zip(names, values.tolist(), strict=True))
