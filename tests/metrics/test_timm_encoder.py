"""Encoders of timm: features and transform are timm's own, a file loads completely or not at all, without a network."""

import importlib.util
import json
import os
import re
import socket
from argparse import Namespace

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from dnnlib.cli import UserError, run
from dnnlib.files import sha256_of
from imagesets.phantoms.make import render_phantom
from metrics.command import make_command
from metrics.detectors import timm_encoder
from metrics.detectors.registry import open_detector, weights_at_hand
from metrics.names import choose_metrics, needed_detectors
from tests.helpers.make_sets import make_set

NAME = "timm:test_vit.r160_in1k"
AS_IN = "as in model.safetensors of timm/test_vit.r160_in1k: does the file belong to another network?"
TRANSFORM = "x / 255, (x - [0.5, 0.5, 0.5]) / [0.5, 0.5, 0.5] (timm " + timm.__version__


@pytest.fixture(autouse=True)
def without_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def network(name=NAME, seed=0):
    """Return timm's network with its classifier and random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return timm.create_model(name.removeprefix("timm:")).eval()


@pytest.fixture(scope="module")
def tensors():
    return network().state_dict()


@pytest.fixture(scope="module")
def file(tmp_path_factory, tensors):
    """A file as timm publishes them, with the tensors of the classifier."""
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def detector(file):
    return open_detector(NAME, device="cpu", weights=file)


def phantoms(count, size=48):
    """Return uint8 [count, 3, size, size]."""
    return torch.stack([torch.from_numpy(render_phantom(5, index, resolution=size)[0]).permute(2, 0, 1)
                        for index in range(count)])


def as_timm_sees(pixels, **config):
    """Return the results of timm's transform for images opened by Pillow."""
    transform = timm.data.create_transform(**config)
    return torch.stack([transform(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in pixels])


def without_head(tensors):
    return {name: value for name, value in tensors.items() if not name.startswith("head.")}


def prefixed(prefix, tensors):
    return {prefix + name: value for name, value in tensors.items()}


@pytest.mark.parametrize("name", ["timm:test_vit.r160_in1k", "timm:test_convnext", "timm:test_resnet"])
@pytest.mark.parametrize("size", [48, 168])
def test_features_are_those_of_timm(tmp_path, name, size):
    theirs = network(name)
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    ours = open_detector(name, device="cpu", weights=tmp_path / "model.safetensors")
    pixels = phantoms(3, size)
    with torch.no_grad():
        x = as_timm_sees(pixels, **timm.data.resolve_model_data_config(theirs))
        expected = theirs.forward_head(theirs.forward_features(x), pre_logits=True)
    features = ours(pixels)
    assert features.dtype == torch.float32
    assert features.shape == expected.shape == (3, ours.num_features)
    # Images of 168 pixels are only cropped: what differs is the order of sums (at most 3e-7 seen). Of resized pixels,
    # some differ by one of 255 levels (at most 8e-4 seen).
    assert (features - expected).abs().max() <= (1e-5 if size == 168 else 3e-3) * expected.abs().max()
    assert (expected[0] - expected[1]).abs().max() > 1e-2 * expected.abs().max()


@pytest.mark.parametrize(("config", "description"), [
    ({}, "shorter side resized to 168 (bicubic, antialiased), center crop 160x160"),
    ({"interpolation": "bilinear"}, "shorter side resized to 168 (bilinear, antialiased), center crop 160x160"),
    ({"crop_pct": 1.0, "crop_mode": "squash"}, "resized to 160x160 (bicubic, antialiased), center crop 160x160"),
    ({"crop_pct": 0.8, "crop_mode": "border"},
     "resized to fit into 200x200 (bicubic, antialiased), center crop 160x160"),
])
def test_transform_is_that_of_timms_data_configuration(monkeypatch, file, config, description):
    whole = timm.data.resolve_model_data_config(network()) | config
    monkeypatch.setattr(timm.data, "resolve_model_data_config", lambda network: whole)
    ours = open_detector(NAME, device="cpu", weights=file)
    assert ours.preprocessing == f"{description}, {TRANSFORM})"
    noise = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    for pixels in (phantoms(2, 32), phantoms(2, 300), noise):
        theirs = as_timm_sees(pixels, **whole) * 127.5 + 127.5
        difference = (ours.resize_and_crop(pixels) - theirs).abs()
        # Pillow rounds its filters, so that each of the two passes may round another way: up to 2 of 255 levels, and
        # 0.066 on average. Without rounding and clamping between the passes, these are 23 and 0.27.
        assert difference.max() <= 2.01  # 0.01 for float32
        assert difference.mean() < 0.1


def test_transform_of_images_that_are_not_square_is_that_of_timm(detector):
    pixels = phantoms(2, 64)[:, :, 8:48]  # 40 x 64
    theirs = as_timm_sees(pixels, **timm.data.resolve_model_data_config(network())) * 127.5 + 127.5
    assert (detector.resize_and_crop(pixels) - theirs).abs().max() <= 2.01  # as above


def test_detector_says_what_it_is(detector, file):
    assert (detector.name, detector.num_features, detector.has_classes) == (NAME, 64, False)
    assert detector.weights_sha256 == sha256_of(file)
    with pytest.raises(ValueError) as caught:
        detector.classify(phantoms(1))
    assert str(caught.value) == f"{NAME} gives no class probabilities; expected a detector that does: inception-v3"


def test_networks_that_do_not_pool_their_outputs_are_refused(file):
    unpooled = open_detector(NAME, device="cpu", weights=file)
    unpooled.network.global_pool = ""
    with pytest.raises(UserError) as caught:
        unpooled(phantoms(2))
    assert str(caught.value) == (f"{NAME} turns 2 images into [2, 101, 64]; expected [2, 64]: choose an encoder that "
                                 "pools its outputs")


def test_features_do_not_depend_on_the_batch_and_need_no_gradients(detector):
    pixels = phantoms(5)
    together, alone = detector(pixels), torch.cat([detector(pixel[None]) for pixel in pixels])
    assert (together - alone).abs().max() <= 1e-5 * together.abs().max()  # the order of sums in float32
    assert not together.requires_grad
    assert not any(module.training for module in detector.modules())
    assert not any(parameter.requires_grad for parameter in detector.parameters())


def test_opening_draws_no_random_numbers_and_prints_nothing(file, capfd, recwarn):
    before = torch.get_rng_state()
    open_detector(NAME, device="cpu", weights=file)
    assert torch.equal(torch.get_rng_state(), before)
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list


LAYOUTS = {
    "without a classifier": without_head,
    "another number of classes": lambda own: own | {"head.weight": torch.ones(7, 64), "head.bias": torch.ones(7)},
    "DINOv2": lambda own: without_head(own) | {"mask_token": torch.ones(1, 64)},
    "DINOv2 in training": lambda own: {
        "student": prefixed("backbone.", other(own)), "epoch": 3, "args": Namespace(lr=0.1),
        "teacher": prefixed("backbone.", without_head(own)) | {"dino_head.mlp.0.weight": torch.ones(2, 2)}},
    "MAE's programs": lambda own: {"model": own, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}, "epoch": 9},
    "parallel": lambda own: {"state_dict": prefixed("module.", own), "best": 0.5},
    "compiled": lambda own: {"state_dict": prefixed("_orig_mod.", own)},
    "timm with averages": lambda own: {"state_dict": other(own), "state_dict_ema": own, "arch": "test_vit"},
    "Lightning": lambda own: {"state_dict": prefixed("model.encoder.", without_head(own))
                              | {"criterion.weight": torch.ones(7)}},
    "nested twice": lambda own: {"model": {"state_dict": prefixed("module.backbone.", own)}},
}


