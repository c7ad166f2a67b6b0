"""Build the libraries of compiled operators, once: `python -m torch_utils.ops.build` does it ahead of their first use.

Not by torch.utils.cpp_extension (tried with PyTorch 2.14): all sources get the same flags (pragmas instead change the
last digits of results), it cannot link with pip's CUDA runtime, and an error is a traceback with the whole log.
"""

import errno
import hashlib
import os
import platform
import re
import secrets
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import click
import torch

from dnnlib.cache import cache_folder
from dnnlib.cli import UserError, expand_user, run
from dnnlib.process_lock import ProcessLock
from dnnlib.progress import Progress
from dnnlib.workers import usable_cores

KINDS = ("cpu", "cuda")
DATA_CENTER_ARCHS = ("8.0", "9.0+PTX") if torch.version.cuda == "12.6" else ("8.0", "9.0", "10.0+PTX")  # new in 12.8
SOURCE = Path(__file__).parent / "csrc"
TORCH = Path(os.path.realpath(os.path.dirname(torch.__file__)))
# math-errno and trapping-math would keep loops from being vectorized. Without OpenMP, which Apple's compiler does not
# have, PyTorch's parallel_for is serial.
_OPENMP = [] if sys.platform == "darwin" else ["-fopenmp"]
_CXX_FLAGS = ["-O3", "-std=c++20", "-fPIC", "-fno-math-errno", "-fno-trapping-math", *_OPENMP]
_GLUE_FLAGS = ["-O1"]  # for sources that read PyTorch's headers: they take longest to compile, and compute nothing
_LEVELS = {"plain": ["-O1"], "avx2": ["-mavx2", "-mfma", "-mf16c"]}  # chosen at run time; plain: CPUs without AVX2
_NVCC_FLAGS = ["-O3", "-std=c++20", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC",
               "-Xptxas", "-v,-warn-spills,-warn-lmem-usage", "--threads", "2"]
_LINK_FLAGS = [] if sys.platform == "darwin" else ["-Xlinker", "--as-needed", "-Xlinker", "--no-undefined"]
_COMPILERS = ("g++", "c++", "clang++")
_ARCH = re.compile(r"\d+\.\d[af]?(\+PTX)?")
_FAULT = re.compile(r"(error|fatal) *:|undefined reference|cannot find -l")


class BuildError(UserError):
    """A library of operators does not exist and cannot be built; the message says what to do."""


class Sources(NamedTuple):
    """What is compiled for one kind of device, and where the library is kept."""

    kind: str
    files: dict[str, bytes]  # by name, headers included
    archs: tuple[str, ...]  # GPU architectures; () for the CPU
    library: Path


def library(kind: str, *, source: Path = SOURCE, archs: str | None = None, force: bool = False) -> Path:
    """Return the shared library of the operators for one kind of device; build it if it is not in the cache.

    kind:   "cpu" or "cuda"
    source: folder of the sources
    archs:  GPU architectures as "8.0;9.0+PTX"; default: TORCH_CUDA_ARCH_LIST, else the GPUs at hand, else data centers'
    force:  build it even if it exists

    PyTorch must be imported before the library is loaded. Raises BuildError.
    """
    sources = read_sources(kind, source, archs)
    if force or not sources.library.is_file():
        _build_alone(sources, force)
    return sources.library


def find(kind: str, *, source: Path = SOURCE) -> Path | None:
    """Return the library if it is built. Raises BuildError where it could not be built with any tools."""
    path = read_sources(kind, source).library
    return path if path.is_file() else None


def builds_folder() -> Path:
    """Return where builds are kept: $TORCH_EXTENSIONS_DIR, as for PyTorch's own, else ops/ in the cache folder."""
    chosen = os.environ.get("TORCH_EXTENSIONS_DIR")
    return Path(expand_user(chosen, "TORCH_EXTENSIONS_DIR")) if chosen else cache_folder() / "ops"


