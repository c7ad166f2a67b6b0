"""Read image arrays row by row: MedMNIST's npz files, MNIST's idx files and the CIFAR-10 python archive."""

import gzip
import io
import math
import os
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from dnnlib.cli import UserError
from dnnlib.files import iterate_retrying, retrying, unpack_advice
from dnnlib.restricted_pickle import Call, PickleRefused
from dnnlib.restricted_pickle import load as load_pickle
from imagesets.classes import MAX_CLASSES
from imagesets.folders import Source
from imagesets.reader import image_suffixes

_SPLITS = ("train", "val", "test")
# What reading a damaged file raises (OSError: for a position outside the file).
_DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError, OSError)
_MAX_RATIO = 1032  # gzip's highest compression ratio (zlib's technical notes)
# Class names of MedMNIST's 2D sets by number (Yang et al. 2023, "MedMNIST v2"), as in the package medmnist but without
# commas, which separate names in options. DermaMNIST's are those of HAM10000's table.
_ORGANS = ("bladder", "femur-left", "femur-right", "heart", "kidney-left", "kidney-right", "liver", "lung-left",
           "lung-right", "pancreas", "spleen")
_MEDMNIST = {
    "bloodmnist": ("basophil", "eosinophil", "erythroblast", "immature granulocytes", "lymphocyte", "monocyte",
                   "neutrophil", "platelet"),
    "breastmnist": ("malignant", "normal or benign"),
    "chestmnist": ("atelectasis", "cardiomegaly", "effusion", "infiltration", "mass", "nodule", "pneumonia",
                   "pneumothorax", "consolidation", "edema", "emphysema", "fibrosis", "pleural", "hernia"),
    "dermamnist": ("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc"),
    "octmnist": ("choroidal neovascularization", "diabetic macular edema", "drusen", "normal"),
    "organamnist": _ORGANS, "organcmnist": _ORGANS, "organsmnist": _ORGANS,
    "pathmnist": ("adipose", "background", "debris", "lymphocytes", "mucus", "smooth muscle", "normal colon mucosa",
                  "cancer-associated stroma", "colorectal adenocarcinoma epithelium"),
    "pneumoniamnist": ("normal", "pneumonia"),
    "retinamnist": ("0", "1", "2", "3", "4"),
    "tissuemnist": ("Collecting Duct and Connecting Tubule", "Distal Convoluted Tubule", "Glomerular endothelial cells",
                    "Interstitial endothelial cells", "Leukocytes", "Podocytes", "Proximal Tubule Segments",
                    "Thick Ascending Limb"),
}
_MEDMNIST_COLOR = {"bloodmnist", "dermamnist", "pathmnist", "retinamnist"}
_MEDMNIST_FINDINGS = {"chestmnist"}  # an image can have several, or none
_MEDMNIST_FILE = re.compile(r"([a-z]+)(?:_(?:64|128|224))?(?: ?\(\d+\))?\.npz")  # (1): a second download
_IDX_IMAGES, _IDX_LABELS = 0x0803, 0x0801  # uint8 with three dimensions, and with one
_BATCHES = {"train": tuple(f"data_batch_{number}" for number in range(1, 6)), "test": ("test_batch",)}
_CIFAR_CLASSES = 10
_CIFAR_SIDE = 32
_CIFAR_BYTES = 3 * _CIFAR_SIDE**2  # of an image
_CIFAR_NAMES = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct", "numpy.ndarray",
                "numpy.dtype")
_MAX_BATCH_BYTES = 64 << 20  # twice the size of a batch
_DAMAGED_CIFAR = (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, OSError)


# MedMNIST, and what all formats share


