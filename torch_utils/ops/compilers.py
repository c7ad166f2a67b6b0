"""Find what builds the compiled operators, and say how: a C++ compiler, a CUDA toolkit that fits PyTorch, commands.

A `Recipe` holds all steps of one library, and names it by all that its content depends on.
"""

import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dnnlib.cli import UserError
from dnnlib.files import atomic_write

KINDS = ("cpu", "cuda")
SNAPSHOT = "csrc"  # folder of the copied sources in the folder of a build
# math-errno and trapping-math would keep loops from being vectorized.
_CXX_FLAGS = ("-O3", "-std=c++20", "-fPIC", "-fno-math-errno", "-fno-trapping-math")
_NVCC_FLAGS = ("-O3", "-std=c++20", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC",
               "-Xptxas", "-v,-warn-spills,-warn-lmem-usage", "--threads", "2")
_GLUE_FLAGS = ("-O1",)  # of sources that read PyTorch's headers: they take longest to compile, and compute nothing
# Of CPUs; which one runs is chosen by the library. On x86-64 "plain" is what very old ones fall back to.
_LEVELS = {"plain": ("-O1",), "avx2": ("-mavx2", "-mfma", "-mf16c")}
_X86_64 = ("x86_64", "AMD64")
_VARIABLES = ("CPATH", "CPLUS_INCLUDE_PATH", "LIBRARY_PATH", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")
_COMPILERS = ("g++", "c++", "clang++")
_ANSWER_SECONDS = 60
DATA_CENTER_ARCHS = ("8.0", "9.0", "10.0+PTX")
_HEADERS = ("cuda_runtime.h", "crt/host_config.h")
_LIBRARY_FOLDERS = ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib")
_ARCH = re.compile(r"(\d+\.\d[af]?)(\+PTX)?")


class BuildError(UserError):
    """A library of operators is not there and cannot be built; the message says what to do."""


@dataclass(frozen=True, kw_only=True)
class Compiler:
    """A C++ compiler, and how to call it."""

    command: tuple[str, ...]  # programs by their whole paths, and the options that $CXX names
    version: str  # all that it says of itself

    @property
    def program(self) -> str:
        """The compiler itself, where the command starts it by another program such as ccache."""
        return [word for word in self.command if os.path.isabs(word)][-1]

    @property
    def title(self) -> str:
        return f"{shlex.join(self.command)}: {self.version.splitlines()[0]}"


def find_program(name: str) -> str | None:
    """Return the path of a program on PATH, or where systems keep programs when PATH does not say."""
    found = shutil.which(name, path=_search_path())
    if found is None:
        return None
    # One path where /bin is /usr/bin. A link of another name stays: ccache knows by it which compiler is meant.
    return os.path.join(os.path.realpath(os.path.dirname(found)), os.path.basename(found))


def find_compiler(cache: Path) -> Compiler:
    """Return $CXX, else the first of g++, c++ and clang++. Raises BuildError.

    cache: folder where answers of programs are kept
    """
    words = [os.path.expanduser(word) for word in shlex.split(os.environ.get("CXX", ""))]
    if words and find_program(words[0]) is None:
        raise BuildError(f"CXX is {os.environ['CXX']!r}; expected a C++ compiler: set it to one, or unset it")
    if not words:
        words = [name for name in _COMPILERS if find_program(name)][:1]
    if not words:
        raise BuildError(f"no C++ compiler is found; expected {', '.join(_COMPILERS)} or $CXX: install the package g++ "
                         "(gcc-c++ on Fedora, gxx from conda-forge)")
    command = tuple(word if word.startswith("-") else find_program(word) or word for word in words)
    return Compiler(command=command, version=answer([*command, "--version"], cache))


def find_ninja() -> str:
    """Return the path of ninja: pip's, else the system's. Raises BuildError."""
    with suppress(ImportError):
        import ninja

        path = os.path.join(ninja.BIN_DIR, "ninja")
        if os.path.isfile(path):
            return path
    path = find_program("ninja")
    if path is None:
        raise BuildError("ninja is not found, which starts the compilers: pip install ninja")
    return path


def answer(command: list[str], cache: Path) -> str:
    """Return what a program prints, from `cache` when it was asked before and its file is the same.

    LIMIT: a program that only starts another one is not asked again when the other one changes.
    Raises BuildError when the program fails.
    """
    programs = [[os.path.realpath(word), os.stat(word).st_mtime_ns, os.stat(word).st_size]
                for word in command if os.path.isabs(word) and os.path.isfile(word)]
    kept = cache / "answers" / f"{hashlib.sha256(json.dumps([command, programs]).encode()).hexdigest()[:32]}.txt"
    with suppress(OSError):
        return kept.read_text(encoding="utf-8")
    try:
        run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
                             env=environment(), check=False, timeout=_ANSWER_SECONDS)
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"{shlex.join(command)} cannot be run ({error})") from error
    if run.returncode or not run.stdout.strip():
        says = " ".join(run.stdout.split())[:200]
        raise BuildError(f"{shlex.join(command)} ended with code {run.returncode}: {says or 'it printed nothing'}")
    with suppress(OSError):  # Where the cache cannot be written, the program is asked each time.
        kept.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(kept, text=True) as file:
            file.write(run.stdout)
    return run.stdout


