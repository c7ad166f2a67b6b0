"""What all command line programs share: how they parse options and paths, and how they end.

A user's mistake gives one line, options given twice are refused, help is grouped, ~ in paths is expanded, and a program
that is stopped ends cleanly: at once (`run`), or between two iterations (`StopRequest`).
"""

import copy
import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from types import FrameType

import click

from dnnlib.files import EXIT_TEMPORARY, DiskFailure, describe_failure, find_failure

EXIT_USAGE = 2
EXIT_BROKEN_PIPE = 1
EXIT_INTERRUPTED = 130  # as a shell reports a program ended by Ctrl-C
EXIT_TERMINATED = 143  # ... and by SIGTERM

# Signals that stop a run between two iterations. Windows lacks SIGUSR1, and sends the others only on Ctrl-C.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))
# Signals that end a program: sent by a batch system, and when a terminal is closed.
_ENDING = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
# Errors of the system that the user or an administrator has to fix.
_USERS_ERRORS = frozenset(getattr(errno, name) for name in (
    "ENOENT", "ENOTDIR", "EISDIR", "EEXIST", "ENOTEMPTY", "ENAMETOOLONG", "ELOOP",  # another path
    "EACCES", "EPERM", "EROFS", "EBUSY", "ETXTBSY",  # permissions, and files that others use
    "ENOSPC", "EDQUOT", "EFBIG",  # disk space
    "EMFILE", "ENFILE",  # limits of open files
) if hasattr(errno, name))  # fmt: skip
_USERS_KINDS = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)  # ours


