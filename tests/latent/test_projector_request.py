"""projector.py: one line for each mistake, before anything is written; results that are there already."""

import json
import os
from pathlib import Path

import pytest
import torch

from tests.helpers.generator_files import lively_generator, save_generator
from tests.helpers.make_sets import make_set, pixels_of, png
from tests.helpers.projector_commands import attempt, contents, project, refuse, working_in
from training.snapshot import Networks, save_network

pytestmark = pytest.mark.usefixtures("one_thread")  # as programs that tests start

CLASSES, LABELS, GROUPS = ["mel", "nv"], [1, 0, 1, 0, 0, 1], ["a", "a", "b", "c", "d", "e"]
SET = ("--data=set.zip", "--outdir=out", "--batch=4")
STARTED = "expected the same number: leave --gpus out, or unset RANK and WORLD_SIZE to let"


@pytest.fixture
def inside(tmp_path, monkeypatch):
    with working_in(tmp_path, monkeypatch):
        make_set("set.zip", 6, labels=LABELS, classes=CLASSES, groups=GROUPS)
        make_set("bare.zip", 2)
        make_set("other.zip", 2, labels=[0, 1], classes=["scc", "bcc"])
        make_set("some.zip", 2, labels=[0, None], classes=["mel"])
        Path("target.png").write_bytes(png(pixels_of(3)))
        yield tmp_path


CLASSES_KNOWN = "expected one of nv, mel, or a number from 0 to 1"
NETWORK = "a .safetensors of a run, or a .pkl of NVIDIA's code"


