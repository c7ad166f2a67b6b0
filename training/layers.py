"""Layers of the generator and the discriminator, and the precision in which they compute.

Equalized learning rate (ProGAN: Karras et al. 2018, "Progressive Growing of GANs", section 4.1): weights are drawn from
N(0, 1) and scaled by the constant 1 / sqrt(fan-in) in each pass; demodulation, where used, replaces this scale.

Legend: N batch, I O in/out channels, H W pixels, kh kw kernel, K w_dim. StyleGAN2: Karras et al. 2020,
"Analyzing and Improving the Image Quality of StyleGAN".
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from torch_utils.ops.bias_act import bias_act
from torch_utils.ops.bias_act_ref import activation_named
from torch_utils.ops.conv2d_resample import conv2d_resample
from torch_utils.ops.upfirdn2d import setup_filter

DEFAULT_FILTER = (1, 3, 3, 1)
HALF_DTYPES = ("float16", "bfloat16")


def modulated_conv2d(x: Tensor, weight: Tensor, styles: Tensor, noise: Tensor | None = None, up: int = 1,
                     down: int = 1, padding: int = 0, resample_filter: Tensor | None = None, demodulate: bool = True,
                     flip_weight: bool = True, fused_modconv: bool = True, impl: str = "auto") -> Tensor:
    """Convolve each image with the weights scaled by its own style (StyleGAN2, section 2.2, eq. 1 to 3).

    w' = s_i * w (eq. 1), and with demodulation w'' = w' / sqrt(sum w'^2 + eps), over I, kh and kw (eq. 3)

    x:       [N, I, H, W] float32, float64 or half
    weight:  [O, I, kh, kw];  styles: [N, I]
    noise:   broadcastable to the result, added after demodulation
    fused_modconv:  True builds one kernel per image and runs a grouped convolution; False scales the activations
                    before and after one shared convolution. Both are equal up to rounding; `choose_fused_modconv`
                    chooses between them

    Returns [N, O, H * up / down, W * up / down] of x's dtype.
    """
    if demodulate and _is_half(x):
        weight, styles = _shrink(weight, styles)
    scale = _demodulation(weight, styles) if demodulate else None  # [N, O]
    options = dict(f=resample_filter, up=up, down=down, padding=padding, flip_weight=flip_weight, impl=impl)

    if not fused_modconv or len(x) == 0:
        out = conv2d_resample(x * _per_channel(styles, x), weight.to(x.dtype), **options)
        if scale is not None and noise is not None:
            return torch.addcmul(noise.to(x.dtype), out, _per_channel(scale, x))  # one pass over memory
        if scale is not None:
            out = out * _per_channel(scale, x)
    else:
        num = x.shape[0]
        kernels = weight * styles[:, None, :, None, None]  # [N, O, I, kh, kw]
        if scale is not None:
            kernels = kernels * scale[:, :, None, None, None]
        one_image = x.reshape(1, -1, *x.shape[2:])  # [1, N * I, H, W]
        out = conv2d_resample(one_image, kernels.flatten(0, 1).to(x.dtype), groups=num, **options)
        out = out.unflatten(1, (num, -1)).squeeze(0)  # [N, O, H', W']
    return out if noise is None else out + noise.to(x.dtype)


def choose_fused_modconv(x: Tensor, weight: Tensor, up: int = 1, training: bool = False) -> bool:
    """Return whether to use one kernel per image (True) or one shared convolution (False) for these inputs.

    Arguments are those of `modulated_conv2d`.

    In training, gradients are cheaper with the shared kernel. In half precision with several images, per-image kernels
    could overflow. Otherwise a GPU uses one kernel per image, like NVIDIA's code. A CPU does so if the kernels of an
    image are no larger than its activations, since the cost of scaling grows with size, but never with upsampling, as
    PyTorch's grouped transposed convolutions are slow (docs/performance.md). On a CPU in float32 the choice does not
    depend on the batch size.
    """
    if training or (_is_half(x) and len(x) > 1):
        return False
    if x.device.type != "cpu":
        return True
    num_out, _num_in, *kernel_size = weight.shape
    return up == 1 and num_out * math.prod(kernel_size) <= math.prod(x.shape[2:])  # of each of the I channels


def _is_half(x: Tensor) -> bool:
    return x.dtype in (torch.float16, torch.bfloat16)


def _per_channel(factors: Tensor, x: Tensor) -> Tensor:
    """Reshape factors [N, C] to broadcast against activations like x. -> [N, C, 1, 1]"""
    return factors.to(x.dtype).reshape(*factors.shape, 1, 1)


def _demodulation(weight: Tensor, styles: Tensor) -> Tensor:
    """Return [N, O], 1 / sqrt(sum (s_i * w)^2 + eps): outputs of unit normal inputs get unit variance (eq. 3)."""
    return torch.rsqrt(styles.square() @ _KernelEnergy.apply(weight).T + 1e-8)


class _KernelEnergy(torch.autograd.Function):
    """Sum the squares of each kernel: [O, I, kh, kw] -> [O, I]

    PyTorch's own derivative of a square passes over all weights three times, this one once.
    """

    @staticmethod
    def forward(ctx, weight):
        ctx.save_for_backward(weight)
        return weight.square().sum(dim=(2, 3))

    @staticmethod
    def backward(ctx, grad):
        weight, = ctx.saved_tensors
        return weight * _per_channel(2 * grad, weight)


def _shrink(weight: Tensor, styles: Tensor) -> tuple[Tensor, Tensor]:
    """Scale down weights and styles by factors that demodulation cancels."""
    # This keeps sums of I * kh * kw products of activations and weights below float16's 65504.
    fan_in = weight[0].numel()
    tiny = torch.finfo(weight.dtype).tiny  # all zeros stay zeros
    largest_weight = weight.abs().amax(dim=[1, 2, 3], keepdim=True).clamp_min(tiny)
    largest_style = styles.abs().amax(dim=1, keepdim=True).clamp_min(tiny)
    return weight / largest_weight / math.sqrt(fan_in), styles / largest_style


class FullyConnectedLayer(nn.Module):
    """Apply act(x @ (w * gain).T + b * lr_multiplier) with gain = lr_multiplier / sqrt(in_features).

    [N, in_features] -> [N, out_features]. See the top for the equalized learning rate.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, activation: str = "linear",
                 lr_multiplier: float = 1, bias_init: float = 0):
        super().__init__()
        self.activation = activation
        self.lr_multiplier = lr_multiplier
        self.weight_gain = lr_multiplier / math.sqrt(in_features)
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / lr_multiplier)
        self.bias = nn.Parameter(torch.full((out_features,), float(bias_init))) if bias else None

    def forward(self, x: Tensor, gain: float = 1) -> Tensor:
        """gain: additional factor, for layers without activation"""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        y = _Linear.apply(x, self.weight.to(x.dtype), bias, self.weight_gain * gain, self.lr_multiplier * gain)
        return y if self.activation == "linear" else bias_act(y, act=self.activation)


