"""Settings: rejected values, constructor arguments, and their JSON form."""

import copy
import dataclasses
import json
import pickle

import pytest

from dnnlib.typed_config import ConfigError, FrozenMapping
from training.config import (
    AdaConfig,
    AdamConfig,
    AugmentConfig,
    DatasetConfig,
    DatasetFacts,
    DiscriminatorConfig,
    EmaConfig,
    GeneratorConfig,
    LossConfig,
    StepConfig,
    TrainConfig,
)
from training.discriminator import Discriminator
from training.generator import Generator
from training.options import TrainOptions, resolve

IMAGES = {"img_resolution": 8, "img_channels": 3, "c_dim": 2}
LOSS, EMA = LossConfig(gamma=1), EmaConfig(kimg=10, rampup=None)
DATASET = {
    "name": "ds", "resolution": 8, "channels": 3, "c_dim": 2, "use_labels": True, "max_size": 5, "xflip": False,
}  # fmt: skip


@pytest.fixture
def run() -> TrainConfig:
    facts = DatasetFacts(name="isic64", resolution=64, channels=3, num_images=300, c_dim=2)
    return resolve(TrainOptions(cond=True, gpus=2, metrics=("fid50k_full", "kid50k_full"), resume="ffhq256"), facts)


def message_of(build, *args, **kwargs) -> str:
    with pytest.raises(ConfigError) as caught:
        build(*args, **kwargs)
    return str(caught.value)


