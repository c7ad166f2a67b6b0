"""Write scalars that TensorBoard shows.

Records are written here and not by torch's SummaryWriter: its thread dies with a traceback on the first full disk, and
takes with it everything that comes later. TensorBoard's own encoding of records is used.
"""

import io
import os
import re
from collections.abc import Mapping
from pathlib import Path

from dnnlib.appending import AppendFile

_PREFIX = "events.out.tfevents."  # TensorBoard finds files by it, and reads them in the order of their names
_NUMBERED = re.compile(re.escape(_PREFIX) + r"(\d{5,})")


class EventFile:
    """The events of one process; those of a continued run are in several files, whichever of them were removed.

    purge_step: steps from here on in files before this one no longer count; None keeps all
    """

    def __init__(self, folder: str | os.PathLike, *, purge_step: int | None = None):
        # One more than the last: a count would name a file that is there where an earlier one was removed.
        found = (_NUMBERED.fullmatch(path.name) for path in Path(folder).glob(f"{_PREFIX}*"))
        number = max((int(match[1]) for match in found if match), default=-1) + 1
        self.path = Path(folder) / f"{_PREFIX}{number:05d}"
        self._file = AppendFile(self.path, durable=False)
        self._purge_step = purge_step
        self._started = False

    def add_scalars(self, scalars: Mapping[str, float], *, step: int, time: float) -> None:
        """Append values at `step`. Raises OSError when that is not possible; they are then written later.

        time: seconds since 1970
        """
        from tensorboard.compat.proto.event_pb2 import Event  # takes a moment, and only the main process writes
        from tensorboard.compat.proto.summary_pb2 import Summary

        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()])
        events = [] if self._started else self._first_events(time)
        self._started = True
        self._file.append(_encode([*events, Event(wall_time=time, step=step, summary=summary)]))

    def _first_events(self, time: float) -> list:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        events = [Event(wall_time=time, file_version="brain.Event:2")]
        if self._purge_step is not None:
            start = SessionLog(status=SessionLog.START)
            events.append(Event(wall_time=time, step=self._purge_step, session_log=start))
        return events


def _encode(events: list) -> bytes:
    """Return events as records with checksums."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    buffer = io.BytesIO()
    writer = RecordWriter(buffer)
    for event in events:
        writer.write(event.SerializeToString())
    return buffer.getvalue()
