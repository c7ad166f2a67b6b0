"""training.nvidia_pickle: hostile and damaged streams are refused, and nothing of them runs, stays or takes memory."""
import contextlib
import copyreg
import pickle
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers import nvidia_pickle_writer as writer
from tests.helpers.nvidia_pickle_writer import BOMBS, Call, Name, check_each_is_refused, dumps
from training.nvidia_pickle import read_nvidia_pickle

ROOT = Path(__file__).parent.parent.parent
SAMPLE = ROOT / "tests" / "data" / "sample_32_c2.stripped.pkl"
PROTOCOLS = (2, 3, 4, 5)
KNOWN_NAMES = [tuple(name.rsplit(".", 1)) for name in (
    "torch_utils.persistence._reconstruct_persistent_obj", "dnnlib.util.EasyDict", "collections.OrderedDict",
    "torch._utils._rebuild_parameter", "torch._utils._rebuild_tensor_v2", "torch.storage._load_from_bytes",
    "numpy.dtype", "_codecs.encode", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "builtins.set",
    "builtins.bytes", "__builtin__.set", "__builtin__.bytes")]


def refused(tmp_path, data):
    """Return the reason for which a file is refused."""
    path = tmp_path / "network.pkl"
    path.write_bytes(data)
    with pytest.raises(ValueError) as caught:
        read_nvidia_pickle(path)
    message = str(caught.value)
    assert message.startswith(f"{path} cannot be read as a StyleGAN2-ADA network pickle: ")
    assert message.isascii()
    assert "\n" not in message
    return message.removeprefix(f"{path} cannot be read as a StyleGAN2-ADA network pickle: ")


def flat(content):
    """Write an object without the header and STOP."""
    return dumps(content, 2)[2:-1]


# Places where the reader looks for something, so that what lies there is not merely skipped.


def in_network(**state):
    state = {"_parameters": {}, "_buffers": {}, "_modules": {}, **state}
    return {"G_ema": writer.persistent("Generator", state)}


def in_tensor(storage):
    arguments = (storage, 0, (3,), (1,), False, {})
    return in_network(_buffers={"x": Call(Name("torch._utils", "_rebuild_tensor_v2"), arguments)})


def nested_modules(depth):
    """Return a network of 10 ** depth modules, in a few bytes."""
    module = module_with()
    for _ in range(depth):
        module = module_with(_modules=many(module, 10))
    return {"G_ema": module}


PLACES = {
    "top": lambda value: value,
    "G_ema": lambda value: {"G_ema": value},
    "options": lambda value: {"G_ema": None, "training_set_kwargs": {"x": value}},
    "arguments": lambda value: in_network(_init_kwargs={"z_dim": value}),
    "skipped": lambda value: in_network(_non_persistent_buffers_set=value),
    "buffers": lambda value: in_network(_buffers=value),
    "buffer": lambda value: in_network(_buffers={"x": value}),
    "parameter": lambda value: in_network(_parameters={"x": value}),
    "module": lambda value: in_network(_modules={"x": value}),
    "storage": in_tensor,
    "payload": lambda value: in_tensor(Call(Name("torch.storage", "_load_from_bytes"), (value,))),
}


# Malicious streams. Each would create the file `touched` if a single opcode of it did what pickle.load does.


def touch_command(touched):
    return f"touch {shlex.quote(str(touched))}"


