"""The institutions of a decentralized training: what is resolved for all of them, and which data are refused."""

from dataclasses import replace

import numpy as np
import pytest

from dnnlib.cli import run
from metrics.names import choose_metrics
from tests.helpers.make_archives import make_zip
from tests.helpers.make_sets import make_set, pixels_of, png
from tests.helpers.simulate_commands import CLASSES, enter_folder, prepare, refuse, site
from training.command import make_command
from training.dataset import ImageDataset, hash_content
from training.sampling import image_weights


@pytest.fixture
def inside(tmp_path, monkeypatch):
    """Working folder with the sets of two institutions; there is no GPU."""
    return enter_folder(tmp_path, monkeypatch)


# What is resolved


@pytest.mark.parametrize("flags", [
    ["--cfg=tiny"], ["--cfg=auto", "--cond=1", "--mirror=1", "--seed=7"], ["--cfg=paper256", "--batch=16"],
    ["--cfg=tiny", "--batch=8", "--batch-gpu=4", "--aug=fixed", "--p=0.2", "--gamma=3", "--precision=bf16"]])
def test_one_institution_has_the_configuration_of_train(flags, inside, capsys):
    found = []
    train = make_command(lambda config, *_: found.append(config) or 0, choose_metrics)
    same = ["--outdir=runs", "--data=a.zip", "--snap=1", *flags]
    assert run(train, [*same, "--metrics=none"]) == 0
    alone = prepare(capsys, *same, "--round-kimg=0.032").config
    central = found[0]
    assert replace(alone, run_name=central.run_name, kimg=central.kimg, federation=None) == central
    assert alone.run_name == central.run_name.replace("a-", "1site-", 1)


def test_institutions_have_one_configuration_of_all_their_images(inside, capsys):
    prepared = prepare(capsys, "--cond=1", "--rounds=100", "--seed=5")
    config = prepared.config
    assert (config.run_name, config.seed, config.gpus, config.batch) == ("2sites-cond-tiny", 5, 1, 16)
    assert (config.dataset.max_size, config.dataset.c_dim, config.dataset.name) == (50, 2, "a+b")
    # 0.02 kimg in each of 100 rounds and at each of 2 sites: the smallest set once
    assert (config.federation.sites, config.federation.rounds, config.federation.round_kimg) == (("a", "b"), 100, 0.02)
    assert (config.kimg, prepared.schedule.total_images(100)) == (4, 4000)
    assert (config.network_snapshot_ticks, config.image_snapshot_ticks, config.metrics) == (1, 1, ())
    assert (prepared.settings.data, prepared.settings.device, prepared.num_processes) == ("a.zip,b.zip", "cpu", 1)
    assert (prepared.holdout, prepared.share_statistics, prepared.warnings, prepared.transferred) == (
        None, False, (), None)


def test_short_training_has_a_kimg(inside, capsys):
    assert prepare(capsys, "--rounds=1").config.kimg == 1


def test_snapshots_are_made_every_few_rounds_and_grids_in_each(inside, capsys):
    config = prepare(capsys, "--snap=5").config
    assert (config.network_snapshot_ticks, config.image_snapshot_ticks) == (5, 1)
    assert refuse(capsys, "--snap=0") == "--snap is 0; expected a number >= 1"


def test_institutions_keep_the_order_of_data_with_images_labels_and_weights(inside, capsys):
    site("c", range(60, 76), labels=[0] * 12 + [1] * 4)
    prepared = prepare(capsys, "--data=c.zip,a.zip", "--data=b.zip", "--cond=1", "--mirror=1", "--balance=classes")
    found = prepared.institutions
    assert [(each.name, each.index, each.path) for each in found] == [
        ("c", 0, "c.zip"), ("a", 1, "a.zip"), ("b", 2, "b.zip")]
    assert [(each.dataset.num_images, len(each.dataset)) for each in found] == [(16, 32), (20, 40), (30, 60)]
    assert [each.dataset.classes for each in found] == [CLASSES] * 3
    alone = ImageDataset("c.zip", use_labels=True, xflip=True)
    weights = image_weights("classes", alone)
    np.testing.assert_array_equal(found[0].weights, weights)
    assert found[0].content_hash == hash_content(alone, weights)
    assert len({each.content_hash for each in found}) == 3
    assert prepare(capsys).institutions[0].weights is None


def test_class_without_images_at_one_institution_is_allowed(inside, capsys):
    site("c", range(60, 80), labels=[0] * 20)
    prepared = prepare(capsys, "--data=a.zip,c.zip", "--cond=1")
    assert [each.dataset.label_dim for each in prepared.institutions] == [2, 2]


def test_paths_may_be_in_the_home_folder(inside, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(inside))
    assert [each.path for each in prepare(capsys, "--data=~/a.zip,~/b.zip").institutions] == [
        f"{inside}/a.zip", f"{inside}/b.zip"]


