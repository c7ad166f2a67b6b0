"""Presets and flags: the published tables, every flag's effect, every error."""

import copy
import json
import random
import re
from pathlib import Path

import pytest

from dnnlib.typed_config import ConfigError
from training.augmentations.draws import AUGMENTATIONS
from training.config import AdaConfig, DatasetFacts, TrainConfig
from training.dry_run import describe_settings
from training.options import TrainOptions, resolve
from training.presets import AUGPIPES, CFG_NAMES, choose_preset, split_batch

DATA = Path(__file__).parent.parent / "data"
PRESET_ROWS = json.loads((DATA / "preset_table.json").read_text())
AUTO_ROWS = json.loads((DATA / "auto_config_table.json").read_text())

REFUSED_ROWS = {
    (("p", 0.3),): "--p is 0.3 with --aug=ada; expected --aug=fixed: set it, or leave --p out",
    (("aug", "fixed"),): "--aug is fixed without --p; expected a probability: add --p=0.2, for example",
    (("batch", 7),): "--batch is 7; expected a multiple of gpus (2): try 8",
    (("gpus", 3),): (
        "--gpus is 3; expected a power of two, because --cfg=auto sets the batch: try 2, or --batch=48"
    ),
}


def facts_of(resolution: int = 256, **changes) -> DatasetFacts:
    given = {"name": f"ds{resolution}", "channels": 3, "num_images": 300, "c_dim": 2} | changes
    return DatasetFacts(resolution=resolution, **given)


def config_of(resolution: int = 256, **flags) -> TrainConfig:
    return resolve(TrainOptions(**flags), facts_of(resolution))


def table_inputs(flags: dict) -> tuple[TrainOptions, DatasetFacts]:
    """Return the inputs of a row; the table's data set has two labeled images, and rows use labels by default."""
    given = {"cond": True} | flags
    facts = facts_of(given.pop("resolution"), num_images=2)
    if "metrics" in given:
        given["metrics"] = tuple(given["metrics"])
    return TrainOptions(**given), facts


def message_of(build, *args, **kwargs) -> str:
    with pytest.raises(ConfigError) as caught:
        build(*args, **kwargs)
    return str(caught.value)


def row_name(row: dict) -> str:
    return "-".join(f"{key}={value}" for key, value in row["flags"].items())


GOOD_ROWS = [row for row in PRESET_ROWS if "error" not in row["resolved"]]
BAD_ROWS = [row for row in PRESET_ROWS if "error" in row["resolved"]]


@pytest.mark.parametrize("row", GOOD_ROWS, ids=row_name)
def test_resolve_preset_table_row_equals_it_to_the_letter(row):
    # As text, so that order and 10 against 10.0 count too.
    assert json.dumps(describe_settings(resolve(*table_inputs(row["flags"])))) == json.dumps(row["resolved"])


@pytest.mark.parametrize("row", BAD_ROWS, ids=row_name)
def test_resolve_refused_preset_table_row_raises_exact_message(row):
    special = {key: value for key, value in row["flags"].items() if key not in ("resolution", "cfg", "cond")}
    if special["gpus"] == 2:
        del special["gpus"]
    assert message_of(lambda: resolve(*table_inputs(row["flags"]))) == REFUSED_ROWS[tuple(special.items())]


def test_preset_table_has_the_rows_that_are_expected():
    assert (len(GOOD_ROWS), len(BAD_ROWS), len(AUTO_ROWS)) == (37, 4, 28)


@pytest.mark.parametrize("row", AUTO_ROWS, ids=lambda row: f"{row['res']}-{row['gpus']}gpus")
def test_resolve_auto_table_row_equals_it_to_the_letter(row):
    config = config_of(row["res"], gpus=row["gpus"])
    found = describe_settings(config)
    names = {"batch": "batch", "batch_gpu": "batch_gpu", "mbstd": "mbstd_group", "channel_base": "channel_base",
             "lr": "lr", "r1_gamma": "r1_gamma", "ema_kimg": "ema_kimg"}  # fmt: skip
    values = {"res": row["res"], "gpus": config.gpus} | {key: found[name] for key, name in names.items()}
    assert json.dumps(values) == json.dumps(row)
    assert config.step.micro_batch == row["batch_gpu"]
    assert config.g_adam == config.d_adam


