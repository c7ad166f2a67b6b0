"""Failing disks and networks: retried, distinguished from users' mistakes, and nothing is lost or changed."""

import errno
import json
import os
import pickle

import click
import numpy as np
import pytest

from dnnlib import files
from dnnlib.cli import UserError, run
from dnnlib.files import DiskFailure, find_failure, iterate_retrying, retrying, sha256_of
from dnnlib.lines import read_lines
from dnnlib.workers import ordered_map
from generation.image_generator import read_projected_w
from generation.network import open_network
from imagesets.convert import convert
from imagesets.inspect import measure
from imagesets.reader import ImageSet
from imagesets.sources import open_source
from imagesets.tables import DelimitedFile
from latent.targets import read_target
from metrics.features import FeatureCache, Features
from tests.helpers.failing_disk import FailingDisk, failing_times
from tests.helpers.generator_files import lively_generator, save_generator
from tests.helpers.make_archives import make_cifar, make_idx, noise
from tests.helpers.make_sets import make_set, pixels_of, png
from torch_utils.checkpoint import CheckpointPair, DamagedCheckpoint, read_checkpoint, write_checkpoint
from training.config import DatasetFacts
from training.options import TrainOptions, resolve
from training.run_folder import choose_run
from training.run_record import read_record

TRANSIENT = [errno.EIO, errno.ESTALE, errno.ETIMEDOUT]
FACTS = DatasetFacts(name="lesions", resolution=32, channels=3, num_images=2000, c_dim=2)


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """Retry without waiting; return the waits that were requested."""
    asked = []
    monkeypatch.setattr("dnnlib.files.time.sleep", asked.append)
    return asked


# ---- trying again


def test_retrying_waits_longer_each_time_and_gives_up_after_tens_of_seconds(waits):
    def read():
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(DiskFailure) as caught:
        retrying(read, "set.zip")
    assert waits == [0.5, 1, 2, 4, 8, 16]
    assert str(caught.value) == ("set.zip cannot be read (Input/output error, tried 7 times in 31.5 s): a disk or "
                                 "network failure")


@pytest.mark.parametrize("name", ["EIO", "ESTALE", "ETIMEDOUT", "ENXIO", "ENODEV", "EREMOTEIO", "EHOSTDOWN",
                                  "ECONNRESET", "ENOTCONN", "ESHUTDOWN", "EUCLEAN", "EBADMSG"])
def test_retrying_failing_disk_that_recovers_gives_the_value(name, waits):
    number, calls = getattr(errno, name), []

    def read():
        calls.append(True)
        if len(calls) < 3:
            raise OSError(number, os.strerror(number))
        return "value"

    assert retrying(read, "x", reset=lambda: calls.append("reset")) == "value"
    assert calls == [True, "reset", True] or calls.count(True) == 2
    assert len(waits) == calls.count(True) - 1 > 0


@pytest.mark.parametrize("name", ["EACCES", "ENOENT", "ENOSPC", "EDQUOT", "EROFS", "EISDIR", "ENAMETOOLONG", "EINVAL"])
def test_retrying_what_the_user_has_to_put_right_is_raised_at_once(name, waits):
    def read():
        raise OSError(getattr(errno, name), name)

    with pytest.raises(OSError, match=name):
        retrying(read, "x")
    assert waits == []


def test_retrying_bad_content_is_not_read_again(waits):
    calls = []

    def read():
        calls.append(True)
        raise UserError("the checksum differs")

    with pytest.raises(UserError):
        retrying(read, "x")
    assert (calls, waits) == ([True], [])


def test_retrying_within_another_one_gives_up_once(waits):
    def read():
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(DiskFailure, match=r"^inner cannot be read"):
        retrying(lambda: retrying(read, "inner"), "outer")
    assert len(waits) == 6


def test_iterate_retrying_goes_on_behind_the_last_item(waits):
    starts = []

    def start():
        starts.append(True)
        for number in range(5):
            if number == 3 and len(starts) < 3:
                raise OSError(errno.ESTALE, "Stale file handle")
            yield number

    assert list(iterate_retrying(start, "x")) == [0, 1, 2, 3, 4]
    assert (len(starts), waits) == (3, [0.5, 1])


# ---- how programs end


