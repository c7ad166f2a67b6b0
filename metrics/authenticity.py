"""Are generated images copies of training images? The share of authentic ones, and the data-copying statistic C_T."""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from torch import Tensor

from metrics.distances import FeatureSet, Nearest, Screen, nearest
from metrics.feature_tensors import as_feature_pair, as_features
from metrics.intervals import SPLITS, Jackknife, TooFew, group_numbers, halves_jackknife, random_halves

_NEAREST = 20  # training images looked at around each image, at least
_MOST_NEAREST = 500  # bounds the memory where a group is large: 8 KB for each image
_CELL_FAKES = 20  # a cell with fewer tells little (Meehan et al. 2020 ask for 20 as well)
_CELL_IMAGES = 100  # held-out images and fakes in a cell, at least, on average
_MOST_CELLS = 20


class Authenticity(NamedTuple):
    """Two views of copying; both look at features, so a copy that the detector does not recognize counts as new."""

    authpct: Jackknife  # percent of authentic fakes, 0 to 100, as the paper prints it
    ct: Jackknife | None  # 0 without copying, negative with; sides "heldout" and "fake"
    note: str = ""  # why there is no ct although there are held-out images


def authenticity(train: np.ndarray | Tensor, fake: np.ndarray | Tensor, train_groups: np.ndarray | None = None,
                 heldout: np.ndarray | Tensor | None = None, heldout_groups: np.ndarray | None = None, *,
                 fake_groups: np.ndarray | None = None, jackknife: bool = True, seed: int = 0,
                 on_rows: Callable[[int], None] = lambda count: None) -> Authenticity:
    """Return AuthPct (Alaa et al. 2022) and, given held-out images, C_T (Meehan et al. 2020).

    train, fake, heldout:  [N, F], [M, F] and [H, F], floating point: images that the network was trained on, made by
                           it, and real ones that it never saw
    *_groups:              int64 [N], [M] and [H]; None = each image is its own group
    jackknife:             False omits what the interval of AuthPct needs, which takes time and four groups on each side
    seed:                  random seed of the cells of C_T
    on_rows:               called with the number of finished rows of distances; there are N + M + H

    Raises ValueError if features have another shape or type, TooFew for too few groups.
    """
    train, fake = as_feature_pair(train, fake, at_least=1)
    groups = group_numbers(train_groups, len(train))
    if groups.max() < 1:
        raise TooFew(f"there are {len(train)} training images of 1 group; expected at least 2 groups, since distances "
                     "to images of other groups are needed")
    halves = [random_halves(*side, 4) for side in (("training", len(train), train_groups),
                                                   ("fake", len(fake), fake_groups))] if jackknife else None
    trains, fakes = FeatureSet(train), FeatureSet(fake)
    sets = [trains, fakes]
    if heldout is not None:
        heldout = as_features(heldout, "held-out features", at_least=1).to(train.device)
        if heldout.shape[1] != train.shape[1]:
            raise ValueError(f"held-out features have {heldout.shape[1]} dimensions, training ones {train.shape[1]}; "
                             "expected equal numbers: compute both with the same detector")
        sets.append(FeatureSet(heldout))
    screen = Screen(*sets)
    # LIMIT: long enough for images of other groups in the same half; rarely none is left, then the last image counts.
    length = min(_NEAREST + 4 * int(np.bincount(groups).max()), _MOST_NEAREST)
    of_train = nearest(screen, trains, min(length, len(train) - 1), on_rows=on_rows)
    of_fakes = nearest(screen, fakes, min(length, len(train)), among=trains, on_rows=on_rows)
    authentic = _are_authentic(of_train, of_fakes, groups)
    authpct = Jackknife(estimate=100 * float(authentic.mean()), without={})
    if halves is not None:
        in_halves = np.empty([SPLITS, 2])
        for split in range(SPLITS):
            train_half, fake_half = (side >> split & 1 for side in halves)
            found = _are_authentic(of_train, of_fakes, groups, train_half, fake_half)
            in_halves[split] = [found[fake_half == half].mean() for half in (0, 1)]
        authpct = halves_jackknife(authpct.estimate, 100 * in_halves, {"real": train_groups, "fake": fake_groups},
                                   {"real": len(train), "fake": len(fake)}, is_share=True, most=100.0)
    if heldout is None:
        return Authenticity(authpct, None)
    of_heldout = nearest(screen, sets[2], 1, among=trains, on_rows=on_rows)
    distances = [found.squares[:, 0].cpu().numpy() for found in (of_fakes, of_heldout)]
    try:
        ct = _copying_statistic((train, fake, heldout), *distances, group_numbers(fake_groups, len(fake)),
                                group_numbers(heldout_groups, len(heldout)), seed)
    except TooFew as error:
        return Authenticity(authpct, None, str(error))
    return Authenticity(authpct, ct)


