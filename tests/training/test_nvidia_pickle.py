"""training.nvidia_pickle: records equal what was written; foreign and damaged files give one ValueError."""
import hashlib
import json
import pickle
import random
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers import nvidia_pickle_writer as writer
from tests.helpers.nvidia_pickle_writer import Call, Name, dumps, snapshot
from tests.helpers.tiny_networks import DISCRIMINATOR, GENERATOR, discriminator, generator
from training.nvidia_pickle import KNOWN_SOURCES, UnknownSourceWarning, read_nvidia_pickle

SAMPLE = Path(__file__).parent.parent / "data" / "sample_32_c2.stripped.pkl"


def write_generator(path, protocol=4, **kwargs):
    """Write a file with only G_ema; return the network in it."""
    network = generator()
    path.write_bytes(dumps(snapshot(writer.module(network, kwargs=GENERATOR, **kwargs)), protocol))
    return network


def refused(path):
    """Return the one-line message with which the file is refused."""
    with pytest.raises(ValueError) as caught:
        read_nvidia_pickle(path)
    message = str(caught.value)
    assert message.startswith(f"{path} cannot be read as a StyleGAN2-ADA network pickle: ")
    assert "\n" not in message
    assert message.isascii()
    return message


# What is read.


@pytest.mark.filterwarnings("error")
def test_read_sample_gives_its_networks_and_options():
    networks = read_nvidia_pickle(SAMPLE)
    assert networks.G_ema.arguments == {
        "z_dim": 64, "w_dim": 64, "c_dim": 2, "img_resolution": 32, "img_channels": 3,
        "mapping_kwargs": {"num_layers": 2}, "synthesis_kwargs": {"channel_base": 1024, "channel_max": 64}}
    assert networks.D.arguments["epilogue_kwargs"] == {"mbstd_group_size": 4}
    assert [networks.G.class_name, networks.D.class_name] == ["Generator", "Discriminator"]
    assert networks.training_set_kwargs["resolution"] == 32
    assert networks.augment_pipe.arguments["xflip"] == 1
    assert networks.augment_pipe.tensors["p"] == 0.25
    assert set(networks.G_ema.sources) <= set(KNOWN_SOURCES)


def test_read_sample_constants_equal_their_definition():
    networks = read_nvidia_pickle(SAMPLE)
    taps = torch.tensor([1.0, 3, 3, 1]) / 8
    assert torch.equal(networks.G_ema.tensors["synthesis.b32.conv0.resample_filter"], taps.outer(taps))
    assert networks.G_ema.kinds["synthesis.b32.conv0.resample_filter"] == "buffer"
    assert networks.G_ema.kinds["synthesis.b4.const"] == "parameter"


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_read_every_protocol_gives_names_order_kinds_and_bits(tmp_path, protocol):
    network = write_generator(tmp_path / "a.pkl", protocol)
    record = read_nvidia_pickle(tmp_path / "a.pkl").G_ema
    state = network.state_dict()
    assert list(record.tensors) == list(state)
    assert all(torch.equal(record.tensors[name], state[name]) for name in state)
    parameters = dict(network.named_parameters())
    assert record.kinds == {name: "parameter" if name in parameters else "buffer" for name in state}


def test_read_old_style_file_gives_plain_arguments(tmp_path):
    # As Python 3.7 with torch 1.7 wrote them: protocol 3, EasyDict arguments, positional ones, numpy numbers.
    two = Call(Name("numpy.core.multiarray", "scalar"), (
        Call(Name("numpy", "dtype"), ("i8", 0, 1), state=(3, "<", None, None, None, -1, -1, 0)),
        np.int64(2).tobytes()))
    easy = Call(Name("dnnlib.util", "EasyDict"), new=True)
    kwargs = {**GENERATOR, "mapping_kwargs": {"num_layers": two}, "img_channels": two}
    del kwargs["z_dim"], kwargs["c_dim"]
    state = {"_parameters": writer.ordered_dict(), "_buffers": writer.ordered_dict(), "_modules": writer.ordered_dict(),
             "_init_args": (8, two), "_init_kwargs": kwargs}
    content = {"G_ema": writer.persistent("Generator", state), "training_set_kwargs": easy, "augment_pipe": None}
    (tmp_path / "a.pkl").write_bytes(dumps(content, 3))
    networks = read_nvidia_pickle(tmp_path / "a.pkl")
    assert networks.G_ema.arguments == {**GENERATOR, "img_channels": 2}
    assert {type(networks.G_ema.arguments[name]) for name in ("z_dim", "c_dim", "img_channels")} == {int}
    assert networks.training_set_kwargs == {}
    assert networks.G is networks.D is networks.augment_pipe is None


