"""What travels in a federated run: the agreed list, constants, and their hashes."""

import re

import pytest
import torch

from federated.agreement import constants, constants_hash, load_tensors, local_tensors, start_tensors, tensors_hash
from tests.helpers.federated_states import agreement_of, tiny_state, trained
from training.config import DatasetFacts
from training.dry_run import meta_state
from training.options import TrainOptions, resolve
from training.state import TrainingState

FROZEN = {"block_kwargs": {"freeze_layers": 1}}


def test_agreement_lists_the_parameters_of_all_networks_and_w_avg():
    state = tiny_state()
    expected = {"G.mapping.w_avg": (8,)}
    for role in ("G", "D", "G_ema"):
        for name, parameter in getattr(state, role).named_parameters():
            expected[f"{role}.{name}"] = tuple(parameter.shape)
    assert agreement_of(state).tensors == expected


@pytest.mark.parametrize(("share", "ema", "roles"), [
    ("G,D", "sites", {"G", "D", "G_ema"}), ("G,D", "server", {"G", "D"}), ("G", "sites", {"G", "G_ema"}),
    ("G", "server", {"G"}),
])
def test_agreement_follows_what_is_shared(share, ema, roles):
    state = tiny_state()
    agreement = agreement_of(state, share=share, ema=ema)
    assert {name.split(".")[0] for name in agreement.tensors} == roles
    assert "G.mapping.w_avg" in agreement.tensors
    # What does not travel is sent at most once: nothing is lost, and nothing is in both lists.
    everything = {f"{role}.{name}" for role in ("G", "D") for name in getattr(state, role).state_dict()}
    everything |= {f"G_ema.{name}" for name, _ in state.G_ema.named_parameters()}
    assert set(agreement.tensors) | set(agreement.start) == everything
    assert not set(agreement.tensors) & set(agreement.start)


def test_agreement_of_meta_and_real_networks_is_equal_and_keeps_the_order():
    config = resolve(TrainOptions(cfg="tiny", precision="fp32", cond=True),
                     DatasetFacts(name="x", resolution=16, channels=3, num_images=9, c_dim=2))
    meta, real = agreement_of(meta_state(config)), agreement_of(TrainingState.create(config, "cpu"))
    assert meta == real
    assert list(meta.tensors) == list(real.tensors)


def test_agreement_refuses_other_weights_than_float32():
    state = tiny_state()
    state.D.double()
    with pytest.raises(ValueError, match=r"^D\.b8\.resample_filter is torch\.float64; expected torch\.float32$"):
        agreement_of(state)


def test_bytes_of_256x256_with_two_classes():
    config = resolve(TrainOptions(cfg="auto", precision="fp32", cond=True),
                     DatasetFacts(name="x", resolution=256, channels=3, num_images=10_000, c_dim=2))
    state = meta_state(config)
    G, D = (sum(parameter.numel() for parameter in network.parameters()) for network in (state.G, state.D))
    sizes = {(share, ema, payload): agreement_of(state, share=share, ema=ema, payload=payload).num_bytes
             for share in ("G,D", "G") for ema in ("sites", "server") for payload in ("float32", "bfloat16")}
    assert sizes["G,D", "sites", "float32"] == 4 * (G + D + G + 512)  # 512 of w_avg
    assert sizes["G,D", "sites", "float32"] / 2**20 == pytest.approx(279.53, abs=0.01)
    assert sizes["G,D", "server", "float32"] == 4 * (G + D + 512)  # a third less
    assert sizes["G", "server", "float32"] == 4 * (G + 512)
    assert all(sizes[share, ema, "bfloat16"] * 2 == sizes[share, ema, "float32"] for share, ema, _ in sizes)


@pytest.mark.parametrize(("label_kind", "c_dim", "expected"), [("class", 2, 2), ("vector", 2, 0), (None, 0, 0)])
def test_num_classes_counts_classes_but_not_the_numbers_of_vectors(label_kind, c_dim, expected):
    state = tiny_state(c_dim=c_dim, D={"c_dim": c_dim})
    assert agreement_of(state, classes=None, label_kind=label_kind).num_classes == expected


def test_constants_are_all_other_buffers():
    state = tiny_state()
    found = constants(state)
    assert {name.rsplit(".", 1)[1] for name in found} == {"noise_const", "resample_filter"}
    assert len(found) == sum(len([*network.buffers()]) for network in (state.G, state.D)) - 1


