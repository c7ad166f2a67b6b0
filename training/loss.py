"""The losses and regularisation terms of StyleGAN2-ADA, as pure functions.

Legend: N batch, C image channels, R resolution, L num_ws, K w_dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def generator_losses(fake_logits: Tensor) -> Tensor:
    """Return softplus(-D(G(z))), element by element: the non-saturating loss (Goodfellow et al. 2014)."""
    return F.softplus(-fake_logits)


def fake_losses(logits: Tensor) -> Tensor:
    """Return softplus(D(G(z))), element by element: the discriminator's loss on fakes."""
    return F.softplus(logits)


def real_losses(logits: Tensor) -> Tensor:
    """Return softplus(-D(x)), element by element: the discriminator's loss on reals."""
    return F.softplus(-logits)


def generator_loss(logits: Tensor) -> Tensor:
    """Return the generator's loss on fakes, the mean over the batch. logits: [N, 1]"""
    return generator_losses(logits).mean()


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Return the discriminator's loss, the sum of its means over reals and fakes. real: [N, 1];  fake: [M, 1]"""
    return fake_losses(fake).mean() + real_losses(real).mean()


def squared_gradient(logits: Tensor, img: Tensor) -> Tensor:
    """Return [N], the squared norm of each image's gradient of its own logit; differentiable.

    img: [N, C, R, R], what the logits [N, 1] were computed from, with requires_grad set
    """
    # Minibatch statistics couple the images weakly; as in the original the gradient is that of the sum.
    gradient, = torch.autograd.grad(logits.sum(), img, create_graph=True)
    return gradient.square().sum(dim=[1, 2, 3])


def r1_penalty(D, img: Tensor, c: Tensor) -> Tensor:
    """Return [N], ||grad_x D(x)||^2 on reals (Mescheder et al. 2018); the loss is gamma / 2 times its mean.

    D:   callable (img, c) -> logits [N, 1];  img: [N, C, R, R];  c: [N, c_dim]
    """
    img = img.detach().requires_grad_()
    return squared_gradient(D(img, c), img)


def path_lengths(G, ws: Tensor, noise: Tensor, **synthesis_kwargs) -> Tensor:
    """Return [N], the length of the generator's Jacobian products J_w^T y (StyleGAN2, section 3.2).

    G:      generator, its `synthesis` is used
    ws:     [N, L, K], mixed or not, with or without history
    noise:  [N, C, R, R], y ~ N(0, 1) / sqrt(R * R)
    """
    if not ws.requires_grad:
        ws = ws.detach().requires_grad_()
    projected = (G.synthesis(ws, **synthesis_kwargs) * noise).sum()
    jacobian, = torch.autograd.grad(projected, ws, create_graph=True)  # [N, L, K]
    return jacobian.square().sum(dim=2).mean(dim=1).sqrt()


def path_length_penalty(lengths: Tensor, mean_length: Tensor, decay: float) -> tuple[Tensor, Tensor]:
    """Return the penalty [N] and the new mean length (StyleGAN2, eq. 4).

    lengths:      [N] with history;  mean_length: scalar, the running mean so far;  decay: its rate

    The penalty uses the mean after its update, history included; the returned mean has none.
    """
    updated = torch.lerp(mean_length, lengths.mean(), decay)
    return (lengths - updated).square(), updated.detach()
