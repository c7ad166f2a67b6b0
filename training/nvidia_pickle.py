"""Read the network files (.pkl) of NVIDIA's StyleGAN2-ADA repository without running anything in them.

Such a file carries the source text of its classes, which the original loader executes. Here the text is hashed and
dropped: the result is a record of class names, constructor arguments and tensors, from which `training.snapshot`
builds our own classes. `python -m training.nvidia_pickle in.pkl out.safetensors` converts a file.
"""
import hashlib
import io
import os
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from dnnlib.files import retrying
from training.pickles.arrays import (
    NumpyType,
    PickledParameter,
    load_storage,
    numpy_scalar,
    rebuild_parameter,
    rebuild_tensor,
)
from training.pickles.machine import Known, PickleRefused, load, quote
from training.pickles.plain_values import to_plain
from training.pickles.signatures import named_arguments

# sha256 of source texts whose classes are known to compute what ours compute. NVIDIA's own text is not among them.
KNOWN_SOURCES = {
    "02ea39533cf5ef395ea2c7d952b5e6df019b0da30dc9e07c26e3f6d121ab65c8": "placeholder for the networks' source",
    "1a2dd8bea953140b4698533d1019bdc51ec900a65b92b81c2b66b70fb6899970": "placeholder for the augmentation's source",
}

_PERSISTENCE_VERSION = 6
_MAX_MODULES, _MAX_DEPTH = 10_000, 16  # a module that contains itself must come to an end
_NETWORK_CLASS = {"G": "Generator", "D": "Discriminator", "G_ema": "Generator", "augment_pipe": "AugmentPipe"}
_ENTRIES = (*_NETWORK_CLASS, "training_set_kwargs")


class UnknownSourceWarning(UserWarning):
    """The file embeds source text that is not known: names match, behaviour may not."""


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
    data = retrying(Path(path).read_bytes, path)
    try:
        networks = _parse(data)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as a StyleGAN2-ADA network pickle: {error}") from error
    _warn_of_sources(path, networks)
    return networks


def _parse(data: bytes) -> NvidiaNetworks:
    if not data.startswith(b"\x80"):
        raise PickleRefused(f"it starts with {quote(data[:16])}; expected a pickle of protocol 2 or later")
    stream = io.BytesIO(data)
    content = load(stream, _known_names())
    if stream.read(1):
        raise PickleRefused("more bytes follow the pickle; expected nothing")
    if type(content) is not dict:
        raise PickleRefused(f"it holds {quote(content)}; expected a dict with G, D and G_ema")
    unknown = [key for key in content if key not in _ENTRIES]
    if unknown or "G_ema" not in content:
        raise PickleRefused(f"it has the entries {quote(str(list(content)))}; expected {', '.join(_ENTRIES)}")
    modules = {key: _read_network(key, content.get(key), len(data)) for key in _NETWORK_CLASS}
    data_set = content.get("training_set_kwargs")
    if data_set is not None and type(data_set) is not dict:
        raise PickleRefused(f"training_set_kwargs is {quote(data_set)}; expected a dict or None")
    return NvidiaNetworks(**modules, training_set_kwargs=to_plain(data_set, "training_set_kwargs"))


def _warn_of_sources(path: str | os.PathLike, networks: NvidiaNetworks) -> None:
    modules = (networks.G, networks.D, networks.G_ema, networks.augment_pipe)
    sources = dict.fromkeys(source for module in modules if module is not None for source in module.sources)
    unknown = [source for source in sources if source not in KNOWN_SOURCES]
    if unknown:
        warnings.warn(f"{path}: names match, behaviour may not: the file was written with source text that is not "
                      f"known here and was not run (sha256 {', '.join(unknown)})", UnknownSourceWarning, stacklevel=3)


# Stand-ins for the names that occur in such files.


@dataclass(frozen=True, kw_only=True)
class _PersistentObject:
    meta: object  # a dict in a proper file; checked when the tree is walked, because later opcodes can still fill it


def _known_names() -> Mapping[tuple[str, str], Known]:
    """Tell the closed list: complete for files of the original repository, protocols 2 to 5."""
    entries = {
        "torch_utils.persistence _reconstruct_persistent_obj": lambda meta: _PersistentObject(meta=meta),
        "dnnlib.util EasyDict": _empty_dict,
        "collections OrderedDict": _empty_dict,
        "torch._utils _rebuild_parameter": rebuild_parameter,
        "torch._utils _rebuild_tensor_v2": rebuild_tensor,
        "torch.storage _load_from_bytes": load_storage,
        "numpy dtype": NumpyType,
        "_codecs encode": _encode_bytes,
    }
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        entries[f"{module} scalar"] = numpy_scalar
    for module in ("builtins", "__builtin__"):
        entries[f"{module} set"] = _make_set
        entries[f"{module} bytes"] = _empty_bytes
    for network in ("dnnlib.tflib.network Network", "tfutil Network"):
        entries[network] = _refuse_tensorflow
    return {tuple(name.split()): Known(name=name.replace(" ", "."), stand_in=function)
            for name, function in entries.items()}