def ends(error, capsys):
    @click.command()
    def command():
        raise error

    code = run(command, [])
    return code, capsys.readouterr().err


AGAIN = "run the same command again once it works"


@pytest.mark.parametrize("number", TRANSIENT)
def test_run_failing_disk_is_one_line_and_75(number, capsys):
    reason = os.strerror(number)
    assert ends(OSError(number, reason, "a.zip"), capsys) == (
        75, f"error: a.zip: {reason}: a disk or network failure; {AGAIN}\n")


def test_run_failing_disk_behind_a_message_of_ours_is_75(capsys):
    def raised(cause):
        try:
            raise UserError(f"--dest=a.zip cannot be written: {cause.strerror}") from cause
        except UserError as error:
            return error

    assert ends(raised(OSError(errno.EIO, "Input/output error")), capsys) == (
        75, f"error: --dest=a.zip cannot be written: Input/output error; {AGAIN}\n")
    assert ends(raised(OSError(errno.ENOSPC, "No space left on device")), capsys) == (
        2, "error: --dest=a.zip cannot be written: No space left on device\n")


@pytest.mark.parametrize("name", ["ENOENT", "EACCES", "EPERM", "ENOSPC", "EDQUOT", "EROFS", "EISDIR", "ENOTDIR",
                                  "ENAMETOOLONG", "EMFILE"])
def test_run_what_the_user_can_put_right_is_2(name, capsys):
    number = getattr(errno, name)
    assert ends(OSError(number, os.strerror(number), "a"), capsys) == (2, f"error: a: {os.strerror(number)}\n")


def test_run_error_of_the_system_that_nobody_foresaw_keeps_its_traceback(capsys):
    with pytest.raises(OSError, match="Invalid argument"):
        ends(OSError(errno.EINVAL, "Invalid argument", "a"), capsys)


def test_disk_failure_survives_the_way_from_a_worker():
    assert str(pickle.loads(pickle.dumps(DiskFailure("a b")))) == "a b"
    assert find_failure(OSError(errno.ENOENT, "x")) is None


# ---- every reader


def run_in(folder):
    with choose_run(folder, resolve(TrainOptions(cfg="tiny"), FACTS), "0" * 64) as chosen:
        return chosen.path


def cached(folder):
    cache = FeatureCache(folder / "features")
    cache.write({"a": 1}, Features(values=np.ones((3, 5), np.float32), probabilities=None))
    return cache


def unpacked(source):
    return [np.asarray(item if isinstance(item, np.ndarray) else list(source.load(item)))
            for item in source.items(np.ones(len(source), dtype=bool))]


def npz(path):
    np.savez(path, train_images=noise(0, 4, 8, 8, 3), train_labels=np.arange(4)[:, None] % 2)
    return path


def cifar(path):
    make_cifar(path)
    return path


def image_folder(path):
    path.mkdir()
    for index in range(3):
        (path / f"{index}.png").write_bytes(png(pixels_of(index)))
    return path


def written(path, text):
    path.write_text(text)
    return path


def with_state(path):
    write_checkpoint(path, {"step": 3})
    return path


def with_styles(path):
    np.savez(path, w=np.ones((1, lively_generator().num_ws, lively_generator().w_dim), np.float32))
    return path


def mnist(folder):
    folder.mkdir()
    make_idx(folder / "t10k-labels-idx1-ubyte.gz", np.array([0, 1, 2], np.uint8))
    make_idx(folder / "t10k-images-idx3-ubyte.gz", noise(0, 3, 8, 8))
    return folder / "t10k-images-idx3-ubyte.gz"


def with_target(path):
    path.write_bytes(png(pixels_of(0)))
    return path


