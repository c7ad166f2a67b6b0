"""Properties of the networks beyond the reference vectors, and high resolutions that compute in half precision."""

import copy
import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.small_networks import random_labels, small_discriminator, small_generator
from training.generator import ARCHITECTURES, Generator, MappingNetwork
from training.layers import half_dtype_at


def latents(count, G, seed=0):
    return torch.randn(count, G.z_dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("c_dim", [0, 2])
@pytest.mark.parametrize("channels", [1, 3])
def test_networks_of_every_kind_compute_and_learn(architecture, c_dim, channels):
    G = small_generator(channels=channels, c_dim=c_dim, architecture=architecture).double()
    D = small_discriminator(channels=channels, c_dim=c_dim, architecture=architecture).double()
    c = random_labels(4, 2)[:, :c_dim]
    img = G(latents(4, G), c)
    assert img.shape == (4, channels, 16, 16)
    logits = D(img, c)
    assert logits.shape == (4, 1)
    logits.sum().backward()
    for network in (G, D):
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


def test_generator_resnet_block_adds_bypass_and_halves_the_power():
    G = small_generator(architecture="resnet", c_dim=0).double().eval()
    block = G.synthesis.b8
    x, ws = torch.randn(2, 16, 4, 4, dtype=torch.float64), [torch.randn(2, 12, dtype=torch.float64)] * 3
    y, img = block(x, None, ws, noise_mode="none")
    main = block.conv1(block.conv0(x, ws[0], noise_mode="none"), ws[1], noise_mode="none")
    torch.testing.assert_close(y, (main + block.skip(x)) / 2**0.5)
    assert img is None


def test_generator_skip_image_is_sum_of_upsampled_torgbs():
    # With every ToRGB but the first silenced, the image is the 4x4 one upsampled: constant where that is constant.
    G = small_generator(c_dim=0).eval()
    with torch.no_grad():
        for res in (4, 8, 16):
            layer = getattr(G.synthesis, f"b{res}").torgb
            layer.weight.zero_()
            layer.bias.fill_(1 if res == 4 else 0)
    img = G(latents(1, G), None)
    torch.testing.assert_close(img[:, :, 6:10, 6:10], torch.ones(1, 3, 4, 4))


def test_generator_torgb_shares_w_with_next_conv0():
    G = small_generator(c_dim=0).eval()
    ws = torch.randn(1, G.num_ws, G.w_dim, requires_grad=True)
    captured = {}
    for name in ("b4.torgb", "b8.conv0", "b8.torgb", "b16.conv0", "b16.torgb"):
        block, layer = name.split(".")
        getattr(getattr(G.synthesis, block), layer).affine.register_forward_pre_hook(
            lambda module, args, name=name: captured.__setitem__(name, args[0]))
    G.synthesis(ws)
    index = {name: next(i for i in range(G.num_ws) if torch.equal(w, ws[:, i])) for name, w in captured.items()}
    assert index == {"b4.torgb": 1, "b8.conv0": 1, "b8.torgb": 3, "b16.conv0": 3, "b16.torgb": 5}


def test_synthesis_noise_modes_differ_as_named():
    G = small_generator(c_dim=0).eval()
    ws = G.mapping(latents(2, G), None)

    def images(mode, seed=None):
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return G.synthesis(ws, noise_mode=mode, generator=generator)

    assert torch.equal(images("const"), images("const"))
    assert torch.equal(images("random", 1), images("random", 1))
    assert not torch.allclose(images("random", 1), images("random", 2), atol=1e-3)
    assert not torch.allclose(images("const"), images("none"), atol=1e-3)
    torch.manual_seed(3)
    by_default_generator = images("random")
    torch.manual_seed(3)
    assert torch.equal(by_default_generator, images("random"))


def test_synthesis_random_noise_is_drawn_per_image():
    G = small_generator(c_dim=0).eval()
    ws = G.mapping(latents(1, G), None).repeat(2, 1, 1)
    first, second = G.synthesis(ws, noise_mode="random")
    assert not torch.allclose(first, second, atol=1e-3)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("num", [1, 3])
def test_generator_forms_of_the_modulated_convolutions_agree(num, architecture):
    G = small_generator(architecture=architecture).double()
    ws = G.mapping(latents(num, G), random_labels(num), skip_w_avg_update=True)
    trained = G.train().synthesis(ws, noise_mode="const")
    for fused in (None, True, False):
        torch.testing.assert_close(G.eval().synthesis(ws, noise_mode="const", fused_modconv=fused), trained)


class Convolutions(TorchDispatchMode):
    """Context manager that lists the groups of convolutions: the number of images if each has its own kernel."""

    def __init__(self):
        super().__init__()
        self.groups = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution.default and args[1].shape[1] > 1:  # filters take one channel each
            self.groups.append(args[-1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("num", [2, 5])
@pytest.mark.parametrize(("training", "fused", "own_kernels"), [
    (True, None, []), (False, False, []), (True, True, None), (False, True, None),
    # conv1 of 4x4 and 8x8 have kernels of 16 x 3 x 3 numbers a channel, that of 16x16 has 8 x 3 x 3; conv0 doubles
    (False, None, ["b4.torgb", "b8.torgb", "b16.conv1", "b16.torgb"])])
def test_generator_takes_a_kernel_per_image_as_asked_or_where_it_is_faster(training, fused, own_kernels, num):
    G = small_generator(c_dim=0).train(training)
    layers = [name for name, _module in G.synthesis.named_modules() if name.endswith(("conv0", "conv1", "torgb"))]
    with Convolutions() as seen:
        G.synthesis(torch.randn(num, G.num_ws, G.w_dim), fused_modconv=fused)
    found = dict(zip(layers, seen.groups, strict=True))
    assert found == {name: num if own_kernels is None or name in own_kernels else 1 for name in layers}


def test_generator_image_does_not_depend_on_its_batch():
    G = small_generator().double().eval()
    z, c = latents(5, G), random_labels(5)
    together = G(z, c, noise_mode="const")
    torch.testing.assert_close(together[3:4], G(z[3:4], c[3:4], noise_mode="const"))


def test_mapping_normalizes_latent_and_label():
    G = small_generator().double().eval()
    z, c = latents(2, G), random_labels(2)
    torch.testing.assert_close(G.mapping(z * 7, c), G.mapping(z, c), rtol=1e-6, atol=1e-7)
    assert not torch.allclose(G.mapping(z, c), G.mapping(z, c.flip(0)), atol=1e-3)


def test_mapping_accepts_float64_latents_for_float32_networks():
    G = small_generator().eval()
    assert G.mapping(latents(2, G), random_labels(2).double()).dtype == torch.float32


def test_mapping_truncation_moves_first_layers_towards_average():
    G = small_generator().eval()
    G.mapping.w_avg.normal_()
    z, c = latents(2, G), random_labels(2)
    full, half = G.mapping(z, c), G.mapping(z, c, truncation_psi=0.5, truncation_cutoff=2)
    torch.testing.assert_close(half[:, :2], (full[:, :2] + G.mapping.w_avg) / 2)
    assert torch.equal(half[:, 2:], full[:, 2:])
    torch.testing.assert_close(G.mapping(z, c, truncation_psi=0), G.mapping.w_avg.expand_as(full))


def test_mapping_w_avg_moves_in_train_mode_only():
    G = small_generator()
    z, c = latents(4, G), random_labels(4)
    for mode, skip in ((False, False), (True, True)):
        G.train(mode).mapping(z, c, skip_w_avg_update=skip)
        assert torch.equal(G.mapping.w_avg, torch.zeros(12))
    w = G.train().mapping(z, c)[:, 0]
    torch.testing.assert_close(G.mapping.w_avg, 0.005 * w.mean(0))


def test_networks_double_computes_in_float64_throughout():
    seen = set()
    G = small_generator(num_fp16_res=2, conv_clamp=256).double()
    D = small_discriminator(num_fp16_res=2, conv_clamp=256).double()
    for module in [*G.modules(), *D.modules()]:
        module.register_forward_hook(lambda module, args, output: seen.update(
            value.dtype for value in (output if isinstance(output, tuple) else (output,)) if value is not None))
    c = random_labels(4).double()
    D(G(latents(4, G), c), c)
    assert seen == {torch.float64}


@pytest.mark.parametrize(("frozen", "expected"), [
    (0, []), (1, ["fromrgb"]), (3, ["fromrgb", "conv0", "conv1"]), (4, ["fromrgb", "conv0", "conv1", "skip"])])
def test_freeze_layers_counts_convolutions_from_the_image(frozen, expected):
    D = small_discriminator(block_kwargs={"freeze_layers": frozen})
    learned = {name for name, _ in D.named_parameters()}
    fixed = {name for name, _ in D.named_buffers() if name.endswith("weight")}
    assert fixed == {f"b16.{layer}.weight" for layer in expected}
    assert not fixed & learned
    assert learned | fixed >= {"b8.conv0.weight", "b16.conv0.weight", "b4.out.weight"}


def test_freeze_layers_reaches_the_next_block():
    D = small_discriminator(block_kwargs={"freeze_layers": 5})
    assert "b8.conv0.weight" in dict(D.named_buffers())
    assert "b8.conv1.weight" in dict(D.named_parameters())


def test_frozen_and_free_discriminators_compute_the_same():
    free, frozen = small_discriminator(), small_discriminator(block_kwargs={"freeze_layers": 3})
    frozen.load_state_dict(free.state_dict())
    img = torch.randn(4, 3, 16, 16)
    assert torch.equal(free(img, random_labels(4)), frozen(img, random_labels(4)))


def test_discriminator_label_chooses_the_projection():
    D = small_discriminator().eval()
    img = torch.randn(2, 3, 16, 16)
    assert not torch.allclose(D(img, random_labels(2)), D(img, random_labels(2).flip(0)), atol=1e-4)


def test_generator_copies_and_pickles_nothing_shared():
    G = small_generator()
    twin = copy.deepcopy(G)
    with torch.no_grad():
        twin.synthesis.b4.const.add_(1)
    assert not torch.equal(G.synthesis.b4.const, twin.synthesis.b4.const)
    assert twin.init_kwargs == G.init_kwargs


@pytest.mark.parametrize(("build", "message"), [
    (lambda: small_generator(resolution=12),
     "generator: img_resolution is 12; expected a power of two from 8 to 2048"),
    (lambda: small_discriminator(resolution=4),
     "discriminator: img_resolution is 4; expected a power of two from 8 to 2048"),
    (lambda: small_generator(channels=0), "generator: img_channels is 0; expected at least 1"),
    (lambda: small_discriminator(architecture="unet"),
     "discriminator: architecture is 'unet'; expected one of orig, skip, resnet"),
    (lambda: small_generator(resolution=256, channel_base=128),
     "generator: channel_base is 128; expected at least img_resolution, 256, so that each layer has a channel"),
    (lambda: small_generator(half_dtype="float8"), "half_dtype is 'float8'; expected one of float16, bfloat16"),
    (lambda: MappingNetwork(0, 0, 8, None),
     "mapping network: z_dim and c_dim are both 0; expected at least one input"),
])
def test_constructors_refuse_what_cannot_work(build, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        build()


@pytest.mark.parametrize(("call", "message"), [
    (lambda G, D: G(torch.zeros(2, 9), random_labels(2)), "mapping network: z is [2, 9]; expected [N, 8]"),
    (lambda G, D: G(torch.zeros(2, 8), None), "mapping network: c is missing; expected [N, 2]"),
    (lambda G, D: G(torch.zeros(2, 8), torch.zeros(2, 0)), "mapping network: c is [2, 0]; expected [N, 2]"),
    (lambda G, D: G.synthesis(torch.zeros(1, 5, 12)), "synthesis network: ws is [1, 5, 12]; expected [N, 6, 12]"),
    (lambda G, D: G.synthesis(torch.zeros(1, 6, 12), noise_mode="zero"),
     "noise_mode is 'zero'; expected one of random, const, none"),
    (lambda G, D: D(torch.zeros(4, 3, 16, 16), random_labels(1)),
     "discriminator: labels are [1, 2]; expected [4, 2], one row per image"),
    (lambda G, D: D(torch.zeros(4, 3, 16, 16), None),
     "discriminator: labels are missing; expected [4, 2], one row per image"),
    (lambda G, D: D(torch.zeros(1, 3, 32, 32), random_labels(1)),
     "discriminator: images are [1, 3, 32, 32]; expected [N, 3, 16, 16]"),
    (lambda G, D: D(torch.zeros(6, 3, 16, 16), random_labels(6)),
     "minibatch standard deviation: the batch has 6 images; expected at most the group size, 4, or a multiple of it"),
])
def test_calls_refuse_inputs_of_another_shape(call, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call(small_generator(), small_discriminator())


def test_generator_unconditional_ignores_labels():
    G = Generator(8, 0, 8, 8, 3, {"num_layers": 2}, {"channel_base": 64, "channel_max": 8}).eval()
    z = latents(2, G)
    assert torch.equal(G(z, torch.zeros(2, 0), noise_mode="const"), G(z, None, noise_mode="const"))


# ---- high resolutions in half precision

# Each layer rounds its activations by half an epsilon of the format at most. Some eight layers in sequence, rounded
# independently, give about one epsilon of the whole; three leave room for other orders of summation.
BOUNDS = {name: 3 * torch.finfo(getattr(torch, name)).eps for name in ("float16", "bfloat16")}


def relative_error(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("half_dtype", BOUNDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
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
@pytest.mark.parametrize("architecture", ARCHITECTURES)
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
def test_prenormalization_keeps_large_weights_finite_in_float16(large):
    # 1e4 times unit weights and styles overflow float16 (65504) in the first product without the normalization.
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
