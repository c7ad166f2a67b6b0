"""Metrics within the time limit of a run: aborted, postponed, caught up on, and failing with or without the GPU."""

import dataclasses
import itertools
import json
import math
import os
import signal
import unittest.mock
from pathlib import Path

import pytest
import torch

from dnnlib.cli import StopRequest
from dnnlib.files import sha256_of
from dnnlib.lines import read_lines, to_line
from tests.helpers.make_sets import make_set
from tests.helpers.training_runs import flattened, statistics
from torch_utils.checkpoint import CheckpointPair
from torch_utils.device import lost_device
from torch_utils.distributed import OtherProcessFailed
from training import loop, options
from training.config import BestValue, RunSettings
from training.dataset import ImageDataset
from training.options import TrainOptions, resolve
from training.presets import choose_preset
from training.run_record import read_record
from training.step import StepResult

METRIC = "kid20_full"
NIMG = [200, 800, 1400, 2000, 2600, 3000]  # of the networks that `train` writes; those of a thousand have one name


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Networks of four channels, and a step that does not learn but changes the generator's weights each time."""
    def step(state, inputs, config, processes, proximal):
        with torch.no_grad():
            for parameter in state.G_ema.parameters():
                parameter += math.cos(state.nimg)
        state.nimg += config.batch
        state.iteration += 1
        return StepResult(stats={"Gmain": {}})

    monkeypatch.setattr(options, "choose_preset", lambda *arguments: dataclasses.replace(
        choose_preset(*arguments), channel_max=4, latent_dim=4))
    monkeypatch.setattr(loop, "train_step", step)
    images = torch.zeros(200, 3, 8, 8, dtype=torch.uint8), torch.zeros(200, 0)
    monkeypatch.setattr(loop, "iterate_batches", lambda *_, **__: itertools.repeat(images))
    monkeypatch.setattr("training.run_report.save_curves", lambda *_: None)


def train(folder, evaluate, kimg=3, snap=1, **settings):
    """Train or continue a run with 200 images per iteration, and a network snapshot every 600."""
    folder.mkdir(exist_ok=True)
    if not (folder / "set.zip").exists():
        make_set(folder / "set.zip", labels=[0, 1] * 3)
    dataset = ImageDataset(folder / "set.zip")
    config = resolve(TrainOptions(cfg="tiny", batch=200, kimg=kimg, tick=0.6, snap=snap, augpipe="blit", workers=0,
                                  precision="fp32", metrics=(METRIC,)), dataset.facts())
    settings = RunSettings(outdir=str(folder / "runs"), data=str(dataset.path), **settings)
    return loop.train(config, settings, dataset, evaluate)


class Metric:
    """Computes a number from the weights; `at` decides what happens in a call, by its number from 1 on."""

    def __init__(self, at=None, seconds=1.0, **fields):
        self.at, self.seconds, self.fields, self.calls = at or {}, seconds, fields, 0

    def __call__(self, G, *, stop):
        self.calls += 1
        happens = self.at.get(self.calls)
        if isinstance(happens, signal.Signals):
            os.kill(os.getpid(), happens)
        elif happens is not None:
            raise happens
        if stop():
            raise RuntimeError("given up")
        value = sum(float(tensor.double().sum()) for tensor in G.parameters())
        return {METRIC: {"results": {METRIC: value}, "total_time": self.seconds, **self.fields}}


def run_in(folder):
    found, = (folder / "runs").iterdir()
    return found


def lines(folder):
    return [{name: value for name, value in line.items() if name != "timestamp"}
            for line in read_lines(run_in(folder) / f"metric-{METRIC}.jsonl")]


def state_in(folder):
    saved, message = CheckpointPair(run_in(folder)).load()
    assert message is None
    saved.pop("seconds")
    saved.pop("missing_metrics")  # those that are made up with a network are so after its state is saved
    return flattened(saved)


@pytest.fixture
def whole(tmp_path):
    """An uninterrupted run."""
    assert train(tmp_path / "whole", Metric()) == loop.EXIT_DONE
    assert [line["nimg"] for line in lines(tmp_path / "whole")] == NIMG
    return tmp_path / "whole"


def assert_equal_runs(first, second):
    assert lines(first) == lines(second)
    assert statistics(run_in(first)) == statistics(run_in(second))
    for pattern in ("*.safetensors", "fakes*.png"):
        found = [{path.name: sha256_of(path) for path in run_in(folder).glob(pattern)} for folder in (first, second)]
        assert found[0] == found[1]
    expected, states = state_in(first), state_in(second)
    assert states.keys() == expected.keys()
    for name, value in expected.items():
        same = torch.equal(value, states[name]) if isinstance(value, torch.Tensor) else value == states[name]
        assert same, name


