"""--resume: which weights are taken, and which networks are rejected."""

import pytest
import torch

from dnnlib.cli import UserError
from tests.helpers.small_networks import small_config, small_discriminator, small_generator, small_state
from training.snapshot import Networks, save_network
from training.transfer import Labels, transfer_weights


@pytest.fixture
def saved(tmp_path):
    networks = Networks(G=small_generator(seed=5), D=small_discriminator(seed=6), G_ema=small_generator(seed=7))
    save_network(tmp_path / "net.safetensors", networks)
    return tmp_path / "net.safetensors", networks


PARTIAL = "--resume-partial=1 takes the layers that match and starts the others from random weights"


def copies_of(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


def same(first, second):
    return all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())


def test_transfer_takes_all_networks(saved):
    path, networks = saved
    state = small_state(small_config())
    found = transfer_weights(state, path)
    for role in ("G", "D", "G_ema"):
        assert same(getattr(networks, role), getattr(state, role)), role
    assert found.lines() == [f"{role}: {len(getattr(networks, role).state_dict())} tensors taken"
                             for role in ("G", "D", "G_ema")]
    assert (state.nimg, state.iteration, state.pl_mean.item()) == (0, 0, 0)


def test_transfer_of_a_generator_alone_is_refused_or_starts_the_discriminator_at_random(tmp_path):
    G_ema, path = small_generator(seed=7), tmp_path / "net.safetensors"
    save_network(path, Networks(G=None, D=None, G_ema=G_ema))
    state = small_state(small_config())
    before = copies_of(state.D)
    with pytest.raises(UserError) as caught:
        transfer_weights(state, path)
    assert str(caught.value) == (f"--resume={path}: the network has no discriminator, but this run has one; expected "
                                 f"the same: {PARTIAL}")
    lines = transfer_weights(state, path, partial=True).lines()
    assert same(G_ema, state.G)
    assert same(G_ema, state.G_ema)
    assert all(torch.equal(before[name], value) for name, value in state.D.state_dict().items())
    assert lines[:2] == ["G: the file has none, so its G_ema is used",
                         "D: the file has none, so it starts from random weights"]
    assert lines[3] == f"D: 0 tensors taken; {len(before)} start from random weights (b16, b8, mapping, b4)"


def test_transfer_into_frozen_layers_takes_their_weights(saved):
    path, networks = saved
    state = small_state(small_config())
    state.D = small_discriminator(seed=1, block_kwargs={"freeze_layers": 2})
    transfer_weights(state, path)
    assert torch.equal(state.D.b16.conv0.weight, networks.D.b16.conv0.weight)


# Layers that are missing on one side, or of other shapes

def small_networks(path, **sizes):
    """Save networks, optionally of other sizes; return them."""
    networks = Networks(G=small_generator(seed=5, **sizes), D=small_discriminator(seed=6, **sizes),
                        G_ema=small_generator(seed=7, **sizes))
    save_network(path, networks)
    return networks


def refused(state, path, **options):
    """Return the error message of a transfer; it must not change the state."""
    before = {role: copies_of(getattr(state, role)) for role in ("G", "D", "G_ema")}
    with pytest.raises(UserError) as caught:
        transfer_weights(state, path, **options)
    for role, tensors in before.items():
        assert all(torch.equal(tensors[name], value) for name, value in getattr(state, role).state_dict().items())
    return str(caught.value)


@pytest.mark.parametrize(("there", "here", "described"), [
    ({"resolution": 16}, {"resolution": 32}, ("16x16 RGB images", "32x32 RGB images")),
    ({"resolution": 32}, {"resolution": 16}, ("32x32 RGB images", "16x16 RGB images")),
    ({}, {"channels": 1}, ("16x16 RGB images", "16x16 gray images")),
    ({}, {"channel_base": 256, "channel_max": 32}, ("16 channels at 4x4", "32 channels at 4x4")),
    ({"channel_base": 64, "channel_max": 16}, {}, ("8 channels at 8x8", "16 channels at 8x8")),
])
def test_transfer_of_other_sizes_is_refused_in_a_line_that_names_them(tmp_path, there, here, described):
    path = tmp_path / "net.safetensors"
    small_networks(path, **there)
    theirs, mine = described
    assert refused(small_state(small_config(), **here), path) == (
        f"--resume={path}: the network has {theirs}, but this run has {mine}; expected the same: {PARTIAL}")


