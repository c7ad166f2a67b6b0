"""Conversion: patients and lesions, from the table of labels and from the table that --groups names."""

import io
import json
import re

import numpy as np
import pytest

from dataset_tool import main
from dnnlib.cli import UserError
from dnnlib.cli import run as run_command
from dnnlib.files import sha256_of
from imagesets.convert import convert
from imagesets.reader import ImageSet
from tests.helpers.make_archives import encode, make_folder, noise

ISIC_2019 = "image,MEL,NV,BCC,AK,BKL,DF,VASC,SCC,UNK\n"
MEL, NV = "1.0" + ",0.0" * 8, "0.0,1.0" + ",0.0" * 7
METADATA = "image,age_approx,anatom_site_general,lesion_id,sex\n"


def image(seed):
    return encode(noise(seed, 8, 8, 3))


def run(tmp_path, **options):
    """Convert the folder `in` with a report; return summary, data set and report."""
    paths = {name: str(tmp_path / options.pop(name)) for name in ("labels", "groups") if name in options}
    summary = convert(options.pop("source", tmp_path / "in"), tmp_path / "set.zip", workers=1, stream=io.StringIO(),
                      report=tmp_path / "r.json", **paths, **options)
    return summary, ImageSet(tmp_path / "set.zip"), json.loads((tmp_path / "r.json").read_text())


def groups_of(images):
    """Return the groups of a data set by letter, None for an image in no group."""
    return dict(zip("abcdefgh", images.named_groups()))


@pytest.fixture
def challenge(tmp_path):
    """Five images a to e of ISIC 2019 with its two files; a and c show one lesion, those of d and e are unknown."""
    make_folder(tmp_path / "in", {f"{name}.png": image(seed) for seed, name in enumerate("abcde")})
    (tmp_path / "truth.csv").write_text(ISIC_2019 + "".join(f"{name},{label}\n" for name, label in zip(
        "abcde", (MEL, NV, MEL, NV, NV))))
    (tmp_path / "lesions.csv").write_text(f"{METADATA}a,55.0,torso,BCN_1,male\nb,,,BCN_2,\nc,,,BCN_1,\n"
                                          "d,60.0,,,female\nz,,,BCN_3,\n")
    return tmp_path


def test_groups_come_from_the_file_beside_the_labels(challenge):
    summary, images, report = run(challenge, labels="truth.csv", groups="lesions.csv", classes="MEL,NV")
    assert images.labels.tolist() == [0, 1, 0, 1, 1]
    assert groups_of(images) == {"a": "BCN_1", "b": "BCN_2", "c": "BCN_1", "d": None, "e": None}
    assert summary.report["num_groups"] == 4
    assert report["images_without_a_group"] == {"count": 2, "names": ["d.png", "e.png"]}
    assert report["groups_table"] == {"name": "lesions.csv", "kind": "groups", "label_columns": [],
                                      "group_columns": ["lesion_id"]}
    assert images.source["options"]["groups"] == "lesions.csv"
    assert images.source["groups_sha256"] == sha256_of(challenge / "lesions.csv")


def test_images_that_are_dropped_are_not_counted_as_without_a_group(challenge):
    _, _, report = run(challenge, labels="truth.csv", groups="lesions.csv", classes="MEL")
    assert report["images_without_a_group"]["count"] == 0


def test_command_tells_what_was_taken_and_what_is_missing(challenge, monkeypatch, capsys):
    monkeypatch.chdir(challenge)
    arguments = ["--source=in", "--dest=set.zip", "--labels=truth.csv", "--classes=MEL,NV", "--workers=1"]
    assert run_command(main, arguments) == 0
    assert capsys.readouterr().out.splitlines()[3:] == [
        "  truth.csv (ISIC 2019): labels from MEL, NV, BCC, AK, BKL, DF, VASC, SCC, UNK, no groups",
        "  note: without groups, split may put images of one lesion into several parts; give --groups=FILE with "
        "ISIC_2019_Training_Metadata.csv"]
    assert run_command(main, [*arguments, "--groups=lesions.csv"]) == 0
    assert capsys.readouterr().out.splitlines()[3:] == [
        "  truth.csv (ISIC 2019): labels from MEL, NV, BCC, AK, BKL, DF, VASC, SCC, UNK, no groups",
        "  lesions.csv: groups by lesion_id",
        "  images without a patient or lesion, each in a group of its own: 2 (d.png, e.png)"]
    (challenge / "metadata.csv").write_text("isic_id,diagnosis_1,diagnosis_2,diagnosis_3,patient_id\n" + "".join(
        f"{name},Benign,x,Nevus,IP_{name}\n" for name in "abcde"))
    assert run_command(main, [*arguments[:2], "--labels=metadata.csv"]) == 0
    assert capsys.readouterr().out.splitlines()[3:] == [
        "  metadata.csv (ISIC archive): labels from diagnosis_1, groups by patient_id",
        "  note: for other levels of the diagnosis give --label-column=diagnosis_2|diagnosis_3"]


def test_groups_of_labels_and_of_the_file_are_both_kept_together(tmp_path):
    make_folder(tmp_path / "in", {f"{name}.png": image(seed) for seed, name in enumerate("abcdefgh")})
    # The patients 7 and 8 share the lesion 1; the lesion 7 is not the patient 7.
    (tmp_path / "truth.csv").write_text("image_name,patient_id,target\na,7,0\nb,8,0\nc,8,1\nd,,0\ne,,0\nf,9,0\ng,,0\n"
                                        "h,,1\n")
    (tmp_path / "lesions.csv").write_text("image,lesion_id\na,1\nb,1\nd,7\ne,7\nf,5\ng,6\n")
    _, images, report = run(tmp_path, labels="truth.csv", groups="lesions.csv")
    assert groups_of(images) == {"a": "7", "b": "7", "c": "7", "d": "7 (2)", "e": "7 (2)", "f": "9", "g": "6",
                                 "h": None}
    assert report["images_without_a_group"]["names"] == ["h.png"]


