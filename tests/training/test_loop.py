"""The training loop itself, in this process: the golden run, exchange with other processes, and continued runs."""

import dataclasses
import errno
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from dnnlib.cli import UserError, run
from tests.helpers.failing_disk import FailingDisk
from tests.helpers.make_sets import make_set
from tests.helpers.parity_checks import compare_state, golden_inputs, golden_start
from tests.helpers.training_runs import flattened, state, statistics
from torch_utils.checkpoint import CheckpointPair
from torch_utils.device import Tuning
from torch_utils.distributed import Processes
from torch_utils.ops.compiled import auto_means
from training import loop, options
from training.config import RunSettings
from training.dataset import ImageDataset
from training.options import TrainOptions, resolve
from training.presets import choose_preset
from training.run_record import read_record
from training.snapshot import read_info

DATA = Path(__file__).parent.parent / "data"
ITERATIONS = 17  # of the golden run


def prepared(folder, size=16, **options):
    """Return configuration, settings and data set of a run: two classes, batch 8, each iteration a tick."""
    labels = [0, 1, 0, 1, 0, 1]
    make_set(folder / "set.zip", size=size, labels=labels, classes=["benign", "melanoma"])
    dataset = ImageDataset(folder / "set.zip", use_labels=True)
    config = resolve(TrainOptions(**{"cfg": "tiny", "cond": True, "batch": 8, "kimg": 1, "tick": 0.008, "snap": 1000,
                                     "workers": 0, "precision": "fp32", "metrics": (), **options}), dataset.facts())
    return config, RunSettings(outdir=str(folder / "runs"), data=str(dataset.path)), dataset


def stop_after(monkeypatch, iterations, saves_at=None):
    """Let another process ask to stop after some iterations, and to save a state at one; return what the loop asked."""
    asked = []

    def answer(_, flags):
        asked.append(list(flags))
        return [len(asked) == iterations, len(asked) == saves_at, False]

    monkeypatch.setattr(Processes, "any_each", answer)
    return asked


def test_loop_replays_the_golden_run(tmp_path, monkeypatch):
    # Only what the loop reads and draws is replaced: weights, images, labels, and the random inputs of the phases.
    state, step = golden_start(DATA)
    config, settings, dataset = prepared(tmp_path, size=32, aug="noaug")
    config = dataclasses.replace(config, step=step)
    arrays = np.load(DATA / "trajectory_32_c2.npz")
    measurements = []

    def compare(iterations):
        if f"iter{iterations}/pl_mean" in arrays.files:
            measurements.extend(compare_state(state, f"iter{iterations}", arrays))

    def batches(*_, **__):
        for iteration in range(ITERATIONS):
            compare(iteration)  # each is asked for when the one before was learned from
            inputs = golden_inputs(iteration)
            yield inputs.reals, inputs.labels
        yield None  # read ahead of the end, and not used

    monkeypatch.setattr(loop.TrainingState, "create", lambda *_: state)
    monkeypatch.setattr(loop, "iterate_batches", batches)
    monkeypatch.setattr(loop, "to_unit_range", lambda reals: reals)  # float64 in [-1, 1] as they come
    monkeypatch.setattr(loop, "draw_phases", lambda _, *, iteration, **__: golden_inputs(iteration).phases)
    stop_after(monkeypatch, ITERATIONS)
    assert loop.train(config, settings, dataset) == loop.EXIT_STOPPED

    compare(ITERATIONS)
    assert {name.partition("/")[0] for name, *_ in measurements} == {"iter1", "iter2", "iter5", "iter17"}
    assert [found for found in measurements if not found.error <= found.tolerance] == []
    found = lines_of(tmp_path / "runs")
    assert len(found) == ITERATIONS
    for iteration, line in enumerate(found):
        expected = golden_statistics(arrays, iteration)
        assert {name for name in line if name.startswith("Loss/")} == expected.keys()
        for name, mean in expected.items():
            assert line[name]["mean"] == pytest.approx(mean, rel=1e-8, abs=1e-8), (iteration, name)


def golden_statistics(arrays, iteration):
    """Return the mean of each statistic over the phases that report it, each of them for 8 images."""
    means = {}
    for key in arrays.files:
        if key.startswith("loss/") and not np.isnan(arrays[key][iteration]):
            means.setdefault(key.split("/", 2)[2], []).append(arrays[key][iteration])
    return {name: np.mean(values) for name, values in means.items()}


