"""Any image encoder of timm as a detector: DINOv2, the image towers of CLIP, models of dermatology, others.

Architecture, names of tensors and preprocessing are timm's; the weights are a file of the user's. Nothing is
downloaded.
"""

import difflib
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Set
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.overrides import TorchFunctionMode

from dnnlib.cli import UserError
from dnnlib.files import sha256_of
from metrics.detectors.base import Detector, WeightsFile, check_tensors, read_file

PREFIX = "timm:"  # of the names of these detectors
_EXAMPLE = "timm:vit_small_patch14_dinov2.lvd142m"
# Training programs save the tensors under these names; the first one counts: averages come before what they average.
_NESTS = ("state_dict_ema", "model_ema", "teacher", "target_encoder", "state_dict", "model", "encoder")
_WRAPPERS = ("module.", "_orig_mod.", "model.", "backbone.", "encoder.")  # before the names of an encoder's tensors


class TimmEncoder(Detector):
    """The features are the pooled outputs of the network, which timm's classifier would get.

    Of a vision transformer, these are the class token or the average of the tokens, as its architecture pools them,
    after the last normalization; of a CLIP tower, they are not yet projected to the space shared with texts.
    """

    def __init__(self, name: str, weights: str | os.PathLike):
        """Build timm's network and read its weights.

        name:    timm:NAME; a tag in the name (after its point) only chooses the preprocessing
        weights: a file of timm, DINOv2 or OpenCLIP, or one of a training program that uses timm's names for tensors

        Raises UserError if timm is not installed, or does not know the name or the file, OSError if the file cannot be
        opened.
        """
        super().__init__()
        _check_name(name)
        with warnings.catch_warnings(action="ignore"):  # timm's and torchvision's, about versions of other packages
            import timm  # here: it is optional (the extra `timm`), and importing it takes seconds

            architecture = name.removeprefix(PREFIX)
            with torch.random.fork_rng(devices=[]):  # the random weights drawn here are replaced
                network = timm.create_model(architecture, num_classes=0)
            with torch.device("meta"):
                whole = timm.create_model(architecture)
            module = sys.modules[timm.models.model_entrypoint(architecture).__module__]
            moved = _load(network, weights, expected_file(name), whole.state_dict().keys(),
                          getattr(module, "checkpoint_filter_fn", None))
            config = timm.data.resolve_model_data_config(network)
            steps = timm.data.create_transform(**config, is_training=False, normalize=False).transforms
        self._resize, self._crop, self._interpolation = *steps[:2], config["interpolation"]
        self.name, self.network, self.num_features = name, network, network.head_hidden_size
        self.register_buffer("mean", 255 * torch.tensor(config["mean"]).reshape(3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(config["std"]).reshape(3, 1, 1))
        self.preprocessing = f"{_describe(config, self._resize.size)} (timm {timm.__version__}"
        self.preprocessing += "; positions resampled from another image size)" if moved else ")"
        self.weights_sha256 = sha256_of(weights)
        self.requires_grad_(False).eval()

    def _features(self, pixels: Tensor) -> Tensor:
        features = self.network((self.resize_and_crop(pixels) - self.mean) / self.std)
        if features.shape != (len(pixels), self.num_features):
            raise UserError(f"{self.name} turns {len(pixels)} images into {list(features.shape)}; expected "
                            f"[{len(pixels)}, {self.num_features}]: choose an encoder that pools its outputs")
        return features

    def resize_and_crop(self, pixels: Tensor) -> Tensor:
        """Return what timm's transform makes of images opened by Pillow, before normalization: [N, 3, H', W'].

        pixels: uint8 [N, 3, H, W]

        As in Pillow, rows are resized first, and each pass gives whole numbers in [0, 255].
        """
        probe = torch.empty(3, *pixels.shape[2:], dtype=torch.uint8, device="meta")
        height, width = self._resize(probe).shape[1:]
        for size in ((pixels.shape[2], width), (height, width)):
            pixels = interpolate(pixels.float(), size, mode=self._interpolation, antialias=True).round().clamp(0, 255)
        return self._crop(pixels)


def check_has_weights(name: str, weights: str | os.PathLike | None) -> None:
    """Raise UserError if the detector is timm:NAME and no file is given, and tell where such files come from."""
    if name.startswith(PREFIX) and weights is None:
        raise UserError(f"{name} needs --detector-weights=FILE, since nothing is downloaded for it; expected a "
                        "checkpoint of this architecture, such as the file model.safetensors on its page under "
                        "https://huggingface.co/timm")


def expected_file(name: str) -> WeightsFile:
    """Return the file that timm publishes for timm:NAME, for messages."""
    return WeightsFile(name=f"model.safetensors of {name.replace(PREFIX, 'timm/', 1)}")


def _check_name(name: str) -> None:
    architecture = name.removeprefix(PREFIX)
    if not architecture or set(architecture) & {":", "/", "\\"}:  # timm's hf-hub: and local-dir: fetch configurations
        raise UserError(f"the detector is {name}; expected the name of an architecture, such as {_EXAMPLE}, and its "
                        "weights in --detector-weights: nothing is downloaded")
    if find_spec("timm") is None:
        raise UserError(f'{name} needs the package timm, which is not installed: pip install -e ".[timm]"')
    with warnings.catch_warnings(action="ignore"):
        import timm

    known = {*timm.list_models(), *timm.list_models(include_tags=True)}
    if architecture not in known:
        close = [PREFIX + each for each in difflib.get_close_matches(architecture, sorted(known))] or [_EXAMPLE]
        raise UserError(f"the detector is {name}, which timm {timm.__version__} does not have; expected a name such as "
                        f"{' or '.join(close)}: list them with timm.list_models()")


def _load(network: nn.Module, path: str | os.PathLike, file: WeightsFile, whole: Set[str],
          convert: Callable[[dict, nn.Module], Mapping] | None) -> bool:
    """Load a file into timm's network without classifier; return whether positions were resampled.

    file:     the expected file, for messages
    whole:    the names of the tensors of the network with its classifier
    convert:  timm's function from the names and shapes of other programs to its own, if there is one

    The file and the network have to have the same tensors, apart from classifiers. Raises UserError, OSError.
    """
    own = network.state_dict()
    tensors = _unwrap(read_file(path, file), own)
    filters = {tensor.numel() for tensor in tensors.values() if isinstance(tensor, Tensor) and tensor.ndim == 4}
    with _Resampling() as resampling:
        try:
            tensors = tensors if convert is None else convert(tensors, network)
        except Exception as error:  # timm's functions raise almost any exception for tensors of another network
            raise UserError(f"{path} does not have the tensors of this network ({error!r:.100}); expected "
                            f"{file.name}, or a file like it") from error
    # LIMIT: tables of relative positions that timm resamples without torch (BEiT's) are not noticed.
    for place, module in network.named_modules():
        if resampling.happened and isinstance(module, nn.Conv2d) and module.weight.numel() not in filters:
            raise UserError(f"{path} has no tensor {list(module.weight.shape)} for {place}.weight; expected one, as in "
                            f"{file.name}: does the file belong to a network with patches of another size?")
    classifiers = network.pretrained_cfg["classifier"] or ()
    heads = tuple(f"{head}." for head in ((classifiers,) if isinstance(classifiers, str) else classifiers))
    layout = {name: tensor.shape for name, tensor in own.items() if tensor.is_floating_point()}
    kept = {name: tensor for name, tensor in tensors.items()
            if name in layout or not (name in own or name in whole or str(name).startswith(heads))}
    network.load_state_dict(own | check_tensors(kept, layout, path, file))
    return resampling.happened


def _unwrap(found: Mapping[str, object], own: Mapping[str, Tensor]) -> dict[str, object]:
    """Return the tensors of the encoder in a file, by the names that they have in the program that wrote it."""
    for _ in _NESTS:  # a few levels
        nest = next((name for name in _NESTS if isinstance(found.get(name), Mapping)), None)
        found = found if nest is None else found[nest]
    for prefix in _WRAPPERS * 2:
        if not own.keys() & found.keys() and any(str(name).startswith(prefix) for name in found):
            found = {name.removeprefix(prefix): tensor for name, tensor in found.items()
                     if str(name).startswith(prefix)}
    return dict(found)


class _Resampling(TorchFunctionMode):
    """Notices whether tensors are resampled inside a `with` block."""

    happened = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.happened |= func is interpolate
        return func(*args, **(kwargs or {}))


def _describe(config: Mapping[str, object], size: int | tuple[int, int]) -> str:
    """Return timm's data configuration in one line.

    size: to which images are resized: of the shorter side, or height and width
    """
    sides = "x".join(map(str, [size] if isinstance(size, int) else size))
    resized = {"squash": f"resized to {sides}", "border": f"resized to fit into {sides}"}
    return (f"{resized.get(config['crop_mode'], f'shorter side resized to {sides}')} ({config['interpolation']}, "
            f"antialiased), center crop {'x'.join(map(str, config['input_size'][1:]))}, x / 255, "
            f"(x - {list(config['mean'])}) / {list(config['std'])}")
