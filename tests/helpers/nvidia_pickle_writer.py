"""Write pickles in NVIDIA's format, and hostile ones, without the classes that they name.

The standard pickler only writes names that it can import; this one writes any name, in any protocol from 2 to 5.
"""
import io
import pickle
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

PLACEHOLDER_SOURCE = "# source of networks.py removed\n"

# Streams that ask for much time or memory, or for a deep stack; none is the file of a network or of CIFAR-10.
_TERABYTE = (2**40).to_bytes(8, "little")
BOMBS = {
    "memo_index": b"\x80\x02Nr\xff\xff\xff\xff.",
    "memo_doubling": b"\x80\x04)" + b"".join(b"\x94h%c\x86" % number for number in range(200)) + b".",
    "memo_doubling_key": b"\x80\x04})" + b"".join(b"\x94h%c\x86" % number for number in range(200)) + b"Ns.",
    "nested_tuples": b"\x80\x02)" + b"\x85" * 1_000_000 + b".",
    "nested_tuples_below_the_limit": b"\x80\x02)" + b"\x85" * 400_000 + b".",
    "nested_key": b"\x80\x02})" + b"\x85" * 400_000 + b"Ns.",
    "nested_lists": b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".",
    "sets": b"\x80\x04" + b"\x8f" * 3_000_000 + b".",
    "colliding_keys": b"\x80\x02}(" + b"".join(
        b"\x8a\x0a" + (number * (2**61 - 1)).to_bytes(10, "little") + b"N" for number in range(160_000)) + b"u.",
    "bytes": b"\x80\x04\x8e" + _TERABYTE + b"x.",
    "text": b"\x80\x04\x8d" + _TERABYTE + b"x.",
    "python2_text": b"\x80\x02T\xff\xff\xff\x7fx.",
    "frame": b"\x80\x04\x95" + _TERABYTE + b"N.",
    "bytearray": b"\x80\x05\x96" + _TERABYTE + b"x.",
    "call_of_bytearray": b"\x80\x02cbuiltins\nbytearray\n\x8a\x06" + _TERABYTE[:6] + b"\x85R.",
}


_REFUSE_EACH = """
import importlib, sys, time
from pathlib import Path
from tests.helpers.nvidia_pickle_writer import limit_memory
module, function, folder, expected = sys.argv[1:]
read = getattr(importlib.import_module(module), function)
limit_memory(400 << 20)
for path in sorted(Path(folder).iterdir()):
    start = time.process_time()
    try:
        read(path)
    except ValueError as error:
        assert expected.format(path=path) in str(error), error
        assert "Memory" not in str(error) and "allocate" not in str(error), error
        assert time.process_time() - start < 10
        print(path.name, flush=True)
"""


def check_each_is_refused(module: str, function: str, folder: Path, expected: str = "") -> None:
    """Check that a function refuses each file of a folder, in a process with little memory, and in little time.

    expected: what each message contains, with {path} for the file
    """
    run = subprocess.run([sys.executable, "-c", _REFUSE_EACH, module, function, folder, expected],
                         cwd=Path(__file__).parent.parent.parent, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.split() == sorted(path.name for path in folder.iterdir())


def limit_memory(num_bytes: int) -> None:
    """Let this process allocate `num_bytes` more than it has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + num_bytes,) * 2)


@dataclass(frozen=True)
class Name:
    """A global: written as GLOBAL or STACK_GLOBAL."""
    module: str
    name: str

    def __call__(self, *_):
        raise AssertionError("a name is written, never called")


@dataclass(eq=False)
class Call:
    """An object that a pickle makes by calling a name (REDUCE, or NEWOBJ), with a state to BUILD if any."""
    function: Name
    arguments: tuple = ()
    state: object = None
    new: bool = False


class _Writer(pickle._Pickler):  # the Python one: the C one cannot be taught to write names
    def save(self, obj, save_persistent_id=True):
        if isinstance(obj, Name):
            return self._save_name(obj)
        if isinstance(obj, Call) and id(obj) not in self.memo:
            return self._save_call(obj)
        return super().save(obj, save_persistent_id)

    def _save_name(self, obj):
        if self.proto >= 4:
            self.save(obj.module)
            self.save(obj.name)
            self.write(pickle.STACK_GLOBAL)
        else:
            self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())

    def _save_call(self, obj):
        self.save(obj.function)
        self.save(obj.arguments)
        self.write(pickle.NEWOBJ if obj.new else pickle.REDUCE)
        self.memoize(obj)
        if obj.state is not None:
            self.save(obj.state)
            self.write(pickle.BUILD)


def dumps(content, protocol: int = 4) -> bytes:
    file = io.BytesIO()
    _Writer(file, protocol).dump(content)
    return file.getvalue()


def ordered_dict() -> Call:
    return Call(Name("collections", "OrderedDict"))


def storage_bytes(values: Tensor) -> bytes:
    """Write the storage of `values` [numel] in torch's legacy format, as torch's own pickling does."""
    file = io.BytesIO()
    storage = torch.storage.TypedStorage(wrap_storage=values.untyped_storage(), dtype=values.dtype, _internal=True)
    torch.save(storage, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def tensor(values: Tensor) -> Call:
    storage = Call(Name("torch.storage", "_load_from_bytes"), (storage_bytes(values.contiguous().clone().flatten()),))
    shape, stride = tuple(values.shape), tuple(values.contiguous().stride())
    return Call(Name("torch._utils", "_rebuild_tensor_v2"), (storage, 0, shape, stride, False, ordered_dict()))


def parameter(values: Tensor) -> Call:
    return Call(Name("torch._utils", "_rebuild_parameter"), (tensor(values), False, ordered_dict()))


def persistent(class_name: str, state: dict, source: str = PLACEHOLDER_SOURCE, version: int = 6) -> Call:
    meta = {"type": "class", "version": version, "module_src": source, "class_name": class_name, "state": state}
    return Call(Name("torch_utils.persistence", "_reconstruct_persistent_obj"), (meta,))


def module(network: nn.Module, args: tuple = (), kwargs: dict | None = None, **meta) -> Call:
    """Describe one of our networks as the original repository would pickle it."""
    state = {
        "_parameters": {name: parameter(value.detach()) for name, value in network._parameters.items()
                        if value is not None},
        "_buffers": {name: tensor(value) for name, value in network._buffers.items() if value is not None},
        "_non_persistent_buffers_set": set(),
        "_modules": {name: module(child, **meta) for name, child in network._modules.items() if child is not None},
        "_init_args": args,
        "_init_kwargs": kwargs or {},
    }
    return persistent(type(network).__name__, state, **meta)


def snapshot(G_ema: Call, **others) -> dict:
    return {"training_set_kwargs": None, "G": None, "D": None, "augment_pipe": None, "G_ema": G_ema, **others}
