"""torch_utils.ops.compilers: toolkits, architectures, what ptxas reports."""

import os

import pytest

from torch_utils.ops.build import KernelUse, ptxas_lines, read_ptxas_report, summarize
from torch_utils.ops.compilers import BuildError, architectures, find_toolkit, gencode

pytestmark = pytest.mark.skipif(os.name != "posix", reason="toolkits are looked for on POSIX systems")
REPORT = """\
[1/2] kernels.cu.o
ptxas warning : Local memory used for function '_ZN4deep6spillyEPKfPfi', size of stack frame: 800 bytes
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN4deep6spillyEPKfPfi' for 'sm_80'
ptxas info    : Function properties for _ZN4deep6spillyEPKfPfi
    800 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers, 800 bytes cumulative stack size, 380 bytes cmem[0]
ptxas info    : Compile time = 388.361 ms
ptxas info    : Function properties for _Z6helperf
    8 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z5twiceIdEvPKT_PS0_i' for 'sm_100'
ptxas info    : Function properties for _Z5twiceIdEvPKT_PS0_i
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers, used 0 barriers
[2/2] ops_cuda.so
"""


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    """No toolkit is named by the environment, and no program is on PATH."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(os, "defpath", "/nowhere")


def write_nvcc(path, version="13.0", top=None):
    """Make a program that says what nvcc says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"""#!/bin/sh
case "$1" in
--version) echo "Cuda compilation tools, release {version}, V{version}.88" ;;
--dryrun) echo "#$ _SPACE_= "; echo "#$ TOP={top}" ;;
esac
""")
    path.chmod(0o755)


def write_files(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def write_toolkit(root, version="13.0", library="lib64/libcudart.so"):
    write_nvcc(root / "bin" / "nvcc", version)
    write_files(root, "include/cuda_runtime.h", "include/crt/host_config.h", library)
    return root


def find(tmp_path, wanted="13.0"):
    return find_toolkit(wanted, tmp_path / "site-packages", tmp_path / "cache", system=tmp_path / "local")


def test_toolkit_of_pip_for_cuda_13_is_found(tmp_path):
    root = write_toolkit(tmp_path / "site-packages/nvidia/cu13", library="lib/libcudart.so.13")
    toolkit, refused = find(tmp_path)
    assert (toolkit.nvcc, toolkit.version, refused) == (root / "bin/nvcc", "13.0", [])
    assert (toolkit.includes, toolkit.cudart) == ((root / "include",), root / "lib/libcudart.so.13")


def test_toolkit_of_pip_for_cuda_12_lies_in_two_folders(tmp_path):
    nvidia = tmp_path / "site-packages/nvidia"
    write_nvcc(nvidia / "cuda_nvcc/bin/nvcc", "12.8")
    write_files(nvidia, "cuda_nvcc/include/crt/host_config.h", "cuda_runtime/include/cuda_runtime.h",
                "cuda_runtime/lib/libcudart.so.12")
    toolkit, _ = find(tmp_path, "12.6")
    assert toolkit.version == "12.8"  # another minor version fits
    assert toolkit.includes == (nvidia / "cuda_nvcc/include", nvidia / "cuda_runtime/include")
    assert toolkit.cudart == nvidia / "cuda_runtime/lib/libcudart.so.12"


def test_runtime_of_pip_without_nvcc_is_passed_over(tmp_path):
    write_files(tmp_path / "site-packages/nvidia/cu13", "include/cuda_runtime.h", "lib/libcudart.so.13")
    root = write_toolkit(tmp_path / "local/cuda")
    toolkit, refused = find(tmp_path)
    assert (toolkit.nvcc, refused) == (root / "bin/nvcc", [])


@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH"])
def test_toolkit_that_a_variable_names_comes_first(variable, tmp_path, monkeypatch):
    write_toolkit(tmp_path / "site-packages/nvidia/cu13")
    monkeypatch.setenv(variable, str(write_toolkit(tmp_path / "mine", "13.2")))
    toolkit, _ = find(tmp_path)
    assert (toolkit.nvcc, toolkit.version) == (tmp_path / "mine/bin/nvcc", "13.2")


def test_places_are_tried_in_order(tmp_path, monkeypatch):
    places = ["site-packages/nvidia/cu13", "path", "local/cuda", "local/cuda-13.1", "local/cuda-13.0"]
    monkeypatch.setenv("PATH", str(tmp_path / "path/bin"))
    for place in reversed(places):
        write_toolkit(tmp_path / place)
        assert find(tmp_path)[0].nvcc == tmp_path / place / "bin/nvcc"


def test_toolkit_of_another_version_is_refused_with_the_reason(tmp_path, monkeypatch):
    old, fits = write_toolkit(tmp_path / "old", "12.4"), write_toolkit(tmp_path / "local/cuda-13.0")
    (tmp_path / "local/cuda").symlink_to(old)
    monkeypatch.setenv("CUDA_HOME", str(old))
    toolkit, refused = find(tmp_path)
    assert toolkit.nvcc == fits / "bin/nvcc"
    assert refused == [f"{old}/bin/nvcc is of CUDA 12.4"]  # once, though two names lead there


def test_wrapper_of_nvcc_is_asked_for_its_toolkit(tmp_path, monkeypatch):
    root = write_toolkit(tmp_path / "opt/cuda")
    write_nvcc(tmp_path / "bin/nvcc", top=f"{root}/bin/..")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    toolkit, _ = find(tmp_path)
    assert (toolkit.nvcc, toolkit.includes) == (tmp_path / "bin/nvcc", (root / "include",))
    assert toolkit.cudart == root / "lib64/libcudart.so"


def test_no_toolkit_says_why_and_how_to_get_one(tmp_path, monkeypatch):
    with pytest.raises(BuildError) as error:
        find(tmp_path)
    assert str(error.value) == ('no CUDA toolkit fits a PyTorch for CUDA 13.0: pip install '
                                '"cuda-toolkit[nvcc,cccl]==13.0.*"')
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "gone"))
    monkeypatch.setenv("CUDA_PATH", str(write_toolkit(tmp_path / "old", "11.8")))
    headless = tmp_path / "site-packages/nvidia/cu12"
    write_nvcc(headless / "bin/nvcc", "12.6", top=headless)
    (write_toolkit(tmp_path / "local/cuda", "12.9") / "lib64/libcudart.so").unlink()
    write_nvcc(tmp_path / "broken/bin/nvcc")
    (tmp_path / "broken/bin/nvcc").write_text("#!/bin/sh\necho no licence\nexit 3\n")
    monkeypatch.setenv("PATH", str(tmp_path / "broken/bin"))
    with pytest.raises(BuildError) as error:
        find(tmp_path, "12.8")
    reasons = [f"{tmp_path}/gone/bin/nvcc does not exist", f"{tmp_path}/old/bin/nvcc is of CUDA 11.8",
               f"{headless}/bin/nvcc is without cuda_runtime.h or crt/host_config.h",
               f"{tmp_path}/broken/bin/nvcc --version ended with code 3: no licence",
               f"{tmp_path}/local/cuda/bin/nvcc is without libcudart.so.12"]
    assert str(error.value) == (f"no CUDA toolkit fits a PyTorch for CUDA 12.8 ({'; '.join(reasons)}): "
                                'pip install "cuda-toolkit[nvcc,cccl]==12.8.*"')


