"""A training run whose disk fills up: `python -m tests.helpers.full_disk_program FOLDER`, with a small disk at
FOLDER/runs.

The disk is filled during the run and freed again; then the run is killed, and continued. Its files are copied to
FOLDER/ended, and observations are printed as a JSON object.
"""

import json
import os
import shutil
import sys
import time
from pathlib import Path

from tests.helpers.training_runs import RUN_NAME, run, start, wait_for_line
from torch_utils.checkpoint import CheckpointPair

ROOM = 100_000  # bytes that stay free: enough to begin the file of a state


def fill(path: Path) -> None:
    """Fill the disk almost completely, also while the run writes to it."""
    with open(path, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 16))
        except OSError:
            os.truncate(path, max(path.stat().st_size - ROOM, 0))


def newest(folder: Path) -> dict:
    """Return the images seen at the newest state, and the message on a damaged one."""
    saved, message = CheckpointPair(folder).load()
    return {"nimg": saved["training"]["nimg"], "message": message}


def main() -> None:
    folder = Path(sys.argv[1])
    run_folder, filler = folder / "runs" / RUN_NAME, folder / "runs" / "filler"
    process = start(folder)
    wait_for_line(process, "tick 1 ")
    fill(filler)
    warning = wait_for_line(process, "warning: failed to save a resumable state ")
    found = {"warning": warning, "full": newest(run_folder)}
    wait_for_line(process, "tick 3 ")
    found["still full"] = newest(run_folder)
    filler.unlink()
    wait_for_line(process, "tick 4 ")
    while newest(run_folder)["nimg"] == found["full"]["nimg"]:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.kill()
    process.communicate()
    found["freed"] = newest(run_folder)
    done = run(folder)
    found |= {"code": done.returncode, "errors": done.stderr, "output": done.stdout}
    shutil.copytree(run_folder, folder / "ended")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
