"""Read the network files (.pkl) of NVIDIA's StyleGAN2-ADA repository without running anything in them.

Such a file carries the source text of its classes, which the original loader executes. Here the text is hashed and
dropped: the result is a record of class names, constructor arguments and tensors, from which `training.snapshot`
builds our own classes. `python -m training.nvidia_pickle in.pkl out.safetensors` converts a file.

`pickle.Unpickler` reads the stream. For a closed list of names it gets stand-ins of ours, and what these return can be
neither called nor changed by the stream. `pickletools.genops` looks at the opcodes before, for what no Unpickler can be
told: to leave copyreg's extensions alone, to allocate no memo of a declared size, to hash no tuples (a few bytes can
nest them so deep that the C stack overflows, or so often in each other that it never ends), and to obey no opcode that
plain data in protocols 2 to 5 does not need.
"""
import hashlib
import importlib
import io
import math
import os
import pickle
import pickletools
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from dnnlib.files import retrying
from training.nvidia_arguments import named_arguments, quote, to_plain

# sha256 of source texts whose classes are known to compute what ours compute. NVIDIA's own text is not among them.
KNOWN_SOURCES = {
    "02ea39533cf5ef395ea2c7d952b5e6df019b0da30dc9e07c26e3f6d121ab65c8": "placeholder for the networks' source",
    "1a2dd8bea953140b4698533d1019bdc51ec900a65b92b81c2b66b70fb6899970": "placeholder for the augmentation's source",
}

# Limits. Three networks for 1024 x 1024 take about 400 million bytes and 30,000 opcodes.
_MAX_BYTES = 4 << 30
_MAX_OPCODES = 500_000  # also of the memo's indices: the Unpickler allocates 16 bytes for each below the highest
_MAX_MODULES, _MAX_DEPTH = 10_000, 16  # a module that contains itself must come to an end

_PERSISTENCE_VERSION = 6
_NETWORK_CLASS = {"G": "Generator", "D": "Discriminator", "G_ema": "Generator", "augment_pipe": "AugmentPipe"}
_ENTRIES = (*_NETWORK_CLASS, "training_set_kwargs")


class PickleRefused(ValueError):
    """The stream is damaged, or asks for something outside the closed list."""


class UnknownSourceWarning(UserWarning):
    """The file embeds source text that is not known: names match, behavior may not."""


@dataclass(frozen=True, kw_only=True)
class PickledModule:
    """What a file says about one network."""
    class_name: str
    arguments: dict[str, object]   # constructor arguments by name, plain values
    tensors: dict[str, Tensor]     # in the order of the state dict, e.g. "synthesis.b4.const"
    kinds: dict[str, str]          # name -> "parameter" or "buffer"
    sources: tuple[str, ...]       # sha256 of the embedded source texts of the module and its children


@dataclass(frozen=True, kw_only=True)
class NvidiaNetworks:
    """What a file holds; a network that is absent or None in it is None here."""
    G: PickledModule | None
    D: PickledModule | None
    G_ema: PickledModule | None
    augment_pipe: PickledModule | None
    training_set_kwargs: dict[str, object] | None


def read_nvidia_pickle(path: str | os.PathLike) -> NvidiaNetworks:
    """Read the file at `path`.

    Warns (UnknownSourceWarning, once a call) when embedded source texts are not in KNOWN_SOURCES.
    Raises FileNotFoundError, or ValueError with one line that names the file for anything but a readable network file.
    """
    try:
        networks = _parse(retrying(lambda: _read_bytes(path), path))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as a StyleGAN2-ADA network pickle: {error}") from error
    modules = [module for module in vars(networks).values() if isinstance(module, PickledModule)]
    unknown = dict.fromkeys(source for module in modules for source in module.sources if source not in KNOWN_SOURCES)
    if unknown:
        warnings.warn(f"{path}: names match, behaviour may not: the file was written with source text that is not "
                      f"known here and was not run (sha256 {', '.join(unknown)})", UnknownSourceWarning, stacklevel=2)
    return networks


def _read_bytes(path: str | os.PathLike) -> bytes:
    num_bytes = os.stat(path).st_size
    if num_bytes > _MAX_BYTES:
        raise PickleRefused(f"it has {num_bytes:,} bytes; expected at most {_MAX_BYTES:,}")
    return Path(path).read_bytes()


