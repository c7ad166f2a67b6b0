"""latent.command: what was asked for, else LPIPS, else what needs no download."""

import importlib.util

import pytest
import torch
from torch import nn

from dnnlib.cli import UserError
from latent.command import choose_similarity
from metrics.detectors import registry
from metrics.detectors.base import LPIPS_VGG16, VGG16
from torch_utils.distributed import Processes

ADVICE = ("whose distances do not compare with those of lpips-vgg16; --detector=NAME chooses: lpips-vgg16, "
          "efficientnet-lite0, random-conv, pixels")


@pytest.fixture
def downloads(downloads, monkeypatch):
    """The folder of downloads, empty, without a network; and an LPIPS that takes any files."""
    monkeypatch.setitem(registry._SIMILARITIES, "lpips-vgg16", registry._Kind(
        build=StandIn, files=(VGG16, LPIPS_VGG16)))
    monkeypatch.setattr(registry, "fetch", fetch_from(downloads, registry.fetch))
    return downloads


class StandIn(nn.Module):
    """What is opened in place of half a GiB."""

    name = "lpips-vgg16"

    def __init__(self, *paths):
        super().__init__()
        self.paths = [path.name for path in paths]
        self.folder = paths[0].parent


def fetch_from(folder, fetch):
    """Return a fetch that takes a file which is there without a look into it."""
    def look_first(url, *, name, sha256):
        return folder / name if (folder / name).exists() else fetch(url, name=name, sha256=sha256)

    return look_first


def without_packages(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(registry, "find_spec", lambda name: None if "efficientnet" in name else find(name))


def process(rank=0, count=1):
    return Processes(rank=rank, count=count, device=torch.device("cpu"))


def put(folder):
    for file in (VGG16, LPIPS_VGG16):
        (folder / file.name).touch()


def fetching(downloads):
    return f"fetching {VGG16.url} into {downloads}\n"


def missing_line(downloads):
    return (f"{VGG16.name} is not at hand, and fetching {VGG16.url} failed (no network): fetch it where there is a "
            f"network, and put it at {downloads / VGG16.name}; the ppl metrics need it, and projections that are not "
            "compared by efficientnet-lite0, random-conv or pixels")


@pytest.mark.parametrize("name", ["pixels", "random-conv", "efficientnet-lite0"])
def test_name_decides_even_where_lpips_is_at_hand(downloads, capsys, name):
    put(downloads)
    assert choose_similarity(name, None, process()).name == name
    assert capsys.readouterr().err == ""


def test_lpips_is_taken_where_its_weights_are_at_hand(downloads, capsys):
    put(downloads)
    found = choose_similarity(None, None, process())
    assert (type(found), found.folder) == (StandIn, downloads)
    assert capsys.readouterr().err == ""


def test_weights_alone_are_those_of_lpips(downloads, tmp_path, capsys):
    put(tmp_path)
    found = choose_similarity(None, str(tmp_path), process())
    assert (found.paths, found.folder) == ([VGG16.name, LPIPS_VGG16.name], tmp_path)
    assert capsys.readouterr().err == ""


def test_without_a_network_efficientnet_takes_its_place_and_that_is_said(downloads, capsys):
    assert choose_similarity(None, None, process()).name == "efficientnet-lite0"
    assert capsys.readouterr().err == (
        f"{fetching(downloads)}{missing_line(downloads)}. Going on with efficientnet-lite0, {ADVICE}\n")


def test_without_network_and_packages_pixels_take_its_place(downloads, monkeypatch, capsys):
    without_packages(monkeypatch)
    assert choose_similarity(None, None, process()).name == "pixels"
    assert capsys.readouterr().err == (
        f"{fetching(downloads)}{missing_line(downloads)}. Going on with pixels, {ADVICE}\n")


def test_nothing_takes_the_place_of_what_was_named(downloads, capsys):
    with pytest.raises(UserError) as caught:
        choose_similarity("lpips-vgg16", None, process())
    assert str(caught.value) == missing_line(downloads)
    assert capsys.readouterr().err == fetching(downloads)


def test_nothing_takes_the_place_of_weights_that_are_missing(downloads, tmp_path):
    with pytest.raises(UserError) as caught:
        choose_similarity(None, str(tmp_path / "no"), process())
    assert str(caught.value) == (f"the folder of weights {tmp_path / 'no'} does not exist; expected a folder with "
                                 f"{VGG16.name} and {LPIPS_VGG16.name} in it")


def test_damaged_weights_are_an_error(downloads, monkeypatch):
    def refuse(*_):
        raise UserError("damaged")

    put(downloads)
    monkeypatch.setitem(registry._SIMILARITIES, "lpips-vgg16", registry._Kind(build=refuse, files=(VGG16, LPIPS_VGG16)))
    with pytest.raises(UserError, match=r"^damaged$"):
        choose_similarity(None, None, process())


def test_other_processes_open_what_the_first_one_chose(downloads, monkeypatch, capsys):
    told = []
    monkeypatch.setattr("latent.command.broadcast_object", lambda value: told.append(value))
    choose_similarity(None, None, process(0, 2))
    assert told == ["efficientnet-lite0"]
    capsys.readouterr()
    monkeypatch.setattr("latent.command.broadcast_object",
                        lambda value: "pixels" if value is None else pytest.fail("it chose itself"))
    assert choose_similarity(None, None, process(1, 2)).name == "pixels"
    assert capsys.readouterr().err == ""


def test_similarity_is_on_the_device_of_the_process(downloads):
    meta = Processes(rank=0, count=1, device=torch.device("meta"))
    found = choose_similarity("random-conv", None, meta)
    assert {tensor.device.type for tensor in found.parameters()} == {"meta"}
