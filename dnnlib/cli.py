"""What every command line program does alike: one line for a user's mistake, clean ends when it is stopped."""

import os
import signal
import sys

import click

EXIT_USAGE = 2
EXIT_BROKEN_PIPE = 1
EXIT_INTERRUPTED = 130  # as a shell reports a program ended by Ctrl-C
EXIT_TERMINATED = 143  # ... and by SIGTERM


# What asks a program to end: a batch system, and a terminal that is closed.
_ENDING = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]


class UserError(ValueError):
    """Something the user can put right; the message is one line: what, what it is, what was expected, what to do."""


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived: unwinds like Ctrl-C, so that temporary files are removed on the way."""


def run(command: click.Command, arguments: list[str] | None = None) -> int:
    """Run a click command and return its exit code.

    A wrong option, a UserError, a missing permission or a full disk gives one line on standard error and 2; Ctrl-C and
    SIGTERM give one line and 130 or 143. Any other exception is a fault of the program and keeps its traceback.
    """
    program = os.path.basename(sys.argv[0])
    previous = {number: signal.signal(number, _raise_terminated) for number in _ENDING
                if signal.getsignal(number) is not signal.SIG_IGN}  # nohup lets SIGHUP be ignored
    try:
        # Not command.main: it prints an empty line of its own when it is interrupted.
        with command.make_context(program, sys.argv[1:] if arguments is None else list(arguments)) as context:
            result = command.invoke(context)
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        return _fail(_one_line(error.format_message()), EXIT_USAGE)
    except UserError as error:
        return _fail(_one_line(str(error)), EXIT_USAGE)
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        return _fail(_describe_os_error(error), EXIT_USAGE)
    except Terminated:
        return _fail("terminated", EXIT_TERMINATED)
    except (KeyboardInterrupt, click.exceptions.Abort):
        return _fail("interrupted", EXIT_INTERRUPTED)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _raise_terminated(signum, frame) -> None:
    raise Terminated


def _fail(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code


def _one_line(message: str) -> str:
    return " ".join(message.split())


def _describe_os_error(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename is not None else ""
    return _one_line(f"{where}{error.strerror or error}")
