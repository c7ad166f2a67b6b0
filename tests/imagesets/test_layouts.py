"""imagesets.layouts: tables of ISIC 2024 and of the ISIC archive, and those that are read for groups alone."""

import pytest

from dnnlib.cli import UserError
from imagesets.tables import read_groups, read_table

ISIC_2024 = ("isic_id,target,patient_id,age_approx,sex,anatom_site_general,attribution,copyright_license,lesion_id,"
             "iddx_full,iddx_1,iddx_2,iddx_3,iddx_4,iddx_5,mel_mitotic_index")
ARCHIVE = ("isic_id,attribution,copyright_license,age_approx,anatom_site_general,diagnosis_1,diagnosis_2,diagnosis_3,"
           "diagnosis_4,diagnosis_5,diagnosis_confirm_type,image_type,lesion_id,patient_id,sex")


@pytest.fixture
def table(tmp_path):
    """Return a function that reads a table of given lines."""
    def read(*lines, function=read_table, **columns):
        (tmp_path / "t.csv").write_text("".join(f"{line}\n" for line in lines))
        return function(tmp_path / "t.csv", **columns)
    return read


def classes(table):
    return {name: table.class_of(name) for name in table.ids}


def groups(table):
    return {name: table.group_of(name) for name in table.ids}


def test_isic_2024_target_is_benign_or_malignant_and_patients_are_groups(table):
    found = table(ISIC_2024, "ISIC_1,0,IP_7,60.0,male,torso,MSK,CC-BY,,Benign,Benign,,,,,",
                  "ISIC_2,1,IP_8,,,,MSK,CC-BY,IL_3,Malignant::x,Malignant,x,,,,", "ISIC_3,0,,,,,,,IL_3,,Benign,,,,,")
    assert (found.kind, found.class_names) == ("ISIC 2024", ["benign", "malignant"])
    assert classes(found) == {"ISIC_1": "benign", "ISIC_2": "malignant", "ISIC_3": "benign"}
    assert groups(found) == {"ISIC_1": "IP_7", "ISIC_2": "IP_8", "ISIC_3": "IP_8"}
    assert (found.label_columns, found.group_columns) == (("target",), ("patient_id", "lesion_id"))
    assert found.other_levels == ("iddx_1", "iddx_2", "iddx_3", "iddx_4", "iddx_5")


def test_isic_2024_ground_truth_holds_floats(table):
    found = table("isic_id,malignant", "ISIC_1,0.0", "ISIC_2,1.0", "ISIC_3,")
    assert (found.kind, found.class_names) == ("ISIC 2024", ["benign", "malignant"])
    assert classes(found) == {"ISIC_1": "benign", "ISIC_2": "malignant", "ISIC_3": None}
    assert (found.label_columns, found.group_columns) == (("malignant",), ())
    assert found.groups_file == "train-metadata.csv from Kaggle"


def test_isic_2024_supplement_alone_gives_the_first_diagnosis(table):
    found = table("isic_id,lesion_id,iddx_full,iddx_1,iddx_2", "a,IL_1,Benign,Benign,", "b,,Malignant::x,Malignant,x")
    assert (found.kind, classes(found)) == ("ISIC 2024", {"a": "Benign", "b": "Malignant"})


ARCHIVE_ROWS = ("a,ViDIR,CC-0,45,torso,Benign,Benign melanocytic proliferations,Nevus,,,,dermoscopic,IL_1,IP_1,male",
                'b,ViDIR,CC-0,45,torso,Malignant,Malignant melanocytic proliferations (Melanoma),"Melanoma, NOS",,,,'
                "dermoscopic,IL_2,,male", "c,ViDIR,CC-0,,,,,,,,,dermoscopic,IL_1,,", "d,,,,,Indeterminate,,,,,,,,,")


def test_archive_first_diagnosis_is_the_label_and_the_others_are_named(table):
    found = table(ARCHIVE, *ARCHIVE_ROWS)
    assert (found.kind, found.class_names) == ("ISIC archive", ["Benign", "Indeterminate", "Malignant"])
    assert classes(found) == {"a": "Benign", "b": "Malignant", "c": None, "d": "Indeterminate"}
    assert groups(found) == {"a": "IP_1", "b": "IL_2", "c": "IP_1", "d": None}
    assert found.label_columns == ("diagnosis_1",)
    assert found.other_levels == ("diagnosis_2", "diagnosis_3", "diagnosis_4", "diagnosis_5")