def open_npz(path: Path, split: str) -> Source:
    """Open a MedMNIST file: train_images [N, H, W] or [N, H, W, 3], train_labels [N, 1] or [N, D], and so on.

    Raises UserError when arrays are missing, of unexpected shape or type, or damaged.
    """
    members = retrying(lambda: _list_arrays(path), path)
    present = [name for name in _SPLITS if f"{name}_images" in members]
    if not present:
        raise UserError(f"{path} holds the arrays {', '.join(sorted(members)) or '(none)'}; expected train_images and "
                        "train_labels, as MedMNIST files have")
    chosen = present if split == "all" else [split]
    if not set(chosen) <= set(present):
        raise UserError(f"{path} has no {split}_images; --split can be {', '.join(present)} or all")
    images = [members[f"{name}_images"] for name in chosen]
    for member in images:
        _check_images(path, member)
    if len({(member.shape[1:], member.dtype) for member in images}) > 1:
        raise UserError(f"{path}: the images of {', '.join(chosen)} differ in shape or type; choose one with --split")
    left_out = {name: members[f"{name}_images"].shape[0] for name in present if name not in chosen}
    height, width = images[0].shape[1:3]
    names = [name for part, member in zip(chosen, images) for name in _numbered_names(part, member.shape[0])]
    labels = retrying(lambda: _read_labels(path, members, chosen), path)
    classes = None if labels is None else retrying(lambda: _known_classes(path, members, present), path)
    return Source(kind="MedMNIST npz", name=path.name, names=names, load=_load_item,
                  items=_NpzItems(path=path, members=images), labels=labels, classes=classes,
                  hints=[] if labels is None or classes is not None else [_why_unnamed(path, labels.ndim == 1)],
                  shape=(width, height, _channels(images[0].shape[1:])),
                  left_out=left_out)


@dataclass(frozen=True, kw_only=True)
class _Member:
    """An array inside an npz: its name there, its shape and type."""
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype


@dataclass(frozen=True, kw_only=True)
class _NpzItems:
    path: Path
    members: Sequence[_Member]

    def __call__(self, wanted: np.ndarray) -> Iterator[np.ndarray]:
        return iterate_retrying(lambda: self._read(wanted), self.path)

    def _read(self, wanted: np.ndarray) -> Iterator[np.ndarray]:
        start = 0
        with zipfile.ZipFile(self.path) as archive:
            for member in self.members:
                count = member.shape[0]
                with archive.open(f"{member.name}.npy") as file:
                    _read_header(file)
                    yield from _rows(self.path, file, member.shape, member.dtype, wanted[start:start + count])
                start += count


def _load_item(item: np.ndarray, limit: int | None = None) -> np.ndarray:
    """Load an image whose item is its pixels."""
    return item


def _numbered_names(prefix: str, count: int) -> list[str]:
    return [f"{prefix}/{index:06d}" for index in range(count)]


def _rows(path: Path, file: IO[bytes], shape: tuple[int, ...], dtype: np.dtype, wanted: np.ndarray) -> Iterator[Any]:
    size = math.prod(shape[1:]) * dtype.itemsize
    last = int(np.flatnonzero(wanted)[-1]) if wanted.any() else -1
    for want in wanted[:last + 1]:
        try:
            data = file.read(size)
        except _DAMAGED as error:
            raise UserError(f"{path} is damaged ({error}); download it again") from error
        if len(data) < size:
            raise UserError(f"{path} ends too early; download it again")
        if want:
            yield np.frombuffer(data, dtype).reshape(shape[1:])


def _list_arrays(path: Path) -> dict[str, _Member]:
    try:
        with zipfile.ZipFile(path) as archive:
            found = {}
            for info in archive.infolist():
                if info.filename.endswith(".npy"):
                    with archive.open(info) as file:
                        found[info.filename.removesuffix(".npy")] = (info.file_size, *_read_header(file))
    except _DAMAGED as error:
        raise UserError(f"{path} cannot be read as an npz file ({error}); download it again") from error
    for name, (size, shape, fortran, dtype) in found.items():
        if dtype.hasobject or (fortran and len(shape) > 1):
            what = "Python objects" if dtype.hasobject else "columns in place of rows (Fortran order)"
            raise UserError(f"{path}: {name} holds {what}; expected plain numbers: save the array again")
        # Checked here because a damaged header can declare more rows than there is memory for their names.
        if math.prod(shape) * dtype.itemsize > size:
            raise UserError(f"{path}: {name} is cut off; download it again")
    return {name: _Member(name=name, shape=shape, dtype=dtype) for name, (_, shape, _, dtype) in found.items()}


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)