def lines_of(outdir):
    """Return the lines of stats.jsonl of the one run there."""
    folder, = outdir.glob("0*")
    return [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]


def test_run_that_goes_on_with_other_operators_says_so_in_its_log(tmp_path, monkeypatch):
    config, settings, dataset = prepared(tmp_path)
    logs = []
    for means in ("composed", "composed", "auto"):
        stop_after(monkeypatch, iterations=1)
        with auto_means(means):
            assert loop.train(config, settings, dataset) == loop.EXIT_STOPPED
        folder, = (tmp_path / "runs").glob("0*")
        logs.append((folder / "log.txt").read_text())
    line = f"{folder}: operators composed then and cpp now; results may differ from those of an uninterrupted run"
    assert [line in log for log in logs] == [False, False, True]
    assert "operators composed then" not in logs[1]


def test_loop_asks_the_others_once_an_iteration_and_saves_when_one_wishes(tmp_path, monkeypatch):
    config, settings, dataset = prepared(tmp_path)
    asked = stop_after(monkeypatch, iterations=3, saves_at=2)
    saved = []
    monkeypatch.setattr(loop.CheckpointPair, "save", lambda self, state: saved.append(state["training"]["iteration"]))
    assert loop.train(config, settings, dataset) == loop.EXIT_STOPPED
    assert asked == [[False, False, False]] * 3  # this process wished nothing, and could read its images
    assert saved == [1, 2, 3]  # the first is that of tick 0


def test_run_whose_classes_exchanged_their_names_is_not_continued(tmp_path, monkeypatch):
    """The class numbers and the computation are the same, but "melanoma" would be another class from here on."""
    config, settings, dataset = prepared(tmp_path)
    stop_after(monkeypatch, iterations=1)
    assert loop.train(config, settings, dataset) == loop.EXIT_STOPPED
    make_set(dataset.path, size=16, labels=[0, 1, 0, 1, 0, 1], classes=["melanoma", "benign"])
    with pytest.raises(UserError) as caught:
        loop.train(config, settings, ImageDataset(dataset.path, use_labels=True))
    assert str(caught.value) == (
        f"{tmp_path}/runs/00000-set-cond-tiny-kimg1-batch8 was trained on the classes benign, melanoma, but --data has "
        "the classes melanoma, benign; expected the same order: correct the classes in its dataset.json, or start "
        "another run with --new")


def test_loop_tells_the_others_what_it_wishes(tmp_path, monkeypatch):
    config, settings, dataset = prepared(tmp_path, state_minutes=1e-9)
    settings = dataclasses.replace(settings, max_hours=1e-9)
    asked = stop_after(monkeypatch, iterations=1)
    assert loop.train(config, settings, dataset) == loop.EXIT_STOPPED
    assert asked == [[True, True, False]]


