"""training.nvidia_pickle: records equal what was written; foreign and damaged files give one ValueError.

Also `python -m training.nvidia_pickle`: it converts, says what it did, never leaves half a file.
"""
import collections
import hashlib
import io
import json
import pickle
import random
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers import nvidia_pickle_writer as writer
from tests.helpers.nvidia_pickle_writer import Call, Name, dumps, snapshot
from tests.helpers.tiny_networks import DISCRIMINATOR, GENERATOR, discriminator, generator
from training.nvidia_pickle import KNOWN_SOURCES, UnknownSourceWarning, read_nvidia_pickle
from training.snapshot import Networks, load_network, main, save_network

ROOT = Path(__file__).parent.parent.parent
SAMPLE = ROOT / "tests" / "data" / "sample_32_c2.stripped.pkl"


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


# Plain values, numbers and tensors.


def read_options(path, data):
    path.write_bytes(data)
    return read_nvidia_pickle(path).training_set_kwargs


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_read_plain_values_gives_equal_values(tmp_path, protocol):
    shared = [1.5, "x"]
    options = {"a": None, "b": [True, False, 0, 1, 255, 256, 65536, -1, -2**31, 2**40, -2**70], "c": shared,
               "d": shared, "e": (), "f": (1,), "g": (1, 2), "h": (1, 2, 3), "i": (1, 2, 3, 4), "n": "\u00e9" * 300,
               "p": collections.OrderedDict(z=1), "q": [[]], "r": list(range(2000))}
    expected = {**options, "e": [], "f": [1], "g": [1, 2], "h": [1, 2, 3], "i": [1, 2, 3, 4], "p": {"z": 1}}
    for fix_imports in (True, False):
        data = pickle.dumps({"G_ema": None, "training_set_kwargs": options}, protocol, fix_imports=fix_imports)
        assert read_options(tmp_path / "a.pkl", data) == expected


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("value", [np.float64(1 / 3), np.float32(0.1), np.float16(2), np.int64(-5), np.uint8(200),
                                   np.int32(7), np.bool_(True), np.dtype(">f8").type(2.5)], ids=repr)
def test_read_numpy_scalar_gives_the_equal_plain_number(tmp_path, value, protocol):
    data = pickle.dumps({"G_ema": None, "training_set_kwargs": {"x": value}}, protocol)
    number = read_options(tmp_path / "a.pkl", data)["x"]
    assert number == value.item()
    assert type(number) is type(value.item())


def numpy_type(code, state=(3, "<", None, None, None, -1, -1, 0)):
    return Call(Name("numpy", "dtype"), (code, 0, 1), state=state)


def scalar_file(kind, data):
    scalar = Call(Name("numpy.core.multiarray", "scalar"), (kind, data))
    return dumps({"G_ema": None, "training_set_kwargs": {"x": scalar}}, 3)


def test_read_numpy_scalar_of_the_old_module_name_and_big_endian(tmp_path):
    kind = numpy_type("f8", (3, ">", None, None, None, -1, -1, 0))
    assert read_options(tmp_path / "a.pkl", scalar_file(kind, np.array(2.5, ">f8").tobytes())) == {"x": 2.5}


NO_NUMBER = "training_set_kwargs holds numpy.core.multiarray.scalar(...); expected plain values"


@pytest.mark.parametrize("code", ["O8", "O", "V8", "S3", "U3", "M8", "c16", "f8,f8", "object", "i16", 8, None])
def test_read_numpy_type_other_than_numeric_is_refused(tmp_path, code):
    (tmp_path / "a.pkl").write_bytes(scalar_file(numpy_type(code), bytes(8)))
    assert refused(tmp_path / "a.pkl").endswith(f": {NO_NUMBER}")


@pytest.mark.parametrize("state", [None, (), (3, "<"), (3, "x", None, None, None, -1, -1, 0), {"a": 1},
                                   (3, "<", (1,), None, None, -1, -1, 0), (3, "<", None, ("a",), {"a": 1}, -1, -1, 0)])
def test_read_numpy_type_with_the_state_of_a_structure_is_refused(tmp_path, state):
    (tmp_path / "a.pkl").write_bytes(scalar_file(numpy_type("f8", state), bytes(8)))
    assert refused(tmp_path / "a.pkl").endswith(f": {NO_NUMBER}")


