"""imagesets.tables with its layouts, delimited text and compact texts: labels and groups by image."""

import pickle
import tracemalloc

import pytest

from dnnlib.cli import UserError
from imagesets.tables import CompactTexts, image_key, read_groups, read_table

ISIC_2019 = "image,MEL,NV,BCC,AK,BKL,DF,VASC,SCC,UNK"
ISIC_2018 = "image,MEL,NV,BCC,AKIEC,BKL,DF,VASC"
ISIC_2020 = "image_name,patient_id,sex,age_approx,anatom_site_general_challenge,diagnosis,benign_malignant,target"
HAM10000 = "lesion_id,image_id,dx,dx_type,age,sex,localization"


@pytest.fixture
def table(tmp_path):
    """Return a function that reads a table of given lines (or bytes)."""
    def read(*lines, function=read_table, **columns):
        path = tmp_path / "t.csv"
        path.write_bytes(lines[0] if isinstance(lines[0], bytes) else "".join(f"{line}\n" for line in lines).encode())
        return function(path, **columns)
    return read


@pytest.fixture
def refused(table, tmp_path):
    """Return a function that returns the error message for a table, without its folder."""
    def read(*lines, **columns):
        with pytest.raises(UserError) as error:
            table(*lines, **columns)
        assert "\n" not in str(error.value)
        return str(error.value).replace(f"{tmp_path}/", "")
    return read


def classes(table):
    return {name: table.class_of(name) for name in table.ids}


def groups(table):
    return {name: table.group_of(name) for name in table.ids}


# Known headers

def test_isic_2019_is_one_hot_in_the_order_of_its_columns(table):
    found = table(ISIC_2019, "ISIC_2,0.0,1.0,0,0,0,0,0,0,0.0", "ISIC_1_downsampled,0,0,0,0,0,0,0,1,0")
    assert found.kind == "ISIC 2019"
    assert found.class_names == "MEL NV BCC AK BKL DF VASC SCC UNK".split()
    assert classes(found) == {"ISIC_1_downsampled": "SCC", "ISIC_2": "NV"}
    assert groups(found) == {"ISIC_1_downsampled": None, "ISIC_2": None}


def test_isic_2019_more_columns_are_no_classes(table):
    found = table("image,NV,MEL,BCC,AK,BKL,DF,VASC,SCC,score_weight,lesion_id", "a,0,1,0,0,0,0,0,0,0.5,L7")
    assert found.class_names == "NV MEL BCC AK BKL DF VASC SCC".split()
    assert (classes(found), groups(found)) == ({"a": "MEL"}, {"a": "L7"})


def test_isic_2018_is_one_hot(table):
    found = table(ISIC_2018, "ISIC_0024306,0.0,0.0,0.0,1.0,0.0,0.0,0.0")
    assert (found.kind, found.class_names) == ("ISIC 2018 task 3", "MEL NV BCC AKIEC BKL DF VASC".split())
    assert classes(found) == {"ISIC_0024306": "AKIEC"}


def test_isic_2020_target_and_patient(table):
    found = table(ISIC_2020, "ISIC_2,IP_7,male,45.0,torso,unknown,benign,0", "ISIC_1,IP_8,,,,melanoma,malignant,1")
    assert (found.kind, found.class_names) == ("ISIC 2020 / SIIM", ["benign", "malignant"])
    assert classes(found) == {"ISIC_1": "malignant", "ISIC_2": "benign"}
    assert groups(found) == {"ISIC_1": "IP_8", "ISIC_2": "IP_7"}


def test_isic_2020_without_the_words_reads_the_target(table):
    found = table("image_name,patient_id,target", "a,P,1", "b,P,0", "c,P,")
    assert classes(found) == {"a": "malignant", "b": "benign", "c": None}


def test_isic_2020_one_class_alone_keeps_both_names(table):
    assert table("image_name,target", "a,0").class_names == ["benign", "malignant"]


