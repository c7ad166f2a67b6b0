"""What travels between the server and the institutions ("sites") of a federated run: tensors and numbers, as bytes.

A message is the content of a safetensors file, with one metadata entry that holds JSON. In each round the server sends
a global message to the sites, and each site returns an update. Nothing here knows files, processes or networks.

A receiver trusts nothing: a message has the tensors of the agreed list and the declared numbers, exactly as the sender
would write them, or it is refused. So an update can carry no text besides what the receiver knows before it arrives.

With the payload "bfloat16" the server sends rounded weights, the sites start from these, and an update holds the
differences from them. Rounded weights in both directions would stop training: bfloat16 has 8 significant bits, and a
change below 1/512 of a weight would be lost in every round, however many add up. A difference has 8 significant bits
of its own, and the server adds it to weights that it never rounded to bfloat16.
"""

import hashlib
import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from federated.agreement import PAYLOADS, Agreement, bytes_of, tensors_hash
from training.phases import PHASES
from training.run_report import SKIPPED_PREFIX

FORMAT_NAME = "stylegan2-ada-federated"
PROTOCOL_VERSION = 1
HEADER_LIMIT = 2**20  # bytes; that of the 1024x1024 networks has about 45,000
# The statistics that an update may declare, by their names in stats.jsonl.
STATISTICS = ("Loss/G/loss", "Loss/G/reg", "Loss/pl_penalty", "Loss/D/loss", "Loss/D/reg", "Loss/r1_penalty",
              *(f"Loss/{what}/{of}" for what in ("scores", "signs") for of in ("fake", "real", "valid")),
              *(f"{SKIPPED_PREFIX}{phase}" for phase in PHASES))

_HEADER_KEY = "federated"  # of the metadata entry
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}  # by their names in safetensors
_FIELDS = ["format", "version", "kind", "agreement", "round", "constants", "tensors", "seal"]
_OWN_FIELDS = {"global": ["start"], "update": ["site", "base", "numbers"]}
LARGEST_COUNT = 2**53  # whole numbers up to here are exact in float64
LARGEST_STATISTIC = 1e30  # whose square is finite
HASH = re.compile("[0-9a-f]{64}")  # a sha256
_SHOWN = 300  # characters of a foreign value in a message


class Refused(ValueError):
    """A message that must not be used; the text is one line with the reason."""


@dataclass(frozen=True, kw_only=True)
class GlobalMessage:
    """What a site receives at the start of a round."""

    round: int
    tensors: Mapping[str, Tensor]  # float32 on the CPU, of the agreed list; rounded if the payload is
    base_hash: str  # of these tensors; an update names it
    constants_hash: str
    start: Mapping[str, Tensor] | None  # float32 on the CPU, of Agreement.start; None = not sent


@dataclass(frozen=True, kw_only=True)
class SiteNumbers:
    """The numbers that a site declares about its round."""

    num_images: int  # real images seen
    num_iterations: int
    images_of_class: tuple[int, ...]  # real images of each class seen; () without classes
    augment_p: float  # at the end of the round
    seconds: float  # of training
    # Name among STATISTICS -> num, mean, std, as torch_utils.stats.Collector returns them. What is not finite, or
    # beyond LARGEST_STATISTIC, is NaN.
    statistics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class SiteUpdate:
    """What the server receives from a site at the end of a round."""

    site: str
    round: int
    numbers: SiteNumbers
    # Weights of the site, on the CPU: float32 as they were sent, or float64 if differences were.
    tensors: Mapping[str, Tensor]


# Messages. The sender checks as the receiver does, so that a mistake is reported where it was made.


def max_bytes(agreement: Agreement) -> int:
    """Return the largest size of a message that is accepted; a transport need not read on."""
    return 8 + HEADER_LIMIT + agreement.num_bytes + bytes_of(agreement.start, torch.float32)


def hash_of_global(agreement: Agreement, tensors: Mapping[str, Tensor]) -> str:
    """Return the hash by which an update names the global message with these tensors.

    tensors:  float32, of the agreed list, as `encode_global` takes them
    """
    return tensors_hash(_cast(tensors, PAYLOADS[agreement.payload]))