def malicious_contents(touched):
    expression = f"open({str(touched)!r}, 'w')"
    opened = (str(touched), "w")
    return {
        "os.system": Call(Name("os", "system"), (touch_command(touched),)),
        "posix.system": Call(Name("posix", "system"), (touch_command(touched),)),
        "eval": Call(Name("builtins", "eval"), (expression,)),
        "exec": Call(Name("builtins", "exec"), (expression,)),
        "open": Call(Name("builtins", "open"), opened),
        "getattr": Call(Call(Name("builtins", "getattr"), (Name("builtins", "set"), "__init__")), ()),
        "getattr_open": Call(Call(Name("builtins", "getattr"), (Name("io", "__dict__"), "open")), opened),
        "functools.partial": Call(Call(Name("functools", "partial"), (Name("builtins", "open"), *opened)), ()),
        "map": Call(Name("builtins", "set"), (Call(Name("builtins", "map"), (Name("builtins", "open"), [*opened])),)),
        "subprocess": Call(Name("subprocess", "Popen"), (touch_command(touched),)),
        "runpy": Call(Name("runpy", "run_path"), (str(touched),)),
        "pickle.loads": Call(Name("pickle", "loads"), (dumps(Call(Name("builtins", "open"), opened)),)),
        "torch.load": Call(Name("torch", "load"), (str(touched),)),
        "dotted_name": Call(Name("torch_utils.persistence", "_reconstruct_persistent_obj.__globals__"), ()),
        "nested_load_from_bytes": Call(Name("torch.storage", "_load_from_bytes"),
                                       (dumps(Call(Name("builtins", "open"), opened), 2),)),
        "other_codec": Call(Name("_codecs", "encode"), (expression, "rot13")),
        "newobj": Call(Name("builtins", "open"), opened, new=True),
        "build_class": Call(Name("builtins", "set"), ([],), state={"__class__": Name("os", "system")}),
    }


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("kind", sorted(malicious_contents("x")))
def test_read_malicious_call_is_refused_and_runs_nothing(tmp_path, kind, protocol):
    touched = tmp_path / "touched"
    for place in PLACES.values():
        refused(tmp_path, dumps(place(malicious_contents(touched)[kind]), protocol))
        assert not touched.exists()


@pytest.mark.parametrize("kind", ["os.system", "eval", "exec", "open", "functools.partial", "nested_load_from_bytes"])
def test_malicious_contents_would_run_under_the_standard_unpickler(tmp_path, kind):
    # Guards the test above: without this, a malformed attack would prove nothing.
    touched = tmp_path / "touched"
    data = dumps({"G_ema": malicious_contents(touched)[kind]}, 4)
    # torch's function runs what is inside, and fails afterwards on what it gets.
    with pytest.raises(RuntimeError) if kind == "nested_load_from_bytes" else contextlib.nullcontext():
        pickle.loads(data)
    assert touched.exists()


def raw_streams(touched):
    path = str(touched).encode()
    argument = b"X" + len(path).to_bytes(4, "little") + path + b"X\x01\x00\x00\x00w"
    return {
        "raw_global_reduce": b"\x80\x02cbuiltins\nopen\n(" + argument + b"tR.",
        "raw_stack_global_reduce": b"\x80\x04\x8c\x08builtins\x8c\x04open\x93(" + argument + b"tR.",
        "inst": b"\x80\x02(" + argument + b"ibuiltins\nopen\n.",
        "obj": b"\x80\x02(cbuiltins\nopen\n" + argument + b"o.",
        "inst_known_name": b"\x80\x02(ibuiltins\nset\n.",
        "obj_known_name": b"\x80\x02(cbuiltins\nset\no.",
        "newobj_ex": b"\x80\x04\x8c\x08builtins\x8c\x04open\x93(" + argument + b"t}\x92.",
        "ext1": b"\x80\x02\x82\x01(" + argument + b"tR.",
        "ext2": b"\x80\x02\x83\x01\x00(" + argument + b"tR.",
        "ext4": b"\x80\x02\x84\x01\x00\x00\x00(" + argument + b"tR.",
        "persid": b"\x80\x02Popen\n.",
        "binpersid": b"\x80\x02X\x04\x00\x00\x00openQ.",
        "next_buffer": b"\x80\x05\x97.",
        "call_of_result": b"\x80\x02cbuiltins\nset\n(]tR(" + argument + b"tR.",
        "call_of_string": b"\x80\x02X\x04\x00\x00\x00open(" + argument + b"tR.",
        "call_with_list": b"\x80\x02cbuiltins\nset\n]R.",
        "call_without_arguments": b"\x80\x02R.",
        "text_opcode": b"\x80\x02I1\n.",
        "protocol_0": b"cbuiltins\nopen\n(" + argument + b"tR.",
    }


