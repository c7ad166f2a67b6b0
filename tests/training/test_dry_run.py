"""Sizes and memory of a run before it starts: counted by hand, and against real networks."""

import pytest
import torch

from tests.helpers.small_networks import small_discriminator
from training.augment import AugmentPipe
from training.config import DatasetFacts, TrainConfig
from training.dry_run import LiveBytes, augment_bytes, count_parameters, estimate_memory, meta_state, state_bytes
from training.options import TrainOptions, resolve
from training.phases import MicroBatch, Phase, PhaseInputs, PhaseWork
from training.snapshot import Networks, save_network
from training.state import TrainingState
from training.step import GradientSum


def config_of(resolution=16, **options) -> TrainConfig:
    facts = DatasetFacts(name="set", resolution=resolution, channels=3, num_images=100, c_dim=2)
    return resolve(TrainOptions(**{"cfg": "tiny", "cond": True, "precision": "fp32", **options}), facts)


def test_live_bytes_counts_what_is_alive_at_a_time():
    with LiveBytes() as tracker:
        x = torch.empty(1000, device="meta", requires_grad=True)  # 4000 bytes
        y = x.exp()  # 4000, kept for the derivative
        assert (tracker.live, tracker.peak) == (8000, 8000)
        z = y[:10].view(2, 5)  # a view takes nothing
        assert tracker.live == 8000
        del y, z
        assert tracker.live == 4000
    assert tracker.peak == 8000


def test_live_bytes_counts_the_backward_pass():
    x = torch.empty(1000, device="meta", requires_grad=True)
    with LiveBytes() as tracker:
        x.exp().exp().sum().backward()
    # Both results and a gradient, later one result and two gradients; the sum, and the 1 that backward starts from.
    assert tracker.peak == 3 * 4000 + 4 + 4
    assert tracker.live == x.grad.nbytes


def test_meta_state_has_the_sizes_of_the_real_one():
    config = config_of(resolution=32)
    meta, real = meta_state(config), TrainingState.create(config, "cpu")
    for role in ("G", "D", "G_ema"):
        mine, theirs = (getattr(state, role).state_dict() for state in (meta, real))
        assert {name: (t.shape, t.dtype) for name, t in mine.items()} == \
            {name: (t.shape, t.dtype) for name, t in theirs.items()}
        assert {t.device.type for t in mine.values()} == {"meta"}


def test_meta_state_draws_no_random_numbers():
    before = torch.get_rng_state()
    meta_state(config_of())
    assert torch.equal(torch.get_rng_state(), before)


def test_count_parameters_leaves_frozen_layers_out():
    network, frozen = small_discriminator(), small_discriminator(block_kwargs={"freeze_layers": 2})
    first = network.b16.fromrgb, network.b16.conv0
    assert count_parameters(network) - count_parameters(frozen) == sum(
        layer.weight.numel() + layer.bias.numel() for layer in first)


def test_persistent_memory_is_that_of_the_real_networks():
    config = config_of()
    state, found = TrainingState.create(config, "cpu"), estimate_memory(config)

    def size(tensors):
        return sum(tensor.nbytes for tensor in tensors)

    assert found.weights == size(state.G.state_dict().values()) + size(state.D.state_dict().values())
    assert found.averaged_generator == size(state.G_ema.state_dict().values())
    assert found.adam == 2 * (size(state.G.parameters()) + size(state.D.parameters()))
    assert found.gradients == size(getattr(state, found.phase[0]).parameters())
    assert found.total == found.weights + found.averaged_generator + found.adam + found.gradients + found.activations


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_are_those_of_a_real_micro_batch(precision):
    config = config_of(precision=precision, batch=4, aug="noaug")
    estimate = estimate_memory(config)
    assert estimate.phase == "Gmain"
    state = TrainingState.create(config, "cpu")
    state.G.requires_grad_(True)
    gradients = GradientSum([*state.G.parameters()])
    gradients.sums = [torch.zeros_like(parameter) for parameter in gradients.parameters]
    inputs = PhaseInputs(z=torch.randn(4, 64), c=torch.eye(2).repeat(2, 1), mix_z=torch.randn(4, 64))
    part = MicroBatch(reals=torch.zeros(4, 3, 16, 16), labels=inputs.c, inputs=inputs, cutoff=1, rng=None,
                      host_rng=None)
    with LiveBytes() as tracker:
        for loss in PhaseWork(Phase.Gmain, state, config.step.loss).losses(part):
            gradients.add(loss)
    # The CPU's own convolutions may keep a tensor more or less than those of the meta device.
    assert estimate.activations == pytest.approx(tracker.peak, rel=0.05)


def test_activations_grow_with_the_micro_batch_alone():
    whole, half, parts = (estimate_memory(config_of(aug="noaug", **sizes)) for sizes in
                          ({"batch": 64}, {"batch": 32}, {"batch": 64, "batch_gpu": 32}))
    assert parts == half
    assert whole.weights == half.weights
    # Weights times their gain, and the like, are made once for any number of images.
    assert whole.activations == pytest.approx(2 * half.activations, rel=0.1)


def test_augmentation_adds_to_the_activations():
    plain, some, more = (augment_bytes(config_of(64, **flags)) for flags in
                         ({"aug": "noaug"}, {"augpipe": "color"}, {"augpipe": "bgcfnc"}))
    image = 16 * 3 * 64 * 64 * 4
    assert plain == 0
    assert image < some < more
    config = config_of(augpipe="color")
    assert estimate_memory(config).activations == \
        estimate_memory(config_of(aug="noaug")).activations + augment_bytes(config)


def test_augmentation_is_scaled_by_area_and_batch():
    assert augment_bytes(config_of(256)) == pytest.approx(16 * augment_bytes(config_of(64)), rel=1e-6)
    assert augment_bytes(config_of(64, batch=32)) == pytest.approx(2 * augment_bytes(config_of(64)), rel=1e-6)


def test_estimate_leaves_the_state_usable():
    config = config_of()
    state = meta_state(config)
    assert estimate_memory(config, state) == estimate_memory(config, state)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in state.G.parameters())
    assert state.augment_pipe is None
    assert isinstance(TrainingState.create(config, "cpu").augment_pipe, AugmentPipe)


def test_snapshot_size_is_that_of_the_file(tmp_path):
    config = config_of()
    state = TrainingState.create(config, "cpu")
    path = tmp_path / "network.safetensors"
    save_network(path, Networks(G=state.G, D=state.D, G_ema=state.G_ema))
    header = 40_000  # names and shapes
    assert 0 < path.stat().st_size - state_bytes(state)["network-snapshot"] < header