@pytest.mark.parametrize(("kind", "data", "expected"), [
    (numpy_type("f8"), b"1234", NO_NUMBER),
    (numpy_type("f8"), "12345678", "training_set_kwargs has '12345678' in place of bytes"),
    ("f8", b"12345678", NO_NUMBER)])
def test_read_numpy_scalar_of_wrong_parts_is_refused(tmp_path, kind, data, expected):
    (tmp_path / "a.pkl").write_bytes(scalar_file(kind, data))
    assert refused(tmp_path / "a.pkl").endswith(f": {expected}")


def write_buffer(path, value, protocol=4):
    """Write a file whose G_ema has nothing but the buffer x."""
    state = {"_parameters": {}, "_buffers": {"x": value}, "_modules": {}}
    path.write_bytes(dumps({"G_ema": writer.persistent("Generator", state)}, protocol))


def read_buffer(path, value, protocol=4):
    write_buffer(path, value, protocol)
    return read_nvidia_pickle(path).G_ema.tensors["x"]


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64,
                                   torch.int32, torch.int16, torch.int8, torch.uint8], ids=str)
@pytest.mark.parametrize("numel", [0, 1, 7])
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")  # what torch.load returns here
def test_read_tensor_equals_what_torch_loads(tmp_path, dtype, numel, protocol):
    values = (torch.arange(numel) * 3.25).to(dtype)
    expected = torch.load(io.BytesIO(writer.storage_bytes(values)), weights_only=True)
    read = read_buffer(tmp_path / "a.pkl", writer.tensor(values), protocol)
    assert read.dtype == expected.dtype == dtype
    assert read.tolist() == expected.tolist()


def test_read_tensor_keeps_the_bits_of_nan(tmp_path):
    bits = torch.tensor([0x7FC00001, 0x7F800000, -(2**31)], dtype=torch.int32)
    read = read_buffer(tmp_path / "a.pkl", writer.tensor(bits.view(torch.float32)))
    assert torch.equal(read.view(torch.int32), bits)


def bad_payloads():
    good = writer.storage_bytes(torch.arange(4.0))
    return {
        "empty": b"", "cut": good[:-1], "longer": good + b"\0", "not_bytes": "text", "magic": dumps(1, 2) + good,
        "bool": writer.storage_bytes(torch.ones(2) > 0), "complex": writer.storage_bytes(torch.ones(2) + 1j),
        "count": good.replace(b"K\x04N", b"K\x7fN"), "negative": good.replace(b"K\x04N", b"J\xff\xff\xff\xffN"),
        "big_endian": good.replace(b"\x88", b"\x89", 1), "other_class": good.replace(b"FloatStorage", b"TableStorage"),
        "state_dict": good.replace(b"ctorch\nFloatStorage", b"cos\nFloatStorage"), "zip": b"PK\x03\x04" + good,
        "view": good.replace(b"K\x04N", b"K\x04K\x01"), "tag": good.replace(b"storage", b"module!"),
    }


@pytest.mark.parametrize("kind", sorted(bad_payloads()))
def test_read_malformed_storage_is_refused(tmp_path, kind):
    tensor = writer.tensor(torch.arange(4.0))
    tensor.arguments[0].arguments = (bad_payloads()[kind],)
    write_buffer(tmp_path / "a.pkl", tensor)
    refused(tmp_path / "a.pkl")


def tensor_call(*description):
    storage = writer.tensor(torch.arange(12.0)).arguments[0]
    return Call(Name("torch._utils", "_rebuild_tensor_v2"), (storage, *description))


@pytest.mark.parametrize(("offset", "size", "stride"), [
    (0, (12,), (1,)), (0, (3, 4), (4, 1)), (0, (4, 3), (1, 4)), (2, (2, 2), (4, 2)), (11, (), ()), (0, (0, 5), (5, 1)),
    (0, (2, 2), (0, 1)), (12, (0,), (1,)),
])
def test_read_tensor_equals_as_strided(tmp_path, offset, size, stride):
    read = read_buffer(tmp_path / "a.pkl", tensor_call(offset, size, stride, False, {}))
    assert torch.equal(read, torch.arange(12.0).as_strided(size, stride, offset))
    assert read.is_contiguous()