class UserError(ValueError):
    """A mistake that the user can fix; the message is one line: what it is, what was expected, what to do."""

    exit_code = EXIT_USAGE


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived: unwinds like Ctrl-C, so that temporary files are removed on the way."""


class UserPath(click.Path):
    """The type of every option and argument that is a path: expands ~, which shells do not do after `--option=`.

    named:  also accept NAME=PATH, and expand ~ in PATH
    The other arguments are those of click.Path.
    """

    def __init__(self, *, named: bool = False, **attributes):
        super().__init__(readable=False, **attributes)  # the code that opens it raises the error
        self._named = named

    def convert(self, value: str | os.PathLike, param: click.Parameter | None,
                ctx: click.Context | None) -> str | os.PathLike:
        text, before = os.fspath(value), ""
        if self._named and not text.startswith("~"):
            name, separator, path = text.partition("=")
            if separator:
                before, text = f"{name}=", path
        option = "the path" if param is None else _shown_name(param)
        # An unset shell variable gives an empty string, and Path("") is the current folder.
        if not text and getattr(param, "flag_value", None) != "":
            raise UserError(f"{option} is {before or 'empty'}; expected {before}PATH")
        return super().convert(before + expand_user(text, option), param, ctx)


class Flag(click.Option):
    """An option with the group under which the help shows it."""

    def __init__(self, declarations: Iterable[str], *, group: str, **attributes):
        super().__init__(list(declarations), **attributes)
        self.group = group


class GroupedCommand(click.Command):
    """A command whose help shows its options in groups."""

    def format_options(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for option in self.get_params(context):
            record = option.get_help_record(context)
            if record is not None:
                groups.setdefault(getattr(option, "group", "Other"), []).append(record)
        for title, records in groups.items():
            with formatter.section(title):
                formatter.write_dl(records)


def expand_user(path: str, name: str) -> str:
    """Return a path with ~ and ~user at its start replaced by the home folder, as a shell does.

    name:  the option or variable that holds the path, for the message

    Raises UserError when there is no such user, unless a file or folder has that very name.
    """
    if not path.startswith("~"):
        return path
    expanded, first = os.path.expanduser(path), path.split("/")[0]
    if expanded == path and not os.path.lexists(first):
        raise UserError(f"{name} is {path}, but the home folder {first} does not exist; expected ~ or ~user, or "
                        f"./{first} for a file or folder with that name")
    return expanded


def check_outdir(outdir: str, option: str = "--outdir") -> None:
    """Raise UserError unless folders can be created in `outdir`, which may not exist yet. option: that names it"""
    place = Path(outdir).absolute()
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        raise UserError(f"{option} is {outdir}, but {place} is not a folder; choose a new or existing folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"{option} is {outdir}, but {place} is not writable; choose a writable folder")


def join_values(context: click.Context, parameter: click.Parameter, values: Sequence[str]) -> str | None:
    """Return the values of an option that may be repeated as one comma-separated list; None when it is not given.

    The callback of options with multiple=True that also accept such a list.
    """
    return ",".join(values) if values else None


def split_paths(context: click.Context, parameter: click.Parameter, values: Sequence[str]) -> tuple[str, ...] | None:
    """Return the paths of an option that may be repeated and takes lists; None when it is not given.

    LIMIT: paths that contain a comma cannot be given.
    """
    paths = [path.strip() for value in values for path in value.split(",")]
    if "" in paths:
        raise UserError(f"{parameter.opts[-1]} has an empty path; expected data sets separated by commas, such as "
                        f"{parameter.opts[-1]}=a.zip,b.zip")
    return tuple(expand_user(path, parameter.opts[-1]) for path in paths) if paths else None


def run(command: click.Command, arguments: list[str] | None = None) -> int:
    """Run a click command and return its exit code.

    A wrong option, one that is given twice, a UserError, a missing permission or a full disk gives one line on standard
    error and 2; a failing disk or network file system one line and 75, also when it is the cause of a UserError; Ctrl-C
    and SIGTERM one line and 130 or 143. Any other exception, including an unexpected error of the system, is a bug in
    the program and keeps its traceback.
    """
    program = os.path.basename(sys.argv[0])
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    previous = {number: signal.signal(number, _raise_terminated) for number in _ENDING
                if signal.getsignal(number) is not signal.SIG_IGN}  # nohup makes SIGHUP ignored
    report = sys.unraisablehook
    sys.unraisablehook = partial(_send_again, report)
    try:
        _refuse_repeated(command, arguments)
        # Not command.main: it prints an empty line when it is interrupted.
        with command.make_context(program, list(arguments)) as context:
            result = command.invoke(context)
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        return _fail(_one_line(error.format_message()), EXIT_USAGE)
    except (UserError, DiskFailure) as error:
        failure = find_failure(error)
        if failure is None:
            return _fail(_one_line(str(error)), error.exit_code)
        return _fail_temporarily(error, failure)
    except BrokenPipeError:  # the reader of our output ended, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except OSError as error:
        failure = find_failure(error)
        if failure is not None:
            return _fail_temporarily(error, failure)
        if error.errno not in _USERS_ERRORS and not isinstance(error, _USERS_KINDS):
            raise
        where = f"{error.filename}: " if error.filename is not None else ""
        return _fail(_one_line(f"{where}{error.strerror or error}"), EXIT_USAGE)
    except Terminated:
        return _fail("terminated", EXIT_TERMINATED)
    except (KeyboardInterrupt, click.exceptions.Abort):
        return _fail("interrupted", EXIT_INTERRUPTED)
    finally:
        sys.unraisablehook = report
        for number, handler in previous.items():
            signal.signal(number, handler)


class StopRequest:
    """A context manager that turns signals into a request to stop; a second Ctrl-C stops at once.

    max_hours:  time from now after which to stop as well; None for no limit
    """

    def __init__(self, max_hours: float | None = None):
        self.reason: str | None = None
        self._deadline = None if max_hours is None else time.monotonic() + max_hours * 3600
        self._max_hours = max_hours
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def wanted(self) -> bool:
        """Return whether to stop now; `reason` holds the reason, that of a signal starts with its name."""
        if self.reason is None and self._deadline is not None and time.monotonic() >= self._deadline:
            self.reason = f"the --max-hours={self._max_hours:g} limit was reached"
        return self.reason is not None

    def seconds_left(self) -> float | None:
        """Return the seconds until the time limit, None when there is none."""
        return None if self._deadline is None else max(self._deadline - time.monotonic(), 0)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.reason is not None:
            raise KeyboardInterrupt
        self.reason = f"{signal.Signals(number).name} received"


def _refuse_repeated(command: click.Command, arguments: Sequence[str],
                     parent: click.Context | None = None) -> None:
    """Raise UserError when an option of a command or subcommand is given more than once.

    click silently keeps the last value. All spellings of an option count as one, and flags are checked too; options
    declared with multiple=True or count=True may be repeated.
    """
    # Resilient: all other mistakes are left to the parser that follows, whose messages are better.
    context = command.context_class(command, parent=parent, resilient_parsing=True, **command.context_settings)
    parameters = command.get_params(context)
    reader = copy.copy(command)
    reader.params, reader.add_help_option = [_gathering(parameter) for parameter in parameters], False
    given, rest, _ = reader.make_parser(context).parse_args(list(arguments))
    for parameter in parameters:
        if isinstance(parameter, click.Option) and not parameter.multiple and not parameter.count:
            values = given.get(parameter.name) or ()
            if len(values) > 1:
                raise UserError(_describe_repeated(parameter, values))
    if isinstance(command, click.Group) and rest:
        _, behind, more = command.resolve_command(context, rest)
        if behind is not None:
            _refuse_repeated(behind, more, context)


def _gathering(parameter: click.Parameter) -> click.Parameter:
    """Return a copy of an option that collects all its values; other parameters unchanged."""
    if not isinstance(parameter, click.Option) or parameter.count:
        return parameter
    gathering = copy.copy(parameter)
    gathering.multiple = True
    return gathering


def _describe_repeated(option: click.Option, values: Sequence[object]) -> str:
    times = "twice" if len(values) == 2 else f"{len(values)} times"
    shown = "" if option.is_flag else " ({})".format(", ".join(
        " ".join(value) if isinstance(value, tuple) else value if isinstance(value, str) else "without a value"
        for value in values))
    return f"{_shown_name(option)} is given {times}{shown}; expected once: keep only one"


def _shown_name(parameter: click.Parameter) -> str:
    """Return an option's long name, or an argument's name as the help shows it."""
    if isinstance(parameter, click.Option):
        return max(parameter.opts, key=len)
    return parameter.human_readable_name


def _raise_terminated(signum, frame) -> None:
    raise Terminated


def _send_again(report: Callable, unraisable) -> None:
    """Resend a signal whose exception Python dropped because it was raised in a finalizer or a weakref callback.

    report:  the previous sys.unraisablehook, for all other exceptions
    """
    if not issubclass(unraisable.exc_type, KeyboardInterrupt):
        report(unraisable)
        return
    number = signal.SIGTERM if issubclass(unraisable.exc_type, Terminated) else signal.SIGINT
    send, *arguments = ([signal.pthread_kill, threading.main_thread().ident]  # wakes it when it waits
                        if hasattr(signal, "pthread_kill") else [signal.raise_signal])
    timer = threading.Timer(0.05, send, [*arguments, number])  # after this call, in which it would be dropped again
    timer.daemon = True
    timer.start()


def _fail(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code


def _fail_temporarily(error: Exception, failure: OSError | DiskFailure) -> int:
    # The system does not always name the file; then the message of the error that wraps it does.
    named = isinstance(failure, DiskFailure) or failure.filename is not None
    text = describe_failure(failure) if named else _one_line(str(error))
    return _fail(f"{text}; run the same command again once it works", EXIT_TEMPORARY)


def _one_line(message: str) -> str:
    return " ".join(message.split())
