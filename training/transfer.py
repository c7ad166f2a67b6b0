"""Start a run from the weights of a trained network: --resume.

Classes are matched by name. A class is a column of the embeddings mapping.embed.weight, [E, c_dim], of G, D and G_ema.
A layer is taken as a whole, if the file has all its tensors with the same names and shapes.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dnnlib.cli import UserError
from dnnlib.text import listed
from dnnlib.typed_config import ConfigError
from imagesets.classes import VECTOR, class_order, label_kind_of, named_classes
from imagesets.reader import describe_shape
from training.config import TrainConfig
from training.dataset import ImageDataset, history_of
from training.discriminator import Discriminator
from training.generator import Generator
from training.options import TrainOptions, network_configs
from training.presets import CFG_NAMES, choose_preset
from training.snapshot import Networks, load_network, read_info
from training.state import TrainingState

_EMBED, _FIRST = "mapping.embed.", "mapping.fc0.weight"  # the first layer takes z beside the embedded class
_FIRST_Z, _FIRST_CLASSES = f"{_FIRST}[z]", f"{_FIRST}[classes]"  # its columns
_W_AVG = "mapping.w_avg"  # the mean output of the mapping network
_ALONE = ("const", "w_avg")  # tensors that do not belong to a layer
_FILTER = "resample_filter"  # a constant, which messages leave out


@dataclass(frozen=True, kw_only=True)
class Labels:
    """The labels that condition a network."""

    c_dim: int  # 0 = unconditional
    names: Sequence[str] | None = None  # of the classes, or of the numbers of a vector
    kind: str | None = None  # as imagesets.classes.label_kind_of; None = unknown

    @classmethod
    def of_network(cls, c_dim: int, info: Mapping[str, Any]) -> "Labels":
        """Read the labels from a network file's info; names are ignored if their number is not c_dim."""
        return cls(c_dim=c_dim, names=named_classes(info, c_dim), kind=label_kind_of(info, c_dim))

    def __str__(self) -> str:
        if self.c_dim == 0:
            return "without classes"
        named = "" if self.names is None else f" {listed(self.names)}"
        if self.kind == VECTOR:
            return f"with vectors of {self.c_dim} numbers{named}"
        return f"with the classes{named}" if named else f"with {self.c_dim} classes"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Which tensors of a network in the file are copied to the run's network, by name."""

    taken: list[str]
    random: list[str]  # of the run: they keep their random weights
    ignored: list[str]  # of the file: the run's network does not have them
    # Tensors of layers that differ -> shapes in the file and in the run, None if missing; tensors of classes are left
    # out.
    differing: dict[str, tuple[list[int] | None, list[int] | None]]

    @property
    def fits(self) -> bool:
        return not self.differing

    def layers(self, names: Sequence[str]) -> list[str]:
        """Return the largest modules whose tensors are all in `names`; constants are left out."""
        every = [name for name in (*self.taken, *self.random, *self.ignored) if not name.endswith(_FILTER)]
        split = {module for name in set(every) - set(names) for module in _modules_of(name)}
        found = [next((module for module in _modules_of(name) if module not in split), name)
                 for name in every if name in names]
        return list(dict.fromkeys(found))

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Return numbers of tensors and names of layers, as plain JSON types."""
        return {what: {"tensors": len(names), "layers": self.layers(names)}
                for what, names in (("taken", self.taken), ("begun_anew", self.random), ("ignored", self.ignored))}

    def __str__(self) -> str:
        parts = [f"{len(self.taken)} tensors taken"]
        for names, what in ((self.random, "start from random weights"), (self.ignored, "of the file are not used")):
            if names:
                parts.append(f"{len(names)} {what} ({', '.join(self.layers(names))})")
        return "; ".join(parts)


@dataclass(frozen=True, kw_only=True)
class Transferred:
    """What was taken from a network file."""

    networks: dict[str, Comparison]  # G, D and G_ema
    notes: tuple[str, ...] = ()  # on classes, and on networks that the file does not have

    def lines(self) -> list[str]:
        """Return the notes, and one line for each network."""
        return [*self.notes, *(f"{role}: {comparison}" for role, comparison in self.networks.items())]

    def to_dict(self) -> dict[str, dict[str, Any]]:
        return {role: comparison.to_dict() for role, comparison in self.networks.items()}


def transfer_for(state: TrainingState, config: TrainConfig, dataset: ImageDataset) -> Transferred:
    """Call `transfer_weights` for a run, with advice on settings that would fit in its errors. Raises UserError."""
    labels = Labels(c_dim=config.dataset.c_dim, names=dataset.label_names, kind=dataset.label_kind)
    return transfer_weights(state, config.resume, labels, new_classes=config.resume_classes == "new",
                            partial=config.resume_partial, advise=lambda networks: _settings_for(networks, config))


def transfer_weights(state: TrainingState, path: str | os.PathLike, labels: Labels | None = None, *,
                     new_classes: bool = False, partial: bool = False,
                     advise: Callable[[Networks], str | None] = lambda networks: None) -> Transferred:
    """Copy parameters and buffers of equal names into the networks of `state`: weights only, starting at image 0.

    labels:       of the run; classes are matched by name, with None by number
    new_classes:  keep random weights for everything that belongs to classes; their numbers may differ
    partial:      keep random weights for layers that are missing or have other shapes in the file
    advise:       returns the settings with which all layers of a network file would fit, for messages

    If the file has no G, its G_ema is used for G.
    Raises UserError, with the state unchanged, if the file cannot be read, its classes differ, frozen layers of the
    discriminator would keep random weights, or, unless `partial`, the layers differ.
    """
    _check_frozen(state.D)
    try:
        networks = load_network(path, device="cpu")
    except (ValueError, FileNotFoundError) as error:
        raise UserError(f"--resume={path}: {error}") from error
    theirs = Labels.of_network(networks.G_ema.c_dim, networks.config.get("info") or {})
    mine = Labels(c_dim=state.G_ema.c_dim) if labels is None else labels
    order = None if new_classes else class_order(theirs.names, mine.names)
    notes = [_note(theirs, mine, new=new_classes, compared=labels is not None),
             "G: the file has none, so its G_ema is used" if networks.G is None else None,
             "D: the file has none, so it starts from random weights" if networks.D is None else None]
    sources = {"G": networks.G_ema if networks.G is None else networks.G, "D": networks.D, "G_ema": networks.G_ema}
    comparisons: dict[str, Comparison] = {}
    copies: list[tuple[Tensor, Tensor]] = []
    for role, source in sources.items():
        of_classes = _class_tensors(role, theirs, mine, new=new_classes)
        splits = _FIRST_CLASSES in of_classes
        given, target = (_tensors_of(network, splits=splits) for network in (source, getattr(state, role)))
        found = comparisons[role] = _compare(given, target, of_classes)
        for name in found.taken:
            value = given[name]
            copies.append((target[name],
                           value[:, order] if order is not None and name == f"{_EMBED}weight" else value))
    _check_fits(path, networks, state, comparisons, partial=partial, advise=advise)
    _check_classes(path, theirs, mine, new_classes)
    _check_frozen(state.D, comparisons["D"])
    with torch.no_grad():
        for tensor, value in copies:
            tensor.copy_(value)
    return Transferred(networks=comparisons, notes=tuple(note for note in notes if note is not None))


def read_history(path: str | os.PathLike | None) -> list[Any]:
    """Return what the network of --resume was trained on, as `training.dataset.history_of`; [] without one."""
    if path is None:
        return []
    try:
        return history_of(read_info(path))
    except (ValueError, OSError) as error:
        raise UserError(f"--resume={path}: {error}") from error


def _tensors_of(network: nn.Module | None, *, splits: bool) -> dict[str, Tensor]:
    """Return a network's tensors by name; with `splits` the first layer's columns of z and of classes separately."""
    tensors = {} if network is None else network.state_dict()
    if splits and _FIRST in tensors:
        weight = tensors.pop(_FIRST)
        # The columns of z come first. With classes the sum has twice as many terms, each with half the variance.
        tensors[_FIRST_Z] = weight[:, :network.z_dim]
        if weight.shape[1] > network.z_dim:
            tensors[_FIRST_CLASSES] = weight[:, network.z_dim:]
    return tensors


def _class_tensors(role: str, theirs: Labels, mine: Labels, *, new: bool) -> tuple[str, ...]:
    """Return the prefixes of tensors that are not taken since they depend on the classes."""
    if not new and theirs.c_dim == mine.c_dim:
        return ()
    if (theirs.c_dim == 0) == (mine.c_dim == 0):
        return (_EMBED,)
    return ("mapping.", "b4.out.") if role == "D" else (_EMBED, _FIRST_CLASSES)


def _compare(given: Mapping[str, Tensor], target: Mapping[str, Tensor], of_classes: tuple[str, ...]) -> Comparison:
    """Compare the tensors of a file with those of a run; a layer is taken as a whole or not at all."""
    def shapes_by_layer(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, torch.Size]]:
        layers: dict[str, dict[str, torch.Size]] = {}
        for name, tensor in tensors.items():
            if not name.startswith(of_classes):
                layers.setdefault(_layer_of(name), {})[name] = tensor.shape
        return layers

    theirs, mine = shapes_by_layer(given), shapes_by_layer(target)
    differing = {name: tuple(list(layers[name]) if name in layers else None for layers in (there, here))
                 for there, here in ((theirs.get(layer, {}), mine.get(layer, {})) for layer in {**theirs, **mine})
                 for name in {**there, **here} if there.get(name) != here.get(name)}
    odd = {_layer_of(name) for name in differing}
    if any(layer.startswith("mapping.") for layer in odd):
        odd.add(_W_AVG)
    taken = [name for name in target if not name.startswith(of_classes) and _layer_of(name) not in odd]
    return Comparison(taken=taken, random=[name for name in target if name not in taken],
                      ignored=[name for name in given if name not in target], differing=differing)


def _layer_of(name: str) -> str:
    """Return the layer that a tensor belongs to, including the affine map of its styles; its own name if it has none.

    Constants of a whole block count as a layer.
    """
    module, _, tensor = name.rpartition(".")
    return name if tensor in _ALONE else module.removesuffix(".affine")


def _modules_of(name: str) -> list[str]:
    """Return the modules that contain a tensor, the outermost first."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _check_fits(path: str | os.PathLike, networks: Networks, state: TrainingState,
                comparisons: Mapping[str, Comparison], *, partial: bool,
                advise: Callable[[Networks], str | None]) -> None:
    """Raise UserError if layers differ without `partial`, or if no layer fits."""
    if all(comparison.fits for comparison in comparisons.values()):
        return
    takes_none = not any(comparison.layers(comparison.taken) for comparison in comparisons.values())
    if partial and not takes_none:
        return
    there, here = zip(*_differences(networks, state, comparisons), strict=True)
    settings = advise(networks)
    ways = [f"{settings} fits"] if settings is not None else []
    if not takes_none:
        ways.append("--resume-partial=1 takes the layers that match and starts the others from random weights")
    result = ", so that no layer fits" if takes_none else ""
    raise UserError(f"--resume={path}: the network has {', '.join(there)}, but this run has {', '.join(here)}{result}; "
                    f"expected the same: {'; or '.join(ways) or 'use another network'}")


