"""imagesets.classes and dnnlib.text: choosing, ordering and merging classes by name."""

import pytest

from dnnlib.cli import UserError
from dnnlib.text import listed, suggestion
from imagesets.classes import ClassChoice, order_classes

HAM = ["akiec", "bcc", "bkl", "df", "mel", "nv", "vasc"]
MERGE = "melanoma=mel;benign=nv,bkl,df,vasc"
ALL = "akiec, bcc, bkl, df, mel, nv, vasc"


def labels(choice, found=HAM):
    return [choice.index_of(name) for name in found]


def test_choice_nothing_said_keeps_the_order_found():
    choice = ClassChoice.create(["b", "a", "c"])
    assert choice.names == ("b", "a", "c")
    assert choice.members == (("b",), ("a",), ("c",))
    assert (labels(choice, "bac"), choice.dropped) == ([0, 1, 2], ())


def test_choice_no_class_found_is_empty():
    assert ClassChoice.create([]).names == ()


def test_choice_classes_fixes_order_and_drops_the_others():
    choice = ClassChoice.create(HAM, "nv, mel")
    assert choice.names == ("nv", "mel")
    assert labels(choice) == [None, None, None, None, 1, 0, None]
    assert choice.dropped == ("akiec", "bcc", "bkl", "df", "vasc")


def test_choice_merge_puts_a_group_where_its_first_member_stood():
    choice = ClassChoice.create(HAM, merge=MERGE)
    assert choice.names == ("akiec", "bcc", "benign", "melanoma")
    assert choice.members == (("akiec",), ("bcc",), ("bkl", "df", "nv", "vasc"), ("mel",))
    assert (labels(choice), choice.dropped) == ([0, 1, 2, 2, 3, 2, 2], ())


def test_choice_classes_after_merge_names_the_merged():
    choice = ClassChoice.create(HAM, "melanoma,benign", MERGE)
    assert choice.names == ("melanoma", "benign")
    assert labels(choice) == [None, None, 1, 1, 0, 1, 1]
    assert choice.dropped == ("akiec", "bcc")


def test_choice_spaces_and_a_last_semicolon_do_not_count():
    spaced = ClassChoice.create(HAM, " melanoma , benign ", " melanoma = mel ; benign=nv, bkl,df ,vasc ;")
    assert spaced == ClassChoice.create(HAM, "melanoma,benign", MERGE)


ARCHIVE = ["Melanoma, NOS", "Nevus", "Nevus, Atypical, Dysplastic, or Clark", "Melanoma"]


def test_choice_takes_names_that_hold_commas_whole():
    choice = ClassChoice.create(ARCHIVE, "Nevus,Nevus, Atypical, Dysplastic, or Clark ,Melanoma, NOS,Melanoma")
    assert choice.names == (ARCHIVE[1], ARCHIVE[2], ARCHIVE[0], ARCHIVE[3])
    merged = ClassChoice.create(ARCHIVE, "nv,mel", "mel=Melanoma, NOS, Melanoma;"
                                                   "nv=Nevus, Atypical, Dysplastic, or Clark,Nevus")
    assert labels(merged, ARCHIVE) == [1, 0, 0, 1]


def test_choice_merge_may_keep_the_name_of_a_member():
    choice = ClassChoice.create(["mel", "nv", "bkl"], merge="nv=nv,bkl")
    assert choice.members == (("mel",), ("nv", "bkl"))


def test_choice_merge_may_exchange_names():
    choice = ClassChoice.create(["a", "b"], merge="b=a;a=b")
    assert (choice.names, choice.members) == (("b", "a"), (("a",), ("b",)))


def test_choice_names_with_spaces_and_numbers_work():
    choice = ClassChoice.create(["basal cell", "10", "9"], "9,tumour", "tumour=basal cell,10")
    assert (choice.names, labels(choice, ["basal cell", "10", "9"])) == (("9", "tumour"), [1, 1, 0])


def test_index_of_unknown_name_raises():
    with pytest.raises(KeyError, match="zzz"):
        ClassChoice.create(HAM, "nv").index_of("zzz")


def test_choice_found_twice_raises():
    with pytest.raises(UserError) as error:
        ClassChoice.create(["a", "b", "a"])
    assert str(error.value) == "the class a exists twice among a, b, a; expected different names"


