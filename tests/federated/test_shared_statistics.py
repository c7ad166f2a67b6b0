"""federated.shared_statistics: FID against images that are not there equals FID against the images."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import safetensors.numpy
import torch

from dnnlib.cli import UserError
from federated.shared_statistics import (
    FEWEST_IMAGES,
    SharedStatistics,
    SiteStatistics,
    StatisticsEvaluator,
    parse_shared_metrics,
    site_statistics,
)
from metrics.detectors.random_conv import RandomConv
from metrics.evaluation import Evaluator, Stopped
from metrics.frechet import FeatureStats, frechet_distance
from metrics.image_sources import SetImages
from tests.helpers.make_sets import make_set
from tests.helpers.small_networks import small_generator

CLASSES = ["benign", "melanoma"]
# By site, the images of its set, as `make_set` numbers them, and how many of them are benign; the others are melanomas.
SITES = {"a": (range(110), 80), "b": (range(110, 240), 130), "c": (range(240, 340), 0)}
DETECTOR = "random-conv"


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DNNLIB_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A set of each site, and union.zip; the images of each are ordered by class."""
    folder = tmp_path_factory.mktemp("sets")
    benign, melanoma = [], []
    for name, (images, num_benign) in SITES.items():
        make_set(folder / f"{name}.zip", images=images, size=16, classes=CLASSES,
                 labels=[int(index >= num_benign) for index in range(len(images))])
        benign += images[:num_benign]
        melanoma += images[num_benign:]
    make_set(folder / "union.zip", images=[*benign, *melanoma], size=16, classes=CLASSES,
             labels=[0] * len(benign) + [1] * len(melanoma))
    return folder


def statistics_of(folder, name, c_dim=2, **more):
    return site_statistics(name, folder / f"{name}.zip", c_dim=c_dim, classes=CLASSES if c_dim else None,
                           detector=DETECTOR, workers=1, **more)


@pytest.fixture(scope="module")
def shared(folder):
    return SharedStatistics([SiteStatistics.from_bytes(statistics_of(folder, name).to_bytes()) for name in SITES])


def statistics(site="a", features=None, **more):
    """Return statistics of features [N, F]."""
    features = np.random.RandomState(0).randn(FEWEST_IMAGES, 3) if features is None else features
    stats = FeatureStats.of(features)
    return SiteStatistics(**{
        "site": site, "count": stats.count, "mean": stats.mean, "covariance": stats.covariance(), "detector": DETECTOR,
        "detector_sha256": "5" * 64, "preprocessing": "none", **more})


def far_apart(num_features=40):
    """Return features of three sites with very different means, spreads and numbers."""
    random = np.random.RandomState(1)
    return {site: random.randn(count, num_features) @ random.randn(num_features, num_features) * spread + mean
            for site, count, spread, mean in (("a", 100, 1, -300), ("b", 1000, 5, 2), ("c", 113, 0.1, 1000))}


def test_union_of_sites_is_pooled_exactly_through_bytes():
    features, other = far_apart(), FeatureStats.of(np.random.RandomState(2).randn(90, 40) * 7)
    sites = [SiteStatistics.from_bytes(statistics(site, some).to_bytes()) for site, some in features.items()]
    pooled, found = FeatureStats.of(np.concatenate(list(features.values()))), SharedStatistics(sites).union
    assert found.count == 1213
    np.testing.assert_allclose(found.mean, pooled.mean, rtol=1e-9)
    np.testing.assert_allclose(found.covariance(), pooled.covariance(), rtol=1e-9)
    distances = [frechet_distance(each.mean, each.covariance(), other.mean, other.covariance())
                 for each in (found, pooled)]
    assert distances[0] == pytest.approx(distances[1], rel=1e-9)


def test_union_does_not_depend_on_the_order_of_arrival():
    sites = [statistics(site, some) for site, some in far_apart().items()]
    found = [SharedStatistics(order) for order in (sites, sites[::-1])]
    assert list(found[0].sites) == list(found[1].sites) == ["a", "b", "c"]
    np.testing.assert_array_equal(found[0].union.mean, found[1].union.mean)
    np.testing.assert_array_equal(found[0].union.covariance(), found[1].union.covariance())