def test_ham10000_sorts_its_diagnoses_and_groups_by_lesion(table):
    found = table(HAM10000, "HAM_2,ISIC_2,nv,histo,45.0,male,trunk", "HAM_2,ISIC_1,nv,histo,45.0,male,trunk",
                  "HAM_1,ISIC_3,akiec,histo,,,")
    assert (found.kind, found.class_names) == ("HAM10000", ["akiec", "nv"])
    assert classes(found) == {"ISIC_1": "nv", "ISIC_2": "nv", "ISIC_3": "akiec"}
    assert groups(found) == {"ISIC_1": "HAM_2", "ISIC_2": "HAM_2", "ISIC_3": "HAM_1"}


def test_isic_2017_neither_column_implies_nevus(table):
    found = table("image_id,melanoma,seborrheic_keratosis", "a,0.0,0.0", "b,1.0,0.0", "c,0.0,1.0", "d,,")
    assert (found.kind, found.class_names) == ("ISIC 2017", ["melanoma", "seborrheic_keratosis", "nevus"])
    assert classes(found) == {"a": "nevus", "b": "melanoma", "c": "seborrheic_keratosis", "d": None}


def test_known_header_in_other_case_is_recognized(table):
    found = table("Image_ID,DX", "a,nv")
    assert (found.kind, classes(found)) == ("HAM10000", {"a": "nv"})


@pytest.mark.parametrize(("lines", "message"), [
    ((ISIC_2018, "a,0,1,0,0,0,0,0", "b,0,0,0,0,0,0,0"),
     "line 3: b has no 1; expected 1 in one of MEL, NV, BCC, AKIEC, BKL, DF, VASC and 0 in the others"),
    ((ISIC_2018, "a,0,1,0,0,0,1,0"),
     "line 2: a has 1 in NV and DF; expected 1 in one of MEL, NV, BCC, AKIEC, BKL, DF, VASC and 0 in the others"),
    ((ISIC_2018, "a,0,yes,0,0,0,0,0"), "line 2: a has 'yes' in NV; expected 0 or 1"),
    ((ISIC_2018, "a,0,0.7,0.3,0,0,0,0"), "line 2: a has '0.7' in NV; expected 0 or 1"),
    ((ISIC_2018, "a,nan,0,0,0,0,0,1"), "line 2: a has 'nan' in MEL; expected 0 or 1"),
    ((ISIC_2018, "a,,1,0,0,0,0,0"), "line 2: a has '' in MEL; expected 0 or 1"),
    (("image_id,melanoma,seborrheic_keratosis", "a,1,1"),
     "line 2: a has 1 in melanoma and seborrheic_keratosis; expected 1 in at most one of melanoma, "
     "seborrheic_keratosis and 0 in the others"),
    (("image_name,target", "a,2"), "line 2: a has '2' in target; expected 0 or 1"),
    ((ISIC_2020, "a,P,,,,,maybe,1"), "line 2: a has 'maybe' in benign_malignant; expected benign or malignant"),
    ((ISIC_2020, "a,P,,,,,benign,1"),
     "line 2: a has 1 in target but benign in benign_malignant; expected 0 and benign, or 1 and malignant"),
])
def test_label_unreadable_is_refused_with_its_line(refused, lines, message):
    assert refused(*lines) == f"t.csv, {message}"


def test_one_hot_row_of_empty_cells_is_without_a_label(table):
    found = table(ISIC_2018, "a,,,,,,,", "b,1,0,0,0,0,0,0")
    assert classes(found) == {"a": None, "b": "MEL"}
    assert "a" in found
    assert len(found) == 2


# Named columns

def test_named_columns_read_any_table(table):
    found = table("file,kind,who", "x.png,red,P1", "y.png,,P1", "z.png,blue,", id_column="file", label_column="kind",
                  group_column="who")
    assert (found.kind, found.class_names) == ("named columns", ["blue", "red"])
    assert classes(found) == {"x": "red", "y": None, "z": "blue"}
    assert groups(found) == {"x": "P1", "y": "P1", "z": None}


