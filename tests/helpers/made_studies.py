"""Results of studies of classifiers whose predictions are made up."""

import numpy as np

from analysis.classification_scores import choose_thresholds
from analysis.regimes import Condition
from analysis.study_results import PartPredictions, StudyResults, TrainedCondition


def make_study(parts=("test", "external"), *, labels=("rest", "mel"), seeds=(0, 1), count=60, names=None, **attributes):
    """Return results of three conditions, the last one with one seed.

    parts:       names, which are also the roles; "synthetic" has only the condition "real"
    names:       of images; None = "0.png", ...
    attributes:  fields of StudyResults, and columns of attributes with a value for each image
    """
    random = np.random.RandomState(0)
    conditions = [Condition(name="real", regime="real"),
                  Condition(name="synthetic", regime="synthetic", baseline="real"),
                  Condition(name="real+synthetic-0.5", regime="real+synthetic", dose=0.5, baseline="real")]
    fields = {key: attributes.pop(key) for key in list(attributes) if key in StudyResults.__dataclass_fields__}

    def part(name, of_conditions):
        truth = random.randint(len(labels), size=count)
        odds = np.exp(random.randn(len(of_conditions), len(seeds), count, len(labels)) + np.eye(len(labels))[truth])
        found = odds / odds.sum(axis=-1, keepdims=True)
        return PartPredictions(name=name, role=name, images=names or [f"{index}.png" for index in range(count)],
                               groups=[f"lesion{index // 2}" for index in range(count)], labels=truth,
                               attributes=attributes,
                               probabilities={each: found[index][:1 if index == 2 else None]
                                              for index, each in enumerate(of_conditions)})

    every = [each.name for each in conditions]
    validation = part("val", every)
    scored = [part(name, every if name != "synthetic" else ["real"]) for name in parts]
    num_real, none = dict.fromkeys(labels, 50), dict.fromkeys(labels, 0)
    return StudyResults(**{
        "protocol": {"sha256": "ab"}, "settings": {"model": "efficientnet-lite0"}, "labels": labels, "seeds": seeds,
        "conditions": tuple(TrainedCondition(
            condition=each, num_real=[none if each.regime == "synthetic" else num_real],
            num_synthetic=[none] if each.regime == "real" else [dict.fromkeys(labels, 25), dict.fromkeys(labels, 26)])
            for each in conditions),
        "thresholds": {name: [choose_thresholds(validation.labels, each) for each in found]
                       for name, found in validation.probabilities.items()},
        "validation": validation, "parts": tuple(scored), "resamples": 20, **fields})
