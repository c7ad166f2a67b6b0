"""Run `study.py embed` in this process on small sets of phantoms, and read what it writes."""

import base64
import csv
import io
import json
import re
from pathlib import Path

import numpy as np
import PIL.Image
import torch

from generation.image_generator import ImageGenerator, SynthesisSettings, save_projected_w
from generation.labeled_set import SetContents, write_labeled_set
from imagesets.phantoms.make import render_phantom
from imagesets.pixel_hashes import hash_pixels
from imagesets.reader import channels_first
from imagesets.writer import ImageSetWriter
from tests.helpers.html_pages import Tags
from tests.helpers.make_sets import make_set, png
from tests.helpers.small_studies import study
from tests.helpers.training_runs import replaced
from torch_utils.distributed import Processes

CLASSES = ("nv", "mel", "bkl")
SIDE = 16
OPEN = {"redistribution": True}
GENERATED = {"generated": True, "network": "net.safetensors", "network_sha256": "ab" * 32}
PROJECTIONS = {**GENERATED, "projected": True}
USUAL = ("--features=random-conv", "--maps=tsne,pca", "--workers=1", "--device=cpu", "--tune-malloc=0", "--no-cache",
         "--verbose=0")
ALONE = Processes(rank=0, count=1, device=torch.device("cpu"))
RED, GREEN, BLUE = (0, 1, 2), (1, 0, 2), (2, 1, 0)  # orders of channels, skin being red


def draw(row, colors=RED, noise=0.0):
    """Return a phantom by number, uint8 [SIDE, SIDE, 3]: two of a lesion, and as many of each class.

    colors:  order of the channels; None = another one for each class
    """
    colors = (RED, GREEN, BLUE)[class_of(row)] if colors is None else colors
    pixels = render_phantom(0, row, class_name=CLASSES[class_of(row)], resolution=SIDE, lesion_number=row // 2)[0]
    noisy = pixels[..., list(colors)] + np.random.default_rng(row).normal(0, noise, pixels.shape)
    return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)


def class_of(row):
    return row // 2 % len(CLASSES)


def write_drawings(path, rows, *, source=None, groups=False, classes=CLASSES, **look):
    """Write phantoms as a data set. groups: name the lesion of each; look: as for `draw`"""
    path.parent.mkdir(exist_ok=True)
    with ImageSetWriter(path, classes=list(classes), source=source) as writer:
        for row in rows:
            pixels = draw(row, **look)
            writer.add(png(pixels), class_of(row), f"lesion{row // 2}" if groups else None,
                       hash_pixels(channels_first(pixels)))
    return path


def link_sets(sets, folder):
    """Give a folder the sets of another one, so that a test names them as they are there."""
    for path in sets.iterdir():
        (folder / path.name).symlink_to(path)


def make_sets(folder):
    """Write sets whose pictures can be told apart: green real images, blue projections of them, red synthetic ones.

    open.zip may be redistributed, real.zip has no record of it but the same images, more.zip others.
    """
    write_drawings(folder / "open.zip", range(120), source=OPEN, groups=True, colors=GREEN)
    write_drawings(folder / "real.zip", range(120), groups=True, colors=GREEN)
    write_drawings(folder / "more.zip", range(130, 160), source=OPEN, groups=True, colors=GREEN)
    write_drawings(folder / "synthetic.zip", range(200, 260), source=GENERATED)
    write_drawings(folder / "other.zip", range(300, 318), source=GENERATED, noise=20)
    write_drawings(folder / "projected" / "projections.zip", range(12), source=PROJECTIONS, groups=True, colors=BLUE)
    return folder


def write_generated(path, network, counts=(3, 4), first=7, **settings):
    """Write images of a network of two classes as generate.py --zip does."""
    generator = ImageGenerator(network.G, SynthesisSettings(**settings), batch=1)
    write_labeled_set(path, network, generator, SetContents(
        first_seed=first, count=sum(counts), counts=counts, piece=2), ALONE)


def write_projections(path, w, network, *, groups=None, sha256=None):
    """Write a set of images that counts as projections, and their styles beside it: float32 [n, L, K]."""
    groups = groups or [f"lesion{index}" for index in range(len(w))]
    make_set(path, len(w), groups=groups, source={
        "generated": True, "projected": True, "network": network.name, "network_sha256": sha256 or network.sha256,
        "redistribution": True})
    save_projected_w(path.with_name("latents.npz"), w, group=np.array(groups))


def embed_arguments(sets, *flags, out="map.html"):
    """Return the arguments of study.py; flags replace the usual ones."""
    return ["embed", f"--sets={','.join(map(str, sets))}", *replaced([*USUAL, f"--out={out}"], flags)]


def embed(sets, *flags, **options):
    """Run the command as `embed_arguments` gives it; return the exit code."""
    return study(*embed_arguments(sets, *flags, **options))


class Written:
    """What a map's page and its file of numbers hold."""

    def __init__(self, path="map.html"):
        path = Path(path)
        self.text = path.read_text(encoding="utf-8")
        self.page = Tags(self.text)
        self.data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', self.text)[1])
        self.record = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))

    def column(self, key):
        """Return the values of a column: a list of texts, "" = missing, or float32 [N]."""
        found, = (column for column in self.data["columns"] if column["key"] == key)
        if found["kind"] == "number":
            return numbers(found["data"], "<f4")
        codes, names = numbers(found["codes"], "<u2" if found.get("wide") else "u1"), found["values"]
        return [names[code] if code < len(names) else "" for code in codes.tolist()]

    def places(self, key):
        """Return the coordinates of a map, uint16 [N, 2]."""
        found, = (one for one in self.data["maps"] if one["key"] == key)
        return np.stack([numbers(found[axis], "<u2") for axis in "xy"], axis=1)

    def nearest(self):
        """Return the real images nearest to each point, int32 [N, n]."""
        neighbors = self.data["neighbors"]
        return numbers(neighbors["rows"], "<i4").reshape(-1, neighbors["count"])

    def cells(self):
        """Return all places for pictures on the map's sheets, gray where there are none: uint8 [n, side, side, 3]."""
        about, found = self.data["pictures"], []
        side = about["side"]
        for code in re.findall(r'<script type="text/plain" class="sprite">(.*?)</script>', self.text):
            cells = picture(code).reshape(-1, side, about["perRow"], side, 3).swapaxes(1, 2)
            found += [*cells.reshape(-1, side, side, 3)]
        return found

    def tiles(self):
        """Return the pictures of the map by point: {point: uint8 [side, side, 3]}."""
        cells = self.cells()
        tiles = numbers(self.data["pictures"]["tiles"], "<i4").tolist()
        return {point: cells[tile] for point, tile in enumerate(tiles) if tile >= 0}

    def pictures(self):
        """Return the pictures of the tables below the map."""
        sources = [attributes["src"] for attributes in self.page.all("img")]
        assert all(source.startswith("data:image/webp;base64,") for source in sources)
        return [picture(source.partition(",")[2]) for source in sources]


def numbers(text, kind):
    return np.frombuffer(base64.b64decode(text), kind)


def picture(code):
    """Decode base64 of an image: uint8 [H, W, 3]."""
    return np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(code))).convert("RGB"))


def color_of(pixels):
    """Return the channel that is brightest on average: 0 is red; None of a gray picture."""
    means = pixels.reshape(-1, 3).mean(axis=0)
    return None if np.ptp(means) < 2 else int(means.argmax())


def rows_of(path):
    """Return the rows of a CSV file as dicts."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
