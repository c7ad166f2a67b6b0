"""training.pickles.arrays: tensors and numbers come back bit for bit; what does not fit its storage is refused."""
import io
import pickle

import numpy as np
import pytest
import torch

from tests.helpers.nvidia_pickle_writer import Call, Name, dumps, storage_bytes
from training.nvidia_pickle import _known_names
from training.pickles.arrays import NumpyType, Storage, load_storage, numpy_scalar, rebuild_parameter, rebuild_tensor
from training.pickles.machine import PickleRefused, load

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
          torch.int8, torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("numel", [0, 1, 7])
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")  # what torch.load returns here
def test_load_storage_equals_torch_load(dtype, numel):
    payload = storage_bytes((torch.arange(numel) * 3.25).to(dtype))
    expected = torch.load(io.BytesIO(payload), weights_only=True)
    loaded = load_storage(payload).values
    assert loaded.dtype == expected.dtype == dtype
    assert loaded.tolist() == expected.tolist()


def test_load_storage_nan_bits_are_kept():
    bits = torch.tensor([0x7FC00001, 0x7F800000, -(2**31)], dtype=torch.int32)
    loaded = load_storage(storage_bytes(bits.view(torch.float32))).values
    assert torch.equal(loaded.view(torch.int32), bits)


def bad_payloads():
    good = storage_bytes(torch.arange(4.0))
    return {
        "empty": b"", "cut": good[:-1], "longer": good + b"\0", "not_bytes": "text", "magic": dumps(1, 2) + good,
        "bool": storage_bytes(torch.ones(2) > 0), "complex": storage_bytes(torch.ones(2) + 1j),
        "count": good.replace(b"K\x04", b"K\x7f"),
        "big_endian": good.replace(b"\x88", b"\x89", 1), "other_class": good.replace(b"FloatStorage", b"TableStorage"),
        "state_dict": good.replace(b"ctorch\nFloatStorage", b"cos\nFloatStorage"), "zip": b"PK\x03\x04" + good,
    }


@pytest.mark.parametrize("kind", sorted(bad_payloads()))
def test_load_storage_malformed_payload_is_refused(kind):
    with pytest.raises(PickleRefused):
        load_storage(bad_payloads()[kind])


STORAGE = Storage(values=torch.arange(12.0))


@pytest.mark.parametrize(("offset", "size", "stride"), [
    (0, (12,), (1,)), (0, (3, 4), (4, 1)), (0, (4, 3), (1, 4)), (2, (2, 2), (4, 2)), (11, (), ()), (0, (0, 5), (5, 1)),
    (0, (2, 2), (0, 1)), (12, (0,), (1,)),
])
def test_rebuild_tensor_equals_as_strided_and_takes_no_memory(offset, size, stride):
    rebuilt = rebuild_tensor(STORAGE, offset, size, stride, False, {})
    assert torch.equal(rebuilt, STORAGE.values.as_strided(size, stride, offset))
    shared = rebuilt.untyped_storage().data_ptr() == STORAGE.values.untyped_storage().data_ptr()
    assert shared or rebuilt.numel() == 0


@pytest.mark.parametrize(("offset", "size", "stride"), [
    (0, (13,), (1,)), (1, (12,), (1,)), (0, (3, 4), (5, 1)), (-1, (2,), (1,)), (0, (-2,), (1,)), (0, (2,), (-1,)),
    (0, (2,), (1, 1)), (12, (), ()), (0, (2.0,), (1,)), (0, [2], [1]), (0, (True,), (1,)), (None, (2,), (1,)),
    (0, (2**39, 2**39), (0, 0)), (0, (2**70,), (0,)), (0, (1,) * 9, (1,) * 9), (0, (13,), (0,)),
    (0, (2**39, 2**39, 0), (0, 0, 0)), (0, (0, 2**39, 2**39), (1, 1, 1)), (0, (2**39,) * 7 + (0,), (2**39,) * 8),
])
def test_rebuild_tensor_outside_its_storage_is_refused(offset, size, stride):
    with pytest.raises(PickleRefused):
        rebuild_tensor(STORAGE, offset, size, stride, False, {})


@pytest.mark.parametrize("arguments", [
    (torch.arange(12.0), 0, (2,), (1,), False, {}), (STORAGE, 0, (2,), (1,), False, {0: "hook"}),
    (STORAGE, 0, (2,), (1,), None, {}), (STORAGE, 0, (2,), (1,), False, {}, {"metadata": 1}),
])
def test_rebuild_tensor_odd_arguments_are_refused(arguments):
    with pytest.raises(PickleRefused):
        rebuild_tensor(*arguments)


def test_rebuild_parameter_of_something_else_is_refused():
    with pytest.raises(PickleRefused):
        rebuild_parameter("weight", True, {})


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("value", [np.float64(1 / 3), np.float32(0.1), np.float16(2), np.int64(-5), np.uint8(200),
                                   np.int32(7), np.bool_(True), np.dtype(">f8").type(2.5)], ids=repr)
def test_numpy_scalar_becomes_the_equal_plain_number(value, protocol):
    loaded = load(io.BytesIO(pickle.dumps(value, protocol)), _known_names())
    assert loaded == value.item()
    assert type(loaded) is type(value.item())


def test_numpy_scalar_old_module_name_and_big_endian():
    kind = Call(Name("numpy", "dtype"), ("f8", 0, 1), state=(3, ">", None, None, None, -1, -1, 0))
    data = dumps(Call(Name("numpy.core.multiarray", "scalar"), (kind, np.array(2.5, ">f8").tobytes())), 3)
    assert load(io.BytesIO(data), _known_names()) == 2.5


@pytest.mark.parametrize("code", ["O8", "O", "V8", "S3", "U3", "M8", "c16", "f8,f8", "object", "i16", 8, None])
def test_numpy_type_other_than_numeric_is_refused(code):
    with pytest.raises(PickleRefused, match="outside the closed list of numeric types"):
        NumpyType(code, False, True)


@pytest.mark.parametrize("state", [None, (), (3, "<"), (3, "x", None, None, None, -1, -1, 0), {"a": 1},
                                   (3, "<", (1,), None, None, -1, -1, 0), (3, "<", None, ("a",), {"a": 1}, -1, -1, 0)])
def test_numpy_type_state_of_a_structure_is_refused(state):
    with pytest.raises(PickleRefused):
        NumpyType("f8").build(state)


@pytest.mark.parametrize(("kind", "data"), [(NumpyType("f8"), b"1234"), (NumpyType("f8"), "12345678"),
                                            ("f8", b"12345678")])
def test_numpy_scalar_of_wrong_parts_is_refused(kind, data):
    with pytest.raises(PickleRefused):
        numpy_scalar(kind, data)
