"""torch_utils.ops.build with real compilers: small libraries that load and compute."""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.kernel_programs import read_ptxas_report
from torch_utils.ops import build
from torch_utils.ops.build import BuildError, find_toolkit, library, read_sources

ROOT = Path(__file__).parent.parent.parent.parent
PACKAGES = Path(torch.__file__).parent.parent
pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="builds are tested on Linux"),
    pytest.mark.skipif(shutil.which("g++", path=f"{os.environ.get('PATH')}:{os.defpath}") is None, reason="needs g++"),
]
KERNEL_CPU = """
#include "twice.h"
#define JOIN(a, b) a##b
#define NAME(level) JOIN(twice_, level)
extern "C" void NAME(CPU_LEVEL)(const float* x, float* y, long n) { for (long i = 0; i < n; ++i) y[i] = FACTOR * x[i]; }
"""
LIBRARY = """
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>
extern "C" void twice_plain(const float*, float*, long);
static at::Tensor twice(const at::Tensor& x) {
  auto y = at::empty_like(x);
  const float* from = x.const_data_ptr<float>();
  float* to = y.mutable_data_ptr<float>();
  at::parallel_for(0, x.numel(), 100, [&](int64_t i, int64_t end) { twice_plain(from + i, to + i, end - i); });
  return y;
}
static bool is_parallel() {
#ifdef _OPENMP
  return true;
#else
  return false;
#endif
}
TORCH_LIBRARY(build_test, m) {
  m.def("twice(Tensor x) -> Tensor");
  m.def("is_parallel() -> bool", &is_parallel);
}
TORCH_LIBRARY_IMPL(build_test, CPU, m) { m.impl("twice", &twice); }
"""
KERNEL_CUDA = """
#include "twice.h"
#include <cuda_runtime.h>
__global__ void twice(const float* x, float* y, long n) {
  long i = blockIdx.x * (long)blockDim.x + threadIdx.x;
  if (i < n) y[i] = FACTOR * x[i];
}
cudaError_t launch_twice(const float* x, float* y, long n, cudaStream_t stream) {
  twice<<<(n + 255) / 256, 256, 0, stream>>>(x, y, n);
  return cudaGetLastError();
}
"""
LIBRARY_CUDA = """
#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>
cudaError_t launch_twice(const float*, float*, long, cudaStream_t);
static at::Tensor twice(const at::Tensor& x) {
  const c10::cuda::CUDAGuard guard(x.device());
  auto y = at::empty_like(x);
  C10_CUDA_CHECK(launch_twice(x.const_data_ptr<float>(), y.mutable_data_ptr<float>(), x.numel(),
                              c10::cuda::getCurrentCUDAStream()));
  return y;
}
TORCH_LIBRARY(build_test, m) { m.def("twice(Tensor x) -> Tensor"); }
TORCH_LIBRARY_IMPL(build_test, CUDA, m) { m.impl("twice", &twice); }
"""
USE = """
import sys
from pathlib import Path
import torch
from torch_utils.ops.build import library
path = library(sys.argv[1], source=Path(sys.argv[2]))
torch.ops.load_library(path)
print(path)
"""
USE_CPU = """
x = torch.arange(10000.0)
assert torch.equal(torch.ops.build_test.twice(x), 2 * x)
assert torch.ops.build_test.is_parallel()
maps = Path("/proc/self/maps").read_text().split()
assert len({name for name in maps if "libgomp" in name or "libomp" in name}) == 1  # one pool of threads
"""
USE_CUDA = """
names = torch._C._dispatch_dump("build_test::twice")
assert "CUDA: registered at csrc/cuda_library.cpp" in names, names
if torch.cuda.is_available():
    x = torch.arange(10000.0, device="cuda")
    assert torch.equal(torch.ops.build_test.twice(x), 2 * x)
"""


