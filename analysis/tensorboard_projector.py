"""Write the features of an embedding for the Embedding Projector, a page of TensorBoard that computes its own maps.

`tensorboard --logdir=FOLDER` opens them. The files are written here rather than by SummaryWriter.add_embedding, which
writes 64 million features as text, one by one, keeps pictures as float64, and names a file after host and time.
"""

import io
import math
import os
from pathlib import Path

import numpy as np
import PIL.Image

from analysis.embedding_points import Embedding
from analysis.embedding_table import fact_header, fact_rows, feature_name
from dnnlib.cli import UserError
from dnnlib.files import TEMPORARY, atomic_write
from dnnlib.text import shorten

# The first is the name that TensorBoard looks for; it is written last, since it names the others.
CONFIG, FEATURES, METADATA, SPRITE = "projector_config.pbtxt", "features.bytes", "metadata.tsv", "sprite.jpg"
_LARGEST_SHEET = 8192  # pixels of a side that TensorBoard's page can draw
_BLOCK = 8  # pixels of a side that JPEG codes at a time: sides of tiles are multiples, so that they do not blur
_QUALITY = 85
# Of points without pictures, by set: the palette of Okabe and Ito, which the color-blind tell apart.
_COLORS = ((86, 180, 233), (230, 159, 0), (0, 158, 115), (213, 94, 0), (0, 114, 178), (204, 121, 167))


def check_projector_folder(folder: str | os.PathLike) -> None:
    """Raise UserError unless a folder is new, or holds nothing but files that are to be replaced."""
    path = Path(folder)
    if not path.exists():
        return
    if not path.is_dir():
        raise UserError(f"--tensorboard={folder} is a file; expected a folder: choose another name")
    known = {CONFIG, FEATURES, METADATA, SPRITE}
    others = sorted(file.name for file in path.iterdir() if file.name not in known and not TEMPORARY.match(file.name))
    if others:
        raise UserError(f"--tensorboard={folder} holds other files ({shorten(others)}); expected a new or empty "
                        "folder, or one that this command wrote: choose another")


def write_projector_files(folder: str | os.PathLike, embedding: Embedding, features: np.ndarray) -> None:
    """Write features, facts and pictures of all points; the same bytes for the same arguments. Raises OSError.

    folder:    made if it is missing
    features:  float32 [N, F]

    Raises UserError as `check_projector_folder` does.
    """
    # Here: importing them takes 0.3 s.
    from google.protobuf import text_format
    from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig

    check_projector_folder(folder)
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    # LIMIT: TensorBoard recognizes these bytes by their not being UTF-8, as features of all images hardly are.
    _write(path / FEATURES, np.ascontiguousarray(features, dtype="<f4").tobytes())
    lines = ["\t".join(map(_in_one_line, row))
             for row in [fact_header(embedding.points), *fact_rows(embedding.points)]]
    _write(path / METADATA, "".join(f"{line}\n" for line in lines).encode(errors="backslashreplace"))
    sheet, side = _sprite(embedding)
    _write(path / SPRITE, sheet)
    config = ProjectorConfig()
    info = config.embeddings.add(tensor_name=feature_name(embedding) or "features", tensor_path=FEATURES,
                                 metadata_path=METADATA, tensor_shape=features.shape)
    info.sprite.image_path = SPRITE
    info.sprite.single_image_dim.extend([side, side])
    _write(path / CONFIG, text_format.MessageToString(config).encode())


def _sprite(embedding: Embedding) -> tuple[bytes, int]:
    """Return all points side by side in a square, a JPEG, and the side of a tile in pixels."""
    count, thumbnails = len(embedding.points), embedding.thumbnails
    columns = max(math.ceil(math.sqrt(count)), 1)
    side = max(min(thumbnails.shape[1], _LARGEST_SHEET // columns) // _BLOCK, 1) * _BLOCK
    sheet = np.zeros((columns, side, columns, side, 3), dtype=np.uint8)
    rows, places = np.divmod(np.arange(count), columns)
    colors = np.array(_COLORS, dtype=np.uint8)[embedding.points.set_numbers % len(_COLORS)]
    sheet[rows, :, places] = colors[:, None, None]
    for point, thumbnail in zip(embedding.pictured.tolist(), thumbnails, strict=True):
        picture = PIL.Image.fromarray(thumbnail)
        if picture.width != side:
            picture = picture.resize((side, side), PIL.Image.Resampling.BOX)
        sheet[rows[point], :, places[point]] = np.asarray(picture)
    with io.BytesIO() as file:
        PIL.Image.fromarray(sheet.reshape(columns * side, columns * side, 3)).save(
            file, "jpeg", quality=_QUALITY, subsampling=0)
        return file.getvalue(), side


def _in_one_line(text: str) -> str:
    """Return a text without tabs and line breaks, which separate the fields of the file."""
    return " ".join(text.split())


def _write(path: Path, content: bytes) -> None:
    with atomic_write(path) as file:
        file.write(content)
