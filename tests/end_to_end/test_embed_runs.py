"""study.py embed as a program: processes and threads, stopped before the end, a study's classifier, in a browser."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.embed_commands import Written, embed, embed_arguments, link_sets, make_sets
from tests.helpers.html_pages import CHROMIUM, open_in_chromium
from tests.helpers.projector_commands import contents
from tests.helpers.small_studies import classify, make_protocol
from tests.helpers.small_studies import make_sets as make_spots
from tests.helpers.training_runs import environment

ROOT = Path(__file__).parent.parent.parent
PCA = "--maps=pca"
SETS = ["open.zip", "synthetic.zip", "projected/projections.zip"]

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    return make_sets(tmp_path_factory.mktemp("sets"))


@pytest.fixture(autouse=True)
def here(sets, tmp_path, monkeypatch):
    """Files are named as they are in the folder of a test, which has the sets."""
    link_sets(sets, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(*flags, out="map.html", keeps_features=False, **variables):
    arguments = embed_arguments(SETS, *flags, out=out)
    if keeps_features:
        arguments.remove("--no-cache")
    return subprocess.Popen(
        [sys.executable, str(ROOT / "study.py"), *arguments], env={**environment(), **variables}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


def own_lines(err):
    """Return the lines of standard error without the note on operators that are not compiled."""
    return [line for line in err.splitlines() if not line.startswith("warning: using PyTorch's own operators")]


def finish(process):
    out, err = process.communicate(timeout=300)
    assert (process.returncode, own_lines(err)) == (0, [])
    return out


@pytest.fixture(scope="module")
def expected(sets, tmp_path_factory):
    """The files that this process makes, with one thread."""
    folder = tmp_path_factory.mktemp("expected")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(sets)
        assert embed(SETS, f"--table={folder / 'map.csv'}", out=folder / "map.html") == 0
    return contents(folder)


@pytest.mark.parametrize(("flags", "threads"), [([], "2"), (["--gpus=2"], "1")])
def test_page_does_not_depend_on_processes_and_threads(here, expected, flags, threads):
    (here / "out").mkdir()
    out = finish(start(*flags, "--table=out/map.csv", out="out/map.html", OMP_NUM_THREADS=threads))
    assert out.splitlines()[-1] == "written to out/map.html"
    assert contents("out") == expected


@pytest.mark.parametrize(("flags", "number", "code", "word"), [
    (["--gpus=2"], signal.SIGINT, 130, "interrupted"), ([], signal.SIGTERM, 143, "terminated")])
def test_stopped_command_leaves_neither_a_page_nor_a_process(here, tmp_path_factory, flags, number, code, word):
    before, cache = contents("."), tmp_path_factory.mktemp("cache")
    process = start(*flags, "--table=map.csv", "--tensorboard=projector", keeps_features=True,
                    DNNLIB_CACHE_DIR=str(cache))
    deadline = time.monotonic() + 200
    while not list(cache.glob("features/**/*.*")):  # those of the first set
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="utf-8").split()
    process.send_signal(number)
    _, err = process.communicate(timeout=200)
    assert (process.returncode, own_lines(err)[-1]) == (code, f"error: {word}")
    assert "Traceback" not in err
    assert contents(".") == before
    assert not [child for child in children if Path(f"/proc/{child}").exists()]


def test_classifier_that_a_study_made_gives_features_and_colors(here):
    make_spots(here)
    make_protocol(here)
    assert classify(here, "--num-seeds=1", outdir="classifiers") == 0
    classifier = "classifiers/models/real-seed0.safetensors"
    assert embed(["train.zip", "synthetic.zip"], PCA, f"--features={classifier}", f"--classifier={classifier}",
                 "--real=val.zip,test.zip") == 0
    found = Written()
    assert found.data["space"] == "real-seed0.safetensors"
    assert set(found.column("institution")) == {"train", "val", "test", ""}
    correct = found.column("correct")
    assert len(correct) == 156
    assert correct.count("right") > 0.65 * 156  # it is a small network with random weights


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_page_in_a_browser_requests_nothing_and_logs_nothing(here):
    assert embed(SETS) == 0
    logged, addresses = open_in_chromium(here / "map.html", here)
    assert logged == []
    assert addresses <= {(here / "map.html").as_uri()}