@pytest.mark.parametrize("row", GOOD_ROWS, ids=row_name)
def test_resolve_table_row_round_trips_through_json(row):
    config = resolve(*table_inputs(row["flags"]))
    text = json.dumps(config.to_dict(), allow_nan=False)
    assert TrainConfig.from_dict(json.loads(text)) == config
    found = TrainConfig.from_dict(json.loads(text))
    assert json.dumps(describe_settings(found)) == json.dumps(describe_settings(config))


@pytest.mark.parametrize("row", GOOD_ROWS, ids=row_name)
def test_resolve_is_pure(row):
    options, facts = table_inputs(row["flags"])
    before = copy.deepcopy((options, facts))
    first = resolve(options, facts)
    describe_settings(first)["augment"].clear()
    assert (options, facts) == before
    assert resolve(options, facts) == first
    assert resolve(*before) == first


# --- what single flags do beyond the table ----------------------------------------------------------------------------


def leaves(data: dict, prefix: str = "") -> dict:
    """Return {dotted path: value} of nested dicts."""
    flat = {}
    for key, value in data.items():
        flat |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value}
    return flat


FLAG_EFFECTS = [
    ({"gpus": 1}, {}),
    ({"cfg": "auto"}, {}),
    ({"cond": False}, {}),
    ({"mirror": False}, {}),
    ({"subset": 300}, {}),
    ({"aug": "ada"}, {"run_name": "ds256-auto1-ada"}),
    ({"augpipe": "bgc"}, {"run_name": "ds256-auto1-bgc"}),
    ({"resume": "noresume"}, {"run_name": "ds256-auto1-noresume"}),
    ({"fp32": False}, {}),
    ({"precision": "fp16"}, {}),
    ({"nhwc": False}, {}),
    ({"nobench": False}, {}),
    ({"allow_tf32": True}, {}),
    ({"cond": True}, {
        "run_name": "ds256-cond-auto1", "dataset.use_labels": True, "dataset.c_dim": 2, "generator.c_dim": 2,
        "discriminator.c_dim": 2,
    }),
    ({"mirror": True}, {"run_name": "ds256-mirror-auto1", "dataset.xflip": True}),
    ({"subset": 299}, {"run_name": "ds256-subset299-auto1", "dataset.max_size": 299}),
    ({"gamma": 0}, {"run_name": "ds256-auto1-gamma0", "step.loss.gamma": 0}),
    ({"gamma": 0.25}, {"run_name": "ds256-auto1-gamma0.25", "step.loss.gamma": 0.25}),
    ({"kimg": 1000000}, {"run_name": "ds256-auto1-kimg1000000", "kimg": 1000000}),
    ({"batch": 8}, {"run_name": "ds256-auto1-batch8", "step.batch": 8, "step.micro_batch": 8, "batch_gpu": 8}),
    ({"batch_gpu": 4}, {"step.micro_batch": 4, "batch_gpu": 4}),
    ({"batch": 64, "batch_gpu": 8}, {
        "run_name": "ds256-auto1-batch64", "step.batch": 64, "step.micro_batch": 8, "batch_gpu": 8,
    }),
    ({"aug": "fixed", "p": 0.0}, {"run_name": "ds256-auto1-fixed-p0", "step.ada": None}),
    ({"aug": "fixed", "p": 0.25}, {
        "run_name": "ds256-auto1-fixed-p0.25", "augment.p": 0.25, "step.ada": None,
    }),
    ({"target": 0.0}, {"run_name": "ds256-auto1-target0", "step.ada.target": 0}),
    ({"resume": "old/network-snapshot-000200.pkl"}, {
        "run_name": "ds256-auto1-resumecustom", "resume": "old/network-snapshot-000200.pkl", "step.ema.rampup": None,
        "step.ada.kimg": 100,
    }),
    ({"resume": "old.pkl", "resume_classes": "new"}, {
        "run_name": "ds256-auto1-resumecustom", "resume": "old.pkl", "resume_classes": "new", "step.ema.rampup": None,
        "step.ada.kimg": 100}),
    ({"resume": "old.pkl", "resume_partial": True}, {
        "run_name": "ds256-auto1-resumecustom", "resume": "old.pkl", "resume_partial": True, "step.ema.rampup": None,
        "step.ada.kimg": 100}),
    ({"freezed": 0}, {"run_name": "ds256-auto1-freezed0", "discriminator.freeze_layers": 0}),
    ({"fp32": True}, {
        "generator.num_fp16_res": 0, "generator.conv_clamp": None, "discriminator.num_fp16_res": 0,
        "discriminator.conv_clamp": None,
    }),
    ({"precision": "fp32"}, {
        "generator.num_fp16_res": 0, "generator.conv_clamp": None, "discriminator.num_fp16_res": 0,
        "discriminator.conv_clamp": None,
    }),
    ({"precision": "bf16"}, {"generator.half_dtype": "bfloat16", "discriminator.half_dtype": "bfloat16"}),
    ({"nhwc": True}, {"generator.fp16_channels_last": True, "discriminator.fp16_channels_last": True}),
    ({"snap": 3}, {"image_snapshot_ticks": 3, "network_snapshot_ticks": 3}),
    ({"tick": 0.5}, {"kimg_per_tick": 0.5}),
    ({"state_minutes": 2.5}, {"state_minutes": 2.5}),
    ({"metrics": ("is50k", "kid50k")}, {"metrics": ["is50k", "kid50k"]}),
    ({"seed": 7}, {"seed": 7}),
    ({"workers": 0}, {"num_workers": 0}),
    ({"nobench": True}, {"cudnn_benchmark": False}),
    ({"allow_tf32": False}, {"allow_tf32": False}),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "effect"), FLAG_EFFECTS, ids=lambda value: str(value)[:60])
