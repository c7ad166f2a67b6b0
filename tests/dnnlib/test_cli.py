"""dnnlib.cli and dnnlib.progress: how programs end or stop, and the progress they show."""

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest

from dnnlib.cli import SIGNALS, StopRequest, UserError, run
from dnnlib.progress import Progress, format_seconds

ROOT = Path(__file__).parent.parent.parent


def command_that(action):
    @click.command()
    @click.option("--count", type=int)
    def command(count):
        return action()

    return command


def raising(error):
    def action():
        raise error

    return action


@pytest.mark.parametrize(("error", "code", "line"), [
    (UserError("--batch is 30;\nexpected 32"), 2, "error: --batch is 30; expected 32"),
    (FileNotFoundError(2, "No such file or directory", "a.zip"), 2, "error: a.zip: No such file or directory"),
    (OSError(28, "No space left on device"), 2, "error: No space left on device"),
    (KeyboardInterrupt(), 130, "error: interrupted"),
])
def test_run_ends_with_one_line_and_a_code(error, code, line, capsys):
    assert run(command_that(raising(error)), []) == code
    out, err = capsys.readouterr()
    assert (out, err) == ("", line + "\n")


def test_run_wrong_option_is_one_line(capsys):
    assert run(command_that(lambda: None), ["--count=x"]) == 2
    assert capsys.readouterr().err == "error: Invalid value for '--count': 'x' is not a valid integer.\n"


@pytest.mark.parametrize(("result", "code"), [(None, 0), (3, 3)])
def test_run_returns_the_code_of_the_command(result, code):
    assert run(command_that(lambda: result), []) == code


def test_run_help_ends_well(capsys):
    assert run(command_that(lambda: None), ["--help"]) == 0
    assert "--count" in capsys.readouterr().out


def test_run_fault_of_the_program_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run(command_that(lambda: 1 / 0), [])


def test_run_sigterm_unwinds_and_is_told_apart(capsys):
    cleaned = []

    def action():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        finally:
            cleaned.append(True)

    before = signal.getsignal(signal.SIGTERM)
    assert run(command_that(action), []) == 143
    assert capsys.readouterr().err == "error: terminated\n"
    assert cleaned == [True]
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(("number", "code", "word"), [
    (signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")])
def test_run_signal_that_comes_in_a_finalizer_is_not_lost(capfd, number, code, word):
    class Something:
        def __del__(self):
            os.kill(os.getpid(), number)
            time.sleep(0)

    def action():
        Something()  # ends at once
        time.sleep(20)
        return 0

    start = time.monotonic()
    assert run(command_that(action), []) == code
    assert time.monotonic() - start < 15
    assert capfd.readouterr().err == f"error: {word}\n"


def test_run_reader_that_goes_away_is_no_error():
    code = ("import sys, click; from dnnlib.cli import run\n"
            "@click.command()\ndef c():\n    for i in range(100000): click.echo(i)\nsys.exit(run(c, []))")
    shell = f"{sys.executable} -c '{code}' | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", shell], cwd=ROOT, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("0\n1\n", "")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_says_rate_and_time_left():
    progress = Progress(1000, "images", stream=io.StringIO())
    progress.started = 100.0
    progress.done = 250
    assert progress.describe(110.0) == "250/1000 images, 25/s, 0:30 left"
    progress.total = None
    assert progress.describe(110.0) == "250 images, 25/s"


def test_progress_rewrites_a_line_on_a_terminal_and_adds_lines_elsewhere():
    terminal, file = Terminal(), io.StringIO()
    for stream in (terminal, file):
        with Progress(3, "images", stream=stream) as progress:
            progress.interval = 0
            for _ in range(3):
                progress.advance()
    assert terminal.getvalue().count("\r") == 4
    assert terminal.getvalue().endswith("left\x1b[K\n")
    assert file.getvalue().count("\n") == 4
    assert "\r" not in file.getvalue()


def test_progress_of_short_work_shows_nothing():
    stream = io.StringIO()
    with Progress(3, "images", stream=stream) as progress:
        progress.advance(3)
    assert stream.getvalue() == ""


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (7.4, "0:07"), (750, "12:30"), (11100, "3:05:00")])
def test_format_seconds(seconds, text):
    assert format_seconds(seconds) == text


# Stopping between two iterations


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_stop_request_remembers_a_signal_and_puts_handlers_back(number):
    before = [signal.getsignal(each) for each in SIGNALS]
    with StopRequest() as stop:
        assert not stop.wanted()
        os.kill(os.getpid(), number)
        assert stop.wanted()
        assert stop.reason == f"{number.name} received"
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
    monkeypatch.setattr("dnnlib.cli.time.monotonic", lambda: now[0])
    with StopRequest(max_hours=0.5) as stop:
        now[0] = 100 + 1799
        assert not stop.wanted()
        now[0] = 100 + 1800
        assert stop.wanted()
        assert stop.reason == "the --max-hours=0.5 limit was reached"