@pytest.fixture
def extension_registry():
    """Register `open` as extension 1, as a program that uses copyreg could have; the standard loader hands it out."""
    copyreg.add_extension("builtins", "open", 1)
    yield
    copyreg.remove_extension("builtins", "open", 1)


@pytest.mark.usefixtures("extension_registry")
@pytest.mark.parametrize("kind", sorted(raw_streams("x")))
def test_read_raw_malicious_opcodes_are_refused_and_run_nothing(tmp_path, kind):
    touched = tmp_path / "touched"
    refused(tmp_path, raw_streams(touched)[kind])
    assert not touched.exists()


@pytest.mark.usefixtures("extension_registry")
def test_read_extension_that_the_standard_loader_has_cached_is_refused(tmp_path):
    stream = raw_streams(tmp_path / "cached")["ext1"]
    pickle.loads(stream).close()  # from now on find_class is not asked any more
    assert refused(tmp_path, raw_streams(tmp_path / "touched")["ext1"]) == (
        "it has the opcode EXT1, which is not allowed")
    assert not (tmp_path / "touched").exists()


@pytest.mark.usefixtures("extension_registry")
@pytest.mark.parametrize("kind", ["raw_global_reduce", "raw_stack_global_reduce", "inst", "obj", "ext1", "ext2",
                                  "ext4", "protocol_0"])
def test_raw_streams_would_run_under_the_standard_unpickler(tmp_path, kind):
    touched = tmp_path / "touched"
    pickle.loads(raw_streams(touched)[kind]).close()
    assert touched.exists()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_read_unknown_name_message_names_it(tmp_path, protocol):
    data = dumps(Call(Name("os", "system"), ("true",)), protocol)
    assert refused(tmp_path, data) == "it names 'os.system', which is not allowed; nothing was run"


# Contamination: BUILD, SETITEM and the like must not reach anything that outlives the load.


@pytest.mark.parametrize(("module", "name"), KNOWN_NAMES)
@pytest.mark.parametrize("state", [{"__new__": Name("builtins", "set")}, (None, {"__new__": Name("builtins", "set")}),
                                   {"__call__": 1}])
def test_build_on_every_known_name_is_refused_and_changes_nothing(tmp_path, module, name, state):
    stream = pickle.PROTO + b"\x04" + dumps(Name(module, name), 4)[2:-1]  # without STOP
    stream += dumps(state, 4)[2:-1] + pickle.BUILD + pickle.STOP
    assert refused(tmp_path, stream) == f"it sets the state of {module}.{name}, which is not allowed"
    assert read_nvidia_pickle(SAMPLE).G_ema.arguments["z_dim"] == 64


@pytest.mark.parametrize("state", [{"value": 1}, (None, {"value": 1}), {"kind": "storage"}])
@pytest.mark.parametrize("kind", ["module", "storage", "buffer", "parameter"])
def test_build_on_what_a_call_gives_is_refused(tmp_path, kind, state):
    tensor = writer.tensor(torch.arange(3.0))
    content = {"module": writer.persistent("Generator", {}), "storage": tensor.arguments[0], "buffer": tensor,
               "parameter": writer.parameter(torch.arange(3.0))}[kind]
    content.state = state
    expected = f"it sets the state of {content.function.module}.{content.function.name}(...), which is not allowed"
    assert refused(tmp_path, dumps(content)) == expected


def test_build_twice_is_refused(tmp_path):
    stream = b"\x80\x02" + flat(Call(Name("numpy", "dtype"), ("f8", 0, 1), state=(3, "<"))) + flat((3, ">")) + b"b."
    assert refused(tmp_path, stream) == "it sets the state of numpy.dtype(...), which is not allowed"


