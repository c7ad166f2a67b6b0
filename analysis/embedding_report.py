"""Describe the numbers beside a map: as sections of its page, as lines for the terminal, and as values of JSON.

Readers are clinicians: each number comes with a sentence on what it means, and on what it does not show.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from analysis.embedding_inputs import STYLES
from analysis.embedding_layouts import PCA
from analysis.embedding_mixture import ALL, MixtureRow, PurityRow, Region, SetMixture
from analysis.embedding_pictures import picture_tag
from analysis.embedding_points import PROJECTED, REAL, Embedding, Layout, LayoutQuality
from analysis.embedding_table import feature_name
from dnnlib.lines import strict
from dnnlib.text import format_table, listed, listed_with_and, plural
from latent.exploration_page import Cell, bullet_list, captioned, heading, paragraph, picture_table, sortable_table
from metrics.intervals import Interval

MEANINGLESS = ("On t-SNE and UMAP maps, distances between clusters and the sizes of clusters mean nothing; only who is "
               "near whom does, and not even that everywhere.")
_SHOWN = 8  # real images of a region: two rows of a small screen
_MOST_ROWS = 200  # in a table
_EVERYTHING = "all"

_QUALITY = ("Trustworthiness tells whether images that are neighbors on the map are also neighbors for the network: 1 "
            "is perfect, about 0.5 is what random places give. Preservation is the share of an image's nearest images "
            "that are also nearest on the map; what the rest is, the map does not show. Where these numbers are low, "
            "trust the lists of nearest images and the tables below, which do not use the map.")
_MIXING = ("For each real image, its nearest images were found among the other real images and those of this set. "
           "Images of the real image's own patient or lesion are left out: a projection does not count for its own "
           "original. If the set had the same distribution as the real images, its share of the nearest images would "
           "be that in the column \"expected\". A smaller share (a ratio below 1) means that few of its images are "
           "near real ones: they look different, or lack part of what there is. A larger share (a ratio above 1) means "
           "that its images crowd around common real images, or are copies of them. A share as expected does not prove "
           "that the images are good, or that they are not copies: copies of real images are near them, too. In the "
           "row of a class only its own images are looked at, so that unequal numbers of classes do not count.")
_PURITY = ("How often the nearest real images (of other patients or lesions, where these are known) have the class of "
           "an image, against the share that chance would give. Images without a class are left out. If it is as high "
           "for synthetic images as for real ones, their classes look as different as they should.")
_REGIONS = ("A region is a real image with the real images nearest to it. Here are those with the fewest images of the "
            "set, compared with what is expected of equal distributions: what they show, the network makes too rarely "
            "or never. The emptiest of many regions look empty by chance, too, and all the more the fewer images the "
            "set has; so the share below is followed by a comparison with as many real images, which lack nothing.")


def report_html(embedding: Embedding, mixtures: Sequence[SetMixture], real_purity: Sequence[PurityRow],
                notes: Sequence[str]) -> str:
    """Return the sections below a map: how to read it, how far to trust it, mixing, purity and empty regions.

    real_purity:  of the real images; () without classes
    notes:        sentences on the input, such as images without a label
    """
    parts = [heading("How to read this page"), bullet_list([*_how_to_read(embedding), *_noted(embedding, notes)]),
             heading("How far the map can be trusted"), paragraph(_QUALITY), _quality_table(embedding)]
    for number, mixture in enumerate(mixtures):
        name = embedding.points.sets[mixture.set_number].name
        parts += [heading(f"Do {name} and the real images mix?"), "" if number else paragraph(_MIXING),
                  _mixture_table(mixture)]
    unknown = list(_unknown_classes(embedding, mixtures, real_purity))
    if real_purity or unknown:
        parts.append(heading("Are the neighbors of the same class?"))
        if real_purity:
            parts += [paragraph(_PURITY), _purity_table(embedding, mixtures, real_purity)]
        parts += map(paragraph, unknown)
    for number, mixture in enumerate(_meant_to_cover(embedding, mixtures)):
        name = embedding.points.sets[mixture.set_number].name
        parts += [heading(f"Where {name} has nothing"), "" if number else paragraph(_REGIONS),
                  paragraph(_empty_sentence(mixture)), *_describe_regions(embedding, mixture)]
    return "".join(parts)


def describe(embedding: Embedding, mixtures: Sequence[SetMixture], real_purity: Sequence[PurityRow]) -> Iterator[str]:
    """Yield lines for the terminal: the sets, and the numbers of the page's tables without single classes."""
    for one in embedding.points.sets:
        yield f"{one.name}: {plural(len(one), 'image')}, {one.kind}"
    rows = [("map", "points", "trustworthiness", "preservation", "neighbors")]
    rows += [(layout.title, which, f"{quality.trustworthiness:.3f}", f"{quality.preservation:.3f}",
              str(quality.num_neighbors)) for layout, which, quality in _qualities(embedding)]
    yield from format_table(rows, left=(0, 1))
    for mixture in mixtures:
        name, row = embedding.points.sets[mixture.set_number].name, mixture.rows[0]
        near = f"share of {name} among the {mixture.num_neighbors} nearest images of real ones"
        yield (f"{near}: {row.why_not}" if row.share is None else
               f"{near}: {_interval(row.share)}, expected {row.expected:.3g}, ratio {_ratio(row):.3g}")
    for mixture in _meant_to_cover(embedding, mixtures):
        name = embedding.points.sets[mixture.set_number].name
        yield f"{name}: {_empty_sentence(mixture)}"
    yield from _unknown_classes(embedding, mixtures, real_purity)
    for which, row in _purities(embedding, mixtures, real_purity):
        if row.name == ALL and row.share is not None:
            yield (f"nearest real images of the same class, of {which}: {_interval(row.share)}, by chance "
                   f"{row.expected:.3g}")
    if _has_meaningless_distances(embedding):
        yield MEANINGLESS


