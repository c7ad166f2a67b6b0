"""imagesets.decode: silence inside, everything as before outside, also after an error."""
import logging
import os
import warnings

import pytest

from imagesets.decode import pillow_silenced, stderr_silenced


@pytest.mark.parametrize("fails", [False, True])
def test_stderr_silenced_drops_writes_and_restores(capfd, fails):
    def write():
        with stderr_silenced():
            os.write(2, b"inside")
            if fails:
                raise KeyError

    before = os.listdir("/proc/self/fd")
    if fails:
        with pytest.raises(KeyError):
            write()
    else:
        write()
    os.write(2, b"outside")
    assert capfd.readouterr() == ("", "outside")
    assert os.listdir("/proc/self/fd") == before


def test_pillow_silenced_drops_warnings_and_log_and_restores(monkeypatch, capsys):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # as in a program that has set up no logging
    log, filters = logging.getLogger("PIL.TiffImagePlugin"), list(warnings.filters)
    with pillow_silenced():
        warnings.warn("inside", UserWarning, stacklevel=1)
        log.error("inside")
    assert capsys.readouterr() == ("", "")
    assert (list(warnings.filters), logging.getLogger("PIL").handlers) == (filters, [])
    log.error("outside")
    assert capsys.readouterr().err == "outside\n"