@pytest.mark.parametrize("state", [{"a": 1}, (None, {"append": 1}), (None, {"__class__": 1})])
@pytest.mark.parametrize("content", [{}, [], "text", b"bytes", 1, (1,), None, {"a"}], ids=repr)
def test_build_on_plain_data_is_refused(tmp_path, content, state):
    refused(tmp_path, b"\x80\x04" + dumps(content, 4)[2:-1] + dumps(state, 4)[2:-1] + pickle.BUILD + pickle.STOP)


def test_read_results_of_two_reads_share_nothing():
    first, second = read_nvidia_pickle(SAMPLE), read_nvidia_pickle(SAMPLE)
    first.G_ema.arguments["mapping_kwargs"]["num_layers"] = 9
    first.training_set_kwargs["resolution"] = 9
    first.G_ema.tensors["synthesis.b4.const"].zero_()
    third = read_nvidia_pickle(SAMPLE)
    assert second.G_ema.arguments == third.G_ema.arguments
    assert second.training_set_kwargs == third.training_set_kwargs
    assert torch.equal(second.G_ema.tensors["synthesis.b4.const"], third.G_ema.tensors["synthesis.b4.const"])


# Known names with foreign arguments.


def foreign_calls():
    """Return (place, call, message)."""
    tensor = writer.tensor(torch.arange(3.0))
    storage = tensor.arguments[0]
    buffer, parameter = (f"G_ema.x is torch._utils.{name}(...); expected a {kind} without hooks" for name, kind in (
        ("_rebuild_tensor_v2", "buffer"), ("_rebuild_parameter", "parameter")))
    encoded = "G_ema.x has _codecs.encode(...) in place of bytes"
    a_set = "G_ema._non_persistent_buffers_set is {}.set(...); expected a set of names"
    return [
        ("buffers", Call(Name("collections", "OrderedDict"), ([["a", 1]],)),
         "G_ema._buffers is collections.OrderedDict(...); expected a dict"),
        ("options", Call(Name("dnnlib.util", "EasyDict"), ("a", 1)),
         "training_set_kwargs holds dnnlib.util.EasyDict(...); expected plain values"),
        ("skipped", Call(Name("builtins", "set"), ([1, 2],)), a_set.format("builtins")),
        ("skipped", Call(Name("__builtin__", "set"), ("text",)), a_set.format("__builtin__")),
        ("payload", Call(Name("_codecs", "encode"), (3, "latin1")), encoded),
        ("payload", Call(Name("_codecs", "encode"), ("a", "zip")), encoded),
        ("payload", Call(Name("builtins", "bytes"), (2**40,)), "G_ema.x has builtins.bytes(...) in place of bytes"),
        ("options", Call(Name("numpy", "dtype"), ("O", 0, 1)),
         "training_set_kwargs holds numpy.dtype(...); expected plain values"),
        ("arguments", Call(Name("numpy._core.multiarray", "scalar"), ("f8", b"12345678")),
         "G_ema (Generator) holds numpy._core.multiarray.scalar(...); expected plain values"),
        ("payload", "text", "G_ema.x has 'text' in place of bytes"),
        ("buffer", Call(Name("torch._utils", "_rebuild_tensor_v2"), ([], 0, (), (), False, {})), buffer),
        ("storage", Call(Name("torch.storage", "_load_from_bytes"), (b"", 1)), buffer),
        ("storage", storage.arguments[0], buffer),
        ("buffer", Call(Name("torch._utils", "_rebuild_tensor_v2"), (storage, 0, (3,), (1,), False, {}, {"a": 1})),
         buffer),
        ("parameter", Call(Name("torch._utils", "_rebuild_parameter"), ("weight", True, {})), parameter),
        ("parameter", Call(Name("torch._utils", "_rebuild_parameter"), (tensor, True, {"a": "hook"})), parameter),
        ("module", Call(Name("torch_utils.persistence", "_reconstruct_persistent_obj"), ({"type": "function"},)),
         "G_ema.x is torch_utils.persistence._reconstruct_persistent_obj(...); expected a class of persistence "
         "version 6"),
    ]


