import numpy as np
import pytest
import torch

from dnnlib.cli import UserError
from latent.attribute_values import (
    Attribute,
    Samples,
    class_attributes,
    find_attributes,
    image_attributes,
    is_usable,
    read_samples,
    read_values,
    samples_of_seeds,
    styles_in,
)
from latent.exploration import ImageFunction
from tests.helpers.disc_generator import disc_explorer

pytestmark = pytest.mark.usefixtures("one_thread")


def samples(seeds=(5, 6, 7), images=None):
    count = len(seeds if images is None else images)
    return Samples(ws=torch.zeros(count, 8, 12), names=("",) * count, seeds=None if images else tuple(seeds),
                   images=None if images is None else tuple(images), classes=None, groups=None)


def attribute(kind, name, values=(0.0, 1.0)):
    return Attribute(kind=kind, name=name, values=np.array(values))


def by_name(attributes):
    return {one.name: one for one in attributes}


# Samples.


def test_samples_of_seeds_take_classes_in_turn(tmp_path):
    explorer = disc_explorer(tmp_path, ["nv", "mel"])
    found = samples_of_seeds(explorer, [3, 4, 5])
    assert found.classes == ("nv", "mel", "nv")
    assert found.names == ("seed 3 nv", "seed 4 mel", "seed 5 nv")
    assert found.seeds == (3, 4, 5)
    assert found.groups is None
    torch.testing.assert_close(found.ws, explorer.styles([3, 4, 5], [0, 1, 0]), rtol=0, atol=0)


def test_classes_are_attributes_of_their_samples(tmp_path):
    found = class_attributes(samples_of_seeds(disc_explorer(tmp_path, ["nv", "mel", "bcc"]), [0, 1, 2, 3]))
    assert [one.name for one in found] == ["nv", "mel", "bcc"]
    assert found[0].values.tolist() == [1, 0, 0, 1]
    assert found[1].values.tolist() == [0, 1, 0, 0]


def test_projections_come_with_their_groups_and_classes(tmp_path):
    explorer = disc_explorer(tmp_path)
    ws = np.random.RandomState(0).randn(4, 8, 12).astype(np.float32)
    np.savez(tmp_path / "p.npz", w=ws, image=np.array(["a.png", "b.png", "c.png", "d.png"]),
             group=np.array(["g", "", "g", ""]), **{"class": np.array(["nv", "mel", "", "nv"])})
    found = read_samples(str(tmp_path / "p.npz"), explorer.G)
    assert found.names == ("a.png", "b.png", "c.png", "d.png")
    assert found.groups.tolist() == [0, 1, 0, 2]  # images without a group are their own
    mel = by_name(class_attributes(found))["mel"].values
    assert mel[[0, 1, 3]].tolist() == [0, 1, 0]
    assert np.isnan(mel[2])
    np.testing.assert_allclose(styles_in(found, [1, 4]), (ws[:, 1] + ws[:, 4]) / 2, rtol=1e-6)  # W+: the mean


def test_projections_of_single_images_are_independent(tmp_path):
    np.savez(tmp_path / "p.npz", w=np.zeros((2, 8, 12), np.float32), group=np.array(["a", "b"]))
    found = read_samples(str(tmp_path / "p.npz"), disc_explorer(tmp_path).G)
    assert found.groups is None
    assert found.names == ("style 0", "style 1")
    assert class_attributes(found) == []


def test_projections_with_an_array_of_another_length_are_refused(tmp_path):
    np.savez(tmp_path / "p.npz", w=np.zeros((2, 8, 12), np.float32), group=np.array(["a"]))
    with pytest.raises(UserError) as caught:
        read_samples(str(tmp_path / "p.npz"), disc_explorer(tmp_path).G)
    assert str(caught.value) == (f"--projected-w={tmp_path}/p.npz has an array group of shape [1]; expected [2], one "
                                 "for each style")


