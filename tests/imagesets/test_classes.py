"""imagesets.classes and dnnlib.text: classes found, chosen, ordered, merged and counted by name."""

from typing import NamedTuple

import numpy as np
import pytest

from dnnlib.cli import UserError
from dnnlib.text import listed, suggestion
from imagesets.classes import (
    NO_LABEL,
    choose_classes,
    class_counts,
    find_class,
    is_named,
    label_vectors,
    order_classes,
)

HAM = ["akiec", "bcc", "bkl", "df", "mel", "nv", "vasc"]
MERGE = "melanoma=mel;benign=nv,bkl,df,vasc"
ALL = "akiec, bcc, bkl, df, mel, nv, vasc"


class Choice(NamedTuple):
    """What choose_classes() returns, and the found classes in each class and in none."""
    names: tuple
    members: tuple
    dropped: tuple
    label_of: dict
    absent: list


def choose(*args, **options):
    names, label_of, absent = choose_classes(*args, **options)
    members = tuple(tuple(name for name in label_of if label_of[name] == index) for index in range(len(names)))
    return Choice(tuple(names), members, tuple(name for name in label_of if label_of[name] is None), label_of,
                  absent)


def labels(choice, found=HAM):
    return [choice.label_of[name] for name in found]


def test_choice_nothing_said_keeps_the_order_found():
    choice = choose(["b", "a", "c"])
    assert choice.names == ("b", "a", "c")
    assert choice.members == (("b",), ("a",), ("c",))
    assert (labels(choice, "bac"), choice.dropped) == ([0, 1, 2], ())


def test_choice_no_class_found_is_empty():
    assert choose([]).names == ()


def test_choice_classes_fixes_order_and_drops_the_others():
    choice = choose(HAM, "nv, mel")
    assert choice.names == ("nv", "mel")
    assert labels(choice) == [None, None, None, None, 1, 0, None]
    assert choice.dropped == ("akiec", "bcc", "bkl", "df", "vasc")


def test_choice_merge_puts_a_group_where_its_first_member_stood():
    choice = choose(HAM, merge=MERGE)
    assert choice.names == ("akiec", "bcc", "benign", "melanoma")
    assert choice.members == (("akiec",), ("bcc",), ("bkl", "df", "nv", "vasc"), ("mel",))
    assert (labels(choice), choice.dropped) == ([0, 1, 2, 2, 3, 2, 2], ())


def test_choice_classes_after_merge_names_the_merged():
    choice = choose(HAM, "melanoma,benign", MERGE)
    assert choice.names == ("melanoma", "benign")
    assert labels(choice) == [None, None, 1, 1, 0, 1, 1]
    assert choice.dropped == ("akiec", "bcc")


def test_choice_spaces_and_a_last_semicolon_do_not_count():
    spaced = choose(HAM, " melanoma , benign ", " melanoma = mel ; benign=nv, bkl,df ,vasc ;")
    assert spaced == choose(HAM, "melanoma,benign", MERGE)


ARCHIVE = ["Melanoma, NOS", "Nevus", "Nevus, Atypical, Dysplastic, or Clark", "Melanoma"]


def test_choice_takes_names_that_hold_commas_whole():
    choice = choose(ARCHIVE, "Nevus,Nevus, Atypical, Dysplastic, or Clark ,Melanoma, NOS,Melanoma")
    assert choice.names == (ARCHIVE[1], ARCHIVE[2], ARCHIVE[0], ARCHIVE[3])
    merged = choose(ARCHIVE, "nv,mel", "mel=Melanoma, NOS, Melanoma;"
                                                   "nv=Nevus, Atypical, Dysplastic, or Clark,Nevus")
    assert labels(merged, ARCHIVE) == [1, 0, 0, 1]


def test_choice_merge_may_keep_the_name_of_a_member():
    choice = choose(["mel", "nv", "bkl"], merge="nv=nv,bkl")
    assert choice.members == (("mel",), ("nv", "bkl"))


def test_choice_merge_may_exchange_names():
    choice = choose(["a", "b"], merge="b=a;a=b")
    assert (choice.names, choice.members) == (("b", "a"), (("a",), ("b",)))


def test_choice_names_with_spaces_and_numbers_work():
    choice = choose(["basal cell", "10", "9"], "9,tumour", "tumour=basal cell,10")
    assert (choice.names, labels(choice, ["basal cell", "10", "9"])) == (("9", "tumour"), [1, 1, 0])


def test_choice_has_a_label_for_found_names_alone():
    assert set(choose(HAM, "nv").label_of) == set(HAM)


def test_choice_found_twice_raises():
    with pytest.raises(UserError) as error:
        choose(["a", "b", "a"])
    assert str(error.value) == "the class a exists twice among a, b, a; expected different names"