@pytest.mark.parametrize(("classes", "message"), [
    ("nv,mell", f"names mell, but there is no class mell; expected some of {ALL} (did you mean mel?)"),
    ("NV", f"names NV, but there is no class NV; expected some of {ALL} (did you mean nv?)"),
    ("nv,zzzzzz", f"names zzzzzz, but there is no class zzzzzz; expected some of {ALL}"),
    ("nv,mel,nv", "names nv twice; expected each class once"),
    ("nv,,mel", "has an empty name; expected names with commas between them, as nv,mel"),
    ("nv,", "has an empty name; expected names with commas between them, as nv,mel"),
    ("", "has an empty name; expected names with commas between them, as nv,mel"),
])
def test_classes_wrong_says_what_exists(classes, message):
    with pytest.raises(UserError) as error:
        ClassChoice.create(HAM, classes)
    assert str(error.value) == f"--classes={classes} {message}"


def test_classes_merged_member_says_where_it_went():
    with pytest.raises(UserError) as error:
        ClassChoice.create(HAM, "mel,benign", MERGE)
    assert str(error.value) == ("--classes=mel,benign names mel, which --merge has put into melanoma; "
                                "expected some of akiec, bcc, benign, melanoma")


@pytest.mark.parametrize(("merge", "message"), [
    ("x=nv,mell", f"takes mell into x, but there is no class mell; expected some of {ALL} (did you mean mel?)"),
    ("x=nv;y=nv", "puts nv in both x and y; expected each class once"),
    ("x=nv,nv", "puts nv twice in x; expected each class once"),
    ("x=nv;x=mel", "makes x twice; expected one group of this name, with all its classes"),
    ("x=", 'has the empty group x; expected "new=a,b;other=c"'),
    ("x=nv,,mel", 'has an empty name in the group x; expected "new=a,b;other=c"'),
    ("=nv", "has a group without a name ('=nv'); expected \"new=a,b;other=c\""),
    ("nv,mel", "has the part 'nv,mel'; expected \"new=a,b;other=c\""),
    ("nv,mel=x", "has the part 'nv,mel=x'; expected \"new=a,b;other=c\""),
    ("x=nv=mel", "has the part 'x=nv=mel'; expected \"new=a,b;other=c\""),
    ("x=nv;;y=mel", "has the part ''; expected \"new=a,b;other=c\""),
    ("", "has the part ''; expected \"new=a,b;other=c\""),
    ("nv=mel", "makes nv, but a class nv exists outside of this group; add it to the group, or choose another name"),
])
def test_merge_wrong_says_what_was_expected(merge, message):
    with pytest.raises(UserError) as error:
        ClassChoice.create(HAM, merge=merge)
    assert str(error.value) == f"--merge={merge} {message}"


def test_listed_long_list_is_cut_and_counted():
    names = [str(index) for index in range(45)]
    assert listed(names[:40]) == ", ".join(names[:40])
    assert listed(names) == ", ".join(names[:40]) + ", ... (5 more)"


def test_suggestion_ignores_case_and_stays_silent_when_nothing_is_near():
    assert suggestion("image_nane", ["patient_id", "Image_Name"]) == " (did you mean Image_Name?)"
    assert suggestion("q", ["patient_id", "Image_Name"]) == ""


@pytest.mark.parametrize(("names", "ordered"), [
    ([], []),
    (["10", "0", "2", "1", "11"], ["0", "1", "2", "10", "11"]),
    (["7", "3", "10"], ["3", "7", "10"]),  # gaps
    (["01", "1", "00", "0"], ["0", "00", "01", "1"]),
    (["10", "9.5", "-1", "010", "1.0"], ["-1", "1.0", "9.5", "010", "10"]),
    (["10", "9", "x"], ["10", "9", "x"]),
    (["10", "9", "nan"], ["10", "9", "nan"]),
    (["10", "9", "1_0"], ["10", "1_0", "9"]),
    (["nv", "Mel", "bcc"], ["Mel", "bcc", "nv"])])
def test_classes_are_ordered_by_value_when_all_are_numbers_else_by_text(names, ordered):
    assert order_classes(names) == ordered
    assert order_classes(set(names)) == ordered
