"""Membership by the discriminator: the logit that it gives each image, larger for images that it takes for real.

A discriminator that has learned its training images by heart gives them larger logits than other images of the same
distribution (Hayes et al. 2019, "LOGAN: Membership Inference Attacks Against Generative Models", white-box attack).

Legend: N images, C image channels, R resolution.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from dnnlib.cli import UserError
from dnnlib.files import sha256_of
from generation.network import Classes, OpenNetwork
from imagesets.classes import VECTOR
from imagesets.reader import Shape, describe_shape
from metrics.detectors.base import exact_float32
from torch_utils.images import to_unit_range
from training.discriminator import Discriminator
from training.network_file import find_network
from training.snapshot import load_network

_ONE = 1  # image per pass on a CPU, where the sums of a larger batch round in another order


def open_discriminator(path: str | os.PathLike, network: OpenNetwork, shape: Shape, *, device: torch.device | str,
                       option: str = "--network") -> Discriminator | str:
    """Return the discriminator of a network file, in eval mode, or why it cannot score images: a clause.

    path:     as the option has it
    network:  opened from this file
    shape:    (C, R, R) of the images to score

    Raises UserError if the network has another resolution or other channels, or the file has changed since.
    """
    G = network.G
    own = (G.img_channels, G.img_resolution, G.img_resolution)
    if own != tuple(shape):
        kind = describe_shape(own) if own[0] in (1, 3) else f"{own[1]}x{own[2]} with {own[0]} channels"
        raise UserError(f"{option} is {network.name}, a network of {kind} images, but the images of the protocol are "
                        f"{describe_shape(shape)}; expected a network of images like these: choose another")
    if network.classes.kind == VECTOR:
        return f"the labels of {network.name} are vectors, which the images of a protocol do not have"
    path = find_network(os.fspath(path), option)
    try:
        is_same = sha256_of(path) == network.sha256
        D = load_network(path, device).D
    except OSError as error:
        raise UserError(f"{option} is {path}, which cannot be read ({error.strerror}); expected a network "
                        "file") from error
    if not is_same:
        raise UserError(f"{option} is {path}, which has changed since it was opened; expected the same file: repeat "
                        "the command, or name a file that is not written anymore")
    if D is None:
        return f"{network.name} has no discriminator: the file was made for image generation only"
    return D


def match_classes(classes: Classes, image_classes: Sequence[str], known: Sequence[str] | None) -> dict[str, int | None]:
    """Return, for each class of images that the network has, its number; None for an unconditional network.

    image_classes:  name of the class of each image, or its number where classes have no names
    known:          all classes of the data set, in order of their numbers; None = they have no names

    Classes are matched by name if both have names, else by number.
    """
    numbers = {name: int(name) if known is None else known.index(name) for name in dict.fromkeys(image_classes)}
    if classes.count == 0:
        return dict.fromkeys(numbers)
    matched = {name: classes.match(number, known) for name, number in numbers.items()}
    return {name: number for name, number in matched.items() if number is not None}


def label_rows(classes: Classes, image_classes: Sequence[str], known: Sequence[str] | None) -> Tensor:
    """Return the network's label of each image: float32 [N, c_dim], one-hot; c_dim is 0 for an unconditional network.

    Rows of images whose class the network does not have are nan. Arguments as of `match_classes`.
    """
    matched = match_classes(classes, image_classes, known)
    rows = classes.labels([matched.get(name) for name in image_classes])
    rows[[name not in matched for name in image_classes]] = torch.nan
    return rows


@torch.no_grad()
def scores_of(D: Discriminator, pixels: Tensor, labels: Tensor) -> np.ndarray:
    """Return the logit of each image, larger for one that is taken for real: float32 [n].

    pixels:  uint8 [n, C, R, R]; for a network of gray images, also gray images that are repeated to RGB
    labels:  float32 [n, c_dim], from `label_rows`; images with nan get nan

    Everything is computed in float32, also layers that were trained in half precision. No image depends on others of
    its batch: bit for bit on a CPU, where each is computed alone; up to rounding on a GPU.
    """
    parameter = next(D.parameters())
    scores = np.full(len(pixels), np.nan, dtype=np.float32)
    rows = torch.nonzero(labels.isfinite().all(dim=1)).flatten()
    size = _ONE if parameter.device.type == "cpu" else max(len(rows), _ONE)
    with exact_float32(), _without_batch_statistics(D):
        for some in rows.split(size) if len(rows) else ():  # of no rows, split makes one part
            img = to_unit_range(pixels[some][:, :D.img_channels].to(parameter.device)).to(parameter.dtype)
            c = labels[some].to(parameter.device, parameter.dtype)
            scores[some.numpy()] = D(img, c, force_fp32=True)[:, 0].float().cpu().numpy()
    return scores


@contextmanager
def _without_batch_statistics(D: Discriminator) -> Iterator[None]:
    """Let the minibatch standard deviation be that of each image alone, 0, so that no score depends on the batch.

    LIMIT: in training it is that of a few images, never 0. All images get the same unusual input, which moves the
    logits of all; scores can be compared with each other, but not with those in the log of a run.
    """
    layer = D.b4.mbstd
    if layer is None:
        yield
        return
    before = layer.group_size
    try:
        layer.group_size = 1
        yield
    finally:
        layer.group_size = before
