"""Score images that are never learned from: where the discriminator overfits, their scores part from those of reals."""

import torch
from torch import Tensor, nn

from training.dataset import ImageDataset, choose_subset
from training.loading import to_unit_range

MOST_IMAGES = 256  # a tick is to spend seconds on them


class Validation:
    """A fixed choice of a data set's images, and D's logits on them, without augmentation.

    batch:  images of a pass, as in training: minibatch statistics depend on it
    seed:   of the choice, where there are more than MOST_IMAGES
    """

    def __init__(self, dataset: ImageDataset, *, batch: int, seed: int):
        self.dataset, self.batch = dataset, batch
        chosen = choose_subset(dataset.num_images, MOST_IMAGES, seed)
        whole = len(chosen) // batch * batch
        # Whole passes only; of a set smaller than one pass, each image by itself.
        self.passes = [chosen[start:start + batch] for start in range(0, whole, batch)] or [row[None] for row in chosen]

    @torch.no_grad()
    def score(self, D: nn.Module, device: torch.device) -> Tensor:
        """Return logits [images]. Raises UserError when an image cannot be read."""
        logits = []
        for rows in self.passes:
            items = [self.dataset[row] for row in rows]
            pixels, labels = (torch.stack([torch.tensor(item[part]) for item in items]).to(device) for part in (0, 1))
            logits.append(D(to_unit_range(pixels), labels).flatten())
        return torch.cat(logits)
