"""Files of weights: only tensors of the right names and shapes get in, and nothing in a file is run."""

import io
import os
import pickle
import re
from argparse import Namespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dnnlib.cli import UserError
from metrics.detectors.base import WeightsFile, load_weights, read_file, read_weights

FILE = WeightsFile(name="true-weights.pth")
AS_IN = "as in true-weights.pth: does the file belong to another network?"


class Runs:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))


def layout() -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in network().state_dict().items() if "tracked" not in name}


def write(path, **changes):
    """Write the network's tensors, changed; a name's dots are underscores here; None removes."""
    tensors = network().state_dict()
    for name, value in changes.items():
        tensors[name.replace("_", ".", 1)] = value
    torch.save({name: value for name, value in tensors.items() if value is not None}, path)
    return path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file.pth"


def test_load_weights_fills_a_network_of_the_meta_device(path):
    trained = network()
    trained[1].running_mean.fill_(3)
    torch.save(trained.state_dict(), path)
    with torch.device("meta"):
        filled = network()
    load_weights(filled, path, FILE)
    x = torch.randn(2, 2, 4, 4)
    assert torch.equal(filled(x), trained.eval()(x))
    assert not filled.training
    assert not any(parameter.requires_grad for parameter in filled.parameters())


def test_load_weights_leaves_the_random_state_alone(path):
    write(path)
    with torch.device("meta"):
        filled = network()
    before = torch.get_rng_state()
    load_weights(filled, path, FILE)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("counter", [None, torch.tensor(5)])
def test_load_weights_with_and_without_counters_of_batches_works(path, counter):
    with torch.device("meta"):
        filled = network()
    load_weights(filled, write(path, **{"1_num_batches_tracked": counter}), FILE)
    assert filled[1].num_batches_tracked.device.type == "cpu"


@pytest.mark.parametrize("old_format", [False, True])
def test_read_weights_reads_both_formats_of_torch_save(path, old_format):
    torch.save(network().state_dict(), path, _use_new_zipfile_serialization=not old_format)
    assert list(read_weights(path, layout(), FILE)) == list(layout())


def test_read_weights_reads_safetensors_whatever_the_file_is_called(path):
    tensors = network().state_dict()
    save_file(tensors, path)
    assert all(torch.equal(value, tensors[name]) for name, value in read_weights(path, layout(), FILE).items())


def test_read_file_reads_the_command_line_that_training_programs_save(path):
    """A Namespace holds values; whatever else is in it is refused like elsewhere."""
    torch.save({"model": network().state_dict(), "args": Namespace(lr=0.1, name="a")}, path)
    content = read_file(path, FILE)
    assert content["args"] == Namespace(lr=0.1, name="a")
    assert content["model"].keys() == network().state_dict().keys()


def test_read_weights_gives_plain_float32(path):
    write(path, **{"0_weight": torch.arange(12.0, dtype=torch.float64)[:6].reshape(2, 3, 1, 1).transpose(0, 1)})
    weight = read_weights(path, layout(), FILE)["0.weight"]
    assert weight.dtype == torch.float32
    assert weight.is_contiguous()
    assert weight.flatten().tolist() == [0, 3, 1, 4, 2, 5]


@pytest.mark.parametrize(("changes", "message"), [
    ({"0_weight": None}, f"has no tensor 0.weight; expected one of shape [3, 2, 1, 1], {AS_IN}"),
    ({"0_weight": torch.ones(3, 2)}, f": 0.weight is [3, 2]; expected [3, 2, 1, 1], {AS_IN}"),
    ({"0_bias": torch.ones(3, dtype=torch.int64)},
     f": 0.bias is not a dense floating point tensor; expected one of shape [3], {AS_IN}"),
    ({"0_bias": [1.0, 2.0, 3.0]}, f": 0.bias is not a dense floating point tensor; expected one of shape [3], {AS_IN}"),
    ({"0_bias": torch.ones(3).to_sparse()}, f": 0.bias is not a dense floating point tensor; expected one of shape "
                                            f"[3], {AS_IN}"),
    ({"0_bias": torch.tensor([1, torch.nan, 1])},
     f": 0.bias has values that are not finite; expected none, {AS_IN}"),
    ({"2_weight": torch.ones(1)}, f"has a tensor 2.weight; expected no tensor of that name, {AS_IN}"),
])
def test_read_weights_of_another_layout_names_the_tensor(path, changes, message):
    with pytest.raises(UserError, match=f"^{re.escape(str(path))} ?{re.escape(message)}$"):
        read_weights(write(path, **changes), layout(), FILE)


def test_read_weights_of_something_else_says_what_it_is(path):
    torch.save([torch.ones(3)], path)
    with pytest.raises(UserError) as caught:
        read_weights(path, layout(), FILE)
    assert str(caught.value) == (f"{path} contains a list, not tensors by name: expected true-weights.pth, "
                                 "or a file like it that contains only tensors")


@pytest.mark.parametrize("how", ["pickle", "old format", "new format", "in a namespace"])
def test_read_weights_runs_no_code(path, tmp_path, how):
    evil = {"0.weight": Runs(tmp_path / "ran")}
    if how == "in a namespace":
        evil = {"0.weight": torch.ones(2), "args": Namespace(**evil)}
    if how == "pickle":
        path.write_bytes(pickle.dumps(evil))
    else:
        torch.save(evil, path, _use_new_zipfile_serialization=how == "new format")
    with pytest.raises(UserError) as caught:
        read_weights(path, layout(), FILE)
    assert str(caught.value) == (
        f"{path} is damaged, is not a file of weights, or contains code (UnpicklingError); no code was run: expected "
        "true-weights.pth, or a file like it that contains only tensors")
    assert not (tmp_path / "ran").exists()


def test_read_weights_of_damaged_files_are_refused_in_one_line(path):
    file = io.BytesIO()
    torch.save(network().state_dict(), file)
    whole = file.getvalue()
    cuts = [whole[:length] for length in range(0, len(whole), 101)]
    for content in [*cuts, b"hello", b"\x89PNG\r\n\x1a\n", b"PK\x03\x04" + bytes(50), pickle.dumps({"a": 1})[:-1]]:
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"^[^\n]+$"):
            read_weights(path, layout(), FILE)


def test_read_weights_missing_file_is_an_os_error(path):
    with pytest.raises(FileNotFoundError):
        read_weights(path, layout(), FILE)