def results_record(embedding: Embedding, mixtures: Sequence[SetMixture], real_purity: Sequence[PurityRow],
                   notes: Sequence[str]) -> dict[str, Any]:
    """Return everything that the page tells in numbers, as values of strict JSON."""
    return strict({
        "title": embedding.title,
        "settings": embedding.settings,
        "notes": list(notes),
        "sets": [{"name": one.name, "kind": one.kind, "images": len(one), "pictures": one.shows_pictures,
                  "why_no_pictures": one.why_not or None} for one in embedding.points.sets],
        "maps": [{"key": layout.key, "title": layout.title, "note": layout.note,
                  "real": _quality_record(layout.real), "placed": _quality_record(layout.placed)}
                 for layout in embedding.layouts],
        "mixtures": [{
            "set": embedding.points.sets[mixture.set_number].name,
            "num_neighbors": mixture.num_neighbors,
            "rows": [_mixture_record(row) for row in mixture.rows],
            "purity": [_purity_record(row) for row in mixture.purity],
            "region_size": mixture.region_size,
            "empty_share": _interval_record(mixture.empty_share),
            "matched_share": mixture.matched_share,
            "control_share": mixture.control_share,
            "num_matched": mixture.num_matched,
            "unknown_classes": list(mixture.unknown_classes),
            "regions": [_region_record(region, embedding) for region in mixture.regions],
        } for mixture in mixtures],
        "real_purity": [_purity_record(row) for row in real_purity],
    })


def _meant_to_cover(embedding: Embedding, mixtures: Sequence[SetMixture]) -> list[SetMixture]:
    """Return what is about sets that should have all there is: not those of some projected images."""
    return [mixture for mixture in mixtures if embedding.points.sets[mixture.set_number].kind != PROJECTED]


def _how_to_read(embedding: Embedding) -> Iterator[str]:
    points = embedding.points
    yield (f"Each dot is an image. Images that are near each other {_similar(embedding)}, which may weigh other things "
           "than a dermatologist does, such as hairs, light or the camera.")
    if _has_meaningless_distances(embedding):
        yield MEANINGLESS
    others = [one.name for one in points.sets if one.kind != REAL]
    placed = f" Those of {listed_with_and(others)} are placed among them, and do not move them." if others else ""
    yield (f"The {plural(points.num_real, 'real image')} alone decide about the map.{placed} So an image far from all "
           "real ones has no place of its own: look at its distances instead.")
    yield ("Point at a dot to see the image, click it to keep it with its nearest real images, and draw around dots to "
           "list them.")


def _similar(embedding: Embedding) -> str:
    """Return what images that are near each other are, by the settings of the features."""
    name, features = feature_name(embedding), embedding.settings.get("features")
    if name == STYLES:
        return "have similar styles in the generator"
    if not name:
        return "look similar to a network"
    is_classifier = isinstance(features, Mapping) and "labels" in features
    return f"look similar to the {'classifier' if is_classifier else 'network'} {name}"


def _noted(embedding: Embedding, notes: Sequence[str]) -> Iterator[str]:
    """Yield why images are dots, and the notes, which may tell it too, each once, as sentences."""
    sets = embedding.points.sets
    hidden = [one.why_not or f"Images of {one.name} are dots, because they have no pictures." for one in sets
              if not one.shows_pictures]
    for text in dict.fromkeys([*hidden, *notes]):
        starts_with_name = any(text.startswith(one.name) for one in sets)  # names stay as they are
        begun = text if starts_with_name else text[:1].upper() + text[1:]
        yield begun if begun.endswith((".", "!", "?")) or not begun else f"{begun}."


