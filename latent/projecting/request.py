"""What projector.py is asked for: the values of its options, and which of them go together."""

from dataclasses import dataclass

from dnnlib.cli import UserError
from imagesets.pixels.depth import Depth
from latent.projecting.projection import ProjectionSettings
from latent.sharing import check_counts, count_processes
from torch_utils.distributed import Place

_OF_SETS, _OF_TARGETS = ("count", "group_by_class", "gpus"), ("save_video", "pti_steps")
_FOR_NOTHING = {"gpus": 1, "save_video": False, "pti_steps": 0}  # values that ask for nothing


@dataclass(frozen=True, kw_only=True)
class ProjectRequest:
    """Values by the names of `latent.projecting.flags.FLAGS`, None where not given.

    Raises UserError where options contradict each other, one is missing, or a number is out of its range.
    """

    network: str | None
    target: str | None
    data: str | None
    class_: str | None
    label: str | None
    outdir: str | None
    count: int | None
    group_by_class: bool | None
    num_steps: int
    seed: int
    space: str
    pti_steps: int | None
    detector: str | None
    detector_weights: str | None
    save_video: bool | None
    transform: str
    resize_filter: str
    exact: bool
    depth: int | None
    device: str
    gpus: int | None
    batch: int | None
    tune_malloc: bool

    def __post_init__(self) -> None:
        for name, example in (("network", "network-snapshot-001000.safetensors"), ("outdir", "out")):
            if not getattr(self, name):
                raise UserError(f"--{name} is missing; expected one, such as --{name}={example}, or see --help")
        if (self.target is None) == (self.data is None):
            both = "are both given" if self.target is not None else "are missing"
            raise UserError(f"--target and --data {both}; expected one of them: an image, or a set of images")
        others, owner = (_OF_SETS, "--data") if self.data is None else (_OF_TARGETS, "--target")
        for name in others:
            value = getattr(self, name)
            if value is not None and value != _FOR_NOTHING.get(name):
                flag = f"--{name.replace('_', '-')}"
                raise UserError(f"{flag} is given, which belongs to {owner}; leave {flag} out")
        check_counts(batch=self.batch, gpus=self.gpus)
        Depth(bits=self.depth)  # checks
        self._check_pti(self.settings)

    @property
    def settings(self) -> ProjectionSettings:
        return ProjectionSettings(space=self.space.lower(), num_steps=self.num_steps, seed=self.seed)

    def processes(self, place: Place) -> int:
        """Return how many processes do the work. place: this process's. Raises UserError."""
        return count_processes(place, self.gpus, shared=None if self.data is not None else "--data")

    def _check_pti(self, settings: ProjectionSettings) -> None:
        if not self.pti_steps:
            return
        if self.pti_steps < 0:
            raise UserError(f"--pti-steps is {self.pti_steps}; expected a number from 0 on, usually some 350")
        if settings.space != "w":
            raise UserError(f"--pti-steps is given with --space={settings.space}; expected --space=w: pivotal tuning "
                            "starts from a style that all layers share")