def test_classes_that_do_not_exist_keep_their_numbers():
    choice = choose(["bcc", "nv"], "scc,nv,mel,bcc")
    assert choice.names == ("scc", "nv", "mel", "bcc")
    assert (labels(choice, ["bcc", "nv"]), choice.absent) == ([3, 1], ["scc", "mel"])
    assert choose(["0", "2"], "0,1,2,3").members == (("0",), (), ("2",), ())  # classes without names


def test_merge_leaves_out_members_that_do_not_exist():
    choice = choose(["bkl", "nv"], merge=MERGE, classes="benign,melanoma")
    assert (choice.names, choice.members) == (("benign", "melanoma"), (("bkl", "nv"), ()))
    assert choice.absent == ["mel", "df", "vasc"]
    assert choose(["bkl", "nv"], merge="benign=nv,bkl,df").absent == ["df"]
    # A group without members is known by its name, also to those who leave it out.
    assert choose(["nv"], "nv", "melanoma=mel").names == ("nv",)


def test_merge_of_nothing_but_absent_classes_needs_their_name_in_classes():
    with pytest.raises(UserError) as error:
        choose(["bkl", "nv"], merge="melanoma=scc")
    assert str(error.value) == ("--merge=melanoma=scc takes scc into melanoma, but there is no class scc; expected "
                                "some of bkl, nv")


@pytest.mark.parametrize(("found", "classes", "merge"), [
    (["nv", "mell"], "nv,mel", "other=mell"),  # the way out that the message names
    (["nv", "mel", "melanoma"], "nv,melanoma,mela", "x=mel"),  # similar to a class that is chosen
    (["BCC", "NV"], "NV,SCC", None), (["grade 1", "grade 3"], "grade 1,grade 2", None),
    (["nv", "typical"], "nv,atypical", None), (["nv", "melanoma"], "nv,melanoma in situ", None),
])
def test_names_that_differ_in_meaning_are_accepted(found, classes, merge):
    assert choose(found, classes, merge).names == tuple(classes.split(","))


@pytest.mark.parametrize(("found", "classes", "meant"), [
    (["nv", "MEL"], "nv,mel", "MEL"), (["nv", "basal_cell"], "nv,basal cell", "basal_cell"),
    (["nv", "akiec"], "nv,ak", "akiec"), (["nv", "naevus"], "nv,nevus", "naevus"),
])
def test_names_that_differ_in_spelling_are_refused(found, classes, meant):
    name = classes.removeprefix("nv,")
    with pytest.raises(UserError) as error:
        choose(found, classes)
    assert str(error.value) == (f"--classes={classes} names {name}, but there is no class {name}; expected some of "
                                f"{listed(found)} (did you mean {meant}? If not, give {meant} another name with "
                                "--merge)")


TWO_OR_ONE = ('which is no class here; if these are two classes, leave out the space ({}); if it is one that only '
              "other data sets have, give it a name without a comma in all, with --merge")


@pytest.mark.parametrize(("options", "message"), [
    ({"classes": "Nevus,Melanoma, NOS"}, '--classes=Nevus,Melanoma, NOS has "Melanoma, NOS", '
     + TWO_OR_ONE.format("Melanoma,NOS")),
    ({"classes": "Nevus, Atypical"}, '--classes=Nevus, Atypical has "Nevus, Atypical", '
     + TWO_OR_ONE.format("Nevus,Atypical")),
    ({"merge": "nv=Nevus, Atypical"}, '--merge=nv=Nevus, Atypical has "Nevus, Atypical", '
     + TWO_OR_ONE.format("Nevus,Atypical")),
])
def test_a_comma_that_may_be_part_of_an_absent_name_is_refused(options, message):
    with pytest.raises(UserError) as error:
        choose(["Nevus", "Seborrheic"], **options)
    assert str(error.value) == message


def test_a_name_with_a_comma_may_be_absent_from_merge():
    choice = choose(["Nevus"], "nevus,melanoma", "melanoma=Melanoma, NOS;nevus=Nevus")
    assert (choice.names, labels(choice, ["Nevus"])) == (("nevus", "melanoma"), [0])


@pytest.mark.parametrize(("name", "classes", "merge", "expected"), [
    ("nv", "mel, nv", None, True), ("Melanoma, NOS", "Nevus,Melanoma, NOS", None, True), ("n", "mel,nv", None, False),
    ("nv", None, "benign=bkl,nv;mel=x", True), ("benign", None, "benign=bkl,nv", False), ("nv", None, None, False),
])
def test_is_named_looks_into_classes_and_the_members_of_merge(name, classes, merge, expected):
    assert is_named(name, classes, merge) is expected


