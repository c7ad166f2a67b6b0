"""imagesets.metadata: from what a data set was made, and whether its images may be redistributed."""

import io

import pytest

from imagesets.convert import convert
from imagesets.metadata import may_be_redistributed, origins_of
from imagesets.phantoms.make import write_phantoms
from imagesets.reader import ImageSet
from tests.helpers.make_sets import make_set

YES, NO, NOTHING = {"redistribution": True}, {"redistribution": False}, {}


def run(source, dest, **options):
    """Convert; return the `source` of the data set that was written."""
    convert(source, dest, workers=1, stream=io.StringIO(), **options)
    return ImageSet(dest).source


def joined(*sources, phantom=False):
    """Return the `source` of data sets that were joined by a version that records no permission; None = a folder."""
    parts = {f"{index}.zip": source for index, source in enumerate(sources) if source is not None}
    top = {"phantom": True} if phantom else {}
    return {**top, "sources": [{"name": f"{index}.zip"} for index in range(len(sources))],
            "origin": {"sources": parts, **top}}


@pytest.mark.parametrize(("source", "expected"), [
    (NOTHING, None), (YES, True), (NO, False),
    ({"redistribution": "yes"}, None), ({"redistribution": 1}, None),  # written by hand
    ({"phantom": True}, True), ({"phantom": True, **NO}, False),
    ({"generated": True}, None), ({"generated": True, "phantom": True}, True),
    # Projections show their originals, which a network of phantoms does not turn into phantoms.
    ({"generated": True, "projected": True, "phantom": True}, None),
    ({"generated": True, "projected": True, **YES}, True),
    ({"origin": YES}, True), ({"origin": {"origin": NO}}, False), ({"origin": NOTHING}, None),
    ({"origin": {"phantom": True}, "phantom": True}, True), ({"origin": YES, **NO}, False), ({"origin": "x"}, None),
])
def test_permission_is_the_own_record_or_that_of_the_origin(source, expected):
    assert may_be_redistributed(source) is expected


@pytest.mark.parametrize(("source", "expected"), [
    (joined(YES, YES), True), (joined(YES, NO), False), (joined(YES, NOTHING), None), (joined(NOTHING, NO), False),
    (joined(YES, {"phantom": True}, phantom=True), True),
    (joined({"phantom": True}, NOTHING, phantom=True), None),
    (joined({"phantom": True}, None, phantom=True), None),  # a folder of photographs
    ({"origin": joined(YES, YES)}, True), ({"origin": joined(YES, None)}, None),
])
def test_permission_of_joined_sets_needs_that_of_all(source, expected):
    assert may_be_redistributed(source) is expected


def test_origins_are_those_of_one_conversion():
    assert origins_of({"seed": 1}) == []
    assert origins_of({"origin": YES}) == [YES]
    assert origins_of(joined(YES, None, NO)) == [YES, NO, {}]
    assert origins_of({"origin": joined(YES, NO)}) == [joined(YES, NO)]


@pytest.mark.parametrize("given", [True, False])
def test_convert_records_the_permission_and_keeps_it(tmp_path, given):
    first = run(make_set(tmp_path / "a.zip", 2), tmp_path / "b.zip", redistribution=given)
    assert first["redistribution"] is given
    second = run(tmp_path / "b.zip", tmp_path / "c.zip")
    assert second["redistribution"] is given
    assert "redistribution" not in second["options"]
    assert run(tmp_path / "c.zip", tmp_path / "d.zip", redistribution=not given)["redistribution"] is not given


def test_convert_without_a_record_writes_none(tmp_path):
    assert "redistribution" not in run(make_set(tmp_path / "a.zip", 2), tmp_path / "b.zip")


@pytest.mark.parametrize(("other", "expected"), [(YES, True), (NO, False), (None, None), ({"phantom": True}, True)])
def test_convert_of_several_sets_needs_the_permission_of_all(tmp_path, other, expected):
    paths = [make_set(tmp_path / "a.zip", 2, source=YES), make_set(tmp_path / "b.zip", 2, source=other)]
    assert run(paths, tmp_path / "c.zip").get("redistribution") is expected


def test_phantoms_may_be_redistributed_also_when_converted(tmp_path):
    write_phantoms(tmp_path / "phantom.zip", count=2, resolution=16, workers=1, stream=io.StringIO())
    assert ImageSet(tmp_path / "phantom.zip").source["redistribution"] is True
    assert run(tmp_path / "phantom.zip", tmp_path / "small.zip", width=8, height=8)["redistribution"] is True


def test_phantoms_of_earlier_versions_may_be_redistributed_when_converted(tmp_path):
    path = make_set(tmp_path / "phantom.zip", 2, source={"phantom": True, "seed": 3})
    assert run(path, tmp_path / "b.zip")["redistribution"] is True