def _check_images(path: Path, member: _Member) -> None:
    if member.dtype not in (np.uint8, np.uint16) or _channels(member.shape[1:]) not in (1, 3) or 0 in member.shape:
        raise UserError(f"{path}: {member.name} is {member.dtype} {list(member.shape)}; expected uint8 [N, H, W] or "
                        "[N, H, W, 3]")


def _channels(shape: tuple[int, ...]) -> int:
    """Return the number of channels of [H, W] or [H, W, C]; 0 for other shapes."""
    return {2: 1, 3: shape[-1] if shape else 0}.get(len(shape), 0)


def _read_labels(path: Path, members: dict[str, _Member], chosen: Sequence[str]) -> np.ndarray | None:
    if not any(f"{name}_labels" in members for name in chosen):
        return None
    parts = []
    with zipfile.ZipFile(path) as archive:
        for name in chosen:
            count, member = members[f"{name}_images"].shape[0], members.get(f"{name}_labels")
            if (member is None or member.shape[:1] != (count,) or len(member.shape) > 2
                    or member.dtype.kind not in "iufb"):
                found = "missing" if member is None else f"{member.dtype} {list(member.shape)}"
                raise UserError(f"{path}: {name}_labels is {found}; expected {count} rows of numbers, one per image")
            with archive.open(f"{member.name}.npy") as file:
                _read_header(file)
                rows = _rows(path, file, member.shape, member.dtype, np.ones(count, dtype=bool))
                parts.append(np.array(list(rows)).reshape(count, -1))
    if len({part.shape[1] for part in parts}) > 1:
        raise UserError(f"{path}: the labels of {', '.join(chosen)} differ in length; choose one with --split")
    return _tidy_labels(path, np.concatenate(parts))


def _tidy_labels(path: Path, labels: np.ndarray) -> np.ndarray:
    """Return int64 [N] for [N, 1], float32 [N, D] otherwise."""
    if labels.shape[1] != 1:
        if not np.isfinite(labels).all():
            raise UserError(f"{path}: labels are not finite numbers; expected numbers such as 0 and 1")
        return labels.astype(np.float32)
    values = labels[:, 0]
    if not np.isfinite(values).all() or (values != np.floor(values)).any() or values.min(initial=0) < 0:
        raise UserError(f"{path}: labels are not all integers >= 0; expected class numbers")
    if values.max(initial=0) >= MAX_CLASSES:
        raise UserError(f"{path}: labels go up to {values.max():g}; expected class numbers less than {MAX_CLASSES}")
    return values.astype(np.int64)


def _known_classes(path: Path, members: dict[str, _Member], present: Sequence[str]) -> list[str] | None:
    """Return the names of the classes of a file of MedMNIST; None where file name, channels and labels do not all fit.

    present: all splits of the file; the labels of each are checked, because one split can lack a class
    """
    name = _medmnist_name(path)
    if name is None or {_channels(members[f"{split}_images"].shape[1:]) for split in present} != {
            3 if name in _MEDMNIST_COLOR else 1}:
        return None
    try:
        labels = _read_labels(path, members, present)
    except UserError:  # in a split that was not chosen
        return None
    found = np.unique(labels)
    if name in _MEDMNIST_FINDINGS:
        fits = labels.ndim == 2 and labels.shape[1] == len(_MEDMNIST[name]) and set(found) <= {0, 1}
    else:
        fits = labels.ndim == 1 and found.tolist() == list(range(len(_MEDMNIST[name])))
    return list(_MEDMNIST[name]) if fits else None


def _medmnist_name(path: Path) -> str | None:
    match = _MEDMNIST_FILE.fullmatch(path.name.lower())
    return match[1] if match is not None and match[1] in _MEDMNIST else None


def _why_unnamed(path: Path, are_classes: bool) -> str:
    name = _medmnist_name(path)
    if name is None:
        what = f"{path.name} is not a file name of MedMNIST v2, such as dermamnist.npz or dermamnist_64.npz"
    else:
        colors = "color" if name in _MEDMNIST_COLOR else "gray"
        what = f"{path.name} does not hold the {len(_MEDMNIST[name])} classes of {name} in {colors}"
    advice = '; --merge "nevus=0;..." gives them names' if are_classes else ""
    return f"{what}: its classes have numbers but no names{advice}"


