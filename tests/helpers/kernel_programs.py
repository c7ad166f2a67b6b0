"""Compile the compiled operators' sources for the host, as programs that run lists of calls, and run them."""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

SOURCES = Path(__file__).parents[2] / "torch_utils" / "ops" / "csrc"
HOST_GPU = Path(__file__).parent.parent / "host_gpu"
OPS = ("upfirdn2d", "bias_act")
SCALARS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # in the order of Scalar in calls.h

# Sanitized kernels take minutes to compile with optimization.
PLAIN = ("-O0",)
SANITIZED = ("-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")  # an error ends the program
THREADS = ("-O0", "-g1", "-fsanitize=thread")
# Inlining everything would double that. __always_inline__ of system headers stays.
_NOT_INLINED = "-Dalways_inline=unused"
_LEVELS = {"plain": (), "avx2": ("-mavx2", "-mfma", "-mf16c")}
_CPU = ("-fno-math-errno", "-fno-trapping-math")
_NUMBERS, _ARRAYS = 16, 5  # of an Order in program.cpp


# A change of the sources that omits the half precision formats: mutants compile in half the time.
FLOATS_ONLY = ("dispatch.h", """    case Scalar::f16: return body(Half());
    case Scalar::bf16: return body(BFloat16());
""", "")


@dataclass(frozen=True, kw_only=True)
class Manner:
    """How calls are run; program.h and program.cpp say more."""

    backwards: bool = False
    most_blocks: int = 2**30
    last_blocks: int = -1
    shift: int = 0  # elements


@dataclass(frozen=True, kw_only=True)
class Order:
    """One call as program.cpp reads it."""

    work: int
    dtype: torch.dtype
    arrays: tuple[Tensor | None, ...]
    result: tuple[int, ...]  # shape
    result_dtype: torch.dtype
    numbers: tuple[int, ...]
    reals: tuple[float, ...] = ()
    whole_x: int = 0  # elements, if x is only the end of an array
    whole_y: int = 0
    manner: Manner = field(default_factory=Manner)

    def write(self, file) -> None:
        arrays = [*self.arrays, *[None] * (_ARRAYS - len(self.arrays))]
        item = self.dtype.itemsize
        sizes = [-1 if array is None else array.numel() * array.element_size() for array in arrays]
        result_size = int(np.prod(self.result)) * self.result_dtype.itemsize
        numbers = [SCALARS.index(self.dtype), *self.numbers]
        head = [self.work, self.manner.backwards, self.manner.most_blocks, self.manner.last_blocks,
                self.manner.shift * item, *sizes, result_size, self.whole_x * item, self.whole_y * item, *numbers,
                *[0] * (_NUMBERS - len(numbers))]
        file.write(np.array(head, dtype=np.int64).tobytes())
        file.write(np.array([*self.reals, *[0.0] * (3 - len(self.reals))]).tobytes())
        for array in arrays:
            if array is not None:
                file.write(_bytes(array))


def _bytes(array: Tensor) -> bytes:
    return array.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@dataclass(frozen=True)
class Program:
    """A compiled program."""

    path: Path

    def objects_but(self, op: str) -> tuple[Path, ...]:
        """Return the objects that the program is linked from, except that of one operator."""
        return tuple(path for path in self.path.parent.glob("*.o") if path.stem != op)

    def run(self, orders: list[Order]) -> list[Tensor]:
        """Return the results of calls. Raises AssertionError with what the program printed if it fails."""
        calls, results = self.path.with_suffix(".calls"), self.path.with_suffix(".results")
        with calls.open("wb") as file:
            for order in orders:
                order.write(file)
        # ThreadSanitizer refuses some memory layouts that the kernel chooses at random.
        still = ["setarch", "-R"] if shutil.which("setarch") else []
        environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=0",
                       "TSAN_OPTIONS": "halt_on_error=1", "UBSAN_OPTIONS": "print_stacktrace=1"}
        ran = subprocess.run([*still, self.path, calls, results], capture_output=True, text=True, env=environment)
        assert ran.returncode == 0, f"ended with {ran.returncode}: {_last_call(ran.stderr)[:6000]}"
        raw = torch.frombuffer(bytearray(results.read_bytes()), dtype=torch.uint8)
        sizes = [int(np.prod(order.result)) * order.result_dtype.itemsize for order in orders]
        parts = raw.split(sizes)
        return [part.clone().view(order.result_dtype).view(order.result) for part, order in zip(parts, orders)]


