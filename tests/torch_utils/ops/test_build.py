"""torch_utils.ops.build: each library once, whole, and one line of advice where it cannot be built."""

import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from dnnlib.cli import run
from torch_utils.ops import build, compilers
from torch_utils.ops.build import find, library, obtain
from torch_utils.ops.compilers import BuildError, Toolkit, TorchBuild, read_subject, write_recipe

ROOT = Path(__file__).parent.parent.parent.parent
LEVELS = ["plain", "avx2"] if platform.machine() in ("x86_64", "AMD64") else ["plain"]
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="builds are tested on Linux")

# Says what it is; writes half of its output, waits for a file where one is named, then fails as asked or writes all.
COMPILER = """#!/bin/sh
case "$*" in *--version) echo asked >> "$LOG"; echo "fake 1.0"; exit ;; esac
echo "$*" >> "$LOG"
while [ "$1" != -o ]; do shift; done
printf half > "$2"
while [ -n "$WAIT_FOR" ] && [ ! -e "$WAIT_FOR" ]; do sleep 0.02; done
if [ -n "$FAULT" ]; then echo "In file included from csrc/a.h:1:"; echo "$FAULT"; exit 1; fi
printf whole > "$2"
"""
TORCH = TorchBuild(version="2.99.0+cu130", commit="c0ffee", cuda="13.0", cxx11_abi=True, folder=Path("/packages/torch"))
BUILD = f"""
import sys
from pathlib import Path, PosixPath
from torch_utils.ops import build
TorchBuild = build.TorchBuild
build.TorchBuild.installed = lambda: {TORCH!r}
print(build.library("cpu", source=Path(sys.argv[1])))
"""
BUILDING = "building the CPU operators, once, which usually takes half a minute: "


@pytest.fixture
def source(tmp_path):
    """A folder of sources of both kinds."""
    folder = tmp_path / "csrc"
    folder.mkdir()
    for name in ("library.cpp", "a_cpu.cpp", "a.cu", "cuda_library.cpp", "a.h"):
        (folder / name).write_text(f"// {name}\n")
    (folder / ".a.h.swp").touch()
    return folder


