"""The files that name dependencies agree."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
CORE = {"torch", "torchvision", "numpy", "scipy", "pillow", "click", "tensorboard", "ninja"}


def requirements(text):
    return [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith(("#", "-r"))]


def test_versions_are_the_same_everywhere():
    expected = requirements((ROOT / "requirements.txt").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["dependencies"] == expected
    conda = (ROOT / "environment.yml").read_text()
    assert [line.removeprefix("- ").strip() for line in requirements(conda.split("- pip:")[1])] == expected
    for extra in ("offline", "dev"):
        assert project["optional-dependencies"][extra] == requirements((ROOT / f"requirements-{extra}.txt").read_text())


def test_each_dependency_beyond_the_core_has_its_reason_beside_it():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    names = {}
    for number, line in enumerate(lines):
        if line and not line.startswith("#"):
            names[line.split(">")[0]] = lines[number - 1].startswith("#")
    assert names.keys() >= CORE
    assert all(names[name] for name in names.keys() - CORE)


def test_every_package_is_installed_with_the_project():
    inits = [path.parent.relative_to(ROOT).parts for path in ROOT.glob("[a-z]*/**/__init__.py")]
    packages = {".".join(parts) for parts in inits if parts[0] != "tests"}
    assert set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]) == packages
