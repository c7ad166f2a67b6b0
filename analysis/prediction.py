"""What a classifier says about images: probabilities, and what in an image speaks for a label; `study.py predict`.

Saliency maps show where the last convolutional features of a label are. LIMIT: they are coarse, 7x7 positions in
most networks at 224 pixels and 2x2 at 64, and a plausible map does not mean that the label is right.
"""

import csv
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor, nn

from analysis.backbones import AUTO
from analysis.classifier import Classifier, open_classifier
from dnnlib.cli import GroupedCommand, UserError, UserPath
from dnnlib.files import atomic_write
from dnnlib.progress import Progress
from dnnlib.text import plural
from generation.command import flag, flags_of
from generation.pictures import check_file
from imagesets.classes import CLASS
from imagesets.contact_sheet import sheet_name
from imagesets.reader import ImageSet
from metrics.detectors.base import exact_float32
from metrics.image_sources import SelectedImages, SetImages
from torch_utils.device import DEVICE_HELP, check_counts, memory_advice, settle_device
from torch_utils.distributed import Place
from torch_utils.images import save_grid

BATCH = 64
_TRANSFORMERS = ("vit_", "swin_", "maxvit_")  # their last features are not maps of convolutions
_OPACITY = 0.6  # of the color where a map is 1
_COLORS = "turbo"  # of matplotlib
_EVEN = 0.5  # the threshold of a file that records none


def predict_probabilities(classifier: Classifier, images: SelectedImages, *, batch: int = BATCH,
                          workers: int | None = None,
                          on_images: Callable[[int], None] = lambda count: None) -> np.ndarray:
    """Return the probability of each label for each image: float64 [N, L].

    classifier:  in eval mode, on any device
    batch:       images per pass
    workers:     number of processes that decode images, as for `SelectedImages.batches`
    on_images:   called with the number of images that were finished

    Raises UserError if an image cannot be read.
    """
    device = classifier.mean.device
    ranges = [range(start, min(start + batch, len(images))) for start in range(0, len(images), batch)]
    found = [np.zeros((0, len(classifier.labels)))]
    with memory_advice(batch), closing(images.batches(ranges, workers)) as batches:
        for pixels in batches:
            found.append(classifier.probabilities(pixels.to(device)).cpu().numpy())
            on_images(len(pixels))
    return np.concatenate(found)


def grad_cam(classifier: Classifier, pixels: Tensor, columns: Sequence[int]) -> Tensor:
    """Return what in each image speaks for a label: float32 [N, H, W] on the CPU; the largest value of a map is 1.

    Grad-CAM (Selvaraju et al. 2017, eq. 1 and 2), with A_k the last maps of features of more than one pixel:

        alpha_k = mean over pixels of dy / dA_k        map = relu(sum_k alpha_k A_k)

    The score y is the label's logit; of two labels, its difference to the other one, which alone decides. A map is all
    0 where nothing speaks for the label.

    classifier: in eval mode;  pixels: uint8 [N, 3, H, W] on its device;  columns: number of the label for each image

    Raises UserError for transformers, which have no such maps.
    """
    check_has_maps(classifier)
    found: list[Tensor] = []

    def keep(layer: nn.Module, inputs: tuple[Tensor, ...], output: object) -> None:
        is_map = isinstance(output, Tensor) and output.ndim == 4 and output.shape[2:].numel() > 1
        if is_map and not isinstance(layer, nn.AdaptiveAvgPool2d):  # VGG's gives 7x7 pixels
            found[:] = [output]

    preprocessing = classifier.backbone.preprocessing
    hooks = [layer.register_forward_hook(keep) for layer in classifier.backbone.network.modules()]
    try:
        with torch.enable_grad(), exact_float32():
            images = preprocessing.resize_and_crop(pixels).requires_grad_()  # weights may need no gradients
            logits = classifier.logits_of(images)
            rows, chosen = torch.arange(len(pixels)), torch.tensor(columns)
            scores = logits[rows, chosen]
            if logits.shape[1] == 2:
                scores = scores - logits[rows, 1 - chosen]
            gradients, = torch.autograd.grad(scores.sum(), found)
    finally:
        for hook in hooks:
            hook.remove()
    alpha = gradients.mean(dim=(2, 3), keepdim=True)
    maps = preprocessing.place((alpha * found[0].detach()).sum(1).relu(), *pixels.shape[2:]).cpu()
    return maps / maps.amax(dim=(1, 2), keepdim=True).clamp(min=torch.finfo(maps.dtype).tiny)


