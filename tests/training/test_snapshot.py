"""training.snapshot: saved networks load bit for bit; other files are rejected with one line."""
import json
import os
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from tests.helpers import nvidia_pickle_writer as writer
from tests.helpers.tiny_networks import DISCRIMINATOR, GENERATOR, discriminator, generator
from training.snapshot import FORMAT_NAME, FORMAT_VERSION, Networks, load_network, save_network

DATA = Path(__file__).parent.parent / "data"
SAMPLE = DATA / "sample_32_c2.stripped.pkl"
ROLES = ("G", "D", "G_ema")


def small_networks(**config):
    return Networks(G=generator(1), D=discriminator(2), G_ema=generator(3), config=config)


def bits(tensor):
    return tensor.detach().contiguous().view(torch.int32 if tensor.dtype == torch.float32 else torch.int64)


def assert_same_networks(first, second):
    for role in ROLES:
        a, b = getattr(first, role), getattr(second, role)
        assert type(a) is type(b)
        if a is not None:
            assert a.init_kwargs == b.init_kwargs
            assert list(a.state_dict()) == list(b.state_dict())
            assert [name for name, _ in a.named_parameters()] == [name for name, _ in b.named_parameters()]
            for name, tensor in a.state_dict().items():
                assert tensor.dtype == b.state_dict()[name].dtype
                assert torch.equal(bits(tensor), bits(b.state_dict()[name])), name


def refused(path):
    with pytest.raises(ValueError) as caught:
        load_network(path)
    message = str(caught.value)
    assert message.startswith(f"{path} ")
    assert "\n" not in message
    return message.removeprefix(f"{path} ")


def rewrite(path, change_header=None, change_tensors=None, metadata=None):
    """Save the small networks with a changed header or changed tensors."""
    save_network(path, small_networks())
    with safetensors.safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["networks"])
    tensors = safetensors.torch.load_file(path)
    for change, value in ((change_header, header), (change_tensors, tensors)):
        if change is not None:
            change(value)
    text = {"networks": json.dumps(header)} if metadata is None else metadata
    safetensors.torch.save_file(tensors, path, metadata=text)


# Reading NVIDIA's sample.


def test_load_network_sample_pickle_gives_the_reference_images_and_logits():
    expected = np.load(DATA / "net_sample_32_c2.npz")
    networks = load_network(SAMPLE)
    img = networks.G_ema(torch.from_numpy(expected["z"]), torch.from_numpy(expected["c"]), noise_mode="const")
    # float32 through 11 layers in another order of summation; the images reach 16.6.
    assert np.abs(img.numpy() - expected["img_const_psi1.0"]).max() < 1e-4
    logits = networks.D(torch.from_numpy(expected["D_img"]), torch.from_numpy(expected["D_c"]))
    assert np.abs(logits.numpy() - expected["D_logits"]).max() < 1e-5


def test_load_network_is_in_eval_mode_without_gradients_and_keeps_the_random_state():
    before = torch.get_rng_state()
    networks = load_network(SAMPLE)
    assert torch.equal(torch.get_rng_state(), before)
    for role in ROLES:
        assert not getattr(networks, role).training
        assert not any(parameter.requires_grad for parameter in getattr(networks, role).parameters())


def test_load_network_pickle_info_keeps_facts_and_drops_the_path():
    info = load_network(SAMPLE).config["info"]
    assert info["class_names"] == {"G": "Generator", "D": "Discriminator", "G_ema": "Generator",
                                   "augment_pipe": "AugmentPipe"}
    assert info["training_set"] == {"class_name": "training.dataset.ImageFolderDataset", "use_labels": True,
                                    "max_size": 24, "xflip": False, "resolution": 32}
    assert info["augment_pipe"]["hue"] == 1
    assert len(info["source_sha256"]) == 2


@pytest.mark.parametrize("freeze_layers", [0, 1, 3])
@pytest.mark.parametrize("architecture", ["orig", "skip", "resnet"])
def test_load_network_pickle_of_every_architecture_equals_what_was_pickled(tmp_path, architecture, freeze_layers):
    G_kwargs = {"synthesis_kwargs": {**GENERATOR["synthesis_kwargs"], "architecture": architecture}, "img_channels": 1}
    D_kwargs = {"architecture": architecture, "c_dim": 0, "block_kwargs": {"freeze_layers": freeze_layers}}
    G, D = generator(4, **G_kwargs), discriminator(5, **D_kwargs)
    content = writer.snapshot(writer.module(G, kwargs={**GENERATOR, **G_kwargs}),
                              D=writer.module(D, kwargs={**DISCRIMINATOR, **D_kwargs}))
    (tmp_path / "a.pkl").write_bytes(writer.dumps(content))
    assert_same_networks(load_network(tmp_path / "a.pkl"), Networks(G=None, D=D, G_ema=G))


