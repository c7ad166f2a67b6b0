"""analysis.discriminator_scores: logits of single images, labels by name, and networks that cannot score."""

import numpy as np
import pytest
import torch

from analysis.discriminator_scores import label_rows, match_classes, open_discriminator, scores_of
from analysis.protocol import Task, label_images
from dnnlib.cli import UserError
from generation.network import Classes, open_network
from imagesets.reader import ImageSet
from tests.helpers.make_sets import make_set
from tests.helpers.small_networks import random_labels, small_discriminator
from tests.helpers.tiny_networks import discriminator, generator
from training.snapshot import Networks, save_network

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = (3, 8, 8)


def save(folder, *, has_discriminator=True, info=None, **changes):
    path = folder / "net.safetensors"
    D = discriminator(**changes) if has_discriminator else None
    save_network(path, Networks(G=generator(**changes) if has_discriminator else None, D=D,
                                G_ema=generator(**changes), config={"info": info or {}}))
    return path


def open_from(path, shape=SHAPE):
    return open_discriminator(path, open_network(path, "cpu"), shape, device="cpu")


def images_of(folder, classes, labels):
    path = make_set(folder / "set.zip", len(labels), labels=labels, classes=classes)
    return label_images(ImageSet(path), Task(labels=tuple(classes or ("0", "1", "2"))), "set.zip")


def random_pixels(count, channels=3, resolution=16):
    random = torch.Generator().manual_seed(5)
    return torch.randint(0, 256, (count, channels, resolution, resolution), dtype=torch.uint8, generator=random)


def test_score_is_the_logit_of_the_image_alone():
    D, pixels, labels = small_discriminator(), random_pixels(5), random_labels(5)
    scores = scores_of(D, pixels, labels)
    assert (scores.dtype, scores.shape) == (np.float32, (5,))
    for index, score in enumerate(scores):
        expected = D(pixels[index:index + 1] / 127.5 - 1, labels[index:index + 1]).item()
        assert score == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_score_does_not_depend_on_batch_order_and_other_images():
    D, pixels, labels = small_discriminator(), random_pixels(7), random_labels(7)
    scores = scores_of(D, pixels, labels)
    order = [4, 0, 6]  # 3 images: not whole groups of 4
    assert scores_of(D, pixels[order], labels[order]).tobytes() == scores[order].tobytes()
    assert D.b4.mbstd.group_size == 4
    assert not np.allclose(D(pixels[:4] / 127.5 - 1, labels[:4])[:, 0].detach(), scores[:4])


def test_network_without_batch_statistics_is_scored():
    D = small_discriminator(epilogue_kwargs={"mbstd_num_channels": 0})
    pixels, labels = random_pixels(4), random_labels(4)
    expected = D(pixels / 127.5 - 1, labels)[:, 0].detach().numpy()
    assert scores_of(D, pixels, labels) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_network_of_half_precision_is_scored_in_float32():
    half, single = (small_discriminator(num_fp16_res=count, conv_clamp=256) for count in (2, 0))
    half.load_state_dict(single.state_dict())
    pixels, labels = random_pixels(3), random_labels(3)
    assert scores_of(half, pixels, labels) == pytest.approx(scores_of(single, pixels, labels), rel=1e-6)


@pytest.mark.cuda
def test_scores_on_a_gpu_are_those_on_a_cpu_up_to_rounding():
    D, pixels, labels = small_discriminator(), random_pixels(7), random_labels(7)
    expected = scores_of(D, pixels, labels)
    assert scores_of(D.cuda(), pixels, labels) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_unconditional_network_scores_all_images():
    D, pixels = small_discriminator(c_dim=0), random_pixels(3)
    assert np.isfinite(scores_of(D, pixels, torch.zeros(3, 0))).all()


def test_gray_network_takes_gray_images_repeated_to_rgb():
    D, gray = small_discriminator(channels=1), random_pixels(3, channels=1)
    assert scores_of(D, gray.repeat(1, 3, 1, 1), random_labels(3)).tolist() == scores_of(
        D, gray, random_labels(3)).tolist()


def test_images_of_unknown_classes_alone_get_nan():
    assert np.isnan(scores_of(small_discriminator(), random_pixels(2), torch.full((2, 2), torch.nan))).all()


def test_images_of_unknown_classes_get_nan_and_others_their_score():
    D, pixels, labels = small_discriminator(), random_pixels(3), random_labels(3)
    expected = scores_of(D, pixels, labels)
    labels[1] = torch.nan
    found = scores_of(D, pixels, labels)
    assert np.isnan(found).tolist() == [False, True, False]
    assert found[[0, 2]].tolist() == expected[[0, 2]].tolist()


@pytest.mark.parametrize(("own", "names", "expected"), [
    (["nv", "mel"], ["mel", "nv", "df"], [[0, 1], [1, 0], None]),
    (None, ["mel", "nv", "df"], [[1, 0], [0, 1], None]),
    (["nv", "mel"], None, [[1, 0], [0, 1], None]),
])
def test_labels_are_matched_by_name_if_both_have_names(tmp_path, own, names, expected):
    info = {"label_kind": "class"} if own is None else {"classes": own, "label_kind": "class"}
    classes, images = Classes(2, info), images_of(tmp_path, names, [0, 1, 2])
    known = images.images.classes
    rows = label_rows(classes, images.classes, known)
    assert [None if torch.isnan(row).any() else row.tolist() for row in rows] == expected
    assert match_classes(classes, images.classes, known) == {
        name: row.index(1) for name, row in zip(images.classes, expected, strict=True) if row}


def test_labels_of_an_unconditional_network_are_empty_and_known(tmp_path):
    images = images_of(tmp_path, ["mel", "nv"], [0, 1, 1])
    rows = label_rows(Classes(0, {}), images.classes, images.images.classes)
    assert match_classes(Classes(0, {}), images.classes, images.images.classes) == {"mel": None, "nv": None}
    assert rows.shape == (3, 0)
    assert rows.isfinite().all()


def test_discriminator_of_a_network_file_is_opened_with_its_weights(tmp_path):
    D = open_from(save(tmp_path))
    pixels, labels = random_pixels(2, resolution=8), random_labels(2)
    assert scores_of(D, pixels, labels).tolist() == scores_of(discriminator().eval(), pixels, labels).tolist()


def test_file_of_a_generator_and_label_vectors_give_a_reason(tmp_path):
    assert open_from(save(tmp_path, has_discriminator=False)) == (
        "net.safetensors has no discriminator: the file was made for image generation only")
    assert open_from(save(tmp_path, info={"label_kind": "vector"})) == (
        "the labels of net.safetensors are vectors, which the images of a protocol do not have")


@pytest.mark.parametrize(("shape", "kind"), [((3, 16, 16), "16x16 RGB"), ((1, 8, 8), "8x8 gray")])
def test_images_of_another_size_or_channels_are_refused(tmp_path, shape, kind):
    with pytest.raises(UserError) as caught:
        open_from(save(tmp_path), shape)
    assert str(caught.value) == (
        "--network is net.safetensors, a network of 8x8 RGB images, but the images of the protocol are "
        f"{kind}; expected a network of images like these: choose another")


def test_file_that_was_replaced_since_is_refused(tmp_path):
    path = save(tmp_path)
    network = open_network(path, "cpu")
    save(tmp_path, seed=3)
    with pytest.raises(UserError, match="which has changed since it was opened; expected the same file"):
        open_discriminator(path, network, SHAPE, device="cpu")
