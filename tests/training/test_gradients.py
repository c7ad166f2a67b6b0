"""Sums of gradients: what `backward` gives."""

import pytest
import torch

from training.gradients import GradientSum


def summed(losses, parameters):
    gradients = GradientSum(parameters)
    for loss in losses():
        gradients.add(loss)
    gradients.hand_over()
    return [parameter.grad for parameter in parameters]


def accumulated(losses, parameters):
    for parameter in parameters:
        parameter.grad = None
    for loss in losses():
        loss.backward()
    return [torch.zeros_like(parameter) if parameter.grad is None else parameter.grad for parameter in parameters]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_sums_are_those_of_backward(count):
    torch.manual_seed(0)
    weight = torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last).requires_grad_()
    # One gradient for both, one without memory of its own, one in another layout, and none at all.
    first, second, spread, turned, unused = (torch.randn(size, requires_grad=True) for size in
                                             ((5, 6), (5, 6), (6,), (6, 5), (2,)))
    parameters = [weight, first, second, spread, turned, unused]
    x = torch.randn(2, 3, 5, 5)

    def losses():
        for i in range(count):
            total = (first + second + turned.T).exp().sum() * (i + 1)
            yield total + spread.sum() + torch.nn.functional.conv2d(x, weight).square().mean()

    expected = accumulated(losses, parameters)
    found = summed(losses, parameters)
    assert all(torch.equal(a, b) for a, b in zip(expected, found))
    assert [a.stride() for a in found] == [parameter.stride() for parameter in parameters]
    assert len({gradient.data_ptr() for gradient in found}) == len(parameters)


def test_sum_leaves_other_leaves_without_gradient_and_lets_go_of_the_graph():
    weight, images = (torch.randn(3, requires_grad=True) for _ in range(2))
    loss = (weight * images).square().sum()
    gradients = GradientSum([weight])
    gradients.add(loss)
    assert (images.grad, weight.grad) == (None, None)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