@pytest.mark.parametrize(("classes", "message"), [
    ("nv,mell", f"names mell, but there is no class mell; expected some of {ALL} (did you mean mel? If not, give mel "
     "another name with --merge)"),
    ("NV", f"names NV, but there is no class NV; expected some of {ALL} (did you mean nv? If not, give nv another name "
     "with --merge)"),
    ("zzzzzz,qqq", f"names zzzzzz, but there is no class zzzzzz; expected some of {ALL}"),
    ("nv,mel,nv", "names nv twice; expected each class once"),
    ("nv,,mel", "has an empty name; expected names separated by commas, such as nv,mel"),
    ("nv,", "has an empty name; expected names separated by commas, such as nv,mel"),
    ("", "has an empty name; expected names separated by commas, such as nv,mel"),
])
def test_classes_wrong_says_what_exists(classes, message):
    with pytest.raises(UserError) as error:
        choose(HAM, classes)
    assert str(error.value) == f"--classes={classes} {message}"


def test_classes_merged_member_says_where_it_went():
    with pytest.raises(UserError) as error:
        choose(HAM, "mel,benign", MERGE)
    assert str(error.value) == ("--classes=mel,benign names mel, which --merge put into melanoma; "
                                "expected some of akiec, bcc, benign, melanoma")


@pytest.mark.parametrize(("merge", "message"), [
    ("x=nv,mell", f"takes mell into x, but there is no class mell; expected some of {ALL} (did you mean mel? If not, "
     "give mel another name with --merge)"),
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
        choose(HAM, merge=merge)
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


NAMES = ["nevus", "melanoma"]
LISTED = "expected one of nevus, melanoma, or a number from 0 to 1"


@pytest.mark.parametrize(("text", "names", "expected"), [
    ("melanoma", NAMES, 1), (" melanoma ", NAMES, 1), ("0", NAMES, 0), (" 01", None, 1),
    ("1", ["1", "0"], 0),  # a name wins over a number
    ("7", ["1", "7"], 1), ("2", ["x", "2"], 1),
    (" a", ["a", " a"], 1),
])
def test_find_class_takes_names_and_numbers(text, names, expected):
    assert find_class(text, names, 2) == expected


@pytest.mark.parametrize(("text", "names", "message"), [
    ("melanomas", NAMES, f"--class names the class 'melanomas' (did you mean melanoma?); {LISTED}"),
    ("", NAMES, f"--class names the class ''; {LISTED}"),
    ("2", NAMES, f"--class names the class '2'; {LISTED}"),
    ("-1", NAMES, f"--class names the class '-1'; {LISTED}"),
    ("+1", None, "--class names the class '+1'; expected a number from 0 to 1"),
    ("\u0661", None, "--class names the class '\u0661'; expected a number from 0 to 1"),  # another script's 1
    ("9" * 5000, None, f"--class names the class '{'9' * 5000}'; expected a number from 0 to 1"),
    ("1", ["0", "2"], "--class names the class '1'; expected one of 0, 2"),  # and is not the class 2, though number 1
    ("0", ["1", "7"], "--class names the class '0'; expected one of 1, 7"),
    ("nevus", None, "--class names the class 'nevus'; expected a number from 0 to 1"),
])
def test_find_class_says_what_is_wrong(text, names, message):
    with pytest.raises(UserError) as caught:
        find_class(text, names, 2)
    assert str(caught.value) == message


def test_find_class_names_the_option():
    with pytest.raises(UserError, match=r"^--classes names the class '7'; "):
        find_class("7", NAMES, 2, flag="--classes")


@pytest.mark.parametrize(("shares", "count", "expected"), [
    ([0.87, 0.13], 2000, [1740, 260]), ([0.87, 0.13], 4, [3, 1]), ([0.34, 0.33, 0.33], 10, [4, 3, 3]),
    ([0.5, 0.5], 5, [3, 2]), ([0.333, 0.333, 0.333], 3, [1, 1, 1]),
    ([0.67, 0.11, 0.11, 0.05, 0.03, 0.02, 0.01], 1000, [670, 110, 110, 50, 30, 20, 10]),
    ([700, 200, 101], 1001, [700, 200, 101]), ([5, 0, 1], 3, [3, 0, 0]), ([1.0], 7, [7]),
])
def test_class_counts_follow_the_largest_remainder(shares, count, expected):
    assert class_counts(shares, count) == expected


def test_label_vectors_are_one_hot_and_zeros_without_a_label():
    found = label_vectors(np.array([2, NO_LABEL, 0]), 3)
    assert (found.dtype, found.tolist()) == (np.float32, [[0, 0, 1], [0, 0, 0], [1, 0, 0]])
    vectors = np.array([[0.5, 0.25]], dtype=np.float32)
    np.testing.assert_array_equal(label_vectors(vectors, 2), vectors)
    assert label_vectors(np.zeros(0, dtype=np.int64), 4).shape == (0, 4)
