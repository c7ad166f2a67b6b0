"""imagesets.split_files: parts hold the same bytes, labels and groups, and the manifest lists them."""

import hashlib
import json

import numpy as np
import pytest

from imagesets.reader import ImageSet
from imagesets.split import assign, institution_of, read_digests
from imagesets.split_files import SplitPaths, content_hash, write_split
from imagesets.writer import ImageSetWriter
from tests.helpers.make_sets import make_set, pixels_of, png
from tests.helpers.split_cases import THREE, make_request


def split(path, asked, *, dest=None):
    """Split without the command line; return the manifest."""
    images = ImageSet(path)
    paths = SplitPaths.choose(images.path, asked, dest)
    digests = read_digests(images)
    write_split(images, digests, assign(images, digests, asked), asked, paths)
    return json.loads(paths.manifest.read_text(encoding="utf-8"))


def by_digest(path):
    """Return {sha256 of an image: (label, group or None)}."""
    images = ImageSet(path)
    groups = [None if group == name else group for name, group in zip(images.names, images.groups, strict=True)]
    labels = [None] * len(images) if images.labels is None else images.labels.tolist()
    return {hashlib.sha256(images.read(name)).hexdigest(): (label, group)
            for name, label, group in zip(images.names, labels, groups, strict=True)}


@pytest.mark.parametrize(("labels", "classes"), [
    ([0, 1] * 20, ["benign", "m\u00e9lanome"]),
    ([[0.1, 0.7], [1, 0]] * 20, None),
    ([0, None] * 20, ["a", "b"]),
    (None, None),
])
def test_write_split_keeps_bytes_labels_classes_and_groups(tmp_path, labels, classes):
    groups = [f"patient{index // 3}" if index < 30 else None for index in range(40)]
    path = make_set(tmp_path / "set.zip", 40, labels=labels, classes=classes, groups=groups)
    split(path, make_request("train:0.5,test:0.5"))
    parts = [tmp_path / "set-train.zip", tmp_path / "set-test.zip"]
    found = [by_digest(part) for part in parts]
    assert not set(found[0]) & set(found[1])
    assert {**found[0], **found[1]} == by_digest(path)
    assert all(ImageSet(part).classes == classes for part in parts)


def test_write_split_manifest_tells_groups_files_and_true_hashes(tmp_path):
    path = make_set(tmp_path / "set.zip", 40, labels=[0, 1] * 20, classes=["benign", "melanoma"],
                    groups=[f"patient{index // 4}" for index in range(40)])
    manifest = split(path, make_request("train:0.75,test:0.25", institutions=2, seed=5))
    assert {key: manifest[key] for key in ("version", "tool", "seed", "parts_asked", "institutions_asked", "skew_asked",
                                           "linked_groups")} == {
        "version": 1, "tool": "dataset_tool.py split", "seed": 5, "parts_asked": {"train": 0.75, "test": 0.25},
        "institutions_asked": {"institution1": 0.5, "institution2": 0.5}, "skew_asked": None, "linked_groups": 0}
    images = ImageSet(path)
    assert manifest["source"] == {"name": "set.zip", "content_hash": content_hash(images, read_digests(images)),
                                  "num_images": 40}
    seen = []
    for part in manifest["parts"]:
        inside = ImageSet(tmp_path / part["zip"])
        assert [file["file"] for file in part["files"]] == inside.names
        assert [file["group"] for file in part["files"]] == inside.groups
        for file in part["files"]:
            assert hashlib.sha256(inside.read(file["file"])).hexdigest() == file["sha256"]
            assert inside.read(file["file"]) == images.read(file["from"])
        assert part["num_images"] == len(inside) == sum(part["classes"].values())
        assert part["classes"] == dict(zip(["benign", "melanoma"], np.bincount(inside.labels).tolist(), strict=True))
        assert part["groups"] == list(dict.fromkeys(inside.groups))
        assert part["num_groups"] == len(part["groups"])
        seen += [file["from"] for file in part["files"]]
    assert sorted(seen) == images.names
    assert [part["name"] for part in manifest["parts"]] == ["institution1", "institution2", "test"]
    assert manifest["left_out"] == {"num_images": 0, "num_groups": 0, "classes": {"benign": 0, "melanoma": 0},
                                    "groups": [], "files": []}