def test_names_of_sites_are_those_given(inside, capsys):
    prepared = prepare(capsys, "--sites=north, South-2.x", "--leave=north:2")
    assert prepared.config.federation.sites == ("north", "South-2.x")
    assert prepared.schedule.members(3) == ["South-2.x"]


def test_mean_of_averages_is_approximate_only_where_iterations_differ(inside, capsys):
    note = ("note: with --local=proportional the sites take different numbers of iterations in a round, so that the "
            "mean of their moving averages of the generator is only approximately the moving average of the mean "
            "generator; with --local=equal it is exact")
    proportional = ["--local=proportional", "--round-kimg=0.1"]
    assert prepare(capsys, *proportional).warnings == (note,)
    assert prepare(capsys, *proportional).settings.notes[-1] == note
    for flags in (["--balance=classes", "--cond=1"], ["--weights=equal"], [*proportional, "--ema=server"]):
        assert prepare(capsys, *flags).warnings == ()
    site("c", range(60, 80))
    assert prepare(capsys, *proportional, "--data=a.zip,c.zip").warnings == ()  # of equal size


# Sets that do not fit each other


def test_images_of_other_sizes_or_colors_are_refused(inside, capsys):
    site("c", range(60, 80), size=32)
    assert refuse(capsys, "--data=a.zip,b.zip,c.zip") == (
        "--data: a.zip (site a) is 16x16 RGB, but c.zip (site c) 32x32 RGB; expected one resolution: convert both with "
        "dataset_tool.py and the same --resolution")
    site("c", range(60, 80), channels=1)
    assert refuse(capsys, "--data=a.zip,c.zip", "--sites=x,y") == (
        "--data: a.zip (site x) is 16x16 RGB, but c.zip (site y) 16x16 gray; expected images that are all gray or all "
        "RGB")


@pytest.mark.parametrize(("classes", "message"), [
    (["mel", "nv"], "mel, nv; expected the same order"),
    (["nv", "mel", "bkl"], "nv, mel, bkl; expected the same names, in the same order"),
    (["nv", "bkl"], "nv, bkl; expected the same names, in the same order")])
def test_other_classes_are_refused_if_labels_are_used(classes, message, inside, capsys):
    site("c", range(60, 80), classes=classes)
    assert refuse(capsys, "--data=a.zip,c.zip", "--cond=1") == (
        f"--data: a.zip (site a) has the classes nv, mel, but c.zip (site c) {message}: convert both with "
        "dataset_tool.py and the same --classes")
    prepare(capsys, "--data=a.zip,c.zip")


def test_an_institution_need_not_have_images_of_each_class(inside, capsys):
    (inside / "w.csv").write_text("class,weight\nnv,1\nmel,3\n")
    site("c", range(60, 80), labels=[0] * 20)
    for flags in ([], ["--balance=classes"], ["--balance=w.csv"]):
        prepared = prepare(capsys, "--data=a.zip,c.zip", "--cond=1", *flags)
        assert (prepared.config.dataset.c_dim, prepared.warnings) == (2, ())
    site("d", range(80, 100), labels=[0] * 20)
    assert prepare(capsys, "--data=c.zip,d.zip", "--cond=1").warnings == (
        "no institution has images of class mel, which the networks will not learn",)
    assert prepare(capsys, "--data=c.zip,d.zip").warnings == ()


def test_classes_without_names_are_compared_by_number(inside, capsys):
    for name, images, labels in (("c", range(60, 80), [0, 1] * 10), ("d", range(80, 100), [0, 1, 2, 1] * 5),
                                 ("e", range(100, 120), [1, 0] * 10)):
        site(name, images, classes=None, labels=labels)
    assert refuse(capsys, "--data=c.zip,d.zip", "--cond=1") == (
        "--data: c.zip (site c) has 2 classes without names, but d.zip (site d) 3; expected the same: convert both "
        "with dataset_tool.py and the same --classes, which names them")
    assert refuse(capsys, "--data=c.zip,a.zip", "--cond=1") == (
        "--data: c.zip (site c) does not name its classes, but a.zip (site a) does (nv, mel); expected the same names: "
        "convert both with dataset_tool.py and the same --classes")
    assert prepare(capsys, "--data=c.zip,e.zip", "--cond=1").config.dataset.c_dim == 2


def test_sets_without_labels_or_with_vectors_are_refused_if_labels_are_used(inside, capsys):
    make_set("plain.zip", images=range(60, 80), size=16)
    make_set("vectors.zip", images=range(80, 100), size=16, labels=[[0.5, 1.0]] * 20)
    assert refuse(capsys, "--data=a.zip,plain.zip", "--cond=1") == (
        "plain.zip has no labels; expected one for each image: convert it with dataset_tool.py --labels, or leave "
        "--cond out")
    for sets in ("a.zip,vectors.zip", "vectors.zip"):
        assert refuse(capsys, f"--data={sets}", "--cond=1") == (
            "--data: vectors.zip (site vectors) has lists of numbers as labels; expected numbers of classes as labels, "
            "since decentralized training takes classes: leave --cond out")
    prepare(capsys, "--data=a.zip,plain.zip,vectors.zip")


