"""Pictures in every form and format, upright and opaque; the processor's pixels; and what is no picture."""

import base64
import contextlib
import io
import struct
import sys
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import drawn, encoded
from PIL import Image as pil

from g3n_mlx.config.fields import read_json
from g3n_mlx.installation import install_command
from g3n_mlx.media.image import Image, ImageProcessing
from g3n_mlx.media.policy import MediaPolicy

ANY = MediaPolicy()
PROCESSING = ImageProcessing(height=192, width=192, resample=2, rescale=1 / 255)
GOLDEN = Path(__file__).parents[1] / "golden" / "image_processing.npz"
NAMES = sorted({name.rpartition(".")[0] for name in np.load(GOLDEN).files})
# How the mean of a picture may differ for its format: lossless, a palette, JPEG's and AVIF's losses.
FORMATS = {
    "PNG": ({}, 0),
    "BMP": ({}, 0),
    "TIFF": ({"compression": "tiff_lzw"}, 0),
    "WEBP": ({"lossless": True}, 0),
    "GIF": ({}, 6),
    "JPEG": ({"quality": 95, "subsampling": 0}, 3),
    "AVIF": ({"quality": 95}, 3),
    "HEIF": ({"quality": 95}, 3),
}


def rgb(source, policy: MediaPolicy = ANY) -> np.ndarray:
    return Image(source).rgb(policy)


def refused(source, policy: MediaPolicy = ANY) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - each caller reads the message
        rgb(source, policy)
    message = str(caught.value)
    assert "\n" not in message
    return message


# The processor.


@pytest.mark.parametrize("name", NAMES)
def test_goldens(golden_arrays, name):
    golden = golden_arrays("image_processing")
    picture = rgb(golden[f"{name}.png"].tobytes())
    np.testing.assert_array_equal(picture, golden[f"{name}.rgb"])
    features = PROCESSING.features(picture)
    ours = features.pixels.transpose(2, 0, 1)
    np.testing.assert_array_equal(ours, golden[f"{name}.pixels_pil"])
    assert np.abs(ours.astype(int) - golden[f"{name}.pixels_torchvision"]).max() <= 1
    np.testing.assert_allclose(features.values(), features.pixels / 255, rtol=1e-6)
    assert features.values().dtype == np.float32


def test_the_digest_is_of_the_content():
    first = PROCESSING.features(drawn())
    assert PROCESSING.features(drawn()).digest == first.digest
    changed = drawn()
    changed[-1, -1] += 100
    assert PROCESSING.features(changed).digest != first.digest


def test_processing_reads_the_checkpoints_numbers(tiny_folder):
    raw = read_json(tiny_folder / "preprocessor_config.json")
    processing = ImageProcessing.from_dict(raw, "preprocessor_config.json")
    assert (processing.height, processing.width) == (raw["size"]["height"], raw["size"]["width"])
    other = ImageProcessing.from_dict({**raw, "size": {"height": 96, "width": 160}}, "preprocessor_config.json")
    assert other.features(drawn()).pixels.shape == (96, 160, 3)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"size": 192}, "size is 192"),
        ({"size": {"height": 0, "width": 192}}, "height is 0"),
        ({"size": {"width": 192}}, "height"),
        ({"do_normalize": True}, "do_normalize is True, only False is supported"),
        ({"do_resize": False}, "do_resize is False"),
        ({"do_center_crop": True}, "do_center_crop"),
        ({"resample": 9}, "resample is 9"),
        ({"rescale_factor": "a"}, "rescale_factor"),
    ],
)
def test_a_processor_that_is_not_supported(tiny_folder, change, expected):
    raw = {**read_json(tiny_folder / "preprocessor_config.json"), **change}
    with pytest.raises(ValueError, match=r"preprocessor_config\.json") as caught:
        ImageProcessing.from_dict(raw, "preprocessor_config.json")
    assert expected in str(caught.value)


# Forms.


def test_every_form(tmp_path):
    pixels = drawn()
    data = encoded(pixels, "PNG")
    path = tmp_path / "a picture.png"
    path.write_bytes(data)
    uri = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    with pil.open(path) as opened:
        for source in (str(path), path, data, pil.fromarray(pixels), opened, pixels, uri, path.as_uri()):
            np.testing.assert_array_equal(rgb(source), pixels)


