"""Make images what a perceptual similarity compares."""

from torch import Tensor, nn

from metrics.detectors.similarity import Similarity
from metrics.sources import to_rgb

LARGEST_SIDE = 256  # pixels that images are averaged down to, as such similarities were trained on smaller ones


def to_similarity_input(images: Tensor, similarity: Similarity) -> Tensor:
    """Return what `similarity` takes of images: [N, 3, h, w] of their dtype; gradients flow.

    images:  [N, 1 or 3, R, R] floating point in [-1, 1]; R at most 256, or a multiple of it

    Sides above 256 are averaged down to 256, sides below the similarity's least_size are enlarged to it; grey is
    repeated to RGB. An image's result depends on no other one. Raises ValueError for other images.
    """
    side = images.shape[-1]
    if images.ndim != 4 or images.shape[1] not in (1, 3) or images.shape[2] != side or not images.is_floating_point():
        raise ValueError(f"images are {images.dtype} {list(images.shape)}; expected floating point "
                         "[N, 1 or 3, R, R]")
    if side > LARGEST_SIDE:
        if side % LARGEST_SIDE:
            raise ValueError(f"images are {side}x{side}; expected sides of at most {LARGEST_SIDE}, or of a multiple")
        images = nn.functional.avg_pool2d(images, side // LARGEST_SIDE)
    elif side < similarity.least_size:
        # LIMIT: on a GPU the gradient of this adds up in no fixed order, so that results repeat to rounding alone.
        size = (similarity.least_size, similarity.least_size)
        images = nn.functional.interpolate(images, size, mode="bilinear", align_corners=False)
    return to_rgb(images)
