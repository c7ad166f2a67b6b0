"""analysis.protocol and make_protocol: what a study records of its parts, and the leaks that it refuses."""

import io
import json
import zipfile

import numpy as np
import PIL.Image
import pytest

from analysis.make_protocol import MOST_LISTED, ProtocolRequest
from analysis.protocol import EXTERNAL, REST, TEST, TRAIN, VAL, Protocol, Task, attributes_of, open_part
from dnnlib.cli import UserError
from imagesets.phantoms.make import write_phantoms
from imagesets.pixel_hashes import hash_set, read_pixel_hashes
from imagesets.reader import ImageSet
from imagesets.writer import ImageSetWriter
from tests.helpers.make_sets import make_set, pixels_of, png
from tests.helpers.study_parts import CLASSES, ROWS, make_part, make_parts, protocol_of


@pytest.fixture
def paths(tmp_path):
    return make_parts(tmp_path)


def refusal(paths, **changes):
    """Return the message with which a protocol is refused."""
    with pytest.raises(UserError) as caught:
        protocol_of(paths, **changes)
    message = str(caught.value)
    assert "\n" not in message
    return message


# What is recorded


def test_parts_record_counts_hashes_and_the_label_of_each_class(paths):
    protocol = protocol_of(paths)
    assert protocol.task == Task(labels=(REST, "mel"), positive=("mel",))
    assert [(part.name, part.role, part.num_images, part.num_groups) for part in protocol.parts] == [
        ("train", TRAIN, 16, 8), ("val", VAL, 8, 4), ("test", TEST, 8, 4), ("isic", EXTERNAL, 8, 4)]
    train = protocol.part("train")
    assert (dict(train.class_counts), dict(train.class_labels)) == ({"nv": 8, "mel": 8}, {"nv": 0, "mel": 1})
    assert (dict(train.label_counts), train.shape) == ({REST: 8, "mel": 8}, (3, 8, 8))
    assert train.pixels_sha256 == hash_set(read_pixel_hashes(ImageSet(paths["train"])))
    assert [part.name for part in protocol.evaluated] == ["test", "isic"]


def test_positive_class_may_have_another_name_in_each_part(paths, tmp_path):
    paths["isic"] = str(make_part(tmp_path / "other.zip", ROWS["isic"], classes=["naevus", "melanoma"]))
    protocol = protocol_of(paths, positive="mel,melanoma")
    assert protocol.task.labels == (REST, "mel")
    assert dict(protocol.part("other").class_labels) == {"naevus": 0, "melanoma": 1}
    assert open_part(protocol, "other").labels.tolist() == [0, 0, 1, 1] * 2


