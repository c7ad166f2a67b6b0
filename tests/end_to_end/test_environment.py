"""pyproject.toml lists what has to be installed, and nothing else."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
OURS = {path.name for path in ROOT.iterdir() if path.is_dir()} | {path.stem for path in ROOT.glob("*.py")}
SELF_EVIDENT = {"torch", "numpy", "scipy", "pillow", "pytest", "ruff"}
NEVER_IMPORTED = {"ninja", "ruff", "cuda-toolkit", "pytest-xdist"}  # programs, and what pytest loads by itself


def list_dependencies(*extras):
    """Return the names of distributions that the project with these extras asks for, extras of extras included."""
    project = PROJECT["project"]
    lines = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    inner = [match[1] for line in lines if (match := re.fullmatch(rf"{project['name']}\[([\w,]+)\]", line))]
    names = {re.match(r"[\w-]+", line)[0].lower() for line in lines} - {project["name"]}
    return names | (list_dependencies(*",".join(inner).split(",")) if inner else set())


def list_imports(files):
    """Return the distributions that the files import, wherever in them."""
    modules = set()
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules.add(node.module.split(".")[0])
    installed = packages_distributions()
    foreign = modules - OURS - set(sys.stdlib_module_names)
    return {re.sub(r"[_.]", "-", installed.get(name, [name])[0]).lower() for name in foreign}


def list_files(*folders):
    return [path for folder in folders for path in (ROOT / folder).rglob("*.py")]


PACKAGES = set(PROJECT["tool"]["setuptools"]["packages"])
PROGRAMS = [*ROOT.glob("*.py"), *list_files("scripts", *{name.split(".")[0] for name in PACKAGES})]


def test_programs_import_what_is_listed_and_everything_listed_is_imported():
    extras = ("offline", "timm", "study", "umap", "federated", "dp")
    assert list_imports(PROGRAMS) == list_dependencies(*extras) - NEVER_IMPORTED


def test_tests_import_what_the_extra_dev_lists_and_everything_listed_is_needed():
    imported = list_imports([*PROGRAMS, *list_files("tests")])
    assert imported == list_dependencies("dev") - NEVER_IMPORTED


def test_each_dependency_has_its_reason_above_it():
    text = (ROOT / "pyproject.toml").read_text()
    lines = text[text.index("dependencies = ["):text.index("[tool.setuptools]")].splitlines()
    for above, line in pairwise(lines):
        if (match := re.match(r'\s*(?:\w+ = \[)?"([\w-]+)', line)) and match[1] not in SELF_EVIDENT | {
                PROJECT["project"]["name"]}:
            assert above.strip().startswith("#"), f"{match[1]} is listed without a reason"


def test_other_files_install_from_the_list():
    assert not [*ROOT.glob("requirements*.txt")]
    conda = (ROOT / "environment.yml").read_text().split("- pip:")[1].split()
    assert conda == ["-", "-e", ".[offline,study]"]
    assert "pip install --quiet -e .[dev]" in (ROOT / "Makefile").read_text()


@pytest.mark.parametrize("path", ["README.md", "docs/metrics.md", "docs/projector.md"])
def test_pages_name_no_file_of_requirements(path):
    assert "requirements" not in (ROOT / path).read_text()


def test_every_package_is_installed_with_the_project():
    inits = [path.parent.relative_to(ROOT).parts for path in ROOT.glob("[a-z]*/**/__init__.py")]
    packages = {".".join(parts) for parts in inits if parts[0] != "tests"}
    assert packages == PACKAGES
