"""Stopping between iterations, and trouble that stops a run."""

import os
import signal

import pytest

from training.options import DatasetFacts, TrainOptions
from training.presets import resolve
from training.step import StepResult
from training.stopping import SIGNALS, StopRequest
from training.trouble import SkippedSteps, describe_out_of_memory, smaller_batch_gpu


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_stop_request_remembers_a_signal_and_puts_handlers_back(number):
    before = [signal.getsignal(each) for each in SIGNALS]
    with StopRequest() as stop:
        assert not stop.wanted()
        os.kill(os.getpid(), number)
        assert stop.wanted()
        assert stop.reason == f"{number.name} arrived"
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_stop_request_second_interrupt_stops_at_once():
    def interrupt_twice():
        with StopRequest():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        interrupt_twice()


def test_stop_request_time_is_over(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("training.stopping.time.monotonic", lambda: now[0])
    with StopRequest(max_hours=0.5) as stop:
        now[0] = 100 + 1799
        assert not stop.wanted()
        now[0] = 100 + 1800
        assert stop.wanted()
        assert stop.reason == "--max-hours=0.5 are over"


def results(*skipped_phases):
    return [StepResult(stats={"Gmain": {}, "Dmain": {}}, skipped={phase: ["a", "b", "c", "d"] for phase in skipped})
            for skipped in skipped_phases]


def test_skipped_steps_stop_after_ten_in_a_row_of_one_phase():
    steps = SkippedSteps()
    assert [steps.add(result) for result in results(*[["Gmain"]] * 9, [], *[["Gmain"]] * 9)] == [None] * 19
    message = steps.add(results(["Gmain"])[0])
    assert message == ("Gmain had a loss or gradient that is not finite 10 times in a row (a, b, c and 1 more); try a "
                       "larger --gamma, --precision=fp32, or look at the data")


def test_skipped_steps_of_a_lazy_phase_count_when_it_runs():
    steps = SkippedSteps()
    lazy = StepResult(stats={"Dreg": {}}, skipped={"Dreg": ["x"]})
    idle = StepResult(stats={"Gmain": {}})
    found = [steps.add(result) for result in [lazy, idle] * 10]
    assert [index for index, message in enumerate(found) if message is not None] == [18]


def test_skipped_steps_continue_after_a_restart():
    first, second = SkippedSteps(), SkippedSteps()
    for result in results(*[["Dmain"]] * 6):
        first.add(result)
    second.load_state_dict(first.state_dict())
    assert [second.add(result) is not None for result in results(*[["Dmain"]] * 4)] == [False, False, False, True]


def config_with(**options):
    facts = DatasetFacts(name="set", resolution=64, channels=3, num_images=20, c_dim=0)
    return resolve(TrainOptions(cfg="auto", **options), facts)


@pytest.mark.parametrize(("options", "smaller"), [
    ({"batch": 32}, 16), ({"batch": 32, "batch_gpu": 8}, 4), ({"batch": 4}, 2), ({"batch": 12}, 4),
    ({"batch": 32, "batch_gpu": 1}, None)])
def test_smaller_batch_gpu_is_one_that_the_run_takes(options, smaller):
    config = config_with(**options)
    assert smaller_batch_gpu(config) == smaller
    if smaller is not None:
        assert config_with(**{**options, "batch_gpu": smaller}).step.micro_batch == smaller
        assert describe_out_of_memory(config) == (
            f"out of memory with --batch-gpu={config.step.micro_batch}; try --batch-gpu={smaller}: the same batch in "
            "smaller passes")
    else:
        assert "one image a pass" in describe_out_of_memory(config)
