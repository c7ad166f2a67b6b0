"""The bilinear sampling op and its derivatives."""

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from torch_utils.ops.grid_sample import sample_bilinear


@pytest.fixture
def case():
    random = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, 5, 6, dtype=torch.float64, generator=random)
    grid = torch.rand(2, 4, 3, 2, dtype=torch.float64, generator=random) * 2.8 - 1.4  # some points lie outside
    return images, grid


def test_sample_bilinear_equals_weighted_neighbors(case):
    images, grid = case
    result = sample_bilinear(images, grid)
    for n in range(2):
        for i in range(4):
            for j in range(3):
                x = (grid[n, i, j, 0].item() + 1) * 3 - 0.5
                y = (grid[n, i, j, 1].item() + 1) * 2.5 - 0.5
                expected = torch.zeros(3, dtype=torch.float64)
                for column in (math.floor(x), math.floor(x) + 1):
                    for row in (math.floor(y), math.floor(y) + 1):
                        if 0 <= column < 6 and 0 <= row < 5:
                            expected += images[n, :, row, column] * (1 - abs(x - column)) * (1 - abs(y - row))
                torch.testing.assert_close(result[n, :, i, j], expected, rtol=0, atol=1e-14)


def test_sample_bilinear_gradients_pass_numerical_checks(case):
    images, grid = case
    images.requires_grad_()
    assert gradcheck(lambda x: sample_bilinear(x, grid).sin(), images)
    assert gradgradcheck(lambda x: sample_bilinear(x, grid).sin(), images)


def test_sample_bilinear_third_derivative_equals_that_of_its_matrix(case):
    images, grid = case
    # Column k of the matrix is the result for the k-th pixel alone.
    pixels = torch.eye(30, dtype=torch.float64).reshape(30, 1, 5, 6)
    matrix = sample_bilinear(pixels, grid[:1].expand(30, -1, -1, -1)).reshape(30, 12).T
    x = images[:1, :1].clone().requires_grad_()

    def third(y):
        for _ in range(2):
            gradient, = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
            y = gradient
        return torch.autograd.grad(y.sin().sum(), x)[0]

    torch.testing.assert_close(third(sample_bilinear(x, grid[:1])), third(matrix @ x.flatten()), rtol=1e-12, atol=1e-12)


def test_sample_bilinear_bad_arguments_raise(case):
    images, grid = case
    with pytest.raises(ValueError, match=r"the grid requires gradients; expected a constant: detach it$"):
        sample_bilinear(images, grid.requires_grad_())
    with pytest.raises(ValueError) as error:
        sample_bilinear(images, torch.zeros(1, 4, 3, 2))
    assert str(error.value) == ("sample_bilinear: images [2, 3, 5, 6] and grid [1, 4, 3, 2]; "
                                "expected [N, C, H, W] and [N, H2, W2, 2]")
