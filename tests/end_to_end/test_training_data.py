"""What networks and synthetic sets record about their source images, and that none of these is in --valid."""

import json
import zipfile

import pytest

import dataset_tool
import generate
import train
from dnnlib.cli import run
from dnnlib.files import EXIT_TEMPORARY
from imagesets.pixel_hashes import hash_set, read_pixel_hashes
from imagesets.reader import ImageSet
from tests.helpers.make_sets import make_set
from tests.helpers.training_runs import train_one_step
from training.dataset import ImageDataset, choose_subset
from training.snapshot import load_network, read_info, save_network


@pytest.fixture
def inside(tmp_path, monkeypatch):
    """Working folder with its own cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path


def refused(capsys, *flags):
    capsys.readouterr()
    assert run(train.main, ["--outdir=runs", "--data=set.zip", "--cfg=tiny", "--metrics=none", *flags]) == 2
    return capsys.readouterr().err


def set_hash(path):
    return hash_set(read_pixel_hashes(ImageSet(path)))


# What a network was trained on

def test_snapshot_records_the_training_images_whatever_their_order_names_labels_and_sides(inside):
    first = make_set("set.zip", labels=[0, 0, 0, 1, 1, 1], groups=["a", "a", "b", None, "c", None])
    second = make_set("other.zip", images=[5, 4, 3, 2, 1, 0], labels=[1] * 6, mirror=True)
    infos = [read_info(train_one_step(inside / f"runs-{name}", name, *flags)) for name, flags in (
        (first, ["--cond=1"]), (second, ["--mirror=1"]))]
    assert infos[0]["training_data"] == {"pixels_sha256": set_hash(first), "num_images": 6, "num_groups": 5}
    assert infos[1]["training_data"] == {"pixels_sha256": set_hash(first), "num_images": 6, "num_groups": None}
    assert infos[0]["training_data_before"] == []


def test_snapshot_of_a_subset_records_its_images_alone(inside):
    path = train_one_step(inside / "runs", make_set("set.zip", 6), "--subset=4", "--seed=2")
    found = read_info(path)["training_data"]
    assert found["num_images"] == 4
    assert found["pixels_sha256"] != set_hash("set.zip")


def test_resumed_network_keeps_what_the_earlier_ones_were_trained_on(inside):
    hashes = [set_hash(make_set(f"{index}.zip", images=range(4 * index, 4 * index + 4))) for index in range(3)]
    path = None
    for index in range(3):
        resume = [] if path is None else [f"--resume={path}"]
        path = train_one_step(inside / f"runs{index}", f"{index}.zip", *resume)
    info = read_info(path)
    assert info["training_data"]["pixels_sha256"] == hashes[2]
    assert [data["pixels_sha256"] for data in info["training_data_before"]] == [hashes[1], hashes[0]]


def test_resume_on_classes_in_another_order_says_so_in_the_log(inside):
    make_set("set.zip", labels=[0, 1] * 3, classes=["nv", "mel"])
    make_set("other.zip", labels=[1, 0] * 3, classes=["mel", "nv"], images=range(6, 12))
    path = train_one_step(inside / "runs", "set.zip", "--cond=1")
    resumed = train_one_step(inside / "again", "other.zip", "--cond=1", f"--resume={path}")
    assert "classes: matched by name; mel, nv are nv, mel in the network file" in (
        resumed.parent / "log.txt").read_text()
    assert read_info(resumed)["classes"] == ["mel", "nv"]


def test_resumed_network_that_does_not_say_is_recorded_as_unknown(inside):
    networks = load_network(train_one_step(inside / "runs", make_set("set.zip")))
    networks.config["info"] = {"kimg": 1}
    save_network("old.safetensors", networks)
    assert read_info(train_one_step(inside / "again", "set.zip", "--resume=old.safetensors"))[
        "training_data_before"] == ["unknown"]


def test_set_without_hashes_is_hashed_once_and_not_by_a_dry_run(inside, capsys):
    data = make_set("set.zip", hashes=False)
    assert run(train.main, ["--outdir=runs", f"--data={data}", "--cfg=tiny", "--metrics=none", "-n"]) == 0
    assert not (inside / "cache" / "pixel_hashes").exists()
    path = train_one_step(inside / "runs", data)
    assert read_info(path)["training_data"]["pixels_sha256"] == set_hash(data)
    kept, = (inside / "cache" / "pixel_hashes").iterdir()
    assert kept.read_text().split() == read_pixel_hashes(ImageSet(data))


def test_run_continues_and_a_run_is_the_same_with_and_without_recorded_hashes(inside):
    """A data set that was converted again by a newer dataset_tool.py continues the run."""
    make_set("set.zip", hashes=False)
    train_one_step(inside / "runs", "set.zip")
    make_set("set.zip")
    command = ["--outdir=runs", "--data=set.zip", "--cfg=tiny", "--batch=4", "--metrics=none", "--workers=0",
               "--precision=fp32", "--device=cpu", "--tune-malloc=0", "--max-hours=1e-9", "--snap=1"]
    assert run(train.main, command) == EXIT_TEMPORARY
    assert len(list((inside / "runs").iterdir())) == 1


def test_synthetic_set_says_what_its_network_was_trained_on(inside):
    make_set("set.zip", labels=[0, 1] * 3, classes=["nv", "mel"])
    path = train_one_step(inside / "runs", "set.zip", "--cond=1")
    assert run(generate.main, [f"--network={path}", "--zip=fakes.zip", "--count=4", "--device=cpu",
                               "--tune-malloc=0"]) == 0
    with zipfile.ZipFile("fakes.zip") as file:
        metadata = json.loads(file.read("dataset.json"))
    assert metadata["source"]["training_data"] == read_info(path)["training_data"]
    assert metadata["source"]["training_data_before"] == []
    assert [record[0] for record in metadata["pixel_hashes"].values()] == read_pixel_hashes(ImageSet("fakes.zip"))
    student = train_one_step(inside / "again", "fakes.zip")
    assert read_info(student)["training_data"]["generated_from"] == [read_info(path)["training_data"]]


def test_converted_and_joined_synthetic_sets_still_say_what_their_networks_were_trained_on(inside):
    make_set("set.zip", labels=[0, 1] * 3, classes=["nv", "mel"])
    path = train_one_step(inside / "runs", "set.zip", "--cond=1")
    assert run(generate.main, [f"--network={path}", "--zip=fakes.zip", "--count=4", "--device=cpu",
                               "--tune-malloc=0"]) == 0
    for name, sources in (("converted.zip", ["fakes.zip"]), ("joined.zip", ["set.zip", "converted.zip"])):
        assert run(dataset_tool.main, [*(f"--source={source}" for source in sources), f"--dest={name}",
                                       "--workers=1"]) == 0
        assert ImageDataset(name).training_data()["generated_from"] == [read_info(path)["training_data"]]
    assert "generated_from" not in ImageDataset("set.zip").training_data()


# --valid shares no image with --data

@pytest.mark.parametrize("hashes", [True, False])
def test_copy_of_the_training_images_is_refused_as_valid(inside, capsys, hashes):
    make_set("set.zip", labels=[0, 1] * 3, classes=["nv", "mel"])
    make_set("copy.zip", images=[9, 3, 1], labels=[1, 1, 0], classes=["nv", "mel"], mirror=True, hashes=hashes)
    for flags in (["--cond=1"], []):
        assert refused(capsys, "--valid=copy.zip", *flags) == (
            "error: --valid=copy.zip: 2 of 3 images are also in --data=set.zip, such as 00000/img00000001.png, which "
            "is 00000/img00000003.png there (apart from order, labels and mirroring); expected images that are not "
            "trained on: hold out part of one data set with dataset_tool.py split\n")
    assert not (inside / "runs").exists()


def test_copied_file_is_refused_as_valid_by_a_dry_run_of_sets_without_hashes(inside, capsys):
    make_set("set.zip", hashes=False)
    make_set("copy.zip", images=[9, 3], hashes=False)
    assert "1 of 2 images are also in --data=set.zip" in refused(capsys, "--valid=copy.zip", "-n")
    assert not (inside / "cache" / "pixel_hashes").exists()


def test_dry_run_says_where_it_compares_valid_by_files_alone(inside, capsys):
    make_set("set.zip", hashes=False)
    make_set("copy.zip", images=[9, 3], mirror=True)
    command = ["--outdir=runs", "--data=set.zip", "--cfg=tiny", "--metrics=none", "--valid=copy.zip", "-n"]
    assert run(train.main, command) == 0
    line = ("--valid=copy.zip is compared with --data file by file only, since pixel hashes are not recorded; training "
            "decodes all images, and rejects equal images in different files\n")
    assert line in capsys.readouterr().err
    assert "1 of 2 images are also in --data=set.zip" in refused(capsys, "--valid=copy.zip")  # decodes them
    assert "1 of 2 images are also in --data=set.zip" in refused(capsys, "--valid=copy.zip", "-n")  # from the cache


def test_images_outside_of_the_subset_serve_as_valid(inside, capsys):
    make_set("set.zip", 6)
    kept = ["--subset=3", "--seed=0"]
    used = choose_subset(6, 3, 0).tolist()
    make_set("valid.zip", images=[*used[:1], 7])
    assert "1 of 2 images" in refused(capsys, "--valid=valid.zip", *kept)
    make_set("valid.zip", images=set(range(6)) - set(used))
    train_one_step(inside / "runs", "set.zip", "--valid=valid.zip", *kept)


def test_groups_in_data_and_valid_are_counted_in_a_warning(inside, capsys):
    make_set("set.zip", groups=["HAM_1", "HAM_1", "HAM_2", None, "HAM_3", "HAM_4"])
    make_set("valid.zip", images=range(10, 15), groups=["HAM_3", "HAM_9", "HAM_1", "HAM_1", None])
    path = train_one_step(inside / "runs", "set.zip", "--valid=valid.zip")
    line = ("warning: 2 groups (patients or lesions) of --valid=valid.zip are also in --data=set.zip (HAM_3, HAM_1), "
            "with 3 of 5 images; their scores hide overfitting: hold out part of one data set with dataset_tool.py "
            "split")
    assert capsys.readouterr().err == line + "\n"
    assert line in (path.parent / "log.txt").read_text()


def test_names_of_images_are_no_groups_in_common(inside, capsys):
    """Two sets use the same image names, and a group of duplicates is named after an image."""
    make_set("set.zip", groups=["00000/img00000007.png"] * 2 + [None] * 4)
    make_set("valid.zip", images=[10, 11], groups=["00000/img00000007.png"] * 2)
    train_one_step(inside / "runs", "set.zip", "--valid=valid.zip")
    assert capsys.readouterr().err == ""
