"""Open the network file that images are made with."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dnnlib.cli import UserError
from dnnlib.files import sha256_of
from latent.classes import Classes
from latent.sampling import CLASS_CENTER, Look
from training.snapshot import load_network


@dataclass(frozen=True, kw_only=True)
class OpenNetwork:
    """A generator, and what its file says of it."""

    G: nn.Module  # the averaged generator, in eval mode
    name: str  # of the file, without its folder: names of folders can name people or places
    sha256: str
    info: dict[str, Any]
    classes: Classes


def open_network(path: str | os.PathLike, device: torch.device | str) -> OpenNetwork:
    """Read the network of --network. Raises UserError when it is missing, damaged or another kind of file."""
    try:
        networks = load_network(path, device)
        sha256 = sha256_of(path)
    except FileNotFoundError as error:
        raise UserError(f"--network is {path}, which does not exist; expected a network file: a .safetensors of a run, "
                        "or a .pkl of the original") from error
    except OSError as error:
        raise UserError(f"--network is {path}, which cannot be read ({error.strerror}); expected a network "
                        "file") from error
    except ValueError as error:
        raise UserError(f"--network: {error}") from error
    info = networks.config.get("info") or {}
    return OpenNetwork(G=networks.G_ema, name=Path(path).name, sha256=sha256, info=info,
                       classes=Classes(networks.G_ema.c_dim, info))


def check_look(look: Look, G: nn.Module) -> None:
    """Raise UserError where a network cannot make images of this look."""
    if look.center == CLASS_CENTER:
        if G.c_dim == 0:
            raise UserError("--trunc-center is class, but this network was trained without classes; expected global: "
                            "leave --trunc-center out")
        return
    if look.truncation != 1 and G.mapping.w_avg_beta is None:
        raise UserError(f"--trunc is {look.truncation:g}, but this network keeps no mean style to truncate towards; "
                        "leave --trunc out")
