"""Everything that leaves a site in runs over NVIDIA FLARE is an update, declared facts, or a listed control message."""

import base64
import io
import json
import socket
import zipfile
from collections import Counter
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from federated.agreement import Agreement
from federated.deployment.executor import FACTS, FAILURE, UPDATE
from federated.deployment.job import DECLARE, TRAIN
from federated.deployment.kits import FEDERATION
from federated.deployment.plan import DeclaredFacts
from federated.exchange import check_update
from imagesets.classes import CLASS
from tests.helpers.deployments import SITES, TINY, federate, running, same_networks
from tests.helpers.recorded_traffic import HOST_NAME, USER_NAME, environment_of, is_name_of, read_recording
from training.config import TrainConfig
from training.state import TrainingState

pytest.importorskip("nvflare", reason="the deployment needs the extra federated")
pytestmark = pytest.mark.slow

SECRET = "lesion-of-Ann.png"  # in the text of an exception
# Raises in each round of site b while a file is there.
FAILURES_OF_B = """
import sys
if "job" in sys.orig_argv:
    import os
    from federated.site import Site
    train = Site.train_round
    def fail(site, data):
        if os.path.exists({flag!r}):
            raise RuntimeError("cannot read /home/{user}/{secret}")
        return train(site, data)
    Site.train_round = fail
"""


@contextmanager
def three_runs(folder):
    """Yield what three runs of a federation sent: a complete one, one in which b fails, and one without data at c."""
    flag, recorded = folder / "b-fails", folder / "recorded"
    with running(folder) as federation:
        environment = environment_of(recorded)
        more = FAILURES_OF_B.format(flag=str(flag), user=USER_NAME, secret=SECRET)
        failing = {**environment, "PYTHONPATH": environment_of(recorded / "b", more)["PYTHONPATH"]}
        federation.start_server()
        for name in SITES:
            federation.start_site(name, until="", environment=failing if name == "b" else environment)
        for name in SITES:
            federation.programs[name].wait_for("connected to the server")
        federation.start_run("whole", "--rounds=3")
        federation.wait_for_state("whole", "finished")
        flag.touch()
        federation.start_run("failing", "--rounds=2")
        federation.wait_for_state("failing", "finished")
        (folder / "c.zip").rename(folder / "gone.zip")
        missing = federation.start_run("missing", "--rounds=2", check=False)
        federation.stop()
        (folder / "gone.zip").rename(folder / "c.zip")
        yield SimpleNamespace(folder=folder, run_of=federation.run_of, log_of=federation.log_of, port=federation.port,
                              missing=missing, recording=read_recording(recorded))


def agreement_of(federation):
    """Return the agreement of the runs, made from the settings of the first."""
    options = json.loads((federation.run_of("whole") / "training_options.json").read_text())
    config = TrainConfig.from_dict(options["config"])
    return Agreement.of(TrainingState.create(config, torch.device("cpu")), share=config.federation.share,
                        ema=config.federation.ema, payload=config.federation.payload,
                        classes=("benign", "melanoma"), label_kind=CLASS)


def to_server(federation):
    """Return the messages that left the sites: not those between a site's process and its jobs."""
    return [each for each in federation.recording.messages if each.url == f"grpc://localhost:{federation.port}"]


def site_of(message):
    """Return the site that sent a message."""
    return (message.parts[0]["origin"] if message.parts else message.payload["endpoint_name"]).partition(".")[0]


def check_run_equals_the_simulation_bit_for_bit(federation):
    federate("simulate", f"--data={','.join(f'{name}.zip' for name in SITES)}", "--outdir=simulated", "--name=whole",
             *TINY, "--rounds=3", cwd=federation.folder)
    assert same_networks(federation.run_of("whole"), federation.folder / "simulated" / "00000-whole")


def check_failing_site_tells_no_more_than_that_it_failed(federation):
    log = federation.log_of("failing")
    assert "round 1: the update of b is refused: its program failed; see the log of the site" in log
    assert federation.missing.returncode == 2
    assert federation.missing.stderr.endswith(
        "site c cannot take part: its data or files do not suit the run; see its log\n")
    kits = federation.folder / "kits"
    assert SECRET in "".join(path.read_text() for path in (kits / "b").rglob("log.txt"))  # at the site itself
    assert "c.zip" in "".join(path.read_text() for path in (kits / "c").rglob("log.txt"))
    at_server = [path for path in (*(kits / "server").rglob("*"), *(federation.folder / "runs").rglob("*"))
                 if path.is_file() and path.suffix not in (".safetensors", ".pt")]
    for path in at_server:
        assert SECRET.encode() not in path.read_bytes(), path


