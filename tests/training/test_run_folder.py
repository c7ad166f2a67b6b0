"""training.run_folder: which run a command continues, and which are left alone."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dnnlib.cli import UserError
from dnnlib.process_lock import LEASE_SECONDS, ProcessLock
from torch_utils.checkpoint import CheckpointPair
from training.config import DatasetFacts, TrainConfig
from training.options import TrainOptions, resolve
from training.run_folder import RunFolder, choose_run, plan_run
from training.run_record import identify, read_record, software_versions, write_record

ROOT = Path(__file__).parent.parent.parent
FACTS = DatasetFacts(name="lesions", resolution=32, channels=3, num_images=2000, c_dim=2)
CONTENT = "0" * 64
NAME = "lesions-tiny"
LOCKED = ["lock.json", "training_options.json"]


def config_of(**options) -> TrainConfig:
    return resolve(TrainOptions(**{"cfg": "tiny", **options}), FACTS)


def start(outdir, *, finish=False, content=CONTENT, new=False, nimg=None, **options):
    """Choose a run, and end it at once with a state after `nimg` images; return its folder's name."""
    with choose_run(outdir, config_of(**options), content, new=new) as run:
        if nimg is not None:
            save_state(run.path, nimg)
        if finish:
            run.mark_finished()
    return run.path.name


def save_state(folder, nimg):
    CheckpointPair(folder).save({"training": {"nimg": nimg}})


def edit(folder, change):
    path = folder / "training_options.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return path


