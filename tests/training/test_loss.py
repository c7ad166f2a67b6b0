"""Losses and regularizers against closed forms."""

import math

import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from tests.helpers.small_networks import random_labels, small_discriminator
from training import loss as losses
from training.augment import AugmentPipe
from training.augmentations.draws import AUGMENTATIONS


def test_generator_loss_is_softplus_of_minus_logits():
    logits = torch.tensor([[0.0], [2.0]])
    expected = (math.log(2) + math.log(1 + math.exp(-2))) / 2
    assert math.isclose(losses.generator_losses(logits).mean().item(), expected, rel_tol=1e-6)


def test_discriminator_losses_are_softplus_of_minus_reals_and_of_fakes():
    real, fake = torch.tensor([[1.0], [3.0]]), torch.tensor([[-2.0]])
    expected = (math.log1p(math.exp(-1)) + math.log1p(math.exp(-3))) / 2 + math.log1p(math.exp(-2))
    found = losses.fake_losses(fake).mean() + losses.real_losses(real).mean()
    assert math.isclose(found.item(), expected, rel_tol=1e-6)


def test_losses_of_confident_logits_stay_finite():
    assert losses.generator_losses(torch.tensor([[-1e4]])).item() == 1e4
    assert losses.real_losses(torch.tensor([[1e4]])).item() == 0
    assert losses.fake_losses(torch.tensor([[-1e4]])).item() == 0


def test_r1_penalty_of_a_linear_judge_is_its_squared_norm():
    weight = torch.randn(3, 4, 4, dtype=torch.float64, requires_grad=True)
    img = torch.randn(5, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    squared_norms = losses.squared_gradient((img * weight).sum(dim=[1, 2, 3])[:, None], img)
    torch.testing.assert_close(squared_norms, weight.square().sum().expand(5))
    gradient, = torch.autograd.grad(squared_norms.mean(), weight, retain_graph=True)
    torch.testing.assert_close(gradient, 2 * weight)
    penalty = losses.r1_penalty(squared_norms, gamma=3)
    torch.testing.assert_close(penalty, 1.5 * weight.square().sum().expand(5))
    gradient, = torch.autograd.grad(penalty.mean(), weight)
    torch.testing.assert_close(gradient, 3 * weight)


def test_path_lengths_of_a_linear_generator_are_its_jacobian_products():
    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.matrix = torch.randn(6, 2 * 4 * 4, dtype=torch.float64)

        def synthesis(self, ws):
            return (ws.flatten(1) @ self.matrix).reshape(len(ws), 2, 4, 4)

    G, ws = Linear(), torch.randn(3, 2, 3, dtype=torch.float64)
    noise = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    lengths = losses.path_lengths(G, ws, noise)
    jacobian = (noise.flatten(1) @ G.matrix.T).reshape(3, 2, 3)  # [N, L, K]
    torch.testing.assert_close(lengths, jacobian.square().sum(2).mean(1).sqrt())
    assert not ws.requires_grad


def test_path_length_penalty_uses_the_mean_after_its_update_with_history():
    lengths = torch.tensor([1.0, 3.0], dtype=torch.float64, requires_grad=True)
    before = torch.tensor(10.0, dtype=torch.float64)
    assert losses.path_length_mean(before, lengths.mean(), 0.25).item() == 10 + 0.25 * (2 - 10) == 8
    penalty = losses.path_length_penalty(lengths, before, 0.25)
    torch.testing.assert_close(penalty, torch.tensor([49.0, 25.0], dtype=torch.float64))
    gradient, = torch.autograd.grad(penalty.sum(), lengths)
    # d/dl_i sum_j (l_j - a)^2 = 2 (l_i - a) - 2 * 0.25 / 2 * sum_j (l_j - a)
    torch.testing.assert_close(gradient, torch.tensor([-14.0 + 3.0, -10.0 + 3.0], dtype=torch.float64))


def test_discriminator_through_augmentation_has_right_first_and_second_derivatives():
    # A smooth activation: numerical differences across lrelu's kink would say nothing.
    kinds = {"block_kwargs": {"activation": "softplus"}, "epilogue_kwargs": {"activation": "softplus"}}
    D = small_discriminator(8, channel_base=32, channel_max=4, **kinds).double()
    pipe = AugmentPipe(**dict.fromkeys(AUGMENTATIONS, 1)).double()
    img = (0.3 * torch.randn(2, 3, 8, 8, dtype=torch.float64)).requires_grad_()

    def judge(img):
        return D(pipe(img, generator=torch.Generator().manual_seed(4)), random_labels(2).double())

    assert gradcheck(judge, img, fast_mode=True)
    assert gradgradcheck(judge, img, fast_mode=True)


def test_r1_through_discriminator_has_right_parameter_gradients():
    kinds = {"block_kwargs": {"activation": "softplus"}, "epilogue_kwargs": {"activation": "softplus"}}
    D = small_discriminator(8, channel_base=32, channel_max=4, **kinds).double()
    img = (0.3 * torch.randn(2, 3, 8, 8, dtype=torch.float64)).requires_grad_()
    for name in ("b8.conv0.weight", "b8.skip.weight", "b4.conv.weight", "b4.fc.weight"):
        parameter = D.get_parameter(name)

        def penalty(value, name=name):
            logits = torch.func.functional_call(D, {name: value}, (img, random_labels(2).double()))
            return losses.r1_penalty(losses.squared_gradient(logits, img), gamma=2)

        assert gradcheck(penalty, parameter.detach().clone().requires_grad_(), fast_mode=True), name
