"""Make the parts of a small study in tests, and synthetic sets for it."""

from analysis.make_protocol import ProtocolRequest, make_protocol
from imagesets.pixel_hashes import hash_set, read_pixel_hashes
from imagesets.reader import ImageSet
from tests.helpers.make_sets import make_set

CLASSES = ["nv", "mel"]
# Numbers of the images of each part, as tests.helpers.make_sets.pixels_of knows them; two images have one lesion.
ROWS = {"train": range(16), "val": range(16, 24), "test": range(24, 32), "isic": range(32, 40)}


def make_part(path, images, *, classes=CLASSES, lesion="lesion{}", **changes):
    """Write a set of these images; half of the lesions, of two images each, are of the second class."""
    images = list(images)
    settings = {"labels": [image // 2 % 2 for image in images], "classes": classes, "images": images,
                "groups": [lesion.format(image // 2) for image in images], **changes}
    return make_set(path, **settings)


def make_parts(folder, **changes):
    """Write train.zip, val.zip, test.zip and isic.zip; return the paths as strings by name. changes: of all"""
    return {name: str(make_part(folder / f"{name}.zip", rows, **changes)) for name, rows in ROWS.items()}


def protocol_of(paths, **changes):
    """Return the protocol of these parts, which is not written; melanoma against the rest."""
    request = {"positive": "mel", "external": [paths["isic"]], **changes}
    return make_protocol(ProtocolRequest(train=paths["train"], val=paths["val"], test=paths["test"], **request),
                         "protocol.json")


def data_of(*paths):
    """Return what a network records that was trained on these sets together."""
    hashes = [one for path in paths for one in read_pixel_hashes(ImageSet(path))]
    return {"pixels_sha256": hash_set(hashes), "num_images": len(hashes), "num_groups": None}


def make_synthetic(path, source, *, images=range(100, 108), **changes):
    """Write a set as generate.py does. source: what differs from that of a network without a record; None = a set of
    unknown origin"""
    origin = None if source is None else {"generated": True, "network": "net.safetensors", **source}
    return str(make_part(path, images, lesion="s{}", **{"groups": None, "source": origin, **changes}))