@pytest.mark.parametrize(("flags", "message"), [
    ([], "--outdir is missing; expected one, such as --outdir=out, or see --help"),
    (["--outdir=o"], "--target and --data are missing; expected one of them: an image, or a set of images"),
    (["--outdir=o", "--target=target.png", "--data=set.zip"],
     "--target and --data are both given; expected one of them: an image, or a set of images"),
    (["--outdir=o", "--target=target.png", "--count=3"], "--count is given, but only works with --data; leave --count "
                                                         "out"),
    (["--outdir=o", "--target=target.png", "--count=0"], "--count is given, but only works with --data; leave --count "
                                                         "out"),
    (["--outdir=o", "--target=target.png", "--group-by-class"],
     "--group-by-class is given, but only works with --data; leave --group-by-class out"),
    (["--outdir=o", "--target=target.png", "--gpus=2"], "--gpus is given, but only works with --data; leave --gpus "
                                                        "out"),
    (["--outdir=o", "--data=set.zip", "--save-video=1"], "--save-video is given, but only works with --target; leave "
                                                         "--save-video out"),
    (["--outdir=o", "--data=set.zip", "--pti-steps=350"], "--pti-steps is given, but only works with --target; leave "
                                                          "--pti-steps out"),
    (["--outdir=o", "--target=target.png", "--class=nv", "--batch=0"], "--batch is 0; expected at least 1"),
    (["--outdir=o", "--data=set.zip", "--batch=-2"], "--batch is -2; expected at least 1"),
    (["--outdir=o", "--data=set.zip", "--gpus=0"], "--gpus is 0; expected at least 1"),
    (["--outdir=o", "--data=set.zip", "--num-steps=0"], "--num-steps is 0; expected at least 1"),
    (["--outdir=o", "--data=set.zip", "--seed=-1"], "--seed is -1; expected at least 0"),
    (["--outdir=o", "--data=set.zip", "--space=z"], "--space is z; expected w or w+"),
    (["--outdir=o", "--target=target.png", "--class=nv", "--pti-steps=-1"],
     "--pti-steps is -1; expected at least 0, usually about 350"),
    (["--outdir=o", "--target=target.png", "--class=nv", "--pti-steps=5", "--space=w+"],
     "--pti-steps is given with --space=w+; expected --space=w: pivotal tuning starts from a style that all layers "
     "share"),
    (["--outdir=o", "--target=target.png", "--transform=crop"],
     "Invalid value for '--transform': 'crop' is not one of 'center-crop', 'center-crop-wide', 'none'."),
    (["--outdir=o", "--target=target.png", "--resize-filter=cubic"],
     "Invalid value for '--resize-filter': 'cubic' is not one of 'box', 'lanczos'."),
    (["--outdir=o", "--target=target.png", "--class=nv", "--device=tpu"],
     "--device is tpu; expected auto, cpu, cuda, or a single GPU such as cuda:1"),
    (["--outdir=target.png/o", "--target=target.png", "--class=nv"],
     "--outdir is target.png/o, but {cwd}/target.png is not a folder; choose a new or existing folder"),
    (["--outdir=target.png/o", "--data=set.zip"],
     "--outdir is target.png/o, but {cwd}/target.png is not a folder; choose a new or existing folder"),
    (["--outdir=o", "--target=no.png", "--class=nv"], "--target is no.png, which does not exist; expected an image "
                                                      "file, such as a PNG or JPEG"),
    (["--outdir=o", "--target=set.zip", "--class=nv"],
     "--target is set.zip, which is not an image; expected an image file, such as a PNG or JPEG (many images, or a "
     "data set, go with --data)"),
    (["--outdir=o", "--target=target.png"], "--class is missing, but this network is class-conditional; "
                                            f"{CLASSES_KNOWN}, or auto to try each"),
    (["--outdir=o", "--target=target.png", "--class=me"], "--class names the class 'me' (did you mean mel?); "
                                                          f"{CLASSES_KNOWN}"),
    (["--outdir=o", "--target=target.png", "--class=2"], f"--class names the class '2'; {CLASSES_KNOWN}"),
    (["--outdir=o", "--target=target.png", "--class=all"], "--class is all; expected one class, or auto to try each"),
    (["--outdir=o", "--target=target.png", "--class=nv,mel"], "--class names 2 classes; expected one, or auto to try "
                                                              "each"),
    (["--outdir=o", "--data=set.zip", "--class=all"], "--class is all; expected one class, or auto to try each"),
    (["--outdir=o", "--data=set.zip", "--class=bcc"], f"--class names the class 'bcc'; {CLASSES_KNOWN}"),
    (["--outdir=o", "--data=set.zip", "--count=0"], "--count is 0; expected at least 1"),
    (["--outdir=o", "--data=no.zip"], "no.zip does not exist; expected a data set: a zip or a folder of images"),
    (["--outdir=o", "--data=target.png"], "target.png cannot be read as a zip (File is not a zip file): it is "
                                          "truncated or not a zip; make or copy it again"),
    (["--outdir=o", "--data=bare.zip"], "bare.zip has no classes, but this network is class-conditional; "
     f"{CLASSES_KNOWN}: give --class=NAME to start from, or --class=auto to try each"),
    (["--outdir=o", "--data=other.zip"], "other.zip has images of scc, bcc, which the network does not know; "
     f"{CLASSES_KNOWN}: give --class=NAME to start from, or --class=auto to try each"),
    (["--outdir=o", "--data=some.zip", "--class=nv"], "some.zip has no images of class nv; expected one of mel, or "
                                                      "leave --class out"),
    (["--outdir=o", "--data=some.zip", "--class=auto", "--group-by-class"],
     "some.zip has 1 images without a class; expected one each for --group-by-class"),
    (["--outdir=o", "--data=bare.zip", "--class=nv", "--group-by-class"],
     "bare.zip has 2 images without a class; expected one each for --group-by-class"),
    (["--outdir=o", "--data=set.zip", "--detector-weights=w.pth"],
     "the file of weights is w.pth; expected none, since pixels does not use one: leave --detector-weights out"),
    (["--outdir=o", "--target=target.png", "--class=nv", "--detector=vgg"],
     "--detector is vgg; expected one of lpips-vgg16, efficientnet-lite0, random-conv, pixels"),
    (["--outdir=o", "--data=set.zip", "--detector=vgg"],
     "--detector is vgg; expected one of lpips-vgg16, efficientnet-lite0, random-conv, pixels"),
])
def test_mistake_gives_one_line_and_no_file(inside, capsys, flags, message):
    assert refuse(capsys, *flags) == message.format(cwd=inside)


