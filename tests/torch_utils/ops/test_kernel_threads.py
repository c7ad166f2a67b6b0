"""Threads of a block share memory in order: ThreadSanitizer sees every access of the kernels, executed on the host."""

import pytest
import torch

from tests.helpers.kernel_calls import filter_grids, filter_table, wrong_results
from tests.helpers.kernel_programs import FLOATS_ONLY, THREADS, Manner, changed_sources, kernel_program

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

# Blocks that loop over several tiles, so that one tile's last accesses meet the next one's first.
WALKING = Manner(most_blocks=2)
# The sync that each has before and after the second stage
MISSING = {
    "first": ("b.sync();\n    walk = at;", "walk = at;"),
    "last": ("(walk.plane * v.out + walk.row) * h.out);\n    }\n    b.sync();",
             "(walk.plane * v.out + walk.row) * h.out);\n    }"),
}


def _calls():
    return [*filter_table(torch.float64), *(call for call in filter_grids() if call.x.dtype == torch.float32)]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    folder = tmp_path_factory.mktemp("threads")
    return kernel_program(folder, *THREADS, csrc=changed_sources(folder, FLOATS_ONLY))


def test_kernels_threads_do_not_race(program):
    assert wrong_results(_calls(), program.run([call.order(WALKING) for call in _calls()])) == []


@pytest.mark.parametrize("sync", MISSING)
def test_kernels_missing_sync_is_a_race(program, tmp_path, sync):
    csrc = changed_sources(tmp_path, FLOATS_ONLY, ("upfirdn2d.h", *MISSING[sync]))
    racing = kernel_program(tmp_path, *THREADS, csrc=csrc, objects=program.objects_but("upfirdn2d"))
    with pytest.raises(AssertionError, match=r"data race[\s\S]*upfirdn2d_tile"):
        racing.run([call.order(WALKING) for call in _calls()])
