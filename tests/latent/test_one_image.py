"""projector.py --target: the files and numbers of one image."""

import hashlib
import os
import shutil
from pathlib import Path

import av
import numpy as np
import PIL.Image
import pytest
import torch

import generate
from dnnlib.cli import run
from generation.image_generator import ImageGenerator, SynthesisSettings
from latent.projection import COLUMNS, measure_styles
from latent.targets import read_target
from metrics.detectors.similarity import PixelDistance
from tests.helpers.generator_files import lively_generator, pixels_in, save_generator
from tests.helpers.image_files import encode, lesion_like, png_16_bit
from tests.helpers.make_sets import pixels_of, png
from tests.helpers.projector_commands import (
    INFO,
    STEPS,
    as_image,
    contents,
    distances_between,
    distances_in,
    names_in,
    project,
    record_in,
    styles_in,
    working_in,
)
from training.snapshot import Networks, load_network, save_network

pytestmark = pytest.mark.usefixtures("one_thread")  # as programs that tests start

FILES = ["proj.mp4", "proj.png", "projected_w.npz", "projection.json", "target.png"]
TARGET = ("--target=target.png", "--class=mel", "--outdir=out")
QUICK = ("--target=target.png", "--outdir=out", "--save-video=0")


@pytest.fixture
def inside(tmp_path, monkeypatch):
    with working_in(tmp_path, monkeypatch):
        Path("target.png").write_bytes(png(pixels_of(3)))
        yield


def made_by_generate(styles, network="net.safetensors"):
    """Return the file that generate.py makes of styles."""
    assert run(generate.main, [f"--network={network}", f"--projected-w={styles}", "--outdir=again"]) == 0
    return Path("again/proj00.png").read_bytes()


def frames_in(path):
    with av.open(os.fspath(path)) as video:
        return [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]


def mean_image(network, label):
    """Return what a network shows at the mean style of a class: uint8 [C, R, R]."""
    G = load_network(network).G_ema
    mean = measure_styles(G, torch.tensor(label)).mean
    return ImageGenerator(G, SynthesisSettings(), batch=1).render(mean.expand(1, G.num_ws, -1), [0])[0]


def near(values):
    return {name: pytest.approx(value, rel=1e-5) for name, value in values.items()}


def test_target_files_are_those_of_the_original(inside, capsys):
    out = project(capsys, *TARGET)
    assert names_in("out") == FILES
    assert np.array_equal(pixels_in("out/target.png"), pixels_of(3))
    with np.load("out/projected_w.npz", allow_pickle=False) as arrays:
        assert arrays.files == ["w"]
        assert (arrays["w"].dtype, arrays["w"].shape) == (np.float32, (1, 4, 8))
    assert Path("out/proj.png").read_bytes() == made_by_generate("out/projected_w.npz")
    record = record_in("out")
    end, start = record["distances"], record["distances_of_start"]
    assert out == (f"out/proj.png: class mel, pixels distance {end['perceptual']:.4g} ({start['perceptual']:.4g} at "
                   f"the start), pixel L2 {end['pixel_l2']:.3g} of 255, PSNR {end['psnr']:.1f} dB, feature cosine "
                   f"{end['feature_cosine']:.3f}\n")


def test_target_video_shows_each_step_beside_the_target(inside, capsys):
    save_generator("net.safetensors", INFO, img_resolution=16)
    project(capsys, *TARGET, "--num-steps=7")
    frames = frames_in("out/proj.mp4")
    assert [frame.shape for frame in frames] == [(256, 512, 3)] * 7
    for name, half in (("target.png", frames[-1][:, :256]), ("proj.png", frames[-1][:, 256:])):
        expected = pixels_in(f"out/{name}").repeat(16, axis=0).repeat(16, axis=1)
        assert np.abs(half.astype(int) - expected).mean() < 12
    assert np.abs(frames[0].astype(int) - frames[-1]).mean() > 1


@pytest.mark.parametrize(("network", "flags", "name", "label", "kimg"), [
    ("net.safetensors", ["--class=mel"], "mel", [0.0, 1.0], 4.5), ("plain.safetensors", [], None, [], None)])
def test_record_says_what_was_done_and_what_came_of_it(inside, capsys, network, flags, name, label, kimg):
    project(capsys, *QUICK, *flags, "--seed=7", network=network)
    target = as_image(pixels_of(3))
    assert record_in("out") == {
        "network": network, "network_sha256": hashlib.sha256(Path(network).read_bytes()).hexdigest(),
        "network_kimg": kimg, "space": "w", "num_steps": STEPS, "seed": 7, "detector": "pixels",
        "detector_weights_sha256": "none", "detector_preprocessing": PixelDistance.preprocessing,
        "transform": "center-crop", "resize_filter": "lanczos", "exact": False, "batch": 1, "device": "cpu",
        "operators": "cpp", "target": "target.png", "target_sha256": hashlib.sha256(target.numpy()).hexdigest(),
        "class": name,
        "distances": near(distances_in("out")),
        "distances_of_start": near(distances_between(target, mean_image(network, label)))}