def test_arrays():
    pixels = drawn()
    grey = pixels[:, :, 0]
    np.testing.assert_array_equal(rgb(grey), np.repeat(grey[:, :, None], 3, axis=2))
    np.testing.assert_array_equal(rgb(grey[:, :, None]), rgb(grey))
    np.testing.assert_array_equal(rgb(pixels / 255), pixels)
    np.testing.assert_array_equal(rgb((pixels / 255).astype(np.float16)), pixels)
    np.testing.assert_array_equal(rgb(pixels[::-1, ::2]), pixels[::-1, ::2])  # not contiguous
    clear = np.dstack([pixels, np.zeros(pixels.shape[:2], np.uint8)])
    assert (rgb(clear) == 255).all()


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.zeros((0, 4, 3), np.uint8), "the shape (0, 4, 3), which holds no pixels"),
        (np.zeros(7, np.uint8), "the shape (7,)"),
        (np.zeros((4, 4, 2), np.uint8), "the shape (4, 4, 2)"),
        (np.zeros((1, 4, 4, 3), np.uint8), "the shape (1, 4, 4, 3)"),
        (np.zeros((4, 4, 3), np.int64), "int64, expected uint8"),
        (np.full((4, 4, 3), np.nan), "from nan to nan"),
        (np.full((4, 4, 3), np.inf), "from inf to inf"),
        (np.full((4, 4, 3), 255.0), "from 255 to 255, expected floats from 0 to 1"),
        (np.full((4, 4, 3), -0.5), "expected floats from 0 to 1"),
    ],
)
def test_arrays_that_are_no_pictures(array, expected):
    with pytest.raises(ValueError, match="an image array") as caught:
        Image(array)
    assert expected in str(caught.value)


@pytest.mark.parametrize("source", [None, 7, ["a.png"], {"url": "a.png"}, io.BytesIO(b"")])
def test_sources_that_are_no_pictures(source):
    with pytest.raises(ValueError, match=f"an image is of type {type(source).__name__}, expected a path, bytes"):
        Image(source)


# Formats.


@pytest.mark.parametrize("kind", FORMATS)
def test_formats(kind):
    options, tolerance = FORMATS[kind]
    ours = rgb(encoded(drawn(), kind, **options)).astype(int)
    assert ours.shape == drawn().shape
    assert np.abs(ours - drawn()).mean() <= tolerance


def test_the_content_says_the_format_not_the_name(tmp_path):
    for name in ("picture.jpg", "picture", "picture.wav"):
        (tmp_path / name).write_bytes(encoded(drawn(), "PNG"))
        np.testing.assert_array_equal(rgb(tmp_path / name), drawn())


def test_several_pictures_in_a_file_are_the_first_one():
    first, second = pil.fromarray(drawn()), pil.new("RGB", (60, 40), (0, 0, 0))
    for kind in ("GIF", "TIFF", "WEBP", "PNG", "MPO"):  # MPO is what phones write as JPEG
        ours = rgb(encoded(first, kind, save_all=True, append_images=[second])).astype(int)
        assert np.abs(ours - drawn()).mean() < 8, kind


# Orientation 1 to 8 of EXIF, as turns and mirrorings of the stored pixels that make the picture upright again.
STORED = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.transpose(1, 0, 2),
    6: lambda p: np.rot90(p, 1),
    7: lambda p: p[::-1, ::-1].transpose(1, 0, 2),
    8: lambda p: np.rot90(p, -1),
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_orientation(kind, orientation):
    exif = pil.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(STORED[orientation](drawn()))
    options = {**FORMATS[kind][0], "exif": exif}
    ours = rgb(encoded(stored, kind, **options)).astype(int)
    assert ours.shape == drawn().shape
    assert np.abs(ours - drawn()).mean() <= FORMATS[kind][1]


def test_orientation_of_heic():
    """pillow-heif turns the picture itself; it must not be turned twice."""
    exif = pil.Exif()
    exif[0x0112] = 6
    ours = rgb(encoded(np.ascontiguousarray(np.rot90(drawn(), 1)), "HEIF", quality=95, exif=exif.tobytes()))
    assert ours.shape == drawn().shape
    assert np.abs(ours.astype(int) - drawn()).mean() <= 3


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "AVIF"])
def test_transparency_is_white(kind):
    alpha = np.zeros((40, 60), np.uint8)
    alpha[:, 30:] = 255
    ours = rgb(encoded(np.dstack([drawn(), alpha]), kind, **FORMATS[kind][0])).astype(int)
    assert (ours[:, :28] > 248).all()
    assert np.abs(ours[:, 32:] - drawn()[:, 32:]).mean() <= FORMATS[kind][1]


def test_other_ways_to_be_transparent():
    palette = pil.fromarray(drawn()).quantize(8)
    corner = palette.getpixel((0, 0))
    for kind in ("PNG", "GIF"):
        assert (rgb(encoded(palette, kind, transparency=corner))[0, 0] == 255).all(), kind
    key = tuple(int(value) for value in drawn()[0, 0])
    assert (rgb(encoded(drawn(), "PNG", transparency=key))[0, 0] == 255).all()
    assert (rgb(pil.new("LA", (3, 3), (0, 0))) == 255).all()
    half = rgb(pil.new("RGBA", (3, 3), (0, 0, 0, 128)))
    assert (np.abs(half.astype(int) - 127) <= 1).all()


