"""Images in real files, for tests."""

import io

import numpy as np
import pytest
from PIL import Image as pil


def drawn(height: int = 40, width: int = 60) -> np.ndarray:
    """A picture that looks different when it is turned or mirrored, uint8 [h, w, 3]."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    pixels = np.stack([255 * x, 255 * y, 255 * (1 - x) * (1 - y)], axis=-1).astype(np.uint8)
    pixels[: height // 4, : width // 3] = (250, 40, 30)
    return pixels


def encoded(picture: np.ndarray | pil.Image, kind: str, **options) -> bytes:
    """The bytes of an image file of a kind that Pillow writes, or HEIF."""
    if kind == "HEIF":
        pytest.importorskip("pillow_heif").register_heif_opener()
    buffer = io.BytesIO()
    picture = pil.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    picture.save(buffer, kind, **options)
    return buffer.getvalue()