def test_bytes_give_back_all_fields():
    sent = statistics("north", class_counts=(30, 0, 70))
    found = SiteStatistics.from_bytes(sent.to_bytes())
    assert found.to_bytes() == sent.to_bytes()
    np.testing.assert_array_equal(found.mean, sent.mean)
    np.testing.assert_array_equal(found.covariance, sent.covariance)
    assert (found.mean.dtype, found.covariance.dtype) == (np.float64, np.float64)
    assert (found.site, found.count, found.class_counts) == ("north", 100, (30, 0, 70))
    assert (found.detector, found.detector_sha256, found.preprocessing) == (DETECTOR, "5" * 64, "none")


def test_bytes_hold_nothing_but_the_statistics():
    data = statistics("north", np.random.RandomState(0).randn(1000, 6)).to_bytes()
    assert len(data) < 8 * (6 + 36) + 500


SENT = statistics().to_bytes()


def rewritten(arrays=None, metadata=None, **fields):
    """Return bytes of statistics of which some parts are replaced; a field or array that is None is left out."""
    header = json.loads(SENT[8:8 + int.from_bytes(SENT[:8], "little")])["__metadata__"]["statistics"]
    fields = {name: value for name, value in {**json.loads(header), **fields}.items() if value is not None}
    arrays = {name: array for name, array in {**safetensors.numpy.load(SENT), **(arrays or {})}.items()
              if array is not None}
    return safetensors.numpy.save(arrays, {"statistics": json.dumps(fields), **(metadata or {})})


def test_rewritten_without_changes_is_accepted():
    assert SiteStatistics.from_bytes(rewritten(), "a").to_bytes() == SENT


VERSION = "the header of the statistics is of another version; expected version 1: use the same version of this " \
          "program at all sites"
DAMAGED = "the statistics of site a are damaged: "
CHANGED = "the statistics of site a were changed or damaged on the way"


@pytest.mark.parametrize(("data", "message"), [
    (rewritten(version=2), VERSION),
    (rewritten(version=None), VERSION),
    (rewritten({"images": np.zeros(3)}),
     "the statistics have the tensors ['covariance', 'images', 'mean']; expected ['covariance', 'mean']"),
    (rewritten({"mean": None}), "the statistics have the tensors ['covariance']; expected ['covariance', 'mean']"),
    (rewritten({"mean": np.zeros(3, dtype=np.float32)}), "the tensor mean of the statistics is F32; expected F64"),
    (rewritten({"mean": np.zeros([3, 1])}), DAMAGED + "the mean is [3, 1]; expected [F]"),
    (rewritten({"mean": np.zeros(4)}), DAMAGED + "the covariance is [3, 3]; expected [4, 4] like the mean"),
    (rewritten({"mean": np.array([0, np.nan, 0])}),
     DAMAGED + "the mean or the covariance has values that are not finite; expected none"),
    (rewritten({"covariance": np.triu(np.ones([3, 3]))}),
     DAMAGED + "the covariance is not symmetric; expected a covariance"),
    (rewritten({"covariance": np.diag([1.0, -1, 1])}),
     DAMAGED + "the covariance has eigenvalues below 0; expected none"),
    (rewritten(count=0), "the statistics of site a are of 0 images; expected at least 100"),
    (rewritten(count=99), "the statistics of site a are of 99 images; expected at least 100"),
    (rewritten(class_counts=[101, -1]), "the statistics of site a have the class counts [101, -1]; expected numbers "
                                        "from 0 on that add up to 100"),
    (rewritten(class_counts=[50, 49]), "the statistics of site a have the class counts [50, 49]; expected numbers "
                                       "from 0 on that add up to 100"),
    (rewritten(count=101), CHANGED),
    (rewritten(preprocessing="other"), CHANGED),
    (rewritten({"mean": np.zeros(3)}), CHANGED),
    (rewritten(metadata={"more": "images"}), CHANGED),
    (rewritten(sha256="0" * 64), CHANGED),
    (rewritten(sha256=None), CHANGED),
    (SENT.replace(b'\\"count\\": 100', b'\\"count\\" :100'), CHANGED),
], ids=itertools.count())
def test_from_bytes_of_tampered_bytes_raises(data, message):
    with pytest.raises(ValueError) as caught:
        SiteStatistics.from_bytes(data)
    assert str(caught.value) == message