@pytest.mark.parametrize(("offset", "size", "stride"), [
    (0, (13,), (1,)), (1, (12,), (1,)), (0, (3, 4), (5, 1)), (-1, (2,), (1,)), (0, (-2,), (1,)), (0, (2,), (-1,)),
    (0, (2,), (1, 1)), (12, (), ()), (0, (2.0,), (1,)), (0, [2], [1]), (0, (True,), (1,)), (None, (2,), (1,)),
    (0, (2**39, 2**39), (0, 0)), (0, (2**70,), (0,)), (0, (1,) * 9, (1,) * 9), (0, (13,), (0,)),
    (0, (2**39, 2**39, 0), (0, 0, 0)), (0, (0, 2**39, 2**39), (1, 1, 1)), (0, (2**39,) * 7 + (0,), (2**39,) * 8),
])
def test_read_tensor_outside_its_storage_is_refused(tmp_path, offset, size, stride):
    write_buffer(tmp_path / "a.pkl", tensor_call(offset, size, stride, False, {}))
    reasons = (r"has shape \[[\d, ]*\], which does not fit its storage of 12 elements",
               "has a malformed size, stride or offset",
               r"is torch\._utils\._rebuild_tensor_v2\(\.\.\.\); expected a buffer without hooks")
    assert re.search(f": G_ema.x ({'|'.join(reasons)})$", refused(tmp_path / "a.pkl"))


@pytest.mark.parametrize("description", [(0, (2,), (1,), False, {0: "hook"}), (0, (2,), (1,), None, {}),
                                         (0, (2,), (1,), False, {}, {"metadata": 1})])
def test_read_tensor_with_odd_extras_is_refused(tmp_path, description):
    write_buffer(tmp_path / "a.pkl", tensor_call(*description))
    assert refused(tmp_path / "a.pkl").endswith(
        ": G_ema.x is torch._utils._rebuild_tensor_v2(...); expected a buffer without hooks")


def test_read_parameter_among_the_buffers_is_refused(tmp_path):
    write_buffer(tmp_path / "a.pkl", writer.parameter(torch.arange(3.0)))
    assert refused(tmp_path / "a.pkl").endswith(
        ": G_ema.x is torch._utils._rebuild_parameter(...); expected a buffer without hooks")


# Embedded source.


def test_read_unknown_source_warns_once_with_its_hash_and_runs_nothing(tmp_path):
    touched = tmp_path / "touched"
    source = f"open({str(touched)!r}, 'w')\n"
    write_generator(tmp_path / "a.pkl", source=source)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read_nvidia_pickle(tmp_path / "a.pkl")
    assert [warning.category for warning in caught] == [UnknownSourceWarning]
    assert "names match, behavior may not" in str(caught[0].message)
    assert hashlib.sha256(source.encode()).hexdigest() in str(caught[0].message)
    assert caught[0].filename == __file__
    assert not touched.exists()


# Other projects' files.


def test_read_tensorflow_file_advises_to_convert(tmp_path):
    network = Call(Name("dnnlib.tflib.network", "Network"), new=True, state={"version": 4})
    for protocol in (2, 3, 4):
        (tmp_path / "a.pkl").write_bytes(dumps((network, network, network), protocol))
        assert refused(tmp_path / "a.pkl").endswith(
            "it was written with TensorFlow; convert it once with legacy.py of the original PyTorch repository, in an "
            "environment that you trust, then open the result")


def change_class(content):
    content.arguments[0]["state"]["_modules"]["synthesis"].arguments[0]["class_name"] = "SynthesisInput"
    return "G_ema.synthesis is of class 'SynthesisInput', which is not part of StyleGAN2-ADA"


def change_nested_argument(content):
    kwargs = {**GENERATOR["synthesis_kwargs"], "magnitude_ema_beta": 0.999}
    content.arguments[0]["state"]["_init_kwargs"] = {**GENERATOR, "synthesis_kwargs": kwargs}
    return ("G_ema.synthesis_kwargs (SynthesisNetwork) has the constructor argument 'magnitude_ema_beta', which is "
            "not part of StyleGAN2-ADA")


def change_inner_argument(content):
    mapping = content.arguments[0]["state"]["_modules"]["mapping"]
    mapping.arguments[0]["state"]["_init_kwargs"] = {"w_dim": 8, "normalize_c": True}
    return ("G_ema.mapping (MappingNetwork) has the constructor argument 'normalize_c', which is not part of "
            "StyleGAN2-ADA")