def test_named_columns_numbers_keep_their_text_and_sort_by_value(table):
    found = table("i,grade", "a,10", "b,9.5", "c,-1", "d,010", id_column="i", label_column="grade")
    assert found.class_names == ["-1", "9.5", "010", "10"]
    assert found.class_of("d") == "010"


@pytest.mark.parametrize(("written", "names"), [
    (["0.0", "1.0", "10.0", ""], ["0", "1", "10"]), (["0", "0.0", "1.", "1,0"], ["0", "1"]),
    (["0.0", "0.5"], ["0.0", "0.5"]), (["1.0", "x"], ["1.0", "x"]), (["1,000", "2"], ["1,000", "2"]),
])
def test_named_columns_whole_numbers_lose_the_point_that_pandas_writes(table, written, names):
    found = table("i;grade", *(f"{index};{text}" for index, text in enumerate(written)), id_column="i",
                  label_column="grade")
    assert found.class_names == names
    assert [found.class_of(str(index)) is None for index in range(len(written))] == [not text for text in written]


def test_rows_of_one_image_may_write_a_number_in_two_ways(table):
    found = table("i,grade,lesion_id", "a,1,12", "a,1.0,12.0", "b,2,", id_column="i", label_column="grade")
    assert (classes(found), groups(found)) == ({"a": "1", "b": "2"}, {"a": "12", "b": None})


@pytest.mark.parametrize("word", ["x", "nan"])
def test_named_columns_numbers_and_words_sort_as_text(table, word):
    found = table("i,grade", "a,10", "b,9", f"c,{word}", id_column="i", label_column="grade")
    assert found.class_names == ["10", "9", word]


def test_named_label_column_takes_the_place_of_the_known_one(table):
    found = table(HAM10000, "L,a,nv,histo,45.0,male,trunk", label_column="sex")
    assert (found.kind, classes(found), groups(found)) == ("named columns", {"a": "male"}, {"a": "L"})


def test_named_group_column_keeps_the_kind(table):
    found = table(HAM10000, "L,a,nv,histo,45.0,male,trunk", group_column="sex")
    assert (found.kind, groups(found)) == ("HAM10000", {"a": "male"})


@pytest.mark.parametrize(("columns", "message"), [
    ({}, "t.csv is not a table of a known kind; its columns are file, kind, who: give --id-column=NAME and "
         "--label-column=NAME"),
    ({"id_column": "file"}, "t.csv is not a table of a known kind; its columns are file, kind, who: give "
                            "--label-column=NAME"),
    ({"label_column": "kind"}, "t.csv is not a table of a known kind; its columns are file, kind, who: give "
                               "--id-column=NAME"),
    ({"id_column": "fil", "label_column": "kind"},
     "--id-column=fil is not a column of t.csv; expected one of file, kind, who (did you mean file?)"),
    ({"id_column": "file", "label_column": "Kind"},
     "--label-column=Kind is not a column of t.csv; expected one of file, kind, who (did you mean kind?)"),
    ({"id_column": "file", "label_column": "kind", "group_column": "patient"},
     "--group-column=patient is not a column of t.csv; expected one of file, kind, who"),
    ({"id_column": "file", "label_column": "file"},
     "--label-column=file is also the id column; expected the column of the classes among file, kind, who"),
])
def test_columns_wrong_lists_the_columns(refused, columns, message):
    assert refused("file,kind,who", "x,red,P1", **columns) == message


def test_column_twice_is_refused_where_it_is_used(refused, table):
    assert refused("image_id,dx,dx", "a,nv,mel") == (
        "t.csv has 2 columns dx; expected one: rename or remove the others")
    assert refused("k,k,i", "nv,mel,a", id_column="i", label_column="k") == (
        "t.csv has 2 columns k; expected one: rename or remove the others")
    assert classes(table("image_id,dx,age,age", "a,nv,1,2")) == {"a": "nv"}