def test_loop_refuses_to_start_with_another_number_of_processes_than_configured(tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    config, settings, dataset = prepared(tmp_path, gpus=2)
    message = ("the run has 1 processes, but gpus is 2; expected the same number: start it with train.py --gpus or "
               "torchrun")
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        loop.train(config, settings, dataset)
    assert not Path(settings.outdir).exists()


# ---- Disks that fail, and disks that are full


def run_in(outdir):
    folder, = outdir.glob("0*")
    return folder


def num_ticks(outdir):
    return sum(path.read_bytes().count(b"\n") for path in outdir.glob("0*/stats.jsonl"))


def stop_at(monkeypatch, outdir, ticks):
    """Let another process ask to stop after some ticks of the run, each of one iteration."""
    monkeypatch.setattr(Processes, "any_each", lambda _, flags: [num_ticks(outdir) == ticks, *flags[1:]])


def saved_in(outdir):
    """Return the newest state, flat, without what may differ between equal runs."""
    saved, message = CheckpointPair(run_in(outdir)).load()
    assert message is None
    saved.pop("seconds")
    saved["collected"] = {name: value for name, value in saved["collected"].items() if "Timing" not in name}
    return flattened(saved)


def refuse(monkeypatch, part, number=errno.ENOSPC, *, when=lambda: True):
    """Let renaming files to names with `part` fail."""
    replace = os.replace

    def refusing(source, target):
        if part in os.path.basename(target) and when():
            raise OSError(number, os.strerror(number))
        replace(source, target)

    monkeypatch.setattr(os, "replace", refusing)


@pytest.mark.parametrize("workers", [0, 1])
def test_loop_whose_disk_fails_saves_the_state_and_continues_bit_for_bit(tmp_path, monkeypatch, capsys, workers):
    (tmp_path / "whole").mkdir()
    with monkeypatch.context() as patch:
        stop_at(patch, tmp_path / "whole" / "runs", 6)
        assert loop.train(*prepared(tmp_path / "whole")) == loop.EXIT_STOPPED
    here, outdir = tmp_path / "broken", tmp_path / "broken" / "runs"
    here.mkdir()
    monkeypatch.setattr("dnnlib.files.RETRY_WAITS", (0, 0))
    with monkeypatch.context() as patch:
        FailingDisk(here / "set.zip", fails=lambda: num_ticks(outdir) >= 2).install(patch.setattr)
        capsys.readouterr()
        assert loop.train(*prepared(here, workers=workers)) == 75
    nimg = saved_in(outdir)["training/nimg"]
    assert nimg == 16 if workers == 0 else 16 <= nimg < 48  # a worker reads ahead
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("stopped")]
    assert len(lines) == 1
    assert lines[0].startswith(f"stopped after {nimg} images: {here / 'set.zip'}: 0000")
    assert lines[0].endswith(".png cannot be read (Input/output error, tried 3 times in 0 s): a disk or network "
                             "failure; the same command continues")
    stop_at(monkeypatch, outdir, 6)
    assert loop.train(*prepared(here, workers=workers)) == loop.EXIT_STOPPED
    found, expected = saved_in(outdir), saved_in(tmp_path / "whole" / "runs")
    assert found.keys() == expected.keys()
    assert expected["training/nimg"] == 48
    for name, value in found.items():
        assert torch.equal(value, expected[name]) if isinstance(value, torch.Tensor) else value == expected[name], name


def test_loop_whose_disk_fails_for_the_state_too_says_from_where_the_command_continues(tmp_path, monkeypatch, capsys):
    outdir = tmp_path / "runs"
    monkeypatch.setattr("dnnlib.files.RETRY_WAITS", (0,))
    with monkeypatch.context() as patch:
        FailingDisk(tmp_path / "set.zip", fails=lambda: num_ticks(outdir) >= 3).install(patch.setattr)
        refuse(patch, "training-state", errno.EIO, when=lambda: num_ticks(outdir) >= 3)
        assert loop.train(*prepared(tmp_path)) == 75
    assert capsys.readouterr().out.splitlines()[-1].endswith(
        "; the state could not be saved (Input/output error): the same command continues at image 8")
    assert saved_in(outdir)["training/nimg"] == 8  # that of tick 0


def test_loop_whose_disk_fails_before_the_first_image_begins_again(tmp_path, monkeypatch, capsys):
    given = prepared(tmp_path)
    monkeypatch.setattr("dnnlib.files.RETRY_WAITS", ())
    given[2].close()
    with monkeypatch.context() as patch:
        FailingDisk(tmp_path / "set.zip", fails=lambda: bool(list(tmp_path.glob("runs/0*")))).install(patch.setattr)
        assert loop.train(*given) == 75
    assert capsys.readouterr().out.splitlines()[-1].endswith("; the same command starts again at image 0")
    stop_at(monkeypatch, tmp_path / "runs", 1)
    assert loop.train(*prepared(tmp_path)) == loop.EXIT_STOPPED
    assert len(list((tmp_path / "runs").glob("0*"))) == 1


def test_loop_goes_on_without_scores_of_held_out_images_that_a_disk_cannot_read(tmp_path, monkeypatch, capsys):
    config, settings, dataset = prepared(tmp_path)
    make_set(tmp_path / "valid.zip", size=16, labels=[0, 1] * 3, classes=["benign", "melanoma"])
    monkeypatch.setattr("dnnlib.files.RETRY_WAITS", ())
    stop_at(monkeypatch, tmp_path / "runs", 1)
    settings = dataclasses.replace(settings, valid=str(tmp_path / "valid.zip"))
    FailingDisk(tmp_path / "valid.zip", fails=lambda: bool(list(tmp_path.glob("runs/0*/reals.png")))).install(
        monkeypatch.setattr)
    assert loop.train(config, settings, dataset) == loop.EXIT_STOPPED
    assert "warning: failed to score --valid: " in capsys.readouterr().out
    assert "Loss/scores/valid" not in lines_of(tmp_path / "runs")[0]


