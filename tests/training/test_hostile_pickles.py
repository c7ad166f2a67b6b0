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
from tests.helpers.nvidia_pickle_writer import Call, Name, dumps
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
    refused(tmp_path, dumps({"G_ema": malicious_contents(touched)[kind]}, protocol))
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
        "opcode EXT1 at byte 2 is outside the closed list")
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
    assert refused(tmp_path, data) == "the name 'os.system' is outside the closed list; nothing was run"


# Contamination: BUILD, SETITEM and the like must not reach anything that outlives the load.


@pytest.mark.parametrize(("module", "name"), KNOWN_NAMES)
@pytest.mark.parametrize("state", [{"__new__": Name("builtins", "set")}, (None, {"__new__": Name("builtins", "set")}),
                                   {"__call__": 1}])
def test_build_on_every_known_name_is_refused_and_changes_nothing(tmp_path, module, name, state):
    stream = pickle.PROTO + b"\x04" + dumps(Name(module, name), 4)[2:-1]  # without STOP
    stream += dumps(state, 4)[2:-1] + pickle.BUILD + pickle.STOP
    assert refused(tmp_path, stream) == f"it sets the state of {module}.{name}, which is outside the closed list"
    assert read_nvidia_pickle(SAMPLE).G_ema.arguments["z_dim"] == 64


@pytest.mark.parametrize("state", [{"value": 1}, (None, {"value": 1}), {"kind": "storage"}])
@pytest.mark.parametrize("kind", ["module", "storage", "buffer", "parameter"])
def test_build_on_what_a_call_gives_is_refused(tmp_path, kind, state):
    tensor = writer.tensor(torch.arange(3.0))
    content = {"module": writer.persistent("Generator", {}), "storage": tensor.arguments[0], "buffer": tensor,
               "parameter": writer.parameter(torch.arange(3.0))}[kind]
    content.state = state
    assert refused(tmp_path, dumps(content)) == f"it sets the state of a {kind}, which is outside the closed list"


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
    tensor = writer.tensor(torch.arange(3.0))
    storage = tensor.arguments[0]
    return {
        "it calls collections.OrderedDict with arguments that do not fit ('_empty_dict() takes 0 positional arguments "
        "but 1 was given')": Call(Name("collections", "OrderedDict"), ([["a", 1]],)),
        "it calls dnnlib.util.EasyDict with arguments that do not fit ('_empty_dict() takes 0 positional arguments but "
        "2 were given')": Call(Name("dnnlib.util", "EasyDict"), ("a", 1), new=True),
        "a set is made of list; expected a list of str": Call(Name("builtins", "set"), ([1, 2],)),
        "a set is made of 'text'; expected a list of str": Call(Name("__builtin__", "set"), ("text",)),
        "_codecs.encode(3, 'latin1') is outside the closed list": Call(Name("_codecs", "encode"), (3, "latin1")),
        "_codecs.encode('a', 'zip') is outside the closed list": Call(Name("_codecs", "encode"), ("a", "zip")),
        "numpy.dtype('O') is outside the closed list of numeric types": Call(Name("numpy", "dtype"), ("O", 0, 1)),
        "a numpy scalar is made of 'f8' and b'12345678'; expected a type and bytes":
            Call(Name("numpy._core.multiarray", "scalar"), ("f8", b"12345678")),
        "a tensor storage is 'text'; expected bytes": Call(Name("torch.storage", "_load_from_bytes"), ("text",)),
        "a tensor has list in place of a storage":
            Call(Name("torch._utils", "_rebuild_tensor_v2"), ([], 0, (), (), False, {})),
        "a tensor has hooks, metadata or an odd requires_grad; expected none":
            Call(Name("torch._utils", "_rebuild_tensor_v2"), (storage, 0, (3,), (1,), False, {}, {"a": 1})),
        "a parameter is made of 'weight'; expected a tensor without hooks":
            Call(Name("torch._utils", "_rebuild_parameter"), ("weight", True, {})),
        "a parameter is made of _Record; expected a tensor without hooks":
            Call(Name("torch._utils", "_rebuild_parameter"), (tensor, True, {0: "hook"})),
    }


@pytest.mark.parametrize("expected", sorted(foreign_calls()))
@pytest.mark.parametrize("new", [False, True])
def test_read_known_name_with_foreign_arguments_is_refused(tmp_path, expected, new):
    call = foreign_calls()[expected]
    call.new = new
    assert refused(tmp_path, dumps(call)) == expected


