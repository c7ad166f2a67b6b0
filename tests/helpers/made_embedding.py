"""An embedding that is made up: of any size, with pictures that look like lesions, and numbers beside the map."""

import numpy as np
from scipy.ndimage import gaussian_filter
from scipy.spatial import cKDTree

from analysis.embedding_mixture import ALL, MixtureRow, PurityRow, Region, SetMixture
from analysis.embedding_points import (
    PROJECTED,
    REAL,
    SYNTHETIC,
    Column,
    Embedding,
    Layout,
    LayoutQuality,
    NearestReals,
    Points,
    PointSet,
)
from metrics.intervals import Interval
from tests.helpers.html_pages import HOSTILE

# Ends of elements, a placeholder of the page, line breaks of JavaScript, an emoji, and a byte that is not UTF-8.
NASTY = f"{HOSTILE}</style></title>{{{{report}}}} \u2028\u2029\n\U0001f600\udcff"
CLASSES = ("nv", "mel", "bkl", "bcc", "akiec", "vasc", "df")
WHY_NOT = "its dataset.json does not record that its pictures may be shown."
_CENTERS = np.random.RandomState(1).randn(len(CLASSES), 2) * 6


def make_interval(estimate, reach=0.05):
    return Interval(estimate=estimate, low=estimate - reach, high=estimate + reach, level=0.95, std_error=reach / 2,
                    method="random halves of groups", unit="group", num_units={"real": 60})


def make_thumbnails(count, side, seed=0):
    """Draw spots on skin with some texture: uint8 [count, side, side, 3]; 50,000 are coded as small as photographs."""
    random = np.random.RandomState(seed)
    y, x = (np.mgrid[:side, :side] / side - 0.5).astype(np.float32)
    textures = gaussian_filter(random.randn(64, side, side).astype(np.float32), (0, 1.2, 1.2), mode="wrap") * 4
    drawn = np.empty((count, side, side, 3), dtype=np.uint8)
    for start in range(0, count, 1000):
        size = len(drawn[start:start + 1000])
        at = 0.12 * random.randn(2, size, 1, 1).astype(np.float32)
        width = 0.03 + 0.05 * random.rand(2, size, 1, 1).astype(np.float32)
        texture = textures[random.randint(64, size=size)]
        distance = (x - at[0]) ** 2 / width[0] + (y - at[1]) ** 2 / width[1] + 0.1 * texture
        spot = 1 / (1 + np.exp(np.minimum(8 * (distance - 0.6), 50)))[..., None]
        skin = np.array([225, 180, 160], dtype=np.float32) + 6 * random.randn(size, 1, 1, 3).astype(np.float32)
        dark = np.array([90, 100, 110], dtype=np.float32) + 12 * random.randn(size, 1, 1, 3).astype(np.float32)
        drawn[start:start + 1000] = np.clip(skin - dark * spot + 7 * texture[..., None], 0, 255)
    return drawn