@pytest.mark.parametrize("number", [1, 3, 6])  # of the first network, one between, and that of the end
def test_signal_during_metrics_gives_them_up_with_a_state_and_they_are_made_up(whole, tmp_path, capsys, number):
    here, nimg = tmp_path / "here", NIMG[number - 1]
    capsys.readouterr()
    assert train(here, Metric({number: signal.SIGUSR1})) == loop.EXIT_STOPPED
    out = capsys.readouterr().out.splitlines()
    assert out[-2] == (f"metrics at kimg {nimg / 1000:.1f} are postponed (SIGUSR1 received): they are computed with "
                       f"the next network snapshot, or by calc_metrics.py --run={run_in(here)}")
    assert out[-1] == (f"stopped after {nimg} images (SIGUSR1 received); the same command " + (
        "computes the metrics at kimg 3.0" if nimg == 3000 else "continues"))
    assert state_in(here)["training/nimg"] == nimg
    assert [line["nimg"] for line in lines(here)] == NIMG[:number - 1]
    metric = Metric()
    assert train(here, metric) == loop.EXIT_DONE
    assert metric.calls == 7 - number
    assert_equal_runs(whole, here)


@pytest.mark.parametrize("number", [1, 2, 5, 6])
def test_run_killed_during_metrics_ends_as_an_unbroken_one(whole, tmp_path, number):
    here = tmp_path / "here"
    with pytest.raises(KeyboardInterrupt):
        train(here, Metric({number: KeyboardInterrupt()}))
    assert train(here, Metric()) == loop.EXIT_DONE
    assert_equal_runs(whole, here)


def test_metrics_that_would_not_end_in_time_are_left_out_with_a_line(tmp_path, capsys, monkeypatch):
    here = tmp_path / "here"
    monkeypatch.setattr(StopRequest, "seconds_left", lambda self: 3600.0)
    metric = Metric(seconds=7200)
    assert train(here, metric, max_hours=1) == loop.EXIT_STOPPED
    assert metric.calls == 1  # how long it takes is not known before
    out = capsys.readouterr().out
    for nimg in NIMG[1:]:
        assert (f"metrics at kimg {nimg / 1000:.1f} are postponed (metrics took at least 2:00:00 the last time, and "
                "1:00:00 of --max-hours is left): they are computed with the next network snapshot, or by "
                f"calc_metrics.py --run={run_in(here)}\n") in out
    assert out.splitlines()[-1].endswith("; the same command computes the metrics at kimg 0.8, 1.4, 2.6, 3.0")
    assert ("metrics at kimg 2.000 were not computed (metrics took at least 2:00:00 the last time, and 1:00:00 of "
            "--max-hours is left): another network overwrites network-snapshot-000002.safetensors\n") in out
    assert not read_record(run_in(here)).finished

    # A command that has no more time than they take leaves them, and the run is over.
    assert train(here, metric, max_hours=1) == loop.EXIT_DONE
    assert capsys.readouterr().out.splitlines()[-2] == (
        "warning: the metrics at kimg 0.8, 1.4, 2.6, 3.0 were not computed; compute them with calc_metrics.py "
        f"--run={run_in(here)}")
    assert metric.calls == 1
    assert read_record(run_in(here)).finished


def test_metrics_are_made_up_with_the_next_network_the_newest_first(tmp_path):
    here, seen = tmp_path / "here", []
    assert train(here, Metric(seconds=7200), max_hours=1) == loop.EXIT_STOPPED

    class Recorder(Metric):
        def __call__(self, G, *, stop):
            seen.append(sum(float(tensor.double().sum()) for tensor in G.parameters()))
            return super().__call__(G, stop=stop)

    assert train(here, Recorder(), kimg=5) == loop.EXIT_DONE
    found = lines(here)
    assert [line["nimg"] for line in found] == [200, 800, 1400, 2600, 3000, 4400, 5000]  # 3.2 and 3.8 are named as 3.0
    values = {line["results"][METRIC]: line["nimg"] for line in found}
    assert [values[value] for value in seen] == [4400, 3000, 2600, 1400, 800, 5000]
    for line in found[1:]:
        assert line["network_sha256"] == sha256_of(run_in(here) / line["snapshot_pkl"])


