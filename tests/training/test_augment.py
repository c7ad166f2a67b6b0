"""The augmentation pipeline as a whole.

data/augment_reference.* was computed with the reference implementation: one image under augmentations with every draw
at one quantile; and for each augmentation and p, over 1000 draws for one 24x24 image, the share of images left
unchanged and the mean absolute change.
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from training.augment import AugmentPipe

DATA = Path(__file__).parent.parent / "data"
REFERENCE = json.loads((DATA / "augment_reference.json").read_text())
ARRAYS = dict(np.load(DATA / "augment_reference.npz"))
BLIT = dict(xflip=1, rotate90=1, xint=1)
GEOMETRY = BLIT | dict(scale=1, rotate=1, aniso=1, xfrac=1)
COLOR = dict(brightness=1, contrast=1, lumaflip=1, hue=1, saturation=1)
EVERYTHING = GEOMETRY | COLOR | dict(imgfilter=1, noise=1, cutout=1)


def pipe_of(p=1.0, **strengths):
    pipe = AugmentPipe(**strengths)
    pipe.p.fill_(p)
    return pipe


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def images_of(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype, generator=seeded(9)) * 0.4


# ---------------------------------------------------------------------------------------------------------------------
# Against the reference implementation

# The reference is float32: rounding of its sampling positions moves values by up to 1.9e-5 at 64 pixels, on every
# machine; those of our own in float32 add less than 1e-6.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", REFERENCE["cases"])
def test_pipe_at_quantile_equals_reference(name, dtype):
    case = dict(REFERENCE["cases"][name])
    image, quantile = case.pop("image"), case.pop("debug_percentile")
    strengths = dict.fromkeys(case.pop("augmentations"), 1) | case
    result = AugmentPipe(**strengths)(torch.tensor(ARRAYS[image]).to(dtype), debug_percentile=quantile)
    assert result.dtype == dtype
    np.testing.assert_allclose(result, ARRAYS[name], rtol=0, atol=3e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pipe_gradients_equal_reference(dtype):
    images = torch.tensor(ARRAYS["base"]).to(dtype).requires_grad_()
    result = AugmentPipe(**GEOMETRY, **COLOR)(images, debug_percentile=0.4)
    first, = torch.autograd.grad((result.sin() * torch.tensor(ARRAYS["bgc_v"])).sum(), images, create_graph=True)
    second, = torch.autograd.grad(first.square().sum(), images)
    np.testing.assert_allclose(first.detach(), ARRAYS["bgc_g"], rtol=0, atol=5e-5)  # values up to 3.3; as above
    np.testing.assert_allclose(second, ARRAYS["bgc_gg"], rtol=0, atol=5e-5)


def test_pipe_buffers_equal_reference():
    state = AugmentPipe(xflip=1).state_dict()
    assert {name: list(value.shape) for name, value in state.items()} == {"p": [], "Hz_geom": [12], "Hz_fbank": [4, 43]}
    assert state["p"] == 1
    np.testing.assert_array_equal(state["Hz_geom"], ARRAYS["Hz_geom"])
    np.testing.assert_allclose(state["Hz_fbank"], ARRAYS["Hz_fbank"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("key", REFERENCE["statistics"])
def test_pipe_statistics_equal_reference(key):
    name, p = key.rsplit("_p", 1)
    share, change = REFERENCE["statistics"][key]
    count = 150
    images = torch.tensor(ARRAYS["base"][:, :, 4:28, 4:28]).repeat(count, 1, 1, 1)
    changes = (pipe_of(float(p), **{name: 1})(images, generator=seeded()) - images).abs().mean([1, 2, 3]).double()
    if float(p) == 0:
        assert changes.max() == 0
        assert share == 1
        assert change < 2e-7
        return
    # Two independent samples, of 150 and of 1000: their difference has variance v / 150 + v / 1000. The share is
    # binomial; what counts as unchanged, here 0.001 on average, is not recorded, and few draws come as near: 0.01.
    spread = 4 * math.sqrt(1 / count + 1 / 1000)
    assert abs((changes < 1e-3).double().mean() - share) <= spread * math.sqrt(share * (1 - share)) + 0.01
    assert abs(changes.mean() - change) <= spread * changes.std()


def test_noise_level_equals_reference():
    images = images_of(4, 3, 32, 32, dtype=torch.float64)
    noise = AugmentPipe(noise=1)(images, debug_percentile=0.6, generator=seeded()) - images
    level = 0.059511613100767136
    # 4 standard errors of the mean, and of a standard deviation, of 12288 normal numbers
    assert abs(noise.mean()) < 4 * level / math.sqrt(noise.numel())
    assert abs(noise.std() / level - 1) < 4 / math.sqrt(2 * noise.numel())


# ---------------------------------------------------------------------------------------------------------------------
# Properties

@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_pipe_switched_off_returns_the_images(dtype):
    images = images_of(3, 3, 16, 16).to(dtype)
    for pipe in (AugmentPipe(), AugmentPipe(**dict.fromkeys(EVERYTHING, 0)), pipe_of(0.0, **EVERYTHING),
                 AugmentPipe(imgfilter=1, imgfilter_bands=[0, 0, 0, 0])):
        result = pipe(images, generator=seeded())
        assert torch.equal(result, images)
        assert result.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_pipe_half_precision_computes_in_float32(dtype):
    images = images_of(3, 3, 16, 16).to(dtype)
    pipe = AugmentPipe(**EVERYTHING)
    result = pipe(images, generator=seeded())
    assert result.dtype == dtype
    assert torch.equal(result, pipe(images.float(), generator=seeded()).to(dtype))


def test_pipe_double_precision_draws_the_same_augmentations():
    images = images_of(8, 3, 24, 24)
    single = AugmentPipe(**EVERYTHING)(images, generator=seeded())
    double = AugmentPipe(**EVERYTHING).double()(images.double(), generator=seeded())
    assert double.dtype == torch.float64
    # Float32 sampling positions, as above; what they move, contrast and filter enlarge: to 9e-5 or 1.1e-4, depending on
    # the CPU. Other augmentations would change the images by 0.1 and more.
    torch.testing.assert_close(single.double(), double, rtol=0, atol=4e-4)
    assert AugmentPipe(**EVERYTHING).double()(images, generator=seeded()).dtype == torch.float32


def test_pipe_image_does_not_depend_on_the_other_images():
    images = images_of(5, 3, 16, 16, dtype=torch.float64)
    pipe = AugmentPipe(**EVERYTHING)
    others = torch.cat([images[:1], images[1:] * 100])
    first = pipe(images, generator=seeded())[:1]
    torch.testing.assert_close(pipe(others, generator=seeded())[:1], first, rtol=0, atol=1e-13)


def test_pipe_draws_do_not_shift_with_strengths():
    images = images_of(16, 3, 16, 16)
    alone = pipe_of(0.5, brightness=1)(images, generator=seeded())
    with_cutout = pipe_of(0.5, brightness=1, contrast=0.0, cutout=1)(images, generator=seeded())
    kept = with_cutout != 0
    assert 0.7 < kept.double().mean() < 1
    assert torch.equal(alone[kept], with_cutout[kept])


def test_pipe_draws_do_not_shift_with_p():
    images = torch.zeros(64, 1, 4, 4)
    some = pipe_of(0.4, brightness=1)(images, generator=seeded())
    every = pipe_of(1.0, brightness=1)(images, generator=seeded())
    happened = some != 0
    assert 0.2 < happened.double().mean() < 0.6
    assert torch.equal(some[happened], every[happened])


def test_pipe_draws_from_the_given_generator_alone():
    images = images_of(4, 3, 16, 16)
    pipe = AugmentPipe(**EVERYTHING)
    before = torch.get_rng_state()
    first = pipe(images, generator=seeded(1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, pipe(images, generator=seeded(1)))
    assert not torch.equal(first, pipe(images, generator=seeded(2)))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        assert torch.equal(first, pipe(images))


@pytest.mark.parametrize("size", [8, 16])
def test_pipe_small_flat_image_stays_flat(size):
    images = torch.ones(4, 3, size, size, dtype=torch.float64)
    result = AugmentPipe(xflip=1, rotate90=1, imgfilter=1)(images, generator=seeded())
    assert (result - 1).abs().min() > 1e-3  # the filter changes the level
    torch.testing.assert_close(result, result[:, :, :1, :1].expand_as(result), rtol=0, atol=1e-6)  # float32 taps


@pytest.mark.parametrize("shape", [(2, 3, 16, 16), (2, 1, 8, 8), (1, 3, 4, 6), (1, 3, 2, 2)])
def test_pipe_is_affine_in_the_images_at_any_size(shape):
    first, second = images_of(2, *shape, dtype=torch.float64)
    pipe = AugmentPipe(**EVERYTHING)
    mixed = pipe(0.3 * first + 0.7 * second, generator=seeded())
    expected = 0.3 * pipe(first, generator=seeded()) + 0.7 * pipe(second, generator=seeded())
    torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-13)


def test_pipe_other_channels_allowed_without_color():
    images = images_of(2, 5, 16, 16)
    result = AugmentPipe(**GEOMETRY, imgfilter=1, cutout=1)(images, debug_percentile=0.7)
    first = AugmentPipe(**GEOMETRY, imgfilter=1, cutout=1)(images[:, :1], debug_percentile=0.7)
    torch.testing.assert_close(result[:, :1], first, rtol=0, atol=1e-6)


def test_pipe_keeps_its_arguments_and_loads_its_state():
    given = dict(xflip=1, scale_std=0.3, imgfilter_bands=[1, 0, 0, 1])
    pipe = pipe_of(0.25, **given)
    other = AugmentPipe(**pipe.init_kwargs)
    other.load_state_dict(pipe.state_dict())
    assert pipe.init_kwargs == given
    assert other.strengths == pipe.strengths
    assert other.p == 0.25


# ---------------------------------------------------------------------------------------------------------------------
# Derivatives

@pytest.mark.parametrize(("shape", "fast"), [((2, 3, 4, 4), False), ((1, 1, 5, 6), False), ((2, 3, 16, 16), True)])
def test_pipe_gradients_pass_numerical_checks(shape, fast):
    pipe = AugmentPipe(**EVERYTHING).double()
    images = images_of(*shape, dtype=torch.float64).requires_grad_()

    def augment(x):
        return pipe(x, generator=seeded()).sin()

    assert gradcheck(augment, images, fast_mode=fast)
    assert gradgradcheck(augment, images, fast_mode=fast)


# ---------------------------------------------------------------------------------------------------------------------
# Errors

@pytest.mark.parametrize(("strengths", "message"), [
    (dict(xflip=-1), "augmentation setting xflip is -1; expected a finite number >= 0"),
    (dict(noise=math.nan), "augmentation setting noise is nan; expected a finite number >= 0"),
    (dict(hue="1"), "augmentation setting hue is '1'; expected a finite number >= 0"),
    (dict(scale_std=math.inf), "augmentation setting scale_std is inf; expected a finite number >= 0"),
    (dict(imgfilter_bands=[1, 1]), "augmentation setting imgfilter_bands is [1, 1]; expected 4 strengths"),
    (dict(imgfilter_bands=[1, 1, -2, 1]), "augmentation setting imgfilter_bands is -2; expected a finite number >= 0"),
])
def test_pipe_bad_setting_raises(strengths, message):
    with pytest.raises(ValueError) as error:
        AugmentPipe(**strengths)
    assert str(error.value) == message


def test_pipe_unknown_setting_raises():
    with pytest.raises(ValueError, match=r"^augmentation setting 'yflip' is unknown; expected one of xflip, rot"):
        AugmentPipe(yflip=1)


@pytest.mark.parametrize("quantile", [0, 1, -0.5, math.nan])
def test_pipe_quantile_outside_range_raises(quantile):
    with pytest.raises(ValueError) as error:
        AugmentPipe(xflip=1)(torch.zeros(1, 3, 8, 8), debug_percentile=quantile)
    assert str(error.value) == f"debug_percentile is {quantile!r}; expected a number between 0 and 1, both excluded"


@pytest.mark.parametrize(("images", "found"), [
    (torch.zeros(3, 8, 8), "torch.float32 [3, 8, 8]"),
    (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "torch.uint8 [1, 3, 8, 8]"),
    (torch.zeros(0, 3, 8, 8), "torch.float32 [0, 3, 8, 8]"),
    (torch.zeros(1, 3, 1, 8), "torch.float32 [1, 3, 1, 8]"),
])
def test_pipe_other_images_raise(images, found):
    with pytest.raises(ValueError) as error:
        AugmentPipe(xflip=1)(images)
    assert str(error.value) == (f"images are {found}; expected floating point [N, C, H, W] with at least one image "
                                "and 2 pixels a side")
