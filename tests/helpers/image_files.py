"""Image files that the tests of imagesets make."""

import io
import struct
import zlib

import numpy as np
import PIL.Image


def encode(pixels, image_format="PNG", **options) -> bytes:
    """Return an image, or uint8 pixels, as a file of this format."""
    image = pixels if isinstance(pixels, PIL.Image.Image) else PIL.Image.fromarray(np.asarray(pixels))
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def read_png(data: bytes) -> np.ndarray:
    """Return the pixels of a PNG: [H, W] or [H, W, 3]."""
    with PIL.Image.open(io.BytesIO(data)) as image:
        assert image.format == "PNG"
        return np.asarray(image)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_16_bit(values: np.ndarray) -> bytes:
    """Return a 16-bit PNG, which Pillow cannot write in color: values [H, W, C], C = 1 L, 2 LA, 3 RGB, 4 RGBA."""
    height, width, channels = values.shape
    rows = values.astype(">u2").reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    return (b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", body) + png_chunk(b"IEND", b""))


def lesion_like(width: int, height: int, seed: int = 0) -> np.ndarray:
    """Return uint8 [H, W, 3]: a brown spot with an uneven edge on skin, with fine noise."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32) / min(width, height)
    dx, dy = x - x.max() / 2, y - y.max() / 2
    angle = np.arctan2(dy, dx)
    edge = 0.25 + 0.04 * np.sin(3 * angle + 1) + 0.03 * np.cos(7 * angle)
    spot = 1 / (1 + np.exp((np.hypot(dx, dy) - edge) * 60))
    skin, brown = np.array([224, 172, 150], np.float32), np.array([105, 62, 45], np.float32)
    texture = 8 * np.sin(40 * x) * np.sin(35 * y) + random.normal(0, 3, (height, width)).astype(np.float32)
    pixels = skin + spot[..., None] * (brown - skin) + texture[..., None]
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)
