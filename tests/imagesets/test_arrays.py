"""Arrays as sources: MedMNIST, CIFAR-10 and MNIST."""

import gzip
import io
import os
import pickle
import re
import tarfile

import numpy as np
import pytest

from dnnlib.cli import UserError
from imagesets.convert import convert
from imagesets.reader import ImageSet
from imagesets.sources import open_source
from tests.helpers.make_archives import CIFAR_CLASSES, cifar_pickle, make_cifar, make_idx, make_zip, noise
from tests.helpers.nvidia_pickle_writer import BOMBS, Call, Name, check_each_is_refused, dumps


def load_all(source, wanted=None):
    wanted = np.ones(len(source), dtype=bool) if wanted is None else np.array(wanted)
    return [source.load(item) for item in source.items(wanted)]


def make_npz(path, save=np.savez_compressed, **changed):
    """Write 4 images to train, 2 to val, 3 to test; return the arrays."""
    arrays = {}
    for seed, (part, count) in enumerate((("train", 4), ("val", 2), ("test", 3))):
        arrays[f"{part}_images"] = noise(seed, count, 6, 8, 3)
        arrays[f"{part}_labels"] = np.arange(count, dtype=np.uint8)[:, None]
    arrays = {name: array for name, array in (arrays | changed).items() if array is not None}
    save(path, **arrays)
    return arrays


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_split_is_read_row_by_row(save, tmp_path):
    arrays = make_npz(tmp_path / "set.npz", save)
    source = open_source(tmp_path / "set.npz", split="test")
    assert source.kind == "MedMNIST npz"
    assert source.shape == (8, 6, 3)
    assert source.names == ["test/000000", "test/000001", "test/000002"]
    assert source.labels.tolist() == [0, 1, 2]
    assert source.left_out == {"train": 4, "val": 2}
    assert np.array_equal(load_all(source), arrays["test_images"])
    assert np.array_equal(load_all(source, [True, False, True]), arrays["test_images"][[0, 2]])


def test_npz_without_a_split_is_the_training_part_and_all_is_all(tmp_path):
    arrays = make_npz(tmp_path / "set.npz")
    assert open_source(tmp_path / "set.npz").names == [f"train/{index:06d}" for index in range(4)]
    source = open_source(tmp_path / "set.npz", split="all")
    assert source.names[3:7] == ["train/000003", "val/000000", "val/000001", "test/000000"]
    assert source.labels.tolist() == [0, 1, 2, 3, 0, 1, 0, 1, 2]
    assert not source.left_out
    expected = np.concatenate([arrays[f"{part}_images"] for part in ("train", "val", "test")])
    assert np.array_equal(load_all(source), expected)


def test_npz_gray_and_multi_label_gives_vectors(tmp_path):
    labels = np.array([[0, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 1]])
    make_npz(tmp_path / "set.npz", train_images=noise(0, 4, 6, 8), train_labels=labels)
    source = open_source(tmp_path / "set.npz")
    assert source.shape == (8, 6, 1)
    assert source.labels.dtype == np.float32
    assert np.array_equal(source.labels, labels)
    assert source.has_vectors


def test_npz_without_labels_has_none(tmp_path):
    make_npz(tmp_path / "set.npz", train_labels=None)
    assert open_source(tmp_path / "set.npz").labels is None


@pytest.mark.parametrize(("changed", "message"), [
    ({f"{part}_images": None for part in ("train", "val", "test")},
     "holds the arrays test_labels, train_labels, val_labels; expected train_images and train_labels, as MedMNIST "
     "files have"),
    ({"train_images": None}, "has no train_images; --split can be val, test or all"),
    ({"train_images": noise(0, 4, 6, 6, 6)},
     ": train_images is uint8 [4, 6, 6, 6]; expected uint8 [N, H, W] or [N, H, W, 3]"),
    ({"train_images": np.zeros((4, 6, 8))},
     ": train_images is float64 [4, 6, 8]; expected uint8 [N, H, W] or [N, H, W, 3]"),
    ({"train_images": noise(0, 0, 6, 8)},
     ": train_images is uint8 [0, 6, 8]; expected uint8 [N, H, W] or [N, H, W, 3]"),
    ({"train_images": np.asfortranarray(noise(0, 4, 6, 8))},
     ": train_images holds columns in place of rows (Fortran order); expected plain numbers: save the array again"),
    ({"train_labels": np.array([{}] * 4)},
     ": train_labels holds Python objects; expected plain numbers: save the array again"),
    ({"train_labels": np.zeros((3, 1))},
     ": train_labels is float64 [3, 1]; expected 4 rows of numbers, one per image"),
    ({"train_labels": np.array([[0.5]] * 4)}, ": labels are not all integers >= 0; expected class numbers"),
    ({"train_labels": np.array([[-1]] * 4)}, ": labels are not all integers >= 0; expected class numbers"),
    ({"train_labels": np.full((4, 2), np.nan)}, ": labels are not finite numbers; expected numbers such as 0 and 1")])
