"""The command line of train.py: what each flag does, what --dry-run prints, and the message for each mistake."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train
from dnnlib.cli import run
from imagesets.writer import ImageSetWriter
from metrics.names import choose_metrics
from tests.helpers.make_archives import make_folder, make_zip
from tests.helpers.make_sets import enclose, make_set, pixels_of, png
from tests.helpers.small_networks import small_generator
from tests.helpers.training_runs import replaced
from torch_utils.checkpoint import CheckpointPair
from torch_utils.device import Tuning
from torch_utils.ops import compiled
from training.command import make_command
from training.config import DatasetFacts
from training.dataset import hash_content
from training.dry_run import describe_settings
from training.options import TrainOptions, resolve
from training.run_folder import choose_run
from training.sampling import image_weights
from training.snapshot import Networks, save_network
from training.state import TrainingState

ROOT = Path(__file__).parent.parent.parent
BASE = ("--outdir=runs", "--data=set.zip", "--metrics=none")


@pytest.fixture
def inside(tmp_path, monkeypatch):
    """Working folder with a data set of six labeled images of 16x16; bf16 counts as slow, and there is no GPU.

    The allocator of the test process is not changed.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("training.command.tune_malloc",
                        lambda wanted: Tuning(is_done=wanted, reason=f"--tune-malloc={wanted}"))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": False})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "cache"))
    make_set(tmp_path / "set.zip", size=16, labels=[0, 0, 0, 1, 1, 2], classes=["nv", "mel", "bcc"])
    return tmp_path


class Trainer:
    """Replaces the training: records its arguments."""

    def __call__(self, config, settings, dataset):
        self.config, self.settings, self.dataset = config, settings, dataset
        return 7


def start(capsys, *arguments):
    """Return the arguments of the training, and standard error."""
    trainer = Trainer()
    code = run(make_command(trainer, choose_metrics), replaced(BASE, arguments))
    captured = capsys.readouterr()
    assert (code, captured.out) == (7, ""), captured.err
    return trainer, captured.err


