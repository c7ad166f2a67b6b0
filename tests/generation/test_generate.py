"""generate.py: files, sheets, mixed styles and sets as they are asked for, and one line for each mistake."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import generate
from dnnlib.cli import UserError, run
from dnnlib.files import sha256_of
from generation.image_generator import ImageGenerator, SynthesisSettings
from generation.network import open_network, require_same
from generation.pictures import Sheet, choose_layers, mix
from imagesets.reader import ImageSet
from tests.helpers.generator_files import is_alike, pixels_in, save_generator
from tests.helpers.make_sets import make_set
from tests.helpers.tiny_networks import generator
from torch_utils.distributed import Processes
from torch_utils.images import MOST_PIXELS
from torch_utils.ops import compiled
from training.snapshot import Networks, load_network, save_network

DATA = Path(__file__).parent.parent / "data"
INFO = {"classes": ["nv", "mel"], "class_counts": [6, 4]}
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def inside(tmp_path, monkeypatch):
    """A folder to work in, with networks of two named classes, of no classes, and one for gray images."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    save_generator("net.safetensors", INFO)
    save_generator("plain.safetensors", {}, c_dim=0)
    save_generator("gray.safetensors", {}, c_dim=0, img_channels=1)
    return tmp_path


def make(capsys, *arguments, network="net.safetensors"):
    """Run generate.py; return standard output."""
    code = run(generate.main, [f"--network={network}", *arguments])
    captured = capsys.readouterr()
    assert (code, captured.err) == (0, "")
    return captured.out


def test_images_where_no_operators_are_built_say_so_in_one_line_and_build_none(inside, capsys, monkeypatch):
    monkeypatch.setattr(compiled, "_failures", {})
    monkeypatch.setattr(compiled, "_told", set())
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "builds")
    assert run(generate.main, ["--network=net.safetensors", "--seeds=0-3", "--class=nv", "--outdir=out"]) == 0
    assert capsys.readouterr().err == (
        "warning: using PyTorch's own operators, which are slower: the compiled CPU operators are not built: run "
        "python -m torch_utils.ops.build once\n")
    assert not os.path.exists("builds")


def refuse(capsys, *arguments, network="net.safetensors", code=2):
    """Return the one line of a mistake, without "error: "; nothing may be left."""
    before = sorted(os.listdir())
    found = run(generate.main, [*([f"--network={network}"] if network else []), *arguments])
    captured = capsys.readouterr()
    assert (found, captured.out) == (code, "")
    assert sorted(os.listdir()) == before
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err.removeprefix("error: ").rstrip("\n")


def images_of(seeds, label=None, network="net.safetensors", **settings):
    """Return the pixels that a seed should have, made one by one: uint8 [N, H, W, C]."""
    G = load_network(network).G_ema
    labels = torch.zeros(len(seeds), G.c_dim)
    if label is not None:
        labels[:, label] = 1
    pixels = torch.cat(list(ImageGenerator(G, SynthesisSettings(**settings), batch=1).generate(seeds, labels)))
    return pixels.permute(0, 2, 3, 1).numpy()


def test_images_of_the_original_network_are_the_original_ones(inside, capsys):
    shutil.copy(DATA / "sample_32_c2.stripped.pkl", "sample.pkl")
    reference = np.load(DATA / "net_sample_32_c2.npz")
    for psi in ("1.0", "0.7"):
        out = make(capsys, "--seeds=0-3", "--class=1", f"--trunc={psi}", f"--outdir=out{psi}", network="sample.pkl")
        assert out == f"out{psi}: 4 images, seed0000.png to seed0003.png\n"
        for seed in range(4):
            found = pixels_in(f"out{psi}/seed{seed:04d}.png")
            # Stored, of another machine.
            assert is_alike(found, reference[f"generate_uint8_seed{seed}_class1_psi{psi}"])


@pytest.mark.parametrize(("flags", "settings"), [
    ([], {}), (["--trunc=0.3"], {"truncation": 0.3}), (["--noise-mode=random"], {"noise_mode": "random"}),
    (["--noise-mode=none", "--fp32"], {"noise_mode": "none"})])