def test_resolve_single_flag_changes_exactly_this(flags, effect):
    plain, changed = leaves(config_of().to_dict()), leaves(config_of(**flags).to_dict())
    # A part that became None has a path of its own and takes its fields' paths away.
    gone = {path for path in plain if path not in changed}
    assert all(any(path.startswith(f"{key}.") and effect[key] is None for key in effect) for path in gone)
    assert {path: value for path, value in changed.items() if path not in plain or plain[path] != value} == effect


def test_resolve_every_flag_is_in_the_table_of_effects():
    from_table = {flag for row in GOOD_ROWS for flag in row["flags"]} - {"resolution"}
    tested = {flag for flags, _ in FLAG_EFFECTS for flag in flags}
    assert tested | from_table == set(TrainOptions().to_dict())


def test_resolve_without_flags_takes_the_documented_defaults():
    config = config_of()
    assert (config.cfg, config.gpus, config.seed, config.kimg, config.resume) == ("auto", 1, 0, 25000, None)
    assert (config.metrics, config.state_minutes, config.num_workers) == (("fid50k_full",), 10, 3)
    assert config.step.ada == AdaConfig(target=0.6, kimg=500, interval=4)
    assert config.step.loss.to_dict() == {
        "gamma": 0.8192, "pl_weight": 2, "pl_decay": 0.01, "pl_batch_shrink": 2, "style_mixing_prob": 0.9,
        "g_reg_interval": 4, "d_reg_interval": 16, "noise_mode": "random",
    }  # fmt: skip


def test_resolve_run_name_keeps_one_order_of_parts():
    flags = {
        "freezed": 2, "resume": "lsundog256", "augpipe": "bg", "p": 0.125, "aug": "fixed", "batch": 32, "kimg": 9,
        "gamma": 1.5, "cfg": "paper256", "mirror": True, "subset": 10, "cond": True,
    }  # fmt: skip
    name = "ds256-cond-subset10-mirror-paper256-gamma1.5-kimg9-batch32-fixed-p0.125-bg-resumelsundog256-freezed2"
    assert config_of(**flags).run_name == name


@pytest.mark.parametrize("name", ["ffhq256", "ffhq512", "ffhq1024", "celebahq256", "lsundog256"])
def test_resolve_published_network_appears_in_the_run_name(name):
    config = config_of(resume=name)
    assert (config.run_name, config.resume) == (f"ds256-auto1-resume{name}", name)


