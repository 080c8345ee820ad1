"""Images in any usual form and format to the pixels that enter the vision tower.

Pillow decodes; HEIC needs pillow-heif (extra `heif`). An image is turned as its EXIF orientation says, brought to
RGB, with what is transparent composited on white, and resized to the processor's size whatever its shape.
Source: transformers, image_transforms.py `convert_to_rgb` and image_processing_pil_siglip.py.
"""

import ctypes
import io
import struct
import threading
import warnings
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from g3n_mlx.config.fields import Fields
from g3n_mlx.failures import BadValue
from g3n_mlx.installation import install_command
from g3n_mlx.media.fetch import fetch, source_text
from g3n_mlx.media.policy import MediaPolicy

if TYPE_CHECKING:
    from PIL import Image as pil

# What Pillow may decode: every extra format exposes another parser to untrusted input.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
_SHOWN_PIXELS = 512  # of an image in a notebook, each side
# A larger image takes up to 16 bytes a pixel while it is decoded: one at a time, whoever sends them.
_LARGE_PIXELS = 8_000_000
_one_large_image = threading.Lock()
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
# What a damaged file makes Pillow raise: OSError, SyntaxError, ValueError and struct.error from its own readers,
# RuntimeError from libavif and libheif, EOFError from libheif. A fuzz test holds the list to that.
_DAMAGED = (OSError, SyntaxError, ValueError, struct.error, RuntimeError, EOFError)


@dataclass(frozen=True, slots=True)
class ImageFeatures:
    """An image as the vision tower reads it."""

    kind: ClassVar[str] = "image"
    pixels: np.ndarray  # uint8 [h, w, 3]
    rescale: float  # what a pixel is multiplied by
    digest: bytes  # of all of the above

    def values(self) -> np.ndarray:
        """The tower's input, float32 [h, w, 3]."""
        return self.pixels.astype(np.float32) * np.float32(self.rescale)


class Image:
    """An image for a message: a path, bytes, a PIL image, an array, a `data:` URI or an http(s) URL.

    An array is [h, w], [h, w, 1], [h, w, 3] or [h, w, 4], uint8 or floats from 0 to 1. Files are opened when the
    message is first used. Raises ValueError when the source is none of these, or an array's shape or values are wrong.
    """

    def __init__(self, source: "str | Path | bytes | np.ndarray | pil.Image") -> None:
        if isinstance(source, np.ndarray):
            source = _pixels_of(source)
        elif not isinstance(source, str | Path | bytes) and not _is_pil(source):
            raise BadValue(
                f"an image is of type {type(source).__name__}, expected a path, bytes, a PIL image, an array or a URL"
            )
        self._source = source

    def __repr__(self) -> str:
        source = self._source
        if isinstance(source, str | Path | bytes | np.ndarray):
            return f"Image({source_text(source)})"
        return f"Image({source.mode}, {source.width} × {source.height})"

    def _repr_png_(self) -> bytes:
        """What a notebook shows: the image as the model would get it, at most 512 pixels wide and high."""
        from PIL import Image as pil

        shown = pil.fromarray(self.rgb(MediaPolicy()))
        shown.thumbnail((_SHOWN_PIXELS, _SHOWN_PIXELS))
        png = io.BytesIO()
        shown.save(png, "PNG")
        return png.getvalue()

    def rgb(self, policy: MediaPolicy, height: int = 0, width: int = 0) -> np.ndarray:
        """The image upright and without transparency, uint8 [h, w, 3].

        height, width: what it will be resized to; a large image may come smaller than it is, but twice that at least.
        Raises ValueError when it can't be fetched, is no image, is damaged or has too many pixels.
        """
        source = fetch(self._source, policy) if isinstance(self._source, str | Path) else self._source
        with _pillow_is_quiet:
            image = _opened(source)
            if image.width * image.height > policy.max_pixels:
                size = f"{image.width} × {image.height}"
                raise BadValue(f"{_too_many_pixels(policy.max_pixels)}: it is {size}")
            if image.width * image.height == 0:
                raise BadValue(f"the image has no pixels: it is {image.width} × {image.height}")
            if max(image.size) > policy.max_side:
                raise BadValue(
                    f"the image is {image.width} × {image.height}, longer than {policy.max_side:,} pixels, "
                    "the most that is decoded"
                )
            if image.width * image.height <= _LARGE_PIXELS:
                with _damage_named():
                    return _to_rgb(_upright(image))
            with _one_large_image:
                policy.check_time()
                try:
                    with _damage_named():
                        return _to_rgb(_reduced(image, height, width))
                finally:
                    del image
                    _give_memory_back()