def check_connections_are_to_the_server_and_within_the_machine(federation):
    for each in federation.recording.messages:
        assert each.url == f"grpc://localhost:{federation.port}" or each.url.startswith(
            ("tcp://localhost:", "tcp://127.0.0.1:"))


# What messages have besides updates, facts and words for failures. Texts are names of sites, identifiers, and WORDS.

_PEER = {"__run_num__", "__identity_name__", "__fqsn__", "__is_leaf__", "__client_name__", "__current_job_id__"}
_CONTEXT = {f"__headers__/__peer_ctx__/{name}" for name in _PEER}
_PROPERTIES = {f"__headers__/__peer_props__/{name}" for name in _PEER}
_TASK = {*_CONTEXT, *(f"__headers__/{name}" for name in (
    "__audit_event_id__", "__cookie_jar__/__task_id__", "__cookie_jar__/__workflow__", "__msg_root_id__", "__task_id__",
    "__task_name__"))}
# NVIDIA FLARE's own messages, by channel and topic, and what each may hold.
CONTROL = {
    ("", "connection"): {"", "endpoint_name", "timestamp", "fqcn"},
    ("task", "challenge"): {""},
    ("task", "register"): {*_CONTEXT, "cert", "cn", "signature", "site_config"},
    ("task", "heart_beat"): _CONTEXT,
    ("task", "quit"): _CONTEXT,
    ("task", "report_job_failure"): {"job_id", "code", "reason"},
    # Answers: is the site free, is the job there, did it start, was it stopped, which version of NVIDIA FLARE it has.
    ("admin", "admin"): {"body", "body/__headers__/_is_resource_enough", "body/__headers__/_resource_reserve_token",
                         "headers", "headers/_rtnCode", "headers/_meta", "id", "topic"},
    ("aux_communication", "__sync_runner__"): {*_PROPERTIES, "__headers__/__topic__"},
    ("aux_communication", "__job_heartbeat__"): {*_PROPERTIES, "__headers__/__topic__"},
    ("aux_communication", "__task_check__"): {*_PROPERTIES, "__headers__/__topic__", "__headers__/__task_id__"},
    ("server_command", "get_task"): {*_CONTEXT, "__headers__/last_task_id"},
    ("server_command", "submit_update"): {*_TASK, FACTS, UPDATE, FAILURE},
    ("sm__STREAM", "sm__ACK"): {""},
    ("cellnet.channel", "bye"): {""},
}
HEADERS = {
    "channel", "topic", "from", "to", "origin", "destination", "route", "req_id", "msg_type", "msg_root_id",
    "msg_root_ttl", "reply_expected", "optional", "secure", "return_code", "send_time", "payload_encoding",
    "payload_len", "client_name", "client_type", "client_ip", "project_name", "federation_protocol_version",
    "nvflare_version", "job_ids", "ssid", "__token__", "__token_signature__", "cn", "nonce",
    *(f"sm__{name}" for name in ("ai", "ch", "cs", "dt", "id", "op", "os", "pe", "ri", "rs", "sq", "sz", "tp", "ws"))}
WORDS = {
    "", "NA", "2.9.0", FEDERATION, "regular", "req", "reply", "ok", "_ok", "none", "fobs", "bytes", "rounds", DECLARE,
    TRAIN, "OK", "Start the client app...", '{"version": "2.9.0"}', "reply_train.start_job",
    "reply_scheduler.check_resource", "reply_sys.report_version", "reply_train.abort", "sm__DATA",
    "Abort signal has been sent to the client App.", *(word for pair in CONTROL for word in pair)}


def check_control(message, paths, *, site, certificate):
    """Check that a message holds nothing but what is listed; return its values under `paths`, which are not checked."""
    allowed, found = CONTROL[message.channel, message.topic], {}
    values = [("header", name, value) for part in message.parts for name, value in part.items()]
    assert {name for _, name, _ in values} <= HEADERS
    leaves = list(message.leaves())
    assert {path for path, _ in leaves} <= allowed, (message.channel, message.topic)
    for path, value in [*((name, item) for _, name, each in values for item in flat(each)), *leaves]:
        if path in paths:
            found[path] = value
        elif path == "cert":
            assert value == certificate
        elif path in ("signature", "__token_signature__"):
            assert len(value if isinstance(value, bytes) else base64.b64decode(value, validate=True)) == 256
        elif isinstance(value, str):
            assert value in (*WORDS, f"deployed app to {site}") or is_name_of(value, site), (path, value)
        else:
            assert value is None or value in ({}, []) or isinstance(value, (bool, int, float)), (path, value)
    return found


def flat(value):
    return [item for each in value for item in flat(each)] if isinstance(value, list) else [value]


