"""What generate.py is asked for: the values of its options, and which of them go together."""

from dataclasses import dataclass, fields
from enum import Enum

from dnnlib.cli import UserError
from latent.sampling import CLASS_CENTER, GLOBAL_CENTER, Look
from latent.sharing import check_counts, count_processes
from torch_utils.distributed import Place


class Job(Enum):
    """What generate.py can do; the value is the option that asks for it."""

    IMAGES = "--seeds"
    PROJECTED = "--projected-w"
    SET = "--zip"
    MIX = "--style-mix"


_EVERYWHERE = {"network", "noise_mode", "device", "batch", "fp32", "tune_malloc"}
_FLAGS = {
    Job.IMAGES: {"seeds", "class_", "label", "trunc", "trunc_center", "outdir", "grid"},
    Job.PROJECTED: {"projected_w", "outdir", "grid"},
    Job.SET: {"zip", "count", "classes", "labels_from", "seeds", "trunc", "trunc_center", "gpus"},
    Job.MIX: {"style_mix", "rows", "cols", "styles", "class_", "label", "trunc", "trunc_center", "outdir"},
}
# Options that one job alone has.
_OWNERS = {"count": Job.SET, "classes": Job.SET, "labels_from": Job.SET, "gpus": Job.SET, "rows": Job.MIX,
           "cols": Job.MIX, "styles": Job.MIX}
_HINTS = {"class_": " (--classes says how many images each class has)",
          "label": " (--labels-from draws labels from a data set)"}  # with --zip

_LARGEST_TRUNC = 1000  # far beyond where images are any; much larger ones pass what float32 holds


@dataclass(frozen=True, kw_only=True)
class Request:
    """Values by the names of `latent.flags.FLAGS`, None where not given.

    Raises UserError where options contradict each other, one is missing, or a number is out of its range.
    """

    network: str | None
    seeds: str | None
    class_: str | None
    label: str | None
    trunc: float | None
    trunc_center: str | None
    noise_mode: str | None
    projected_w: str | None
    outdir: str | None
    grid: str | None
    zip: str | None
    count: int | None
    classes: str | None
    labels_from: str | None
    style_mix: bool | None
    rows: str | None
    cols: str | None
    styles: str | None
    device: str
    gpus: int | None
    batch: int | None
    fp32: bool | None
    tune_malloc: bool

    def __post_init__(self) -> None:
        if not self.network:
            raise UserError("--network is missing; expected a network file, such as "
                            "--network=run/network-snapshot-001000.safetensors, or see --help")
        self._check_together()
        self._check_complete()
        if self.trunc is not None and not abs(self.trunc) <= _LARGEST_TRUNC:  # so that nan is none
            raise UserError(f"--trunc is {self.trunc:g}; expected a number, usually from 0 to 1, at most "
                            f"{_LARGEST_TRUNC}")
        if self.trunc_center == CLASS_CENTER and self.trunc is None:
            raise UserError("--trunc-center is class, but without --trunc nothing is truncated; add one, such as "
                            "--trunc=0.7, or leave --trunc-center out")
        if None not in (self.classes, self.labels_from):
            raise UserError("--classes and --labels-from are both given; expected one of them")
        check_counts(batch=self.batch, gpus=self.gpus)

    @property
    def job(self) -> Job:
        if self.style_mix:
            return Job.MIX
        if self.zip is not None:
            return Job.SET
        return Job.IMAGES if self.projected_w is None else Job.PROJECTED

    @property
    def look(self) -> Look:
        return Look(truncation=1.0 if self.trunc is None else self.trunc, center=self.trunc_center or GLOBAL_CENTER,
                    noise_mode=self.noise_mode or "const", fp32=bool(self.fp32))

    def processes(self, place: Place) -> int:
        """Return how many processes do the work. place: this process's. Raises UserError."""
        return count_processes(place, self.gpus, shared=None if self.job is Job.SET else Job.SET.value)

    def _check_together(self) -> None:
        job = self.job
        for field in fields(self):
            name = field.name
            if getattr(self, name) is None or name in _EVERYWHERE | _FLAGS[job] or (name, self.gpus) == ("gpus", 1):
                continue
            flag = f"--{name.rstrip('_').replace('_', '-')}"
            if name in _OWNERS:
                raise UserError(f"{flag} is given, which belongs to {_OWNERS[name].value}; add that, or leave {flag} "
                                "out")
            hint = _HINTS.get(name, "") if job is Job.SET else ""
            raise UserError(f"{flag} is given with {job.value}; expected one of them{hint}")

    def _check_complete(self) -> None:
        job = self.job
        if job is Job.IMAGES and self.seeds is None:
            raise UserError("--seeds is missing; expected what to make: --seeds=0-9, --projected-w=FILE, --zip=FILE or "
                            "--style-mix, see --help")
        if job is Job.MIX and None in (self.rows, self.cols):
            missing = "rows" if self.rows is None else "cols"
            raise UserError(f"--{missing} is missing; expected seeds for --style-mix, such as --rows=85,100 "
                            "--cols=55,821")
        if job is not Job.SET and not self.outdir and (job is Job.MIX or not self.grid):
            other = "" if job is Job.MIX else ", or --grid=FILE for a sheet alone"
            raise UserError(f"--outdir is missing; expected a folder for the images{other}")
