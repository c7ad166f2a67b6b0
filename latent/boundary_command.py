"""`explore.py boundary`: find directions that change an attribute, test them, and show what else they change."""

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from dnnlib.cli import UserError, UserPath
from dnnlib.files import atomic_write
from dnnlib.text import plural
from generation.command import flag
from generation.network import Label, OpenNetwork
from imagesets.classes import split_names
from latent.attribute_values import (
    CLASSIFIER,
    MEASURE,
    Attribute,
    Samples,
    class_attributes,
    find_attribute,
    find_attributes,
    image_attributes,
    is_usable,
    read_samples,
    read_values,
    samples_of_seeds,
    styles_in,
)
from latent.boundaries import SIGNIFICANCE, choose_samples, rank_correlations, require_scikit_learn
from latent.boundary_findings import (
    describe,
    describe_findings,
    describe_without,
    find_all,
    find_without,
    record_of,
    write_matrix,
)
from latent.class_lines import walk_between_classes
from latent.directions import (
    ALL_LAYERS,
    BOUNDARY,
    FILE,
    Directions,
    choose_style_layers,
    deviations_along,
    is_direction,
    mapping_sha256,
    parse_direction,
    save_directions,
)
from latent.exploration import NETWORK, Explorer, OpenClassifier, make_explore_command, seeds_of
from latent.measurements import MeasuredRequest
from latent.walks import parse_strength, place_steps, remove_walks, walk_directions, write_walks

RECORD, CORRELATIONS = "boundary.json", "correlations.csv"
SEEDS, LINE_SEEDS = "0-1999", "0-31"  # defaults
_STRENGTH, _LINE_STRENGTH = "-3..3", "-0.5..1.5"
_STEPS, _LINE_STEPS = 7, 9
_WALKED = 32  # samples whose images are measured along each direction
_ATTRIBUTE, _WALK = "Attribute", "Walk"  # headings of the help