def test_npz_that_does_not_fit_raises(changed, message, tmp_path):
    path = tmp_path / "set.npz"
    make_npz(path, **changed)
    separator = "" if message.startswith(":") else " "
    with pytest.raises(UserError, match=f"^{re.escape(f'{path}{separator}{message}')}$"):
        open_source(path)


def test_npz_parts_of_different_shape_need_a_split(tmp_path):
    make_npz(tmp_path / "set.npz", val_images=noise(0, 2, 6, 8))
    with pytest.raises(UserError, match=r"differ in shape or type; choose one with --split$"):
        open_source(tmp_path / "set.npz", split="all")


def test_npz_header_that_promises_more_rows_than_there_are_raises(tmp_path):
    path = tmp_path / "set.npz"
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (10**12, 8, 8)})
    make_zip(path, {"train_images.npy": file.getvalue() + bytes(640)})
    with pytest.raises(UserError, match=r"train_images is cut off; download it again$"):
        open_source(path)


def test_npz_cut_off_raises(tmp_path):
    path = tmp_path / "set.npz"
    make_npz(path)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match=r"cannot be read as an npz file \(File is not a zip file\); download it"):
        open_source(path)


def test_npz_damaged_inside_raises_while_reading(tmp_path):
    path = tmp_path / "set.npz"
    make_npz(path, np.savez, train_images=noise(0, 400, 8, 8), train_labels=None)
    source = open_source(path)
    data = bytearray(path.read_bytes())
    data[20000] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"is damaged \(Bad CRC-32 for file 'train_images.npy'\); download it again$"):
        load_all(source)


def test_cifar_gives_images_labels_and_classes_in_order(tmp_path):
    path = tmp_path / "cifar-10-python.tar.gz"
    pixels, labels = make_cifar(path)
    source = open_source(path)
    assert source.kind == "CIFAR-10"
    assert source.classes == CIFAR_CLASSES
    assert source.labels.tolist() == labels[:15]
    assert source.names[14] == "train/000014"
    assert source.left_out == {"test": 3}
    assert np.array_equal(load_all(source), pixels[:15])
    wanted = np.arange(15) % 4 == 1
    assert np.array_equal(load_all(source, wanted), pixels[:15][wanted])


@pytest.mark.parametrize(("split", "part"), [("test", slice(15, 18)), ("all", slice(0, 18))])
def test_cifar_splits(split, part, tmp_path):
    path = tmp_path / "cifar-10-python.tar.gz"
    pixels, labels = make_cifar(path)
    source = open_source(path, split=split)
    assert source.labels.tolist() == labels[part]
    assert np.array_equal(load_all(source), pixels[part])


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("hostile_was_here",)


@pytest.mark.parametrize("content", [
    pickle.dumps({"data": Hostile(), "labels": []}), pickle.dumps({"data": np.random.RandomState(0), "labels": []}),
    b"\x80\x02cbuiltins\neval\nU\x041+1 \x85R.", b"\x80\x02U\x01aQ.", cifar_pickle(noise(0, 2, 3072), [1, 2])[:-900]])