def _has_meaningless_distances(embedding: Embedding) -> bool:
    return any(layout.key != PCA for layout in embedding.layouts)


def _quality_table(embedding: Embedding) -> str:
    rows = [[Cell(layout.title), Cell(which), _number(quality.trustworthiness), _number(quality.preservation),
             _count(quality.num_neighbors), _count(quality.num_points)]
            for layout, which, quality in _qualities(embedding)]
    notes = bullet_list(f"{layout.title}: {layout.note}" for layout in embedding.layouts if layout.note)
    return sortable_table(["map", "points", "trustworthiness", "preservation", "neighbors", "measured on points"],
                          rows) + notes


def _qualities(embedding: Embedding) -> Iterator[tuple[Layout, str, LayoutQuality]]:
    for layout in embedding.layouts:
        yield layout, "real", layout.real
        if layout.placed is not None:
            yield layout, "placed", layout.placed


def _mixture_table(mixture: SetMixture) -> str:
    rows = []
    for row in mixture.rows[:_MOST_ROWS]:
        ratio = _ratio(row)
        rows.append([Cell(row.name or _EVERYTHING), _count(row.num_real), _groups(row.num_groups),
                     _count(row.num_others), *_share_cells(row.share, row.why_not),
                     _number(math.nan if row.share is None else row.expected),
                     Cell("-" if math.isnan(ratio) else f"{ratio:.2f}", sort=ratio,
                          shade=None if math.isnan(ratio) else max(-1.0, min(1.0, ratio - 1)))])
    near = f"among the {mixture.num_neighbors} nearest images of real ones"
    caption = f"Share of the set {near}{_level(mixture.rows)}."
    if all(row.share is None for row in mixture.rows):
        caption = f"There are too few images to tell the share of the set {near}."
    return sortable_table(
        ["class", "real images", "patients or lesions", "images of the set", "share near real images", "interval",
         "expected", "ratio"], rows, caption) + _left_out(mixture.rows)


def _purity_table(embedding: Embedding, mixtures: Sequence[SetMixture], real_purity: Sequence[PurityRow]) -> str:
    found = list(_purities(embedding, mixtures, real_purity))
    level = _level([row for _, row in found])
    rows = [[Cell(which), Cell(row.name or _EVERYTHING), _count(row.num_images), _groups(row.num_groups),
             *_share_cells(row.share, row.why_not), _number(row.expected)] for which, row in found[:_MOST_ROWS]]
    return sortable_table(["images of", "class", "images", "patients or lesions", "same class", "interval",
                           "by chance"], rows,
                          f"Share of the nearest real images that have the same class{level}.") + _left_out(found)


def _left_out(rows: Sequence[Any]) -> str:
    if len(rows) <= _MOST_ROWS:
        return ""
    return paragraph(f"These are the first {_MOST_ROWS} of {len(rows):,} rows; the JSON file beside the page has all.")


def _unknown_classes(embedding: Embedding, mixtures: Sequence[SetMixture],
                     real_purity: Sequence[PurityRow]) -> Iterator[str]:
    """Yield which classes of other sets are not compared, because no real image has them."""
    for mixture in mixtures:
        name, classes = embedding.points.sets[mixture.set_number].name, mixture.unknown_classes
        if classes and not real_purity:
            yield f"The classes of {name} are not compared, because the real images have none."
        elif classes:
            yield f"Classes of {name} that no real image has are not compared: {listed(classes)}."


def _purities(embedding: Embedding, mixtures: Sequence[SetMixture],
              real_purity: Sequence[PurityRow]) -> Iterator[tuple[str, PurityRow]]:
    yield from (("the real images", row) for row in real_purity)
    for mixture in mixtures:
        name = embedding.points.sets[mixture.set_number].name
        yield from ((name, row) for row in mixture.purity)


def _empty_sentence(mixture: SetMixture) -> str:
    if mixture.empty_share is None:
        return "There are too few images to tell how many real images have none of the set near them."
    share = mixture.empty_share
    sentence = (f"For {_percent(share.estimate)} of the real images ({_percent(share.low)} to {_percent(share.high)}), "
                f"no image of the set is as near as their {mixture.region_size - 1} nearest real ones.")
    if mixture.matched_share is None or mixture.control_share is None:
        return sentence
    return (f"{sentence} Among a random half of the real images, and with {plural(mixture.num_matched, 'image')} of "
            f"each, {_percent(mixture.matched_share)} are without an image of the set, and "
            f"{_percent(mixture.control_share)} without a real one of the other half.")