def test_sixteen_bits():
    """Pillow alone would clip them, and the picture would be white."""
    grey = np.linspace(0, 65535, 40 * 60).reshape(40, 60).astype(np.uint16)
    expected = np.repeat(np.rint(grey / 257).astype(int)[:, :, None], 3, axis=2)
    for kind in ("PNG", "TIFF"):
        assert np.abs(rgb(encoded(pil.fromarray(grey), kind)).astype(int) - expected).max() <= 1
    floats = pil.fromarray((grey / 65535).astype(np.float32))
    assert np.abs(rgb(encoded(floats, "TIFF")).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_pixels_that_are_no_numbers(value, recwarn):
    floats = np.full((4, 6), 0.5, np.float32)
    floats[1, 2] = value
    for source in (pil.fromarray(floats), encoded(pil.fromarray(floats), "TIFF")):
        assert refused(source) == "the image is damaged: it has pixels that are not finite numbers (NaN or infinity)"
    assert not recwarn.list


def test_sixteen_bits_of_colour():
    """A PNG written by hand, since Pillow can't write one."""
    wide = drawn(5, 7).astype(">u2") * 257
    rows = b"".join(b"\0" + row.tobytes() for row in wide)
    header = struct.pack(">IIBBBBB", 7, 5, 16, 2, 0, 0, 0)
    assert np.abs(rgb(png(header, zlib.compress(rows))).astype(int) - drawn(5, 7)).max() <= 1


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "LA", "PA", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "I", "F", "La", "RGBa"]
)
def test_modes_of_pil_images(mode):
    picture = pil.fromarray(drawn())
    if mode in ("PA", "La"):
        picture = picture.convert("LA")
    if mode == "RGBa":
        picture = picture.convert("RGBA")
    ours = rgb(picture.convert(mode)).astype(int)
    assert ours.shape == (40, 60, 3)
    grey = mode in ("1", "L", "LA", "PA", "I", "F", "La")
    if mode not in ("1", "I", "P", "PA"):  # two colours, 32 bits taken for 16, a palette
        expected = rgb(picture.convert("L")) if grey else drawn()
        assert np.abs(ours - expected).mean() <= 3


def test_cmyk():
    ours = rgb(encoded(pil.fromarray(drawn()).convert("CMYK"), "JPEG", quality=95)).astype(int)
    assert np.abs(ours - drawn()).mean() <= 4
    ours = rgb(encoded(pil.fromarray(drawn()).convert("CMYK"), "TIFF")).astype(int)
    assert np.abs(ours - drawn()).mean() <= 2


# What is no picture.


def png(header: bytes, data: bytes) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (60, 90, 3), np.uint8)


@pytest.mark.parametrize("kind", FORMATS)
def test_cut_off(kind):
    data = encoded(noise(), kind, **FORMATS[kind][0])
    for part in (0.9, 0.5):
        assert "damaged" in refused(data[: int(len(data) * part)])


def test_a_jpeg_that_lacks_its_end_marker_alone():
    """All its pixels may be there, but a file that was cut off there would look the same."""
    data = Path(__file__).with_name("cases").joinpath("no_end_marker.jpg").read_bytes()
    assert "damaged" in refused(data)
    assert rgb(data + b"\xff\xd9").ndim == 3


@cache
def small_files() -> dict[str, bytes]:
    """An image of every format, with EXIF data or in another mode or compression where Pillow has code of its own."""
    exif = pil.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    image = pil.fromarray(noise()[:12, :16])
    files = {kind: encoded(image, kind, **FORMATS[kind][0]) for kind in FORMATS}
    files |= {f"{kind} exif": encoded(image, kind, exif=exif.tobytes()) for kind in ("PNG", "JPEG", "WEBP", "HEIF")}
    files |= {f"TIFF {name}": encoded(image, "TIFF", compression=name) for name in ("raw", "jpeg", "packbits")}
    files |= {
        f"PNG {mode}": encoded(image.convert("L").convert(mode), "PNG") for mode in ("1", "P", "LA", "RGBA", "I;16")
    }
    files |= {f"{kind} frames": encoded(image, kind, save_all=True, append_images=[image]) for kind in ("GIF", "MPO")}
    return files | {"JPEG progressive": encoded(image, "JPEG", progressive=True)}


