"""Files of every kind that PIL writes, read as the picture that they show."""

import io
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from datasets.images import ImageError, list_images, read_image

HEIGHT, WIDTH = 48, 80
Y, X = np.mgrid[:HEIGHT, :WIDTH]
# Smooth, so that JPEG keeps it, and different at each corner and in each channel.
PICTURE = Image.fromarray(np.stack([X * 3, Y * 5, 255 - X - Y], axis=-1).astype(np.uint8))
GRAY = PICTURE.convert("L")
BLACK_AND_WHITE = GRAY.point(lambda value: 255 * (value > 100)).convert("1")
PALETTE = PICTURE.quantize(32)
ALPHA = Image.linear_gradient("L").resize(PICTURE.size)
WITH_ALPHA = Image.merge("RGBA", [*PICTURE.split(), ALPHA])
DEEP_GRAY = Image.fromarray(np.asarray(GRAY).astype(np.uint16) * 257)
DEEP_COLOR = np.asarray(PICTURE)[..., ::-1].astype(np.uint16) * 257  # PIL has no 16-bit color


def encode(image: Image.Image, kind: str, **options) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


@pytest.fixture
def read(tmp_path):
    def read_bytes(data: bytes) -> np.ndarray:
        (tmp_path / "image.bin").write_bytes(data)
        return read_image(tmp_path / "image.bin")

    return read_bytes


def assert_shows(array: np.ndarray, expected: Image.Image, tolerance: int = 0) -> None:
    pixels = np.asarray(expected.convert("RGB"))
    assert array.dtype == np.uint8 and array.shape == pixels.shape
    assert np.abs(array.astype(int) - pixels).max() <= tolerance


@pytest.mark.parametrize(
    ("data", "expected", "tolerance"),
    [
        (encode(PICTURE, "PNG"), PICTURE, 0),
        (encode(PICTURE, "BMP"), PICTURE, 0),
        (encode(PICTURE, "PPM"), PICTURE, 0),
        (encode(PICTURE, "TIFF"), PICTURE, 0),
        (encode(PICTURE, "TIFF", compression="tiff_lzw"), PICTURE, 0),
        (encode(PICTURE, "WEBP", lossless=True), PICTURE, 0),
        (encode(GRAY, "PNG"), GRAY, 0),
        (encode(GRAY, "JPEG", quality=100), GRAY, 2),
        (encode(BLACK_AND_WHITE, "PNG"), BLACK_AND_WHITE, 0),
        (encode(PICTURE.convert("CMYK"), "JPEG", quality=100, subsampling=0), PICTURE, 6),
        (encode(DEEP_GRAY, "PNG"), GRAY, 1),
        (encode(DEEP_GRAY, "TIFF"), GRAY, 1),
        (cv2.imencode(".png", DEEP_COLOR)[1].tobytes(), PICTURE, 1),
        (encode(PALETTE, "PNG"), PALETTE, 0),
        (encode(PALETTE, "PNG", transparency=3), PALETTE, 0),
        (encode(PALETTE, "GIF"), PALETTE, 0),
        (encode(WITH_ALPHA, "PNG"), PICTURE, 0),
        (encode(Image.merge("LA", [GRAY, ALPHA]), "PNG"), GRAY, 0),
    ],
)  # fmt: skip
def test_formats(read, data, expected, tolerance):
    assert_shows(read(data), expected, tolerance)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 30, "optimize": True}])
@pytest.mark.parametrize("orientation", range(9))  # 0 is none
def test_jpeg_is_what_pil_shows(read, options, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(PICTURE, "JPEG", exif=exif, **options)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert expected.height == (HEIGHT if orientation < 5 else WIDTH)
    assert_shows(read(data), expected, tolerance=3)


@pytest.mark.parametrize("name", ["ü 图.png", "with [brackets].png", "no_suffix"])
def test_any_file_name(tmp_path, name):
    (tmp_path / name).write_bytes(encode(PICTURE, "PNG"))
    for path in (tmp_path / name, str(tmp_path / name)):
        assert_shows(read_image(path), PICTURE)


# Broken files


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("kind", ["JPEG", "progressive", "PNG", "WEBP", "BMP", "TIFF", "GIF"])
def test_truncated(read, kind, fraction):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8))
    options = {"progressive": True} if kind == "progressive" else {}
    data = encode(noise, "JPEG" if options else kind, **options)
    read(data)
    with pytest.raises(ImageError):
        read(data[: int(len(data) * fraction)])


