"""The demonstration, shortened: what it leaves, and that it goes on where it was stopped."""

import json
import os
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest

from imagesets.reader import ImageSet

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_demo_goes_all_the_way_from_drawings_to_numbers(tmp_path):
    dest = tmp_path / "demo"
    command = [sys.executable, "-m", "scripts.demo", f"--dest={dest}", "--kimg=1", "--synthetic=40",
               "--detector=random-conv"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"DNNLIB_CACHE_DIR": str(tmp_path / "cache")},
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in dest.iterdir()} == {
        "phantom.zip", "run", "synthetic.zip", "samples.png", "reals_fakes.png", "curves.png", "summary.json",
        "index.html"}
    synthetic = ImageSet(dest / "synthetic.zip")
    assert (len(synthetic), (synthetic.labels == 1).sum(), synthetic.classes) == (40, 8, ["benign", "melanoma"])
    assert (synthetic.source["generated"], synthetic.source["phantom"]) == (True, True)
    summary = json.loads((dest / "summary.json").read_text())
    # 1.008: 63 whole batches
    assert (summary["kimg"], summary["detector"], summary["metric"]) == (1.008, "random-conv", "kid1k_full")
    lines = (dest / "run" / summary["run"] / "metric-kid1k_full.jsonl").read_text().splitlines()
    assert [summary[moment]["kid1k_full"] for moment in ("start", "end")] == [
        json.loads(line)["results"]["kid1k_full"] for line in (lines[0], lines[-1])]
    assert summary["end"]["kid1k_full"] < summary["start"]["kid1k_full"]
    with PIL.Image.open(dest / "samples.png") as samples:
        assert samples.height == 2 * 64  # a row for each network file: of the start, and of 1 kimg
    page = (dest / "index.html").read_text()
    assert all(f'src="{name}"' in page for name in ("samples.png", "reals_fakes.png", "curves.png"))
    assert "no data on patients" in " ".join(page.split())
    assert f"look at {dest / 'samples.png'}" in done.stdout


def test_demo_ends_with_the_message_of_the_program_that_failed(tmp_path):
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "phantom.zip").mkdir()  # where the first program wants to write
    done = subprocess.run([sys.executable, "-m", "scripts.demo", f"--dest={tmp_path / 'demo'}"], cwd=ROOT,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"error: --dest={tmp_path / 'demo' / 'phantom.zip'} is a folder; expected a zip file to write",
        "error: dataset_tool.py ended with exit code 2; see above. The same command continues from here"]
