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


def picture() -> Image.Image:
    """Smooth, so that JPEG keeps it, and different at each corner and in each channel."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    return Image.fromarray(np.stack([x * 3, y * 5, 255 - x - y], axis=-1).astype(np.uint8))


def rgb(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"))


def encode(image: Image.Image, kind: str, **options) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


@pytest.fixture
def read(tmp_path):
    def write_and_read(data: bytes) -> np.ndarray:
        path = tmp_path / "image.bin"
        path.write_bytes(data)
        return read_image(path)

    return write_and_read


def assert_shows(array: np.ndarray, expected: np.ndarray, tolerance: int = 0) -> None:
    assert array.dtype == np.uint8 and array.shape == expected.shape
    assert np.abs(array.astype(int) - expected).max() <= tolerance


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("BMP", {}),
        ("PPM", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("WEBP", {"lossless": True}),
    ],
)
def test_lossless_formats(read, kind, options):
    assert_shows(read(encode(picture(), kind, **options)), rgb(picture()))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 30, "optimize": True}])
def test_jpeg_is_what_pil_shows(read, options):
    data = encode(picture(), "JPEG", **options)
    assert_shows(read(data), rgb(Image.open(io.BytesIO(data))), tolerance=3)
    assert_shows(read(data), rgb(picture()), tolerance=40)


def test_gray(read):
    gray = picture().convert("L")
    assert_shows(read(encode(gray, "PNG")), rgb(gray))
    assert_shows(read(encode(gray, "JPEG", quality=100)), rgb(gray), tolerance=2)
    black_and_white = gray.point(lambda value: 255 * (value > 100)).convert("1")
    assert_shows(read(encode(black_and_white, "PNG")), rgb(black_and_white))


def test_cmyk_jpeg(read):
    data = encode(picture().convert("CMYK"), "JPEG", quality=100, subsampling=0)
    assert_shows(read(data), rgb(picture()), tolerance=6)


def test_16_bit(read):
    gray = picture().convert("L")
    deep = Image.fromarray(np.asarray(gray).astype(np.uint16) * 257)
    assert_shows(read(encode(deep, "PNG")), rgb(gray), tolerance=1)
    assert_shows(read(encode(deep, "TIFF")), rgb(gray), tolerance=1)
    color = rgb(picture())[..., ::-1].astype(np.uint16) * 257  # PIL has no 16-bit color
    assert_shows(read(cv2.imencode(".png", color)[1].tobytes()), rgb(picture()), tolerance=1)


def test_palette(read):
    palette = picture().quantize(32)
    for options in ({}, {"transparency": 3}):
        assert_shows(read(encode(palette, "PNG", **options)), rgb(palette))
    assert_shows(read(encode(palette, "GIF")), rgb(palette))


def test_alpha_is_dropped(read):
    image = picture()
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    assert_shows(read(encode(image, "PNG")), rgb(picture()))
    gray = picture().convert("LA")
    gray.putalpha(100)
    assert_shows(read(encode(gray, "PNG")), rgb(picture().convert("L")))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(read, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(picture(), "JPEG", exif=exif, quality=95)
    expected = rgb(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert expected.shape[0] == (HEIGHT if orientation < 5 else WIDTH)
    assert_shows(read(data), expected, tolerance=3)


@pytest.mark.parametrize("name", ["ü 图.png", "with [brackets].png", "no_suffix"])
def test_any_file_name(tmp_path, name):
    (tmp_path / name).write_bytes(encode(picture(), "PNG"))
    assert_shows(read_image(tmp_path / name), rgb(picture()))
    assert_shows(read_image(str(tmp_path / name)), rgb(picture()))


# Broken files


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("WEBP", {}),
        ("BMP", {}),
        ("TIFF", {}),
        ("GIF", {}),
    ],
)
def test_truncated(read, kind, options, share):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8))
    data = encode(noise, kind, **options)
    read(data)
    with pytest.raises(ImageError):
        read(data[: int(len(data) * share)])


def with_thumbnail(image: Image.Image) -> bytes:
    """A JPEG with a whole JPEG in a segment before its own data, as cameras write it."""
    thumbnail = encode(image.resize((16, 16)), "JPEG")
    segment = b"\xff\xe5" + (len(thumbnail) + 2).to_bytes(2, "big") + thumbnail
    data = encode(image, "JPEG")
    return data[:2] + segment + data[2:]


def test_end_of_a_thumbnail_is_not_the_end_of_the_jpeg(read):
    data = with_thumbnail(picture())
    read(data)
    for missing in (2, 100, len(data) // 2):
        with pytest.raises(ImageError, match="truncated"):
            read(data[:-missing])


def test_jpeg_cut_short_and_filled_with_zeros(read):
    data = encode(picture(), "JPEG")
    half = len(data) // 2
    with pytest.raises(ImageError, match="truncated"):
        read(data[:half] + bytes(half))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_data_after_the_end_does_not_matter(read, kind):
    """Phones append a film, whose bytes may look like any marker."""
    data = encode(picture(), kind)
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
    ],
)
def test_not_an_image(read, data, reason, capfd):
    log_level = cv2.utils.logging.getLogLevel()
    with pytest.raises(ImageError, match=reason) as error:
        read(data)
    assert "image.bin: " in str(error.value) and "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")
    assert cv2.utils.logging.getLogLevel() == log_level


@pytest.mark.parametrize("name", ["missing.jpg", ".", "a\0b.jpg", "\ud800.jpg"])
def test_no_such_file(tmp_path, name):
    with pytest.raises(ImageError) as error:
        read_image(os.path.join(tmp_path, name))
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_unreadable_file(tmp_path):
    path = tmp_path / "secret.png"
    path.write_bytes(encode(picture(), "PNG"))
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    with pytest.raises(ImageError, match="Permission denied"):
        read_image(path)


# Which files there are


@pytest.fixture
def folder(tmp_path) -> Path:
    names = [
        "b.jpg",
        "a.PNG",
        "broken.jpeg",
        "notes.txt",
        "sub/c.webp",
        "sub/sub/d.tif",
        "._b.jpg",
        "e[1].jpg",
        "noimage.json",
    ]
    for name in names:
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).touch()
    (tmp_path / "images" / "folder.jpg").mkdir()
    (tmp_path / "empty").mkdir()
    return tmp_path / "images"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("", ["a.PNG", "b.jpg", "broken.jpeg", "e[1].jpg", "sub/c.webp", "sub/sub/d.tif"]),
        ("sub", ["sub/c.webp", "sub/sub/d.tif"]),
        ("b.jpg", ["b.jpg"]),
        ("notes.txt", ["notes.txt"]),  # asked for by name: the reader judges it
        ("e[1].jpg", ["e[1].jpg"]),
        ("*.jp*g", ["b.jpg", "broken.jpeg", "e[1].jpg"]),
        ("*", ["a.PNG", "b.jpg", "broken.jpeg", "e[1].jpg"]),
        ("**/[cd].*", ["sub/c.webp", "sub/sub/d.tif"]),
        ("**/**/*.webp", ["sub/c.webp"]),
    ],
)
def test_list_images(folder, source, expected):
    expected = [folder / name for name in expected]
    assert list_images(str(folder / source)) == expected
    assert list_images(folder / source) == expected


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
