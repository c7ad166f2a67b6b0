"""Train a generator on a data set of images; the same command again continues the run."""

import sys

import torch

from dnnlib.cli import run
from metrics.evaluation import Evaluator
from metrics.names import choose_metrics, needed_detectors, parse_metrics, require_detectors
from metrics.perceptual_path import check_path_requests
from torch_utils.distributed import Place
from torch_utils.launch import launch
from torch_utils.ops.compiled import make_ready
from training.command import make_command
from training.config import RunSettings, TrainConfig
from training.dataset import ImageDataset
from training.snapshot_metrics import Evaluate


def train(config: TrainConfig, settings: RunSettings, dataset: ImageDataset) -> int:
    """Run the training, launching the other processes if there are several, and return the exit code."""
    evaluate = make_evaluate(config, settings, dataset.resolution) if config.metrics else None
    make_ready(torch.device(settings.device).type)  # before other processes start, so that it is built only once
    if config.gpus > 1 and not Place.from_environment().is_started:
        return launch(config.gpus)
    from training.loop import train as train_here

    return train_here(config, settings, dataset, evaluate)


def make_evaluate(config: TrainConfig, settings: RunSettings, resolution: int) -> Evaluate:
    """Return the function that computes the run's metrics. Raises UserError if they cannot be computed."""
    check_path_requests(parse_metrics(config.metrics), resolution)
    detectors = needed_detectors(config.metrics, settings.detector, settings.detector_weights)
    if Place.from_environment().rank == 0:
        require_detectors(detectors)
    evaluator = Evaluator(config.metrics, data=settings.data, detector=settings.detector, weights=detectors,
                          mirror=config.dataset.xflip, seed=config.seed, per_class=settings.per_class)
    return evaluator.evaluate


main = make_command(train, choose_metrics)

if __name__ == "__main__":
    sys.exit(run(main))