@pytest.mark.parametrize("fields", [
    {"count": 100.0}, {"count": True}, {"count": None}, {"class_counts": [50.0, 50]}, {"class_counts": 100},
    {"class_counts": None}, {"site": ""}, {"site": 3}, {"site": "a\nstopped: by another"}, {"detector": None},
    {"more": 1}])
def test_from_bytes_of_another_header_raises(fields):
    with pytest.raises(ValueError, match=r"^the header of the statistics has the fields \{[^\n]*\}; expected the texts "
                                         r"site, detector, detector_sha256, preprocessing, the whole number count and "
                                         r"the list of whole numbers class_counts$"):
        SiteStatistics.from_bytes(rewritten(**fields))


@pytest.mark.parametrize("data", [
    b"", b"PK\x03\x04", SENT[:-1], SENT + b"\0", SENT[:8] + b"[" + SENT[9:], SENT.replace(b"F64", b"X64"),
    SENT.replace(b"statistics", b"something_"), SENT.replace(b'\\"count\\": 100', b'\\"count\\": 1e!'),
    safetensors.numpy.save({"mean": np.zeros(3)}),
    safetensors.numpy.save({"mean": np.zeros(3)}, {"statistics": "[1]"})], ids=range(10))
def test_from_bytes_of_other_bytes_raises_one_line(data):
    with pytest.raises(ValueError, match=r"^(the bytes are not statistics of a site, or are damaged \(|the header of)"
                                         r"[^\n]*$"):
        SiteStatistics.from_bytes(data)


@pytest.mark.parametrize("bit", range(8))
def test_from_bytes_of_one_changed_bit_raises_one_line(bit):
    for place in range(len(SENT)):
        with pytest.raises(ValueError, match=r"^[^\n]+$"):
            SiteStatistics.from_bytes(SENT[:place] + bytes([SENT[place] ^ 1 << bit]) + SENT[place + 1:])


def test_from_bytes_of_another_site_raises():
    with pytest.raises(ValueError, match=r"^the statistics are of site a; expected those of site north$"):
        SiteStatistics.from_bytes(SENT, "north")


def test_site_statistics_are_those_of_all_images_unflipped(folder):
    found = statistics_of(folder, "a")
    features = RandomConv()(SetImages(folder / "a.zip").select().pixels(range(110)))
    expected = FeatureStats.of(features)
    np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-6)  # other batches: float32 rounding of features
    np.testing.assert_allclose(found.covariance, expected.covariance(), rtol=1e-4, atol=1e-9)
    assert (found.site, found.count, found.class_counts) == ("a", 110, (80, 30))
    assert (found.detector, found.detector_sha256) == (DETECTOR, RandomConv().weights_sha256)
    assert found.preprocessing == RandomConv.preprocessing


def test_site_statistics_count_classes_by_the_networks_order_and_none_without_classes(folder):
    found = site_statistics("a", folder / "a.zip", c_dim=3, classes=["nevus", "melanoma", "benign"], detector=DETECTOR,
                            workers=1)
    assert found.class_counts == (0, 30, 80)
    assert statistics_of(folder, "a", c_dim=0).class_counts == ()


def test_site_statistics_of_too_few_images_raises(tmp_path):
    path = make_set(tmp_path / "few.zip", 99, size=16)
    with pytest.raises(UserError) as caught:
        site_statistics("north", path, detector=DETECTOR)
    assert str(caught.value) == ("site north has 99 images; expected at least 100, since mean and covariance of fewer "
                                 "tell too much about each: leave --share-statistics out, or this site")