@dataclass(frozen=True, kw_only=True)
class BoundaryRequest(MeasuredRequest):
    """The options of explore.py boundary. Raises UserError if one is missing, contradicts another or is wrong."""

    seeds: str | None = flag(
        NETWORK, "LIST", "Random seeds of the samples, such as 0-999. With several classes, they take turns.",
        shown=f"{SEEDS}, or {LINE_SEEDS} with --from")
    projected_w: str | None = flag(
        NETWORK, "FILE", "Take projected images as samples, not seeds: an .npz file of projector.py. Of styles in W+, "
        "the mean over --layers is used.", type=UserPath())
    attribute: str | None = flag(
        _ATTRIBUTE, "LIST", "Attributes to find directions for: classes of the network, measurements of the lesion, "
        "labels of --classifier, columns of --values. Where a name is ambiguous, class:mel, measure:area, "
        "classifier:mel or values:age.")
    values: str | None = flag(
        _ATTRIBUTE, "FILE.csv", "Table with values of the samples: a column seed (or image, with --projected-w), and "
        "others with numbers, or with two words.", type=UserPath())
    extremes: float = flag(
        _ATTRIBUTE, "SHARE", "Share of the samples with the lowest, and of those with the highest values, that are "
        "compared.", default=0.25)
    orthogonal_to: str | None = flag(
        _ATTRIBUTE, "LIST", "Attributes that should stay as they are, or directions (FILE:NAME): also write each "
        "direction without what it has in common with the others of these.")
    permutations: int = flag(_ATTRIBUTE, "INT", "Permutations of the test.", default=200)
    from_: str | None = flag(
        _ATTRIBUTE, "NAME", "Class of a conditional network: instead of finding an attribute, walk from its mean style "
        "to that of --to.")
    to: str | None = flag(_ATTRIBUTE, "NAME", "The class that the walk leads to.")
    layers: str = flag(
        _WALK, "LIST", "Layers of w that move, such as 0,1,5-9, or coarse, middle, fine.", default=ALL_LAYERS)
    strength: str | None = flag(
        _WALK, "LOW..HIGH", "How far images move, in standard deviations of w along the direction; with --from, in "
        "distances between the classes.", shown=f"{_STRENGTH}, or {_LINE_STRENGTH} with --from")
    steps: int | None = flag(_WALK, "INT", "Steps of a walk.", shown=f"{_STEPS}, or {_LINE_STEPS} with --from")

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.from_ is None) != (self.to is None):
            given, missing = ("to", "from") if self.from_ is None else ("from", "to")
            raise UserError(f"--{given} is given without --{missing}; expected both, such as --from=nv --to=mel")
        if self.is_line:
            for name in ("attribute", "projected_w", "values", "orthogonal_to", "class_", "label"):
                if getattr(self, name) is not None:
                    option = "--" + name.rstrip("_").replace("_", "-")
                    raise UserError(f"{option} and --from are both given; expected one of them")
        elif self.attribute is None:
            raise UserError("--attribute is missing; expected one, such as --attribute=area, or two classes, such as "
                            "--from=nv --to=mel")
        if None not in (self.seeds, self.projected_w):
            raise UserError("--seeds and --projected-w are both given; expected one of them")
        if not 0 < self.extremes <= 0.5:  # also refuses nan
            raise UserError(f"--extremes is {self.extremes:g}; expected a share above 0, at most 0.5")
        if self.permutations < 1:
            raise UserError(f"--permutations is {self.permutations}; expected at least 1, such as 200")
        self.walk_steps()

    @property
    def is_line(self) -> bool:
        """Whether a walk between two classes is asked for."""
        return self.from_ is not None

    @property
    def num_steps(self) -> int:
        return self.steps if self.steps is not None else _LINE_STEPS if self.is_line else _STEPS

    def walk_steps(self) -> list[float]:
        """Return the steps of a walk, in the unit of --strength. Raises UserError."""
        default, unit = ((_LINE_STRENGTH, "distances between the classes") if self.is_line else
                         (_STRENGTH, "standard deviations"))
        return place_steps(*parse_strength(self.strength or default, unit=unit, example=default), self.num_steps)

    def chosen_seeds(self) -> list[int]:
        """Return the seeds, each once. Raises UserError."""
        default = LINE_SEEDS if self.is_line else SEEDS
        return seeds_of(default if self.seeds is None else self.seeds, least=2)

    def choose_labels(self, network: OpenNetwork) -> tuple[Label, ...]:
        """Return the labels of the samples, or the two classes of a walk. Raises UserError."""
        if not self.is_line:
            return super().choose_labels(network)
        if network.classes.count == 0:
            raise UserError("--from and --to are given, but this network was trained without classes; expected "
                            "--attribute")
        ends = (network.classes.find("--from", self.from_), network.classes.find("--to", self.to))
        if ends[0] == ends[1]:
            raise UserError(f"--from and --to are both {self.from_}; expected two different classes")
        return ends

    def check(self, network: OpenNetwork) -> None:
        """Raise UserError if options do not fit the network."""
        super().check(network)
        choose_style_layers(self.layers, network.G)
        if not self.is_line:
            require_scikit_learn()
        if self.projected_w is not None:
            read_samples(self.projected_w, network.G)
        elif self.is_line or self.seeds is not None:
            self.chosen_seeds()