def test_constants_hash_is_equal_for_equal_seeds_and_does_not_change_in_training():
    assert constants_hash(tiny_state(seed=1)) == constants_hash(tiny_state(seed=1))
    assert constants_hash(tiny_state(seed=1)) != constants_hash(tiny_state(seed=2))
    assert constants_hash(tiny_state(seed=1)) == constants_hash(trained(tiny_state(seed=1), seed=5))


def test_frozen_layers_are_constants_and_do_not_travel():
    state = tiny_state(D=FROZEN)
    agreement, hash_before = agreement_of(state), constants_hash(state)
    assert "D.b8.fromrgb.weight" in constants(state)
    assert "D.b8.fromrgb.weight" not in agreement.tensors
    assert agreement.start["D.b8.fromrgb.weight"] == (4, 3, 1, 1)
    assert "D.b8.conv0.weight" in agreement.tensors
    with torch.no_grad():
        state.D.b8.fromrgb.weight[0, 0, 0, 0] += 1e-6
    assert constants_hash(state) != hash_before


@pytest.mark.parametrize("ema", ["sites", "server"])
def test_load_tensors_copies_what_travels_and_nothing_else(ema):
    mine, theirs = tiny_state(seed=0), trained(tiny_state(seed=1), seed=2)
    agreement, own_average = agreement_of(mine, ema=ema), mine.G_ema.synthesis.b4.const.clone()
    own_noise = mine.G.synthesis.b8.conv0.noise_const.clone()
    load_tensors(mine, local_tensors(theirs, agreement))
    for name, tensor in local_tensors(mine, agreement).items():
        assert torch.equal(tensor, local_tensors(theirs, agreement)[name]), name
    assert torch.equal(mine.G_ema.mapping.w_avg, theirs.G.mapping.w_avg)
    assert torch.equal(mine.G.synthesis.b8.conv0.noise_const, own_noise)
    expected = theirs.G_ema.synthesis.b4.const if ema == "sites" else own_average
    assert torch.equal(mine.G_ema.synthesis.b4.const, expected)


@pytest.mark.parametrize(("share", "ema"), [("G,D", "sites"), ("G", "server")])
def test_load_tensors_of_the_round_and_of_the_start_makes_the_states_equal(share, ema):
    mine, theirs = tiny_state(seed=0, D=FROZEN), trained(tiny_state(seed=1, D=FROZEN), seed=2)
    agreement = agreement_of(mine, share=share, ema=ema)
    assert constants_hash(mine) != constants_hash(theirs)
    load_tensors(mine, local_tensors(theirs, agreement))
    load_tensors(mine, start_tensors(theirs, agreement))
    assert constants_hash(mine) == constants_hash(theirs)
    for role in ("G", "D", "G_ema"):
        assert tensors_hash(getattr(mine, role).state_dict()) == tensors_hash(getattr(theirs, role).state_dict())


def test_local_tensors_share_memory_with_the_networks():
    state = tiny_state()
    local_tensors(state, agreement_of(state))["G.mapping.w_avg"].fill_(3)
    assert state.G.mapping.w_avg.tolist() == [3.0] * 8


def test_tensors_hash_sees_every_property_but_the_order_and_the_layout_in_memory():
    values = torch.arange(6.0).reshape(2, 3)
    one = tensors_hash({"a": values, "b": torch.zeros([])})
    assert re.fullmatch("[0-9a-f]{64}", one)
    assert tensors_hash({"b": torch.zeros([]), "a": values.t().contiguous().t()}) == one
    others = [{"a": values + 1, "b": torch.zeros([])}, {"a": values.reshape(3, 2), "b": torch.zeros([])},
              {"a": values.view(torch.int32), "b": torch.zeros([])}, {"a": values, "c": torch.zeros([])},
              {"a": values}, {"a": values, "b": -torch.zeros([])}]
    assert len({one, *map(tensors_hash, others)}) == 7


def test_facts_are_what_a_message_states():
    agreement = agreement_of(tiny_state(), payload="bfloat16")
    facts = agreement.facts()
    assert facts["G"]["synthesis_kwargs"] == {"channel_base": 32, "channel_max": 4}
    assert {name: facts[name] for name in ("classes", "label_kind", "share", "ema", "payload")} == {
        "classes": ["nv", "mel"], "label_kind": "class", "share": "G,D", "ema": "sites", "payload": "bfloat16"}
