"""From images to results: which images are seen by what, what is kept, and what is refused."""

import re

import numpy as np
import pytest
import torch

from dnnlib.cli import UserError
from dnnlib.progress import Progress
from metrics import evaluation
from metrics.evaluation import Evaluator
from metrics.frechet import FeatureStats, frechet_distance
from metrics.image_sources import FakeLabels, GeneratedImages, SetImages
from metrics.inception_score import inception_score
from metrics.kernel import kernel_distance
from metrics.precision_recall import precision_recall
from tests.helpers.make_sets import make_set
from tests.helpers.metric_networks import MeanDetector, use_mean_detectors
from tests.helpers.small_networks import small_generator

COUNT = 24
CLASSES = ["benign", "melanoma"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_set(tmp_path_factory.mktemp("data") / "a.zip", COUNT, size=16, classes=CLASSES,
                    labels=[int(index % 4 == 0) for index in range(COUNT)])


@pytest.fixture(autouse=True)
def detectors(monkeypatch, tmp_path):
    """Put detectors with known answers in place of real ones; return them by name once they are opened."""
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "cache"))
    return use_mean_detectors(monkeypatch)


def fakes_of(G, labels, count, seed=0, batch=32):
    """Return features of a generator's images, computed here."""
    source = GeneratedImages(G.eval(), labels, count=count, seed=seed, device="cpu")
    with torch.no_grad():
        return torch.cat([MeanDetector()(source.pixels(range(start, min(start + batch, count))))
                          for start in range(0, count, batch)])


def reals_of(data, rows):
    images = SetImages(data)
    return MeanDetector()(images.select().pixels(range(COUNT)))[rows]


def everything(data):
    return FakeLabels(SetImages(data).label_table(2))


def test_evaluate_gives_the_values_of_all_metrics(data):
    G = small_generator()
    found = Evaluator("fid40_full,kid20_full,pr10_full,is40,pr40_full", data=data).evaluate(G)
    fake, real = fakes_of(G, everything(data), 40), reals_of(data, slice(None))
    stats = [FeatureStats.of(side) for side in (real, fake)]
    expected_fid = frechet_distance(stats[0].mean, stats[0].covariance(), stats[1].mean, stats[1].covariance())
    assert found["fid40_full"]["results"] == {"fid40_full": pytest.approx(expected_fid, rel=1e-9)}
    assert found["kid20_full"]["results"] == {
        "kid20_full": pytest.approx(kernel_distance(real, fake[:20], 100, 20, 0), rel=1e-9)}
    for count in (10, 40):
        name = f"pr{count}_full"
        precision, recall = precision_recall(real, fake[:count], 3)
        assert found[name]["results"] == {f"{name}_precision": precision, f"{name}_recall": recall}
    mean, std = inception_score(torch.softmax(4 * fake[:, :3], dim=1))
    assert found["is40"]["results"] == {"is40_mean": pytest.approx(mean), "is40_std": pytest.approx(std)}


def test_evaluate_makes_images_once_and_shows_each_detector_what_it_needs(data, detectors, monkeypatch):
    made = []
    original = GeneratedImages.pixels
    monkeypatch.setattr(GeneratedImages, "pixels", lambda self, rows: made.append(rows) or original(self, rows))
    evaluator = Evaluator("fid70_full,kid40_full,pr36_full", data=data)
    evaluator.evaluate(small_generator())
    assert made == [range(32), range(32, 64), range(64, 70)]
    # a probe, fakes, a probe, the 24 reals
    assert detectors["inception-v3"].seen == [1, 32, 32, 6, 1, COUNT]
    assert detectors["vgg16"].seen == [1, 32, 4, 1, COUNT]
    evaluator.evaluate(small_generator())
    assert detectors["vgg16"].seen[5:] == [1, 32, 4]  # reals were kept