def test_transfer_to_another_number_of_mapping_layers_is_refused_or_takes_those_that_are_there(saved):
    path, networks = saved
    state = small_state(small_config())
    for G in (state.G, state.G_ema):
        G.mapping.fc2, G.mapping.num_layers = torch.nn.Linear(12, 12), 3
    assert refused(state, path) == (f"--resume={path}: the network has 2 mapping layers, but this run has 3 mapping "
                                    f"layers; expected the same: {PARTIAL}")
    found = transfer_weights(state, path, partial=True)
    assert found.networks["D"].fits
    assert found.to_dict()["G"] == {
        "taken": {"tensors": len(networks.G.state_dict()) - 1,
                  "layers": ["synthesis", "mapping.embed", "mapping.fc0", "mapping.fc1"]},
        "begun_anew": {"tensors": 3, "layers": ["mapping.w_avg", "mapping.fc2"]},  # not the mean of its output now
        "ignored": {"tensors": 0, "layers": []}}
    assert found.lines()[0].endswith("; 3 start from random weights (mapping.w_avg, mapping.fc2)")


def test_partial_transfer_to_a_larger_resolution_takes_all_smaller_ones(saved):
    path, networks = saved
    state = small_state(small_config(), resolution=32)
    start = {role: copies_of(getattr(state, role)) for role in ("G", "D", "G_ema")}
    found = transfer_weights(state, path, partial=True)
    for role in ("G", "G_ema"):
        kept = taken(getattr(networks, role).state_dict(), start[role], getattr(state, role).state_dict())[1]
        # of equal values at the start: biases, strengths and filters
        assert {name for name in kept if name.startswith("synthesis.b32.")} == kept
        assert found.to_dict()[role]["begun_anew"]["layers"] == ["synthesis.b32"]
    assert found.to_dict()["D"] == {
        "taken": {"tensors": len(networks.D.state_dict()) - 3,
                  "layers": ["b16.conv0", "b16.conv1", "b16.skip", "b8", "mapping", "b4"]},
        "begun_anew": {"tensors": len(state.D.b32.state_dict()), "layers": ["b32"]},
        "ignored": {"tensors": 3, "layers": ["b16.fromrgb"]}}
    assert torch.equal(state.D.b16.conv0.weight, networks.D.b16.conv0.weight)
    assert torch.equal(state.D.b32.conv0.weight, start["D"]["b32.conv0.weight"])


def test_partial_transfer_takes_a_layer_as_a_whole_or_not_at_all(tmp_path):
    """The biases of the outer layers have equal shapes on both sides, but belong to other weights."""
    path = tmp_path / "net.safetensors"
    networks = small_networks(path, channels=1)
    state = small_state(small_config())
    with torch.no_grad():
        networks.D.b16.fromrgb.bias.fill_(3)
    save_network(path, networks)
    found = transfer_weights(state, path, partial=True).to_dict()
    assert (found["D"]["begun_anew"], found["D"]["ignored"]["layers"]) == (
        {"tensors": 3, "layers": ["b16.fromrgb"]}, [])
    assert found["G_ema"]["begun_anew"]["layers"] == [f"synthesis.b{res}.torgb" for res in (4, 8, 16)]
    assert torch.equal(state.D.b16.fromrgb.bias, torch.zeros(16)[:len(state.D.b16.fromrgb.bias)])
    assert torch.equal(state.D.b4.fc.weight, networks.D.b4.fc.weight)


def test_partial_transfer_of_equal_networks_takes_all(saved):
    path, _ = saved
    whole, partial = (transfer_weights(small_state(small_config()), path, partial=some) for some in (False, True))
    assert whole == partial


def test_partial_transfer_that_takes_nothing_is_refused(tmp_path):
    path = tmp_path / "net.safetensors"
    small_networks(path)
    state = small_state(small_config(), channel_base=512, channel_max=64)
    for G in (state.G, state.G_ema):
        G.mapping = torch.nn.Module()
        G.mapping.num_layers = 2
    assert refused(state, path, partial=True) == (
        f"--resume={path}: the network has 16 channels at 4x4, but this run has 64 channels at 4x4, so that no layer "
        "fits; expected the same: use another network")


def test_transfer_of_layers_that_nothing_else_tells_apart_names_a_tensor(tmp_path):
    path = tmp_path / "net.safetensors"
    save_network(path, Networks(
        G=small_generator(), G_ema=small_generator(),
        D=small_discriminator(epilogue_kwargs={"mbstd_num_channels": 0})))
    assert refused(small_state(small_config()), path) == (
        f"--resume={path}: the network has D.b4.conv.weight of [16, 16, 3, 3], but this run has D.b4.conv.weight of "
        f"[16, 17, 3, 3]; expected the same: {PARTIAL}")


# Frozen layers

