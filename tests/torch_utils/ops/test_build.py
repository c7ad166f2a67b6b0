"""torch_utils.ops.build: each library is built once and whole, or one line says why not and what to do."""

import os
import platform
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from dnnlib.cli import run
from torch_utils.ops import build
from torch_utils.ops.build import BuildError, find, library, read_sources

ROOT = Path(__file__).parent.parent.parent.parent
LEVELS = ["plain", "avx2"] if platform.machine() in ("x86_64", "AMD64") else ["plain"]
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="builds are tested on Linux")

# Writes half of its output, waits for a file if one is named, then fails if told to or writes all.
COMPILER = """#!/bin/sh
echo "$*" >> "$LOG"
while [ "$1" != -o ]; do shift; done
printf half > "$2"
while [ -n "$WAIT_FOR" ] && [ ! -e "$WAIT_FOR" ]; do sleep 0.02; done
if [ -n "$FAULT" ]; then echo "In file included from csrc/a.h:1:"; echo "$FAULT"; exit 1; fi
printf whole > "$2"
"""
BUILD = """
import sys
from pathlib import Path
from torch_utils.ops.build import library
print(library("cpu", source=Path(sys.argv[1])))
"""


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
    """The arguments of each call of the fake compiler, which is $CXX; the cache is empty."""
    compiler = tmp_path / "compiler"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("LOG", str(tmp_path / "calls.txt"))
    monkeypatch.setenv("MAX_JOBS", "1")
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "a cache"))
    for name in ("TORCH_EXTENSIONS_DIR", "TORCH_CUDA_ARCH_LIST", "WAIT_FOR", "FAULT"):
        monkeypatch.delenv(name, raising=False)
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
    assert len(commands) == len(LEVELS) + 2
    compiled = [line.split(" -c ")[1] for line in commands if " -c " in line]
    assert sorted(compiled) == sorted(["csrc/library.cpp -o library.cpp.o",
                                       *(f"csrc/a_cpu.cpp -o a_cpu.cpp.{level}.o" for level in LEVELS)])
    for level in LEVELS:
        line = next(line for line in commands if f"-DCPU_LEVEL={level}" in line)
        assert ("-mavx2 -mfma -mf16c" in line) == (level == "avx2")
    assert "-shared" in commands[-1]


def test_build_keeps_the_library_its_commands_and_the_log(source, cache):
    folder = library("cpu", source=source).parent
    assert sorted(path.name for path in folder.iterdir()) == ["build.ninja", "ops_cpu.so"]
    assert sorted(path.name for path in cache.iterdir()) == [folder.name, f"{folder.name}.log"]
    assert (cache / f"{folder.name}.log").read_text().splitlines()[-1].endswith("] ops_cpu.so")


def test_second_call_starts_no_process(source, log, monkeypatch):
    first = library("cpu", source=source)
    count = len(calls(log))

    def refuse(*_, **__):
        raise AssertionError("a process is started")

    monkeypatch.setattr(subprocess, "Popen", refuse)
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
    assert library("cpu", source=source).read_text() == "whole"


# Finding without building