def test_evaluate_records_what_a_result_comes_from(data):
    found = Evaluator("fid30_full,kid10", data=data, mirror=True, seed=7).evaluate(small_generator())
    record = found["fid30_full"]
    versions = record.pop("versions")
    assert set(versions) == {"python", "torch", "numpy", "project"}
    assert all(re.match(r"\d+\.\d+", version) for version in versions.values())
    assert record.pop("total_time") > 0
    assert record.pop("results").keys() == {"fid30_full"}
    assert record == {
        "num_real": COUNT, "num_fake": 30, "mirrored_reals": False, "detector": "inception-v3",
        "detector_sha256": "0" * 64, "preprocessing": "none", "seed": 7, "batch": 32, "class": None, "device": "cpu",
        "data_sha256": SetImages(data).select().content_hash()}
    capped = found["kid10"]
    assert (capped["num_real"], capped["num_fake"], capped["mirrored_reals"]) == (10, 10, True)
    assert (capped["subsets"], capped["subset_size"], "subset_std" in capped) == (1, 10, False)


def test_real_statistics_are_those_that_the_metric_uses(data):
    evaluator = Evaluator("kid10,fid_full", data=data, mirror=True)
    evaluator.evaluate(small_generator(), stop=lambda: False)
    stats, detector = evaluator.real_statistics("fid_full")
    expected = FeatureStats.of(reals_of(data, slice(None)))
    np.testing.assert_allclose(stats.mean, expected.mean, rtol=1e-6)
    np.testing.assert_allclose(stats.covariance(), expected.covariance(), rtol=1e-5, atol=1e-9)
    assert (stats.count, detector.name) == (COUNT, "inception-v3")
    assert evaluator.real_statistics("kid10")[0].count == 10
    alone = Evaluator("fid_full", data=data).real_statistics("fid_full")[0]  # of no generator
    np.testing.assert_array_equal(alone.mean, stats.mean)


def test_evaluate_few_images_for_fid_are_noted(data):
    notes = [Evaluator(f"fid{count}_full", data=data).evaluate(small_generator())[f"fid{count}_full"].get("note")
             for count in (6, 7)]
    assert notes == ["6 images span less than the 6 dimensions of the features: the value is too high by an amount "
                     "that depends on the numbers of images; compare only values for equal numbers, or use kid", None]


def test_evaluate_mirror_counts_for_metrics_without_full(data):
    values = {}
    for mirror in (False, True):
        found = Evaluator("kid100,kid100_full", data=data, mirror=mirror).evaluate(small_generator())
        values[mirror] = [found[name]["num_real"] for name in ("kid100", "kid100_full")]
    assert values == {False: [COUNT, COUNT], True: [2 * COUNT, COUNT]}


@pytest.mark.parametrize(("chosen", "count"), [(None, COUNT), ("melanoma", 6)])
def test_evaluate_without_a_number_makes_as_many_fakes_as_there_are_reals(data, chosen, count):
    """Of a class, as many as this class has; mirrored reals do not count."""
    evaluators = [Evaluator(names, data=data, chosen=chosen, mirror=True)
                  for names in ("kid_full,pr_full", f"kid{count}_full,pr{count}_full")]
    found, numbered = (list(evaluator.evaluate(small_generator()).values()) for evaluator in evaluators)
    assert [(record["num_real"], record["num_fake"]) for record in found] == [(count, count)] * 2
    assert [list(record["results"].values()) for record in found] == [
        list(record["results"].values()) for record in numbered]
    assert list(found[1]["results"]) == ["pr_full_precision", "pr_full_recall"]


def test_evaluate_leaves_mode_random_state_and_weights_as_they_were(data):
    G = small_generator()
    G.train()
    G.synthesis.b8.eval()
    modes = [module.training for module in G.modules()]
    before = {name: value.clone() for name, value in G.state_dict().items()}
    torch.manual_seed(3)
    np.random.seed(3)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    Evaluator("fid10_full,pr10_full,is10", data=data).evaluate(G)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert [module.training for module in G.modules()] == modes
    assert torch.is_grad_enabled()
    assert all(torch.equal(value, before[name]) for name, value in G.state_dict().items())
    assert all(parameter.grad is None for parameter in G.parameters())


