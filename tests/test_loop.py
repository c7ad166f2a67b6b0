"""The training loop itself, in this process: the golden run through it, and what it asks other processes."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

from dnnlib.cli import UserError
from tests.make_sets import make_set
from tests.parity_checks import compare_state, golden_inputs, golden_start
from training import loop
from training.dataset import ImageDataset
from training.options import TrainOptions
from training.presets import resolve
from training.run_settings import RunSettings

DATA = Path(__file__).parent / "data"
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
    """Let another process wish to stop after so many iterations, and a state at one; return what the loop asked."""
    asked = []

    def answer(flags):
        asked.append(list(flags))
        return [len(asked) == iterations, len(asked) == saves_at]

    monkeypatch.setattr(loop, "any_process_each", answer)
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
            compare(iteration)
            inputs = golden_inputs(iteration)
            yield inputs.reals, inputs.labels

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
    """Return the mean of each statistic over the phases that report it; each does so for 8 images, or it is alone."""
    means = {}
    for key in arrays.files:
        if key.startswith("loss/") and not np.isnan(arrays[key][iteration]):
            means.setdefault(key.split("/", 2)[2], []).append(arrays[key][iteration])
    return {name: np.mean(values) for name, values in means.items()}


def lines_of(outdir):
    """Return the lines of stats.jsonl of the one run there."""
    folder, = outdir.glob("0*")
    return [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]


def test_loop_asks_the_others_once_an_iteration_and_saves_when_one_wishes(tmp_path, monkeypatch):
    config, settings, dataset = prepared(tmp_path)
    asked = stop_after(monkeypatch, iterations=3, saves_at=2)
    saved = []
    monkeypatch.setattr(loop._Loop, "_save_state", lambda self: saved.append(self.state.iteration))
    assert loop.train(config, settings, dataset) == loop.EXIT_STOPPED
    assert asked == [[False, False]] * 3  # this process wished nothing
    assert saved == [1, 2, 3]  # the first is that of tick 0


def test_loop_tells_the_others_what_it_wishes(tmp_path, monkeypatch):
    config, settings, dataset = prepared(tmp_path, state_minutes=1e-9)
    settings = dataclasses.replace(settings, max_hours=1e-9)
    asked = stop_after(monkeypatch, iterations=1)
    assert loop.train(config, settings, dataset) == loop.EXIT_STOPPED
    assert asked == [[True, True]]


def test_loop_refuses_to_start_with_another_number_of_processes_than_configured(tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    config, settings, dataset = prepared(tmp_path, gpus=2)
    message = ("1 processes are in the run, and gpus is 2; expected the same number: start it with train.py --gpus or "
               "torchrun")
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        loop.train(config, settings, dataset)
    assert not Path(settings.outdir).exists()
