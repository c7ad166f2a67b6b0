"""The command line of the conversion: exit codes, messages, and what is left after an interruption or a full disk."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dataset_tool import main
from dnnlib.cli import run
from dnnlib.progress import Progress
from imagesets.reader import ImageSet
from tests.helpers.full_disk import needs_mount
from tests.helpers.make_archives import encode, make_folder, make_zip, noise

ROOT = Path(__file__).parent.parent.parent


def image(seed, size=8):
    return encode(noise(seed, size, size, 3))


@pytest.fixture
def inside(tmp_path, monkeypatch):
    """A folder to work in, with a folder of four images in two classes."""
    monkeypatch.chdir(tmp_path)
    return make_folder(tmp_path / "lesions", {"mel/a.png": image(1), "mel/b.png": image(2), "nv/c.png": image(3),
                                              "nv/d.png": image(4)}).parent


def call(capsys, *arguments):
    """Return exit code, standard output, standard error."""
    code = run(main, [*arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_conversion_prints_a_summary(inside, capsys):
    (inside / "lesions/nv/e.png").write_bytes(b"")
    (inside / "lesions/notes.txt").write_text("hello")
    arguments = "--source=lesions --dest=set.zip --resolution=16x16 --max-bad=20% --report=report.json --workers=1"
    assert call(capsys, *arguments.split()) == (0, """\
set.zip: 4 images, 16x16 RGB, 4 groups
  found 5 in lesions (image folder), kept 4, dropped 1
  dropped: unreadable: zero bytes: 1 (nv/e.png)
  converted: upscaled: 4 (mel/a.png, mel/b.png, nv/c.png, ...)
  classes: mel 2, nv 2
  files that are not images by their names: 1 (notes.txt)
""", "")
    assert json.loads((inside / "report.json").read_text())["dropped"] == {
        "unreadable: zero bytes": {"count": 1, "names": ["nv/e.png"]}}


KEPT = ("; numbers of classes are kept, which is right if another data set of the study has such images: convert all "
        "with the same --classes; if none has, leave the class out with --classes\n")


def test_classes_without_images_are_kept_and_named(inside, capsys):
    make_folder(inside / "other", {"bcc/a.png": image(5), "mel/b.png": image(6)})
    for source in ("lesions", "other"):
        code, out, err = call(capsys, f"--source={source}", f"--dest={source}.zip", "--classes=nv,bcc,mel",
                              "--workers=1")
        assert (code, err) == (0, "")
        found, empty = ("nv 2, bcc 0, mel 2", "bcc") if source == "lesions" else ("nv 0, bcc 1, mel 1", "nv")
        assert out.endswith(f"  classes: {found}\n  note: no images of class {empty}{KEPT}")
    first, second = (ImageSet(f"{source}.zip") for source in ("lesions", "other"))
    assert first.classes == second.classes == ["nv", "bcc", "mel"]
    assert (first.labels.tolist(), second.labels.tolist()) == ([2, 2, 0, 0], [1, 2])
    # Converted again, and joined, they keep their classes.
    assert call(capsys, "--source=lesions.zip", "--source=other.zip", "--dest=both.zip", "--workers=1")[0] == 0
    both = ImageSet("both.zip")
    assert (both.classes, both.labels.tolist()) == (["nv", "bcc", "mel"], [2, 2, 0, 0, 1, 2])


@pytest.mark.parametrize(("arguments", "lines"), [
    ("--classes=nv,cancer", "  classes: nv 2, cancer 0\n  note: no images of class cancer" + KEPT + "  note: the "
     "source has no class named cancer, and --classes leaves out mel; check that no name is misspelled\n"),
    ("--merge=benign=nv,df;x=scc --classes=benign,mel", "  classes: benign 2, mel 2\n  note: the source has no class "
     "named df, scc; check that no name is misspelled\n")])
def test_names_that_may_be_wrong_are_shown_beside_what_is_left_out(arguments, lines, inside, capsys):
    code, out, _ = call(capsys, "--source=lesions", "--dest=set.zip", "--workers=1", *arguments.split())
    assert code == 0
    assert out.endswith(lines)


def test_a_single_folder_is_a_class_if_classes_or_merge_names_it(inside, capsys):
    make_folder(inside / "clinic", {"images/nv/a.png": image(5), "images/nv/b.png": image(6)})
    for flags, names in (("--classes=mel,nv", ["mel", "nv"]), ("--merge=benign=nv,bkl --classes=mel,benign",
                                                               ["mel", "benign"])):
        code, out, _ = call(capsys, "--source=clinic", "--dest=set.zip", "--workers=1", *flags.split())
        assert (code, f"  classes: mel 0, {names[1]} 2\n" in out) == (0, True)
        assert (ImageSet("set.zip").classes, ImageSet("set.zip").labels.tolist()) == (names, [1, 1])
    refusal = ("error: --classes: the images of clinic have no labels; expected subfolders, a dataset.json with "
               "labels, or --labels=FILE\n")
    assert call(capsys, "--source=clinic", "--dest=set.zip", "--classes=mel,bcc") == (2, "", refusal)
    assert call(capsys, "--source=clinic", "--dest=set.zip", "--classes=mel,nv", "--folders=ignore") == (2, "", refusal)


def test_source_given_twice_means_two_parts_of_one_set(inside, capsys):
    make_folder(inside / "more", {"nv/e.png": image(5), "bcc/f.png": image(6)})
    assert call(capsys, "--source=lesions", "--source=more", "--dest=set.zip", "--workers=1") == (0, """\
