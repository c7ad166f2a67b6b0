"""Convert an NVIDIA network pickle to a safetensors snapshot from the command line."""
import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from training.file_kind import FileKind, recognise
from training.nvidia_pickle import UnknownSourceWarning
from training.rebuild import NETWORK_CLASSES
from training.snapshot import Networks, load_network, save_network


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m training.nvidia_pickle IN OUT`; return the exit code, 2 for errors of the user."""
    options = _parse_arguments(argv)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UnknownSourceWarning)
            networks = _convert(Path(options.source), Path(options.target), force=options.force)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for warning in caught:
        print(f"warning: {warning.message}", file=sys.stderr)
    for line in _describe(networks):
        print(line)
    print(f"wrote {options.target} ({Path(options.target).stat().st_size:,} bytes)")
    return 0


def _parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m training.nvidia_pickle",
        description="Read an NVIDIA StyleGAN2-ADA pickle, running nothing in it; write its networks as safetensors.")
    parser.add_argument("source", metavar="IN.pkl", help="file to read")
    parser.add_argument("target", metavar="OUT.safetensors", help="file to write")
    parser.add_argument("--force", action="store_true", help="overwrite OUT when it exists")
    return parser.parse_args(argv)


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