def everything(folder):
    """Return all files below a folder with their content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- numbers and names


def test_choose_run_first_run_is_number_0_with_its_options(tmp_path):
    config = config_of(kimg=7)
    with choose_run(tmp_path / "deep" / "runs", config, CONTENT) as run:
        assert run.path == tmp_path / "deep" / "runs" / f"00000-{NAME}-kimg7"
        assert (run.continues, run.notes) == (False, ())
        assert sorted(os.listdir(run.path)) == LOCKED
        content = json.loads(run.options.read_text())
        assert list(content) == ["format", "version", "finished", "config", "identity", "versions", "precision_given",
                                 "passes", "classes"]
        assert (content["format"], content["version"], content["finished"]) == ("stylegan2-ada-run", 1, False)
        assert TrainConfig.from_dict(content["config"]) == config
        assert content["identity"] == identify(config, CONTENT)
        assert content["versions"] == software_versions()
        assert content["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert os.listdir(run.path) == ["training_options.json"]
    assert os.listdir(run.path.parent) == [run.path.name]


@pytest.mark.parametrize(("present", "number"), [
    (["00003-a", "00001-b"], "00004"),
    (["99999-x"], "100000"),
    (["x-00005", "00005x", "notes", ".00008-x"], "00000"),
    (["00009", "7-short", "0012-x", "2024-notes", "20240117-ham", "000007-x"], "00000"),
    (["00003-a", "2024-notes.txt", "20240117-ham"], "00004"),
])
def test_choose_run_number_follows_the_highest_of_five_digits_and_a_hyphen(tmp_path, present, number):
    for name in present:
        (tmp_path / name).mkdir()
    assert start(tmp_path) == f"{number}-{NAME}"


def test_choose_run_files_have_no_number(tmp_path):
    for name in ("2024-notes.txt", "00004-notes.txt", f"00000-{NAME}"):
        (tmp_path / name).write_text("mine")
    assert start(tmp_path) == f"00001-{NAME}"  # 00000 would take the place of a file
    assert (tmp_path / f"00000-{NAME}").read_text() == "mine"


def test_choose_run_numbering_goes_on_after_99999(tmp_path):
    (tmp_path / "99999-x").mkdir()
    assert [start(tmp_path, seed=seed) for seed in range(3)] == [f"10000{number}-{NAME}" for number in range(3)]
    assert start(tmp_path, seed=0) == f"100000-{NAME}"  # continues


def test_choose_run_a_link_to_a_run_elsewhere_counts_and_continues(tmp_path):
    (tmp_path / "runs").mkdir()
    assert start(tmp_path / "large_disk") == f"00000-{NAME}"
    (tmp_path / "runs" / f"00004-{NAME}").symlink_to(tmp_path / "large_disk" / f"00000-{NAME}")
    assert start(tmp_path / "runs") == f"00004-{NAME}"
    assert start(tmp_path / "runs", seed=1) == f"00005-{NAME}"


def test_run_folder_names_of_files():
    run = RunFolder("runs/00007-x")
    names = [run.options, run.log, run.stats, run.reals, run.fakes(0), run.fakes(200_999), run.snapshot(200_000),
             run.metric("fid50k_full")]
    assert [str(name) for name in names] == [f"runs/00007-x/{name}" for name in (
        "training_options.json", "log.txt", "stats.jsonl", "reals.png", "fakes000000.png", "fakes000200.png",
        "network-snapshot-000200.safetensors", "metric-fid50k_full.jsonl")]


def test_run_folder_newest_snapshot_is_that_of_the_most_images(tmp_path):
    run = RunFolder(tmp_path)
    assert run.newest_snapshot() is None
    for nimg in (1_000_000_000, 999_999_000):
        run.snapshot(nimg).touch()
    assert run.newest_snapshot() == run.snapshot(1_000_000_000)


@pytest.mark.parametrize("name", ["a/b", "../a", "/a", "a/"])
def test_choose_run_a_name_with_folders_is_refused(tmp_path, name):
    with pytest.raises(UserError) as error:
        choose_run(tmp_path / "runs", replace(config_of(), run_name=name), CONTENT)
    assert str(error.value) == f"the run's name is {name!r}; expected a name without folders: give one with --name"
    assert os.listdir(tmp_path) == []


# ---- which one continues


def test_choose_run_the_same_command_continues(tmp_path):
    assert start(tmp_path) == f"00000-{NAME}"
    with choose_run(tmp_path, config_of(), CONTENT) as run:
        assert (run.path.name, run.continues, run.notes) == (f"00000-{NAME}", True, ())


def test_choose_run_free_options_continue_and_are_taken_over(tmp_path):
    start(tmp_path, kimg=5)
    changed = config_of(kimg=9, snap=3, tick=1, metrics=(), workers=0, state_minutes=1, nobench=True)
    with choose_run(tmp_path, changed, CONTENT) as run:
        assert (run.path.name, run.continues) == (f"00000-{NAME}-kimg5", True)
        assert read_record(run.path).config == changed


@pytest.mark.parametrize("kimg", [1, 2])
def test_choose_run_finished_run_is_left_alone_by_an_equal_or_smaller_kimg(tmp_path, kimg):
    name = start(tmp_path, finish=True, nimg=2000, kimg=2)
    before = everything(tmp_path)
    run = choose_run(tmp_path, config_of(kimg=kimg), CONTENT)
    assert run.left_alone == f"already finished at 2 kimg: {tmp_path}/{name}; --new starts another run"
    assert (run.path.name, run.continues) == (name, False)
    plan = plan_run(tmp_path, config_of(kimg=kimg), CONTENT)
    assert (plan.path.name, plan.continues, plan.left_alone) == (name, False, run.left_alone)
    assert everything(tmp_path) == before
    assert start(tmp_path, new=True, kimg=kimg) == f"00001-{NAME}-kimg{kimg}"


def test_choose_run_finished_run_is_continued_by_a_larger_kimg(tmp_path):
    name = start(tmp_path, finish=True, nimg=1000, kimg=1)
    assert plan_run(tmp_path, config_of(kimg=2), CONTENT).continues
    with choose_run(tmp_path, config_of(kimg=2), CONTENT) as run:
        assert (run.path.name, run.continues, run.left_alone) == (name, True, None)
        record = read_record(run.path)
        assert (record.finished, record.config.kimg) == (False, 2)
        save_state(run.path, 2000)
        run.mark_finished()
    assert choose_run(tmp_path, config_of(kimg=2), CONTENT).left_alone.startswith("already finished at 2 kimg: ")


def test_choose_run_the_largest_kimg_asked_for_is_kept(tmp_path):
    name = start(tmp_path, kimg=5, nimg=500)
    assert start(tmp_path, kimg=9) == name
    with choose_run(tmp_path, config_of(kimg=9), CONTENT) as run:
        assert run.record.config.kimg == 9
    before = everything(tmp_path)
    for function in (choose_run, plan_run):
        with pytest.raises(UserError) as error:
            function(tmp_path, config_of(kimg=5), CONTENT)
        assert str(error.value) == (f"--kimg is 5, but {tmp_path}/{name}, now at 0.5 kimg, was started with 9; "
                                    "expected --kimg=9 or more to continue it, or --new to start another run")
    assert everything(tmp_path) == before
    assert start(tmp_path, kimg=5, new=True) == f"00001-{NAME}-kimg5"


def test_choose_run_smaller_kimg_that_an_unfinished_run_has_reached_leaves_it_alone(tmp_path):
    name = start(tmp_path, kimg=9, nimg=6008)
    before = everything(tmp_path)
    run = choose_run(tmp_path, config_of(kimg=6), CONTENT)
    assert run.left_alone == (f"already finished at 6.008 kimg (of 9 requested before): {tmp_path}/{name}; --new "
                              "starts another run")
    assert everything(tmp_path) == before


def test_choose_run_finished_run_without_its_state_is_refused(tmp_path):
    name = start(tmp_path, finish=True, kimg=1)
    before = everything(tmp_path)
    with pytest.raises(UserError) as error:
        choose_run(tmp_path, config_of(kimg=2), CONTENT)
    assert str(error.value) == (
        f"{tmp_path}/{name} is finished at 1 kimg, but its resumable state is missing; expected training-state.pt, to "
        "continue to 2 kimg: copy it back, or start another run with --new")
    assert everything(tmp_path) == before
    state = tmp_path / name / "training-state.pt"
    state.write_bytes(b"half a state")
    with pytest.raises(UserError, match="training-state.pt is damaged: .*; expected one intact state: restore one "
                                        r"from a backup, or start from scratch \(--new does so\)"):
        choose_run(tmp_path, config_of(kimg=2), CONTENT)
    assert everything(tmp_path) == {**before, f"{name}/training-state.pt": b"half a state"}


def test_choose_run_new_forces_a_number(tmp_path):
    start(tmp_path)
    assert start(tmp_path, new=True) == f"00001-{NAME}"


def test_choose_run_newest_of_several_equal_ones_decides(tmp_path):
    start(tmp_path)
    start(tmp_path, new=True)
    start(tmp_path, seed=1)
    assert start(tmp_path) == f"00001-{NAME}"
    start(tmp_path, new=True, finish=True)
    left_alone = choose_run(tmp_path, config_of(), CONTENT).left_alone  # not 00001, which the user gave up
    assert left_alone == f"already finished at 25000 kimg: {tmp_path}/00003-{NAME}; --new starts another run"


def test_choose_run_other_data_or_options_begin_anew_and_say_why(tmp_path):
    start(tmp_path)
    with choose_run(tmp_path, config_of(seed=3), CONTENT) as run:
        assert run.path.name == f"00001-{NAME}"
        assert run.not_continued == (
            f"{tmp_path}/00000-{NAME} is unfinished and not continued: seed is 0 there and 3 here",)
    with choose_run(tmp_path, config_of(), "1" * 64) as run:
        assert run.not_continued[1] == f"{tmp_path}/00000-{NAME} is unfinished and not continued: the data differ"
    assert run.notes == ()


def test_choose_run_changed_flag_that_makes_another_name_says_which_run_is_not_continued(tmp_path):
    def auto(gpus):
        return resolve(TrainOptions(cfg="auto", gpus=gpus, precision="fp32"), replace(FACTS, resolution=256))

    choose_run(tmp_path, auto(1), CONTENT).release()
    for function in (plan_run, choose_run):
        found = function(tmp_path, auto(2), CONTENT)
        assert found.path.name == "00001-lesions-auto2"
        line, = found.not_continued
        assert line.startswith(f"{tmp_path}/00000-lesions-auto1 is unfinished and not continued: --gpus is 1 there and "
                               "2 here, which --cfg=auto depends on; step.batch is 16 there and 32 here; ")
    assert choose_run(tmp_path, auto(2), "1" * 64, new=True).not_continued == ()  # as the user said


def test_choose_run_of_many_unfinished_runs_the_newest_are_named(tmp_path):
    for seed in range(6):
        start(tmp_path, seed=seed)
    start(tmp_path, seed=6, finish=True)
    start(tmp_path, seed=7, content="1" * 64, cond=True)  # other data, another name
    with choose_run(tmp_path, config_of(seed=8), CONTENT) as run:
        assert run.not_continued == (*(
            f"{tmp_path}/0000{seed}-{NAME} is unfinished and not continued: seed is {seed} there and 8 here"
            for seed in (5, 4, 3)), "3 older ones are not continued either")


# ---- what a continuation keeps of its record


def test_choose_run_auto_precision_of_another_device_continues_with_the_recorded_one(tmp_path):
    """Started with --precision=auto on a GPU, continued on a CPU, and vice versa."""
    for first, second in (("fp16", "fp32"), ("fp32", "fp16"), ("bf16", "fp32")):
        outdir = tmp_path / first
        start(outdir, precision=first)
        with choose_run(outdir, config_of(precision=second), CONTENT) as run:
            assert (run.path.name, run.continues, run.record.config.precision) == (f"00000-{NAME}", True, first)
            assert run.record.config == config_of(precision=first)
        plan = plan_run(outdir, config_of(precision=second), CONTENT)
        assert plan.config.precision == first
        assert start(outdir, precision=second) == f"00000-{NAME}"  # and once more, with the record as it is now


def test_choose_run_given_precision_is_part_of_the_identity(tmp_path):
    start(tmp_path, precision="fp16")
    with choose_run(tmp_path, config_of(precision="fp32"), CONTENT, precision_given=True) as run:
        assert (run.path.name, run.continues) == (f"00001-{NAME}", False)
        assert run.not_continued == (
            f"{tmp_path}/00000-{NAME} is unfinished and not continued: --precision is fp16 there and fp32 here",)
    # 00001 was asked to be fp32: a command on a GPU that does not ask means the other one.
    assert start(tmp_path, precision="fp16") == f"00000-{NAME}"
    with choose_run(tmp_path, config_of(precision="fp32"), CONTENT, precision_given=True) as run:
        assert run.path.name == f"00001-{NAME}"


def test_choose_run_pass_size_continues_and_is_kept(tmp_path):
    with choose_run(tmp_path, config_of(batch=16), CONTENT) as run:
        run.note_pass(0, 16)
    smaller = config_of(batch=16, batch_gpu=4)
    with choose_run(tmp_path, smaller, CONTENT, batch_gpu_given=True) as run:
        assert (run.continues, run.record.config.step.micro_batch) == (True, 4)
        run.note_pass(320, 4)
    name = f"00000-{NAME}-batch16"
    content = json.loads((tmp_path / name / "training_options.json").read_text())
    assert content["passes"] == [{"from_nimg": 0, "batch_gpu": 16}, {"from_nimg": 320, "batch_gpu": 4}]
    with choose_run(tmp_path, config_of(batch=16), CONTENT) as run:  # the command of before does not fill memory again
        assert run.record.config.step.micro_batch == 4
        assert run.notes == (f"{tmp_path}/{name}: 4 images per pass, as the run had before (--batch-gpu changes this)",)
        run.note_pass(480, 4)
    assert len(read_record(tmp_path / name).passes) == 2
    with choose_run(tmp_path, config_of(batch=16, batch_gpu=8), CONTENT, batch_gpu_given=True) as run:
        assert run.record.config.step.micro_batch == 8
        run.note_pass(160, 8)  # the newest state was lost
    passes = [(size.from_nimg, size.batch_gpu) for size in read_record(tmp_path / name).passes]
    assert passes == [(0, 16), (160, 8)]


def test_choose_run_pass_size_that_never_fitted_is_not_kept(tmp_path):
    """It is recorded after the first iteration."""
    with choose_run(tmp_path, config_of(batch=16, batch_gpu=4), CONTENT) as run:
        run.note_pass(0, 4)
    start(tmp_path, batch=16, batch_gpu=16)
    with choose_run(tmp_path, config_of(batch=16), CONTENT) as run:
        assert run.record.config.step.micro_batch == 4


@pytest.mark.parametrize(("then", "now", "kept"), [(2, 1, 8), (1, 2, 8), (1, 4, 4), (4, 1, 4)])
def test_choose_run_number_of_processes_keeps_the_pass_size_as_far_as_shares_go(tmp_path, then, now, kept):
    """Two processes with one pass each are equivalent to one process with two passes; see training.step."""
    with choose_run(tmp_path, config_of(batch=16, gpus=then, cfg="stylegan2"), CONTENT) as run:
        run.note_pass(0, {1: 16, 2: 8, 4: 4}[then])
    expected = {(1, 2): 8, (1, 4): 4}.get((then, now), kept)
    with choose_run(tmp_path, config_of(batch=16, gpus=now, cfg="stylegan2"), CONTENT) as run:
        assert (run.continues, run.record.config.step.micro_batch) == (True, expected)


def test_records_of_before_open_and_continue(tmp_path):
    """They have no passes, classes or precision_given, and their identity contains the pass size."""
    start(tmp_path, precision="bf16", batch=16)
    path = tmp_path / f"00000-{NAME}-batch16" / "training_options.json"
    content = json.loads(path.read_text())
    del content["passes"], content["precision_given"], content["classes"]
    content["identity"]["options"]["step.micro_batch"] = 16
    del content["identity"]["options"]["allow_tf32"], content["config"]["allow_tf32"]  # as before an option
    path.write_text(json.dumps(content))
    with choose_run(tmp_path, config_of(precision="fp32", batch=16, batch_gpu=4), CONTENT, batch_gpu_given=True) as run:
        assert (run.path.name, run.continues, run.record.config.precision) == (path.parent.name, True, "bf16")
        run.note_pass(800, 4)
    passes = [(size.from_nimg, size.batch_gpu) for size in read_record(path.parent).passes]
    assert passes == [(0, 16), (800, 4)]


def test_choose_run_finished_run_whose_classes_exchanged_their_names_is_refused(tmp_path):
    """It would be left alone as the requested run, but its network calls "mel" what is now "nv"."""
    with choose_run(tmp_path, config_of(kimg=1), CONTENT, classes=["nv", "mel"]) as run:
        run.mark_finished()
    for choose in (plan_run, choose_run):
        with pytest.raises(UserError) as caught:
            choose(tmp_path, config_of(kimg=1), CONTENT, classes=["mel", "nv"])
        assert str(caught.value) == (
            f"{run.path} was trained on the classes nv, mel, but --data has the classes mel, nv; expected the same "
            "order: correct the classes in its dataset.json, or start another run with --new")
    assert choose_run(tmp_path, config_of(kimg=1), CONTENT, classes=["nevus", "mel"]).left_alone is not None


def test_choose_run_resume_by_name_and_by_number_are_different_runs(tmp_path):
    """The names decide how classes of --resume are matched."""
    network = tmp_path / "net.safetensors"
    network.write_bytes(b"1")
    named, unnamed = config_of(resume=str(network)), []
    with choose_run(tmp_path / "runs", named, CONTENT, classes=["mel", "nv"]) as run:
        run.mark_finished()
    with choose_run(tmp_path / "runs", named, CONTENT, classes=unnamed) as other:
        assert (other.path.name[:5], other.continues) == ("00001", False)
        assert other.not_continued == (f"{run.path} is not continued: its classes are mel, nv there and without names "
                                       "here",)
    assert choose_run(tmp_path / "runs", named, CONTENT, classes=["mel", "nv"]).path == run.path
    anew = config_of(resume=str(network), resume_classes="new")
    for classes, continues in ((["mel", "nv"], False), (unnamed, True)):  # where no class is taken, names do not count
        with choose_run(tmp_path / "runs", anew, CONTENT, classes=classes) as run:
            assert run.continues is continues


def test_choose_run_other_software_is_said(tmp_path):
    start(tmp_path)
    folder = tmp_path / f"00000-{NAME}"
    record = read_record(folder)
    write_record(folder, replace(record, versions={**record.versions, "torch": "1.7.1"}))
    with choose_run(tmp_path, config_of(), CONTENT) as run:
        now = software_versions()["torch"]
        assert run.notes == (f"{folder}: torch 1.7.1 then and {now} now; results may differ from those of an "
                             "uninterrupted run",)
    assert read_record(folder).versions == software_versions()


def test_choose_run_goes_on_with_a_run_of_a_program_that_wrote_ada_twice(tmp_path):
    start(tmp_path)
    folder = tmp_path / f"00000-{NAME}"

    def write_twice(content):
        ada = content["config"]["step"]["ada"]
        content["config"]["augment"]["ada"] = ada
        content["identity"]["options"] |= {f"augment.ada.{name}": value for name, value in ada.items()}

    edit(folder, write_twice)
    with choose_run(tmp_path, config_of(), CONTENT) as run:
        assert (run.path, run.continues, run.notes) == (folder, True, ())


def test_choose_run_folders_of_other_programs_are_passed_over(tmp_path):
    for name, content in (("00000-a", '{"num_gpus": 1}'), ("00001-b", "[]")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "training_options.json").write_text(content)
    (tmp_path / "00002-c").mkdir()
    with choose_run(tmp_path, config_of(), CONTENT) as run:
        assert (run.path.name, run.notes) == (f"00003-{NAME}", ())


def test_choose_run_options_that_cannot_be_read_are_noted(tmp_path):
    start(tmp_path)
    path = tmp_path / f"00000-{NAME}" / "training_options.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "colour": 1}))
    with choose_run(tmp_path, config_of(), CONTENT) as run:
        assert run.path.name == f"00001-{NAME}"
        assert run.not_continued == (
            f"{path}: colour is not a field of a run's options; expected one of format, version, finished, config, "
            "identity, versions, precision_given, passes, classes; this run is not continued",)


def test_plan_run_tells_the_folder_and_changes_nothing(tmp_path):
    plan = plan_run(tmp_path / "runs", config_of(), CONTENT)
    assert (plan.path, plan.continues) == (tmp_path / "runs" / f"00000-{NAME}", False)
    assert os.listdir(tmp_path) == []
    start(tmp_path)
    plan = plan_run(tmp_path, config_of(), CONTENT)
    assert (plan.path.name, plan.continues) == (f"00000-{NAME}", True)
    assert plan_run(tmp_path, config_of(), CONTENT, new=True).path.name == f"00001-{NAME}"
    assert os.listdir(tmp_path) == [f"00000-{NAME}"]


def test_run_of_before_classes_could_start_anew_is_continued(tmp_path):
    first = start(tmp_path)
    path = tmp_path / first / "training_options.json"
    record = json.loads(path.read_text())
    del record["identity"]["options"]["resume_classes"]
    for name in ("resume_classes", "resume_partial"):
        del record["config"][name]
    path.write_text(json.dumps(record))
    assert start(tmp_path) == first


# ---- locks, kills, two programs at once

HOLD = """
import json, sys, time
from tests.training.test_run_folder import CONTENT, choose_run, config_of
run = choose_run(sys.argv[1], config_of(**json.loads(sys.argv[2])), CONTENT)
print(json.dumps([run.path.name, run.notes]), flush=True)
time.sleep(100)
"""
ONCE = HOLD.replace("time.sleep(100)", "")
posix = pytest.mark.skipif(os.name != "posix", reason="sees processes as POSIX systems show them")


def hold(outdir, code=HOLD, **options):
    return subprocess.Popen([sys.executable, "-c", code, str(outdir), json.dumps(options)], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@posix
def test_choose_run_live_run_is_refused_and_a_killed_one_taken_over(tmp_path):
    process = hold(tmp_path)
    assert json.loads(process.stdout.readline()) == [f"00000-{NAME}", []]
    who = f"process {process.pid} on {socket.gethostname()}"
    with pytest.raises(UserError) as error:
        choose_run(tmp_path, config_of(), CONTENT)
    assert str(error.value) == (f"{tmp_path}/00000-{NAME} is being trained by {who}; expected no other process: wait "
                                "for it, stop it, or start another run with --new")
    assert start(tmp_path, new=True) == f"00001-{NAME}"
    assert sorted(os.listdir(tmp_path)) == [f"00000-{NAME}", f"00001-{NAME}"]
    shutil.rmtree(tmp_path / f"00001-{NAME}")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with choose_run(tmp_path, config_of(), CONTENT) as run:
        assert run.notes == (f"{run.path}: took over from {who}, which has ended",)
        assert (run.path.name, run.continues) == (f"00000-{NAME}", True)


@posix
def test_choose_run_programs_started_at_once_get_numbers_of_their_own(tmp_path):
    processes = [hold(tmp_path, ONCE, seed=seed) for seed in range(4)]
    results = [process.communicate() for process in processes]
    assert all(not err for _, err in results), results
    names = sorted(json.loads(out)[0] for out, _ in results)
    assert names == [f"{number:05d}-{NAME}" for number in range(4)]
    assert sorted(os.listdir(tmp_path)) == names


@posix
def test_choose_run_the_same_command_started_at_once_runs_once(tmp_path):
    processes = [hold(tmp_path) for _ in range(4)]
    errors = []
    while len(errors) < 3:
        for process in list(processes):
            if process.poll() is not None:
                errors.append(process.communicate()[1])
                processes.remove(process)
    assert all("is being trained by process" in error.splitlines()[-1] for error in errors)
    processes[0].kill()
    assert json.loads(processes[0].communicate()[0])[0] == f"00000-{NAME}"
    assert os.listdir(tmp_path) == [f"00000-{NAME}"]


@posix
def test_choose_run_killed_before_any_system_call_leaves_nothing_in_the_way(tmp_path):
    folders = set()
    for call in range(200):
        outdir = tmp_path / str(call)
        pid = os.fork()
        if pid == 0:
            die_at(call)
            choose_run(outdir, config_of(), CONTENT)
            os._exit(0)
        code = os.waitpid(pid, 0)[1]
        with choose_run(outdir, config_of(), CONTENT) as run:
            folders.add(run.path.name)
            assert sorted(os.listdir(run.path)) == LOCKED
            assert read_record(run.path).identity == identify(config_of(), CONTENT)
        assert os.listdir(outdir) == [f"00000-{NAME}"]
        if code == 0:
            break
    assert folders == {f"00000-{NAME}"}
    assert 8 <= call < 199  # all calls were reached


def die_at(call):
    """Let this process die before the call-th call that changes the file system."""
    left = [call]

    def counted(function):
        def run(*arguments, **named):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **named)
        return run

    # Not the writing of locks: one that names nobody is waited for, which has its own test.
    for name in ("open", "mkdir", "rename", "replace", "unlink", "fsync", "rmdir", "link"):
        setattr(os, name, counted(getattr(os, name)))


# Starts to write a file, prints a line, and continues when it reads one.
WRITER = """
import sys
from dnnlib.files import atomic_write
with atomic_write(sys.argv[1]) as file:
    file.write(b"half")
    file.flush()
    print("ready", flush=True)
    sys.stdin.readline()
    file.write(b" and whole")
