"""Images to measure: from data sets, and from generators by seed."""

import multiprocessing
from contextlib import closing

import numpy as np
import pytest
import torch

from dnnlib.cli import UserError
from imagesets.phantoms.make import write_phantoms
from imagesets.reader import ImageSet
from metrics import image_sources
from metrics.image_sources import FakeLabels, GeneratedImages, SetImages, draw_latents, to_rgb
from tests.helpers.make_sets import enclose, make_set, pixels_of, png
from tests.helpers.small_networks import small_generator
from torch_utils.images import to_pixels

CLASSES = ["benign", "melanoma"]


def planes(index, **kwargs):
    """Return the pixels of the index-th image of a set: uint8 [3, H, W]."""
    pixels = pixels_of(index, **kwargs)
    return torch.from_numpy(pixels.transpose(2, 0, 1) if pixels.ndim == 3 else np.stack([pixels] * 3))


@pytest.fixture(scope="module")
def labeled(tmp_path_factory):
    return make_set(tmp_path_factory.mktemp("set") / "a.zip", 6, labels=[0, 1, 0, 0, 1, 0], classes=CLASSES)


def test_set_images_give_pixels_by_index(labeled):
    found = SetImages(labeled).select().pixels(range(2, 5))
    assert found.dtype == torch.uint8
    assert torch.equal(found, torch.stack([planes(index) for index in (2, 3, 4)]))


def test_set_images_repeat_gray(tmp_path):
    gray = SetImages(make_set(tmp_path / "gray.zip", 2, channels=1))
    assert gray.shape == (1, 8, 8)
    assert torch.equal(gray.select().pixels(range(2)), torch.stack([planes(index, channels=1) for index in (0, 1)]))


def test_select_mirror_doubles_the_set_with_flipped_images(labeled):
    selection = SetImages(labeled).select(mirror=True)
    assert len(selection) == 12
    assert torch.equal(selection.pixels(range(8, 9))[0], planes(2).flip(2))


def test_select_takes_random_images_once_each_by_seed(labeled):
    images = SetImages(labeled)
    chosen = [images.select(4, mirror=True, seed=seed).items.tolist() for seed in range(20)]
    assert all(len(set(items)) == 4 and items == sorted(items) for items in chosen)
    assert {item for items in chosen for item in items} == set(range(12))
    assert chosen[3] == images.select(4, mirror=True, seed=3).items.tolist()
    assert images.select(7).items.tolist() == list(range(6))  # no more than there are


def test_select_shuffle_takes_all_in_another_order(labeled):
    items = SetImages(labeled).select(shuffle=True, seed=0).items.tolist()
    assert sorted(items) == list(range(6))
    assert items != sorted(items)


def test_set_images_of_a_class_leave_others_out(labeled):
    for chosen in ("melanoma", "1"):
        images = SetImages(labeled, chosen)
        assert len(images) == 2
        assert torch.equal(images.select().pixels(range(2)), torch.stack([planes(1), planes(4)]))


@pytest.mark.parametrize(("count", "mirror", "shuffle"), [
    (None, False, False), (None, True, True), (1, False, True), (3, True, False)])
def test_select_of_a_class_is_that_of_a_set_of_this_class_alone(labeled, count, mirror, shuffle):
    alone = SetImages(labeled, "melanoma").select(count, mirror=mirror, shuffle=shuffle, seed=3)
    found = SetImages(labeled).select(count, mirror=mirror, shuffle=shuffle, seed=3, label=1)
    assert len(found) == len(alone)
    assert torch.equal(found.pixels(range(len(found))), alone.pixels(range(len(alone))))


def test_groups_of_flipped_images_are_those_of_their_originals(tmp_path):
    path = make_set(tmp_path / "a.zip", 5, labels=[0, 1, 1, 1, 0], groups=["p1", "p2", "p1", None, None])
    images = SetImages(path)
    assert images.groups(images.select().items).tolist() == [0, 1, 0, 2, 3]
    assert images.groups(images.select(mirror=True).items).tolist() == [0, 1, 0, 2, 3] * 2
    assert images.groups(np.array([9, 7, 0])).tolist() == [3, 0, 0]
    assert images.groups(np.array([4, 0, 1])) is None  # one image each
    of_class = SetImages(path, "1")
    assert of_class.groups(of_class.select(mirror=True).items).tolist() == [1, 0, 2] * 2


