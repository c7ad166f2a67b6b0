"""Messages between the server and the sites: what arrives is what was sent, and everything else is refused."""

import math
import re
from dataclasses import replace

import pytest
import safetensors.torch
import torch

from federated.agreement import constants_hash, load_tensors, local_tensors, start_tensors, tensors_hash
from federated.exchange import (
    STATISTICS,
    decode_global,
    decode_update,
    encode_global,
    encode_update,
    hash_of_global,
    max_bytes,
)
from tests.helpers.federated_states import NUMBERS, Round, agreement_of, forged, refusal, tiny_state, trained
from tests.helpers.small_networks import small_config, small_inputs, small_state
from training.step import train_step


@pytest.fixture(scope="module")
def wire():
    return Round()


def test_global_message_arrives_bit_for_bit(wire):
    assert wire.received.round == 7
    assert list(wire.received.tensors) == list(wire.agreement.tensors)
    for name, tensor in wire.received.tensors.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor.view(torch.int32), wire.base[name].view(torch.int32)), name
    assert wire.received.base_hash == hash_of_global(wire.agreement, wire.base)
    assert (wire.received.constants_hash, wire.received.start) == (wire.constants, None)


def test_update_arrives_bit_for_bit(wire):
    update = wire.read_update(wire.up)
    assert (update.site, update.round, update.numbers) == ("b", 7, NUMBERS)
    sent = local_tensors(wire.site, wire.agreement)
    assert list(update.tensors) == list(sent)
    for name, tensor in update.tensors.items():
        assert torch.equal(tensor.view(torch.int32), sent[name].view(torch.int32)), name


def test_float32_update_keeps_every_bit_of_unusual_numbers(wire):
    values = [-0.0, 1e-45, -3.4028235e38, 1 + 2**-23, 0.1, 2**-126, -1e-40, 1 / 3]
    ends = {**wire.base, "G.mapping.w_avg": torch.tensor(values)}
    data = encode_update(wire.agreement, ends, wire.received, site="b", constants_hash=wire.constants, numbers=NUMBERS)
    found = wire.read_update(data).tensors["G.mapping.w_avg"]
    assert found.view(torch.int32).tolist() == torch.tensor(values).view(torch.int32).tolist()


def test_equal_content_gives_equal_bytes(wire):
    again = Round()
    assert (again.down, again.up) == (wire.down, wire.up)


def test_messages_are_little_larger_than_their_tensors(wire):
    for data in (wire.down, wire.up):
        assert wire.agreement.num_bytes < len(data) < wire.agreement.num_bytes + 20_000 < max_bytes(wire.agreement)
    half = Round(payload="bfloat16")
    assert half.agreement.num_bytes * 2 == wire.agreement.num_bytes
    assert len(half.down) - len(wire.down) == pytest.approx(-half.agreement.num_bytes, abs=200)


@pytest.mark.parametrize(("share", "ema"), [("G", "sites"), ("G,D", "server"), ("G", "server")])
def test_messages_hold_only_what_is_shared(share, ema):
    partial = Round(share=share, ema=ema)
    for data in (partial.down, partial.up):
        assert safetensors.torch.load(data).keys() == partial.agreement.tensors.keys()
    assert partial.read_update(partial.up).tensors.keys() == partial.agreement.tensors.keys()


def test_start_brings_a_site_to_the_weights_of_the_server():
    server, site = trained(tiny_state(seed=1), seed=3), tiny_state(seed=0)
    agreement = agreement_of(server, share="G", ema="server", payload="bfloat16")
    data = encode_global(agreement, local_tensors(server, agreement), round=0, constants_hash=constants_hash(server),
                         start=start_tensors(server, agreement))
    assert len(data) < max_bytes(agreement)
    message = decode_global(data, agreement, constants_hash=constants_hash(site))
    load_tensors(site, message.tensors)
    load_tensors(site, message.start)
    assert constants_hash(site) == constants_hash(server) == message.constants_hash
    # Only the weights of the round are rounded.
    assert torch.equal(site.D.b8.conv0.weight, server.D.b8.conv0.weight)
    assert torch.equal(site.G.synthesis.b4.const, server.G.synthesis.b4.const.bfloat16().float())


def test_other_constants_are_refused_without_start(wire):
    expected = (f'the constants have the sha256 "{wire.constants}"; expected "other": start the server and all sites '
                "with the same --seed and --resume")
    assert refusal(wire.read_global, wire.down, constants_hash="other") == expected
    assert refusal(wire.read_update, wire.up, constants_hash="other") == expected


# bfloat16


def test_bfloat16_update_is_the_difference_added_to_the_weights_of_the_server():
    half = Round(payload="bfloat16", step=1e-4)
    update = half.read_update(half.up)
    for name, tensor in update.tensors.items():
        start, end = half.received.tensors[name], local_tensors(half.site, half.agreement)[name]
        assert torch.equal(start, half.base[name].bfloat16().float()), name
        assert tensor.dtype == torch.float64
        change = (end - start).bfloat16().double()  # the site's, to 8 bits
        assert torch.equal(tensor, half.base[name].double() + change), name
    assert half.received.base_hash == tensors_hash({name: tensor.bfloat16() for name, tensor in half.base.items()})


