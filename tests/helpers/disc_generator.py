"""A generator built by hand, whose image is a known function of w: a dark disc on light skin.

Four orthogonal axes of W drive the disc: its radius, its color (larger is lighter), its center's x and y. Each axis
drives another number of style channels of every layer, so that factorization finds them in this order.
"""

from pathlib import Path

import numpy as np
import torch
from torch import nn

from generation.image_generator import ImageGenerator, SynthesisSettings
from generation.network import Classes, OpenNetwork
from latent.exploration import Explorer
from torch_utils.distributed import Processes
from training.generator import Generator, SynthesisNetwork, truncate

ATTRIBUTES = ("radius", "color", "x", "y")
CHANNELS = {"radius": 6, "color": 5, "x": 3, "y": 2}  # style channels that each axis drives, in each layer
CLASS_OFFSET = 2.0  # along the radius, of the last class's mean style; that of the first is -2

_SKIN, _DARK, _LIGHT = (0.92, 0.76, 0.66), (0.22, 0.12, 0.10), (0.62, 0.40, 0.32)  # RGB, from 0 to 1


class DiscMapping(nn.Module):
    """w = axes^T (scales * z) + offset of the class: coordinate i of z is the i-th attribute, if scales are 1."""

    def __init__(self, axes, scales, c_dim, num_ws):
        super().__init__()
        self.num_ws, self.w_avg_beta = num_ws, 0.995
        steps = torch.linspace(-1, 1, c_dim) if c_dim > 1 else torch.zeros(c_dim)
        offsets = CLASS_OFFSET * steps[:, None] * axes[0]
        for name, values in (("axes", axes), ("scales", scales), ("offsets", offsets),
                             ("w_avg", torch.zeros(len(axes)))):
            self.register_buffer(name, values)

    def forward(self, z, c, truncation_psi=1, truncation_cutoff=None, skip_w_avg_update=False):
        w = (z.float() * self.scales) @ self.axes
        if len(self.offsets):
            w = w + c.float() @ self.offsets
        ws = w[:, None].repeat(1, self.num_ws, 1)
        return truncate(ws, self.w_avg, truncation_psi, truncation_cutoff)


class DiscSynthesis(SynthesisNetwork):
    """Paints the disc of the mean over layers of w; its layers' weights have the axes, but are not used otherwise."""

    def __init__(self, axes, *args, noise=0.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("axes", axes[:len(ATTRIBUTES)])
        self.noise = noise  # standard deviation of a pixel
        random = np.random.RandomState(1)
        order = [index for index, name in enumerate(ATTRIBUTES) for _ in range(CHANNELS[name])]
        for resolution in self.block_resolutions:
            block = getattr(self, f"b{resolution}")
            for layer in (block.conv1,) if block.is_first else (block.conv0, block.conv1):
                # Nearly along an axis.
                rows = axes[order] + 0.02 * torch.from_numpy(random.randn(len(order), len(axes)))
                lengths = torch.from_numpy(random.uniform(0.1, 10, len(order)))
                layer.affine.weight.data.copy_(rows * lengths[:, None])

    def attributes(self, ws):
        """Return the attributes of styles [N, L, K] by name, in numbers that are 0 on average: each [N]."""
        return dict(zip(ATTRIBUTES, (ws.mean(dim=1) @ self.axes.T).T, strict=True))

    def forward(self, ws, noise_mode="random", force_fp32=False, generator=None, fused_modconv=None):
        assert ws.shape[1:] == (self.num_ws, self.w_dim)
        size = self.img_resolution
        squashed = {name: torch.tanh(values / 3)[:, None, None] for name, values in self.attributes(ws).items()}
        radius = size * (0.21 + 0.11 * squashed["radius"])
        center_x, center_y = (size * (0.5 + 0.12 * squashed[name]) - 0.5 for name in ("x", "y"))
        across = torch.arange(size, dtype=ws.dtype, device=ws.device)
        away = torch.sqrt((across - center_x)**2 + (across[:, None] - center_y)**2)
        disc = torch.sigmoid(2 * (radius - away))[:, None]  # [N, 1, R, R], soft within a pixel
        skin, dark, light = (torch.tensor(color, dtype=ws.dtype, device=ws.device)[:, None, None]
                             for color in (_SKIN, _DARK, _LIGHT))
        inside = dark + (light - dark) * (1 + squashed["color"][:, None]) / 2
        images = 2 * (skin + (inside - skin) * disc) - 1
        if noise_mode == "none" or not self.noise:
            return images
        stream = torch.Generator().manual_seed(2) if noise_mode == "const" else generator
        shape = (1 if noise_mode == "const" else len(ws), 1, size, size)
        return images + self.noise * torch.randn(shape, generator=stream).to(images)


def disc_generator(resolution=32, c_dim=0, w_dim=12, scales=None, noise=0.0, seed=0):
    """Return the generator, in eval mode.

    scales:  [K], standard deviations of w along the axes, of which the first four are ATTRIBUTES; None = all 1
    noise:   standard deviation of the pixels' noise; images are in [-1, 1]
    """
    axes = torch.from_numpy(np.linalg.qr(np.random.RandomState(seed).randn(w_dim, w_dim))[0].T.copy()).float()
    channels = sum(CHANNELS.values())
    sizes = {"channel_base": channels * resolution, "channel_max": channels}
    torch.manual_seed(seed)
    G = Generator(w_dim, c_dim, w_dim, resolution, 3, {"num_layers": 1}, sizes)
    G.synthesis = DiscSynthesis(axes, w_dim, resolution, 3, noise=noise, **sizes)
    G.mapping = DiscMapping(axes, torch.ones(w_dim) if scales is None else torch.tensor(scales), c_dim, G.num_ws)
    return G.eval().requires_grad_(False)


def axis_of(G, attribute):
    """Return the unit vector that drives an attribute: float32 [K]."""
    return G.mapping.axes[ATTRIBUTES.index(attribute)]


def angle_between(first, second):
    """Return the angle between two lines, from 0 to 90 degrees. [K] each"""
    first, second = (np.asarray(one, dtype=np.float64) for one in (first, second))
    return np.degrees(np.arccos(min(1.0, abs(first @ second) / np.linalg.norm(first) / np.linalg.norm(second))))


def disc_network(names=None, info=None, sha256="d" * 64, **generator):
    """Return the generator as an open network. names: of its classes; None = unconditional"""
    G = disc_generator(c_dim=len(names or ()), **generator)
    info = {**({} if names is None else {"classes": list(names), "label_kind": "class"}), **(info or {})}
    return OpenNetwork(G=G, name="disc.safetensors", sha256=sha256, info=info, classes=Classes(G.c_dim, info))


def disc_explorer(outdir, names=None, settings=None, labels=None, **network):
    """Return an Explorer of the network in one process. labels: that --class names; None = all"""
    opened = disc_network(names, **network)
    if labels is None:
        labels = range(len(names)) if names else [None]
    Path(outdir).mkdir(parents=True, exist_ok=True)
    return Explorer(network=opened, generator=ImageGenerator(opened.G, settings or SynthesisSettings(), batch=1),
                    processes=Processes(rank=0, count=1, device=torch.device("cpu")), outdir=Path(outdir),
                    labels=tuple(labels))