def other(tensors):
    return {name: value + 1 for name, value in tensors.items()}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_checkpoints_of_several_programs_give_the_same_features(tmp_path, tensors, detector, layout):
    torch.save(layout(tensors), tmp_path / "checkpoint.pth")
    ours = open_detector(NAME, device="cpu", weights=tmp_path / "checkpoint.pth")
    assert torch.equal(ours(phantoms(2)), detector(phantoms(2)))
    assert ours.preprocessing == detector.preprocessing


def test_half_precision_files_are_computed_in_float32(tmp_path, tensors):
    halves = {name: value.half() for name, value in tensors.items()}
    save_file(halves, tmp_path / "half.safetensors")
    torch.save({name: value.float() for name, value in halves.items()}, tmp_path / "float.pth")
    half, whole = (open_detector(NAME, device="cpu", weights=tmp_path / name)
                   for name in ("half.safetensors", "float.pth"))
    assert torch.equal(half(phantoms(2)), whole(phantoms(2)))


def test_clip_towers_are_read_from_openclips_files_beside_the_tower_of_texts(tmp_path):
    """Names as in OpenAI's and OpenCLIP's network: the projection is the classifier of timm, and left out."""
    name = "timm:vit_xsmall_patch16_clip_224"
    theirs = network(name)
    renamed = {"visual.class_embedding": theirs.cls_token[0, 0], "visual.positional_embedding": theirs.pos_embed[0],
               "visual.proj": theirs.head.weight.T, "visual.conv1.weight": theirs.patch_embed.proj.weight,
               "positional_embedding": torch.ones(77, 256), "logit_scale": torch.ones(()),
               "transformer.resblocks.0.ln_1.weight": torch.ones(256), "token_embedding.weight": torch.ones(9, 256)}
    for key, value in theirs.state_dict().items():
        block = re.fullmatch(r"blocks\.(\d+)\.(.*)", key)
        if block:
            inner = block[2].replace("norm", "ln_").replace("attn.qkv.", "attn.in_proj_").replace("proj.", "out_proj.")
            inner = inner.replace("mlp.fc1", "mlp.c_fc").replace("mlp.fc2", "mlp.c_proj")
            renamed[f"visual.transformer.resblocks.{block[1]}.{inner}"] = value
        elif key.startswith("norm"):
            renamed["visual." + key.replace("norm_pre", "ln_pre").replace("norm.", "ln_post.")] = value
    renamed = {key: value.detach().contiguous() for key, value in renamed.items()}
    save_file(renamed, tmp_path / "open_clip_model.safetensors")
    torch.save({"epoch": 3, "state_dict": prefixed("module.", renamed)}, tmp_path / "epoch_3.pt")
    pixels = phantoms(2, 248)  # the size to which timm resizes for this network
    with torch.no_grad():
        x = as_timm_sees(pixels, **timm.data.resolve_model_data_config(theirs))
        expected = theirs.forward_head(theirs.forward_features(x), pre_logits=True)
    for file in ("open_clip_model.safetensors", "epoch_3.pt"):
        features = open_detector(name, device="cpu", weights=tmp_path / file)(pixels)
        assert features.shape == (2, 256)
        assert (features - expected).abs().max() <= 1e-5 * expected.abs().max()  # the order of sums in float32