def test_shared_groups_are_the_named_ones_that_both_sets_have(tmp_path):
    one = SetImages(make_set(tmp_path / "a.zip", 4, groups=["p1", "p2", None, "p3"]))
    other = SetImages(make_set(tmp_path / "b.zip", images=range(10, 15), groups=["p3", "p3", None, "p1", "p4"]))
    assert other.shared_groups(one) == (["p3", "p1"], 3)
    assert one.shared_groups(other) == (["p1", "p3"], 2)
    assert SetImages(one.path).shared_groups(SetImages(make_set(tmp_path / "c.zip", images=[7, 8]))) == ([], 0)


def test_shared_groups_of_drawings_count_for_equal_seeds_only(tmp_path):
    sets = []
    for number, seed in enumerate((0, 0, 1)):
        write_phantoms(tmp_path / f"{number}.zip", workers=1, count=3, resolution=16, classes={"benign": 1.0},
                       seed=seed, bias={})
        sets.append(SetImages(tmp_path / f"{number}.zip"))
    names = [f"patient{number:06d}" for number in range(3)]
    assert sets[0].shared_groups(sets[1]) == (names, 3)
    assert sets[0].shared_groups(sets[2]) == ([], 0)


def test_content_hash_follows_images_order_and_mirroring_not_names(labeled, tmp_path):
    images = SetImages(labeled)
    folder = tmp_path / "other"
    folder.mkdir()
    for index in range(6):
        (folder / f"x{index}.png").write_bytes(png(pixels_of(index)))
    assert SetImages(folder).select().content_hash() == images.select().content_hash()
    different = [images.select(), images.select(5), images.select(mirror=True), images.select(shuffle=True),
                 SetImages(labeled, "0").select()]
    assert len({selection.content_hash() for selection in different}) == len(different)
    assert images.select().content_hash(5) == images.content_hash(np.arange(5))
    (folder / "x5.png").write_bytes(png(pixels_of(77)))
    assert SetImages(folder).select().content_hash() != images.select().content_hash()