def _last_call(said: str) -> str:
    """Return what a program printed from its last call on."""
    return re.split(r"^(?=call \d+$)", said, flags=re.MULTILINE)[-1]


def compile_object(folder: Path, source: Path, *flags: str, csrc: Path = SOURCES) -> Path:
    """Compile one source file, a .cu as C++; return the object file. Raises AssertionError if that fails."""
    target = folder / f"{source.stem}.o"
    # csrc first: a changed copy has its own headers.
    command = [compiler(), "-std=c++20", "-Wall", *flags, "-I", csrc, "-I", HOST_GPU, "-x", "c++", "-c", source, "-o",
               target]
    _succeed(command)
    return target


def changed_sources(folder: Path, *changes: tuple[str, str, str]) -> Path:
    """Copy the sources, with changes (file, old text, new text); return where they are.

    Raises AssertionError if an old text does not occur exactly once in its file.
    """
    csrc = Path(shutil.copytree(SOURCES, folder / "csrc"))
    for name, old, new in changes:
        text = (csrc / name).read_text()
        assert text.count(old) == 1, f"{name} holds {text.count(old)} times {old!r}; expected once: renew the mutant"
        (csrc / name).write_text(text.replace(old, new))
    return csrc


def kernel_program(folder: Path, *flags: str, csrc: Path = SOURCES, objects: tuple[Path, ...] = ()) -> Program:
    """Compile a program that runs the kernels; `objects` replace some of the sources."""
    folder.mkdir(parents=True, exist_ok=True)
    ready = {path.stem: path for path in objects}
    flags = (*flags, "-DKERNELS_ON_HOST", _NOT_INLINED)
    sources = [csrc / f"{op}.cu" for op in OPS] + [HOST_GPU / "kernels.cpp", HOST_GPU / "program.cpp"]
    parts = [ready[source.stem] if source.stem in ready else compile_object(folder, source, *flags, csrc=csrc)
             for source in sources]
    return _link(folder / "program", parts, flags)


def cpu_program(folder: Path, level: str, *flags: str) -> Program:
    """Compile a program that runs the CPU functions of a level."""
    folder.mkdir(parents=True, exist_ok=True)
    flags = (*flags, f"-DCPU_LEVEL={level}", *_LEVELS[level], *_CPU, _NOT_INLINED)
    sources = [SOURCES / f"{op}_cpu.cpp" for op in OPS] + [HOST_GPU / "cpu.cpp", HOST_GPU / "program.cpp"]
    return _link(folder / "program", [compile_object(folder, source, *flags) for source in sources], flags)


def cpu_object(folder: Path, op: str, level: str) -> Path:
    """Compile an operator for a CPU level as the library does."""
    return compile_object(folder, SOURCES / f"{op}_cpu.cpp", "-O3", "-fPIC", *_CPU, f"-DCPU_LEVEL={level}",
                          *_LEVELS[level])


def compiler() -> str:
    """Return the C++ compiler's name."""
    return os.environ.get("CXX", "g++")


def _link(target: Path, objects: list[Path], flags: tuple[str, ...]) -> Program:
    _succeed([compiler(), *objects, *[flag for flag in flags if flag.startswith("-fsanitize")], "-o", target])
    return Program(target)


def _succeed(command: list) -> None:
    ran = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert ran.returncode == 0, f"{' '.join(map(str, command))}: {ran.stderr[-4000:]}"


class KernelUse(NamedTuple):
    """What one kernel, or one function that a kernel calls, uses on one architecture."""

    kernel: str  # its name for the linker
    arch: str  # "sm_90"
    registers: int  # per thread; 0 for a function
    stack: int  # bytes per thread, as the others
    spill_stores: int
    spill_loads: int


def read_ptxas_report(log: str) -> list[KernelUse]:
    """Return what `ptxas -v` printed into the log of a build, in its order."""
    found, arch, name = [], "", ""
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '\S+' for '(\S+)'", line):
            arch = match[1]
        elif match := re.search(r"Function properties for (\S+)", line):
            name = match[1]
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            found.append(KernelUse(name, arch, 0, *map(int, match.groups())))
        elif (match := re.search(r"Used (\d+) registers", line)) and found:
            found[-1] = found[-1]._replace(registers=int(match[1]))
    return found