@pytest.mark.parametrize("flags", [{"aug": "noaug"}, {"aug": "fixed", "p": 0.5}])
def test_describe_resume_without_ada_still_says_the_shorter_ada_kimg(flags):
    assert describe_settings(config_of(**flags))["ada_kimg"] == 500
    assert describe_settings(config_of(**flags, resume="ffhq256"))["ada_kimg"] == 100


def test_resolve_noaug_has_no_strengths():
    config = config_of(aug="noaug")
    assert (dict(config.augment.strengths), config.augment.p) == ({}, 0)
    assert config.step.ada is None


@pytest.mark.parametrize(("channels", "c_dim"), [(1, 0), (1, 7), (3, 0), (3, 7)])
def test_resolve_gray_or_rgb_sizes_both_networks(channels, c_dim):
    facts = facts_of(64, channels=channels, c_dim=c_dim)
    config = resolve(TrainOptions(cond=c_dim > 0), facts)
    for network in (config.generator, config.discriminator):
        assert (network.img_resolution, network.img_channels, network.c_dim) == (64, channels, c_dim)
    assert (config.dataset.channels, config.dataset.c_dim, config.dataset.name) == (channels, c_dim, "ds64")


# --- presets ----------------------------------------------------------------------------------------------------------


def test_augpipes_are_the_groups_and_their_unions():
    assert {
        "blit": ("xflip", "rotate90", "xint"),
        "geom": ("scale", "rotate", "aniso", "xfrac"),
        "color": ("brightness", "contrast", "lumaflip", "hue", "saturation"),
        "filter": ("imgfilter",),
        "noise": ("noise",),
        "cutout": ("cutout",),
        "bg": AUGMENTATIONS[:7],
        "bgc": AUGMENTATIONS[:12],
        "bgcf": AUGMENTATIONS[:13],
        "bgcfn": AUGMENTATIONS[:14],
        "bgcfnc": AUGMENTATIONS,
    } == AUGPIPES
    assert AUGMENTATIONS == ("xflip", "rotate90", "xint", "scale", "rotate", "aniso", "xfrac", "brightness", "contrast",
                             "lumaflip", "hue", "saturation", "imgfilter", "noise", "cutout")


@pytest.mark.parametrize("pipe", AUGPIPES)
def test_resolve_augpipe_turns_on_its_augmentations_at_full_strength(pipe):
    config = config_of(augpipe=pipe)
    assert dict(config.augment.strengths) == dict.fromkeys(AUGPIPES[pipe], 1)
    assert config.run_name == f"ds256-auto1-{pipe}"


def test_resolve_tiny_is_auto_but_for_its_sizes():
    tiny, auto = leaves(config_of(64, cfg="tiny").to_dict()), leaves(config_of(64).to_dict())
    assert {path: value for path, value in tiny.items() if auto[path] != value} == {
        "run_name": "ds64-tiny", "cfg": "tiny", "batch_gpu": 16, "step.batch": 16, "step.micro_batch": 16,
        "generator.z_dim": 64, "generator.w_dim": 64, "generator.channel_base": 1024, "generator.channel_max": 64,
        "discriminator.channel_base": 1024, "discriminator.channel_max": 64,
        "step.loss.gamma": 0.0512, "step.ema.kimg": 5.0,
    }  # fmt: skip
    assert config_of(64, cfg="tiny", gpus=16).step.micro_batch == 1


@pytest.mark.parametrize(("gpus", "micro_batch"), [(1, 32), (2, 32), (4, 16), (8, 8)])
def test_resolve_cifar_on_many_gpus_never_passes_more_than_a_process_has(gpus, micro_batch):
    config = config_of(32, cfg="cifar", gpus=gpus)
    assert (config.batch_gpu, config.step.micro_batch) == (32, micro_batch)


def test_resolve_fewer_gpus_than_the_reference_accumulates_micro_batches():
    config = config_of(cfg="stylegan2", gpus=1)
    assert (config.batch, config.step.micro_batch) == (32, 4)