def _differences(networks: Networks, state: TrainingState,
                 comparisons: Mapping[str, Comparison]) -> list[tuple[str, str]]:
    """Describe how the networks of a file and of a run differ: (file, run) for each difference, at least one."""
    theirs, mine = networks.G_ema, state.G_ema
    pairs = [tuple(text(network) for network in (theirs, mine)) for text in (
        lambda G: f"{describe_shape((G.img_channels, G.img_resolution, G.img_resolution))} images",
        lambda G: f"{G.mapping.num_layers} mapping layers",
        lambda G: f"latents of {G.z_dim} and styles of {G.w_dim} numbers")]
    channels = [tuple(f"{len(getattr(G.synthesis, f'b{res}').conv1.weight)} channels at {res}x{res}"
                      for G in (theirs, mine))
                for res in mine.synthesis.block_resolutions if res in theirs.synthesis.block_resolutions]
    pairs += [pair for pair in channels if pair[0] != pair[1]][:1]
    pairs.append(("no discriminator", "one") if networks.D is None else tuple(
        f"a discriminator of the {D.init_kwargs['architecture']} architecture" for D in (networks.D, state.D)))
    found = [pair for pair in pairs if pair[0] != pair[1]]
    if found:
        return found
    role, name, shapes = next((role, name, shapes) for role, comparison in comparisons.items()
                              for name, shapes in comparison.differing.items())
    there, here = (f"no {role}.{name}" if shape is None else f"{role}.{name} of {shape}" for shape in shapes)
    return [(there, here)]