@pytest.mark.parametrize("index", range(len(foreign_calls())))
@pytest.mark.parametrize("new", [False, True])
def test_read_known_name_with_foreign_arguments_is_refused(tmp_path, index, new):
    place, call, expected = foreign_calls()[index]
    if isinstance(call, Call):
        call.new = new
    assert refused(tmp_path, dumps(PLACES[place](call))) == expected


@pytest.mark.parametrize(("module", "name"), KNOWN_NAMES)
@pytest.mark.parametrize("arguments", [(1,) * 9, (Name("builtins", "set"),), ([], {}), ({"a": 1}, "x", None)], ids=repr)
def test_read_known_name_with_any_arguments_raises_value_error(tmp_path, module, name, arguments):
    for place in PLACES.values():
        refused(tmp_path, dumps(place(Call(Name(module, name), arguments))))


# Damaged and hostile shapes.


@pytest.mark.parametrize("stream", [
    b"", b"\x80", b"\x80\x04", b"\x80\x04.", b"\x80\x04N", b"\x80\x04NN.", b"\x80\x04(.", b"\x80\x04(N.", b"\x80\x04s.",
    b"\x80\x04u.", b"\x80\x04e.", b"\x80\x04h\x05.", b"\x80\x04(h\x00R.", b"\x80\x04\x94.", b"\x80\x04}(Nu.",
    b"\x80\x04}N\x8c\x01as.", b"\x80\x04}(N(sN.", b"\x80\x04Nb.", b"\x80\x04NN\x93.", b"\x80\x04]N\x8c\x01x\x93.",
    b"\x80\x06N.", b"\x80\x01N.", b"\x80\x04\x8c\xffab", b"\x80\x04\x8c\x01\xff.", b"\x80\x04\xff.",
    b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\xffx.", b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7fx.",
    b"\x80\x04cabc", b"\x80\x04c\xff\n\xff\n.", b"\x80\x04\x8f(]\x90.", b"\x80\x04]N}s.", b"\x80\x04NNa.",
    b"\x80\x04\x95" + b"\xff" * 7 + b"\x7fN.", b"\x80\x04\x95\xff\x00\x00\x00\x00\x00\x00\x00N.", b"\x80\x04e(N.",
    b"\x80\x04(NsN.", b"\x80\x04N(\x85.", b"\x80\x04](NNs.",
], ids=lambda stream: stream[:12].hex())
def test_read_damaged_stream_is_refused(tmp_path, stream):
    refused(tmp_path, stream)


KEY = "a dict or set has the key tuple; expected a string or a small number"
KEYS = {  # nested so deep that hashing overflows the C stack, or so often in itself that it never ends
    "deep_key": b"})" + b"\x85" * 200_000 + b"Ns.", "deep_member": b"\x8f()" + b"\x85" * 200_000 + b"\x90.",
    "deep_second_key": b"}(K\x01N)" + b"\x85" * 200_000 + b"Nu.",
    "doubled_key": b"})" + b"".join(b"\x94h%c\x86" % number for number in range(99)) + b"Ns.",
    "memo_key": b"])\x85q\x05a}h\x05Ns.",
    "key_from_put": b"})\x85r\x09\x00\x00\x00Ns.",
}


@pytest.mark.parametrize("kind", sorted(KEYS))
def test_read_tuple_as_a_key_is_refused_before_it_is_hashed(tmp_path, kind):
    assert refused(tmp_path, b"\x80\x04" + KEYS[kind]) == KEY


@pytest.mark.parametrize("stream", [b"})\x85NbNs.", b"})\x85(eNs."])
def test_read_tuple_that_is_filled_before_it_is_a_key_is_refused(tmp_path, stream):
    refused(tmp_path, b"\x80\x04" + stream)


@pytest.mark.parametrize("key", [-1, 2**20, 2**61 - 1, 1.5, None, True, b"x"])
def test_read_other_key_than_a_string_or_a_small_number_is_refused(tmp_path, key):
    assert refused(tmp_path, dumps({"G_ema": None, key: 1})).startswith("a dict or set has the key ")