@pytest.mark.parametrize(("architecture", "most"), [("resnet", 7), ("skip", 6), ("orig", 5)])
def test_more_frozen_layers_than_there_are_are_refused_by_their_number(tmp_path, architecture, most):
    path = tmp_path / "net.safetensors"
    D = small_discriminator(architecture=architecture)
    save_network(path, Networks(G=small_generator(), D=D, G_ema=small_generator()))
    state = small_state(small_config())
    for frozen in (most, most + 1):
        state.D = small_discriminator(architecture=architecture, block_kwargs={"freeze_layers": frozen})
        if frozen == most:
            transfer_weights(state, path)
            assert not [name for name, _ in state.D.named_parameters() if not name.startswith(("b4.", "mapping."))]
        else:
            assert refused(state, path) == (f"--freezed is {frozen}; expected at most {most}, the number of layers of "
                                            "this run's discriminator that can be frozen")


def test_frozen_layers_that_begin_anew_are_refused(tmp_path):
    path = tmp_path / "net.safetensors"
    small_networks(path)  # lacks b32, which is nearest to the image
    state = small_state(small_config(), resolution=32)
    state.D = small_discriminator(32, block_kwargs={"freeze_layers": 2})
    assert refused(state, path, partial=True) == (
        "--freezed is 2, but layer 1 of the discriminator, b32.fromrgb, has random weights and would never learn; "
        "expected layers that are taken from --resume: leave --freezed out")
    small_networks(path, channel_max=8)  # 4x4 and 8x8 have fewer
    state = small_state(small_config())
    state.D = small_discriminator(block_kwargs={"freeze_layers": 3})
    assert refused(state, path, partial=True).endswith("layers that are taken from --resume: --freezed=2")


def test_transfer_of_a_cut_file_is_refused(saved, tmp_path):
    path, _ = saved
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError) as caught:
        transfer_weights(small_state(small_config()), cut)
    assert str(caught.value).startswith(f"--resume={cut}: ")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"^--resume=absent\.pkl: "):
        transfer_weights(small_state(small_config()), "absent.pkl")


# Classes

def save_named(path, classes, c_dim=2, **info):
    networks = Networks(G=small_generator(seed=5, c_dim=c_dim), D=small_discriminator(seed=6, c_dim=c_dim),
                        G_ema=small_generator(seed=7, c_dim=c_dim), config={"info": {"classes": classes, **info}})
    save_network(path, networks)
    return networks


def one_hot(index, c_dim):
    return torch.nn.functional.one_hot(torch.tensor([index]), c_dim).float()


@pytest.mark.parametrize("names", [["mel", "nv", "bcc"], ["bcc", "mel", "nv"]])
def test_transfer_of_classes_in_another_order_keeps_what_each_of_them_means(tmp_path, names):
    before = ["nv", "mel", "bcc"]
    networks = save_named(tmp_path / "net.safetensors", before, c_dim=3)
    state = small_state(small_config(), c_dim=3)
    found = transfer_weights(state, tmp_path / "net.safetensors", Labels(c_dim=3, names=names, kind="class"))
    z, img = torch.randn(1, 8), torch.randn(1, 3, 16, 16)
    for name in names:
        old, new = one_hot(before.index(name), 3), one_hot(names.index(name), 3)
        for role in ("G", "G_ema"):
            G = getattr(state, role).eval()
            images = G(z, new, noise_mode="const"), getattr(networks, role).eval()(z, old, noise_mode="const")
            assert torch.equal(*images), (role, name)
        assert torch.equal(state.D(img, new), networks.D(img, old)), name
    assert found.lines()[0] == f"classes: matched by name; {', '.join(names)} are nv, mel, bcc in the network file"


@pytest.mark.parametrize(("mine", "described"), [
    (Labels(c_dim=2, names=["nv", "bkl"], kind="class"), "with the classes nv, bkl"),
    (Labels(c_dim=3, names=["nv", "mel", "bkl"], kind="class"), "with the classes nv, mel, bkl"),
    (Labels(c_dim=3, kind="class"), "with 3 classes"),
    (Labels(c_dim=2, names=["nv", "mel"], kind="vector"), "with vectors of 2 numbers nv, mel"),
    (Labels(c_dim=0), "without classes"),
])
def test_transfer_of_other_classes_is_refused_in_a_line_that_names_both_and_changes_nothing(tmp_path, mine, described):
    path = tmp_path / "net.safetensors"
    save_named(path, ["nv", "mel"], class_counts=[3, 1])
    state = small_state(small_config(), c_dim=mine.c_dim)
    before = {name: value.clone() for name, value in state.G.state_dict().items()}
    with pytest.raises(UserError) as caught:
        transfer_weights(state, path, mine)
    assert str(caught.value) == (
        f"--resume={path}: the network was trained with the classes nv, mel, but this run trains {described}; expected "
        "the same: --resume-classes=new starts the class embedding from random weights and takes all else")
    assert all(torch.equal(before[name], value) for name, value in state.G.state_dict().items())