@settings(max_examples=100, deadline=None)
@given(st.randoms(use_true_random=False))
def test_damage_is_an_error_of_ours_or_none(rng):
    """Whatever is overwritten, cut out or put in: an exception that image.py does not expect fails here."""
    for whole in small_files().values():
        data = bytearray(whole)
        for _ in range(rng.choice([1, 2, 4])):
            place = rng.randrange(min(len(data), rng.choice([50, 300, 10_000])))
            removed, added = rng.choice([(1, 1), (4, 4), (rng.randrange(20), 0), (0, rng.randrange(8))])
            data[place : place + removed] = rng.choice([bytes(added), b"\xff" * added, rng.randbytes(added)])
        with contextlib.suppress(ValueError):
            assert rgb(bytes(data), MediaPolicy(max_pixels=1_000_000)).shape[2] == 3


def test_what_is_no_picture(tmp_path):
    assert refused(b"") == "the image has no bytes"
    for data in (b"no picture", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF-1.7\n", b"RIFF\0\0\0\0WAVEfmt "):
        assert (
            refused(data)
            == "not an image in one of the formats AVIF, BMP, GIF, JPEG, PNG, TIFF, WEBP, HEIC, or damaged"
        )
    assert "does not exist" in refused(tmp_path / "missing.png")
    assert "is not a regular file" in refused(tmp_path)
    assert "no pixels: it is 0 × 5" in refused(pil.new("RGB", (0, 5)))


def test_formats_beyond_the_list_are_not_decoded():
    """Whatever else Pillow reads stays out of reach of a stranger's bytes."""
    for kind in ("PPM", "TGA", "ICO"):
        assert "not an image in one of the formats" in refused(encoded(drawn(), kind))


def test_decompression_bombs():
    """The size is refused by the header, before anything is decoded."""
    bomb = png(struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0), zlib.compress(b"\0" * 1000))
    assert refused(bomb).startswith("the image has more than 178,956,970 pixels, the most that is decoded")
    policy = MediaPolicy(max_pixels=2399)
    expected = "the image has more than 2,399 pixels, the most that is decoded: it is 60 × 40"
    for source in (encoded(drawn(), "PNG"), drawn(), pil.fromarray(drawn())):
        assert refused(source, policy) == expected
    assert rgb(drawn(), MediaPolicy(max_pixels=2400)).shape == (40, 60, 3)


def test_a_large_picture_within_the_limit_warns_of_nothing(recwarn):
    """Pillow would, at half of its own limit."""
    large = png(struct.pack(">IIBBBBB", 10_000, 10_000, 1, 0, 0, 0, 0), zlib.compress(b"\0" * (1251 * 10_000)))
    assert rgb(large).shape == (10_000, 10_000, 3)
    assert not recwarn.list


def test_heic_without_its_extra(monkeypatch):
    data = encoded(drawn(), "HEIF")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    assert refused(data) == f"the image is HEIC, which needs pillow-heif: {install_command('heif')}"


# Notebooks.


def test_a_notebook_shows_the_image_upright_and_not_too_large():
    pixels = np.zeros((600, 1200, 3), np.uint8)
    pixels[:, :600] = (255, 0, 0)
    shown = pil.open(io.BytesIO(Image(pixels)._repr_png_()))
    assert (shown.format, shown.size) == ("PNG", (512, 256))
    assert (shown.getpixel((10, 100)), shown.getpixel((500, 100))) == ((255, 0, 0), (0, 0, 0))
    small = pil.open(io.BytesIO(Image(pixels[:20, :30])._repr_png_()))
    np.testing.assert_array_equal(np.asarray(small), pixels[:20, :30])


def test_the_array_of_a_caller_may_change():
    array = drawn().copy()
    image = Image(array)
    expected = image.rgb(ANY)
    array[:] = 0
    np.testing.assert_array_equal(image.rgb(ANY), expected)


def test_a_long_thin_image_is_refused_before_it_is_decoded():
    data = encoded(np.zeros((70_000, 1, 3), np.uint8), "PNG")
    assert refused(data) == "the image is 1 × 70000, longer than 65,535 pixels, the most that is decoded"


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
def test_a_large_image_comes_reduced(file_format):
    """With the same picture, and never smaller than twice what is asked for."""
    large = np.asarray(pil.fromarray(drawn()).resize((4800, 3600)))
    data = encoded(large, file_format)
    reduced = Image(data).rgb(ANY, 256, 256)
    assert min(reduced.shape[:2]) >= 512
    assert reduced.size < large.size / 4
    small = [np.asarray(pil.fromarray(rgb).resize((256, 256))).astype(int) for rgb in (reduced, Image(data).rgb(ANY))]
    assert np.abs(small[0] - small[1]).mean() < 2
