"""--resume: which weights are taken, and which networks are refused."""

import pytest
import torch

from dnnlib.cli import UserError
from tests.small_networks import small_config, small_discriminator, small_generator, small_state
from training.snapshot import Networks, save_network
from training.transfer import transfer_weights


@pytest.fixture
def saved(tmp_path):
    networks = Networks(G=small_generator(seed=5), D=small_discriminator(seed=6), G_ema=small_generator(seed=7))
    save_network(tmp_path / "net.safetensors", networks)
    return tmp_path / "net.safetensors", networks


def same(first, second):
    return all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())


def test_transfer_takes_all_networks(saved):
    path, networks = saved
    state = small_state(small_config())
    found = transfer_weights(state, path)
    for role in ("G", "D", "G_ema"):
        assert same(getattr(networks, role), getattr(state, role)), role
    assert found.lines() == [f"{role}: {len(getattr(networks, role).state_dict())} tensors taken"
                             for role in ("G", "D", "G_ema")]
    assert (state.nimg, state.iteration, state.pl_mean.item()) == (0, 0, 0)


def test_transfer_of_a_generator_alone_starts_the_discriminator_at_random(tmp_path):
    G_ema = small_generator(seed=7)
    save_network(tmp_path / "net.safetensors", Networks(G=None, D=None, G_ema=G_ema))
    state = small_state(small_config())
    before = {name: value.clone() for name, value in state.D.state_dict().items()}
    transfer_weights(state, tmp_path / "net.safetensors")
    assert same(G_ema, state.G)
    assert same(G_ema, state.G_ema)
    assert all(torch.equal(before[name], value) for name, value in state.D.state_dict().items())


def test_transfer_into_frozen_layers_takes_their_weights(saved):
    path, networks = saved
    state = small_state(small_config())
    state.D = small_discriminator(seed=1, block_kwargs={"freeze_layers": 2})
    transfer_weights(state, path)
    assert torch.equal(state.D.b16.conv0.weight, networks.D.b16.conv0.weight)


def test_transfer_to_a_larger_generator_says_what_starts_at_random(saved):
    path, _ = saved
    state = small_state(small_config())
    state.G.mapping.fc2 = torch.nn.Linear(12, 12)
    assert transfer_weights(state, path).lines()[0].endswith(
        "2 not in the file, start at random (mapping.fc2.weight, mapping.fc2.bias)")


def test_transfer_of_another_shape_names_the_layer_and_changes_nothing(saved):
    path, _ = saved
    state = small_state(small_config(), c_dim=0)
    before = {name: value.clone() for name, value in state.G.state_dict().items()}
    with pytest.raises(UserError) as caught:
        transfer_weights(state, path)
    assert str(caught.value) == (
        f"--resume={path}: G.mapping.fc0.weight is [12, 20] in the file and [12, 8] in this run; expected networks of "
        "one resolution, size (--cfg), number of channels and labels (--cond)")
    assert all(torch.equal(before[name], value) for name, value in state.G.state_dict().items())


def test_transfer_of_a_cut_file_is_refused(saved, tmp_path):
    path, _ = saved
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError) as caught:
        transfer_weights(small_state(small_config()), cut)
    assert str(caught.value).startswith(f"--resume={cut}: ")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"^--resume=absent\.pkl: "):
        transfer_weights(small_state(small_config()), "absent.pkl")