def test_end_of_a_thumbnail_is_not_the_end_of_the_jpeg(read):
    """Cameras write a whole JPEG in a segment before the picture's own data."""
    data, thumbnail = encode(PICTURE, "JPEG"), encode(PICTURE.resize((16, 16)), "JPEG")
    segment = b"\xff\xe5" + (len(thumbnail) + 2).to_bytes(2, "big") + thumbnail
    data = data[:2] + segment + data[2:]
    read(data)
    for missing in (2, 100, len(data) // 2):
        with pytest.raises(ImageError, match="truncated"):
            read(data[:-missing])


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_data_after_the_end_does_not_matter(read, kind):
    """Phones append a film, whose bytes may look like any marker."""
    data = encode(PICTURE, kind)
    np.testing.assert_array_equal(read(data + b"\xff\xda\xff\xd8" + b"film" * 50), read(data))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"<html>404</html>", "not an image"),
        (bytes(1000), "not an image"),
        (b"\xff\xd8\xff", "truncated"),
        (b"\x89PNG\r\n\x1a\n", "truncated"),
        (b"\xff\xd8\xff\xd9", "not an image"),
        (encode(PICTURE, "JPEG")[:480] + bytes(480), "truncated"),  # filled up with zeros
    ],
)
def test_not_an_image(read, data, reason, capfd):
    get_log_level = getattr(cv2, "getLogLevel", None) or cv2.utils.logging.getLogLevel
    log_level = get_log_level()
    with pytest.raises(ImageError, match=reason) as error:
        read(data)
    assert "image.bin: " in str(error.value) and "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")
    assert get_log_level() == log_level


@pytest.mark.parametrize("name", ["missing.jpg", ".", "a\0b.jpg", "\ud800.jpg", "secret.jpg"])
def test_no_such_file_or_an_unreadable_one(tmp_path, name):
    secret = tmp_path / "secret.jpg"
    secret.touch(mode=0)
    if name == secret.name and os.access(secret, os.R_OK):
        pytest.skip("this user may read everything")
    with pytest.raises(ImageError) as error:
        read_image(os.path.join(tmp_path, name))
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    assert ("Permission denied" in str(error.value)) == (name == secret.name)


# Which files there are


@pytest.fixture
def folder(tmp_path) -> Path:
    images = tmp_path / "images"
    (images / "sub" / "sub").mkdir(parents=True)
    names = "b.jpg a.PNG broken.jpeg notes.txt ._b.jpg e[1].jpg noimage.json"
    for name in [*names.split(), "sub/c.webp", "sub/sub/d.tif"]:
        (images / name).touch()
    (images / "folder.jpg").mkdir()
    (tmp_path / "empty").mkdir()
    return images


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("", "a.PNG b.jpg broken.jpeg e[1].jpg sub/c.webp sub/sub/d.tif"),
        ("sub", "sub/c.webp sub/sub/d.tif"),
        ("b.jpg", "b.jpg"),
        ("notes.txt", "notes.txt"),  # asked for by name: the reader judges it
        ("e[1].jpg", "e[1].jpg"),
        ("*.jp*g", "b.jpg broken.jpeg e[1].jpg"),
        ("*", "a.PNG b.jpg broken.jpeg e[1].jpg"),
        ("**/[cd].*", "sub/c.webp sub/sub/d.tif"),
        ("**/**/*.webp", "sub/c.webp"),
    ],
)
def test_list_images(folder, source, expected):
    paths = [folder / name for name in expected.split()]
    assert list_images(str(folder / source)) == list_images(folder / source) == paths


def test_folders_that_are_links_or_look_like_patterns(folder):
    other = folder.parent / "run [1]"
    other.mkdir()
    (other / "link").symlink_to(folder / "sub")
    assert list_images(other) == [other / "link/c.webp", other / "link/sub/d.tif"]


@pytest.mark.parametrize("source", ["nowhere", "empty", "images/*.bmp", "images/*.json", "no/**"])
def test_nothing_there(folder, source):
    with pytest.raises(ValueError) as error:
        list_images(folder.parent / source)
    assert str(folder.parent / source) in str(error.value) and "\n" not in str(error.value)