def read_sources(kind: str, folder: Path, archs: str | None = None) -> Sources:
    """Read *.cu and cuda_*.cpp for "cuda", other *.cpp for "cpu", and *.h for both.

    The library's folder is named after everything that the results depend on, except the tools. Raises BuildError.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; expected one of {', '.join(KINDS)}")
    if sys.platform == "win32":
        raise BuildError("compiled operators are not supported on Windows: use Linux, or impl='auto', which runs "
                         "PyTorch's own operators there")
    if kind == "cuda" and torch.version.cuda is None:
        raise BuildError(f"PyTorch {torch.__version__} is built without CUDA: install one with CUDA "
                         "(https://pytorch.org/get-started/locally)")
    for_cuda = {path for pattern in ("*.cu", "cuda_*.cpp") for path in folder.glob(pattern)}
    chosen = for_cuda if kind == "cuda" else set(folder.glob("*.cpp")) - for_cuda
    if not chosen:
        raise BuildError(f"{folder} does not contain sources of the {kind} operators: install the project again")
    files = {path.name: path.read_bytes() for path in sorted([*chosen, *folder.glob("*.h")])}
    targets = architectures(archs) if kind == "cuda" else ()
    pytorch = [str(torch.__version__), torch.version.git_version, torch.version.cuda]
    flags = [_CXX_FLAGS, _GLUE_FLAGS, _LEVELS, _NVCC_FLAGS, _LINK_FLAGS]
    system = [sys.platform, platform.machine(), platform.libc_ver()]  # different machines may share a home folder
    digest = hashlib.sha256(repr([files, targets, pytorch, flags, system]).encode()).hexdigest()[:16]
    return Sources(kind, files, targets, builds_folder() / f"{kind}-{digest}" / f"ops_{kind}.so")


def architectures(text: str | None) -> tuple[str, ...]:
    """Return the GPU architectures to compile for, such as "8.0" or, with PTX that later GPUs translate, "9.0+PTX"."""
    text = os.environ.get("TORCH_CUDA_ARCH_LIST", "") if text is None else text
    words = text.replace(";", " ").replace(",", " ").split()
    if not all(_ARCH.fullmatch(word) for word in words):
        raise BuildError(f"the GPU architectures are {text!r}; expected for example '8.0;9.0+PTX': correct "
                         "TORCH_CUDA_ARCH_LIST, or torch_utils.ops.build --archs")
    count = torch.cuda.device_count() if not words and torch.cuda.is_available() else 0
    devices = {torch.cuda.get_device_capability(index) for index in range(count)}
    return tuple(dict.fromkeys(words or [f"{major}.{minor}" for major, minor in sorted(devices)] or DATA_CENTER_ARCHS))


def find_program(name: str) -> str | None:
    """Return the path of a program on PATH, in the system's folders, or beside Python."""
    found = shutil.which(name, path=_search_path())
    return found and os.path.abspath(found)


def _search_path() -> str:
    return os.pathsep.join(filter(None, (os.environ.get("PATH"), os.defpath, os.path.dirname(sys.executable))))


def find_compiler() -> list[str]:
    """Return $CXX, which may hold options or begin with ccache, else the first compiler found. Raises BuildError."""
    words = [os.path.expanduser(word) for word in shlex.split(os.environ.get("CXX", ""))]
    if words and find_program(words[0]) is None:
        raise BuildError(f"CXX is {os.environ['CXX']!r}; expected a C++ compiler: set it to one, or unset it")
    words = words or [name for name in _COMPILERS if find_program(name)][:1]
    if not words:
        raise BuildError(f"no C++ compiler was found; expected {', '.join(_COMPILERS)} or $CXX: install the package "
                         "g++ (gcc-c++ on Fedora, gxx from conda-forge)")
    return [word if word.startswith("-") else find_program(word) or word for word in words]