def _parse(data: bytes) -> NvidiaNetworks:
    if not data.startswith(b"\x80"):
        raise PickleRefused(f"it starts with {quote(data[:16])}; expected a pickle of protocol 2 or later")
    stream = io.BytesIO(data)
    content = _load(stream, _known_names(len(data)))
    if stream.read(1):
        raise PickleRefused("more bytes follow the pickle; expected nothing")
    if type(content) is not dict:
        raise PickleRefused(f"it holds {quote(content)}; expected a dict with G, D and G_ema")
    if "G_ema" not in content or any(key not in _ENTRIES for key in content):
        shown = [key if type(key) is str else quote(key) for key in content]
        raise PickleRefused(f"it has the entries {quote(str(shown))}; expected {', '.join(_ENTRIES)}")
    modules = {key: _read_network(key, content.get(key), len(data)) for key in _NETWORK_CLASS}
    data_set = content.get("training_set_kwargs")
    if data_set is not None and type(data_set) is not dict:
        raise PickleRefused(f"training_set_kwargs is {quote(data_set)}; expected a dict or None")
    return NvidiaNetworks(**modules, training_set_kwargs=to_plain(data_set, "training_set_kwargs"))


_OPCODES = frozenset("""
    PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT SHORT_BINUNICODE BINUNICODE
    BINUNICODE8 SHORT_BINBYTES BINBYTES BINBYTES8 EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS
    EMPTY_DICT SETITEM SETITEMS EMPTY_SET ADDITEMS MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET GLOBAL STACK_GLOBAL
    REDUCE NEWOBJ BUILD BINPERSID""".split())
_FILLING = frozenset("APPEND APPENDS SETITEM SETITEMS ADDITEMS BUILD".split())  # leave what they fill on the stack


def _load(stream: BinaryIO, names: Mapping[tuple[str, str], object]) -> object:
    """Read one pickle from `stream`, leaving it just behind the STOP opcode.

    names:  (module, name) as written in the stream -> what stands for it
    Raises PickleRefused, and no other exception, for every stream that is not a complete pickle within the closed list.
    """
    start = stream.tell()
    try:
        _check_opcodes(stream)
        end = stream.tell()
        stream.seek(start)
        content = _Unpickler(stream, names).load()
    except PickleRefused:
        raise
    except Exception as error:  # a damaged or hostile stream can raise anything
        raise PickleRefused(f"the pickle stream is damaged or cut off ({quote(str(error))})") from error
    stream.seek(end)
    return content


class _Unpickler(pickle.Unpickler):
    """Knows the names of a table: nothing that the stream names is ever imported."""

    def __init__(self, stream: BinaryIO, names: Mapping[tuple[str, str], object]) -> None:
        super().__init__(stream)
        self.names = names

    def find_class(self, module: str, name: str) -> object:
        if (module, name) in _TENSORFLOW:
            raise PickleRefused("it is of the TensorFlow era; convert it once with legacy.py of the original PyTorch "
                                "repository, in an environment that you trust, then open the result")
        if (module, name) not in self.names:
            raise PickleRefused(f"the name {quote(f'{module}.{name}')} is outside the closed list; nothing was run")
        return self.names[module, name]

    def persistent_load(self, identity: object) -> "_Record":
        if self.names is not _STORAGES:
            raise PickleRefused("it holds a persistent id, which is outside the closed list")
        return _Record("identity", identity)


def _check_opcodes(stream: BinaryIO) -> None:
    """Read the opcodes of one pickle, tracking where on the Unpickler's stack a tuple lies (True)."""
    stack, marks, memo = [], [], {}
    for count, (opcode, argument, position) in enumerate(pickletools.genops(stream)):
        name = opcode.name
        if name not in _OPCODES:
            raise PickleRefused(f"opcode {name} at byte {position} is outside the closed list")
        if name == "PROTO" and not 2 <= argument <= 5:
            raise PickleRefused(f"pickle protocol {argument} is outside 2 to 5")
        if count >= _MAX_OPCODES or (name == "LONG_BINPUT" and argument >= _MAX_OPCODES):
            raise PickleRefused(f"it holds or numbers more than {_MAX_OPCODES:,} objects; no network's file does")
        if name == "MARK":
            marks.append(len(stack))
        elif name in ("MEMOIZE", "BINPUT", "LONG_BINPUT"):
            memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        else:
            sliced = pickletools.stackslice in opcode.stack_before
            bottom = marks.pop() if sliced else len(stack) - len(opcode.stack_before) + (name in _FILLING)
            items = stack[bottom:]
            del stack[bottom:]
            if any({"SETITEM": items[:1], "SETITEMS": items[::2], "ADDITEMS": items}.get(name, ())):
                raise PickleRefused("a dict or set has the key tuple; expected str or int")
            if name not in _FILLING:
                stack += [each is pickletools.pytuple for each in opcode.stack_after]