def change_argument_twice(content):
    content.arguments[0]["state"]["_init_args"] = (8,)
    return "G_ema (Generator) has the argument z_dim by position and by name"


def change_argument_count(content):
    content.arguments[0]["state"]["_init_args"] = (8,) * 8
    return "G_ema (Generator) has malformed constructor arguments"


def change_argument_value(content):
    content.arguments[0]["state"]["_init_kwargs"] = {**GENERATOR, "z_dim": float("nan")}
    return "G_ema (Generator) holds nan; expected plain values"


def change_version(content):
    content.arguments[0]["version"] = 7
    return ("G_ema is torch_utils.persistence._reconstruct_persistent_obj(...); expected a class of persistence "
            "version 6")


def change_kwargs_to_class(content):
    content.arguments[0]["class_name"] = "MappingNetwork"
    content.arguments[0]["state"]["_init_kwargs"] = {"z_dim": 8}
    return "G_ema is of class MappingNetwork; expected Generator"


def change_buffer_name(content):
    content.arguments[0]["state"]["_buffers"]["a.b"] = None
    return "G_ema._buffers has the key 'a.b'; expected an identifier"


def change_tensor(content):
    content.arguments[0]["state"]["_parameters"]["gain"] = 1.5
    return "G_ema.gain is 1.5; expected a parameter without hooks"


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
    assert re.search(r": it has more than twice the bytes of the file up to G_ema\.copy\d+; a network has each once$",
                     refused(tmp_path / "a.pkl"))


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
    expected = f": G_ema{'.child' * 17} is nested more than 16 levels deep"
    assert refused(tmp_path / "a.pkl").endswith(expected)


@pytest.mark.parametrize(("content", "expected"), [
    ([1, 2], "it holds list; expected a dict with G, D and G_ema"),
    (3, "it holds 3; expected a dict with G, D and G_ema"),
    ({"a": 1}, "it has the entries 'a'; expected G, D, G_ema, augment_pipe, training_set_kwargs"),
    ({"G": None, "D": None}, "it has the entries 'G', 'D'; expected G, D, G_ema, augment_pipe, "
                             "training_set_kwargs"),
    ({"G_ema": 5}, "G_ema is 5; expected a class of persistence version 6"),
    ({"G_ema": None, "training_set_kwargs": 3}, "training_set_kwargs is 3; expected a dict or None"),
])
def test_read_foreign_pickle_says_what_it_holds(tmp_path, content, expected):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content))
    assert refused(tmp_path / "a.pkl").endswith(": " + expected)


def test_read_pickle_of_a_model_object_names_the_class(tmp_path):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"G_ema": torch.nn.Linear(1, 1)}))
    assert refused(tmp_path / "a.pkl").endswith(
        ": it names 'torch.nn.modules.linear.Linear', which is not allowed; nothing was run")


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


# The command that converts.