# name -> (make the file, or the folder that fails; read it)
READERS = {
    "zip": (lambda folder: make_set(folder / "set.zip", labels=[0] * 6),
            lambda path: [ImageSet(path).labels.tolist(), ImageSet(path).read("00000/img00000002.png")]),
    "folder": (lambda folder: image_folder(folder / "images"),
               lambda path: [ImageSet(path).read("2.png"), ImageSet(path).checksums()]),
    "source folder": (lambda folder: image_folder(folder / "images"), lambda path: unpacked(open_source(path))),
    "source zip": (lambda folder: make_set(folder / "set.zip"), lambda path: unpacked(open_source(path))),
    "npz": (lambda folder: npz(folder / "a.npz"),
            lambda path: [*unpacked(open_source(path)), open_source(path).labels]),
    "cifar": (lambda folder: cifar(folder / "cifar-10-python.tar.gz"),
              lambda path: [*unpacked(open_source(path)), open_source(path).labels]),
    "mnist": (lambda folder: mnist(folder / "m"),
              lambda path: [*unpacked(open_source(path)), open_source(path).labels]),
    "table": (lambda folder: written(folder / "a.csv", "image,dx\na,nv\nb,mel\n"),
              lambda path: [DelimitedFile(path).header, list(DelimitedFile(path).rows())]),
    "digest": (lambda folder: written(folder / "a", "text"), sha256_of),
    "lines": (lambda folder: written(folder / "a.jsonl", '{"a": 1}\n'), read_lines),
    "record of a run": (run_in, lambda path: read_record(path).identity),
    "state": (lambda folder: with_state(folder / "state.pt"), read_checkpoint),
    "network": (lambda folder: save_generator(folder / "net.safetensors"),
                lambda path: open_network(path, "cpu").sha256),
    "styles": (lambda folder: with_styles(folder / "w.npz"), lambda path: read_projected_w(path, lively_generator())),
    "target": (lambda folder: with_target(folder / "a.png"), lambda path: read_target(path, lively_generator())),
}


def equal(found, expected):
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(equal, found, expected))
    return bool(np.array_equal(found, expected)) if hasattr(expected, "shape") else found == expected


@pytest.mark.parametrize("where", ["open", "read"])
@pytest.mark.parametrize("reader", READERS)
def test_reader_of_a_disk_that_recovers_returns_what_is_there(reader, where, tmp_path, monkeypatch):
    make, read = READERS[reader]
    path = make(tmp_path)
    expected = read(path)
    for number in TRANSIENT:
        with monkeypatch.context() as patch:
            disk = FailingDisk(path, number=number, where=where, fails=failing_times(3)).install(patch.setattr)
            assert equal(read(path), expected)
            assert disk.attempts == 3


@pytest.mark.parametrize("where", ["open", "read"])
@pytest.mark.parametrize("reader", READERS)
def test_reader_of_a_disk_that_keeps_failing_blames_nobody(reader, where, tmp_path, monkeypatch):
    make, read = READERS[reader]
    path = make(tmp_path)
    FailingDisk(path, where=where).install(monkeypatch.setattr)
    with pytest.raises(DiskFailure, match=r"cannot be read \(Input/output error, tried 7 times in 31\.5 s\)"):
        read(path)


def test_zip_opened_before_is_opened_anew_where_its_handle_is_stale(tmp_path, monkeypatch):
    path = make_set(tmp_path / "set.zip", size=64)
    images = ImageSet(path)
    expected = images.read(images.names[-1])
    images.close()
    is_stale = [False]
    with monkeypatch.context() as patch:  # a handle that was opened here fails for ever from some moment on
        disk = FailingDisk(path, number=errno.ESTALE, fails=lambda: is_stale[0]).install(patch.setattr)
        images.read(images.names[0])
    is_stale[0] = True
    assert images.read(images.names[-1]) == expected
    assert disk.attempts == 1


def test_bad_content_stays_the_users_mistake(tmp_path):
    path = make_set(tmp_path / "set.zip")
    data = bytearray(path.read_bytes())
    place = data.index(b"IDAT") + 10
    data[place] ^= 1
    path.write_bytes(data)
    images = ImageSet(path)
    with pytest.raises(UserError, match=r"is damaged \(Bad CRC-32 .*\); make or copy the data set again$"):
        images.read(images.names[0])


def test_cache_on_a_failing_disk_is_not_called_damaged(tmp_path, monkeypatch):
    cache, lines = cached(tmp_path), []
    cache._log = lines.append
    FailingDisk(tmp_path).install(monkeypatch.setattr)
    assert cache.read({"a": 1}, count=3, classes=False) is None
    assert lines == [f"{cache.path({'a': 1})} cannot be read (Input/output error, tried 7 times in 31.5 s): a disk or "
                     "network failure; its features are computed again"]


# ---- nothing is lost, dropped or started from scratch


