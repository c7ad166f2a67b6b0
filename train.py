"""Train a generator on a data set of images; the same command again continues the run."""

import sys

from dnnlib.cli import run
from training.command import make_command
from training.config import TrainConfig
from training.dataset import ImageDataset
from training.launch import is_part_of_run, launch
from training.run_settings import RunSettings


def train(config: TrainConfig, settings: RunSettings, dataset: ImageDataset) -> int:
    """Run the training, in as many processes as it takes, and return the exit code."""
    if config.gpus > 1 and not is_part_of_run():
        return launch(config.gpus)
    from training.loop import train as train_here

    return train_here(config, settings, dataset)


main = make_command(train)

if __name__ == "__main__":
    sys.exit(run(main))