@pytest.mark.parametrize(("theirs", "mine", "who"), [(None, ["nv", "mel"], "the network file"),
                                                     (["nv", "mel"], None, "the data set")])
def test_transfer_without_names_says_that_classes_are_taken_by_number(tmp_path, theirs, mine, who):
    networks = save_named(tmp_path / "net.safetensors", theirs)
    state = small_state(small_config())
    found = transfer_weights(state, tmp_path / "net.safetensors", Labels(c_dim=2, names=mine, kind="class"))
    assert found.lines()[0] == (f"classes: matched by number, since {who} does not name them; make sure that their "
                                "order is the same")
    assert same(networks.D, state.D)


def test_transfer_of_equal_classes_has_nothing_to_say_of_them(tmp_path):
    save_named(tmp_path / "net.safetensors", ["nv", "mel"])
    labels = Labels(c_dim=2, names=["nv", "mel"], kind="class")
    assert transfer_weights(small_state(small_config()), tmp_path / "net.safetensors", labels).lines()[0].startswith(
        "G: ")


def started_anew(tmp_path, c_dim, target_c_dim):
    """Return {name: value} of G and D in the file, at random initialization and after the transfer; and its lines."""
    path = tmp_path / "net.safetensors"
    networks = save_named(path, ["nv", "mel"][:c_dim], c_dim=c_dim)
    state = small_state(small_config(), c_dim=target_c_dim)
    start = {role: {name: value.clone() for name, value in getattr(state, role).state_dict().items()}
             for role in ("G", "D", "G_ema")}
    lines = transfer_weights(state, path, Labels(c_dim=target_c_dim), new_classes=True).lines()
    return [({**getattr(networks, role).state_dict()}, start[role], getattr(state, role).state_dict())
            for role in ("G", "D", "G_ema")], lines


def taken(given, start, after):
    """Return the names of tensors that were taken, and of those that kept random weights: together all of them."""
    found = {name for name in after if name in given and torch.equal(given[name], after[name])}
    kept = {name for name in after if name not in found and torch.equal(start[name], after[name])}
    return found, kept, set(after) - found - kept


EMBED = {"mapping.embed.weight", "mapping.embed.bias"}


@pytest.mark.parametrize("c_dim", [2, 5])
def test_new_classes_start_anew_and_all_else_is_taken(tmp_path, c_dim):
    roles, lines = started_anew(tmp_path, 2, c_dim)
    for given, start, after in roles:
        _, kept, mixed = taken(given, start, after)
        # a bias of the embedding is 0 in all of them
        assert (kept | {"mapping.embed.bias"}, mixed) == (EMBED, set())
    assert lines[0] == ("classes: the embedding starts from random weights; the network was trained with the classes "
                        f"nv, mel, and this run trains with {c_dim} classes")
    assert lines[1].endswith("; 2 start from random weights (mapping.embed)")


def test_unconditional_network_gives_a_conditional_one_all_but_classes(tmp_path):
    (G, D, G_ema), lines = started_anew(tmp_path, 0, 3)
    for given, start, after in (G, G_ema):
        _, kept, mixed = taken(given, start, after)
        assert (kept, mixed) == (EMBED, {"mapping.fc0.weight"})
        assert torch.equal(after["mapping.fc0.weight"][:, :8], given["mapping.fc0.weight"])
        assert torch.equal(after["mapping.fc0.weight"][:, 8:], start["mapping.fc0.weight"][:, 8:])
    found, kept, mixed = taken(*D)
    assert {name for name in kept if not name.startswith("mapping.")} == {"b4.out.weight", "b4.out.bias"}
    assert found >= {name for name in D[0] if not name.startswith("b4.out.")}
    assert mixed == set()
    assert lines[1].endswith(" tensors taken; 3 start from random weights (mapping.embed, mapping.fc0.weight[classes])")


def test_conditional_network_gives_an_unconditional_one_all_but_classes(tmp_path):
    (G, D, G_ema), _ = started_anew(tmp_path, 2, 0)
    for given, start, after in (G, G_ema):
        _, kept, mixed = taken(given, start, after)
        assert (kept, mixed) == (set(), {"mapping.fc0.weight"})
        assert torch.equal(after["mapping.fc0.weight"], given["mapping.fc0.weight"][:, :8])
    assert taken(*D)[1:] == ({"b4.out.weight", "b4.out.bias"}, set())


def test_new_classes_where_there_are_none_are_refused(tmp_path):
    path = tmp_path / "net.safetensors"
    save_named(path, [], c_dim=0)
    with pytest.raises(UserError) as caught:
        transfer_weights(small_state(small_config(), c_dim=0), path, Labels(c_dim=0), new_classes=True)
    assert str(caught.value) == (f"--resume-classes is new, but neither {path} nor this run has classes; leave it out")