@dataclass(frozen=True, slots=True)
class ImageProcessing:
    """How pixels are prepared for the tower: the image part of preprocessor_config.json."""

    height: int
    width: int
    resample: int  # Pillow's number of the filter; 2 is bilinear
    rescale: float

    @staticmethod
    def from_dict(raw: dict[str, Any], where: str) -> "ImageProcessing":
        """Reads preprocessor_config.json; raises ValueError naming the key that is missing or not supported."""
        fields = Fields(raw, where)
        size = fields.get("size")
        if not isinstance(size, dict):
            raise BadValue(f"{where}: size is {size!r}, expected an object with height and width")
        sides = Fields(size, f"{where}, size")
        for key, expected in {"do_resize": True, "do_normalize": False}.items():
            if fields.get(key) is not expected:
                raise BadValue(f"{where}: {key} is {fields.get(key)!r}, only {expected} is supported")
        if raw.get("do_center_crop"):
            raise BadValue(f"{where}: do_center_crop is {raw['do_center_crop']!r}, only false is supported")
        resample = fields.integer("resample")
        if resample > 5:
            raise BadValue(f"{where}: resample is {resample}, expected the number of a Pillow filter, 0 to 5")
        return ImageProcessing(
            height=sides.integer("height", at_least=1),
            width=sides.integer("width", at_least=1),
            resample=resample,
            rescale=fields.number("rescale_factor") if fields.get("do_rescale") else 1.0,
        )

    def features(self, rgb: np.ndarray) -> ImageFeatures:
        """An image, uint8 [h, w, 3], at the tower's size; its aspect is not kept."""
        from PIL import Image as pil

        resized = pil.fromarray(rgb).resize((self.width, self.height), pil.Resampling(self.resample))
        pixels = np.asarray(resized)
        digest = blake2b(repr((pixels.shape, self.rescale)).encode(), digest_size=32, person=b"image")
        digest.update(pixels.tobytes())
        return ImageFeatures(pixels, self.rescale, digest.digest())


def _is_pil(source: Any) -> bool:
    from PIL import Image as pil

    return isinstance(source, pil.Image)


