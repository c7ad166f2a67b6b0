"""Hostile and damaged messages: other tensors, undeclared content, foreign files, and flipped bits are refused."""

import json
import math
import random
import time
from contextlib import suppress

import pytest
import safetensors.torch
import torch

from federated.exchange import Refused
from tests.helpers.federated_states import Round, compact, forged, refusal


@pytest.fixture(scope="module")
def wire():
    return Round()


@pytest.mark.parametrize(("tensors", "reason"), [
    ({"G.extra": torch.zeros(1)}, 'the tensor "G.extra" is not among those that were agreed'),
    ({"Ann\n" * 500: torch.zeros(1)}, r'the tensor "Ann\nAnn\n'),
    ({"G.synthesis.b4.const": None}, "the tensor G.synthesis.b4.const is missing"),
    ({"G.synthesis.b4.const": torch.zeros(4, 4)}, "the tensor G.synthesis.b4.const has the shape [4, 4]; expected "
                                                  "[4, 4, 4]"),
    ({"G.mapping.w_avg": torch.zeros(8, dtype=torch.float64)}, 'the tensor G.mapping.w_avg is "F64"; expected float32'),
    ({"G.mapping.w_avg": torch.zeros(8, dtype=torch.bfloat16)},
     "the tensor G.mapping.w_avg is bfloat16; expected float32"),
    ({"D.b4.out.bias": torch.full([4], math.nan), "G.synthesis.b4.const": torch.full([4, 4, 4], -math.inf)},
     "the tensor G.synthesis.b4.const has values that are not finite"),
])
def test_other_tensors_are_refused_by_name(wire, tensors, reason):
    for data, read in ((wire.down, wire.read_global), (wire.up, wire.read_update)):
        text = refusal(read, forged(data, tensors=tensors))
        assert text.startswith(reason)
        assert len(text) < 400


def test_not_finite_bfloat16_is_refused():
    half = Round(payload="bfloat16")
    bad = {"G.mapping.w_avg": torch.full([8], math.inf, dtype=torch.bfloat16)}
    assert refusal(half.read_update, forged(half.up, tensors=bad)) == \
        "the tensor G.mapping.w_avg has values that are not finite"


# Other numbers, and everything that is not declared.


def in_numbers(name, value):
    return lambda header: header["numbers"].update({name: value})


def in_loss(name, value):
    return lambda header: header["numbers"]["statistics"]["Loss/G/loss"].update({name: value})


@pytest.mark.parametrize(("change", "reason"), [
    (in_numbers("num_images", 0), "num_images is 0; expected a whole number from 1 to 9007199254740992"),
    (in_numbers("num_images", 2**60), f"num_images is {2**60}; expected a whole number from 1 to 9007199254740992"),
    (in_numbers("num_images", 16.0), "num_images is 16.0; expected a whole number from 1 to 9007199254740992"),
    (in_numbers("num_images", True), "num_images is true; expected a whole number from 1 to 9007199254740992"),
    (in_numbers("num_iterations", 1009), "num_iterations is 1009; expected a whole number from 1 to 1008"),
    (in_numbers("images_of_class", [1]), "images_of_class is [1]; expected a number for each of 2 classes"),
    (in_numbers("images_of_class", "12"), 'images_of_class is "12"; expected a number for each of 2 classes'),
    (in_numbers("images_of_class", [-1, 2]), "images_of_class[0] is -1; expected a whole number from 0 to 1008"),
    (in_numbers("images_of_class", [1000, 9]), "images_of_class has 1009 images; expected at most num_images, 1008"),
    (in_numbers("augment_p", 1.5), "augment_p is 1.5; expected a number from 0 to 1"),
    (in_numbers("augment_p", None), "augment_p is null; expected a number from 0 to 1"),
    (in_numbers("seconds", -1), "seconds is -1; expected a number from 0 to 9007199254740992"),
    (in_numbers("seconds", "12"), 'seconds is "12"; expected a number from 0 to 9007199254740992'),
    (in_numbers("patient", "Ann"), 'the number "patient" is not among those that were agreed'),
    (in_numbers("statistics", None), "it has null; expected a value for each statistic"),
    (in_numbers("statistics", {"Ann": {"num": 1, "mean": 1, "std": 0}}),
     'the statistic "Ann" is not among those that were agreed'),
    (in_loss("mean", "Ann"), 'Loss/G/loss: mean is "Ann"; expected a number from -1e+30 to 1e+30'),
    (in_loss("std", 1e200), "Loss/G/loss: std is 1e+200; expected a number from -1e+30 to 1e+30"),
    (in_loss("mean", -1e200), "Loss/G/loss: mean is -1e+200; expected a number from -1e+30 to 1e+30"),
    (in_loss("num", 0), "Loss/G/loss: num is 0; expected a whole number from 1 to 9007199254740992"),
    (in_loss("values", [1, 2]), 'the number of Loss/G/loss "values" is not among those that were agreed'),
    (lambda header: header["numbers"].pop("seconds"), "the number seconds is missing"),
    (lambda header: header.update(numbers=[]), "it has []; expected a value for each number"),
    (lambda header: header.update(note="Ann"), 'the header field "note" is not among those that were agreed'),
    (lambda header: header.pop("base"), "the header field base is missing"),
    (lambda header: header.update(agreement=None), "the agreement is null there and {"),
    (lambda header: header.update(format="onnx"), "its header does not name the format stylegan2-ada-federated"),
    (lambda header: header.update(round="7"), 'round is "7"; expected a whole number from 0 to 9007199254740992'),
    (lambda header: header.update(site={"name": ["b"]}), 'site is {"name": ["b"]}; expected "b"'),
    (lambda header: header.update(tensors="0"), "its tensors were changed or damaged on the way"),
])
def test_undeclared_content_of_an_update_is_refused(wire, change, reason):
    assert refusal(wire.read_update, forged(wire.up, change)).startswith(reason)


