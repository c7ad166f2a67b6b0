"""torch_utils.ops.build: the compiler and CUDA toolkit that it finds, the architectures, and the commands."""

import os

import pytest
import torch

from torch_utils.ops import build
from torch_utils.ops.build import BuildError, architectures, build_commands, find_compiler, find_toolkit, read_sources

pytestmark = pytest.mark.skipif(os.name != "posix", reason="compilers and toolkits are searched for on POSIX systems")


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    """The environment names no toolkit or compiler, and no program is on PATH."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(os, "defpath", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)


def write_files(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch(mode=0o755)


def write_toolkit(root, version=13000, library="lib64/libcudart.so"):
    write_files(root, "bin/nvcc", "include/crt/host_config.h", library)
    (root / "include/cuda_runtime_api.h").write_text(f"#define CUDART_VERSION  {version}\n")
    return root


@pytest.fixture
def find(tmp_path, monkeypatch):
    """Return a function that searches only tmp_path for a toolkit, for a PyTorch of some CUDA version."""
    def look(wanted="13.0"):
        monkeypatch.setattr(torch.version, "cuda", wanted)
        return find_toolkit(system=tmp_path / "local/cuda")

    monkeypatch.setattr(build, "TORCH", tmp_path / "site-packages/torch")
    return look


def test_toolkit_of_pip_for_cuda_13_is_found(tmp_path, find):
    root = write_toolkit(tmp_path / "site-packages/nvidia/cu13", library="lib/libcudart.so.13")
    nvcc, includes, cudart = find()
    assert (nvcc, cudart) == (root / "bin/nvcc", root / "lib/libcudart.so.13")
    assert set(includes) == {f"-I{root}/include"}


def test_toolkit_of_pip_for_cuda_12_lies_in_two_folders(tmp_path, find):
    nvidia = tmp_path / "site-packages/nvidia"
    write_toolkit(nvidia / "cuda_runtime", 12080, "lib/libcudart.so.12")
    (nvidia / "cuda_runtime/bin/nvcc").unlink()
    (nvidia / "cuda_runtime/include/crt/host_config.h").unlink()
    write_files(nvidia, "cuda_nvcc/bin/nvcc", "cuda_nvcc/include/crt/host_config.h")
    assert find("12.6") == (  # another minor version fits
        nvidia / "cuda_nvcc/bin/nvcc", [f"-I{nvidia}/cuda_nvcc/include", f"-I{nvidia}/cuda_runtime/include"],
        nvidia / "cuda_runtime/lib/libcudart.so.12")


def test_toolkit_of_conda_has_parts_in_targets(tmp_path, find, monkeypatch):
    target = write_toolkit(tmp_path / "conda/targets/x86_64-linux", library="lib/libcudart.so")
    write_files(tmp_path / "conda", "bin/nvcc")
    monkeypatch.setenv("PATH", str(tmp_path / "conda/bin"))
    nvcc, includes, cudart = find()
    assert (nvcc, set(includes), cudart) == (tmp_path / "conda/bin/nvcc", {f"-I{target}/include"},
                                             target / "lib/libcudart.so")


@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH"])
def test_toolkit_that_a_variable_names_comes_first(variable, tmp_path, find, monkeypatch):
    write_toolkit(tmp_path / "site-packages/nvidia/cu13")
    monkeypatch.setenv(variable, str(write_toolkit(tmp_path / "mine", 13020)))
    assert find()[0] == tmp_path / "mine/bin/nvcc"


def test_places_are_tried_in_order_except_incomplete_ones(tmp_path, find, monkeypatch):
    places = ["site-packages/nvidia/cu13", "path", "local/cuda"]
    monkeypatch.setenv("PATH", str(tmp_path / "path/bin"))
    for place in reversed(places):
        write_toolkit(tmp_path / place)
        assert find()[0] == tmp_path / place / "bin/nvcc"
    (tmp_path / places[0] / "bin/nvcc").unlink()  # pip's runtime alone, which comes with PyTorch
    (tmp_path / "path/include/cuda_runtime_api.h").unlink()  # nvcc on PATH is a script that starts another one
    assert find()[0] == tmp_path / "local/cuda/bin/nvcc"


def test_toolkit_of_another_version_is_skipped(tmp_path, find, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(write_toolkit(tmp_path / "old", 12040)))
    write_toolkit(tmp_path / "local/cuda", 12040)
    write_toolkit(tmp_path / "local/cuda-13.0")
    assert find()[0] == tmp_path / "local/cuda-13.0/bin/nvcc"
    monkeypatch.setenv("CUDA_PATH", str(write_toolkit(tmp_path / "new")))
    assert find()[0] == tmp_path / "new/bin/nvcc"


def test_no_toolkit_says_why_and_how_to_get_one(tmp_path, find, monkeypatch):
    with pytest.raises(BuildError) as error:
        find()
    assert str(error.value) == 'no toolkit for CUDA 13 was found: pip install "cuda-toolkit[nvcc,cccl]==13.0.*"'
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "gone"))
    (write_toolkit(tmp_path / "site-packages/nvidia/cu12") / "include/crt/host_config.h").unlink()
    monkeypatch.setenv("PATH", str(write_toolkit(tmp_path / "old", 11080) / "bin"))
    (write_toolkit(tmp_path / "local/cuda", 12090) / "lib64/libcudart.so").unlink()
    with pytest.raises(BuildError) as error:
        find("12.8")
    assert str(error.value) == (
        f"no toolkit for CUDA 12 was found; {tmp_path}/gone does not contain bin/nvcc; {tmp_path}/site-packages/nvidia/"
        f"cu12 does not contain include/crt/host_config.h; {tmp_path}/old is not for CUDA 12; {tmp_path}/local/cuda "
        'does not contain lib*/libcudart.so*: pip install "cuda-toolkit[nvcc,cccl]==12.8.*"')


def test_compiler_is_cxx_with_its_options_else_the_first_on_path(tmp_path, monkeypatch):
    write_files(tmp_path, "clang++", "c++", "ccache", "ninja")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", ".")
    assert find_compiler() == [f"{tmp_path}/c++"]
    write_files(tmp_path, "g++")
    assert find_compiler() == [f"{tmp_path}/g++"]
    monkeypatch.setenv("CXX", "ccache clang++ -O1")
    assert find_compiler() == [f"{tmp_path}/ccache", f"{tmp_path}/clang++", "-O1"]


def test_commands_for_cuda_name_the_toolkit_the_compiler_and_each_architecture(tmp_path, find, monkeypatch):
    root = write_toolkit(tmp_path / "site-packages/nvidia/cu13", library="lib/libcudart.so.13")
    write_files(tmp_path, "g++", "ccache", "csrc/a.cu", "csrc/cuda_library.cpp", "csrc/library.cpp")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "ccache g++")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    commands = build_commands(read_sources("cuda", tmp_path / "csrc", "9.0a;10.0+PTX"))
    assert list(commands) == ["a.cu.o", "cuda_library.cpp.o", "ops_cuda.so"]
    kernel, glue, link = commands.values()
    assert kernel[:3] == [f"{root}/bin/nvcc", "-ccbin", f"{tmp_path}/g++"]
    assert [word for word in kernel if "gencode" in word] == [
        "-gencode=arch=compute_90a,code=sm_90a", "-gencode=arch=compute_100,code=[sm_100,compute_100]"]
    assert glue[:2] == link[:2] == [f"{tmp_path}/ccache", f"{tmp_path}/g++"]
    assert f"-I{root}/include" in kernel
    assert f"-I{root}/include" in glue
    assert f"{root}/lib/libcudart.so.13" in link


@pytest.mark.parametrize(("text", "devices", "expected"), [
    ("8.0;9.0+PTX", [(7, 5)], ("8.0", "9.0+PTX")),
    ("8.6 9.0a,12.0f;8.6", [], ("8.6", "9.0a", "12.0f")),
    ("", [(9, 0), (8, 0), (9, 0)], ("8.0", "9.0")),
    ("", [], ("8.0", "9.0", "10.0+PTX")),
])
def test_architectures_are_those_named_else_those_at_hand_else_those_of_data_centers(text, devices, expected,
                                                                                      monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(devices))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(devices))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: devices[index])
    assert architectures(text) == expected
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", text)
    assert architectures(None) == expected


def test_devices_that_an_old_driver_cannot_use_are_not_asked(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # NVML sees it
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: 1 / 0)
    assert architectures("") == build.DATA_CENTER_ARCHS
    assert architectures("9.0") == ("9.0",)


def test_architectures_of_another_form_raise():
    with pytest.raises(BuildError) as error:
        architectures("8.0;Ampere")
    assert str(error.value) == ("the GPU architectures are '8.0;Ampere'; expected for example '8.0;9.0+PTX': correct "
                                "TORCH_CUDA_ARCH_LIST, or torch_utils.ops.build --archs")
