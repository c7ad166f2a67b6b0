"""Directions in W: how they are found from the network alone, and the files that hold them.

SeFa: Shen and Zhou 2021, "Closed-Form Factorization of Latent Semantics in GANs". GANSpace: Harkonen et al. 2020,
"GANSpace: Discovering Interpretable GAN Controls". How much a step of one standard deviation changes an image is not
measured here, but in latent/walks.py.

Legend: K w_dim, L num_ws, N styles; index j of ws drives the j-th convolution, see training/generator.py.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from dnnlib.cli import UserError, expand_user
from dnnlib.files import atomic_write
from dnnlib.text import listed, suggestion
from generation.image_generator import parse_ranges, read_npz
from generation.network import OpenNetwork

FILE = "directions.npz"  # in --outdir
SEFA, PCA, BOUNDARY, CLASS_LINE = "sefa", "pca", "boundary", "class line"  # methods
# Names of layers, by the resolutions of their blocks.
RESOLUTIONS_OF = {"coarse": range(4, 9), "middle": range(16, 33), "fine": range(64, 2**20)}
ALL_LAYERS = "all"

_ARRAYS = ("directions", "deviations", "layers", "names", "method", "network_sha256")
_EXPECTED = "expected an .npz file of directions, as explore.py sefa and explore.py boundary write it"
_ROUNDING = 1e-3  # by which the length of a direction in a file may differ from 1


@dataclass(frozen=True, kw_only=True)
class Directions:
    """Directions in W, and the layers of ws that they are meant for."""

    names: tuple[str, ...]  # "0", "1", ..., or what the direction changes
    vectors: Tensor  # float32 [num, K], of length 1
    deviations: Tensor  # float32 [num], the standard deviation of w along each
    layers: tuple[int, ...]  # indices of ws
    method: str
    network_sha256: str  # as `mapping_sha256` returns it
    extras: Mapping[str, np.ndarray] = field(default_factory=dict)  # such as singular_values, for the file

    def only(self, index: int) -> "Directions":
        """Return one direction, without the extras."""
        return Directions(names=self.names[index:index + 1], vectors=self.vectors[index:index + 1],
                          deviations=self.deviations[index:index + 1], layers=self.layers, method=self.method,
                          network_sha256=self.network_sha256)


def mapping_sha256(network: OpenNetwork) -> str:
    """Return the hash of the file that a network's W comes from: the network's own, or that which it was tuned from.

    Pivotal tuning leaves the mapping as it is, so that w means the same in both networks.
    """
    tuning = network.info.get("pivotal_tuning")
    origin = tuning.get("network_sha256") if isinstance(tuning, dict) else None
    return origin if isinstance(origin, str) else network.sha256


def choose_style_layers(text: str, G: nn.Module, option: str = "--layers") -> list[int]:
    """Return the layers that an option names, as indices of ws, each once and in order.

    text:  a list of numbers, ranges and names, such as 0,1,5-9 or coarse,9. coarse stands for the layers of 4x4 and 8x8
           pixels, middle of 16x16 and 32x32, fine of 64x64 and more, all for all of them

    The last index, which drives only the last ToRGB layer, belongs to the resolution of the images.

    Raises UserError for layers that the network does not have.
    """
    resolutions = resolutions_of_layers(G)
    named = {name: [index for index, resolution in enumerate(resolutions) if resolution in range_]
             for name, range_ in RESOLUTIONS_OF.items()}
    named[ALL_LAYERS] = list(range(len(resolutions)))
    chosen: set[int] = set()
    for part in (part.strip() for part in text.split(",")):
        if part in named:
            if not named[part]:
                known = [name for name, layers in named.items() if layers]
                raise UserError(f"{option} has {part}, but this network of {G.img_resolution}x{G.img_resolution} "
                                f"pixels has no such layers; expected {', '.join(known)}, or indices from 0 to "
                                f"{G.num_ws - 1}")
            chosen.update(named[part])
        elif part[:1].isdigit():
            for some in parse_ranges(option, part, largest=G.num_ws - 1, what="layer of this network"):
                chosen.update(some)
        else:
            raise UserError(f"{option} has {part!r}; expected coarse, middle, fine, all, or indices, such as 0,1,5-9")
    return sorted(chosen)


def factorize(G: nn.Module, layers: Sequence[int], num: int, *, torgb: bool = False) -> tuple[Tensor, Tensor]:
    """Return the directions of W that change the styles of some layers most (Shen and Zhou 2021, eq. 7 and 8).

    layers:  indices of ws
    num:     number of directions
    torgb:   include the styles of ToRGB layers

    Each style channel is a row a of weights over w, scaled to unit length. Of all rows, stacked to A, the directions n
    are those that maximize |A n|^2: the eigenvectors of A^T A, which are the right singular vectors of A. Signs are
    chosen so that the first of the largest entries of n is positive.

    Returns the directions, float32 [num, K], of length 1, orthogonal, and their singular values |A n|, float32 [num],
    from large to small. Raises UserError if there are not as many.
    """
    rows = [affine.weight.detach().double().cpu() for affine in _affines(G, layers, torgb=torgb)]
    if not rows:
        raise UserError(f"--layers is {G.num_ws - 1}, which only drives a ToRGB layer; expected other layers, or "
                        "--torgb")
    stacked = torch.cat(rows)
    lengths = stacked.norm(dim=1)
    stacked = stacked[lengths > 0] / lengths[lengths > 0, None]
    most = min(stacked.shape)
    if not 1 <= num <= most:
        raise UserError(f"--num is {num}; expected 1 to {most}: these layers have {len(stacked)} style channels, and w "
                        f"has {G.w_dim} numbers")
    # numpy: its result does not depend on the number of threads that PyTorch uses.
    _, values, vectors = np.linalg.svd(stacked.numpy(), full_matrices=False)
    return _with_signs(vectors[:num]), torch.from_numpy(values[:num]).float()


def principal_components(styles: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """Return the directions along which styles vary most (GANSpace, section 2.1).

    styles:  float64 [N, K]
    num:     number of directions

    Returns the directions, float32 [num, K], of length 1, orthogonal, with signs as in `factorize`, and the standard
    deviations of the styles along them, float32 [num], from large to small. Raises UserError if there are not as many.
    """
    most = min(styles.shape[1], len(styles) - 1)
    if not 1 <= num <= most:
        raise UserError(f"--num is {num}; expected 1 to {most}: w has {styles.shape[1]} numbers")
    variances, vectors = np.linalg.eigh(np.cov(styles.numpy(), rowvar=False).reshape(styles.shape[1], -1))
    deviations = np.sqrt(np.maximum(variances[::-1], 0))  # rounding may leave -1e-17
    return _with_signs(vectors.T[::-1][:num]), torch.from_numpy(deviations[:num].copy()).float()


def deviations_along(styles: Tensor, vectors: Tensor) -> Tensor:
    """Return the standard deviations of styles along directions: float32 [num].

    styles:   float64 [N, K];  vectors: [num, K]
    """
    return (styles @ vectors.to(styles.dtype).T).std(dim=0).float()


def save_directions(path: str | os.PathLike, directions: Directions) -> None:
    """Write directions for `read_directions`, with the extras as further arrays. Raises OSError."""
    with atomic_write(path) as file:
        np.savez(file, directions=directions.vectors.numpy(), deviations=directions.deviations.numpy(),
                 layers=np.array(directions.layers, dtype=np.int64), names=np.array(directions.names, dtype=str),
                 method=np.array(directions.method), network_sha256=np.array(directions.network_sha256),
                 **directions.extras)


def read_directions(path: str | os.PathLike, network: OpenNetwork, option: str = "--direction") -> Directions:
    """Return the directions in a file. option: that names it

    Raises UserError if the file is missing, damaged or another kind of file, and for directions of another network,
    unless one of the two was made from the other by pivotal tuning.
    """
    flag = f"{option}={path}"
    arrays = read_npz(path, _ARRAYS, flag=flag, expected=_EXPECTED, optional=None)
    vectors, deviations, layers, names = (arrays[name] for name in _ARRAYS[:4])
    sha256 = str(arrays["network_sha256"])
    # Before the shapes: those of another network may differ.
    if sha256 not in (network.sha256, mapping_sha256(network)):
        raise UserError(f"{flag} has directions of another network (SHA-256 {sha256[:12]}..., but {network.name} has "
                        f"{network.sha256[:12]}...); expected directions of this one")
    if vectors.ndim != 2 or vectors.shape[1] != network.G.w_dim or not len(vectors):
        raise UserError(f"{flag} has directions of shape {list(vectors.shape)}; expected [num, {network.G.w_dim}] for "
                        "this network")
    for name, found in (("deviations", deviations), ("names", names)):
        if found.shape != (len(vectors),):
            raise UserError(f"{flag} has {name} of shape {list(found.shape)}; expected [{len(vectors)}], one for each "
                            "direction")
    for name, found in (("directions", vectors), ("deviations", deviations)):
        if found.dtype.kind not in "fiu" or not np.isfinite(found).all():
            raise UserError(f"{flag} has {name} of type {found.dtype} and values that are not finite numbers; expected "
                            "finite numbers")
    if np.abs(np.linalg.norm(vectors, axis=1) - 1).max() > _ROUNDING:
        raise UserError(f"{flag} has directions of other lengths than 1; expected unit vectors")
    if layers.ndim != 1 or layers.dtype.kind not in "iu" or not len(layers) or not (
            0 <= layers.min() <= layers.max() < network.G.num_ws):
        raise UserError(f"{flag} has layers that this network does not have; expected indices from 0 to "
                        f"{network.G.num_ws - 1}")
    return Directions(names=tuple(map(str, names.tolist())), vectors=torch.from_numpy(vectors.astype(np.float32)),
                      deviations=torch.from_numpy(deviations.astype(np.float32)),
                      layers=tuple(sorted(set(layers.tolist()))), method=str(arrays["method"]), network_sha256=sha256,
                      extras={name: found for name, found in arrays.items() if name not in _ARRAYS})


def parse_direction(text: str, network: OpenNetwork, option: str = "--direction") -> Directions:
    """Return the one direction that FILE:INDEX or FILE:NAME stands for. Raises UserError.

    A name wins over an index. Names and files may contain colons: the longest name of a file that exists is taken.
    """
    splits = _splits(text, option)
    if not splits or not splits[0][1]:
        raise UserError(f"{option} is {text}; expected FILE:INDEX or FILE:NAME, such as directions.npz:0")
    path, which = next((split for split in splits if os.path.exists(split[0])), splits[0])
    directions = read_directions(path, network, option)
    if which in directions.names:
        return directions.only(directions.names.index(which))
    last = len(directions.names) - 1
    if not (which.isascii() and which.isdigit()):
        raise UserError(f"{option} is {text}, but {path} has no direction {which}"
                        f"{suggestion(which, directions.names)}; it has {listed(directions.names)}")
    if int(which[:18]) > last:
        raise UserError(f"{option} is {text}, but {path} has {last + 1}; expected an index from 0 to {last}")
    return directions.only(int(which))


def is_direction(text: str, option: str = "--direction") -> bool:
    """Tell whether a text is meant as FILE:INDEX or FILE:NAME: what is before a colon exists, or ends in .npz."""
    return any(os.path.exists(path) or path.endswith(".npz") for path, _ in _splits(text, option))


def _splits(text: str, option: str) -> list[tuple[str, str]]:
    """Return the ways to divide a text at a colon, that with the longest file first; ~ is replaced in the files."""
    parts = expand_user(text, option).split(":")
    return [(":".join(parts[:count]), ":".join(parts[count:])) for count in range(len(parts) - 1, 0, -1)]


def resolutions_of_layers(G: nn.Module) -> list[int]:
    """Return the resolution of the convolution that each index of ws drives; of the images for the last one."""
    blocks = G.synthesis.block_resolutions
    return [resolution for resolution in blocks for _ in range(getattr(G.synthesis, f"b{resolution}").num_conv)] + [
        blocks[-1]]


def _affines(G: nn.Module, layers: Sequence[int], *, torgb: bool) -> list[nn.Module]:
    """Return the layers that turn the chosen indices of ws into styles."""
    wanted, found, index = set(layers), [], 0
    for resolution in G.synthesis.block_resolutions:
        block = getattr(G.synthesis, f"b{resolution}")
        for layer in (block.conv1,) if block.is_first else (block.conv0, block.conv1):
            if index in wanted:
                found.append(layer.affine)
            index += 1
        # ToRGB takes the index of the next block's conv0.
        if torgb and block.torgb is not None and index in wanted:
            found.append(block.torgb.affine)
    return found


def _with_signs(vectors: np.ndarray) -> Tensor:
    """Return vectors [num, K] as float32, with signs that make the first of each one's largest entries positive."""
    vectors = np.asarray(vectors)
    largest = np.take_along_axis(vectors, np.abs(vectors).argmax(axis=1)[:, None], axis=1)
    return torch.from_numpy((vectors * np.where(largest < 0, -1.0, 1.0)).astype(np.float32))