def test_positions_of_another_image_size_are_resampled_and_the_record_says_so(tmp_path, tensors):
    """Positions that are the same everywhere stay so when they are resampled."""
    first, everywhere = tensors["pos_embed"][:, :1], tensors["pos_embed"][:, 1:2]
    detectors = []
    for count in (100, 25):
        positions = torch.cat([first, everywhere.expand(1, count, 64)], dim=1)
        torch.save({**tensors, "pos_embed": positions}, tmp_path / f"{count}.pth")
        detectors.append(open_detector(NAME, device="cpu", weights=tmp_path / f"{count}.pth"))
    features, resampled = (each(phantoms(2)) for each in detectors)
    assert (features - resampled).abs().max() <= 1e-5 * features.abs().max()  # resampling rounds
    assert detectors[0].preprocessing.endswith(f"{TRANSFORM})")
    assert detectors[1].preprocessing.endswith(f"{TRANSFORM}; positions resampled from another image size)")


@pytest.mark.parametrize(("changes", "message"), [
    ({"norm.bias": None}, f" has no tensor norm.bias; expected one of shape [64], {AS_IN}"),
    ({"ls1.gamma": torch.ones(64)}, f" has a tensor ls1.gamma; expected no tensor of that name, {AS_IN}"),
    ({"norm.bias": torch.ones(65)}, f": norm.bias is [65]; expected [64], {AS_IN}"),
    ({"norm.bias": torch.full((64,), torch.inf)},
     f": norm.bias has values that are not finite; expected none, {AS_IN}"),
    ({"norm.bias": "a"}, f": norm.bias is not a dense floating point tensor; expected one of shape [64], {AS_IN}"),
    ({"patch_embed.proj.weight": torch.ones(64, 3, 8, 8)},
     " has no tensor [64, 3, 16, 16] for patch_embed.proj.weight; expected one, as in model.safetensors of "
     "timm/test_vit.r160_in1k: does the file belong to a network with patches of another size?"),
])
def test_files_of_another_network_are_refused_and_the_tensor_is_named(tmp_path, tensors, changes, message):
    path = tmp_path / "other.pth"
    torch.save({"model": {name: value for name, value in (tensors | changes).items() if value is not None}}, path)
    with pytest.raises(UserError) as caught:
        open_detector(NAME, device="cpu", weights=path)
    assert str(caught.value) == f"{path}{message}"