def test_lesion_of_either_table_is_one_lesion_where_both_have_that_column(tmp_path):
    make_folder(tmp_path / "in", {f"{name}.png": image(seed) for seed, name in enumerate("abc")})
    (tmp_path / "truth.csv").write_text("image_id,dx,lesion_id\na,nv,L1\nb,nv,\nc,mel,L2\n")
    (tmp_path / "lesions.csv").write_text("image_id,lesion_id\na,\nb,L1\nc,L2\n")
    _, images, _ = run(tmp_path, labels="truth.csv", groups="lesions.csv")
    assert groups_of(images) == {"a": "L1", "b": "L1", "c": "L2"}


def test_groups_of_images_in_class_folders(tmp_path):
    make_folder(tmp_path / "in", {"mel/a.png": image(1), "nv/b.png": image(2), "nv/c.png": image(3)})
    (tmp_path / "who.csv").write_text("file,who\na.png,7.0\nb.png,\nc.png,7.0\n")
    _, images, _ = run(tmp_path, groups="who.csv", id_column="file", group_column="who")
    assert (images.classes, images.labels.tolist()) == (["mel", "nv"], [0, 1, 1])
    assert groups_of(images) == {"a": "7", "b": None, "c": "7"}


def test_groups_of_a_data_set_stay_where_a_table_gives_labels_alone(challenge):
    run(challenge, labels="truth.csv", groups="lesions.csv", classes="MEL,NV")
    first = challenge / "first.zip"
    (challenge / "set.zip").rename(first)
    (challenge / "grades.csv").write_text("file,grade\n" + "".join(
        f"00000/img{index:08d}.png,{index % 2}\n" for index in range(5)))
    _, images, _ = run(challenge, source=first, labels="grades.csv", id_column="file", label_column="grade")
    assert images.labels.tolist() == [0, 1, 0, 1, 0]
    assert groups_of(images) == {"a": "BCN_1", "b": "BCN_2", "c": "BCN_1", "d": None, "e": None}


def test_columns_named_are_those_of_the_file_of_groups(challenge):
    (challenge / "who.csv").write_text("image,patient,lesion_id\na,P,L\nb,P,M\n")
    _, images, _ = run(challenge, labels="truth.csv", groups="who.csv", group_column="patient", id_column="image")
    assert groups_of(images) == {"a": "P", "b": "P", "c": None, "d": None, "e": None}
    # The table of labels has a column "name"; the table of groups does not have it and does not need it.
    (challenge / "kinds.csv").write_text("name,kind\n" + "".join(f"{name},nv\n" for name in "abcde"))
    _, images, _ = run(challenge, labels="kinds.csv", groups="lesions.csv", id_column="name", label_column="kind")
    assert groups_of(images)["c"] == "BCN_1"


@pytest.mark.parametrize(("options", "message"), [
    ({"groups": "other.csv"}, "--groups: no image of in has a row; the images are named as a.png, the rows as HAM_1: "
                              "choose the column with --id-column, or another table"),
    ({"groups": "none.csv"}, "FOLDER/none.csv does not exist; expected a table, a CSV file"),
    ({"groups": "lesions.csv", "group_column": "who"},
     "--group-column=who is not a column of FOLDER/lesions.csv; expected one of image, age_approx, "
     "anatom_site_general, lesion_id, sex"),
    ({"groups": "lesions.csv", "label_column": "sex"},
     "--label-column names a column, but there is no table; add --labels=FILE"),
    ({"groups": "lesions.csv", "source": "set.npz"},
     "--groups: set.npz (MedMNIST npz) has no file names to look for in a table; leave the option out"),
])
def test_groups_that_do_not_fit_are_refused(challenge, options, message):
    (challenge / "other.csv").write_text("image,lesion_id\nHAM_1,L\n")
    np.savez(challenge / "set.npz", train_images=np.zeros((2, 8, 8), np.uint8), train_labels=np.zeros((2, 1), np.uint8))
    if "source" in options:
        options = options | {"source": challenge / options["source"]}
    with pytest.raises(UserError, match=f"^{re.escape(message.replace('FOLDER', str(challenge)))}$"):
        run(challenge, **options)
    assert not (challenge / "set.zip").exists()


def test_split_keeps_the_lesions_of_the_file_of_groups_together(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [f"ISIC_{index:02d}" for index in range(40)]
    lesions = [f"HAM_{index % 13}" for index in range(40)]
    make_folder(tmp_path / "in", {f"{name}.png": image(seed) for seed, name in enumerate(names)})
    (tmp_path / "truth.csv").write_text("image,MEL,NV,BCC,AKIEC,BKL,DF,VASC\n" + "".join(
        f"{name},0,1,0,0,0,0,0\n" for name in names))
    (tmp_path / "lesions.csv").write_text("image,lesion_id,diagnosis_confirm_type\n" + "".join(
        f"{name},{lesion},histopathology\n" for name, lesion in zip(names, lesions)))
    assert run_command(main, ["--source=in", "--dest=set.zip", "--labels=truth.csv", "--groups=lesions.csv",
                              "--classes=NV"]) == 0
    assert run_command(main, ["split", "set.zip", "--parts=train:0.7,test:0.3"]) == 0
    train, test = (set(ImageSet(f"set-{part}.zip").groups) for part in ("train", "test"))
    assert (train | test, train & test) == (set(lesions), set())