def environment(**more: str) -> dict[str, str]:
    """Return the environment for compilers: messages in English, and a PATH on which they find the system's parts."""
    return {**os.environ, "LC_ALL": "C", "PATH": _search_path(), **more}


def _search_path() -> str:
    return os.pathsep.join(part for part in (os.environ.get("PATH"), os.defpath) if part)


# CUDA


@dataclass(frozen=True, kw_only=True)
class Toolkit:
    """What compiles .cu files."""

    nvcc: Path
    version: str  # "13.0"
    includes: tuple[Path, ...]
    cudart: Path  # the shared library of the CUDA runtime

    @property
    def title(self) -> str:
        return f"{self.nvcc}: CUDA {self.version}"


class Unfit(Exception):
    """A toolkit cannot be used; the text says why."""


def find_toolkit(wanted: str, packages: Path, cache: Path, *,
                 system: Path = Path("/usr/local")) -> tuple[Toolkit, list[str]]:
    """Return the first toolkit whose major version is that of `wanted`, and why others before it were refused.

    wanted:   torch.version.cuda
    packages: site-packages, where pip puts toolkits
    cache:    folder where answers of programs are kept
    system:   holds cuda, cuda-13.0 and the like

    Raises BuildError with the command that installs one.
    """
    refused, seen = [], set()
    for nvcc in _places(wanted.split(".")[0], packages, system):
        if os.path.realpath(nvcc) in seen:
            continue
        seen.add(os.path.realpath(nvcc))
        try:
            return _examine(nvcc, wanted.split(".")[0], packages, cache), refused
        except (Unfit, BuildError) as reason:
            refused.append(f"{reason}")
    found = f" ({'; '.join(refused)})" if refused else ""
    raise BuildError(f"no CUDA toolkit fits a PyTorch for CUDA {wanted}{found}: "
                     f'pip install "cuda-toolkit[nvcc,cccl]=={wanted}.*"')


def architectures(text: str, torch_cuda: str, devices: list[tuple[int, int]]) -> tuple[str, ...]:
    """Return what to compile for, as "8.0" or, with code that later GPUs can translate, "9.0+PTX".

    text:       what TORCH_CUDA_ARCH_LIST says, for example "8.0;9.0+PTX"; "" for the GPUs at hand
    torch_cuda: torch.version.cuda
    devices:    compute capabilities of these GPUs; without any, those of data centers

    Raises BuildError for a text of another form.
    """
    words = text.replace(";", " ").replace(",", " ").split()
    for word in words:
        if not _ARCH.fullmatch(word):
            raise BuildError(f"the architectures are {text!r}; expected for example '8.0;9.0+PTX': "
                             "correct TORCH_CUDA_ARCH_LIST, or what torch_utils.ops.build --archs says")
    if words:
        return tuple(dict.fromkeys(words))
    if devices:
        return tuple(f"{major}.{minor}" for major, minor in sorted(set(devices)))
    if tuple(int(part) for part in torch_cuda.split(".")) < (12, 8):  # the first version that knows 10.0
        return ("8.0", "9.0+PTX")
    return DATA_CENTER_ARCHS


