"""Turn seeds and labels into styles, and styles into pixels: a seed gives the same image in every program.

Seeds are lists such as 0,1,5-9; styles come from seeds, or from a file that projector.py saved.
"""

import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from dnnlib.cli import UserError
from dnnlib.files import atomic_write, retrying
from torch_utils.images import to_pixels
from torch_utils.seeding import generator_for, seed_for
from training.generator import truncate

GLOBAL_CENTER, CLASS_CENTER = "global", "class"
TRUNC_CENTERS = (GLOBAL_CENTER, CLASS_CENTER)
MEAN_LATENTS = 10_000  # that the mean style of a class is computed from, as in the original's projector

LARGEST_SEED = 2**32 - 1  # the largest that numpy's RandomState takes
MOST_SEEDS = 1_000_000

_RANGE = re.compile(r"([0-9]{1,18})(?:-([0-9]{1,18}))?")
_MEAN_SEED, _MEAN_BATCH = 123, 1000
_GPU_PIXELS, _GPU_BATCH = 1 << 21, 64  # per batch: 32 images of 256x256, at most 64 smaller ones


@dataclass(frozen=True, kw_only=True)
class SynthesisSettings:
    """How images are made from latents and labels."""

    truncation: float = 1.0  # psi: 1 keeps the variety, 0 gives the mean image
    center: str = GLOBAL_CENTER  # of truncation: the mean style of all classes, or of each image's own
    noise_mode: str = "const"
    fp32: bool = False  # compute half precision blocks in float32

    def require_support(self, G: nn.Module) -> None:
        """Raise UserError if a network cannot make images with these settings."""
        if self.center == CLASS_CENTER:
            if G.c_dim == 0:
                raise UserError("--trunc-center is class, but this network was trained without classes; expected "
                                "global: leave --trunc-center out")
        elif self.truncation != 1 and G.mapping.w_avg_beta is None:
            raise UserError(f"--trunc is {self.truncation:g}, but this network has no mean style to truncate towards; "
                            "leave --trunc out")