@pytest.mark.parametrize(("module", "name"), KNOWN_NAMES)
@pytest.mark.parametrize("arguments", [(1,) * 9, (Name("builtins", "set"),), ([], {}), ({"a": 1}, "x", None)], ids=repr)
def test_read_known_name_with_any_arguments_raises_value_error(tmp_path, module, name, arguments):
    refused(tmp_path, dumps({"G_ema": Call(Name(module, name), arguments)}))


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


KEY = "a dict or set has the key tuple; expected str or int"
KEYS = {  # nested so deep that hashing overflows the C stack, or so often in itself that it never ends
    "deep_key": b"})" + b"\x85" * 200_000 + b"Ns.", "deep_member": b"\x8f()" + b"\x85" * 200_000 + b"\x90.",
    "deep_second_key": b"}(K\x01N)" + b"\x85" * 200_000 + b"Nu.",
    "doubled_key": b"})" + b"".join(b"\x94h%c\x86" % number for number in range(99)) + b"Ns.",
    "memo_key": b"])\x85q\x05a}h\x05Ns.",
    "key_after_fill": b"})\x85NbNs.", "key_after_no_items": b"})\x85(eNs.",
    "key_from_put": b"})\x85r\x09\x00\x00\x00Ns.",
}


@pytest.mark.parametrize("kind", sorted(KEYS))
def test_read_tuple_as_a_key_is_refused_before_it_is_hashed(tmp_path, kind):
    assert refused(tmp_path, b"\x80\x04" + KEYS[kind]) == KEY


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
def test_read_memo_index_far_beyond_the_file_is_refused(tmp_path, index):
    data = b"\x80\x04Nr" + index.to_bytes(4, "little") + b"."
    assert refused(tmp_path, data) == "it holds or numbers more than 500,000 objects; no network's file does"


@pytest.mark.parametrize("opcode", [b"\x8f", b"}", b"]", b"N", b"\x94"])
def test_read_more_objects_than_any_network_is_refused(tmp_path, opcode):
    data = b"\x80\x04N" + opcode * 500_000 + b"."
    assert refused(tmp_path, data) == "it holds or numbers more than 500,000 objects; no network's file does"


def test_read_lists_that_unfold_without_end_are_refused(tmp_path):
    value = ["x"]
    for _ in range(12):
        value = [value] * 10
    content = {"G_ema": None, "training_set_kwargs": {"x": value}}
    assert refused(tmp_path, dumps(content)) == (
        "training_set_kwargs holds more than 10,000 values; no network's file does")


@pytest.mark.parametrize("kind", ["storage", "text", "set"])
def test_read_many_copies_of_one_large_value_are_refused(tmp_path, kind):
    name, arguments = {
        "storage": (Name("torch.storage", "_load_from_bytes"), (writer.storage_bytes(torch.zeros(250_000)),)),
        "text": (Name("_codecs", "encode"), ("x" * 1_000_000, "latin1")),
        "set": (Name("builtins", "set"), (["x"] * 100_000,))}[kind]
    content = [Call(name, arguments) for _ in range(1000)]
    assert refused(tmp_path, dumps(content)) == "it asks for more copies of its data than the file has bytes"


@pytest.mark.parametrize("change_count", [False, True])
def test_read_storage_that_declares_a_terabyte_is_refused(tmp_path, change_count):
    count, declared = (2**38 if change_count else 4), b"\x8a\x05" + (2**38).to_bytes(5, "little")
    payload = writer.storage_bytes(torch.arange(4.0))
    assert payload.count(b"K\x04N") == payload.count((4).to_bytes(8, "little")) == 1
    changed = payload.replace((4).to_bytes(8, "little"), count.to_bytes(8, "little"))
    changed = changed.replace(b"K\x04N", declared + b"N")
    data = dumps({"G_ema": Call(Name("torch.storage", "_load_from_bytes"), (changed,))})
    assert refused(tmp_path, data) == (f"a storage of 274,877,906,944 torch.float32 holds {count:,} elements in 16 "
                                       "bytes; expected 1,099,511,627,776 bytes")


def test_read_value_that_declares_more_bytes_than_the_file_has_is_refused(tmp_path):
    terabyte = (2**40).to_bytes(8, "little")
    for opcode in (b"B\xff\xff\xff\x7f", b"\x8e" + terabyte, b"\x8d" + terabyte):
        assert refused(tmp_path, b"\x80\x04" + opcode + b"x.").startswith("the pickle stream is damaged or cut off (")


def test_read_file_larger_than_any_network_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "network.pkl"
    with open(path, "wb") as file:
        file.write(b"\x80\x04")
        file.truncate(5 << 30)  # takes no room on the disk
    with pytest.raises(ValueError, match=r": it has 5,368,709,120 bytes; expected at most 4,294,967,296$"):
        read_nvidia_pickle(path)