def test_site_statistics_of_vectors_or_missing_labels_raises(tmp_path):
    path = make_set(tmp_path / "vectors.zip", 100, size=16, labels=[[0.5, 1.0]] * 100)
    with pytest.raises(UserError, match=r"^site north has vectors as labels, which cannot be counted; expected "
                                        r"classes: leave --share-statistics out$"):
        site_statistics("north", path, c_dim=2, detector=DETECTOR)
    path = make_set(tmp_path / "missing.zip", 100, size=16, labels=[0, 1] * 49 + [None, None])
    with pytest.raises(UserError, match=r"2 of 100 images have no label"):
        site_statistics("north", path, c_dim=2, detector=DETECTOR)


@pytest.mark.parametrize("c_dim", [0, 2])
def test_evaluate_equals_evaluator_on_the_union(folder, shared, c_dim):
    """With as many fakes, of the same labels: the union's images are ordered by class."""
    G, metrics = small_generator(c_dim=c_dim), "fid60_full,fid90_full"
    expected = Evaluator(metrics, data=folder / "union.zip", detector=DETECTOR, seed=3, workers=1).evaluate(G)
    found = StatisticsEvaluator(metrics, shared, seed=3).evaluate(G, stop=lambda: False)
    assert list(found) == ["fid60_full", "fid90_full"]
    for name, record in found.items():
        assert record["results"] == {name: pytest.approx(expected[name]["results"][name], rel=1e-9)}
        assert record["results"][name] > 0.1
        assert record["num_real_of_sites"] == {"a": 110, "b": 130, "c": 100}
        assert (record["data_sha256"], record["total_time"] > 0) == (None, True)
        own = ("results", "sites", "num_real_of_sites", "data_sha256", "total_time")
        assert ({key: value for key, value in record.items() if key not in own}
                == {key: value for key, value in expected[name].items() if key not in own})
    assert [record["num_fake"] for record in found.values()] == [60, 90]


def test_evaluate_gives_the_value_of_each_site(folder, shared):
    G = small_generator(c_dim=0)
    found = StatisticsEvaluator("fid50_full", shared).evaluate(G)["fid50_full"]["sites"]
    assert list(found) == ["a", "b", "c"]
    for name, value in found.items():
        alone = Evaluator("fid50_full", data=folder / f"{name}.zip", detector=DETECTOR, workers=1).evaluate(G)
        assert value == pytest.approx(alone["fid50_full"]["results"]["fid50_full"], rel=1e-9)
    assert len(set(found.values())) == 3


@pytest.mark.parametrize("c_dim", [0, 2])
def test_evaluate_against_one_site_equals_evaluator_on_its_set(folder, c_dim):
    G = small_generator(c_dim=c_dim)
    shared = SharedStatistics([statistics_of(folder, "a", c_dim)])
    record = StatisticsEvaluator("fid_full", shared).evaluate(G)["fid_full"]
    alone = Evaluator("fid_full", data=folder / "a.zip", detector=DETECTOR, workers=1).evaluate(G)["fid_full"]
    assert record["results"]["fid_full"] == pytest.approx(alone["results"]["fid_full"], rel=1e-9)
    assert record["sites"] == {"a": pytest.approx(record["results"]["fid_full"], rel=1e-12)}
    assert (record["num_real"], record["num_fake"]) == (110, 110)


def test_labels_of_fakes_are_in_proportion_to_the_classes_of_the_union(shared):
    assert shared.class_counts == (210, 130)
    assert shared.labels_of_fakes(2).table.sum(dim=0).tolist() == [210, 130]
    assert shared.labels_of_fakes(0).table.shape == (1, 0)
    with pytest.raises(UserError, match=r"^the network has 3 classes, and the statistics of the sites count 2; "
                                        r"expected equal numbers: compute them with the network's labels$"):
        shared.labels_of_fakes(3)


