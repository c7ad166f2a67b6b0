"""Score images that are never learned from: where the discriminator overfits, their scores part from those of reals."""

import numpy as np
import torch
from torch import Tensor, nn

from training.dataset import ImageDataset, choose_subset
from training.loading import to_unit_range

MOST_IMAGES = 256  # a tick is to spend seconds on them


class Validation:
    """A data set's images, or a fixed choice of MOST_IMAGES, and D's logits on them, without augmentation.

    group:  images of a group of the minibatch standard deviation, as in training: a score depends on its neighbors
    seed:   of the choice and of the groups

    Images and groups depend neither on the batch nor on the number of processes. They are mixed at random, as those of
    training are: sets may come class by class. A last group that is not full is filled up with images of the first
    ones, whose logits in it do not count.
    """

    def __init__(self, dataset: ImageDataset, *, group: int, seed: int):
        self.dataset = dataset
        chosen = choose_subset(dataset.num_images, MOST_IMAGES, seed)
        self.rows = np.random.RandomState(seed % 2**31).permutation(chosen)  # of the data set; each once
        num_groups = -(-len(self.rows) // group)
        self._groups = np.resize(self.rows, (num_groups, group))  # repeats from the beginning

    @torch.no_grad()
    def score(self, D: nn.Module, device: torch.device) -> Tensor:
        """Return logits [len(rows)], in their order. Raises UserError when an image cannot be read."""
        logits = []
        for rows in self._groups:
            items = [self.dataset[row] for row in rows]
            pixels, labels = (torch.stack([torch.tensor(item[part]) for item in items]).to(device) for part in (0, 1))
            logits.append(D(to_unit_range(pixels), labels).flatten())
        return torch.cat(logits)[:len(self.rows)]