def test_read_frozen_layers_are_buffers(tmp_path):
    kwargs = {**DISCRIMINATOR, "block_kwargs": {"freeze_layers": 2}}
    D = discriminator(block_kwargs={"freeze_layers": 2})
    content = snapshot(writer.module(generator(), kwargs=GENERATOR), D=writer.module(D, kwargs=kwargs))
    (tmp_path / "a.pkl").write_bytes(dumps(content))
    record = read_nvidia_pickle(tmp_path / "a.pkl").D
    frozen = {name for name, kind in record.kinds.items() if kind == "buffer" and name.endswith(("weight", "bias"))}
    assert frozen == {"b8.fromrgb.weight", "b8.fromrgb.bias", "b8.conv0.weight", "b8.conv0.bias"}


def test_read_non_persistent_buffer_is_left_out(tmp_path):
    content = writer.module(generator(), kwargs=GENERATOR)
    state = content.arguments[0]["state"]
    state["_buffers"]["scratch"] = writer.tensor(torch.zeros(3))
    state["_non_persistent_buffers_set"] = {"scratch"}
    (tmp_path / "a.pkl").write_bytes(dumps(snapshot(content)))
    assert "scratch" not in read_nvidia_pickle(tmp_path / "a.pkl").G_ema.tensors


# Embedded source.


def test_read_unknown_source_warns_once_with_its_hash_and_runs_nothing(tmp_path):
    touched = tmp_path / "touched"
    source = f"open({str(touched)!r}, 'w')\n"
    write_generator(tmp_path / "a.pkl", source=source)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read_nvidia_pickle(tmp_path / "a.pkl")
    assert [warning.category for warning in caught] == [UnknownSourceWarning]
    assert "names match, behaviour may not" in str(caught[0].message)
    assert hashlib.sha256(source.encode()).hexdigest() in str(caught[0].message)
    assert caught[0].filename == __file__
    assert not touched.exists()


# Other projects' files.


def test_read_tensorflow_file_advises_to_convert(tmp_path):
    network = Call(Name("dnnlib.tflib.network", "Network"), new=True, state={"version": 4})
    for protocol in (2, 3, 4):
        (tmp_path / "a.pkl").write_bytes(dumps((network, network, network), protocol))
        assert refused(tmp_path / "a.pkl").endswith(
            "it is of the TensorFlow era; convert it once with legacy.py of the original PyTorch repository, in an "
            "environment that you trust, then open the result")


def change_class(content):
    content.arguments[0]["state"]["_modules"]["synthesis"].arguments[0]["class_name"] = "SynthesisInput"
    return "G_ema.synthesis is of class 'SynthesisInput', which StyleGAN2-ADA does not have"


def change_nested_argument(content):
    kwargs = {**GENERATOR["synthesis_kwargs"], "magnitude_ema_beta": 0.999}
    content.arguments[0]["state"]["_init_kwargs"] = {**GENERATOR, "synthesis_kwargs": kwargs}
    return ("G_ema.synthesis_kwargs (SynthesisNetwork) has the constructor argument 'magnitude_ema_beta', which "
            "StyleGAN2-ADA does not have")


def change_inner_argument(content):
    mapping = content.arguments[0]["state"]["_modules"]["mapping"]
    mapping.arguments[0]["state"]["_init_kwargs"] = {"w_dim": 8, "normalize_c": True}
    return ("G_ema.mapping (MappingNetwork) has the constructor argument 'normalize_c', which StyleGAN2-ADA does not "
            "have")


def change_argument_twice(content):
    content.arguments[0]["state"]["_init_args"] = (8,)
    return "G_ema (Generator) has the argument 'z_dim' by position and by name"


def change_argument_count(content):
    content.arguments[0]["state"]["_init_args"] = (8,) * 8
    return "G_ema (Generator) has malformed constructor arguments"


def change_argument_value(content):
    content.arguments[0]["state"]["_init_kwargs"] = {**GENERATOR, "z_dim": float("nan")}
    return "G_ema (Generator) holds nan; expected plain values"


def change_version(content):
    content.arguments[0]["version"] = 7
    return "G_ema is not a class of persistence version 6"


def change_kwargs_to_class(content):
    content.arguments[0]["class_name"] = "MappingNetwork"
    content.arguments[0]["state"]["_init_kwargs"] = {"z_dim": 8}
    return "G_ema is of class 'MappingNetwork'; expected Generator"


def change_buffer_name(content):
    content.arguments[0]["state"]["_buffers"]["a.b"] = None
    return "G_ema has 'a.b' in _buffers; expected an identifier"


def change_tensor(content):
    content.arguments[0]["state"]["_parameters"]["gain"] = 1.5
    return "G_ema.gain is 1.5; expected a parameter"


CHANGES = (change_class, change_nested_argument, change_inner_argument, change_argument_twice, change_argument_count,
           change_argument_value, change_version, change_kwargs_to_class, change_buffer_name, change_tensor)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_read_changed_network_is_refused_by_name(tmp_path, change):
    content = writer.module(generator(), kwargs=GENERATOR)
    expected = change(content)
    (tmp_path / "a.pkl").write_bytes(dumps(snapshot(content)))
    assert refused(tmp_path / "a.pkl").endswith(": " + expected)