def moved_after_rounds(payload, rounds=5, step=1e-4):
    """Return how far a weight of the server, at first 1, gets in rounds in which each of two sites adds `step`."""
    state = tiny_state()
    agreement = agreement_of(state, payload=payload)
    for tensor in local_tensors(state, agreement).values():
        tensor.fill_(1)
    hashed = constants_hash(state)
    for number in range(rounds):
        base = {name: tensor.clone() for name, tensor in local_tensors(state, agreement).items()}
        sent = decode_global(encode_global(agreement, base, round=number, constants_hash=hashed), agreement,
                             constants_hash=hashed)
        updates = []
        for site in ("a", "b"):
            ends = {name: tensor + step for name, tensor in sent.tensors.items()}
            data = encode_update(agreement, ends, sent, site=site, constants_hash=hashed, numbers=NUMBERS)
            updates.append(decode_update(data, agreement, site=site, round=number, base=base, constants_hash=hashed,
                                         base_hash=sent.base_hash).tensors)
        load_tensors(state, {name: (updates[0][name].double() + updates[1][name].double()) / 2 for name in base})
    return state.G.mapping.w_avg.double().mean().item() - 1


def test_bfloat16_does_not_lose_small_updates_over_rounds():
    # Each change is far below the distance of two numbers of bfloat16 near 1, 2^-7.
    assert torch.tensor(1 + 1e-4).bfloat16() == 1
    assert moved_after_rounds("float32") == pytest.approx(5e-4, rel=1e-3)
    assert moved_after_rounds("bfloat16") == pytest.approx(5e-4, rel=2**-8)


# What a receiver refuses: another agreement.


def other_agreements():
    """Yield agreements of another site, with the reason to refuse its messages."""
    state = tiny_state()
    mine = agreement_of(state)
    wide = tiny_state(synthesis_kwargs={"channel_base": 64, "channel_max": 4})
    yield agreement_of(wide), "G.synthesis_kwargs.channel_base is 64 there and 32 here"
    deep = tiny_state(mapping_kwargs={"num_layers": 3})
    yield agreement_of(deep), "G.mapping_kwargs.num_layers is 3 there and 2 here"
    clamped = tiny_state(D={"conv_clamp": 256})
    yield agreement_of(clamped), "D.conv_clamp is 256 there and null here"
    frozen = tiny_state(D={"block_kwargs": {"freeze_layers": 2}})
    yield agreement_of(frozen), "D.block_kwargs.freeze_layers is given there and missing here"
    yield replace(mine, networks={**mine.networks, "G": {"c_dim": 2}}), "G.z_dim is missing there and 8 here"
    odd = {"e\n": 1, **mine.networks["G"]}
    yield replace(mine, networks={**mine.networks, "G": odd}), r'"G.e\n" is given there and missing here'
    yield agreement_of(state, classes=("mel", "nv")), 'classes is ["mel", "nv"] there and ["nv", "mel"] here'
    yield agreement_of(state, classes=None), 'classes is null there and ["nv", "mel"] here'
    yield agreement_of(state, label_kind="vector"), 'label_kind is "vector" there and "class" here'
    yield agreement_of(state, share="G"), 'share is "G" there and "G,D" here'
    yield agreement_of(state, ema="server"), 'ema is "server" there and "sites" here'
    yield agreement_of(state, payload="bfloat16"), 'payload is "bfloat16" there and "float32" here'


def test_message_under_another_agreement_is_refused_with_the_difference(wire):
    for other, reason in other_agreements():
        tensors = {name: torch.zeros(shape) for name, shape in other.tensors.items()}
        down = encode_global(other, tensors, round=7, constants_hash=wire.constants)
        assert refusal(wire.read_global, down) == reason
        received = decode_global(down, other, constants_hash=wire.constants)
        numbers = replace(NUMBERS, images_of_class=(1,) * other.num_classes)
        up = encode_update(other, tensors, received, site="b", constants_hash=wire.constants, numbers=numbers)
        assert refusal(wire.read_update, up) == reason


def test_other_protocol_version_is_refused(wire):
    reason = "the protocol version is 2 there and 1 here; use the same version of this project everywhere"
    for data, read in ((wire.down, wire.read_global), (wire.up, wire.read_update)):
        assert refusal(read, forged(data, lambda header: header.update(version=2))) == reason


def test_other_round_site_base_and_kind_are_refused(wire):
    assert refusal(wire.read_global, wire.down, round=8) == "round is 7; expected 8"
    assert refusal(wire.read_update, wire.up, round=8) == "round is 7; expected 8"
    assert refusal(wire.read_update, wire.up, site="a") == 'site is "b"; expected "a"'
    base = wire.received.base_hash
    assert refusal(wire.read_update, wire.up, base_hash="0" * 64) == (
        f'it was trained from weights with the sha256 "{base}"; expected those of this round, "{"0" * 64}"')
    assert refusal(wire.read_update, wire.down) == 'it is a message of the kind "global"; expected "update"'
    assert refusal(wire.read_global, wire.up) == 'it is a message of the kind "update"; expected "global"'