def run_boundary(explorer: Explorer, request: BoundaryRequest, open_classifier: OpenClassifier) -> None:
    """Do what the options ask for; all processes call this together."""
    kinds = [*([MEASURE] if request.measure else []), *([CLASSIFIER] if request.classifier is not None else [])]
    functions = dict(zip(kinds, request.functions(open_classifier, explorer.generator.device), strict=True))
    layers = choose_style_layers(request.layers, explorer.G)
    if request.is_line:
        walk_between_classes(explorer, request.chosen_seeds(), request.walk_steps(), layers, functions)
        return
    samples = (samples_of_seeds(explorer, request.chosen_seeds()) if request.projected_w is None else
               read_samples(request.projected_w, explorer.G))
    known = class_attributes(samples)
    if request.values is not None:
        known += read_values(request.values, samples, quiet=not explorer.is_main)
    # What can be refused without an image is refused before any is made.
    named = [*known, *(Attribute(kind=kind, name=name, values=np.zeros(0)) for kind, function in functions.items()
                       for name in function.names)]
    wanted = find_attributes(request.attribute, named)
    others, away = _parse_others(request.orthogonal_to, wanted, named, explorer.network)
    tested = list({one.key: one for one in (*wanted, *others)}.values())
    for attribute in tested:
        if attribute.key in {one.key for one in known}:
            choose_samples(attribute.name, attribute.values, samples.groups, request.extremes)
    _check_permutations(request.permutations, len(tested))
    attributes = [*known, *image_attributes(explorer, samples, functions)]
    wanted, others = ([find_attribute(one.key, attributes) for one in some] for some in (wanted, others))
    found, record = explorer.from_main(lambda beat: _find_and_write(explorer, request, samples, attributes, wanted,
                                                                    others, away, layers, beat))
    reports = []
    if found is not None:
        walked = samples.groups if samples.groups is None else samples.groups[:_WALKED]
        reports = walk_directions(explorer, found, samples.ws[:_WALKED], samples.names[:_WALKED], groups=walked,
                                  steps=request.walk_steps(), functions=list(functions.values()))
    write_walks(explorer, reports, title=f"Directions of attributes: {explorer.network.name}",
                body=describe_findings(record), record={"samples": list(samples.names[:_WALKED])})


def _parse_others(text: str | None, wanted: Sequence[Attribute], known: Sequence[Attribute],
                  network: OpenNetwork) -> tuple[list[Attribute], dict[str, np.ndarray]]:
    """Return the attributes and the directions [K], by their texts, of --orthogonal-to. Raises UserError."""
    names = {name for attribute in known for name in (attribute.key, attribute.name)}
    others, away = [], {}
    for part in [] if text is None else split_names(text, sorted(names)):
        if part not in names and is_direction(part, "--orthogonal-to"):
            name = Path(part).name
            away[part if name in away else name] = parse_direction(
                part, network, "--orthogonal-to").vectors[0].double().numpy()
            continue
        other = find_attributes(part, known, "--orthogonal-to")[0]
        if [other.key] == [one.key for one in wanted]:
            raise UserError(f"--orthogonal-to has {part}, which is also the only --attribute; expected another one")
        others.append(other)
    if len({other.key for other in others}) < len(others):
        raise UserError(f"--orthogonal-to={text} names an attribute twice; expected each once")
    return others, away


def _check_permutations(permutations: int, tests: int) -> None:
    if tests / (1 + permutations) >= SIGNIFICANCE:
        raise UserError(f"--permutations is {permutations}, too few for a test of {plural(tests, 'attribute')}: the "
                        f"smallest p-value would be {tests / (1 + permutations):.2g}; expected at least "
                        f"{math.floor(tests / SIGNIFICANCE)}")