def check_has_maps(classifier: Classifier) -> None:
    """Raise UserError if `grad_cam` does not work."""
    if classifier.backbone.name.startswith(_TRANSFORMERS):
        raise UserError(f"--saliency is given, but {classifier.backbone.name} is a transformer, which has no maps of "
                        "convolutional features to show; leave --saliency out")


def overlay(pixels: Tensor, maps: Tensor) -> Tensor:
    """Return images with colors where a map is above 0: uint8 [N, 3, H, W].

    pixels: uint8 [N, 3, H, W] on the CPU;  maps: float32 [N, H, W] in [0, 1]
    """
    from matplotlib import colormaps  # here: it takes a second to import

    colors = torch.from_numpy(colormaps[_COLORS](maps.numpy())[..., :3]).permute(0, 3, 1, 2).float() * 255
    opacity = _OPACITY * maps[:, None]
    return ((1 - opacity) * pixels + opacity * colors).round().clamp(0, 255).to(torch.uint8)


# The command.

HELP = """Compute a classifier's probabilities for images, with labels or without.

\b
python study.py predict --model=classifiers/models/real-seed0.safetensors --data=images.zip --out=probabilities.csv
"""
_MODEL, _OUTPUT, _SPEED = "Classifier and images", "Output", "Speed and devices"


@dataclass(frozen=True, kw_only=True)
class PredictRequest:
    """The options of `study.py predict`. Raises UserError if one is missing or out of range."""

    model: str | None = flag(_MODEL, "FILE", "Classifier, a .safetensors file of study.py classify. Required.",
                             type=UserPath())
    data: str | None = flag(_MODEL, "PATH", "Images: a data set, or a folder or zip of images of one size. Required.",
                            type=UserPath())
    weights: str = flag(
        _MODEL, "FILE", "File with the weights of the classifier's backbone, if only its head was trained and they are "
        f"not on this machine; {AUTO} looks for them, and downloads them.", default=AUTO, type=UserPath())
    out: str | None = flag(_OUTPUT, "FILE.csv", "Table of probabilities. An existing file is replaced. Required.",
                           type=UserPath())
    saliency: str | None = flag(
        _OUTPUT, "DIR", "Also write a PNG for each image: the image, and beside it which parts speak for the label "
        "(Grad-CAM): with two labels for the second one, else for the most probable one.", type=UserPath())
    batch: int = flag(_SPEED, "INT", "Images per pass.", default=BATCH)
    device: str = flag(_SPEED, "NAME", DEVICE_HELP, default="auto")
    workers: int | None = flag(_SPEED, "INT", "Number of processes that decode images.",
                               shown="the number of CPU cores, at most 8")

    def __post_init__(self) -> None:
        for name, example in (("model", "classifier.safetensors"), ("data", "images.zip"), ("out", "table.csv")):
            if getattr(self, name) is None:
                raise UserError(f"--{name} is missing; expected a path, such as --{name}={example}, or see --help")
        check_counts(batch=self.batch, workers=self.workers)
        check_file("--out", self.out, ".csv")
        if self.saliency is not None and Path(self.saliency).exists() and not Path(self.saliency).is_dir():
            raise UserError(f"--saliency is {self.saliency}, which is a file; expected a folder")


def make_predict_command() -> click.Command:
    """Return the command `study.py predict`."""
    return GroupedCommand("predict", callback=_predict, params=flags_of(PredictRequest), help=HELP,
                          short_help="Compute the probabilities that a classifier gives images.")