"""


@contextlib.contextmanager
def writer_of(path):
    with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], cwd=ROOT, text=True, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def test_choose_run_removes_what_a_killed_process_left(tmp_path):
    start(tmp_path)
    folder = tmp_path / f"00000-{NAME}"
    kept = [".tmp-mine", "a.tmp", "fakes000000.png"]
    for name in kept:
        (folder / name).write_text("")
    with writer_of(folder / "a.bin") as process:
        process.kill()
        process.wait()
        assert len(os.listdir(folder)) == 5
        with choose_run(tmp_path, config_of(), CONTENT):
            assert sorted(os.listdir(folder)) == sorted([*kept, *LOCKED])
    assert "a.bin" not in os.listdir(folder)


def test_choose_run_leaves_what_a_living_process_is_writing(tmp_path):
    start(tmp_path)
    folder = tmp_path / f"00000-{NAME}"
    with writer_of(folder / "metric-fid50k_full.png") as process, choose_run(tmp_path, config_of(), CONTENT):
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.wait() == 0
    assert (folder / "metric-fid50k_full.png").read_bytes() == b"half and whole"
    assert sorted(os.listdir(folder)) == ["metric-fid50k_full.png", "training_options.json"]


@pytest.mark.parametrize("name", [".tmp-00000000-7-7-0123456789abcdef", ".tmp-0123456789abcdef"])
def test_choose_run_removes_what_another_host_left_once_it_is_silent(tmp_path, name):
    start(tmp_path)
    path = tmp_path / f"00000-{NAME}" / name  # of another host, or of an earlier version that named no owner
    path.write_text("")
    start(tmp_path)
    assert path.exists()
    before = path.stat().st_mtime - 3601
    os.utime(path, (before, before))
    start(tmp_path)
    assert not path.exists()


def test_require_held_after_a_takeover_is_a_line(tmp_path):
    with choose_run(tmp_path, config_of(), CONTENT) as run:
        run.require_held()
        lock = run.path / "lock.json"
        lock.write_text(f"filelock/2\npid=3\nhost=gpu07\nmode=lease\ntoken=ab\nduration={LEASE_SECONDS}\n")
        with pytest.raises(UserError) as error:
            run.require_held()
        message = (rf"{re.escape(str(lock))} was taken over by process 3 on gpu07 \(last heartbeat \d s ago\); "
                   "expected the lock of this process, which stops here: the process that holds the lock continues the "
                   "run")
        assert re.fullmatch(message, str(error.value))


# ---- output folders that cannot be used


def test_choose_run_outdir_that_is_a_file_is_a_line(tmp_path):
    path = tmp_path / "runs"
    path.write_text("")
    for function in (choose_run, plan_run):
        with pytest.raises(UserError) as error:
            function(path, config_of(), CONTENT)
        assert str(error.value) == f"--outdir={path} is a file; expected a folder: choose another name"
        with pytest.raises(UserError, match=r"cannot be used \(Not a directory: .*\)|is a file; expected a folder"):
            choose_run(path / "below", config_of(), CONTENT)
    assert path.read_text() == ""


@pytest.mark.parametrize("existing", [True, False])
def test_choose_run_outdir_that_cannot_be_written_is_a_line(tmp_path, monkeypatch, existing):
    outdir = tmp_path / "runs"
    if existing:
        outdir.mkdir()

    def refuse(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "open" if existing else "mkdir", refuse)
    with pytest.raises(UserError) as error:
        choose_run(outdir, config_of(), CONTENT)
    at = outdir / ".choosing-a-run.json" if existing else outdir
    assert str(error.value) == (f"--outdir={outdir} cannot be used (Permission denied: {at}); expected a writable "
                                "folder: choose another, or change its permissions")


def test_choose_run_a_full_disk_leaves_no_folder(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot be used \(No space left on device: "):
        choose_run(tmp_path, config_of(), CONTENT)
    assert os.listdir(tmp_path) == []


def test_choose_run_a_choosing_program_that_hangs_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("training.run_folder._CHOOSING_SECONDS", 0)
    with ProcessLock(tmp_path / ".choosing-a-run.json"), pytest.raises(UserError) as error:
        choose_run(tmp_path, config_of(), CONTENT)
    assert re.fullmatch(re.escape(f"a run in {tmp_path} is being chosen by process {os.getpid()} on ") + ".*"
                        + re.escape("; expected that to take a moment: try again, or remove "
                                    f"{tmp_path}/.choosing-a-run.json if that process is gone"), str(error.value))
