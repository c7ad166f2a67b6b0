"""The program calc_metrics.py: what it prints and writes, and what it refuses."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest

from dnnlib.cli import run
from dnnlib.files import sha256_of
from dnnlib.lines import read_lines
from generation.network import open_network
from imagesets.writer import ImageSetWriter
from metrics.command import make_command
from metrics.image_sources import GeneratedImages, SetImages
from metrics.names import DESCRIPTIONS, FORMS, KNOWN_NAMES
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


def test_tables_of_a_run_are_titled_with_the_snapshot(capsys, data, tmp_path):
    code, _, err = measure(capsys, f"--run={save_run(tmp_path / 'run')}", f"--data={data}", "--metrics=kid20_full",
                           "--ci=0.95")
    titles = [line for line in err.splitlines() if line.startswith("network-snapshot")]
    assert (code, titles) == (0, ["network-snapshot-000000.safetensors:", "network-snapshot-000200.safetensors:"])


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
     "none of --network, --generated, --run and --compare is given; expected exactly one of them"),
    (["--network=a.pkl", "--run=b"], "--network and --run are given; expected exactly one of them"),
    (["--network=none.pkl", "--metrics=is20", "--detector=inception-v3"],
     "--network is none.pkl, which does not exist; expected a network file: a .safetensors of a run, or a .pkl of "
     "NVIDIA's code"),
    (["--run=none"], "--run is none, which is not a folder; expected the folder of a run, such as "
                     "runs/00007-isic256-cond-auto1"),
    (["--generated=none.zip"], "none.zip does not exist; expected a data set: a zip or a folder of images"),
    (["--network=a.pkl", "--metrics=fid"],
     f"metric 'fid' is not known; expected names such as {FORMS}, or one of {', '.join(KNOWN_NAMES)}"),
    (["--network=a.pkl", "--detector=resnet"],
     "detector 'resnet' is not known; expected one of inception-v3, vgg16, efficientnet-lite0, random-conv, timm:NAME"),
    (["--compare=a.pkl"], "--compare is a.pkl alone; expected at least two runs, network files or sets"),
    (["--network=a.pkl", "--compare=b.zip"], "--network and --compare are given; expected exactly one of them"),
    (["--network=a.pkl", "b.zip"], "b.zip is given without an option; expected --network, --generated, --run or "
                                   "--compare before it"),
    (["--compare", "a.pkl", "b.zip"], "--compare is b.zip, which does not exist; expected a run, a network file or a "
                                      "set of images"),
    (["--compare", "a.pkl", "*.zip"], "--compare is *.zip, which matches nothing; expected a pattern that matches a "
                                      "run, a network file or a set of images"),
    (["--run=b", "--figure=b.png"], "--figure is given with --run, which draws measured-NAME.png; expected --network, "
                                    "--generated or --compare"),
    (["--network=a.pkl", "--figure=b.jpg"], "--figure is b.jpg; expected the name of a PNG, such as classes.png"),
    (["--network=a.pkl", "--figure=/none/b.png"], "--figure is /none/b.png, but /none is not a folder; choose an "
                                                  "existing folder"),
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


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Real images of two classes, in pairs of a group; held-out ones; generated ones; a copy of these; darker ones."""
    folder = tmp_path_factory.mktemp("sets")
    made = {"classes": ["benign", "melanoma"], "size": 16}
    labels = [int(index % 5 == 0) for index in range(80)]
    make_set(folder / "real.zip", images=range(80), labels=labels, groups=[f"g{index // 10}" for index in range(80)],
             **made)
    make_set(folder / "heldout.zip", images=range(100, 130), labels=labels[:30], **made)
    make_set(folder / "fake.zip", images=range(200, 260), labels=labels[:60], **made)
    make_set(folder / "copy.zip", images=range(200, 260), labels=labels[:60], **made)
    with ImageSetWriter(folder / "dark.zip", classes=made["classes"]) as writer:
        for index in range(60):
            writer.add(png(pixels_of(300 + index, 16) // 2), labels[index], None, None)
    return folder


def rows_of(table):
    """Return the cells of each row by its name and the titles; those of the last value in a table of several."""
    lines = [re.split(r"\s{2,}", line) for line in table.splitlines()]
    start = next(index for index, line in enumerate(lines) if line[0] in ("class", "item"))
    return {row[0]: dict(zip(lines[start], row, strict=True)) for row in lines[start + 1:]
            if len(row) == len(lines[start])}


def test_table_has_the_values_of_the_records(capsys, sets, tmp_path):
    arguments = [f"--generated={sets}/fake.zip", f"--data={sets}/real.zip", f"--holdout={sets}/heldout.zip",
                 "--metrics=kid_full", "--ci=0.9", "--per-class", f"--figure={tmp_path}/a.png"]
    code, (record,), err = measure(capsys, *arguments)
    assert code == 0
    rows, by_name = rows_of(err), {"all": record, **record["per_class"]}
    assert list(rows) == list(by_name) == ["all", "benign", "melanoma"]
    for name, row in rows.items():
        found = by_name[name]
        interval, floor = found["ci"]["kid_full"], found["floor"]
        assert interval["level"] == 0.9
        numbers = [found["results"]["kid_full"], interval["low"], interval["high"], floor["at_equal_size"]["kid_full"],
                   floor["results"]["kid_full"]]
        # A row shows as many decimals as its interval has; the estimate follows where it differs from the value.
        shown = [row["value"].rstrip("*"), *re.findall(r"[-\d.]+", row["interval"])[:2], row["at its n"],
                 row["floor"]]
        decimals = len(shown[0].partition(".")[2])
        assert shown == [f"{number:.{decimals}f}" for number in numbers]
        assert (row["real"], row["fake"], row["held-out"]) == tuple(
            str(number) for number in (found["num_real"], found["num_fake"], floor["num_fake"]))
    assert "interval: 90%" in err
    with PIL.Image.open(tmp_path / "a.png") as picture:
        assert picture.size[0] == 720


def test_table_is_printed_only_if_an_option_asks_for_it(capsys, sets):
    arguments = [f"--generated={sets}/fake.zip", f"--data={sets}/real.zip", "--metrics=kid_full"]
    assert measure(capsys, *arguments)[2] == ""
    assert measure(capsys, *arguments, "--ci=0.95")[2].splitlines()[1].split() == [
        "class", "real", "fake", "value", "interval"]
    assert measure(capsys, *arguments, "--per-class")[2].startswith("class     real  fake  kid_full\n")


@pytest.mark.parametrize("level", ["0", "1", "95", "nan"])
def test_level_that_is_none_is_refused(capsys, sets, level):
    line = refused(capsys, f"--generated={sets}/fake.zip", f"--data={sets}/real.zip", "--metrics=kid_full",
                   f"--ci={level}")
    assert line == f"--ci is {level}; expected a level between 0 and 1, such as 0.95"


def test_compared_sets_are_named_where_they_differ(capsys, sets, tmp_path):
    paths = [f"{sets}/{name}.zip" for name in ("fake", "copy", "dark")]
    code, lines, err = measure(capsys, "--compare", *paths, f"--data={sets}/real.zip", "--metrics=dc_full,kid_full",
                               f"--figure={tmp_path}/a.png")
    assert code == 0
    records, found = lines[:6], lines[6:]
    assert [(record["item"], record["metric"]) for record in records] == [
        (f"{name}.zip", metric) for name in ("fake", "copy", "dark") for metric in ("dc_full", "kid_full")]
    assert {record["data_sha256"] for record in records} == {records[0]["data_sha256"]}
    keys = ["dc_full_density", "dc_full_coverage", "kid_full"]
    assert [(each["first"], each["second"], each["key"]) for each in found] == [
        (f"{first}.zip", f"{second}.zip", key)
        for first, second in (("fake", "copy"), ("fake", "dark"), ("copy", "dark")) for key in keys]
    assert {each["num_tests"] for each in found} == {9}
    assert [each["paired"] for each in found] == [["blocks"], ["blocks"], ["real"]] * 3
    for each in found[:3]:
        assert (each["difference"], each["distinguishable"]) == (0, False)
    kid = {each["second"]: each for each in found if each["first"] == "fake.zip" and each["key"] == "kid_full"}
    assert kid["dark.zip"]["distinguishable"]
    assert kid["dark.zip"]["high"] < 0
    values = {record["item"]: record["results"]["kid_full"] for record in records if record["metric"] == "kid_full"}
    rows = rows_of(err)
    assert list(rows) == ["fake.zip", "copy.zip", "dark.zip"]
    for name, row in rows.items():
        assert float(row["value"]) == pytest.approx(values[name], abs=0.5 * 10**-len(row["value"].split(".")[1]))
    named = err[err.index("Differences distinguishable from 0"):].splitlines()[2:]
    assert {tuple(line.split()[:3]) for line in named if ".zip" in line} == {
        (each["first"], each["second"], each["key"]) for each in found if each["distinguishable"]}
    with PIL.Image.open(tmp_path / "a.png") as picture:
        assert picture.size[0] > 720  # three panels


def test_compared_networks_share_latents_and_reals_and_write_nothing_into_runs(capsys, sets, tmp_path, monkeypatch):
    runs = [save_run(tmp_path / f"0000{index}-run") for index in range(2)]
    save(runs[1] / "network-snapshot-000200.safetensors", 5, kimg=200.0)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    read = []
    item = SetImages.item
    monkeypatch.setattr(SetImages, "item", lambda self, index: read.append(self.path.name) or item(self, index))
    code, lines, err = measure(capsys, "--compare", *runs, sets / "fake.zip", f"--data={sets}/real.zip",
                               "--metrics=kid60_full", "--no-cache")
    assert code == 0
    assert err.startswith(f"--compare: {runs[0]}/network-snapshot-000200.safetensors\n")
    assert read.count("real.zip") == 80  # once for all items
    assert [(line["item"], line["num_fake"], "network_sha256" in line) for line in lines[:3]] == [
        ("00000-run", 60, True), ("00001-run", 60, True), ("fake.zip", 60, False)]
    assert [(each["first"], each["second"], each["paired"]) for each in lines[3:]] == [
        ("00000-run", "00001-run", ["real", "fake"]), ("00000-run", "fake.zip", ["real"]),
        ("00001-run", "fake.zip", ["real"])]
    alone = measure(capsys, f"--network={runs[1]}", f"--data={sets}/real.zip", "--metrics=kid60_full")[1]
    assert alone[0]["results"] == lines[1]["results"]
    (runs[1] / "metric-kid60_full.jsonl").unlink()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and "cache" not in path.parts
            } == before


def test_item_that_does_not_fit_is_named_before_anything_is_measured(capsys, sets, tmp_path):
    other = save(tmp_path / "large.safetensors", resolution=32)
    fake, real = sets / "fake.zip", sets / "real.zip"
    assert refused(capsys, "--compare", fake, other, f"--data={real}", "--metrics=kid_full") == (
        f"large.safetensors: {real} has 16x16 RGB images, but the network makes 32x32 RGB ones; expected the same: "
        "convert the data set with dataset_tool.py")
    assert refused(capsys, "--compare", fake, sets / "heldout.zip", f"--data={real}", "--metrics=kid40_full") == (
        f"metric kid40_full needs 40 generated images and {sets}/heldout.zip has 30; expected more, or a smaller "
        "number in the metric's name")
    assert refused(capsys, "--compare", fake, fake, f"--data={real}", "--metrics=kid_full") == (
        f"--compare names {fake} twice; expected different networks or sets")


def test_networks_trained_with_and_without_flipped_images_need_one_choice(capsys, sets, tmp_path):
    runs = [save_run(tmp_path / f"0000{index}-run", xflip=bool(index)) for index in range(2)]
    arguments = ["--compare", *runs, f"--data={sets}/real.zip"]
    code, _, err = measure(capsys, *arguments, "--metrics=kid20")
    assert code == 2
    assert err.splitlines()[-1] == (
        "error: --compare names 00001-run, which was trained with flipped images, and 00000-run, which was not; "
        "expected --mirror=0 or --mirror=1, which decides for all, or metrics with _full")
    found = [measure(capsys, *arguments, *more)[1] for more in (["--metrics=kid20", "--mirror=1"],
                                                                ["--metrics=kid20_full"])]
    assert [{line["mirrored_reals"] for line in lines if "item" in line} for lines in found] == [{True}, {False}]


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
def test_comparison_by_two_processes_is_that_of_one(sets, tmp_path, cache):
    networks = [save(tmp_path / f"{seed}.safetensors", seed) for seed in range(2)]
    command = [sys.executable, str(ROOT / "calc_metrics.py"), *QUICK, "--compare", *map(str, networks),
               f"{sets}/fake.zip", f"--data={sets}/real.zip", "--metrics=kid40_full,dc40_full", "--batch=16",
               "--no-cache", "--per-class"]
    found = []
    for gpus in (1, 2):
        done = subprocess.run([*command, f"--gpus={gpus}"], capture_output=True, text=True, check=False,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        found.append((done.stderr, [line.get("results", line) for line in lines]))
    assert len(found[0][1]) == 3 * 2 + 3 * 3
    assert found[0] == found[1]


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