@pytest.fixture
def log(tmp_path, monkeypatch):
    """What the fake compiler was called for; it is $CXX, the cache is empty, and PyTorch needs no import."""
    compiler = tmp_path / "compiler"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("LOG", str(tmp_path / "calls.txt"))
    monkeypatch.setenv("MAX_JOBS", "1")
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "a cache"))
    for name in ("TORCH_EXTENSIONS_DIR", "TORCH_CUDA_ARCH_LIST", "WAIT_FOR", "FAULT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(TorchBuild, "installed", lambda: TORCH)
    return tmp_path / "calls.txt"


@pytest.fixture
def cache(log, tmp_path):
    return tmp_path / "a cache" / "ops"


def start(source):
    return subprocess.Popen([sys.executable, "-c", BUILD, str(source)], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


def wait_for(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def calls(log):
    return log.read_text().splitlines() if log.exists() else []


def message(kind, source, **options):
    with pytest.raises(BuildError) as error:
        library(kind, source=source, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_library_compiles_each_source_and_each_cpu_level(source, log):
    path = library("cpu", source=source)
    assert (path.name, path.read_text()) == ("ops_cpu.so", "whole")
    commands = calls(log)
    assert len(commands) == 1 + len(LEVELS) + 2
    compiled = [line.split(" -c ")[1] for line in commands if " -c " in line]
    assert sorted(compiled) == sorted(["csrc/library.cpp -o library.cpp.o",
                                       *(f"csrc/a_cpu.cpp -o a_cpu.cpp.{level}.o" for level in LEVELS)])
    for level in LEVELS:
        line = next(line for line in commands if f"-DCPU_LEVEL={level}" in line)
        assert ("-mavx2 -mfma -mf16c" in line) == (level == "avx2")
    assert "-shared" in commands[-1]


def test_build_keeps_what_tells_of_it_and_no_more(source, cache):
    folder = library("cpu", source=source).parent
    assert sorted(path.name for path in folder.iterdir()) == ["build.json", "build.ninja", "log.txt", "ops_cpu.so"]
    record = json.loads((folder / "build.json").read_text())
    assert (record["torch"], record["torch_cuda"], record["archs"]) == ("2.99.0+cu130", "13.0", [])
    assert record["steps"].keys() == {"library.cpp.o", "ops_cpu.so", *(f"a_cpu.cpp.{level}.o" for level in LEVELS)}
    assert record["seconds"] >= 0 <= min(record["steps"].values())
    assert record["cpu_seconds"] >= 0
    assert record["compiler"] == f"{os.environ['CXX']}: fake 1.0"
    assert sorted(path.name for path in cache.iterdir()) == ["answers", folder.name]


def test_second_call_starts_no_process(source, log, monkeypatch):
    first = library("cpu", source=source)
    count = len(calls(log))

    def refuse(*_, **__):
        raise AssertionError("a process is started")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    assert obtain("cpu", source=source).is_new is False
    assert library("cpu", source=source) == first
    assert len(calls(log)) == count


def test_forced_build_replaces_the_one_that_is_there(source, log):
    path = library("cpu", source=source)
    path.write_text("broken")
    assert library("cpu", source=source).read_text() == "broken"
    assert library("cpu", source=source, force=True) == path
    assert path.read_text() == "whole"


def test_library_that_was_removed_is_built_again(source, log):
    library("cpu", source=source).unlink()
    built = obtain("cpu", source=source)
    assert (built.is_new, built.library.read_text()) == (True, "whole")


# What is there, without building


def test_find_where_nothing_is_built_starts_no_process(source, cache, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a process is started")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    assert find("cpu", source=source) is None
    assert not cache.exists()


def test_find_returns_what_was_built_and_prefers_these_tools(source, log, tmp_path, monkeypatch):
    ours = library("cpu", source=source)
    other = tmp_path / "other"
    other.write_text(COMPILER.replace("fake 1.0", "fake 2.0"))
    other.chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setenv("CXX", str(other))
        assert find("cpu", source=source).library == ours  # of other tools for the same code
        theirs = library("cpu", source=source)
        assert find("cpu", source=source).library == theirs != ours
        patch.setenv("CXX", "gone")
        assert find("cpu", source=source).library == theirs  # the newest
    assert find("cpu", source=source).library == ours
    (source / "a.h").write_text("// changed\n")
    assert find("cpu", source=source) is None


def test_cpu_library_reads_the_headers_of_pytorch_in_one_source():
    # They are half of what a build costs.
    def reads(name):
        included = re.findall(r'#include ([<"])(.*?)[>"]', (build.SOURCE / name).read_text())
        return any(path.startswith(("ATen/", "torch/", "c10/")) if kind == "<" else reads(path)
                   for kind, path in included)

    subject = read_subject("cpu", build.SOURCE, TORCH, "")
    assert [name for name in subject.sources if name.endswith(".cpp") and reads(name)] == ["library.cpp"]


# The name of a build


def name_of(source, kind="cpu", *, torch=TORCH, archs="8.0", toolkit=None, monkeypatch=None, cache=None):
    subject = read_subject(kind, source, torch, archs)
    if kind == "cuda":
        monkeypatch.setattr("torch_utils.ops.compilers.find_toolkit", lambda *_: (toolkit, []))
    return write_recipe(subject, cache).name


def test_name_changes_with_all_that_a_library_depends_on(source, cache, log, tmp_path, monkeypatch):
    names = [name_of(source, cache=cache)]
    changes = {"version": "2.99.1", "commit": "cafe", "cuda": "13.1", "cxx11_abi": False, "folder": tmp_path}
    names += [name_of(source, torch=replace(TORCH, **{field: value}), cache=cache) for field, value in changes.items()]
    for file in ("a_cpu.cpp", "library.cpp", "a.h", "new.h"):
        (source / file).write_text("// changed\n")
        names.append(name_of(source, cache=cache))
    monkeypatch.setenv("CPATH", "/somewhere")
    names.append(name_of(source, cache=cache))
    monkeypatch.setenv("CXX", f"{os.environ['CXX']} -O1")
    names.append(name_of(source, cache=cache))
    compiler = Path(os.environ["CXX"].split()[0])
    compiler.write_text(COMPILER.replace("fake 1.0", "fake 1.1"))
    os.utime(compiler, (1, 1))
    names.append(name_of(source, cache=cache))
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    names.append(name_of(source, cache=cache))
    assert len(set(names)) == len(names) == 14


def test_name_of_cuda_changes_with_toolkit_and_architectures(source, cache, log, tmp_path, monkeypatch):
    toolkit = Toolkit(nvcc=Path("/cuda/bin/nvcc"), version="13.0", includes=(Path("/cuda/include"),),
                      cudart=Path("/cuda/lib64/libcudart.so"))
    name = partial(name_of, source, "cuda", monkeypatch=monkeypatch, cache=cache)
    names = [name(toolkit=toolkit), name(toolkit=replace(toolkit, version="13.1")), name(toolkit=toolkit, archs="9.0"),
             name(toolkit=replace(toolkit, nvcc=Path("/other/bin/nvcc")))]
    (source / "a.cu").write_text("// changed\n")
    names.append(name(toolkit=toolkit))
    assert len(set(names)) == 5


def test_name_stays_when_the_other_kind_of_sources_changes(source, cache, log):
    before = name_of(source, cache=cache)
    for file in ("a.cu", "cuda_library.cpp", ".a.h.swp", "notes.txt"):
        (source / file).write_text("// changed\n")
    assert name_of(source, cache=cache) == before


def test_ninja_file_quotes_what_shell_and_ninja_would_read_otherwise(source, cache, log):
    subject = read_subject("cpu", source, replace(TORCH, folder=Path("/a $b/torch")), "")
    text = write_recipe(subject, cache).ninja_file()
    assert "'/a $$b/torch/include'" in text
    assert "build library.cpp.o: run csrc/library.cpp\n" in text


# Several processes, killed ones


def test_two_processes_at_once_build_once(source, log, tmp_path, monkeypatch):
    monkeypatch.setenv("WAIT_FOR", str(tmp_path / "go"))
    first = start(source)
    wait_for(lambda: len(calls(log)) > 1)
    second = start(source)
    assert second.stderr.readline().startswith(f"waiting for operators that process {first.pid} on ")
    (tmp_path / "go").touch()
    says = [process.communicate() for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0)
    assert says[0][0] == says[1][0] == f"{library('cpu', source=source)}\n"
    assert says[0][1].startswith(BUILDING)
    assert BUILDING not in says[1][1]
    assert len(calls(log)) == 1 + len(LEVELS) + 2


def test_build_that_was_killed_is_done_anew(source, log, cache, tmp_path, monkeypatch):
    monkeypatch.setenv("WAIT_FOR", str(tmp_path / "go"))
    process = start(source)
    wait_for(lambda: len(calls(log)) > 1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = [path.name for path in cache.iterdir() if path.name.startswith(".tmp-cpu-")]
    assert len(left) == 1
    monkeypatch.delenv("WAIT_FOR")
    assert library("cpu", source=source).read_text() == "whole"
    (tmp_path / "go").touch()  # lets the orphaned compiler end
    assert not [path for path in cache.iterdir() if path.name.startswith(".")]
    assert sum(" -c " in call for call in calls(log)) > len(LEVELS) + 1  # none of the first objects was taken
    process.stdout.close()
    process.stderr.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_build_that_is_stopped_leaves_nothing(number, source, log, cache, tmp_path, monkeypatch):
    monkeypatch.setenv("WAIT_FOR", str(tmp_path / "go"))
    code = BUILD.replace("print(", "import signal; signal.signal(signal.SIGTERM, signal.default_int_handler)\nprint(")
    process = subprocess.Popen([sys.executable, "-c", code, str(source)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: len(calls(log)) > 1)
    process.send_signal(number)
    assert "KeyboardInterrupt" in process.communicate()[1]
    assert [path.name for path in cache.iterdir()] == ["answers"]
    count = len(calls(log))
    (tmp_path / "go").touch()
    time.sleep(0.2)
    assert len(calls(log)) == count  # ninja ended too, and started nothing


# What cannot be built


def test_no_compiler_says_what_to_install(source, log, monkeypatch):
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(os, "defpath", "/nowhere")
    assert message("cpu", source) == ("no C++ compiler is found; expected g++, c++, clang++ or $CXX: install the "
                                      "package g++ (gcc-c++ on Fedora, gxx from conda-forge)")
    monkeypatch.setenv("CXX", "icpx -O2")
    assert message("cpu", source) == "CXX is 'icpx -O2'; expected a C++ compiler: set it to one, or unset it"


def test_library_built_before_the_compiler_went_is_used(source, log, monkeypatch):
    path = library("cpu", source=source)
    monkeypatch.setenv("CXX", "gone")
    built = obtain("cpu", source=source)
    assert (built.library, built.is_new, built.recipe) == (path, False, None)
    assert message("cpu", source, force=True).startswith("CXX is 'gone'")
    (source / "a.h").write_text("// changed\n")
    assert message("cpu", source).startswith("CXX is 'gone'")


@pytest.mark.parametrize("fault", [
    "csrc/a.h:3:9: error: 'Half' was not declared in this scope", "a.cu(3): error: expected a ';'",
    "nvcc fatal   : Unsupported gpu architecture 'compute_70'", "x.o: undefined reference to `launch(int)'",
    "/usr/bin/ld: cannot find -lc10: No such file or directory", "Killed",
])
def test_compile_error_shows_its_first_line_and_the_log(fault, source, log, cache, monkeypatch):
    monkeypatch.setenv("FAULT", fault)
    text = message("cpu", source)
    kept = next(cache.glob("cpu-*.log"))
    if fault == "Killed":  # none of the known forms: the last line
        fault = "ninja: build stopped: subcommand failed."
    assert text == f"compiling the operators failed ({fault}): the whole log is {kept}"
    assert "In file included from csrc/a.h:1:" in kept.read_text()
    assert sorted(path.name for path in cache.iterdir()) == ["answers", kept.name]
    monkeypatch.delenv("FAULT")
    library("cpu", source=source)
    assert not kept.exists()


def test_cache_that_cannot_be_written_says_which_variable_to_set(source, log, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "file"))
    assert message("cpu", source) == (f"operators cannot be built in {tmp_path}/file/ops (Not a directory): set "
                                      "DNNLIB_CACHE_DIR to a folder that can be written and has space")


def test_full_disk_says_which_variable_to_set(source, log, cache, monkeypatch):
    monkeypatch.setenv("FAULT", "fatal error: error writing to a.s: No space left on device")
    assert message("cpu", source) == (f"operators cannot be built in {cache} (No space left on device): set "
                                      "DNNLIB_CACHE_DIR to a folder that can be written and has space")


def test_cuda_without_its_parts_says_which(source, log, monkeypatch):
    monkeypatch.setattr(TorchBuild, "installed", lambda: replace(TORCH, version="2.99.0+cpu", cuda=None))
    assert message("cuda", source) == ("PyTorch 2.99.0+cpu is built without CUDA: install one with CUDA "
                                       "(https://pytorch.org/get-started/locally)")
    monkeypatch.setattr(TorchBuild, "installed", lambda: replace(TORCH, cuda="77.1"))
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    assert message("cuda", source).endswith(': pip install "cuda-toolkit[nvcc,cccl]==77.1.*"')


def test_other_faults_are_named(source, log, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    assert message("cpu", tmp_path / "empty") == (f"{tmp_path}/empty holds no sources of the cpu operators: install "
                                                  "the project again")
    monkeypatch.setenv("MAX_JOBS", "0")
    assert message("cpu", source) == ("MAX_JOBS is '0'; expected how many compilers may run at once: set it to 1 or "
                                      "more")
    with pytest.raises(ValueError, match="kind is 'gpu'; expected one of cpu, cuda"):
        library("gpu", source=source)
    monkeypatch.setattr(sys, "platform", "win32")
    assert message("cpu", source) == ("compiled operators are not supported on Windows: use Linux, or impl='auto', "
                                      "which runs PyTorch's own operators there")


def test_missing_ninja_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ninja", None)
    monkeypatch.setattr(compilers, "find_program", lambda _: None)
    with pytest.raises(BuildError) as error:
        compilers.find_ninja()
    assert str(error.value) == "ninja is not found, which starts the compilers: pip install ninja"


# The command


def test_command_prints_what_it_found_and_built(source, log, cache, monkeypatch, capsys):
    monkeypatch.setattr(build, "obtain", partial(obtain, source=source))
    assert run(build.main, ["--kind=cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    path = library("cpu", source=source)
    assert lines[0].startswith(f"torch     {torch.__version__}, ")
    assert lines[1] == f"compiler  {os.environ['CXX']}: fake 1.0"
    assert re.fullmatch(rf"cpu       built in [\d.]+ s, [\d.]+ CPU seconds: {re.escape(str(path))}", lines[2])
    assert lines[3].startswith("cache     1 builds, 0.0 MB in ")
    assert run(build.main, ["--kind=cpu"]) == 0
    assert capsys.readouterr().out.splitlines()[2].startswith("cpu       there already, made ")


def test_command_ends_with_one_line_of_advice(source, log, monkeypatch, capsys):
    monkeypatch.setattr(build, "obtain", partial(obtain, source=source))
    monkeypatch.setenv("CXX", "gone")
    assert run(build.main, ["--kind=cpu"]) == 2
    assert capsys.readouterr().err == ("error: CXX is 'gone'; expected a C++ compiler: set it to one, or unset it\n")


def test_command_that_is_optional_succeeds_with_one_line_where_there_is_no_compiler(source, log, monkeypatch, capsys):
    monkeypatch.setattr(build, "obtain", partial(obtain, source=source))
    monkeypatch.setenv("CXX", "gone")
    assert run(build.main, ["--kind=cpu", "--optional"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.splitlines()[1:] == ["cpu       not built, so that PyTorch's operators are used, which are slower: "
                                    "CXX is 'gone'; expected a C++ compiler: set it to one, or unset it"]
