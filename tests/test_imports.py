"""The house: who may import whom, what a file must be worth, and that docs/architecture.md names what exists."""

import ast
import re
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# package -> packages of the project that it may import besides itself
ALLOWED = {
    "dnnlib": set(),
    "torch_utils": {"dnnlib"},
    "imagesets": {"dnnlib"},
    "training": {"torch_utils", "imagesets", "dnnlib"},
    "generation": {"training", "torch_utils", "imagesets", "dnnlib"},
    "metrics": {"torch_utils", "imagesets", "dnnlib"},
    "latent": {"metrics", "generation", "training", "torch_utils", "imagesets", "dnnlib"},
    "federated": {"metrics", "generation", "training", "torch_utils", "imagesets", "dnnlib"},
    "analysis": {"latent", "federated", "metrics", "generation", "training", "torch_utils", "imagesets", "dnnlib"},
}
# The metrics' mathematics knows no training; what measures networks does.
_FOR_NETWORKS = {"generation", "training"}
ALLOWED_BY_FILE = {f"metrics/{name}.py": _FOR_NETWORKS for name in ("command", "comparison", "image_sources")}
WITHOUT_TORCH = ("dnnlib", "imagesets")

SMALL = 60  # lines; a smaller file costs its reader more than it gives, unless many open it anyway
FEW_IMPORTERS = 3
ONE_OP_METRIC_OR_DETECTOR = ("torch_utils/ops/", "metrics/detectors/")  # and the metrics, by name:
METRICS = {"authenticity", "diversity", "frechet", "kernel", "precision_recall", "inception_score", "perceptual_path"}
MAY_OCCUR_TWICE = {"__init__", "command"}

SCRIPTS = sorted(ROOT.glob("*.py"))
FILES = sorted(path for package in ALLOWED for path in (ROOT / package).rglob("*.py"))
PRODUCTION = [*SCRIPTS, *FILES, *sorted((ROOT / "scripts").glob("*.py"))]
TESTS = sorted((ROOT / "tests").rglob("*.py"))


def name_of(path):
    """Return the dotted name of a module; that of a package for its __init__.py."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in [*PRODUCTION, *TESTS]}


@cache
def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imported_modules(path):
    """Return the dotted names of all modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
    return frozenset(found - {name_of(path)})


def importers_of(module, files):
    return [path for path in files if module in imported_modules(path)]


@cache
def reached_from(module):
    """Return a module and all that it imports, and these, and so on."""
    reached, new = set(), {module}
    while new:
        reached |= new
        new = {other for name in new for other in imported_modules(MODULES[name])} & MODULES.keys() - reached
    return reached


# Classes that NVIDIA FLARE builds by their names, and the program that it runs in.
BY_NAME = {"federated.deployment.controller", "federated.deployment.executor", "federated.deployment.relaunch",
           "federated.deployment.nvflare_process"}


def is_entry(path):
    """Tell whether a file is started or built by its name: a script, `python -m`, or BY_NAME."""
    return (path.parent in (ROOT, ROOT / "scripts") or name_of(path) in BY_NAME
            or '__name__ == "__main__"' in path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down_only(path):
    where = path.relative_to(ROOT)
    package = where.parts[0]
    names = {name.split(".")[0] for name in imported_modules(path)}
    allowed = {package} | ALLOWED[package] | ALLOWED_BY_FILE.get(where.as_posix(), set())
    forbidden = (set(ALLOWED) - allowed) | {path.stem for path in SCRIPTS} | {"scripts", "tests"}
    assert not names & forbidden
    if package in WITHOUT_TORCH:
        assert "torch" not in names


def test_every_package_is_in_the_table():
    packages = {path.parent.name for path in ROOT.glob("[!.]*/*.py")}
    assert packages - set(ALLOWED) == {"scripts", "tests"}


def test_imports_go_in_no_circle():
    graph = {name: {other for other in imported_modules(path) if other in MODULES} for name, path in MODULES.items()}
    left = dict(graph)
    while free := {name for name, others in left.items() if not others & left.keys()}:
        left = {name: others for name, others in left.items() if name not in free}
    # What remains is in a circle, or imports one.
    while tops := left.keys() - set().union(*left.values()):
        left = {name: others for name, others in left.items() if name not in tops}
    assert not left, "these import each other, or stand between those that do"


def test_modules_are_named_where_they_are_built_by_name():
    names = set(re.findall(r"federated\.deployment\.[a-z_]+", " ".join(
        node.value for path in PRODUCTION for node in ast.walk(parse(path))
        if isinstance(node, ast.Constant) and isinstance(node.value, str))))
    assert names >= BY_NAME


def test_every_module_is_used_by_a_program():
    reached = set().union(*(reached_from(name) for name, path in MODULES.items()
                            if path in PRODUCTION and is_entry(path)))
    unused = [name for name, path in MODULES.items()
              if path in PRODUCTION and path.stem != "__init__" and name not in reached]
    assert unused == []


def test_small_files_are_imported_by_several():
    found = []
    for path in PRODUCTION:
        where = path.relative_to(ROOT).as_posix()
        is_one_of_a_kind = where.startswith(ONE_OP_METRIC_OR_DETECTOR) or (
            path.parent.name == "metrics" and path.stem in METRICS)
        if path.stem == "__init__" or is_entry(path) or is_one_of_a_kind:
            continue
        lines = len(path.read_text(encoding="utf-8").splitlines())
        importers = importers_of(name_of(path), PRODUCTION)
        if lines < SMALL and len(importers) < FEW_IMPORTERS:
            found.append(f"{where}: {lines} lines, {len(importers)} importers")
    assert found == []


def test_every_basename_occurs_once():
    counts = Counter(path.stem for path in [*PRODUCTION, *TESTS])
    assert [name for name, count in counts.items() if count > 1 and name not in MAY_OCCUR_TWICE] == []


def test_each_name_is_defined_once_in_its_file():
    found = []
    for path in [*PRODUCTION, *TESTS]:
        bodies = [parse(path).body, *(node.body for node in parse(path).body if isinstance(node, ast.ClassDef))]
        for body in bodies:
            # Setters of a property carry its name, and are no second definition.
            counts = Counter(node.name for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef))
                             and not any(isinstance(each, ast.Attribute) for each in node.decorator_list))
            found += [f"{path.relative_to(ROOT)}: {name}" for name, count in counts.items() if count > 1]
    assert found == []