@pytest.mark.parametrize("workers", [1, 2])
def test_conversion_on_a_failing_disk_drops_no_image(workers, tmp_path, monkeypatch):
    source = image_folder(tmp_path / "images")
    monkeypatch.setattr(files, "RETRY_WAITS", (0, 0))
    FailingDisk(source / "1.png").install(monkeypatch.setattr)
    with pytest.raises(DiskFailure, match=r"1\.png cannot be read \(Input/output error, tried 3 times"):
        convert(source, tmp_path / "out.zip", workers=workers, max_bad=1.0)
    assert sorted(os.listdir(tmp_path)) == ["images"]


@pytest.mark.parametrize("workers", [1, 2])
def test_inspection_on_a_failing_disk_calls_no_image_damaged(workers, tmp_path, monkeypatch):
    images = ImageSet(make_set(tmp_path / "set.zip"))
    images.close()
    FailingDisk(tmp_path / "set.zip").install(monkeypatch.setattr)
    with pytest.raises(DiskFailure, match=r"set\.zip: 00000/img00000000\.png cannot be read"):
        measure(images, workers=workers)


def _fail(item):
    try:
        raise OSError(errno.ESTALE, "Stale file handle", item)
    except OSError as error:
        raise UserError(f"{item} is damaged; make it again") from error


def test_ordered_map_keeps_the_kind_of_a_failure():
    with pytest.raises(DiskFailure) as caught:
        list(ordered_map(_fail, ["a", "b"], 2))
    assert str(caught.value) == "a: Stale file handle: a disk or network failure"


def test_state_on_a_failing_disk_is_not_passed_over_for_an_older_one(tmp_path, monkeypatch):
    pair = CheckpointPair(tmp_path)
    for step in (1, 2):
        pair.save({"step": step})
    with monkeypatch.context() as patch:
        FailingDisk(pair.newest).install(patch.setattr)
        with pytest.raises(DiskFailure) as caught:
            CheckpointPair(tmp_path).load()
    assert str(caught.value) == (
        f"{pair.newest} cannot be read (Input/output error, tried 7 times in 31.5 s): a disk or network failure; if it "
        "stays unreadable, move that file away to continue the run from training-state.prev.pt")
    assert CheckpointPair(tmp_path).load() == ({"step": 2}, None)
    pair.newest.rename(tmp_path / "away")
    state, message = CheckpointPair(tmp_path).load()
    assert state == {"step": 1}
    assert "training-state.prev.pt is used instead" in message


def test_state_with_damaged_content_is_still_passed_over(tmp_path):
    pair = CheckpointPair(tmp_path)
    for step in (1, 2):
        pair.save({"step": step})
    pair.newest.write_bytes(pair.newest.read_bytes()[:-1])
    with pytest.raises(DamagedCheckpoint):
        read_checkpoint(pair.newest)
    assert CheckpointPair(tmp_path).load()[0] == {"step": 1}


@pytest.mark.parametrize("where", ["open", "read"])
def test_run_whose_record_a_failing_disk_hides_is_not_begun_anew(where, tmp_path, monkeypatch):
    path = run_in(tmp_path)
    with monkeypatch.context() as patch:
        FailingDisk(path / "training_options.json", where=where).install(patch.setattr)
        with pytest.raises(DiskFailure, match=r"training_options\.json cannot be read"):
            run_in(tmp_path)
    assert os.listdir(tmp_path) == [path.name]
    assert run_in(tmp_path) == path  # continues


def test_settings_of_unfinished_work_on_a_failing_disk_do_not_remove_it(tmp_path, monkeypatch):
    from torch_utils.piecework import Pieces

    pieces = Pieces(tmp_path / "out.zip", {"seed": 1})
    with pieces.held():
        pieces.save(0, {"a": np.ones(3)})
    with monkeypatch.context() as patch:
        FailingDisk(pieces.folder).install(patch.setattr)
        with pytest.raises(DiskFailure), Pieces(tmp_path / "out.zip", {"seed": 1}).held():
            pass
        with pytest.raises(DiskFailure, match=r"piece-000000\.npz cannot be read"):
            pieces.load(0)
    assert pieces.finished() == [0]
    assert json.loads((pieces.folder / "settings.json").read_text())["seed"] == 1