REFUSED = [
    (LossConfig, {"gamma": -1}, "LossConfig.gamma is -1; expected a number >= 0"),
    (LossConfig, {"gamma": "1"}, "LossConfig.gamma is '1'; expected a finite number"),
    (LossConfig, {"gamma": True}, "LossConfig.gamma is True; expected a finite number"),
    (LossConfig, {"gamma": float("nan")}, "LossConfig.gamma is nan; expected a finite number"),
    (LossConfig, {"gamma": float("inf")}, "LossConfig.gamma is inf; expected a finite number"),
    (LossConfig, {"gamma": 1, "pl_weight": -2}, "LossConfig.pl_weight is -2; expected a number >= 0"),
    (LossConfig, {"gamma": 1, "pl_decay": 0}, "LossConfig.pl_decay is 0; expected a number > 0 and <= 1"),
    (LossConfig, {"gamma": 1, "pl_batch_shrink": 0}, "LossConfig.pl_batch_shrink is 0; expected a number >= 1"),
    (LossConfig, {"gamma": 1, "pl_batch_shrink": 2.0}, "LossConfig.pl_batch_shrink is 2.0; expected a whole number"),
    (LossConfig, {"gamma": 1, "style_mixing_prob": 1.1},
     "LossConfig.style_mixing_prob is 1.1; expected a number from 0 to 1"),
    (LossConfig, {"gamma": 1, "g_reg_interval": 0}, "LossConfig.g_reg_interval is 0; expected a number >= 1"),
    (LossConfig, {"gamma": 1, "d_reg_interval": 0}, "LossConfig.d_reg_interval is 0; expected a number >= 1"),
    (LossConfig, {"gamma": 1, "noise_mode": "off"},
     "LossConfig.noise_mode is 'off'; expected one of random, const, none"),
    (EmaConfig, {"kimg": -1, "rampup": None}, "EmaConfig.kimg is -1; expected a number >= 0"),
    (EmaConfig, {"kimg": 1, "rampup": 0}, "EmaConfig.rampup is 0; expected a number > 0, or none"),
    (EmaConfig, {"kimg": 1, "rampup": "x"}, "EmaConfig.rampup is 'x'; expected a finite number or null"),
    (AdaConfig, {"target": 1.5}, "AdaConfig.target is 1.5; expected a number from -1 to 1, as a mean of signs is"),
    (AdaConfig, {"target": 0.6, "kimg": 0}, "AdaConfig.kimg is 0; expected a number > 0"),
    (AdaConfig, {"target": 0.6, "interval": 0}, "AdaConfig.interval is 0; expected a number >= 1"),
    (AdamConfig, {"lr": 0}, "AdamConfig.lr is 0; expected a number > 0"),
    (AdamConfig, {"lr": 1, "beta1": 1}, "AdamConfig.beta1 is 1; expected a number >= 0 and < 1"),
    (AdamConfig, {"lr": 1, "beta2": -0.1}, "AdamConfig.beta2 is -0.1; expected a number >= 0 and < 1"),
    (AdamConfig, {"lr": 1, "eps": 0}, "AdamConfig.eps is 0; expected a number > 0"),
    (AugmentConfig, {"strengths": {"flip": 1}, "p": 0},
     ("AugmentConfig.strengths has 'flip'; expected names among xflip, rotate90, xint, scale, rotate, aniso, xfrac, "
     "brightness, contrast, lumaflip, hue, saturation, imgfilter, noise, cutout")),
    (AugmentConfig, {"strengths": {"xflip": -1}, "p": 0},
     "AugmentConfig.strengths['xflip'] is -1; expected a number >= 0"),
    (AugmentConfig, {"strengths": {"xflip": "1"}, "p": 0},
     "AugmentConfig.strengths is {'xflip': '1'}; expected a mapping from names to finite numbers"),
    (AugmentConfig, {"strengths": {"xflip": 1}, "p": 1.5},
     "AugmentConfig.p is 1.5; expected a number from 0 to 1"),
    (AugmentConfig, {"strengths": {}, "p": 0.5},
     "AugmentConfig.p is 0.5; expected 0 without augmentations"),
    (StepConfig, {"batch": 0, "micro_batch": 1, "loss": LOSS, "ema": EMA},
     "StepConfig.batch is 0; expected a number >= 1"),
    (StepConfig, {"batch": 9, "micro_batch": 4, "loss": LOSS, "ema": EMA},
     "StepConfig.batch is 9; expected a multiple of micro_batch (4)"),
    (StepConfig, {"batch": 4, "micro_batch": 0, "loss": LOSS, "ema": EMA},
     "StepConfig.micro_batch is 0; expected a number >= 1"),
    (StepConfig, {"batch": 4, "micro_batch": 4, "loss": None, "ema": EMA},
     "StepConfig.loss is None; expected the fields of LossConfig"),
    (DatasetConfig, {**DATASET, "max_size": 0}, "DatasetConfig.max_size is 0; expected a number >= 1"),
    (DatasetConfig, {**DATASET, "c_dim": 0}, "DatasetConfig.c_dim is 0; expected a number >= 1 where labels are used"),
    (DatasetConfig, {**DATASET, "use_labels": False}, "DatasetConfig.c_dim is 2; expected 0 where labels are not used"),
    (DatasetConfig, {**DATASET, "xflip": 1}, "DatasetConfig.xflip is 1; expected true or false"),
    (GeneratorConfig, {**IMAGES, "mapping_layers": 0}, "GeneratorConfig.mapping_layers is 0; expected a number >= 1"),
    (GeneratorConfig, {**IMAGES, "z_dim": 0}, "GeneratorConfig.z_dim is 0; expected a number >= 1"),
    (DiscriminatorConfig, {**IMAGES, "mbstd_group_size": 0},
     "DiscriminatorConfig.mbstd_group_size is 0; expected a number >= 1"),
    (DiscriminatorConfig, {**IMAGES, "freeze_layers": -1},
     "DiscriminatorConfig.freeze_layers is -1; expected a number >= 0, or none"),
]  # fmt: skip


@pytest.mark.parametrize(("cls", "values", "message"), REFUSED)
def test_config_unusable_value_raises_exact_message(cls, values, message):
    assert message_of(cls, **values) == message


