"""What the command lines of all programs do alike: options given twice are refused, ~ is expanded in every path."""

import re
from pathlib import Path

import click
import pytest

import calc_metrics
import dataset_tool
import explore
import federate
import generate
import projector
import study
import train
from dnnlib.cache import cache_folder
from dnnlib.cli import UserPath, run
from metrics.names import choose_metrics
from scripts import demo
from tests.helpers.make_sets import make_set
from torch_utils.ops import build
from training.command import make_command
from training.snapshot import convert_command

ROOT = Path(__file__).parent.parent.parent
PROGRAMS = {"train.py": train.main, "generate.py": generate.main, "projector.py": projector.main,
            "calc_metrics.py": calc_metrics.main, "dataset_tool.py": dataset_tool.main, "scripts/demo.py": demo.main,
            "federate.py": federate.main, "explore.py": explore.main, "study.py": study.main,
            "torch_utils/ops/build.py": build.main, "training/nvidia_pickle.py": convert_command}
GROUPS = ("dataset_tool.py", "federate.py", "explore.py", "study.py")
COMMANDS = {**PROGRAMS, **{f"{program} {name}": command for program in GROUPS
                           for name, command in PROGRAMS[program].commands.items()}}
OPTIONS = [pytest.param(program, option, id=f"{program} {option.opts[-1]}") for program, command in COMMANDS.items()
           for option in command.params if isinstance(option, click.Option)]
# What stands in the place of a value that is a path: FILE, NAME=FILE, none|classes|FILE, [FILE], IN.pkl, ...
PATH = re.compile(r"FILE|PATH|DIR|FOLDER|IN\.|OUT\.")
NOT_ONLY_PATHS = {"FILE:NAME"}  # a direction in a file


def given(program, *arguments, capsys):
    """Run a program; return the exit code and standard error."""
    name, *command = program.split()
    code = run(PROGRAMS[name], [*command, *arguments])
    return code, capsys.readouterr().err


def test_every_program_is_among_those_looked_at():
    files = [path for path in ROOT.rglob("*.py") if not {".venv", "tests"} & set(path.relative_to(ROOT).parts)]
    assert {str(path.relative_to(ROOT)) for path in files if "__main__" in path.read_text()} == set(PROGRAMS)


