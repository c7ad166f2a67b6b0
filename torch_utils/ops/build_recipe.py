"""Say how a library of operators is compiled, and name it by all that its content depends on."""

import hashlib
import json
import os
import platform
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from torch_utils.ops.build_cuda import Toolkit, architectures, find_toolkit, gencode
from torch_utils.ops.build_tools import BuildError, Compiler, find_compiler

KINDS = ("cpu", "cuda")
SNAPSHOT = "csrc"  # folder of the copied sources in the folder of a build
# math-errno and trapping-math would keep loops from being vectorised.
_CXX_FLAGS = ("-O3", "-std=c++20", "-fPIC", "-fno-math-errno", "-fno-trapping-math")
_NVCC_FLAGS = ("-O3", "-std=c++20", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC",
               "-Xptxas", "-v,-warn-spills,-warn-lmem-usage", "--threads", "2")
_GLUE_FLAGS = ("-O1",)  # of sources that read PyTorch's headers: they take longest to compile, and compute nothing
# Of CPUs; which one runs is chosen by the library. On x86-64 "plain" is what very old ones fall back to.
_LEVELS = {"plain": ("-O1",), "avx2": ("-mavx2", "-mfma", "-mf16c")}
_X86_64 = ("x86_64", "AMD64")
_VARIABLES = ("CPATH", "CPLUS_INCLUDE_PATH", "LIBRARY_PATH", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")


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