@pytest.mark.parametrize("cls", [GeneratorConfig, DiscriminatorConfig])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"img_resolution": 4}, "img_resolution is 4; expected a power of two from 8 to 2048"),
        ({"img_resolution": 24}, "img_resolution is 24; expected a power of two from 8 to 2048"),
        ({"img_channels": 0}, "img_channels is 0; expected at least 1"),
        ({"c_dim": -1}, "c_dim is -1; expected a number >= 0"),
        ({"num_fp16_res": -1}, "num_fp16_res is -1; expected a number >= 0"),
        ({"channel_base": 4}, "channel_base is 4; expected at least img_resolution, 8, so that each layer has a "
                              "channel"),
        ({"channel_max": 0}, "channel_max is 0; expected a number >= 1"),
        ({"conv_clamp": 0}, "conv_clamp is 0; expected a number > 0, or none"),
        ({"architecture": "flat"}, "architecture is 'flat'; expected one of orig, skip, resnet"),
        ({"half_dtype": "float8"}, "half_dtype is 'float8'; expected one of float16, bfloat16"),
    ],
)
def test_network_config_unusable_value_raises_exact_message(cls, changes, message):
    assert message_of(cls, **{**IMAGES, **changes}) == f"{cls.__name__}.{message}"


def test_loss_config_defaults_are_those_of_the_paper():
    assert LossConfig(gamma=10).to_dict() == {
        "gamma": 10, "pl_weight": 2.0, "pl_decay": 0.01, "pl_batch_shrink": 2, "style_mixing_prob": 0.9,
        "g_reg_interval": 4, "d_reg_interval": 16, "noise_mode": "random",
    }  # fmt: skip


def test_loss_config_under_the_old_name_of_gamma_is_the_same():
    old = LossConfig(r1_gamma=10)
    assert old == LossConfig(gamma=10)
    assert (old.gamma, old.r1_gamma) == (10, 10)
    assert repr(old) == repr(LossConfig(gamma=10))
    assert message_of(LossConfig, r1_gamma=-1) == "LossConfig.gamma is -1; expected a number >= 0"
    assert message_of(LossConfig, r1_gamma=1, gamma=1) == (
        "LossConfig has both r1_gamma and gamma; expected only gamma, its current name")
    assert dataclasses.replace(old, gamma=3) == LossConfig(gamma=3)
    assert pickle.loads(pickle.dumps(old)) == old


def test_adam_and_ada_config_defaults_are_those_of_the_paper():
    assert AdamConfig(lr=0.002).to_dict() == {"lr": 0.002, "beta1": 0.0, "beta2": 0.99, "eps": 1e-8}
    assert AdaConfig(target=0.6).to_dict() == {"target": 0.6, "kimg": 500, "interval": 4}


def test_config_assignment_is_refused():
    with pytest.raises(dataclasses.FrozenInstanceError):
        LOSS.gamma = 2
    with pytest.raises(TypeError):
        LossConfig(1)  # keyword-only


def test_augment_config_later_change_of_the_given_mapping_has_no_effect():
    given = {"xflip": 1}
    config = AugmentConfig(strengths=given, p=0.5)
    given["hue"] = 1
    assert dict(config.strengths) == {"xflip": 1}
    with pytest.raises(TypeError):
        config.strengths["hue"] = 1


def test_frozen_mapping_equals_hashes_and_copies_like_its_items():
    mapping = FrozenMapping({"xflip": 1, "hue": 0.5})
    assert mapping == {"hue": 0.5, "xflip": 1}
    assert hash(mapping) == hash(FrozenMapping({"hue": 0.5, "xflip": 1}))
    assert list(mapping) == ["xflip", "hue"]
    assert repr(mapping) == "{'xflip': 1, 'hue': 0.5}"


def test_generator_config_init_kwargs_are_the_constructor_arguments():
    config = GeneratorConfig(
        **IMAGES, z_dim=16, w_dim=24, mapping_layers=2, channel_base=64, channel_max=8, num_fp16_res=4, conv_clamp=256,
        half_dtype="bfloat16",
    )  # fmt: skip
    assert config.init_kwargs() == {
        "z_dim": 16, "c_dim": 2, "w_dim": 24, "img_resolution": 8, "img_channels": 3,
        "mapping_kwargs": {"num_layers": 2},
        "synthesis_kwargs": {
            "architecture": "skip", "channel_base": 64, "channel_max": 8, "num_fp16_res": 4, "conv_clamp": 256,
            "half_dtype": "bfloat16",
        },
    }  # fmt: skip