def _pixels_of(array: np.ndarray) -> np.ndarray:
    """An array of a user's, checked, as uint8 [h, w] or [h, w, 3 or 4]."""
    if 0 in array.shape:
        raise BadValue(f"an image array has the shape {array.shape}, which holds no pixels")
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise BadValue(f"an image array has the shape {array.shape}, expected [h, w] or [h, w, 1, 3 or 4]")
    if np.issubdtype(array.dtype, np.floating):
        if not (array.min() >= 0 and array.max() <= 1):  # false for NaN too
            raise BadValue(
                f"an image array has values from {array.min():g} to {array.max():g}, "
                "expected floats from 0 to 1, or uint8"
            )
        array = np.rint(array * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise BadValue(f"an image array is {array.dtype}, expected uint8, or floats from 0 to 1")
    # A copy: the caller may fill the array with the next image before this one is opened.
    return np.array(array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array, order="C")


def _opened(source: "bytes | np.ndarray | pil.Image") -> "pil.Image":
    """Pillow's image, of which a file's header has been read."""
    from PIL import Image as pil

    if isinstance(source, np.ndarray):
        return pil.fromarray(source)
    if not isinstance(source, bytes):
        return source
    if not source:
        raise BadValue("the image has no bytes")
    heif = source[4:8] == b"ftyp" and source[8:12] in _HEIF_BRANDS
    if heif:
        _register_heif()
    with _damage_named():
        return pil.open(io.BytesIO(source), formats=["HEIF"] if heif else FORMATS)


@contextmanager
def _damage_named() -> Generator[None]:
    """Pillow's errors about a file as one ValueError."""
    from PIL import Image as pil

    try:
        yield
    except pil.UnidentifiedImageError:
        raise BadValue(f"not an image in one of the formats {', '.join(FORMATS)}, HEIC, or damaged") from None
    except pil.DecompressionBombError:
        assert pil.MAX_IMAGE_PIXELS is not None
        raise BadValue(_too_many_pixels(2 * pil.MAX_IMAGE_PIXELS)) from None
    except _DAMAGED as error:
        raise BadValue(f"the image is damaged: {' '.join(str(error).split()) or type(error).__name__}") from None


def _register_heif() -> None:
    try:
        import pillow_heif
    except ImportError:
        raise BadValue(f"the image is HEIC, which needs pillow-heif: {install_command('heif')}") from None
    pillow_heif.register_heif_opener()


class _QuietPillow:
    """Ignores Pillow's warnings while any thread decodes: of odd metadata, and of sizes that the policy allows.

    `warnings.catch_warnings` alone would leave the wrong filters behind when two threads overlap.
    """

    def __init__(self) -> None:
        self._lock, self._inside, self._filters = threading.Lock(), 0, warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._filters = warnings.catch_warnings()
                self._filters.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\.")

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._filters.__exit__(None, None, None)


_pillow_is_quiet = _QuietPillow()


def _reduced(image: "pil.Image", height: int, width: int) -> "pil.Image":
    """A large image upright, with as few pixels as twice `height` and `width` need; all of them if those are 0."""
    if not height or not width:
        return _upright(image)
    side = 2 * max(height, width)
    image.draft(None, (side, side))  # of JPEG, which is then decoded to a fraction of its size
    image = _upright(image)
    factors = (max(1, image.width // side), max(1, image.height // side))
    if factors == (1, 1) or image.mode not in ("L", "RGB", "RGBA", "CMYK"):
        return image
    return image.reduce(factors)


def _upright(image: "pil.Image") -> "pil.Image":
    """The image turned as its EXIF orientation says."""
    from PIL import ImageOps

    image.load()  # or it would be copied where nothing is to be turned
    ImageOps.exif_transpose(image, in_place=True)
    return image


def _give_memory_back() -> None:
    """Lets glibc return what a large image took; elsewhere the system's allocator does so by itself."""
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _to_rgb(image: "pil.Image") -> np.ndarray:
    from PIL import Image as pil

    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _deep_grey_to_rgb(np.asarray(image))
    if image.mode == "La":  # Pillow converts it to nothing else
        image = image.convert("LA")
    if "A" in image.getbands() or "a" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = pil.new("RGBA", image.size, (255, 255, 255, 255))
        image = pil.alpha_composite(white, image)
    return np.asarray(image.convert("RGB"))


def _deep_grey_to_rgb(values: np.ndarray) -> np.ndarray:
    """Grey of more than 8 bits, scaled to 8: integers are of 16 bits, floats run to 1, or to 255 if they pass it.

    Pillow would clip them at 255, and the image would be white.
    """
    if values.dtype.kind == "f":
        if not np.isfinite(values).all():
            raise BadValue("it has pixels that are not finite numbers (NaN or infinity)")
        scale = 255.0 if values.max() <= 1 else 1.0
    else:
        scale = 255 / 65535
    grey = np.rint(np.clip(values * scale, 0, 255)).astype(np.uint8)
    return np.repeat(grey[:, :, None], 3, axis=2)


def _too_many_pixels(limit: int) -> str:
    return f"the image has more than {limit:,} pixels, the most that is decoded"
