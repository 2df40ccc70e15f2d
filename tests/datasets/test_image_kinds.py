"""Orientation, samples and sizes of image files: the right picture, or an error that says why."""

import io
import resource
import struct
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import example
from hypothesis import strategies as st
from PIL import Image, ImageOps

from datasets.image_headers import read_header
from datasets.images import ImageError, read_image
from tests.datasets.image_bytes import chunk, png, tiff
from tests.fuzzing import fuzzed

HEIGHT, WIDTH = 48, 80
Y, X = np.mgrid[:HEIGHT, :WIDTH]
RGB = np.stack([X * 3, Y * 5, 255 - X - Y], axis=-1).astype(np.uint8)
GRAY = RGB[..., :1]
ALPHA = (X * 2 + 20).astype(np.uint8)[..., None]
DEEP = RGB.astype(np.uint16) * 257


@pytest.fixture
def read(tmp_path):
    def read_bytes(data: bytes, **options) -> np.ndarray:
        (tmp_path / "image.bin").write_bytes(data)
        return read_image(tmp_path / "image.bin", **options)

    return read_bytes


def encode(kind: str, pixels: np.ndarray = RGB, **options) -> bytes:
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, kind, **options)
    return data.getvalue()


def exif_of(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def with_late_exif(orientation: int) -> bytes:
    """A PNG whose EXIF comes after its pixels."""
    content = exif_of(orientation).tobytes().removeprefix(b"Exif\0\0")
    data = encode("PNG")
    return data[:-12] + chunk(b"eXIf", content) + data[-12:]


ORIENTED = {
    "JPEG": lambda o: encode("JPEG", exif=exif_of(o), quality=100, subsampling=0),
    "PNG": lambda o: encode("PNG", exif=exif_of(o)),
    "PNG, late": with_late_exif,
    "WEBP": lambda o: encode("WEBP", exif=exif_of(o), lossless=True),
    "AVIF": lambda o: encode("AVIF", exif=exif_of(o), quality=100, subsampling="4:4:4"),
    "TIFF": lambda o: encode("TIFF", exif=exif_of(o), compression="tiff_lzw"),
    "TIFF, 16 bits": lambda o: tiff(DEEP, 2, orientation=o),
    "TIFF, gray": lambda o: tiff(RGB[..., :1], 1, orientation=o),
}


@pytest.mark.parametrize("orientation", range(10))  # 0 and 9 mean nothing
@pytest.mark.parametrize("kind", ORIENTED)
def test_orientation(read, kind, orientation):
    if kind in ("AVIF", "TIFF") and orientation not in range(1, 9):
        pytest.skip("PIL writes none")
    data = ORIENTED[kind](orientation)
    stored = RGB if kind != "TIFF, gray" else GRAY.repeat(3, axis=2)
    picture = Image.fromarray(stored)
    picture.getexif()[0x0112] = orientation
    shown = np.asarray(ImageOps.exif_transpose(picture))
    for exif, expected in (("apply", shown), ("ignore", stored)):
        image = read(data, exif=exif)
        assert image.shape == expected.shape and image.flags.c_contiguous
        assert np.abs(image.astype(int) - expected).max() <= 4
    known = orientation if orientation in range(1, 9) else 1
    assert read_header(io.BytesIO(data)).orientation == known


# Samples of more than 8 bits


def pnm(samples: np.ndarray, largest: int) -> bytes:
    """A binary PGM or PPM."""
    height, width, bands = samples.shape
    kind = b"P5" if bands == 1 else b"P6"
    pixels = samples.astype(">u2" if largest > 255 else "u1").tobytes()
    return b"%s\n# made for a test\n%d %d\n%d\n%s" % (kind, width, height, largest, pixels)


def cv2_encoded(suffix: str, samples: np.ndarray) -> bytes:
    return cv2.imencode(suffix, samples[..., ::-1].copy())[1].tobytes()


def in_one_tile(file: bytes, side: int = 2**15) -> bytes:
    """A TIFF whose tags say that it is a tile."""
    data = bytearray(file)
    for old, new in ((278, 322), (284, 323)):
        at = next(i for i in range(10, 200, 12) if data[i : i + 2] == struct.pack("<H", old))
        data[at : at + 12] = struct.pack("<HHII", new, 4, 1, side)
    return bytes(data)


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("bands", [1, 3])
@pytest.mark.parametrize("kind", [".png", ".tif", "raw tif", ".jp2", "pnm of 65535", "pnm"])
def test_samples_are_scaled_by_the_bits_that_are_used(read, kind, bands, bits):
    samples = (DEEP >> (16 - bits))[..., :bands]
    samples[0, 0] = 2**bits - 1
    if kind.startswith("pnm"):
        data = pnm(samples, 65535 if kind == "pnm of 65535" else 2**bits - 1)
    else:
        data = tiff(samples, 2 if bands == 3 else 1) if " " in kind else cv2_encoded(kind, samples)
    expected = (samples >> (bits - 8)).astype(int)
    assert np.abs(read(data) - expected).max() <= 1


@pytest.mark.parametrize(
    ("largest", "values", "expected"),
    [
        (15, (0, 5, 15), (0, 85, 255)),
        (100, (0, 50, 100), (0, 128, 255)),
        (1000, (0, 500, 1000), (0, 127, 255)),
        (4095, (16, 160, 255), (1, 10, 16)),  # a dark image stays dark: the file gives the scale
    ],
)
@pytest.mark.parametrize("bands", [1, 3])
def test_pnm_has_its_largest_value(read, largest, values, expected, bands):
    samples = np.tile(np.array(values, np.uint16).repeat(4)[None, :, None], (4, 1, bands))
    image = read(pnm(samples, largest))
    assert np.abs(image[0, ::4, 0].astype(int) - expected).max() <= 1


def test_packed_samples_have_the_depth_that_the_file_says(read):
    """12 bits in a TIFF: a dark image is not taken for one of fewer bits."""
    values = np.full((2, 8, 1), 100, np.uint16)
    data = bytearray(tiff(values, 1))
    packed = bytes([100 >> 4, (100 & 15) << 4, 100]) * 8
    data[-32:] = packed
    at = data.index(struct.pack("<HHI", 258, 3, 1)) + 8
    data[at : at + 2] = struct.pack("<H", 12)
    assert (read(bytes(data)) == 100 >> 4).all()


@pytest.mark.parametrize("photometric", [0, 1, 2])
@pytest.mark.parametrize("extra", [None, [0], [1], [2]])
@pytest.mark.parametrize("samples", [RGB, DEEP])
@pytest.mark.parametrize(
    "layout", [{}, {"order": ">"}, {"big": True}, {"big": True, "order": ">"}, {"planar": True}]
)
def test_bands_of_a_tiff_are_rgb_and_alpha_is_left_out(read, samples, extra, photometric, layout):
    if layout.get("planar") and samples is DEEP:
        with pytest.raises(ImageError, match="one after the other; save them interleaved"):
            read(tiff(samples, photometric, extra=extra, **layout))
        return
    if extra is not None:
        fourth = ALPHA if samples is RGB else ALPHA.astype(np.uint16) * 257
        samples = np.concatenate([samples, fourth], axis=2)
    np.testing.assert_array_equal(read(tiff(samples, photometric, extra=extra, **layout)), RGB)


def test_three_bands_of_which_two_are_called_extra(read):
    np.testing.assert_array_equal(read(tiff(RGB, 1, extra=[0, 0])), RGB)


@pytest.mark.parametrize("photometric", [0, 1])
@pytest.mark.parametrize("samples", [GRAY, DEEP[..., :1], DEEP[..., :1] >> 4])
def test_gray_of_a_tiff(read, samples, photometric):
    samples = samples.copy()
    samples[0, 0] = np.iinfo(samples.dtype).max >> (
        4 if samples.max() < 4096 and samples.max() > 255 else 0
    )
    bits = int(samples.max()).bit_length()
    expected = (samples >> (bits - 8)).astype(np.uint8).repeat(3, axis=2)
    image = read(tiff(samples, photometric))
    np.testing.assert_array_equal(image, expected if photometric else 255 - expected)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (tiff(RGB[..., [0, 1, 2, 0, 1]], 2, extra=[0, 0]), "has 5 bands, more than 4"),
        (tiff(DEEP[..., [0] * 12], 1, extra=[0] * 11), "has 12 bands"),
        (tiff(GRAY.astype(np.float32), 1, sample_format=3), "floating-point samples of 32 bits"),
        (tiff(RGB.astype(np.float32), 2, sample_format=3), "floating-point samples of 32 bits"),
        (tiff(GRAY.astype(np.float64), 1, sample_format=3), "floating-point samples of 64 bits"),
        (tiff(GRAY.astype(np.float16), 1, sample_format=3), "floating-point samples of 16 bits"),
        (tiff(GRAY.astype(np.uint32), 1), "samples of 32 bits; convert it to 8 or 16"),
        (tiff(GRAY.astype(np.int16), 1, sample_format=2), "signed samples of 16 bits"),
        (tiff(DEEP[..., :2], 1, extra=[2]), "two bands of 16 bits"),
        (in_one_tile(tiff(RGB[..., :2], 1, extra=[2])), "two bands in tiles; save the first one"),
        (b"Pf\n2 2\n-1.0\n" + bytes(16), "samples of 32 bits"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100), "HEIC"),
    ],
)  # fmt: skip
def test_samples_that_cannot_be_read_are_named(read, data, reason):
    with pytest.raises(ImageError, match=reason):
        read(data)


