"""Find the training image that each image is most similar to, and how much more than to the next one.

Candidates are the nearest training images of a few groups by detector features and by 16x16 pixels, in all eight
orientations of the image; they are compared by SSIM after alignment (analysis.aligned_similarity). A ratio compares the
distance to the nearest with that to the nearest of another group: a copy has a small one, wherever images lie close to
each other or far apart.

LIMIT: SSIM is low for blurred or noisy copies and for those that were turned by a few degrees. Their distances of 16x16
pixels show them; measured on phantoms, those of features depend on the detector most.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from analysis.aligned_similarity import SIDE, aligned_ssim, enlarge_thumbnails
from analysis.near_duplicates import ORIENTATIONS, describe_orientation, orient
from metrics.distances import FeatureSet, Screen, nearest

PER_SPACE = 5  # groups that candidates are taken from, by features and by pixels each
# LIMIT: of training images listed per orientation; where a few groups have more images, not all of the nearest groups
# are found. It bounds memory and time.
_MOST_LISTED = 100
# Training thumbnails are searched whole and enlarged: a copy from which 10 % of the side were cropped is nearer to the
# latter. Without, 10 % of such copies are not found among 3,000 phantoms, and more among more images.
_ENLARGED = (1.0, 1.11)
_QUERIES = 256  # handled at once: eight orientations of them fill one block of metrics.distances


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidates:
    """Training images that Q queries are compared with; the distances are to the nearest training image.

    rows:              int64 [Q, 2 * per_space], of training images; -1 = none
    orientations:      int64 [Q, 2 * per_space], index in ORIENTATIONS of what turns the query
    feature_distance:  float64 [Q]; inf where no training image is allowed, as in the following
    feature_ratio:     float64 [Q], of this distance to that of the next group; 1 if there is no other group
    pixel_distance:    float64 [Q], root mean square of differences of 16x16 pixels in levels, without the mean color
    pixel_ratio:       float64 [Q]
    """

    rows: np.ndarray
    orientations: np.ndarray
    feature_distance: np.ndarray
    feature_ratio: np.ndarray
    pixel_distance: np.ndarray
    pixel_ratio: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True, kw_only=True, eq=False)
class NearestTraining:
    """The most similar training image of each of Q queries, and distances of the queries to training images.

    ssim:         float64 [Q], after alignment; -1 where no training image is allowed
    ratio:        float64 [Q], of 1 - SSIM to that of the most similar candidate of another group
    row:          int64 [Q], of the most similar training image; -1 = none
    orientation:  int64 [Q], index in ORIENTATIONS of what turns the query into that image
    shift:        int64 [Q, 2], pixels of 64 down and to the right
    scale:        float64 [Q], about the center
    feature_distance, feature_ratio, pixel_distance, pixel_ratio: as in Candidates
    """

    ssim: np.ndarray
    ratio: np.ndarray
    row: np.ndarray
    orientation: np.ndarray
    shift: np.ndarray
    scale: np.ndarray
    feature_distance: np.ndarray
    feature_ratio: np.ndarray
    pixel_distance: np.ndarray
    pixel_ratio: np.ndarray

    def __len__(self) -> int:
        return len(self.ssim)

    def copy_scores(self) -> dict[str, np.ndarray]:
        """Return scores that are larger for images that are more like copies, float64 [Q] each."""
        return {"ssim": self.ssim, "ssim-ratio": 1 - self.ratio, "features": 1 - self.feature_ratio,
                "pixels": 1 - self.pixel_ratio}

    def describe_alignment(self, index: int) -> str:
        """Return what was done to a query, such as "turned by 90 degrees, scaled by 0.9, shifted by 3, 0 pixels"."""
        if self.row[index] < 0:
            return "not compared"
        done = []
        if self.orientation[index]:
            done.append(describe_orientation(ORIENTATIONS[self.orientation[index]]))
        if self.scale[index] != 1:
            done.append(f"scaled by {self.scale[index]:.2f}")
        if self.shift[index].any():
            down, right = self.shift[index]
            done.append(f"shifted by {right}, {down} pixels of {SIDE}")
        return ", ".join(done) or describe_orientation(ORIENTATIONS[0])


def find_candidates(features: np.ndarray | Tensor, color: Tensor, training_features: np.ndarray | Tensor,
                    training_color: Tensor, training_groups: np.ndarray, own_groups: np.ndarray | None = None, *,
                    per_space: int = PER_SPACE, on_rows: Callable[[int], None] = lambda count: None) -> Candidates:
    """Return the training images that queries may be copies of: the nearest image of each of the nearest groups.

    features:           float32 [Q, 8, F], of the queries in ORIENTATIONS
    color:              float32 [Q, 3, S, S], as of SmallImages
    training_features:  float32 [N, F]
    training_color:     float32 [N, 3, S, S]
    training_groups:    int64 [N]
    own_groups:         int64 [Q], groups that a query is not compared with; None = all are compared
    per_space:          groups that are taken by features and by pixels each, at least 2
    on_rows:            called with the number of finished queries, for features and then for pixels: 2 * Q in all
    """
    num_queries, num_training = len(color), len(training_color)
    own = np.full(num_queries, -1) if own_groups is None else np.asarray(own_groups)
    sizes = np.sort(np.bincount(np.unique(training_groups, return_inverse=True)[1]))[::-1]
    # So many images belong to `per_space` groups besides the own one at least.
    length = min(int(sizes[:per_space + (own_groups is not None)].sum()), max(_MOST_LISTED, per_space))
    features, training_features = torch.as_tensor(features), torch.as_tensor(training_features)
    colors = _without_mean(color)
    enlarged = torch.cat([_without_mean(enlarge_thumbnails(training_color, scale)) for scale in _ENLARGED])
    searches = (
        _search(num_queries, features.flatten(0, 1), lambda rows: features[rows], training_features, length),
        _search(num_queries, colors, lambda rows: torch.stack([orient(colors[rows], one) for one in ORIENTATIONS],
                                                              dim=1), enlarged, length * len(_ENLARGED)))
    found = []
    for search in searches:
        results = []
        for squares, indices in search:
            start = len(results)
            results += [_nearest_groups(squares[row], indices[row] % num_training, own[start + row], training_groups,
                                        per_space) for row in range(len(squares))]
            on_rows(len(squares))
        found.append([np.stack(values) for values in zip(*results, strict=True)])
    (rows, turns, squares), (pixel_rows, pixel_turns, pixel_squares) = found
    same = (rows[:, :, None] == pixel_rows[:, None]) & (turns[:, :, None] == pixel_turns[:, None])
    pixel_rows = np.where(same.any(axis=1), -1, pixel_rows)  # compared already
    return Candidates(
        rows=np.concatenate([rows, pixel_rows], axis=1), orientations=np.concatenate([turns, pixel_turns], axis=1),
        feature_distance=np.sqrt(squares[:, 0]), feature_ratio=_ratio(*np.sqrt(squares.T[:2])),
        pixel_distance=np.sqrt(pixel_squares[:, 0] / math.prod(color.shape[1:])),
        pixel_ratio=_ratio(*np.sqrt(pixel_squares.T[:2])))


def compare(gray_queries: Tensor, gray_training: Tensor, candidates: Candidates, rows: range,
            training_groups: np.ndarray) -> dict[str, np.ndarray]:
    """Compare some queries with their candidates: ssim, ratio, row, orientation, shift and scale of NearestTraining.

    gray_queries:     uint8 [Q, SIDE, SIDE]
    gray_training:    uint8 [N, SIDE, SIDE]
    rows:             of the queries
    training_groups:  int64 [N]
    """
    theirs, turns = (each[rows.start:rows.stop] for each in (candidates.rows, candidates.orientations))
    query, place = np.nonzero(theirs >= 0)
    chosen = [torch.from_numpy(each) for each in (query + rows.start, theirs[query, place], turns[query, place])]
    found = aligned_ssim(gray_queries[chosen[0]], gray_training[chosen[1]], chosen[2])
    ssim = np.full(theirs.shape, -1.0)
    shift, scale = np.zeros([*theirs.shape, 2], dtype=np.int64), np.ones(theirs.shape)
    ssim[query, place], shift[query, place], scale[query, place] = (each.numpy() for each in found)
    each, best = np.arange(len(rows)), ssim.argmax(axis=1)
    groups = training_groups[theirs]
    is_other = (groups != groups[each, best][:, None]) & (theirs >= 0)
    others = np.where(is_other, ssim, -1).max(axis=1)
    ratio = np.where(is_other.any(axis=1), _ratio(1 - ssim[each, best], 1 - others), 1)
    return {"ssim": ssim[each, best], "ratio": ratio, "row": theirs[each, best], "orientation": turns[each, best],
            "shift": shift[each, best], "scale": scale[each, best]}


def nearest_synthetic(real_features: np.ndarray | Tensor, synthetic_features: np.ndarray | Tensor, *,
                      on_rows: Callable[[int], None] = lambda count: None) -> np.ndarray:
    """Return the distance of real images to the nearest synthetic one in any orientation, float64 [R].

    real_features:       float32 [R, F]
    synthetic_features:  float32 [M, 8, F]
    on_rows:             called with the number of finished real images
    """
    real = FeatureSet(torch.as_tensor(real_features))
    synthetic = FeatureSet(torch.as_tensor(synthetic_features).flatten(0, 1))
    return nearest(Screen(real, synthetic), real, 1, among=synthetic, on_rows=on_rows).squares[:, 0].sqrt().numpy()


def _without_mean(color: Tensor) -> Tensor:
    """Return color thumbnails without the mean of each channel: float32 [N, 3, S, S]."""
    return color - color.mean(dim=(2, 3), keepdim=True)


def _search(num_queries: int, values: Tensor, oriented: Callable[[slice], Tensor], training: Tensor, length: int,
            ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield squared distances float64 [q, 8, length] and rows int64 of the nearest training images, in blocks.

    values:    [m, ...], that have the range of all queries in all orientations
    oriented:  returns some of the queries in ORIENTATIONS, [q, 8, ...]
    training:  [N, ...]
    """
    known = FeatureSet(training.flatten(1))
    screen = Screen(FeatureSet(values.flatten(1)), known)
    for start in range(0, num_queries, _QUERIES):
        block = oriented(slice(start, start + _QUERIES))
        near = nearest(screen, FeatureSet(block.flatten(0, 1).flatten(1)), length, among=known)
        yield tuple(each.view(len(block), len(ORIENTATIONS), length).numpy() for each in (near.squares, near.indices))


def _nearest_groups(squares: np.ndarray, indices: np.ndarray, own: int, training_groups: np.ndarray, count: int,
                    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the nearest image of each of the nearest groups: row (-1 = none), orientation, and squared distance.

    squares, indices:  float64 and int64 [8, length], the nearest training images in each orientation of the query
    """
    order = np.lexsort((indices.ravel(), squares.ravel()))  # of equal distances, the first row and orientation
    order = order[training_groups[indices.ravel()[order]] != own]
    _, first = np.unique(training_groups[indices.ravel()[order]], return_index=True)
    chosen = order[np.sort(first)[:count]]
    rows, turns, found = (np.full(count, fill) for fill in (-1, 0, math.inf))
    rows[:len(chosen)], turns[:len(chosen)] = indices.ravel()[chosen], chosen // indices.shape[1]
    found[:len(chosen)] = squares.ravel()[chosen]
    return rows, turns, found


def _ratio(distances: np.ndarray, of_next: np.ndarray) -> np.ndarray:
    """Return the ratio of distances to those of the next group; 1 where both are 0, or there is none (inf)."""
    has_ratio = (of_next > 0) & np.isfinite(of_next)
    return np.divide(distances, of_next, out=np.ones_like(distances), where=has_ratio)