def gencode(arch: str) -> list[str]:
    """Return nvcc's options for one architecture."""
    number, ptx = _ARCH.fullmatch(arch).groups()
    name = number.replace(".", "")
    code = f"[sm_{name},compute_{name}]" if ptx else f"sm_{name}"
    return ["-gencode", f"arch=compute_{name},code={code}"]


def _places(major: str, packages: Path, system: Path) -> Iterator[Path]:
    """Yield where nvcc may be, best first."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name):  # named by the user: refused aloud when it is not there
            yield Path(os.path.expanduser(os.environ[name])) / "bin" / "nvcc"
    others = [packages / "nvidia" / f"cu{major}" / "bin" / "nvcc", packages / "nvidia" / "cuda_nvcc" / "bin" / "nvcc"]
    on_path = find_program("nvcc")
    if on_path is not None:
        others.append(Path(on_path))
    others.append(system / "cuda" / "bin" / "nvcc")
    others.extend(sorted(system.glob(f"cuda-{major}.*/bin/nvcc"), reverse=True))
    yield from (path for path in others if path.is_file())


def _examine(nvcc: Path, major: str, packages: Path, cache: Path) -> Toolkit:
    """Return the toolkit that a compiler belongs to. Raises Unfit, and BuildError when nvcc fails."""
    if not nvcc.is_file():
        raise Unfit(f"{nvcc} does not exist")
    says = re.search(r"release (\d+\.\d+)", answer([f"{nvcc}", "--version"], cache))
    if says is None:
        raise Unfit(f"{nvcc} does not say its version")
    if says[1].split(".")[0] != major:
        raise Unfit(f"{nvcc} is of CUDA {says[1]}")
    roots = [nvcc.parent.parent]
    if not (roots[0] / "include").is_dir() or roots[0].name == "cuda_nvcc":
        roots.append(packages / "nvidia" / "cuda_runtime")  # pip's packages for CUDA 12: a folder each
    if not _has_headers(roots):
        roots = [_ask_root(nvcc, cache)]
    if not _has_headers(roots):
        raise Unfit(f"{nvcc} is without {' or '.join(_HEADERS)}")
    libraries = [root / folder / name for root in roots for folder in _LIBRARY_FOLDERS
                 for name in (f"libcudart.so.{major}", "libcudart.so")]
    for cudart in libraries:
        if cudart.is_file():
            includes = tuple(root / "include" for root in roots)
            return Toolkit(nvcc=nvcc, version=says[1], includes=includes, cudart=cudart)
    raise Unfit(f"{nvcc} is without libcudart.so.{major}")


def _has_headers(roots: list[Path]) -> bool:
    return all(any((root / "include" / header).is_file() for root in roots) for header in _HEADERS)


def _ask_root(nvcc: Path, cache: Path) -> Path:
    """Return the folder of the toolkit that a wrapper of nvcc, which lies elsewhere, belongs to."""
    plan = answer([f"{nvcc}", "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull], cache)
    top = re.search(r"^#\$ TOP=(.*)$", plan, re.MULTILINE)
    return Path(os.path.realpath(top[1])) if top else nvcc.parent.parent


# What is compiled, and how


@dataclass(frozen=True, kw_only=True)
class TorchBuild:
    """What a library depends on of the installed PyTorch."""

    version: str
    commit: str
    cuda: str | None
    cxx11_abi: bool
    folder: Path

    @classmethod
    def installed(cls) -> "TorchBuild":
        import torch

        return cls(version=str(torch.__version__), commit=torch.version.git_version or "", cuda=torch.version.cuda,
                   cxx11_abi=torch.compiled_with_cxx11_abi(), folder=Path(torch.__file__).parent)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is compiled, whatever the tools: source code, and what it is compiled for."""

    kind: str
    sources: dict[str, bytes]  # by file name: those of this kind, and all headers
    torch: TorchBuild
    archs: tuple[str, ...]  # of GPUs; () for kind cpu

    @property
    def prefix(self) -> str:
        """The first part of the name of every build of it."""
        code = {name: hashlib.sha256(content).hexdigest() for name, content in self.sources.items()}
        torch = {"version": self.torch.version, "commit": self.torch.commit, "cuda": self.torch.cuda,
                 "cxx11_abi": self.torch.cxx11_abi}
        flags = [_CXX_FLAGS, _GLUE_FLAGS, _NVCC_FLAGS, _LEVELS]
        return f"{self.kind}-{_digest([code, torch, self.archs, flags, _system()])}"

    @property
    def library_name(self) -> str:
        return f"ops_{self.kind}.so"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All steps of a build."""

    subject: Subject
    compiler: Compiler
    toolkit: Toolkit | None
    refused: list[str]  # toolkits that do not fit, and why
    objects: dict[str, tuple[str, list[str]]]  # object file: source file, command
    link: list[str]

    @property
    def name(self) -> str:
        """The name of the build: equal for builds that come out equal."""
        variables = {name: os.environ.get(name) for name in _VARIABLES}
        toolkit = self.toolkit and self.toolkit.title
        commands = [self.objects, self.link]
        return f"{self.subject.prefix}-{_digest([self.compiler.version, toolkit, commands, variables])}"

    def ninja_file(self) -> str:
        """Return the text of build.ninja for a folder that holds the sources in SNAPSHOT."""
        lines = ["rule run", "  command = $words", "  description = $out"]
        for name, (source, words) in self.objects.items():
            lines += [f"build {_escape(name)}: run {_escape(source)}", f"  words = {_join(words)}"]
        inputs = " ".join(_escape(name) for name in self.objects)
        lines += [f"build {self.subject.library_name}: run {inputs}", f"  words = {_join(self.link)}"]
        return "".join(f"{line}\n" for line in lines)


def read_subject(kind: str, folder: Path, torch: TorchBuild, archs: str) -> Subject:
    """Read the sources of one kind of library.

    folder: holds the sources: *.cu and cuda_*.cpp for "cuda", other *.cpp for "cpu", *.h for both
    archs:  GPU architectures as in TORCH_CUDA_ARCH_LIST; "" for those of the GPUs at hand

    Raises BuildError where it cannot be built whatever the tools.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; expected one of {', '.join(KINDS)}")
    if sys.platform == "win32":
        raise BuildError("compiled operators are not supported on Windows: use Linux, or impl='auto', which runs "
                         "PyTorch's own operators there")
    if kind == "cuda" and torch.cuda is None:
        raise BuildError(f"PyTorch {torch.version} is built without CUDA: install one with CUDA "
                         "(https://pytorch.org/get-started/locally)")
    if not any(_belongs(path.name, kind) and path.suffix != ".h" for path in folder.glob("*")):
        raise BuildError(f"{folder} holds no sources of the {kind} operators: install the project again")
    sources = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if _belongs(path.name, kind)}
    return Subject(kind=kind, sources=sources, torch=torch,
                   archs=architectures(archs, torch.cuda, _devices()) if kind == "cuda" else ())