def test_write_split_manifest_lists_what_is_left_out(tmp_path):
    path = make_set(tmp_path / "set.zip", 40, labels=[1] * 4 + [0] * 36, classes=["a", "b"])
    manifest = split(path, make_request(institutions=2, skew="b=0.5,0.5", leave_out=True))
    assert manifest["left_out"]["classes"] == {"a": 32, "b": 0}
    assert len(manifest["left_out"]["files"]) == 32
    assert "file" not in manifest["left_out"]["files"][0]
    assert manifest["skew_asked"] == {"b": [0.5, 0.5]}


def test_write_split_source_stays_and_tells_part_and_whole(tmp_path):
    with ImageSetWriter(tmp_path / "set.zip", source={"phantom": True, "seed": 9}) as writer:
        for index in range(8):
            writer.add(png(pixels_of(index)))
    whole = split(tmp_path / "set.zip", make_request("a:0.5,b:0.5"))["source"]
    of = {"name": "set.zip", "content_hash": whole["content_hash"]}
    source = ImageSet(tmp_path / "set-b.zip").source
    assert source == {"phantom": True, "seed": 9, "split": {"part": "b", "seed": 0, "of": of}}
    split(tmp_path / "set-b.zip", make_request("c:0.5,d:0.5"))
    assert ImageSet(tmp_path / "set-b-c.zip").source["split"]["before"] == source["split"]


def test_institution_of_a_part_is_known_also_when_it_was_split_or_converted_again(tmp_path):
    path = make_set(tmp_path / "set.zip", 16)
    assert institution_of(ImageSet(path).source) is None
    split(path, make_request("train:0.5,test:0.5", institutions=2))
    found = [ImageSet(tmp_path / f"set-{name}.zip").source for name in ("institution1", "institution2", "test")]
    assert list(map(institution_of, found)) == ["institution1", "institution2", None]
    split(tmp_path / "set-institution2.zip", make_request("train:0.5,val:0.5"))
    again = ImageSet(tmp_path / "set-institution2-val.zip").source
    assert (again["split"]["part"], institution_of(again)) == ("val", "institution2")
    assert institution_of({"tool": "dataset_tool.py", "origin": again}) == "institution2"
    assert institution_of({"sources": [{"name": "a"}, {"name": "b"}],
                           "origin": {"sources": {"a": found[0], "b": found[1]}}}) is None


def test_write_split_twice_gives_equal_bytes(tmp_path):
    path = make_set(tmp_path / "set.zip", 30, labels=[0, 1, 2] * 10)
    for folder in ("one", "two"):
        split(path, make_request(THREE), dest=tmp_path / folder)
    for file in ("set-train.zip", "set-val.zip", "set-test.zip", "set-split.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_write_split_table_keeps_rows_of_the_part_under_new_names(tmp_path):
    with ImageSetWriter(tmp_path / "set.zip") as writer:
        names = [writer.add(png(pixels_of(index))) for index in range(8)]
        written = [names[0], f"./{names[1]}", names[2].replace("/", "\\"), *names[3:]]
        writer.add_file("attributes.csv", "".join(["size,file\n", *(f"{index},{name}\n" for index, name
                                                                     in enumerate(written))]).encode())
        writer.add_file("notes.txt", b"by hand")
    images, asked = ImageSet(tmp_path / "set.zip"), make_request("a:0.5,b:0.5")
    digests = read_digests(images)
    paths = SplitPaths.choose(images.path, asked, None)
    assert write_split(images, digests, assign(images, digests, asked), asked, paths) == ["notes.txt"]
    for path in paths.parts:
        part = ImageSet(path)
        rows = [line.split(",") for line in part.read("attributes.csv").decode().splitlines()]
        assert (rows[0], len(rows)) == (["size", "file"], 5)
        assert [name for _, name in rows[1:]] == part.names
        assert all(part.read(name) == png(pixels_of(int(size))) for size, name in rows[1:])


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("dest", [None, "new"])
def test_write_split_stopped_leaves_nothing(tmp_path, error, dest):
    path = make_set(tmp_path / "set.zip", 12)
    images, asked = ImageSet(path), make_request("a:0.5,b:0.5")
    digests = read_digests(images)
    paths = SplitPaths.choose(images.path, asked, dest and tmp_path / dest)
    calls = []

    def stop():
        calls.append(1)
        if len(calls) == 9:
            raise error

    with pytest.raises(error):
        write_split(images, digests, assign(images, digests, asked), asked, paths, on_image=stop)
    assert [item.name for item in tmp_path.iterdir()] == ["set.zip"]
