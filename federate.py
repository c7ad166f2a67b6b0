"""Train one network at several institutions, whose images stay where they are."""

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch

from dnnlib.cli import run
from federated.command import make_group, make_simulate_command
from federated.institutions import PreparedFederation
from federated.shared_statistics import (
    SharedStatistics,
    SiteStatistics,
    StatisticsEvaluator,
    site_statistics,
)
from metrics.evaluation import Evaluator
from metrics.names import choose_metrics, needed_detectors, parse_metrics, require_detectors
from metrics.perceptual_path import check_path_requests
from torch_utils.distributed import Place, broadcast_object, is_main
from torch_utils.launch import launch
from torch_utils.ops.compiled import make_ready
from training.snapshot_metrics import Evaluate


def simulate(prepared: PreparedFederation) -> int:
    """Run the simulation, launching the other processes if there are several, and return the exit code."""
    evaluate = make_evaluate(prepared) if prepared.config.metrics else None
    make_ready(torch.device(prepared.settings.device).type)  # before other processes start, so that it is built once
    if prepared.num_processes > 1 and not Place.from_environment().is_started:
        return launch(prepared.num_processes)
    from federated.simulation import simulate as simulate_here

    return simulate_here(prepared, evaluate)


def make_evaluate(prepared: PreparedFederation) -> Evaluate:
    """Return the function that computes the metrics. Raises UserError if they cannot be computed."""
    config, settings = prepared.config, prepared.settings
    check_path_requests(parse_metrics(config.metrics), config.dataset.resolution)
    detectors = needed_detectors(config.metrics, settings.detector, settings.detector_weights)
    if Place.from_environment().rank == 0:
        require_detectors(detectors)
    if prepared.share_statistics:
        return compare_with_statistics(prepared, detectors)
    evaluator = Evaluator(config.metrics, data=prepared.holdout, detector=settings.detector, weights=detectors,
                          mirror=config.dataset.xflip, seed=config.seed, per_class=settings.per_class)
    return evaluator.evaluate


def compare_with_statistics(prepared: PreparedFederation, detectors: dict[str, str | None]) -> Evaluate:
    """Return the function that computes the metrics from what the sites tell about their images, at its first call.

    detectors:  with their files of weights, as `needed_detectors` returns them
    """
    config, settings, evaluators = prepared.config, prepared.settings, []

    def evaluate(G: torch.nn.Module, *, stop: Callable[[], bool]) -> Mapping[str, Mapping[str, Any]]:
        if not evaluators:  # all processes compute them together, once they have joined
            device = next(G.parameters()).device
            found = [site_statistics(each.name, each.path, c_dim=G.c_dim, classes=each.dataset.label_names,
                                     detector=settings.detector, weights=detectors, device=device)
                     for each in prepared.institutions]
            sent = broadcast_object([each.to_bytes() for each in found] if is_main() else None)
            shared = SharedStatistics([SiteStatistics.from_bytes(data) for data in sent])
            evaluators.append(StatisticsEvaluator(config.metrics, shared, weights=detectors, seed=config.seed,
                                                  device=device))
        return evaluators[0].evaluate(G, stop=stop)

    return evaluate


# Each command is registered here, under its name.
main = make_group(simulate=make_simulate_command(simulate, choose_metrics))

if __name__ == "__main__":
    sys.exit(run(main))