def test_evaluate_repeats_its_values_and_follows_the_seed(data):
    values = [Evaluator("fid20_full", data=data, seed=seed).evaluate(small_generator())["fid20_full"]["results"]
              for seed in (0, 0, 1)]
    assert values[0] == values[1] != values[2]


def test_evaluate_a_class_compares_images_of_that_class(data):
    found = Evaluator("fid30_full", data=data, chosen="melanoma").evaluate(small_generator())["fid30_full"]
    real = FeatureStats.of(reals_of(data, slice(0, None, 4)))
    fake = FeatureStats.of(fakes_of(small_generator(), FakeLabels.of_class(1, 2), 30))
    expected = frechet_distance(real.mean, real.covariance(), fake.mean, fake.covariance())
    assert found["results"]["fid30_full"] == pytest.approx(expected, rel=1e-9)
    assert (found["class"], found["num_real"]) == ("melanoma", 6)


def test_evaluate_without_data_takes_labels_from_the_network_file():
    G = small_generator()
    found = Evaluator("is40").evaluate(G, {"class_counts": [0, 5]})["is40"]["results"]["is40_mean"]
    assert found == Evaluator("is40", chosen="1").evaluate(G)["is40"]["results"]["is40_mean"]
    assert found != Evaluator("is40", chosen="0").evaluate(G)["is40"]["results"]["is40_mean"]
    record = Evaluator("is40", chosen="b").evaluate(G, {"classes": ["a", "b"]})["is40"]
    assert (record["results"]["is40_mean"], record["num_real"], record["data_sha256"]) == (found, 0, None)
    with pytest.raises(UserError, match=r"^--data is missing, and the network file does not record how many "):
        Evaluator("is40").evaluate(G)


def test_evaluate_path_length_beside_other_metrics(data):
    G = small_generator(resolution=32)
    names = ["ppl50_wend", "is10"]
    found = Evaluator(names, data=make_like(data, 32)).evaluate(G)
    record = found["ppl50_wend"]
    assert record["results"]["ppl50_wend"] > 0
    assert (record["detector"], record["num_fake"], record["epsilon"]) == ("lpips-vgg16", 50, 1e-4)
    alone = Evaluator("ppl50_wend", data=make_like(data, 32)).evaluate(G)
    assert alone["ppl50_wend"]["results"] == record["results"]


def make_like(data, size):
    return make_set(data.with_name(f"{size}.zip"), COUNT, size=size, labels=[index % 2 for index in range(COUNT)])


def test_evaluate_images_compares_sets(data, tmp_path):
    fake = make_set(tmp_path / "fake.zip", 30, size=16)
    found = Evaluator("fid30_full,is30", data=data).evaluate_images(SetImages(fake))
    assert found["fid30_full"]["results"]["fid30_full"] < 0.05  # random pixels both
    assert found["is30"]["num_fake"] == 30
    same = Evaluator(f"fid{COUNT}_full", data=data).evaluate_images(SetImages(data))
    assert same[f"fid{COUNT}_full"]["results"][f"fid{COUNT}_full"] == pytest.approx(0, abs=1e-9)


def test_evaluate_images_takes_some_of_many_at_random(data):
    values = [Evaluator("fid10_full", data=data, seed=seed).evaluate_images(SetImages(data))["fid10_full"]["results"]
              for seed in (0, 0, 1)]
    assert values[0] == values[1] != values[2]


def test_features_of_sets_are_cached_by_content(data, detectors, tmp_path):
    fake = make_set(tmp_path / "fake.zip", 30, size=16)
    lines = []

    def evaluate(**changes):
        Evaluator("kid30_full,is30", **{"data": data, "log": lines.append, **changes}).evaluate_images(SetImages(fake))
        return detectors["inception-v3"].seen

    assert evaluate() == [1, 30, 1, COUNT]
    assert evaluate() == []
    assert evaluate(use_cache=False) == [1, 30, 1, COUNT]
    assert evaluate(chosen="benign", data=data) == [1, 18]
    files = sorted((tmp_path / "cache" / "features").iterdir())
    assert len(files) == 3
    for file in files:
        file.write_bytes(b"broken")
    assert evaluate() == [1, 30, 1, COUNT]
    assert [line.endswith("; its features are computed again") for line in lines] == [True, True]


