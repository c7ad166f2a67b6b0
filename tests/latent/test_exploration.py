"""Test what all commands of explore.py share: the folder of a refused command, and work divided among processes."""

from pathlib import Path

import numpy as np
import pytest
import torch

from generation.image_generator import ImageGenerator, SynthesisSettings
from latent.exploration import Explorer, ImageFunction
from tests.helpers.disc_generator import disc_explorer, disc_network
from tests.helpers.explore_commands import refuse
from tests.helpers.generator_files import save_generator
from torch_utils.distributed import Processes

pytestmark = pytest.mark.usefixtures("one_thread")

MEAN = ImageFunction(names=("mean",), compute=lambda pixels: pixels.float().mean(dim=(1, 2, 3))[:, None].numpy())


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_generator("net.safetensors", {"classes": ["nv", "mel"], "label_kind": "class"})


@pytest.mark.parametrize("outdir", ["out", "new/out"])
def test_a_command_that_is_refused_late_leaves_no_folder(folder, capsys, outdir):
    assert refuse(capsys, "boundary", f"--outdir={outdir}", "--attribute=melanoma", "--seeds=0-49",
                  "--measure=0") == "--attribute has melanoma; expected one of class:nv, class:mel"


def test_a_command_that_is_refused_late_leaves_folders_that_were_there(folder, capsys):
    Path("empty").mkdir()
    Path("full").mkdir()
    Path("full/notes.txt").write_text("notes")
    for outdir in ("empty", "full"):
        refuse(capsys, "boundary", f"--outdir={outdir}", "--attribute=melanoma", "--seeds=0-49", "--measure=0")


@pytest.mark.parametrize("command", [["sefa"], ["boundary", "--attribute=nv"], ["neighbors"], ["anatomy"]])
def test_an_empty_list_of_seeds_is_refused(folder, capsys, command):
    assert refuse(capsys, *command, "--outdir=out", "--seeds=") == (
        "--seeds has ''; expected numbers and ranges, such as 0,1,5-9")


def test_a_batch_is_one_pass_of_the_network(monkeypatch):
    opened, sizes = disc_network(), []
    forward = opened.G.synthesis.forward
    monkeypatch.setattr(opened.G.synthesis, "forward",
                        lambda ws, **options: (sizes.append(len(ws)), forward(ws, **options))[1])
    explorer = Explorer(network=opened, generator=ImageGenerator(opened.G, SynthesisSettings(), batch=40),
                        processes=Processes(rank=0, count=1, device=torch.device("cpu")), outdir=Path("out"),
                        labels=(None,))
    ws = explorer.styles(range(90))
    images = torch.cat(list(explorer.images(ws)))
    assert sizes == [40, 40, 10]
    found, = explorer.evaluate(ws, [MEAN])
    assert sizes[3:] == [40, 40, 10]
    np.testing.assert_array_equal(found, MEAN.compute(images))


def test_reference_styles_of_many_classes_are_not_all_kept(tmp_path):
    explorer = disc_explorer(tmp_path, names=[f"class {index}" for index in range(20)])
    first = explorer.reference_styles([0])
    assert explorer.reference_styles([0]) is first
    for label in range(1, 20):
        explorer.reference_styles([label])
    again = explorer.reference_styles([0])
    assert again is not first
    torch.testing.assert_close(again, first, rtol=0, atol=0)


def test_work_of_the_main_process_gets_a_call_that_keeps_the_others_waiting(tmp_path):
    assert disc_explorer(tmp_path).from_main(lambda beat: (beat(), "done")[1]) == "done"