def test_probabilities_become_log_odds_and_measurements_stay_as_they_are(tmp_path):
    explorer = disc_explorer(tmp_path)
    shares = np.array([[0.5], [0.9], [0.0], [1.0]], dtype=np.float32)
    seen = []

    def compute(pixels):
        seen.extend(pixels)
        return shares[len(seen) - len(pixels):len(seen)]

    function = ImageFunction(names=("mel",), compute=compute)
    chosen = samples_of_seeds(explorer, range(4))
    odds = image_attributes(explorer, chosen, {"classifier": function})[0]
    assert odds.key == "classifier:mel"
    np.testing.assert_allclose(odds.values[:2], [0, np.log(9)], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(odds.values[2:], [-13.8155, 13.8155], rtol=1e-4)  # finite
    seen.clear()
    assert image_attributes(explorer, chosen, {"measure": function})[0].values.tolist() == shares[:, 0].tolist()


# Tables.


def table(tmp_path, text):
    (tmp_path / "t.csv").write_text(text)
    return str(tmp_path / "t.csv")


def test_values_are_found_by_seed(tmp_path, capsys):
    path = table(tmp_path, "age,seed,site,notes\n40,6,leg,x\n,5,arm,y\n9,99,arm,z\n")
    found = by_name(read_values(path, samples()))
    np.testing.assert_array_equal(found["age"].values, [np.nan, 40, np.nan])
    np.testing.assert_array_equal(found["site"].values, [0, 1, np.nan])
    assert found["site"].words == ("arm", "leg")
    assert found["age"].words is None
    assert capsys.readouterr().err == ("1 row of --values is of no sample\n"
                                       "1 sample is not in --values\n")


def test_values_are_found_by_image_with_or_without_its_extension(tmp_path, capsys):
    path = table(tmp_path, "image,age\nfolder/b,2\na.png,1\n")
    found = read_values(path, samples(images=["a.png", "folder/b.jpg"]))[0]
    assert found.values.tolist() == [1, 2]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("text", "message"), [
    ("name,age\n5,1\n", "--values={path} does not have a column seed (it has name, age); expected one that names the "
                        "samples"),
    ("seed,age\n5,1\n5,2\n", "--values={path}, line 3: seed 5 is named twice; expected each once"),
    ("seed,age,age\n5,1,2\n", "--values={path} has two columns of one name; expected each name once"),
    ("seed,age\n1,1\n2,2\n", "--values={path} names none of the 3 samples; its column seed should have entries such "
                             "as 5"),
])
def test_tables_that_do_not_fit_are_refused(tmp_path, text, message):
    path = table(tmp_path, text)
    with pytest.raises(UserError) as caught:
        read_values(path, samples())
    assert str(caught.value) == message.format(path=path)


def test_a_column_of_several_words_is_refused_only_when_it_is_asked_for(tmp_path):
    found = read_values(table(tmp_path, "seed,site,age\n5,leg,1\n6,arm,2\n7,head,3\n"), samples())
    assert [one.name for one in find_attributes("age", found)] == ["age"]
    with pytest.raises(UserError) as caught:
        find_attributes("site", found)
    assert str(caught.value) == ("--attribute has site, a column of --values that has the texts arm, head, leg; "
                                 "expected numbers, or two different words")
    assert [is_usable(one) for one in found] == [False, True]


# Names.


KNOWN = [attribute("class", "mel"), attribute("classifier", "mel"), attribute("measure", "area"),
         attribute("values", "age, years")]


@pytest.mark.parametrize(("text", "expected"), [
    ("area", ["measure:area"]),
    ("class:mel,area", ["class:mel", "measure:area"]),
    ("age, years,classifier:mel", ["values:age, years", "classifier:mel"]),
])
def test_attributes_are_found_by_name_and_kind(text, expected):
    assert [one.key for one in find_attributes(text, KNOWN)] == expected


@pytest.mark.parametrize(("text", "message"), [
    ("mel", "--attribute has mel, which is a class and a label of the classifier; expected class:mel or "
            "classifier:mel"),
    ("arae", "--attribute has arae (did you mean area?); expected one of class:mel, classifier:mel, measure:area, "
             "values:age, years"),
    ("area,measure:area", "--attribute=area,measure:area names an attribute twice; expected each once"),
])
def test_attributes_that_are_ambiguous_or_unknown_are_refused(text, message):
    with pytest.raises(UserError) as caught:
        find_attributes(text, KNOWN)
    assert str(caught.value) == message