set.zip: 6 images, 8x8 RGB, 6 groups
  found 6 in lesions + more (image folder), kept 6, dropped 0
  from lesions (image folder): found 4, kept 4
  from more (image folder): found 2, kept 2
  classes: bcc 1, mel 2, nv 3
""", "")


def test_width_and_height_mean_resolution(inside, capsys):
    for number, size in enumerate((["--resolution=16x16"], ["--width=16", "--height=16"])):
        assert call(capsys, "--source=lesions", f"--dest={number}.zip", "--workers=1", *size)[0] == 0
    assert (inside / "0.zip").read_bytes() == (inside / "1.zip").read_bytes()


@pytest.mark.parametrize(("flags", "expected"), [((), None), (("--redistribution=yes",), True),
                                                 (("--redistribution=no",), False)])
def test_redistribution_reaches_the_data_set(inside, capsys, flags, expected):
    assert call(capsys, "--source=lesions", "--dest=set.zip", "--workers=1", *flags)[0] == 0
    source = ImageSet("set.zip").source
    assert source.get("redistribution") is source["options"].get("redistribution") is expected


def test_exact_and_filter_and_transform_reach_the_data_set(inside, capsys):
    arguments = ["--source=lesions", "--dest=set.zip", "--resolution=16x16", "--transform=center-crop",
                 "--resize-filter=box", "--exact", "--workers=1"]
    assert call(capsys, *arguments)[0] == 0
    assert ImageSet("set.zip").source["options"] == {
        "unlabeled": "error", "transform": "center-crop", "width": 16, "height": 16, "resize_filter": "box",
        "exact": True, "max_bad": 0.01}


def test_old_spelling_of_unlabeled_is_accepted_but_not_shown(inside, capsys):
    (inside / "lesions/stray.png").write_bytes(image(9))
    sets = []
    for option in ("--unlabelled=drop", "--unlabeled=drop"):
        assert call(capsys, "--source=lesions", f"--dest={len(sets)}.zip", "--workers=1", option)[0] == 0
        sets.append((inside / f"{len(sets)}.zip").read_bytes())
    assert sets[0] == sets[1]
    assert call(capsys, "--source=lesions", "--dest=x.zip", "--unlabelled=some") == (
        2, "", "error: Invalid value for '--unlabeled': 'some' is not one of 'error', 'drop', 'keep'.\n")
    assert call(capsys, "--source=lesions", "--dest=x.zip", "--unlabelled=drop", "--unlabeled=keep") == (
        2, "", "error: --unlabeled is given twice (drop, keep); expected once: keep only one\n")
    out = call(capsys, "--help")[1]
    assert "--unlabeled [error|drop|keep]" in out
    assert "unlabelled" not in out


def test_options_before_a_command_are_refused(inside, capsys):
    assert call(capsys, "--unlabelled=drop", "inspect", "lesions") == (
        2, "", "error: --unlabeled comes before inspect; expected the options of a command after its name\n")


def test_names_that_the_terminal_cannot_show_are_escaped(inside, capsys):
    (inside / "lesions/nv/\u00e9.png").write_bytes(b"")
    code, out, _ = call(capsys, "--source=lesions", "--dest=set.zip", "--max-bad=50%", "--workers=1")
    assert code == 0
    assert "  dropped: unreadable: zero bytes: 1 (nv/\\xe9.png)\n" in out


EXPECTED = ("expected a folder or a zip of images, a MedMNIST .npz, the CIFAR-10 python archive (.tar.gz), or MNIST "
            "images (-images-idx3-ubyte.gz)")
BOTH = "; give both, such as --source=images/ --dest=isic256.zip, or see --help"


@pytest.mark.parametrize(("arguments", "message"), [
    ("", "--source is missing" + BOTH),
    ("--source=lesions", "--dest is missing" + BOTH),
    ("--source=gone --dest=set.zip", "--source=gone does not exist; " + EXPECTED),
    ("--source=empty --dest=set.zip", "empty holds no images; expected files such as .png or .jpg"),
    ("--source=cut.zip --dest=set.zip", "cut.zip cannot be read as a zip (File is not a zip file): it is truncated or "
                                        "not a zip; make or copy it again"),
    ("--source=unknown --dest=set.zip", "unknown: labels in dataset.json name 1 file that is not there (x.png)"),
    ("--source=kinds --dest=set.zip", "kinds: labels in dataset.json are of mixed kinds (integers, lists of 2); "
                                      "expected integers, or lists of one length"),
    ("--source=mixed --dest=set.zip", "images differ in size: a.png is 8x8 but b.png is 16x16; expected one size: give "
                                      "--resolution=8x8, with --transform=center-crop if they should not be "
                                      "stretched"),
    ("--source=lesions --dest=empty.zip", "--dest=empty.zip is a folder; expected a zip file to write"),
    ("--source=lesions --dest=lesions", "--dest=lesions is the source itself; choose another name"),
    ("--source=lesions --dest=mixed", "--dest=mixed is a folder with files in it; expected an empty or a new one"),
    ("--source=lesions --dest=set.tar", "--dest=set.tar ends in .tar; expected .zip, or a folder"),
    ("--source=lesions --dest=gone/set.zip", "--dest=gone/set.zip: there is no folder gone; make it first"),
    ("--source=lesions --dest=set.zip --resolution=300x300",
     "--resolution=300x300: 300 is not a power of two from 8 to 2048; expected for example 256x256"),
    ("--source=lesions --dest=set.zip --resolution=256x128",
     "--resolution=256x128 is not square; expected equal sides, such as 128x128, or --transform=center-crop-wide, "
     "which pads with black to a square"),
    ("--source=lesions --dest=set.zip --resolution=256", "--resolution=256; expected WIDTHxHEIGHT, such as 256x256"),
    ("--source=lesions --dest=set.zip --resolution=8x8 --width=8",
     "--resolution and --width or --height are both given; expected only one of the two"),
    ("--source=lesions --dest=set.zip --max-bad=few",
     "--max-bad=few; expected a share from 0 to 1, or from 0% to 100%"),
    ("--source=lesions --dest=set.zip --merge=x=bcc",
     "--merge=x=bcc takes bcc into x, but there is no class bcc; expected some of mel, nv"),
    ("--source=lesions --dest=set.zip --classes=bcc,df",
     "--classes=bcc,df names bcc, but there is no class bcc; expected some of mel, nv"),
    ("--source=lesions --dest=set.zip --classes=nv,Mel", "--classes=nv,Mel names Mel, but there is no class Mel; "
     "expected some of mel, nv (did you mean mel? If not, give mel another name with --merge)"),
    ("--source=lesions --dest=set.zip --labels=gone.csv", "gone.csv does not exist; expected a table, a CSV file"),
    ("--source=lesions --dest=set.zip --labels=truth.csv --id-column=nam --label-column=kind", "--id-column=nam is not "
     "a column of truth.csv; expected one of name, kind (did you mean name?)"),
    ("--source=lesions --dest=set.zip --transform=middle",
     "Invalid value for '--transform': 'middle' is not one of 'center-crop', 'center-crop-wide'."),
    ("--source=lesions --dest=set.zip --report=empty", "--report=empty is a folder; expected a file name such as "
                                                       "report.json")])
def test_bad_input_gives_one_line_and_leaves_nothing(arguments, message, inside, capsys):
    (inside / "empty").mkdir()
    (inside / "empty.zip").mkdir()
    (inside / "truth.csv").write_text("name,kind\na,x\nb,x\nc,y\nd,y\n")
    make_folder(inside / "mixed", {"a.png": image(1), "b.png": image(2, 16)})
    make_folder(inside / "unknown", {"a.png": image(1), "dataset.json": b'{"labels": [["x.png", 1]]}'})
    make_folder(inside / "kinds", {"a.png": image(1), "b.png": image(2),
                                   "dataset.json": b'{"labels": [["a.png", 1], ["b.png", [0, 1]]]}'})
    whole = make_zip(inside / "cut.zip", {"a.png": image(1), "b.png": image(2)}).read_bytes()
    (inside / "cut.zip").write_bytes(whole[:len(whole) // 2])
    before = sorted(os.listdir(inside))
    code, out, err = call(capsys, *arguments.split())
    assert (code, out) == (2, "")
    assert err == f"error: {message}\n"
    assert sorted(os.listdir(inside)) == before


def test_a_damaged_destination_keeps_its_old_content(inside, capsys):
    (inside / "set.zip").write_bytes(b"old")
    (inside / "lesions/mel/a.png").write_bytes(b"")
    code, _, err = call(capsys, "--source=lesions", "--dest=set.zip", "--workers=1")
    assert (code, err) == (2, "error: 1 of 4 images cannot be read (zero bytes: 1), more than --max-bad=0.01 allows; "
                              "list them with --report=FILE\n")
    assert (inside / "set.zip").read_bytes() == b"old"
    assert sorted(os.listdir(inside)) == ["lesions", "set.zip"]


def make_slow_source(folder, count=600):
    """Make a source of many images that take some 10 ms each: links to one file."""
    source = make_folder(folder / "slow", {"0000.png": encode(noise(0, 700, 700, 3))})
    for number in range(1, count):
        os.link(source / "0000.png", source / f"{number:04d}.png")
    return source


COMMAND = [sys.executable, str(ROOT / "dataset_tool.py"), "--source=slow", "--resolution=64x64",
           "--transform=center-crop"]


@pytest.mark.parametrize(("number", "code", "word", "dest"), [(signal.SIGINT, 130, "interrupted", "set.zip"),
                                                              (signal.SIGTERM, 143, "terminated", "set")])
def test_a_stopped_conversion_leaves_nothing_behind(number, code, word, dest, tmp_path):
    make_slow_source(tmp_path)
    process = subprocess.Popen([*COMMAND, f"--dest={dest}", "--workers=2", "--report=r.json"], cwd=tmp_path, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    try:
        wait_for(lambda: written(tmp_path) > 20000)
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does: all processes get it
        else:
            process.send_signal(number)
        out, err = process.communicate(timeout=30)
        assert (process.returncode, out, err) == (code, "", f"error: {word}\n")
        assert os.listdir(tmp_path) == ["slow"]
        wait_for(lambda: not group_exists(process.pid))
    finally:
        if process.poll() is None:
            process.kill()


def written(folder):
    """Return the bytes in temporary files and folders."""
    return sum(path.stat().st_size for path in folder.glob(".tmp-*")) + \
        sum(path.stat().st_size for path in folder.glob(".tmp-*/**/*.png"))


def group_exists(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@needs_mount
@pytest.mark.parametrize("dest", ["set.zip", "set"])
def test_a_full_disk_gives_one_line_and_leaves_nothing_behind(dest, tmp_path):
    make_slow_source(tmp_path, 40)  # 12 kB each as 64x64
    (tmp_path / "disk").mkdir()
    script = 'mount -t tmpfs -o size=200k tmpfs disk && "$@"; code=$?; ls -A disk; exit $code'
    done = subprocess.run(["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh", *COMMAND,
                           f"--dest=disk/{dest}", "--workers=2", "--report=r.json"],
                          cwd=tmp_path, capture_output=True, text=True, check=False)
    message = f"error: --dest=disk/{dest} cannot be written: the disk is full; nothing was left there\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)
    assert sorted(os.listdir(tmp_path)) == ["disk", "slow"]


@pytest.mark.skipif(os.name != "posix", reason="limits file sizes by ulimit")
def test_a_limit_on_file_sizes_gives_one_line_and_leaves_nothing_behind(tmp_path):
    make_slow_source(tmp_path, 40)
    done = subprocess.run(["sh", "-c", 'ulimit -f 400; exec "$@"', "sh", *COMMAND, "--dest=set.zip", "--workers=2"],
                          cwd=tmp_path, capture_output=True, text=True, check=False)
    message = "error: --dest=set.zip cannot be written: File too large; nothing was left there\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)
    assert os.listdir(tmp_path) == ["slow"]


def test_progress_tells_rate_and_time_left(inside, capsys, monkeypatch):
    monkeypatch.setitem(Progress.__init__.__kwdefaults__, "log_seconds", 0)
    code, _, err = call(capsys, "--source=lesions", "--dest=set.zip", "--workers=1")
    assert code == 0
    lines = err.splitlines()
    assert len(lines) == 10  # of 4 headers and 4 images, and each at the end
    assert re.fullmatch(r"2/4 headers, [\d.e+]+/s, 0:\d\d left", lines[1])
    assert re.fullmatch(r"2/4 images, [\d.e+]+/s, 0:\d\d left", lines[6])
