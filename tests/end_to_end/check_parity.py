"""Replay a complete folder of reference vectors and print one line per file with its worst error.

    python tests/end_to_end/check_parity.py FOLDER
"""

import sys
import time
import zipfile
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.helpers.parity_checks import CHECKS, Measurement
from torch_utils.ops.compiled import make_ready


def badness(measurement: Measurement) -> float:
    """Return the error in units of what is allowed; infinite for NaN, and for any error where none is allowed."""
    error, tolerance = measurement.error, measurement.tolerance
    if not tolerance or error != error:
        return 0.0 if error == 0 else float("inf")
    return error / tolerance


def main() -> int:
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        print("usage: python tests/end_to_end/check_parity.py FOLDER\nexpected the folder with the reference vectors",
              file=sys.stderr)
        return 2
    folder = Path(sys.argv[1])
    make_ready("cpu")
    failed = 0
    for file, checks in CHECKS.items():
        for label, check in checks.items():
            title = f"{file} ({label})" if label else file
            if not (folder / file).exists():
                print(f"{title:38} MISSING")
                failed += 1
                continue
            started = time.perf_counter()
            try:
                measurements = list(check(folder))
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
                reason = " ".join(str(error).split())
                print(f"{title:38} UNREADABLE, or of another version: {type(error).__name__}: {reason}", flush=True)
                failed += 1
                continue
            worst = max(measurements, key=badness)
            ok = bool(measurements) and badness(worst) <= 1
            failed += not ok
            print(f"{title:38} {'ok' if ok else 'FAILED':6} {len(measurements):5} numbers, worst {worst.error:.1e} of "
                  f"{worst.tolerance:.0e} allowed: {worst.name} ({time.perf_counter() - started:.1f} s)", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
