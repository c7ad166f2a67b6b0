"""Keep off the screen what Pillow and the C libraries below it say about damaged or unusual files."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_STDERR = 2


@contextmanager
def pillow_silenced() -> Iterator[None]:
    """Drop Pillow's warnings, and its log unless the program listens to it; nothing stays changed."""
    log, deaf = logging.getLogger("PIL"), logging.NullHandler()
    log.addHandler(deaf)  # Python prints what is logged while there is no handler at all
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.removeHandler(deaf)


@contextmanager
def stderr_silenced() -> Iterator[None]:
    """Drop what anyone in this process writes to standard error, as libtiff does past Python's knowledge."""
    try:
        screen = os.dup(_STDERR)
    except OSError:  # closed: nothing can be written there
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, _STDERR)
        yield
    finally:
        os.dup2(screen, _STDERR)
        os.close(screen)
        os.close(nowhere)