@pytest.mark.parametrize("options", [{"batch": 16}, {"batch": 24}, {"batch_gpu": 4}, {"batch": 12, "batch_gpu": 12}])
def test_scores_of_held_out_images_are_the_same_for_each_batch(tmp_path, monkeypatch, options):
    """The same images in the same groups: a discriminator that does not learn gives the same scores, bit for bit."""
    found = []
    for name, changes in (("a", {}), ("b", options)):
        (folder := tmp_path / name).mkdir()
        config, settings, dataset = prepared(folder, **changes)
        config = dataclasses.replace(config, d_adam=dataclasses.replace(config.d_adam, lr=1e-30))
        make_set(folder / "valid.zip", 10, size=16, images=range(50, 60), labels=[0, 1] * 5,
                 classes=["benign", "melanoma"])
        stop_at(monkeypatch, folder / "runs", 1)
        loop.train(config, dataclasses.replace(settings, valid=str(folder / "valid.zip")), dataset)
        line = lines_of(folder / "runs")[0]
        found.append((line["Loss/scores/valid"], line["Loss/signs/valid"]))
    assert found[0] == found[1]
    assert found[0][0]["num"] == 10
    assert found[0][0]["std"] > 0


def nearly_done(monkeypatch):
    """Let runs start one iteration before the end of --kimg=1."""
    create = loop.TrainingState.create

    def created(*arguments):
        state = create(*arguments)
        state.nimg = 992
        return state

    monkeypatch.setattr(loop.TrainingState, "create", created)


def measured(G, *, stop):
    return {"kid20_full": {"results": {"kid20_full": 0.5}}}


def metric_lines(outdir):
    return [json.loads(line) for line in (run_in(outdir) / "metric-kid20_full.jsonl").read_text().splitlines()]


def test_metric_line_names_no_network_file_that_could_not_be_written(tmp_path, monkeypatch, capsys):
    nearly_done(monkeypatch)
    snapshot = "network-snapshot-000001.safetensors"
    with monkeypatch.context() as patch:
        refuse(patch, "network-snapshot")
        assert loop.train(*prepared(tmp_path, metrics=("kid20_full",)), measured) == 75
    line, = metric_lines(tmp_path / "runs")
    assert (line["results"], line["snapshot_pkl"], line["network_sha256"]) == ({"kid20_full": 0.5}, None, None)
    assert line["snapshot_note"] == f"{snapshot} could not be written (No space left on device)"
    assert not (run_in(tmp_path / "runs") / snapshot).exists()
    # A run is not finished without its last network file: the same command writes it, and ends the run.
    assert capsys.readouterr().out.splitlines()[-1] == (
        "not finished after 1000 images: its last network snapshot could not be written (No space left on device); "
        "once that is fixed, the same command continues at image 1000")
    assert not read_record(run_in(tmp_path / "runs")).finished
    assert loop.train(*prepared(tmp_path, metrics=("kid20_full",)), measured) == loop.EXIT_DONE
    assert (run_in(tmp_path / "runs") / snapshot).exists()
    assert read_record(run_in(tmp_path / "runs")).finished
    assert len(metric_lines(tmp_path / "runs")) == 1


def test_metric_line_names_the_network_file_that_was_written(tmp_path, monkeypatch):
    nearly_done(monkeypatch)
    assert loop.train(*prepared(tmp_path, metrics=("kid20_full",)), measured) == loop.EXIT_DONE
    line, = metric_lines(tmp_path / "runs")
    assert line["snapshot_pkl"] == "network-snapshot-000001.safetensors"
    assert len(line["network_sha256"]) == 64
    assert "snapshot_note" not in line