class _Linear(torch.autograd.Function):
    """Compute weight_gain * x @ weight.T + bias_gain * bias. [N, I], [O, I], [O] or None -> [N, O]

    PyTorch's own derivative applies the gains to each gradient separately, with three times as many operators.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, weight_gain, bias_gain):
        ctx.save_for_backward(x, weight)
        ctx.gains = weight_gain, bias_gain
        if bias is None:
            return (x * weight_gain) @ weight.T
        return torch.addmm(bias, x, weight.T, alpha=weight_gain, beta=bias_gain)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        weight_gain, bias_gain = ctx.gains
        scaled, of_bias = grad * weight_gain, None
        if ctx.needs_input_grad[2]:
            of_bias = grad.sum(dim=0) if bias_gain == 1 else grad.sum(dim=0) * bias_gain
        return (scaled @ weight if ctx.needs_input_grad[0] else None,
                scaled.T @ x if ctx.needs_input_grad[1] else None, of_bias, None, None)


class Conv2dLayer(nn.Module):
    """Convolve with w / sqrt(I * kh * kw) and optional resampling, then bias and activation.

    [N, I, H, W] -> [N, O, H * up / down, W * up / down]. See the top for the equalized learning rate.

    trainable=False keeps the weights as buffers, which the optimizer does not see.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, bias: bool = True,
                 activation: str = "linear", up: int = 1, down: int = 1,
                 resample_filter: Sequence[float] = DEFAULT_FILTER, conv_clamp: float | None = None,
                 channels_last: bool = False, trainable: bool = True):
        super().__init__()
        self.activation = activation
        self.resampling = dict(up=up, down=down, padding=kernel_size // 2, flip_weight=up == 1)
        self.conv_clamp = conv_clamp
        self.act_gain = activation_named(activation).gain
        self.weight_gain = 1 / math.sqrt(in_channels * kernel_size**2)
        self.register_buffer("resample_filter", setup_filter(resample_filter))
        values = {"weight": torch.randn(out_channels, in_channels, kernel_size, kernel_size),
                  "bias": torch.zeros(out_channels) if bias else None}
        values["weight"] = values["weight"].to(memory_format=memory_format(channels_last))
        for name, value in values.items():
            if trainable:
                self.register_parameter(name, None if value is None else nn.Parameter(value))
            elif value is not None:
                self.register_buffer(name, value)
            else:
                setattr(self, name, None)

    def forward(self, x: Tensor, gain: float = 1) -> Tensor:
        weight = (self.weight * self.weight_gain).to(x.dtype)
        x = conv2d_resample(x, weight, self.resample_filter, **self.resampling)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        clamp = None if self.conv_clamp is None else self.conv_clamp * gain
        return bias_act(x, bias, act=self.activation, gain=self.act_gain * gain, clamp=clamp)


def normalize_second_moment(x: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    """Scale x so that the mean of its squares along `dim` is 1."""
    return x * torch.rsqrt(x.square().mean(dim=dim, keepdim=True) + eps)


class MinibatchStdLayer(nn.Module):
    """Append the standard deviation over a group of images, averaged over channels and pixels (ProGAN, section 3).

    [N, C, H, W] -> [N, C + num_channels, H, W]. Image n belongs to group n mod (N / G), with G = min(group_size, N),
    group_size None = the whole batch. Raises ValueError for a batch that `keeps_groups` does not allow.
    """

    def __init__(self, group_size: int | None, num_channels: int = 1):
        super().__init__()
        self.group_size = group_size
        self.num_channels = num_channels

    def forward(self, x: Tensor) -> Tensor:
        num, channels, height, width = x.shape
        members = max(num if self.group_size is None else min(self.group_size, num), 1)
        if channels % self.num_channels:
            raise ValueError(f"minibatch standard deviation: the input has {channels} channels; expected a multiple of "
                             f"num_channels, {self.num_channels}")
        if self.group_size is not None and not keeps_groups(num, self.group_size):
            raise ValueError(f"minibatch standard deviation: the batch has {num} images; expected at most the group "
                             f"size, {members}, or a multiple of it")
        grouped = x.reshape(members, num // members, self.num_channels, -1, height, width)
        spread = (grouped.var(dim=0, correction=0) + 1e-8).sqrt().mean(dim=[2, 3, 4])  # [N / G, num_channels]
        extra = spread.repeat(members, 1)[:, :, None, None].expand(-1, -1, height, width)
        return torch.cat([x, extra], dim=1)


def keeps_groups(num_images: int, group_size: int) -> bool:
    """Tell whether a pass is at most one minibatch standard deviation group, or whole groups."""
    return num_images <= group_size or num_images % group_size == 0


def half_dtype_at(resolution: int, img_resolution: int, num_fp16_res: int, half_dtype: str) -> torch.dtype | None:
    """Return the half-precision dtype of the block at `resolution`, or None if it computes in full precision.

    The `num_fp16_res` highest resolutions use half precision, but none below 8.
    Raises ValueError for an unknown dtype.
    """
    if half_dtype not in HALF_DTYPES:
        raise ValueError(f"half_dtype is {half_dtype!r}; expected one of {', '.join(HALF_DTYPES)}")
    lowest = max(2 * img_resolution >> num_fp16_res, 8)
    return getattr(torch, half_dtype) if resolution >= lowest else None


def compute_dtype(parameter: torch.Tensor, half: torch.dtype | None, force_fp32: bool) -> torch.dtype:
    """Return the dtype to compute in: `half` if it is given, not overridden, and the parameters are float32."""
    if half is None or force_fp32 or parameter.dtype != torch.float32:
        return parameter.dtype
    return half


def memory_format(channels_last: bool) -> torch.memory_format:
    """Return the memory format of activations; channels-last is fast on tensor cores."""
    return torch.channels_last if channels_last else torch.contiguous_format
