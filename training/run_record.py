"""Record what a run computes: training_options.json, and the identity that decides what may continue it.

Two commands mean the same run if their identities are equal: the data, the network of --resume and all options except
FREE_OPTIONS.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from dnnlib.cli import UserError
from dnnlib.files import atomic_write, retrying, sha256_of
from dnnlib.typed_config import ConfigError
from torch_utils.device import find_versions
from training.config import TrainConfig
from training.presets import largest_pass

RECORD_NAME = "training_options.json"
RECORD_FORMAT = "stylegan2-ada-run"
RECORD_VERSION = 1
IDENTITY_VERSION = 1

# Options that may change when a run continues, by their dotted names in TrainConfig.to_dict(): they decide how long,
# how often and on which devices to train, not what is computed. The pass size, `step.micro_batch`, does change the
# minibatch standard deviation groups and the images used for path lengths; but a run that ran out of memory must be
# able to continue, so `passes` records it instead. All other options must not depend on what is measured at start-up.
FREE_OPTIONS = frozenset({
    "run_name", "dataset.name",
    "kimg", "kimg_per_tick", "image_snapshot_ticks", "network_snapshot_ticks", "state_minutes", "metrics",
    "gpus", "batch_gpu", "step.micro_batch", "num_workers", "cudnn_benchmark",
    "resume",  # the path of the network; its content is in the identity
    "resume_partial",  # decides whether the run may start; the layers taken follow from the network
    # Of decentralized training; the server's state records which sites took part in the rounds so far.
    "federation.rounds", "federation.sites", "federation.join", "federation.leave", "federation.max_update_norm",
    "federation.on_refused",
    "federation.dp_epsilon",  # what is computed follows from dp_noise
})  # fmt: skip

_FIELDS = ("format", "version", "finished", "config", "identity", "versions", "precision_given", "passes", "classes")
_NEW_FIELDS = ("precision_given", "passes", "classes")  # missing in records of earlier versions
_PRECISION = ("num_fp16_res", "conv_clamp", "half_dtype")  # what --precision sets in both networks


@dataclass(frozen=True, kw_only=True)
class PassSize:
    """The number of images per pass, from some image of a run on."""

    from_nimg: int
    batch_gpu: int


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """The content of training_options.json."""

    config: TrainConfig
    identity: dict[str, Any]  # as `identify` returns it
    versions: dict[str, str] = field(default_factory=lambda: software_versions())  # of the last process that trained
    finished: bool = False  # the run reached config.length; only a larger one continues it
    precision_given: bool = False  # by the user, when the run started; else --precision=auto keeps the recorded one
    passes: tuple[PassSize, ...] = ()  # the pass sizes that were used, which may differ from the requested ones
    classes: tuple[str, ...] | None = None  # names in the order of their numbers, () without; None in earlier records

    def with_pass(self, nimg: int, batch_gpu: int) -> Self:
        """Return the record with this pass size from image `nimg` on; entries from later images are dropped."""
        passes = tuple(size for size in self.passes if size.from_nimg < nimg)
        if not passes or passes[-1].batch_gpu != batch_gpu:
            passes += (PassSize(from_nimg=nimg, batch_gpu=batch_gpu),)
        return replace(self, passes=passes)

    def settle(self, config: TrainConfig, *, precision_given: bool, batch_gpu_given: bool) -> TrainConfig:
        """Return the configuration with which `config` continues this run: settings not given are the run's.

        precision_given, batch_gpu_given:  whether the user gave --precision, --batch-gpu
        """
        if not (precision_given or self.precision_given):
            same = {name: getattr(self.config.generator, name) for name in _PRECISION}
            config = replace(config, generator=replace(config.generator, **same),
                             discriminator=replace(config.discriminator, **same))
        if self.passes and not batch_gpu_given:
            size = largest_pass(config.batch // config.gpus, config.discriminator.mbstd_group_size,
                                self.passes[-1].batch_gpu)
            if size != config.step.micro_batch:
                config = replace(config, batch_gpu=size, step=replace(config.step, micro_batch=size))
        federation = config.federation
        if None not in (federation, self.config.federation):
            federation = replace(federation, rounds=max(federation.rounds, self.config.federation.rounds))
        return replace(config, kimg=max(config.kimg, self.config.kimg), federation=federation)


def identify(config: TrainConfig, content_hash: str) -> dict[str, Any]:
    """Return everything that changes what a run computes, as JSON types: runs of equal identity continue each other.

    content_hash: of the images and labels in use, see ImageDataset.content_hash

    Reads the file config.resume. Raises UserError if that fails.
    """
    try:
        resume = None if config.resume is None else sha256_of(config.resume)
    except OSError as error:
        raise UserError(f"--resume={config.resume} cannot be read ({error.strerror}); expected a network file: "
                        "check the path") from error
    return {"version": IDENTITY_VERSION, "data": content_hash, "resume": resume, "options": comparable_options(config)}


def comparable_options(config: TrainConfig) -> dict[str, Any]:
    """Return the options of a run's identity, by their dotted names.

    Derived from the configuration also for a recorded run, so that records older than an option still compare equal.
    """
    free = FREE_OPTIONS if config.federation is None else {*FREE_OPTIONS, "dataset.max_size"}  # sites may join
    return {name: value for name, value in flatten(config.to_dict()) if name not in free}


def without_precision(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of an identity without those that --precision sets."""
    return {name: value for name, value in options.items() if name.rpartition(".")[2] not in _PRECISION}