def test_evaluate_keeps_no_features_of_networks(data, tmp_path):
    Evaluator("kid30_full", data=data).evaluate(small_generator())
    assert len(list((tmp_path / "cache" / "features").iterdir())) == 1  # the reals'


@pytest.mark.parametrize(("metrics", "changes", "message"), [
    ("fid20_full", {"data": None}, r"^--data is missing; expected the real images that fid20_full compares with$"),
    ("pr50k30_full", {}, r"^metric pr50k30_full needs at least 31 real images and .*a.zip has 24; expected more$"),
    ("pr50k8_full", {"chosen": "1"}, r"needs at least 9 real images and .*a.zip has 6 of class 1; expected more$"),
    ("is20", {"detector": "vgg16"}, r"^metric is20 needs probabilities of classes, which vgg16 does not give"),
    ("fid20_full", {"detector": "resnet"}, r"^detector 'resnet' is not known; expected one of inception-v3, vgg16, "),
    ("fid20", {"seed": -1}, r"^--seed is -1; expected 0 to 4294967295$"),
    ("fid20", {"batch": 0}, r"^--batch is 0; expected at least 1$"),
    ("fid20", {"ci": 95.0}, r"^--ci is 95; expected a level between 0 and 1, such as 0\.95$"),
    ("is20", {"data": None, "holdout": "h.zip"},
     r"^--holdout is given, but --data is missing; expected the real images to compare with$"),
    ("is20", {"data": None, "per_class": True},
     r"^--per-class is given, but --data is missing; expected the real images to compare with$"),
    ("kid20", {"chosen": "melanoma", "per_class": True},
     r"^--per-class is given with --class=melanoma; expected one of the two$"),
    ("fid20", {"chosen": "nevus"}, r"^--class names the class 'nevus'; expected one of benign, melanoma, or a number "
                                   r"from 0 to 1$"),
])
def test_evaluator_refuses_what_cannot_be(data, metrics, changes, message):
    with pytest.raises(UserError, match=message):
        Evaluator(metrics, **{"data": data, **changes})


@pytest.mark.parametrize(("network", "info", "changes", "message"), [
    ({"resolution": 32}, {}, {}, r"a.zip has 16x16 RGB images, but the network makes 32x32 RGB ones; expected the "),
    ({"channels": 1}, {}, {}, r"a.zip has 16x16 RGB images, but the network makes 16x16 gray ones; expected the same"),
    ({"c_dim": 3}, {}, {}, r"a.zip has labels of length 2, but the network takes 3; expected the data set that it"),
    ({"c_dim": 0}, {}, {"chosen": "1"}, r"^--class is 1, but the network was trained without classes; leave --class"),
    ({}, {"classes": ["melanoma", "nevus"]}, {}, r"a.zip has labels of benign; expected those of melanoma, nevus: "),
])
def test_evaluate_refuses_networks_that_do_not_fit_before_opening_detectors(data, detectors, network, info, changes,
                                                                           message):
    with pytest.raises(UserError, match=message):
        Evaluator("fid20_full", data=data, **changes).evaluate(small_generator(**network), info)
    assert detectors == {}


@pytest.mark.parametrize("chosen", [None, ("1", "0"), ("melanoma", "melanoma")])
def test_evaluate_takes_the_labels_of_a_data_set_by_name(data, tmp_path, chosen):
    """The same images whose classes have other numbers give the same result; a number is that of the data set."""
    other = make_set(tmp_path / "b.zip", COUNT, size=16, classes=CLASSES[::-1],
                     labels=[int(index % 4 != 0) for index in range(COUNT)])
    G, info, logged = small_generator(), {"classes": CLASSES}, []
    found = [Evaluator("kid6_full", data=path, chosen=name, log=logged.append).evaluate(G, info)["kid6_full"]["results"]
             for path, name in zip((data, other), chosen or (None, None))]
    assert found[0] == found[1]
    assert logged == []


