"""The mapping network: from latent and label to the intermediate latent w."""

from itertools import pairwise

import torch
from torch import Tensor, nn

from training.layers import FullyConnectedLayer, normalize_second_moment


def truncate(ws: Tensor, center: Tensor, psi: float, cutoff: int | None = None) -> Tensor:
    """Return center + psi * (ws - center) in the first `cutoff` layers (Karras et al. 2019, StyleGAN, appendix B).

    ws:      [N, L, K];  center: [K], the mean style, or [N, 1, K], one for each
    psi:     1 keeps ws, 0 gives the center
    cutoff:  None for all layers
    """
    cutoff = ws.shape[1] if cutoff is None else cutoff
    return torch.cat([torch.lerp(center, ws[:, :cutoff], psi), ws[:, cutoff:]], dim=1)


class MappingNetwork(nn.Module):
    """Map z [N, Z] and label c [N, c_dim] to ws [N, L, K]; without num_ws to [N, K], as the discriminator uses it.

    z and the embedded label are each normalised by their second moment (StyleGAN2-ADA, appendix C). In train mode
    every call moves the buffer w_avg towards the mean of w, unless skip_w_avg_update.
    """

    def __init__(self, z_dim: int, c_dim: int, w_dim: int, num_ws: int | None, num_layers: int = 8,
                 embed_features: int | None = None, layer_features: int | None = None, activation: str = "lrelu",
                 lr_multiplier: float = 0.01, w_avg_beta: float | None = 0.995):
        super().__init__()
        if z_dim == 0 and c_dim == 0:
            raise ValueError("mapping network: z_dim and c_dim are both 0; expected at least one input")
        self.z_dim, self.c_dim, self.w_dim = z_dim, c_dim, w_dim
        self.num_ws = num_ws
        self.num_layers = num_layers
        self.w_avg_beta = w_avg_beta if num_ws is not None else None
        if self.w_avg_beta is not None:
            self.register_buffer("w_avg", torch.zeros(w_dim))

        embedded = 0
        if c_dim > 0:
            embedded = w_dim if embed_features is None else embed_features
            self.embed = FullyConnectedLayer(c_dim, embedded)
        hidden = w_dim if layer_features is None else layer_features
        widths = [z_dim + embedded, *[hidden] * (num_layers - 1), w_dim]
        for index, (narrow, wide) in enumerate(pairwise(widths)):
            self.add_module(f"fc{index}", FullyConnectedLayer(narrow, wide, activation=activation,
                                                              lr_multiplier=lr_multiplier))

    def forward(self, z: Tensor | None, c: Tensor | None, truncation_psi: float = 1,
                truncation_cutoff: int | None = None, skip_w_avg_update: bool = False) -> Tensor:
        """Return ws. truncation_psi: 1 keeps w, 0 gives w_avg, in the first truncation_cutoff layers (None: in all)."""
        w = self._input(z, c)
        for index in range(self.num_layers):
            w = getattr(self, f"fc{index}")(w)
        if self.w_avg_beta is not None and self.training and not skip_w_avg_update:
            with torch.no_grad():
                self.w_avg.copy_(torch.lerp(w.mean(dim=0), self.w_avg, self.w_avg_beta))
        if self.num_ws is None:
            return w
        ws = w.unsqueeze(1).repeat(1, self.num_ws, 1)  # [N, L, K]
        if truncation_psi == 1:
            return ws
        if self.w_avg_beta is None:
            raise ValueError(f"truncation_psi is {truncation_psi}; expected 1: this network keeps no average of w")
        return truncate(ws, self.w_avg, truncation_psi, truncation_cutoff)

    def _input(self, z: Tensor | None, c: Tensor | None) -> Tensor:
        dtype = self.fc0.weight.dtype
        parts = []
        for name, value, size in (("z", z, self.z_dim), ("c", c, self.c_dim)):
            if size == 0:
                continue
            if value is None or value.ndim != 2 or value.shape[1] != size:
                found = "missing" if value is None else list(value.shape)
                raise ValueError(f"mapping network: {name} is {found}; expected [N, {size}]")
            value = value.to(dtype)
            parts.append(normalize_second_moment(self.embed(value) if name == "c" else value))
        return torch.cat(parts, dim=1)
