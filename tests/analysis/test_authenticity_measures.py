"""analysis.authenticity_measures: images of several sets, tables that are kept, numbers that depend on images alone."""

import numpy as np
import pytest
import torch

from analysis import authenticity_measures
from analysis.authenticity_measures import Measurer, StudyImages, Work, real_features
from analysis.nearest_training import NearestTraining
from metrics.detectors.registry import open_detector
from metrics.image_sources import SelectedImages, SetImages
from tests.helpers.make_sets import make_set, pixels_of
from tests.helpers.study_images import study_images
from torch_utils.distributed import Processes

pytestmark = pytest.mark.usefixtures("one_thread")

ALONE = Processes(rank=0, count=1, device=torch.device("cpu"))
NUM_TRAIN, NUM_QUERIES = 12, 9


# Images of several sets


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Images 3, 1, 0 of one set and 12, 10 of another one."""
    folder = tmp_path_factory.mktemp("images")
    sets = [SelectedImages(SetImages(make_set(folder / f"{name}.zip", images=chosen, labels=[0] * 4)),
                           np.array(rows)) for name, chosen, rows in
            (("a", range(4), [3, 1, 0]), ("b", range(10, 14), [2, 0]))]
    return StudyImages(title="held-out images", sets=sets, names=[f"image{number}" for number in (3, 1, 0, 12, 10)],
                       classes=["nv", "mel", "nv", "mel", "mel"], known_classes=["nv", "mel"],
                       groups=np.array([4, 4, 7, 9, 8]))


def numbers_of(pixels):
    """Return the numbers of images, uint8 [N, 3, 8, 8], as `pixels_of` knows them."""
    known = {pixels_of(number).tobytes(): number for number in range(20)}
    return [known[image.permute(1, 2, 0).numpy().tobytes()] for image in pixels]


def test_pixels_are_those_of_rows_across_sets(images):
    assert (len(images), images.num_groups) == (5, 4)
    for start in range(5):
        for stop in range(start + 1, 6):
            pixels = images.pixels(range(start, stop))
            assert (pixels.dtype, pixels.shape[1:]) == (torch.uint8, (3, 8, 8))
            assert numbers_of(pixels) == [3, 1, 0, 12, 10][start:stop]
    for row, number in enumerate([3, 1, 0, 12, 10]):
        assert images.item(row).tobytes() == pixels_of(number).tobytes()


@pytest.mark.parametrize(("rows", "numbers"), [
    ([4, 0, 2], [3, 0, 10]), ([1], [1]), ([3, 4], [12, 10]), (np.arange(5)[::-1], [3, 1, 0, 12, 10])])
def test_selected_images_keep_names_classes_and_groups_in_ascending_order(images, rows, numbers):
    found = images.select(rows, "some images")
    rows = sorted(rows)
    assert (found.title, found.known_classes) == ("some images", images.known_classes)
    assert found.names == [f"image{number}" for number in numbers]
    assert found.classes == [images.classes[row] for row in rows]
    assert found.groups.tolist() == images.groups[rows].tolist()
    assert numbers_of(found.pixels(range(len(found)))) == numbers
    assert len(found.sets) == len({number >= 10 for number in numbers})


def test_content_tells_images_and_their_order_apart_but_not_files(images, tmp_path):
    same = SelectedImages(SetImages(make_set(tmp_path / "same.zip", images=[5, 3, 1, 0])), np.array([1, 2, 3]))
    again = StudyImages(title="others", sets=[same, images.sets[1]], names=images.names, classes=images.classes,
                        known_classes=None, groups=images.groups)
    assert again.content == images.content
    contents = {images.select(rows, "").content for rows in ([0, 1], [0, 2], [3], [0, 1, 2, 3, 4])}
    assert len(contents) == 4
    other = StudyImages(title="", sets=images.sets[::-1], names=[], classes=[], known_classes=None, groups=np.array([]))
    assert other.content != images.content


# Tables


class Computer:
    """Computes tables of squares, and remembers of which rows."""

    def __init__(self):
        self.rows = []

    def __call__(self, rows):
        self.rows.append((rows.start, rows.stop))
        return [np.array([[row, row**2] for row in rows], np.float64), np.array([[sum(rows)]], np.float64)]


def tables(folder, computer, key, count=5, **changes):
    work = Work(folder, ALONE, verbose=False)
    return work.tables(**{"title": "squares", "key": key, "count": count, "compute": computer, "num_tables": 2,
                          "num_whole": 1, **changes})


@pytest.fixture
def chunks_of_two(monkeypatch):
    monkeypatch.setattr(authenticity_measures, "CHUNK", 2)


def test_tables_are_computed_once_chunk_by_chunk(tmp_path, chunks_of_two, capsys):
    computer = Computer()
    found = [tables(tmp_path, computer, {"seed": 1}) for _ in range(2)]
    assert computer.rows == [(0, 2), (2, 4), (4, 5)]
    assert capsys.readouterr().err == ""
    for each in found:
        assert [table.tolist() for table, _ in each] == [[[0, 0], [1, 1]], [[2, 4], [3, 9]], [[4, 16]]]
        assert [total.tolist() for _, total in each] == [[[1]], [[5]], [[4]]]
        assert all(table.dtype == np.float32 for pair in each for table in pair)


@pytest.mark.parametrize("changes", [{"key": {"seed": 2}}, {"key": {}}, {"title": "cubes"}])
def test_tables_of_another_key_or_title_are_computed_again(tmp_path, chunks_of_two, changes):
    computer = Computer()
    tables(tmp_path, computer, {"seed": 1})
    tables(tmp_path, computer, **{"key": {"seed": 1}, **changes})
    assert computer.rows == 2 * [(0, 2), (2, 4), (4, 5)]
    tables(tmp_path, computer, {"seed": 1})  # those of both are kept
    assert len(computer.rows) == 6


def test_more_images_need_only_the_chunks_that_are_new(tmp_path, chunks_of_two):
    computer = Computer()
    tables(tmp_path, computer, {})
    tables(tmp_path, computer, {}, count=8)
    assert computer.rows == [(0, 2), (2, 4), (4, 5), (4, 6), (6, 8)]


@pytest.mark.parametrize("damage", [lambda file: file.write_bytes(b""), lambda file: file.unlink(),
                                    lambda file: file.write_bytes(file.read_bytes()[:-20])])
def test_damaged_or_lost_tables_are_computed_again(tmp_path, chunks_of_two, damage):
    computer = Computer()
    expected = tables(tmp_path, computer, {})
    files = sorted(tmp_path.glob("*.npz"))
    assert len(files) == 6
    for count, file in enumerate(files, start=1):
        damage(file)
        found = tables(tmp_path, computer, {})
        assert len(computer.rows) == 3 + count  # only its chunk
        assert str(found) == str(expected)


def test_error_while_computing_keeps_what_was_finished(tmp_path, chunks_of_two):
    computer = Computer()

    def fail(rows):
        if rows.start == 4:
            raise KeyboardInterrupt
        return computer(rows)

    with pytest.raises(KeyboardInterrupt):
        tables(tmp_path, fail, {})
    tables(tmp_path, computer, {})
    assert computer.rows == [(0, 2), (2, 4), (4, 5)]


# Measurements


@pytest.fixture(scope="module")
def detector():
    return open_detector("random-conv", device="cpu")


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    """Training images of two lesions of four images each, and four of one image."""
    path = make_set(tmp_path_factory.mktemp("training") / "train.zip", NUM_TRAIN, size=16)
    return study_images(path, "training images", groups=np.array([0] * 4 + [1] * 4 + [2, 3, 4, 5]))


@pytest.fixture(scope="module")
def queries(tmp_path_factory):
    """Two copies of training images, one of them mirrored, among others."""
    path = tmp_path_factory.mktemp("queries") / "queries.zip"
    make_set(path, images=[100, 101, 5, 102, 103, 104, 105, 9, 106], size=16, mirror=True)
    return study_images(path, "queries")


def measure(folder, detector, training, queries, **options):
    work = Work(folder, ALONE, verbose=False)
    features = real_features(work, detector, training, use_cache=False, workers=1)
    measurer = Measurer(work, detector, training, features, workers=1)
    return measurer.measure("queries", queries, {"images": queries.content},
                            **{"reals": features, "reals_key": "training", **options})


def numbers_of_measured(measured):
    """Return all numbers, by name."""
    nearest = {name: getattr(measured.nearest, name) for name in NearestTraining.__dataclass_fields__}
    return {**nearest, "features": measured.features, "to_reals": measured.to_reals}


def assert_equal(found, expected, tolerance=0.0):
    for name, values in numbers_of_measured(expected).items():
        assert np.allclose(numbers_of_measured(found)[name], values, rtol=0, atol=tolerance), name


@pytest.fixture(scope="module")
def measured(tmp_path_factory, detector, training, queries):
    return measure(tmp_path_factory.mktemp("work"), detector, training, queries)


def test_copies_are_nearest_to_their_originals(measured, queries, training, detector):
    nearest = measured.nearest
    assert nearest.row[[2, 7]].tolist() == [5, 9]
    assert nearest.ssim[[2, 7]] == pytest.approx(1)
    assert nearest.ratio[[2, 7]] == pytest.approx(0, abs=1e-6)
    assert nearest.describe_alignment(2) == "mirrored left to right"
    assert (np.delete(nearest.ratio, [2, 7]) > 0.5).all()
    assert measured.features == pytest.approx(detector(queries.pixels(range(NUM_QUERIES))).numpy(), abs=1e-4)


def test_distances_of_real_images_are_those_to_the_nearest_query_in_any_orientation(
        measured, tmp_path, detector, training, queries):
    of_each = measure(tmp_path, detector, training, queries, of_each=True)
    assert of_each.to_reals.shape == (NUM_QUERIES, NUM_TRAIN)
    assert measured.to_reals.shape == (NUM_TRAIN,)
    assert of_each.to_reals.min(axis=0) == pytest.approx(measured.to_reals, abs=1e-3)
    assert measured.to_reals[[5, 9]] == pytest.approx(0, abs=1e-3)
    assert of_each.to_reals[[2, 7], [5, 9]] == pytest.approx(0, abs=0.01)
    assert np.sort(measured.to_reals)[2] > 0.1


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_numbers_do_not_depend_on_the_size_of_chunks(measured, tmp_path, monkeypatch, detector, training, queries,
                                                     chunk):
    monkeypatch.setattr(authenticity_measures, "CHUNK", chunk)
    # Batches of other sizes round features elsewhere.
    assert_equal(measure(tmp_path, detector, training, queries), measured, tolerance=1e-5)
    assert len(list(tmp_path.glob("*.npz"))) == 3 * -(-NUM_QUERIES // chunk)


def test_kept_numbers_are_those_that_were_computed(measured, tmp_path, monkeypatch, detector, training, queries):
    first = measure(tmp_path, detector, training, queries)
    monkeypatch.setattr(authenticity_measures, "find_candidates", None)  # would fail if it were called
    assert_equal(measure(tmp_path, detector, training, queries), first)


def test_own_groups_are_not_compared(tmp_path, detector, training):
    others = training.select([0, 5, 9], "training images among other groups")
    nearest = measure(tmp_path, detector, training, others, own_groups=others.groups, reals_key="").nearest
    assert (training.groups[nearest.row] != others.groups).all()
    assert (nearest.ratio > 0.5).all()
    plain = measure(tmp_path, detector, training, others, reals_key="").nearest  # not those that are kept above
    assert plain.row.tolist() == [0, 5, 9]


def test_distances_to_other_images_are_those_of_measure(measured, tmp_path, detector, training, queries):
    work = Work(tmp_path, ALONE, verbose=False)
    features = real_features(work, detector, training, use_cache=False, workers=1)
    found = Measurer(work, detector, training, features, workers=1).distances(
        "reference", queries, {"images": queries.content}, features, "training")
    assert found == pytest.approx(measured.to_reals, abs=1e-5)


def test_real_features_are_those_of_the_detector_in_order(tmp_path, detector, training):
    some = training.select([2, 7, 11], "some")
    found = real_features(Work(tmp_path, ALONE, verbose=False), detector, some, use_cache=False, workers=1)
    assert found == pytest.approx(detector(some.pixels(range(3))).numpy(), abs=1e-4)