def find_toolkit(system: Path = Path("/usr/local/cuda")) -> tuple[Path, list[str], Path]:
    """Return nvcc, options for its headers and the runtime library of the first toolkit of PyTorch's CUDA version.

    Another minor version will do. Raises BuildError with the command that installs a toolkit.
    """
    major, nvidia, on_path = torch.version.cuda.split(".")[0], TORCH.parent / "nvidia", find_program("nvcc")
    named = [[Path(os.environ[name]).expanduser()] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = [*named, [nvidia / f"cu{major}"], [nvidia / "cuda_nvcc", nvidia / "cuda_runtime"]]  # the latter: CUDA 12
    places += [[Path(os.path.realpath(on_path)).parent.parent]] if on_path else []
    places += [[system], *([path] for path in sorted(system.parent.glob(f"cuda-{major}.*"), reverse=True))]
    parts = ("bin/nvcc", "include/crt/host_config.h", "include/cuda_runtime_api.h", "lib*/libcudart.so*")
    refused = []
    for roots in places:
        # Conda's parts are in targets/.
        found = [next((path for root in roots for place in (part, f"targets/*/{part}") for path in root.glob(place)),
                      None) for part in parts]
        nvcc, crt, header, cudart = found
        if None in found:
            if nvcc or roots in named:
                refused.append(f"{roots[0]} does not contain {parts[found.index(None)]}")
        elif re.search(rb"define CUDART_VERSION +%s\d{3}\b" % major.encode(), header.read_bytes()):
            return nvcc, [f"-I{crt.parent.parent}", f"-I{header.parent}"], cudart
        else:
            refused.append(f"{roots[0]} is not for CUDA {major}")
    raise BuildError(f"{'; '.join([f'no toolkit for CUDA {major} was found', *refused])}: "
                     f'pip install "cuda-toolkit[nvcc,cccl]=={torch.version.cuda}.*"')


def build_commands(sources: Sources) -> dict[str, list[str]]:
    """Return by which command each object is made, and last the library. Raises BuildError where a tool is missing."""
    compiler = find_compiler()
    nvcc, includes, cudart = find_toolkit() if sources.kind == "cuda" else (None, [], None)
    cxx = [*compiler, *_CXX_FLAGS, "-isystem", f"{TORCH}/include",
           "-isystem", f"{TORCH}/include/torch/csrc/api/include", *includes]
    host = [word for word in compiler if os.path.isabs(word) and not os.path.isdir(word)][-1]  # behind ccache
    cuda = [f"{nvcc}", "-ccbin", host, *_NVCC_FLAGS, *includes]
    for arch in sources.archs:
        name = arch.removesuffix("+PTX").replace(".", "")
        code = f"[sm_{name},compute_{name}]" if arch.endswith("+PTX") else f"sm_{name}"
        cuda.append(f"-gencode=arch=compute_{name},code={code}")
    levels = _LEVELS if platform.machine() in ("x86_64", "AMD64") else {"plain": []}
    commands = {}
    for name in sources.files:
        if name.endswith("_cpu.cpp"):
            commands |= {f"{name}.{level}.o": [*cxx, *flags, f"-DCPU_LEVEL={level}", "-c", f"csrc/{name}"]
                         for level, flags in levels.items()}
        elif name.endswith((".cpp", ".cu")):
            commands[f"{name}.o"] = [*(cuda if name.endswith(".cu") else [*cxx, *_GLUE_FLAGS]), "-c", f"csrc/{name}"]
    # pip's CUDA runtime has no libcudart.so that -lcudart would find. The system's OpenMP beside the one that PyTorch
    # brings would be a second pool of threads.
    libraries = ["-ltorch_cpu", "-lc10", *(["-ltorch_cuda", "-lc10_cuda", f"{cudart}"] if cudart else [])]
    openmp = [f"{path}" for path in sorted(TORCH.glob("lib/libgomp*.so*"))[:1]] or _OPENMP
    commands[sources.library.name] = [*compiler, "-shared", *_LINK_FLAGS, *commands, f"-L{TORCH}/lib",
                                      "-Xlinker", "-rpath", "-Xlinker", f"{TORCH}/lib", *libraries, *openmp]
    return {made: [*command, "-o", made] for made, command in commands.items()}


def _build_alone(sources: Sources, force: bool) -> None:
    """Build unless another process does or did."""
    commands, folder = build_commands(sources), sources.library.parent
    temporary = folder.with_name(f".tmp-{folder.name}-{secrets.token_hex(4)}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with ProcessLock.beside(folder).awaited("waiting for the operators, which {holder} is building"):
            if sources.library.is_file() and not force:
                return
            # What a killed build left. Its compilers may still run: they write into a folder that is gone.
            for left in folder.parent.glob(f".tmp-{folder.name}-*"):
                shutil.rmtree(left, ignore_errors=True)
            try:
                _build(sources, commands, temporary)
                if folder.exists():
                    os.rename(folder, temporary / "old")
                os.rename(temporary / "new", folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise BuildError(f"operators cannot be built in {folder.parent} ({error.strerror or error}): set "
                         "TORCH_EXTENSIONS_DIR to a writable folder with free space") from error


def _build(sources: Sources, commands: dict[str, list[str]], temporary: Path) -> None:
    """Make temporary/new, which holds the library. Raises BuildError, or OSError when the disk is full."""
    (temporary / "csrc").mkdir(parents=True)
    (temporary / "new").mkdir()
    for name, content in sources.files.items():
        (temporary / "csrc" / name).write_bytes(content)
    lines = ["rule run", "  command = $words", "  description = $out"]
    for made, words in commands.items():
        objects = [word for word in words if word in commands and word != made]
        lines += [f"build {made}: run {' '.join(objects)}", f"  words = {shlex.join(words).replace('$', '$$')}"]
    (temporary / "build.ninja").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    tools = " and ".join(dict.fromkeys(words[0] for words in commands.values()))
    print(f"building the {sources.kind.upper()} operators with {tools}, once, which usually takes "
          f"{'half a minute' if sources.kind == 'cpu' else 'a minute or two'}", file=sys.stderr)
    code, log = _run_ninja(temporary, len(commands))
    if code and os.strerror(errno.ENOSPC) in log:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    kept = Path(f"{sources.library.parent}.log")
    kept.write_text(log, encoding="utf-8")
    if code:
        lines = [line.strip() for line in log.splitlines() if line.strip()] or ["ninja printed nothing"]
        raise BuildError(f"compiling the operators failed ({next(filter(_FAULT.search, lines), lines[-1])}): "
                         f"the whole log is {kept}")
    with open(temporary / sources.library.name, "rb") as file:  # a power cut must not leave a half-written one
        os.fsync(file.fileno())
    for name in (sources.library.name, "build.ninja"):
        os.rename(temporary / name, temporary / "new" / name)


def _run_ninja(folder: Path, steps: int) -> tuple[int, str]:
    """Run build.ninja and show progress; return the exit code and what the compilers printed."""
    ninja = find_program(os.path.join(os.path.dirname(sys.executable), "ninja")) or find_program("ninja")  # pip's first
    if ninja is None:
        raise BuildError("ninja, which starts the compilers, was not found: pip install ninja")
    # Temporary files go here, not where the disk may be full; nvcc splits the name of the folder at spaces.
    variables = {**os.environ, "LC_ALL": "C", "PATH": _search_path(), "TMPDIR": ".", "NINJA_STATUS": "[%f/%t] "}
    process = subprocess.Popen([ninja, "-j", os.environ.get("MAX_JOBS") or f"{usable_cores()}"], cwd=folder,
                               env=variables, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True, errors="replace")
    lines = []
    try:
        with process.stdout, Progress(steps, "build steps", log_seconds=60) as progress:
            for line in process.stdout:
                progress.advance(line.startswith("["))
                lines.append(line)
        return process.wait(), "".join(lines)
    finally:
        if process.poll() is None:  # this program is being stopped
            process.terminate()
            process.wait()


@click.command(help=__doc__.splitlines()[0])
@click.option("--kind", type=click.Choice(["auto", *KINDS]), default="auto", show_default=True,
              help="Device to build operators for; auto: the CPU, and CUDA if PyTorch sees a GPU.")
@click.option("--archs", help="GPU architectures, as '8.0;9.0+PTX'.  [default: TORCH_CUDA_ARCH_LIST, else the GPUs at "
                              f"hand, else {';'.join(DATA_CENTER_ARCHS)}]")
@click.option("--force", is_flag=True, help="Build even if the library exists.")
@click.option("--optional", is_flag=True, help="If the build fails, print the reason in one line and succeed.")
def main(kind: str, archs: str | None, force: bool, optional: bool) -> None:
    print(f"torch     {torch.__version__}, {f'CUDA {torch.version.cuda}' if torch.version.cuda else 'without CUDA'}")
    for each in [kind] if kind != "auto" else KINDS if torch.version.cuda and torch.cuda.is_available() else ["cpu"]:
        try:
            print(f"{each:<9} {library(each, archs=archs, force=force)}")
        except BuildError as error:
            if not optional:
                raise
            print(f"{each:<9} not built; PyTorch's own operators are used, which are slower: {error}")


if __name__ == "__main__":
    sys.exit(run(main))