def write_recipe(subject: Subject, cache: Path) -> Recipe:
    """Find the tools for a library, and say what each does. Raises BuildError when one is missing.

    cache: folder where answers of programs are kept
    """
    compiler = find_compiler(cache)
    toolkit, refused = None, []
    if subject.kind == "cuda":
        toolkit, refused = find_toolkit(subject.torch.cuda, subject.torch.folder.parent, cache)
    objects = {}
    for name in subject.sources:
        source = f"{SNAPSHOT}/{name}"
        for level, command in _compile_commands(name, subject, compiler, toolkit).items():
            target = f"{Path(name).name}{level and f'.{level}'}.o"
            objects[target] = (source, [*command, "-c", source, "-o", target])
    return Recipe(subject=subject, compiler=compiler, toolkit=toolkit, refused=refused, objects=objects,
                  link=_link_command(subject, compiler, toolkit, list(objects)))


def _compile_commands(name: str, subject: Subject, compiler: Compiler, toolkit: Toolkit | None) -> dict[str, list[str]]:
    """Return the command for a source, without file names, for each CPU level; the level is "" where there is one."""
    torch = subject.torch
    toolkit_includes = [f"-I{path}" for path in toolkit.includes] if toolkit else []
    if name.endswith(".cu"):
        targets = [option for arch in subject.archs for option in gencode(arch)]
        return {"": [f"{toolkit.nvcc}", "-ccbin", compiler.program, *_NVCC_FLAGS, *targets, *toolkit_includes]}
    if not name.endswith(".cpp"):
        return {}
    command = [*compiler.command, *_CXX_FLAGS, *_openmp(), f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.cxx11_abi)}",
               "-isystem", f"{torch.folder / 'include'}",
               "-isystem", f"{torch.folder / 'include' / 'torch' / 'csrc' / 'api' / 'include'}", *toolkit_includes]
    if not name.endswith("_cpu.cpp"):
        return {"": [*command, *_GLUE_FLAGS]}
    levels = _LEVELS if platform.machine() in _X86_64 else {"plain": ()}
    return {level: [*command, *flags, f"-DCPU_LEVEL={level}"] for level, flags in levels.items()}


