"""Maps of features in two dimensions: PCA, t-SNE and UMAP, fitted on the real images; other images are placed on them.

So adding images never moves the real ones. In t-SNE and PCA, a place also does not depend, not even in its last bit, on
which other images are placed: all sums over features have a fixed order, and exact differences decide who is a
neighbor.

Legend: N points (the real ones first), R real images, F features, D principal components, k neighbors.
"""

import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from analysis.embedding_neighbors import nearest_others
from analysis.embedding_points import Layout, LayoutQuality
from dnnlib.text import plural
from metrics.distances import Block, FeatureSet, Screen, square_distances

TSNE, PCA, UMAP = "tsne", "pca", "umap"
# Module that makes each map, and its package for pip; PCA needs none but threadpoolctl, which all maps need.
MAPS: dict[str, tuple[str, str]] = {TSNE: ("openTSNE", "openTSNE"), PCA: ("threadpoolctl", "threadpoolctl"),
                                    UMAP: ("umap", "umap-learn")}
OnStep = Callable[[str, int, int], None]  # map, finished steps, all steps; may raise to interrupt

MAX_COMPONENTS = 50  # that t-SNE and UMAP see: as van der Maaten and Hinton 2008, section 4.2, with 30
_SMALLEST_VARIANCE = 1e-10  # of a component, as a share of the largest: below is rounding of float32 features
_ROWS = 512  # features projected at a time: these fit into the CPU's cache
_PAIRS = 2**22  # distances at a time: with ties everywhere 0.4 GB

_INTERPOLATED_FROM = 10_000  # real images: above, t-SNE's repulsion is interpolated on a grid (openTSNE's default)
_EARLY_STEPS, _STEPS = 250, 500  # openTSNE's defaults
_PLACING_STEPS = 100  # with 3,000 real images, 250 change quality by less than 0.0001
_PLACING_PERPLEXITY = 5  # openTSNE's default: a place follows the nearest few
_STEPS_PER_CALL = 10
_UMAP_NEIGHBORS = 15  # umap-learn's default
_MARGIN = 0.5  # widths of the real images' box by which a placed image may lie outside

ALL_MEASURED = 5_000  # points: up to here quality is measured on all
MEASURED = 2_000  # of more points, so many drawn at random


@dataclass(frozen=True, kw_only=True)
class LayoutSettings:
    """Which maps are made, and how."""

    maps: tuple[str, ...]  # of MAPS, those whose modules are installed; the first is shown first
    perplexity: float  # of t-SNE, above 1: the effective number of neighbors of a point
    num_neighbors: int  # of the measured quality, at least 1
    seed: int = 0


def make_layouts(features: np.ndarray, num_real: int, settings: LayoutSettings, *,
                 on_step: OnStep = lambda name, step, steps: None) -> list[Layout]:
    """Return a layout per map of the settings, in their order.

    features:  float32 [N, F], finite; the first num_real rows are of real images, at least 50
    on_step:   called with the map and its finished and all steps
    """
    with _single_thread(), _quiet():
        axes = fit_principal_axes(features[:num_real])
        reduced = axes.project(features)
        layouts = []
        for name in settings.maps:
            coordinates, title, note = {TSNE: _tsne, PCA: _pca, UMAP: _umap}[name](
                axes, reduced, num_real, settings, on_step)
            real, placed = (measure_quality(features, coordinates, num_real, placed=placed, seed=settings.seed,
                                            num_neighbors=settings.num_neighbors)
                            if not placed or len(features) > num_real else None for placed in (False, True))
            layouts.append(Layout(key=name, title=title, coordinates=coordinates, real=real, placed=placed, note=note))
    return layouts