@pytest.mark.parametrize(("text", "devices", "expected"), [
    ("8.0;9.0+PTX", [(7, 5)], ("8.0", "9.0+PTX")),
    ("8.6 9.0a,12.0f;8.6", [], ("8.6", "9.0a", "12.0f")),
    ("", [(9, 0), (8, 0), (9, 0)], ("8.0", "9.0")),
    ("", [], ("8.0", "9.0", "10.0+PTX")),
])
def test_architectures_are_those_named_else_those_at_hand_else_those_of_data_centers(text, devices, expected):
    assert architectures(text, "13.0", devices) == expected


def test_architectures_are_those_that_the_toolkit_knows():
    assert architectures("", "12.6", []) == ("8.0", "9.0+PTX")
    assert architectures("", "12.8", []) == ("8.0", "9.0", "10.0+PTX")


def test_architectures_of_another_form_raise():
    with pytest.raises(BuildError) as error:
        architectures("8.0;Ampere", "13.0", [])
    assert str(error.value) == ("the architectures are '8.0;Ampere'; expected for example '8.0;9.0+PTX': correct "
                                "TORCH_CUDA_ARCH_LIST, or what torch_utils.ops.build --archs says")


def test_gencode_adds_code_for_later_gpus_where_it_is_asked_for():
    assert gencode("9.0a") == ["-gencode", "arch=compute_90a,code=sm_90a"]
    assert gencode("10.0+PTX") == ["-gencode", "arch=compute_100,code=[sm_100,compute_100]"]


def test_ptxas_report_is_read_by_kernel_and_architecture():
    assert read_ptxas_report(REPORT) == [
        KernelUse("_ZN4deep6spillyEPKfPfi", "sm_80", 32, 800, 12, 16),
        KernelUse("_Z6helperf", "sm_80", 0, 8, 0, 0),
        KernelUse("_Z5twiceIdEvPKT_PS0_i", "sm_100", 12, 0, 0, 0),
    ]
    assert read_ptxas_report("") == []


def test_ptxas_lines_leave_out_what_others_printed():
    kept = ptxas_lines(REPORT + "kernels.cu(3): warning #177-D: variable was declared but never referenced\n")
    assert kept.splitlines() == REPORT.splitlines()[1:-1]
    assert read_ptxas_report(kept) == read_ptxas_report(REPORT)


def test_summary_tells_registers_stack_and_spills():
    uses = read_ptxas_report(REPORT)
    assert summarize(uses) == ("2 kernels on 2 architectures, at most 32 registers, a stack of up to 800 bytes, "
                               "spills in 1")
    assert summarize(uses[2:]) == "1 kernels on 1 architectures, at most 12 registers, no stack, no spills"
