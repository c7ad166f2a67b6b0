"""Read the network files (.pkl) of NVIDIA's StyleGAN2-ADA repository without running anything in them.

Such a file carries the source code of its classes, which the original loader executes. Here it is hashed and dropped:
the result is a record of class names, constructor arguments and tensors, from which `training.snapshot` builds our own
classes. `python -m training.nvidia_pickle in.pkl out.safetensors` converts a file.

`dnnlib.restricted_pickle` reads the file into plain data and records of calls; `_NetworkReader` interprets them. Both
have limits, because a few bytes of a pickle can repeat a large value thousands of times.

Tensor storages are in torch's legacy format, which we read ourselves: torch.load(weights_only=True) allocates what a
file declares, in calls of bytearray, too. It ignores the byte order and trailing bytes, and returns uninitialized
memory when the list of keys is empty.
"""
import hashlib
import importlib
import io
import math
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dnnlib.files import retrying
from dnnlib.restricted_pickle import Call, Name, PickleRefused, load, quote

# sha256 of source code whose classes are known to compute what ours compute. NVIDIA's own code is not among them.
KNOWN_SOURCES = {
    "02ea39533cf5ef395ea2c7d952b5e6df019b0da30dc9e07c26e3f6d121ab65c8": "placeholder for the networks' source",
    "1a2dd8bea953140b4698533d1019bdc51ec900a65b92b81c2b66b70fb6899970": "placeholder for the augmentation's source",
}

# Limits. Three networks for 1024 x 1024 take about 400 million bytes; each has about 1,000 values.
_MAX_BYTES = 4 << 30
_MAX_VALUES, _MAX_DEPTH = 10_000, 16  # modules, tensors and arguments of a network, and how deep they are nested
_MAX_NAME = 64  # characters

_NETWORK_CLASS = {"G": "Generator", "D": "Discriminator", "G_ema": "Generator", "augment_pipe": "AugmentPipe"}
_ENTRIES = (*_NETWORK_CLASS, "training_set_kwargs")
_TENSORFLOW = ("dnnlib.tflib.network.Network", "tfutil.Network")
_NAMES = frozenset("""
    torch_utils.persistence._reconstruct_persistent_obj dnnlib.util.EasyDict collections.OrderedDict
    torch._utils._rebuild_parameter torch._utils._rebuild_tensor_v2 torch.storage._load_from_bytes numpy.dtype
    numpy.core.multiarray.scalar numpy._core.multiarray.scalar _codecs.encode builtins.set __builtin__.set
    builtins.bytes __builtin__.bytes""".split())