@contextmanager
def _single_thread() -> Iterator[None]:
    """Let BLAS and LAPACK use one thread: the order of their sums, and so the last bits, depends on the number."""
    # Here: importing them takes 0.1 s. SciPy brings a BLAS of its own, which is limited only if it is loaded before.
    import scipy.linalg  # noqa: F401
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what openTSNE and umap-learn tell their programmers."""
    logger = logging.getLogger("openTSNE")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@dataclass(frozen=True, kw_only=True, eq=False)
class PrincipalAxes:
    """The principal components of features.

    mean:       float64 [F]
    axes:       float64 [D, F], orthonormal, by decreasing variance; the largest loading of each is positive
    variances:  float64 [D] along the axes
    total:      variance of all features together
    """

    mean: np.ndarray
    axes: np.ndarray
    variances: np.ndarray
    total: float

    def project(self, features: np.ndarray) -> np.ndarray:
        """Return the coordinates of features [N, F] on the axes, float64 [N, D].

        A matrix product would be faster, but its rounding depends on how many rows it has, and on the processor.
        """
        result = np.empty([len(features), len(self.axes)])
        loadings = np.ascontiguousarray(self.axes.T)[:, :, None]
        for start in range(0, len(features), _ROWS):
            columns = np.ascontiguousarray((features[start:start + _ROWS] - self.mean).T)  # [F, n]
            sums, product = np.zeros([2, len(self.axes), columns.shape[1]])
            for loading, column in zip(loadings, columns):
                np.multiply(loading, column, out=product)
                sums += product
            result[start:start + _ROWS] = sums.T
        return result


def fit_principal_axes(features: np.ndarray) -> PrincipalAxes:
    """Return the principal axes of features [R, F], at most MAX_COMPONENTS; those without variance are left out."""
    from scipy.linalg import eigh  # takes 0.1 s to import

    num_images, num_features = features.shape
    mean = features.mean(axis=0, dtype=np.float64)
    if num_features <= num_images:
        products = np.zeros([num_features, num_features])
        for start in range(0, num_images, _ROWS):
            part = features[start:start + _ROWS] - mean
            products += part.T @ part
    else:  # products of images with each other have the same eigenvalues
        centered = features - mean
        products = centered @ centered.T
    size = len(products)
    values, vectors = eigh(products, subset_by_index=[max(size - MAX_COMPONENTS, 0), size - 1])
    values, vectors = values[::-1], vectors[:, ::-1]
    kept = values > values[0] * _SMALLEST_VARIANCE
    values, axes = values[kept], vectors[:, kept].T
    if num_features > num_images:
        axes = axes @ centered
        axes /= np.linalg.norm(axes, axis=1, keepdims=True)
    largest = np.abs(axes).argmax(axis=1)
    signs = np.sign(axes[np.arange(len(axes)), largest])
    return PrincipalAxes(mean=mean, axes=axes * signs[:, None], variances=values / (num_images - 1),
                         total=float(np.trace(products)) / (num_images - 1))


def _first_two(reduced: np.ndarray) -> np.ndarray:
    """Return the first two columns, zeros where there are fewer, float64 [N, 2]."""
    result = np.zeros([len(reduced), 2])
    result[:, :reduced.shape[1]] = reduced[:, :2]
    return result


def _pca(axes: PrincipalAxes, reduced: np.ndarray, num_real: int, settings: LayoutSettings,
         on_step: OnStep) -> tuple[np.ndarray, str, str]:
    first, second = (*(axes.variances[:2] / axes.total if axes.total > 0 else ()), 0.0, 0.0)[:2]
    on_step(PCA, 1, 1)
    return _first_two(reduced), "PCA", (
        f"The axes are the two directions in which the features of the real images vary most; the horizontal one holds "
        f"{first:.1%} of their variance, the vertical one {second:.1%}.")


def _tsne(axes: PrincipalAxes, reduced: np.ndarray, num_real: int, settings: LayoutSettings,
          on_step: OnStep) -> tuple[np.ndarray, str, str]:
    """Return a t-SNE map (van der Maaten and Hinton 2008), its title and note.

    Others move in the field of the real images alone (Policar et al. 2021). They start at the nearest real image: from
    the median of several, which is openTSNE's default, a tenth of 1,000 copies of real images ended in other regions,
    and trustworthiness was 0.85 instead of 0.88 (3,000 real images in 40 clusters; with 25,000, 0.960 and 0.957). Their
    repulsion is never interpolated: openTSNE 1.0.4 then slows points inside of its grid, not those at its edge.
    """
    from openTSNE import TSNE as Fitting  # takes 2 s to import
    from openTSNE.affinity import PerplexityBasedNN
    from openTSNE.tsne import PartialTSNEEmbedding

    num_others = len(reduced) - num_real
    steps = _EARLY_STEPS + _STEPS + (_PLACING_STEPS if num_others else 0)
    done = 0

    def after_steps(*_) -> None:  # openTSNE stops where this returns something true
        nonlocal done
        done += _STEPS_PER_CALL
        on_step(TSNE, done, steps)

    on_step(TSNE, 0, steps)
    perplexity = min(settings.perplexity, (num_real - 1) / 3)
    reduced = _scaled(reduced, num_real)
    affinities = PerplexityBasedNN(knn_index=_ExactIndex(reduced[:num_real], max(int(3 * perplexity), 1)),
                                   perplexity=perplexity, n_jobs=1)
    fitted = Fitting(
        initialization=_start(reduced[:num_real], 1e-4, settings.seed), early_exaggeration_iter=_EARLY_STEPS,
        n_iter=_STEPS, negative_gradient_method="fft" if num_real >= _INTERPOLATED_FROM else "bh", n_jobs=1,
        random_state=settings.seed, callbacks=after_steps, callbacks_every_iters=_STEPS_PER_CALL,
    ).fit(affinities=affinities)
    real = np.array(fitted)
    wished = f" ({settings.perplexity:.4g} needs more real images)" if perplexity < settings.perplexity else ""
    note = (f"t-SNE by openTSNE on the first {plural(reduced.shape[1], 'principal component')}, with perplexity "
            f"{perplexity:.4g}{wished} and seed {settings.seed}.")
    if not num_others:
        return real, "t-SNE", note
    affinity, neighbors, _ = affinities.to_new(reduced[num_real:], perplexity=min(_PLACING_PERPLEXITY, perplexity),
                                               return_distances=True)
    others = PartialTSNEEmbedding(real[neighbors[:, 0]], fitted, affinity, **fitted.gradient_descent_params)
    others = others.optimize(_PLACING_STEPS, learning_rate=0.1, exaggeration=1.5, momentum=0.8, max_grad_norm=0.25,
                             max_step_norm=None, negative_gradient_method="bh")  # as openTSNE's transform does
    others, moved = _keep_near(np.array(others), real)
    return np.concatenate([real, others]), "t-SNE", note + " " + _about_others(moved)


def _umap(axes: PrincipalAxes, reduced: np.ndarray, num_real: int, settings: LayoutSettings,
          on_step: OnStep) -> tuple[np.ndarray, str, str]:
    """Return a UMAP (McInnes et al. 2018), its title and note."""
    from umap import UMAP as Fitting  # takes 10 s to import

    num_others = len(reduced) - num_real
    steps = 2 if num_others else 1
    on_step(UMAP, 0, steps)
    reduced = _scaled(reduced, num_real).astype(np.float32)
    fitted = Fitting(
        n_neighbors=min(_UMAP_NEIGHBORS, num_real - 1), init=_start(reduced[:num_real], 5, settings.seed),
        n_epochs=500 if num_real <= _INTERPOLATED_FROM else 200,  # the default; for placing it would depend on others
        random_state=settings.seed, transform_seed=settings.seed, n_jobs=1,
    ).fit(reduced[:num_real])
    real = np.array(fitted.embedding_, dtype=np.float64)
    on_step(UMAP, 1, steps)
    note = (f"UMAP by umap-learn on the first {plural(reduced.shape[1], 'principal component')}, with "
            f"{fitted.n_neighbors} neighbors and seed {settings.seed}.")
    if not num_others:
        return real, "UMAP", note
    others, moved = _keep_near(np.array(fitted.transform(reduced[num_real:]), dtype=np.float64), real)
    on_step(UMAP, 2, steps)
    return np.concatenate([real, others]), "UMAP", (
        f"{note} {_about_others(moved)} umap-learn places them together, so that the place of one can depend on "
        "which others there are.")


def _about_others(num_moved: int) -> str:
    text = "The other images are placed among the real ones, which they do not move."
    return text if num_moved == 0 else (
        f"{text} {plural(num_moved, 'image')} would lie far outside of the map, and "
        f"{'is' if num_moved == 1 else 'are'} drawn at its edge.")


def _scaled(reduced: np.ndarray, num_real: int) -> np.ndarray:
    """Return components scaled by a power of two, so that the first has a deviation of about 1 on the real images.

    At least one column. No map depends on the scale, but openTSNE and umap-learn search widths near 1.
    """
    if reduced.shape[1] == 0:
        return np.zeros([len(reduced), 1])
    return reduced * 2.0 ** -math.frexp(float(reduced[:num_real, 0].std()))[1]


def _start(reduced: np.ndarray, deviation: float, seed: int) -> np.ndarray:
    """Return where optimization starts: the first two components, and a little noise that parts equal points."""
    start = _first_two(reduced)
    spread = start[:, 0].std()
    noise = np.random.default_rng(seed).normal(size=start.shape)
    return (start / spread if spread > 0 else start) * deviation + noise * (deviation * 0.01)


def _keep_near(others: np.ndarray, real: np.ndarray) -> tuple[np.ndarray, int]:
    """Return places that are at most _MARGIN outside of the box of the real ones, and how many were moved there."""
    low, high = real.min(axis=0), real.max(axis=0)
    margin = _MARGIN * float((high - low).max())
    kept = np.clip(others, low - margin, high + margin)
    return kept, int((kept != others).any(axis=1).sum())


class _ExactIndex:
    """What openTSNE asks of an index of nearest neighbors; its own exact one takes minutes for 25,000 points."""

    def __init__(self, points: np.ndarray, k: int):
        self.points, self.k, self.n_samples = points, k, len(points)

    def build(self) -> tuple[np.ndarray, np.ndarray]:
        return nearest_others(self.points, None, self.k)

    def query(self, points: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        return nearest_others(points, self.points, k)


class _Neighborhood:
    """Distances of points to others with bounds, some points at a time."""

    def __init__(self, points: np.ndarray, among: np.ndarray, own: np.ndarray | None):
        """own: int64 [n], the row in `among` that is the point itself, which is no neighbor."""
        self._points, self._own = torch.from_numpy(np.ascontiguousarray(points)), own
        other = FeatureSet(torch.from_numpy(np.ascontiguousarray(among)))
        self.screen = Screen(FeatureSet(self._points), other)
        blocks = list(self.screen.blocks(other))
        self.among = Block(other.features, other.equal, torch.cat([block.x for block in blocks]),
                           torch.cat([block.squares for block in blocks]), 0)

    def parts(self) -> Iterator[tuple[slice, Block, torch.Tensor]]:
        """Yield some points, and lower bounds of their scaled squared distances, [n, R]; infinite for itself."""
        size = min(max(_PAIRS // len(self.among.features), 1), 2048)
        for start in range(0, len(self._points), size):
            rows = slice(start, min(start + size, len(self._points)))
            block, = self.screen.blocks(FeatureSet(self._points[rows]))
            low = self.screen.lower_bounds(block, self.among)
            if self._own is not None:
                low[torch.arange(len(low)), torch.from_numpy(self._own[rows])] = math.inf
            yield rows, block, low


def neighbor_ranks(points: np.ndarray, among: np.ndarray, chosen: np.ndarray,
                   own: np.ndarray | None = None) -> np.ndarray:
    """Return which nearest neighbor of a point each chosen one is, int64 [n, k] from 1; of equals the first is nearer.

    points, among:  float [n, F], [R, F]
    chosen:         int64 [n, k], rows of `among`
    own:            int64 [n], for each point the row of `among` that it is, which does not count as its neighbor
    """
    ranks = np.empty(chosen.shape, dtype=np.int64)
    neighborhood = _Neighborhood(points, among, own)
    screen, others = neighborhood.screen, neighborhood.among
    for rows, block, low in neighborhood.parts():
        spread = screen.spread(block.squares[:, None], others.squares)
        line = torch.arange(len(low))
        for place in range(chosen.shape[1]):
            target = torch.from_numpy(chosen[rows, place])
            exact = square_distances(block, line, others, target)
            reach = (exact * screen.square_scale).to(low.dtype)[:, None]
            is_open = low <= reach
            is_nearer = low + spread < reach
            row, column = (is_open & ~is_nearer).nonzero().unbind(dim=1)
            squares = square_distances(block, row, others, column)
            before = (squares < exact[row]) | ((squares == exact[row]) & (column < target[row]))
            ranks[rows, place] = (is_nearer.sum(dim=1) + torch.bincount(row[before], minlength=len(low)) + 1).numpy()
    return ranks


def measure_quality(features: np.ndarray, coordinates: np.ndarray, num_real: int, *, placed: bool = False,
                    num_neighbors: int, seed: int = 0) -> LayoutQuality:
    """Return the trustworthiness of a map (Venna and Kaski 2001, eq. 1), and how many neighbors it preserves.

        T(k) = 1 - 2 / (n k (2 c - 3 k + 1)) * sum_i sum_{j in U_k(i)} (r(i, j) - k)

    U_k(i) are those among the k nearest of i on the map that are not among its k nearest by features, r(i, j) is the
    rank of j by features; c is the number of real images that could be neighbors: R - 1 for a real one, R for others.

    features:     float32 [N, F], the real ones first
    coordinates:  float64 [N, 2]
    placed:       measure the images after num_real, whose neighbors are real images, instead of the real ones
    seed:         draws the images on which it is measured, MEASURED of more than ALL_MEASURED
    """
    first, count = (num_real, len(features) - num_real) if placed else (0, num_real)
    rows = np.arange(count)
    if count > ALL_MEASURED:
        rows = np.sort(np.random.default_rng(seed).choice(count, MEASURED, replace=False))
    own = None if placed else rows
    rows = first + rows
    candidates = num_real if placed else num_real - 1
    k = min(num_neighbors, candidates // 2)
    chosen, _ = nearest_others(coordinates[rows], coordinates[:num_real], k, point_groups=own,
                               among_groups=np.arange(num_real))
    ranks = neighbor_ranks(features[rows], features[:num_real], chosen, own)
    penalty = 2 / (len(rows) * k * (2 * candidates - 3 * k + 1)) * int(np.maximum(ranks - k, 0).sum())
    return LayoutQuality(trustworthiness=1 - penalty, preservation=float((ranks <= k).mean()), num_neighbors=k,
                         num_points=len(rows))
