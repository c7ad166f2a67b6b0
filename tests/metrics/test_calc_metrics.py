"""The program calc_metrics.py: what it prints and writes, and what it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest

from dnnlib.cli import run
from dnnlib.files import sha256_of
from dnnlib.lines import read_lines
from generation.network import open_network
from metrics.command import make_command
from metrics.image_sources import GeneratedImages
from metrics.names import DESCRIPTIONS, KNOWN_NAMES
from tests.helpers.make_sets import enclose, make_set, pixels_of, png
from tests.helpers.small_networks import small_generator
from tests.helpers.training_runs import replaced
from training.config import DatasetFacts
from training.options import TrainOptions, resolve
from training.run_record import RunRecord, identify, write_record
from training.snapshot import Networks, save_network

ROOT = Path(__file__).parent.parent.parent
COUNT = 20
QUICK = ["--detector=random-conv", "--device=cpu", "--verbose=0"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_set(tmp_path_factory.mktemp("data") / "a.zip", COUNT, size=16, classes=["benign", "melanoma"],
                    labels=[int(index % 4 == 0) for index in range(COUNT)])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def save(path, seed=0, kimg=0.0, **network):
    save_network(path, Networks(G=None, D=None, G_ema=small_generator(seed=seed, **network),
                                config={"info": {"kimg": kimg, "classes": ["benign", "melanoma"], "run": "r"}}))
    return path


def save_run(folder, *, xflip=False):
    """Make what a run of two snapshots leaves behind."""
    folder.mkdir(parents=True)
    facts = DatasetFacts(name="a", resolution=16, channels=3, num_images=COUNT, c_dim=2)
    config = resolve(TrainOptions(cond=True, mirror=xflip), facts)
    write_record(folder, RunRecord(config=config, identity=identify(config, "0")))
    for seed in (0, 1):
        save(folder / f"network-snapshot-{seed * 200:06d}.safetensors", seed, kimg=200.0 * seed)
    return folder


def measure(capsys, *arguments):
    """Run the program here; return the exit code, the records that it printed, and what it said."""
    code = run(make_command(), replaced(QUICK, [str(argument) for argument in arguments]))
    out, err = capsys.readouterr()
    return code, [json.loads(line) for line in out.splitlines()], err


def refused(capsys, *arguments):
    """Return the one line with which the program ends."""
    code, records, err = measure(capsys, *arguments)
    assert (code, records) == (2, [])
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    return err[len("error: "):-1]


def test_network_prints_a_line_for_each_metric(capsys, data, tmp_path):
    network = save(tmp_path / "net.safetensors", kimg=12.5)
    code, records, err = measure(capsys, f"--network={network}", f"--data={data}", "--metrics=fid20_full,pr10_full")
    assert (code, err) == (0, "")
    assert [record["metric"] for record in records] == ["fid20_full", "pr10_full"]
    assert list(records[0])[:7] == ["results", "metric", "total_time", "total_time_str", "num_gpus", "snapshot_pkl",
                                    "timestamp"]
    assert records[0]["results"]["fid20_full"] > 0
    assert set(records[1]["results"]) == {"pr10_full_precision", "pr10_full_recall"}
    assert {(record["snapshot_pkl"], record["num_gpus"], record["kimg"], record["detector"], record["network_sha256"])
            for record in records} == {("net.safetensors", 1, 12.5, "random-conv", sha256_of(network))}
    assert not list(tmp_path.glob("metric*"))


def test_network_in_a_run_folder_adds_to_the_files_of_its_metrics(capsys, data, tmp_path):
    folder = save_run(tmp_path / "run")
    (folder / "metric-kid20.jsonl").write_text('{"results": {"kid20": 1.0}, "tick": 0}\n')
    code, records, _ = measure(capsys, f"--network={folder / 'network-snapshot-000200.safetensors'}", f"--data={data}",
                               "--metrics=kid20")
    assert code == 0
    lines = read_lines(folder / "metric-kid20.jsonl")
    assert lines == [{"results": {"kid20": 1.0}, "tick": 0}, *records]
    assert lines[1]["snapshot_pkl"] == "network-snapshot-000200.safetensors"
    assert "tick" not in lines[1]  # the run does not take it for its own


def test_network_that_is_a_runs_folder_is_its_newest_and_belongs_to_the_run(capsys, data, tmp_path):
    folder = save_run(tmp_path / "00000-run")
    code, records, err = measure(capsys, f"--network={tmp_path}/00000-*", f"--data={data}", "--metrics=kid20",
                                 "--metrics=fid20_full")
    assert (code, err) == (0, f"--network: {folder}/network-snapshot-000200.safetensors\n")
    assert [(record["metric"], record["snapshot_pkl"]) for record in records] == [
        (name, "network-snapshot-000200.safetensors") for name in ("kid20", "fid20_full")]
    assert read_lines(folder / "metric-kid20.jsonl") == records[:1]
    code, records, _ = measure(capsys, f"--run={tmp_path}/0000?-*", f"--data={data}", "--metrics=kid20")
    assert (code, [record["kimg"] for record in records]) == (0, [0, 200])


def test_group_of_one_with_another_gpus_is_refused(capsys, data, tmp_path, monkeypatch):
    network = save(tmp_path / "net.safetensors")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert refused(capsys, f"--network={network}", f"--data={data}", "--metrics=kid20", "--gpus=4") == (
        "--gpus is 4, but WORLD_SIZE (set by torchrun) is 1; expected the same number: leave --gpus out, or unset "
        "RANK and WORLD_SIZE to let --gpus=4 start 4 processes")


def test_run_measures_all_snapshots_and_draws_a_curve(capsys, data, tmp_path):
    folder = save_run(tmp_path / "run")
    (folder / "metric-kid20.png").write_bytes(b"the run's own")
    code, records, err = measure(capsys, f"--run={folder}", f"--data={data}", "--metrics=fid20_full,kid20",
                                 "--verbose=1")
    assert code == 0
    assert [(record["metric"], record["kimg"]) for record in records] == [
        ("fid20_full", 0), ("kid20", 0), ("fid20_full", 200), ("kid20", 200)]
    assert records[0]["results"] != records[2]["results"]
    assert "network-snapshot-000200.safetensors (2 of 2)" in err.splitlines()
    for name in ("fid20_full", "kid20"):
        assert read_lines(folder / f"metric-{name}.jsonl") == [record for record in records if record["metric"] == name]
        with PIL.Image.open(folder / f"measured-{name}.png") as picture:
            assert picture.size == (720, 400)
    assert (folder / "metric-kid20.png").read_bytes() == b"the run's own"
    assert not (folder / "metric-fid20_full.png").exists()


@pytest.mark.parametrize("when", ["000200", "000000"])  # before it is to be opened, and just then
def test_run_whose_network_file_is_removed_meanwhile_is_measured_without_it(capsys, data, tmp_path, monkeypatch, when):
    folder = save_run(tmp_path / "run")

    def remove_and_open(path, device):
        if path.stem.endswith(when):
            (folder / "network-snapshot-000000.safetensors").unlink(missing_ok=True)
        return open_network(path, device)

    monkeypatch.setattr("metrics.command.open_network", remove_and_open)
    code, records, err = measure(capsys, f"--run={folder}", f"--data={data}", "--metrics=kid20", "--verbose=1")
    assert code == 0
    assert [record["snapshot_pkl"] for record in records] == ["network-snapshot-000200.safetensors"]
    assert ("network-snapshot-000000.safetensors was removed in the meantime, as train.py --keep does; it is skipped\n"
            ) in err


def test_mirror_is_as_in_the_training_unless_given(capsys, data, tmp_path):
    folder = save_run(tmp_path / "run", xflip=True)
    network = folder / "network-snapshot-000000.safetensors"
    arguments = [f"--network={network}", f"--data={data}", "--metrics=kid100,kid20_full"]
    counts = [[record["num_real"] for record in measure(capsys, *arguments, *more)[1]] for more in ([], ["--mirror=0"])]
    assert counts == [[2 * COUNT, COUNT], [COUNT, COUNT]]


def test_generated_set_and_class(capsys, data, tmp_path):
    fake = make_set(tmp_path / "fake.zip", 30, size=16, classes=["benign", "melanoma"],
                    labels=[index % 2 for index in range(30)])
    code, records, _ = measure(capsys, f"--generated={fake}", f"--data={data}", "--metrics=kid15_full",
                               "--class=melanoma")
    assert code == 0
    record = records[0]
    assert (record["num_real"], record["num_fake"], record["class"]) == (5, 15, "melanoma")
    assert (record["snapshot_pkl"], record["generated"]) == (None, "fake.zip")
    assert "network_sha256" not in record


def test_metrics_without_a_number_take_all_images_and_print_how_many(capsys, data, tmp_path):
    """As many fakes of a network as there are reals, mirrored ones not counted; all images of a set."""
    network = save(tmp_path / "net.safetensors")
    fake = make_set(tmp_path / "fake.zip", 30, size=16)
    names = ["fid", "kid", "pr"]
    for measured, fakes in ((f"--network={network}", COUNT), (f"--generated={fake}", 30)):
        arguments = [measured, f"--data={data}", "--mirror=1"]
        code, records, _ = measure(capsys, *arguments, "--metrics=fid_full,kid_full,pr_full")
        assert (code, [record["metric"] for record in records]) == (0, [f"{name}_full" for name in names])
        assert {(record["num_real"], record["num_fake"]) for record in records} == {(COUNT, fakes)}
        numbered = measure(capsys, *arguments, f"--metrics={','.join(f'{name}{fakes}_full' for name in names)}")[1]
        assert [list(record["results"].values()) for record in records] == [
            list(record["results"].values()) for record in numbered]


@pytest.mark.parametrize("hashes", [True, False])
def test_generated_images_that_are_among_the_real_ones_are_counted_in_a_warning(capsys, data, tmp_path, hashes):
    fake = make_set(tmp_path / "fake.zip", images=[*range(100, 120), 3, 1], size=16, hashes=hashes)
    other = make_set(tmp_path / "other.zip", images=range(100, 120), size=16)
    lines = [measure(capsys, f"--generated={path}", f"--data={data}", "--metrics=kid20_full")[2]
             for path in (fake, other)]
    line = (f"warning: 2 of 22 images of --generated={fake} are also in --data={data}; the metrics compare these "
            "images with themselves")
    assert [line in found for found in lines] == [True, False]


def test_cache_is_used_unless_told_otherwise(capsys, data, tmp_path, cache):
    fake = make_set(tmp_path / "fake.zip", 30, size=16)
    arguments = [f"--generated={fake}", f"--data={data}", "--metrics=kid20_full"]
    assert measure(capsys, *arguments, "--no-cache")[0] == 0
    assert not cache.exists()
    assert measure(capsys, *arguments)[0] == 0
    assert len(list((cache / "features").iterdir())) == 2


def test_detector_weights_of_another_layout_are_refused(capsys, data, tmp_path):
    network = save(tmp_path / "net.safetensors")
    line = refused(capsys, f"--network={network}", f"--data={data}", "--metrics=fid20_full", "--detector=inception-v3",
                   f"--detector-weights={network}")
    assert str(network) in line


def test_missing_weights_are_said_before_an_image_is_made(capsys, data, tmp_path, monkeypatch):
    monkeypatch.setattr(GeneratedImages, "pixels", None)
    network = save(tmp_path / "net.safetensors")
    line = refused(capsys, f"--network={network}", f"--data={data}", "--metrics=fid20_full", "--detector=inception-v3",
                   f"--detector-weights={tmp_path / 'none.pth'}")
    assert line.startswith(f"the file of weights {tmp_path / 'none.pth'} does not exist; expected ")


@pytest.mark.parametrize(("arguments", "message"), [
    (["--metrics=fid20_full"],
     "none of --network, --generated and --run is given; expected exactly one of them"),
    (["--network=a.pkl", "--run=b"], "--network and --run are given; expected exactly one of them"),
    (["--network=none.pkl", "--metrics=is20", "--detector=inception-v3"],
     "--network is none.pkl, which does not exist; expected a network file: a .safetensors of a run, or a .pkl of "
     "NVIDIA's code"),
    (["--run=none"], "--run is none, which is not a folder; expected the folder of a run, such as "
                     "runs/00007-isic256-cond-auto1"),
    (["--generated=none.zip"], "none.zip does not exist; expected a data set: a zip or a folder of images"),
    (["--network=a.pkl", "--metrics=fid"],
     "metric 'fid' is not known; expected names such as fid2k_full, kid500, kid_full, pr2k3_full, is10k, ppl1k2_wend, "
     "or one of " + ", ".join(KNOWN_NAMES)),
    (["--network=a.pkl", "--detector=resnet"],
     "detector 'resnet' is not known; expected one of inception-v3, vgg16, efficientnet-lite0, random-conv, timm:NAME"),
    (["--network=a.pkl", "--gpus=0"], "--gpus is 0; expected at least 1"),
    (["--network=a.pkl", "--metrics=kid20,ppl_zend", "--detector-weights=w.pt"],
     "--detector-weights is w.pt, and random-conv and lpips-vgg16 are needed; expected NAME=FILE, such as "
     "random-conv=w.pt"),
    (["--network=a.pkl", "--detector-weights=vgg16=w.pt"],
     "--detector-weights is vgg16=w.pt, but vgg16 is not used; expected weights of random-conv"),
])
def test_bad_arguments_give_one_line(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("a.pkl").touch()
    assert refused(capsys, *arguments) == message
    assert [path.name for path in tmp_path.iterdir()] == ["a.pkl"]


@pytest.mark.parametrize(("network", "arguments", "message"), [
    ({}, ["--class=nevus"], "--class names the class 'nevus'; expected one of benign, melanoma, or a number "
                               "from 0 to 1"),
    ({}, ["--class=2"], "--class names the class '2'; expected one of benign, melanoma, or a number from 0 to 1"),
    ({"c_dim": 0}, ["--class=1"], "--class is 1, but the network was trained without classes; leave --class out, or "
                                  "use a network that was trained with train.py --cond=1"),
    ({"resolution": 32}, [], "{data} has 16x16 RGB images, but the network makes 32x32 RGB ones; expected the same: "
                             "convert the data set with dataset_tool.py"),
    ({"channels": 1}, [], "{data} has 16x16 RGB images, but the network makes 16x16 gray ones; expected the same: "
                          "convert the data set with dataset_tool.py"),
    ({}, ["--metrics=pr2k20_full"], "metric pr2k20_full needs at least 21 real images and {data} has 20; expected "
                                    "more"),
])
def test_network_data_and_class_that_do_not_fit_give_one_line(capsys, data, tmp_path, network, arguments, message):
    path = save(tmp_path / "net.safetensors", **network)
    line = refused(capsys, f"--network={path}", f"--data={data}", "--metrics=fid20_full", *arguments)
    assert line == message.format(data=data)
    assert list(tmp_path.iterdir()) == [path]


def test_class_of_a_set_without_labels_gives_one_line(capsys, tmp_path):
    plain = make_set(tmp_path / "plain.zip", 4, size=16)
    assert refused(capsys, f"--generated={plain}", f"--data={plain}", "--class=0", "--metrics=kid2") == (
        f"{plain} has no labels, but --class is given; expected classes: leave --class out")


def test_class_number_that_means_another_class_in_the_generated_set_gives_one_line(capsys, data, tmp_path):
    fake = make_set(tmp_path / "fake.zip", 20, size=16, classes=["melanoma", "benign"], labels=[0, 1] * 10)
    arguments = [f"--generated={fake}", f"--data={data}", "--metrics=kid5_full"]
    assert refused(capsys, *arguments, "--class=1") == (
        f"--class is 1, which is melanoma in {data} and benign in {fake}; expected the same class in both: give its "
        f"name")
    code, records, _ = measure(capsys, *arguments, "--class=melanoma")
    assert (code, records[0]["num_real"]) == (0, 5)


def test_damaged_and_foreign_network_files_give_one_line(capsys, data, tmp_path):
    path = save(tmp_path / "net.safetensors")
    content = path.read_bytes()
    for damaged in (content[:len(content) // 2], b"", b"PK\3\4 something else"):
        path.write_bytes(damaged)
        line = refused(capsys, f"--network={path}", f"--data={data}", "--metrics=fid20_full")
        assert line.startswith("--network: ")
        assert str(path) in line


def test_help_tells_of_each_metric(capsys):
    assert run(make_command(), ["--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for kind, description in DESCRIPTIONS.items():
        assert f" {kind} {description}" in text
    assert all(name in text for name in KNOWN_NAMES)


@pytest.mark.slow
def test_program_with_two_processes_prints_what_one_does(data, tmp_path, cache):
    network = save(tmp_path / "net.safetensors")
    command = [sys.executable, str(ROOT / "calc_metrics.py"), *QUICK, f"--network={network}", f"--data={data}",
               "--metrics=fid40_full,kid40", "--batch=16"]
    results = []
    for gpus in (1, 2):
        done = subprocess.run([*command, f"--gpus={gpus}", "--no-cache"], capture_output=True, text=True, check=False,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert (done.returncode, done.stderr) == (0, "")
        records = [json.loads(line) for line in done.stdout.splitlines()]
        assert [record["num_gpus"] for record in records] == [gpus, gpus]
        results.append([record["results"] for record in records])
    assert results[0] == results[1]


@pytest.mark.slow
@pytest.mark.parametrize("damaged", [1, 5])  # of the first process's block, and of the second's
def test_program_with_two_processes_says_once_which_image_is_damaged(data, tmp_path, damaged):
    folder = tmp_path / "fake"
    folder.mkdir()
    for index in range(8):
        (folder / f"{index}.png").write_bytes(png(pixels_of(100 + index, size=16)))
    (folder / f"{damaged}.png").write_bytes(b"nothing")
    done = subprocess.run([sys.executable, str(ROOT / "calc_metrics.py"), *QUICK, f"--generated={data}",
                           f"--data={folder}", "--metrics=kid5_full", "--batch=4", "--gpus=2"], capture_output=True,
                          text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    message = f"error: {folder}: {damaged}.png cannot be decoded (it is not an image); make or copy it again\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)


def test_sets_in_a_folder_inside_are_measured_by_class_as_at_the_top(capsys, data, tmp_path):
    inside = enclose(data, tmp_path / "a.zip")
    arguments = ("--metrics=kid5_full", "--class=melanoma")
    expected = measure(capsys, f"--generated={data}", f"--data={data}", *arguments)[1]
    found = measure(capsys, f"--generated={inside}", f"--data={inside}", *arguments)[1]
    assert [record["results"] for record in found] == [record["results"] for record in expected]
    assert found[0]["generated_sha256"] == expected[0]["generated_sha256"]
