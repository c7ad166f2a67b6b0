"""Save and load network snapshots: safetensors files with the constructor arguments in the header.

The header's only metadata entry is one JSON text, so that equal networks give equal bytes:

    {"format": "stylegan2-ada-networks", "version": 1,
     "networks": {"G": {...} | null, "D": {...} | null, "G_ema": {...}},     constructor arguments by name
     "info": {...}}                                                          any JSON, kept as it is

Tensors are named "ROLE.NAME", for example "G_ema.synthesis.b4.const". NVIDIA's pickles are also read here, and
converted by `python -m training.nvidia_pickle in.pkl out.safetensors`.
"""
import json
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import click
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from dnnlib.cli import UserError, UserPath, run
from dnnlib.files import atomic_write, sha256_of
from training.discriminator import Discriminator
from training.generator import Generator
from training.network_file import OTHER_NAMES, FileKind, find_network, recognize
from training.nvidia_pickle import NvidiaNetworks, PickledModule, UnknownSourceWarning, read_nvidia_pickle

FORMAT_NAME = "stylegan2-ada-networks"
FORMAT_VERSION = 1

# Role of a network in a file -> the only class that may be built for it.
NETWORK_CLASSES: dict[str, type[nn.Module]] = {"G": Generator, "D": Discriminator, "G_ema": Generator}

_HEADER_KEY = "networks"  # of the metadata entry
_HEADER_FIELDS = {"format", "version", "networks", "info"}
_DTYPES = (torch.float32, torch.float64)
_SHOWN_NAMES = 3  # missing or unknown tensors that a message lists


@dataclass(frozen=True, kw_only=True)
class Networks:
    """The networks of one snapshot."""
    G: nn.Module | None      # the generator that is being trained; None in generator-only files
    D: nn.Module | None
    G_ema: nn.Module         # the averaged generator, which makes the images
    # {"G": constructor arguments or None, "D": ..., "G_ema": ..., "info": any JSON}, complete after loading. Saving
    # takes the arguments from the networks (`init_kwargs`); if config has them too, they must agree.
    config: dict[str, object] = field(default_factory=dict)


def load_network(path: str | os.PathLike, device: str | torch.device = "cpu") -> Networks:
    """Read a snapshot, safetensors or NVIDIA pickle, recognized by content; no code in the file is run.

    The networks are in eval mode and need no gradients; dtypes are those in the file; the random state is untouched.
    Raises FileNotFoundError, or ValueError with one line that names the file if it is not a readable snapshot, and
    DiskFailure.
    """
    kind = recognize(path)
    if kind is FileKind.PICKLE:
        networks = _from_pickle(path, read_nvidia_pickle(path))
    else:
        networks = _read_safetensors(path)
    for network in (networks.G, networks.D, networks.G_ema):
        if network is not None:
            network.to(device)
    return networks


