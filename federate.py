"""Train one network at several institutions, whose images stay where they are."""

import sys

import torch

from dnnlib.cli import run
from federated.command import make_group, make_simulate_command
from federated.compare_arms import make_compare_command
from federated.institutions import PreparedFederation
from metrics.evaluation import Evaluator
from metrics.names import choose_metrics, needed_detectors, parse_metrics, require_detectors
from metrics.perceptual_path import check_path_requests
from torch_utils.distributed import Place
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


def make_evaluate(prepared: PreparedFederation) -> Evaluate | None:
    """Return the function that computes the metrics; None if the simulation makes one, of the sites' statistics.

    Raises UserError if they cannot be computed.
    """
    config, settings = prepared.config, prepared.settings
    check_path_requests(parse_metrics(config.metrics), config.dataset.resolution)
    detectors = needed_detectors(config.metrics, settings.detector, settings.detector_weights)
    if Place.from_environment().rank == 0:
        require_detectors(detectors)
    if prepared.share_statistics:
        return None
    evaluator = Evaluator(config.metrics, data=prepared.holdout, detector=settings.detector, weights=detectors,
                          mirror=config.dataset.xflip, seed=config.seed, per_class=settings.per_class)
    return evaluator.evaluate


# Each command is registered here, under its name.
main = make_group(simulate=make_simulate_command(simulate, choose_metrics), compare=make_compare_command())

if __name__ == "__main__":
    sys.exit(run(main))
