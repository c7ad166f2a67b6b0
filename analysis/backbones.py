"""Backbones of classifiers: torchvision's classification networks, or EfficientNet-lite0, without their last layer.

A backbone turns images into features, which its own classification layer would take. Weights come from torchvision's
cache, a Python package, a download, or a file of the user's; reading a file never runs code.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad

from dnnlib.cache import FetchError, fetch
from dnnlib.cli import UserError
from dnnlib.files import sha256_of
from dnnlib.text import suggestion
from metrics.detectors.base import EFFICIENTNET_LITE0, Detector, WeightsFile, check_tensors, read_file
from metrics.detectors.registry import find_packaged, require_packages

DEFAULT_MODEL, OFFLINE_MODEL = "efficientnet_b2", EFFICIENTNET_LITE0.name.rpartition("-")[0]
AUTO, RANDOM = "auto", "none"  # values of --weights beside a file

# On a CPU, as many images at a time as have these pixels: their activations fit into its caches, which makes
# EfficientNet-B2 twice as fast as with 32 images.
_CPU_PIXELS, _LEAST_CPU_IMAGES = 4 * 224**2, 4
_LITE0_SIZE, _LITE0_MEAN, _LITE0_STD = 224, 127 / 255, 128 / 255  # as in metrics.detectors.efficientnet_lite0
_FIXED_SIZE = ("vit_", "maxvit_")  # these networks take images of one size only
_AUXILIARY = ("AuxLogits.", "aux1.", "aux2.")  # classifiers on earlier layers, which only their own training uses
_DIGEST = re.compile(r"-([0-9a-f]{8,})\.pth$")  # torchvision's file names end with the first digits of their sha256
# Names of tensors in files of old versions -> names now.
_RENAMED = ((re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12])\."), r"\1\2."),
            (re.compile(r"\.mlp\.linear_1\."), ".mlp.0."), (re.compile(r"\.mlp\.linear_2\."), ".mlp.3."))


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """What happens to pixels before a network.

    resize:         (shorter side,), or (height, width), in pixels
    crop:           side of the square in the center that is kept; None keeps all
    interpolation:  "bilinear" or "bicubic", antialiased
    mean, std:      of the three channels, for pixels scaled to [0, 1]
    """

    resize: tuple[int, ...]
    crop: int | None
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def as_record(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        """Raises KeyError, TypeError or ValueError for anything but what `as_record` returns."""
        resize, crop, interpolation = tuple(map(int, record["resize"])), record["crop"], record["interpolation"]
        mean, std = (tuple(map(float, record[name])) for name in ("mean", "std"))
        if (len(resize) not in (1, 2) or min(resize) < 1 or len(mean) != 3 or len(std) != 3 or min(std) <= 0
                or interpolation not in ("bilinear", "bicubic")):
            raise ValueError("the preprocessing is out of range")
        return cls(resize=resize, crop=None if crop is None else int(crop), interpolation=interpolation, mean=mean,
                   std=std)

    def describe(self) -> str:
        """Return one line for results and keys of caches."""
        sides = f"{self.resize[0]}x{self.resize[1]}" if len(self.resize) == 2 else f"shorter side {self.resize[0]}"
        crop = "" if self.crop is None else f", center crop {self.crop}x{self.crop}"
        return (f"resized to {sides} ({self.interpolation}, antialiased){crop}, x / 255, "
                f"(x - {list(self.mean)}) / {list(self.std)}")

    def resize_and_crop(self, pixels: Tensor) -> Tensor:
        """Return images as large as the network takes them, float32 [N, 3, H', W'] in [0, 255].

        pixels: uint8 [N, 3, H, W]
        """
        height, width = self._resized(*pixels.shape[2:])
        images = pixels.float().contiguous()  # rows of one channel: the fastest for convolutions on a CPU
        if pixels.shape[2:] != (height, width):
            images = interpolate(images, size=(height, width), mode=self.interpolation, antialias=True)
        images = images.clamp(0, 255)  # bicubic interpolation overshoots
        left, right, top, bottom = self._margins(height, width)
        return pad(images, [-left, -right, -top, -bottom])

    def normalize(self, images: Tensor) -> Tensor:
        """Scale images [N, 3, H, W] in [0, 255] as the network takes them."""
        mean, std = (255 * images.new_tensor(values).reshape(3, 1, 1) for values in (self.mean, self.std))
        return (images - mean) / std

    def place(self, maps: Tensor, height: int, width: int) -> Tensor:
        """Return maps of what the network saw, at their place in the whole images: [N, H, W], 0 where it saw nothing.

        maps:           [N, h, w]
        height, width:  of the images before `resize_and_crop`
        """
        resized = self._resized(height, width)
        left, right, top, bottom = self._margins(*resized)
        seen = (resized[0] - top - bottom, resized[1] - left - right)
        maps = interpolate(maps[:, None], size=seen, mode="bilinear")
        return interpolate(pad(maps, [left, right, top, bottom]), size=(height, width), mode="bilinear")[:, 0]

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if len(self.resize) == 2:
            return self.resize
        side, shorter = self.resize[0], min(height, width)  # as in torchvision, fractions are cut off
        return side * height // shorter, side * width // shorter

    def _margins(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Return how many columns and rows are cut off: left, right, top, bottom; below 0 where some are added."""
        if self.crop is None:
            return 0, 0, 0, 0
        left, top = round((width - self.crop) / 2), round((height - self.crop) / 2)
        return left, width - self.crop - left, top, height - self.crop - top


