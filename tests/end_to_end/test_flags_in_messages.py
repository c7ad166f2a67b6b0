"""Messages and help texts mention only flags of the running program, or name the other program beside the flag.

A text counts for each program whose code can reach it: from the program's module, along the names that functions,
methods and constants refer to. A method counts if its class does and reached code uses its name.
"""

import ast
import re
from collections import defaultdict
from pathlib import Path

import click
import pytest

from tests.end_to_end.test_command_lines import PROGRAMS, ROOT

FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
FILES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in ROOT.rglob("*.py")
         if not {".venv", "tests"} & set(path.relative_to(ROOT).parts) and path.stem != "__init__"}
SETS = "dataset_tool.py"  # the program that converts
# Some texts there are arguments of other programs, not messages: of compilers, and the demonstration's commands.
ARGUMENTS = {"torch_utils.ops.build", "scripts.demo"}
# Pages: style sheets, whose variables look like flags, and commands that test_demo.py checks.
PAGE = {"scripts.demo:_PAGE", "scripts.demo:next_steps", "latent.exploration_page:STYLE"}
# Of training runs, which choose no class for their metrics.
CLASS_OF_METRICS = {
    "imagesets.classes:find_class", "metrics.reference:Reference.__init__", "metrics.reference:Reference.check_class",
    "metrics.reference:Reference.labels_of_fakes", "metrics.image_sources:SetImages.__init__"}
# Texts that a program's code refers to but never reaches, with the reason.
UNREACHED = {
    ("train.py", "--class"): CLASS_OF_METRICS,
    ("federate.py", "--class"): CLASS_OF_METRICS,
    ("federate.py", "--subset"): {"training.options:FLAGS", "training.options:_dataset_config"},  # sites train on all
    ("federate.py", "--network"): {  # compare opens the networks of its arms
        "generation.network:choose_network", "generation.network:open_network"},
    ("federate.py", "--source"): {"federated.compare_arms:write_union"},  # arguments of dataset_tool.py
    ("federate.py", "--dest"): {"federated.compare_arms:write_union"},
    ("federate.py", "--set"): {  # of NVIDIA FLARE's programs
        "federated.deployment.processes:_server_process", "federated.deployment.processes:_site_process"},
    ("train.py", "--ci"): {"metrics.evaluation:Evaluator.__init__"},  # its metrics have no intervals
    ("train.py", "--holdout"): {  # nor a floor
        "metrics.reference:Reference.__init__", "metrics.reference:Reference.check_holdout"},
    ("projector.py", "--resolution"): {"imagesets.resize:PixelSpec.__post_init__"},  # it gives both sizes
    ("projector.py", "--max-hours"): {"dnnlib.cli:StopRequest.wanted"},  # it has no limit
    ("projector.py", "--dest"): {"imagesets.writer:ImageSetWriter.__init__"},  # the default; its messages name --outdir
    # It opens whole sets and takes their classes from labels.
    ("study.py", "--class"): {
        "imagesets.classes:find_class", "metrics.image_sources:SetImages.__init__", "latent.targets:_wanted_rows"},
    ("study.py", "--per-class"): {
        "metrics.image_sources:SetImages.class_names", "metrics.image_sources:SetImages.select"},
    ("study.py", "--detector-weights"): {"metrics.detectors.registry:find_packaged"},  # the default; --weights here
    # Its projections are those of projector.py, of chosen images of data sets, in W and without pivotal tuning.
    ("study.py", "--depth"): {"imagesets.pixel_formats:BEYOND_DEPTH", "imagesets.pixel_formats:Depth.__post_init__",
                              "imagesets.pixel_formats:NOT_FINITE"},
    ("study.py", "--dest"): {"imagesets.writer:ImageSetWriter.__init__"},
    ("study.py", "--group-by-class"): {"latent.targets:choose_targets"},
    ("study.py", "--label"): {"generation.network:Classes.known_labels"},
    ("study.py", "--max-hours"): {"dnnlib.cli:StopRequest.wanted"},
    ("study.py", "--pti-steps"): {"latent.command:ProjectRequest.__post_init__"},
    ("study.py", "--resize-filter"): {"imagesets.resize:PixelSpec.__post_init__"},
    ("study.py", "--resolution"): {"imagesets.resize:PixelSpec.__post_init__"},
    ("study.py", "--space"): {"latent.command:ProjectRequest.__post_init__",
                              "latent.projection:ProjectionSettings.__post_init__"},
    ("study.py", "--target"): {"latent.command:ProjectRequest", "latent.command:ProjectRequest.__post_init__"},
    ("study.py", "--transform"): {"imagesets.resize:PixelSpec.__post_init__", "latent.targets:spec_for"},
    # It divides no images among classes; np.divide has the name of that method.
    ("study.py", "--classes"): {"generation.network:Classes._given_counts", "generation.network:Classes.divide"},
    ("study.py", "--labels-from"): {"generation.network:Classes.divide"},
    ("study.py", "--zip"): {"generation.network:Classes.divide"},
    # The classifier of a file, which study.py classify opened.
    ("explore.py", "--model"): {"analysis.backbones:_torchvision"},
    ("explore.py", "--size"): {"analysis.backbones:_torchvision", "analysis.backbones:open_backbone"},
    ("explore.py", "--workers"): {"dnnlib.workers:_Worker._describe_death"},  # it starts none
    # Originals are prepared as projector.py did, which checked how.
    ("explore.py", "--depth"): {"imagesets.pixel_formats:BEYOND_DEPTH", "imagesets.pixel_formats:Depth.__post_init__",
                                "imagesets.pixel_formats:NOT_FINITE"},
    ("explore.py", "--resize-filter"): {"imagesets.resize:PixelSpec.__post_init__"},
    ("explore.py", "--resolution"): {"imagesets.resize:PixelSpec.__post_init__"},
    ("explore.py", "--transform"): {"imagesets.resize:PixelSpec.__post_init__", "latent.targets:spec_for"},
    ("explore.py", "--per-class"): {  # it takes the whole training set
        "metrics.image_sources:SetImages.class_names", "metrics.image_sources:SetImages.select"},
    ("generate.py", "--dest"): {"imagesets.writer:ImageSetWriter.__init__"},  # its messages name --zip
}