def test_several_positive_classes_of_the_training_part_name_the_label(paths, tmp_path):
    for name, rows in ROWS.items():
        labels = [image // 2 % 4 for image in rows]
        make_part(tmp_path / f"{name}.zip", rows, classes=["nv", "mel", "bcc", "df"], labels=labels,
                  groups=[f"{name}{row}" for row in rows])
    protocol = protocol_of(paths, positive="mel,bcc")
    assert protocol.task.labels == (REST, "mel+bcc")
    assert dict(protocol.part("train").class_labels) == {"nv": 0, "mel": 1, "bcc": 1, "df": 0}


def test_all_classes_are_labels_by_name_whatever_their_numbers(paths, tmp_path):
    rows = ROWS["test"]
    make_part(tmp_path / "test.zip", rows, classes=["unused", "mel", "nv"], labels=[2 - row // 2 % 2 for row in rows])
    protocol = protocol_of(paths, positive=None, multiclass=True)
    assert (protocol.task.labels, protocol.task.is_binary) == (("nv", "mel"), False)
    opened = open_part(protocol, "test")
    assert opened.classes == [CLASSES[label] for label in opened.labels.tolist()]
    assert opened.labels.tolist() == [0, 0, 1, 1] * 2
    assert (opened.groups.tolist(), opened.group_names[:3]) == ([0, 0, 1, 1, 2, 2, 3, 3],
                                                                ["lesion12", "lesion12", "lesion13"])
    assert np.array_equal(opened.images.item(3), pixels_of(27))


def test_protocol_reads_back_equal_and_moves_with_its_data(paths, tmp_path):
    protocol = protocol_of(paths)
    protocol.write(tmp_path / "p.json")
    assert [entry["path"] for entry in json.loads((tmp_path / "p.json").read_text())["parts"]] == [
        "train.zip", "val.zip", "test.zip", "isic.zip"]
    assert Protocol.read(tmp_path / "p.json") == protocol
    moved = tmp_path.parent / f"{tmp_path.name}-moved"
    tmp_path.rename(moved)
    again = Protocol.read(moved / "p.json")
    assert again.sha256 == protocol.sha256
    assert len(open_part(again, "val")) == 8
    moved.rename(tmp_path)


def test_identity_depends_on_content_and_task_not_on_paths(paths, tmp_path):
    protocol = protocol_of(paths)
    (tmp_path / "elsewhere").mkdir()
    assert protocol_of(make_parts(tmp_path / "elsewhere")).sha256 == protocol.sha256
    others = [protocol_of(paths, positive="nv"), protocol_of(paths, positive=None, multiclass=True),
              protocol_of(paths, external=[]), protocol_of({**paths, "val": paths["test"], "test": paths["val"]})]
    make_part(tmp_path / "val.zip", ROWS["val"], lesion="patient{}")
    others.append(protocol_of(paths))
    assert len({protocol.sha256, *(other.sha256 for other in others)}) == 6


@pytest.mark.parametrize("change", [{"lesion": "patient{}"}, {"labels": [1, 1, 0, 0] * 2}, {"images": range(50, 58)},
                                    {"classes": ["mel", "nv"]}])
def test_changed_part_is_refused_when_it_is_opened(paths, tmp_path, change):
    protocol = protocol_of(paths)
    images = change.pop("images", ROWS["test"])
    make_part(tmp_path / "test.zip", images, **change)
    with pytest.raises(UserError) as caught:
        open_part(protocol, "test")
    assert str(caught.value) == (
        f"{tmp_path}/test.zip is not the test part of protocol.json anymore: its images, labels or groups have "
        "changed; expected the same data set: restore it, or make another protocol with study.py protocol")


def test_part_that_does_not_exist_is_named(paths):
    with pytest.raises(UserError, match=r"^protocol\.json has no part dev; expected one of train, val, test, isic$"):
        open_part(protocol_of(paths), "dev")


@pytest.mark.parametrize(("content", "reason"), [
    ("{", "is not a protocol (Expecting property name"),
    ("[]", "is not a protocol; expected the file that study.py protocol wrote"),
    ('{"format": "another"}', "is not a protocol; expected"),
    ('{"format": "lesion-study-protocol", "version": 9}', "is a protocol of version 9; this program reads version 1"),
    ('{"format": "lesion-study-protocol", "version": 1, "parts": [{}]}', "is damaged (parts or attributes have no pa"),
    (None, "cannot be read (No such file or directory)"),
])
def test_other_files_are_no_protocols(tmp_path, content, reason):
    if content is not None:
        (tmp_path / "p.json").write_text(content)
    with pytest.raises(UserError) as caught:
        Protocol.read(tmp_path / "p.json")
    assert str(caught.value).startswith(f"{tmp_path}/p.json {reason}")


@pytest.mark.parametrize(("change", "reason"), [
    ({"parts": None}, "parts or attributes have no path"), ({"task": {"labels": ["a"]}}, "Task.labels is ('a',); exp"),
    ({"subsets": [{"name": 1}]}, "subsets[0].pixels_sha256 is missing"), ({"created_by": ...}, "created_by is missing"),
])
def test_damaged_protocols_are_named_with_the_fault(paths, tmp_path, change, reason):
    protocol_of(paths).write(tmp_path / "p.json")
    record = json.loads((tmp_path / "p.json").read_text()) | change
    (tmp_path / "p.json").write_text(json.dumps({name: value for name, value in record.items() if value is not ...}))
    with pytest.raises(UserError) as caught:
        Protocol.read(tmp_path / "p.json")
    assert str(caught.value).startswith(f"{tmp_path}/p.json is damaged ({reason}")
    assert str(caught.value).endswith("make it again with study.py protocol")


# Leaks


@pytest.mark.parametrize("changes", [{}, {"mirror": True}, {"hashes": False}])
def test_same_image_under_another_name_is_refused(paths, tmp_path, changes):
    make_part(tmp_path / "test.zip", [*ROWS["test"], 3], lesion="other{}", **changes)
    assert refusal(paths) == (
        f"--train={paths['train']} and --test={paths['test']} share 1 image (00000/img00000003.png is "
        "00000/img00000008.png); expected no image in two parts, also mirrored: split one data set with "
        "dataset_tool.py split, which keeps equal images together")


@pytest.mark.parametrize(("first", "second"), [("val", "test"), ("test", "isic"), ("train", "isic")])
def test_shared_images_of_any_two_parts_are_refused(paths, tmp_path, first, second):
    make_part(tmp_path / f"{second}.zip", [*ROWS[second], *list(ROWS[first])[:5]], lesion="other{}")
    assert f"={paths[first]} and --" in refusal(paths)
    assert f"={paths[second]} share 5 images (" in refusal(paths)


def test_all_pairs_that_share_images_are_counted(paths, tmp_path):
    for name in ("val", "test"):
        make_part(tmp_path / f"{name}.zip", [*ROWS[name], 0], lesion=name + "{}")
    assert ") (and 2 more pairs of parts); expected no image" in refusal(paths)


def test_same_lesion_in_two_parts_is_refused(paths, tmp_path):
    make_part(tmp_path / "isic.zip", ROWS["isic"], groups=["lesion3", "lesion3", *(f"x{row}" for row in range(5)),
                                                           "lesion5"])
    assert refusal(paths) == (
        f"--train={paths['train']} and --external={paths['isic']} share 2 groups (lesion3, lesion5), 4 images of the "
        "first; expected each patient or lesion in one part: split one data set with dataset_tool.py split; if equal "
        "names mean different patients, convert one data set with dataset_tool.py --groups and a table of other names")


def test_images_without_groups_share_none(paths, tmp_path):
    make_parts(tmp_path, groups=None)
    assert protocol_of(paths).part("test").num_groups == 8


def test_copy_that_was_encoded_again_is_listed(tmp_path):
    for number, name in enumerate(ROWS):
        write_phantoms(tmp_path / f"{name}.zip", count=12, resolution=64, seed=number, workers=1,
                       classes={"nv": 0.5, "mel": 0.5})
    paths = {name: str(tmp_path / f"{name}.zip") for name in ROWS}
    train = ImageSet(paths["train"])
    image = PIL.Image.open(io.BytesIO(train.read(train.names[5]))).transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=70)
    test = ImageSet(paths["test"])
    with ImageSetWriter(tmp_path / "doctored.zip", classes=test.classes, source=test.source) as writer:
        for row, name in enumerate(test.names):
            writer.add(test.read(name), test.label(row), test.groups[row])
        writer.add(png(PIL.Image.open(buffer)), 0)
    protocol = protocol_of({**paths, "test": str(tmp_path / "doctored.zip")})
    (found,) = protocol.near_duplicates
    assert (found.part, found.image, found.training_image, found.orientation) == (
        "test", "00000/img00000012.png", train.names[5], "mirrored left to right")
    assert found.correlation > 0.98
    assert protocol.num_near_duplicates == 1 < MOST_LISTED
    assert protocol_of(paths).near_duplicates == ()  # patients of different seeds have equal names, and are others


def test_generated_images_are_no_part(paths, tmp_path):
    make_part(tmp_path / "test.zip", ROWS["test"], source={"origin": {"generated": True}})
    assert refusal(paths) == (f"--test={paths['test']} holds images that a network generated; expected photographs: "
                              "synthetic images are no part of a protocol")


# Subsets


def test_subsets_of_the_training_part_are_recorded_by_name(paths, tmp_path):
    subset = make_set(tmp_path / "site-a.zip", images=range(2, 9), mirror=True)
    (found,) = protocol_of(paths, subset=[str(subset)]).subsets
    assert (found.name, found.num_images) == ("site-a", 7)
    assert found.pixels_sha256 == hash_set(read_pixel_hashes(ImageSet(paths["train"]))[2:9])


def test_subset_with_other_images_is_refused(paths, tmp_path):
    subset = make_set(tmp_path / "site-a.zip", images=[1, 2, 24, 25])
    assert refusal(paths, subset=[str(subset)]) == (
        f"--subset={subset} has 2 images (00000/img00000002.png, 00000/img00000003.png) that --train={paths['train']} "
        "does not have; expected a subset of the training part")


# Mistakes


def test_positive_class_that_no_part_has_is_refused_with_a_suggestion(paths):
    assert refusal(paths, positive="mel,mell") == (
        "--positive names mell, which is a class of no part (did you mean mel?); expected some of nv, mel")
    assert refusal(paths, positive="") == (
        "--positive names an empty text, which is a class of no part; expected some of nv, mel")


@pytest.mark.parametrize("changes", [{"positive": None}, {"multiclass": True}])
def test_exactly_one_task_is_expected(paths, changes):
    which = "missing" if "positive" in changes else "given"
    assert refusal(paths, **changes) == (
        f"--positive and --multiclass are both {which}; expected one: --positive=mel for one class against the rest, "
        "or --multiclass for all classes")


def test_class_absent_from_a_part_is_refused(paths, tmp_path):
    make_part(tmp_path / "val.zip", ROWS["val"], labels=[0] * 8)
    assert refusal(paths) == (
        f"--val={paths['val']} has no images of mel (classes mel), only of nv; expected images of rest, mel in each "
        "part: choose other parts, or rename classes with dataset_tool.py --merge")
    assert refusal(paths, positive=None, multiclass=True).startswith(
        f"--val={paths['val']} has no images of mel, only of nv; expected images of nv, mel in each part")
    make_parts(tmp_path)
    make_part(tmp_path / "isic.zip", ROWS["isic"], labels=[1] * 8)
    assert "has no images of rest, only of mel; expected images of rest, mel in each external set" in refusal(paths)


def test_class_that_the_training_part_does_not_have_is_refused(paths, tmp_path):
    make_part(tmp_path / "isic.zip", ROWS["isic"], classes=["nevus", "mel"])
    assert refusal(paths, positive=None, multiclass=True) == (
        f"--external={paths['isic']} has images of nevus, which the training part does not have; "
        "expected images of nv, mel: rename, merge or leave out classes with dataset_tool.py --merge and --classes")


def test_single_class_is_no_task(paths, tmp_path):
    make_part(tmp_path / "train.zip", ROWS["train"], labels=[0] * 16)
    assert refusal(paths, positive=None, multiclass=True) == (
        f"--train={paths['train']} has images of nv only; expected at least two classes")


def test_label_of_a_single_group_is_refused(paths, tmp_path):
    make_part(tmp_path / "test.zip", ROWS["test"], groups=["a", "b", *["lesion99"] * 2, "c", "d", *["lesion99"] * 2])
    assert refusal(paths) == (
        f"--test={paths['test']} has 4 images of mel, all of the group lesion99; expected at least 2 groups (patients "
        "or lesions) of each label in each part, as intervals need: choose larger parts")


@pytest.mark.parametrize(("changes", "reason"), [
    ({"labels": None, "classes": None}, "has no labels; expected the class of each image: convert it with "
     "dataset_tool.py --labels"),
    ({"labels": [[0.5, 1.0]] * 8}, "has lists of numbers as labels; expected the class of each image: convert it with "
     "dataset_tool.py --labels"),
    ({"labels": [0, 0, None, 1, 1, None, 0, 1]}, "has no label for 2 of 8 images (00000/img00000002.png, ...); "
     "expected one each: convert it with dataset_tool.py --unlabeled=drop"),
])
def test_images_without_a_class_are_refused(paths, tmp_path, changes, reason):
    make_part(tmp_path / "val.zip", ROWS["val"], **changes)
    assert refusal(paths) == f"--val={paths['val']} {reason}"


def test_images_of_several_sizes_in_one_part_are_refused(paths, tmp_path):
    images = ImageSet(paths["test"])
    with ImageSetWriter(tmp_path / "mixed.zip", classes=CLASSES) as writer:
        for row, name in enumerate(images.names):
            writer.add(images.read(name), images.label(row))
        writer.add(png(pixels_of(90, size=16)), 0)
    assert refusal({**paths, "test": str(tmp_path / "mixed.zip")}) == (
        f"{tmp_path}/mixed.zip: 00000/img00000008.png is 16x16 RGB, the first image 8x8 RGB; expected one size: "
        "convert it with dataset_tool.py")


def test_data_set_that_plays_two_parts_is_refused(paths, tmp_path):
    (tmp_path / "link.zip").symlink_to(paths["train"])
    assert refusal({**paths, "test": str(tmp_path / "link.zip")}) == (
        f"--test={tmp_path}/link.zip is the same data set as --train={paths['train']}; expected different parts: split "
        "one with dataset_tool.py split")


@pytest.mark.parametrize(("name", "taken"), [
    ("synthetic", ""), ("test", " of --test={test}"), ("isic", " of --external={isic}")])
def test_external_set_whose_name_is_taken_is_refused(paths, tmp_path, name, taken):
    (tmp_path / "more").mkdir()
    path = make_part(tmp_path / f"more/{name}.zip", range(60, 68))
    assert refusal(paths, external=[paths["isic"], str(path)]) == (
        f"--external={path} would be named {name}, which is the name{taken.format(**paths)} of another part; expected "
        "different names: rename the file")


def test_rest_is_no_positive_class():
    with pytest.raises(UserError, match="labels is"):
        Task(labels=(REST, REST), positive=(REST,))


def test_request_gives_options_in_the_order_of_the_parts():
    request = ProtocolRequest(train="a.zip", val="b.zip", test="c.zip", external=["d.zip"], multiclass=True)
    assert [option for option, *_ in request.given()] == ["--train=a.zip", "--val=b.zip", "--test=c.zip",
                                                          "--external=d.zip"]


# Attributes


TABLE = "lesion_id,image_id,age,sex,site\n"


def make_table(path, rows):
    path.write_text(TABLE + "".join(f"{row}\n" for row in rows))
    return str(path)


def test_attributes_are_found_by_group(paths, tmp_path):
    rows = [f"lesion{image // 2},ISIC_{image},{40 + image // 2},{'female' if image < 20 else 'unknown'},"
            f"{'back' if image % 2 else 'arm'}" for image in range(30)]
    rows += [f"lesion{number},ISIC_{number},50,male,back" for number in range(100, 140)]  # of other images
    protocol = protocol_of(paths, attributes=make_table(tmp_path / "table.csv", rows))
    table = protocol.attributes
    assert (table.key, table.key_column, table.columns) == ("group", "lesion_id", ("age", "sex"))
    assert table.left_out == ("image_id", "site")  # ids, which differ between images of a lesion; sites differ too
    assert dict(table.matched) == {"train": 16, "val": 8, "test": 6, "isic": 0}
    assert attributes_of(protocol, "val") == {"age": [f"{48 + row // 2}" for row in range(8)],
                                              "sex": ["female"] * 4 + [""] * 4}
    assert attributes_of(protocol, "isic") == {"age": [""] * 8, "sex": [""] * 8}


def test_attributes_are_found_by_file_names_that_the_data_set_kept(paths, tmp_path):
    images = ImageSet(paths["isic"])
    with zipfile.ZipFile(tmp_path / "named.zip", "w") as archive:
        for row, name in enumerate(images.names):
            archive.writestr(f"ISIC_{row}.png", images.read(name))
        archive.writestr("dataset.json", json.dumps({
            "labels": [[f"ISIC_{row}.png", images.label(row)] for row in range(8)], "classes": CLASSES}))
    rows = [f"x{row},ISIC_{row}.jpg,{row},female,arm" for row in range(7)]
    protocol = protocol_of({**paths, "isic": str(tmp_path / "named.zip")},
                           attributes=make_table(tmp_path / "table.csv", rows))
    assert (protocol.attributes.key, protocol.attributes.key_column) == ("image", "image_id")
    assert attributes_of(protocol, "named")["age"] == [*map(str, range(7)), ""]


def test_table_that_names_no_image_is_refused(paths, tmp_path):
    table = make_table(tmp_path / "table.csv", ["a,00000/img00000000.png,1,male,arm"])
    assert refusal(paths, attributes=table) == (
        f"--attributes={table}: no column names images or groups (patients, lesions) of the data sets; its columns are "
        "lesion_id, image_id, age, sex, site: expected the ids that dataset.json has as groups, or file names that "
        "dataset_tool.py did not give")


def test_changed_table_is_refused(paths, tmp_path):
    rows = [f"lesion{number},x,{number},male,arm" for number in range(8)]
    protocol = protocol_of(paths, attributes=make_table(tmp_path / "table.csv", rows))
    make_table(tmp_path / "table.csv", rows[:-1])
    with pytest.raises(UserError) as caught:
        attributes_of(protocol, "train")
    assert str(caught.value) == (
        f"{tmp_path}/table.csv is not the table of attributes of the protocol anymore: its content has changed; "
        "expected the same file: restore it, or make another protocol")


def test_protocol_without_a_table_has_no_attributes(paths):
    assert attributes_of(protocol_of(paths), "test") == {}