@pytest.mark.parametrize("content", [{}, {"model": {}}, {"teacher": 3}, {1: torch.ones(2)}, {"weight": torch.ones(3)},
                                     {"pos_embed": torch.ones(5)}, [torch.ones(3)]])
def test_other_files_are_refused_in_one_line(tmp_path, content):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"^\S+other\.pth [^\n]+expected [^\n]+timm/test_vit\.r160_in1k[^\n]*$"):
        open_detector(NAME, device="cpu", weights=tmp_path / "other.pth")


def test_dicts_that_contain_themselves_are_refused(tmp_path):
    content = {}
    content["model"] = content
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"has no tensor cls_token"):
        open_detector(NAME, device="cpu", weights=tmp_path / "other.pth")


def test_code_in_a_file_is_not_run(tmp_path, tensors):
    class Runs:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"model": tensors, "args": Runs()}, tmp_path / "checkpoint.pth")
    with pytest.raises(UserError, match=r"contains code \(UnpicklingError\); no code was run: expected model\.safe"):
        open_detector(NAME, device="cpu", weights=tmp_path / "checkpoint.pth")
    assert not (tmp_path / "ran").exists()


def test_damaged_safetensors_are_refused_in_one_line(tmp_path, file):
    for length in (0, 7, 9, 1000, file.stat().st_size - 1):
        (tmp_path / "cut").write_bytes(file.read_bytes()[:length])
        with pytest.raises(UserError, match=r"^\S+cut is damaged, is not a file of weights, or contains code [^\n]+$"):
            open_detector(NAME, device="cpu", weights=tmp_path / "cut")


