"""Networks whose high resolutions compute in half precision."""

import pytest
import torch

from tests.helpers.small_networks import random_labels, small_discriminator, small_generator
from training.layers import half_dtype_at

# Each layer rounds its activations by half an epsilon of the format at most. Some eight layers in sequence, rounded
# independently, give about one epsilon of the whole; three leave room for other orders of summation.
BOUNDS = {name: 3 * torch.finfo(getattr(torch, name)).eps for name in ("float16", "bfloat16")}


def relative_error(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("half_dtype", BOUNDS)
@pytest.mark.parametrize("architecture", ["orig", "skip", "resnet"])
@pytest.mark.parametrize("training", [False, True])
def test_generator_images_stay_near_float32(half_dtype, architecture, training):
    G = small_generator(32, num_fp16_res=3, conv_clamp=256, half_dtype=half_dtype, architecture=architecture)
    G.train(training)
    ws = G.mapping(torch.randn(4, 8, generator=torch.Generator().manual_seed(2)), random_labels(4))
    img = G.synthesis(ws, noise_mode="const")
    full = G.synthesis(ws, noise_mode="const", force_fp32=True)
    assert img.dtype == full.dtype == torch.float32
    error = relative_error(img, full)
    assert 0 < error < BOUNDS[half_dtype]


@pytest.mark.parametrize("half_dtype", BOUNDS)
@pytest.mark.parametrize("architecture", ["orig", "skip", "resnet"])
def test_discriminator_logits_stay_near_float32(half_dtype, architecture):
    D = small_discriminator(32, num_fp16_res=3, conv_clamp=256, half_dtype=half_dtype, architecture=architecture)
    img = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    logits, full = D(img, random_labels(4)), D(img, random_labels(4), force_fp32=True)
    assert logits.dtype == torch.float32
    assert 0 < relative_error(logits, full) < 2 * BOUNDS[half_dtype]  # logits are a difference of larger terms


@pytest.mark.parametrize("half_dtype", BOUNDS)
def test_gradients_through_half_blocks_stay_near_float32(half_dtype):
    # A smooth activation: lrelu's slope jumps where rounding changes a sign, which is up to the numbers.
    smooth = {"activation": "swish"}
    G = small_generator(32, num_fp16_res=3, conv_clamp=256, half_dtype=half_dtype, **smooth)
    D = small_discriminator(32, num_fp16_res=3, conv_clamp=256, half_dtype=half_dtype, block_kwargs=smooth,
                            epilogue_kwargs=smooth)
    z, c = torch.randn(4, 8, generator=torch.Generator().manual_seed(2)), random_labels(4)

    def gradients(force_fp32):
        logits = D(G(z, c, noise_mode="const", force_fp32=force_fp32), c, force_fp32=force_fp32)
        gradients = torch.autograd.grad(torch.nn.functional.softplus(-logits).mean(), list(G.parameters()))
        return torch.cat([gradient.flatten() for gradient in gradients])

    assert 0 < relative_error(gradients(False), gradients(True)) < BOUNDS[half_dtype]


def test_blocks_in_half_are_the_highest_resolutions():
    G = small_generator(64, num_fp16_res=2, conv_clamp=256)
    dtypes = {}
    for res in G.synthesis.block_resolutions:
        getattr(G.synthesis, f"b{res}").conv1.register_forward_hook(
            lambda module, args, output, res=res: dtypes.__setitem__(res, output.dtype))
    G.synthesis(torch.randn(2, G.num_ws, G.w_dim))
    assert dtypes == {4: torch.float32, 8: torch.float32, 16: torch.float32, 32: torch.float16, 64: torch.float16}


@pytest.mark.parametrize(("resolution", "img_resolution", "num", "is_half"), [
    (256, 256, 1, True), (128, 256, 1, False), (32, 256, 4, True), (16, 256, 4, False), (8, 32, 4, True),
    (4, 32, 4, False), (4, 8, 9, False), (256, 256, 0, False)])
def test_half_dtype_at_counts_from_the_top_and_never_below_8(resolution, img_resolution, num, is_half):
    found = half_dtype_at(resolution, img_resolution, num, "float16")
    assert found == (torch.float16 if is_half else None)


def test_epilogue_and_mapping_stay_in_float32():
    D = small_discriminator(8, num_fp16_res=4)
    seen = []
    D.b4.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    D.b4.conv.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    D(torch.randn(2, 3, 8, 8), random_labels(2))
    assert seen == [torch.float16, torch.float32]


@pytest.mark.parametrize("num_fp16_res", [0, 3])
def test_conv_clamp_limits_every_layer_of_every_block(num_fp16_res):
    # Weights of ToRGB and biases made large, so that the clamp is reached in float32 and half blocks alike.
    clamp, gain = 0.5, 2**0.5
    G = small_generator(16, num_fp16_res=num_fp16_res, conv_clamp=clamp)
    largest = {}
    for name, module in G.synthesis.named_modules():
        if name.endswith(("conv0", "conv1", "torgb")):
            with torch.no_grad():
                module.bias.fill_(3.0)
            module.register_forward_hook(lambda module, args, output, name=name: largest.__setitem__(
                name, output.abs().max().item()))
    G.synthesis(torch.randn(2, G.num_ws, G.w_dim), force_fp32=num_fp16_res == 0)
    assert set(largest.values()) == {clamp}, largest
    assert gain * 3.0 > clamp  # what conv1 would give without the clamp
    assert len(largest) == 8


def test_conv_clamp_is_scaled_by_the_gain_and_spares_the_bypass():
    D = small_discriminator(16, conv_clamp=0.5, num_fp16_res=1)
    largest = {}
    for name in ("fromrgb", "conv0", "conv1", "skip"):
        layer = getattr(D.b16, name)
        with torch.no_grad():
            layer.weight.mul_(50)
        layer.register_forward_hook(lambda module, args, output, name=name: largest.__setitem__(
            name, output.abs().max().item()))
    D(torch.randn(4, 3, 16, 16) * 3, random_labels(4))
    assert largest["fromrgb"] == largest["conv0"] == 0.5
    assert largest["conv1"] == pytest.approx(0.5**1.5, rel=1e-3)
    assert largest["skip"] > 0.5


@pytest.mark.parametrize("large", [1.0, 1e4])
def test_prenormalisation_keeps_large_weights_finite_in_float16(large):
    # 1e4 times unit weights and styles overflow float16 (65504) in the first product without the normalisation.
    G = small_generator(16, num_fp16_res=2, conv_clamp=256)
    with torch.no_grad():
        for name, module in G.synthesis.named_modules():
            if name.startswith(("b8", "b16")) and name.endswith(("conv0", "conv1")):
                module.weight.mul_(large)
                module.affine.weight.mul_(large)
                module.affine.bias.mul_(large)
    ws = torch.randn(4, G.num_ws, G.w_dim, generator=torch.Generator().manual_seed(5))
    img, full = G.synthesis(ws, noise_mode="const"), G.synthesis(ws, noise_mode="const", force_fp32=True)
    assert torch.isfinite(img).all()
    assert relative_error(img, full) < BOUNDS["float16"]


def test_channels_last_changes_the_layout_and_not_the_result():
    plain = small_generator(16, num_fp16_res=2, conv_clamp=256).eval()
    last = small_generator(16, num_fp16_res=2, conv_clamp=256, fp16_channels_last=True).eval()
    last.load_state_dict(plain.state_dict())
    layouts = []
    last.synthesis.b16.conv1.register_forward_hook(
        lambda module, args, output: layouts.append(output.is_contiguous(memory_format=torch.channels_last)))
    ws = torch.randn(2, plain.num_ws, plain.w_dim)
    img = last.synthesis(ws, noise_mode="const")
    assert relative_error(img, plain.synthesis(ws, noise_mode="const")) < BOUNDS["float16"]
    assert layouts == [True]
    assert img.is_contiguous()