def test_images_follow_seed_class_and_settings(inside, capsys, flags, settings):
    make(capsys, "--seeds=5,70000", "--class=mel", "--outdir=a/b", *flags)
    assert sorted(os.listdir("a/b")) == ["seed0005.png", "seed70000.png"]
    expected = images_of([5, 70000], 1, **settings)
    assert np.array_equal(pixels_in("a/b/seed0005.png"), expected[0])
    assert np.array_equal(pixels_in("a/b/seed70000.png"), expected[1])


def test_a_seed_named_twice_is_made_once_and_the_files_are_counted(inside, capsys):
    assert run(generate.main, ["--network=net.safetensors", "--seeds=3,0-1,0", "--class=nv", "--outdir=out",
                               "--grid=sheet.png"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "out: 3 images, seed0000.png to seed0003.png\nsheet.png: 2 x 2 images\n"
    assert captured.err == "--seeds names 4 seeds, 3 of them different; each is made once\n"
    assert sorted(os.listdir("out")) == ["seed0000.png", "seed0001.png", "seed0003.png"]
    assert make(capsys, "--seeds=7", "--class=nv", "--outdir=one") == "one: 1 image, seed0007.png\n"


def test_style_mix_of_seeds_named_twice_counts_its_files(inside, capsys):
    out = make(capsys, "--style-mix", "--rows=1,1", "--cols=2,2", "--class=nv", "--outdir=out")
    assert out.startswith("out: 3 images and grid.png, ")
    assert sorted(os.listdir("out")) == ["1-1.png", "1-2.png", "2-2.png", "grid.png"]


def test_images_are_alike_in_batches(inside, capsys):
    make(capsys, "--seeds=0-4", "--class=nv", "--outdir=out", "--batch=3")
    found = np.stack([pixels_in(f"out/seed{seed:04d}.png") for seed in range(5)])
    assert is_alike(found, images_of(range(5), 0))


def test_images_replace_earlier_ones_and_leave_other_files(inside, capsys):
    os.mkdir("out")
    for name in ("seed0001.png", "notes.txt"):
        Path("out", name).write_text("old")
    make(capsys, "--seeds=1", "--outdir=out", network="plain.safetensors")
    assert np.array_equal(pixels_in("out/seed0001.png"), images_of([1], network="plain.safetensors")[0])
    assert sorted(os.listdir("out")) == ["notes.txt", "seed0001.png"]


def test_gray_network_writes_gray_files(inside, capsys):
    make(capsys, "--seeds=1", "--outdir=out", "--grid", network="gray.safetensors")
    expected = images_of([1], network="gray.safetensors")[0, :, :, 0]
    assert np.array_equal(pixels_in("out/seed0001.png"), expected)
    assert np.array_equal(pixels_in("out/grid.png"), expected)


def test_grid_shows_all_seeds_in_a_square(inside, capsys):
    out = make(capsys, "--seeds=0-4", "--class=nv", "--grid=sheet.png")
    assert out == "sheet.png: 3 x 2 images\n"
    cells = pixels_in("sheet.png").reshape(2, 8, 3, 8, 3).swapaxes(1, 2).reshape(6, 8, 8, 3)
    assert np.array_equal(cells[:5], images_of(range(5), 0))
    assert (cells[5] == 255).all()


def test_grid_has_a_row_for_each_class(inside, capsys):
    out = make(capsys, "--seeds=3,1,4", "--class=mel,nv", "--grid", "--outdir=out")
    assert out == f"{Path('out', 'grid.png')}: 3 x 2 images\n"
    assert os.listdir("out") == ["grid.png"]
    picture = pixels_in("out/grid.png")
    assert picture.shape[1] > 24  # names stand at the left
    cells = picture[:, -24:].reshape(2, 8, 3, 8, 3).swapaxes(1, 2)
    assert np.array_equal(cells[0], images_of([3, 1, 4], 1))
    assert np.array_equal(cells[1], images_of([3, 1, 4], 0))


def test_sheet_continues_long_classes_in_further_rows(tmp_path):
    sheet = Sheet(["a", "b"], 33, resolution=8)
    images = torch.arange(66, dtype=torch.uint8)[:, None, None, None].expand(66, 1, 8, 8)
    sheet.add(images[:40])
    sheet.add(images[40:])
    sheet.save(tmp_path / "sheet.png")
    found = pixels_in(tmp_path / "sheet.png")[::8, -32 * 8::8].ravel().tolist()  # a pixel of each cell
    assert (sheet.columns, sheet.rows) == (32, 4)
    assert found[:33] == list(range(33))
    assert found[64:97] == list(range(33, 66))
    assert set(found[33:64] + found[97:]) == {255}


def test_projected_styles_become_numbered_files(inside, capsys):
    G = load_network("net.safetensors").G_ema
    ws = np.random.RandomState(0).randn(3, G.num_ws, G.w_dim)
    np.savez("w.npz", w=ws)
    assert make(capsys, "--projected-w=w.npz", "--outdir=out", "--grid=sheet.png") == (
        "out: 3 images, proj00.png to proj02.png\nsheet.png: 2 x 2 images\n")
    expected = ImageGenerator(G, SynthesisSettings(), batch=1)
    for index in range(3):
        pixels = expected.render(torch.from_numpy(ws[index:index + 1]).float(), [0])
        assert np.array_equal(pixels_in(f"out/proj{index:02d}.png"), pixels[0].permute(1, 2, 0).numpy())


def test_style_mix_writes_pairs_and_sheet(inside, capsys):
    out = make(capsys, "--style-mix", "--rows=85,100", "--cols=55", "--styles=0-1,3", "--class=1", "--outdir=out",
               "--trunc=0.8")
    assert out == "out: 5 images and grid.png, layers 0, 1, 3 of the columns\n"
    alone = dict(zip((85, 100, 55), images_of([85, 100, 55], 1, truncation=0.8), strict=True))
    assert sorted(os.listdir("out")) == sorted([*(f"{seed}-{seed}.png" for seed in alone), "85-55.png", "100-55.png",
                                                "grid.png"])
    for seed, pixels in alone.items():
        assert np.array_equal(pixels_in(f"out/{seed}-{seed}.png"), pixels)
    images = ImageGenerator(load_network("net.safetensors").G_ema, SynthesisSettings(truncation=0.8), batch=1)
    row, column = images.map_seeds([85, 55], torch.tensor([[0.0, 1], [0, 1]]))
    row[[0, 1, 3]] = column[[0, 1, 3]]
    mixed = images.render(row[None], [85])[0].permute(1, 2, 0).numpy()
    assert np.array_equal(pixels_in("out/85-55.png"), mixed)
    assert not is_alike(mixed, alone[85])
    grid = pixels_in("out/grid.png").reshape(3, 8, 2, 8, 3).swapaxes(1, 2)
    assert (grid[0, 0] == 255).all()
    for place, pixels in {(0, 1): alone[55], (1, 0): alone[85], (2, 0): alone[100], (1, 1): mixed}.items():
        assert np.array_equal(grid[place], pixels)


CENTER = ("--trunc=0.4", "--trunc-center=class")
SAID = ("--trunc=0.4 pulls towards the mean style of each image's own class or label, from 10000 latents "
        "(--trunc-center=class)\n")


def make_centered(capsys, *arguments):
    """Run generate.py with the center of the class, which is said on standard error."""
    assert run(generate.main, ["--network=net.safetensors", *CENTER, *arguments]) == 0
    assert capsys.readouterr().err == SAID


def test_truncation_center_of_the_class_gives_images_sheets_and_mixed_styles(inside, capsys):
    settings = {"truncation": 0.4, "center": "class"}
    expected = images_of([5, 6], 1, **settings)
    make_centered(capsys, "--seeds=5,6", "--class=mel", "--outdir=out")
    assert np.array_equal(pixels_in("out/seed0006.png"), expected[1])
    assert not is_alike(expected, images_of([5, 6], 1, truncation=0.4))
    make_centered(capsys, "--seeds=5,6", "--class=mel,nv", "--grid=sheet.png")
    rows = [np.concatenate(list(images_of([5, 6], label, **settings)), axis=1) for label in (1, 0)]
    assert np.array_equal(pixels_in("sheet.png")[:, -16:], np.concatenate(rows))
    make_centered(capsys, "--style-mix", "--rows=5", "--cols=6", "--class=mel", "--outdir=mixed")
    assert np.array_equal(pixels_in("mixed/6-6.png"), expected[1])


def test_truncation_center_stands_in_the_set_that_it_made(inside, capsys):
    make_centered(capsys, "--zip=set.zip", "--classes=nv:1,mel:2")
    found = ImageSet("set.zip")
    assert (found.source["truncation"], found.source["truncation_center"]) == (0.4, "class")
    make_centered(capsys, "--seeds=2", "--class=mel", "--outdir=out")
    assert Path("out/seed0002.png").read_bytes() == found.read(found.names[2])
    make(capsys, "--zip=same.zip", "--count=3", "--trunc=0.4", "--trunc-center=global")
    assert "truncation_center" not in ImageSet("same.zip").source  # as in sets from before the option
    make(capsys, "--zip=usual.zip", "--count=3", "--trunc=0.4")
    assert Path("usual.zip").read_bytes() == Path("same.zip").read_bytes()


@pytest.mark.parametrize(("network", "flags", "message"), [
    ("plain.safetensors", ["--trunc=0.4", "--trunc-center=class"], "--trunc-center is class, but this network was "
     "trained without classes; expected global: leave --trunc-center out"),
    ("net.safetensors", ["--class=nv", "--trunc-center=class"], "--trunc-center is class, but without --trunc nothing "
     "is truncated; add one, such as --trunc=0.7, or leave --trunc-center out"),
    ("net.safetensors", ["--class=nv", "--trunc=0.4", "--trunc-center=mel"], "Invalid value for '--trunc-center': "
     "'mel' is not one of 'global', 'class'.")])
def test_truncation_center_that_does_not_fit_gives_one_line(inside, capsys, network, flags, message):
    assert refuse(capsys, "--seeds=0", "--outdir=o", *flags, network=network) == message


def test_truncation_center_of_too_many_labels_is_refused(inside, capsys, monkeypatch):
    monkeypatch.setattr("generation.labeled_set._MOST_CENTERS", 1)
    make_set("labels.zip", 4, labels=[0, 1, 1, 1], classes=["nv", "mel"])
    assert refuse(capsys, "--zip=set.zip", "--labels-from=labels.zip", *CENTER) == (
        "--trunc-center is class, which needs a mean style for each different label, and the images have 2 from "
        "labels.zip; expected at most 1: leave --trunc-center out")


@pytest.mark.parametrize(("text", "num_ws", "expected"), [
    (None, 8, [0, 1, 2, 3, 4, 5, 6]), (None, 18, [0, 1, 2, 3, 4, 5, 6]), (None, 6, [0, 1, 2]),
    ("3,0-1,1", 4, [0, 1, 3])])
def test_style_mix_layers_are_the_coarse_ones(text, num_ws, expected):
    assert choose_layers(text, num_ws) == expected


def test_style_mix_of_all_layers_is_the_column():
    row, column = torch.zeros(4, 2), torch.ones(4, 2)
    assert torch.equal(mix(row, column, range(4)), column)
    assert mix(row, column, [1])[:, 0].tolist() == [0, 1, 0, 0]
    assert not row.any()


def test_set_image_can_be_made_again_alone(inside, capsys):
    out = make(capsys, "--zip=set.zip", "--count=10", "--seeds=100", "--trunc=0.6", "--noise-mode=random")
    assert out == "set.zip: 10 images of 8x8 (nv: 6, mel: 4), seeds 100-109\n"
    found = ImageSet("set.zip")
    assert found.labels.tolist() == [0] * 6 + [1] * 4
    for index, name in ((3, "nv"), (8, "mel")):
        make(capsys, f"--seeds={100 + index}", f"--class={name}", "--trunc=0.6", "--noise-mode=random", "--outdir=out")
        assert Path(f"out/seed{100 + index:04d}.png").read_bytes() == found.read(found.names[index])


def test_set_takes_counts_of_classes(inside, capsys):
    out = make(capsys, "--zip=set.zip", "--classes=mel:2,nv:1")
    assert out == "set.zip: 3 images of 8x8 (nv: 1, mel: 2), seeds 0-2\n"
    assert ImageSet("set.zip").labels.tolist() == [0, 1, 1]
    assert make(capsys, "--zip=set.zip", "--classes=nv:1,mel:2") == "set.zip already holds these images\n"


@pytest.mark.parametrize(("flags", "is_noted"), [
    ("--seeds=1 --class=mel --outdir=out", True), ("--seeds=1 --class=all --grid=grid.png", True),
    ("--style-mix --rows=1 --cols=2 --class=mel --outdir=out", True), ("--zip=set.zip --classes=mel:1,nv:1", True),
    ("--seeds=1 --class=nv --outdir=out", False), ("--zip=set.zip --count=2", False)])
def test_classes_without_training_images_are_noted(inside, capsys, flags, is_noted):
    save_generator("some.safetensors", {"classes": ["nv", "mel"], "class_counts": [6, 0]})
    assert run(generate.main, ["--network=some.safetensors", *flags.split()]) == 0
    assert capsys.readouterr().err == ("the training set of this network has no images of class mel: images made for "
                                       "it may not show it\n" if is_noted else "")


def test_set_of_classes_without_names_has_their_numbers(inside, capsys):
    save_generator("numbers.safetensors", {}, c_dim=3)
    out = make(capsys, "--zip=set.zip", "--classes=0:1,2:2", network="numbers.safetensors")
    assert out == "set.zip: 3 images of 8x8 (0: 1, 1: 0, 2: 2), seeds 0-2\n"
    found = ImageSet("set.zip")
    assert (found.classes, found.labels.tolist()) == (None, [0, 2, 2])


def test_set_of_a_network_without_classes(inside, capsys):
    assert make(capsys, "--zip=set.zip", "--count=3", "--gpus=1", network="plain.safetensors") == (
        "set.zip: 3 images of 8x8, seeds 0-2\n")
    assert ImageSet("set.zip").labels is None


NETWORK = "a .safetensors of a run, or a .pkl of NVIDIA's code"


@pytest.mark.parametrize(("flags", "message"), [
    ([], "--seeds is missing; expected --seeds=0-9, --projected-w=FILE, --zip=FILE or --style-mix: see --help"),
    (["--seeds=0"], "--outdir is missing; expected a folder for the images, or --grid=FILE for only a sheet"),
    (["--seeds=0", "--grid"], "--outdir is missing; expected a folder for the images, or --grid=FILE for only a sheet"),
    (["--seeds=3-", "--outdir=o"], "--seeds has '3-'; expected numbers and ranges, such as 0,1,5-9"),
    (["--seeds=-1", "--outdir=o"], "--seeds has '-1'; expected numbers and ranges, such as 0,1,5-9"),
    (["--seeds=0", "--outdir=o"], "--class is missing, but this network is class-conditional; expected one of nv, "
                                  "mel, or a number from 0 to 1"),
    (["--seeds=0", "--outdir=o", "--class=2"], "--class names the class '2'; expected one of nv, mel, or a number "
                                               "from 0 to 1"),
    (["--seeds=0", "--outdir=o", "--class=-1"], "--class names the class '-1'; expected one of nv, mel, or a "
                                                "number from 0 to 1"),
    (["--seeds=0", "--outdir=o", "--class=me"], "--class names the class 'me' (did you mean mel?); expected one of nv, "
                                                "mel, or a number from 0 to 1"),
    (["--seeds=0", "--outdir=o", "--class=all"], "--class names 2 classes, but the files in --outdir are of one "
                                                 "class; expected one, or --grid=FILE without --outdir for a sheet of "
                                                 "several"),
    (["--seeds=0", "--outdir=o", "--class=nv", "--trunc=nan"], "--trunc is nan; expected a number, usually from 0 to "
                                                               "1, at most 1000"),
    (["--seeds=0", "--outdir=o", "--class=nv", "--trunc=1e39"], "--trunc is 1e+39; expected a number, usually from 0 "
                                                                "to 1, at most 1000"),
    (["--seeds=0", "--outdir=o", "--class=nv", "--batch=0"], "--batch is 0; expected at least 1"),
    (["--seeds=0", "--outdir=o", "--class=nv", "--gpus=2"], "--gpus is given, but only works with --zip; add that, or "
                                                            "leave --gpus out"),
    (["--seeds=0", "--outdir=o", "--class=nv", "--device=tpu"], "--device is tpu; expected auto, cpu, cuda, or a "
                                                                "single GPU such as cuda:1"),
    (["--seeds=0", "--outdir=o", "--class=nv", "--noise-mode=loud"], "Invalid value for '--noise-mode': 'loud' is not "
     "one of 'random', 'const', 'none'."),
    (["--seeds=0", "--outdir=o", "--rows=1"], "--rows is given, but only works with --style-mix; add that, or leave "
                                              "--rows out"),
    (["--seeds=0", "--outdir=o", "--projected-w=w.npz"], "--seeds is given with --projected-w; expected one of them"),
    (["--outdir=o", "--projected-w=w.npz", "--class=nv"], "--class is given with --projected-w; expected one of them"),
    (["--outdir=o", "--projected-w=w.npz", "--trunc=1"], "--trunc is given with --projected-w; expected one of them"),
    (["--seeds=0", "--outdir=net.safetensors/o", "--class=nv"], "--outdir is net.safetensors/o, but "
     "{cwd}/net.safetensors is not a folder; choose a new or existing folder"),
    (["--seeds=0", "--grid=sheet.jpg", "--class=nv"], "--grid is sheet.jpg; expected a name ending in .png"),
    (["--seeds=0", "--grid=no/sheet.png", "--class=nv"], "--grid is no/sheet.png, but the folder no does not "
                                                         "exist; create it first"),
    (["--seeds=0-999999", "--grid=sheet.png", "--class=all"],
     f"--grid would show 2000000 images of 8x8; expected at most {MOST_PIXELS // 64}: name fewer --seeds, or leave "
     "--grid out"),
    (["--zip=set.tar", "--count=3"], "--zip is set.tar; expected a name ending in .zip"),
    (["--zip=no/set.zip", "--count=3"], "--zip is no/set.zip, but the folder no does not exist; create it first"),
    (["--zip=set.zip", "--count=0"], "--count is 0; expected at least 1"),
    (["--zip=set.zip", "--classes=nv:1,mel:1", "--count=3"], "--count is 3, but --classes adds up to 2; expected the "
                                                             "same number: leave --count out"),
    (["--zip=set.zip", "--count=3", "--class=nv"], "--class is given with --zip; expected one of them (--classes sets "
                                                   "the number of images of each class)"),
    (["--zip=set.zip", "--count=3", "--outdir=o"], "--outdir is given with --zip; expected one of them"),
    (["--zip=set.zip", "--count=3", "--seeds=0-2"], "--seeds is 0-2; expected only the first seed with --zip, such as "
                                                    "--seeds=0: --count sets the number of images"),
    (["--count=3", "--seeds=0", "--outdir=o"], "--count is given, but only works with --zip; add that, or leave "
                                               "--count "
                                               "out"),
    (["--style-mix", "--rows=1", "--outdir=o", "--class=nv"], "--cols is missing; expected seeds for --style-mix, such "
                                                              "as --rows=85,100 --cols=55,821"),
    (["--style-mix", "--rows=1", "--cols=2", "--class=nv"], "--outdir is missing; expected a folder for the images"),
    (["--style-mix", "--rows=1", "--cols=2", "--class=nv", "--outdir=o", "--styles=0-9"],
     "--styles has 9; the largest layer of this network is 3"),
    (["--style-mix", "--rows=1", "--cols=2", "--class=all", "--outdir=o"], "--class names 2 classes; expected one "
                                                                           "with --style-mix"),
    (["--style-mix", "--rows=0-9999", "--cols=0-9999", "--class=nv", "--outdir=o"],
     f"grid.png would show {10001**2} images of 8x8; expected at most {MOST_PIXELS // 64}: name fewer --rows or "
     "--cols"),
])
def test_mistake_gives_one_line(inside, capsys, flags, message):
    assert refuse(capsys, *flags) == message.format(cwd=inside)


@pytest.mark.parametrize(("name", "content", "message"), [
    (None, None, "--network is missing; expected a network file, such as "
                 "--network=run/network-snapshot-001000.safetensors, or see --help"),
    ("gone.pkl", None, f"--network is gone.pkl, which does not exist; expected a network file: {NETWORK}"),
    (".", None, "--network is ., a folder without network-snapshot-*.safetensors; expected a network file (a "
                ".safetensors of a run, or a .pkl of NVIDIA's code), or the folder of a run"),
    ("text.pkl", b"hello, network", "--network: text.pkl is of an unknown kind (it starts with 68 65 6c 6c 6f 2c 20 "
     "6e); expected a network file (.safetensors or NVIDIA .pkl)"),
    ("set.zip", b"PK\x03\x04", "--network: set.zip is a zip archive (a data set, or a checkpoint of torch.save); "
     "expected a network file (.safetensors or NVIDIA .pkl)"),
])
def test_file_that_is_no_network_gives_one_line(inside, capsys, name, content, message):
    if content is not None:
        Path(name).write_bytes(content)
    assert refuse(capsys, "--seeds=0", "--outdir=o", network=name) == message


@pytest.mark.parametrize("flags", [["--seeds=0", "--outdir=o"], ["--zip=set.zip", "--count=3"],
                                   ["--zip=set.zip", "--count=3", "--gpus=2"]])
def test_cut_network_gives_one_line(inside, capsys, flags):
    content = Path("net.safetensors").read_bytes()
    Path("cut.safetensors").write_bytes(content[:-100])
    assert refuse(capsys, *flags, network="cut.safetensors").startswith(
        "--network: cut.safetensors cannot be read as a network snapshot: ")


def test_class_on_a_network_without_classes_gives_one_line(inside, capsys):
    assert refuse(capsys, "--seeds=0", "--outdir=o", "--class=0", network="plain.safetensors") == (
        "--class is 0, but this network was trained without classes; leave --class out")


@pytest.mark.parametrize("flags", [["--seeds=0", "--outdir=o"], ["--zip=set.zip", "--count=3"]])
def test_network_of_a_diverged_training_gives_one_line(inside, capsys, flags):
    G = generator(c_dim=0)
    torch.nn.init.constant_(G.synthesis.b8.conv1.weight, torch.nan)
    save_network("bad.safetensors", Networks(G=None, D=None, G_ema=G))
    assert refuse(capsys, *flags, network="bad.safetensors") == (
        "the network of --network makes images that are not finite, perhaps because its training diverged; expected a "
        "network that works: try an earlier snapshot")


def test_advice_against_a_diverged_network_names_the_option_of_the_program_or_none():
    G = generator(c_dim=0)
    torch.nn.init.constant_(G.synthesis.b8.conv1.weight, torch.nan)
    for flag, ending in (("--fp32", "an earlier snapshot, or --fp32"), (None, "an earlier snapshot")):
        images = ImageGenerator(G, SynthesisSettings(), batch=1, fp32_flag=flag)
        images.fp32 = False  # as on a GPU
        with pytest.raises(UserError, match=f"; expected a network that works: try {ending}$"):
            images.render(images.map_seeds([0], torch.zeros(1, 0)), [0])


def test_truncation_without_a_mean_gives_one_line(inside, capsys):
    G = generator(c_dim=0, mapping_kwargs={"num_layers": 2, "w_avg_beta": None})
    save_network("flat.safetensors", Networks(G=None, D=None, G_ema=G))
    assert refuse(capsys, "--seeds=0", "--outdir=o", "--trunc=0.5", network="flat.safetensors") == (
        "--trunc is 0.5, but this network has no mean style to truncate towards; leave --trunc out")
    make(capsys, "--seeds=0", "--outdir=o", network="flat.safetensors")


W = "expected an .npz file with an array w of shape [M, 4, 8], as projector.py writes it"


@pytest.mark.parametrize(("arrays", "message"), [
    (None, f"--projected-w=w.npz does not exist; {W}"),
    (b"", f"--projected-w=w.npz cannot be read as an npz file (No data left in file); {W}"),
    (b"\x80\x04N.", f"--projected-w=w.npz is not an npz file; {W}"),
    (b"text", f"--projected-w=w.npz is not an npz file; {W}"),
    (b"PK\x03\x04 and so on", f"--projected-w=w.npz cannot be read as an npz file (File is not a zip file); {W}"),
    ({"x": np.zeros(3)}, f"--projected-w=w.npz does not have an array w (it has x); {W}"),
    ({"w": np.zeros((1, 5, 8))}, "--projected-w=w.npz has w of shape [1, 5, 8]; expected [M, 4, 8] for this network"),
    ({"w": np.zeros((0, 4, 8))}, "--projected-w=w.npz has w of shape [0, 4, 8]; expected [M, 4, 8] for this network"),
    ({"w": np.full((1, 4, 8), np.nan)}, "--projected-w=w.npz has w of type float64 and values that are not finite "
                                        "numbers; expected finite numbers"),
    ({"w": np.full((1, 4, 8), "a")}, "--projected-w=w.npz has w of type <U1 and values that are not finite numbers; "
                                     "expected finite numbers"),
])
def test_styles_that_do_not_fit_give_one_line(inside, capsys, arrays, message):
    if isinstance(arrays, bytes):
        Path("w.npz").write_bytes(arrays)
    elif arrays is not None:
        np.savez("w.npz", **arrays)
    assert refuse(capsys, "--projected-w=w.npz", "--outdir=o") == message


def test_styles_in_a_single_array_or_a_pickle_give_one_line(inside, capsys):
    np.save("w.npy", np.zeros((1, 4, 8)))
    assert refuse(capsys, "--projected-w=w.npy", "--outdir=o") == f"--projected-w=w.npy is a single array; {W}"
    np.savez("w.npz", w=np.array([{}]))
    assert refuse(capsys, "--projected-w=w.npz", "--outdir=o") == (
        "--projected-w=w.npz cannot be read as an npz file (Object arrays cannot be loaded when allow_pickle=False); "
        f"{W}")


def test_several_processes_without_a_set_give_one_line(inside, capsys, monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert refuse(capsys, "--seeds=0", "--outdir=o", "--class=0") == (
        "2 processes were started; expected one: only --zip uses several")
    assert refuse(capsys, "--zip=set.zip", "--count=3", "--gpus=3") == (
        "--gpus is 3, but WORLD_SIZE (set by torchrun) is 2; expected the same number: leave --gpus out, or unset "
        "RANK and WORLD_SIZE to let --gpus=3 start 3 processes")


@pytest.mark.parametrize(("text", "number"), [
    ("runs/00000-*/network-snapshot-000008.safetensors", 8), ("runs/00000-*", 12), ("runs/00000-a", 12)])
def test_network_takes_a_pattern_or_a_run_and_says_the_file(text, number, inside, capsys):
    os.makedirs("runs/00000-a")
    for each in (8, 12):
        save_generator(f"runs/00000-a/network-snapshot-{each:06d}.safetensors", {**INFO, "kimg": each})
    path = f"runs/00000-a/network-snapshot-{number:06d}.safetensors"
    for flags in (["--zip=set.zip", "--count=2"], ["--seeds=0", "--class=0", "--outdir=out"],
                  ["--style-mix", "--rows=0", "--cols=1", "--class=0", "--outdir=mix"]):
        assert run(generate.main, [f"--network={text}", *flags]) == 0
        assert capsys.readouterr().err == f"--network: {path}\n"
    source = ImageSet("set.zip").source
    assert (source["network"], source["network_sha256"]) == (os.path.basename(path), sha256_of(path))


def test_network_that_matches_several_files_lists_them(inside, capsys):
    assert refuse(capsys, "--seeds=0", "--outdir=o", network="*.safetensors") == (
        "--network is *.safetensors, which matches 3 paths: gray.safetensors, net.safetensors, plain.safetensors; "
        "expected a pattern that matches one, a network file or the folder of a run")


def test_processes_that_opened_different_networks_are_refused(inside, monkeypatch):
    """A run's folder may get a newer network between the start of one process and the next."""
    network = open_network("net.safetensors", "cpu")
    processes = Processes(rank=1, count=2, device=torch.device("cpu"))
    require_same(network, processes)
    monkeypatch.setattr("generation.network.broadcast_object", lambda _: sha256_of("plain.safetensors"))  # of the first
    with pytest.raises(UserError, match=r"^--network is another file in process 1 \(net.safetensors\) than in the "
                                        r"first; expected the same file: repeat the command, or name the file itself$"):
        require_same(network, processes)


def test_group_of_one_with_another_gpus_gives_one_line(inside, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert refuse(capsys, "--zip=set.zip", "--count=3", "--gpus=4") == (
        "--gpus is 4, but WORLD_SIZE (set by torchrun) is 1; expected the same number: leave --gpus out, or unset "
        "RANK and WORLD_SIZE to let --gpus=4 start 4 processes")


@pytest.mark.parametrize(("batch", "advice"), [
    (4, "try --batch=2"), (1, "use --device=cpu, or a GPU with more memory")])
@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")])
def test_full_memory_gives_one_line(inside, capsys, monkeypatch, batch, advice, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(ImageGenerator, "_synthesize", fail)
    for flags in (["--seeds=0", "--outdir=o", "--class=nv"], ["--zip=set.zip", "--count=3"]):
        found = refuse(capsys, *flags, f"--batch={batch}", code=4)
        assert found == f"out of memory with --batch={batch}; {advice}"


def test_help_names_every_flag(capsys):
    assert run(generate.main, ["--help"]) == 0
    text = capsys.readouterr().out
    for option in generate.main.params:
        assert option.opts[0] in text