def test_content_hash_reads_the_files_of_a_folder_once(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(png(pixels_of(0)))
    selection = SetImages(tmp_path).select()
    first = selection.content_hash()
    monkeypatch.setattr(ImageSet, "read", None)
    assert selection.content_hash() == first


@pytest.mark.parametrize(("chosen", "message"), [
    ("melanomas", r"--class names the class 'melanomas' \(did you mean melanoma\?\); expected one of benign, melanoma, "
                  r"or a number from 0 to 1$"),
    ("2", r"--class names the class '2'; expected one of benign, melanoma, or a number from 0 to 1$"),
    ("-1", r"--class names the class '-1'; expected one of benign, melanoma, or a number from 0 to 1$"),
])
def test_set_images_unknown_class_raises(labeled, chosen, message):
    with pytest.raises(UserError, match=message):
        SetImages(labeled, chosen)


def test_set_images_class_without_labels_raises(tmp_path):
    with pytest.raises(UserError, match=r"plain.zip has no labels, but --class is given"):
        SetImages(make_set(tmp_path / "plain.zip"), "0")
    vectors = make_set(tmp_path / "vectors.zip", 2, labels=[[0.5, 1.0], [1.0, 0.0]])
    with pytest.raises(UserError, match=r"vectors.zip has vectors as labels, but --class is given"):
        SetImages(vectors, "0")


def test_set_images_class_without_images_raises(tmp_path):
    path = make_set(tmp_path / "a.zip", 2, labels=[0, 0], classes=CLASSES)
    with pytest.raises(UserError, match=r"a.zip has no images of class melanoma; expected some$"):
        SetImages(path, "melanoma")


def test_set_images_of_another_size_or_mode_raise(tmp_path):
    (tmp_path / "0.png").write_bytes(png(pixels_of(0)))
    (tmp_path / "1.png").write_bytes(png(pixels_of(1, size=16)))
    (tmp_path / "2.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "3.png").write_bytes(png(np.zeros((8, 8, 4))))
    (tmp_path / "4.png").write_bytes(png(pixels_of(4, channels=1)))
    selection = SetImages(tmp_path).select()
    for row, message in ((1, "1.png is 16x16 RGB, the first image 8x8 RGB; expected one size"),
                         (2, "2.png cannot be decoded"), (3, "3.png has mode RGBA; expected 8-bit gray or RGB"),
                         (4, "4.png is 8x8 gray, the first image 8x8 RGB; expected one size")):
        with pytest.raises(UserError, match=message):
            selection.pixels(range(row, row + 1))


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Return a set that is large enough to be decoded by other processes."""
    return SetImages(make_set(tmp_path_factory.mktemp("many") / "gray.zip", 300, channels=1, hashes=False))


def processes_during(batches):
    """Return how many processes decode while the first batch is there, and how many are left after the last one."""
    with closing(batches):
        next(batches)
        return len(multiprocessing.active_children()), (batches.close(), len(multiprocessing.active_children()))[1]


@pytest.mark.parametrize("workers", [1, 2, 3, None])
def test_batches_are_the_pixels_of_their_ranges_for_any_number_of_processes(many, workers):
    selection = many.select(mirror=True, shuffle=True, seed=1)
    ranges = [range(start, min(start + 32, 590)) for start in (0, 64, 128, 160, 192, 256, 320, 384, 448, 576)]
    found = list(selection.batches(ranges, workers))
    assert [batch.shape for batch in found] == [(len(rows), 3, 8, 8) for rows in ranges]
    assert all(torch.equal(batch, selection.pixels(rows)) for batch, rows in zip(found, ranges, strict=True))
    assert multiprocessing.active_children() == []


def test_batches_of_few_images_need_no_process_and_no_process_is_left(many):
    assert processes_during(many.select().batches([range(255)], 3)) == (0, 0)
    assert processes_during(many.select().batches([range(256)], 1)) == (0, 0)
    assert processes_during(many.select().batches([range(20), range(20, 300)], 3)) == (3, 0)


@pytest.mark.parametrize(("cores", "local", "expected"), [(16, None, 8), (16, 4, 4), (3, None, 3), (3, 4, 0)])
def test_batches_use_as_many_processes_as_this_one_has_cores_up_to_eight(many, monkeypatch, cores, local, expected):
    monkeypatch.setattr(image_sources, "usable_cores", lambda: cores)
    if local is not None:  # eight processes on two machines, as torchrun starts them
        for name, value in (("RANK", 1), ("WORLD_SIZE", 2 * local), ("LOCAL_WORLD_SIZE", local),
                            ("MASTER_ADDR", "localhost"), ("MASTER_PORT", 1)):
            monkeypatch.setenv(name, str(value))
    ranges = [range(20), range(20, 300)]
    assert processes_during(many.select().batches(ranges)) == (expected, 0)


def test_batches_of_a_damaged_image_raise_the_error_of_decoding_it_here(tmp_path):
    for index in range(300):
        (tmp_path / f"{index:03d}.png").write_bytes(png(pixels_of(index)))
    (tmp_path / "280.png").write_bytes((tmp_path / "280.png").read_bytes()[:100])
    selection = SetImages(tmp_path).select()
    ranges = [range(start, start + 100) for start in (0, 100, 200)]
    with pytest.raises(UserError) as here:
        selection.pixels(ranges[2])
    batches = selection.batches(ranges, 2)
    assert torch.equal(next(batches), selection.pixels(ranges[0]))
    next(batches)
    with pytest.raises(UserError) as elsewhere:
        next(batches)
    assert str(elsewhere.value) == str(here.value)
    assert str(here.value).startswith(f"{tmp_path}: 280.png cannot be decoded (")
    assert "\n" not in str(here.value)
    assert multiprocessing.active_children() == []


def test_label_table_is_one_hot_and_must_fit_the_network(labeled, tmp_path):
    assert SetImages(labeled).label_table(2)[:, 1].tolist() == [0, 1, 0, 0, 1, 0]
    with pytest.raises(UserError, match=r"a.zip has labels of length 2, but the network takes 3; expected"):
        SetImages(labeled).label_table(3)
    nameless = SetImages(make_set(tmp_path / "b.zip", 2, labels=[0, 1]))
    assert nameless.label_table(3).shape == (2, 3)  # a part of a set may lack its last class
    with pytest.raises(UserError, match=r"b.zip has labels of length 2, but the network takes 1"):
        nameless.label_table(1)
    with pytest.raises(UserError, match=r"c.zip: 1 of 2 images have no label; expected one each"):
        SetImages(make_set(tmp_path / "c.zip", 2, labels=[0, None])).label_table(1)
    with pytest.raises(UserError, match=r"d.zip has no labels; expected them, since the network has 2 classes"):
        SetImages(make_set(tmp_path / "d.zip", 2)).label_table(2)


def test_fake_labels_follow_the_table_and_the_number_alone():
    labels = FakeLabels.of_counts([300, 100])
    drawn = labels.draw(range(2000), seed=1)
    assert abs(drawn[:, 1].mean().item() - 0.25) < 0.04
    assert torch.equal(labels.draw(range(700, 720), seed=1), drawn[700:720])
    assert not torch.equal(labels.draw(range(2000), seed=2), drawn)
    assert FakeLabels.of_class(1, 3).draw(range(2), 0).tolist() == [[0, 1, 0], [0, 1, 0]]
    assert FakeLabels(torch.zeros(1, 0)).draw(range(4), 0).shape == (4, 0)


def test_generated_images_are_those_of_the_network():
    G = small_generator().eval()
    for name, parameter in G.named_parameters():
        if name.endswith("noise_strength"):
            torch.nn.init.zeros_(parameter)
    source = GeneratedImages(G, FakeLabels.of_class(1, 2), count=5, seed=0, device="cpu")
    with torch.no_grad():
        image = G(draw_latents(range(4, 5), 8, 0, "metrics/z"), torch.tensor([[0.0, 1.0]]))
        assert torch.equal(source.pixels(range(4, 5)), to_pixels(image))


def test_draw_latents_are_standard_normal_and_independent():
    z = draw_latents(range(500), 8, 0, "one")
    assert torch.equal(draw_latents(range(100, 102), 8, 0, "one"), z[100:102])
    everything = torch.cat([z, draw_latents(range(500), 8, 1, "one"), draw_latents(range(500), 8, 0, "two")], dim=1)
    assert everything.mean().abs() < 0.03
    assert (everything.T.cov() - torch.eye(24)).abs().max() < 0.25


def test_generated_images_follow_seed_and_block_and_leave_random_state_alone():
    G = small_generator(c_dim=0).eval()
    source = GeneratedImages(G, FakeLabels(torch.zeros(1, 0)), count=8, seed=3, device="cpu")
    other = GeneratedImages(G, FakeLabels(torch.zeros(1, 0)), count=8, seed=4, device="cpu")
    torch.manual_seed(0)
    state = torch.get_rng_state()
    with torch.no_grad():
        first, again, shifted = (source.pixels(rows) for rows in (range(4), range(4), range(1, 4)))
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(first, again)
        assert not torch.equal(first[1:], shifted)  # the same latents with other noise
        assert not torch.equal(first, other.pixels(range(4)))
        for name, parameter in G.named_parameters():
            if name.endswith("noise_strength"):
                parameter.zero_()
        apart = (source.pixels(range(4))[1:].int() - source.pixels(range(1, 4)).int()).abs()
        assert apart.max() <= 1  # without noise an image does not depend on its block


def test_generated_images_gray_are_repeated():
    G = small_generator(channels=1, c_dim=0).eval()
    with torch.no_grad():
        pixels = GeneratedImages(G, FakeLabels(torch.zeros(1, 0)), count=2, seed=0, device="cpu").pixels(range(2))
    assert pixels.shape == (2, 3, 16, 16)
    assert torch.equal(pixels, pixels[:, :1].expand(-1, 3, -1, -1))


def test_to_rgb_leaves_color_alone():
    images = torch.rand(2, 3, 4, 4)
    assert to_rgb(images) is images


def test_set_images_of_a_set_in_a_folder_inside_have_its_labels_and_hash(labeled, tmp_path):
    flat, inside = SetImages(labeled, "melanoma"), SetImages(enclose(labeled, tmp_path / "inside.zip"), "melanoma")
    assert inside.rows.tolist() == [1, 4]
    assert torch.equal(inside.label_table(2), flat.label_table(2))
    assert inside.select().content_hash() == flat.select().content_hash()