def encode_global(agreement: Agreement, tensors: Mapping[str, Tensor], *, round: int, constants_hash: str,
                  start: Mapping[str, Tensor] | None = None) -> bytes:
    """Return the global message of a round.

    tensors:         float32, of the agreed list, on any device
    round:           its number
    constants_hash:  as `constants_hash` returns it
    start:           as `start_tensors` returns them; None = not sent

    Raises Refused if a receiver would refuse it.
    """
    _check_layout(_layout(agreement.tensors, torch.float32), _layout_of(tensors))
    content = _cast(tensors, PAYLOADS[agreement.payload])
    if start is not None:
        _check_layout(_layout(agreement.start, torch.float32), _layout_of(start))
        start = _cast(start, torch.float32)
    header = {"round": round, "constants": constants_hash, "start": None if start is None else tensors_hash(start)}
    _check_round(round)
    return _pack(agreement, "global", header, content, start or {})


def decode_global(data: bytes, agreement: Agreement, *, constants_hash: str, round: int | None = None) -> GlobalMessage:
    """Return the content of a global message.

    agreement:       the site's own
    constants_hash:  of the site; not compared if the message brings the constants
    round:           the number that the site expects; None = any

    Raises Refused.
    """
    header, tensors = _unpack(data, agreement, "global")
    _check_round(header["round"], round)
    start = None
    if header["start"] is not None:
        start = {name: tensors.pop(name) for name in agreement.start}
    else:
        _check_constants(header["constants"], constants_hash)
    return GlobalMessage(round=header["round"], tensors=_cast(tensors, torch.float32), base_hash=header["tensors"],
                         constants_hash=header["constants"], start=start)


def encode_update(agreement: Agreement, tensors: Mapping[str, Tensor], received: GlobalMessage, *, site: str,
                  constants_hash: str, numbers: SiteNumbers) -> bytes:
    """Return a site's update after a round.

    tensors:   float32, of the agreed list, on any device
    received:  the message that the round started from

    Raises Refused if a receiver would refuse it.
    """
    _check_layout(_layout(agreement.tensors, torch.float32), _layout_of(tensors))
    content = _cast(tensors, torch.float32)
    if agreement.payload == "bfloat16":
        content = _cast({name: tensor - received.tensors[name] for name, tensor in content.items()}, torch.bfloat16)
    declared = _numbers_to_json(numbers)
    _check_numbers(declared, agreement)
    header = {"site": site, "round": received.round, "base": received.base_hash, "constants": constants_hash,
              "numbers": declared}
    return _pack(agreement, "update", header, content, {})


def check_update(data: bytes, agreement: Agreement, *, site: str) -> None:
    """Check that bytes are an update of a site and nothing else, before they leave it.

    agreement:  the site's own

    Raises Refused.
    """
    header, _ = _unpack(data, agreement, "update")
    _check_equal("site", header["site"], site)
    _check_round(header["round"])
    _check_numbers(header["numbers"], agreement)
    for name in ("base", "constants"):
        if not isinstance(header[name], str) or not HASH.fullmatch(header[name]):
            raise Refused(f"{name} is {_shown(header[name])}; expected a sha256")


def decode_update(data: bytes, agreement: Agreement, *, site: str, round: int, base: Mapping[str, Tensor],
                  base_hash: str, constants_hash: str) -> SiteUpdate:
    """Return the content of an update.

    agreement, constants_hash:  the server's own
    site, round:                those that are expected
    base:                       float32, the server's tensors in the round's global message, before they were rounded
    base_hash:                  as `hash_of_global` returns it for them

    Raises Refused.
    """
    header, tensors = _unpack(data, agreement, "update")
    _check_equal("site", header["site"], site)
    _check_round(header["round"], round)
    _check_constants(header["constants"], constants_hash)
    if header["base"] != base_hash:
        raise Refused(f"it was trained from weights with the sha256 {_shown(header['base'])}; expected those of this "
                      f"round, {_shown(base_hash)}")
    _check_numbers(header["numbers"], agreement)
    if agreement.payload == "bfloat16":
        tensors = {name: base[name].detach().cpu().double() + tensor.double() for name, tensor in tensors.items()}
    return SiteUpdate(site=site, round=round, numbers=_numbers_from_json(header["numbers"]), tensors=tensors)


def _pack(agreement: Agreement, kind: str, own: Mapping[str, Any], tensors: Mapping[str, Tensor],
          start: Mapping[str, Tensor]) -> bytes:
    _check_finite({**tensors, **start})
    header = {"format": FORMAT_NAME, "version": PROTOCOL_VERSION, "kind": kind, "agreement": agreement.facts(), **own,
              "tensors": tensors_hash(tensors)}
    header["seal"] = _seal(header)
    data = safetensors.torch.save({**tensors, **start}, metadata={_HEADER_KEY: _to_json(header)})
    if _header_size(data) > HEADER_LIMIT:
        raise Refused(f"its header has {_header_size(data)} bytes; expected at most {HEADER_LIMIT}: shorten the names "
                      "of the classes")
    return data