MAKE = b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n"
NESTED = {
    "tuples": b")" + b"\x85" * 20_000, "lists": b"]" * 20_000 + b"a" * 19_999,
    "dicts": b"}" + b"K\x01}" * 20_000 + b"s" * 20_000,
    "objects": MAKE + b"q\x00" + b"h\x00" * 20_000 + b"N" + b"\x85R" * 20_001,
}


def test_read_deeply_nested_values_do_not_end_the_process(tmp_path):
    # In a thread with a small stack, where recursion in C would end the process soonest.
    for kind, value in NESTED.items():
        streams = {"alone": value, "argument": MAKE + value + b"\x85R", "G_ema": b"}" + flat("G_ema") + value + b"s",
                   "training_set": b"}(" + flat("G_ema") + b"N" + flat("training_set_kwargs") + value + b"u"}
        for place, stream in streams.items():
            (tmp_path / f"{kind}_{place}.pkl").write_bytes(b"\x80\x02" + stream + b".")
    for number in (400_000, 1_000_000):
        (tmp_path / f"{number}.pkl").write_bytes(b"\x80\x02)" + b"\x85" * number + b".")
    code = """
import gc, sys, threading
from pathlib import Path
from training.nvidia_pickle import read_nvidia_pickle
def read():
    for path in sorted(Path(sys.argv[1]).iterdir()):
        try:
            read_nvidia_pickle(path)
        except ValueError as error:
            assert str(error).startswith(f"{path} cannot be read as a StyleGAN2-ADA network pickle: "), error
        gc.collect()
        print(path.name, flush=True)
threading.stack_size(256 * 1024)
thread = threading.Thread(target=read)
thread.start()
thread.join()
"""
    run = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.splitlines() == sorted(path.name for path in tmp_path.iterdir())
    assert len(run.stdout.splitlines()) == 18


# Bombs: a few bytes that ask for much.


@pytest.mark.parametrize("index", [500_000, 2**31 - 1, 2**32 - 1])
def test_read_memo_index_far_beyond_the_file_is_harmless(tmp_path, index):
    data = b"\x80\x04Nr" + index.to_bytes(4, "little") + b"."
    assert refused(tmp_path, data) == "it holds None; expected a dict with G, D and G_ema"


@pytest.mark.parametrize("opcode", [b"\x8f", b"}", b"]", b"N", b"\x94"])
def test_read_more_objects_than_any_network_is_refused(tmp_path, opcode):
    data = b"\x80\x04N" + opcode * 500_000 + b"."
    assert refused(tmp_path, data) == "it has more than 500,000 opcodes"


def test_read_lists_that_unfold_without_end_are_refused(tmp_path):
    value = [1]
    for _ in range(12):
        value = [value] * 10
    content = {"G_ema": None, "training_set_kwargs": {"x": value}}
    assert refused(tmp_path, dumps(content)) == (
        "it has more than 10,000 values up to training_set_kwargs; a network has about 1,000")


def many(value, count=1000):
    return {f"x{number}": value for number in range(count)}


def tensor_of(payload, size=(3,), stride=(1,)):
    storage = Call(Name("torch.storage", "_load_from_bytes"), (payload,))
    return Call(Name("torch._utils", "_rebuild_tensor_v2"), (storage, 0, size, stride, False, {}))


def module_with(**state):
    return writer.persistent("ToRGBLayer", {"_parameters": {}, "_buffers": {}, "_modules": {}, **state})