def test_metrics_that_did_not_end_in_a_commands_time_do_not_take_that_of_the_next(tmp_path, monkeypatch, capsys):
    here, left = tmp_path / "here", iter([40.0, 30.0, 30.0])
    monkeypatch.setattr(StopRequest, "seconds_left", lambda self: next(left, 30.0))
    now = [0.0]
    monkeypatch.setattr("training.snapshot_metrics.time.monotonic", lambda: now[0])

    class Long(Metric):
        def __call__(self, G, *, stop):
            now[0] += 40
            return super().__call__(G, stop=stop)

    assert train(here, Long({1: signal.SIGTERM})) == loop.EXIT_STOPPED
    metric = Long()
    assert train(here, metric) == loop.EXIT_STOPPED
    assert metric.calls == 0
    assert ("metrics at kimg 0.8 are postponed (metrics took at least 0:40 the last time, and 0:30 of --max-hours is "
            "left): ") in capsys.readouterr().out
    assert train(here, metric) == loop.EXIT_DONE  # nothing else was done, and there is no time
    assert metric.calls == 0
    left = itertools.repeat(50.0)
    assert train(here, metric, kimg=5) == loop.EXIT_DONE
    assert metric.calls == 4 + 2  # those of four network files that are there, and of two new ones


def test_metrics_that_calc_metrics_computed_are_not_made_up(tmp_path):
    here = tmp_path / "here"
    assert train(here, Metric(seconds=7200), kimg=2, max_hours=1) == loop.EXIT_STOPPED
    path = run_in(here) / f"metric-{METRIC}.jsonl"
    for kimg, seed in ((1.4, None), (0.8, 7)):  # the latter is of other latents than the run's
        snapshot = f"network-snapshot-{int(kimg):06d}.safetensors"
        with open(path, "ab") as file:
            file.write(to_line({"results": {METRIC: 1.0}, "snapshot_pkl": snapshot, "kimg": kimg, "seed": seed}))
    metric = Metric()
    assert train(here, metric, kimg=2) == loop.EXIT_DONE
    assert metric.calls == 2
    assert [line.get("nimg", line.get("kimg")) for line in lines(here)] == [200, 1.4, 0.8, 800, 2000]


def test_metrics_of_classes_that_calc_metrics_left_out_are_made_up(tmp_path):
    """A line without classes is not what a run with --per-class would have written."""
    here = tmp_path / "here"
    assert train(here, Metric(seconds=7200, per_class={"nv": {}}), kimg=2, max_hours=1) == loop.EXIT_STOPPED
    for kimg, fields in ((1.4, {"per_class": {"nv": {}}}), (0.8, {})):
        with open(run_in(here) / f"metric-{METRIC}.jsonl", "ab") as file:
            file.write(to_line({"results": {METRIC: 1.0}, "kimg": kimg, **fields,
                                "snapshot_pkl": f"network-snapshot-{int(kimg):06d}.safetensors"}))
    metric = Metric(per_class={"nv": {}})
    assert train(here, metric, kimg=2) == loop.EXIT_DONE
    assert metric.calls == 2
    assert [line.get("nimg", line.get("kimg")) for line in lines(here)] == [200, 1.4, 0.8, 800, 2000]