# Decode bombs

BOMBS = {
    "png": png(2**15, 2**15, rows=2**15 - 8),
    "bmp": b"BM" + struct.pack("<IIIIiiHHI", 54, 0, 54, 40, 30000, 30000, 1, 24, 0) + bytes(99),
    "gif": b"GIF89a" + struct.pack("<HH", 65000, 65000) + b"\x80\0\0" + bytes(6)
    + b"," + struct.pack("<HHHH", 0, 0, 65000, 65000) + b"\0\x02\x02\x4c\x01\0;",
    "tif": tiff(GRAY, 1, size=(30000, 30000)),
    "big tif": tiff(GRAY, 1, size=(2**20, 2**20), big=True),
    "pgm": b"P5 40000 40000 255\n" + bytes(100),
}  # fmt: skip


@pytest.mark.parametrize("kind", BOMBS)
def test_an_image_of_too_many_pixels_is_not_decoded(read, kind):
    if kind == "png":
        assert len(BOMBS[kind]) < 31_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ImageError, match="pixels are more than .* cut it into tiles"):
        read(BOMBS[kind])
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after - before < 50_000  # kB


def test_the_limit_of_pixels_can_be_set(read):
    data = png(100, 50)
    assert read(data, max_pixels=5000).shape == (50, 100, 3)
    with pytest.raises(ImageError, match="100 x 50 pixels are more than 4,999.*max_pixels"):
        read(data, max_pixels=4999)
    with pytest.raises(ImageError, match="more than can be read, 1,073,741,824; cut"):
        read(tiff(GRAY, 1, size=(2**16, 2**15)), max_pixels=2**40)