def pickle_changes():
    weight = torch.zeros(4, 4, 4)
    return {
        "G_ema does not match its constructor arguments: missing tensors 'synthesis.b4.const'; unknown tensors none":
            lambda b4: b4["_parameters"].pop("const"),
        "G_ema does not match its constructor arguments: missing tensors none; unknown tensors 'synthesis.b4.extra'":
            lambda b4: b4["_parameters"].update(extra=writer.parameter(weight)),
        "G_ema.synthesis.b4.const has shape [4, 4, 3]; expected [4, 4, 4]":
            lambda b4: b4["_parameters"].update(const=writer.parameter(weight[:, :, :3])),
        "G_ema.synthesis.b4.const is torch.float16; expected float32 or float64":
            lambda b4: b4["_parameters"].update(const=writer.parameter(weight.half())),
        "G_ema.synthesis.b4.const is a buffer in the file; expected a parameter (freeze_layers decides which)":
            lambda b4: (b4["_parameters"].pop("const"), b4["_buffers"].update(const=writer.tensor(weight))),
    }


@pytest.mark.parametrize("expected", sorted(pickle_changes()))
def test_load_network_pickle_with_other_tensors_is_refused(tmp_path, expected):
    content = writer.module(generator(), kwargs=GENERATOR)
    b4 = content.arguments[0]["state"]["_modules"]["synthesis"].arguments[0]["state"]["_modules"]["b4"]
    pickle_changes()[expected](b4.arguments[0]["state"])
    (tmp_path / "a.pkl").write_bytes(writer.dumps(writer.snapshot(content)))
    assert refused(tmp_path / "a.pkl") == f"cannot be read as a StyleGAN2-ADA network pickle: {expected}"


@pytest.mark.parametrize("changes", [
    {"img_resolution": 33}, {"img_resolution": "x"}, {"z_dim": None}, {"z_dim": 0, "c_dim": 0}, {"z_dim": -9},
    {"mapping_kwargs": {"num_layers": 10**12}}, {"mapping_kwargs": {"num_layers": "x"}},
    {"mapping_kwargs": {"activation": "unknown"}}, {"synthesis_kwargs": {"use_fp16": True}},
])
def test_load_network_pickle_with_impossible_arguments_is_refused(tmp_path, changes):
    content = writer.module(generator(), kwargs={**GENERATOR, **changes})
    (tmp_path / "a.pkl").write_bytes(writer.dumps(writer.snapshot(content)))
    assert refused(tmp_path / "a.pkl").startswith("cannot be read as a StyleGAN2-ADA network pickle: G_ema ")


# The round trip.


def test_save_network_round_trip_is_bit_equal(tmp_path):
    networks = small_networks(info={"a": [1, 2.5, None, {"b": "text"}]})
    networks.G.mapping.w_avg[0] = float("nan")
    networks.D.double()
    networks.G_ema.synthesis.b8.double()  # mixed within a network
    save_network(tmp_path / "a.safetensors", networks)
    loaded = load_network(tmp_path / "a.safetensors")
    assert_same_networks(loaded, networks)
    assert loaded.config == {"G": networks.G.init_kwargs, "D": networks.D.init_kwargs,
                             "G_ema": networks.G_ema.init_kwargs, "info": {"a": [1, 2.5, None, {"b": "text"}]}}


def test_save_network_sample_round_trip_equals_the_pickle(tmp_path):
    networks = load_network(SAMPLE)
    save_network(tmp_path / "a.safetensors", networks)
    loaded = load_network(tmp_path / "a.safetensors")
    assert_same_networks(loaded, networks)
    assert loaded.config == networks.config


def test_save_network_equal_input_gives_equal_bytes(tmp_path):
    for name in ("a", "b"):
        save_network(tmp_path / name, small_networks(info=dict(zip("xyz", range(3))) if name == "a" else
                                                     {"z": 2, "y": 1, "x": 0}))
    save_network(tmp_path / "c", load_network(tmp_path / "a"))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes()


def test_save_network_generator_only_gives_none_for_the_others(tmp_path):
    save_network(tmp_path / "a.safetensors", Networks(G=None, D=None, G_ema=generator()))
    loaded = load_network(tmp_path / "a.safetensors")
    assert loaded.G is loaded.D is None
    assert loaded.config["G"] is loaded.config["D"] is None
    assert_same_networks(loaded, Networks(G=None, D=None, G_ema=generator()))