@pytest.mark.parametrize(("program", "option"), OPTIONS)
def test_option_given_twice_is_refused_by_name(program, option, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, last = option.opts[0], option.opts[-1]  # a short and a long form, where there are two
    name = max(option.opts, key=len)
    if option.is_flag:
        forms, shown = [[first, last]], ""
    else:
        forms = [[f"{last}=1", f"{last}=2"], [last, "1", f"{last}=2"], [f"{last}=1", last, "2"],
                 [first, "1", last, "2"]]
        shown = " (1, 2)"
    for form in forms:
        code, err = given(program, *form, capsys=capsys)
        assert code == 2
        if option.multiple:
            assert "is given twice" not in err
        else:
            assert err == f"error: {name} is given twice{shown}; expected once: keep only one\n"
    assert list(tmp_path.iterdir()) == []


def test_options_that_may_be_given_several_times_are_these():
    several = {option.id for option in OPTIONS if option.values[1].multiple}
    assert several - {"dataset_tool.py --source", "dataset_tool.py --include", "dataset_tool.py --exclude"} == {
        "train.py --metrics", "calc_metrics.py --metrics", "train.py --detector-weights",
        "calc_metrics.py --detector-weights", "calc_metrics.py --compare", "dataset_tool.py phantom --bias",
        *(f"federate.py simulate --{name}" for name in ("data", "metrics", "detector-weights", "join", "leave")),
        "federate.py server --detector-weights",
        *(f"federate.py start --{name}" for name in ("metrics", "join", "leave")),
        *(f"federate.py compare --{name}" for name in ("data", "holdout", "metrics", "detector-weights", "join",
                                                       "leave")),
        *(f"federate.py start --{name}" for name in ("data", "metrics", "detector-weights", "join", "leave")),
        "study.py protocol --external", "study.py protocol --subset",
        "study.py authenticity --projections", "study.py embed --sets", "study.py embed --real",
        *(f"study.py classify --{name}" for name in ("regimes", "fraction", "dose")), "explore.py interpolate --points"}


@pytest.mark.parametrize(("arguments", "message"), [
    (["train.py", "-n", "--dry-run"], "--dry-run is given twice"),
    (["train.py", "-nn"], "--dry-run is given twice"),
    (["train.py", "--cond=1", "--cond", "1", "--cond=1"], "--cond is given 3 times (1, 1, 1)"),
    (["train.py", "-h", "--help"], "--help is given twice"),
    (["dataset_tool.py split", "x.zip", "-h", "-h"], "--help is given twice"),
    (["dataset_tool.py", "--dest=a", "split", "x.zip", "--dest=b", "--dest=c"], "--dest is given twice (b, c)"),
    (["generate.py", "--grid", "--grid=a.png"], "--grid is given twice (without a value, a.png)"),
])
def test_all_forms_of_an_option_count_as_one(arguments, message, capsys):
    assert given(*arguments, capsys=capsys) == (2, f"error: {message}; expected once: keep only one\n")


def test_value_that_looks_like_an_option_is_none(capsys):
    code, err = given("generate.py", "--network=--seeds=1", "--seeds=2", capsys=capsys)
    assert code == 2
    assert err.startswith("error: --outdir is missing; expected a folder for the images")


def test_metrics_given_several_times_are_a_list(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_set("set.zip", size=16)
    found = []
    command = make_command(lambda config, *_: found.append(config.metrics) or 0, choose_metrics)
    base = ["--outdir=runs", "--data=set.zip", "--cfg=tiny", "--detector=random-conv", "--precision=fp32"]
    assert run(command, [*base, "--metrics=fid50k_full", "--metrics=kid50k_full"]) == 0
    assert run(command, [*base, "--metrics=fid50k_full,kid50k_full"]) == 0
    assert found == [("fid50k_full", "kid50k_full")] * 2
    assert run(command, [*base, "--metrics=kid5k", "--metrics=fid5k,kid5k"]) == 2
    assert capsys.readouterr().err == "error: --metrics names kid5k 2 times; expected each metric once\n"


def test_every_path_of_every_program_expands_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for program, command in COMMANDS.items():
        for parameter in command.params:
            shown = parameter.metavar or parameter.name
            if not PATH.search(shown.upper()) or shown in NOT_ONLY_PATHS:
                assert not isinstance(parameter.type, UserPath), (program, shown)
                continue
            assert isinstance(parameter.type, UserPath), (program, parameter.name, shown)
            context = click.Context(command)
            assert str(parameter.type.convert("~/a b", parameter, context)) == f"{tmp_path}/a b"
            assert Path(parameter.type.convert("./~/a", parameter, context)) == Path("./~/a")
            if parameter.name == "detector_weights" and parameter.multiple:  # NAME=FILE
                assert parameter.type.convert("vgg16=~/a", parameter, context) == f"vgg16={tmp_path}/a"
                assert parameter.type.convert("~/a=~b", parameter, context) == f"{tmp_path}/a=~b"


@pytest.mark.parametrize(("program", "parameter"), [
    pytest.param(program, parameter, id=f"{program} {parameter.opts[-1]}") for program, command in COMMANDS.items()
    for parameter in command.params if isinstance(parameter.type, UserPath)])
def test_empty_path_is_refused_and_never_the_folder_of_the_program(program, parameter, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_set("set.zip")
    if isinstance(parameter, click.Argument):
        name, given_path = parameter.human_readable_name, [""]
    else:
        name, given_path = max(parameter.opts, key=len), [f"{parameter.opts[-1]}="]
        if program in ("dataset_tool.py inspect", "dataset_tool.py split"):
            given_path.append("set.zip")
    if (program, name) == ("generate.py", "--grid"):  # its empty value is that of --grid without a name
        return
    if (program, name) == ("training/nvidia_pickle.py", "OUT.safetensors"):
        given_path.insert(0, "set.zip")
    code, err = given(program, *given_path, capsys=capsys)
    assert (code, err) == (2, f"error: {name} is empty; expected PATH\n")
    assert [path.name for path in tmp_path.iterdir()] == ["set.zip"]


def test_named_path_that_is_empty_is_refused(capsys):
    assert given("train.py", "--detector-weights=vgg16=", capsys=capsys) == (
        2, "error: --detector-weights is vgg16=; expected vgg16=PATH\n")


def test_outdir_in_the_home_folder_makes_no_folder_named_tilde(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home/sets").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert run(dataset_tool.main, ["phantom", "--dest=~/sets/p.zip", "--count=4", "--resolution=8x8",
                                   "--classes=nv:0.5,mel:0.5", "--workers=1"]) == 0
    assert run(dataset_tool.main, ["split", "~/sets/p.zip", "--parts=a:0.5,b:0.5", "--allow-missing",
                                   "--dest=~/parts"]) == 0
    assert sorted(path.name for path in (tmp_path / "home/parts").iterdir()) == ["p-a.zip", "p-b.zip", "p-split.json"]
    found = []
    command = make_command(lambda config, settings, dataset: found.append(settings) or 0, choose_metrics)
    assert run(command, ["--outdir=~/runs", "--data=~/parts/p-b.zip", "--valid=~/parts/p-a.zip", "--metrics=none",
                         "--cfg=tiny", "--precision=fp32"]) == 0
    assert (found[0].outdir, found[0].data) == (f"{tmp_path}/home/runs", f"{tmp_path}/home/parts/p-b.zip")
    assert list((tmp_path / "here").iterdir()) == []


def test_home_folder_of_nobody_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, err = given("generate.py", "--network=n.pkl", "--outdir=~no-such-user/out", capsys=capsys)
    assert (code, err) == (2, "error: --outdir is ~no-such-user/out, but the home folder ~no-such-user does not exist; "
                              "expected ~ or ~user, or ./~no-such-user for a file or folder with that name\n")
    Path("~kept").mkdir()  # such a name is a name where it is there
    assert UserPath().convert("~kept/out", None, None) == "~kept/out"


@pytest.mark.parametrize(("name", "expected"), [
    ("DNNLIB_CACHE_DIR", "c"), ("XDG_CACHE_HOME", "c/lesion-stylegan2-ada")])
def test_cache_folder_of_the_environment_expands_the_home_folder(name, expected, tmp_path, monkeypatch):
    for other in ("DNNLIB_CACHE_DIR", "XDG_CACHE_HOME", "TORCH_EXTENSIONS_DIR"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(name, "~/c")
    assert cache_folder() == tmp_path / expected
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "~/ops")
    assert build.builds_folder() == tmp_path / "ops"