def read_info(path: str | os.PathLike) -> dict[str, object]:
    """Return "info" of a snapshot's header, without reading tensors. Raises as `load_network` does."""
    if recognize(path) is FileKind.PICKLE:
        return _pickle_info(read_nvidia_pickle(path))
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return _parse_header((file.metadata() or {}).get(_HEADER_KEY))["info"]
    except (safetensors.SafetensorError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a network snapshot: {error}") from error


def save_network(path: str | os.PathLike, networks: Networks) -> None:
    """Write a snapshot atomically; equal networks and info give equal bytes.

    Raises ValueError if constructor arguments or info are not JSON, or config contradicts the networks.
    """
    header = {"format": FORMAT_NAME, "version": FORMAT_VERSION, **_header_content(networks)}
    tensors: dict[str, Tensor] = {}
    for role in NETWORK_CLASSES:
        network = getattr(networks, role)
        if network is not None:
            for name, tensor in network.state_dict().items():
                # Copies, since safetensors rejects tensors that share memory, such as one network in two roles.
                tensors[f"{role}.{name}"] = tensor.detach().to("cpu", copy=True).contiguous()
    text = json.dumps(header, sort_keys=True, allow_nan=False)
    data = safetensors.torch.save(tensors, metadata={_HEADER_KEY: text})
    with atomic_write(path) as file:
        file.write(data)


def _header_content(networks: Networks) -> dict[str, object]:
    """Return the fields "networks" and "info", made of plain JSON values."""
    config = networks.config
    unknown = sorted(set(config) - {*NETWORK_CLASSES, "info"})
    if unknown:
        raise ValueError(f"config has the entries {unknown}; expected G, D, G_ema and info: put others into info")
    arguments = {}
    for role in NETWORK_CLASSES:
        network = getattr(networks, role)
        if network is None and role == "G_ema":
            raise ValueError("G_ema is None; a snapshot needs it")
        arguments[role] = None if network is None else _as_json(f"{role}.init_kwargs", network.init_kwargs)
        if role in config and _as_json(f"config[{role!r}]", config[role]) != arguments[role]:
            raise ValueError(f"config[{role!r}] differs from the constructor arguments of {role}; expected the same")
    info = _as_json("config['info']", config.get("info", {}))
    if not isinstance(info, dict):
        raise ValueError(f"config['info'] is {info!a}; expected a dict")
    return {"networks": arguments, "info": info}


def _as_json(where: str, value: object) -> object:
    """Return `value` as it will be read from a file."""
    def has_text_keys(value: object) -> bool:
        if isinstance(value, dict):
            return all(isinstance(key, str) and has_text_keys(item) for key, item in value.items())
        return not isinstance(value, (list, tuple)) or all(map(has_text_keys, value))

    try:
        result = json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not plain JSON ({error}); expected numbers, strings, lists and dicts") from error
    if not has_text_keys(value):
        raise ValueError(f"{where} has a key that is not a string; expected string keys, as JSON changes others")
    return result


def _read_safetensors(path: str | os.PathLike) -> Networks:
    # Read the file once by ordinary means, which report a failing disk: safetensors maps it into memory, where an
    # unreadable page kills the process (SIGBUS).
    sha256_of(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = _parse_header((file.metadata() or {}).get(_HEADER_KEY))
            # Copies: the originals are views of the file, and would change if it is overwritten in place.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a dict
    except (safetensors.SafetensorError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a network snapshot: {error}") from error
    try:
        return _build_networks(header, tensors)
    except ValueError as error:
        raise ValueError(f"{path} is inconsistent: {error}") from error


def _parse_header(text: str | None) -> dict[str, object]:
    """Parse the header, and check its format, version and structure. Raises ValueError."""
    if text is None:
        raise ValueError("it is a safetensors file of another project; expected one with constructor arguments")
    try:
        header = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its header is not JSON ({error})") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT_NAME:
        raise ValueError(f"its header does not name the format {FORMAT_NAME}")
    version = header.get("version")
    if type(version) is not int or version < 1:
        raise ValueError(f"its header has version {version!a}; expected a whole number >= 1")
    if version > FORMAT_VERSION:
        raise ValueError(f"it has format version {version}; this program reads up to {FORMAT_VERSION}: update it")
    if set(header) != _HEADER_FIELDS or not isinstance(header["info"], dict):
        raise ValueError(f"its header has the fields {sorted(header)}; expected {sorted(_HEADER_FIELDS)}")
    networks = header["networks"]
    if not isinstance(networks, dict) or set(networks) != set(NETWORK_CLASSES):
        raise ValueError("its header does not describe exactly G, D and G_ema")
    for role, arguments in networks.items():
        if not isinstance(arguments, dict) and (arguments is not None or role == "G_ema"):
            raise ValueError(f"its header has constructor arguments of {role} that are not a dict")
    return header


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def _build_networks(header: dict[str, object], tensors: dict[str, Tensor]) -> Networks:
    by_role: dict[str, dict[str, Tensor]] = {role: {} for role, kwargs in header["networks"].items()
                                             if kwargs is not None}
    for full_name, tensor in tensors.items():
        role, _, name = full_name.partition(".")
        if role not in by_role:
            raise ValueError(f"the tensor {full_name!a} does not belong to a network of the header")
        by_role[role][name] = tensor
    built = {role: build_network(role, header["networks"][role], by_role[role]) if role in by_role else None
             for role in NETWORK_CLASSES}
    return _networks(built, header["info"])


def _networks(built: dict[str, nn.Module | None], info: dict[str, object]) -> Networks:
    arguments = {role: None if network is None else network.init_kwargs for role, network in built.items()}
    return Networks(**built, config={**arguments, "info": info})


def _from_pickle(path: str | os.PathLike, content: NvidiaNetworks) -> Networks:
    records = {role: getattr(content, role) for role in NETWORK_CLASSES}
    try:
        built = {role: None if record is None else build_network(role, record.arguments, record.tensors, record.kinds)
                 for role, record in records.items()}
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as a StyleGAN2-ADA network pickle: {error}") from error
    return _networks(built, _pickle_info(content))


def _pickle_info(content: NvidiaNetworks) -> dict[str, object]:
    """Collect the rest of a pickle's content that is worth keeping."""
    modules = {name: getattr(content, name) for name in (*NETWORK_CLASSES, "augment_pipe")}
    present: dict[str, PickledModule] = {name: module for name, module in modules.items() if module is not None}
    augment = content.augment_pipe
    data_set = content.training_set_kwargs
    return {
        "source": "NVIDIA pickle",
        "class_names": {name: module.class_name for name, module in present.items()},
        "source_sha256": sorted({source for module in present.values() for source in module.sources}),
        "augment_pipe": None if augment is None else augment.arguments,
        # Without its path: folder names on the machine that trained can name people or places.
        "training_set": None if data_set is None else {k: v for k, v in data_set.items() if k != "path"},
    }


# Building a network from the content of a file.


def build_network(
    role: str, arguments: Mapping[str, object], tensors: Mapping[str, Tensor], kinds: Mapping[str, str] | None = None,
) -> nn.Module:
    """Return the network in eval mode, without gradients, on the CPU, holding `tensors` themselves (dtype kept).

    role:      key of NETWORK_CLASSES
    arguments: constructor arguments by name
    tensors:   every parameter and buffer by name, float32 or float64
    kinds:     name -> "parameter" or "buffer", if the file records it; None skips the comparison
    Raises ValueError if the arguments, names, shapes, dtypes or kinds do not fit.
    """
    network = _construct(role, arguments, len(tensors))
    _check_tensors(role, network, tensors, kinds)
    # The memory format follows from the constructor's arguments, not from the file.
    last = {name for name, tensor in network.state_dict().items() if tensor.ndim == 4
            and tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()}
    arranged = {name: tensor.contiguous(memory_format=torch.channels_last) if name in last else tensor
                for name, tensor in tensors.items()}
    network.load_state_dict(arranged, strict=True, assign=True)
    return network.eval().requires_grad_(False)


def _construct(role: str, arguments: Mapping[str, object], num_tensors: int) -> nn.Module:
    num_layers = [options["num_layers"] for options in arguments.values()
                  if isinstance(options, Mapping) and "num_layers" in options]
    if any(type(count) is not int or not 1 <= count <= num_tensors for count in num_layers):
        # Checked before building, since building a billion layers would take hours.
        raise ValueError(f"{role} asks for num_layers {num_layers} with {num_tensors} tensors; expected one per layer")
    try:
        # On "meta" no memory is allocated and no random numbers are drawn: the file's tensors replace the empty ones.
        with torch.device("meta"):
            return NETWORK_CLASSES[role](**arguments)
    except Exception as error:  # any: the arguments come from a file, and their types are not checked yet
        reason = " ".join(str(error).split())  # one line
        raise ValueError(f"{role} cannot be built with the constructor arguments in the file: {reason}") from error


def _check_tensors(role: str, network: nn.Module, tensors: Mapping[str, Tensor],
                   kinds: Mapping[str, str] | None) -> None:
    expected = network.state_dict()
    missing = [name for name in expected if name not in tensors]
    unknown = [name for name in tensors if name not in expected]
    if missing or unknown:
        raise ValueError(f"{role} does not match its constructor arguments: missing tensors {_listed(missing)}; "
                         f"unknown tensors {_listed(unknown)}")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(f"{role}.{name} has shape {list(tensor.shape)}; expected {list(expected[name].shape)}")
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{role}.{name} is {tensor.dtype}; expected float32 or float64")
    parameters = {name for name, _ in network.named_parameters()}
    for name in expected:
        kind = "parameter" if name in parameters else "buffer"
        if kinds is not None and kinds[name] != kind:
            raise ValueError(f"{role}.{name} is a {kinds[name]} in the file; expected a {kind} "
                             "(freeze_layers decides which)")


def _listed(names: list[str]) -> str:
    if not names:
        return "none"
    more = f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
    return ", ".join(ascii(name) for name in names[:_SHOWN_NAMES]) + more


# The converter.


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m training.nvidia_pickle IN OUT`; return the exit code, 2 for a user's mistake."""
    return run(convert_command, argv)


@click.command(context_settings={"help_option_names": ["-h", "--help"]},
               help="Read IN, an NVIDIA StyleGAN2-ADA pickle, without running code in it; write its networks to OUT as "
                    f"safetensors. IN may also be {OTHER_NAMES}.")
@click.argument("source", type=UserPath(), metavar="IN.pkl")
@click.argument("target", type=UserPath(path_type=Path), metavar="OUT.safetensors")
@click.option("--force", is_flag=True, help="Overwrite OUT if it exists.")
def convert_command(source: str, target: Path, force: bool) -> None:
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
        raise ValueError(f"the folder {target.parent} does not exist; create it first")
    if target.exists() and not force:
        raise ValueError(f"{target} already exists; expected a new name: choose another, or overwrite it with --force")
    if recognize(source) is not FileKind.PICKLE:
        raise ValueError(f"{source} is already a safetensors file; expected an NVIDIA pickle")
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