@pytest.mark.parametrize(("gpus", "batch", "micro_batch"), [(3, 48, 16), (5, 20, 4), (6, 12, 2), (7, 56, 8)])
def test_resolve_given_batch_allows_any_gpus_that_divide_it(gpus, batch, micro_batch):
    config = config_of(gpus=gpus, batch=batch)
    assert (config.gpus, config.batch, config.step.micro_batch) == (gpus, batch, micro_batch)
    assert config.run_name == f"ds256-auto{gpus}-batch{batch}"


@pytest.mark.parametrize("resolution", [8, 16, 1024, 2048])
def test_resolve_auto_works_from_the_smallest_to_the_largest_resolution(resolution):
    expected = {8: (32, 2e-4 * 64 / 32), 16: (32, 2e-4 * 256 / 32), 1024: (4, 52.4288), 2048: (2, 2e-4 * 2048**2 / 2)}
    config = config_of(resolution)
    assert (config.batch, config.step.loss.gamma) == expected[resolution]


def test_resolve_few_images_on_a_laptop_is_sensible():
    facts = facts_of(64, num_images=300, c_dim=0)
    options = TrainOptions(cfg="tiny", mirror=True, kimg=200, precision="fp32", snap=5, tick=1)
    config = resolve(options, facts)
    assert (config.gpus, config.batch, config.step.micro_batch) == (1, 16, 16)
    assert (config.dataset.max_size, config.dataset.xflip) == (300, True)
    # With so few images the discriminator overfits: augmentation has to adapt, and images must be seen half-way.
    assert config.step.ada == AdaConfig(target=0.6, kimg=500)
    assert config.network_snapshot_ticks * config.kimg_per_tick * 1000 < config.kimg * 1000
    assert (config.generator.num_fp16_res, config.discriminator.num_fp16_res) == (0, 0)


def test_resolve_many_images_on_eight_gpus_is_sensible():
    facts = facts_of(512, num_images=40_000, c_dim=8)
    config = resolve(TrainOptions(cond=True, gpus=8), facts)
    assert (config.batch, config.step.micro_batch, config.gpus) == (64, 8, 8)
    assert config.batch == config.gpus * config.step.micro_batch  # nothing to accumulate
    assert config.discriminator.mbstd_group_size == 4
    assert (config.dataset.max_size, config.generator.c_dim, config.generator.channel_base) == (40_000, 8, 32768)


# --- refusals ---------------------------------------------------------------------------------------------------------