@pytest.mark.parametrize("error", [
    RuntimeError("no\nluck"), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"), OSError("gone")])
def test_metric_that_fails_is_a_line_and_training_goes_on(tmp_path, capsys, error):
    assert train(tmp_path / "here", Metric({2: error})) == loop.EXIT_DONE
    text = " ".join(str(error).split())
    assert f"warning: metrics failed ({type(error).__name__}: {text}); training continues\n" in capsys.readouterr().out
    assert [line["nimg"] for line in lines(tmp_path / "here")] == [200, *NIMG[2:]]


def test_gpu_that_fails_in_metrics_ends_the_run_and_the_same_command_continues(whole, tmp_path, capsys):
    here = tmp_path / "here"
    error = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(torch.AcceleratorError):
        train(here, Metric({2: error}), new=True)
    line = ("stopped: the GPU failed while computing metrics (AcceleratorError: CUDA error: an illegal memory access "
            "was encountered); the same command (without --new) continues")
    assert capsys.readouterr().out.splitlines()[-1] == line
    assert line in (run_in(here) / "log.txt").read_text()
    assert state_in(here)["training/nimg"] == 800
    assert train(here, Metric()) == loop.EXIT_DONE
    assert_equal_runs(whole, here)


@pytest.mark.parametrize(("error", "lost"), [
    (RuntimeError("damaged"), False), (torch.AcceleratorError("CUDA error: uncorrectable ECC error"), True)])
def test_network_that_cannot_be_loaded_to_make_up_metrics_ends_the_run_where_the_gpu_fails(
        tmp_path, capsys, monkeypatch, error, lost):
    here = tmp_path / "here"
    assert train(here, Metric({2: signal.SIGTERM})) == loop.EXIT_STOPPED
    with monkeypatch.context() as patch:
        patch.setattr("training.snapshot_metrics.load_network", unittest.mock.Mock(side_effect=error))
        if lost:
            with pytest.raises(torch.AcceleratorError):
                train(here, Metric())
        else:
            assert train(here, Metric()) == loop.EXIT_DONE
    said, what = capsys.readouterr().out, f"({type(error).__name__}: {error}); "
    assert (f"stopped: the GPU failed while computing metrics {what}the same command continues\n" if lost else
            f"warning: failed to compute metrics at kimg 0.8 {what}training continues\n") in said
    if lost:
        assert train(here, Metric()) == loop.EXIT_DONE
    assert [line["nimg"] for line in lines(here)] == (NIMG if lost else [NIMG[0], *NIMG[2:]])


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:1000])])
def test_network_that_is_gone_or_damaged_before_metrics_are_made_up_is_named(tmp_path, capsys, damage):
    here = tmp_path / "here"
    assert train(here, Metric({2: signal.SIGTERM})) == loop.EXIT_STOPPED
    path = sorted(run_in(here).glob("network-snapshot-*"))[-1]
    damage(path)
    assert train(here, Metric()) == loop.EXIT_DONE
    assert (f"warning: metrics at kimg 0.8 were not computed: {path.name} is missing, damaged, or another network\n"
            in capsys.readouterr().out)
    assert [line["nimg"] for line in lines(here)] == [NIMG[0], *NIMG[2:]]


@pytest.mark.parametrize(("error", "expected"), [
    (torch.AcceleratorError("CUDA error: device-side assert triggered\nCUDA kernel errors might be"), True),
    (RuntimeError("CUDA error: unspecified launch failure"), True),
    (RuntimeError("CUDA error: an illegal memory access was encountered"), True),
    (RuntimeError("CUDA error: out of memory"), False), (torch.OutOfMemoryError("CUDA out of memory"), False),
    (OtherProcessFailed("AcceleratorError: CUDA error: device-side assert triggered"), False),
    (RuntimeError("CUDA error: invalid argument"), False), (ValueError("device-side assert triggered"), False)])
def test_lost_device_is_recognized_by_its_words(error, expected):
    assert lost_device(error, torch.device("cpu")) == expected


@pytest.mark.parametrize(("found", "expected"), [
    (None, False), (RuntimeError("CUDA error: something new"), True),
    (torch.OutOfMemoryError("CUDA out of memory"), False)])
def test_lost_device_is_recognized_by_a_gpu_that_computes_no_more(monkeypatch, found, expected):
    def synchronize(device):
        if found is not None:
            raise found

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch, "zeros", lambda *_, device: torch.ones(1))
    assert lost_device(RuntimeError("cuBLAS has words of its own"), torch.device("cuda")) == expected


# ---- --keep and --keep-best


def names_in(folder):
    return [int(path.stem[-6:]) for path in sorted(run_in(folder).glob("network-*"))]


BEST = BestValue(metric=METRIC, key=METRIC, lower_is_better=True)


class Values(Metric):
    """Computes the given values, one after the other."""

    def __init__(self, *values, at=None):
        super().__init__(at)
        self.values = list(values)

    def __call__(self, G, *, stop):
        found = super().__call__(G, stop=stop)
        return {METRIC: {**found[METRIC], "results": {METRIC: self.values.pop(0)}}}


def test_keep_leaves_the_newest_network_files_and_all_else(tmp_path, capsys):
    here = tmp_path / "here"
    assert train(here, None, kimg=5, keep=2) == loop.EXIT_DONE
    assert names_in(here) == [4, 5]
    assert len(list(run_in(here).glob("fakes00*.png"))) == 6
    log = (run_in(here) / "log.txt").read_text()
    assert [line[20:] for line in log.splitlines() if " removed " in line] == [
        f"removed network-snapshot-00000{number}.safetensors (--keep=2)" for number in range(4)]


