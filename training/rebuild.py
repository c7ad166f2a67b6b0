"""Build a network from its constructor arguments with exactly the tensors of a file."""
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from training.discriminator import Discriminator
from training.generator import Generator

# Role of a network in a file -> the one class that may be built for it.
NETWORK_CLASSES: dict[str, type[nn.Module]] = {"G": Generator, "D": Discriminator, "G_ema": Generator}

_DTYPES = (torch.float32, torch.float64)
_SHOWN_NAMES = 3  # of a list of missing or unknown tensors


def build_network(
    role: str, arguments: Mapping[str, object], tensors: Mapping[str, Tensor], kinds: Mapping[str, str] | None = None,
) -> nn.Module:
    """Return the network in eval mode, without gradients, on the CPU, holding `tensors` themselves (dtype kept).

    role:      key of NETWORK_CLASSES
    arguments: constructor arguments by name
    tensors:   every parameter and buffer by name, float32 or float64
    kinds:     name -> "parameter" or "buffer", where the file tells; None skips the comparison
    Raises ValueError when the arguments, names, shapes, dtypes or kinds do not fit.
    """
    network = _construct(role, arguments, len(tensors))
    _check_tensors(role, network, tensors)
    if kinds is not None:
        _check_kinds(role, network, kinds)
    layouts = {name: tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
               for name, tensor in network.state_dict().items() if tensor.ndim == 4}
    arranged = {name: tensor.contiguous(memory_format=torch.channels_last) if layouts.get(name) else tensor
                for name, tensor in tensors.items()}
    network.load_state_dict(arranged, strict=True, assign=True)
    return network.eval().requires_grad_(False)


def tensor_kinds(network: nn.Module) -> dict[str, str]:
    """Tell for each name of the state dict whether it is a "parameter" or a "buffer" (freeze_layers makes buffers)."""
    parameters = {name for name, _ in network.named_parameters()}
    return {name: "parameter" if name in parameters else "buffer" for name in network.state_dict()}


def _construct(role: str, arguments: Mapping[str, object], num_tensors: int) -> nn.Module:
    num_layers = [options["num_layers"] for options in arguments.values()
                  if isinstance(options, Mapping) and "num_layers" in options]
    if any(type(count) is not int or not 1 <= count <= num_tensors for count in num_layers):
        # Before building: a count of a billion would be built for hours.
        raise ValueError(f"{role} asks for num_layers {num_layers} with {num_tensors} tensors; expected one per layer")
    try:
        # On "meta" nothing is allocated or drawn: the file's tensors take the places, the random state stays.
        with torch.device("meta"):
            return NETWORK_CLASSES[role](**arguments)
    except Exception as error:  # any error: the arguments come from a file, and their types are unchecked so far
        reason = " ".join(str(error).split())  # one line
        raise ValueError(f"{role} cannot be built with the constructor arguments in the file: {reason}") from error


def _check_tensors(role: str, network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    expected = network.state_dict()
    missing = [name for name in expected if name not in tensors]
    unknown = [name for name in tensors if name not in expected]
    if missing or unknown:
        raise ValueError(f"{role} does not fit its constructor arguments: missing tensors {_listed(missing)}; "
                         f"unknown tensors {_listed(unknown)}")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(f"{role}.{name} has shape {list(tensor.shape)}; expected {list(expected[name].shape)}")
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{role}.{name} is {tensor.dtype}; expected float32 or float64")


def _check_kinds(role: str, network: nn.Module, kinds: Mapping[str, str]) -> None:
    for name, kind in tensor_kinds(network).items():
        if kinds[name] != kind:
            raise ValueError(f"{role}.{name} is a {kinds[name]} in the file; expected a {kind} "
                             "(freeze_layers decides which)")


def _listed(names: list[str]) -> str:
    if not names:
        return "none"
    more = f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
    return ", ".join(ascii(name) for name in names[:_SHOWN_NAMES]) + more