def test_image_of_another_size_within_a_set_is_refused(inside, capsys):
    make_zip("c.zip", {**{f"{index}.png": png(pixels_of(60 + index, 16)) for index in range(20)},
                       "z.png": png(pixels_of(1, 8))})
    assert refuse(capsys, "--data=a.zip,c.zip") == (
        "c.zip: z.png is 8x8 RGB, the first image 16x16 RGB; expected one size: convert it with dataset_tool.py")


# What stands in two sets

SPLIT = "dataset_tool.py split --institutions keeps the images of a patient or lesion together"


@pytest.mark.parametrize("options", [{}, {"mirror": True}, {"hashes": False}])
def test_image_at_two_institutions_is_refused(options, inside, capsys):
    site("c", [60, 21, 61, 22, *range(62, 80)], **options)
    assert refuse(capsys, "--data=a.zip,b.zip,c.zip") == (
        "--data: 2 of 22 images of c.zip (site c) are also in b.zip (site b), such as 00000/img00000001.png, which is "
        "00000/img00000001.png there (apart from order, labels and mirroring); expected each image at one institution: "
        f"{SPLIT}")


def test_group_at_two_institutions_is_refused(inside, capsys):
    site("c", range(60, 80), groups=["p1", "p2"] * 10)
    site("d", range(80, 100), groups=["p3"] * 17 + ["p2", "p2", "p1"])
    assert refuse(capsys, "--data=c.zip,d.zip") == (
        "--data: 2 groups (patients or lesions) of d.zip (site d) are also in c.zip (site c) (p2, p1), with 3 of 20 "
        f"images; expected each at one institution: {SPLIT}; if different ones have the same name, give them different "
        "names")


@pytest.mark.parametrize("flag", ["--valid", "--holdout"])
def test_held_out_image_that_a_site_trains_on_is_refused(flag, inside, capsys):
    metrics = ["--metrics=kid5", "--detector=random-conv"] if flag == "--holdout" else []
    site("h", [60, 25, 61])
    assert refuse(capsys, f"{flag}=h.zip", *metrics) == (
        f"{flag}=h.zip: 1 of 3 images are also in --data=b.zip, such as 00000/img00000001.png, which is "
        "00000/img00000005.png there (apart from order, labels and mirroring); expected images that are not trained "
        "on: hold out part of one data set with dataset_tool.py split")
    assert refuse(capsys, f"{flag}=b.zip", *metrics) == (
        f"{flag}=b.zip is the data set of --data itself; expected images that are not trained on")
    site("h", range(60, 65), size=32)
    assert refuse(capsys, f"{flag}=h.zip", *metrics) == (
        f"{flag}=h.zip is 32x32 RGB; expected 16x16 RGB, as in --data")


@pytest.mark.parametrize("flag", ["--valid", "--holdout"])
def test_held_out_group_that_a_site_trains_on_gives_a_warning(flag, inside, capsys):
    metrics = ["--metrics=kid5", "--detector=random-conv"] if flag == "--holdout" else []
    site("c", range(60, 80), groups=["p1", "p2"] * 10)
    site("h", range(80, 90), groups=["p2"] * 4 + ["p3"] * 6)
    prepared = prepare(capsys, "--data=a.zip,c.zip", f"{flag}=h.zip", *metrics)
    line = (f"warning: 1 groups (patients or lesions) of {flag}=h.zip are also in --data=c.zip (p2), with 4 of 10 "
            "images; their scores hide overfitting: hold out part of one data set with dataset_tool.py split")
    assert prepared.alerts == prepared.warnings == (line,)
    assert prepared.settings.notes[-1] == line


def test_held_out_labels_are_matched_by_name(inside, capsys):
    metrics = ["--metrics=kid5", "--detector=random-conv"]
    site("h", range(60, 70), classes=["mel", "bkl"])
    assert refuse(capsys, "--cond=1", "--holdout=h.zip", *metrics) == (
        "h.zip has labels of bkl; expected those of nv, mel: convert it with dataset_tool.py and the same --classes")
    site("h", range(60, 70), classes=["mel", "nv"])
    prepared = prepare(capsys, "--cond=1", "--holdout=h.zip", *metrics)
    assert (prepared.holdout, prepared.config.metrics) == ("h.zip", ("kid5",))


def test_same_set_twice_is_refused(inside, capsys):
    assert refuse(capsys, "--data=a.zip,./b.zip,b.zip") == (
        "--data names b.zip twice; expected another data set for each institution")
