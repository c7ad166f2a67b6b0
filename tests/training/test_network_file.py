"""training.network_file: the network file that a path, a pattern or a run's folder names."""

import re
from pathlib import Path

import pytest

from dnnlib.cli import UserError
from training.network_file import find_network

RUN = "runs/00000-lesions-cond-tiny"
NONE = ("without network-snapshot-*.safetensors; expected a network file (a .safetensors of a run, or a .pkl of "
        "NVIDIA's code), or the folder of a run")


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    """Two runs, the first with three network snapshots and a run's other files."""
    monkeypatch.chdir(tmp_path)
    for name in (f"{RUN}/network-snapshot-000200.safetensors", f"{RUN}/network-snapshot-001000.safetensors",
                 f"{RUN}/network-snapshot-1200000.safetensors", f"{RUN}/network-snapshot-9000000.safetensors.part",
                 f"{RUN}/training-state.pt", "runs/00001-b/network-snapshot-000200.safetensors", "runs/00002-c/log.txt",
                 "theirs/network-snapshot-000400.pkl", "odd[1].pkl", "odd1.pkl"):
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


@pytest.mark.parametrize(("text", "path"), [
    ("runs/00000-*/network-snapshot-000200.safetensors", f"{RUN}/network-snapshot-000200.safetensors"),
    (RUN, f"{RUN}/network-snapshot-1200000.safetensors"),  # by number, not by name
    ("runs/00000-*", f"{RUN}/network-snapshot-1200000.safetensors"),
    ("runs/00000-*/", f"{RUN}/network-snapshot-1200000.safetensors"),
    ("theirs", "theirs/network-snapshot-000400.pkl"),
    (f"{RUN}/network-snapshot-001000.safetensors", f"{RUN}/network-snapshot-001000.safetensors"),
    ("odd[1].pkl", "odd[1].pkl"),  # a file of that name comes first
])
def test_text_stands_for_a_network_file(text, path):
    assert find_network(text, "--network") == path


@pytest.mark.parametrize(("text", "message"), [
    *((gone, f"--network is {gone}, which does not exist; expected a network file: a .safetensors of a run, or a .pkl "
             "of NVIDIA's code") for gone in ("gone.pkl", "runs/gone/n.pkl", "odd1.pkl/n.pkl")),
    ("runs/00009-*", "--network is runs/00009-*, which matches nothing; expected a pattern that matches a network file "
                     "or the folder of a run"),
    ("runs/*/network-snapshot-000200.safetensors",
     "--network is runs/*/network-snapshot-000200.safetensors, which matches 2 paths: "
     f"{RUN}/network-snapshot-000200.safetensors, runs/00001-b/network-snapshot-000200.safetensors; expected a pattern "
     "that matches one, a network file or the folder of a run"),
    (f"{RUN}/*", f"--network is {RUN}/*, which matches 5 paths: {RUN}/network-snapshot-000200.safetensors, "
                 f"{RUN}/network-snapshot-001000.safetensors, {RUN}/network-snapshot-1200000.safetensors, "
                 f"{RUN}/network-snapshot-9000000.safetensors.part, {RUN}/training-state.pt; expected a pattern that "
                 "matches one, a network file or the folder of a run"),
    ("runs/00002-c", f"--network is runs/00002-c, a folder {NONE}"),
    ("runs/00002*", f"--network is runs/00002*, which matches the folder runs/00002-c {NONE}"),
])
def test_text_that_stands_for_none_or_several_is_refused_with_what_is_there(text, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        find_network(text, "--network")