def test_a_tile_larger_than_its_image_counts(read):
    """OpenCV allocates whole tiles."""
    with pytest.raises(ImageError, match="more than"):
        read(in_one_tile(tiff(GRAY, 1)))


# Anything else

SEEDS = [make(6) for make in ORIENTED.values()] + [
    encode("BMP"),
    encode("GIF"),
    encode("JPEG2000"),
    pnm(RGB.astype(np.uint16), 255),
    pnm(DEEP >> 4, 4095),
    tiff(np.concatenate([RGB, ALPHA], axis=2), 1, extra=[2], big=True),
    png(30, 20),
]


@st.composite
def broken_files(draw) -> bytes:
    """An image file with some bytes changed, cut out or doubled."""
    data = bytearray(draw(st.sampled_from(SEEDS)))
    near = min(len(data) - 1, draw(st.sampled_from([16, 64, 300, 10**6])))  # headers more often
    for _ in range(draw(st.integers(0, 6))):
        at = draw(st.integers(0, near))
        data[at : at + 1] = draw(st.binary(min_size=0, max_size=4))
        near = min(near, len(data) - 1)
    return bytes(data[: draw(st.integers(0, len(data))) if draw(st.booleans()) else len(data)])


NAMES = st.text(
    st.characters(codec=None, exclude_characters="/\0"), min_size=1, max_size=40
).filter(lambda name: name not in (".", ".."))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzzed")


@fuzzed(data=broken_files() | st.binary(max_size=64), name=NAMES)
@example(data=SEEDS[0], name="\ud800.jpg")
@example(data=SEEDS[0], name="a\nb\x1b[31m.jpg")
def test_any_file_is_an_image_or_one_line(folder, data, name):
    path = folder / name
    try:
        path.write_bytes(data)
    except (OSError, UnicodeEncodeError):  # no name for a file: there is none
        data = b""
    try:
        image = read_image(path, max_pixels=2**22)
    except ImageError as error:
        assert len(str(error).splitlines()) == 1 and str(error).isprintable()
        str(error).encode()
    else:
        assert data and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
        assert image.size <= 3 * 2**22
    finally:
        with suppress(OSError, ValueError):
            path.unlink(missing_ok=True)


def test_pillows_own_limit_is_left_as_it_is():
    code = (
        "from PIL import Image; limit = Image.MAX_IMAGE_PIXELS; import datasets.images; "
        "print(limit == Image.MAX_IMAGE_PIXELS)"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout.strip() == "True"