def flags_of(command):
    """Return the flags of a command and of its subcommands."""
    options = [option for option in command.params if isinstance(option, click.Option)]
    return {"--help", *(form for option in options for form in (*option.opts, *option.secondary_opts)),
            *(flag for behind in getattr(command, "commands", {}).values() for flag in flags_of(behind))}


FLAGS = {Path(name).name: flags_of(command) for name, command in PROGRAMS.items()}
MODULES = {Path(name).name: name.removesuffix(".py").replace("/", ".") for name in PROGRAMS}
MODULES["nvidia_pickle.py"] = "training.snapshot"  # what its __main__ imports


def _is_text(node):
    """Tell whether a statement is a docstring."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


class Module:
    """The parts of a module, and what each refers to."""

    def __init__(self, name, path):
        self.name = name
        tree = ast.parse(path.read_text(encoding="utf-8"))
        self.imported = {}  # name here -> (module, name there), (module, None) for a module
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    whole = f"{node.module}.{alias.name}"
                    found = (whole, None) if whole in FILES else (node.module, alias.name)
                    self.imported[alias.asname or alias.name] = found
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    self.imported[alias.asname or alias.name.partition(".")[0]] = (alias.name, None)
        self.parts = defaultdict(list)  # "function", "Class", "Class.method", "CONSTANT" or "" -> its nodes
        for node in tree.body:
            if _is_text(node) or (isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)):
                continue
            if isinstance(node, ast.ClassDef):
                methods = [item for item in node.body if isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef))]
                for method in methods:
                    self.parts[f"{node.name}.{method.name}"].append(method)
                self.parts[node.name] += [*node.bases, *node.decorator_list, *node.keywords,
                                          *(item for item in node.body if item not in methods and not _is_text(item))]
            elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                self.parts[node.name].append(node)
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                for name in {item.id for target in targets for item in ast.walk(target) if isinstance(item, ast.Name)}:
                    self.parts[name].append(node)
            elif not isinstance(node, (ast.Import, ast.ImportFrom)):
                self.parts[""].append(node)

    def references(self, part):
        """Return the (module, part) that a part refers to by name, and the names of attributes that it uses."""
        found, attributes = set(), set()
        for node in (inner for outer in self.parts[part] for inner in ast.walk(outer)):
            if isinstance(node, ast.Attribute):
                attributes.add(node.attr)
                if isinstance(node.value, ast.Name) and self.imported.get(node.value.id, ("", ""))[1] is None:
                    found.add((self.imported[node.value.id][0], node.attr))
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                found.add((self.name, node.id) if node.id in self.parts else self.imported.get(node.id, ("", None)))
        return found, attributes


SOURCES = {name: Module(name, path) for name, path in FILES.items()}


def reached_by(program):
    """Return the (module, part) that a program's code can reach."""
    reached, asked, waiting, todo = set(), set(), defaultdict(set), []

    def reach(module, part):
        if module in SOURCES and part in SOURCES[module].parts and (module, part) not in reached:
            reached.add((module, part))
            todo.append((module, part))

    for part in list(SOURCES[MODULES[program]].parts):
        reach(MODULES[program], part)
    while todo:
        module, part = todo.pop()
        source = SOURCES[module]
        reach(module, "")
        for method in [name for name in source.parts if name.startswith(f"{part}.")]:
            name = method.partition(".")[2]
            if name.startswith("__") or name in asked:
                reach(module, method)
            else:
                waiting[name].add((module, method))
        found, attributes = source.references(part)
        for target in found:
            reach(*target)
            # a name that a module only hands on
            if target[0] in SOURCES and target[1] in SOURCES[target[0]].imported:
                reach(*SOURCES[target[0]].imported[target[1]])
        for name in attributes - asked:
            asked.add(name)
            for target in waiting.pop(name, ()):
                reach(*target)
    return reached


