"""Rebuild the tensors and numbers of a pickle from plain checked values, in place of torch's and numpy's own functions.

The stand-ins for the names with which torch and numpy describe arrays in a pickle. `torch.storage._load_from_bytes`
would unpickle its argument without restriction; here the argument, a storage in torch's legacy file format, is read by
the same closed-list interpreter as the pickle around it.
"""
import io
import math
import sys
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from training.pickles.machine import Buildable, Known, PickleRefused, load, quote

# Legacy torch.save: five parts, each but the last a pickle of its own: magic number, version, system, object, keys;
# then each storage as an element count and raw bytes. The numbers are torch's.
_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
_FORMAT_VERSION = 1001

_STORAGE_DTYPES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
}
_STORAGE_NAMES = {
    (module, name): Known(name=name) for module in ("torch", "torch.cuda") for name in _STORAGE_DTYPES
}
_NUMPY_CODES = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")


@dataclass(frozen=True, kw_only=True)
class Storage:
    """The memory of one or more tensors."""
    values: Tensor  # [numel], of one of the dtypes above, on the CPU


@dataclass(frozen=True, kw_only=True)
class PickledParameter:
    """A tensor that the file calls a parameter."""
    tensor: Tensor


def load_storage(payload: object) -> Storage:
    """Read one storage in torch's legacy file format.

    Raises PickleRefused when anything but a storage of a plain numeric dtype, stored little-endian, is in `payload`.
    """
    if type(payload) is not bytes:
        raise PickleRefused(f"a tensor storage is {quote(payload)}; expected bytes")
    stream = io.BytesIO(payload)
    magic, version, system = (load(stream, {}) for _ in range(3))
    if magic != _MAGIC_NUMBER or version != _FORMAT_VERSION:
        raise PickleRefused(f"a tensor storage starts with {quote(magic)}; expected torch's legacy format")
    if type(system) is not dict or system.get("little_endian") is not True:
        raise PickleRefused("a tensor storage is not marked as little-endian")
    reference = load(stream, _STORAGE_NAMES, persistent=_StorageReference.from_id)
    keys = load(stream, {})
    if type(reference) is not _StorageReference or type(keys) is not list or keys != [reference.key]:
        raise PickleRefused("a tensor storage holds something other than one storage")
    return Storage(values=_read_values(stream.read(), reference))


@dataclass(frozen=True, kw_only=True)
class _StorageReference:
    """What the persistent id of a storage says."""
    dtype: torch.dtype
    key: str
    numel: int

    @classmethod
    def from_id(cls, identity: object) -> "_StorageReference":
        if type(identity) is not tuple or len(identity) != 6:
            raise PickleRefused(f"a storage is described by {quote(identity)}; expected a tuple of 6")
        tag, kind, key, location, numel, view = identity
        # The location (a device of the machine that wrote the file) is irrelevant: everything is read to the CPU.
        if tag != "storage" or type(kind) is not Known or type(key) is not str or type(location) is not str:
            raise PickleRefused("the description of a storage is not of the expected form")
        if type(numel) is not int or numel < 0 or view is not None:
            raise PickleRefused(f"a storage has {quote(numel)} elements, view {quote(view)}; expected a count, no view")
        return cls(dtype=_STORAGE_DTYPES[kind.name], key=key, numel=numel)


def _read_values(data: bytes, reference: _StorageReference) -> Tensor:
    """data: element count (int64), then the elements, both little-endian."""
    expected = reference.numel * reference.dtype.itemsize
    count = int.from_bytes(data[:8], "little")
    if count != reference.numel or len(data) != 8 + expected:
        raise PickleRefused(f"a storage of {reference.numel} {reference.dtype} holds {count} elements in "
                            f"{max(len(data) - 8, 0)} bytes; expected {expected} bytes")
    if sys.byteorder != "little":
        raise PickleRefused("this machine is big-endian; the reader supports little-endian machines alone")
    if reference.numel == 0:
        return torch.empty(0, dtype=reference.dtype)
    # bytearray: torch wants memory that it may write to.
    return torch.frombuffer(bytearray(memoryview(data)[8:]), dtype=reference.dtype)


def rebuild_tensor(storage: object, offset: object, size: object, stride: object, requires_grad: object = False,
                   hooks: object = None, metadata: object = None) -> Tensor:
    """Answer torch._utils._rebuild_tensor_v2: a view of the storage, [*size], no gradient.

    A view, since a file can ask for thousands of tensors of one storage in a few bytes each.

    Raises PickleRefused when an index would leave the storage, and for hooks and metadata.
    """
    if type(storage) is not Storage:
        raise PickleRefused(f"a tensor has {quote(storage)} in place of a storage")
    if hooks or metadata or type(requires_grad) is not bool:
        raise PickleRefused("a tensor has hooks, metadata or an odd requires_grad; expected none")
    if not (_is_shape(size) and _is_shape(stride) and _is_shape((offset,)) and len(size) == len(stride)):
        raise PickleRefused("size, stride and offset of a tensor are not tuples of counts")
    numel, held = math.prod(size), storage.values.numel()
    last = offset + sum((extent - 1) * step for extent, step in zip(size, stride, strict=True))
    if numel > held or (numel > 0 and last >= held):
        raise PickleRefused(f"a tensor of shape {quote(str(size))} reaches outside its storage of {held} elements")
    if numel == 0:
        if math.prod(max(extent, 1) for extent in size) >= 2**31:  # torch multiplies these, and would overflow
            raise PickleRefused(f"an empty tensor has the shape {quote(str(size))}")
        return torch.empty(size, dtype=storage.values.dtype)
    return storage.values.as_strided(size, stride, offset)


def _is_shape(counts: object) -> bool:
    return type(counts) is tuple and len(counts) <= 8 and all(type(n) is int and 0 <= n < 2**40 for n in counts)


def rebuild_parameter(tensor: object, requires_grad: object, hooks: object = None) -> PickledParameter:
    """Answer torch._utils._rebuild_parameter."""
    if not isinstance(tensor, Tensor) or type(requires_grad) is not bool or hooks:
        raise PickleRefused(f"a parameter is made of {quote(tensor)}; expected a tensor without hooks")
    return PickledParameter(tensor=tensor)


class NumpyType(Buildable):
    """Answer numpy.dtype for numeric kinds: a code and a byte order, never an object or a structure."""

    def __init__(self, code: object, align: object = False, copy: object = True) -> None:
        if code not in _NUMPY_CODES or align not in (0, 1) or copy not in (0, 1):
            raise PickleRefused(f"numpy.dtype({quote(code)}) is outside the closed list of numeric types")
        self.code = code
        self.byte_order = "|"

    def build(self, state: object) -> None:
        # numpy's state: version, byte order, then what structures, subarrays and odd sizes would need.
        if type(state) is not tuple or len(state) < 8 or state[1] not in ("<", ">", "|", "=") \
                or state[2:5] != (None, None, None):
            raise PickleRefused("the state of a numpy.dtype is not that of a plain number")
        self.byte_order = state[1]


def numpy_scalar(kind: object, data: object) -> bool | int | float:
    """Answer numpy.core.multiarray.scalar with the plain Python number."""
    if type(kind) is not NumpyType or type(data) is not bytes:
        raise PickleRefused(f"a numpy scalar is made of {quote(kind)} and {quote(data)}; expected a type and bytes")
    dtype = np.dtype(kind.code).newbyteorder(kind.byte_order)
    if len(data) != dtype.itemsize:
        raise PickleRefused(f"a numpy {kind.code} has {len(data)} bytes; expected {dtype.itemsize}")
    return np.frombuffer(data, dtype)[0].item()
