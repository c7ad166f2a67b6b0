"""The training state: schedules, and that saved states are complete."""

import copy
import io
import re

import pytest
import torch

from tests.helpers.small_networks import ada_config, small_config, small_inputs, small_state
from torch_utils.seeding import generator_for, seed_for
from training.augment import AugmentPipe
from training.config import AdamConfig, DatasetFacts
from training.options import TrainOptions, resolve
from training.state import TrainingState, ema_beta, lazy_adam
from training.step import train_step


def augmented_state(config):
    pipe = AugmentPipe(xflip=1, rotate=1, brightness=1)
    pipe.p.fill_(0.4)
    return small_state(config, augment=pipe)


def run(state, config, iterations):
    return [train_step(state, small_inputs(state, config), config) for _ in range(iterations)]


def saved_and_opened(state):
    """Return the content of a file, loaded without running code."""
    file = io.BytesIO()
    torch.save(state.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def flattened(value, prefix=""):
    if isinstance(value, dict):
        return {key: leaf for name, item in value.items() for key, leaf in flattened(item, f"{prefix}{name}/").items()}
    return {prefix: value}


def test_resume_is_exact():
    config = small_config(micro_batch=4, ada=ada_config(interval=3))
    unbroken, broken = augmented_state(config), augmented_state(config)
    run(unbroken, config, 7)
    run(broken, config, 4)
    continued = augmented_state(config)
    run(continued, config, 1)  # what was there before must leave no trace
    continued.load_state_dict(saved_and_opened(broken))
    run(continued, config, 3)
    expected, found = flattened(unbroken.state_dict()), flattened(continued.state_dict())
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        same = torch.equal(found[name], value) if isinstance(value, torch.Tensor) else found[name] == value
        assert same, name


def test_resume_brings_moments_into_the_layout_of_their_weights():
    # The fused optimizer goes over weights, gradients and moments in the order of memory.
    config = small_config()

    def start(layout):
        state = small_state(config)
        weight = state.D.b16.conv0.weight
        weight.data = weight.data.contiguous(memory_format=layout)
        return state

    plain, unbroken, broken, continued = map(start, [torch.contiguous_format] + 3 * [torch.channels_last])
    run(plain, config, 3)
    run(unbroken, config, 3)
    run(broken, config, 2)
    saved = saved_and_opened(broken)
    moments = saved["d_adam"]["b16.conv0.weight"]
    assert not moments["exp_avg_sq"].is_contiguous()
    saved["d_adam"]["b16.conv0.weight"] = {name: value.contiguous() for name, value in moments.items()}
    continued.load_state_dict(saved)
    run(continued, config, 1)
    assert torch.equal(continued.D.b16.conv0.weight, unbroken.D.b16.conv0.weight)
    # 2.4e-7 at most with three instruction sets; moments of other weights move each by up to the learning rate, 2e-3.
    torch.testing.assert_close(continued.D.b16.conv0.weight, plain.D.b16.conv0.weight, rtol=0, atol=1e-4)


def test_state_dict_holds_moments_of_every_parameter_once_trained():
    config = small_config()
    state = small_state(config)
    assert state.state_dict()["g_adam"] == {}
    run(state, config, 1)
    saved = state.state_dict()
    assert saved["g_adam"].keys() == {name for name, _ in state.G.named_parameters()}
    assert saved["d_adam"].keys() == {name for name, _ in state.D.named_parameters()}
    assert saved["g_adam"]["mapping.fc0.weight"]["step"].item() == 2  # Gmain and Greg share one optimizer
    assert (saved["iteration"], saved["nimg"]) == (1, 8)


def test_load_state_dict_copies_and_does_not_alias():
    config = small_config()
    first, second = small_state(config), small_state(config)
    run(first, config, 1)
    saved = copy.deepcopy(first.state_dict())
    second.load_state_dict(saved)
    run(second, config, 1)
    for name, value in flattened(first.state_dict()).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(flattened(saved)[name], value), name


def without(key):
    return lambda saved: saved["G"].pop(key)


@pytest.mark.parametrize(("spoil", "message"), [
    (lambda saved: saved.update(version=7), "training state has version 7; expected 1"),
    (lambda saved: saved.pop("pl_mean"), "training state differs in pl_mean; expected the names of these networks: "
     "continue with the options of the run that saved it"),
    (without("mapping.w_avg"), "training state: G differs in mapping.w_avg; expected the names of these networks: "
     "continue with the options of the run that saved it"),
    (lambda saved: saved["D"].update({"b4.out.bias": torch.zeros(3)}),
     "training state: D.b4.out.bias is [3]; expected a tensor [16]"),
    (lambda saved: saved.update(iteration=None), "training state: iteration is None; expected a whole number >= 0"),
    (lambda saved: saved.update(nimg=-1), "training state: nimg is -1; expected a whole number >= 0"),
    (lambda saved: saved.update(G=4), "training state: G is int; expected names with values"),
    (lambda saved: saved["g_adam"]["mapping.fc0.weight"].pop("step"),
     "training state: g_adam.mapping.fc0.weight differs in step; expected the names of these networks: continue with "
     "the options of the run that saved it"),
    (lambda saved: saved["g_adam"].update(other=saved["g_adam"]["mapping.fc0.weight"]),
     "training state: g_adam has moments of other; expected parameters of the network"),
    (lambda saved: saved["d_adam"]["b4.out.bias"].update(exp_avg=torch.zeros(2)),
     "training state: d_adam.b4.out.bias.exp_avg is [2]; expected a tensor [16]"),
])
def test_load_state_dict_of_another_run_raises_and_changes_nothing(spoil, message):
    config = small_config()
    state, other = small_state(config), small_state(config)
    run(other, config, 1)
    saved = saved_and_opened(other)
    spoil(saved)
    before = copy.deepcopy(flattened(state.state_dict()))
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        state.load_state_dict(saved)
    for name, value in flattened(state.state_dict()).items():
        assert torch.equal(before[name], value) if isinstance(value, torch.Tensor) else before[name] == value, name


def tiny_config(**options):
    facts = DatasetFacts(name="set", resolution=16, channels=3, num_images=20, c_dim=2)
    return resolve(TrainOptions(cfg="tiny", cond=True, **options), facts)


def test_create_is_a_function_of_the_seed():
    torch.manual_seed(123)
    first = TrainingState.create(tiny_config(seed=1), "cpu")
    drawn = torch.rand([])
    again, other = TrainingState.create(tiny_config(seed=1), "cpu"), TrainingState.create(tiny_config(seed=2), "cpu")
    torch.manual_seed(123)
    assert torch.rand([]) == drawn  # the default generator is left alone
    weight = first.G.synthesis.b8.conv0.weight
    assert torch.equal(again.G.synthesis.b8.conv0.weight, weight)
    assert not torch.equal(other.G.synthesis.b8.conv0.weight, weight)
    assert torch.equal(first.G_ema.synthesis.b8.conv0.weight, weight)
    assert first.augment_pipe.p.item() == 0


def test_create_follows_the_configuration():
    state = TrainingState.create(tiny_config(aug="fixed", p=0.25, freezed=2, resume="net.pkl"), "cpu")
    assert state.augment_pipe.p.item() == 0.25
    assert "b16.conv0.weight" in dict(state.D.named_buffers())
    assert state.G.init_kwargs["c_dim"] == 2
    assert TrainingState.create(tiny_config(aug="noaug"), "cpu").augment_pipe is None
    group = state.g_adam.param_groups[0]
    assert group["lr"] == pytest.approx(0.0025 * 4 / 5)
    assert group["betas"] == (0.0, pytest.approx(0.99**0.8))
    assert state.d_adam.param_groups[0]["lr"] == pytest.approx(0.0025 * 16 / 17)


def test_created_state_trains_an_iteration():
    config = tiny_config(batch=4)
    state = TrainingState.create(config, "cpu")
    result = train_step(state, small_inputs(state, config.step), config.step)
    assert not result.skipped
    assert state.nimg == 4


def test_lazy_adam_scales_rate_and_time_constants():
    found = lazy_adam(AdamConfig(lr=0.01, beta1=0.5, beta2=0.9), 1)
    assert found == {"lr": 0.005, "betas": (0.5**0.5, 0.9**0.5), "eps": 1e-8}


def test_ema_beta_halves_over_its_half_life():
    assert ema_beta(100, 0, 0.1, None) == pytest.approx(0.5)
    assert ema_beta(50, 0, 0.1, None) == pytest.approx(0.5**0.5)
    assert ema_beta(50, 1000, 10, 0.05) == pytest.approx(0.5)  # half-life 50 images so far
    assert ema_beta(50, 0, 10, 0.05) == 0


def test_seed_for_depends_on_every_part():
    base = (3, 400, 5, "latents")
    seeds = {seed_for(*base), seed_for(4, 400, 5, "latents"), seed_for(3, 401, 5, "latents"),
             seed_for(3, 400, 6, "latents"), seed_for(3, 400, 5, "noise")}
    assert len(seeds) == 5
    assert seed_for(*base) == seed_for(*base)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_seed_for_is_the_same_in_every_version():
    # Stored runs continue with it.
    assert seed_for(0, 0, 0, "latents") == 3762454771200859575


def test_generator_for_starts_from_the_seed():
    assert torch.equal(torch.rand(3, generator=generator_for(7)), torch.rand(3, generator=generator_for(7)))