@pytest.mark.parametrize(("network", "message"), [
    (None, "--network is missing; expected one, such as --network=network-snapshot-001000.safetensors, or see --help"),
    ("no.safetensors", f"--network is no.safetensors, which does not exist; expected a network file: {NETWORK}"),
    (".", "--network is ., a folder without network-snapshot-*.safetensors; expected a network file (a .safetensors of "
          "a run, or a .pkl of NVIDIA's code), or the folder of a run")])
@pytest.mark.parametrize("what", [["--target=target.png"], ["--data=set.zip"]])
def test_mistake_of_network_gives_one_line_and_no_file(inside, capsys, network, message, what):
    assert refuse(capsys, *what, "--class=nv", "--outdir=o", network=network) == message


def test_network_of_other_channels_is_refused(inside, capsys):
    save_generator("four.safetensors", {}, c_dim=0, img_channels=4)
    for what in ("--target=target.png", "--data=set.zip"):
        assert refuse(capsys, what, "--outdir=o", network="four.safetensors") == (
            "the network of --network makes images with 4 channels; expected a network of gray or RGB images")


@pytest.mark.parametrize("class_", ["nv", "auto"])
@pytest.mark.parametrize("what", ["--target=target.png", "--data=set.zip"])
def test_class_of_a_network_without_classes_is_refused(inside, capsys, what, class_):
    assert refuse(capsys, what, f"--class={class_}", "--outdir=o", network="plain.safetensors") == (
        f"--class is {class_}, but this network was trained without classes; leave --class out")