def test_a_script_and_a_package_never_share_a_name():
    assert not {path.stem for path in SCRIPTS} & set(ALLOWED)


def test_importing_everything_does_no_work():
    modules = [name_of(path) for path in FILES if path.stem != "__init__"]
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


# docs/architecture.md: a numbered line below a heading is one file of a path: 1. `file.py` `name`, `Class.method`: text
_STOP = re.compile(r"^(?P<number>\d+)\. `(?P<file>[^`]+\.py)`(?P<names>(?:,? `[^`]+`)*): ", re.MULTILINE)
MOST_FILES = {"What does --gamma do?": 6, "From zip to logits": 9, "ADA": 5, "One projected image": 10, "FID": 10,
              "A direction and what it changes": 7, "A round of decentralized training": 8, "A run over a network": 8,
              "A classifier of a study": 9, "Is a synthetic image a copy?": 9, "A map of images": 7}


def paths_of_architecture():
    """Return {heading: [(file, [names])]}."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)[1:]
    found = {heading: [(match["file"], re.findall(r"`([^`]+)`", match["names"])) for match in _STOP.finditer(body)]
             for heading, body in zip(parts[::2], parts[1::2], strict=True)}
    return {heading: stops for heading, stops in found.items() if stops}


def defined_names(path):
    """Return the functions, classes, methods, fields and constants of a file: "name" and "Class.name"."""
    found = set()
    classes = [node for node in parse(path).body if isinstance(node, ast.ClassDef)]
    for body, prefix in [(parse(path).body, ""), *((node.body, f"{node.name}.") for node in classes)]:
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found.add(prefix + node.name)
            elif isinstance(node, ast.Assign):
                found |= {prefix + name.id for target in node.targets for name in ast.walk(target)
                          if isinstance(name, ast.Name)}
            elif isinstance(node, ast.AnnAssign):
                found.add(prefix + node.target.id)
    return found


def test_architecture_is_read_whole_by_these_tests():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    numbers = [int(match["number"]) for match in _STOP.finditer(text)]
    assert numbers == [int(number) for number in re.findall(r"^(\d+)\. ", text, flags=re.MULTILINE)]
    assert numbers == [number for stops in paths_of_architecture().values() for number in range(1, len(stops) + 1)]
    quoted = [name for name in re.findall(r"`([^`\s]+)`", text) if name.endswith((".py", "/"))]
    # A bare name such as `command.py` stands for a script or for a file of the package that the sentence is about.
    assert [name for name in quoted if not (ROOT / name).exists() and not list(ROOT.glob(f"*/{name}"))] == []


def test_architecture_has_its_eleven_paths_and_each_is_short():
    counts = {heading: len({file for file, _ in stops}) for heading, stops in paths_of_architecture().items()}
    assert counts.keys() == MOST_FILES.keys()
    assert {heading: count for heading, count in counts.items() if count > MOST_FILES[heading]} == {}


def test_architecture_names_files_and_functions_that_exist_and_follow_each_other():
    missing = []
    for heading, stops in paths_of_architecture().items():
        for file, names in stops:
            known = defined_names(ROOT / file) if (ROOT / file).exists() else set()
            missing += [f"{heading}: {file} {name}" for name in names if name not in known]
            if not names or not known:
                missing.append(f"{heading}: {file}")
        modules = [name_of(ROOT / file) for file, _ in stops]
        for index, (module, (file, _)) in enumerate(zip(modules, stops, strict=True)):
            if index and not any(module in reached_from(other) or other in reached_from(module)
                                 for other in modules[:index]):
                missing.append(f"{heading}: no imports lead from {file} to a file before it, or back")
    assert missing == []


def test_readme_names_files_that_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8").split("## Files")[1].split("\n## ")[0]
    missing = []
    for cell in re.findall(r"^\| (`[^|]*) \|", text, flags=re.MULTILINE):
        for quoted in re.findall(r"`([^`]+)`", cell):
            first, *others = quoted.split(", ")
            missing += [path for path in (first, *(f"{Path(first).parent}/{other}" for other in others))
                        if not (ROOT / path).exists()]
    assert missing == []
