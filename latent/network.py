"""Open the network file that images are made with."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dnnlib.cli import UserError
from dnnlib.files import sha256_of
from latent.classes import Classes
from latent.sampling import CLASS_CENTER, Look
from torch_utils.distributed import Place, Processes, broadcast_object
from training.file_kind import find_network
from training.snapshot import load_network


@dataclass(frozen=True, kw_only=True)
class OpenNetwork:
    """A generator, and what its file says of it."""

    G: nn.Module  # the averaged generator, in eval mode
    name: str  # of the file, without its folder: names of folders can name people or places
    sha256: str
    info: dict[str, Any]
    classes: Classes

    @property
    def training(self) -> dict[str, Any]:
        """What the network learned from, under the names of its file; empty where the file does not say."""
        return {name: self.info[name] for name in ("training_data", "training_data_before") if name in self.info}


def choose_network(text: str) -> str:
    """Return the path of the file that --network stands for, see `find_network`; say it where it is another text."""
    path = find_network(text, "--network")
    place = Place.from_environment()
    if path != text and place.rank == 0 and place.launcher is None:  # training.launch's own process has said it
        print(f"--network: {path}", file=sys.stderr)
    return path


def require_same(network: OpenNetwork, processes: Processes) -> None:
    """Raise UserError unless all processes opened the same file: a newer one may have appeared in a run's folder."""
    if broadcast_object(network.sha256) != network.sha256:
        raise UserError(f"--network is another file in process {processes.rank} ({network.name}) than in the first; "
                        "expected one for all: repeat the command, or name the file itself")


def open_network(text: str | os.PathLike, device: torch.device | str) -> OpenNetwork:
    """Read the network of --network. Raises UserError when it is missing, damaged or another kind of file."""
    path = choose_network(os.fspath(text))
    try:
        networks = load_network(path, device)
        sha256 = sha256_of(path)
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