IN_BYTES = "it has more than twice the bytes of the file up to {}; a network has each once"
IN_VALUES = "it has more than 10,000 values up to G_ema.{}; a network has about 1,000"
COPIES = {  # a large value that many places refer to
    "storage": (lambda: in_network(_buffers=many(tensor_of(writer.storage_bytes(torch.zeros(25_000))))),
                IN_BYTES.format("G_ema.x2")),
    "encoded": (lambda: in_network(_buffers=many(tensor_of(Call(Name("_codecs", "encode"), (
        writer.storage_bytes(torch.zeros(25_000)).decode("latin1"), "latin1"))))), IN_BYTES.format("G_ema.x2")),
    "text": (lambda: {"G_ema": None, "training_set_kwargs": many("x" * 100_000)},
             IN_BYTES.format("training_set_kwargs")),
    "set": (lambda: in_network(_modules=many(module_with(_non_persistent_buffers_set=Call(Name("builtins", "set"), (
        ["x"] * 5_000,))))), IN_VALUES.format("x1")),
    "modules": (lambda: in_network(_modules=many(module_with(_buffers=many(None, 5_000)))),
                IN_VALUES.format("x1")),
    "name": (lambda: in_network(_buffers={"x" * 65: tensor_of(b"")}),
             f"G_ema._buffers has the key '{'x' * 65}'; expected an identifier"),
}


@pytest.mark.parametrize("kind", sorted(COPIES))
def test_read_many_copies_of_one_large_value_are_refused(tmp_path, kind):
    content, expected = COPIES[kind]
    assert refused(tmp_path, dumps(content())) == expected


def test_read_bombs_take_little_time_and_memory(tmp_path):
    payload = writer.storage_bytes(torch.arange(4.0))
    terabyte = payload.replace(b"K\x04N", b"\x8a\x05" + (2**38).to_bytes(5, "little") + b"N")
    contents = {
        "storage": dumps(PLACES["payload"](terabyte)),
        "storage_and_count": dumps(PLACES["payload"](terabyte.replace((4).to_bytes(8, "little"),
                                                                      (2**38).to_bytes(8, "little")))),
        "empty_tensors": dumps(in_network(_buffers=many(tensor_of(payload, (0, 2**39), (1, 1)), 9_000))),
        "bytearray": dumps(PLACES["payload"](dumps(Call(Name("builtins", "bytearray"), (2**40,)), 2))),
        "modules_in_modules": dumps(nested_modules(15)),
        **BOMBS}
    for name, data in contents.items():
        (tmp_path / f"{name}.pkl").write_bytes(data)
    check_each_is_refused("training.nvidia_pickle", "read_nvidia_pickle", tmp_path)


@pytest.mark.parametrize("change_count", [False, True])
def test_read_storage_that_declares_a_terabyte_is_refused(tmp_path, change_count):
    count, declared = (2**38 if change_count else 4), b"\x8a\x05" + (2**38).to_bytes(5, "little")
    payload = writer.storage_bytes(torch.arange(4.0))
    assert payload.count(b"K\x04N") == payload.count((4).to_bytes(8, "little")) == 1
    changed = payload.replace((4).to_bytes(8, "little"), count.to_bytes(8, "little"))
    changed = changed.replace(b"K\x04N", declared + b"N")
    assert refused(tmp_path, dumps(PLACES["payload"](changed))) == "G_ema.x has a malformed storage"


def test_read_value_that_declares_more_bytes_than_the_file_has_is_refused(tmp_path):
    terabyte = (2**40).to_bytes(8, "little")
    for opcode in (b"B\xff\xff\xff\x7f", b"\x8e" + terabyte, b"\x8d" + terabyte):
        assert refused(tmp_path, b"\x80\x04" + opcode + b"x.").startswith("it is not a pickle, or damaged or cut off (")


def test_read_file_larger_than_any_network_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "network.pkl"
    with open(path, "wb") as file:
        file.write(b"\x80\x04")
        file.truncate(5 << 30)  # takes no room on the disk
    with pytest.raises(ValueError, match=r": it has 5,368,709,120 bytes; expected at most 4,294,967,296$"):
        read_nvidia_pickle(path)


def test_read_call_with_thousands_of_arguments_is_refused(tmp_path):
    # It costs nothing to read, but would be gone through for each of thousands of references to it.
    assert refused(tmp_path, dumps(Call(Name("numpy", "dtype"), (None,) * 100_000))) == (
        "it calls numpy.dtype with 100,000 arguments")
