"""Read what ptxas says of kernels: registers, stack and spills."""

import re
from typing import NamedTuple

_ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(\S+)'")
_PROPERTIES = re.compile(r"Function properties for (\S+)")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")


class KernelUse(NamedTuple):
    """What one kernel, or one function that a kernel calls, takes on one architecture."""

    kernel: str  # the name as the linker sees it
    arch: str  # "sm_90"
    registers: int  # a thread's; 0 for a function
    stack: int  # bytes a thread, as the others
    spill_stores: int
    spill_loads: int


def read_ptxas_report(text: str) -> list[KernelUse]:
    """Return what `ptxas -v` printed, in its order."""
    found, arch, name = [], "", ""
    for line in text.splitlines():
        if match := _ENTRY.search(line):
            arch = match[2]
        elif match := _PROPERTIES.search(line):
            name = match[1]
        elif match := _STACK.search(line):
            found.append(KernelUse(name, arch, 0, *map(int, match.groups())))
        elif (match := _REGISTERS.search(line)) and found:
            found[-1] = found[-1]._replace(registers=int(match[1]))
    return found


def ptxas_lines(log: str) -> str:
    """Return the lines of a build's log that ptxas wrote."""
    return "".join(f"{line}\n" for line in log.splitlines() if line.startswith("ptxas ") or _STACK.search(line))


def summarize(uses: list[KernelUse]) -> str:
    """Return for example "42 kernels on 3 architectures, at most 40 registers, no stack, no spills"."""
    kernels, archs = {use.kernel for use in uses if use.registers}, {use.arch for use in uses}
    registers, stack = (max((getattr(use, field) for use in uses), default=0) for field in ("registers", "stack"))
    spilling = {use.kernel for use in uses if use.spill_stores or use.spill_loads}
    return (f"{len(kernels)} kernels on {len(archs)} architectures, at most {registers} registers, "
            f"{f'a stack of up to {stack} bytes' if stack else 'no stack'}, "
            f"{f'spills in {len(spilling)}' if spilling else 'no spills'}")
