"""Settings of a run that are not mathematics: where it reads and writes, on what, and for how long."""

import re
from dataclasses import dataclass

from training.config_base import Config

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, kw_only=True)
class BestValue(Config):
    """The value of a metric that the best network file is found by."""

    metric: str
    key: str  # of the value among the metric's results
    lower_is_better: bool


@dataclass(frozen=True, kw_only=True)
class RunSettings(Config):
    """What the training loop needs to know beside its TrainConfig."""

    outdir: str  # the folder that holds the folders of runs
    data: str  # path of the data set
    device: str = "cpu"  # cpu, cuda, or one GPU as cuda:1
    precision: str = "auto"  # as asked for; auto leaves it to a run that goes on
    batch_gpu: int | None = None  # as asked for; None leaves it to a run that goes on
    balance: str = "none"  # how often images are seen: see training.balance.image_weights
    valid: str | None = None  # path of a data set that is only looked at, never learned from
    detector: str | None = None  # that metrics look through, in place of the usual ones
    detector_weights: tuple[str, ...] = ()  # files of weights, as FILE or NAME=FILE
    max_hours: float | None = None  # save and stop after that long; None = when kimg is reached
    keep: int | None = None  # of the newest network files; None = all, or one where keep_best is given
    keep_best: BestValue | None = None  # the best network file by it stays too
    name: str | None = None  # of the run, in place of one made from the flags
    tune_malloc: bool = True  # let the allocator of a CPU keep freed memory
    new: bool = False  # start a new run even where one could be continued
    notes: tuple[str, ...] = ()  # choices that were made for the user, one line each, for the run's log

    def asked(self) -> dict[str, bool]:
        """Return what `training.run_folder.choose_run` needs to know of what the user said and left open."""
        return {"new": self.new, "precision_given": self.precision != "auto",
                "batch_gpu_given": self.batch_gpu is not None}

    @property
    def num_newest(self) -> int | None:
        """How many of the newest network files stay; None = all do."""
        return 1 if self.keep is None and self.keep_best is not None else self.keep

    @property
    def keep_flags(self) -> str:
        """What messages call the flags that network files are removed by."""
        best = [] if self.keep_best is None else [f"--keep-best={self.keep_best.key}"]
        return " ".join([*([] if self.keep is None else [f"--keep={self.keep}"]), *best])

    @property
    def same_command(self) -> str:
        """What messages call the command that goes on with the run."""
        return "the same command (without --new)" if self.new else "the same command"

    def label(self, name: str) -> str:
        """Return the flag, since that is what the user wrote."""
        return "--" + name.replace("_", "-")

    def check(self) -> None:
        self.require(bool(self.outdir), "outdir", "a folder")
        self.require(bool(self.data), "data", "a data set")
        self.require(self.max_hours is None or self.max_hours > 0, "max_hours", "a number > 0")
        self.require(self.keep is None or self.keep >= 1, "keep", "a number >= 1")
        self.require(self.name is None or _NAME.fullmatch(self.name) is not None, "name",
                     "letters, digits, '.', '_' and '-', a letter or digit first")