@pytest.mark.parametrize(("classes", "nameless"), [(CLASSES, "the network file"), (None, None)])
def test_evaluate_logs_once_that_classes_are_taken_by_number(data, tmp_path, classes, nameless):
    path = make_set(tmp_path / "b.zip", COUNT, size=16, classes=classes, labels=[0, 1] * (COUNT // 2))
    info = {} if classes else {"classes": CLASSES}
    logged = []
    evaluator = Evaluator("kid6_full", data=path, log=logged.append)
    for _ in range(2):
        evaluator.evaluate(small_generator(), info)
    assert logged == [f"classes are matched by number, since {nameless or path} does not name its own"]


@pytest.mark.parametrize(("metrics", "message"), [
    ("fid31_full", r"^metric fid31_full needs 31 generated images and .*fake.zip has 30; expected more, or a "),
    ("ppl2_wend", r"^metric ppl2_wend needs a network; expected --network instead of --generated$"),
])
def test_evaluate_images_refuses_what_cannot_be(data, tmp_path, metrics, message):
    fake = make_set(tmp_path / "fake.zip", 30, size=16)
    with pytest.raises(UserError, match=message):
        Evaluator(metrics, data=data).evaluate_images(SetImages(fake))


@pytest.mark.parametrize(("metrics", "message"), [
    ("pr_full", "metric pr_full needs at least 4 generated images and {} has 2 of class melanoma; expected more"),
    ("kid3_full", "metric kid3_full needs 3 generated images and {} has 2 of class melanoma; expected more, or a "
                  "smaller number in the metric's name")])
def test_evaluate_images_too_few_of_a_class_raises(data, tmp_path, metrics, message):
    fake = make_set(tmp_path / "fake.zip", 30, size=16, classes=CLASSES, labels=[1, 1] + 28 * [0])
    with pytest.raises(UserError) as caught:
        Evaluator(metrics, data=data, chosen="melanoma").evaluate_images(SetImages(fake, "melanoma"))
    assert str(caught.value) == message.format(fake)


def test_evaluate_images_of_another_size_raises(data, tmp_path):
    fake = make_set(tmp_path / "fake.zip", 30, size=8)
    with pytest.raises(UserError, match=r"a.zip has 16x16 RGB images, but .*fake.zip has 8x8 RGB ones; expected"):
        Evaluator("fid30_full", data=data).evaluate_images(SetImages(fake))


@pytest.mark.parametrize(("metrics", "asked"), [
    ("fid40_full", 1), ("fid40_full", 2), ("fid40_full", 3), ("pr40_full", 4), ("kid40_full", 4)])
def test_evaluate_is_given_up_after_the_batch_that_stop_says(data, metrics, asked):
    """Two batches of fakes, one of reals or more, and the rows of tables of pairs."""
    evaluator, whole = (Evaluator(metrics, data=data, batch=32, use_cache=False) for _ in range(2))
    calls, G = [], small_generator().train()
    random_state = torch.get_rng_state()

    def stop():
        calls.append(0)
        return len(calls) >= asked

    with pytest.raises(evaluation.Stopped):
        evaluator.evaluate(G, stop=stop)
    assert len(calls) == asked
    assert G.training
    assert torch.equal(torch.get_rng_state(), random_state)
    found = evaluator.evaluate(G)  # as if nothing had been given up
    assert found[metrics]["results"] == whole.evaluate(small_generator())[metrics]["results"]


def test_evaluate_shows_how_far_each_part_of_the_work_is(data, monkeypatch):
    shown = []

    class Recorder(Progress):
        def __exit__(self, *details):
            shown.append((self.unit, self.done, self.total))

    monkeypatch.setattr(evaluation, "Progress", Recorder)
    Evaluator("fid30_full,kid30_full,pr30_full,dc30_full", data=data, progress=True).evaluate(small_generator())
    assert shown == [("generated images", 30, 30), ("real images", COUNT, COUNT), ("rows for fid30_full", 0, None),
                     ("rows for kid30_full", 2 * COUNT + 30, None),
                     ("rows for pr30_full, dc30_full", 2 * COUNT + 30, 2 * COUNT + 30)]