def _describe_regions(embedding: Embedding, mixture: SetMixture) -> Iterator[str]:
    if not mixture.regions:
        yield paragraph("No region is empty: none has less than half of the images that are expected, beyond what "
                        "chance explains.")
    for number, region in enumerate(mixture.regions, start=1):
        yield heading(f"Region {number}: {plural(region.found, 'image')} of the set, {region.expected:.3g} expected", 3)
        classes = ", ".join(f"{count} {name or 'without a class'}" for name, count in region.classes)
        yield paragraph(f"{plural(len(region.rows), 'real image')}: {classes}. The nearest image of the set is at a "
                        f"distance of {region.nearest_distance:.3g} from the center; the real ones are within "
                        f"{region.radius:.3g}.")
        yield f'<p><a href="#pin={int(region.rows[0])}">Show the center of the region on the map</a></p>\n'
        yield _region_images(embedding, region)


def _region_images(embedding: Embedding, region: Region) -> str:
    """Return the first images of a region and the nearest one of the set: pictures as far as they are shown."""
    names_set = sum(one.kind == REAL for one in embedding.points.sets) > 1
    shown = [*region.rows[:_SHOWN], *([region.nearest] if region.nearest >= 0 else [])]
    what = ["center", *["real image"] * (len(shown) - 1)]
    if region.nearest >= 0:
        what[-1] = "nearest of the set"
    pictures = {int(row): place for place, row in enumerate(embedding.pictured)} if len(embedding.pictured) else {}
    texts = [_image_text(embedding, row, names_set or row == region.nearest) for row in shown]
    if not any(row in pictures for row in shown):
        return bullet_list(f"{role}: {text}" for role, text in zip(what, texts))
    images = [picture_tag(embedding.thumbnails[pictures[row]], text) if row in pictures else ""
              for row, text in zip(shown, texts)]
    cells = [captioned(image, text) for image, text in zip(images, texts)]
    return picture_table(what, [("", cells)])


def _image_text(embedding: Embedding, row: int, names_set: bool) -> str:
    name, class_name = embedding.points.names[row], embedding.points.classes[row]
    of_set = f" of {_set_name(embedding, row)}" if names_set else ""
    return f"{name}{of_set}{f' ({class_name})' if class_name else ''}"


def _set_name(embedding: Embedding, row: int) -> str:
    return embedding.points.sets[int(embedding.points.set_numbers[row])].name


def _share_cells(share: Interval | None, why_not: str) -> list[Cell]:
    if share is None:
        return [Cell("-", sort=math.nan), Cell(why_not or "-", is_long=bool(why_not))]
    return [_number(share.estimate), Cell(f"{share.low:.3g} to {share.high:.3g}")]


def _level(rows: Sequence[MixtureRow | PurityRow]) -> str:
    share = next((row.share for row in rows if row.share is not None), None)
    return "" if share is None else (f"; intervals hold what is compatible with the data at a level of "
                                     f"{100 * share.level:g} %")


def _ratio(row: MixtureRow) -> float:
    return math.nan if row.share is None else row.share.estimate / row.expected


def _number(value: float) -> Cell:
    return Cell("-" if math.isnan(value) else f"{value:.3g}", sort=value)


def _count(value: int) -> Cell:
    return Cell(f"{value:,}", sort=value)


def _groups(count: int | None) -> Cell:
    return Cell("-", sort=math.nan) if count is None else _count(count)


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _interval(share: Interval) -> str:
    return f"{share.estimate:.3g} ({share.low:.3g} to {share.high:.3g})"


def _interval_record(interval: Interval | None) -> dict[str, Any] | None:
    return None if interval is None else interval.as_record()


def _quality_record(quality: LayoutQuality | None) -> dict[str, Any] | None:
    return None if quality is None else vars(quality)


def _mixture_record(row: MixtureRow) -> dict[str, Any]:
    return {"class": row.name or None, "real_images": row.num_real, "real_groups": row.num_groups,
            "other_images": row.num_others, "expected": row.expected, "share": _interval_record(row.share),
            "ratio": _ratio(row), "reason": row.why_not or None}


def _purity_record(row: PurityRow) -> dict[str, Any]:
    return {"class": row.name or None, "images": row.num_images, "groups": row.num_groups, "expected": row.expected,
            "share": _interval_record(row.share), "reason": row.why_not or None}


def _region_record(region: Region, embedding: Embedding) -> dict[str, Any]:
    *images, nearest = ({"set": _set_name(embedding, row), "name": embedding.points.names[row]}
                        for row in (*region.rows, region.nearest))
    return {"images": images, "radius": region.radius, "found": region.found, "expected": region.expected,
            "nearest": nearest if region.nearest >= 0 else None, "nearest_distance": region.nearest_distance,
            "classes": [{"class": name or None, "images": count} for name, count in region.classes]}