def _settings_for(networks: Networks, config: TrainConfig) -> str | None:
    """Return the settings with which a run of `config` would have networks of these shapes; None if there are none."""
    G, D = networks.G_ema, networks.D
    images = replace(config.dataset, resolution=G.img_resolution, channels=G.img_channels, c_dim=G.c_dim,
                     use_labels=G.c_dim > 0)
    fitting = []
    for cfg in CFG_NAMES:
        try:
            preset = choose_preset(cfg, images.resolution, config.gpus)
            generator, discriminator = network_configs(TrainOptions(precision="fp32"), preset, images)
        except ConfigError:  # the preset does not support the resolution
            continue
        with torch.device("meta"):
            pairs = [(G, Generator(**generator.init_kwargs()))]
            if D is not None:
                pairs.append((D, Discriminator(**discriminator.init_kwargs())))
        if all(_shapes(network) == _shapes(other) for network, other in pairs):
            fitting.append(cfg)
    settings = [] if config.cfg in fitting else [" or ".join(f"--cfg={cfg}" for cfg in fitting)]
    if (images.resolution, images.channels) != (config.dataset.resolution, config.dataset.channels):
        shape = describe_shape((images.channels, images.resolution, images.resolution))
        made = "" if images.resolution == config.dataset.resolution else (
            f" (dataset_tool.py --resolution={images.resolution}x{images.resolution})")
        settings.append(f"a data set of {shape} images{made}")
    return " with ".join(settings) if fitting and settings else None