def dry_run(capsys, *arguments):
    """Return the JSON that is printed, and standard error."""
    code = run(make_command(None, choose_metrics), [*replaced(BASE, arguments), "--dry-run"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return json.loads(captured.out), captured.err


def refuse(capsys, *arguments):
    """Return the error message of a command, without "error: "; it must not leave files."""
    before = sorted(os.listdir())
    code = run(make_command(None, choose_metrics), list(arguments))
    captured = capsys.readouterr()
    assert (code, captured.out) == (2, "")
    assert sorted(os.listdir()) == before
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err.removeprefix("error: ").rstrip("\n")


def save_tiny_network(path, resolution=16, classes=None, **options):
    facts = DatasetFacts(name="set", resolution=resolution, channels=3, num_images=6, c_dim=3)
    state = TrainingState.create(resolve(TrainOptions(**{"cfg": "tiny", "precision": "fp32", **options}), facts), "cpu")
    info = {} if classes is None else {"info": {"classes": classes}}
    save_network(path, Networks(G=state.G, D=state.D, G_ema=state.G_ema, config=info))
    return path


# What each flag does

CONFIG_FLAGS = [
    ("--cfg=tiny", "generator.channel_base", 1024),
    ("--cond=1", "dataset.use_labels", True),
    ("--cond=1", "generator.c_dim", 3),
    ("--cond=false", "generator.c_dim", 0),
    ("--subset=4", "dataset.max_size", 4),
    ("--mirror=true", "dataset.xflip", True),
    ("--mirror=0", "dataset.xflip", False),
    ("--gamma=5", "step.loss.gamma", 5.0),
    ("--kimg=10", "kimg", 10),
    ("--batch=16", "step.batch", 16),
    ("--batch-gpu=8", "step.micro_batch", 8),
    ("--aug=noaug", "augment.strengths", {}),
    ("--aug=fixed --p=0.3", "augment.p", 0.3),
    ("--aug=fixed --p=0.3", "step.ada", None),
    ("--target=0.7", "step.ada.target", 0.7),
    ("--augpipe=blit", "augment.strengths", {"xflip": 1, "rotate90": 1, "xint": 1}),
    ("--resume=noresume", "resume", None),
    ("--resume-classes=same", "resume_classes", "same"),
    ("--cfg=tiny --resume=network.safetensors --resume-partial=1", "resume_partial", True),
    ("--cfg=tiny --resume=network.safetensors --resume-partial=0", "resume_partial", False),
    ("--cfg=tiny --resume=network.safetensors --freezed=2", "discriminator.freeze_layers", 2),
    ("--freezed=0", "discriminator.freeze_layers", 0),
    ("--fp32=1", "generator.num_fp16_res", 0),
    ("--fp32=0", "generator.num_fp16_res", 4),
    ("--fp32=0", "generator.half_dtype", "float16"),
    ("--precision=fp16", "discriminator.half_dtype", "float16"),
    ("--precision=bf16", "discriminator.half_dtype", "bfloat16"),
    ("--precision=fp32", "discriminator.num_fp16_res", 0),
    ("--precision=auto", "discriminator.num_fp16_res", 0),
    ("--precision=auto --fp32=0", "discriminator.num_fp16_res", 4),
    ("--precision=bf16 --nhwc=1", "generator.fp16_channels_last", True),
    ("--nobench=1", "cudnn_benchmark", False),
    ("--nobench=0", "cudnn_benchmark", True),
    ("--allow-tf32=0", "allow_tf32", False),
    ("--workers=0", "num_workers", 0),
    ("--seed=5", "seed", 5),
    ("--snap=10", "network_snapshot_ticks", 10),
    ("--snap=10", "image_snapshot_ticks", 10),
    ("--tick=0.5", "kimg_per_tick", 0.5),
    ("--state-minutes=2.5", "state_minutes", 2.5),
    ("--gpus=2", "gpus", 2),
    ("--name=first-try", "run_name", "first-try"),
]


def look_up(config, path):
    for name in path.split("."):
        config = getattr(config, name)
    return dict(config) if path == "augment.strengths" else config


@pytest.mark.parametrize(("flags", "path", "value"), CONFIG_FLAGS)
def test_flag_reaches_the_configuration(flags, path, value, inside, capsys):
    if "--resume=network" in flags:
        save_tiny_network("network.safetensors")
    trainer, _ = start(capsys, *flags.split())
    assert look_up(trainer.config, path) == value


SETTINGS_FLAGS = [
    ("", "outdir", "runs"), ("", "data", "set.zip"), ("", "device", "cpu"), ("--device=cpu", "device", "cpu"),
    ("", "balance", "none"), ("--balance=classes", "balance", "classes"), ("--valid=other.zip", "valid", "other.zip"),
    ("", "max_hours", None), ("--max-hours=1.5", "max_hours", 1.5), ("", "new", False), ("--new", "new", True),
    ("", "keep", None), ("--keep=3", "keep", 3), ("", "keep_best", None), ("--keep=3", "num_newest", 3),
    ("", "num_newest", None), ("--keep=2", "keep_flags", "--keep=2"),
    ("", "name", None), ("--name=a.b_c-1", "name", "a.b_c-1"),
    ("", "tune_malloc", True), ("--tune-malloc=0", "tune_malloc", False),
    ("", "precision", "auto"), ("--precision=auto", "precision", "auto"), ("--precision=bf16", "precision", "bf16"),
    ("--fp32=1", "precision", "fp32"), ("--precision=auto --fp32=0", "precision", "fp16"),
    ("", "batch_gpu", None), ("--batch-gpu=8", "batch_gpu", 8),
    ("", "per_class", False), ("--cond=1 --per-class=1", "per_class", True),
]


@pytest.mark.parametrize(("flags", "name", "value"), SETTINGS_FLAGS)
def test_flag_reaches_the_settings(flags, name, value, inside, capsys):
    make_set("other.zip", images=[8, 9], size=16, labels=[0, 1])
    trainer, _ = start(capsys, *flags.split())
    assert getattr(trainer.settings, name) == value


@pytest.mark.parametrize(("text", "metric", "key", "lower"), [
    ("fid2k_full", "fid2k_full", "fid2k_full", True), ("kid500", "kid500", "kid500", True),
    ("pr2k3_full_recall", "pr2k3_full", "pr2k3_full_recall", False),
    ("pr2k3_full_precision", "pr2k3_full", "pr2k3_full_precision", False),
    ("is10k", "is10k", "is10k_mean", False), ("is10k_mean", "is10k", "is10k_mean", False),
    ("ppl2_wend", "ppl2_wend", "ppl2_wend", True), ("dc2k_full_coverage", "dc2k_full", "dc2k_full_coverage", False),
    ("auth2k_full", "auth2k_full", "auth2k_full_authpct", False),
    ("div2k_full", "div2k_full", "div2k_full_ratio", False)])
def test_keep_best_takes_a_value_of_the_metrics_and_knows_which_is_better(text, metric, key, lower, inside, capsys):
    names = "fid2k_full,kid500,pr2k3_full,is10k,ppl2_wend,dc2k_full,auth2k_full,div2k_full"
    settings = start(capsys, f"--metrics={names}", f"--keep-best={text}")[0].settings
    assert settings.keep_best.to_dict() == {"metric": metric, "key": key, "lower_is_better": lower}
    assert (settings.keep, settings.num_newest, settings.keep_flags) == (None, 1, f"--keep-best={key}")


def test_what_is_kept_is_no_part_of_a_runs_identity(inside, capsys):
    flags = ["--metrics=kid5", "--detector=random-conv"]
    all_kept, some = (start(capsys, *flags, *more)[0] for more in ([], ["--keep=2", "--keep-best=kid5"]))
    assert all_kept.config == some.config


def test_metrics_of_classes_are_no_part_of_a_runs_identity(inside, capsys):
    flags = ["--metrics=kid5", "--detector=random-conv", "--cond=1"]
    without, with_classes = (start(capsys, *flags, *more)[0] for more in ([], ["--per-class=1"]))
    assert without.config == with_classes.config
    assert dry_run(capsys, *flags, "--per-class=1")[0]["per_class"] is True


def test_metrics_of_classes_need_classes(inside, capsys):
    make_set("vectors.zip", 6, size=16, labels=[[0.5, 1.0]] * 6)
    assert refuse(capsys, "--outdir=runs", "--data=vectors.zip", "--cond=1", "--per-class=1") == (
        "--per-class is true, but vectors.zip has lists of numbers as labels; expected classes: leave --per-class out")


def test_metrics_are_computed_for_classes_if_wanted(inside, capsys):
    """The evaluator of a run with --per-class measures the classes of its data."""
    trainer, _ = start(capsys, "--cond=1", "--metrics=kid2_full", "--detector=random-conv", "--per-class=1")
    evaluate = train.make_evaluate(trainer.config, trainer.settings, 16)
    found = evaluate(small_generator(c_dim=3), stop=lambda: False)["kid2_full"]["per_class"]
    assert {name: record.get("num_real", record.get("reason")) for name, record in found.items()} == {
        "nv": 3, "mel": 2, "bcc": "too few images: 1 real and 1 generated; the metric needs at least 2"}


def test_dry_run_counts_network_files_and_their_bytes(inside, capsys):
    flags = ["--cfg=tiny", "--batch=32", "--kimg=10", "--tick=0.5", "--snap=4", "--detector=random-conv"]
    size = save_tiny_network(inside / "a.safetensors", cond=False).stat().st_size
    found, _ = dry_run(capsys, *flags, "--metrics=kid5")
    # An iteration, then each 2,048 images, and the end at 10,016: 0, 2, 4, 6, 8 and 10 thousand
    snapshots = found["snapshots"]
    assert (snapshots["written"], snapshots["kept"], found["keep"], found["keep_best"]) == (6, 6, None, None)
    assert snapshots["bytes_each"] == pytest.approx(size, rel=0.02)
    assert snapshots["bytes_written"] == snapshots["bytes_kept"] == 6 * snapshots["bytes_each"]
    assert found["files"]["network-snapshot-KKKKKK.safetensors"] == (
        "every 4 ticks (2 kimg); 2.9 MB each; 6 in total, 17 MB")
    found, _ = dry_run(capsys, *flags, "--metrics=kid5", "--keep=2", "--keep-best=kid5")
    assert (found["keep"], found["keep_best"], found["snapshots"]["kept"]) == (2, "kid5", 4)
    assert found["snapshots"]["bytes_kept"] == 4 * snapshots["bytes_each"]
    assert found["files"]["network-snapshot-KKKKKK.safetensors"] == (
        "every 4 ticks (2 kimg); 2.9 MB each; 6 in total, 17 MB; --keep=2 --keep-best=kid5 keeps 4 at a time, 11 MB")
    found, _ = dry_run(capsys, *flags, "--metrics=kid5", "--keep-best=kid5")
    assert (found["keep"], found["snapshots"]["kept"]) == (1, 3)


def test_allocator_is_tuned_on_a_cpu_alone(inside, capsys, monkeypatch):
    def memory_notes(*flags):
        return [line for line in start(capsys, "--precision=fp32", *flags)[0].settings.notes if "memory" in line]

    assert memory_notes() == ["memory: freed memory is kept for reuse (--tune-malloc=True)"]
    assert memory_notes("--tune-malloc=no") == ["memory: the allocator is not tuned (--tune-malloc=False)"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert memory_notes() == []


def test_allocator_is_no_part_of_a_runs_identity(inside, capsys):
    tuned, left = (start(capsys, *flags)[0] for flags in ([], ["--tune-malloc=0"]))
    assert tuned.config == left.config


def test_every_flag_has_a_test_of_its_effect(inside):
    tested = " ".join(flags for flags, *_ in CONFIG_FLAGS + SETTINGS_FLAGS)
    elsewhere = {"outdir", "data", "metrics", "detector", "detector_weights", "keep_best", "dry_run"}
    names = {parameter.name for parameter in make_command(None, choose_metrics).params}
    assert {name for name in names if f"--{name.replace('_', '-')}" not in tested} == elsewhere


def test_data_set_is_opened_as_the_flags_say(inside, capsys):
    trainer, _ = start(capsys, "--subset=4", "--mirror=1", "--cond=1", "--seed=3")
    dataset = trainer.dataset
    assert (dataset.num_images, len(dataset), dataset.label_table().shape) == (4, 8, (4, 3))
    others, _ = start(capsys, "--subset=4", "--seed=4")
    assert others.dataset.image_names() != dataset.image_names()
    assert trainer.config.run_name == "set-cond-subset4-mirror-auto1"


def test_resume_takes_a_file(inside, capsys):
    save_tiny_network("network.safetensors")
    trainer, _ = start(capsys, "--cfg=tiny", "--resume=network.safetensors")
    config = trainer.config
    assert (config.resume, config.step.ema.rampup, config.step.ada.kimg) == ("network.safetensors", None, 100)


def save_snapshots(folder, *numbers):
    """Create the folder of a run with this number of network snapshots; the newest is another network."""
    Path(folder).mkdir(parents=True)
    for number in numbers:
        save_tiny_network(f"{folder}/network-snapshot-{number:06d}.safetensors", seed=number)


@pytest.mark.parametrize(("resume", "path"), [
    ("bases/00000-*", "bases/00000-a/network-snapshot-000012.safetensors"),
    ("bases/00000-a", "bases/00000-a/network-snapshot-000012.safetensors"),
    ("bases/0000?-*/network-snapshot-000008.safetensors", "bases/00000-a/network-snapshot-000008.safetensors")])
def test_resume_takes_a_pattern_or_a_run_and_says_the_file(resume, path, inside, capsys):
    save_snapshots("bases/00000-a", 8, 12)
    trainer, _ = start(capsys, "--cfg=tiny", "--precision=fp32", f"--resume={resume}")
    assert trainer.config.resume == path  # what the run records
    assert trainer.settings.notes[-1] == f"--resume: {path}"
    found, err = dry_run(capsys, "--cfg=tiny", "--precision=fp32", f"--resume={resume}")
    assert (found["resume"], err) == (path, f"--resume: {path}\n")


def test_resume_that_matches_several_files_lists_them(inside, capsys):
    save_snapshots("bases/00000-a", 8, 12)
    assert refuse(capsys, *BASE, "--cfg=tiny", "--resume=bases/*/network-snapshot-*") == (
        "--resume is bases/*/network-snapshot-*, which matches 2 paths: "
        "bases/00000-a/network-snapshot-000008.safetensors, bases/00000-a/network-snapshot-000012.safetensors; "
        "expected a pattern that matches one, a network file or the folder of a run")


@pytest.mark.parametrize("resume", ["bases/00000-a", "*/0000?-*/network-snapshot-000008.safetensors"])
def test_same_command_continues_its_run_when_resume_could_mean_a_newer_file(resume, inside, capsys):
    save_snapshots("bases/00000-a", 8)
    flags = ["--cfg=tiny", "--precision=fp32", f"--resume={resume}"]
    path = "bases/00000-a/network-snapshot-000008.safetensors"
    begun, _ = start(capsys, *flags)
    with choose_run("runs", begun.config, hash_content(begun.dataset, None)) as run_folder:
        pass
    # The base trains on, and the run itself writes a file that the pattern matches, too.
    save_tiny_network("bases/00000-a/network-snapshot-000020.safetensors", seed=20)
    save_tiny_network(run_folder.path / "network-snapshot-000008.safetensors", seed=21)
    again, _ = start(capsys, *flags)
    assert again.config.resume == path
    assert again.settings.notes[-1] == f"--resume: {path}, which {run_folder.path} started from"
    found, _ = dry_run(capsys, *flags)
    assert (found["run_folder"], found["continues"]) == (str(run_folder.path), True)
    if resume == "bases/00000-a":  # a run with other settings, or a new one, starts from the newest
        newest = "bases/00000-a/network-snapshot-000020.safetensors"
        assert start(capsys, *flags, "--seed=1")[0].config.resume == newest
        assert start(capsys, *flags, "--new")[0].config.resume == newest


def test_resume_of_other_classes_names_both_and_new_classes_start_anew(inside, capsys):
    save_tiny_network("network.safetensors", cond=True, classes=["nv", "mel", "bkl"])
    flags = ["--cfg=tiny", "--resume=network.safetensors", "--cond=1"]
    assert refuse(capsys, *BASE, *flags) == (
        "--resume=network.safetensors: the network was trained with the classes nv, mel, bkl, but this run trains with "
        "the classes nv, mel, bcc; expected the same: --resume-classes=new starts the class embedding from random "
        "weights and takes all else")
    found, _ = dry_run(capsys, *flags, "--resume-classes=new")
    assert found["resume_classes"] == "new"
    assert found["resume_takes"][0] == (
        "classes: the embedding starts from random weights; the network was trained with the classes nv, mel, bkl, and "
        "this run trains with the classes nv, mel, bcc")
    assert found["resume_takes"][1].endswith("; 2 start from random weights (mapping.embed)")
    assert start(capsys, *flags, "--resume-classes=new")[0].config.resume_classes == "new"
    unconditional, _ = dry_run(capsys, *flags[:2], "--resume-classes=new")
    assert "this run trains without classes" in unconditional["resume_takes"][0]


def test_dry_run_says_that_classes_are_taken_by_name_or_number(inside, capsys):
    flags = ["--cfg=tiny", "--resume=network.safetensors", "--cond=1"]
    save_tiny_network("network.safetensors", cond=True, classes=["bcc", "nv", "mel"])
    assert dry_run(capsys, *flags)[0]["resume_takes"][0] == (
        "classes: matched by name; nv, mel, bcc are bcc, nv, mel in the network file")
    save_tiny_network("network.safetensors", cond=True)
    assert dry_run(capsys, *flags)[0]["resume_takes"][0] == (
        "classes: matched by number, since the network file does not name them; make sure that their order is the same")


def test_valid_with_other_classes_is_refused_and_with_others_numbers_is_not(inside, capsys):
    make_set("valid.zip", images=[8, 9], size=16, labels=[0, 1], classes=["mel", "bkl"])
    assert refuse(capsys, *BASE, "--cond=1", "--valid=valid.zip") == (
        "valid.zip has labels of bkl; expected those of nv, mel, bcc: convert it with dataset_tool.py and "
        "the same --classes")
    make_set("valid.zip", images=[8, 9], size=16, labels=[0, 1], classes=["mel", "nv"])
    start(capsys, "--cond=1", "--valid=valid.zip")


def test_valid_without_names_of_classes_is_taken_by_number_and_says_so(inside, capsys):
    make_set("valid.zip", images=[8, 9], size=16, labels=[0, 2])
    line = "--valid=valid.zip does not name its classes; those of --valid are matched by number"
    assert line in dry_run(capsys, "--cond=1", "--valid=valid.zip")[1].splitlines()
    assert line in start(capsys, "--cond=1", "--valid=valid.zip")[0].settings.notes
    assert line not in start(capsys, "--cond=0", "--valid=valid.zip")[0].settings.notes


def test_classes_without_images_are_named(inside, capsys):
    make_set("some.zip", 8, size=16, labels=[1] * 8, classes=["nv", "mel", "bcc"])
    line = "some.zip has no images of class nv, bcc, which the networks will not learn"
    assert line in dry_run(capsys, "--data=some.zip", "--cond=1")[1].splitlines()
    assert line in start(capsys, "--data=some.zip", "--cond=1")[0].settings.notes
    assert line not in start(capsys, "--data=some.zip", "--cond=0")[0].settings.notes


def test_exit_code_is_that_of_the_training(inside):
    assert run(make_command(lambda *_: 3, choose_metrics), list(BASE)) == 3


def test_script_launches_several_processes_or_trains(inside, monkeypatch):
    config = resolve(TrainOptions(cfg="tiny", gpus=2, metrics=()),
                     DatasetFacts(name="set", resolution=16, channels=3, num_images=6, c_dim=0))
    done, settings = [], SimpleNamespace(device="cpu")
    monkeypatch.setattr(train, "make_ready", lambda device: done.append(f"operators for {device}"))
    monkeypatch.setattr(train, "launch", lambda count: done.append("launched") or 10 + count)
    monkeypatch.setitem(sys.modules, "training.loop", SimpleNamespace(train=lambda *_: done.append("trained") or 1))
    assert train.train(config, settings, None) == 12
    assert done == ["operators for cpu", "launched"]  # built once, before the processes start
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert train.train(config, settings, None) == 1
    assert done[2:] == ["operators for cpu", "trained"]
    settings.device = "cuda:1"  # whose operators are those of every GPU
    train.train(config, settings, None)
    assert done[4:] == ["operators for cuda", "trained"]


@pytest.mark.parametrize(("flags", "message"), [
    ("--metrics=ppl_wend", "metric ppl_wend needs images of at least 16x16 after cropping, but the network makes "
                           "16x16; expected larger ones, or another metric"),
    ("--metrics=kid4 --detector-weights=gone.pth", "the file of weights gone.pth does not exist; expected "
     "weights-inception-2015-12-05-6726825d.pth, from https://github.com/toshas/torch-fidelity/releases/download/"
     "v0.2.0/weights-inception-2015-12-05-6726825d.pth"),
])
def test_metrics_that_cannot_work_end_a_run_before_it_begins(flags, message, inside, capsys):
    assert run(train.main, ["--outdir=runs", "--data=set.zip", "--cfg=tiny", *flags.split()]) == 2
    assert capsys.readouterr() == ("", f"error: {message}\n")
    assert not (inside / "runs").exists()


def test_number_of_processes_is_that_of_torchrun(inside, capsys, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    assert start(capsys)[0].config.gpus == 4
    assert start(capsys, "--gpus=4")[0].config.gpus == 4
    assert refuse(capsys, *BASE, "--gpus=2") == (
        "--gpus is 2, but WORLD_SIZE (set by torchrun) is 4; expected the same number: leave --gpus out, or unset "
        "RANK and WORLD_SIZE to let --gpus=2 start 2 processes")


def test_group_of_one_with_another_gpus_is_refused(inside, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert refuse(capsys, *BASE, "--gpus=4") == (
        "--gpus is 4, but WORLD_SIZE (set by torchrun) is 1; expected the same number: leave --gpus out, or unset "
        "RANK and WORLD_SIZE to let --gpus=4 start 4 processes")
    assert start(capsys)[0].config.gpus == 1
    assert start(capsys, "--gpus=1")[0].config.gpus == 1


def test_variables_of_a_batch_system_leave_gpus_to_start_the_processes(inside, capsys, monkeypatch):
    for name in ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "LOCAL_RANK"):
        monkeypatch.setenv(name, "1")
    trainer, _ = start(capsys, "--gpus=2", "--cfg=tiny")
    monkeypatch.setattr(train, "launch", lambda count: 10 + count)
    assert train.train(trainer.config, trainer.settings, trainer.dataset) == 12


def test_only_the_first_process_speaks(inside, capsys, monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    trainer = Trainer()
    assert run(make_command(trainer, choose_metrics), ["--outdir=runs", "--data=set.zip"]) == 7
    assert capsys.readouterr() == ("", "")


def test_metrics_that_are_not_at_hand_are_left_out_with_a_line(inside, capsys):
    trainer = Trainer()
    assert run(make_command(trainer, choose_metrics), ["--outdir=runs", "--data=set.zip"]) == 7
    line = ("metrics: none, since the weights of inception-v3 that fid50k_full needs are not on this machine "
            "(--metrics=fid50k_full downloads them, --metrics=kid5k_full --detector=efficientnet-lite0 needs no "
            "download, --metrics=none omits this line)")
    assert capsys.readouterr() == ("", "")  # the run logs its notes
    assert trainer.config.metrics == ()
    assert trainer.settings.notes == (
        "device: cpu (no CUDA device is available)",
        "memory: freed memory is kept for reuse (--tune-malloc=True)", line)
    assert run(make_command(None, choose_metrics), ["--outdir=runs", "--data=set.zip", "--dry-run"]) == 0
    assert capsys.readouterr().err == line + "\n"


def test_metrics_at_hand_are_used(inside, capsys):
    weights = inside / "inception.pth"
    weights.touch()  # read when the training starts, not when it is planned
    trainer = Trainer()
    command = make_command(trainer, choose_metrics)
    base = ["--outdir=runs", "--data=set.zip"]
    assert run(command, [*base, f"--detector-weights={weights}"]) == 7
    assert (trainer.config.metrics, trainer.settings.detector_weights) == (("fid50k_full",), (str(weights),))
    assert run(command, [*base, "--detector=random-conv"]) == 7
    assert (trainer.config.metrics, trainer.settings.detector) == (("fid50k_full",), "random-conv")
    assert run(command, [*base, "--metrics=kid2k_full, pr2k3_full"]) == 7
    assert trainer.config.metrics == ("kid2k_full", "pr2k3_full")
    assert capsys.readouterr().err == ""


def test_precision_that_this_cpu_has_no_instructions_for_warns_in_one_line(inside, capsys):
    line = ("warning: bf16 may be many times slower than fp32 on this CPU, which has neither AVX512-BF16 nor AMX-BF16; "
            "a new run is faster with --precision=fp32")
    found, err = dry_run(capsys, "--precision=bf16")
    assert (found["precision"], err) == ({"name": "bf16", "reason": "--precision=bf16"}, line + "\n")
    assert dry_run(capsys, "--precision=fp32")[1] == ""


def test_auto_precision_means_the_same_run_on_a_cpu_with_and_without_bf16(inside, capsys, monkeypatch):
    without, _ = start(capsys)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True, "amx_bf16": True})
    assert start(capsys)[0].config == without.config
    assert without.config.precision == "fp32"


def test_auto_precision_on_a_cpu_continues_a_run_that_was_begun_on_a_gpu(inside, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    begun, _ = start(capsys, "--cfg=tiny")
    with choose_run("runs", begun.config, hash_content(begun.dataset, None), **begun.settings.asked()):
        pass
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found, err = dry_run(capsys, "--cfg=tiny")
    assert (found["run_folder"], found["continues"], found["num_fp16_res"]) == ("runs/00000-set-tiny", True, 4)
    assert found["precision"] == {"name": "fp16", "reason": "chosen when the run was started"}
    assert err.startswith("warning: fp16 may be many times slower than fp32 on this CPU")
    found, err = dry_run(capsys, "--cfg=tiny", "--precision=fp32")
    assert (found["run_folder"], found["continues"]) == ("runs/00001-set-tiny", False)
    assert err == ("runs/00000-set-tiny is unfinished and not continued: --precision is fp16 there and fp32 here\n")
    assert found["warnings"] == err.splitlines()


# --dry-run

def test_dry_run_prints_the_settings_and_writes_nothing(inside, capsys):
    found, err = dry_run(capsys, "--cfg=tiny", "--cond=1", "--mirror=1", "--kimg=10", "--balance=classes")
    config = resolve(TrainOptions(cfg="tiny", cond=True, mirror=True, kimg=10, metrics=(), precision="fp32"),
                     DatasetFacts(name="set", resolution=16, channels=3, num_images=6, c_dim=3))
    described = json.loads(json.dumps(describe_settings(config)))
    assert {name: found[name] for name in described} == described
    assert found["data"] == {"path": "set.zip", "images": 6, "items": 12, "channels": 3, "resolution": 16,
                             "label_kind": "class", "label_length": 3, "classes": ["nv", "mel", "bcc"],
                             "balance": "classes", "valid": None}
    assert found["device"] == {"name": "cpu", "reason": "no CUDA device is available"}
    assert found["precision"]["name"] == "fp32"
    assert err == ""
    assert os.listdir() == ["set.zip"]


def test_dry_run_where_no_operators_are_built_builds_none_and_says_nothing_of_them(inside, capsys, monkeypatch):
    monkeypatch.setattr(compiled, "_failures", {})
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "builds")
    assert dry_run(capsys, "--cfg=tiny", "--cond=1")[1] == ""
    assert os.listdir() == ["set.zip"]


def test_dry_run_counts_parameters_and_memory(inside, capsys):
    found, _ = dry_run(capsys, "--cfg=tiny")
    state = TrainingState.create(resolve(TrainOptions(cfg="tiny", precision="fp32"), DatasetFacts(
        name="set", resolution=16, channels=3, num_images=6, c_dim=3)), "cpu")
    assert found["parameters"] == {role: sum(p.numel() for p in getattr(state, role).parameters())
                                   for role in ("G", "D")}
    memory = found["memory_per_process"]
    parts = ("weights", "averaged_generator", "adam", "gradients", "activations")
    assert memory["total"] == sum(memory[part] for part in parts)
    assert all(memory[part] > 0 for part in parts)
    assert memory["unit"] == "bytes"


def test_dry_run_names_the_files(inside, capsys):
    for name in ("00003-x", "00012-set-tiny", "notes"):
        (inside / "runs" / name).mkdir(parents=True)  # no runs, but their numbers are taken
    found, _ = dry_run(capsys, "--cfg=tiny", "--snap=5", "--tick=0.5")
    assert (found["run_folder"], found["continues"]) == ("runs/00013-set-tiny", False)
    assert found["files"]["fakesKKKKKK.png"] == "every 5 ticks (2.5 kimg)"
    assert {"training_options.json", "stats.jsonl", "reals.png", "training-state.pt",
            "network-snapshot-KKKKKK.safetensors"} <= set(found["files"])
    assert sorted(os.listdir("runs")) == ["00003-x", "00012-set-tiny", "notes"]


def test_dry_run_tells_which_run_would_be_continued(inside, capsys):
    trainer, _ = start(capsys, "--cfg=tiny", "--balance=classes")
    weights = image_weights("classes", trainer.dataset)
    with choose_run("runs", trainer.config, hash_content(trainer.dataset, weights)):
        pass
    same, another = ("runs/00000-set-tiny", True), ("runs/00001-set-tiny", False)
    for flags, expected in (([], same), (["--kimg=30000", "--workers=0"], same), (["--new"], another),
                            (["--balance=none"], another), (["--seed=1"], another)):
        found, _ = dry_run(capsys, *replaced(["--cfg=tiny", "--balance=classes"], flags))
        assert (found["run_folder"], found["continues"]) == expected
    assert os.listdir("runs") == ["00000-set-tiny"]


def test_dry_run_tells_what_a_finished_run_would_do(inside, capsys):
    trainer, _ = start(capsys, "--cfg=tiny", "--kimg=2")
    with choose_run("runs", trainer.config, hash_content(trainer.dataset, None)) as run:
        CheckpointPair(run.path).save({"training": {"nimg": 2000}})
        run.mark_finished()
    found, err = dry_run(capsys, "--cfg=tiny", "--kimg=2")
    assert (found["run_folder"], found["continues"], found["already_finished"]) == (
        "runs/00000-set-tiny-kimg2", False, True)
    assert err == "already finished at 2 kimg: runs/00000-set-tiny-kimg2; --new starts another run\n"
    found, err = dry_run(capsys, "--cfg=tiny", "--kimg=3")
    assert (found["run_folder"], found["continues"], found["already_finished"], found["kimg"], err) == (
        "runs/00000-set-tiny-kimg2", True, False, 3, "")
    with choose_run("runs", dataclasses.replace(trainer.config, kimg=9), hash_content(trainer.dataset, None)):
        pass
    assert refuse(capsys, *BASE, "--cfg=tiny", "--kimg=3", "--dry-run") == (
        "--kimg is 3, but runs/00000-set-tiny-kimg2, now at 2 kimg, was started with 9; expected --kimg=9 or more to "
        "continue it, or --new to start another run")


def test_dry_run_shows_flags_that_are_not_among_the_compared_settings(inside, capsys):
    flags = ["--max-hours=2", "--new", "--workers=1", "--state-minutes=3", "--nobench=1", "--allow-tf32=0",
             "--seed=9"]
    found, _ = dry_run(capsys, "--cfg=tiny", *flags)
    assert {name: found[name] for name in ("max_hours", "new", "num_workers", "state_minutes", "cudnn_benchmark",
                                           "allow_tf32", "seed", "cfg", "gpus")} == {
        "max_hours": 2.0, "new": True, "num_workers": 1, "state_minutes": 3.0, "cudnn_benchmark": False,
        "allow_tf32": False, "seed": 9, "cfg": "tiny", "gpus": 1}


def test_script_prints_one_json_object(tmp_path):
    data = make_set(tmp_path / "set.zip", size=16)
    command = [sys.executable, ROOT / "train.py", f"--outdir={tmp_path}/runs", f"--data={data}", "--cfg=tiny", "-n"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["run_name"] == "set-tiny"
    assert result.stderr.startswith("metrics: none")
    assert os.listdir(tmp_path) == ["set.zip"]


# --help

def test_help_shows_every_flag_in_a_group_with_its_default(inside, capsys):
    assert run(make_command(None, choose_metrics), ["--help"]) == 0
    text = capsys.readouterr().out
    groups = ["What and where:", "Data:", "Networks and training:", "Augmentation:",
              "Starting from a trained network:", "Speed and devices:"]
    assert [line for line in text.splitlines() if line in groups] == groups
    for parameter in make_command(None, choose_metrics).params:
        assert f" {parameter.opts[-1]} " in text
        assert "[default: " in parameter.help or parameter.is_flag or "equired" in parameter.help
    assert max(map(len, text.splitlines())) <= 110


# Mistakes

NETWORK = "a network file: a .safetensors of a run, or a .pkl of NVIDIA's code"
LICENSE = ("that NVIDIA published under the NVIDIA Source Code License-NC (for non-commercial use only); expected a "
           "file: download it from NVIDIA under that license, and give its path, such as --resume={}.pkl")
METRICS = ("names such as fid2k_full, kid500, kid_full, pr2k3_full, dc600_full, auth_full, div_full, is10k, "
           "ppl1k2_wend, or one of fid50k_full, kid50k_full, pr50k3_full, fid50k, kid50k, pr50k3, is50k, ppl2_wend, "
           "ppl_zfull, ppl_wfull, ppl_zend, ppl_wend, dc5k5_full, auth5k_full, div5k_full")


@pytest.mark.parametrize(("arguments", "message"), [
    ("--data=set.zip", "--outdir is missing; expected both --outdir and --data, such as --outdir=runs "
                       "--data=isic256.zip: see --help"),
    ("--outdir=runs", "--data is missing; expected both --outdir and --data, such as --outdir=runs --data=isic256.zip: "
                      "see --help"),
    ("--data=gone.zip", "gone.zip does not exist; expected a data set: a zip or a folder of images"),
    ("--data=cut.zip", "cut.zip cannot be read as a zip (File is not a zip file): it is truncated or not a zip; make "
                       "or copy it again"),
    ("--data=mixed.zip", "mixed.zip: b.png is 32x32 RGB, the first image 16x16 RGB; expected "
                         "one size: convert it with dataset_tool.py"),
    ("--data=mixed", "mixed: b.png is 16x16 gray, the first image 16x16 RGB; expected one size: "
                     "convert it with dataset_tool.py"),
    ("--data=odd.zip", "data set odd has resolution 24; expected a power of two from 8 to 2048: convert it with "
                       "dataset_tool.py"),
    ("--data=plain.zip --cond=1", "--cond is true; expected a data set with labels, but plain has none: add labels to "
                                  "its dataset.json, or leave --cond out"),
    ("--subset=7", "--subset is 7; expected at most 6, the number of images in set"),
    ("--cfg=huge", "Invalid value for '--cfg': 'huge' is not one of 'auto', 'stylegan2', 'paper256', 'paper512', "
                   "'paper1024', 'cifar', 'tiny'."),
    ("--gpus=2 --batch=7", "--batch is 7; expected a multiple of gpus (2): try 8"),
    ("--gpus=3", "--gpus is 3; expected a power of two, because --cfg=auto sets the batch: try 2, or --batch=60"),
    ("--batch=30 --batch-gpu=8", "--batch is 30; expected a multiple of gpus * batch_gpu (1 * 8): try 32"),
    ("--batch=6", "--batch is 6, or 6 on each of 1 gpus; expected at most 4 images in a pass, or a multiple of 4: try "
                  "8"),
    ("--batch-gpu=6", "--batch-gpu is 6; expected at most 4 images in a pass, or a multiple of 4: try 8"),
    ("--metrics=fid", f"metric 'fid' is not known; expected {METRICS}"),
    ("--metrics=", "no metric is named; expected names such as fid2k_full, kid500, kid_full, pr2k3_full, dc600_full, "
                   "auth_full, div_full, is10k, ppl1k2_wend"),
    ("--per-class=1", "--per-class is true without --cond=1; expected networks that know the classes: add --cond=1, or "
                      "leave --per-class out"),
    ("--metrics=kid1k --detector=vgg", "detector 'vgg' is not known; expected one of inception-v3, vgg16, "
                                       "efficientnet-lite0, random-conv, timm:NAME"),
    ("--metrics=is1k --detector=vgg16", "metric is1k needs probabilities of classes, which vgg16 does not give; "
                                        "expected --detector=inception-v3, or another metric"),
    ("--metrics=none --detector=vgg16", "--metrics is none, but --detector or --detector-weights is given; expected "
                                        "metrics that use them, such as --metrics=kid5k_full"),
    ("--device=tpu", "--device is tpu; expected auto, cpu, cuda, or a single GPU such as cuda:1"),
    ("--device=cuda", "--device is cuda, but this PyTorch is built without CUDA; expected a working GPU and driver, or "
                      "--device=cpu"),
    ("--augpipe=bgx", "Invalid value for '--augpipe': 'bgx' is not one of 'blit', 'geom', 'color', 'filter', 'noise', "
                      "'cutout', 'bg', 'bgc', 'bgcf', 'bgcfn', 'bgcfnc'."),
    ("--p=0.2", "--p is 0.2 with --aug=ada; expected --aug=fixed: set it, or leave --p out"),
    ("--aug=fixed --p=1.5", "--p is 1.5; expected a number from 0 to 1"),
    ("--aug=fixed --p=-0.1", "--p is -0.1; expected a number from 0 to 1"),
    ("--aug=fixed", "--aug is fixed without --p; expected a probability: add --p=0.2, for example"),
    ("--aug=noaug --target=0.5", "--target is 0.5 with --aug=noaug; expected --aug=ada: set it, or leave --target out"),
    ("--precision=bf16 --fp32=1", "--precision is bf16 with --fp32=true; expected the two to agree: leave --fp32 out"),
    ("--nhwc=1", "--nhwc is true in full precision; expected fp16 or bf16, as it affects half-precision layers only: "
                 "use --precision=fp16, the default on a GPU, or leave --nhwc out"),
    ("--kimg=0", "--kimg is 0; expected a number >= 1"),
    ("--tick=0", "--tick is 0.0; expected a number > 0"),
    ("--max-hours=-1", "--max-hours is -1.0; expected a number > 0"),
    ("--keep=0", "--keep is 0; expected a number >= 1"),
    ("--keep-best=kid5k", "--keep-best is kid5k, which is not among --metrics (none); expected a metric that is "
                          "computed for each snapshot: add its metric to --metrics"),
    ("--metrics=kid5k,is5k --keep-best=fid5k", "--keep-best is fid5k, which is not among --metrics (kid5k, is5k); "
     "expected one of kid5k, is5k_mean: add its metric to --metrics"),
    ("--metrics=pr5k3_full --keep-best=pr5k3_full", "--keep-best is pr5k3_full, which has 2 values; expected one of "
                                                    "them: pr5k3_full_precision or pr5k3_full_recall"),
    ("--name=../up", "--name is '../up'; expected letters, digits, '.', '_' and '-', starting with a letter or digit"),
    ("--balance=gone.csv", "--balance=gone.csv cannot be read ([Errno 2] No such file or directory: 'gone.csv'); "
                           "expected none, classes, or a CSV file"),
    ("--balance=set.zip/w.csv", "--balance=set.zip/w.csv cannot be read ([Errno 20] Not a directory: 'set.zip/w.csv'); "
                                "expected none, classes, or a CSV file"),
    ("--resume=set.zip/net.pkl", f"--resume is set.zip/net.pkl, which does not exist; expected {NETWORK}"),
    ("--data=plain.zip --balance=classes", "--balance=classes: plain.zip has no classes; expected integer labels"),
    ("--valid=gone.zip", "gone.zip does not exist; expected a data set: a zip or a folder of images"),
    ("--valid=./set.zip", "--valid=set.zip is the data set of --data itself; expected images that are not trained on"),
    ("--valid=odd.zip", "--valid=odd.zip is 24x24 RGB; expected 16x16 RGB, as in --data"),
    ("--valid=two.zip --cond=1", "--valid=two.zip has labels of length 2; expected 3, as in --data: convert both with "
                                 "dataset_tool.py and the same --classes"),
    ("--outdir=set.zip", "--outdir is set.zip, but {here}/set.zip is not a folder; choose a new or existing folder"),
    ("--outdir=set.zip/runs", "--outdir is set.zip/runs, but {here}/set.zip is not a folder; choose a new or existing "
                              "folder"),
    ("--resume=ffhq256", "--resume is ffhq256, a network for faces of FFHQ at 256x256 " + LICENSE.format("ffhq256")),
    ("--resume=lsundog256", "--resume is lsundog256, a network for dogs of LSUN at 256x256 "
                            + LICENSE.format("lsundog256")),
    ("--resume=https://host/net.pkl", "--resume is https://host/net.pkl; expected a file: download it first, and give "
                                      "its path"),
    ("--resume-classes=new", "--resume-classes is new without --resume; expected a network to start from: add "
                             "--resume, or leave --resume-classes out"),
    ("--resume-partial=1", "--resume-partial is true without --resume; expected a network to start from: add --resume, "
                           "or leave --resume-partial out"),
    ("--freezed=3 --resume=noresume", "--freezed is 3 without --resume; expected a network to start from: add "
                                      "--resume, or leave --freezed out"),
    ("--resume=gone.pkl", f"--resume is gone.pkl, which does not exist; expected {NETWORK}"),
    ("--resume=mixed", "--resume is mixed, a folder without network-snapshot-*.safetensors; expected a network file (a "
                       ".safetensors of a run, or a .pkl of NVIDIA's code), or the folder of a run"),
    ("set.zip", "Got unexpected extra argument (set.zip)")])
def test_mistake_gives_one_line_and_leaves_nothing(arguments, message, inside, capsys):
    make_set("plain.zip", size=16)
    make_set("odd.zip", size=24, labels=[0, 1, 2] * 2)
    make_set("two.zip", size=16, labels=[0, 1] * 3)
    Path("cut.zip").write_bytes(Path("set.zip").read_bytes()[:-200])
    first = png(pixels_of(0, 16))
    make_zip(Path("mixed.zip"), {"a.png": first, "b.png": png(pixels_of(1, 32))})
    make_folder(Path("mixed"), {"a.png": first, "b.png": png(pixels_of(1, 16, channels=1))})
    given = arguments.split()
    names = {argument.split("=")[0] for argument in given}
    defaults = [] if "is missing" in message else [flag for flag in BASE if flag.split("=")[0] not in names]
    assert refuse(capsys, *defaults, *given) == message.format(here=inside)



@pytest.mark.parametrize(("argument", "message"), [  # the rest of these lines is click's, and varies
    ("--cond=maybe", "Invalid value for '--cond': 'maybe' is not a valid boolean"),
    ("--kimg=long", "Invalid value for '--kimg': 'long' is not a valid integer"),
    ("--outdirs=runs", "No such option"),
    ("--mirror", "Option '--mirror' requires an argument")])
def test_mistyped_flag_gives_one_line(argument, message, inside, capsys):
    assert refuse(capsys, *BASE, argument).startswith(message)


PARTIAL = "--resume-partial=1 takes the layers that match and starts the others from random weights"


@pytest.mark.parametrize(("made", "flags", "message"), [
    ({"resolution": 32}, "--cfg=tiny",
     "32x32 RGB images, but this run has 16x16 RGB images; expected the same: a data set of 32x32 RGB images "
     f"(dataset_tool.py --resolution=32x32) fits; or {PARTIAL}"),
    ({"cfg": "stylegan2"}, "--cfg=auto",
     "8 mapping layers, but this run has 2 mapping layers; expected the same: --cfg=stylegan2 or --cfg=paper256 or "
     f"--cfg=paper512 or --cfg=paper1024 fits; or {PARTIAL}"),
    ({"cfg": "auto"}, "--cfg=paper256",
     "2 mapping layers, but this run has 8 mapping layers; expected the same: --cfg=auto fits; or " + PARTIAL),
    ({"cfg": "cifar"}, "--cfg=auto",
     "a discriminator of the orig architecture, but this run has a discriminator of the resnet architecture; expected "
     f"the same: --cfg=cifar fits; or {PARTIAL}"),
    ({"resolution": 32}, "--cfg=auto",
     "32x32 RGB images, latents of 64 and styles of 64 numbers, 64 channels at 4x4, but this run has 16x16 RGB images, "
     "latents of 512 and styles of 512 numbers, 512 channels at 4x4, so that no layer fits; expected the same: "
     "--cfg=tiny with a data set of 32x32 RGB images (dataset_tool.py --resolution=32x32) fits")])
def test_resume_of_networks_that_do_not_fit_names_the_setting_that_does(made, flags, message, inside, capsys):
    save_tiny_network("network.safetensors", **made)
    assert refuse(capsys, *BASE, flags, "--resume=network.safetensors") == (
        f"--resume=network.safetensors: the network has {message}")


def test_setting_that_is_named_for_resume_fits(inside, capsys):
    save_tiny_network("network.safetensors", cfg="stylegan2")
    for cfg in ("stylegan2", "paper256", "paper512", "paper1024"):
        start(capsys, f"--cfg={cfg}", "--resume=network.safetensors")


def test_resume_of_gray_images_names_the_data(inside, capsys):
    make_set("gray.zip", size=16, channels=1)
    save_tiny_network("network.safetensors")
    assert refuse(capsys, *replaced(BASE, ["--data=gray.zip"]), "--cfg=tiny", "--resume=network.safetensors") == (
        "--resume=network.safetensors: the network has 16x16 RGB images, but this run has 16x16 gray images; expected "
        f"the same: a data set of 16x16 RGB images fits; or {PARTIAL}")


def test_partial_resume_says_what_is_taken(inside, capsys):
    save_tiny_network("network.safetensors", 32)
    flags = ["--cfg=tiny", "--resume=network.safetensors", "--resume-partial=1"]
    found, _ = dry_run(capsys, *flags)
    assert found["resume_partial"] is True
    layers = found["resume_layers"]
    assert list(layers) == ["G", "D", "G_ema"]
    assert layers["G"]["taken"]["layers"] == layers["G_ema"]["taken"]["layers"] == [
        "synthesis.b4", "synthesis.b8", "synthesis.b16", "mapping"]
    assert layers["G"]["ignored"]["layers"] == ["synthesis.b32"]
    assert layers["D"]["begun_anew"] == {"tensors": 3, "layers": ["b16.fromrgb"]}
    assert layers["D"]["ignored"]["layers"] == ["b32"]
    counts = {what: part["tensors"] for what, part in layers["D"].items()}
    assert found["resume_takes"][1] == (
        f"D: {counts['taken']} tensors taken; 3 start from random weights (b16.fromrgb); {counts['ignored']} of the "
        "file are not used (b32)")
    without, _ = dry_run(capsys, "--cfg=tiny")
    assert (without["resume_partial"], without["resume_layers"], without["resume_takes"]) == (False, None, [])


def test_more_frozen_layers_than_the_discriminator_has_are_refused(inside, capsys):
    save_tiny_network("network.safetensors")
    flags = ["--cfg=tiny", "--resume=network.safetensors"]
    assert refuse(capsys, *BASE, *flags, "--freezed=8") == (
        "--freezed is 8; expected at most 7, the number of layers of this run's discriminator that can be frozen")
    start(capsys, *flags, "--freezed=7")


def test_resume_of_a_cut_file_is_refused(inside, capsys):
    data = save_tiny_network(inside / "network.safetensors").read_bytes()
    (inside / "network.safetensors").write_bytes(data[:-1000])
    assert refuse(capsys, *BASE, "--cfg=tiny", "--resume=network.safetensors").startswith(
        "--resume=network.safetensors: network.safetensors ")


def test_outdir_that_the_system_does_not_let_write_is_refused(inside, capsys, monkeypatch):
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != inside and access(path, mode))
    assert refuse(capsys, *BASE) == (
        f"--outdir is runs, but {inside} is not writable; choose a writable folder")


def test_damaged_header_of_an_image_is_named(inside, capsys):
    make_zip(Path("bad.zip"), {"a.png": png(pixels_of(0, 16)), "b.png": b"no image at all"})
    assert refuse(capsys, "--outdir=runs", "--data=bad.zip").startswith("bad.zip: b.png cannot be decoded (")


def test_subset_is_checked_alone(inside, capsys):
    """A bad image that is not chosen does no harm."""
    pixels = {f"{index}.png": png(pixels_of(index, 16)) for index in range(8)}
    make_zip(Path("bad.zip"), {**pixels, "9.png": png(pixels_of(9, 32))})
    trainer, _ = start(capsys, "--data=bad.zip", "--subset=1", "--seed=0")
    assert trainer.dataset.image_names() != ["9.png"]
    assert refuse(capsys, *replaced(BASE, ["--data=bad.zip"])).startswith("bad.zip: 9.png is 32x32")


def test_train_takes_sets_in_a_folder_inside_with_their_labels(inside, capsys):
    with ImageSetWriter("valid.zip", classes=["nv", "mel", "bcc"]) as writer:
        for index in range(6, 10):
            writer.add(png(pixels_of(index, 16)), index % 3)
    flags = ("--cfg=tiny", "--cond=1", "--valid=valid.zip", "--precision=fp32")
    expected, _ = dry_run(capsys, *flags)
    for name in ("set.zip", "valid.zip"):
        enclose(name, inside / "inside.zip").replace(inside / name)
    found, _ = dry_run(capsys, *flags)
    assert found == expected
    assert (found["data"]["label_length"], found["data"]["classes"]) == (3, ["nv", "mel", "bcc"])