class ImageGenerator:
    """Makes images with a network, deterministically: equal arguments give equal images.

    G:          the averaged generator (G_ema), in eval mode, on the device to use
    batch:      batch size
    fp32_flag:  the program's option for `SynthesisSettings.fp32`, for messages; None if it has none

    Batch size and number of threads change only the order of sums: in float32, about one pixel value in 10,000
    changes by 1.
    """

    def __init__(self, G: nn.Module, settings: SynthesisSettings, *, batch: int, fp32_flag: str | None = None):
        self.G, self.settings, self.batch, self.fp32_flag = G, settings, batch, fp32_flag
        self.device = next(G.parameters()).device
        # Half precision is what makes a GPU fast; most CPUs are slower with it.
        self.fp32 = settings.fp32 or self.device.type == "cpu"
        self._centers: dict[tuple[float, ...], Tensor] = {}  # label -> mean style [K]

    def generate(self, seeds: Sequence[int], labels: Tensor,
                 on_images: Callable[[int], None] = lambda count: None) -> Iterator[Tensor]:
        """Yield the images of seeds in batches, uint8 [n, C, R, R] on the CPU.

        labels:     float32 [N, c_dim], one row per seed
        on_images:  called after each batch with its number of images
        """
        for start in range(0, len(seeds), self.batch):
            some = seeds[start:start + self.batch]
            pixels = self.render(self.map_seeds(some, labels[start:start + self.batch]), some)
            on_images(len(pixels))
            yield pixels

    def render_all(self, ws: Tensor, on_images: Callable[[int], None] = lambda count: None) -> Iterator[Tensor]:
        """Yield the images of styles [N, L, K] in batches, uint8 [n, C, R, R] on the CPU. on_images: see `generate`"""
        for start in range(0, len(ws), self.batch):
            some = ws[start:start + self.batch]
            yield self.render(some, range(start, start + len(some)))
            on_images(len(some))

    def map_seeds(self, seeds: Sequence[int], labels: Tensor) -> Tensor:
        """Return truncated styles: float32 [N, L, K] on the device. labels: float32 [N, c_dim]"""
        return self.map_latents(latents_of(seeds, self.G.z_dim), labels)

    @torch.no_grad()
    def map_latents(self, z: Tensor, labels: Tensor, centers: Tensor | None = None) -> Tensor:
        """Return truncated styles: float32 [N, L, K] on the device.

        z:        [N, Z]
        labels:   float32 [N, c_dim]
        centers:  [N, K], what truncation pulls towards if its center is the class's; None = see `centers_of`
        """
        z, psi = z.to(self.device), self.settings.truncation
        if not self.pulls_to_class:
            return self.G.mapping(z, labels.to(self.device), truncation_psi=psi)
        centers = self.centers_of(labels) if centers is None else centers.to(self.device)
        return truncate(self.G.mapping(z, labels.to(self.device)), centers[:, None], psi)

    @property
    def pulls_to_class(self) -> bool:
        """Whether styles are truncated towards the mean style of their own class or label."""
        return self.settings.center == CLASS_CENTER and self.settings.truncation != 1

    def centers_of(self, labels: Tensor) -> Tensor:
        """Return the mean style of each label: [N, K] float32 on the device. labels: float32 [N, c_dim]"""
        return torch.stack([self._center(label) for label in labels])

    @torch.no_grad()
    def render(self, ws: Tensor, noise_seeds: Sequence[int], maps: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the images of styles in one pass: uint8 [N, C, R, R] on the CPU.

        ws:           [N, L, K]
        noise_seeds:  the seed of each image's noise in noise mode "random"
        maps:         noise maps [N, 1, r, r] that replace the network's own, by their names in G.synthesis

        Raises UserError if the images are not finite.
        """
        if self.settings.noise_mode != "random":
            return to_pixels(self._synthesize(ws, maps=maps)).cpu()
        # LIMIT: one image at a time, since a batch draws the noise of all its images from one random stream.
        streams = (generator_for(seed_for(seed, 0, 0, "generate/noise"), self.device) for seed in noise_seeds)
        return torch.cat([to_pixels(self._synthesize(w, generator=stream)).cpu()
                          for w, stream in zip(ws.split(1), streams, strict=True)])

    def _center(self, label: Tensor) -> Tensor:
        """Return the mean style of a label, [K] float32 on the device; each is computed only once."""
        key = tuple(label.tolist())
        if key not in self._centers:
            self._centers[key] = styles_of_label(self.G, label).mean(dim=0).float().to(self.device)
        return self._centers[key]

    def _synthesize(self, ws: Tensor, generator: torch.Generator | None = None,
                    maps: Mapping[str, Tensor] | None = None) -> Tensor:
        options = dict(noise_mode=self.settings.noise_mode, force_fp32=self.fp32, generator=generator)
        images = functional_call(self.G.synthesis, dict(maps or {}), (ws.to(self.device),), options)
        if not images.isfinite().all():  # converting to pixels would hide this
            other = "" if self.fp32 or self.fp32_flag is None else f", or {self.fp32_flag}"
            raise UserError("the network of --network makes images that are not finite, perhaps because its training "
                            f"diverged; expected a network that works: try an earlier snapshot{other}")
        return images


def choose_batch(resolution: int, device: torch.device | str) -> int:
    """Return the batch size: on a GPU what fits into a few GB for the usual networks, on a CPU 1.

    Larger batches would be faster on a CPU too, but with 1 an image is the same, bit for bit, in a file, on a sheet and
    in a data set.
    """
    return 1 if torch.device(device).type == "cpu" else min(max(_GPU_PIXELS // resolution**2, 1), _GPU_BATCH)


def latents_of(seeds: Sequence[int], z_dim: int) -> Tensor:
    """Return the latents of seeds, drawn as in the original: float64 [N, Z]."""
    return torch.from_numpy(np.concatenate([np.random.RandomState(seed).randn(1, z_dim) for seed in seeds]))


@torch.no_grad()
def styles_of_label(G: nn.Module, label: Tensor) -> Tensor:
    """Return the untruncated styles of 10,000 latents, the same for each label: float64 [10000, K] on the CPU.

    label:  [c_dim]; c_dim may be 0
    """
    z = torch.from_numpy(np.random.RandomState(_MEAN_SEED).randn(MEAN_LATENTS, G.z_dim))
    device = next(G.parameters()).device
    labels = label.to(device).expand(_MEAN_BATCH, -1)
    return torch.cat([G.mapping(some.to(device), labels, skip_w_avg_update=True)[:, 0].double().cpu()
                      for some in z.split(_MEAN_BATCH)])


def parse_ranges(flag: str, text: str, *, largest: int, what: str) -> list[range]:
    """Return the ranges of a list such as "0,1,5-9", in its order.

    flag:     the name of the option, for messages
    largest:  the largest number allowed
    what:     what the numbers stand for, in the singular, for messages

    Raises UserError for anything else.
    """
    found = []
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        if match is None:
            raise UserError(f"{flag} has {part.strip()!r}; expected numbers and ranges, such as 0,1,5-9")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise UserError(f"{flag} has the range {first}-{last}, which runs backwards; expected {last}-{first}")
        if last > largest:
            raise UserError(f"{flag} has {last}; the largest {what} is {largest}")
        found.append(range(first, last + 1))
    return found


def parse_seeds(flag: str, text: str) -> list[int]:
    """Return the seeds of a list such as "0,1,5-9", in its order. Raises UserError."""
    ranges = parse_ranges(flag, text, largest=LARGEST_SEED, what="seed")
    if (count := sum(map(len, ranges))) > MOST_SEEDS:
        raise UserError(f"{flag} names {count} seeds; expected at most {MOST_SEEDS}: for more images use "
                        "generate.py --zip and --count")
    return [seed for some in ranges for seed in some]


def parse_first_seed(flag: str, text: str) -> int:
    """Return the seed of the first image of a labeled data set. Raises UserError."""
    ranges = parse_ranges(flag, text, largest=LARGEST_SEED, what="seed")
    if len(ranges) != 1 or len(ranges[0]) != 1:
        raise UserError(f"{flag} is {text}; expected only the first seed with --zip, such as --seeds=0: --count sets "
                        "the number of images")
    return ranges[0][0]


def save_projected_w(path: str | os.PathLike, ws: np.ndarray, **columns: np.ndarray) -> None:
    """Write styles for `read_projected_w`, with further arrays about each row. Raises OSError.

    ws:       float32 [M, L, K]
    columns:  arrays of length M, by name
    """
    with atomic_write(path) as file:
        np.savez(file, w=ws, **columns)


def read_projected_w(path: str | os.PathLike, G: nn.Module, option: str = "--projected-w") -> Tensor:
    """Return the styles of a file: float32 [M, L, K], from the array "w" of an npz file. option: that names it

    Raises UserError if the file is missing, is not an npz file, or has styles of another network.
    """
    flag = f"{option}={path}"
    expected = f"expected an .npz file with an array w of shape [M, {G.num_ws}, {G.w_dim}], as projector.py writes it"
    w = read_npz(path, ["w"], flag=flag, expected=expected)["w"]
    if w.ndim != 3 or w.shape[1:] != (G.num_ws, G.w_dim) or not len(w):
        raise UserError(f"{flag} has w of shape {list(w.shape)}; expected [M, {G.num_ws}, {G.w_dim}] for this network")
    if w.dtype.kind not in "fiu" or not np.isfinite(w).all():
        raise UserError(f"{flag} has w of type {w.dtype} and values that are not finite numbers; expected finite "
                        "numbers")
    return torch.from_numpy(w.astype(np.float32))


def read_npz(path: str | os.PathLike, names: Sequence[str], *, flag: str, expected: str,
             optional: Sequence[str] | None = ()) -> dict[str, np.ndarray]:
    """Return arrays of an npz file by name.

    names:     that the file must have
    optional:  that are also returned where the file has them; None = all
    flag:      the option with its value, for messages
    expected:  "expected an .npz file with ..., as ... writes it", for messages

    Raises UserError if the file is missing, is not an npz file, or lacks an array.
    """
    try:
        return retrying(lambda: _read_npz(path, names, flag, expected, optional), path)
    except FileNotFoundError as error:
        raise UserError(f"{flag} does not exist; {expected}") from error
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{flag} cannot be read ({error.strerror or error}); {expected}") from error
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError) as error:
        raise UserError(f"{flag} cannot be read as an npz file ({error}); {expected}") from error


def _read_npz(path: str | os.PathLike, names: Sequence[str], flag: str, expected: str,
              optional: Sequence[str] | None) -> dict[str, np.ndarray]:
    with open(path, "rb") as file:
        start = file.read(len(np.lib.format.MAGIC_PREFIX))
    if start and not start.startswith((b"PK", np.lib.format.MAGIC_PREFIX)):  # numpy's error would suggest unpickling it
        raise UserError(f"{flag} is not an npz file; {expected}")
    arrays = np.load(path, allow_pickle=False)
    if not isinstance(arrays, np.lib.npyio.NpzFile):
        raise UserError(f"{flag} is a single array; {expected}")
    with arrays:
        for name in names:
            if name not in arrays.files:
                found = ", ".join(arrays.files[:5]) or "nothing"
                raise UserError(f"{flag} does not have an array {name} (it has {found}); {expected}")
        others = arrays.files if optional is None else [name for name in optional if name in arrays.files]
        return {name: arrays[name] for name in dict.fromkeys([*names, *others])}
