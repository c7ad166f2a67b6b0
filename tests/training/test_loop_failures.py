"""training.loop: failures that stop a run."""

import pytest
import torch

from training.config import DatasetFacts
from training.loop import SkippedSteps, describe_out_of_memory, smaller_batch_gpu
from training.options import TrainOptions, resolve
from training.step import StepResult


def results(*skipped_phases):
    return [StepResult(stats={"Gmain": {}, "Dmain": {}}, skipped={phase: ["a", "b", "c", "d"] for phase in skipped})
            for skipped in skipped_phases]


def test_skipped_steps_stop_after_ten_in_a_row_of_one_phase():
    steps = SkippedSteps()
    assert [steps.add(result) for result in results(*[["Gmain"]] * 9, [], *[["Gmain"]] * 9)] == [None] * 19
    message = steps.add(results(["Gmain"])[0])
    assert message == ("the loss or a gradient of Gmain was not finite 10 times in a row (a, b, c and 1 more); check "
                       "the data")


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
    found = describe_out_of_memory(config, torch.OutOfMemoryError(), "the same command", has_started=True)
    if smaller is not None:
        assert config_with(**{**options, "batch_gpu": smaller}).step.micro_batch == smaller
        assert found == (
            f"out of memory with --batch-gpu={config.step.micro_batch}; the same command with --batch-gpu={smaller} "
            "continues the run from its last state: the same batch in smaller passes")
    else:
        assert found == (
            "out of memory with one image per pass (--batch-gpu=1); free memory on the device or use one that has "
            "more, and the same command continues the run (a smaller --cfg or resolution starts another one)")


def test_out_of_memory_before_the_first_image_advises_nothing_about_passes():
    found = describe_out_of_memory(config_with(batch=32), MemoryError(), "the same command", has_started=False)
    assert found == (
        "out of memory before the first image, while creating networks and optimizers; free memory on the device or "
        "use one that has more, and the same command continues the run (a smaller --cfg or resolution starts another "
        "one)")


KILLED = "DataLoader worker (pid 7) is killed by signal: Killed. "


def test_out_of_memory_of_a_reader_advises_fewer_readers():
    found = describe_out_of_memory(config_with(), RuntimeError(KILLED), "the same command (without --new)",
                                   has_started=True)
    assert found == ("a data loading worker was killed, probably because memory ran out; the same command (without "
                     "--new) with --workers=1 continues the run")