def _predict(**flags: Any) -> int:
    request, place = PredictRequest(**flags), Place.from_environment()
    if place.count > 1:
        raise UserError(f"{place.count} processes were started; expected one: start predict without torchrun")
    device = settle_device(request.device, place, 1, tunes_malloc=True)
    classifier = open_classifier(request.model, weights=request.weights, device=device)
    if request.saliency is not None:
        check_has_maps(classifier)
        Path(request.saliency).mkdir(parents=True, exist_ok=True)
    images, described = SetImages(request.data).select(), ImageSet(request.data)
    _note_size(classifier, images)
    with Progress(len(images), "images") as progress:
        probabilities = predict_probabilities(classifier, images, batch=request.batch, workers=request.workers,
                                              on_images=progress.advance)
    threshold = threshold_of(classifier)
    columns = choose_labels(probabilities, threshold)
    write_table(request.out, classifier.labels, described, probabilities, columns)
    rule = "the most probable label" if threshold is None else f"{classifier.labels[1]} from {threshold:g} on"
    click.echo(f"{request.out}: {plural(len(images), 'image')}; predicted is {rule}")
    if request.saliency is not None:
        shown = np.ones_like(columns) if len(classifier.labels) == 2 else columns
        _write_saliency(Path(request.saliency), classifier, images, described.names, probabilities, shown, request)
    return 0


def choose_labels(probabilities: np.ndarray, threshold: float | None) -> np.ndarray:
    """Return the number of the predicted label of each image, int64 [N].

    probabilities:  float64 [N, L]
    threshold:      with two labels, the probability from which on the second is predicted; None = the most probable one
    """
    return probabilities.argmax(axis=1) if threshold is None else (probabilities[:, 1] >= threshold).astype(np.int64)


def write_table(path: str, labels: Sequence[str], images: ImageSet, probabilities: np.ndarray,
                columns: np.ndarray) -> None:
    """Write a CSV file: image, class if there are classes, probability of the second of two labels or of each, and the
    predicted label. Raises OSError.

    columns: number of the predicted label of each image, int64 [N]
    """
    classes = images.class_names() if images.label_kind == CLASS else None
    header = ["image", *(["class"] if classes else []),
              *(["probability"] if len(labels) == 2 else [f"probability_{label}" for label in labels]), "predicted"]
    with atomic_write(path, text=True) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        for row, (name, values, column) in enumerate(zip(images.names, probabilities, columns)):
            label = images.label(row)
            known = [] if classes is None else ["" if label is None else classes[label]]
            shown = values[1:] if len(labels) == 2 else values
            writer.writerow([name, *known, *(f"{value:.6g}" for value in shown), labels[column]])


def threshold_of(classifier: Classifier) -> float | None:
    """Return the probability from which on the second of two labels is predicted; None with more labels."""
    if len(classifier.labels) != 2:
        return None
    thresholds = classifier.info.get("thresholds")
    found = thresholds.get("balanced") if isinstance(thresholds, dict) else None
    return float(found) if isinstance(found, (int, float)) else _EVEN


def _note_size(classifier: Classifier, images: SelectedImages) -> None:
    trained, found = classifier.info.get("resolution"), list(images.images.shape[1:])
    if isinstance(trained, list) and len(trained) == 2 and trained != found:
        print(f"note: the images are of {found[1]}x{found[0]} pixels, those that the classifier was trained on of "
              f"{trained[1]}x{trained[0]}; they are resized", file=sys.stderr)


def _write_saliency(folder: Path, classifier: Classifier, images: SelectedImages, names: Sequence[str],
                    probabilities: np.ndarray, columns: np.ndarray, request: PredictRequest) -> None:
    """Write a picture for each image, its name numbered, so that it is safe and unique."""
    device = classifier.mean.device
    ranges = [range(start, min(start + request.batch, len(images))) for start in range(0, len(images), request.batch)]
    with (Progress(len(images), "pictures") as progress, memory_advice(request.batch),
          closing(images.batches(ranges, request.workers)) as batches):
        for rows, pixels in zip(ranges, batches):
            chosen = columns[rows.start:rows.stop].tolist()
            pictures = overlay(pixels, grad_cam(classifier, pixels.to(device), chosen))
            for row, image, picture, column in zip(rows, pixels, pictures, chosen):
                label = f"{classifier.labels[column][:16]} {probabilities[row, column]:.2f}"
                save_grid(folder / sheet_name(row, len(images), names[row]), [image, picture], columns=2, rows=1,
                          labels=[label])
                progress.advance()
    click.echo(f"{folder}: {plural(len(images), 'picture')}")
