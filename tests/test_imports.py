"""Who may import whom, and that importing does no work."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# package -> packages of the project that it may import besides itself
ALLOWED = {
    "dnnlib": set(),
    "torch_utils": {"dnnlib"},
    "imagesets": {"dnnlib"},
    "training": {"torch_utils", "imagesets", "dnnlib"},
    "metrics": {"torch_utils", "imagesets", "dnnlib"},
    "latent": {"training", "metrics", "torch_utils", "imagesets", "dnnlib"},
    "federated": {"training", "metrics", "torch_utils", "imagesets", "dnnlib"},
    "analysis": {"latent", "federated", "training", "metrics", "torch_utils", "imagesets", "dnnlib"},
}
FILES = sorted(path for package in ALLOWED for path in (ROOT / package).rglob("*.py"))
SCRIPTS = {path.stem for path in ROOT.glob("*.py")}


def imported_names(path):
    """Return the first part of every name that a file imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            yield node.module.split(".")[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down_only(path):
    package = path.relative_to(ROOT).parts[0]
    names = set(imported_names(path))
    forbidden = (set(ALLOWED) - ALLOWED[package] - {package}) | SCRIPTS
    assert not names & forbidden
    if package in ("dnnlib", "imagesets"):
        assert "torch" not in names


def test_a_script_and_a_package_never_share_a_name():
    assert not SCRIPTS & set(ALLOWED)


def test_importing_everything_does_no_work():
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in FILES if path.stem != "__init__"]
    code = f"""
import importlib, warnings, torch
def flags():
    return [torch.get_rng_state().tolist(), torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads(),
            torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision(), torch.cuda.is_initialized(),
            list(warnings.filters)]
torch.manual_seed(0)
before = flags()
for name in {modules!r}:
    importlib.import_module(name)
assert flags() == before
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