@pytest.mark.parametrize("asked", [1, 2, 3, 5])
def test_evaluate_is_canceled_after_the_batch_or_site_that_stop_says(shared, asked):
    """Two batches of fakes, then three sites."""
    evaluator, G, calls = StatisticsEvaluator("fid40_full", shared), small_generator().train(), []
    random_state = torch.get_rng_state()
    with pytest.raises(Stopped):
        evaluator.evaluate(G, stop=lambda: calls.append(0) or len(calls) >= asked)
    assert len(calls) == asked
    assert G.training
    assert torch.equal(torch.get_rng_state(), random_state)
    again, new = evaluator.evaluate(G, stop=lambda: False), StatisticsEvaluator("fid40_full", shared).evaluate(G)
    assert again["fid40_full"]["results"] == new["fid40_full"]["results"]


@pytest.mark.parametrize(("other", "message"), [
    ({"detector_sha256": "7" * 64}, f"weights with the sha256 {RandomConv().weights_sha256} here, and {'7' * 64}"),
    ({"preprocessing": "none"}, f"the preprocessing {RandomConv.preprocessing} here, and none"),
    ({"mean": np.zeros(3), "covariance": np.eye(3)}, "the number of features 256 here, and 3")])
def test_evaluate_with_another_detector_than_the_sites_raises(folder, other, message):
    sites = [replace(statistics_of(folder, "a"), **other)]
    with pytest.raises(UserError) as caught:
        StatisticsEvaluator("fid_full", SharedStatistics(sites)).evaluate(small_generator())
    assert str(caught.value) == (f"random-conv has {message} at the sites; expected the same: use the same version of "
                                 "this program, and the same --detector-weights")


@pytest.mark.parametrize(("metrics", "message"), [
    ("fid1k_full,kid1k_full,pr_full", "--metrics has kid1k_full, pr_full, which cannot be computed from "
     "--share-statistics; expected fid metrics alone, such as fid50k_full: leave out the others, or "
     "--share-statistics"),
    (["ppl_wend"], "--metrics has ppl_wend, which cannot be computed from --share-statistics; expected fid metrics "
     "alone, such as fid50k_full: leave out the others, or --share-statistics"),
    ("fid1k,fid_full,fid50", "--metrics has fid1k, fid50, which may take a part of the images, or flipped ones; "
     "expected fid1k_full, fid50_full with --share-statistics, which is of all images")])
def test_metrics_that_need_images_are_refused(shared, metrics, message):
    for parse in (parse_shared_metrics, lambda text: StatisticsEvaluator(text, shared)):
        with pytest.raises(UserError) as caught:
            parse(metrics)
        assert str(caught.value) == message


def test_metrics_of_all_images_are_accepted():
    assert [request.name for request in parse_shared_metrics("fid50k_full, fid_full")] == ["fid50k_full", "fid_full"]


@pytest.mark.parametrize(("sites", "message"), [
    ([], "there are statistics of the sites ; expected some, and one of each site"),
    ([statistics("b"), statistics("a"), statistics("b")],
     "there are statistics of the sites a, b, b; expected some, and one of each site"),
    ([statistics("b"), statistics("a", detector="inception-v3")],
     "site a has statistics with detector inception-v3, site b with random-conv; expected the same: use one detector, "
     "and one file of its weights, at all sites"),
    ([statistics("a"), statistics("b", detector_sha256="8" * 64)],
     f"site a has statistics with detector_sha256 {'5' * 64}, site b with {'8' * 64}; expected the same: use one "
     "detector, and one file of its weights, at all sites"),
    ([statistics("a"), statistics("b", np.random.RandomState(0).randn(200, 4))],
     "site a has statistics of 3 features, site b of 4; expected equal numbers"),
    ([statistics("a", class_counts=(50, 50)), statistics("b")],
     "site a has statistics of 2 classes, site b of 0; expected equal numbers"),
])
def test_shared_statistics_of_sites_that_do_not_fit_raise(sites, message):
    with pytest.raises(UserError) as caught:
        SharedStatistics(sites)
    assert str(caught.value) == message