def _unpack(data: bytes, agreement: Agreement, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the header and the tensors, in the agreed order. Fields of one kind of message are not checked."""
    header, found, offset = _read_header(data)
    if header.get("format") != FORMAT_NAME:
        raise Refused(f"its header does not name the format {FORMAT_NAME}")
    if _to_json(header.get("version")) != _to_json(PROTOCOL_VERSION):
        raise Refused(f"the protocol version is {_shown(header.get('version'))} there and {PROTOCOL_VERSION} here; use "
                      "the same version of this project everywhere")
    if header.get("kind") != kind:
        raise Refused(f"it is a message of the kind {_shown(header.get('kind'))}; expected {_shown(kind)}")
    _check_names("header field", header, [*_FIELDS, *_OWN_FIELDS[kind]])
    if difference := _first_difference(header["agreement"], agreement.facts()):
        raise Refused(difference)
    dtype = PAYLOADS[agreement.payload]
    lists = {"tensors": agreement.tensors, **({"start": agreement.start} if header.get("start") is not None else {})}
    start = lists.get("start", {})
    _check_layout(_layout(agreement.tensors, dtype) | _layout(start, torch.float32), found)
    expected = bytes_of(agreement.tensors, dtype) + bytes_of(start, torch.float32)
    if len(data) - offset != expected:
        raise Refused(f"it has {len(data) - offset} bytes of tensors; expected {expected}")
    if header.pop("seal") != _seal(header):
        raise Refused("its header was changed or damaged on the way")
    try:
        tensors = safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise Refused(f"it is not in the safetensors format ({_shown(str(error))})") from error
    tensors = {name: tensors[name] for name in [*agreement.tensors, *start]}
    for key, names in lists.items():
        if header[key] != tensors_hash({name: tensors[name] for name in names}):
            raise Refused("its tensors were changed or damaged on the way")
    _check_finite(tensors)
    return header, tensors


def _read_header(data: bytes) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Return the header, the layout of the tensors, and where their bytes begin. Tensors are not read."""
    offset = 8 + _header_size(data)
    if not 8 < offset <= min(len(data), 8 + HEADER_LIMIT):
        raise Refused(f"it is not in the safetensors format, or its header has more than {HEADER_LIMIT} bytes")
    try:
        layout = _parse(data[8:offset].decode().rstrip(" "))
        [(key, text)] = layout.pop("__metadata__").items()
        header = _parse(text)
        found = {name: (_DTYPES.get(entry["dtype"], entry["dtype"]), entry["shape"]) for name, entry in layout.items()}
        if key != _HEADER_KEY or not isinstance(header, dict) or any(len(entry) != 3 for entry in layout.values()):
            raise ValueError("metadata that is not declared")
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError) as error:
        raise Refused("its header is not that of a message between a server and a site, or is damaged") from error
    return header, found, offset


def _header_size(data: bytes) -> int:
    return int.from_bytes(data[:8], "little")


def _parse(text: str) -> Any:
    """Parse JSON that `_to_json` wrote: no name twice, no other spelling of a number, which could hide something."""
    value = json.loads(text)
    if _to_json(value) != text:
        raise ValueError("JSON that is written in another way")
    return value


def _to_json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _seal(header: Mapping[str, Any]) -> str:
    """Return the sha256 of a header; it finds damage, and does not tell who wrote it."""
    return hashlib.sha256(_to_json(header).encode()).hexdigest()


def _cast(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in tensors.items()}


def _layout(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, Any]:
    return {name: (dtype, list(shape)) for name, shape in shapes.items()}


def _layout_of(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: (tensor.dtype, list(tensor.shape)) for name, tensor in tensors.items()}


def _type_name(dtype: Any) -> str:
    """Return "float32"; for a type of safetensors that no message has, its name there."""
    return str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else _shown(dtype)


# Checks; each raises Refused.