def _find_and_write(explorer: Explorer, request: BoundaryRequest, samples: Samples, attributes: Sequence[Attribute],
                    wanted: Sequence[Attribute], others: Sequence[Attribute], away: dict[str, np.ndarray],
                    layers: Sequence[int], beat: Callable[[], None]) -> tuple[Directions | None, dict[str, Any]]:
    """Find the directions, print and write what was found; return those to walk along, and the record.

    beat:  called now and then, see `Explorer.from_main`
    """
    for name in (FILE, RECORD, CORRELATIONS):  # from an earlier command
        (explorer.outdir / name).unlink(missing_ok=True)
    remove_walks(explorer.outdir)
    styles = styles_in(samples, layers)
    tested = list({one.key: one for one in (*wanted, *others)}.values())
    findings = find_all(tested, styles, samples.groups, request.extremes, request.permutations, attributes, beat)
    found_others = [one for one in findings if one.is_found and one.attribute.key in {other.key for other in others}]
    for finding in findings:
        if (unknown := int(np.isnan(finding.attribute.values).sum())):
            print(f"{finding.name} is not known for {unknown} of {len(samples)} samples, which are left out",
                  file=sys.stderr)
        print(describe(finding, len(findings), request.permutations), flush=True)
    apart = find_without([one for one in findings[:len(wanted)] if one.is_found], styles, found_others, away,
                         request.permutations, beat) if request.orthogonal_to is not None else []
    for finding in apart:
        print(describe_without(finding), flush=True)
    if others and not found_others and not away:
        print("no direction of --orthogonal-to was found, so that there is nothing to leave out", flush=True)
    findings += apart
    usable = [attribute for attribute in attributes if not attribute.refusal and is_usable(attribute)]
    correlations = rank_correlations({attribute.key: attribute.values for attribute in usable})
    keys = [attribute.key for attribute in usable]
    write_matrix(explorer.outdir / CORRELATIONS, keys, correlations)
    shown = [finding for finding in findings if finding.is_found]
    directions = None
    if shown:
        vectors = torch.from_numpy(np.stack([finding.boundary.normal for finding in shown])).float()
        directions = Directions(
            names=tuple(finding.name for finding in shown), vectors=vectors, method=BOUNDARY, layers=tuple(layers),
            deviations=deviations_along(explorer.reference_styles(), vectors),
            network_sha256=mapping_sha256(explorer.network))
        save_directions(explorer.outdir / FILE, directions)
    cosines = np.eye(0) if directions is None else (vectors.double() @ vectors.double().T).numpy()
    record = {
        **explorer.describe(), "samples": len(samples),
        "seeds": None if request.projected_w else request.seeds or SEEDS,
        **{name: None if path is None else Path(path).name for name, path in (
            ("projected_w", request.projected_w), ("values", request.values), ("classifier", request.classifier))},
        "groups": None if samples.groups is None else len(np.unique(samples.groups)), "layers": list(layers),
        "extremes": request.extremes, "permutations": request.permutations, "tests": len(tested),
        "directions": [record_of(finding) for finding in findings],
        "cosines": {"names": [finding.name for finding in shown], "values": cosines.tolist()},
        "rank_correlations": {"names": keys, "values": [[None if math.isnan(value) else value for value in row]
                                                        for row in correlations.tolist()]}}
    with atomic_write(explorer.outdir / RECORD, text=True) as file:
        file.write(json.dumps(record, indent=1, allow_nan=False) + "\n")
    return directions, record


HELP = f"""Find directions of W that change an attribute, and test that they do.

\b
python explore.py boundary --network=N.safetensors --attribute=area,color_l --outdir=boundary
python explore.py boundary --network=N.safetensors --attribute=area --orthogonal-to=color_l --outdir=boundary
python explore.py boundary --network=N.safetensors --attribute=age --values=table.csv --outdir=boundary
python explore.py boundary --network=N.safetensors --projected-w=latents.npz --attribute=mel --outdir=boundary
python explore.py boundary --network=N.safetensors --from=nv --to=mel --classifier=C.safetensors --outdir=line

A direction is written only if it tells samples apart that it was not found from: if a permutation test says so, and
the interval of its AUC lies above 0.5; of one that was made orthogonal to others, only the interval counts. Writes
{FILE}, {RECORD}, {CORRELATIONS}, sheets, and index.html.
"""


def make_boundary_command(open_classifier: OpenClassifier) -> click.Command:
    """Return the command `explore.py boundary`. open_classifier: opens a file of --classifier"""
    def work(explorer: Explorer, request: BoundaryRequest) -> None:
        run_boundary(explorer, request, open_classifier)

    return make_explore_command("boundary", BoundaryRequest, work, HELP,
                                "Find directions that change an attribute, with tests.")