@pytest.mark.parametrize(("name", "message"), [
    ("timm:test_vitt", f"the detector is timm:test_vitt, which timm {timm.__version__} does not have; expected a name "
                       "such as timm:test_vit"),
    ("timm:test_vit.of_mine", f"the detector is timm:test_vit.of_mine, which timm {timm.__version__} does not have; "
                              "expected a name such as timm:"),
    ("timm:0", f"the detector is timm:0, which timm {timm.__version__} does not have; expected a name such as "
               "timm:vit_small_patch14_dinov2.lvd142m: list them with timm.list_models()"),
    *((name, f"the detector is {name}; expected the name of an architecture, such as "
             "timm:vit_small_patch14_dinov2.lvd142m, and its weights in --detector-weights: nothing is downloaded")
      for name in ("timm:", "timm:hf-hub:timm/test_vit.r160_in1k", "timm:local-dir:weights", "timm:org/model")),
])
def test_names_that_timm_does_not_have_are_refused(file, name, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        open_detector(name, device="cpu", weights=file)


def test_without_timm_the_message_says_how_to_install_it(monkeypatch, file):
    find = importlib.util.find_spec
    monkeypatch.setattr(timm_encoder, "find_spec", lambda name: None if name == "timm" else find(name))
    with pytest.raises(UserError) as caught:
        open_detector(NAME, device="cpu", weights=file)
    assert str(caught.value) == f'{NAME} needs the package timm, which is not installed: pip install -e ".[timm]"'


@pytest.mark.parametrize("use", [lambda: open_detector(NAME, device="cpu"),
                                 lambda: needed_detectors("kid1k_full", NAME, []),
                                 lambda: choose_metrics(None, NAME, [])])
def test_without_weights_the_message_says_where_they_come_from(use):
    with pytest.raises(UserError) as caught:
        use()
    assert str(caught.value) == (
        f"{NAME} needs --detector-weights=FILE, since nothing is downloaded for it; expected a checkpoint of this "
        "architecture, such as the file model.safetensors on its page under https://huggingface.co/timm")


@pytest.mark.parametrize(("file", "what"), [("no.pth", "does not exist"), (".", "is a folder")])
def test_missing_files_are_refused(tmp_path, file, what):
    with pytest.raises(UserError) as caught:
        open_detector(NAME, device="cpu", weights=tmp_path / file)
    assert str(caught.value) == (f"the file of weights {tmp_path / file} {what}; expected model.safetensors of "
                                 "timm/test_vit.r160_in1k")


def test_metrics_take_the_detector_by_name_and_its_file_alone_or_named():
    assert needed_detectors("fid1k_full,pr1k3_full", NAME, ["a=b.pth"]) == {NAME: "a=b.pth"}
    assert needed_detectors("kid1k,ppl2_wend", NAME, [f"{NAME}=w.pth"]) == {NAME: "w.pth", "lpips-vgg16": None}
    with pytest.raises(UserError, match=rf"^--detector-weights is w\.pth, and {NAME} and lpips-vgg16 are needed; "):
        needed_detectors("kid1k,ppl2_wend", NAME, ["w.pth"])
    with pytest.raises(UserError, match=rf"^metric is10k needs probabilities of classes, which {NAME} does not give; "):
        needed_detectors("is10k", NAME, ["w.pth"])


def test_training_keeps_its_usual_metric_with_an_encoder():
    assert choose_metrics(None, NAME, ["w.pth"]) == (("fid50k_full",), None, None)
    assert weights_at_hand(NAME, "w.pth")


def test_calc_metrics_measures_with_an_encoder(tmp_path, monkeypatch, file, detector, capsys):
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "cache"))
    data, fakes = (make_set(tmp_path / f"{start}.zip", size=16, images=range(start, start + 20)) for start in (0, 100))
    command = [f"--generated={fakes}", f"--data={data}", "--metrics=kid_full,fid_full", f"--detector={NAME}",
               "--device=cpu", "--verbose=0"]
    records = []
    for _ in range(2):  # the second time from the cache
        assert run(make_command(), [*command, f"--detector-weights={file}"]) == 0
        records.append([json.loads(line) for line in capsys.readouterr().out.splitlines()])
    assert [record["results"] for record in records[0]] == [record["results"] for record in records[1]]
    assert len(list((tmp_path / "cache").rglob("*.npz"))) == 2  # of the reals and of the fakes
    assert {(record["detector"], record["detector_sha256"], record["preprocessing"]) for record in records[0]} == {
        (NAME, detector.weights_sha256, detector.preprocessing)}
    assert run(make_command(), command) == 2
    assert run(make_command(), [*command, f"--detector-weights={data}"]) == 2
    assert [line.split("; ")[0] for line in capsys.readouterr().err.splitlines()] == [
        f"error: {NAME} needs --detector-weights=FILE, since nothing is downloaded for it",
        f"error: {data} is damaged, is not a file of weights, or contains code (RuntimeError)"]