def make_embedding(num_real=60, num_synthetic=30, num_projected=20, *, side=16, hidden=(REAL,), nasty="", seed=0):
    """Return an embedding of three sets, of which empty ones are left out; two real images each show one lesion.

    hidden:  kinds of sets that are dots
    nasty:   is appended to names, classes, groups, titles and sentences
    """
    random = np.random.RandomState(seed)
    sets = []
    for kind, count in ((REAL, num_real), (SYNTHETIC, num_synthetic), (PROJECTED, num_projected)):
        if count:
            labels = np.sort(random.randint(len(CLASSES), size=count))
            sets.append(PointSet(
                name=f"{kind}.zip{nasty}", kind=kind, images=None, shows_pictures=kind not in hidden,
                names=[f"{index // 1000:05d}/img{index:08d}.png{nasty}" for index in range(count)],
                classes=[f"{CLASSES[label]}{nasty}" for label in labels],
                groups=[None if kind == SYNTHETIC else f"HAM_{index // 2:07d}{nasty}" for index in range(count)],
                why_not=f"{WHY_NOT}{nasty}" if kind in hidden else ""))
    bare = Points(sets=sets)
    count = len(bare)
    kinds = [one.kind for one in sets for _ in one.names]
    columns = [
        Column(key="class", title="class", values=bare.classes), Column(key="source", title="source", values=kinds),
        Column(key="set", title="set", values=[one.name for one in sets for _ in one.names]),
        Column(key="localization", title=f"localization{nasty}",
               values=[("back", "face", "", f"lower leg{nasty}")[code] for code in random.randint(4, size=count)]),
        Column(key="age", title="age", values=np.where(random.rand(count) < 0.1, np.nan, random.randint(5, 90, count)))]
    points = Points(sets=sets, columns=columns)
    labels = [CLASSES.index(name.removesuffix(nasty)) for name in points.classes]
    places = _CENTERS[labels] + random.randn(count, 2)
    distances, rows = cKDTree(places[:num_real]).query(places, k=6)
    own = np.arange(count)[:, None] // 2 == rows // 2  # of one lesion
    own[num_real:] = False
    kept = np.argsort(own, axis=1, kind="stable")[:, :5]
    nearest = NearestReals(rows=np.take_along_axis(np.where(own, -1, rows), kept, 1),
                           distances=np.take_along_axis(np.where(own, np.nan, distances), kept, 1))
    quality = LayoutQuality(trustworthiness=0.95, preservation=0.4, num_neighbors=10, num_points=num_real)
    layouts = [Layout(key=key, title=f"{title}{nasty}", coordinates=coordinates, real=quality,
                      placed=quality if count > num_real else None, note=f"made up{nasty}")
               for key, title, coordinates in (("tsne", "t-SNE", places),
                                               ("pca", "PCA", places @ [[1, 0.5], [0, 0.3]]))]
    pictured = np.flatnonzero([one.shows_pictures for one in sets for _ in one.names])
    return Embedding(title=f"A map{nasty}", points=points, layouts=layouts, nearest=nearest,
                     thumbnails=make_thumbnails(len(pictured), side, seed), pictured=pictured,
                     settings={"features": {"name": "efficientnet-lite0", "weights": "ab" * 32}, "seed": seed})


def make_purity(share=0.7):
    """Return the purity of all images, of one class, and of one with too few images."""
    return [PurityRow(name=ALL, num_images=60, num_groups=30, expected=0.25, share=make_interval(share)),
            PurityRow(name="nv", num_images=40, num_groups=20, expected=0.5, share=make_interval(share + 0.1)),
            PurityRow(name="df", num_images=2, num_groups=1, expected=0.03, share=None, why_not="too few images")]


def make_mixtures(embedding, share=0.2, nasty=""):
    """Return what neighbors say about each set that is not real. share: of 1/3 expected"""
    points = embedding.points
    mixtures = []
    for number, one in enumerate(points.sets):
        if one.kind == REAL:
            continue
        rows = points.rows_of(number)
        regions = [Region(rows=list(range(start, start + 10)), radius=1.5, found=start // 10, expected=4.5,
                          nearest=int(rows[start]), nearest_distance=2.5,
                          classes=[(f"nv{nasty}", 7), ("", 3)]) for start in (0, 10)]
        mixtures.append(SetMixture(
            set_number=number, num_neighbors=10, purity=make_purity(0.5) if one.kind == SYNTHETIC else [],
            rows=[MixtureRow(name=ALL, num_real=points.num_real, num_groups=points.num_real // 2,
                             num_others=len(one), expected=1 / 3, share=make_interval(share)),
                  MixtureRow(name=f"df{nasty}", num_real=2, num_groups=1, num_others=1, expected=0.3, share=None,
                             why_not=f"there are too few images{nasty}")],
            regions=regions, region_size=10, empty_share=make_interval(0.4), matched_share=0.3, control_share=0.01,
            num_matched=25))
    return mixtures