def test_target_of_pixels_that_the_network_shows_has_null_for_its_psnr(inside, capsys):
    G = lively_generator(c_dim=0)
    for name, parameter in G.synthesis.named_parameters():
        if "torgb" in name:
            torch.nn.init.zeros_(parameter)  # one color, whatever the style
    save_network("even.safetensors", Networks(G=None, D=None, G_ema=G, config={"info": {}}))
    color = ImageGenerator(G, SynthesisSettings(), batch=1).render(torch.zeros(1, G.num_ws, G.w_dim), [0])[0]
    Path("target.png").write_bytes(png(color.permute(1, 2, 0).numpy()))
    assert " (0 at the start), pixel L2 0 of 255, equal pixels, " in project(capsys, *QUICK, network="even.safetensors")
    assert record_in("out")["distances"]["psnr"] is None


def test_target_without_a_video_is_the_same_without_it(inside, capsys):
    project(capsys, *TARGET)
    expected = contents("out")
    del expected["proj.mp4"]
    project(capsys, *TARGET, "--save-video=0", "--outdir=out2")
    assert contents("out2") == expected


def test_class_is_named_or_numbered(inside, capsys):
    found = {}
    for name in ("mel", "1", "nv", "0"):
        project(capsys, *QUICK, f"--class={name}", "--outdir=out" + name)
        found[name] = contents("out" + name)
        assert record_in("out" + name)["class"] == {"1": "mel", "0": "nv"}.get(name, name)
    assert found["mel"] == found["1"]
    assert found["nv"] == found["0"]
    assert found["nv"]["projected_w.npz"] != found["mel"]["projected_w.npz"]


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize(("target", "nearest"), [(6, "nv"), (5, "mel")])
def test_class_auto_keeps_the_nearest(inside, capsys, target, nearest, batch):
    Path("target.png").write_bytes(png(pixels_of(target)))
    alone = {}
    for name in INFO["classes"]:
        project(capsys, *QUICK, f"--class={name}", f"--batch={batch}", f"--outdir={name}")
        alone[name] = contents(name) | record_in(name)
    out = project(capsys, *QUICK, "--class=auto", f"--batch={batch}")
    assert out.startswith(f"out/proj.png: class {nearest}, ")
    record = record_in("out")
    assert record.pop("perceptual_by_class") == {name: files["distances"]["perceptual"] for name, files in
                                                 alone.items()}
    found = contents("out") | record
    del found["projection.json"], alone[nearest]["projection.json"]
    assert found == alone[nearest]
    assert min(alone, key=lambda name: alone[name]["distances"]["perceptual"]) == nearest


def test_class_auto_of_a_network_with_one_class_tries_that(inside, capsys):
    save_generator("one.safetensors", {"classes": ["nv"]}, c_dim=1)
    assert project(capsys, *QUICK, "--class=auto", network="one.safetensors").startswith("out/proj.png: class nv, ")
    assert "perceptual_by_class" not in record_in("out")


def test_gray_network_writes_gray_files(inside, capsys):
    out = project(capsys, "--target=target.png", "--outdir=out", network="gray.safetensors")
    assert out.startswith("out/proj.png: pixels distance ")
    assert pixels_in("out/target.png").shape == pixels_in("out/proj.png").shape == (8, 8)
    assert Path("out/proj.png").read_bytes() == made_by_generate("out/projected_w.npz", "gray.safetensors")
    assert record_in("out")["distances"] == near(distances_in("out"))
    assert len(frames_in("out/proj.mp4")) == STEPS


PHOTO = lesion_like(100, 80)
PICTURES = {
    "photo.jpg": encode(PHOTO, "JPEG"), "clear.png": encode(PIL.Image.fromarray(PHOTO).convert("RGBA")),
    "gray.tif": encode(PIL.Image.fromarray(PHOTO).convert("L"), "TIFF"),
    "deep.png": png_16_bit(np.random.default_rng(0).integers(0, 65536, (9, 12, 3)))}


@pytest.mark.parametrize("network", ["plain.safetensors", "gray.safetensors"])
@pytest.mark.parametrize("name", PICTURES)
def test_target_of_any_kind_becomes_an_image_of_the_network(inside, capsys, name, network):
    Path(name).write_bytes(PICTURES[name])
    project(capsys, *QUICK, f"--target={name}", "--num-steps=1", network=network)
    assert torch.equal(as_image(pixels_in("out/target.png")), read_target(name, load_network(network).G_ema))
    assert record_in("out")["target"] == name