def test_run_whose_last_state_cannot_be_saved_is_not_finished(tmp_path, monkeypatch, capsys):
    nearly_done(monkeypatch)
    with monkeypatch.context() as patch:
        refuse(patch, "training-state")
        assert loop.train(*prepared(tmp_path)) == 75
    assert capsys.readouterr().out.splitlines()[-1] == (
        "not finished after 1000 images: its last state could not be written (No space left on device); once that is "
        "fixed, the same command continues at image 0")
    assert not read_record(run_in(tmp_path / "runs")).finished
    assert loop.train(*prepared(tmp_path)) == loop.EXIT_DONE
    assert read_record(run_in(tmp_path / "runs")).finished


def test_run_whose_record_cannot_be_marked_is_not_finished(tmp_path, monkeypatch, capsys):
    nearly_done(monkeypatch)
    with monkeypatch.context() as patch:
        refuse(patch, "training_options", when=lambda: num_ticks(tmp_path / "runs") > 0)
        assert loop.train(*prepared(tmp_path)) == 75
    assert "its options could not be written (No space left on device)" in capsys.readouterr().out.splitlines()[-1]
    assert loop.train(*prepared(tmp_path)) == loop.EXIT_DONE


def test_stop_says_that_the_state_could_not_be_saved(tmp_path, monkeypatch, capsys):
    outdir = tmp_path / "runs"
    stop_at(monkeypatch, outdir, 2)
    refuse(monkeypatch, "training-state", when=lambda: num_ticks(outdir) >= 2)
    assert loop.train(*prepared(tmp_path)) == 75
    assert capsys.readouterr().out.splitlines()[-1] == (
        "stopped after 16 images (another process was asked to stop); the state could not be saved (No space left on "
        "device): the same command continues at image 8")


# ---- continued runs: 200 images per iteration, so that a thousand are five iterations; networks of four channels


@pytest.fixture
def small_presets(monkeypatch):
    monkeypatch.setattr(options, "choose_preset", lambda *arguments: dataclasses.replace(
        choose_preset(*arguments), channel_max=4, latent_dim=4))


def train_for(folder, kimg, **options):
    """Train to `kimg`, with ticks of 600 images after the first iteration, and a network snapshot every second tick."""
    config, settings, dataset = prepared(folder, size=8, **{"batch": 200, "tick": 0.6, "snap": 2, "kimg": kimg,
                                                            "augpipe": "blit", **options})
    return loop.train(config, settings, dataset)


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def kimgs(folder):
    return [line["Progress/kimg"]["mean"] for line in statistics(folder)]


def test_loop_finished_run_continued_by_larger_kimg_is_bit_for_bit_one_run_of_that_length(tmp_path, small_presets,
                                                                                         capsys):
    (tmp_path / "whole").mkdir()
    (tmp_path / "chain").mkdir()
    assert train_for(tmp_path / "whole", 3) == loop.EXIT_DONE
    for kimg in (1, 2, 3):
        assert train_for(tmp_path / "chain", kimg) == loop.EXIT_DONE
    whole, chain = tmp_path / "whole/runs/00000-set-cond-tiny-kimg3-batch200-blit", \
        tmp_path / "chain/runs/00000-set-cond-tiny-kimg1-batch200-blit"
    assert [path.name for path in chain.parent.iterdir()] == [chain.name]
    ended, continued = state(whole), state(chain)
    assert [continued.pop(name) for name in ("reported_ticks", "extra_ticks", "ends")] == [7, 2, [1000, 2000, 3000]]
    assert [ended.pop(name) for name in ("reported_ticks", "extra_ticks", "ends")] == [6, 1, [3000]]
    assert ended.keys() == continued.keys()
    assert ended["training/augment/p"] > 0
    for name, value in ended.items():
        same = torch.equal(value, continued[name]) if isinstance(value, torch.Tensor) else value == continued[name]
        assert same, name
    # The tick that the first end cut short is an extra one; all others end where they would have.
    assert kimgs(whole) == [0.2, 0.8, 1.4, 2.0, 2.6, 3.0]
    assert kimgs(chain) == [0.2, 0.8, 1.0, 1.4, 2.0, 2.6, 3.0]
    for index, other in ((0, 0), (1, 1), (4, 3), (5, 4), (6, 5)):
        lines = [dict(statistics(folder)[number]) for folder, number in ((chain, index), (whole, other))]
        assert [line.pop("Progress/tick")["mean"] for line in lines] == [index, other]
        assert lines[0] == lines[1]
    assert (whole / "network-snapshot-000003.safetensors").read_bytes() != b""
    capsys.readouterr()

    before = files_of(tmp_path / "chain")
    for kimg in (3, 2):
        assert train_for(tmp_path / "chain", kimg) == loop.EXIT_DONE
        assert capsys.readouterr() == (f"already finished at 3 kimg: {chain}; --new starts another run\n", "")
    assert files_of(tmp_path / "chain") == before
    assert json.loads((chain / "training_options.json").read_text())["config"]["kimg"] == 3