# What a sender refuses.


def test_sender_refuses_what_the_receiver_would(wire):
    good = {name: tensor.clone() for name, tensor in wire.base.items()}
    first = next(iter(good))
    bad = [({**good, "x": torch.zeros(1)}, 'the tensor "x" is not among those that were agreed'),
           ({name: good[name] for name in good if name != first}, f"the tensor {first} is missing"),
           ({**good, "G.mapping.w_avg": torch.zeros(9)},
            "the tensor G.mapping.w_avg has the shape [9]; expected [8]"),
           ({**good, "G.mapping.w_avg": torch.zeros(8).double()},
            "the tensor G.mapping.w_avg is float64; expected float32"),
           ({**good, "G.mapping.w_avg": torch.full([8], math.nan)},
            "the tensor G.mapping.w_avg has values that are not finite")]
    for tensors, reason in bad:
        assert refusal(encode_global, wire.agreement, tensors, round=7, constants_hash=wire.constants) == reason
        assert refusal(encode_update, wire.agreement, tensors, wire.received, site="b",
                       constants_hash=wire.constants, numbers=NUMBERS) == reason
    assert refusal(encode_global, wire.agreement, good, round=-1, constants_hash="") == \
        "round is -1; expected a whole number from 0 to 9007199254740992"
    assert refusal(encode_global, wire.agreement, good, round=7, constants_hash="", start={}).endswith("is missing")


def test_sender_refuses_a_start_that_is_not_finite_and_a_header_that_is_too_large(wire):
    start = {name: torch.zeros(shape) for name, shape in wire.agreement.start.items()}
    start["D.b8.resample_filter"] = torch.full([4, 4], math.nan)
    assert refusal(encode_global, wire.agreement, wire.base, round=7, constants_hash="", start=start) == \
        "the tensor D.b8.resample_filter has values that are not finite"
    agreement = replace(wire.agreement, classes=("x" * 2**20, "y"))
    assert re.fullmatch("its header has 10[0-9]+ bytes; expected at most 1048576: shorten the names of the classes",
                        refusal(encode_global, agreement, wire.base, round=7, constants_hash=""))


@pytest.mark.parametrize(("changes", "reason"), [
    ({"seconds": math.inf}, "seconds is Infinity; expected a number from 0 to 9007199254740992"),
    ({"augment_p": math.nan}, "augment_p is NaN; expected a number from 0 to 1"),
    ({"images_of_class": ()}, "images_of_class is []; expected a number for each of 2 classes"),
    ({"statistics": {"Ann": {"num": 1, "mean": 0, "std": 0}}}, 'the statistic "Ann" is not among those'),
    ({"statistics": {"Loss/G/loss": {"num": 1, "mean": 0, "std": "Ann"}}}, 'Loss/G/loss: std is "Ann"; expected'),
])
def test_sender_refuses_numbers_that_the_receiver_would(changes, reason):
    assert refusal(Round, numbers=replace(NUMBERS, **changes)).startswith(reason)


@pytest.mark.parametrize("mean", [math.inf, 2e30, -2e30])
def test_statistics_that_are_not_finite_or_too_large_to_square_arrive_as_nan(mean):
    numbers = replace(NUMBERS, statistics={"Loss/D/loss": {"num": 2, "mean": mean, "std": math.nan}})
    sent = Round(numbers=numbers)
    assert rb'{\\\"num\\\":2,\\\"mean\\\":null,\\\"std\\\":null}' in sent.up.replace(rb'\"', rb'\\\"')
    found = sent.read_update(sent.up).numbers.statistics["Loss/D/loss"]
    assert found["num"] == 2
    assert math.isnan(found["mean"])
    assert math.isnan(found["std"])


def test_every_statistic_of_training_is_declared():
    config = small_config(g_reg_interval=1, d_reg_interval=1)
    state = small_state(config)
    result = train_step(state, small_inputs(state, config), config)
    reported = {name for named in result.stats.values() for name in named}
    reported |= {f"Trouble/skipped/{phase}" for phase in result.stats}
    # training/loop.py adds those of held-out images.
    assert set(STATISTICS) == reported | {"Loss/scores/valid", "Loss/signs/valid"}


def test_unconditional_round_counts_no_classes():
    state = tiny_state(c_dim=0, D={"c_dim": 0})
    agreement = agreement_of(state, classes=None, label_kind=None)
    tensors = local_tensors(state, agreement)
    hashed = constants_hash(state)
    received = decode_global(encode_global(agreement, tensors, round=0, constants_hash=hashed), agreement,
                             constants_hash=hashed, round=0)
    data = encode_update(agreement, tensors, received, site="b", constants_hash=hashed,
                         numbers=replace(NUMBERS, images_of_class=(), statistics={}))
    update = decode_update(data, agreement, site="b", round=0, base=tensors, base_hash=received.base_hash,
                           constants_hash=hashed)
    assert (update.numbers.images_of_class, update.numbers.statistics) == ((), {})
    assert not re.search(r"embed", " ".join(update.tensors))
