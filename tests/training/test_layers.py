"""Modulated convolution, layers with equalized learning rate, and minibatch standard deviation."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from tests.helpers.op_cases import (
    COMPARED,
    HALF_DTYPES,
    MODULATED_CONV2D_CASES,
    assert_equals_reference,
    ids,
    unit_roundoff,
)
from torch_utils.ops.bias_act_ref import ACTIVATIONS
from torch_utils.ops.conv2d_resample import conv2d_resample
from torch_utils.ops.upfirdn2d import setup_filter
from training.layers import (
    Conv2dLayer,
    FullyConnectedLayer,
    MinibatchStdLayer,
    choose_fused_modconv,
    memory_format,
    modulated_conv2d,
    normalize_second_moment,
)

PAIRS = [pytest.param(*MODULATED_CONV2D_CASES[i:i + 2], id=MODULATED_CONV2D_CASES[i].name.removesuffix("_fused"))
         for i in range(0, len(MODULATED_CONV2D_CASES), 2)]


def randn(*shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(dtype)


# Modulated convolution


@pytest.mark.parametrize(("impl", "device"), COMPARED)
@pytest.mark.parametrize("case", **ids(MODULATED_CONV2D_CASES))
def test_modulated_conv2d_every_implementation_equals_reference(case, impl, device):
    assert_equals_reference(case, impl, device)


@pytest.mark.parametrize("case", **ids(MODULATED_CONV2D_CASES))
def test_modulated_conv2d_derivatives_pass_numerical_checks(case):
    assert gradcheck(case.run, case.inputs(), fast_mode=True)
    assert gradgradcheck(case.run, case.inputs(), fast_mode=True)


@pytest.mark.parametrize(("fused", "scaled"), PAIRS)
def test_modulated_conv2d_fused_equals_scaled_activations(fused, scaled):
    inputs = fused.inputs()
    found, expected = fused.run(*inputs), scaled.run(*inputs)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)  # two orders of a hundred products near 10
    weights = randn(*found.shape)
    gradients = [torch.autograd.grad((y.sin() * weights).sum(), inputs) for y in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-11)


@pytest.mark.parametrize("demodulate", [True, False])
@pytest.mark.parametrize("resampling", [{}, {"up": 2}, {"down": 2}], ids=str)
@pytest.mark.parametrize("num", [1, 2, 3, 4])
@pytest.mark.parametrize(("num_out", "size"), [(8, 4), (3, 12)])
def test_modulated_conv2d_chosen_form_equals_either_form(num_out, size, num, resampling, demodulate):
    x, weight, styles = randn(num, 5, size, size), randn(num_out, 5, 3, 3), randn(num, 5)
    options = dict(padding=1, resample_filter=setup_filter([1, 3, 3, 1]), demodulate=demodulate, **resampling)
    chosen = choose_fused_modconv(x, weight, resampling.get("up", 1))
    assert chosen == (size == 12 and "up" not in resampling)  # 3 * 9 <= 12 * 12, 8 * 9 > 4 * 4
    found, per_image, shared = (modulated_conv2d(x, weight, styles, fused_modconv=fused, **options)
                                for fused in (chosen, True, False))
    torch.testing.assert_close(found, per_image, rtol=0, atol=1e-10)
    torch.testing.assert_close(found, shared, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("device", "num", "size", "dtype", "options", "expected"), [
    ("cpu", 1, 5, torch.float32, {}, False),  # 4 * 9 numbers a channel of a kernel, 25 of the activations
    ("cpu", 16, 5, torch.float32, {}, False),
    ("cpu", 1, 6, torch.float32, {}, True),  # as many
    ("cpu", 16, 6, torch.float32, {}, True),
    ("cpu", 16, 6, torch.float64, {}, True),
    ("cpu", 1, 64, torch.float32, {"up": 2}, False),
    ("cpu", 16, 64, torch.float32, {"up": 2}, False),
    ("cpu", 2, 64, torch.float32, {"training": True}, False),
    ("cpu", 1, 64, torch.bfloat16, {}, True),
    ("cpu", 2, 64, torch.bfloat16, {}, False),
    ("meta", 1, 4, torch.float32, {"up": 2}, True),  # as on a GPU: for any shape
    ("meta", 16, 4, torch.float32, {}, True),
    ("meta", 1, 4, torch.float16, {}, True),
    ("meta", 2, 64, torch.float16, {}, False),
    ("meta", 2, 64, torch.float32, {"training": True}, False),
])
def test_modulated_conv2d_form_follows_device_shape_and_dtype(device, num, size, dtype, options, expected):
    x, weight = torch.empty(num, 3, size, size, dtype=dtype, device=device), torch.empty(4, 3, 3, 3, device=device)
    assert choose_fused_modconv(x, weight, **options) == expected


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("demodulate", [True, False])
def test_modulated_conv2d_equals_formula(fused, demodulate):
    x, weight, styles, noise = randn(2, 3, 4, 5), randn(4, 3, 3, 3), randn(2, 3), randn(2, 1, 4, 5)
    found = modulated_conv2d(x, weight, styles, noise, padding=1, demodulate=demodulate, fused_modconv=fused)
    for n in range(2):
        for o in range(4):
            kernel = torch.stack([weight[o, i] * styles[n, i] for i in range(3)])
            if demodulate:
                kernel = kernel / math.sqrt(sum(v * v for v in kernel.flatten().tolist()) + 1e-8)
            expected = F.conv2d(x[n:n + 1], kernel[None], padding=1)[0, 0] + noise[n, 0]
            torch.testing.assert_close(found[n, o], expected, rtol=0, atol=1e-13)  # 27 products below 10


@pytest.mark.parametrize("fused", [True, False])
def test_modulated_conv2d_demodulated_kernel_has_unit_energy(fused):
    # One impulse per input channel shows the kernel: its squares add up to the variance that unit inputs get.
    num_channels = 5
    x = torch.zeros(num_channels, num_channels, 5, 5, dtype=torch.float64)
    x[range(num_channels), range(num_channels), 2, 2] = 1
    styles = 30 * randn(1, num_channels).expand(num_channels, -1)
    y = modulated_conv2d(x, randn(4, num_channels, 3, 3), styles, padding=1, fused_modconv=fused)
    torch.testing.assert_close(y.square().sum(dim=[0, 2, 3]), torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-9)


def test_modulated_conv2d_demodulated_normal_inputs_keep_unit_variance():
    x = randn(2, 16, 64, 64)
    y = modulated_conv2d(x, 7 * randn(8, 16, 3, 3), 0.1 * randn(2, 16))
    # 3844 pixels, correlated over 3x3: about 430 independent values, whose variance scatters by sqrt(2 / 430) = 7 %.
    assert (y.var(dim=[2, 3]) - 1).abs().max() < 4 * 0.07
    assert abs(y.var() - 1) < 0.07  # 16 times as many


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("factor", [1e-3, 1e3, -1.0])
def test_modulated_conv2d_demodulated_result_ignores_scale_of_styles(fused, factor):
    x, weight, styles = randn(2, 3, 4, 4), randn(4, 3, 3, 3), randn(2, 3)
    options = dict(padding=1, fused_modconv=fused)
    found = modulated_conv2d(x, weight, styles * factor, **options)
    expected = math.copysign(1, factor) * modulated_conv2d(x, weight, styles, **options)
    # What is left is the 1e-8 beside the energy.
    energy = kernel_energy(weight, styles)[:, :, None, None]
    left = ((energy + 1e-8) / (energy + 1e-8 / factor**2)).sqrt()
    assert (left - 1).abs().max() < 2e-3
    torch.testing.assert_close(found, expected * left, rtol=0, atol=1e-12)  # roundings of 27 products below 10


@pytest.mark.parametrize("fused", [True, False])
def test_modulated_conv2d_not_demodulated_result_is_linear_in_styles(fused):
    x, weight, styles = randn(2, 3, 4, 4), randn(4, 3, 3, 3), randn(2, 3)
    options = dict(padding=1, fused_modconv=fused, demodulate=False)
    expected = 1e3 * modulated_conv2d(x, weight, styles, **options)
    found = modulated_conv2d(x, weight, 1e3 * styles, **options)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)  # 27 products below 1e4


@pytest.mark.parametrize("fused", [True, False])
def test_modulated_conv2d_noise_is_added_after_demodulation(fused):
    x, weight, styles, noise = randn(2, 3, 4, 4), randn(4, 3, 3, 3), randn(2, 3), 100 * randn(2, 1, 4, 4)
    options = dict(padding=1, fused_modconv=fused)
    difference = modulated_conv2d(x, weight, styles, noise, **options) - modulated_conv2d(x, weight, styles, **options)
    torch.testing.assert_close(difference, noise.expand(2, 4, 4, 4), rtol=0, atol=1e-12)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("options", "size"), [(dict(up=2), 16), (dict(down=2), 4)])
def test_modulated_conv2d_resampling_changes_the_size(options, size, fused):
    y = modulated_conv2d(randn(2, 3, 8, 8), randn(4, 3, 3, 3), randn(2, 3), padding=1, fused_modconv=fused,
                         resample_filter=setup_filter([1, 3, 3, 1]), **options)
    assert y.shape == (2, 4, size, size)


# Half precision


def kernel_energy(weight, styles):
    """Return [N, O], the squares of the modulated kernels summed."""
    return (weight[None] * styles[:, None, :, None, None]).square().sum(dim=[2, 3, 4])


def exact_with_bound(x, weight, styles, dtype):
    """Return the demodulated 3x3 convolution with padding 1 in float64, and how far half precision may be from it.

    The sum has n = I * kh * kw products. The weight, the style, their products with x, each addition, the demodulation
    factor and the last product are rounded, which makes ((1 + u)^(n + 8) - 1) of the sum of magnitudes, for any
    accumulation dtype. Tamed weights are at most 1: those below the normal range lose half a step of it, together less
    than one smallest normal number here. The 1e-8 beside the energy is left out: it weighs 1e-8 of a tamed energy of
    more than 0.005, so less than 2e-6 of the result.
    """
    x, weight, styles = x.double(), weight.double(), styles.double()
    scale = kernel_energy(weight, styles).rsqrt()[:, :, None, None]
    exact = F.conv2d(x * styles[:, :, None, None], weight, padding=1) * scale
    magnitudes = F.conv2d(x.abs() * styles.abs()[:, :, None, None], weight.abs(), padding=1) * scale
    relative = (1 + unit_roundoff(dtype)) ** (weight[0].numel() + 8) - 1
    return exact, relative * magnitudes + 2e-6 * exact.abs() + torch.finfo(dtype).smallest_normal


@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("weight_size", "style_size"), [(1, 1), (300, 80), (1e4, 1e4), (1e-4, 1)])
def test_modulated_conv2d_half_precision_stays_near_float64(weight_size, style_size, fused, dtype):
    x = randn(2, 4, 6, 6, dtype=dtype)
    weight, styles = weight_size * randn(3, 4, 3, 3, dtype=torch.float32), style_size * randn(2, 4, dtype=torch.float32)
    found = modulated_conv2d(x, weight, styles, padding=1, fused_modconv=fused)
    exact, bound = exact_with_bound(x, weight, styles, dtype)
    assert found.dtype == dtype
    assert ((found.double() - exact).abs() <= bound).all()


def test_modulated_conv2d_large_weights_and_styles_do_not_overflow_float16():
    num_channels = 64
    x = randn(2, num_channels, 4, 4, dtype=torch.float16)
    weight = 300 * randn(3, num_channels, 3, 3, dtype=torch.float32)
    styles = 50 * randn(2, num_channels, dtype=torch.float32)

    untamed = F.conv2d(x * styles.half()[:, :, None, None], weight.half(), padding=1)
    assert not untamed.isfinite().all()  # what scaling activations as they are leads to, whatever follows

    exact, bound = exact_with_bound(x, weight, styles, torch.float16)
    float64 = modulated_conv2d(x.double(), weight.double(), styles.double(), padding=1)
    torch.testing.assert_close(float64, exact, rtol=0, atol=1e-12)  # 1e-8 is nothing beside these energies
    for fused in (True, False):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_(), styles.clone().requires_grad_()
        found = modulated_conv2d(*leaves, padding=1, fused_modconv=fused)
        assert ((found.double() - float64).abs() <= bound).all()
        for gradient in torch.autograd.grad(found.sum(), leaves):
            assert gradient.isfinite().all()


def test_modulated_conv2d_float16_intermediate_sums_stay_below_the_largest_number():
    # The worst case: every weight, style and sign agrees. Tamed, a sum of n products is at most sqrt(n) |x|.
    num_channels = 512
    x = torch.full((1, num_channels, 3, 3), 256.0, dtype=torch.float16)  # activations are clamped to 256
    y = modulated_conv2d(x, torch.full((1, num_channels, 3, 3), 4e4), torch.full((1, num_channels), 4e4),
                         fused_modconv=False)
    expected = 256 * math.sqrt(num_channels * 9)
    assert expected < torch.finfo(torch.float16).max
    assert abs(y.item() / expected - 1) < 5 * unit_roundoff(torch.float16)  # equal terms: roundings of five factors


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_modulated_conv2d_without_demodulation_half_precision_keeps_the_scale(dtype):
    x, weight, styles = (torch.full(shape, 3.0) for shape in ((1, 2, 2, 2), (1, 2, 1, 1), (1, 2)))
    for fused in (True, False):
        y = modulated_conv2d(x.to(dtype), weight, styles, demodulate=False, fused_modconv=fused)
        assert torch.equal(y, torch.full((1, 1, 2, 2), 54.0, dtype=dtype))


# Fully connected


@pytest.mark.parametrize("act", ["linear", "lrelu"])
@pytest.mark.parametrize("lr_multiplier", [1, 0.01])
def test_fully_connected_layer_equals_formula(act, lr_multiplier):
    layer = FullyConnectedLayer(5, 3, activation=act, lr_multiplier=lr_multiplier, bias_init=2).double()
    x = randn(4, 5)
    linear = F.linear(x, layer.weight * (lr_multiplier / math.sqrt(5))) + 2 * lr_multiplier
    expected = linear if act == "linear" else math.sqrt(2) * torch.where(linear > 0, linear, 0.2 * linear)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-14)
    assert layer.bias.tolist() == [2.0] * 3


def test_fully_connected_layer_without_bias_maps_zero_to_zero():
    layer = FullyConnectedLayer(5, 3, bias=False)
    assert layer.bias is None
    assert [name for name, _ in layer.named_parameters()] == ["weight"]
    assert layer(torch.zeros(2, 5)).tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize("lr_multiplier", [1, 0.01])
def test_fully_connected_layer_starts_with_equal_scale_at_every_lr_multiplier(lr_multiplier):
    torch.manual_seed(0)
    layer = FullyConnectedLayer(100, 200, lr_multiplier=lr_multiplier)
    # Stored weights have deviation 1 / lr_multiplier; 20,000 draws know theirs to 0.5 %.
    assert abs(layer.weight.std().item() * lr_multiplier - 1) < 0.02
    assert abs((layer.weight * layer.weight_gain).std().item() * 10 - 1) < 0.02


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_layers_result_has_the_inputs_dtype(dtype):
    assert FullyConnectedLayer(4, 3)(torch.ones(2, 4, dtype=dtype)).dtype == dtype
    assert Conv2dLayer(4, 3, 3, up=2)(torch.ones(2, 4, 5, 5, dtype=dtype)).dtype == dtype


# Convolution layer


@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("act", ["linear", "lrelu", "swish"])
def test_conv2d_layer_equals_formula(act, kernel_size):
    layer = Conv2dLayer(3, 4, kernel_size, activation=act).double()
    torch.nn.init.normal_(layer.bias)
    x = randn(2, 3, 5, 6)
    weight = layer.weight / math.sqrt(3 * kernel_size**2)
    linear = F.conv2d(x, weight, layer.bias, padding=kernel_size // 2)
    functions = {"linear": lambda v: v, "lrelu": lambda v: F.leaky_relu(v, 0.2), "swish": F.silu}
    for gain in (1, 0.5):
        expected = functions[act](linear) * ACTIVATIONS[act].gain * gain
        torch.testing.assert_close(layer(x, gain=gain), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("options", "shape"), [(dict(up=2), (10, 12)), (dict(down=2), (2, 3))])
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_conv2d_layer_resamples_as_the_op_does(kernel_size, options, shape):
    layer = Conv2dLayer(3, 4, kernel_size, resample_filter=[1, 2, 4, 1], **options).double()
    x = randn(2, 3, 5 if "up" in options else 4, 6)
    expected = conv2d_resample(x, layer.weight / math.sqrt(3 * kernel_size**2), setup_filter([1, 2, 4, 1]).double(),
                               padding=kernel_size // 2, flip_weight="up" not in options, impl="ref", **options)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-13)
    assert expected.shape == (2, 4, *shape)


@pytest.mark.parametrize("gain", [1, 0.5, 2])
def test_conv2d_layer_clamp_is_multiplied_by_gain(gain):
    layer = Conv2dLayer(1, 1, 1, activation="lrelu", conv_clamp=3)
    x = torch.tensor([-1e3, 1e3]).reshape(1, 1, 1, 2)
    torch.nn.init.ones_(layer.weight)
    assert layer(x, gain=gain).flatten().tolist() == [-3 * gain, 3 * gain]
    layer.conv_clamp = None
    assert layer(x, gain=gain).abs().max() > 1e2


@pytest.mark.parametrize("bias", [True, False])
def test_conv2d_layer_not_trainable_has_buffers_only(bias):
    frozen, free = (Conv2dLayer(3, 4, 3, bias=bias, trainable=trainable) for trainable in (False, True))
    assert dict(frozen.named_parameters()) == {}
    names = {"weight", "bias"} if bias else {"weight"}
    assert {name for name, _ in frozen.named_buffers()} == names | {"resample_filter"}
    assert {name for name, _ in free.named_parameters()} == names
    assert [name for name, _ in free.named_buffers()] == ["resample_filter"]
    assert (frozen.bias is None) == (free.bias is None) == (not bias)
    frozen.load_state_dict(free.state_dict())  # strict: one file serves both
    x = randn(1, 3, 4, 4, dtype=torch.float32)
    assert torch.equal(frozen(x), free(x))


def test_conv2d_layer_channels_last_changes_the_layout_only():
    plain, last = Conv2dLayer(3, 4, 3), Conv2dLayer(3, 4, 3, channels_last=True)
    assert last.weight.is_contiguous(memory_format=torch.channels_last)
    assert plain.weight.is_contiguous()
    last.load_state_dict(plain.state_dict())
    x = randn(2, 3, 5, 5, dtype=torch.float32)
    # float32 sums of 27 products near 1 in another order.
    torch.testing.assert_close(last(x.contiguous(memory_format=torch.channels_last)), plain(x), rtol=0, atol=5e-6)
    assert memory_format(True) == torch.channels_last
    assert memory_format(False) == torch.contiguous_format


# Statistics


def test_normalize_second_moment_brings_mean_square_to_one():
    x = 1e3 * randn(3, 5)
    torch.testing.assert_close(normalize_second_moment(x).square().mean(dim=1), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(normalize_second_moment(x, dim=0).square().mean(dim=0),
                               torch.ones(5, dtype=torch.float64))
    assert normalize_second_moment(torch.zeros(2, 3)).tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize(("num", "group_size", "num_channels"),
                         [(6, 3, 1), (6, 2, 2), (4, 4, 1), (3, 8, 2), (2, None, 1), (4, 1, 1)])
def test_minibatch_std_layer_equals_formula(num, group_size, num_channels):
    x = randn(num, 4, 3, 2)
    y = MinibatchStdLayer(group_size, num_channels)(x)
    assert y.shape == (num, 4 + num_channels, 3, 2)
    assert torch.equal(y[:, :4], x)
    num_groups = num // min(group_size or num, num)
    for n in range(num):
        group = [m for m in range(num) if m % num_groups == n % num_groups]
        for f in range(num_channels):
            width = 4 // num_channels
            values = x[group][:, f * width:(f + 1) * width]
            variance = (values - values.mean(dim=0)).square().mean(dim=0)
            expected = (variance + 1e-8).sqrt().mean()
            torch.testing.assert_close(y[n, 4 + f], expected.expand(3, 2), rtol=0, atol=1e-14)


def test_minibatch_std_layer_group_of_equal_images_stays_near_zero_with_finite_gradient():
    x = randn(1, 4, 3, 3).expand(4, -1, -1, -1).clone().requires_grad_()
    y = MinibatchStdLayer(4)(x)[:, 4]
    torch.testing.assert_close(y, torch.full_like(y, 1e-4))  # the root of 1e-8
    assert torch.autograd.grad(y.sum(), x)[0].abs().max() < 1e-6


def test_minibatch_std_layer_derivatives_pass_numerical_checks():
    x = randn(4, 2, 2, 2).requires_grad_()
    layer = MinibatchStdLayer(2, 2)
    assert gradcheck(layer, x)
    assert gradgradcheck(layer, x, fast_mode=True)


@pytest.mark.parametrize(("num", "group_size"), [(6, 4), (5, 2), (9, 8)])
def test_minibatch_std_layer_group_that_does_not_divide_the_batch_raises(num, group_size):
    message = (f"minibatch standard deviation: the batch has {num} images; expected at most the group size, "
               f"{group_size}, or a multiple of it")
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        MinibatchStdLayer(group_size)(torch.zeros(num, 2, 2, 2))


@pytest.mark.parametrize("what", ["weight", "styles"])
def test_modulated_conv2d_of_zeros_in_half_precision_is_zero(what):
    x, weight, styles = torch.ones(2, 3, 4, 4).half(), torch.ones(5, 3, 3, 3), torch.ones(2, 3)
    {"weight": weight, "styles": styles}[what][0] = 0
    y = modulated_conv2d(x, weight, styles, padding=1, fused_modconv=False)
    assert torch.isfinite(y).all()
    assert (y[:, 0] if what == "weight" else y[0]).abs().max() == 0


@pytest.mark.parametrize("fused", [False, True])
def test_modulated_conv2d_of_no_images_gives_none(fused):
    y = modulated_conv2d(torch.zeros(0, 3, 4, 4), torch.ones(5, 3, 3, 3), torch.ones(0, 3), padding=1,
                         fused_modconv=fused)
    assert y.shape == (0, 5, 4, 4)


def test_minibatch_std_channels_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"^minibatch standard deviation: the input has 6 channels; expected a "
                                         r"multiple of num_channels, 4$"):
        MinibatchStdLayer(4, num_channels=4)(torch.zeros(4, 6, 4, 4))


def test_conv2d_layer_unknown_activation_is_refused():
    with pytest.raises(ValueError, match=r"^bias_act: act is 'foo'; expected one of linear, relu"):
        Conv2dLayer(3, 3, 3, activation="foo")