def test_label_column_of_names_is_refused(refused):
    rows = [f"i{index},n{index}" for index in range(1001)]
    assert refused("i,n", *rows, id_column="i", label_column="n") == (
        "t.csv, line 1002: the column of the labels has more than 1000 different values ('n1000' for example); "
        "expected classes: choose another --label-column")


# Groups

def test_group_is_the_patient_else_the_patient_of_the_lesion_else_the_lesion(table):
    found = table("isic_id,dx,lesion_id,patient_id", "a,nv,L1,", "b,nv,L1,P1", "c,nv,L2,", "d,nv,,", "e,nv,,P1",
                  id_column="isic_id", label_column="dx")
    assert groups(found) == {"a": "P1", "b": "P1", "c": "L2", "d": None, "e": "P1"}


def test_lesion_of_two_patients_is_refused(refused):
    rows = "isic_id,dx,lesion_id,patient_id", "a,nv,L1,P1", "b,nv,L1,P2"
    assert refused(*rows, id_column="isic_id", label_column="dx") == (
        "t.csv, line 3: lesion L1 belongs to patient P2, but to P1 in an earlier line; expected one patient: correct "
        "it, or choose a --group-column")


# Names of images

@pytest.mark.parametrize(("name", "key"), [
    ("ISIC_1", "ISIC_1"), ("ISIC_1.jpg", "ISIC_1"), ("ISIC_1.JPG", "ISIC_1"), (" ISIC_1.jpeg ", "ISIC_1"),
    ("lesion.v1", "lesion.v1"), ("lesion.v1.png", "lesion.v1"), (r"p1\a.png", "p1/a"), ("./p1//a.png", "p1/a"),
    ("/p1/a.png", "p1/a"), (".jpg", ".jpg"), ("me\u0301l.png", "m\u00e9l"),
])
def test_image_key_leaves_out_what_does_not_tell_images_apart(name, key):
    assert image_key(name) == key


def test_lookup_takes_paths_and_extensions_on_either_side(table):
    found = table("image_id,dx", "ISIC_1.jpg,nv", "ISIC_2,mel")
    assert list(found.ids) == ["ISIC_1", "ISIC_2"]
    assert [found.class_of(name) for name in ("ISIC_1", "ISIC_1.png", "train/nv/ISIC_1.JPG", "ISIC_2.tif")] == [
        "nv", "nv", "nv", "mel"]
    assert [found.class_of(name) for name in ("isic_1", "ISIC_3.jpg", "ISIC_1.jpg.txt", "")] == [None] * 4


def test_lookup_with_folders_in_the_table_tells_equal_names_apart(table):
    found = table("image_id,dx", "set/p1/a.png,nv", "set/p2/a.png,mel")
    assert list(found.ids) == ["set/p1/a", "set/p2/a"]
    assert [found.class_of(name) for name in ("p1/a.png", "x/set/p2/a.png", "x/p1/a.jpg", "p3/a.png", "a.png")] == [
        "nv", "mel", None, None, None]


def test_lookup_folder_before_all_names_may_be_the_source_and_no_other(table):
    found = table("image_id,dx", "images/a.png,nv", "images/b.png,mel")
    # In a folder of another name it may be another image: test/b.png beside train/b.png.
    names = ("a.png", "b", "images/b.png", "other/b.png")
    assert [found.class_of(name) for name in names] == ["nv", "mel", "mel", None]


def test_ids_are_sorted_and_rows_found(table):
    found = table("image_id,dx", "b,nv", "c,mel", "a,mel")
    assert list(found.ids) == ["a", "b", "c"]
    assert [found.row_of(name) for name in ("a.png", "b", "c", "d")] == [0, 1, 2, None]
    assert ["b.png" in found, "d.png" in found] == [True, False]


def test_table_goes_to_workers(table):
    found = pickle.loads(pickle.dumps(table("image_id,dx,patient_id", "b,nv,P", "a,,")))
    assert (classes(found), groups(found)) == ({"a": None, "b": "nv"}, {"a": None, "b": "P"})


# Rows that repeat or contradict