def _shapes(network: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in network.state_dict().items()}


def _check_frozen(D: nn.Module, comparison: Comparison | None = None) -> None:
    """Raise UserError if more layers are frozen than there are, or, given `comparison`, one with random weights is."""
    frozen, layers = D.init_kwargs["block_kwargs"].get("freeze_layers") or 0, D.freezable_layers()
    if frozen > len(layers):
        raise UserError(f"--freezed is {frozen}; expected at most {len(layers)}, the number of layers of this run's "
                        "discriminator that can be frozen")
    for index, layer in enumerate(layers[:frozen] if comparison is not None else []):
        if f"{layer}.weight" not in comparison.taken:
            raise UserError(f"--freezed is {frozen}, but layer {index + 1} of the discriminator, {layer}, has random "
                            "weights and would never learn; expected layers that are taken from --resume: "
                            + (f"--freezed={index}" if index else "leave --freezed out"))


def _check_classes(path: str | os.PathLike, theirs: Labels, mine: Labels, new_classes: bool) -> None:
    """Raise UserError if classes are to be taken from the network but differ there."""
    if new_classes:
        if theirs.c_dim == mine.c_dim == 0:
            raise UserError(f"--resume-classes is new, but neither {path} nor this run has classes; leave it out")
        return
    kinds_differ = None not in (theirs.kind, mine.kind) and theirs.kind != mine.kind
    names_differ = None not in (theirs.names, mine.names) and class_order(theirs.names, mine.names) is None
    if theirs.c_dim != mine.c_dim or kinds_differ or names_differ:
        raise UserError(f"--resume={path}: the network was trained {theirs}, but this run trains {mine}; expected the "
                        "same: --resume-classes=new starts the class embedding from random weights and takes all else")


def _note(theirs: Labels, mine: Labels, *, new: bool, compared: bool) -> str | None:
    """Return a note on how the classes of network and run are matched; None if they are the same."""
    if new:
        return (f"classes: the embedding starts from random weights; the network was trained {theirs}, and this run "
                f"trains {mine}")
    if not compared or theirs.c_dim == 0 or mine.c_dim == 0:
        return None
    if None in (theirs.names, mine.names):
        who = "the network file" if theirs.names is None else "the data set"
        return f"classes: matched by number, since {who} does not name them; make sure that their order is the same"
    if list(theirs.names) != list(mine.names):
        return f"classes: matched by name; {listed(mine.names)} are {listed(theirs.names)} in the network file"
    return None
