"""Build the libraries of compiled operators, once: `python -m torch_utils.ops.build` does it ahead of their use."""

import errno
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import click

from dnnlib.cache import cache_folder
from dnnlib.cli import expand_user, run
from dnnlib.files import atomic_write
from dnnlib.process_lock import ProcessLock
from dnnlib.progress import Progress
from dnnlib.workers import usable_cores
from torch_utils.ops.compilers import (
    DATA_CENTER_ARCHS,
    KINDS,
    SNAPSHOT,
    BuildError,
    Recipe,
    Subject,
    TorchBuild,
    environment,
    find_ninja,
    read_subject,
    write_recipe,
)

SOURCE = Path(__file__).parent / "csrc"
_RECORD, _LOG, _REPORT = "build.json", "log.txt", "ptxas.txt"
_STATUS = re.compile(r"\[(\d+)/\d+\] ")  # as NINJA_STATUS below
_FAULT = re.compile(r"(error|fatal) *:|undefined reference|cannot find -l")
# What ptxas prints of kernels
_ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(\S+)'")
_PROPERTIES = re.compile(r"Function properties for (\S+)")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_FULL_DISK = os.strerror(errno.ENOSPC)
_USUAL_TIME = {"cpu": "half a minute", "cuda": "a minute or two"}  # on two idle cores


@dataclass(frozen=True, kw_only=True)
class Built:
    """A library that is there."""

    library: Path
    is_new: bool
    recipe: Recipe | None  # None where a tool is missing, and the library was built when it was there

    @property
    def record(self) -> dict:
        """What build.json says: kind, versions, commands, seconds on the clock and of all CPUs."""
        return json.loads((self.library.parent / _RECORD).read_text(encoding="utf-8"))


def library(kind: str, *, source: Path = SOURCE, archs: str | None = None, force: bool = False) -> Path:
    """Return the shared library of the operators for one kind of device; builds it when it is not in the cache.

    kind:   "cpu" or "cuda"
    source: folder of the sources
    archs:  GPU architectures as "8.0;9.0+PTX"; None for TORCH_CUDA_ARCH_LIST, else the GPUs at hand, else data centers'
    force:  build it although it is there

    PyTorch has to be imported before the library is loaded. Raises BuildError.
    """
    return obtain(kind, source=source, archs=archs, force=force).library


def builds_folder() -> Path:
    """Return where builds are kept: $TORCH_EXTENSIONS_DIR, as for PyTorch's own, else ops/ in the cache folder."""
    chosen = os.environ.get("TORCH_EXTENSIONS_DIR")
    return Path(expand_user(chosen, "TORCH_EXTENSIONS_DIR")) if chosen else cache_folder() / "ops"


def obtain(kind: str, *, source: Path = SOURCE, archs: str | None = None, force: bool = False) -> Built:
    """Do what `library` does, and tell what was found."""
    cache = builds_folder()
    if archs is None:
        archs = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    subject = read_subject(kind, source, TorchBuild.installed(), archs)
    try:
        recipe = write_recipe(subject, cache)
    except BuildError:
        earlier = None if force else _any_build(subject, cache)
        if earlier is None:
            raise
        return Built(library=earlier, is_new=False, recipe=None)
    path = cache / recipe.name / subject.library_name
    is_new = (force or not path.is_file()) and _build_alone(recipe, path, force)
    return Built(library=path, is_new=is_new, recipe=recipe)


def find(kind: str, *, source: Path = SOURCE) -> Built | None:
    """Return the library that `library` would return, or one that other tools made of the same code; never build.

    Raises BuildError where the kind cannot be built whatever the tools.
    """
    cache = builds_folder()
    subject = read_subject(kind, source, TorchBuild.installed(), os.environ.get("TORCH_CUDA_ARCH_LIST", ""))
    path, recipe = _any_build(subject, cache), None
    if path is None:
        return None
    with suppress(BuildError):
        recipe = write_recipe(subject, cache)
    if recipe is not None and (cache / recipe.name / subject.library_name).is_file():
        return Built(library=cache / recipe.name / subject.library_name, is_new=False, recipe=recipe)
    return Built(library=path, is_new=False, recipe=None)


def _any_build(subject: Subject, cache: Path) -> Path | None:
    """Return the newest library of the same code, by whatever tools: machines without tools use what others built."""
    found = sorted(cache.glob(f"{subject.prefix}-*/{subject.library_name}"), key=lambda path: path.stat().st_mtime)
    return found[-1] if found else None