def test_discriminator_config_init_kwargs_are_the_constructor_arguments():
    config = DiscriminatorConfig(**IMAGES, architecture="orig", channel_base=64, channel_max=8, mbstd_group_size=8)
    assert config.init_kwargs() == {
        "c_dim": 2, "img_resolution": 8, "img_channels": 3, "architecture": "orig", "channel_base": 64,
        "channel_max": 8, "num_fp16_res": 0, "conv_clamp": None, "half_dtype": "float16", "block_kwargs": {},
        "mapping_kwargs": {}, "epilogue_kwargs": {"mbstd_group_size": 8},
    }  # fmt: skip


def test_network_config_optional_arguments_appear_only_when_set():
    generator = GeneratorConfig(**IMAGES, fp16_channels_last=True).init_kwargs()
    discriminator = DiscriminatorConfig(**IMAGES, fp16_channels_last=True, freeze_layers=3).init_kwargs()
    assert generator["synthesis_kwargs"]["fp16_channels_last"] is True
    assert discriminator["block_kwargs"] == {"freeze_layers": 3, "fp16_channels_last": True}


@pytest.mark.parametrize("architecture", ["orig", "skip", "resnet"])
def test_network_config_init_kwargs_build_networks_of_these_sizes(architecture):
    sizes = {**IMAGES, "channel_base": 64, "channel_max": 8, "num_fp16_res": 1, "conv_clamp": 256.0}
    extra = {"architecture": architecture, "half_dtype": "bfloat16", "fp16_channels_last": True}
    generator = Generator(**GeneratorConfig(**sizes, **extra, z_dim=16, w_dim=24, mapping_layers=2).init_kwargs())
    config = DiscriminatorConfig(**sizes, **extra, mbstd_group_size=2, freeze_layers=1)
    discriminator = Discriminator(**config.init_kwargs())
    assert (generator.z_dim, generator.w_dim, generator.c_dim) == (16, 24, 2)
    assert (generator.img_resolution, generator.img_channels) == (8, 3)
    assert generator.synthesis.b8.conv1.weight.shape == (8, 8, 3, 3)
    assert "mapping.fc1.weight" in generator.state_dict()
    assert "mapping.fc2.weight" not in generator.state_dict()
    learned = {name for name, _ in discriminator.named_parameters()}
    assert "b8.fromrgb.weight" in discriminator.state_dict()
    assert "b8.fromrgb.weight" not in learned
    assert "b8.conv0.weight" in learned


def test_train_config_json_round_trip_is_exact(run):
    text = json.dumps(run.to_dict(), allow_nan=False)
    again = TrainConfig.from_dict(json.loads(text))
    assert again == run
    assert json.dumps(again.to_dict()) == text
    assert again.metrics == ("fid50k_full", "kid50k_full")
    assert isinstance(again.augment.strengths, FrozenMapping)


def test_train_config_pickle_and_copy_are_equal_and_hash_alike(run):
    assert pickle.loads(pickle.dumps(run)) == run
    assert copy.deepcopy(run) == run
    assert hash(copy.deepcopy(run)) == hash(run)


def test_train_config_batch_is_that_of_its_step(run):
    assert run.batch == run.step.batch == 64


