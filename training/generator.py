"""The StyleGAN2 generator: mapping network f and synthesis network g.

StyleGAN: Karras et al. 2019, "A Style-Based Generator Architecture for Generative Adversarial Networks". StyleGAN2:
Karras et al. 2020, "Analyzing and Improving the Image Quality of StyleGAN".

Legend: N batch, Z z_dim, K w_dim, L num_ws, I O in/out channels, C image channels, R resolution.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from imagesets.resize import RESOLUTIONS, is_resolution
from torch_utils.ops.bias_act import bias_act
from torch_utils.ops.bias_act_ref import activation_named
from torch_utils.ops.upfirdn2d import setup_filter, upsample2d
from training.layers import (
    DEFAULT_FILTER,
    Conv2dLayer,
    FullyConnectedLayer,
    choose_fused_modconv,
    compute_dtype,
    half_dtype_at,
    memory_format,
    modulated_conv2d,
    normalize_second_moment,
)

ARCHITECTURES = ("orig", "skip", "resnet")  # StyleGAN2, figure 7: how blocks are connected, in both networks
NOISE_MODES = ("random", "const", "none")


class Generator(nn.Module):
    """Map latents z [N, Z] and labels c [N, c_dim] to images [N, C, R, R]."""

    def __init__(self, z_dim: int, c_dim: int, w_dim: int, img_resolution: int, img_channels: int,
                 mapping_kwargs: dict | None = None, synthesis_kwargs: dict | None = None):
        super().__init__()
        mapping_kwargs, synthesis_kwargs = dict(mapping_kwargs or {}), dict(synthesis_kwargs or {})
        self.init_kwargs = dict(z_dim=z_dim, c_dim=c_dim, w_dim=w_dim, img_resolution=img_resolution,
                                img_channels=img_channels, mapping_kwargs=mapping_kwargs,
                                synthesis_kwargs=synthesis_kwargs)
        self.z_dim, self.c_dim, self.w_dim = z_dim, c_dim, w_dim
        self.img_resolution, self.img_channels = img_resolution, img_channels
        self.synthesis = SynthesisNetwork(w_dim, img_resolution, img_channels, **synthesis_kwargs)
        self.num_ws = self.synthesis.num_ws
        self.mapping = MappingNetwork(z_dim, c_dim, w_dim, self.num_ws, **mapping_kwargs)

    def forward(self, z: Tensor, c: Tensor, truncation_psi: float = 1, truncation_cutoff: int | None = None,
                **synthesis_kwargs) -> Tensor:
        ws = self.mapping(z, c, truncation_psi=truncation_psi, truncation_cutoff=truncation_cutoff)
        return self.synthesis(ws, **synthesis_kwargs)


class MappingNetwork(nn.Module):
    """Map z [N, Z] and label c [N, c_dim] to ws [N, L, K]; without num_ws to [N, K], as the discriminator uses it.

    z and the embedded label are each normalized by their second moment (StyleGAN2-ADA, appendix C). In train mode
    every call moves the buffer w_avg towards the mean of w, unless skip_w_avg_update.
    """

    def __init__(self, z_dim: int, c_dim: int, w_dim: int, num_ws: int | None, num_layers: int = 8,
                 embed_features: int | None = None, layer_features: int | None = None, activation: str = "lrelu",
                 lr_multiplier: float = 0.01, w_avg_beta: float | None = 0.995):
        super().__init__()
        if z_dim == 0 and c_dim == 0:
            raise ValueError("mapping network: z_dim and c_dim are both 0; expected at least one input")
        self.z_dim, self.c_dim, self.w_dim = z_dim, c_dim, w_dim
        self.num_ws = num_ws
        self.num_layers = num_layers
        self.w_avg_beta = w_avg_beta if num_ws is not None else None
        if self.w_avg_beta is not None:
            self.register_buffer("w_avg", torch.zeros(w_dim))

        embedded = 0
        if c_dim > 0:
            embedded = w_dim if embed_features is None else embed_features
            self.embed = FullyConnectedLayer(c_dim, embedded)
        hidden = w_dim if layer_features is None else layer_features
        widths = [z_dim + embedded, *[hidden] * (num_layers - 1), w_dim]
        for index, (narrow, wide) in enumerate(pairwise(widths)):
            self.add_module(f"fc{index}", FullyConnectedLayer(narrow, wide, activation=activation,
                                                              lr_multiplier=lr_multiplier))

    def forward(self, z: Tensor | None, c: Tensor | None, truncation_psi: float = 1,
                truncation_cutoff: int | None = None, skip_w_avg_update: bool = False) -> Tensor:
        """Return ws. truncation_psi: 1 keeps w, 0 gives w_avg, in the first truncation_cutoff layers (None: in all)."""
        w = self._input(z, c)
        for index in range(self.num_layers):
            w = getattr(self, f"fc{index}")(w)
        if self.w_avg_beta is not None and self.training and not skip_w_avg_update:
            with torch.no_grad():
                self.w_avg.copy_(torch.lerp(w.mean(dim=0), self.w_avg, self.w_avg_beta))
        if self.num_ws is None:
            return w
        ws = w.unsqueeze(1).repeat(1, self.num_ws, 1)  # [N, L, K]
        if truncation_psi == 1:
            return ws
        if self.w_avg_beta is None:
            raise ValueError(f"truncation_psi is {truncation_psi}; expected 1: this network does not track w_avg")
        return truncate(ws, self.w_avg, truncation_psi, truncation_cutoff)

    def _input(self, z: Tensor | None, c: Tensor | None) -> Tensor:
        dtype = self.fc0.weight.dtype
        parts = []
        for name, value, size in (("z", z, self.z_dim), ("c", c, self.c_dim)):
            if size == 0:
                continue
            if value is None or value.ndim != 2 or value.shape[1] != size:
                found = "missing" if value is None else list(value.shape)
                raise ValueError(f"mapping network: {name} is {found}; expected [N, {size}]")
            value = value.to(dtype)
            parts.append(normalize_second_moment(self.embed(value) if name == "c" else value))
        return torch.cat(parts, dim=1)


def truncate(ws: Tensor, center: Tensor, psi: float, cutoff: int | None = None) -> Tensor:
    """Return center + psi * (ws - center) in the first `cutoff` layers (StyleGAN, appendix B).

    ws:      [N, L, K];  center: [K], the mean style, or [N, 1, K], one per image
    psi:     1 keeps ws, 0 gives the center
    cutoff:  None for all layers
    """
    cutoff = ws.shape[1] if cutoff is None else cutoff
    return torch.cat([torch.lerp(center, ws[:, :cutoff], psi), ws[:, cutoff:]], dim=1)


class SynthesisNetwork(nn.Module):
    """Turn ws [N, L, K] into images [N, C, R, R]. L is the number of convolutions plus 1."""

    def __init__(self, w_dim: int, img_resolution: int, img_channels: int, channel_base: int = 32768,
                 channel_max: int = 512, num_fp16_res: int = 0, architecture: str = "skip",
                 half_dtype: str = "float16", **block_kwargs):
        super().__init__()
        check_image_format("generator: ", img_resolution, img_channels, architecture, channel_base)
        self.w_dim, self.img_resolution, self.img_channels = w_dim, img_resolution, img_channels
        self.block_resolutions = resolutions_up_to(img_resolution)
        self.num_ws = 1
        in_channels = 0
        for res in self.block_resolutions:
            out_channels = min(channel_base // res, channel_max)
            half = half_dtype_at(res, img_resolution, num_fp16_res, half_dtype)
            block = SynthesisBlock(in_channels, out_channels, w_dim=w_dim, resolution=res, img_channels=img_channels,
                                   is_last=res == img_resolution, architecture=architecture, half=half, **block_kwargs)
            self.add_module(f"b{res}", block)
            self.num_ws += block.num_conv
            in_channels = out_channels

    def forward(self, ws: Tensor, noise_mode: str = "random", force_fp32: bool = False,
                generator: torch.Generator | None = None, fused_modconv: bool | None = None) -> Tensor:
        """Return images of the parameters' dtype; the range of the training images is [-1, 1].

        noise_mode:  "random" draws noise per image (from `generator`, None for torch's default one), "const" uses
                     the network's constant noise maps, "none" uses no noise
        force_fp32:  compute half-precision blocks in float32
        fused_modconv:  the form of all modulated convolutions; None chooses for each (`choose_fused_modconv`)

        Raises ValueError for ws of another shape, and for an unknown noise_mode.
        """
        if ws.ndim != 3 or ws.shape[1:] != (self.num_ws, self.w_dim):
            raise ValueError(f"synthesis network: ws is {list(ws.shape)}; expected [N, {self.num_ws}, {self.w_dim}]")
        if noise_mode not in NOISE_MODES:
            raise ValueError(f"noise_mode is {noise_mode!r}; expected one of {', '.join(NOISE_MODES)}")
        layer_ws = ws.to(self.b4.conv1.affine.weight.dtype).unbind(dim=1)
        x = img = None
        first = 0
        for res in self.block_resolutions:
            block = getattr(self, f"b{res}")
            mine = layer_ws[first:first + block.num_conv + 1]  # the last one is shared with the next block's conv0
            x, img = block(x, img, mine, force_fp32=force_fp32, noise_mode=noise_mode, generator=generator,
                           fused_modconv=fused_modconv)
            first += block.num_conv
        return img


def noise_maps(synthesis: nn.Module) -> dict[str, Tensor]:
    """Return the constant noise maps [r, r] by their names in the network, from low to high resolution."""
    return {name: buffer for name, buffer in synthesis.named_buffers() if name.rpartition(".")[2] == "noise_const"}


class SynthesisBlock(nn.Module):
    """All layers of one resolution.

    The first block (in_channels=0) starts from a learned constant [O, R, R] and has only conv1; the others double
    the resolution in conv0. `skip` blocks add to the image of the lower resolutions; `orig` and `resnet` networks
    have a single ToRGB layer, in the last block.
    """

    def __init__(self, in_channels: int, out_channels: int, w_dim: int, resolution: int, img_channels: int,
                 is_last: bool, architecture: str = "skip", resample_filter: Sequence[float] = DEFAULT_FILTER,
                 conv_clamp: float | None = None, half: torch.dtype | None = None, fp16_channels_last: bool = False,
                 **layer_kwargs):
        super().__init__()
        self.is_first = in_channels == 0
        self.architecture = architecture
        self.half_dtype = half
        self.channels_last = fp16_channels_last and half is not None
        self.register_buffer("resample_filter", setup_filter(resample_filter))
        shared = dict(conv_clamp=conv_clamp, channels_last=self.channels_last)
        layer = dict(w_dim=w_dim, resolution=resolution, resample_filter=resample_filter, **shared, **layer_kwargs)
        if self.is_first:
            self.const = nn.Parameter(torch.randn(out_channels, resolution, resolution))
        else:
            self.conv0 = SynthesisLayer(in_channels, out_channels, up=2, **layer)
        self.conv1 = SynthesisLayer(out_channels, out_channels, **layer)
        self.torgb = self.skip = None
        if is_last or architecture == "skip":
            self.torgb = ToRGBLayer(out_channels, img_channels, w_dim, **shared)
        if architecture == "resnet" and not self.is_first:
            self.skip = Conv2dLayer(in_channels, out_channels, 1, up=2, bias=False,
                                    channels_last=self.channels_last, resample_filter=resample_filter)
        self.num_conv = 1 if self.is_first else 2

    def forward(self, x: Tensor | None, img: Tensor | None, ws: Sequence[Tensor], force_fp32: bool = False,
                noise_mode: str = "random", generator: torch.Generator | None = None,
                fused_modconv: bool | None = None) -> tuple[Tensor, Tensor | None]:
        """Return the activations and image after this block.

        x:    [N, I, R / 2, R / 2], None in the first block;  img: [N, C, R / 2, R / 2] or None
        ws:   num_conv + 1 tensors [N, K]: one per convolution, then ToRGB's
        """
        dtype = compute_dtype(self.conv1.weight, self.half_dtype, force_fp32)
        layout = memory_format(self.channels_last and dtype == self.half_dtype)
        options = dict(noise_mode=noise_mode, fused_modconv=fused_modconv, generator=generator)

        if self.is_first:
            x = self.const.to(dtype=dtype, memory_format=torch.contiguous_format)
            x = x.expand(len(ws[0]), *x.shape).to(memory_format=layout)
            x = self.conv1(x, ws[0], **options)
        else:
            x = x.to(dtype=dtype, memory_format=layout)
            branch = math.sqrt(0.5) if self.skip is not None else 1
            y = self.conv1(self.conv0(x, ws[0], **options), ws[1], gain=branch, **options)
            x = y if self.skip is None else self.skip(x, gain=branch) + y

        if img is not None:
            img = upsample2d(img, self.resample_filter)
        if self.torgb is not None:
            rgb = self.torgb(x, ws[-1], fused_modconv=fused_modconv)
            rgb = rgb.to(dtype=self.torgb.weight.dtype, memory_format=torch.contiguous_format)
            img = rgb if img is None else img + rgb
        return x, img


class SynthesisLayer(nn.Module):
    """Modulated convolution with noise, bias and activation. [N, I, R / up, R / up] -> [N, O, R, R]"""

    def __init__(self, in_channels: int, out_channels: int, w_dim: int, resolution: int, kernel_size: int = 3,
                 up: int = 1, use_noise: bool = True, activation: str = "lrelu",
                 resample_filter: Sequence[float] = DEFAULT_FILTER, conv_clamp: float | None = None,
                 channels_last: bool = False):
        super().__init__()
        self.resolution = resolution
        self.use_noise = use_noise
        self.activation = activation
        self.act_gain = activation_named(activation).gain
        self.conv_clamp = conv_clamp
        self.convolution = dict(up=up, padding=kernel_size // 2, flip_weight=up == 1)
        self.register_buffer("resample_filter", setup_filter(resample_filter))
        self.affine = FullyConnectedLayer(w_dim, in_channels, bias_init=1)
        weight = torch.randn(out_channels, in_channels, kernel_size, kernel_size)
        self.weight = nn.Parameter(weight.to(memory_format=memory_format(channels_last)))
        if use_noise:
            self.register_buffer("noise_const", torch.randn(resolution, resolution))
            self.noise_strength = nn.Parameter(torch.zeros([]))
        self.bias = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x: Tensor, w: Tensor, noise_mode: str = "random", fused_modconv: bool | None = None,
                gain: float = 1, generator: torch.Generator | None = None) -> Tensor:
        if fused_modconv is None:
            fused_modconv = choose_fused_modconv(x, self.weight, self.convolution["up"], self.training)
        x = modulated_conv2d(x, self.weight, self.affine(w), noise=self._noise(len(x), noise_mode, generator),
                             resample_filter=self.resample_filter, fused_modconv=fused_modconv, **self.convolution)
        clamp = None if self.conv_clamp is None else self.conv_clamp * gain
        return bias_act(x, self.bias.to(x.dtype), act=self.activation, gain=self.act_gain * gain, clamp=clamp)

    def _noise(self, num: int, noise_mode: str, generator: torch.Generator | None) -> Tensor | None:
        if not self.use_noise or noise_mode == "none":
            return None
        if noise_mode == "const":
            return self.noise_const * self.noise_strength
        drawn = torch.randn(num, 1, self.resolution, self.resolution, generator=generator,
                            dtype=self.noise_const.dtype, device=self.noise_const.device)
        return drawn * self.noise_strength


class ToRGBLayer(nn.Module):
    """Modulated convolution to image channels, without demodulation or noise. [N, I, R, R] -> [N, C, R, R]"""

    def __init__(self, in_channels: int, out_channels: int, w_dim: int, kernel_size: int = 1,
                 conv_clamp: float | None = None, channels_last: bool = False):
        super().__init__()
        self.conv_clamp = conv_clamp
        self.padding = kernel_size // 2
        self.affine = FullyConnectedLayer(w_dim, in_channels, bias_init=1)
        weight = torch.randn(out_channels, in_channels, kernel_size, kernel_size)
        self.weight = nn.Parameter(weight.to(memory_format=memory_format(channels_last)))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.style_gain = 1 / math.sqrt(in_channels * kernel_size**2)

    def forward(self, x: Tensor, w: Tensor, fused_modconv: bool | None = None) -> Tensor:
        if fused_modconv is None:
            fused_modconv = choose_fused_modconv(x, self.weight, training=self.training)
        styles = self.affine(w, gain=self.style_gain)
        x = modulated_conv2d(x, self.weight, styles, padding=self.padding, demodulate=False,
                             fused_modconv=fused_modconv)
        return bias_act(x, self.bias.to(x.dtype), clamp=self.conv_clamp)


def check_image_format(prefix: str, img_resolution: int, img_channels: int, architecture: str,
                       channel_base: int) -> None:
    """Raise ValueError unless a network of this architecture can generate or classify such images.

    prefix: put before the argument's name in messages, such as "generator: "
    """
    if not is_resolution(img_resolution):
        raise ValueError(f"{prefix}img_resolution is {img_resolution}; expected {RESOLUTIONS}")
    if img_channels < 1:
        raise ValueError(f"{prefix}img_channels is {img_channels}; expected at least 1")
    if channel_base < img_resolution:
        raise ValueError(f"{prefix}channel_base is {channel_base}; expected at least img_resolution, "
                         f"{img_resolution}, so that each layer has a channel")
    if architecture not in ARCHITECTURES:
        raise ValueError(f"{prefix}architecture is {architecture!r}; expected one of {', '.join(ARCHITECTURES)}")


def resolutions_up_to(img_resolution: int) -> list[int]:
    """Return [4, 8, ..., img_resolution]."""
    return [2**i for i in range(2, img_resolution.bit_length())]
