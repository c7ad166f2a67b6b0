"""Kernels and CPU functions under AddressSanitizer and UBSan, and what the CPU's objects may define."""

import re
import subprocess
from pathlib import Path

import pytest
import torch

from tests.helpers.kernel_calls import bias_grids, bias_table, filter_grids, filter_table, huge_orders, wrong_results
from tests.helpers.kernel_programs import (
    FLOATS_ONLY,
    OPS,
    SANITIZED,
    SCALARS,
    Manner,
    changed_sources,
    cpu_object,
    cpu_program,
    kernel_program,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


def _all_calls():
    return [call for dtype in SCALARS for call in (*filter_table(dtype), *bias_table(dtype))] + filter_grids() \
        + bias_grids()


def _has_avx2() -> bool:
    info = Path("/proc/cpuinfo")
    return info.exists() and {"avx2", "fma", "f16c"} <= set(info.read_text().split())


LEVELS = ["plain", pytest.param("avx2", marks=pytest.mark.skipif(not _has_avx2(), reason="this CPU has no AVX2"))]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return kernel_program(tmp_path_factory.mktemp("kernels"), *SANITIZED)


@pytest.mark.parametrize("manner", [Manner(), Manner(backwards=True, shift=1, most_blocks=2)],
                         ids=["forwards", "backwards_off_alignment_walking"])
def test_kernels_sanitizers_find_nothing(program, manner):
    calls = _all_calls()
    assert wrong_results(calls, program.run([call.order(manner) for call in calls])) == []


def test_kernels_beyond_int32_overflow_nothing(program):
    for call, huge, small in huge_orders():
        found, expected = program.run([huge, small])
        assert torch.equal(found, expected), call.name


@pytest.mark.parametrize("level", LEVELS)
def test_cpu_functions_sanitizers_find_nothing(tmp_path, level):
    program = cpu_program(tmp_path, level, *SANITIZED)
    calls = _all_calls()
    for manner in (Manner(), Manner(backwards=True, shift=1)):
        assert wrong_results(calls, program.run([call.order(manner) for call in calls])) == []


def test_kernels_rows_beyond_the_last_are_an_overflow(program, tmp_path):
    csrc = changed_sources(tmp_path, FLOATS_ONLY, ("upfirdn2d.cu", "upfirdn2d_tile<K, T>(block, call, row, "
                           "static_cast<int32_t>(rows - row < each ? rows - row : each)",
                           "upfirdn2d_tile<K, T>(block, call, row, each"))
    overflowing = kernel_program(tmp_path, *SANITIZED, csrc=csrc, objects=program.objects_but("upfirdn2d"))
    with pytest.raises(AssertionError, match=r"heap-buffer-overflow[\s\S]*upfirdn2d"):
        overflowing.run([call.order(Manner()) for call in filter_table(torch.float32)])


@pytest.mark.skipif(not _has_avx2(), reason="this CPU has no AVX2")
@pytest.mark.parametrize("op", OPS)
def test_cpu_objects_of_avx2_define_nothing_that_others_share(tmp_path, op):
    # If several objects define a function, the linker keeps any of them: it must not be one that needs AVX2.
    listing = subprocess.run(["nm", "-C", "--defined-only", "--extern-only", cpu_object(tmp_path, op, "avx2")],
                             capture_output=True, text=True, check=True).stdout
    names = re.findall(r"^\S+ (\S) (.*)$", listing, flags=re.MULTILINE)
    assert [name for _, name in names if f"ops::avx2::{op}" in name]
    assert [name for _, name in names if "avx2" not in name] == []