# The names.

_TENSORFLOW = {("dnnlib.tflib.network", "Network"), ("tfutil", "Network")}
_NUMPY_CODES = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")


def _refuse_state(self: object, _: object) -> None:
    """Answer the BUILD opcode, which would otherwise set attributes."""
    name = self.__name__ if isinstance(self, _Name) else f"a {self.kind}"
    raise PickleRefused(f"it sets the state of {name}, which is outside the closed list")


class _Name(type):
    """What stands for a name that the stream may call, with REDUCE or with NEWOBJ, which takes nothing but classes."""
    __setstate__ = _refuse_state


@dataclass(frozen=True, eq=False)
class _Record:
    """What a call gives, unless it is plain data."""
    kind: str      # "module", "identity", "storage", "buffer" or "parameter"
    value: object  # a Tensor, or what the first two were called with: later opcodes can still fill that

    __setstate__ = _refuse_state


def _known_names(file_size: int) -> dict[tuple[str, str], _Name]:
    """Return the closed list: complete for files of the original repository, protocols 2 to 5."""
    functions = {
        "torch_utils.persistence _reconstruct_persistent_obj": lambda meta: _Record("module", meta),
        "dnnlib.util EasyDict": _empty_dict,
        "collections OrderedDict": _empty_dict,
        "torch._utils _rebuild_parameter": _rebuild_parameter,
        "torch._utils _rebuild_tensor_v2": _rebuild_tensor,
        "torch.storage _load_from_bytes": _load_storage,
        "numpy dtype": _NumpyType,
        "_codecs encode": _encode,
        **dict.fromkeys(("numpy.core.multiarray scalar", "numpy._core.multiarray scalar"), _numpy_scalar),
        **dict.fromkeys(("builtins set", "__builtin__ set"), _make_set),
        **dict.fromkeys(("builtins bytes", "__builtin__ bytes"), lambda: b""),  # how protocol 2 writes b""
    }
    # With the memo a few bytes can ask for a large copy again and again. Protocol 2 copies storages twice, from text.
    free_bytes = 2 * file_size

    def callable_name(name: str, function: Callable[..., object]) -> _Name:
        def answer(_: type, *arguments: object) -> object:
            nonlocal free_bytes
            free_bytes -= sum(len(each) for each in arguments if isinstance(each, (str, bytes, list, tuple)))
            if free_bytes < 0:
                raise PickleRefused("it asks for more copies of its data than the file has bytes")
            try:
                return function(*arguments)
            except TypeError as error:
                raise PickleRefused(f"it calls {name} with arguments that do not fit ({quote(str(error))})") from error

        return _Name(name, (), {"__slots__": (), "__new__": answer})

    return {tuple(name.split()): callable_name(name.replace(" ", "."), function)
            for name, function in functions.items()}


def _empty_dict() -> dict:
    return {}


def _encode(text: object, encoding: object) -> bytes:
    """Answer _codecs.encode, with which protocol 2 writes bytes as latin-1 text; any other codec is refused."""
    if type(text) is not str or encoding != "latin1":
        raise PickleRefused(f"_codecs.encode({quote(text)}, {quote(encoding)}) is outside the closed list")
    return text.encode("latin1")


def _make_set(items: object = ()) -> set:
    if type(items) not in (list, tuple) or any(type(item) is not str for item in items):
        raise PickleRefused(f"a set is made of {quote(items)}; expected a list of str")
    return set(items)


class _NumpyType:
    """Answer numpy.dtype for numeric kinds: a code and a byte order, never an object or a structure."""

    def __init__(self, code: object, align: object = False, copy: object = True) -> None:
        if code not in _NUMPY_CODES or align not in (0, 1) or copy not in (0, 1):
            raise PickleRefused(f"numpy.dtype({quote(code)}) is outside the closed list of numeric types")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: object) -> None:
        # numpy's state: version, byte order, then what structures, subarrays and odd sizes would need.
        if type(state) is not tuple or len(state) < 8 or state[1] not in tuple("<>|=") or state[2:5] != (None,) * 3:
            raise PickleRefused("the state of a numpy.dtype is not that of a plain number")
        self.dtype = self.dtype.newbyteorder(state[1])