_NUMPY_CODES = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
_MAGIC_NUMBER, _FORMAT_VERSION = 0x1950A86A20F9469CFC6C, 1001  # of torch's legacy format
_STORAGES = {f"{module}.{name}Storage": dtype for module in ("torch", "torch.cuda") for name, dtype in {
    "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8}.items()}

# Class: its constructor arguments, in order. Files with others come from another project or version.
_ARGUMENTS = {name: arguments.split() for name, arguments in (line.split(":") for line in """
Generator: z_dim c_dim w_dim img_resolution img_channels mapping_kwargs synthesis_kwargs
MappingNetwork: z_dim c_dim w_dim num_ws num_layers embed_features layer_features activation lr_multiplier w_avg_beta
SynthesisNetwork: w_dim img_resolution img_channels channel_base channel_max num_fp16_res
SynthesisBlock: in_channels out_channels w_dim resolution img_channels is_last architecture resample_filter \
    conv_clamp use_fp16 fp16_channels_last
SynthesisLayer: in_channels out_channels w_dim resolution kernel_size up use_noise activation resample_filter \
    conv_clamp channels_last
ToRGBLayer: in_channels out_channels w_dim kernel_size conv_clamp channels_last
Discriminator: c_dim img_resolution img_channels architecture channel_base channel_max num_fp16_res conv_clamp \
    cmap_dim block_kwargs mapping_kwargs epilogue_kwargs
DiscriminatorBlock: in_channels tmp_channels out_channels resolution img_channels first_layer_idx architecture \
    activation resample_filter conv_clamp use_fp16 fp16_channels_last freeze_layers
DiscriminatorEpilogue: in_channels cmap_dim resolution img_channels architecture mbstd_group_size mbstd_num_channels \
    activation conv_clamp
MinibatchStdLayer: group_size num_channels
Conv2dLayer: in_channels out_channels kernel_size bias activation up down resample_filter conv_clamp channels_last \
    trainable
FullyConnectedLayer: in_features out_features bias activation lr_multiplier bias_init
AugmentPipe: xflip rotate90 xint xint_max scale rotate aniso xfrac scale_std rotate_max aniso_std xfrac_std \
    brightness contrast lumaflip hue saturation brightness_std contrast_std hue_max saturation_std \
    imgfilter imgfilter_bands imgfilter_std noise cutout noise_std cutout_size
""".strip().splitlines())}
# Class -> classes to which it passes on keyword arguments; argument -> class for which its dict is meant.
_PASSED_ON = {"SynthesisNetwork": ("SynthesisBlock", "SynthesisLayer"), "SynthesisBlock": ("SynthesisLayer",)}
_NESTED = {"mapping_kwargs": "MappingNetwork", "synthesis_kwargs": "SynthesisNetwork",
           "block_kwargs": "DiscriminatorBlock", "epilogue_kwargs": "DiscriminatorEpilogue"}


class UnknownSourceWarning(UserWarning):
    """The file contains unknown source code: names match, behavior may not."""


@dataclass(frozen=True, kw_only=True)
class PickledModule:
    """One network of a file."""
    class_name: str
    arguments: dict[str, object]   # constructor arguments by name, plain values
    tensors: dict[str, Tensor]     # in the order of the state dict, e.g. "synthesis.b4.const"
    kinds: dict[str, str]          # name -> "parameter" or "buffer"
    sources: tuple[str, ...]       # sha256 of the source code of the module and its children


@dataclass(frozen=True, kw_only=True)
class NvidiaNetworks:
    """The content of a file; a network that is absent or None in it is None here."""
    G: PickledModule | None
    D: PickledModule | None
    G_ema: PickledModule | None
    augment_pipe: PickledModule | None
    training_set_kwargs: dict[str, object] | None


def read_nvidia_pickle(path: str | os.PathLike) -> NvidiaNetworks:
    """Read the file at `path`.

    Warns once (UnknownSourceWarning) when the file contains source code that is not in KNOWN_SOURCES.
    Raises FileNotFoundError, or ValueError with one line that names the file for anything but a readable network file.
    """
    try:
        networks = _parse(retrying(lambda: _read_bytes(path), path))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as a StyleGAN2-ADA network pickle: {error}") from error
    modules = [module for module in vars(networks).values() if isinstance(module, PickledModule)]
    unknown = dict.fromkeys(source for module in modules for source in module.sources if source not in KNOWN_SOURCES)
    if unknown:
        warnings.warn(f"{path}: names match, behavior may not: the file contains unknown source code, which was not "
                      f"run (sha256 {', '.join(unknown)})", UnknownSourceWarning, stacklevel=2)
    return networks


def _read_bytes(path: str | os.PathLike) -> bytes:
    num_bytes = os.stat(path).st_size
    if num_bytes > _MAX_BYTES:
        raise PickleRefused(f"it has {num_bytes:,} bytes; expected at most {_MAX_BYTES:,}")
    return Path(path).read_bytes()


def _parse(data: bytes) -> NvidiaNetworks:
    stream = io.BytesIO(data)
    try:
        content = load(stream, _NAMES)
    except PickleRefused as error:
        if any(name in str(error) for name in _TENSORFLOW):
            raise PickleRefused("it was written with TensorFlow; convert it once with legacy.py of the original "
                                "PyTorch repository, in an environment that you trust, then open the result") from error
        raise
    if stream.read(1):
        raise PickleRefused("more bytes follow the pickle; expected nothing")
    if type(content) is not dict:
        raise PickleRefused(f"it holds {quote(content)}; expected a dict with G, D and G_ema")
    if "G_ema" not in content or not content.keys() <= set(_ENTRIES):
        shown = ", ".join(quote(key) for key in list(content)[:len(_ENTRIES)])
        raise PickleRefused(f"it has the entries {shown}; expected {', '.join(_ENTRIES)}")
    modules = {role: _NetworkReader(len(data)).network(role, content.get(role)) for role in _NETWORK_CLASS}
    data_set = _NetworkReader(len(data)).plain("training_set_kwargs", content.get("training_set_kwargs"))
    if not isinstance(data_set, dict | None):
        raise PickleRefused(f"training_set_kwargs is {quote(data_set)}; expected a dict or None")
    return NvidiaNetworks(**modules, training_set_kwargs=data_set)


class _NetworkReader:
    """Interprets the records of one network. `where` is the place in the file, such as "G_ema.synthesis.b4"."""

    def __init__(self, num_bytes: int) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.kinds: dict[str, str] = {}
        self.sources: dict[str, None] = {}
        # A network holds each byte of its file about once.
        self.free_values, self.free_bytes = _MAX_VALUES, 2 * num_bytes

    def spend(self, where: str, depth: int = 0, num_values: int = 1, num_bytes: int = 0) -> None:
        self.free_values -= num_values
        self.free_bytes -= num_bytes
        if self.free_values < 0:
            raise PickleRefused(f"it has more than {_MAX_VALUES:,} values up to {where}; a network has about 1,000")
        if self.free_bytes < 0:
            raise PickleRefused(f"it has more than twice the bytes of the file up to {where}; a network has each once")
        if depth > _MAX_DEPTH:
            raise PickleRefused(f"{where} is nested more than {_MAX_DEPTH} levels deep")

    def network(self, role: str, content: object) -> PickledModule | None:
        if content is None:
            return None
        class_name, arguments = self.module(role, content)
        if class_name != _NETWORK_CLASS[role]:
            raise PickleRefused(f"{role} is of class {class_name}; expected {_NETWORK_CLASS[role]}")
        sources = tuple(hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest() for text in self.sources)
        return PickledModule(class_name=class_name, arguments=arguments, tensors=self.tensors, kinds=self.kinds,
                             sources=sources)

    def module(self, where: str, content: object, depth: int = 0) -> tuple[str, dict[str, object]]:
        """Collect the tensors of a module and its children; return its class name and constructor arguments."""
        self.spend(where, depth)
        match content:
            case Call("torch_utils.persistence._reconstruct_persistent_obj", ({
                    "type": "class", "version": 6, "class_name": str(class_name), "module_src": str(source),
                    "state": dict(state)},)):
                self.sources[source] = None
            case _:
                raise PickleRefused(f"{where} is {quote(content)}; expected a class of persistence version 6")
        arguments = self.arguments(where, class_name, state.get("_init_args", ()), state.get("_init_kwargs", {}))
        match state.get("_non_persistent_buffers_set"):
            case None:
                skipped = set()
            case set(skipped):
                pass
            case Call("builtins.set" | "__builtin__.set", ([*names],)) if all(type(name) is str for name in names):
                self.spend(where, num_values=len(names))
                skipped = set(names)
            case other:
                raise PickleRefused(f"{where}._non_persistent_buffers_set is {quote(other)}; expected a set of names")
        for field, kind in (("_parameters", "parameter"), ("_buffers", "buffer"), ("_modules", "module")):
            entries = state.get(field)
            if type(entries) is not dict:
                raise PickleRefused(f"{where}.{field} is {quote(entries)}; expected a dict")
            for name, value in entries.items():
                self.spend(where)
                if type(name) is not str or len(name) > _MAX_NAME or not name.isidentifier():
                    raise PickleRefused(f"{where}.{field} has the key {quote(name)}; expected an identifier")
                path = f"{where}.{name}"
                if value is None or (kind == "buffer" and name in skipped):
                    continue
                if kind == "module":
                    self.module(path, value, depth + 1)
                else:
                    name_in_network = path.partition(".")[2]
                    self.tensors[name_in_network], self.kinds[name_in_network] = self.tensor(path, kind, value), kind
        return class_name, arguments

    def arguments(self, where: str, class_name: str, args: object, kwargs: object) -> dict[str, object]:
        """Return constructor arguments, a tuple and a dict, by name and as plain values."""
        order = _ARGUMENTS.get(class_name)
        if order is None:
            raise PickleRefused(f"{where} is of class {quote(class_name)}, which is not part of StyleGAN2-ADA")
        if type(args) is not tuple or type(kwargs) is not dict or len(args) > len(order):
            raise PickleRefused(f"{where} ({class_name}) has malformed constructor arguments")
        by_position = dict(zip(order, args))
        for name in by_position.keys() & kwargs.keys():
            raise PickleRefused(f"{where} ({class_name}) has the argument {name} by position and by name")
        arguments = self.plain(f"{where} ({class_name})", by_position | kwargs)
        _check_names(where, class_name, arguments)
        return arguments

    def plain(self, where: str, value: object, depth: int = 0) -> object:
        """Return a copy of None, bool, int, finite float, str, and lists and str-keyed dicts of them.

        Tuples become lists, numpy's numbers become those of Python.
        """
        self.spend(where, depth, num_bytes=len(value) if isinstance(value, str) else 0)
        match value:
            case None | bool() | int() | str():
                return value
            case float() if math.isfinite(value):
                return value
            case list() | tuple():
                return [self.plain(where, item, depth + 1) for item in value]
            case dict() if all(type(key) is str and len(key) <= _MAX_NAME for key in value):
                return {key: self.plain(where, item, depth + 1) for key, item in value.items()}
            case Call("numpy.core.multiarray.scalar" | "numpy._core.multiarray.scalar", (
                    Call("numpy.dtype", (str(code), *_), (_, "<" | ">" | "|" | "=" as order, None, None, None, *_)),
                    data)) if code in _NUMPY_CODES:
                dtype, data = np.dtype(code).newbyteorder(order), self.read_bytes(where, data)
                if len(data) == dtype.itemsize:
                    return self.plain(where, np.frombuffer(data, dtype)[0].item(), depth)
        raise PickleRefused(f"{where} holds {quote(value)}; expected plain values")

    def read_bytes(self, where: str, value: object) -> bytes:
        """Return bytes, which protocol 2 writes as latin-1 text."""
        match value:
            case bytes():
                data = value
            case Call("_codecs.encode", (str(text), "latin1")):
                data = text.encode("latin1")
            case Call("builtins.bytes" | "__builtin__.bytes", ()):
                data = b""
            case _:
                raise PickleRefused(f"{where} has {quote(value)} in place of bytes")
        self.spend(where, num_bytes=len(data))
        return data

    def tensor(self, where: str, kind: str, value: object) -> Tensor:
        """Return a parameter or buffer, contiguous and in its own memory."""
        found, content, extras = "buffer", value, ()
        match value:
            case Call("torch._utils._rebuild_parameter", (inner, bool(), *hooks)):
                found, content, extras = "parameter", inner, hooks
        match content:
            case Call("torch._utils._rebuild_tensor_v2", (
                    Call("torch.storage._load_from_bytes", (payload,)),
                    int(offset), tuple(size), tuple(stride), bool(), *more)) if (
                    found == kind and not any((*extras, *more))):  # hooks or metadata
                storage = self.storage(where, self.read_bytes(where, payload))
            case _:
                raise PickleRefused(f"{where} is {quote(value)}; expected a {kind} without hooks")
        if len(size) != len(stride) or len(size) > 8 or any(
                type(count) is not int or not 0 <= count < 2**40 for count in (offset, *size, *stride)):
            raise PickleRefused(f"{where} has a malformed size, stride or offset")
        numel, held = math.prod(size), storage.numel()
        last = offset + sum((extent - 1) * step for extent, step in zip(size, stride))
        # torch multiplies the extents of an empty tensor, too, and could overflow.
        if numel > held or (numel and last >= held) or math.prod(max(extent, 1) for extent in size) >= 2**40:
            raise PickleRefused(f"{where} has shape {list(size)}, which does not fit its storage of {held} elements")
        return storage.as_strided(size, stride, offset if numel else 0).clone(memory_format=torch.contiguous_format)

    def storage(self, where: str, payload: bytes) -> Tensor:
        """Return [number of elements], on the CPU. The format is five pickles, that number, and the elements."""
        stream = io.BytesIO(payload)
        magic, version, system, description, keys = (
            load(stream, _STORAGES, persistent_ids=True, max_opcodes=100) for _ in range(5))
        count = int.from_bytes(stream.read(8), "little")
        data = memoryview(payload)[stream.tell():]
        match (magic, version, system, description):
            case (int(), int(), {"little_endian": True}, Call("persistent id", (
                    ("storage", Name(storage), str(key), str(), int(numel), None),))) if (
                    (magic, version, keys, sys.byteorder) == (_MAGIC_NUMBER, _FORMAT_VERSION, [key], "little")
                    and numel == count and len(data) == count * _STORAGES[storage].itemsize):
                # bytearray: torch needs writable memory, and at least one byte.
                dtype = _STORAGES[storage]
                return torch.frombuffer(bytearray(data), dtype=dtype) if count else torch.empty(0, dtype=dtype)
        raise PickleRefused(f"{where} has a malformed storage")


def _check_names(where: str, class_name: str, arguments: dict[str, object]) -> None:
    accepted = {name for each in (class_name, *_PASSED_ON.get(class_name, ())) for name in _ARGUMENTS[each]}
    for name, value in arguments.items():
        if name not in accepted:
            raise PickleRefused(f"{where} ({class_name}) has the constructor argument {quote(name)}, which is not part "
                                "of StyleGAN2-ADA")
        if name in _NESTED:
            if type(value) is not dict:
                raise PickleRefused(f"{where} ({class_name}) has {name} {quote(value)}; expected a dict")
            _check_names(f"{where}.{name}", _NESTED[name], value)


if __name__ == "__main__":
    # By name, not with an import statement: training.snapshot, which has the converter, imports this module.
    sys.exit(importlib.import_module("training.snapshot").main())
