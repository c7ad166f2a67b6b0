"""Arrays of images as sources, read row by row: MedMNIST's npz, MNIST's idx files and the CIFAR-10 python archive."""

import gzip
import io
import math
import os
import pickle
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
from imagesets.classes import MAX_CLASSES
from imagesets.folders import Source
from imagesets.reader import image_suffixes

_SPLITS = ("train", "val", "test")
# What reading a damaged file raises: OSError for a place outside of it, too.
_DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError, OSError)
_MAX_RATIO = 1032  # what gzip can shorten data by at most (zlib's technical notes)
# The classes of MedMNIST's 2D sets by number (Yang et al. 2023, "MedMNIST v2"), in the words of the package medmnist,
# but for commas, which options take for the end of a name; DermaMNIST's, which are HAM10000's, in those of its table.
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
_MEDMNIST_FINDINGS = {"chestmnist"}  # several of an image, or none
_MEDMNIST_FILE = re.compile(r"([a-z]+)(?:_(?:64|128|224))?(?: ?\(\d+\))?\.npz")  # (1): of a browser, downloaded twice
_IDX_IMAGES, _IDX_LABELS = 0x0803, 0x0801  # uint8, three dimensions and one
_BATCHES = {"train": tuple(f"data_batch_{number}" for number in range(1, 6)), "test": ("test_batch",)}
_CIFAR_CLASSES = 10
_CIFAR_SIDE = 32
_MAX_BATCH_BYTES = 64 << 20  # twice what the archive has
_DAMAGED_CIFAR = (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, OSError)


# MedMNIST, and what all kinds share


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
        raise UserError(f"{path}: the images of {', '.join(chosen)} differ in shape or type; choose one by --split")
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
        # Asked here, since a damaged header may promise more rows than there is memory for their names.
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
                raise UserError(f"{path}: {name}_labels is {found}; expected {count} rows of numbers, one an image")
            with archive.open(f"{member.name}.npy") as file:
                _read_header(file)
                rows = _rows(path, file, member.shape, member.dtype, np.ones(count, dtype=bool))
                parts.append(np.array(list(rows)).reshape(count, -1))
    if len({part.shape[1] for part in parts}) > 1:
        raise UserError(f"{path}: the labels of {', '.join(chosen)} differ in length; choose one by --split")
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

    present: the splits; all their labels count, since a part may lack a class, and others may have been numbered anew
    """
    name = _medmnist_name(path)
    if name is None or {_channels(members[f"{split}_images"].shape[1:]) for split in present} != {
            3 if name in _MEDMNIST_COLOR else 1}:
        return None
    try:
        labels = _read_labels(path, members, present)
    except UserError:  # of a split that nobody asked for
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
        what = f"{path.name} is not named as a file of MedMNIST v2, such as dermamnist.npz or dermamnist_64.npz"
    else:
        colors = "color" if name in _MEDMNIST_COLOR else "gray"
        what = f"{path.name} does not hold the {len(_MEDMNIST[name])} classes of {name} in {colors}"
    advice = '; --merge "nevus=0;..." gives them names' if are_classes else ""
    return f"{what}: its classes are known by number alone{advice}"


# MNIST


def open_mnist(path: Path) -> Source:
    """Open MNIST's images, "...-images-idx3-ubyte.gz", with the file of labels beside them.

    Raises UserError when the labels are missing, when either file is damaged, or when their counts differ.
    """
    if "images-idx3" not in path.name:
        raise UserError(f"--source={path} is no file of images; expected ...-images-idx3-ubyte.gz")
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
        raise UserError(f"{path} is no idx file of uint8 in {dimensions} dimensions; expected MNIST's images and "
                        "labels")
    if math.prod(shape) > _MAX_RATIO * path.stat().st_size:
        raise UserError(f"{path} ends too early; download it again")
    return tuple(shape)


# CIFAR-10, whose pickles are read without importing or calling what they name


def open_cifar(path: Path, split: str) -> Source:
    """Open cifar-10-python.tar.gz. Raises UserError when members are missing, damaged, or not what is expected."""
    if split == "val":
        raise UserError(f"{path.name} (CIFAR-10) has no part val; --split can be train, test or all")
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
                raise UserError(f"{path}: {name} does not hold 10 label_names; expected that of CIFAR-10")
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
    pixels, labels = _array(content.get("data")), content.get("labels")
    fits = (pixels is not None and pixels.ndim == 2 and pixels.shape[1] == 3 * _CIFAR_SIDE * _CIFAR_SIDE
            and isinstance(labels, list) and len(labels) == len(pixels)
            and all(type(x) is int and 0 <= x < _CIFAR_CLASSES for x in labels))
    if not fits:
        raise UserError(f"{path}: {name} does not hold data [N, 3072] and labels [N] from 0 to 9; expected a batch of "
                        "CIFAR-10")
    return pixels, np.array(labels, dtype=np.int64)


def _load(path: Path, name: str, data: bytes) -> dict[str, Any]:
    try:
        content = _ArrayUnpickler(io.BytesIO(data), encoding="latin-1").load()
    except Exception as error:  # a damaged or hostile stream can raise anything
        raise UserError(f"{path}: {name} cannot be read ({type(error).__name__}: {error}); expected the pickles of "
                        "CIFAR-10: download it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: {name} holds a {type(content).__name__}; expected the dict of a CIFAR-10 batch")
    return content


class _ArrayUnpickler(pickle.Unpickler):
    """Knows three names, for which records of ours stand in: nothing of the stream is ever imported or called."""

    def find_class(self, module: str, name: str) -> Any:
        known = {("numpy.core.multiarray", "_reconstruct"): _NewArray, ("numpy._core.multiarray", "_reconstruct"):
                 _NewArray, ("numpy", "ndarray"): object, ("numpy", "dtype"): _Record}
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not allowed")
        return known[module, name]

    def persistent_load(self, identifier: Any) -> Any:
        raise pickle.UnpicklingError("it refers to something outside")


class _Record:
    """What stands for numpy.dtype(code, ...), whose state says nothing of bytes."""

    arguments: tuple = ()
    state: Any = None

    def __init__(self, *arguments: Any):
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _NewArray(_Record):
    """What stands for an array: filled by the state (version, shape, type, Fortran order, bytes)."""


def _array(record: Any) -> np.ndarray | None:
    """Return the uint8 array of a record, None when it is something else."""
    state = record.state if isinstance(record, _NewArray) else None
    if not isinstance(state, tuple) or len(state) != 5:
        return None
    _, shape, dtype, fortran, data = state
    if isinstance(data, str):  # Python 2 had one type for text and bytes
        data = data.encode("latin-1")
    if type(dtype) is not _Record or dtype.arguments[:1] != ("u1",) or fortran or not isinstance(data, bytes):
        return None
    if not isinstance(shape, tuple) or not all(type(x) is int and x >= 0 for x in shape):
        return None
    pixels = np.frombuffer(data, dtype=np.uint8)
    return pixels.reshape(shape) if pixels.size == math.prod(shape) else None