def check_all_that_leaves_a_site_is_agreed_declared_or_listed(federation):
    kinds, agreement = Counter(), agreement_of(federation)
    for message in to_server(federation):
        site = site_of(message)
        certificate = (federation.folder / "kits" / site / "startup" / "client.crt").read_bytes()
        found = check_control(message, (FACTS, UPDATE, FAILURE), site=site, certificate=certificate)
        if (message.channel, message.topic) != ("server_command", "submit_update"):
            assert not found
            continue
        [(kind, content)] = found.items()
        if kind == UPDATE:
            check_update(content, agreement, site=site)
        elif kind == FACTS:
            assert DeclaredFacts.from_bytes(content).num_images == 30
        kinds[site, kind, content if kind == FAILURE else ""] += 1
    assert kinds == {
        **{(name, FACTS, ""): 2 if name == "c" else 3 for name in SITES}, ("c", FAILURE, "unsuitable"): 1,
        ("a", UPDATE, ""): 5, ("b", UPDATE, ""): 3, ("c", UPDATE, ""): 5, ("b", FAILURE, "failed"): 2}
    print("\nchannel, topic: messages, bytes")
    for (channel, topic), (count, size) in federation.recording.table().items():
        print(f"{channel or '-'}, {topic}: {count}, {size}")


# Texts and pixels, looked for in every byte that any process of a site sent, also to its own jobs.


def check_no_name_path_or_address_is_sent(federation):
    folder = federation.folder
    texts = {str(folder), folder.name, "/kits", "/runs", HOST_NAME, USER_NAME, SECRET, "/home", "Error", "Traceback",
             "site-a", ".zip", ".png"}
    texts |= {each.address for addresses in psutil.net_if_addrs().values() for each in addresses
              if each.family in (socket.AF_INET, socket.AF_INET6, psutil.AF_LINK) and len(each.address) > 4}
    for name in SITES:
        with zipfile.ZipFile(folder / f"{name}.zip") as archive:
            texts |= {file for file in archive.namelist()} | {file.rsplit("/", 1)[-1] for file in archive.namelist()}
            texts |= set(json.loads(archive.read("dataset.json"))["groups"].values())  # patients
    assert any(each.startswith("patient") for each in texts)
    sent = federation.recording.raw
    assert b"melanoma" in sent  # a declared name is found
    assert [text for text in sorted(texts) if text.encode() in sent] == []


def check_no_row_of_an_image_is_sent(federation):
    needles = set()
    for name in SITES:
        with zipfile.ZipFile(federation.folder / f"{name}.zip") as archive:
            for file in archive.namelist():
                if not file.endswith(".png"):
                    continue
                data = archive.read(file)
                needles |= {data[at:at + 32] for at in range(data.index(b"IDAT") + 4, len(data) - 32, 32)}
                pixels = np.asarray(Image.open(io.BytesIO(data)))
                for image in (pixels, pixels.transpose(2, 0, 1)):  # as files and tensors have it
                    for rows in (image, image.astype(np.float32), image.astype(np.float32) / 127.5 - 1):
                        # A row: 32 pixels of three channels, or 32 values of one.
                        flat_rows = rows if image is pixels else rows.reshape(-1, rows.shape[-1])
                        needles |= {row.tobytes() for row in flat_rows}
    needles = {each for each in needles if len(set(each[:16])) > 3}  # even areas are found in any file
    assert len(needles) > 5000
    planted = next(iter(needles))
    assert found_in(planted, needles) == [planted]
    assert found_in(federation.recording.raw, needles) == []


def found_in(data, needles):
    """Return those of many byte strings, of eight bytes or more, that occur in data."""
    starts = np.unique(np.array([int.from_bytes(each[:8], "little") for each in needles], dtype=np.uint64))
    places = []
    for shift in range(8):
        words = np.frombuffer(data, dtype="<u8", offset=shift, count=(len(data) - shift) // 8)
        near = np.minimum(np.searchsorted(starts, words), len(starts) - 1)
        places += [shift + 8 * int(at) for at in np.flatnonzero(starts[near] == words)]
    by_start = {}
    for each in needles:
        by_start.setdefault(each[:8], []).append(each)
    return [each for at in places for each in by_start[data[at:at + 8]] if data.startswith(each, at)]


def test_a_run_equals_the_simulation_and_nothing_else_leaves_a_site(tmp_path):
    """One test, so that the runs are made once."""
    folder = tmp_path / "clinic-of-dr-meyer"
    folder.mkdir()
    with three_runs(folder) as federation:
        check_run_equals_the_simulation_bit_for_bit(federation)
        check_failing_site_tells_no_more_than_that_it_failed(federation)
        check_connections_are_to_the_server_and_within_the_machine(federation)
        check_all_that_leaves_a_site_is_agreed_declared_or_listed(federation)
        check_no_name_path_or_address_is_sent(federation)
        check_no_row_of_an_image_is_sent(federation)