def test_save_network_one_network_in_two_roles_is_written_twice(tmp_path):
    G = generator()
    save_network(tmp_path / "a.safetensors", Networks(G=G, D=None, G_ema=G))
    assert_same_networks(load_network(tmp_path / "a.safetensors"), Networks(G=G, D=None, G_ema=G))


def test_save_network_frozen_layers_come_back_as_buffers(tmp_path):
    networks = Networks(G=None, D=discriminator(block_kwargs={"freeze_layers": 2}), G_ema=generator())
    save_network(tmp_path / "a.safetensors", networks)
    loaded = load_network(tmp_path / "a.safetensors")
    assert_same_networks(loaded, networks)
    assert "b8.conv0.weight" in dict(loaded.D.named_buffers())


def test_load_network_goes_by_content_not_by_suffix(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(SAMPLE.read_bytes())
    save_network(tmp_path / "b.pkl", load_network(tmp_path / "a.safetensors"))
    assert_same_networks(load_network(tmp_path / "a.safetensors"), load_network(tmp_path / "b.pkl"))


def test_load_network_tensors_outlive_a_change_of_the_file(tmp_path):
    path = tmp_path / "a.safetensors"
    save_network(path, small_networks())
    loaded = load_network(path)
    with open(path, "r+b") as file:
        file.seek(-4096, os.SEEK_END)
        file.write(bytes(4096))
    assert_same_networks(loaded, small_networks())


@pytest.mark.parametrize(("config", "expected"), [
    ({"info": {"path": Path("x")}}, "config['info'] is not plain JSON"),
    ({"info": {"x": float("nan")}}, "config['info'] is not plain JSON"),
    ({"info": {1: "x"}}, "config['info'] has a key that is not a string; expected string keys, as JSON changes others"),
    ({"info": [1]}, "config['info'] is [1]; expected a dict"),
    ({"seed": 1}, "config has the entries ['seed']; expected G, D, G_ema and info: put others into info"),
    ({"G": {"z_dim": 9}}, "config['G'] differs from the constructor arguments of G; expected the same"),
])
def test_save_network_bad_config_is_refused_and_writes_nothing(tmp_path, config, expected):
    with pytest.raises(ValueError) as caught:
        save_network(tmp_path / "a.safetensors", small_networks(**config))
    assert str(caught.value).startswith(expected)
    assert list(tmp_path.iterdir()) == []


def test_save_network_without_averaged_generator_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^G_ema is None; a snapshot needs it$"):
        save_network(tmp_path / "a.safetensors", Networks(G=generator(), D=None, G_ema=None))
    assert list(tmp_path.iterdir()) == []


# Files that are not snapshots.


@pytest.mark.parametrize(("content", "expected"), [
    (b"", "is empty"),
    (b"<!DOCTYPE html><html>", "is a web page (HTML or XML), perhaps from a failed download"),
    (b"\n  <html>", "is a web page (HTML or XML), perhaps from a failed download"),
    (b"PK\x03\x04" + bytes(60), "is a zip archive (a data set, or a checkpoint of torch.save)"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n",
     "is a git-lfs pointer, not the file itself: fetch it with `git lfs pull`"),
    (b"some text", "is of an unknown kind (it starts with 73 6f 6d 65 20 74 65 78)"),
    (bytes(100), "is of an unknown kind (it starts with 00 00 00 00 00 00 00 00)"),
])
@pytest.mark.parametrize("suffix", [".pkl", ".safetensors"])
def test_load_network_other_file_says_what_it_is(tmp_path, content, expected, suffix):
    path = tmp_path / f"network{suffix}"
    path.write_bytes(content)
    assert refused(path) == f"{expected}; expected a network file (.safetensors or NVIDIA .pkl)"


def test_load_network_folder_is_refused(tmp_path):
    assert refused(tmp_path) == "is a folder; expected a network file (.safetensors or NVIDIA .pkl)"


def test_load_network_missing_file_raises_file_not_found(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_network(tmp_path / "missing.pkl")


def test_load_network_truncated_safetensors_is_refused_at_every_length(tmp_path):
    path = tmp_path / "a.safetensors"
    save_network(path, Networks(G=None, D=None, G_ema=generator()))
    data = path.read_bytes()
    for length in (*range(0, 40, 3), *range(40, len(data), 211), len(data) - 1):
        path.write_bytes(data[:length])
        refused(path)
    path.write_bytes(data + b"\0")
    refused(path)


@pytest.mark.parametrize("metadata", [{}, {"format": "pt"}])
def test_load_network_safetensors_of_another_project_is_refused(tmp_path, metadata):
    rewrite(tmp_path / "a.safetensors", metadata=metadata)
    assert refused(tmp_path / "a.safetensors") == (
        "cannot be read as a network snapshot: it is a safetensors file of another project; expected one with "
        "constructor arguments")


@pytest.mark.parametrize("text", ["{", "[" * 100_000, '{"version": NaN}', "", "\\ud800"])
def test_load_network_header_that_is_not_json_is_refused(tmp_path, text):
    rewrite(tmp_path / "a.safetensors", metadata={"networks": text})
    assert "its header is not JSON" in refused(tmp_path / "a.safetensors")


HEADER_CHANGES = {
    f"its header does not name the format {FORMAT_NAME}": lambda h: h.update(format="other"),
    f"it has format version {FORMAT_VERSION + 1}; this program reads up to {FORMAT_VERSION}: update it":
        lambda h: h.update(version=FORMAT_VERSION + 1),
    "its header has version '1'; expected a whole number >= 1": lambda h: h.update(version="1"),
    "its header has version True; expected a whole number >= 1": lambda h: h.update(version=True),
    "its header has the fields ['extra', 'format', 'info', 'networks', 'version']; "
    "expected ['format', 'info', 'networks', 'version']": lambda h: h.update(extra=1),
    "its header does not describe exactly G, D and G_ema": lambda h: h["networks"].pop("D"),
    "its header has constructor arguments of D that are not a dict": lambda h: h["networks"].update(D=[1]),
    "its header has constructor arguments of G_ema that are not a dict": lambda h: h["networks"].update(G_ema=None),
}


@pytest.mark.parametrize("expected", sorted(HEADER_CHANGES))
def test_load_network_malformed_header_is_refused(tmp_path, expected):
    rewrite(tmp_path / "a.safetensors", change_header=HEADER_CHANGES[expected])
    assert refused(tmp_path / "a.safetensors") == f"cannot be read as a network snapshot: {expected}"


CONTENT_CHANGES = {
    "the tensor 'D.b8.conv0.bias' does not belong to a network of the header":
        (lambda h: h["networks"].update(D=None), lambda t: [t.pop(n) for n in list(t) if n[0] == "D" and
                                                            n != "D.b8.conv0.bias"]),
    "the tensor 'H.weight' does not belong to a network of the header":
        (None, lambda t: t.update({"H.weight": torch.zeros(1)})),
    "D does not match its constructor arguments: missing tensors 'b4.out.bias'; unknown tensors none":
        (None, lambda t: t.pop("D.b4.out.bias")),
    "G does not match its constructor arguments: missing tensors none; unknown tensors 'x'":
        (None, lambda t: t.update({"G.x": torch.zeros(1)})),
    "G.mapping.w_avg has shape [7]; expected [8]": (None, lambda t: t.update({"G.mapping.w_avg": torch.zeros(7)})),
    "G.mapping.w_avg is torch.int64; expected float32 or float64":
        (None, lambda t: t.update({"G.mapping.w_avg": torch.zeros(8, dtype=torch.int64)})),
    "G cannot be built with the constructor arguments in the file: ":
        (lambda h: h["networks"]["G"].update(unknown=1), None),
    "G asks for num_layers [1000000000] with 39 tensors; expected one per layer":
        (lambda h: h["networks"]["G"]["mapping_kwargs"].update(num_layers=10**9), None),
}


@pytest.mark.parametrize("expected", sorted(CONTENT_CHANGES))
def test_load_network_content_that_does_not_fit_is_refused(tmp_path, expected):
    change_header, change_tensors = CONTENT_CHANGES[expected]
    rewrite(tmp_path / "a.safetensors", change_header, change_tensors)
    assert refused(tmp_path / "a.safetensors").startswith(f"is inconsistent: {expected}")


def test_load_network_keeps_the_layout_that_the_arguments_ask_for(tmp_path):
    sizes = {**GENERATOR["synthesis_kwargs"], "num_fp16_res": 1, "fp16_channels_last": True}
    network = generator(synthesis_kwargs=sizes)
    save_network(tmp_path / "a.safetensors", Networks(G=None, D=None, G_ema=network))
    loaded = load_network(tmp_path / "a.safetensors").G_ema
    weight = loaded.synthesis.b8.conv0.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()
    assert torch.equal(weight, network.synthesis.b8.conv0.weight)