def flatten(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested dicts with their dotted names; an empty dict is a leaf."""
    for key, value in data.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def describe_difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Describe briefly how two identities differ."""
    if there["version"] != here["version"]:
        return "it was started by another version of this program"
    found = ["the data differ"] if there["data"] != here["data"] else []
    if there["resume"] != here["resume"]:
        found.append("the network of --resume differs")
    old, new = there["options"], here["options"]
    for name in sorted(old.keys() | new.keys()):
        values = (json.dumps(options[name]) if name in options else "not set" for options in (old, new))
        if old.get(name) != new.get(name) or (name in old) != (name in new):
            found.append("{} is {} there and {} here".format(name, *values))
    return "; ".join(found[:3]) + (f"; and {len(found) - 3} more" if len(found) > 3 else "")


def software_versions() -> dict[str, str]:
    """Return the versions of the libraries that compute."""
    return find_versions("torch", "torchvision", "numpy")


def write_record(folder: str | os.PathLike, record: RunRecord) -> None:
    """Write training_options.json into a run's folder, atomically."""
    content = {"format": RECORD_FORMAT, "version": RECORD_VERSION, "finished": record.finished,
               "config": record.config.to_dict(), "identity": record.identity, "versions": record.versions,
               "precision_given": record.precision_given, "passes": [asdict(size) for size in record.passes],
               "classes": record.classes}
    with atomic_write(os.path.join(folder, RECORD_NAME), text=True) as file:
        file.write(json.dumps(content, indent=2, allow_nan=False) + "\n")


def read_record(folder: str | os.PathLike) -> RunRecord | None:
    """Read training_options.json of a run's folder; None if there is none, or it is another program's.

    Raises ConfigError, one line that names the file, for any content that `write_record` does not write; and
    DiskFailure, so that a run is not overlooked while its record is temporarily unreadable.
    """
    path = os.path.join(folder, RECORD_NAME)
    try:
        content = json.loads(retrying(lambda: Path(path).read_text(encoding="utf-8"), path))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); expected a run's options") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}); expected a run's options") from error
    if not isinstance(content, dict) or content.get("format") != RECORD_FORMAT:
        return None
    if content.get("version") != RECORD_VERSION:
        raise ConfigError(f"{path} has version {content.get('version')!r}; expected {RECORD_VERSION}: "
                          "use the program that wrote it")
    _check_fields(path, content)
    config = TrainConfig.from_dict(content["config"], where=f"{path}: config")
    passes = content.get("passes", [{"from_nimg": 0, "batch_gpu": config.step.micro_batch}])
    classes = content.get("classes")
    return RunRecord(config=config, identity=content["identity"], versions=content["versions"],
                     finished=content["finished"], precision_given=content.get("precision_given", False),
                     passes=tuple(PassSize(**size) for size in passes),
                     classes=None if classes is None else tuple(classes))


def _check_fields(path: str, content: dict[str, Any]) -> None:
    for name in content:
        if name not in _FIELDS:
            raise ConfigError(f"{path}: {name} is not a field of a run's options; expected one of {', '.join(_FIELDS)}")
    for name in _FIELDS:
        if name not in content and name not in _NEW_FIELDS:
            raise ConfigError(f"{path}: {name} is missing; expected the fields {', '.join(_FIELDS)}")
    for name in ("finished", "precision_given"):
        if not isinstance(content.get(name, False), bool):
            raise ConfigError(f"{path}: {name} is {content[name]!r}; expected true or false")
    passes = content.get("passes", [])
    if not isinstance(passes, list) or not all(
            isinstance(size, dict) and set(size) == {"from_nimg", "batch_gpu"}
            and all(type(value) is int for value in size.values()) for size in passes):
        raise ConfigError(f"{path}: passes is {passes!r}; expected a list of from_nimg and batch_gpu")
    classes = content.get("classes")
    if classes is not None and not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
        raise ConfigError(f"{path}: classes is {classes!r}; expected a list of names, or null")
    parts = content["identity"]
    if not isinstance(parts, dict) or set(parts) != {"version", "data", "resume", "options"} \
            or not isinstance(parts["options"], dict):
        raise ConfigError(f"{path}: identity is {parts!r}; expected version, data, resume and options")
    versions = content["versions"]
    if not isinstance(versions, dict) or not all(isinstance(value, str) for value in versions.values()):
        raise ConfigError(f"{path}: versions is {versions!r}; expected names with strings")
