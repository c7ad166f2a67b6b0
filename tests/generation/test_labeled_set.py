"""What a labeled set holds, and how it goes on after an end."""

import json
import os
import zipfile

import numpy as np
import pytest
import torch

from dnnlib.cli import Terminated, UserError
from dnnlib.process_lock import ProcessLock
from generation.image_generator import ImageGenerator, SynthesisSettings
from generation.labeled_set import SetContents, choose_piece_size, write_labeled_set
from generation.network import open_network
from imagesets.reader import ImageSet
from tests.helpers.generator_files import save_generator
from tests.helpers.make_sets import make_set
from torch_utils.device import OutOfMemory
from torch_utils.distributed import Processes
from torch_utils.ops import compiled
from torch_utils.ops.compiled import auto_implementation, auto_means
from torch_utils.piecework import Pieces

INFO = {"classes": ["nv", "mel"], "kimg": 4.5, "phantom": True}
ALONE = Processes(rank=0, count=1, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    return open_network(save_generator(tmp_path_factory.mktemp("network") / "net.safetensors", INFO), "cpu")


def contents(first_seed=7, counts=(3, 4), piece=2):
    return SetContents(first_seed=first_seed, count=sum(counts), counts=counts, piece=piece)


def write(dest, network, chosen=None, **settings):
    generator = ImageGenerator(network.G, SynthesisSettings(**settings), batch=1)
    write_labeled_set(dest, network, generator, chosen or contents(), ALONE)
    return dest


def stop_after(monkeypatch, number, error):
    """Let the program end when it has saved so many pieces."""
    saved = []
    save = Pieces.save

    def save_some(self, *arguments):
        if len(saved) == number:
            raise error
        save(self, *arguments)
        saved.append(arguments[0])

    monkeypatch.setattr(Pieces, "save", save_some)
    return saved


def test_plan_gives_classes_in_order_whatever_the_pieces():
    chosen = contents(counts=(3, 0, 4))
    found = [(chosen.seeds(images), chosen.labels(images)) for images in map(chosen.images, range(chosen.num_pieces))]
    assert found == [([7, 8], [0, 0]), ([9, 10], [0, 2]), ([11, 12], [2, 2]), ([13], [2])]
    assert contents(counts=(3, 0, 4), piece=7).labels(range(7)) == [0, 0, 0, 2, 2, 2, 2]


def test_plan_refuses_seeds_that_do_not_exist():
    contents(first_seed=2**32 - 7)
    with pytest.raises(UserError) as caught:
        contents(first_seed=2**32 - 6)
    assert str(caught.value) == ("--seeds is 4294967290, so the last seed of 7 images would be 4294967296; the "
                                 "largest seed is 4294967295: start lower, or make fewer images")


@pytest.mark.parametrize(("shape", "batch", "expected"), [
    ((3, 32, 32), 1, 256), ((3, 32, 32), 24, 240), ((3, 256, 256), 1, 85), ((3, 1024, 1024), 2, 4),
    ((3, 1024, 1024), 16, 16), ((3, 4096, 4096), 1, 1)])
def test_piece_size_is_whole_batches_of_a_few_megabytes(shape, batch, expected):
    assert choose_piece_size(shape, batch) == expected


def test_set_holds_what_was_drawn_and_says_where_it_is_from(network, tmp_path):
    found = ImageSet(write(tmp_path / "set.zip", network, truncation=0.5))
    assert (found.classes, found.labels.tolist()) == (["nv", "mel"], [0, 0, 0, 1, 1, 1, 1])
    assert found.source == {
        "generated": True, "network": "net.safetensors", "network_sha256": network.sha256, "network_kimg": 4.5,
        "seeds": [7, 13], "truncation": 0.5, "noise_mode": "const", "fp32": True, "device": "cpu", "batch": 1,
        "operators": "cpp", "classes": {"nv": 3, "mel": 4}, "phantom": True}
    assert os.listdir(tmp_path) == ["set.zip"]


def test_set_of_an_unconditional_gray_network_has_no_labels(tmp_path):
    gray = open_network(save_generator(tmp_path / "net.safetensors", c_dim=0, img_channels=1), "cpu")
    found = ImageSet(write(tmp_path / "set.zip", gray, SetContents(first_seed=0, count=3, counts=None, piece=2)))
    assert (len(found), found.labels, found.classes, found.source["classes"]) == (3, None, None, None)
    assert "phantom" not in found.source
    assert found.read(found.names[0])[25] == 0  # the color type of a PNG: gray


def test_set_does_not_depend_on_interruptions(network, tmp_path, monkeypatch, capsys):
    expected = write(tmp_path / "set.zip", network).read_bytes()
    dest = tmp_path / "again.zip"
    for rounds in range(3):
        with monkeypatch.context() as patch:
            stop_after(patch, 1, Terminated())
            with pytest.raises(Terminated):
                write(dest, network)
        assert not dest.exists()
        err = capsys.readouterr().err
        assert err.endswith(f"{2 * rounds + 2} of 7 images are kept in {dest}.parts; the same command continues\n")
        assert (f"{dest}.parts: {2 * rounds} of 7 images are already done; continuing\n" in err) == (rounds > 0)
    saved = stop_after(monkeypatch, 9, None)
    assert write(dest, network).read_bytes() == expected
    assert saved == [3]
    assert sorted(os.listdir(tmp_path)) == ["again.zip", "set.zip"]


def test_set_that_runs_out_of_memory_says_what_goes_on_with_its_pieces(network, tmp_path, monkeypatch):
    dest = tmp_path / "set.zip"
    with monkeypatch.context() as patch:
        stop_after(patch, 2, torch.OutOfMemoryError("CUDA out of memory"))
        with pytest.raises(OutOfMemory) as caught:
            write(dest, network)
    assert str(caught.value) == (
        f"out of memory; 4 of 7 images are kept in {dest}.parts: the same command continues once memory is free; to "
        "use a smaller --batch, remove that folder and start from scratch")
    with pytest.raises(UserError) as caught:
        write_labeled_set(dest, network, ImageGenerator(network.G, SynthesisSettings(), batch=2), contents(), ALONE)
    assert str(caught.value) == (f"{dest}.parts contains unfinished work with other settings (batch is 1 there and 2 "
                                 "here); run its command again to complete it, or remove the folder")
    saved = stop_after(monkeypatch, 9, None)
    write(dest, network)
    assert saved == [2, 3]


def test_set_that_runs_out_of_memory_before_its_first_piece_leaves_the_advice_to_others(network, tmp_path,
                                                                                        monkeypatch):
    stop_after(monkeypatch, 0, torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        write(tmp_path / "set.zip", network)
    assert os.listdir(tmp_path) == []


def test_set_whose_assembly_was_interrupted_is_assembled_again(network, tmp_path, monkeypatch):
    expected = write(tmp_path / "set.zip", network).read_bytes()
    dest = tmp_path / "again.zip"
    load, loaded = Pieces.load, []

    def load_some(self, number):
        if len(loaded) == 2:
            raise KeyboardInterrupt
        loaded.append(number)
        return load(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(Pieces, "load", load_some)
        with pytest.raises(KeyboardInterrupt):
            write(dest, network)
    assert sorted(os.listdir(tmp_path)) == ["again.zip.parts", "set.zip"]
    saved = stop_after(monkeypatch, 0, AssertionError("all pieces are there"))
    assert write(dest, network).read_bytes() == expected
    assert saved == []


def begun(tmp_path, network, monkeypatch, **settings):
    """Leave a set of which one piece is there; return its name."""
    dest = tmp_path / "set.zip"
    with monkeypatch.context() as patch:
        stop_after(patch, 1, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            write(dest, network, **settings)
    return dest


def test_set_that_was_begun_without_compiled_operators_goes_on_without(network, tmp_path, monkeypatch, capsys):
    with auto_means("composed"):
        expected = write(tmp_path / "expected.zip", network).read_bytes()
        dest = begun(tmp_path, network, monkeypatch)
    capsys.readouterr()
    used, generate = [], ImageGenerator.generate
    monkeypatch.setattr(ImageGenerator, "generate",
                        lambda *given: used.append(auto_implementation("cpu")) or generate(*given))
    assert write(dest, network).read_bytes() == expected
    assert used == ["composed"] * 3
    assert ImageSet(dest).source["operators"] == "composed"
    assert capsys.readouterr().err == (
        f"{dest}.parts: 2 of 7 images are already done; continuing\nthe work in {dest}.parts was started with "
        "PyTorch's own operators and continues with them, for consistent results\n")


def test_set_whose_operators_are_gone_is_refused_and_the_pieces_stay(network, tmp_path, monkeypatch):
    expected = write(tmp_path / "expected.zip", network).read_bytes()
    dest = begun(tmp_path, network, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(compiled, "_failures", {"cpu": "there is no compiler"})
        with pytest.raises(UserError) as caught:
            write(dest, network)
    assert str(caught.value) == (
        f"the work in {dest}.parts was started with the compiled operators (cpp), which cannot run here (there is no "
        "compiler): fix that and repeat the command, or remove it to start from scratch")
    assert sorted(os.listdir(f"{dest}.parts")) == ["piece-000000.npz", "settings.json"]
    assert write(dest, network).read_bytes() == expected


def test_set_of_a_version_that_did_not_note_its_operators_is_continued(network, tmp_path, monkeypatch):
    expected = write(tmp_path / "expected.zip", network).read_bytes()
    dest = begun(tmp_path, network, monkeypatch)
    settings = tmp_path / "set.zip.parts" / "settings.json"
    found = json.loads(settings.read_text())
    assert found.pop("operators") == "cpp"
    settings.write_text(json.dumps(found))
    saved = stop_after(monkeypatch, 9, None)
    assert write(dest, network).read_bytes() == expected
    assert saved == [1, 2, 3]


def test_set_of_other_settings_is_refused_and_the_pieces_stay(network, tmp_path, monkeypatch):
    dest = begun(tmp_path, network, monkeypatch)
    before = sorted(os.listdir(f"{dest}.parts"))
    with pytest.raises(UserError) as caught:
        write(dest, network, contents(counts=(3, 5)), truncation=0.5)
    assert str(caught.value) == (
        f"{dest}.parts contains unfinished work with other settings (seeds is [7, 13] there and [7, 14] here; "
        "truncation is 1.0 there and 0.5 here); run its command again to complete it, or remove the folder")
    assert sorted(os.listdir(f"{dest}.parts")) == before == ["piece-000000.npz", "settings.json"]


@pytest.mark.parametrize(("first", "then", "difference"), [
    ({}, {"center": "class"}, 'truncation_center is null there and "class" here'),
    ({"center": "class"}, {}, 'truncation_center is "class" there and null here')])
def test_set_of_another_truncation_center_is_refused(network, tmp_path, monkeypatch, first, then, difference):
    dest = begun(tmp_path, network, monkeypatch, truncation=0.5, **first)
    with pytest.raises(UserError) as caught:
        write(dest, network, truncation=0.5, **then)
    assert str(caught.value) == (f"{dest}.parts contains unfinished work with other settings ({difference}); run its "
                                 "command again to complete it, or remove the folder")
    write(dest, network, truncation=0.5, **first)
    assert not (tmp_path / "set.zip.parts").exists()


@pytest.mark.parametrize("error", [UserError("no"), Terminated("no")])
def test_set_without_a_finished_piece_leaves_nothing(network, tmp_path, monkeypatch, capsys, error):
    with monkeypatch.context() as patch:
        stop_after(patch, 0, error)
        with pytest.raises(type(error), match=r"^no$"):
            write(tmp_path / "set.zip", network)
    assert os.listdir(tmp_path) == []
    assert capsys.readouterr().err == ""


def test_settings_that_a_killed_program_left_without_pieces_hinder_nobody(network, tmp_path):
    folder = tmp_path / "set.zip.parts"
    folder.mkdir()
    (folder / "settings.json").write_text('{"format": "stylegan2-ada-pieces", "version": 1, "count": 9}')
    assert len(ImageSet(write(tmp_path / "set.zip", network))) == 7
    assert os.listdir(tmp_path) == ["set.zip"]


def test_pieces_of_unknown_origin_are_made_anew(network, tmp_path, monkeypatch):
    expected = write(tmp_path / "other.zip", network).read_bytes()
    dest = begun(tmp_path, network, monkeypatch)
    folder = tmp_path / "set.zip.parts"
    (folder / "settings.json").unlink()
    np.savez(folder / "piece-000000.npz", pixels=np.zeros((2, 3, 8, 8), dtype=np.uint8))
    (folder / ".tmp-0123456789abcdef").touch()
    assert write(dest, network).read_bytes() == expected
    assert not folder.exists()


@pytest.mark.parametrize(("name", "content", "message"), [
    ("notes.txt", "mine", "{0}, where finished pieces go, has other files (notes.txt); rename it"),
    ("settings.json", "{}", "{0}/settings.json was not written by this program; rename the folder"),
    ("settings.json", "{", "{0}/settings.json was not written by this program; rename the folder")])
def test_folder_of_somebody_else_is_left_alone(network, tmp_path, name, content, message):
    folder = tmp_path / "set.zip.parts"
    folder.mkdir()
    (folder / name).write_text(content)
    with pytest.raises(UserError) as caught:
        write(tmp_path / "set.zip", network)
    assert str(caught.value) == message.format(folder)
    assert (os.listdir(folder), (folder / name).read_text()) == ([name], content)


def test_file_in_the_place_of_the_folder_is_refused(network, tmp_path):
    (tmp_path / "set.zip.parts").touch()
    with pytest.raises(UserError) as caught:
        write(tmp_path / "set.zip", network)
    assert str(caught.value) == (f"{tmp_path}/set.zip.parts is not a folder, but finished pieces go there; rename "
                                 "it")


def test_second_process_is_refused(network, tmp_path):
    folder = tmp_path / "set.zip.parts"
    folder.mkdir()
    with ProcessLock(folder / "lock"), pytest.raises(UserError) as caught:
        write(tmp_path / "set.zip", network)
    assert str(caught.value).startswith(f"{tmp_path}/set.zip is being made by process {os.getpid()} on ")
    assert not (tmp_path / "set.zip").exists()


def test_full_disk_at_the_start_leaves_nothing(network, tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("filelock.SoftFileLease._write_lock_info", refuse)
    with pytest.raises(UserError) as caught:
        write(tmp_path / "set.zip", network)
    assert str(caught.value) == (f"{tmp_path}/set.zip.parts, where finished pieces go, is not writable (No space left "
                                 "on device); choose a writable folder")
    assert os.listdir(tmp_path) == []


def test_damaged_piece_is_named_and_the_rest_is_kept(network, tmp_path, monkeypatch):
    dest = begun(tmp_path, network, monkeypatch)
    piece = tmp_path / "set.zip.parts" / "piece-000000.npz"
    piece.write_bytes(piece.read_bytes()[:100])
    with pytest.raises(UserError, match=r"piece-000000\.npz cannot be read .*; remove it, and run the same command"):
        write(dest, network)
    piece.unlink()
    assert len(ImageSet(write(dest, network))) == 7


def test_full_disk_keeps_the_pieces_and_says_so(network, tmp_path, monkeypatch):
    def refuse(file, pixels):
        raise OSError(28, "No space left on device")

    dest = begun(tmp_path, network, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr("torch_utils.piecework.np.savez", refuse)
        with pytest.raises(UserError) as caught:
            write(dest, network)
    assert str(caught.value) == (f"{dest}.parts is not writable (No space left on device); finished pieces are kept: "
                                 "fix this, and run the same command again")
    assert sorted(os.listdir(f"{dest}.parts")) == ["piece-000000.npz", "settings.json"]


def test_full_disk_at_the_end_keeps_the_pieces_and_says_so(network, tmp_path, monkeypatch, capsys):
    def refuse(self, *arguments):
        raise OSError(28, "No space left on device")

    dest = tmp_path / "set.zip"
    with monkeypatch.context() as patch:
        patch.setattr(zipfile.ZipFile, "writestr", refuse)
        with pytest.raises(UserError) as caught:
            write(dest, network)
    assert str(caught.value) == f"--zip={dest} cannot be written: the disk is full; nothing was left there"
    assert capsys.readouterr().err == f"7 of 7 images are kept in {dest}.parts; the same command continues\n"
    assert os.listdir(tmp_path) == ["set.zip.parts"]
    saved = stop_after(monkeypatch, 0, AssertionError("all pieces are there"))
    assert len(ImageSet(write(dest, network))) == 7
    assert saved == []


def test_pieces_that_another_process_takes_away_hinder_nobody(tmp_path, monkeypatch):
    (tmp_path / "set.zip.parts").mkdir()
    (tmp_path / "set.zip.parts" / "piece-000000.npz").touch()
    with monkeypatch.context() as patch:
        patch.setattr("torch_utils.piecework.os.listdir", lambda folder: [".tmp-0123456789abcdef", "piece-000000.npz"])
        Pieces(tmp_path / "set.zip", {}).remove()
    assert not list((tmp_path / "set.zip.parts").iterdir())


def test_finished_set_is_left_alone_by_the_same_request(network, tmp_path, monkeypatch):
    drawn = SetContents(first_seed=7, count=3, counts=(2, 1), piece=2, drawn=[0, 1, 0], labels_from="real.zip")
    for name, chosen, settings in (("a.zip", contents(), {}), ("b.zip", drawn, {"truncation": 0.5, "center": "class"})):
        dest = tmp_path / name
        generator = ImageGenerator(network.G, SynthesisSettings(**settings), batch=1)
        assert write_labeled_set(dest, network, generator, chosen, ALONE)
        before = dest.read_bytes(), dest.stat().st_mtime_ns
        with monkeypatch.context() as patch:
            patch.setattr(ImageGenerator, "generate", None)
            assert not write_labeled_set(dest, network, generator, chosen, ALONE)
            with auto_means("composed"):  # a set that is there keeps to the operators that made it
                assert not write_labeled_set(dest, network, generator, chosen, ALONE)
        assert (dest.read_bytes(), dest.stat().st_mtime_ns) == before
    assert sorted(os.listdir(tmp_path)) == ["a.zip", "b.zip"]


def test_finished_set_whose_pieces_were_not_removed_is_put_together_again(network, tmp_path, monkeypatch):
    dest, remove = tmp_path / "set.zip", Pieces.remove

    def remove_before_the_set_is_there(self):
        if dest.exists():
            raise KeyboardInterrupt
        remove(self)

    with monkeypatch.context() as patch:
        patch.setattr(Pieces, "remove", remove_before_the_set_is_there)
        with pytest.raises(KeyboardInterrupt):
            write(dest, network)
    expected = dest.read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["set.zip", "set.zip.parts"]
    assert write(dest, network).read_bytes() == expected
    assert os.listdir(tmp_path) == ["set.zip"]


@pytest.mark.parametrize(("changes", "settings", "difference"), [
    ({"first_seed": 8}, {}, "seeds is [7, 13] there and [8, 14] here"),
    ({"counts": (4, 3)}, {}, 'classes is {"nv": 3, "mel": 4} there and {"nv": 4, "mel": 3} here'),
    ({}, {"truncation": 0.5}, "truncation is 1.0 there and 0.5 here"),
    ({}, {"noise_mode": "random"}, 'noise_mode is "const" there and "random" here')])
def test_finished_set_of_another_request_is_refused_and_stays(network, tmp_path, changes, settings, difference):
    dest = write(tmp_path / "set.zip", network)
    before = dest.read_bytes()
    with pytest.raises(UserError) as caught:
        write(dest, network, contents(**changes), **settings)
    assert str(caught.value) == (f"--zip is {dest}, which exists and holds other images ({difference}); choose another "
                                 "name, or remove it")
    assert (dest.read_bytes(), os.listdir(tmp_path)) == (before, ["set.zip"])


def test_finished_set_of_another_network_is_refused(network, tmp_path):
    other = open_network(save_generator(tmp_path / "net.safetensors", INFO | {"kimg": 9}), "cpu")
    dest = write(tmp_path / "set.zip", network)
    with pytest.raises(UserError, match=r"holds other images \(network_sha256 is .*; network_kimg is 4.5 there and 9 "):
        write(dest, other)


def test_file_that_is_not_such_a_set_is_refused_and_stays(network, tmp_path):
    dest = make_set(tmp_path / "set.zip", 7)
    with pytest.raises(UserError, match=r"set\.zip, which exists and holds other images \(generated is null there "):
        write(dest, network)
    assert len(ImageSet(dest)) == 7
    dest.write_bytes(dest.read_bytes()[:300])
    with pytest.raises(UserError) as caught:
        write(dest, network)
    assert str(caught.value) == (f"--zip is {dest}, which exists and is not a data set; choose another name, or remove "
                                 "it")
    assert dest.stat().st_size == 300


@pytest.mark.parametrize(("rank", "expected"), [(1, [2]), (2, [4])])
def test_processes_share_the_missing_pieces(network, tmp_path, monkeypatch, rank, expected):
    monkeypatch.setattr("torch_utils.piecework.broadcast_object", lambda value: ([1, 2, 4, 5], "cpp"))
    saved = stop_after(monkeypatch, 9, None)
    (tmp_path / "set.zip.parts").mkdir()
    chosen, generator = contents(counts=(5, 6)), ImageGenerator(network.G, SynthesisSettings(), batch=1)
    write_labeled_set(tmp_path / "set.zip", network, generator, chosen,
                       Processes(rank=rank, count=3, device=torch.device("cpu")))
    assert saved == expected
    assert os.listdir(tmp_path) == ["set.zip.parts"]
    images = chosen.images(expected[0])
    alone = generator.generate(chosen.seeds(images), network.classes.labels(chosen.labels(images)))
    found = np.load(tmp_path / "set.zip.parts" / f"piece-{expected[0]:06d}.npz")["pixels"]
    assert np.array_equal(found, torch.cat(list(alone)).numpy())
