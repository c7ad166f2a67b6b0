"""Kill a training process a hundred times, and compare its files with those of an uninterrupted run.

    python -m tests.end_to_end.soak [--kills N] [--seed N]

Each kill is a SIGKILL at a random moment, every second one while a file is being written; the same command then
continues. A finished run is compared bit for bit, and the next one starts. The exit code is 1 on a difference.
"""

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

from tests.helpers.training_runs import OFTEN, RUN_NAME, differences, kill_run, make_phantoms, run


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="how many (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments (default: 0)")
    parser.add_argument("--seconds", type=float, default=5, help="at most from start to kill (default: 5)")
    return parser.parse_args()


def unbroken_run(folder: Path) -> Path:
    """Make an uninterrupted run, and return its folder."""
    folder.mkdir()
    make_phantoms(folder / "phantom.zip")
    finish(folder)
    return folder / "runs" / RUN_NAME


def finish(folder: Path) -> None:
    """Let the run in a folder finish."""
    done = run(folder, OFTEN)
    if done.returncode != 0:
        sys.exit(f"the run ended with code {done.returncode}: {done.stderr}")


def broken_run(folder: Path, kills: int, moments: random.Random, seconds: float) -> list[bool]:
    """Make a run that is killed up to `kills` times; return for each kill whether it left a half-written file."""
    folder.mkdir()
    make_phantoms(folder / "phantom.zip")
    left = []
    while len(left) < kills:
        in_a_write = len(left) % 2 == 1
        after = moments.uniform(0, seconds)
        found = kill_run(folder, after, in_a_write=in_a_write)
        if found is None:
            return left
        left.append(found)
        print(f"  kill {len(left)}: {after:.2f} s after its start{', in a write' if found else ''}", flush=True)
    finish(folder)
    return left


def soak(folder: Path, options: argparse.Namespace) -> bool:
    """Return whether all runs ended like an uninterrupted one."""
    moments, kills, halves, broken, started = random.Random(options.seed), 0, 0, [], time.monotonic()
    print("an uninterrupted run", flush=True)
    expected = unbroken_run(folder / "unbroken")
    number = 0
    while kills < options.kills:
        number += 1
        print(f"run {number}", flush=True)
        left = broken_run(folder / f"run{number}", options.kills - kills, moments, options.seconds)
        kills, halves = kills + len(left), halves + sum(left)
        found = differences(expected, folder / f"run{number}" / "runs" / RUN_NAME)
        broken += [number] if found else []
        print(f"run {number}, killed {len(left)} times: {'differs in ' + ', '.join(found) if found else 'equal'}; "
              f"{kills} of {options.kills} kills, {time.monotonic() - started:.0f} s", flush=True)
    print(f"{kills} kills, {halves} of them in a write, in {number} runs: "
          f"{f'{len(broken)} differ' if broken else 'all end bit for bit like an uninterrupted one'}")
    return not broken


def main() -> int:
    options = parse()
    with tempfile.TemporaryDirectory() as folder:
        return 0 if soak(Path(folder), options) else 1


if __name__ == "__main__":
    sys.exit(main())