def _numpy_scalar(kind: object, data: object) -> bool | int | float:
    """Answer numpy.core.multiarray.scalar with the plain Python number."""
    if type(kind) is not _NumpyType or type(data) is not bytes:
        raise PickleRefused(f"a numpy scalar is made of {quote(kind)} and {quote(data)}; expected a type and bytes")
    if len(data) != kind.dtype.itemsize:
        raise PickleRefused(f"a numpy {kind.dtype} has {len(data)} bytes; expected {kind.dtype.itemsize}")
    return np.frombuffer(data, kind.dtype)[0].item()


# Tensors. A storage is in torch's legacy format, five pickles (magic number, version, system, object, keys), then an
# element count and the elements; torch's own function would unpickle these without restriction.

_MAGIC_NUMBER, _FORMAT_VERSION = 0x1950A86A20F9469CFC6C, 1001
_STORAGES = {(module, f"{name}Storage"): dtype for module in ("torch", "torch.cuda") for name, dtype in {
    "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8}.items()}
# (tag, dtype, key, location, number of elements, view); the location is the device of the machine that wrote the file
_STORAGE_ID = (str, torch.dtype, str, str, int, type(None))


def _load_storage(payload: object) -> _Record:
    """Answer torch.storage._load_from_bytes: [number of elements], a plain numeric dtype, on the CPU."""
    if type(payload) is not bytes:
        raise PickleRefused(f"a tensor storage is {quote(payload)}; expected bytes")
    stream = io.BytesIO(payload)
    magic, version, system = (_load(stream, {}) for _ in range(3))
    if magic != _MAGIC_NUMBER or version != _FORMAT_VERSION:
        raise PickleRefused(f"a tensor storage starts with {quote(magic)}; expected torch's legacy format")
    if type(system) is not dict or system.get("little_endian") is not True:
        raise PickleRefused("a tensor storage is not marked as little-endian")
    header, keys = _load(stream, _STORAGES), _load(stream, {})
    identity = header.value if type(header) is _Record else None
    if type(identity) is not tuple or tuple(map(type, identity)) != _STORAGE_ID or identity[0] != "storage":
        raise PickleRefused("the description of a storage is not of the expected form")
    _, dtype, key, _, numel, _ = identity
    if type(keys) is not list or keys != [key]:
        raise PickleRefused("a tensor storage holds something other than one storage")
    count = int.from_bytes(stream.read(8), "little")
    data = memoryview(payload)[stream.tell():]
    if count != numel or len(data) != numel * dtype.itemsize:  # numel can be negative, count cannot
        raise PickleRefused(f"a storage of {numel:,} {dtype} holds {count:,} elements in {len(data):,} bytes; "
                            f"expected {numel * dtype.itemsize:,} bytes")
    if sys.byteorder != "little":
        raise PickleRefused("this machine is big-endian; the reader supports little-endian machines alone")
    # bytearray: torch wants memory that it may write to, and some.
    return _Record("storage", torch.frombuffer(bytearray(data), dtype=dtype) if numel else torch.empty(0, dtype=dtype))


def _rebuild_tensor(storage: object, offset: object, size: object, stride: object, requires_grad: object = False,
                    hooks: object = None, metadata: object = None) -> _Record:
    """Answer torch._utils._rebuild_tensor_v2: a view of the storage, [*size].

    A view, since a file can ask for thousands of tensors of one storage in a few bytes each.
    Raises PickleRefused when an index would leave the storage, and for hooks and metadata.
    """
    if type(storage) is not _Record or storage.kind != "storage":
        raise PickleRefused(f"a tensor has {quote(storage)} in place of a storage")
    if hooks or metadata or type(requires_grad) is not bool:
        raise PickleRefused("a tensor has hooks, metadata or an odd requires_grad; expected none")
    if not (_is_shape(size) and _is_shape(stride) and _is_shape((offset,)) and len(size) == len(stride)):
        raise PickleRefused("size, stride and offset of a tensor are not tuples of counts")
    numel, held = math.prod(size), storage.value.numel()
    last = offset + sum((extent - 1) * step for extent, step in zip(size, stride, strict=True))
    if numel > held or (numel > 0 and last >= held):
        raise PickleRefused(f"a tensor of shape {quote(str(size))} reaches outside its storage of {held} elements")
    if numel > 0:
        return _Record("buffer", storage.value.as_strided(size, stride, offset))
    if math.prod(max(extent, 1) for extent in size) >= 2**31:  # torch multiplies these, and would overflow
        raise PickleRefused(f"an empty tensor has the shape {quote(str(size))}")
    return _Record("buffer", torch.empty(size, dtype=storage.value.dtype))


def _is_shape(counts: object) -> bool:
    return type(counts) is tuple and len(counts) <= 8 and all(type(n) is int and 0 <= n < 2**40 for n in counts)


def _rebuild_parameter(tensor: object, requires_grad: object, hooks: object = None) -> _Record:
    """Answer torch._utils._rebuild_parameter."""
    if type(tensor) is not _Record or tensor.kind != "buffer" or type(requires_grad) is not bool or hooks:
        raise PickleRefused(f"a parameter is made of {quote(tensor)}; expected a tensor without hooks")
    return _Record("parameter", tensor.value)


# From the content to records.


@dataclass(kw_only=True)
class _Walk:
    """What is collected on the way through one network."""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)  # source text -> sha256
    num_modules: int = 0
    free_bytes: int  # of tensors; a network holds each byte of its file once at most


def _read_network(key: str, content: object, file_size: int) -> PickledModule | None:
    if content is None:
        return None
    walk = _Walk(free_bytes=file_size)
    class_name, arguments = _walk_module(key, content, walk, prefix="", depth=0)
    if class_name != _NETWORK_CLASS[key]:
        raise PickleRefused(f"{key} is of class {quote(class_name)}; expected {_NETWORK_CLASS[key]}")
    return PickledModule(class_name=class_name, arguments=arguments, tensors=walk.tensors, kinds=walk.kinds,
                         sources=tuple(walk.sources.values()))


def _walk_module(where: str, content: object, walk: _Walk, prefix: str, depth: int) -> tuple[str, dict[str, object]]:
    """Collect a module and its children; return its class name and constructor arguments."""
    walk.num_modules += 1
    if depth > _MAX_DEPTH:
        raise PickleRefused(f"{where} is nested more than {_MAX_DEPTH} modules deep; no network is")
    if walk.num_modules > _MAX_MODULES:
        raise PickleRefused(f"{where} is beyond {_MAX_MODULES:,} modules; no network has so many")
    meta = content.value if type(content) is _Record and content.kind == "module" else None
    if type(meta) is not dict or meta.get("type") != "class" or meta.get("version") != _PERSISTENCE_VERSION:
        raise PickleRefused(f"{where} is not a class of persistence version {_PERSISTENCE_VERSION}")
    class_name, source, state = meta.get("class_name"), meta.get("module_src"), meta.get("state")
    if type(class_name) is not str or type(source) is not str or type(state) is not dict:
        raise PickleRefused(f"{where} lacks class_name, module_src or state")
    if source not in walk.sources:
        walk.sources[source] = hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest()
    arguments = named_arguments(where, class_name, state.get("_init_args", ()), state.get("_init_kwargs", {}))
    skipped = state.get("_non_persistent_buffers_set", set())
    if type(skipped) is not set:
        raise PickleRefused(f"{where} has a malformed _non_persistent_buffers_set")
    for field_name, kind in (("_parameters", "parameter"), ("_buffers", "buffer")):
        for name, value in _children(where, state, field_name).items():
            if value is None or (kind == "buffer" and name in skipped):
                continue
            if type(value) is not _Record or value.kind != kind:
                shown = f"a {value.kind}" if type(value) is _Record else quote(value)
                raise PickleRefused(f"{where}.{name} is {shown}; expected a {kind}")
            walk.free_bytes -= value.value.numel() * value.value.element_size()
            if walk.free_bytes < 0:
                raise PickleRefused(f"{where}.{name} and what precedes it hold {-walk.free_bytes:,} bytes more than "
                                    "the file")
            walk.tensors[prefix + name] = value.value.clone(memory_format=torch.contiguous_format)
            walk.kinds[prefix + name] = kind
    for name, child in _children(where, state, "_modules").items():
        if child is not None:
            _walk_module(f"{where}.{name}", child, walk, prefix=f"{prefix}{name}.", depth=depth + 1)
    return class_name, arguments


def _children(where: str, state: dict, field_name: str) -> dict[str, object]:
    entries = state.get(field_name)
    if type(entries) is not dict:
        raise PickleRefused(f"{where} has {field_name} {quote(entries)}; expected a dict")
    for name in entries:
        if type(name) is not str or not name.isidentifier():
            raise PickleRefused(f"{where} has {quote(name)} in {field_name}; expected an identifier")
    return entries


if __name__ == "__main__":
    # By name, not with an import statement: training.snapshot, which has the converter, imports this module.
    sys.exit(importlib.import_module("training.snapshot").main())
