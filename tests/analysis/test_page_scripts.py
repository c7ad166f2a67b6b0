"""Run the tests of the page's scripts by node's own test runner."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = Path(__file__).parent / "page"


def find_node():
    """Return node from PATH, or the one that playwright brings, or None."""
    try:
        import playwright
    except ImportError:
        return shutil.which("node")
    bundled = Path(playwright.__file__).parent / "driver" / "node"
    return shutil.which("node") or (str(bundled) if bundled.exists() else None)


NODE = find_node()


@pytest.mark.skipif(NODE is None, reason="node.js is not installed, nor playwright, which brings one")
@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.test.mjs")), ids=lambda path: path.name.split(".")[0])
def test_page_script_passes_its_own_tests(path):
    environment = {name: value for name, value in os.environ.items() if name != "NODE_OPTIONS"}

    done = subprocess.run([NODE, "--test", "--test-reporter=tap", str(path)], env=environment, timeout=120,
                          capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"^# pass (\d+)$", done.stdout, re.MULTILINE)[1]) > 0, done.stdout


def test_page_themes_repeat_the_colors_of_all_pages():
    colors = re.compile(r"--(?:ink|paper|line|soft|mark): #[0-9a-f]{6}")

    ours = colors.findall((ROOT / "analysis" / "page" / "map.css").read_text(encoding="utf-8"))
    theirs = colors.findall((ROOT / "latent" / "exploration_page.py").read_text(encoding="utf-8"))

    assert len(theirs) == 10
    assert sorted(ours) == sorted(theirs)