def _build_alone(recipe: Recipe, path: Path, force: bool) -> bool:
    """Build unless another process does or did; tell whether this one built."""
    folder = path.parent
    waiting = "waiting for operators that {holder} builds"
    with _explained_disk(folder.parent), ProcessLock.beside(folder).awaited(waiting):
        if path.is_file() and not force:
            return False
        # What a killed build left. Compilers of that build may still run: they write into a folder that is gone.
        for left in folder.parent.glob(f".tmp-{folder.name}-*"):
            shutil.rmtree(left, ignore_errors=True)
        temporary = folder.with_name(f".tmp-{folder.name}-{secrets.token_hex(4)}")
        temporary.mkdir()
        try:
            _build(recipe, temporary, folder)
            _replace(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return True


def _build(recipe: Recipe, temporary: Path, folder: Path) -> None:
    """Fill `temporary` with all that a build leaves; `folder` is where it will lie."""
    started = time.monotonic()
    subject = recipe.subject
    (temporary / SNAPSHOT).mkdir()
    for name, content in subject.sources.items():
        (temporary / SNAPSHOT / name).write_bytes(content)
    (temporary / "build.ninja").write_text(recipe.ninja_file(), encoding="utf-8")
    print(f"building the {subject.kind.upper()} operators, once, which usually takes {_USUAL_TIME[subject.kind]}: "
          f"{folder}", file=sys.stderr)
    used = _cpu_seconds_of_children()
    code, log = _run_ninja(temporary, len(recipe.objects) + 1)
    used = _cpu_seconds_of_children() - used
    log_of_failure = folder.with_name(f"{folder.name}.log")
    if code:
        raise _failure(log, log_of_failure)
    log_of_failure.unlink(missing_ok=True)
    (temporary / _LOG).write_text(log, encoding="utf-8")
    if recipe.toolkit is not None:
        (temporary / _REPORT).write_text(ptxas_lines(log), encoding="utf-8")
    with atomic_write(temporary / _RECORD, text=True) as file:
        json.dump(_record(recipe, temporary, time.monotonic() - started, used), file, indent=1)
    with open(temporary / subject.library_name, "rb") as file:  # a power cut must not leave a half-written one
        os.fsync(file.fileno())
    for name in (*recipe.objects, ".ninja_log"):
        (temporary / name).unlink(missing_ok=True)
    shutil.rmtree(temporary / SNAPSHOT)


def _run_ninja(folder: Path, steps: int) -> tuple[int, str]:
    """Run build.ninja, showing how far it is; return its exit code and what the compilers printed."""
    # Temporary files here, not where the disk may be full; nvcc splits the name of the folder at spaces.
    variables = environment(NINJA_STATUS="[%f/%t] ", TMPDIR=".")
    process = subprocess.Popen([find_ninja(), "-j", f"{_jobs()}"], cwd=folder, env=variables, stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    lines = []
    try:
        with process.stdout, Progress(steps, "steps of the build", log_seconds=60) as progress:
            for line in process.stdout:
                status = _STATUS.match(line)
                if status:
                    progress.advance(int(status[1]) - progress.done)
                lines.append(line)
        return process.wait(), "".join(lines)
    finally:
        if process.poll() is None:  # this program is being stopped
            process.terminate()
            process.wait()


def _jobs() -> int:
    """Return how many compilers may run at once: $MAX_JOBS, as PyTorch's own builds read it, else the CPUs."""
    text = os.environ.get("MAX_JOBS", "")
    if not text:
        return usable_cores()
    if not (text.isdecimal() and int(text)):
        raise BuildError(f"MAX_JOBS is {text!r}; expected how many compilers may run at once: set it to 1 or more")
    return int(text)


def _failure(log: str, kept: Path) -> BuildError:
    """Keep the log of a failed build; return what to tell of it. Raises OSError when the disk is full."""
    if _FULL_DISK in log:
        raise OSError(errno.ENOSPC, _FULL_DISK)
    with atomic_write(kept, text=True) as file:
        file.write(log)
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    first = next((line for line in lines if _FAULT.search(line)), lines[-1] if lines else "ninja ended without a word")
    return BuildError(f"compiling the operators failed ({first}): the whole log is {kept}")


def _cpu_seconds_of_children() -> float:
    """Return what all processes that this one started, and they, have used and been waited for."""
    times = os.times()
    return times.children_user + times.children_system


def _record(recipe: Recipe, folder: Path, seconds: float, cpu_seconds: float) -> dict:
    # ninja's own log: start and end in ms, time of the file, name, hash
    lines = (folder / ".ninja_log").read_text(encoding="utf-8").splitlines()
    rows = [line.split("\t") for line in lines if not line.startswith("#")]
    steps = {name: (int(end) - int(start)) / 1000 for start, end, _, name, _ in rows}
    torch = recipe.subject.torch
    return {"kind": recipe.subject.kind, "made": datetime.now().astimezone().isoformat(" ", "seconds"),
            "seconds": round(seconds, 1), "cpu_seconds": round(cpu_seconds, 1), "steps": steps,
            "torch": torch.version, "torch_cuda": torch.cuda, "cxx11_abi": torch.cxx11_abi,
            "compiler": recipe.compiler.title, "toolkit": recipe.toolkit and recipe.toolkit.title,
            "archs": list(recipe.subject.archs),
            "commands": [*(command for _, command in recipe.objects.values()), recipe.link]}


def _replace(temporary: Path, folder: Path) -> None:
    """Give a finished build its name; what had it, by --force or with its library removed, goes."""
    if folder.exists():
        old = temporary.with_name(f"{temporary.name}-old")
        os.rename(folder, old)
        shutil.rmtree(old, ignore_errors=True)
    os.rename(temporary, folder)


@contextmanager
def _explained_disk(cache: Path) -> Iterator[None]:
    """Make the folder of builds; turn an error of the file system into a BuildError that says what to do."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise BuildError(f"operators cannot be built in {cache} ({error.strerror or error}): set DNNLIB_CACHE_DIR to a "
                         "folder that can be written and has space") from error


# What ptxas says of kernels


class KernelUse(NamedTuple):
    """What one kernel, or one function that a kernel calls, takes on one architecture."""

    kernel: str  # the name as the linker sees it
    arch: str  # "sm_90"
    registers: int  # a thread's; 0 for a function
    stack: int  # bytes a thread, as the others
    spill_stores: int
    spill_loads: int


def read_ptxas_report(text: str) -> list[KernelUse]:
    """Return what `ptxas -v` printed, in its order."""
    found, arch, name = [], "", ""
    for line in text.splitlines():
        if match := _ENTRY.search(line):
            arch = match[2]
        elif match := _PROPERTIES.search(line):
            name = match[1]
        elif match := _STACK.search(line):
            found.append(KernelUse(name, arch, 0, *map(int, match.groups())))
        elif (match := _REGISTERS.search(line)) and found:
            found[-1] = found[-1]._replace(registers=int(match[1]))
    return found


def ptxas_lines(log: str) -> str:
    """Return the lines of a build's log that ptxas wrote."""
    return "".join(f"{line}\n" for line in log.splitlines() if line.startswith("ptxas ") or _STACK.search(line))


def summarize(uses: list[KernelUse]) -> str:
    """Return for example "42 kernels on 3 architectures, at most 40 registers, no stack, no spills"."""
    kernels, archs = {use.kernel for use in uses if use.registers}, {use.arch for use in uses}
    registers, stack = (max((getattr(use, field) for use in uses), default=0) for field in ("registers", "stack"))
    spilling = {use.kernel for use in uses if use.spill_stores or use.spill_loads}
    return (f"{len(kernels)} kernels on {len(archs)} architectures, at most {registers} registers, "
            f"{f'a stack of up to {stack} bytes' if stack else 'no stack'}, "
            f"{f'spills in {len(spilling)}' if spilling else 'no spills'}")


# The command


@click.command(help=__doc__)
@click.option("--kind", type=click.Choice(["auto", *KINDS]), default="auto", show_default=True,
              help="Operators for which device; auto: the CPU, and CUDA where PyTorch sees a GPU.")
@click.option("--archs", help="GPU architectures, as '8.0;9.0+PTX'.  [default: TORCH_CUDA_ARCH_LIST, else the GPUs at "
                              f"hand, else {';'.join(DATA_CENTER_ARCHS)}]")
@click.option("--force", is_flag=True, help="Build although it is there.")
@click.option("--optional", is_flag=True, help="Where it cannot be built, say why in one line, and succeed.")
def main(kind: str, archs: str | None, force: bool, optional: bool) -> None:
    import torch

    print(f"torch     {torch.__version__}, {f'CUDA {torch.version.cuda}' if torch.version.cuda else 'without CUDA'}")
    kinds = [kind]
    if kind == "auto":
        kinds = list(KINDS) if torch.version.cuda and torch.cuda.is_available() else ["cpu"]
    for each in kinds:
        try:
            built = obtain(each, archs=archs, force=force)
        except BuildError as error:
            if not optional:
                raise
            print(f"{each:<9} not built, so that PyTorch's operators are used, which are slower: {error}")
            return
        _describe(each, built)
    if kinds == ["cpu"] and kind == "auto":
        print("cuda      left out, since PyTorch sees no GPU; --kind=cuda builds it all the same")
    _count_others(built.library.parent.parent)


def _describe(kind: str, built: Built) -> None:
    """Print what was found and built."""
    record = built.record
    if built.recipe is None:
        print("tools     missing; the library was built when they were there")
    print(f"compiler  {record['compiler']}")
    if kind == "cuda":
        print(f"toolkit   {record['toolkit']}")
        for reason in built.recipe.refused if built.recipe else []:
            print(f"refused   {reason}")
        print(f"archs     {' '.join(record['archs'])}")
    how = f"there already, made {record['made']}"
    if built.is_new:
        how = f"built in {record['seconds']:.1f} s, {record['cpu_seconds']:.1f} CPU seconds"
    print(f"{kind:<9} {how}: {built.library}")
    if kind == "cuda":
        report = (built.library.parent / _REPORT).read_text(encoding="utf-8")
        print(f"kernels   {summarize(read_ptxas_report(report))}")


def _count_others(cache: Path) -> None:
    """Print how much the builds take up: those of earlier versions are not removed by themselves."""
    builds = [path for path in cache.iterdir() if (path / _RECORD).is_file()]
    size = sum(file.stat().st_size for path in builds for file in path.iterdir())
    print(f"cache     {len(builds)} builds, {size / 1e6:.1f} MB in {cache}; the folder may be removed at any time")


if __name__ == "__main__":
    sys.exit(run(main))