# MNIST


def open_mnist(path: Path) -> Source:
    """Open MNIST's images, "...-images-idx3-ubyte.gz", with the file of labels beside them.

    Raises UserError when the labels are missing, when either file is damaged, or when their counts differ.
    """
    if "images-idx3" not in path.name:
        raise UserError(f"--source={path} is not a file of images; expected ...-images-idx3-ubyte.gz")
    count, height, width = retrying(lambda: _idx_shape(path, _IDX_IMAGES, 3), path)
    label_path = path.with_name(path.name.replace("images-idx3", "labels-idx1"))
    if not label_path.is_file():
        raise UserError(f"{label_path} does not exist; expected the labels beside the images")
    (num_labels,) = retrying(lambda: _idx_shape(label_path, _IDX_LABELS, 1), label_path)
    if num_labels != count:
        raise UserError(f"{label_path} holds {num_labels} labels; expected {count}, one for each image in {path.name}")
    labels = retrying(lambda: list(_idx_rows(label_path, (count,), np.ones(count, dtype=bool))), label_path)
    return Source(kind="MNIST", name=path.name, names=_numbered_names(path.name.split("-")[0], count),
                  items=_IdxItems(path=path, shape=(count, height, width)), load=_load_item,
                  labels=np.array(labels, dtype=np.int64), shape=(width, height, 1))


@dataclass(frozen=True, kw_only=True)
class _IdxItems:
    path: Path
    shape: tuple[int, int, int]

    def __call__(self, wanted: np.ndarray) -> Iterator[np.ndarray]:
        return iterate_retrying(lambda: _idx_rows(self.path, self.shape, wanted), self.path)


def _idx_rows(path: Path, shape: tuple[int, ...], wanted: np.ndarray) -> Iterator[np.ndarray]:
    with gzip.open(path) as file:
        file.seek(4 + 4 * len(shape))
        yield from _rows(path, file, shape, np.dtype(np.uint8), wanted)


def _idx_shape(path: Path, magic: int, dimensions: int) -> tuple[int, ...]:
    try:
        with gzip.open(path) as file:
            found, *shape = struct.unpack(f">{1 + dimensions}I", file.read(4 + 4 * dimensions))
    except (*_DAMAGED, struct.error) as error:
        raise UserError(f"{path} cannot be read as a gzip file ({error}); download it again") from error
    if found != magic or 0 in shape:
        raise UserError(f"{path} is not a {dimensions}-dimensional idx file of uint8; expected MNIST's images and "
                        "labels")
    if math.prod(shape) > _MAX_RATIO * path.stat().st_size:
        raise UserError(f"{path} ends too early; download it again")
    return tuple(shape)


# CIFAR-10, whose pickles are read without importing or calling what they name


def open_cifar(path: Path, split: str) -> Source:
    """Open cifar-10-python.tar.gz. Raises UserError when members are missing, damaged, or not what is expected."""
    if split == "val":
        raise UserError(f"{path.name} (CIFAR-10) has no val split; --split can be train, test or all")
    chosen = tuple(_BATCHES) if split == "all" else (split,)
    members = [member for part in chosen for member in _BATCHES[part]]
    classes, labels, counts = retrying(lambda: _read_cifar_labels(path, members), path)
    names = [name for part in chosen for name in _numbered_names(part, sum(counts[m] for m in _BATCHES[part]))]
    return Source(kind="CIFAR-10", name=path.name, names=names, load=_load_item, labels=labels, classes=classes,
                  items=_CifarItems(path=path, members=tuple(members), counts=tuple(counts[m] for m in members)),
                  shape=(_CIFAR_SIDE, _CIFAR_SIDE, 3),
                  left_out={part: sum(counts[m] for m in _BATCHES[part]) for part in _BATCHES if part not in chosen})