def test_device_that_is_not_there_is_refused(inside, capsys, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    for what in ("--target=target.png", "--data=set.zip"):
        assert refuse(capsys, what, "--class=nv", "--outdir=o", "--device=cuda") == (
            "--device is cuda, but this PyTorch is built without CUDA; expected a working GPU and driver, or "
            "--device=cpu")


def test_folder_that_cannot_be_written_to_is_refused(inside, capsys, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    for what in ("--target=target.png", "--data=set.zip"):
        assert refuse(capsys, what, "--class=nv", "--outdir=o") == (
            f"--outdir is o, but {inside} is not writable; choose a writable folder")


def test_network_that_is_a_runs_folder_is_recorded_by_its_file(inside, capsys):
    os.makedirs("runs/00000-a")
    for number in (8, 12):
        os.link("net.safetensors", f"runs/00000-a/network-snapshot-{number:06d}.safetensors")
    assert attempt("--target=target.png", "--class=nv", "--outdir=out", "--save-video=0", network="runs/*-a") == 0
    assert capsys.readouterr().err == "--network: runs/00000-a/network-snapshot-000012.safetensors\n"
    assert json.loads(Path("out/projection.json").read_text())["network"] == "network-snapshot-000012.safetensors"


@pytest.mark.parametrize(("flags", "environment", "message"), [
    (["--target=target.png"], {"RANK": "0", "WORLD_SIZE": "2"}, "2 processes were started; expected one: only --data "
                                                                "uses several"),
    (["--data=set.zip", "--gpus=3"], {"RANK": "1", "WORLD_SIZE": "2"},
     f"--gpus is 3, but WORLD_SIZE (set by torchrun) is 2; {STARTED} --gpus=3 start 3 processes"),
    (["--data=set.zip", "--gpus=4"], {"RANK": "0", "WORLD_SIZE": "1"},
     f"--gpus is 4, but WORLD_SIZE (set by torchrun) is 1; {STARTED} --gpus=4 start 4 processes")])
def test_processes_that_do_not_fit_are_refused(inside, capsys, monkeypatch, flags, environment, message):
    for name, value in {"LOCAL_RANK": environment["RANK"], "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                        "MASTER_PORT": "1", **environment}.items():
        monkeypatch.setenv(name, value)
    assert refuse(capsys, *flags, "--class=nv", "--outdir=o") == message


@pytest.mark.parametrize("flags", [["--target=target.png", "--class=nv", "--gpus=1", "--pti-steps=0"],
                                   ["--data=set.zip", "--save-video=0", "--pti-steps=0", "--gpus=1"]])
def test_options_that_ask_for_nothing_are_no_mistake(inside, capsys, flags):
    project(capsys, *flags, "--outdir=out")


def test_out_of_memory_says_what_to_try(inside, capsys, monkeypatch):
    def refuse_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\nand more lines")

    monkeypatch.setattr("latent.projection.Projection.advance", refuse_memory)
    assert refuse(capsys, "--target=target.png", "--class=auto", "--outdir=out", "--batch=9", code=4) == (
        "out of memory with --batch=9; try --batch=4")
    assert refuse(capsys, "--target=target.png", "--class=nv", "--outdir=out", code=4) == (
        "out of memory with --batch=1; use --device=cpu, or a GPU with more memory")
    assert refuse(capsys, "--data=set.zip", "--outdir=out", "--batch=6", code=4) == (
        "out of memory with --batch=6; try --batch=3")


def test_network_whose_images_are_no_numbers_is_refused(inside, capsys):
    G = lively_generator(c_dim=0)
    G.synthesis.b8.torgb.bias.data.fill_(float("nan"))
    save_network("broken.safetensors", Networks(G=None, D=None, G_ema=G, config={"info": {}}))
    for what in ("--target=target.png", "--data=set.zip"):
        assert refuse(capsys, what, "--outdir=out", network="broken.safetensors") == (
            "the distance of the network's images to the targets is not finite, perhaps because its training "
            "diverged; expected a network that works: try an earlier snapshot")


def test_same_command_again_says_that_all_is_there(inside, capsys):
    project(capsys, *SET)
    before = contents("out")
    assert project(capsys, *SET) == "out already holds these results\n"
    assert contents("out") == before


@pytest.mark.parametrize(("flag", "name"), [
    ("--seed=4", "seed"), ("--num-steps=3", "num_steps"), ("--space=w+", "space"), ("--batch=3", "batch"),
    ("--class=auto", "class"), ("--class=nv", "data_sha256"), ("--count=5", "data_sha256"),
    ("--detector=random-conv", "detector"), ("--transform=none", "transform"), ("--resize-filter=box", "resize_filter"),
    ("--exact", "exact"), ("--group-by-class", "data_sha256"), ("--data=other.zip", "data"),
    ("--network=plain.safetensors", "network")])
def test_folder_of_other_results_is_refused(inside, capsys, flag, name):
    make_set("other.zip", 6, labels=LABELS, classes=CLASSES, groups=GROUPS)
    project(capsys, *SET)
    assert refuse(capsys, *SET, flag) == (f"--outdir is out, which holds other results ({name} differs); choose "
                                          f"another folder for these")


def test_set_that_changed_is_another_one(inside, capsys):
    project(capsys, *SET)
    make_set("set.zip", 6, labels=LABELS, classes=CLASSES, groups=["other", *GROUPS[1:]])
    assert refuse(capsys, *SET) == ("--outdir is out, which holds other results (data_sha256 differs); choose another "
                                    "folder for these")


@pytest.mark.parametrize(("content", "message"), [
    ("{", "out/projections.json was not written by this program; choose another --outdir for these results"),
    ("[]", "--outdir is out, which holds other results (network differs); choose another folder for these")])
def test_record_of_somebody_else_is_left_alone(inside, capsys, content, message):
    Path("out").mkdir()
    Path("out/projections.json").write_text(content)
    assert refuse(capsys, *SET) == message
