"""Say what a result was computed from, so that it can be told which results may be compared."""

import json
import math
import platform
import time
import tomllib
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from dnnlib.progress import format_seconds

_PROJECT_FILE = Path(__file__).parent.parent / "pyproject.toml"


def software_versions() -> dict[str, str]:
    """Return the versions of what computes; "unknown" where they are not known."""
    packages = {name: metadata.version(name) for name in ("torch", "numpy")}
    return {"python": platform.python_version(), **packages, "project": _project_version()}


def _project_version() -> str:
    """Read the version from the project's own file, which lies beside the packages: it is run without installing."""
    try:
        return tomllib.loads(_PROJECT_FILE.read_text(encoding="utf-8"))["project"]["version"]
    except (OSError, ValueError, KeyError):
        return "unknown"


def result_record(name: str, found: Mapping[str, Any], *, num_gpus: int, snapshot: str | None,
                  **more: Any) -> dict[str, Any]:
    """Return one result with the fields of the original's lines, and ours behind them.

    found:     what `Evaluator` returned for the metric: results, total_time and further fields
    snapshot:  name of the network file, relative to its run's folder; None when images were measured
    more:      further fields
    """
    seconds = found["total_time"]
    usual = {"results": dict(found["results"]), "metric": name, "total_time": seconds,
             "total_time_str": format_seconds(seconds), "num_gpus": num_gpus, "snapshot_pkl": snapshot,
             "timestamp": time.time()}
    return {**usual, **{key: value for key, value in found.items() if key not in usual}, **more}


def to_json(record: Mapping[str, Any]) -> str:
    """Return a record as one line of strict JSON; results that are not finite become null."""
    results = {key: value if math.isfinite(value) else None for key, value in record["results"].items()}
    return json.dumps({**record, "results": results}, allow_nan=False)