def test_archive_another_diagnosis_is_taken_by_its_column(table):
    found = table(ARCHIVE, *ARCHIVE_ROWS, label_column="diagnosis_3")
    assert found.class_names == ["Melanoma, NOS", "Nevus"]
    assert classes(found) == {"a": "Nevus", "b": "Melanoma, NOS", "c": None, "d": None}
    assert groups(found)["c"] == "IP_1"


@pytest.mark.parametrize("header", ["isic_id,benign_malignant,diagnosis", "name,meta.clinical.benign_malignant,dx"])
def test_archive_tables_of_before_are_read(table, header):
    found = table(header, "a,benign,nevus", "b,indeterminate/malignant,")
    assert (found.kind, classes(found)) == ("ISIC archive", {"a": "benign", "b": "indeterminate/malignant"})


@pytest.mark.parametrize(("header", "column"), [("isic_id,patient_id,target", "target"),
                                                ("isic_id,lesion_id,malignant", "malignant"),
                                                ("image_name,patient_id,target", "target")])
def test_target_named_as_label_column_is_read_as_when_it_is_not(table, header, column):
    found = table(header, "a,P,0", "b,Q,1.0", label_column=column)
    assert (classes(found), found.kind) == ({"a": "benign", "b": "malignant"}, table(header, "a,P,0").kind)


def test_target_of_an_unknown_table_is_a_number(table):
    assert classes(table("file,target", "a,0", "b,1", id_column="file", label_column="target")) == {"a": "0", "b": "1"}


def test_label_column_needs_no_id_column_beside_a_usual_one(table):
    assert classes(table("isic_id,grade", "a,low", label_column="grade")) == {"a": "low"}


@pytest.mark.parametrize(("lines", "columns", "expected"), [
    (("image,lesion_id,diagnosis_confirm_type", "a,HAM_1,histopathology", "b,HAM_1,"), {},
     {"a": "HAM_1", "b": "HAM_1"}),
    (("image,age_approx,anatom_site_general,lesion_id,sex", "a,55.0,torso,,female", "b,,,BCN_1,"), {},
     {"a": None, "b": "BCN_1"}),
    ((ARCHIVE, *ARCHIVE_ROWS), {}, {"a": "IP_1", "b": "IL_2", "c": "IP_1", "d": None}),
    (("image_name,patient_id,lesion_id", "a,P,L", "b,,L"), {"group_column": "lesion_id"}, {"a": "L", "b": "L"}),
    (("file,who", "a.png,7.0", "b.png,"), {"id_column": "file", "group_column": "who"}, {"a": "7", "b": None}),
])
def test_groups_of_a_table_alone_are_read_without_labels(table, lines, columns, expected):
    found = table(*lines, function=read_groups, **columns)
    assert groups(found) == expected
    assert set(classes(found).values()) == {None}


@pytest.mark.parametrize(("lines", "columns", "message"), [
    (("image_id,age_approximate,sex", "a,50,male"), {},
     "--groups=g.csv has the columns image_id, age_approximate, sex; expected the name of the image in one of isic_id, "
     "image_name, image_id, image, and patient_id or lesion_id: give --group-column=NAME"),
    (("file,who", "a,b"), {},
     "--groups=g.csv has the columns file, who; expected the name of the image in one of isic_id, image_name, "
     "image_id, image, and patient_id or lesion_id: give --id-column=NAME and --group-column=NAME"),
    (("image,lesion_id", "a,L"), {"id_column": "imag"},
     "--id-column=imag is no column of g.csv; expected one of image, lesion_id (did you mean image?)"),
    (("image,lesion_id", "a,L", "a,M"), {},
     "g.csv, line 3: a is in the group M, but in the group L in line 2; expected rows of one image to agree: correct "
     "or remove one"),
])
def test_groups_of_a_table_that_has_none_are_refused(tmp_path, monkeypatch, lines, columns, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "g.csv").write_text("".join(f"{line}\n" for line in lines))
    with pytest.raises(UserError) as error:
        read_groups("g.csv", **columns)
    assert str(error.value) == message