@pytest.mark.parametrize(("better", "expected"), [(True, [1, 5]), (False, [3, 5])])
def test_keep_best_alone_leaves_the_best_and_the_newest(tmp_path, better, expected):
    here = tmp_path / "here"
    best = BestValue(metric=METRIC, key=METRIC, lower_is_better=better)
    values = Values(5.0, 4.0, 1.0, 4.0, 3.0, 6.0, 6.0, float("nan"), 2.0)  # at 1.4 kimg the lowest; 3.2 and 3.8 highest
    assert train(here, values, kimg=5, keep_best=best) == loop.EXIT_DONE
    assert [line["snapshot_pkl"][-13] for line in lines(here)] == list("001223345")
    assert names_in(here) == expected
    assert len(lines(here)) == 9  # those of files that are gone stay


def test_network_file_whose_metrics_are_to_be_made_up_stays_until_they_are(tmp_path):
    here = tmp_path / "here"
    assert train(here, Metric(seconds=7200), kimg=5, keep=1, keep_best=BEST, max_hours=1) == loop.EXIT_STOPPED
    assert names_in(here) == [0, 1, 2, 3, 4, 5]
    assert train(here, Values(5.0, 4.0, 2.0, 3.0, 7.0, 8.0), kimg=5, keep=1, keep_best=BEST) == loop.EXIT_DONE
    assert names_in(here) == [3, 5]  # 5, 4, 3 were computed in this order


@pytest.mark.parametrize("number", [2, 4, 6])
def test_keep_leaves_the_same_files_whether_the_run_was_stopped_or_not(tmp_path, number):
    best = dataclasses.replace(BEST, lower_is_better=False)
    for name, at in (("whole", {}), ("broken", {number: signal.SIGTERM})):
        metric = Metric(at)
        codes = [train(tmp_path / name, metric, keep=1, keep_best=best) for _ in range(1 + bool(at))]
        assert codes[-1] == loop.EXIT_DONE
    assert_equal_runs(tmp_path / "whole", tmp_path / "broken")
    assert len(names_in(tmp_path / "whole")) == 2


def test_keep_leaves_the_network_files_of_earlier_ends(tmp_path):
    for kimg in (1, 2, 5):
        assert train(tmp_path / "here", None, kimg=kimg, keep=1) == loop.EXIT_DONE
    assert names_in(tmp_path / "here") == [1, 2, 5]


def test_keep_leaves_a_network_file_that_another_run_began_from(tmp_path):
    here = tmp_path / "here"
    assert train(here, None, kimg=1, snap=1) == loop.EXIT_DONE
    first = run_in(here)
    other = first.with_name("00001-other")
    other.mkdir()
    record = json.loads((first / "training_options.json").read_text())
    record["config"].update(resume="relative/to/another/folder.safetensors", seed=9)
    record["identity"].update(resume=sha256_of(first / "network-snapshot-000000.safetensors"))
    (other / "training_options.json").write_text(json.dumps(record))
    assert train(here, None, kimg=5, keep=1) == loop.EXIT_DONE
    assert sorted(path.stem[-1] for path in first.glob("network-*")) == ["0", "1", "5"]


def test_keep_removes_nothing_while_the_newest_file_cannot_be_written(tmp_path, monkeypatch):
    replace = os.replace

    def refusing(source, target):
        if os.path.basename(target) > "network-snapshot-000001" and "network" in os.path.basename(target):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refusing)
    assert train(tmp_path / "here", None, keep=1) == loop.EXIT_STOPPED
    assert names_in(tmp_path / "here") == [0]


def test_metrics_of_a_replaced_network_that_fail_are_not_tried_again(tmp_path, capsys):
    here = tmp_path / "here"
    assert train(here, Metric({1: signal.SIGTERM})) == loop.EXIT_STOPPED
    assert train(here, Metric({1: RuntimeError("no luck")})) == loop.EXIT_DONE  # at 0.8 kimg, before its network
    assert "warning: metrics failed (RuntimeError: no luck); training continues\n" in capsys.readouterr().out
    assert [line["nimg"] for line in lines(here)] == NIMG[1:]


def test_metrics_without_a_network_file_are_not_made_up(tmp_path, monkeypatch, capsys):
    here = tmp_path / "here"
    with monkeypatch.context() as patch:
        replace = os.replace

        def refusing(source, target):
            if os.path.basename(target).startswith("network-snapshot-000000"):
                raise OSError(28, "No space left on device")
            replace(source, target)

        patch.setattr(os, "replace", refusing)
        assert train(here, Metric({1: signal.SIGTERM})) == loop.EXIT_STOPPED
    assert ("metrics at kimg 0.200 were not computed (SIGTERM received): its network snapshot could not be written\n"
            ) in capsys.readouterr().out
    assert train(here, Metric()) == loop.EXIT_DONE
    assert [line["nimg"] for line in lines(here)] == NIMG[1:]
