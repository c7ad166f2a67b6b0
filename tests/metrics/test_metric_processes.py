"""Metrics of several processes are those of one."""

import sys

import pytest
import torch

from metrics import evaluation
from tests.helpers import metric_programs
from tests.helpers.make_sets import make_set
from torch_utils.distributed import Processes
from training.launch import launch


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    make_set(folder / "data.zip", 21, size=32, labels=[index % 2 for index in range(21)])
    programs = "evaluate+give_up+leave_out+exchange"
    assert launch(2, [sys.executable, "-m", "tests.helpers.metric_programs", programs, str(folder)]) == 0
    return folder


def results(folder, name):
    """Return what each of two processes found."""
    return [torch.load(folder / f"{name}-{rank}.pt") for rank in range(2)]


def test_evaluate_two_processes_give_the_bits_of_one(folder, one_thread, monkeypatch):
    for name in ("open_detector", "open_similarity"):  # the program replaces them; this puts them back
        monkeypatch.setattr(evaluation, name, None)
    alone = metric_programs.evaluate(Processes(rank=0, count=1, device=torch.device("cpu")), folder)
    main, other = results(folder, "evaluate")
    assert main == alone
    assert [len(found) for found in main.values()] == [6, 6]
    assert other == {70: {}, 12: {}}


def test_evaluate_is_given_up_by_all_processes_when_one_wishes_so(folder):
    main, other = results(folder, "give_up")
    assert main == {"failures": [("Stopped", 2), ("Stopped", 8)], "after": True}
    # All compute features, and are asked; the main process compares them alone.
    assert other == {"failures": [("Stopped", 2), ("OtherProcessFailed", 7)], "after": False}


def test_metrics_of_a_file_that_one_process_could_not_write_are_left_out_by_all(folder):
    assert [found["missing"] for found in results(folder, "leave_out")] == [[[], [[3, 800]]]] * 2


def test_exchange_gathers_rows_and_shares_failures(folder):
    main, other = results(folder, "exchange")
    assert main["rows"].tolist() == [[100, 101], [102, 103]]
    assert main["none"].shape == (0, 3)
    assert main["none"].dtype == torch.uint8
    assert [found["main"] for found in (main, other)] == ["here", None]
    assert [found["long"] for found in (main, other)] == [[None] * 3, None]
    assert [found["from_main"] for found in (main, other)] == [["rank", 0]] * 2
    assert [part.tolist() for part in main["blocks"]] == [[[0], [1], [2], [3], [4]], [[0, 0], [1, 1], [2, 2]]]
    assert (other["rows"], other["none"], other["blocks"]) == (None, None, None)
    zero = "ZeroDivisionError: integer division or modulo by zero"
    elsewhere = f"OtherProcessFailed: {zero}"
    assert main["failures"] == [elsewhere, zero, zero, elsewhere]
    assert other["failures"] == [zero, elsewhere, elsewhere, zero]