def edited(config: TrainConfig, path: str, value) -> dict:
    """Return the JSON form with one value changed; a path ending in "!" removes it."""
    data = json.loads(json.dumps(config.to_dict()))
    *parents, last = path.split(".")
    place = data
    for parent in parents:
        place = place[parent]
    if last.endswith("!"):
        del place[last[:-1]]
    else:
        place[last] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("step.loss.r1_weight", 1,
         ("step.loss.r1_weight is not a setting of LossConfig; expected one of gamma, pl_weight, pl_decay, "
         "pl_batch_shrink, style_mixing_prob, g_reg_interval, d_reg_interval, noise_mode")),
        ("g_adam.lr!", None, "g_adam.lr is missing; expected a finite number"),
        ("seed!", None, "seed is missing; expected a whole number"),
        ("step.ema.rampup!", None, "step.ema.rampup is missing; expected a finite number or null"),
        ("seed", "0", "seed is '0'; expected a whole number"),
        ("seed", 0.0, "seed is 0.0; expected a whole number"),
        ("seed", True, "seed is True; expected a whole number"),
        ("seed", None, "seed is None; expected a whole number"),
        ("kimg_per_tick", 10**400, f"kimg_per_tick is {10**400}; expected a finite number"),
        ("dataset.xflip", 0, "dataset.xflip is 0; expected true or false"),
        ("generator.conv_clamp", False, "generator.conv_clamp is False; expected a finite number or null"),
        ("metrics", "fid50k_full", "metrics is 'fid50k_full'; expected a list of strings"),
        ("metrics", [1], "metrics is (1,); expected a list of strings"),
        ("augment.strengths", ["xflip"],
         "augment.strengths is ['xflip']; expected a mapping from names to finite numbers"),
        ("augment.strengths.xflip", None,
         ("augment.strengths is {'xflip': None, 'rotate90': 1, 'xint': 1, 'scale': 1, 'rotate': 1, 'aniso': 1, "
          "'xfrac': 1, 'brightness': 1, 'contrast': 1, 'lumaflip': 1, 'hue': 1, 'saturation': 1}; "
          "expected a mapping from names to finite numbers")),
        ("step", 5, "step is 5; expected an object with the fields of StepConfig"),
        ("step.loss.gamma", -1, "LossConfig.gamma is -1; expected a number >= 0"),
        ("step.loss.r1_gamma", 1,
         "step.loss has both r1_gamma and gamma; expected only gamma, its current name"),
    ],
)  # fmt: skip
def test_train_config_from_edited_dict_raises_exact_message(run, path, value, message):
    assert message_of(TrainConfig.from_dict, edited(run, path, value)) == message


def test_train_config_from_a_list_raises_exact_message():
    message = message_of(TrainConfig.from_dict, [])
    assert message == "TrainConfig is []; expected an object with the fields of TrainConfig"


def test_train_config_from_dict_missing_default_takes_it(run):
    assert TrainConfig.from_dict(edited(run, "num_workers!", None)) == run


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("run_name", "", "TrainConfig.run_name is ''; expected a name"),
        ("gpus", 0, "TrainConfig.gpus is 0; expected a number >= 1"),
        ("seed", -1, "TrainConfig.seed is -1; expected a number >= 0"),
        ("kimg_per_tick", 0, "TrainConfig.kimg_per_tick is 0; expected a number > 0"),
        ("state_minutes", 0, "TrainConfig.state_minutes is 0; expected a number > 0"),
        ("metrics", ["a", "a"], "TrainConfig.metrics is ('a', 'a'); expected each metric once"),
        ("gpus", 3, "TrainConfig.gpus is 3; expected gpus * micro_batch to divide the batch of 64"),
        ("discriminator.mbstd_group_size", 3,
         "StepConfig.micro_batch is 32; expected at most mbstd_group_size (3) or a multiple of it"),
        ("generator.img_channels", 1,
         ("TrainConfig.generator has resolution, channels, c_dim (64, 1, 2); expected those of the data set, (64, 3, "
          "2)")),
        ("augment.strengths", {},
         "StepConfig.ada is AdaConfig(target=0.6, kimg=100, interval=4); expected none without augmentations"),
        ("discriminator.c_dim", 3,
         ("TrainConfig.discriminator has resolution, channels, c_dim (64, 3, 3); expected those of the data set, (64, "
         "3, 2)")),
    ],
)  # fmt: skip
def test_train_config_contradicting_parts_raise_exact_message(run, path, value, message):
    assert message_of(TrainConfig.from_dict, edited(run, path, value)) == message


def test_train_config_of_earlier_programs_has_the_old_name_of_gamma(run):
    data = edited(run, "step.loss.r1_gamma", run.step.loss.gamma)
    del data["step"]["loss"]["gamma"]
    assert TrainConfig.from_dict(data) == run
    assert TrainConfig.from_dict(data).to_dict() == run.to_dict()


def test_train_config_of_earlier_programs_holds_ada_in_step_and_augment_alike(run):
    assert TrainConfig.from_dict(edited(run, "augment.ada", run.step.ada.to_dict())) == run
    message = message_of(TrainConfig.from_dict, edited(run, "augment.ada", {"target": 0.5, "kimg": 500, "interval": 4}))
    assert message == ("augment.ada is {'target': 0.5, 'kimg': 500, 'interval': 4}; expected the same as step.ada")