def _are_authentic(of_train: Nearest, of_fakes: Nearest, groups: np.ndarray, train_half: np.ndarray | None = None,
                   fake_half: np.ndarray | None = None) -> np.ndarray:
    """Return bool [M]: whether fakes are farther from their nearest training image than that is from its nearest other.

    *_half:  int64 [N] and [M]; given these, only training images of the same half count

    Alaa et al. 2022; there every other training image counts. Here only those of other groups do: several photographs
    of a lesion would make it seem that its surroundings are crowded.

    Without any copying not all fakes pass: a fresh image fails where it is the nearest neighbor of its own nearest
    neighbor, with probability 2/3 on a line, 0.62 in an evenly filled plane, and less in many dimensions. So compare
    with the value of held-out images. Fakes that are merely bad pass, and so do blurred copies of outlying images.
    """
    train_indices, fake_indices = (found.indices.cpu().numpy() for found in (of_train, of_fakes))
    others = groups[train_indices] != groups[:, None]
    all_of_fakes = np.ones_like(fake_indices, dtype=bool)
    if train_half is not None:
        others &= train_half[train_indices] == train_half[:, None]
        all_of_fakes = train_half[fake_indices] == fake_half[:, None]
    _, surroundings = _first(of_train, others)
    image, square = _first(of_fakes, all_of_fakes)
    return square > surroundings[image]


def _first(found: Nearest, allowed: np.ndarray) -> Iterator[np.ndarray]:
    """Return index and squared distance of the first allowed image in each list, otherwise the last: [n] each."""
    place = np.where(allowed.any(axis=1), allowed.argmax(axis=1), allowed.shape[1] - 1)[:, None]
    return (np.take_along_axis(each.cpu().numpy(), place, axis=1)[:, 0] for each in (found.indices, found.squares))


def _copying_statistic(sets: tuple[Tensor, Tensor, Tensor], of_fakes: np.ndarray, of_heldout: np.ndarray,
                       fake_groups: np.ndarray, heldout_groups: np.ndarray, seed: int) -> Jackknife:
    """Return C_T: by how many standard deviations fakes are nearer to training images than held-out images are.

    sets:                  features of training images, fakes and held-out images
    of_fakes, of_heldout:  float64 [M] and [H], squared distances to the nearest training image

    Meehan et al. 2020: in each cell of the training images, by k-means, the z-score of the Mann-Whitney statistic;
    their mean weighted by the share of held-out images. Cells with fewer than 20 fakes are left out. Negative: copying.

    C_T grows with the number of images, so compare it at equal numbers only; and fakes that are merely worse than
    held-out images are farther away, which hides copying. The cells stay the same for the jackknife.
    """
    from scipy.cluster.vq import kmeans2, vq  # here: importing scipy takes 0.3 s

    num_cells = min(max(min(len(of_fakes), len(of_heldout)) // _CELL_IMAGES, 1), _MOST_CELLS, len(sets[0]))
    train, fake, heldout = (each.float().cpu().numpy() for each in sets)
    centers, _ = kmeans2(train, num_cells, minit="++", missing="raise", rng=np.random.default_rng(seed))
    fake_cells, heldout_cells = vq(fake, centers)[0], vq(heldout, centers)[0]
    num_fakes, num_heldout = (np.bincount(cells, minlength=num_cells) for cells in (fake_cells, heldout_cells))
    kept = (num_fakes >= _CELL_FAKES) & (num_heldout > 0)
    if not kept.any():
        raise TooFew(f"no part of the training images has {_CELL_FAKES} fakes and a held-out image beside it")
    wins_of_fakes, wins_of_heldout = np.zeros(len(fake)), np.zeros(len(heldout))  # in pairs of one cell; a tie is half
    for cell in np.flatnonzero(kept):
        ours, theirs = fake_cells == cell, heldout_cells == cell
        wins_of_fakes[ours] = _num_below(of_heldout[theirs], of_fakes[ours])
        wins_of_heldout[theirs] = num_fakes[cell] - _num_below(of_fakes[ours], of_heldout[theirs])
    wins = np.bincount(fake_cells, weights=wins_of_fakes, minlength=num_cells)

    def statistic(wins: np.ndarray, num_fakes: np.ndarray, num_heldout: np.ndarray) -> np.ndarray:
        pairs = num_fakes * num_heldout
        deviation = np.sqrt(pairs * (num_fakes + num_heldout + 1) / 12)
        weights = np.where(kept, num_heldout, 0)
        z = (wins - pairs / 2) / np.maximum(deviation, np.finfo(float).tiny)
        return (weights * z).sum(axis=-1) / np.maximum(weights.sum(axis=-1), 1)

    def by_group(groups: np.ndarray, cells: np.ndarray, wins: np.ndarray) -> list[np.ndarray]:
        """Return wins and numbers of images by group and cell: [groups, cells] each."""
        shape = groups.max() + 1, num_cells
        return [np.bincount(groups * num_cells + cells, weights, math.prod(shape)).reshape(shape)
                for weights in (wins, None)]

    heldout_wins, heldout_sizes = by_group(heldout_groups, heldout_cells, wins_of_heldout)
    fake_wins, fake_sizes = by_group(fake_groups, fake_cells, wins_of_fakes)
    return Jackknife(estimate=float(statistic(wins, num_fakes, num_heldout)),
                     without={"heldout": statistic(wins - heldout_wins, num_fakes, num_heldout - heldout_sizes),
                              "fake": statistic(wins - fake_wins, num_fakes - fake_sizes, num_heldout)})


def _num_below(values: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """Return how many of the values are below each limit; equal ones count half."""
    values = np.sort(values)
    return (np.searchsorted(values, limits, "left") + np.searchsorted(values, limits, "right")) / 2
