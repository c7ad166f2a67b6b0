"""python -m training.nvidia_pickle: converts, says what it did, never leaves half a file."""
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers import nvidia_pickle_writer as writer
from tests.helpers.tiny_networks import GENERATOR, generator
from training.pickles.convert import main
from training.snapshot import Networks, load_network, save_network

ROOT = Path(__file__).parent.parent.parent
SAMPLE = ROOT / "tests" / "data" / "sample_32_c2.stripped.pkl"


def failure(capsys, *arguments):
    """Return the one line with which the command fails."""
    assert main([str(argument) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err.removeprefix("error: ").rstrip("\n")


def test_convert_as_a_command_writes_the_same_networks(tmp_path):
    target = tmp_path / "out.safetensors"
    run = subprocess.run([sys.executable, "-m", "training.nvidia_pickle", SAMPLE, target], cwd=ROOT, text=True,
                         capture_output=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [
        "G      Generator, 32 x 32, 3 channels, labels of length 2, 268,275 parameters",
        "D      Discriminator, 32 x 32, 3 channels, labels of length 2, 326,560 parameters",
        "G_ema  Generator, 32 x 32, 3 channels, labels of length 2, 268,275 parameters",
        f"wrote {target} ({target.stat().st_size:,} bytes)",
    ]
    assert run.stderr == ""
    first, second = load_network(SAMPLE).D.state_dict(), load_network(target).D.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_convert_unknown_source_is_a_warning_on_stderr(tmp_path, capsys):
    content = writer.snapshot(writer.module(generator(c_dim=0), kwargs={**GENERATOR, "c_dim": 0}, source="pass\n"))
    (tmp_path / "in.pkl").write_bytes(writer.dumps(content))
    assert main([str(tmp_path / "in.pkl"), str(tmp_path / "out.safetensors")]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[:2] == ["G      none", "D      none"]
    assert "unconditional" in out
    assert err.startswith(f"warning: {tmp_path / 'in.pkl'}: names match, behaviour may not")
    assert err.count("\n") == 1


def test_convert_takes_a_pattern_or_a_folder_of_the_original_and_says_the_file(tmp_path, capsys):
    folder = tmp_path / "00000-theirs"
    folder.mkdir()
    for number in (8, 12):
        shutil.copy(SAMPLE, folder / f"network-snapshot-{number:06d}.pkl")
    for text, number in ((folder, 12), (tmp_path / "00000-*", 12), (tmp_path / "0*/network-snapshot-000008.pkl", 8)):
        assert main([str(text), str(tmp_path / "out.safetensors"), "--force"]) == 0
        assert capsys.readouterr().err == f"IN: {folder}/network-snapshot-{number:06d}.pkl\n"


@pytest.mark.parametrize(("name", "message"), [
    ("gone.pkl", "IN is {path}, which does not exist; expected a network file: a .safetensors of a run, or a .pkl of "
                 "the original"),
    ("file.txt/in.pkl", "IN is {path}, which does not exist; expected a network file: a .safetensors of a run, or a "
                        ".pkl of the original"),
    ("folder", "IN is {path}, a folder without network-snapshot-*.safetensors; expected a network file (a .safetensors "
               "of a run, or a .pkl of the original), or the folder of a run"),
    ("file.txt", "{path} is of an unknown kind (it starts with 74 65 78 74); expected a network file (.safetensors or "
                 "NVIDIA .pkl)")])
def test_convert_of_what_is_no_network_file_gives_a_sentence(tmp_path, capsys, name, message):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file.txt").write_text("text")
    path = tmp_path / name
    assert failure(capsys, path, tmp_path / "out.safetensors") == message.format(path=path)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["file.txt", "folder"]


def test_convert_existing_output_needs_force(tmp_path, capsys):
    target = tmp_path / "out.safetensors"
    target.write_bytes(b"precious")
    assert failure(capsys, SAMPLE, target) == (
        f"{target} exists already; expected a new name: choose another, or overwrite it with --force")
    assert target.read_bytes() == b"precious"
    assert main([str(SAMPLE), str(target), "--force"]) == 0
    assert load_network(target).G_ema.img_resolution == 32


@pytest.mark.parametrize("content", [b"", b"<html>", b"\x80\x04N.", SAMPLE.read_bytes()[:100_000]],
                         ids=["empty", "web_page", "foreign", "cut"])
def test_convert_unreadable_input_writes_nothing_and_keeps_the_old_output(tmp_path, capsys, content):
    source, target = tmp_path / "in.pkl", tmp_path / "out.safetensors"
    source.write_bytes(content)
    assert str(source) in failure(capsys, source, target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.pkl"]
    target.write_bytes(b"old")
    failure(capsys, source, target, "--force")
    assert target.read_bytes() == b"old"


def test_convert_missing_input_names_it(tmp_path, capsys):
    assert "missing.pkl" in failure(capsys, tmp_path / "missing.pkl", tmp_path / "out.safetensors")


def test_convert_missing_output_folder_names_it(tmp_path, capsys):
    assert str(tmp_path / "missing") in failure(capsys, SAMPLE, tmp_path / "missing" / "out.safetensors")


def test_convert_other_output_suffix_is_refused(tmp_path, capsys):
    assert failure(capsys, SAMPLE, tmp_path / "out.pkl") == (
        f"the output is {tmp_path / 'out.pkl'}; expected a name that ends in .safetensors")


def test_convert_safetensors_input_is_refused(tmp_path, capsys):
    source = tmp_path / "in.safetensors"
    save_network(source, Networks(G=None, D=None, G_ema=generator()))
    assert failure(capsys, source, tmp_path / "out.safetensors") == (
        f"{source} is a safetensors file already; expected an NVIDIA pickle")


def test_convert_into_a_missing_folder_names_the_folder(tmp_path, capsys):
    message = failure(capsys, SAMPLE, tmp_path / "missing" / "out.safetensors")
    assert message == f"there is no folder {tmp_path / 'missing'}; make it first"