def test_loop_continued_run_keeps_the_network_file_of_its_first_end(tmp_path, small_presets, monkeypatch):
    # Of ticks of 1,000 images behind the first iteration one ends at 1,200: in the thousand of the end, with its names.
    fakes = []
    monkeypatch.setattr("training.run_output.save_fakes", lambda path, *_, **__: fakes.append(path.name))
    assert train_for(tmp_path, 1, tick=1, snap=1) == loop.EXIT_DONE
    folder, = (tmp_path / "runs").iterdir()
    network = folder / "network-snapshot-000001.safetensors"
    content = network.read_bytes()
    assert train_for(tmp_path, 3, tick=1, snap=1) == loop.EXIT_DONE
    assert kimgs(folder) == [0.2, 1.0, 1.2, 2.2, 3.0]
    assert network.read_bytes() == content
    assert read_info(network)["kimg"] == 1.0
    assert [path.stem[-1] for path in sorted(folder.glob("network-*"))] == list("0123")
    assert fakes == ["fakes_init.png", "fakes000000.png", "fakes000001.png", "fakes000002.png", "fakes000003.png"]


def test_loop_continued_run_writes_the_network_file_that_its_first_end_could_not(tmp_path, small_presets, monkeypatch):
    with monkeypatch.context() as patch:
        refuse(patch, "network-snapshot", when=lambda: num_ticks(tmp_path / "runs") >= 2)
        assert train_for(tmp_path, 1, tick=1, snap=1) == loop.EXIT_STOPPED
    assert train_for(tmp_path, 3, tick=1, snap=1) == loop.EXIT_DONE
    network, = (tmp_path / "runs").glob("*/network-snapshot-000001.safetensors")
    assert read_info(network)["kimg"] == 1.2


def test_loop_run_without_the_state_that_it_had_is_not_begun_anew(tmp_path, small_presets, monkeypatch):
    stop_after(monkeypatch, iterations=5)
    assert train_for(tmp_path, 9) == loop.EXIT_STOPPED
    folder, = (tmp_path / "runs").iterdir()
    for path in folder.glob("training-state*"):
        path.unlink()
    before = files_of(tmp_path / "runs")
    with pytest.raises(UserError) as error:
        train_for(tmp_path, 9)
    assert str(error.value) == (f"{folder} has trained 2 ticks, but its resumable state is missing; expected "
                                "training-state.pt or training-state.prev.pt: copy one back, or start another run "
                                "with --new")
    assert {name: content for name, content in files_of(tmp_path / "runs").items() if "options" not in name} == {
        name: content for name, content in before.items() if "options" not in name}


def test_loop_run_whose_states_are_all_damaged_is_a_line(tmp_path, small_presets, monkeypatch):
    stop_after(monkeypatch, iterations=1)
    assert train_for(tmp_path, 9) == loop.EXIT_STOPPED
    folder, = (tmp_path / "runs").iterdir()
    for path in folder.glob("training-state*"):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"training-state.pt is damaged: .* or start from scratch \(--new does so\)$"):
        train_for(tmp_path, 9)


def test_loop_new_run_says_on_standard_error_and_in_its_log_what_it_does_not_continue(tmp_path, small_presets,
                                                                                      monkeypatch, capsys):
    stop_after(monkeypatch, iterations=1)
    assert train_for(tmp_path, 9) == loop.EXIT_STOPPED
    stop_after(monkeypatch, iterations=1)
    assert train_for(tmp_path, 9, gamma=3) == loop.EXIT_STOPPED  # another automatic name
    first, second = sorted((tmp_path / "runs").iterdir())
    assert second.name == "00001-set-cond-tiny-gamma3-kimg9-batch200-blit"
    error = capsys.readouterr().err
    assert error == (f"{first} is unfinished and not continued: step.loss.gamma is 0.0008 there and 3 here\n")
    assert error in (second / "log.txt").read_text()


