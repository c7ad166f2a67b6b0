"""training.pickles.machine: plain data comes back, everything else is refused and nothing runs."""
import builtins
import collections
import contextlib
import copyreg
import functools
import io
import os
import pickle
import shlex

import pytest

from tests.helpers.nvidia_pickle_writer import Call, Name, dumps
from training.nvidia_pickle import _known_names, read_nvidia_pickle
from training.pickles.machine import Known, PickleRefused, load

PROTOCOLS = (2, 3, 4, 5)


def load_bytes(data, known=None):
    return load(io.BytesIO(data), _known_names() if known is None else known)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_load_plain_data_gives_equal_data(protocol):
    shared = [1.5, "x"]
    content = {"a": None, "b": [True, False, 0, 1, 255, 256, 65536, -1, -2**31, 2**40, -2**70],
               "c": shared, "d": shared,
               "e": (), "f": (1,), "g": (1, 2), "h": (1, 2, 3), "i": (1, 2, 3, 4), "j": b"\x00\xff", "k": b"", 7: {},
               "l": {"p", "q"}, "m": set(), "n": "\u00e9" * 300, "o": b"\xfe" * 300, "p": collections.OrderedDict(z=1),
               "q": [[]], "r": list(range(2000))}
    for fix_imports in (True, False):  # __builtin__ and builtins
        loaded = load_bytes(pickle.dumps(content, protocol, fix_imports=fix_imports))
        assert loaded == content
        assert loaded["c"] is loaded["d"]


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
def test_load_malicious_call_is_refused_and_runs_nothing(tmp_path, kind, protocol):
    touched = tmp_path / "touched"
    path = tmp_path / "network.pkl"
    path.write_bytes(dumps({"G_ema": malicious_contents(touched)[kind]}, protocol))
    with pytest.raises(ValueError, match=r"network\.pkl cannot be read as a StyleGAN2-ADA network pickle: "):
        read_nvidia_pickle(path)
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
def test_load_raw_malicious_opcodes_are_refused_and_run_nothing(tmp_path, kind):
    touched = tmp_path / "touched"
    with pytest.raises(PickleRefused):
        load_bytes(raw_streams(touched)[kind])
    path = tmp_path / "network.pkl"
    path.write_bytes(raw_streams(touched)[kind])
    with pytest.raises(ValueError, match=r"network\.pkl"):
        read_nvidia_pickle(path)
    assert not touched.exists()


@pytest.mark.usefixtures("extension_registry")
@pytest.mark.parametrize("kind", ["raw_global_reduce", "raw_stack_global_reduce", "inst", "obj", "ext1", "ext2",
                                  "ext4", "protocol_0"])
def test_raw_streams_would_run_under_the_standard_unpickler(tmp_path, kind):
    touched = tmp_path / "touched"
    pickle.loads(raw_streams(touched)[kind]).close()
    assert touched.exists()


def test_load_unknown_name_message_names_it():
    with pytest.raises(PickleRefused) as caught:
        load_bytes(dumps(Call(Name("os", "system"), ("true",))))
    assert str(caught.value) == "the name 'os.system' is outside the closed list; nothing was run"


# Contamination: BUILD, SETITEM and the like must not reach anything that outlives the load.


@pytest.mark.parametrize("target", sorted(map(" ".join, _known_names())))
@pytest.mark.parametrize("state", [{"stand_in": Name("builtins", "set")}, (None, {"stand_in": Name("builtins", "set")}),
                                   {"__call__": 1}])
def test_build_on_every_known_name_is_refused_and_changes_nothing(target, state):
    module, name = target.split()
    before = {key: (entry, entry.stand_in) for key, entry in _known_names().items()}
    snapshots = [dict(vars(each)) for each in (Known, PickleRefused)]
    stream = pickle.PROTO + b"\x04" + dumps(Name(module, name), 4)[2:-1]  # without STOP
    stream += dumps(state, 4)[2:-1] + pickle.BUILD + pickle.STOP
    with pytest.raises(PickleRefused, match="it sets the state of Known"):
        load_bytes(stream)
    after = _known_names()
    assert after.keys() == before.keys()
    assert [dict(vars(each)) for each in (Known, PickleRefused)] == snapshots
    assert not hasattr(builtins.set, "stand_in")
    assert not hasattr(functools.partial, "stand_in")


def test_load_results_of_two_loads_share_nothing():
    data = dumps({"a": Call(Name("collections", "OrderedDict")), "b": Call(Name("builtins", "set"), ([],))})
    first, second = load_bytes(data), load_bytes(data)
    first["a"]["x"] = 1
    first["b"].add("x")
    assert second == load_bytes(data) == {"a": {}, "b": set()}


def test_load_known_entries_are_immutable():
    entry = next(iter(_known_names().values()))
    with pytest.raises(AttributeError):
        entry.stand_in = os.system


# Damaged and hostile shapes.


@pytest.mark.parametrize("stream", [
    b"", b"\x80", b"\x80\x04", b"\x80\x04.", b"\x80\x04N", b"\x80\x04NN.", b"\x80\x04(.", b"\x80\x04(N.", b"\x80\x04s.",
    b"\x80\x04u.", b"\x80\x04e.", b"\x80\x04h\x05.", b"\x80\x04(h\x00R.", b"\x80\x04\x94.", b"\x80\x04}(Nu.",
    b"\x80\x04}N\x8c\x01as.", b"\x80\x04}(N(sN.", b"\x80\x04Nb.", b"\x80\x04NN\x93.", b"\x80\x04]N\x8c\x01x\x93.",
    b"\x80\x06N.", b"\x80\x01N.", b"\x80\x04\x8c\xffab", b"\x80\x04\x8c\x01\xff.", b"\x80\x04\xff.",
    b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\xffx.", b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7fx.",
    b"\x80\x04cabc", b"\x80\x04c\xff\n\xff\n.", b"\x80\x04\x8f(]\x90.", b"\x80\x04]N}s.", b"\x80\x04NNa.",
    # Tuples nested so deep that hashing them as a key or a member would end the process.
    b"\x80\x04})" + b"\x85" * 200_000 + b"Ns.", b"\x80\x04\x8f()" + b"\x85" * 200_000 + b"\x90.",
], ids=lambda stream: stream[:12].hex())
def test_load_damaged_stream_raises_refused(stream):
    with pytest.raises(PickleRefused):
        load_bytes(stream)


def test_load_leaves_the_stream_behind_stop():
    stream = io.BytesIO(b"\x80\x02K\x07." + b"\x80\x02K\x08." + b"rest")
    assert [load(stream, {}), load(stream, {}), stream.read()] == [7, 8, b"rest"]
