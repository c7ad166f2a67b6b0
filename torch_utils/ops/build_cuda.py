"""Find the CUDA toolkit that fits the installed PyTorch, and the GPU architectures to compile for."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch_utils.ops.build_tools import BuildError, answer, find_program

_HEADERS = ("cuda_runtime.h", "crt/host_config.h")
_LIBRARY_FOLDERS = ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib")
_ARCH = re.compile(r"(\d+\.\d[af]?)(\+PTX)?")


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
    devices:    compute capabilities of these GPUs; without any, those of data centres

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
    if _numbers(torch_cuda) < (12, 8):  # the first version that knows 10.0
        return ("8.0", "9.0+PTX")
    return ("8.0", "9.0", "10.0+PTX")


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


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))
