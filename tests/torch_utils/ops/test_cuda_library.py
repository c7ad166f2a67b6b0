"""The compiled CUDA operators: registers, spills, and accesses of 128 bits."""

import re
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.helpers.kernel_programs import read_ptxas_report
from torch_utils.ops.build import library

ARCHS = ("sm_80", "sm_90", "sm_100")
REGISTERS = 65536  # per multiprocessor

pytestmark = [pytest.mark.slow,
              pytest.mark.skipif(torch.version.cuda is None, reason="PyTorch is of a kind without CUDA")]


def most_registers(kernel: str) -> int:
    """Return how many registers leave room for two blocks on a multiprocessor, or for one if sums are double."""
    shape = re.search(r"Li(\d+)ELi(\d+)EEEv", kernel)  # of the block, where it is a template's
    threads = int(shape[1]) * int(shape[2]) if shape else 256
    return min(REGISTERS // threads // (1 if re.search("Ed(Li|E)", kernel) else 2), 255)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The library for all architectures, built by pip's toolkit, as on a machine without another."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST"):
            patch.delenv(name, raising=False)
        patch.setenv("PATH", "")
        return library("cuda", archs="8.0;9.0;10.0+PTX")


def test_cuda_library_links_and_registers_for_the_device(built):
    code = f"""
import torch
from torch_utils.ops import compiled
assert compiled.failure_of("cpu") is None
torch.ops.load_library({str(built)!r})
for name in ("upfirdn2d", "bias_act", "bias_act_grad", "bias_act_grad2"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"lesion_ops::{{name}}", "CUDA"), name
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent.parent.parent)


def test_cuda_kernels_spill_nothing_and_have_no_stack(built):
    report = read_ptxas_report(Path(f"{built.parent}.log").read_text(encoding="utf-8"))
    kernels = {use.kernel for use in report}
    assert Counter(use.arch for use in report) == dict.fromkeys(ARCHS, len(kernels))
    assert len(kernels) > 200  # kernels, formats and block shapes
    odd = [use for use in report if use.stack or use.spill_stores or use.spill_loads]
    assert not odd
    assert [use for use in report if use.registers > most_registers(use.kernel)] == []


@pytest.mark.parametrize("kernel", ["bias_act_kernel", "upfirdn2d_kernel", "upfirdn2d_channels_kernel"])
def test_cuda_kernels_access_128_bits_at_once(built, kernel):
    tool = Path(find_spec("triton").origin).parent / "backends/nvidia/bin/cuobjdump"
    done = subprocess.run([tool, "-sass", "-arch", "sm_80", built], check=True, capture_output=True, text=True)
    functions = {section.split()[0]: section for section in re.split(r"Function : ", done.stdout)[1:]}
    # In float32: in double a pack of the filters is 32 bytes, in half precision 8.
    chosen = {name: code for name, code in functions.items() if re.search(rf"\d{kernel}I.*E(Lb[01]E)?fLi", name)}
    assert chosen
    assert [name for name, code in chosen.items() if "LDG.E.128" not in code] == []
    assert [name for name, code in chosen.items() if "STG.E.128" not in code] == []
