"""What the processes of sites send in a run: recorded where NVIDIA FLARE has a message as bytes, before TLS.

`environment_of` makes Python record in every process of a site (by a sitecustomize.py); `read_messages` puts streams of
chunks together and decodes what was recorded.
"""

import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_FOLDER = "RECORDED_TRAFFIC"
HOST_NAME, USER_NAME = "reading-room-7.clinic.example", "ann-schmidt"  # of the recorded processes


def environment_of(folder: Path, more: str = "") -> dict[str, str]:
    """Return the environment in which a site records into `folder`. more: statements for all processes of the site"""
    (folder / "python").mkdir(parents=True, exist_ok=True)
    (folder / "python" / "sitecustomize.py").write_text(
        "from tests.helpers.recorded_traffic import is_site_process, record\n"
        "if is_site_process():\n    record()\n" + more)
    return {"PYTHONPATH": str(folder / "python"), _FOLDER: str(folder), "USER": USER_NAME, "LOGNAME": USER_NAME}


def is_site_process() -> bool:
    """Return whether this is a process of NVIDIA FLARE: a site's own, or one of its jobs."""
    return any("nvflare_process" in each for each in sys.orig_argv)


def record() -> None:
    """Append each frame that this process sends to a file, and give the machine a name that can be looked for."""
    import socket
    import threading

    import msgpack
    from nvflare.fuel.f3.sfm.sfm_conn import SfmConnection

    socket.gethostname = socket.getfqdn = lambda *_: HOST_NAME
    system = os.uname()
    os.uname = lambda: os.uname_result((system[0], HOST_NAME, *system[2:]))
    path = Path(os.environ[_FOLDER]) / f"{os.getpid()}.frames"
    send, lock = SfmConnection.send_frame, threading.Lock()

    def send_frame(connection, prefix, headers, payload):
        url = connection.conn.connector.params.get("url") or str(connection.conn.connector)
        with lock, open(path, "ab") as file:
            file.write(msgpack.packb([url, prefix.type, msgpack.packb(headers), bytes(payload or b"")]))
        send(connection, prefix, headers, payload)

    SfmConnection.send_frame = send_frame


@dataclass
class SentMessage:
    """A message, or a frame of NVIDIA FLARE's that is not a part of a stream.

    url:      of the connection
    channel:  "" for the frames by which connections begin
    parts:    headers of all frames of the message
    """

    url: str
    channel: str
    topic: str
    parts: list[dict[str, Any]]
    payload: Any
    num_bytes: int = 0

    def leaves(self) -> Iterator[tuple[str, Any]]:
        """Yield each value of the payload with its path, such as __headers__/task_id."""
        yield from _leaves(self.payload)


@dataclass
class Recording:
    """All that was sent. raw: headers and payload of each message, one after another"""

    messages: list[SentMessage] = field(default_factory=list)
    raw: bytes = b""

    def table(self) -> dict[tuple[str, str], tuple[int, int]]:
        """Return channel and topic -> number of messages, and bytes of their headers and payloads."""
        found: dict[tuple[str, str], tuple[int, int]] = {}
        for each in self.messages:
            count, size = found.get((each.channel, each.topic), (0, 0))
            found[each.channel, each.topic] = count + 1, size + each.num_bytes
        return dict(sorted(found.items()))


def read_recording(folder: Path) -> Recording:
    """Return what was recorded in `folder` so far."""
    import msgpack
    from nvflare.apis.utils.decomposers import flare_decomposers
    from nvflare.fuel.f3.sfm.constants import Types
    from nvflare.fuel.utils import fobs
    from nvflare.private.admin_defs import Message

    flare_decomposers.register()
    fobs.register_data_classes(Message)
    recording, raw = Recording(), []
    for path in sorted(folder.glob("*.frames")):
        streams: dict[int, SentMessage] = {}
        with open(path, "rb") as file:
            for url, kind, header_bytes, payload in msgpack.Unpacker(file, max_buffer_size=2**31):
                headers = {key.removeprefix("cn__"): value
                           for key, value in (msgpack.unpackb(header_bytes) or {}).items()}
                size = len(header_bytes) + len(payload)
                if kind != Types.DATA:
                    content = msgpack.unpackb(payload) if payload else {}
                    message = SentMessage(url, "", "connection", [], content, size)
                elif headers["topic"] == "sm__DATA":
                    message = streams.setdefault(headers["sm__id"], SentMessage(
                        url, headers.get("sm__ch"), headers.get("sm__tp"), [], b""))
                    message.parts.append(headers)
                    message.payload, message.num_bytes = message.payload + payload, message.num_bytes + size
                    raw.append(header_bytes)
                    if headers["sm__dt"] != 2:  # not the last part
                        continue
                    raw.append(message.payload)
                    message.payload = fobs.loads(message.payload)
                    recording.messages.append(streams.pop(headers["sm__id"]))
                    continue
                else:
                    encoding = headers["payload_encoding"]
                    assert (encoding == "none") == (not payload)
                    assert encoding in ("none", "fobs")
                    content = fobs.loads(payload) if payload else {}
                    message = SentMessage(url, headers["channel"], headers["topic"], [headers], content, size)
                raw += [header_bytes, payload]
                recording.messages.append(message)
        assert not streams
    recording.raw = b"\n".join(raw)
    return recording


def _leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    from nvflare.apis.fl_context import FLContext
    from nvflare.private.admin_defs import Message

    if isinstance(value, FLContext):
        value = value.get_all_public_props()
    elif isinstance(value, Message):
        value = vars(value)
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _leaves(item, (*path, str(key)))
    elif isinstance(value, (list, tuple)) and value:
        for item in value:
            yield from _leaves(item, (*path, "*"))
    else:
        yield "/".join(path), value


UUID = "[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"


def is_name_of(text: str, site: str) -> bool:
    """Return whether a text is an identifier, the name of a site or server, or of one of their jobs."""
    return re.fullmatch(rf"({UUID}|({re.escape(site)}|server)(\.{UUID})?)", text) is not None