@pytest.fixture
def command(tmp_path, small_presets, monkeypatch):
    """The arguments of a command for train.py; the allocator of the test process is not changed."""
    monkeypatch.setattr("training.command.tune_malloc", lambda wanted: Tuning(is_done=False, reason="a test"))
    make_set(tmp_path / "set.zip", size=8)
    return [f"--outdir={tmp_path / 'runs'}", f"--data={tmp_path / 'set.zip'}", "--cfg=tiny", "--batch=200", "--kimg=1",
            "--augpipe=blit", "--tick=0.4", "--metrics=none", "--device=cpu", "--workers=0", "--state-minutes=1e-9"]


def run_out_of_memory(monkeypatch, largest, error, after=3):
    """Let passes of more than `largest` images run out of memory, after some iterations."""
    step, calls = loop.train_step, []

    def limited(state, inputs, config, processes, proximal):
        calls.append(config.micro_batch)
        if config.micro_batch > largest and len(calls) > after:
            raise error
        return step(state, inputs, config, processes, proximal)

    monkeypatch.setattr(loop, "train_step", limited)
    return calls


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: 9 bytes")])
def test_out_of_memory_advice_continues_the_run_from_its_last_state(command, tmp_path, monkeypatch, capsys, error):
    run_out_of_memory(monkeypatch, 100, error)
    assert run(train.main, command) == 4
    advice = capsys.readouterr().err
    assert advice == ("error: out of memory with --batch-gpu=200; the same command with --batch-gpu=100 continues the "
                      "run from its last state: the same batch in smaller passes\n")
    calls = run_out_of_memory(monkeypatch, 100, error)
    assert run(train.main, [*command, *re.findall(r"with (--batch-gpu=\d+) continues", advice)]) == 0
    folder, = (tmp_path / "runs").iterdir()
    assert calls == [100, 100]  # of five iterations three were done
    found = json.loads((folder / "training_options.json").read_text())
    assert found["passes"] == [{"from_nimg": 0, "batch_gpu": 200}, {"from_nimg": 600, "batch_gpu": 100}]
    output = capsys.readouterr().out
    line = ("100 images per pass from image 600 on, 200 before: the same batch, but other minibatch standard deviation "
            "groups and other images for path lengths\n")
    assert line in output
    assert line in (folder / "log.txt").read_text()

    # The command of before, as the next job of a chain holds it, keeps to what fits.
    assert run(train.main, [argument.replace("kimg=1", "kimg=2") for argument in command]) == 0
    assert calls == [100] * 7
    assert f"{folder}: 100 images per pass, as the run had before (--batch-gpu changes this)" in \
        capsys.readouterr().out


def test_out_of_memory_with_new_advises_to_leave_it_out(command, monkeypatch, capsys):
    run_out_of_memory(monkeypatch, 100, MemoryError(), after=0)
    assert run(train.main, [*command, "--new"]) == 4
    assert "; the same command (without --new) with --batch-gpu=100 continues the run" in capsys.readouterr().err


def test_out_of_memory_before_the_first_image_has_the_same_exit_code(command, monkeypatch, capsys):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(loop.TrainingState, "create", fail)
    assert run(train.main, command) == 4
    assert capsys.readouterr().err.startswith("error: out of memory before the first image, ")


def test_steps_that_keep_failing_advise_what_loses_nothing(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loop.SkippedSteps, "add", lambda self, result: "Gmain had a loss that is not finite")
    assert run(train.main, command) == loop.EXIT_DIVERGED
    assert "; a larger --gamma or --precision=fp32 starts another run\n" in capsys.readouterr().out
    failures = iter([None])
    monkeypatch.setattr(loop.SkippedSteps, "add", lambda self, result: next(failures, "Gmain had a loss"))
    assert run(train.main, command) == loop.EXIT_DIVERGED
    folder, = (tmp_path / "runs").iterdir()
    found = re.search(r"stopped: Gmain had a loss; the last state was saved before that, and the same command tries "
                      r"again from there; a larger --gamma or --precision=fp32 starts another run; (--resume=\S+) "
                      "starts it from the weights learned here\n", capsys.readouterr().out)
    assert found[1] == f"--resume={folder}/network-snapshot-000000.safetensors"
    assert run(train.main, [*command, "--gamma=100", found[1], "--dry-run"]) == 0