def _check_layout(expected: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    _check_names("tensor", found, expected)
    for name, (dtype, shape) in expected.items():
        if found[name][1] != shape:
            raise Refused(f"the tensor {name} has the shape {_shown(found[name][1])}; expected {shape}")
        if found[name][0] != dtype:
            raise Refused(f"the tensor {name} is {_type_name(found[name][0])}; expected {_type_name(dtype)}")


def _check_names(what: str, found: Any, expected: Collection[str], *, all_needed: bool = True) -> None:
    if not isinstance(found, dict):
        raise Refused(f"it has {_shown(found)}; expected a value for each {what}")
    for name in expected:
        if all_needed and name not in found:
            raise Refused(f"the {what} {name} is missing")
    for name in found:
        if name not in expected:
            raise Refused(f"the {what} {_shown(name)} is not among those that were agreed")


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise Refused(f"the tensor {name} has values that are not finite")


def _check_equal(what: str, found: Any, expected: Any) -> None:
    if _to_json(found) != _to_json(expected):
        raise Refused(f"{what} is {_shown(found)}; expected {_shown(expected)}")


def _check_round(found: Any, expected: int | None = None) -> None:
    _check_number("round", found, 0, whole=True)
    if expected is not None:
        _check_equal("round", found, expected)


def _check_constants(found: Any, expected: str) -> None:
    if found != expected:
        raise Refused(f"the constants have the sha256 {_shown(found)}; expected {_shown(expected)}: start the server "
                      "and all sites with the same --seed and --resume")


def _check_number(name: str, value: Any, least: float, most: float = LARGEST_COUNT, *, whole: bool = False) -> None:
    fits = type(value) is int if whole else isinstance(value, (int, float)) and not isinstance(value, bool)
    if not fits or not least <= value <= most:  # False for NaN
        raise Refused(f"{name} is {_shown(value)}; expected a {'whole ' if whole else ''}number from {least} to {most}")


def _check_numbers(declared: Any, agreement: Agreement) -> None:
    """Check what `_numbers_to_json` returns."""
    _check_names("number", declared, SiteNumbers.__dataclass_fields__)
    _check_number("num_images", declared["num_images"], 1, whole=True)
    _check_number("num_iterations", declared["num_iterations"], 1, declared["num_images"], whole=True)
    # With differential privacy nothing is declared that depends on images: no counts of classes, p and statistics.
    is_private = agreement.privacy is not None
    _check_number("augment_p", declared["augment_p"], 0, 0 if is_private else 1)
    _check_number("seconds", declared["seconds"], 0)
    counts = declared["images_of_class"]
    if not isinstance(counts, list) or len(counts) != agreement.num_classes:
        raise Refused(f"images_of_class is {_shown(counts)}; expected a number for each of {agreement.num_classes} "
                      "classes")
    for label, count in enumerate(counts):
        _check_number(f"images_of_class[{label}]", count, 0, declared["num_images"], whole=True)
    if sum(counts) > declared["num_images"]:
        raise Refused(f"images_of_class has {sum(counts)} images; expected at most num_images, "
                      f"{declared['num_images']}")
    statistics = declared["statistics"]
    _check_names("statistic", statistics, () if is_private else STATISTICS, all_needed=False)
    for name, entry in statistics.items():
        _check_names(f"number of {name}", entry, ["num", "mean", "std"])
        _check_number(f"{name}: num", entry["num"], 1, whole=True)
        for key in ("mean", "std"):
            if entry[key] is not None:
                _check_number(f"{name}: {key}", entry[key], -LARGEST_STATISTIC, LARGEST_STATISTIC)


def _numbers_to_json(numbers: SiteNumbers) -> dict[str, Any]:
    statistics = {name: {key: None if isinstance(value, float) and not abs(value) <= LARGEST_STATISTIC else value
                         for key, value in entry.items()} for name, entry in numbers.statistics.items()}
    return {**vars(numbers), "images_of_class": list(numbers.images_of_class), "statistics": statistics}


def _numbers_from_json(declared: Mapping[str, Any]) -> SiteNumbers:
    statistics = {name: {key: math.nan if value is None else value for key, value in entry.items()}
                  for name, entry in declared["statistics"].items()}
    return SiteNumbers(**{**declared, "images_of_class": tuple(declared["images_of_class"]), "statistics": statistics})


def _first_difference(theirs: Any, mine: Any, where: str = "") -> str | None:
    """Return how two values of JSON differ, as "G.z_dim is 64 there and 512 here"; None if they are equal."""
    if not (isinstance(theirs, dict) and isinstance(mine, dict)):
        same = _to_json(theirs) == _to_json(mine)
        return None if same else f"{where or 'the agreement'} is {_shown(theirs)} there and {_shown(mine)} here"
    for name in [*mine, *(name for name in theirs if name not in mine)]:
        inner = f"{where}.{name}" if where else name
        if name not in theirs:
            return f"{inner} is missing there and {_shown(mine[name])} here"
        if name not in mine:
            inner = inner if inner.isascii() and inner.isprintable() else _shown(inner)
            return f"{inner} is given there and missing here"
        if found := _first_difference(theirs[name], mine[name], inner):
            return found
    return None


def _shown(value: Any) -> str:
    """Return a value for a message: one line of ASCII, which may come from anyone."""
    text = json.dumps(value, default=repr)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
