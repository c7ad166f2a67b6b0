"""The terms of the losses, one value per image; `training.phases` averages them.

Legend: N batch, C image channels, R resolution, L num_ws, K w_dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def generator_losses(fake_logits: Tensor) -> Tensor:
    """Return softplus(-D(G(z))) = -log sigmoid(D(G(z))), non-saturating (Goodfellow et al. 2014, section 3). [N, 1]"""
    return F.softplus(-fake_logits)


def fake_losses(logits: Tensor) -> Tensor:
    """Return softplus(D(G(z))) = -log(1 - sigmoid(D(G(z)))), D's on fakes (Goodfellow et al. 2014, eq. 1). [N, 1]"""
    return F.softplus(logits)


def real_losses(logits: Tensor) -> Tensor:
    """Return softplus(-D(x)) = -log sigmoid(D(x)), D's on reals (Goodfellow et al. 2014, eq. 1). [N, 1]"""
    return F.softplus(-logits)


def squared_gradient(logits: Tensor, img: Tensor) -> Tensor:
    """Return [N], ||grad_x D(x)||^2, the squared norm of each image's gradient of its own logit; differentiable.

    img: [N, C, R, R], what the logits [N, 1] were computed from, with requires_grad set
    """
    # The minibatch standard deviation couples the images weakly; as in NVIDIA's code the gradient is that of the sum.
    gradient, = torch.autograd.grad(logits.sum(), img, create_graph=True)
    return gradient.square().sum(dim=[1, 2, 3])


def r1_penalty(squared_norms: Tensor, gamma: float) -> Tensor:
    """Return [N], (gamma / 2) * ||grad_x D(x)||^2 on reals, of `squared_gradient` (Mescheder et al. 2018, eq. 9)."""
    return (gamma / 2) * squared_norms


def path_lengths(G, ws: Tensor, noise: Tensor, **synthesis_kwargs) -> Tensor:
    """Return [N], ||J_w^T y||_2, the length of the generator's Jacobian product (StyleGAN2, section 3.2).

    G:      generator, of which `synthesis` is used
    ws:     [N, L, K], with or without style mixing, with or without gradient history
    noise:  [N, C, R, R], y ~ N(0, 1) / sqrt(R * R)
    """
    if not ws.requires_grad:
        ws = ws.detach().requires_grad_()
    projected = (G.synthesis(ws, **synthesis_kwargs) * noise).sum()
    jacobian, = torch.autograd.grad(projected, ws, create_graph=True)  # [N, L, K]
    return jacobian.square().sum(dim=2).mean(dim=1).sqrt()


def path_length_mean(mean_length: Tensor, new_length: Tensor, decay: float) -> Tensor:
    """Return a + decay * (new_length - a), the running mean a of path lengths (StyleGAN2, section 3.2). Scalars."""
    return torch.lerp(mean_length, new_length, decay)


def path_length_penalty(lengths: Tensor, mean_length: Tensor, decay: float) -> Tensor:
    """Return [N], (||J_w^T y||_2 - a)^2 (StyleGAN2, eq. 4), with a after its update by these lengths, differentiable.

    lengths:      [N], of `path_lengths`;  mean_length: scalar, the running mean before;  decay: its update rate
    """
    return (lengths - path_length_mean(mean_length, lengths.mean(), decay)).square()
