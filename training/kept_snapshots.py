"""Choose which network files of a run stay: --keep and --keep-best."""

import math
from collections.abc import Collection, Mapping
from pathlib import Path

from dnnlib.files import sha256_of
from training.config import ConfigError
from training.file_kind import run_snapshots
from training.run_record import read_record
from training.run_settings import RunSettings


def snapshots_to_remove(newest: Path, settings: RunSettings, values: Mapping[str, float | None],
                        needed: Collection[Path]) -> list[Path]:
    """Return the network files of a run that do not stay, the oldest first.

    newest:  that of the images seen so far; later ones are of a process that was killed, and written anew
    values:  of --keep-best by the name of the file
    needed:  files that stay in any case

    What stays follows from files and values alone, so that a run that was stopped ends with the files of another one.
    """
    if settings.num_newest is None:
        return []
    found = [path for path in map(Path, run_snapshots(newest.parent)) if path.suffix == newest.suffix]
    found = found[:found.index(newest) + 1] if newest in found else []
    stay = {*found[-settings.num_newest:], *needed}
    if settings.keep_best is not None:
        # One that was not measured could be the best.
        stay.update(path for path in found if path.name not in values)
        stay.update(_best(found, values, lower_is_better=settings.keep_best.lower_is_better))
    others = [path for path in found if path not in stay]
    begun_from = _hashes_of_resume(newest.parent.parent) if others else set()
    return [path for path in others if not begun_from or sha256_of(path) not in begun_from]


def _best(found: list[Path], values: Mapping[str, float | None], *, lower_is_better: bool) -> list[Path]:
    """Return the file of the best value, the newer one of equals; none where no value is finite."""
    sign = -1 if lower_is_better else 1
    finite = [(sign * values[path.name], index) for index, path in enumerate(found)
              if values.get(path.name) is not None and math.isfinite(values[path.name])]
    return [found[max(finite)[1]]] if finite else []


def _hashes_of_resume(outdir: Path) -> set[str]:
    """Return the SHA-256 of the network files that runs in a folder began from: their commands name them.

    Not their paths, which may be relative to another working directory.
    """
    found = set()
    for path in outdir.iterdir():
        try:
            record = read_record(path)
        except ConfigError:
            continue
        if record is not None and record.identity["resume"] is not None:
            found.add(record.identity["resume"])
    return found
