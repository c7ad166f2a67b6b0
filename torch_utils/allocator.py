"""Let the C library keep memory that was freed, so that a large tensor does not begin with a page fault every 4 KiB.

By default glibc maps large blocks one by one and unmaps them when they are freed, and gives the free end of its heap
back to the system. In training the same amount is needed again at once.
"""

import ctypes
import os
import sys
from dataclasses import dataclass
from pathlib import Path

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_NEVER = -1


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What was done about the allocator."""

    is_done: bool
    reason: str  # how it was done, or why not
    is_foreign: bool = False  # left alone because of settings outside this program

    @property
    def note(self) -> str:
        """Return a line for a log."""
        what = "freed memory is kept for reuse" if self.is_done else "the allocator is left as it is"
        return f"memory: {what} ({self.reason})"


def tune_malloc(wanted: bool) -> Tuning:
    """Let glibc's malloc keep what is freed, in this process and those that fork from it; to call before large tensors.

    What is computed does not change. The process does not shrink again: what it holds stays at the most that it needed.
    """
    if not wanted:
        return Tuning(is_done=False, reason="--tune-malloc=false")
    found = _foreign_settings()
    if found is not None:
        return Tuning(is_done=False, reason=found, is_foreign=True)
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(library, "gnu_get_libc_version"):
        return Tuning(is_done=False, reason="only that of Linux with glibc is tuned")
    if not (library.mallopt(_M_MMAP_MAX, 0) and library.mallopt(_M_TRIM_THRESHOLD, _NEVER)):
        return Tuning(is_done=False, reason="mallopt refused", is_foreign=True)
    return Tuning(is_done=True, reason="mallopt; --tune-malloc=false leaves it")


def _foreign_settings() -> str | None:
    """Return which setting of the environment says something about memory, None where none does."""
    for name in sorted(os.environ):
        if name.startswith("MALLOC_") and os.environ[name]:
            return f"{name} is set"
    if "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", ""):
        return "GLIBC_TUNABLES sets glibc.malloc"
    # Blocks that torch aligns to huge pages leave gaps in a heap: with both, clones of 64 MiB took twice the memory of
    # either, and longer.
    if os.environ.get("THP_MEM_ALLOC_ENABLE") == "1":
        return "THP_MEM_ALLOC_ENABLE is set"
    for path in os.environ.get("LD_PRELOAD", "").replace(":", " ").split():
        if "malloc" in Path(path).name:  # jemalloc, tcmalloc, mimalloc
            return f"LD_PRELOAD names {Path(path).name}"
    return None
