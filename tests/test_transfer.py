"""--resume: which weights are taken, and which networks are refused."""

import pytest
import torch

from dnnlib.cli import UserError
from tests.small_networks import small_config, small_discriminator, small_generator, small_state
from training.snapshot import Networks, save_network
from training.transfer import Labels, transfer_weights


@pytest.fixture
def saved(tmp_path):
    networks = Networks(G=small_generator(seed=5), D=small_discriminator(seed=6), G_ema=small_generator(seed=7))
    save_network(tmp_path / "net.safetensors", networks)
    return tmp_path / "net.safetensors", networks


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


def test_transfer_of_a_generator_alone_starts_the_discriminator_at_random(tmp_path):
    G_ema = small_generator(seed=7)
    save_network(tmp_path / "net.safetensors", Networks(G=None, D=None, G_ema=G_ema))
    state = small_state(small_config())
    before = {name: value.clone() for name, value in state.D.state_dict().items()}
    transfer_weights(state, tmp_path / "net.safetensors")
    assert same(G_ema, state.G)
    assert same(G_ema, state.G_ema)
    assert all(torch.equal(before[name], value) for name, value in state.D.state_dict().items())


def test_transfer_into_frozen_layers_takes_their_weights(saved):
    path, networks = saved
    state = small_state(small_config())
    state.D = small_discriminator(seed=1, block_kwargs={"freeze_layers": 2})
    transfer_weights(state, path)
    assert torch.equal(state.D.b16.conv0.weight, networks.D.b16.conv0.weight)


def test_transfer_to_a_larger_generator_says_what_starts_at_random(saved):
    path, _ = saved
    state = small_state(small_config())
    state.G.mapping.fc2 = torch.nn.Linear(12, 12)
    assert transfer_weights(state, path).lines()[0].endswith(
        "2 not in the file, start at random (mapping.fc2.weight, mapping.fc2.bias)")


def test_transfer_of_another_shape_names_the_layer_and_changes_nothing(saved):
    path, _ = saved
    state = small_state(small_config(), channels=1)
    before = {name: value.clone() for name, value in state.G.state_dict().items()}
    with pytest.raises(UserError) as caught:
        transfer_weights(state, path)
    assert str(caught.value) == (
        f"--resume={path}: G.synthesis.b4.torgb.weight is [3, 16, 1, 1] in the file and [1, 16, 1, 1] in this run; "
        "expected networks of one resolution, size (--cfg) and number of channels")
    assert all(torch.equal(before[name], value) for name, value in state.G.state_dict().items())


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
    assert found.lines()[0] == f"classes: taken by name; {', '.join(names)} are nv, mel, bcc in the network file"


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
        f"--resume={path}: the network was trained with the classes nv, mel, and this run trains {described}; expected "
        "the same: --resume-classes=new lets the class embedding start anew and takes all else")
    assert all(torch.equal(before[name], value) for name, value in state.G.state_dict().items())


@pytest.mark.parametrize(("theirs", "mine", "who"), [(None, ["nv", "mel"], "the network file"),
                                                     (["nv", "mel"], None, "the data set")])
def test_transfer_without_names_says_that_classes_are_taken_by_number(tmp_path, theirs, mine, who):
    networks = save_named(tmp_path / "net.safetensors", theirs)
    state = small_state(small_config())
    found = transfer_weights(state, tmp_path / "net.safetensors", Labels(c_dim=2, names=mine, kind="class"))
    assert found.lines()[0] == (f"classes: taken by number, since {who} does not name its own; make sure that their "
                                "order is the same")
    assert same(networks.D, state.D)


def test_transfer_of_equal_classes_has_nothing_to_say_of_them(tmp_path):
    save_named(tmp_path / "net.safetensors", ["nv", "mel"])
    labels = Labels(c_dim=2, names=["nv", "mel"], kind="class")
    assert transfer_weights(small_state(small_config()), tmp_path / "net.safetensors", labels).lines()[0].startswith(
        "G: ")


def started_anew(tmp_path, c_dim, target_c_dim):
    """Return for G and D {name: value} of the file, at the random start, and after the transfer; and its lines."""
    path = tmp_path / "net.safetensors"
    networks = save_named(path, ["nv", "mel"][:c_dim], c_dim=c_dim)
    state = small_state(small_config(), c_dim=target_c_dim)
    start = {role: {name: value.clone() for name, value in getattr(state, role).state_dict().items()}
             for role in ("G", "D", "G_ema")}
    lines = transfer_weights(state, path, Labels(c_dim=target_c_dim), new_classes=True).lines()
    return [({**getattr(networks, role).state_dict()}, start[role], getattr(state, role).state_dict())
            for role in ("G", "D", "G_ema")], lines


def taken(given, start, after):
    """Return the names of tensors that were taken, and of those that kept their start; all are one of these."""
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
    assert lines[0] == ("classes: the embedding starts anew; the network was trained with the classes nv, mel, and "
                        f"this run trains with {c_dim} classes")
    assert "; 2 start anew (mapping.embed.weight, mapping.embed.bias)" in lines[1]


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
    assert lines[1].endswith("; 1 start anew (mapping.fc0.weight but for z); 2 not in the file, start at random "
                             "(mapping.embed.weight, mapping.embed.bias)")


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