@dataclass(frozen=True, kw_only=True)
class _CifarItems:
    path: Path
    members: Sequence[str]
    counts: Sequence[int]

    def __call__(self, wanted: np.ndarray) -> Iterator[np.ndarray]:
        """Yield uint8 [32, 32, 3]; one batch at a time is in memory."""
        start = 0
        for member, count in zip(self.members, self.counts):
            chosen = wanted[start:start + count]
            start += count
            if chosen.any():
                _, data = retrying(lambda member=member: next(_walk(self.path, member)), self.path)
                pixels, _ = _read_batch(self.path, member, data)
                for row in pixels[chosen]:
                    yield np.ascontiguousarray(row.reshape(3, _CIFAR_SIDE, _CIFAR_SIDE).transpose(1, 2, 0))


def _read_cifar_labels(path: Path, members: Sequence[str]) -> tuple[list[str] | None, np.ndarray, dict[str, int]]:
    """Return the class names, int64 [N] in the order of the members, and the images of each member of the archive."""
    classes, labels, counts = None, {}, {}
    for name, data in _walk(path):
        if name == "batches.meta":
            classes = _load(path, name, data).get("label_names")
            if not (isinstance(classes, list) and len(classes) == _CIFAR_CLASSES
                    and all(isinstance(one, str) for one in classes)):
                raise UserError(f"{path}: {name} does not hold 10 label_names; expected those of CIFAR-10")
        elif any(name in batches for batches in _BATCHES.values()):
            labels[name] = _read_batch(path, name, data)[1]
            counts[name] = len(labels[name])
    if not counts and classes is None:
        raise UserError(f"--source={path} {unpack_advice(path)}")
    missing = [name for batches in _BATCHES.values() for name in batches if name not in counts]
    if missing:
        raise UserError(f"{path} has no member {missing[0]}; expected the CIFAR-10 python archive, "
                        "cifar-10-python.tar.gz: download it again")
    return classes, np.concatenate([labels[name] for name in members]), counts


def _walk(path: Path, wanted: str | None = None) -> Iterator[tuple[str, bytes]]:
    """Yield (name without folders, content) of the files in the archive, or of the wanted one."""
    known = {"batches.meta", *(name for batches in _BATCHES.values() for name in batches)}
    suffixes = image_suffixes()
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                name = member.name.rsplit("/", 1)[-1]
                if member.isfile() and os.path.splitext(name)[1].lower() in suffixes:  # CIFAR's archive has none
                    raise UserError(f"--source={path} {unpack_advice(path)}")
                if not member.isfile() or name not in known or wanted not in (None, name):
                    continue
                if member.size > _MAX_BATCH_BYTES:
                    raise UserError(f"{path}: {member.name} has {member.size:,} bytes; expected about 31 million, and "
                                    f"at most {_MAX_BATCH_BYTES:,}: is it CIFAR-10's archive? Download it again")
                file = archive.extractfile(member)
                yield name, file.read()
    except _DAMAGED_CIFAR as error:
        raise UserError(f"{path} cannot be read as a tar.gz file ({error}); download it again") from error


def _read_batch(path: Path, name: str, data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Return uint8 [N, 3072] and int64 [N]."""
    content = _load(path, name, data)
    match content.get("data"), content.get("labels"):
        case Call(state=(_, tuple((rows, columns)), Call("numpy.dtype", ("u1", *_)), False, pixels)), list(labels) if (
                isinstance(pixels, (str, bytes))):
            if isinstance(pixels, str):  # Python 2 had one type for text and bytes
                pixels = pixels.encode("latin-1", "ignore")  # without other characters the length does not fit
            if (columns == _CIFAR_BYTES and rows == len(labels) and len(pixels) == rows * columns
                    and all(type(label) is int and 0 <= label < _CIFAR_CLASSES for label in labels)):
                return np.frombuffer(pixels, np.uint8).reshape(rows, columns), np.array(labels, dtype=np.int64)
    raise UserError(f"{path}: {name} does not hold data [N, 3072] and labels [N] from 0 to 9; expected a batch of "
                    "CIFAR-10")


def _load(path: Path, name: str, data: bytes) -> dict[str, Any]:
    try:
        content = load_pickle(io.BytesIO(data), _CIFAR_NAMES)
    except PickleRefused as error:
        raise UserError(f"{path}: {name} cannot be read ({error}); expected the pickles of CIFAR-10: download it "
                        "again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: {name} holds a {type(content).__name__}; expected the dict of a CIFAR-10 batch")
    return content
