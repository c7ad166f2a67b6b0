"""Make small archives of images in tests: folders, zips, MedMNIST npz, CIFAR-10 and MNIST files."""

import gzip
import io
import struct
import tarfile
import zipfile

import numpy as np
import PIL.Image


def encode(pixels, kind="png", **options) -> bytes:
    """Encode uint8 [H, W] or [H, W, C] as a file of this kind."""
    file = io.BytesIO()
    PIL.Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(file, kind, **options)
    return file.getvalue()


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, shape, dtype=np.uint8)


def make_folder(path, files):
    """Write {name: bytes}; return the folder."""
    for name, data in files.items():
        target = path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    return path


def make_zip(path, files, compression=zipfile.ZIP_STORED):
    """Write {name: bytes} or [(name, bytes), ...]; return the zip."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in files.items() if isinstance(files, dict) else files:
            archive.writestr(name, data)
    return path


def make_idx(path, array):
    """Write a uint8 array as MNIST does."""
    with gzip.open(path, "wb") as file:
        file.write(struct.pack(f">{1 + array.ndim}I", 0x0800 | array.ndim, *array.shape) + array.tobytes())
    return path


CIFAR_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()


def cifar_pickle(pixels, labels) -> bytes:
    """Return a batch in the bytes that Python 2 wrote: protocol 2, texts and bytes of one type."""
    shape = b"".join(b"J" + struct.pack("<i", size) for size in pixels.shape)
    array = (b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
             b"(K\x01" + shape + b"\x86" + b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xff"
             b"J\xff\xff\xff\xffK\x00tb\x89T" + struct.pack("<I", pixels.size) + pixels.tobytes() + b"tb")
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(U\x04data" + array + b"U\x06labels" + numbers + b"u."


def cifar_meta() -> bytes:
    names = b"](" + b"".join(b"U" + bytes([len(name)]) + name.encode() for name in CIFAR_CLASSES) + b"e"
    return b"\x80\x02}U\x0blabel_names" + names + b"s."


def make_cifar(path, per_batch=3, **replaced):
    """Write cifar-10-python.tar.gz with random images and labels; `replaced` members are given as bytes, or None.

    Returns uint8 [5 * per_batch + per_batch, 32, 32, 3] and the labels, train before test.
    """
    members, pixels, labels = {}, [], []
    for number, name in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]):
        images = noise(number, per_batch, 32, 32, 3)
        numbers = [(3 * number + k) % 10 for k in range(per_batch)]
        members[name] = cifar_pickle(np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(per_batch, -1), numbers)
        pixels.append(images)
        labels += numbers
    members["batches.meta"] = cifar_meta()
    members["readme.html"] = b"<html>"
    with tarfile.open(path, "w:gz") as archive:
        for name in sorted(members, reverse=True):  # as in the original, not in the order of the names
            data = replaced.get(name.replace(".", "_"), members[name])
            if data is not None:
                info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return np.concatenate(pixels), labels


def counts(entries):
    """Return the numbers of images, by reason or note, of "dropped" or "converted" in the report of a conversion."""
    return {name: entry["count"] for name, entry in entries.items()}