def test_read_many_tensors_of_one_storage_are_refused_before_they_take_memory(tmp_path):
    content = writer.module(generator(), kwargs=GENERATOR)
    buffers = content.arguments[0]["state"]["_buffers"]
    large = writer.tensor(torch.zeros(100_000))
    for index in range(100):
        buffers[f"copy{index}"] = large
    (tmp_path / "a.pkl").write_bytes(dumps(snapshot(content)))
    assert re.search(r"and what precedes it hold [\d,]+ bytes more than the file$", refused(tmp_path / "a.pkl"))


def test_read_module_in_itself_is_refused(tmp_path):
    # By hand: the dict is memo 0 and the object made from it memo 1; then the dict gets a child that is the object.
    def flat(value):
        return pickle.dumps(value, 2)[2:-1]

    meta = {"type": "class", "version": 6, "module_src": "", "class_name": "Generator"}
    fields = b"".join(flat(item) for pair in meta.items() for item in pair)
    modules = b"}" + flat("child") + pickle.BINGET + b"\x64" + b"s"
    state = b"}(" + flat("_parameters") + b"}" + flat("_buffers") + b"}" + flat("_modules") + modules + b"u"
    make = b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n" + b"}q\x63\x85Rq\x64"
    fill = b"h\x63(" + fields + flat("state") + state + b"u"
    stream = b"\x80\x02}(" + flat("G_ema") + make + flat("training_set_kwargs") + fill + b"u."
    (tmp_path / "a.pkl").write_bytes(stream)
    expected = f": G_ema{'.child' * 17} is nested more than 16 modules deep; no network is"
    assert refused(tmp_path / "a.pkl").endswith(expected)


@pytest.mark.parametrize(("content", "expected"), [
    ([1, 2], "it holds list; expected a dict with G, D and G_ema"),
    (3, "it holds 3; expected a dict with G, D and G_ema"),
    ({"a": 1}, "it has the entries \"['a']\"; expected G, D, G_ema, augment_pipe, training_set_kwargs"),
    ({"G": None, "D": None}, "it has the entries \"['G', 'D']\"; expected G, D, G_ema, augment_pipe, "
                             "training_set_kwargs"),
    ({"G_ema": 5}, "G_ema is not a class of persistence version 6"),
    ({"G_ema": None, "training_set_kwargs": 3}, "training_set_kwargs is 3; expected a dict or None"),
])
def test_read_foreign_pickle_says_what_it_holds(tmp_path, content, expected):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content))
    assert refused(tmp_path / "a.pkl").endswith(": " + expected)


def test_read_pickle_of_a_model_object_names_the_class(tmp_path):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"G_ema": torch.nn.Linear(1, 1)}))
    assert "the name 'torch.nn.modules.linear.Linear' is outside the closed list; nothing was run" in refused(
        tmp_path / "a.pkl")


def test_read_bytes_after_the_pickle_are_refused(tmp_path):
    (tmp_path / "a.pkl").write_bytes(dumps(snapshot(writer.module(generator(), kwargs=GENERATOR))) + b"\0")
    assert refused(tmp_path / "a.pkl").endswith("more bytes follow the pickle; expected nothing")


@pytest.mark.parametrize("data", [b"", b"\x80", b"\x80\x04", b"text", json.dumps([1]).encode(), bytes(1000),
                                  random.Random(0).randbytes(5000), b"PK\x03\x04" + bytes(100), b"\x80\x04N."])
def test_read_other_bytes_is_refused(tmp_path, data):
    (tmp_path / "a.pkl").write_bytes(data)
    refused(tmp_path / "a.pkl")


def test_read_missing_file_raises_file_not_found(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_nvidia_pickle(tmp_path / "missing.pkl")


# Damage at random: a result or a ValueError, nothing else, whatever the place.


@pytest.mark.filterwarnings("ignore::training.nvidia_pickle.UnknownSourceWarning")
def test_read_truncated_sample_always_raises_value_error(tmp_path):
    data = SAMPLE.read_bytes()
    rng = random.Random(1)
    path = tmp_path / "cut.pkl"
    # Most in the first tenth: as many kinds of places, a tenth of the time.
    cuts = [rng.randrange(len(data) // 10) for _ in range(170)] + [rng.randrange(len(data)) for _ in range(30)]
    for cut in (*cuts, len(data) - 1):
        path.write_bytes(data[:cut])
        refused(path)


@pytest.mark.filterwarnings("ignore::training.nvidia_pickle.UnknownSourceWarning")
@pytest.mark.slow
def test_read_flipped_bits_give_a_result_or_value_error(tmp_path):
    path = tmp_path / "flipped.pkl"
    write_generator(path)
    small, sample = path.read_bytes(), SAMPLE.read_bytes()
    rng = random.Random(2)
    num_read, messages = 0, set()
    for data, num_flips in ((small, 600), (sample, 60)):
        for _ in range(num_flips):
            changed = bytearray(data)
            changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            path.write_bytes(changed)
            try:
                num_read += read_nvidia_pickle(path).G_ema is not None
            except ValueError as error:
                messages.add(str(error))
    assert all(message.startswith(f"{path} cannot be read as ") for message in messages)
    assert num_read > 60  # flips within weights and unused fields leave a readable file