def test_find_where_nothing_is_built_starts_no_process(source, cache, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a process is started")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    assert find("cpu", source=source) is None
    assert not cache.exists()


def test_find_returns_what_was_built_from_the_same_sources(source, log):
    path = library("cpu", source=source)
    assert find("cpu", source=source) == path
    (source / "a.h").write_text("// changed\n")
    assert find("cpu", source=source) is None


def test_cpu_library_reads_the_headers_of_pytorch_in_one_source():
    # They take half of the time of a build.
    def reads(name):
        included = re.findall(r'#include ([<"])(.*?)[>"]', (build.SOURCE / name).read_text())
        return any(path.startswith(("ATen/", "torch/", "c10/")) if kind == "<" else reads(path)
                   for kind, path in included)

    files = read_sources("cpu", build.SOURCE).files
    assert [name for name in files if name.endswith(".cpp") and reads(name)] == ["library.cpp"]


# The name of a build


def test_name_changes_with_all_that_a_library_depends_on(source, cache, monkeypatch):
    def name():
        return read_sources("cpu", source).library.parent.name

    names = [name()]
    for owner, field, value in ((torch, "__version__", "2.99.1"), (torch.version, "git_version", "cafe"),
                                (torch.version, "cuda", "99.1"), (build, "_CXX_FLAGS", ["-O2"]),
                                (build, "_LEVELS", {"plain": []}), (build, "_LINK_FLAGS", []),
                                (platform, "machine", lambda: "riscv64")):
        monkeypatch.setattr(owner, field, value)
        names.append(name())
    for file in ("a_cpu.cpp", "library.cpp", "a.h", "new.h"):
        (source / file).write_text("// changed\n")
        names.append(name())
    assert len(set(names)) == len(names) == 12


def test_name_of_cuda_changes_with_its_sources_flags_and_architectures(source, cache, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    names = [read_sources("cuda", source, archs).library.parent.name for archs in ("8.0", "9.0", "9.0+PTX")]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    assert read_sources("cuda", source).library.parent.name == names[1]
    monkeypatch.setattr(build, "_NVCC_FLAGS", [])
    names.append(read_sources("cuda", source, "8.0").library.parent.name)
    (source / "a.cu").write_text("// changed\n")
    names.append(read_sources("cuda", source, "8.0").library.parent.name)
    assert len(set(names)) == 5


def test_name_stays_when_the_other_kind_of_sources_changes(source, cache):
    before = read_sources("cpu", source)
    for file in ("a.cu", "cuda_library.cpp", ".a.h.swp", "notes.txt"):
        (source / file).write_text("// changed\n")
    assert read_sources("cpu", source) == before


def test_paths_that_shell_and_ninja_would_read_otherwise_reach_the_compiler_whole(source, log, monkeypatch):
    monkeypatch.setattr(build, "TORCH", Path("/a $b/torch"))
    folder = library("cpu", source=source).parent
    assert all("-isystem /a $b/torch/include " in call for call in calls(log)[:-1])
    assert "'/a $$b/torch/include'" in (folder / "build.ninja").read_text()


# Several processes, killed ones


def test_two_processes_at_once_build_once(source, log, tmp_path, monkeypatch):
    monkeypatch.setenv("WAIT_FOR", str(tmp_path / "go"))
    first = start(source)
    wait_for(lambda: calls(log))
    second = start(source)
    assert second.stderr.readline().startswith(f"waiting for the operators, which process {first.pid} on ")
    (tmp_path / "go").touch()
    says = [process.communicate() for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0)
    assert says[0][0] == says[1][0] == f"{library('cpu', source=source)}\n"
    assert says[0][1] == (f"building the CPU operators with {os.environ['CXX']}, once, which usually takes half a "
                          "minute\n")
    assert says[1][1] == ""
    assert len(calls(log)) == len(LEVELS) + 2


def test_build_that_was_killed_is_repeated(source, log, cache, tmp_path, monkeypatch):
    monkeypatch.setenv("WAIT_FOR", str(tmp_path / "go"))
    process = start(source)
    wait_for(lambda: calls(log))
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = [path.name for path in cache.iterdir() if path.name.startswith(".tmp-cpu-")]
    assert len(left) == 1
    monkeypatch.delenv("WAIT_FOR")
    assert library("cpu", source=source).read_text() == "whole"
    (tmp_path / "go").touch()  # let the orphaned compiler end
    assert not [path for path in cache.iterdir() if path.name.startswith(".")]
    assert sum(" -c " in call for call in calls(log)) > len(LEVELS) + 1  # none of the first objects was used
    process.stdout.close()
    process.stderr.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_build_that_is_stopped_leaves_nothing(number, source, log, cache, tmp_path, monkeypatch):
    monkeypatch.setenv("WAIT_FOR", str(tmp_path / "go"))
    code = BUILD.replace("print(", "import signal; signal.signal(signal.SIGTERM, signal.default_int_handler)\nprint(")
    process = subprocess.Popen([sys.executable, "-c", code, str(source)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: calls(log))
    process.send_signal(number)
    assert "KeyboardInterrupt" in process.communicate()[1]
    assert list(cache.iterdir()) == []
    count = len(calls(log))
    (tmp_path / "go").touch()
    time.sleep(0.2)
    assert len(calls(log)) == count  # ninja ended too, and started no other step


# Failures


def test_no_compiler_says_what_to_install(source, log, monkeypatch):
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(os, "defpath", "/nowhere")
    assert message("cpu", source) == ("no C++ compiler was found; expected g++, c++, clang++ or $CXX: install the "
                                      "package g++ (gcc-c++ on Fedora, gxx from conda-forge)")
    monkeypatch.setenv("CXX", "icpx -O2")
    assert message("cpu", source) == "CXX is 'icpx -O2'; expected a C++ compiler: set it to one, or unset it"


def test_library_built_before_the_compiler_was_removed_is_used(source, log, monkeypatch):
    path = library("cpu", source=source)
    monkeypatch.setenv("CXX", "gone")
    assert library("cpu", source=source) == path
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
    if fault == "Killed":  # not a known form: the last line
        fault = "ninja: build stopped: subcommand failed."
    assert text == f"compiling the operators failed ({fault}): the whole log is {kept}"
    assert "In file included from csrc/a.h:1:" in kept.read_text()
    assert list(cache.iterdir()) == [kept]
    monkeypatch.delenv("FAULT")
    library("cpu", source=source)
    assert "In file included" not in kept.read_text()


def test_cache_that_cannot_be_written_says_which_variable_to_set(source, log, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "file"))
    assert message("cpu", source) == (f"operators cannot be built in {tmp_path}/file/ops (Not a directory): set "
                                      "TORCH_EXTENSIONS_DIR to a writable folder with free space")


def test_full_disk_says_which_variable_to_set(source, log, cache, monkeypatch):
    monkeypatch.setenv("FAULT", "fatal error: error writing to a.s: No space left on device")
    assert message("cpu", source) == (f"operators cannot be built in {cache} (No space left on device): set "
                                      "TORCH_EXTENSIONS_DIR to a writable folder with free space")


def test_cuda_without_its_parts_says_which(source, log, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.99.0+cpu")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert message("cuda", source) == ("PyTorch 2.99.0+cpu is built without CUDA: install one with CUDA "
                                       "(https://pytorch.org/get-started/locally)")
    monkeypatch.setattr(torch.version, "cuda", "77.1")
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    assert message("cuda", source).endswith(': pip install "cuda-toolkit[nvcc,cccl]==77.1.*"')


def test_other_failures_are_named(source, log, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    assert message("cpu", tmp_path / "empty") == (f"{tmp_path}/empty does not contain sources of the cpu operators: "
                                                  "install the project again")
    with pytest.raises(ValueError, match="kind is 'gpu'; expected one of cpu, cuda"):
        library("gpu", source=source)
    with monkeypatch.context() as patch:
        patch.setattr(build, "find_program", lambda name: None if name.endswith("ninja") else f"/bin/{name}")
        assert message("cpu", source) == "ninja, which starts the compilers, was not found: pip install ninja"
    monkeypatch.setattr(sys, "platform", "win32")
    assert message("cpu", source) == ("compiled operators are not supported on Windows: use Linux, or impl='auto', "
                                      "which runs PyTorch's own operators there")


# The command


def test_command_builds_and_prints_where_the_library_is(source, log, monkeypatch, capsys):
    monkeypatch.setattr(build, "library", partial(library, source=source))
    path = library("cpu", source=source)
    path.write_text("earlier")
    for flags, content in ([], "earlier"), (["--force"], "whole"):
        assert run(build.main, ["--kind=cpu", *flags]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith(f"torch     {torch.__version__}, ")
        assert lines[1:] == [f"cpu       {path}"]
        assert path.read_text() == content


def test_command_ends_with_one_line_of_advice(source, log, monkeypatch, capsys):
    monkeypatch.setattr(build, "library", partial(library, source=source))
    monkeypatch.setenv("CXX", "gone")
    assert run(build.main, ["--kind=cpu"]) == 2
    assert capsys.readouterr().err == ("error: CXX is 'gone'; expected a C++ compiler: set it to one, or unset it\n")


def test_command_that_is_optional_succeeds_with_one_line_where_there_is_no_compiler(source, log, monkeypatch, capsys):
    monkeypatch.setattr(build, "library", partial(library, source=source))
    monkeypatch.setenv("CXX", "gone")
    assert run(build.main, ["--kind=cpu", "--optional"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.splitlines()[1:] == ["cpu       not built; PyTorch's own operators are used, which are slower: "
                                    "CXX is 'gone'; expected a C++ compiler: set it to one, or unset it"]