def _refuse_tensorflow(*_: object) -> None:
    raise PickleRefused("it is of the TensorFlow era; convert it once with legacy.py of the original PyTorch "
                        "repository, in an environment that you trust, then open the result")


def _empty_dict() -> dict:
    return {}


def _empty_bytes() -> bytes:  # how protocol 2 writes b""
    return b""


def _encode_bytes(text: object, encoding: object) -> bytes:
    """Answer _codecs.encode, with which protocol 2 writes bytes as latin-1 text; any other codec is refused."""
    if type(text) is not str or encoding != "latin1":
        raise PickleRefused(f"_codecs.encode({quote(text)}, {quote(encoding)}) is outside the closed list")
    return text.encode("latin1")


def _make_set(items: object = ()) -> set:
    if type(items) not in (list, tuple) or any(type(item) is not str for item in items):
        raise PickleRefused(f"a set is made of {quote(items)}; expected a list of str")
    return set(items)


# From stand-ins to records.


@dataclass(kw_only=True)
class _Walk:
    """What is collected on the way through one network."""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    sources: dict[str, None] = field(default_factory=dict)  # an ordered set
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
                         sources=tuple(walk.sources))


def _walk_module(where: str, content: object, walk: _Walk, prefix: str, depth: int) -> tuple[str, dict[str, object]]:
    """Collect a module and its children; return its class name and constructor arguments."""
    walk.num_modules += 1
    if depth > _MAX_DEPTH:
        raise PickleRefused(f"{where} is nested more than {_MAX_DEPTH} modules deep; no network is")
    if walk.num_modules > _MAX_MODULES:
        raise PickleRefused(f"{where} is beyond {_MAX_MODULES:,} modules; no network has so many")
    class_name, source, state = _read_meta(where, content)
    walk.sources[hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest()] = None
    arguments = named_arguments(where, class_name, state.get("_init_args", ()), state.get("_init_kwargs", {}))
    skipped = state.get("_non_persistent_buffers_set", set())
    if type(skipped) is not set:
        raise PickleRefused(f"{where} has a malformed _non_persistent_buffers_set")
    for field_name, kind in (("_parameters", "parameter"), ("_buffers", "buffer")):
        for name, value in _children(where, state, field_name).items():
            if value is not None and not (kind == "buffer" and name in skipped):
                tensor = _tensor_of(f"{where}.{name}", kind, value)
                walk.free_bytes -= tensor.numel() * tensor.element_size()
                if walk.free_bytes < 0:
                    raise PickleRefused(f"{where}.{name} and what precedes it hold {-walk.free_bytes:,} bytes more "
                                        "than the file")
                walk.tensors[prefix + name] = tensor.clone(memory_format=torch.contiguous_format)
                walk.kinds[prefix + name] = kind
    for name, child in _children(where, state, "_modules").items():
        if child is not None:
            _walk_module(f"{where}.{name}", child, walk, prefix=f"{prefix}{name}.", depth=depth + 1)
    return class_name, arguments


def _read_meta(where: str, content: object) -> tuple[str, str, dict]:
    """Return class name, source text and state of a pickled object."""
    meta = content.meta if type(content) is _PersistentObject else None
    if type(meta) is not dict or meta.get("type") != "class" or meta.get("version") != _PERSISTENCE_VERSION:
        raise PickleRefused(f"{where} is not a class of persistence version {_PERSISTENCE_VERSION}")
    class_name, source, state = meta.get("class_name"), meta.get("module_src"), meta.get("state")
    if type(class_name) is not str or type(source) is not str or type(state) is not dict:
        raise PickleRefused(f"{where} lacks class_name, module_src or state")
    return class_name, source, state


def _children(where: str, state: dict, field_name: str) -> dict[str, object]:
    entries = state.get(field_name)
    if type(entries) is not dict:
        raise PickleRefused(f"{where} has {field_name} {quote(entries)}; expected a dict")
    for name in entries:
        if type(name) is not str or not name.isidentifier():
            raise PickleRefused(f"{where} has {quote(name)} in {field_name}; expected an identifier")
    return entries


def _tensor_of(where: str, kind: str, value: object) -> Tensor:
    if kind == "parameter" and type(value) is PickledParameter:
        return value.tensor
    if kind == "buffer" and isinstance(value, Tensor):
        return value
    raise PickleRefused(f"{where} is {quote(value)}; expected a {kind}")


if __name__ == "__main__":
    # Imported here: the converter needs this module, under its proper name.
    from training.pickles.convert import main

    sys.exit(main())
