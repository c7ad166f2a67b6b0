"""The StyleGAN2 discriminator (Karras et al. 2020, "Analyzing and Improving the Image Quality of StyleGAN").

Legend: N batch, I O in/out channels, C image channels, R resolution.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from torch_utils.ops.upfirdn2d import downsample2d, setup_filter
from training.generator import MappingNetwork, check_image_format, resolutions_up_to
from training.layers import (
    DEFAULT_FILTER,
    Conv2dLayer,
    FullyConnectedLayer,
    MinibatchStdLayer,
    compute_dtype,
    half_dtype_at,
    memory_format,
)


class Discriminator(nn.Module):
    """Map images [N, C, R, R] and labels c [N, c_dim] to one logit each, positive for "real"."""

    def __init__(self, c_dim: int, img_resolution: int, img_channels: int, architecture: str = "resnet",
                 channel_base: int = 32768, channel_max: int = 512, num_fp16_res: int = 0,
                 conv_clamp: float | None = None, cmap_dim: int | None = None, block_kwargs: dict | None = None,
                 mapping_kwargs: dict | None = None, epilogue_kwargs: dict | None = None,
                 half_dtype: str = "float16"):
        super().__init__()
        check_image_format("discriminator: ", img_resolution, img_channels, architecture, channel_base)
        block_kwargs, mapping_kwargs, epilogue_kwargs = (dict(kwargs or {}) for kwargs in
                                                         (block_kwargs, mapping_kwargs, epilogue_kwargs))
        self.init_kwargs = dict(c_dim=c_dim, img_resolution=img_resolution, img_channels=img_channels,
                                architecture=architecture, channel_base=channel_base, channel_max=channel_max,
                                num_fp16_res=num_fp16_res, conv_clamp=conv_clamp, cmap_dim=cmap_dim,
                                block_kwargs=block_kwargs, mapping_kwargs=mapping_kwargs,
                                epilogue_kwargs=epilogue_kwargs, half_dtype=half_dtype)
        self.c_dim, self.img_resolution, self.img_channels = c_dim, img_resolution, img_channels
        self.block_resolutions = resolutions_up_to(img_resolution)[:0:-1]  # img_resolution down to 8
        channels = {res: min(channel_base // res, channel_max) for res in [*self.block_resolutions, 4]}
        num_layers = 0
        for res in self.block_resolutions:
            block = DiscriminatorBlock(channels[res] if res < img_resolution else 0, channels[res], channels[res // 2],
                                       img_channels=img_channels, first_layer_idx=num_layers,
                                       architecture=architecture, conv_clamp=conv_clamp,
                                       half=half_dtype_at(res, img_resolution, num_fp16_res, half_dtype),
                                       **block_kwargs)
            self.add_module(f"b{res}", block)
            num_layers += block.num_layers
        if c_dim == 0:
            cmap_dim = 0
        elif cmap_dim is None:
            cmap_dim = channels[4]
        self.mapping = MappingNetwork(z_dim=0, c_dim=c_dim, w_dim=cmap_dim, num_ws=None, **mapping_kwargs) \
            if c_dim > 0 else None
        self.b4 = DiscriminatorEpilogue(channels[4], img_channels if architecture == "skip" else None, cmap_dim,
                                        conv_clamp=conv_clamp, **epilogue_kwargs)

    def freezable_layers(self) -> list[str]:
        """Return the names of the layers that `freeze_layers` counts, in order: convolutions, starting at the image."""
        return [f"b{res}.{name}" for res in self.block_resolutions
                for name, _ in getattr(self, f"b{res}").named_children()]

    def forward(self, img: Tensor, c: Tensor | None, force_fp32: bool = False) -> Tensor:
        """Return logits [N, 1] of the parameters' dtype. Raises ValueError for images of another shape."""
        channels, res = self.img_channels, self.img_resolution
        if img.ndim != 4 or img.shape[1:] != (channels, res, res):
            raise ValueError(f"discriminator: images are {list(img.shape)}; expected [N, {channels}, {res}, {res}]")
        if self.mapping is not None and (c is None or len(c) != len(img)):
            raise ValueError(f"discriminator: labels are {'missing' if c is None else list(c.shape)}; expected "
                             f"[{len(img)}, {self.c_dim}], one row per image")
        x = None
        for res in self.block_resolutions:
            x, img = getattr(self, f"b{res}")(x, img, force_fp32=force_fp32)
        cmap = None if self.mapping is None else self.mapping(None, c)
        return self.b4(x, img, cmap)


