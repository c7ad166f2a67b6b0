"""Read files of weights without running what is in them."""

import io
import os
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from dnnlib.cli import UserError
from dnnlib.disk_failures import retrying
from metrics.detectors.files import WeightsFile

_COUNTER = ".num_batches_tracked"  # of batch normalisation; unused in eval mode, absent in files of old versions


def load_weights(network: nn.Module, path: str | os.PathLike, file: WeightsFile) -> None:
    """Put the tensors of a file into a network, which may be on the meta device, for use on the CPU as it is.

    Raises what `read_weights` raises.
    """
    wanted = network.state_dict()
    counters = {name: torch.zeros((), dtype=torch.int64) for name in wanted if name.endswith(_COUNTER)}
    layout = {name: tensor.shape for name, tensor in wanted.items() if name not in counters}
    network.load_state_dict(read_weights(path, layout, file) | counters, assign=True)
    network.requires_grad_(False).eval()


def read_weights(path: str | os.PathLike, layout: Mapping[str, torch.Size], file: WeightsFile) -> dict[str, Tensor]:
    """Return the tensors of a file that torch.save wrote, float32 on the CPU.

    layout: the name and shape of each tensor
    file:   what the file should be, for messages

    Raises UserError when it holds more than tensors, cannot be read, or has another layout; OSError when it cannot be
    opened.
    """
    tensors = _read(path, file)
    tensors = {name: tensor for name, tensor in tensors.items() if not str(name).endswith(_COUNTER)}
    as_in = f"as in {file.name}: is it the weights of another network?"
    for name, shape in layout.items():
        if name not in tensors:
            raise UserError(f"{path} has no tensor {name}; expected one of {list(shape)}, {as_in}")
        if not _is_plain(tensors[name]):
            raise UserError(f"{path}: {name} is no tensor of plain numbers; expected one of {list(shape)}, {as_in}")
        if tensors[name].shape != shape:
            raise UserError(f"{path}: {name} is {list(tensors[name].shape)}; expected {list(shape)}, {as_in}")
        if not tensors[name].isfinite().all():
            raise UserError(f"{path}: {name} has values that are not finite; expected numbers, {as_in}")
    foreign = [name for name in tensors if name not in layout]
    if foreign:
        raise UserError(f"{path} has a tensor {foreign[0]}; expected none of that name, {as_in}")
    return {name: tensors[name].detach().float().contiguous() for name in layout}


def _read(path: str | os.PathLike, file: WeightsFile) -> Mapping[str, Tensor]:
    expected = f"expected {file.name}, or a file like it that holds tensors alone"
    with io.BytesIO(retrying(Path(path).read_bytes, path)) as stream:
        try:
            with warnings.catch_warnings(action="ignore"):  # about files that are refused in the next step
                tensors = torch.load(stream, map_location="cpu", weights_only=True)
        except Exception as error:  # torch's reader and Python's pickle raise almost anything for a damaged file
            raise UserError(f"{path} is damaged, or no file of weights, or would run code when it is read "
                            f"({type(error).__name__}); nothing in it was run: {expected}") from error
    if not isinstance(tensors, Mapping):
        raise UserError(f"{path} holds a {type(tensors).__name__}, not tensors with names: {expected}")
    return tensors


def _is_plain(value: object) -> bool:
    return (isinstance(value, Tensor) and value.layout == torch.strided and value.is_floating_point()
            and not value.is_meta)
