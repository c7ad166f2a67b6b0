"""training.run_report: the reports of a run, truncated when it continues, and training on a full disk."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from training.run_report import Reporter, Tick, TickClock, TickTimes

ROOT = Path(__file__).parent.parent.parent
SCALARS = """Progress/tick Progress/kimg Progress/augment Timing/total_sec Timing/sec_per_tick Timing/sec_per_kimg
Timing/maintenance_sec Timing/total_hours Timing/total_days Resources/cpu_mem_gb Resources/peak_gpu_mem_gb""".split()
STATISTICS = {"Loss/G/loss": {"num": 4, "mean": 0.75, "std": 0.25},
              "Loss/D/loss": {"num": 4, "mean": 1.5, "std": 0.5}}


def a_tick(number, **changes):
    values = dict(number=number, nimg=1000 * number + 8, augment_p=0.125, cpu_memory=3 * 2**29, gpu_memory=0,
                  times=TickTimes(total=7205.0, tick=30.0, maintenance=2.5, images=1000, left=3600.0))
    return Tick(**{**values, **changes})


def a_run(folder, ticks, *, start=None, stats=STATISTICS):
    """Report ticks, as a process does, from `start` ticks on."""
    folder.mkdir(exist_ok=True)
    reporter = Reporter(folder, is_main=True)
    done = ticks[0] if start is None else start
    reporter.start(ticks=done, nimg=1000 * (done - 1) + 8 if done else 0)
    for number in ticks:
        reporter.tick(a_tick(number), stats)
    return reporter


def records(path):
    return [json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
            for line in path.read_text(encoding="ascii").splitlines()]


def ticks_in(path):
    return [int(record["Progress/tick"]["mean"]) for record in records(path)]


def events(folder):
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return {tag: [(event.step, event.value) for event in accumulator.Scalars(tag)]
            for tag in accumulator.Tags()["scalars"]}


# ---- One tick ----

def test_tick_line_reads_as_users_know_it(tmp_path, capsys):
    a_run(tmp_path, [3])
    out = capsys.readouterr().out
    assert out == ("tick 3     kimg 3.0      time 2:00:05   left 1:00:00   sec/tick 30.0    sec/kimg 30.00    "
                   "maintenance 2.5    cpumem 1.50   augment 0.125  G 0.750  D 1.500\n")


def test_tick_line_names_gpu_memory_and_skipped_steps_where_there_are_some(tmp_path, capsys):
    stats = {"Trouble/skipped/Gmain": {"num": 8, "mean": 0.25, "std": 0.4},
             "Trouble/skipped/Dreg": {"num": 1, "mean": 1.0, "std": 0.0}}
    Reporter(tmp_path, is_main=True).tick(a_tick(0, gpu_memory=2**31), stats)
    assert capsys.readouterr().out.endswith(
        "cpumem 1.50   gpumem 2.00   augment 0.125  G -      D -      skipped 3\n")


def test_tick_writes_statistics_with_the_names_that_users_know(tmp_path):
    a_run(tmp_path, [2])
    (record,) = records(tmp_path / "stats.jsonl")
    assert set(record) == {*STATISTICS, *SCALARS, "timestamp"}
    assert record["Loss/G/loss"] == STATISTICS["Loss/G/loss"]
    expected = dict(zip(SCALARS, [2, 2.008, 0.125, 7205.0, 30.0, 30.0, 2.5, 7205 / 3600, 7205 / 86400, 1.5, 0.0]))
    assert {name: record[name] for name in SCALARS} == {
        name: {"num": 1, "mean": value, "std": 0.0} for name, value in expected.items()}
    assert record["timestamp"] > 1.7e9


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_tick_values_that_are_not_finite_are_null(tmp_path, capsys, bad):
    a_run(tmp_path, [0], stats={"Loss/G/loss": {"num": 4, "mean": bad, "std": math.nan}})
    (record,) = records(tmp_path / "stats.jsonl")
    assert record["Loss/G/loss"] == {"num": 4, "mean": None, "std": None}
    assert f"G {bad:.3f}" in capsys.readouterr().out


def test_tick_writes_scalars_for_tensorboard(tmp_path):
    a_run(tmp_path, [0, 1, 2])
    found = events(tmp_path)
    assert set(found) == {*STATISTICS, *SCALARS}
    assert found["Progress/tick"] == [(8, 0.0), (1008, 1.0), (2008, 2.0)]
    assert found["Loss/G/loss"] == [(8, 0.75), (1008, 0.75), (2008, 0.75)]


def test_reporter_without_tensorboard_writes_no_events(tmp_path):
    Reporter(tmp_path, is_main=True, tensorboard=False).tick(a_tick(0), STATISTICS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.txt", "stats.jsonl"]


def test_reporter_of_another_process_does_nothing(tmp_path, capsys):
    reporter = Reporter(tmp_path / "missing", is_main=False)
    reporter.start(ticks=0, nimg=0)
    reporter.log("words")
    reporter.tick(a_tick(0), STATISTICS)
    reporter.metric("fid", {"results": {"fid": 1.0}, "total_time": 1}, tick=0, nimg=0, num_gpus=2, snapshot=None)
    with reporter.surviving("write a file"):
        raise OSError
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_log_holds_everything_said_with_the_time(tmp_path, capsys):
    reporter = Reporter(tmp_path, is_main=True)
    reporter.log("one\ntwo \u00e9")
    reporter.tick(a_tick(0), STATISTICS)
    lines = (tmp_path / "log.txt").read_text(encoding="utf-8").splitlines()
    assert [line[20:] for line in lines] == capsys.readouterr().out.splitlines()
    assert all(line[4] == line[7] == "-" and line[13] == line[16] == ":" for line in lines)


# ---- Continuing ----

def without_times(record):
    times = ("Timing/", "Resources/", "timestamp")
    return {name: value for name, value in record.items() if not name.startswith(times)}


def test_continued_run_ends_with_the_statistics_of_an_unbroken_one(tmp_path):
    a_run(tmp_path / "whole", range(6))
    a_run(tmp_path / "broken", range(5), stats={"Loss/G/loss": {"num": 1, "mean": 9.0, "std": 0.0}})
    for path in (tmp_path / "broken").iterdir():  # as a process leaves them that was killed while it wrote
        if path.name != "log.txt":
            path.write_bytes(path.read_bytes()[:-5])
    a_run(tmp_path / "broken", range(2), start=0)
    a_run(tmp_path / "broken", range(2, 6))
    whole, broken = ([without_times(record) for record in records(tmp_path / name / "stats.jsonl")]
                     for name in ("whole", "broken"))
    assert broken == whole
    assert events(tmp_path / "broken") == events(tmp_path / "whole")


@pytest.mark.parametrize(("ticks", "expected"), [(0, []), (3, [0, 1, 2]), (9, [0, 1, 2, 3, 4])])
def test_start_cuts_statistics_and_leaves_kept_lines_as_they_are(tmp_path, ticks, expected):
    a_run(tmp_path, range(5))
    before = (tmp_path / "stats.jsonl").read_bytes().splitlines(keepends=True)
    Reporter(tmp_path, is_main=True).start(ticks=ticks, nimg=0)
    assert ticks_in(tmp_path / "stats.jsonl") == expected
    assert (tmp_path / "stats.jsonl").read_bytes() == b"".join(before[:len(expected)])


def test_start_hides_what_tensorboard_was_told_beyond_the_state(tmp_path):
    a_run(tmp_path, range(5))
    reporter = Reporter(tmp_path, is_main=True)
    reporter.start(ticks=3, nimg=2300)  # in the midst of tick 3
    reporter.tick(a_tick(3), STATISTICS)
    assert events(tmp_path)["Progress/tick"] == [(8, 0.0), (1008, 1.0), (2008, 2.0), (3008, 3.0)]


def test_start_takes_later_progress_lines_from_the_log_and_keeps_other_words(tmp_path):
    reporter = a_run(tmp_path, range(3))
    reporter.log("warning: something  tick 2  kimg 9")
    with open(tmp_path / "log.txt", "ab") as file:
        file.write(b"2026-01-01 00:00:00 cut sho")
    Reporter(tmp_path, is_main=True).start(ticks=2, nimg=1000)
    lines = (tmp_path / "log.txt").read_text(encoding="utf-8").splitlines()
    assert [" ".join(line[20:].split()[:2]) for line in lines] == ["tick 0", "tick 1", "warning: something", "cut sho"]
    assert (tmp_path / "log.txt").read_bytes().endswith(b"cut sho\n")


# ---- Metrics ----

def report_metric(reporter, tick, value=10.0, **more):
    found = {"results": {"pr50k3_full_precision": value, "pr50k3_full_recall": 0.5}, "total_time": 65.2, "seed": 7}
    reporter.metric("pr50k3_full", {**found, **more}, tick=tick, nimg=1000 * tick, num_gpus=2,
                    snapshot="network-snapshot-000000.safetensors")


def test_metric_prints_how_many_images_were_compared(tmp_path, capsys):
    report_metric(Reporter(tmp_path, is_main=True), 4, num_fake=100, num_real=24)
    assert capsys.readouterr().out == ("pr50k3_full_precision 10  pr50k3_full_recall 0.5  of 100 fakes and 24 reals  "
                                       "at kimg 4.0, in 1:05\n")


def test_metric_writes_line_picture_and_scalars(tmp_path, capsys):
    reporter = Reporter(tmp_path, is_main=True)
    report_metric(reporter, 0, math.nan)
    report_metric(reporter, 4)
    first, second = records(tmp_path / "metric-pr50k3_full.jsonl")
    assert first["results"] == {"pr50k3_full_precision": None, "pr50k3_full_recall": 0.5}
    assert second.pop("timestamp") > 1.7e9
    assert second == {"results": {"pr50k3_full_precision": 10.0, "pr50k3_full_recall": 0.5}, "metric": "pr50k3_full",
                      "total_time": 65.2, "total_time_str": "1:05", "num_gpus": 2, "tick": 4, "nimg": 4000, "seed": 7,
                      "snapshot_pkl": "network-snapshot-000000.safetensors"}
    assert events(tmp_path)["Metrics/pr50k3_full_recall"] == [(0, 0.5), (4000, 0.5)]
    assert PIL.Image.open(tmp_path / "metric-pr50k3_full.png").size == (720, 400)
    assert capsys.readouterr().out.splitlines()[1] == \
        "pr50k3_full_precision 10  pr50k3_full_recall 0.5  at kimg 4.0, in 1:05"


def test_metric_of_classes_names_the_worst_and_plots_it(tmp_path, capsys):
    worst = {"pr50k3_full_precision": {"class": "melanoma", "value": 0.25},
             "pr50k3_full_recall": {"class": "nevus", "value": 0.125}}
    reporter = Reporter(tmp_path, is_main=True)
    report_metric(reporter, 4, worst_class=worst, per_class={"melanoma": {}, "nevus": {}})
    report_metric(reporter, 5, worst_class={}, per_class={"melanoma": {"reason": "too few"}})
    assert capsys.readouterr().out == (
        "pr50k3_full_precision 10  pr50k3_full_recall 0.5  worst class: melanoma (0.25), nevus (0.125)  at kimg 4.0, "
        "in 1:05\n"
        "pr50k3_full_precision 10  pr50k3_full_recall 0.5  at kimg 5.0, in 1:05\n")
    assert records(tmp_path / "metric-pr50k3_full.jsonl")[0]["worst_class"] == worst
    found = events(tmp_path)
    assert found["Metrics/pr50k3_full_recall/worst_class"] == [(4000, 0.125)]
    assert found["Metrics/pr50k3_full_precision/worst_class"] == [(4000, 0.25)]


def test_start_cuts_metrics_and_keeps_lines_of_others(tmp_path):
    path = tmp_path / "metric-pr50k3_full.jsonl"
    reporter = Reporter(tmp_path, is_main=True)
    report_metric(reporter, 1)
    with open(path, "a", encoding="ascii") as file:
        file.write('{"results": {"pr50k3_full_precision": 1}, "metric": "pr50k3_full"}\n')
    report_metric(reporter, 4)
    Reporter(tmp_path, is_main=True).start(ticks=4, nimg=3000)
    assert [record.get("tick") for record in records(path)] == [1, None]


def test_metric_of_an_earlier_tick_stands_where_it_would_have(tmp_path, monkeypatch):
    curves = []
    monkeypatch.setattr("training.run_report.save_curves", lambda path, found: curves.append(found))
    path = tmp_path / "metric-pr50k3_full.jsonl"
    reporter = Reporter(tmp_path, is_main=True)
    for tick in (1, 5):
        report_metric(reporter, tick)
    with open(path, "a", encoding="ascii") as file:
        file.write('{"results": {"pr50k3_full_precision": 1}, "metric": "pr50k3_full"}\n')
    before = path.read_bytes().splitlines()
    report_metric(reporter, 3)
    found = path.read_bytes().splitlines()
    assert [json.loads(line).get("tick") for line in found] == [1, 3, 5, None]
    assert [found[0], *found[2:]] == before
    assert [kimg for kimg, _ in curves[-1]["pr50k3_full_recall"]] == [1.0, 3.0, 5.0]


def test_metric_of_an_earlier_tick_that_a_full_disk_refuses_follows_later(tmp_path, full_disk):
    full_disk["has_room"] = True
    reporter = Reporter(tmp_path, is_main=True)
    report_metric(reporter, 5)
    full_disk["has_room"] = False

    def refuse(*_):
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        report_metric(reporter, 3)
    full_disk["has_room"] = True
    reporter.write_waiting()
    assert [record["tick"] for record in records(tmp_path / "metric-pr50k3_full.jsonl")] == [5, 3]


# ---- Event files ----

def test_event_file_is_a_new_one_whichever_was_removed(tmp_path):
    for number in range(3):
        a_run(tmp_path, [number], start=number)
    names = [f"events.out.tfevents.{number:05d}" for number in range(3)]
    assert sorted(path.name for path in tmp_path.glob("events*")) == names
    for removed, written in (("00000", "00003"), ("00002", "00004"), ("00004", "00004")):
        (tmp_path / f"events.out.tfevents.{removed}").unlink()
        before = {path: path.read_bytes() for path in tmp_path.glob("events*")}
        a_run(tmp_path, [5], start=5)
        assert {path: path.read_bytes() for path in before} == before
        new, = set(tmp_path.glob("events*")) - before.keys()
        assert new.name == f"events.out.tfevents.{written}"
    for path in tmp_path.glob("events*"):
        path.unlink()
    (tmp_path / "events.out.tfevents.1700000000.host.7.0").touch()  # as other programs name theirs
    a_run(tmp_path, [0])
    assert (tmp_path / names[0]).stat().st_size > 0
    assert events(tmp_path)["Progress/tick"] == [(8, 0.0)]


# ---- Trouble ----

@pytest.fixture
def full_disk(monkeypatch):
    """A disk that writes only 10 bytes of each block, until it is set to True."""
    state = {"has_room": False}
    write = os.write

    def limited(descriptor, data):
        if state["has_room"]:
            return write(descriptor, data)
        if len(data) <= 20:
            raise OSError(28, "No space left on device")
        return write(descriptor, data[:-20])

    monkeypatch.setattr("dnnlib.lines.os.write", limited)
    return state


def test_full_disk_warns_once_and_loses_nothing(tmp_path, capsys, full_disk):
    reporter = Reporter(tmp_path, is_main=True)
    for number in range(3):
        reporter.tick(a_tick(number), STATISTICS)
        with reporter.surviving("write fakes000000.png"):
            raise OSError(28, "No space left on device")
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if not line.startswith("tick")] == [
        "warning: failed to write log.txt (No space left on device); training continues; missing lines are written "
        "once there is space again",
        "warning: failed to write fakes000000.png (No space left on device); training continues"]
    assert all(path.stat().st_size == 0 for path in tmp_path.iterdir())  # no half lines
    full_disk["has_room"] = True
    reporter.tick(a_tick(3), STATISTICS)
    assert ticks_in(tmp_path / "stats.jsonl") == [0, 1, 2, 3]
    assert events(tmp_path)["Progress/tick"] == [(8, 0.0), (1008, 1.0), (2008, 2.0), (3008, 3.0)]
    assert [line[20:26] for line in (tmp_path / "log.txt").read_text(encoding="ascii").splitlines()] == [
        "tick 0", "warnin", "warnin", "tick 1", "tick 2", "tick 3"]
    with reporter.surviving("write fakes000000.png"):
        raise OSError(28, "No space left on device")
    assert "warning: failed to write fakes000000.png" in capsys.readouterr().out  # a new trouble, a new warning


def test_vanished_folder_warns_once_and_comes_back(tmp_path, capsys):
    folder = tmp_path / "run"
    reporter = a_run(folder, [0])
    folder.rename(tmp_path / "gone")
    for number in (1, 2):
        reporter.tick(a_tick(number), STATISTICS)
        report_metric(reporter, number)
    out = capsys.readouterr().out
    assert out.count("warning: failed to write log.txt (No such file or directory); training continues") == 1
    assert out.count("warning") == 1
    (tmp_path / "gone").rename(folder)
    reporter.tick(a_tick(3), STATISTICS)
    assert ticks_in(folder / "stats.jsonl") == [0, 1, 2, 3]


def test_surviving_lets_other_errors_through(tmp_path):
    with pytest.raises(KeyError), Reporter(tmp_path, is_main=True).surviving("write a file"):
        raise KeyError


def test_log_outlives_its_reader_and_a_terminal_of_few_letters(tmp_path):
    code = f"""
