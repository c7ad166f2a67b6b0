"""Archives that have to be unpacked: the message of every option for images, tables or networks shows how."""

import bz2
import gzip
import io
import shlex
import subprocess
import tarfile

import pytest

from dnnlib.cli import UserError
from dnnlib.files import packed_names, unpack_advice
from imagesets.reader import ImageSet
from imagesets.sources import open_source
from imagesets.tables import read_table
from tests.helpers.make_archives import encode, make_folder, make_zip, noise
from training.network_file import recognize

UNTAR = "mkdir -p {folder} && tar -xf {path} -C {folder}"


def make_tar(path, mode, names=("images/a.png", "images/b.png")):
    with tarfile.open(path, mode) as archive:
        for name in names:
            data = encode(noise(1, 8, 8, 3))
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize(("name", "mode"), [
    ("my images.tgz", "w:gz"), ("my images.tar.gz", "w:gz"), ("my images.tar", "w"), ("my images.tar.bz2", "w:bz2"),
    ("my images.tar.xz", "w:xz"), ("my images.gz", "w:gz")])
def test_a_tar_of_images_is_to_be_unpacked_by_a_command_that_works(name, mode, tmp_path):
    path = make_tar(tmp_path / name, mode)
    command = UNTAR.format(path=shlex.quote(str(path)), folder=shlex.quote(str(tmp_path / "my images")))
    advice = f"is a tar archive; unpack it: {command}"
    assert unpack_advice(path) == advice
    with pytest.raises(UserError) as caught:
        open_source(path)
    assert str(caught.value) == f"--source={path} {advice}"
    with pytest.raises(UserError) as caught:
        ImageSet(path)  # --data, --valid, --generated, --labels-from
    assert str(caught.value) == f"{path} {advice}"
    with pytest.raises(ValueError) as caught:
        recognize(path)  # --network, --resume
    assert str(caught.value) == f"{path} {advice}; expected a network file (.safetensors or NVIDIA .pkl)"
    subprocess.run(command, shell=True, check=True)
    assert open_source(tmp_path / "my images").names == ["images/a.png", "images/b.png"]


@pytest.mark.parametrize(("name", "data", "advice"), [
    ("a.7z", b"7z\xbc\xaf\x27\x1c" + bytes(99), "is a 7z archive; unpack it: 7z x {path} -o{folder}"),
    ("a.rar", b"Rar!\x1a\x07\x01\x00" + bytes(99), "is a rar archive; unpack it: unrar x {path} {folder}/"),
    ("a.tar.zst", b"\x28\xb5\x2f\xfd" + bytes(99), "is a tar archive; unpack it: " + UNTAR),
    ("a.csv.gz", gzip.compress(b"image_id,dx\na,nv\n" * 9), "is a file compressed by gzip; unpack it: gunzip -k "
                                                            "{path}"),
    ("a.bz2", bz2.compress(bytes(600)), "is a file compressed by bzip2; unpack it: bunzip2 -k {path}")])
def test_other_packed_files_name_their_program(name, data, advice, tmp_path):
    path = tmp_path / name
    path.write_bytes(data)
    expected = advice.format(path=path, folder=tmp_path / "a")
    assert unpack_advice(path) == expected
    with pytest.raises(UserError) as caught:
        open_source(path)
    assert str(caught.value) == f"--source={path} {expected}"
    if b"\0" in data:
        with pytest.raises(UserError) as caught:
            read_table(path)
        assert str(caught.value) == f"{path} {expected}; expected a table as CSV (a workbook: save it as CSV)"


def test_what_is_not_packed_has_no_advice(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"no archive")
    make_zip(tmp_path / "a.zip", {"a.png": b""})
    assert [unpack_advice(tmp_path / name) for name in ("a.tar", "a.zip", "missing.tgz")] == [None, None, None]


def test_a_folder_or_zip_of_archives_names_them(tmp_path):
    files = {"HAM10000_images_part_1.zip": b"PK", "HAM10000_images_part_2.zip": b"PK", "HAM10000_metadata": b"a,b\n"}
    folder, path = make_folder(tmp_path / "dataverse_files", files), make_zip(tmp_path / "dataverse_files.zip", files)
    for source in (folder, path):
        with pytest.raises(UserError) as caught:
            open_source(source)
        assert str(caught.value) == (
            f"{source} holds no images; expected files such as .png or .jpg, not packed ones: give or unpack the "
            "one inside (HAM10000_images_part_1.zip, HAM10000_images_part_2.zip)")
    assert packed_names(["a.png", "B.TGZ", "c.tar.gz", "d.zip", "e"]) == ["B.TGZ", "c.tar.gz", "d.zip"]