@pytest.fixture
def source(tmp_path, monkeypatch):
    folder = tmp_path / "csrc"
    folder.mkdir()
    (folder / "twice.h").write_text("#define FACTOR 2\n")
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "a cache"))
    for name in ("CXX", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "TORCH_EXTENSIONS_DIR"):
        monkeypatch.delenv(name, raising=False)
    return folder


def use(kind, source, code):
    """Build and load a library in a process of its own, without a PATH; return its path."""
    run = subprocess.run([sys.executable, "-c", USE + code, kind, str(source)], cwd=ROOT, capture_output=True,
                         text=True, env={**os.environ, "PATH": ""}, check=False)
    assert run.returncode == 0, run.stderr
    return Path(run.stdout.strip())


def test_library_without_torch_has_a_function_for_each_cpu_level(source):
    (source / "twice_cpu.cpp").write_text(KERNEL_CPU)
    made = ctypes.CDLL(str(library("cpu", source=source)))
    levels = ["plain"]
    if "avx2" in Path("/proc/cpuinfo").read_text():
        levels.append("avx2")
    for level in levels:
        x, y = (ctypes.c_float * 100)(*range(100)), (ctypes.c_float * 100)()
        getattr(made, f"twice_{level}")(x, y, ctypes.c_long(100))
        assert list(y) == [2.0 * i for i in range(100)]


def test_mistake_in_a_source_is_shown_with_its_place(source):
    (source / "twice_cpu.cpp").write_text("#include \"twice.h\"\n\nint twice = FACTORY;\n")
    with pytest.raises(BuildError, match=r"failed \(csrc/twice_cpu.cpp:3:13: error: .*FACTORY.*\): the whole log is "):
        library("cpu", source=source)


def test_missing_function_is_reported_when_linking(source):
    (source / "twice.cpp").write_text("int missing();\nint twice() { return missing(); }\n")
    with pytest.raises(BuildError, match=r"failed \(.*undefined reference to `missing\(\)'\): the whole log is "):
        library("cpu", source=source)


@pytest.mark.slow
def test_cpu_library_registers_operators_and_shares_pytorchs_threads(source):
    (source / "twice_cpu.cpp").write_text(KERNEL_CPU)
    (source / "library.cpp").write_text(LIBRARY)
    use("cpu", source, USE_CPU)


def toolkit_of(where, tmp_path, monkeypatch):
    """Return the folder of the toolkit beside PyTorch ("pip") or of the system; skip if there is none."""
    if torch.version.cuda is None:
        pytest.skip("this PyTorch is built without CUDA")
    with monkeypatch.context() as patch:
        if where == "system":
            patch.setattr(build, "TORCH", tmp_path / "torch")
        try:
            nvcc = find_toolkit()[0]
        except BuildError as error:
            pytest.skip(f"{error}")
    if where == "pip" and not nvcc.is_relative_to(PACKAGES.resolve()):
        pytest.skip(f'no toolkit beside PyTorch; pip install "cuda-toolkit[nvcc,cccl]=={torch.version.cuda}.*"')
    return nvcc.parent.parent


@pytest.mark.slow
@pytest.mark.parametrize("where", ["pip", "system"])
def test_cuda_library_is_built_and_loaded_without_a_gpu(where, source, tmp_path, monkeypatch):
    root = toolkit_of(where, tmp_path, monkeypatch)
    if where == "system":
        monkeypatch.setenv("CUDA_HOME", str(root))
    (source / "twice.cu").write_text(KERNEL_CUDA)
    (source / "cuda_library.cpp").write_text(LIBRARY_CUDA)
    folder = use("cuda", source, USE_CUDA).parent
    assert f"{root}/bin/nvcc" in (folder / "build.ninja").read_text()
    uses = read_ptxas_report(Path(f"{folder}.log").read_text())
    archs = read_sources("cuda", source).archs
    assert {use.arch for use in uses} == {f"sm_{arch.split('+')[0].replace('.', '')}" for arch in archs}
    assert all(use.kernel == "_Z5twicePKfPfl" and 0 < use.registers < 32 for use in uses)
    assert not any(use.stack or use.spill_stores or use.spill_loads for use in uses)