def test_cifar_pickle_that_asks_for_more_is_refused(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_cifar(tmp_path / "cifar.tar.gz", data_batch_2=content)
    with pytest.raises(UserError, match=r"data_batch_2 cannot be read \(.*\); expected the pickles of CIFAR-10"):
        open_source(tmp_path / "cifar.tar.gz")
    assert os.listdir(tmp_path) == ["cifar.tar.gz"]


def test_cifar_bombs_take_little_time_and_memory(tmp_path):
    for name, data in BOMBS.items():
        make_cifar(tmp_path / f"{name}.tar.gz", data_batch_2=data)
    check_each_is_refused("imagesets.sources", "open_source", tmp_path, "{path}: data_batch_2 ")


def cifar_call(function, arguments, state=None):
    return dumps({"data": Call(Name(*function.rsplit(".", 1)), arguments, state=state), "labels": [1]}, 2)


def cifar_array(shape=(1, 3072), kind=("u1", 0, 1), is_fortran=False, data="\0" * 3072):
    name = Name("numpy", "ndarray")
    return cifar_call("numpy.core.multiarray._reconstruct", (name, (0,), "b"), (
        1, shape, Call(Name("numpy", "dtype"), kind, state=(3, "|", None, None, None, -1, -1, 0)), is_fortran, data))


def test_cifar_array_of_the_tests_below_is_read(tmp_path):
    make_cifar(tmp_path / "cifar.tar.gz", data_batch_2=cifar_array())
    assert len(open_source(tmp_path / "cifar.tar.gz")) == 13


@pytest.mark.parametrize("content", [
    cifar_call("numpy.ndarray", ((2**20, 2**20),)), cifar_call("numpy.core.multiarray._reconstruct", (2**40,)),
    cifar_call("numpy.dtype", ("u1", 0, 1)), cifar_array(shape=(2**40, 3072)), cifar_array(shape=(-1, 3072)),
    cifar_array(shape=(3072, 1)), cifar_array(shape=(1,) * 100), cifar_array(shape=[1, 3072]),
    cifar_array(kind=("O", 0, 1)), cifar_array(kind=()), cifar_array(is_fortran=True),
    cifar_array(data=3072), cifar_array(data="\u0100" * 3072), cifar_array(data="x")])
def test_cifar_call_with_foreign_arguments_is_refused(content, tmp_path):
    make_cifar(tmp_path / "cifar.tar.gz", data_batch_2=content)
    with pytest.raises(UserError, match=r": data_batch_2 does not hold data \[N, 3072\] and labels"):
        open_source(tmp_path / "cifar.tar.gz")


@pytest.mark.parametrize(("replaced", "message"), [
    ({"data_batch_3": None},
     "has no member data_batch_3; expected the CIFAR-10 python archive, cifar-10-python.tar.gz: "
     "download it again"),
    ({"data_batch_3": b"\x80\x02]."}, ": data_batch_3 holds a list; expected the dict of a CIFAR-10 batch"),
    ({"data_batch_3": cifar_pickle(noise(0, 2, 3072), [1])},
     ": data_batch_3 does not hold data [N, 3072] and labels [N] from 0 to 9; expected a batch of CIFAR-10"),
    ({"data_batch_3": cifar_pickle(noise(0, 2, 3072), [1, 10])},
     ": data_batch_3 does not hold data [N, 3072] and labels [N] from 0 to 9; expected a batch of CIFAR-10"),
    ({"data_batch_3": cifar_pickle(noise(0, 2, 3071), [1, 2])},
     ": data_batch_3 does not hold data [N, 3072] and labels [N] from 0 to 9; expected a batch of CIFAR-10"),
    ({"data_batch_3": pickle.dumps({"data": np.zeros((1, 3072)), "labels": [0]})},
     ": data_batch_3 does not hold data [N, 3072] and labels [N] from 0 to 9; expected a batch of CIFAR-10"),
    ({"batches_meta": b"\x80\x02}."}, ": batches.meta does not hold 10 label_names; expected those of CIFAR-10")])
def test_cifar_that_does_not_fit_raises(replaced, message, tmp_path):
    path = tmp_path / "cifar.tar.gz"
    make_cifar(path, **replaced)
    separator = "" if message.startswith(":") else " "
    with pytest.raises(UserError, match=f"^{re.escape(f'{path}{separator}{message}')}$"):
        open_source(path)


def test_cifar_has_no_val_part(tmp_path):
    make_cifar(tmp_path / "cifar.tar.gz")
    with pytest.raises(UserError, match=r"^cifar\.tar\.gz \(CIFAR-10\) has no val split; --split can be train, test"):
        open_source(tmp_path / "cifar.tar.gz", split="val")


def test_tar_cut_off_raises(tmp_path):
    path = tmp_path / "cifar.tar.gz"
    make_cifar(path)
    path.write_bytes(path.read_bytes()[:20000])
    with pytest.raises(UserError, match=r"cannot be read as a tar\.gz file \(.*\); download it again$"):
        open_source(path)


def test_tar_of_something_else_raises(tmp_path):
    path = tmp_path / "other.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("images.zip"), io.BytesIO())
    with pytest.raises(UserError, match=r"^--source=.*other\.tar\.gz is a tar archive; unpack it: mkdir -p "):
        open_source(path)


def make_mnist(folder, count=5, labels=None):
    images = noise(0, count, 6, 8)
    make_idx(folder / "train-images-idx3-ubyte.gz", images)
    make_idx(folder / "train-labels-idx1-ubyte.gz", np.arange(count, dtype=np.uint8) if labels is None else labels)
    return images


def test_mnist_gives_images_and_the_labels_beside_them(tmp_path):
    images = make_mnist(tmp_path)
    source = open_source(tmp_path / "train-images-idx3-ubyte.gz")
    assert source.kind == "MNIST"
    assert source.shape == (8, 6, 1)
    assert source.names[4] == "train/000004"
    assert source.labels.tolist() == [0, 1, 2, 3, 4]
    assert np.array_equal(load_all(source), images)
    assert np.array_equal(load_all(source, [False, True, False, True, False]), images[[1, 3]])


def test_mnist_that_does_not_fit_raises(tmp_path):
    make_mnist(tmp_path, labels=np.zeros(3, dtype=np.uint8))
    path, labels = tmp_path / "train-images-idx3-ubyte.gz", tmp_path / "train-labels-idx1-ubyte.gz"
    with pytest.raises(UserError, match=r"holds 3 labels; expected 5, one for each image in train-images-idx3-"):
        open_source(path)
    with pytest.raises(UserError, match=r"is not a file of images; expected \.\.\.-images-idx3-ubyte\.gz$"):
        open_source(labels)
    labels.unlink()
    with pytest.raises(UserError, match=r"labels-idx1-ubyte.gz does not exist; expected the labels beside the images$"):
        open_source(path)
    make_idx(labels, noise(0, 5, 2))
    with pytest.raises(UserError, match=r"is not a 1-dimensional idx file of uint8; expected MNIST's images and"):
        open_source(path)


def test_mnist_cut_off_raises(tmp_path):
    make_mnist(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    with gzip.open(path) as file:
        data = file.read()
    with gzip.open(path, "wb") as file:
        file.write(data[:-10])
    with pytest.raises(UserError, match=r"ends too early; download it again$"):
        load_all(open_source(path))
    with gzip.open(path, "wb") as file:
        file.write(data[:4] + b"\xff" * 4 + data[8:])  # so many images that their names would fill the memory
    with pytest.raises(UserError, match=r"ends too early; download it again$"):
        open_source(path)
    make_mnist(tmp_path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"is damaged \(Compressed file ended before the end-of-stream marker was"):
        load_all(open_source(path))


HAM10000 = ["akiec", "bcc", "bkl", "df", "mel", "nv", "vasc"]


def make_medmnist(path, classes, *channels, **changed):
    """Write a file of which the training part has all classes, val and test two and three."""
    arrays = {f"{part}_images": noise(count, count, 6, 8, *channels)
              for part, count in (("train", classes), ("val", 2), ("test", 3))}
    labels = {"train_labels": np.arange(classes)[::-1, None], "test_labels": np.arange(3)[:, None] % classes}
    return make_npz(path, **arrays | labels | changed)


@pytest.mark.parametrize(("name", "classes", "channels", "expected"), [
    ("dermamnist.npz", 7, (3,), {0: "akiec", 3: "df", 4: "mel", 5: "nv", 6: "vasc"}),
    ("dermamnist_224.npz", 7, (3,), {2: "bkl"}), ("DermaMNIST (1).npz", 7, (3,), {1: "bcc"}),
    ("bloodmnist_64.npz", 8, (3,), {0: "basophil", 7: "platelet"}),
    ("pathmnist_128.npz", 9, (3,), {0: "adipose", 8: "colorectal adenocarcinoma epithelium"}),
    ("octmnist.npz", 4, (), {3: "normal"}), ("pneumoniamnist.npz", 2, (), {1: "pneumonia"}),
    ("breastmnist.npz", 2, (), {0: "malignant", 1: "normal or benign"}),
    ("organcmnist.npz", 11, (), {0: "bladder", 10: "spleen"}), ("tissuemnist.npz", 8, (), {4: "Leukocytes"}),
    ("retinamnist.npz", 5, (3,), {4: "4"})])
def test_medmnist_classes_have_their_names(name, classes, channels, expected, tmp_path):
    make_medmnist(tmp_path / name, classes, *channels)
    source = open_source(tmp_path / name, split="test")
    assert source.labels.tolist() == [0, 1, 2 % classes]
    assert len(source.classes) == len(set(source.classes)) == classes
    assert {number: source.classes[number] for number in expected} == expected
    assert not source.hints


def test_medmnist_findings_of_the_chest_are_named_columns(tmp_path):
    labels = {f"{part}_labels": np.eye(14)[:count] for part, count in (("train", 14), ("val", 2), ("test", 3))}
    make_medmnist(tmp_path / "chestmnist.npz", 14, **labels)
    source = open_source(tmp_path / "chestmnist.npz")
    assert (source.labels.shape, len(source.classes), source.classes[7]) == ((14, 14), 14, "pneumothorax")
    done = convert(tmp_path / "chestmnist.npz", tmp_path / "set.zip", width=8, height=8, workers=1,
                   stream=io.StringIO())
    assert any(line.startswith("  labels: lists of 14 numbers (atelectasis, cardiomegaly, ") for line in done.lines)
    assert ImageSet(tmp_path / "set.zip").classes == source.classes


@pytest.mark.parametrize(("name", "changed", "why"), [
    ("dermamnist_corrected_28.npz", {}, "dermamnist_corrected_28.npz is not a file name of MedMNIST v2, such as "
                                        "dermamnist.npz or dermamnist_64.npz"),
    ("dermamnist.npz", {"train_labels": np.arange(7)[:, None] % 2}, None),  # two classes with other numbers
    ("dermamnist.npz", {"train_labels": np.arange(7)[:, None] + 1}, None),
    ("dermamnist.npz", {"test_labels": None}, None),
    ("dermamnist.npz", {"train_labels": np.eye(7)}, None),
    ("dermamnist.npz", {f"{part}_images": noise(0, count, 6, 8) for part, count in
                        (("train", 7), ("val", 2), ("test", 3))}, None)])
def test_medmnist_file_that_does_not_fit_keeps_its_numbers_and_says_so(name, changed, why, tmp_path):
    make_medmnist(tmp_path / name, 7, 3, **changed)
    source = open_source(tmp_path / name)
    assert source.classes is None
    why = why or "dermamnist.npz does not hold the 7 classes of dermamnist in color"
    advice = '; --merge "nevus=0;..." gives them names' if source.labels.ndim == 1 else ""  # --merge takes no lists
    assert source.hints == [f"{why}: its classes have numbers but no names{advice}"]


def test_medmnist_class_names_are_in_the_data_set(tmp_path):
    make_medmnist(tmp_path / "dermamnist.npz", 7, 3)
    options = {"width": 8, "height": 8, "workers": 1, "stream": io.StringIO()}
    done = convert(tmp_path / "dermamnist.npz", tmp_path / "set.zip", classes="nv,mel", **options)
    assert done.report["classes"] == {"nv": 1, "mel": 1}
    convert(tmp_path / "dermamnist.npz", tmp_path / "all.zip", split="val", **options)
    result = ImageSet(tmp_path / "all.zip")
    assert (result.classes, result.labels.tolist()) == (HAM10000, [0, 1])