def failure(capsys, *arguments):
    """Return the one line with which the command fails."""
    assert main([str(argument) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err.removeprefix("error: ").rstrip("\n")


def test_convert_as_a_command_writes_the_same_networks(tmp_path):
    target = tmp_path / "out.safetensors"
    run = subprocess.run([sys.executable, "-m", "training.nvidia_pickle", SAMPLE, target], cwd=ROOT, text=True,
                         capture_output=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [
        "G      Generator, 32 x 32, 3 channels, labels of length 2, 268,275 parameters",
        "D      Discriminator, 32 x 32, 3 channels, labels of length 2, 326,560 parameters",
        "G_ema  Generator, 32 x 32, 3 channels, labels of length 2, 268,275 parameters",
        f"wrote {target} ({target.stat().st_size:,} bytes)",
    ]
    assert run.stderr == ""
    first, second = load_network(SAMPLE).D.state_dict(), load_network(target).D.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_convert_unknown_source_is_a_warning_on_stderr(tmp_path, capsys):
    content = writer.snapshot(writer.module(generator(c_dim=0), kwargs={**GENERATOR, "c_dim": 0}, source="pass\n"))
    (tmp_path / "in.pkl").write_bytes(writer.dumps(content))
    assert main([str(tmp_path / "in.pkl"), str(tmp_path / "out.safetensors")]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[:2] == ["G      none", "D      none"]
    assert "unconditional" in out
    assert err.startswith(f"warning: {tmp_path / 'in.pkl'}: names match, behavior may not")
    assert err.count("\n") == 1


def test_convert_takes_a_pattern_or_a_folder_of_the_original_and_says_the_file(tmp_path, capsys):
    folder = tmp_path / "00000-theirs"
    folder.mkdir()
    for number in (8, 12):
        shutil.copy(SAMPLE, folder / f"network-snapshot-{number:06d}.pkl")
    for text, number in ((folder, 12), (tmp_path / "00000-*", 12), (tmp_path / "0*/network-snapshot-000008.pkl", 8)):
        assert main([str(text), str(tmp_path / "out.safetensors"), "--force"]) == 0
        assert capsys.readouterr().err == f"IN: {folder}/network-snapshot-{number:06d}.pkl\n"


@pytest.mark.parametrize(("name", "message"), [
    ("gone.pkl", "IN is {path}, which does not exist; expected a network file: a .safetensors of a run, or a .pkl of "
                 "NVIDIA's code"),
    ("file.txt/in.pkl", "IN is {path}, which does not exist; expected a network file: a .safetensors of a run, or a "
                        ".pkl of NVIDIA's code"),
    ("folder", "IN is {path}, a folder without network-snapshot-*.safetensors; expected a network file (a .safetensors "
               "of a run, or a .pkl of NVIDIA's code), or the folder of a run"),
    ("file.txt", "{path} is of an unknown kind (it starts with 74 65 78 74); expected a network file (.safetensors or "
                 "NVIDIA .pkl)")])
def test_convert_of_what_is_no_network_file_gives_a_sentence(tmp_path, capsys, name, message):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file.txt").write_text("text")
    path = tmp_path / name
    assert failure(capsys, path, tmp_path / "out.safetensors") == message.format(path=path)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["file.txt", "folder"]


def test_convert_existing_output_needs_force(tmp_path, capsys):
    target = tmp_path / "out.safetensors"
    target.write_bytes(b"precious")
    assert failure(capsys, SAMPLE, target) == (
        f"{target} already exists; expected a new name: choose another, or overwrite it with --force")
    assert target.read_bytes() == b"precious"
    assert main([str(SAMPLE), str(target), "--force"]) == 0
    assert load_network(target).G_ema.img_resolution == 32


@pytest.mark.parametrize("content", [b"", b"<html>", b"\x80\x04N.", SAMPLE.read_bytes()[:100_000]],
                         ids=["empty", "web_page", "foreign", "cut"])
def test_convert_unreadable_input_writes_nothing_and_keeps_the_old_output(tmp_path, capsys, content):
    source, target = tmp_path / "in.pkl", tmp_path / "out.safetensors"
    source.write_bytes(content)
    assert str(source) in failure(capsys, source, target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.pkl"]
    target.write_bytes(b"old")
    failure(capsys, source, target, "--force")
    assert target.read_bytes() == b"old"


def test_convert_missing_input_names_it(tmp_path, capsys):
    assert "missing.pkl" in failure(capsys, tmp_path / "missing.pkl", tmp_path / "out.safetensors")


def test_convert_missing_output_folder_names_it(tmp_path, capsys):
    assert str(tmp_path / "missing") in failure(capsys, SAMPLE, tmp_path / "missing" / "out.safetensors")


def test_convert_other_output_suffix_is_refused(tmp_path, capsys):
    assert failure(capsys, SAMPLE, tmp_path / "out.pkl") == (
        f"the output is {tmp_path / 'out.pkl'}; expected a name that ends in .safetensors")


def test_convert_safetensors_input_is_refused(tmp_path, capsys):
    source = tmp_path / "in.safetensors"
    save_network(source, Networks(G=None, D=None, G_ema=generator()))
    assert failure(capsys, source, tmp_path / "out.safetensors") == (
        f"{source} is already a safetensors file; expected an NVIDIA pickle")


def test_convert_into_a_missing_folder_names_the_folder(tmp_path, capsys):
    message = failure(capsys, SAMPLE, tmp_path / "missing" / "out.safetensors")
    assert message == f"the folder {tmp_path / 'missing'} does not exist; create it first"