from training.run_report import Reporter
reporter = Reporter({str(tmp_path)!r}, is_main=True)
for number in range(3):
    reporter.log(f"line {{number}} \\u00e9")
    input()
"""
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, env={**os.environ, "PYTHONIOENCODING": "ascii"}) as process:
        first = process.stdout.readline()
        process.stdout.close()
        process.stdin.write(b"\n\n\n")
        process.stdin.close()
        error = process.stderr.read()
        assert (process.wait(), error) == (0, b"")
    assert first == b"line 0 \\xe9\n"
    log = (tmp_path / "log.txt").read_text(encoding="utf-8").splitlines()
    assert [line[20:] for line in log] == [f"line {number} \u00e9" for number in range(3)]


# ---- Times ----

def test_clock_tells_training_from_maintenance_and_counts_on():
    now = [100.0]
    clock = TickClock(total_nimg=1000, now=lambda: now[0])
    clock.resume(50.0)
    now[0] += 7
    clock.begin(200)
    now[0] += 10
    assert clock.end(300) == TickTimes(total=67.0, tick=10.0, maintenance=7.0, images=100, left=70.0)
    now[0] += 5
    clock.begin(300)
    now[0] += 15
    # 200 images took 30 s with what lay between them; the start does not count.
    assert clock.end(400) == TickTimes(total=87.0, tick=15.0, maintenance=5.0, images=100, left=90.0)
    assert clock.total() == 87.0
    now[0] += 1
    clock.begin(400)
    assert clock.end(1000).left == 0


def test_clock_tick_without_an_image_has_no_pace(tmp_path):
    clock = TickClock(total_nimg=1000)
    clock.begin(0)
    tick = a_tick(0, times=clock.end(0))
    assert tick.times.left is None
    Reporter(tmp_path, is_main=True).tick(tick, {})
    (record,) = records(tmp_path / "stats.jsonl")
    assert record["Timing/sec_per_kimg"]["mean"] is None