class Backbone(nn.Module):
    """A network without its classification layer.

    name:            as for `open_backbone`
    network:         normalized images float32 [N, 3, H, W] -> features float32 [N, F]
    weights_sha256:  of the file of weights; None for random ones
    note:            a line for the user if the file is not that of the usual weights
    """

    def __init__(self, name: str, network: nn.Module, *, num_features: int, preprocessing: Preprocessing,
                 weights_sha256: str | None, note: str | None = None):
        super().__init__()
        self.note = note
        self.name, self.network, self.num_features = name, network, num_features
        self.preprocessing, self.weights_sha256 = preprocessing, weights_sha256

    def forward(self, pixels: Tensor) -> Tensor:
        """Return features, float32 [N, F]. pixels: uint8 [N, 3, H, W]"""
        if self.training or pixels.device.type != "cpu":
            return self.features(self.preprocessing.resize_and_crop(pixels))
        side = self.preprocessing.crop or self.preprocessing.resize[0]
        parts = pixels.split(max(_CPU_PIXELS // side**2, _LEAST_CPU_IMAGES))
        return torch.cat([self.features(self.preprocessing.resize_and_crop(part)) for part in parts])

    def features(self, images: Tensor) -> Tensor:
        """Return features, float32 [N, F], of what `Preprocessing.resize_and_crop` returns."""
        return self.network(self.preprocessing.normalize(images))

    def detector(self) -> Detector:
        """Return this network, put into eval mode, as a detector for metrics.features.compute_features."""
        return _BackboneDetector(self)


class _BackboneDetector(Detector):
    def __init__(self, backbone: Backbone):
        super().__init__()
        self.backbone, self.name, self.num_features = backbone, backbone.name, backbone.num_features
        # Features for classifiers are computed in another way than those of metrics: cached ones are told apart.
        self.preprocessing = f"{backbone.preprocessing.describe()}; of a classifier"
        self.weights_sha256 = backbone.weights_sha256 or hash_tensors(backbone.network.state_dict())
        self.eval()

    def _features(self, pixels: Tensor) -> Tensor:
        return self.backbone(pixels).float()


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return a sha256 of tensors, with their names, types and shapes, in any order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}/{value.dtype}/{list(value.shape)}/".encode())
        digest.update(value.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def open_backbone(name: str, *, weights: str = AUTO, size: int | None = None, seed: int = 0) -> Backbone:
    """Return a backbone on the CPU, in eval mode.

    name:     of a classification network of torchvision, or OFFLINE_MODEL
    weights:  AUTO: ImageNet's, from torchvision's cache, a package or a download; RANDOM; or a file with the tensors of
              the network, written by torch.save or safetensors, whose classification layer is ignored
    size:     side in pixels to which images are resized, without a crop; None = resize and crop as torchvision does
              with its weights
    seed:     of random weights

    Raises UserError if the name is unknown, the size does not fit the network, a package is missing, or the weights
    cannot be obtained, are damaged or belong to another network.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        network, file, preprocessing = _lite0(weights) if name == OFFLINE_MODEL else _torchvision(name, size)
    path = None if weights == RANDOM else _find(file, weights)
    place, num_features = _remove_classifier(network)
    if path is not None:
        _load(network, path, file, (f"{place}.", *_AUXILIARY))
    if size is not None:
        if size < 1:
            raise UserError(f"--size is {size}; expected at least 1")
        preprocessing = _stretched(size, preprocessing.interpolation, preprocessing.mean, preprocessing.std)
    digest = None if path is None else sha256_of(path)
    note = None
    if digest is not None and not digest.startswith(file.sha256):
        note = (f"--weights={weights}: its sha256 {digest} is not that of {file.name}; other weights of this network "
                "are used, and results record them")
    return Backbone(name, network, num_features=num_features, preprocessing=preprocessing, weights_sha256=digest,
                    note=note).eval()


def _stretched(size: int, interpolation: str, mean: tuple[float, ...], std: tuple[float, ...]) -> Preprocessing:
    return Preprocessing(resize=(size, size), crop=None, interpolation=interpolation, mean=mean, std=std)


def _lite0(weights: str) -> tuple[nn.Module, WeightsFile, Preprocessing]:
    """Return what `_torchvision` returns."""
    require_packages(OFFLINE_MODEL, None if weights == AUTO else weights)
    from efficientnet_lite_pytorch import EfficientNet  # optional: the extra `offline`

    return EfficientNet.from_name(OFFLINE_MODEL), EFFICIENTNET_LITE0, _stretched(
        _LITE0_SIZE, "bilinear", (_LITE0_MEAN,) * 3, (_LITE0_STD,) * 3)


def _torchvision(name: str, size: int | None) -> tuple[nn.Module, WeightsFile, Preprocessing]:
    """Return a network with random weights, the file of its usual weights, and their preprocessing."""
    from torchvision import models  # here: importing it takes seconds, and changes warning filters

    known = models.list_models(module=models)
    if name not in known:
        raise UserError(f"--model is {name!a}; expected {OFFLINE_MODEL}, or a classification network of torchvision, "
                        f"such as {DEFAULT_MODEL}{suggestion(name, [*known, OFFLINE_MODEL])}")
    usual = models.get_model_weights(name).DEFAULT
    transform, least = usual.transforms(), max(usual.meta["min_size"])
    arguments = {}
    if name.startswith(_FIXED_SIZE):
        if size not in (None, least):
            raise UserError(f"--size is {size}, but {name} takes images of {least} pixels only; leave --size out, or "
                            "choose another --model")
        arguments = {"image_size": least} if name.startswith("vit_") else {}
    elif size is not None and not name.startswith("swin_") and size < least:
        raise UserError(f"--size is {size}; expected at least {least} for {name}")
    if name in ("googlenet", "inception_v3"):
        # Their weights are of programs with other means and deviations, which the networks convert to themselves.
        arguments = {"aux_logits": False, "init_weights": True, "transform_input": True}
    file = WeightsFile(name=usual.url.rpartition("/")[2], url=usual.url, sha256=_DIGEST.search(usual.url)[1])
    return models.get_model(name, weights=None, **arguments), file, Preprocessing(
        resize=tuple(transform.resize_size), crop=transform.crop_size[0], mean=tuple(transform.mean),
        std=tuple(transform.std), interpolation=transform.interpolation.value)


def _remove_classifier(network: nn.Module) -> tuple[str, int]:
    """Replace the last linear layer, or the last convolution of 1x1 pixel, by the identity; return its name and F."""
    place, layer = [(place, layer) for place, layer in network.named_modules()
                    if isinstance(layer, (nn.Linear, nn.Conv2d))][-1]
    parent, _, name = place.rpartition(".")
    setattr(network.get_submodule(parent), name, nn.Identity())
    return place, layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels


def _find(file: WeightsFile, weights: str) -> Path:
    """Return the path of the file of weights; download it if needed."""
    if weights != AUTO:
        if not Path(weights).is_file():
            what = "is a folder" if Path(weights).is_dir() else "does not exist"
            raise UserError(f"--weights is {weights}, which {what}; expected {AUTO}, {RANDOM}, or a file such as "
                            f"{file.name}{'' if file.url is None else f', from {file.url}'}")
        return Path(weights)
    if file.url is None:
        return find_packaged(file, "--weights")
    cached = Path(torch.hub.get_dir()) / "checkpoints" / file.name  # where torchvision keeps it
    if cached.is_file():
        # LIMIT: torchvision publishes 8 or 10 digits, which detect damage and mix-ups, not forgery.
        if not (digest := sha256_of(cached)).startswith(file.sha256):
            raise UserError(f"{cached} has the sha256 {digest}; expected one that starts with {file.sha256}: remove "
                            "it to download it again, or name it with --weights to use it anyway")
        return cached
    try:
        return fetch(file.url, name=file.name, sha256=file.sha256)
    except FetchError as error:
        raise FetchError(f"{error}, or name it with --weights=FILE; study.py classify --weights={RANDOM} and "
                         f"--model={OFFLINE_MODEL} need no download") from error


def _load(network: nn.Module, path: Path, file: WeightsFile, ignored: tuple[str, ...]) -> None:
    """Load a file into a network without classification layer.

    ignored: how the names of other tensors may start

    Raises UserError if the file is not of this network.
    """
    own = network.state_dict()  # load_state_dict needs the versions of layers in its _metadata
    layout = {name: tensor.shape for name, tensor in own.items() if tensor.is_floating_point()}
    tensors = {}
    for name, tensor in read_file(path, file).items():
        name = str(name)
        for old, new in _RENAMED:
            name = old.sub(new, name)
        if name in layout or not (name in own or name.startswith(ignored)):
            tensors[name] = tensor
    own.update(check_tensors(tensors, layout, path, file))
    network.load_state_dict(own)