def test_duplicate_rows_that_agree_are_counted(table):
    found = table("image_id,dx,lesion_id", "a,nv,L", "b,mel,M", "a.jpg,nv,L", "a,nv,L")
    assert (len(found), found.num_duplicates) == (2, 2)
    assert classes(found) == {"a": "nv", "b": "mel"}


@pytest.mark.parametrize(("rows", "message"), [
    (["a,nv,L", "b,mel,M", "a,mel,L"], "line 4: a is mel, but nv in line 2"),
    (["a,nv,L", "a,,L"], "line 3: a is without a label, but nv in line 2"),
    (["a,nv,L", "a,nv,M"], "line 3: a is in the group M, but in the group L in line 2"),
    (["a,nv,L", "a,nv,"], "line 3: a is in the group (none), but in the group L in line 2"),
    (["b,nv,L", "a,nv,L", "b,mel,L", "a,mel,L"], "line 4: b is mel, but nv in line 2 (1 more such rows)"),
])
def test_duplicate_rows_that_contradict_are_refused(refused, rows, message):
    assert refused("image_id,dx,lesion_id", *rows) == (
        f"t.csv, {message}; expected rows of one image to agree: correct or remove one")


def test_empty_id_is_refused(refused):
    assert refused("image_id,dx", "a,nv", " ,mel") == "t.csv, line 3: image_id is empty; expected the name of an image"


# Text

EXPECTED = {"a": "nv", "b": "mel, nodular"}


@pytest.mark.parametrize("data", [
    b'image_id,dx\na,nv\nb,"mel, nodular"\n',
    b'image_id,dx\r\na,nv\r\nb,"mel, nodular"\r\n',
    b'image_id,dx\ra,nv\rb,"mel, nodular"',
    b'\xef\xbb\xbfimage_id,dx\na,nv\nb,"mel, nodular"',
    b'\xef\xbb\xbf"image_id";"dx"\n"a";"nv"\n"b";"mel, nodular"\n',
    b"image_id;dx\na;nv\nb;mel, nodular\n",
    b"image_id\tdx\na\tnv\nb\tmel, nodular\n",
    b'\nimage_id , dx\n\na, nv \n,\nb,"mel, nodular "\n,\n , \n',
    "image_id\tdx\r\na\tnv\r\nb\tmel, nodular\r\n".encode("utf-16"),
], ids=["lf", "crlf", "cr", "bom", "bom-quoted-semicolon", "semicolon", "tab", "blank-rows-and-spaces", "utf-16"])
def test_text_of_any_shape_reads_alike(table, data):
    assert classes(table(data)) == EXPECTED


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_text_accents_are_read_in_either_encoding(table, encoding):
    found = table("image_id,dx\nn\u00e6vus,bl\u00e9\n".encode(encoding))
    assert classes(found) == {"n\u00e6vus": "bl\u00e9"}


def test_text_accent_across_two_pieces_of_the_file_stays_utf8(table):
    header = "image_id,dx,site\n"
    piece = 1 << 20  # size of the pieces in which a file is read
    num_rows, rest = divmod(piece - 2 - len(header), 1000)
    rows = [f"q{index:07d},x,".ljust(999 + (rest if index == 0 else 0), "y") + "\n" for index in range(num_rows)]
    data = f"{header}{''.join(rows)}n\u00e6vus,bl\u00e9,\n".encode()
    assert data[piece - 1:piece + 1] == "\u00e6".encode()
    assert table(data).class_of("n\u00e6vus.png") == "bl\u00e9"


def test_text_number_with_decimal_comma_is_read(table):
    assert classes(table("image_id;melanoma;seborrheic_keratosis", "a;1,0;0,0")) == {"a": "melanoma"}


def test_text_quoted_cell_over_lines_counts_them(refused):
    assert refused('image_id,dx,note', 'a,nv,"one', 'two"', ",nv,x") == (
        "t.csv, line 4: image_id is empty; expected the name of an image")


