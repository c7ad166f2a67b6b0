"""What a user may say about a training run, and what is known of the data set: the inputs of `presets.resolve`.

Contradictions between flags are found here; whether a flag suits the data set or the preset is found in `presets`.
"""

from dataclasses import dataclass

from imagesets.resolutions import RESOLUTIONS, is_resolution
from training.config import RESUME_CLASSES, ConfigError
from training.config_base import Config

AUGMENT_MODES = ("noaug", "ada", "fixed")
PRECISIONS = ("fp16", "bf16", "fp32")


@dataclass(frozen=True, kw_only=True)
class TrainOptions(Config):
    """The flags of train.py by their names; None = not given.

    A program that offers more ways of saying a thing (--precision=auto, --metrics=none) translates them first.
    """

    cfg: str | None = None
    gpus: int | None = None  # processes; on a machine without a GPU: 1
    cond: bool | None = None
    subset: int | None = None
    mirror: bool | None = None
    gamma: float | None = None
    kimg: int | None = None
    batch: int | None = None
    batch_gpu: int | None = None
    aug: str | None = None
    p: float | None = None
    target: float | None = None
    augpipe: str | None = None
    resume: str | None = None
    resume_classes: str | None = None
    resume_partial: bool | None = None
    freezed: int | None = None
    fp32: bool | None = None
    precision: str | None = None
    nhwc: bool | None = None
    snap: int | None = None
    tick: float | None = None  # thousands of images
    state_minutes: float | None = None
    metrics: tuple[str, ...] | None = None
    seed: int | None = None
    workers: int | None = None
    nobench: bool | None = None
    allow_tf32: bool | None = None

    def label(self, name: str) -> str:
        """Return the flag, since that is what the user wrote."""
        return "--" + name.replace("_", "-")

    def check(self) -> None:
        """Raise ConfigError on a value out of range and on flags that contradict each other."""
        self._check_ranges()
        self._check_augmentation()
        self._check_precision()

    @property
    def resumes(self) -> bool:
        """Tell whether training starts from an existing network."""
        return self.resume not in (None, "noresume")

    def _check_ranges(self) -> None:
        minima = {
            "gpus": 1, "subset": 1, "gamma": 0, "kimg": 1, "batch": 1, "batch_gpu": 1, "freezed": 0, "snap": 1,
            "seed": 0, "workers": 0,
        }  # fmt: skip
        for name, minimum in minima.items():
            if getattr(self, name) is not None:
                self.require_at_least(minimum, name)
        for name in ("tick", "state_minutes"):
            value = getattr(self, name)
            self.require(value is None or value > 0, name, "a number > 0")
        for name in ("p", "target"):
            value = getattr(self, name)
            self.require(value is None or 0 <= value <= 1, name, "a number from 0 to 1")
        for name, choices in (("aug", AUGMENT_MODES), ("precision", PRECISIONS)):
            value = getattr(self, name)
            self.require(value is None or value in choices, name, f"one of {', '.join(choices)}")
        self.require(self.resume != "", "resume", "a network's name, path or URL, or noresume")
        self.require(self.resume_classes in (None, *RESUME_CLASSES), "resume_classes",
                     f"one of {', '.join(RESUME_CLASSES)}")
        for name in ("resume_classes", "resume_partial"):
            value = getattr(self, name)
            if value not in (None, "same", False) and not self.resumes:
                flag = self.label(name)
                raise ConfigError(f"{flag} is {str(value).lower()} without --resume; expected a network to start from: "
                                  f"add it, or leave {flag} out")
        for metric in self.metrics or ():
            if self.metrics.count(metric) > 1:
                times = self.metrics.count(metric)
                raise ConfigError(f"--metrics names {metric} {times} times; expected each metric once")

    def _check_augmentation(self) -> None:
        mode = self.aug or "ada"
        if mode == "fixed" and self.p is None:
            raise ConfigError("--aug is fixed without --p; expected a probability: add --p=0.2, for example")
        if mode != "fixed" and self.p is not None:
            raise ConfigError(f"--p is {self.p:g} with --aug={mode}; expected --aug=fixed: add it, or leave --p out")
        if mode != "ada" and self.target is not None:
            raise ConfigError(
                f"--target is {self.target:g} with --aug={mode}; expected --aug=ada: change it, or leave --target out"
            )
        if mode == "noaug" and self.augpipe is not None:
            raise ConfigError(
                f"--augpipe is {self.augpipe} with --aug=noaug; expected --aug=ada or fixed: "
                "change it, or leave --augpipe out"
            )

    def _check_precision(self) -> None:
        if self.fp32 is not None and self.precision is not None and self.fp32 != (self.precision == "fp32"):
            raise ConfigError(
                f"--precision is {self.precision} with --fp32={str(self.fp32).lower()}; expected the two to agree: "
                "leave --fp32 out"
            )
        if self.nhwc and (self.fp32 or self.precision == "fp32"):
            raise ConfigError(
                "--nhwc is true in float32; expected fp16 or bf16, whose layers it arranges: give "
                "--precision=fp16, the standard on a GPU, or leave --nhwc out"
            )


@dataclass(frozen=True, kw_only=True)
class DatasetFacts(Config):
    """What `resolve` needs to know of a data set."""

    name: str  # begins the run's name
    resolution: int
    channels: int
    num_images: int  # before mirroring
    c_dim: int  # length of a label vector; 0 = the data set has no labels

    @property
    def has_labels(self) -> bool:
        return self.c_dim > 0

    def check(self) -> None:
        """Raise ConfigError where the networks cannot take the images."""
        if not self.name or "/" in self.name or "\\" in self.name:
            raise ConfigError(f"the data set's name is {self.name!r}; expected a name without path separators")
        if not is_resolution(self.resolution):
            raise ConfigError(
                f"data set {self.name} has resolution {self.resolution}; expected {RESOLUTIONS}: "
                "convert it with dataset_tool.py"
            )
        if self.channels not in (1, 3):
            raise ConfigError(
                f"data set {self.name} has {self.channels} channels; expected 1 (grey) or 3 (RGB): "
                "convert it with dataset_tool.py"
            )
        if self.num_images < 1:
            raise ConfigError(f"data set {self.name} has {self.num_images} images; expected at least 1")
        if self.c_dim < 0:
            raise ConfigError(f"data set {self.name} has labels of length {self.c_dim}; expected a length >= 0")