REFUSED_FLAGS = [
    ({"cfg": "stylegan3"},
     "--cfg is 'stylegan3'; expected one of auto, stylegan2, paper256, paper512, paper1024, cifar, tiny"),
    ({"augpipe": "all"},
     "--augpipe is 'all'; expected one of blit, geom, color, filter, noise, cutout, bg, bgc, bgcf, bgcfn, bgcfnc"),
    ({"aug": "some"}, "--aug is 'some'; expected one of noaug, ada, fixed"),
    ({"precision": "fp64"}, "--precision is 'fp64'; expected one of fp32, fp16, bf16"),
    ({"gpus": 0}, "--gpus is 0; expected a number >= 1"),
    ({"gpus": "2"}, "--gpus is '2'; expected a whole number or null"),
    ({"subset": 0}, "--subset is 0; expected a number >= 1"),
    ({"subset": 301}, "--subset is 301; expected at most 300, the number of images in ds256"),
    ({"gamma": -1}, "--gamma is -1; expected a number >= 0"),
    ({"kimg": 0}, "--kimg is 0; expected a number >= 1"),
    ({"batch": 0}, "--batch is 0; expected a number >= 1"),
    ({"batch_gpu": 0}, "--batch-gpu is 0; expected a number >= 1"),
    ({"freezed": -1}, "--freezed is -1; expected a number >= 0"),
    ({"snap": 0}, "--snap is 0; expected a number >= 1"),
    ({"seed": -1}, "--seed is -1; expected a number >= 0"),
    ({"workers": -1}, "--workers is -1; expected a number >= 0"),
    ({"tick": 0}, "--tick is 0; expected a number > 0"),
    ({"state_minutes": 0}, "--state-minutes is 0; expected a number > 0"),
    ({"aug": "fixed", "p": 1.5}, "--p is 1.5; expected a number from 0 to 1"),
    ({"target": -0.1}, "--target is -0.1; expected a number from 0 to 1"),
    ({"target": 1.1}, "--target is 1.1; expected a number from 0 to 1"),
    ({"resume": ""}, "--resume is ''; expected a network file, or noresume"),
    ({"metrics": ("a", "b", "a")}, "--metrics lists a 2 times; expected each metric once"),
    ({"aug": "noaug", "p": 0.2}, "--p is 0.2 with --aug=noaug; expected --aug=fixed: set it, or leave --p out"),
    ({"aug": "ada", "p": 0.2}, "--p is 0.2 with --aug=ada; expected --aug=fixed: set it, or leave --p out"),
    ({"aug": "noaug", "target": 0.5},
     "--target is 0.5 with --aug=noaug; expected --aug=ada: set it, or leave --target out"),
    ({"aug": "fixed", "p": 0.2, "target": 0.5},
     "--target is 0.5 with --aug=fixed; expected --aug=ada: set it, or leave --target out"),
    ({"aug": "noaug", "augpipe": "bgc"},
     "--augpipe is bgc with --aug=noaug; expected --aug=ada or fixed: set it, or leave --augpipe out"),
    ({"fp32": True, "precision": "bf16"},
     "--precision is bf16 with --fp32=true; expected the two to agree: leave --fp32 out"),
    ({"fp32": False, "precision": "fp32"},
     "--precision is fp32 with --fp32=false; expected the two to agree: leave --fp32 out"),
    ({"fp32": True, "nhwc": True},
     "--nhwc is true in full precision; expected fp16 or bf16, as it affects half-precision layers only: use "
     "--precision=fp16, the default on a GPU, or leave --nhwc out"),
    ({"precision": "fp32", "nhwc": True},
     "--nhwc is true in full precision; expected fp16 or bf16, as it affects half-precision layers only: use "
     "--precision=fp16, the default on a GPU, or leave --nhwc out"),
    # sizes
    ({"gpus": 12}, "--gpus is 12; expected a power of two, because --cfg=auto sets the batch: try 8, or --batch=48"),
    ({"gpus": 3, "batch_gpu": 8},
     "--gpus is 3; expected a power of two, because --cfg=auto sets the batch: try 2, or --batch=48"),
    ({"gpus": 100},
     "--gpus is 100; expected a power of two, because --cfg=auto sets the batch: try 64, or --batch=100"),
    ({"gpus": 32, "cfg": "tiny"}, "--gpus is 32; expected at most the batch of --cfg=tiny: try 16, or --batch=32"),
    ({"gpus": 100, "cfg": "cifar"},
     "--gpus is 100; expected a power of two, because --cfg=cifar sets the batch: try 64, or --batch=100"),
    ({"gpus": 128, "cfg": "paper256", "batch_gpu": 2},
     "--gpus is 128; expected at most the batch of --cfg=paper256: try 64, or --batch=256"),
    ({"gpus": 2, "batch": 30, "batch_gpu": 8},
     "--batch is 30; expected a multiple of gpus * batch_gpu (2 * 8): try 32"),
    ({"gpus": 4, "batch": 30}, "--batch is 30; expected a multiple of gpus (4): try 32"),
    ({"gpus": 4, "batch": 24},
     ("--batch is 24, or 6 on each of 4 gpus; expected at most 4 images in a pass, or a multiple of 4: try 32")),
    ({"cfg": "cifar", "batch": 48},
     ("--batch is 48, or 48 on each of 1 gpus; expected at most 32 images in a pass, or a multiple of 32: try 64")),
    ({"batch_gpu": 6}, "--batch-gpu is 6; expected at most 4 images in a pass, or a multiple of 4: try 8"),
    ({"batch": 7, "batch_gpu": 7}, "--batch-gpu is 7; expected at most 4 images in a pass, or a multiple of 4: try 1"),
    ({"batch_gpu": 12},
     "--batch-gpu is 12; expected a divisor of the 16 images that --cfg=auto gives to each of 1 gpus: try 16"),
    ({"batch_gpu": 64},
     "--batch-gpu is 64; expected a divisor of the 16 images that --cfg=auto gives to each of 1 gpus: try 16"),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "message"), REFUSED_FLAGS, ids=lambda value: str(value)[:60])