@pytest.mark.parametrize(("data", "message"), [
    (b"", "t.csv is empty; expected a table: a header and one row per image"),
    (b"\n \n", "t.csv is empty; expected a table: a header and one row per image"),
    (b"image_id,dx\n", "t.csv has a header but no rows; expected one row per image"),
    (b"image_id\na\n", "t.csv has the single column 'image_id'; expected at least two, separated by commas, semicolons "
                       "or tabs"),
    (b"PK\x03\x04\x00\x00", "t.csv is not a text file; expected a table as CSV (a workbook: save it as CSV)"),
    (b"\xff\xfea", "t.csv begins like UTF-16 but is damaged (truncated data); save the table as CSV in UTF-8"),
    (b"image_id,dx\na,nv,3\n", "t.csv, line 2: the row has 3 cells; expected 2, like the header"),
    (b"image_id,dx\n\na\n", "t.csv, line 3: the row has 1 cell; expected 2, like the header"),
    (b'image_id,dx\na,"nv\nb,nv\n', "t.csv, line 2: the quotes in this row are wrong (unexpected end of data); "
                                    'expected cells such as "text", and "" for a quote inside one'),
    (b'image_id,dx\na,"n"v\n', "t.csv, line 2: the quotes in this row are wrong (',' expected after '\"'); "
                               'expected cells such as "text", and "" for a quote inside one'),
    (b'"image_id,dx\na,nv\n', "t.csv, line 1: the quotes in this row are wrong (unexpected end of data); "
                              'expected cells such as "text", and "" for a quote inside one'),
])
def test_text_damaged_is_refused(refused, data, message):
    assert refused(data) == message


def test_path_missing_or_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"none\.csv does not exist; expected a table, a CSV file$"):
        read_table(tmp_path / "none.csv")
    with pytest.raises(UserError, match=r" is a folder; expected a table, a CSV file$"):
        read_table(tmp_path)


# Size

def test_large_table_takes_little_memory(tmp_path):
    num_rows = 20_000
    path = tmp_path / "t.csv"
    with open(path, "w", encoding="ascii") as file:
        file.write("image_name,patient_id,target\n")
        file.writelines(f"ISIC_{index * 7919 % num_rows:07d},IP_{index % 999:07d},{index % 2}\n"
                        for index in range(num_rows))
    tracemalloc.start()
    try:
        found = read_table(path)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(found) == num_rows
    assert found.class_of("ISIC_0007919.jpg") == "malignant"
    # 12 bytes of id, 10 of group, 8 for each of both ends, 2 of class; arrays grow by up to an eighth ahead of need.
    assert kept / num_rows < 60
    assert peak / num_rows < 200  # sorting holds all ids as str once


def test_compact_texts_hold_any_text():
    texts = ["", "a", "m\u00e9l", "b" * 1000, "a"]
    compact = CompactTexts(texts)
    assert (list(compact), len(compact), compact[-1], compact[2]) == (texts, 5, "a", "m\u00e9l")
    with pytest.raises(IndexError):
        compact[5]


def test_compact_texts_find_sorted_finds_each_and_nothing_else():
    texts = sorted(f"{index:x}" for index in range(0, 600, 3))
    compact = CompactTexts(texts)
    assert [compact.find_sorted(text) for text in texts] == list(range(len(texts)))
    assert [compact.find_sorted(text) for text in ("", "1", "zz")] == [None] * 3


ISIC_2024 = ("isic_id,target,patient_id,age_approx,sex,anatom_site_general,attribution,copyright_license,lesion_id,"
             "iddx_full,iddx_1,iddx_2,iddx_3,iddx_4,iddx_5,mel_mitotic_index")
ARCHIVE = ("isic_id,attribution,copyright_license,age_approx,anatom_site_general,diagnosis_1,diagnosis_2,diagnosis_3,"
           "diagnosis_4,diagnosis_5,diagnosis_confirm_type,image_type,lesion_id,patient_id,sex")


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
     "--id-column=imag is not a column of g.csv; expected one of image, lesion_id (did you mean image?)"),
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