class DiscriminatorBlock(nn.Module):
    """All layers of one resolution; halves the resolution.

    The convolutions of all blocks are numbered, starting at the image, in this block from `first_layer_idx`; those
    below `freeze_layers` are not trainable (Mo et al. 2020). `num_layers` is the number of convolutions in this block.
    """

    def __init__(self, in_channels: int, tmp_channels: int, out_channels: int, img_channels: int,
                 first_layer_idx: int, architecture: str = "resnet", activation: str = "lrelu",
                 resample_filter: Sequence[float] = DEFAULT_FILTER, conv_clamp: float | None = None,
                 half: torch.dtype | None = None, fp16_channels_last: bool = False, freeze_layers: int = 0):
        super().__init__()
        self.architecture = architecture
        self.half_dtype = half
        self.channels_last = fp16_channels_last and half is not None
        self.num_layers = 0
        self.register_buffer("resample_filter", setup_filter(resample_filter))

        def convolution(i: int, o: int, kernel_size: int, **kwargs) -> Conv2dLayer:
            trainable = first_layer_idx + self.num_layers >= freeze_layers
            self.num_layers += 1
            return Conv2dLayer(i, o, kernel_size, trainable=trainable, resample_filter=resample_filter,
                               channels_last=self.channels_last, **kwargs)

        active = dict(activation=activation, conv_clamp=conv_clamp)
        self.fromrgb = convolution(img_channels, tmp_channels, 1, **active) \
            if in_channels == 0 or architecture == "skip" else None
        self.conv0 = convolution(tmp_channels, tmp_channels, 3, **active)
        self.conv1 = convolution(tmp_channels, out_channels, 3, down=2, **active)
        self.skip = convolution(tmp_channels, out_channels, 1, bias=False, down=2) if architecture == "resnet" else None

    def forward(self, x: Tensor | None, img: Tensor | None, force_fp32: bool = False) -> tuple[Tensor, Tensor | None]:
        """Return activations [N, O, R / 2, R / 2], and for `skip` the image [N, C, R / 2, R / 2]."""
        dtype = compute_dtype(self.conv0.weight, self.half_dtype, force_fp32)
        layout = memory_format(self.channels_last and dtype == self.half_dtype)
        if x is not None:
            x = x.to(dtype=dtype, memory_format=layout)
        if self.fromrgb is not None:
            img = img.to(dtype=dtype, memory_format=layout)
            seen = self.fromrgb(img)
            x = seen if x is None else x + seen
        img = downsample2d(img, self.resample_filter) if self.architecture == "skip" else None

        if self.skip is None:
            return self.conv1(self.conv0(x)), img
        branch = math.sqrt(0.5)
        return self.skip(x, gain=branch) + self.conv1(self.conv0(x), gain=branch), img


class DiscriminatorEpilogue(nn.Module):
    """Map activations [N, I, 4, 4] to logits [N, 1]; with labels, by projection onto cmap [N, cmap_dim].

    The projection is that of Miyato and Koyama 2018, scaled by 1 / sqrt(cmap_dim).
    """

    SIZE = 4

    def __init__(self, in_channels: int, img_channels: int | None, cmap_dim: int, activation: str = "lrelu",
                 conv_clamp: float | None = None, mbstd_group_size: int | None = 4, mbstd_num_channels: int = 1):
        """img_channels: channels of the image that is also an input here (`skip`); None for no image."""
        super().__init__()
        self.cmap_dim = cmap_dim
        self.fromrgb = None
        if img_channels is not None:
            self.fromrgb = Conv2dLayer(img_channels, in_channels, kernel_size=1, activation=activation)
        self.mbstd = MinibatchStdLayer(mbstd_group_size, mbstd_num_channels) if mbstd_num_channels > 0 else None
        self.conv = Conv2dLayer(in_channels + mbstd_num_channels, in_channels, kernel_size=3,
                                conv_clamp=conv_clamp, activation=activation)
        self.fc = FullyConnectedLayer(in_channels * self.SIZE**2, in_channels, activation=activation)
        self.out = FullyConnectedLayer(in_channels, max(cmap_dim, 1))

    def forward(self, x: Tensor, img: Tensor | None, cmap: Tensor | None) -> Tensor:
        dtype = self.conv.weight.dtype  # never half: this block is cheap, and its statistics need full precision
        x = x.to(dtype=dtype, memory_format=torch.contiguous_format)
        if self.fromrgb is not None:
            x = x + self.fromrgb(img.to(dtype=dtype, memory_format=torch.contiguous_format))
        if self.mbstd is not None:
            x = self.mbstd(x)
        x = self.out(self.fc(self.conv(x).flatten(1)))
        if self.cmap_dim == 0:
            return x
        return (x * cmap).sum(dim=1, keepdim=True) / math.sqrt(self.cmap_dim)
