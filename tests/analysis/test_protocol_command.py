"""study.py protocol: what it prints and writes, and the mistakes that it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import study
from analysis.protocol import Protocol
from dnnlib.cli import run
from imagesets.reader import ImageSet
from imagesets.writer import ImageSetWriter
from tests.helpers.make_sets import make_set, pixels_of, png
from tests.helpers.study_parts import ROWS, make_part, make_parts


@pytest.fixture
def inside(tmp_path, monkeypatch):
    """Working folder with the parts of a study."""
    monkeypatch.chdir(tmp_path)
    make_parts(tmp_path)
    return tmp_path


def protocol(capsys, *flags, out="p.json"):
    """Run the command; return the exit code, output and errors."""
    code = run(study.main, ["protocol", "--train=train.zip", "--val=val.zip", "--test=test.zip", "--workers=1",
                            f"--out={out}", *flags])
    return code, *capsys.readouterr()


def test_parts_labels_and_file_are_printed(inside, capsys):
    make_set("site-a.zip", images=range(5))
    make_part("isic.zip", ROWS["isic"], classes=["nevus", "melanoma"])
    (inside / "table.csv").write_text("lesion,sex,empty\n" + "".join(f"lesion{row},female,\n" for row in range(10)))
    code, out, err = protocol(capsys, "--external=isic.zip", "--positive=mel,melanoma", "--subset=site-a.zip",
                              "--attributes=table.csv")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "task: mel against rest",
        "",
        "part   size     images  groups  rest  mel",
        "train  8x8 RGB      16       8     8    8",
        "val    8x8 RGB       8       4     4    4",
        "test   8x8 RGB       8       4     4    4",
        "isic   8x8 RGB       8       4     4    4",
        "",
        "train: nv (8) = rest, mel (8) = mel",
        "val: nv (4) = rest, mel (4) = mel",
        "test: nv (4) = rest, mel (4) = mel",
        "isic: nevus (4) = rest, melanoma (4) = mel",
        "",
        "subset site-a: 5 images of the training part",
        "no image and no named group (patient, lesion) is in two parts",
        "no image resembles a training image as a changed copy does",
        "attributes sex, by group (lesion); not used: empty",
        "images with attributes: train 16 of 16, val 4 of 8, test 0 of 8, isic 0 of 8",
        "written to p.json"]
    assert [part.name for part in Protocol.read("p.json").parts] == ["train", "val", "test", "isic"]


def test_all_classes_are_columns_and_need_no_map(inside, capsys):
    code, out, _ = protocol(capsys, "--multiclass")
    assert code == 0
    assert out.splitlines()[:5] == ["task: nv, mel", "", "part   size     images  groups  nv  mel",
                                    "train  8x8 RGB      16       8   8    8",
                                    "val    8x8 RGB       8       4   4    4"]
    assert "=" not in out


def test_near_duplicates_are_printed_but_not_refused(inside, capsys):
    before = ImageSet("test.zip")
    with ImageSetWriter("doctored.zip", classes=before.classes) as writer:
        for row, name in enumerate(before.names):
            writer.add(before.read(name), before.label(row), before.groups[row])
        for image in range(7):
            writer.add(png(pixels_of(image) * 0.97), image % 2, f"other{image}")
    (inside / "test.zip").write_bytes((inside / "doctored.zip").read_bytes())
    code, out, _ = protocol(capsys, "--positive=mel")
    lines = out.splitlines()
    start = lines.index("7 images resemble a training image as a changed copy does; look at them, and leave them out "
                        "if they are the same picture:")
    assert code == 0
    assert sorted(lines[start + 1:start + 6])[0].startswith("    test 00000/img0000")
    assert {line.split("correlation ")[1] for line in lines[start + 1:start + 6]} == {"1.000"}
    assert lines[start + 6:] == ["    ... (2 more in the file)", "written to p.json"]
    found = Protocol.read("p.json").near_duplicates
    assert {(one.image, one.training_image) for one in found} == {
        (f"00000/img{8 + image:08d}.png", f"00000/img{image:08d}.png") for image in range(7)}


def test_same_command_again_leaves_the_file_and_says_so(inside, capsys):
    assert protocol(capsys, "--positive=mel")[0] == 0
    content = Path("p.json").read_bytes()
    code, out, _ = protocol(capsys, "--positive=mel")
    assert (code, out.splitlines()[-1]) == (0, "p.json holds this protocol already")
    assert Path("p.json").read_bytes() == content


def test_same_parts_in_other_places_are_written_again(inside, capsys):
    assert protocol(capsys, "--positive=mel")[0] == 0
    (inside / "moved").mkdir()
    Path("test.zip").rename("moved/test.zip")
    code = run(study.main, ["protocol", "--train=train.zip", "--val=val.zip", "--test=moved/test.zip", "--workers=1",
                            "--positive=mel", "--out=p.json"])
    assert (code, capsys.readouterr().out.splitlines()[-1]) == (0, "written to p.json")
    assert json.loads(Path("p.json").read_text())["parts"][2]["path"] == "moved/test.zip"


@pytest.mark.parametrize(("content", "message"), [
    (None, "--out is p.json, which holds another protocol; choose another name, or remove it"),
    ("{}", "--out is p.json, which exists and is not a readable protocol; choose another name, or remove it"),
])
def test_another_file_is_not_replaced(inside, capsys, content, message):
    if content is None:
        assert protocol(capsys, "--positive=nv")[0] == 0
    else:
        Path("p.json").write_text(content)
    before = Path("p.json").read_bytes()
    assert protocol(capsys, "--positive=mel") == (2, "", f"error: {message}\n")
    assert Path("p.json").read_bytes() == before


@pytest.mark.parametrize(("out", "message"), [
    ("folder.json", "--out is folder.json, which is a folder; expected a file name"),
    ("missing/p.json", "--out is missing/p.json, but the folder missing does not exist; create it first"),
    ("p.txt", "--out is p.txt; expected a name ending in .json"),
])
def test_file_that_cannot_be_written_is_refused_first(inside, capsys, out, message):
    (inside / "folder.json").mkdir()
    assert protocol(capsys, "--positive=nothing", out=out) == (2, "", f"error: {message}\n")


@pytest.mark.parametrize(("missing", "message"), [
    ("train", "--train is missing; expected the data set that classifiers learn from"),
    ("val", "--val is missing; expected a data set for thresholds"),
    ("test", "--test is missing; expected a data set for results"),
    ("out", "--out is missing; expected a file name such as protocol.json"),
])
def test_missing_options_are_named(inside, capsys, missing, message):
    flags = [f"--{name}={name}.json" for name in ("train", "val", "test", "out") if name != missing]
    assert run(study.main, ["protocol", *flags, "--positive=mel"]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


@pytest.mark.parametrize(("flags", "message"), [
    (["--positive=Mel"], "--positive names Mel, which is a class of no part (did you mean mel?); expected some of nv, "
     "mel"),
    ([], "--positive and --multiclass are both missing; expected one: --positive=mel for one class against the rest, "
     "or --multiclass for all classes"),
    (["--positive=mel", "--external=isic.zip,"], "--external has an empty path; expected data sets separated by "
     "commas, such as --external=a.zip,b.zip"),
    (["--positive=mel", "--external=none.zip"], "none.zip does not exist; expected a data set: a zip or a folder of "
     "images"),
    (["--positive=mel", "--attributes=none.csv"], "none.csv does not exist; expected a table, a CSV file"),
])
def test_mistakes_are_one_line_and_leave_no_file(inside, capsys, flags, message):
    assert protocol(capsys, *flags) == (2, "", f"error: {message}\n")
    assert not Path("p.json").exists()


def test_external_sets_may_be_repeated_and_listed(inside, capsys):
    for number in range(2):
        make_part(f"more{number}.zip", range(50 + 8 * number, 58 + 8 * number))
    assert protocol(capsys, "--positive=mel", "--external=isic.zip,more0.zip", "--external=more1.zip")[0] == 0
    assert [part.name for part in Protocol.read("p.json").evaluated] == ["test", "isic", "more0", "more1"]


def test_help_needs_no_heavy_library():
    program = ("import sys; import study; study.main(['protocol', '--help'], standalone_mode=False); "
               "print({'scipy.fft', 'sklearn', 'matplotlib', 'torchvision'} & set(sys.modules))")
    found = subprocess.run([sys.executable, "-c", program], cwd=Path(study.__file__).parent, capture_output=True,
                           text=True, check=True).stdout
    assert found.splitlines()[-1] == "set()"
    assert "--positive NAME,..." in found