def test_target_is_read_as_the_options_say(inside, capsys):
    Path("photo.jpg").write_bytes(encode(lesion_like(640, 400), "JPEG"))
    G, seen = load_network("plain.safetensors").G_ema, []
    for flags, options in (
            ([], {}), (["--transform=none"], {"transform": "none"}),
            (["--transform=none", "--resize-filter=box"], {"transform": "none", "resize_filter": "box"}),
            (["--transform=none", "--exact"], {"transform": "none", "exact": True})):
        project(capsys, *QUICK, "--target=photo.jpg", "--num-steps=1", *flags, network="plain.safetensors")
        seen.append(Path("out/target.png").read_bytes())
        assert torch.equal(as_image(pixels_in("out/target.png")), read_target("photo.jpg", G, **options))
    assert len(set(seen)) == len(seen)


def save_calm_network(path):
    """Write a network whose images follow from styles, hardly from noise, as those of trained ones."""
    G = lively_generator(img_resolution=16, synthesis_kwargs={"channel_base": 128, "channel_max": 8})
    for name, parameter in G.named_parameters():
        if name.endswith("noise_strength"):
            torch.nn.init.constant_(parameter, 0.02)
    save_network(path, Networks(G=None, D=None, G_ema=G, config={"info": INFO}))


def test_target_that_the_network_made_is_come_near_to(inside, capsys):
    save_calm_network("net.safetensors")
    assert run(generate.main, ["--network=net.safetensors", "--seeds=4-6", "--class=nv", "--outdir=made"]) == 0
    capsys.readouterr()
    for seed in range(4, 7):
        project(capsys, *QUICK, f"--target=made/seed000{seed}.png", "--class=nv", "--num-steps=60")
        record = record_in("out")
        assert record["distances"]["perceptual"] < 0.5 * record["distances_of_start"]["perceptual"]
        assert record["distances"]["pixel_l2"] < 50


def test_space_says_whether_layers_have_styles_of_their_own(inside, capsys):
    project(capsys, *TARGET)
    assert (styles_in("out", "projected_w.npz") == styles_in("out", "projected_w.npz")[:, :1]).all()
    project(capsys, *TARGET, "--space=w+", "--outdir=plus")
    w = styles_in("plus", "projected_w.npz")
    assert (w.dtype, w.shape) == (np.float32, (1, 4, 8))
    assert all((w[0, first] != w[0, second]).any() for first in range(4) for second in range(first))
    assert record_in("plus")["space"] == "w+"
    assert names_in("plus") == FILES
    assert Path("plus/proj.png").read_bytes() == made_by_generate("plus/projected_w.npz")


def test_seed_decides_and_defaults_to_that_of_the_original(inside, capsys):
    found = []
    for number, flags in enumerate([[], ["--seed=303"], ["--seed=304"]]):
        project(capsys, *QUICK, "--class=nv", *flags, f"--outdir=out{number}")
        found.append(styles_in(f"out{number}", "projected_w.npz"))
    assert np.array_equal(found[0], found[1])
    assert not np.array_equal(found[0], found[2])


def test_pivotal_tuning_adds_a_network_that_shows_the_target_better(inside, capsys):
    save_calm_network("net.safetensors")
    project(capsys, *TARGET)
    plain, record = contents("out"), record_in("out")
    out = project(capsys, *TARGET, "--pti-steps=12", "--outdir=tuned")
    found = contents("tuned")
    assert names_in("tuned") == sorted([*FILES, "network-pti.safetensors", "proj-pti.png"])
    assert found["proj-pti.png"] == made_by_generate("tuned/projected_w.npz", "tuned/network-pti.safetensors")
    assert load_network("tuned/network-pti.safetensors").config["info"]["classes"] == ["nv", "mel"]
    tuned = record_in("tuned").pop("pivotal_tuning")
    assert tuned == {"num_steps": 12, **near(distances_in("tuned", "proj-pti.png"))}
    assert tuned["perceptual"] < record["distances"]["perceptual"]
    assert {**record, "pivotal_tuning": tuned} == record_in("tuned")
    assert all(found[name] == plain[name] for name in FILES if name != "projection.json")
    assert out.endswith(f"; tuned: {tuned['perceptual']:.4g}, pixel L2 {tuned['pixel_l2']:.3g} of 255, PSNR "
                        f"{tuned['psnr']:.1f} dB, feature cosine {tuned['feature_cosine']:.3f}\n")


def test_target_files_replace_all_of_an_earlier_command_and_leave_others(inside, capsys):
    project(capsys, *QUICK, "--class=mel", "--outdir=expected")
    project(capsys, *TARGET, "--class=nv", "--pti-steps=1")
    Path("out/notes.txt").write_text("mine")
    project(capsys, *QUICK, "--class=mel")
    assert contents("out") == contents("expected") | {"notes.txt": b"mine"}


def test_network_of_the_original_is_projected_with(inside, capsys):
    shutil.copy(Path(__file__).parent.parent / "data" / "sample_32_c2.stripped.pkl", "sample.pkl")
    out = project(capsys, *QUICK, "--class=1", "--num-steps=2", network="sample.pkl")
    assert out.startswith("out/proj.png: class 1, pixels distance ")
    assert Path("out/proj.png").read_bytes() == made_by_generate("out/projected_w.npz", "sample.pkl")
    assert set(record_in("out")["distances"]) == set(COLUMNS)