def test_intact_message_survives_the_forger_of_these_tests(wire):
    assert forged(wire.up) == wire.up
    assert forged(wire.down) == wire.down


DAMAGED = "its header is not that of a message between a server and a site, or is damaged"


@pytest.mark.parametrize("hide", [
    lambda text: text.replace('{"__metadata__":{', '{"__metadata__":{"name":"Ann",'),
    lambda text: text.replace('"dtype":"F32"', '"name":"Ann","dtype":"F32"', 1),
    lambda text: text.replace('"dtype":"F32"', '"dtype":"I8","dtype":"F32"', 1),
    lambda text: text.replace(r'\"seconds\":12.5', r'\"seconds\":9999,\"seconds\":12.5'),
    lambda text: text.replace(r'\"seconds\":12.5', r'\"seconds\":12.50012300'),
    lambda text: text.replace(r'\"seconds\":12.5', r'\"seconds\":1e999'),
    lambda text: text.replace(r'\"seconds\":12.5', r'\"seconds\":NaN'),
    lambda text: text.replace("}", " }", 1),
    lambda text: "[" * 100_000,
    lambda text: "1" * 100_000,
    lambda text: "{}",
    lambda text: "null",
    lambda text: '{"__metadata__":{"federated":"[]"}}',
    lambda text: '{"__metadata__":{"other":"{}"}}',
])
def test_header_that_hides_something_or_is_foreign_is_refused(wire, hide):
    size = int.from_bytes(wire.up[:8], "little")
    text = wire.up[8:8 + size].decode().rstrip()
    changed = hide(text).encode()
    assert changed.decode() != text
    for padding in (b"", b" " * 100):
        data = (len(changed) + len(padding)).to_bytes(8, "little") + changed + padding + wire.up[8 + size:]
        reason = refusal(wire.read_update, data)
        assert reason in (DAMAGED, "its header was changed or damaged on the way")


def test_other_sizes_are_refused_before_tensors_are_read(wire):
    size = wire.agreement.num_bytes
    assert refusal(wire.read_update, wire.up + b"Ann") == f"it has {size + 3} bytes of tensors; expected {size}"
    assert refusal(wire.read_update, wire.up[:-1]) == f"it has {size - 1} bytes of tensors; expected {size}"
    reason = "it is not in the safetensors format, or its header has more than 1048576 bytes"
    for data in (b"", b"1234567", wire.up[:8], wire.up[:100], bytes(1000), b"\xff" * 1000,
                 (2**20 + 1).to_bytes(8, "little") + bytes(2**21)):
        assert refusal(wire.read_update, data) == reason


def test_safetensors_files_of_others_are_refused(wire):
    for metadata in (None, {"format": "pt"}, {"networks": "{}"}):
        data = safetensors.torch.save({"a": torch.zeros(3)}, metadata=metadata)
        assert refusal(wire.read_update, data) == DAMAGED


@pytest.mark.parametrize("payload", ["float32", "bfloat16"])
def test_every_damage_is_refused_and_quickly(payload):
    intact, rng = Round(payload=payload), random.Random(0)
    size = 8 + int.from_bytes(intact.up[:8], "little")
    for number in range(300):
        data = bytearray(intact.up)
        # One half of the flips are in the header, which is a small part of a message of real networks.
        for place in rng.sample(range(size if number % 2 else len(data)), rng.choice([1, 1, 3])):
            data[place] ^= 1 << rng.randrange(8)
        if number % 5 == 0:
            del data[rng.randrange(len(data)):]
        began = time.perf_counter()
        refusal(intact.read_update, bytes(data))
        assert time.perf_counter() - began < 1
    assert intact.read_update(intact.up).round == 7


def places_in(value, path=()):
    """Yield the paths of all values in JSON."""
    yield path
    if isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places_in(item, (*path, key))


def test_every_other_value_in_the_header_is_refused_unless_it_is_a_number():
    wire = Round(share="G", ema="server")  # few tensors, for speed
    size = int.from_bytes(wire.up[:8], "little")
    header = json.loads(json.loads(wire.up[8:8 + size])["__metadata__"]["federated"])
    accepted = []
    for path in (path for path in places_in(header) if path and path[-1] not in ("seal", "tensors")):
        for value in (None, True, -1, 0.5, 10**400, "Ann", [None], {}):
            def change(header, path=path, value=value):
                for key in path[:-1]:
                    header = header[key]
                header[path[-1]] = value

            data = forged(wire.up, change)
            with suppress(Refused):
                wire.read_update(data)
                accepted += [(path, value)] if data != wire.up else []
    assert {path[0] for path, _ in accepted} == {"numbers"}
    # No number of a statistic, and no statistics at all, are allowed.
    assert {compact(value) for _, value in accepted} == {"-1", "0.5", "null", "{}"}
    assert [path for path, value in accepted if value == {}] == [("numbers", "statistics")]