def texts_of(module, part):
    """Yield the strings in a part except docstrings, with {} for placeholders."""
    nodes = [inner for outer in SOURCES[module].parts[part] for inner in ast.walk(outer)]
    skipped = {node.body[0].value for node in nodes
               if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
               and isinstance(node.body[0], ast.Expr)}
    for node in nodes:
        if isinstance(node, ast.JoinedStr):
            skipped.update(node.values)
            yield "".join(item.value if isinstance(item, ast.Constant) else "{}" for item in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in skipped:
            yield node.value


def named_flags(text, program):
    """Yield (program, flag) for each flag in a text; program is None if the text does not name one.

    A flag belongs to the program whose name it follows in its clause, else to the running one. Conversion is done by
    dataset_tool.py, some of whose flags have the same names as those of other programs.
    """
    for clause in re.split(r"[;,()\n]|: |\bor\b", text):
        owner = None if "convert" in clause and program != SETS else program
        for word in re.finditer(rf"[\w/]+\.py\b|\btorchrun\b|\btorch_utils\.ops\.build\b|{FLAG.pattern}", clause):
            if word[0].startswith("--"):
                yield owner, word[0]
            else:
                owner = {"torch_utils.ops.build": "build.py"}.get(word[0], Path(word[0]).name)


def wrong_flags(program):
    found = set()
    for module, part in reached_by(program):
        where = f"{module}:{part}"
        for text in texts_of(module, part) if where not in PAGE else ():
            if module in ARGUMENTS and re.fullmatch(r"-\S+", text):
                continue
            for owner, flag in named_flags(text, program):
                if owner != "torchrun" and flag not in FLAGS.get(owner, ()) \
                        and where not in UNREACHED.get((program, flag), ()):
                    found.add((where, owner, flag))
    return sorted(found, key=str)


@pytest.mark.parametrize("program", FLAGS)
def test_messages_name_flags_of_the_program_at_hand(program):
    assert wrong_flags(program) == []


@pytest.mark.parametrize(("text", "expected"), [
    ("--gamma is 3; try --batch=4", [("train.py", "--gamma"), ("train.py", "--batch")]),
    ("convert it with dataset_tool.py --transform=center-crop --resolution=8x8, or leave --cond out",
     [("dataset_tool.py", "--transform"), ("dataset_tool.py", "--resolution"), ("train.py", "--cond")]),
    ("convert it with the same --classes", [(None, "--classes")]),
    ("calc_metrics.py --run={} makes it up", [("calc_metrics.py", "--run")]),
])
def test_flags_belong_to_the_program_that_is_named_before_them(text, expected):
    assert list(named_flags(text, "train.py")) == expected


def test_code_that_a_program_comes_to_is_found_through_imports_methods_and_constants():
    reached = reached_by("train.py")
    assert {("training.options", "FLAGS"), ("training.loop", "TrainingLoop.train"),
            ("training.options", "TrainOptions.check"), ("training.transfer", "transfer_weights"),
            ("training.ada", "next_p")} <= reached
    assert not {module for module, _ in reached if module.startswith(("latent.", "imagesets.commands"))}


def test_exceptions_are_needed():
    for (program, flag), places in UNREACHED.items():
        for place in places:
            module, _, part = place.partition(":")
            assert (module, part) in reached_by(program)
            assert any(flag in text for text in texts_of(module, part)), place