def _link_command(subject: Subject, compiler: Compiler, toolkit: Toolkit | None, objects: list[str]) -> list[str]:
    """Return the command that makes the shared library."""
    folder = subject.torch.folder / "lib"
    libraries = ["-ltorch_cpu", "-lc10"]
    if toolkit is not None:  # pip's runtime has no libcudart.so for -lcudart to find
        libraries += ["-ltorch_cuda", "-lc10_cuda", f"{toolkit.cudart}"]
    # Not -fopenmp where PyTorch brings its own: the system's would be a second pool of threads.
    openmp = [f"{path}" for path in sorted(folder.glob("libgomp*.so*"))[:1]] or list(_openmp())
    options = [] if sys.platform == "darwin" else ["-Xlinker", "--as-needed", "-Xlinker", "--no-undefined"]
    return [*compiler.command, "-shared", *options, "-o", subject.library_name, *objects, f"-L{folder}",
            "-Xlinker", "-rpath", "-Xlinker", f"{folder}", *libraries, *openmp]


def _openmp() -> tuple[str, ...]:
    """Return the option without which PyTorch's parallel_for is serial; Apple's compiler does not know it."""
    return () if sys.platform == "darwin" else ("-fopenmp",)


def _belongs(name: str, kind: str) -> bool:
    """Tell whether a file takes part in one kind of library."""
    for_cuda = name.endswith(".cu") or (name.endswith(".cpp") and name.startswith("cuda_"))
    return name.endswith(".h") or (for_cuda if kind == "cuda" else name.endswith(".cpp") and not for_cuda)


def _devices() -> list[tuple[int, int]]:
    """Return the compute capability of each GPU that PyTorch sees."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.cuda.get_device_capability(index) for index in range(count)]


def _system() -> list[str]:
    """Return what tells machines apart that cannot run each other's libraries; homes are shared between them."""
    libc = os.confstr("CS_GNU_LIBC_VERSION") if "CS_GNU_LIBC_VERSION" in os.confstr_names else None
    return [sys.platform, platform.machine(), libc or ""]


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _escape(path: str) -> str:
    """Return a path as ninja reads it."""
    return path.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _join(words: list[str]) -> str:
    """Return a command for the shell as ninja reads it."""
    return shlex.join(words).replace("$", "$$")
