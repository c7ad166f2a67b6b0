"""Continue images beyond their borders by reflection, however far."""

import torch.nn.functional as F
from torch import Tensor


def reflect_pad(images: Tensor, left: int, right: int, top: int, bottom: int) -> Tensor:
    """Pad by mirroring about the centres of the border pixels, again and again where an image is small.

    images: [N, C, H, W], H and W at least 2;  left, right, top, bottom: pixels to add, 0 or more
    """
    while max(left, right, top, bottom) > 0:
        # Reflection reaches size - 1 pixels. A mirror of the whole image there lies on a mirror of its period again, so
        # the next round goes on with the same pattern; a smaller step would not.
        height, width = images.shape[2:]
        step = [min(left, width - 1), min(right, width - 1), min(top, height - 1), min(bottom, height - 1)]
        images = F.pad(images, step, mode="reflect")
        left, right, top, bottom = left - step[0], right - step[1], top - step[2], bottom - step[3]
    return images