def test_resolve_unusable_flags_raise_exact_message(flags, message):
    assert message_of(config_of, **flags) == message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolution": 4},
         "data set ds has resolution 4; expected a power of two from 8 to 2048: convert it with dataset_tool.py"),
        ({"resolution": 100},
         "data set ds has resolution 100; expected a power of two from 8 to 2048: convert it with dataset_tool.py"),
        ({"resolution": 4096},
         "data set ds has resolution 4096; expected a power of two from 8 to 2048: convert it with dataset_tool.py"),
        ({"channels": 4},
         "data set ds has 4 channels; expected 1 (gray) or 3 (RGB): convert it with dataset_tool.py"),
        ({"num_images": 0}, "data set ds has 0 images; expected at least 1"),
        ({"c_dim": -1}, "data set ds has labels of length -1; expected a length >= 0"),
        ({"name": ""}, "the data set's name is ''; expected a name without path separators"),
        ({"name": "../ds"}, "the data set's name is '../ds'; expected a name without path separators"),
        ({"num_images": 2.5}, "DatasetFacts.num_images is 2.5; expected a whole number"),
    ],
)  # fmt: skip
def test_dataset_facts_unusable_value_raises_exact_message(changes, message):
    good = {"name": "ds", "resolution": 64, "channels": 3, "num_images": 10, "c_dim": 0}
    assert message_of(DatasetFacts, **{**good, **changes}) == message


def test_resolve_cond_without_labels_raises_exact_message():
    assert message_of(resolve, TrainOptions(cond=True), facts_of(c_dim=0)) == (
        "--cond is true; expected a data set with labels, but ds256 has none: add labels to its dataset.json, or leave "
        "--cond out"
    )


def test_resolve_tiny_at_a_resolution_without_channels_raises_exact_message():
    assert message_of(config_of, 2048, cfg="tiny") == (
        "--cfg is tiny for images of resolution 2048; expected at most 1024: try --cfg=auto"
    )


# --- properties of sizes ----------------------------------------------------------------------------------------------


def random_sizes(rng: random.Random) -> tuple[int, dict]:
    flags = {"cfg": rng.choice(CFG_NAMES), "gpus": rng.choice((1, 2, 3, 4, 6, 8, 16, 40, 64, 128))}
    if rng.random() < 0.6:
        flags["batch"] = rng.randint(1, 200)
    if rng.random() < 0.5:
        flags["batch_gpu"] = rng.randint(1, 40)
    return rng.choice((8, 64, 256, 1024)), flags


def test_resolve_any_sizes_advice_leads_to_a_run():
    rng = random.Random(0)
    refused = 0
    for _ in range(600):
        resolution, flags = random_sizes(rng)
        for _attempt in range(3):
            try:
                config = config_of(resolution, **flags)
                break
            except ConfigError as error:
                refused += 1
                flag = re.match(r"--([a-z-]+) is ", str(error)).group(1).replace("-", "_")
                flags = flags | {flag: int(re.search(r"try (\d+)", str(error)).group(1))}
        else:
            pytest.fail(f"three times advised, still refused: {flags}")
        assert config.batch % (config.gpus * config.step.micro_batch) == 0
    assert refused > 200  # the draw reaches the refusals


def test_resolve_too_many_gpus_advice_of_a_batch_leads_to_a_run():
    for cfg in CFG_NAMES:
        for gpus in (3, 6, 100):
            message = message_of(config_of, 256, cfg=cfg, gpus=gpus)
            batch = int(re.search(r"or --batch=(\d+)$", message).group(1))
            assert config_of(256, cfg=cfg, gpus=gpus, batch=batch).batch == batch


def test_split_batch_keeps_groups_whole():
    preset = choose_preset("auto", 256, 1)
    assert preset.mbstd == 4
    usable = []
    for batch in range(1, 25):
        try:
            usable.append(split_batch("auto", preset, 1, batch, None).micro_batch)
        except ConfigError:
            continue
    assert usable == [1, 2, 3, 4, 8, 12, 16, 20, 24]
