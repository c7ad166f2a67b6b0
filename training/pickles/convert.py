"""Convert an NVIDIA network pickle to a safetensors snapshot from the command line."""
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import click
from torch import nn

from dnnlib.cli import UserError, UserPath, run
from training.file_kind import OTHER_NAMES, FileKind, find_network, recognise
from training.nvidia_pickle import UnknownSourceWarning
from training.rebuild import NETWORK_CLASSES
from training.snapshot import Networks, load_network, save_network


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m training.nvidia_pickle IN OUT`; return the exit code, 2 for errors of the user."""
    return run(command, argv)


@click.command(context_settings={"help_option_names": ["-h", "--help"]},
               help="Read IN, an NVIDIA StyleGAN2-ADA pickle, running nothing in it; write its networks to OUT as "
                    f"safetensors. IN may also be {OTHER_NAMES}.")
@click.argument("source", type=UserPath(), metavar="IN.pkl")
@click.argument("target", type=UserPath(path_type=Path), metavar="OUT.safetensors")
@click.option("--force", is_flag=True, help="Overwrite OUT when it exists.")
def command(source: str, target: Path, force: bool) -> None:
    path = find_network(source, "IN")
    if path != source:
        print(f"IN: {path}", file=sys.stderr)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UnknownSourceWarning)
            networks = _convert(Path(path), target, force=force)
    except ValueError as error:
        raise UserError(str(error)) from error
    for warning in caught:
        print(f"warning: {warning.message}", file=sys.stderr)
    for line in _describe(networks):
        print(line)
    print(f"wrote {target} ({target.stat().st_size:,} bytes)")


def _convert(source: Path, target: Path, *, force: bool) -> Networks:
    if target.suffix != ".safetensors":
        raise ValueError(f"the output is {target}; expected a name that ends in .safetensors")
    if not target.absolute().parent.is_dir():
        raise ValueError(f"there is no folder {target.parent}; make it first")
    if target.exists() and not force:
        raise ValueError(f"{target} exists already; expected a new name: choose another, or overwrite it with --force")
    if recognise(source) is not FileKind.PICKLE:
        raise ValueError(f"{source} is a safetensors file already; expected an NVIDIA pickle")
    networks = load_network(source)
    save_network(target, networks)
    return networks


def _describe(networks: Networks) -> list[str]:
    lines = []
    for role in NETWORK_CLASSES:
        network: nn.Module | None = getattr(networks, role)
        if network is None:
            lines.append(f"{role:5}  none")
            continue
        num_parameters = sum(parameter.numel() for parameter in network.parameters())
        classes = f"labels of length {network.c_dim}" if network.c_dim else "unconditional"
        lines.append(f"{role:5}  {type(network).__name__}, {network.img_resolution} x {network.img_resolution}, "
                     f"{network.img_channels} channels, {classes}, {num_parameters:,} parameters")
    return lines
