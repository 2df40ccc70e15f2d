"""Large TIFFs read by windows: the pixels of decoded ones, and what is refused and why."""

import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import rasterio
from hypothesis import example
from hypothesis import strategies as st
from PIL import Image
from rasterio.errors import NotGeoreferencedWarning
from rasterio.transform import from_origin

from datasets import large_images
from datasets.images import ImageError, open_image, read_image
from datasets.large_images import WindowedImage, read_georeference
from datasets.resize import resize_align_corners, resize_image, resize_sides
from tests.datasets.image_bytes import tiff
from tests.fuzzing import fuzzed

ROOT = Path(__file__).resolve().parents[2]
HEIGHT, WIDTH = 150, 170
Y, X = np.mgrid[:HEIGHT, :WIDTH]
RGB = np.stack([X, Y, 255 - X], axis=-1).astype(np.uint8)
ALPHA = (X // 2 + 20).astype(np.uint8)[..., None]
DEEP = RGB.astype(np.uint16) * 257


pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")


@pytest.fixture(autouse=True)
def all_images_are_large(monkeypatch):
    monkeypatch.setattr(large_images, "LARGE_PIXELS", 0)


def write_tiff(path: Path, samples: np.ndarray, **options) -> Path:
    """By GDAL, in tiles unless the options say otherwise."""
    height, width, bands = samples.shape
    shape = {"height": height, "width": width, "count": bands, "dtype": samples.dtype}
    layout = {"tiled": True, "blockxsize": 64, "blockysize": 32} | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(path, "w", driver="GTiff", **shape, **layout) as file:
            file.write(samples.transpose(2, 0, 1))
    return path


def by_rows(image: WindowedImage, step: int = 37) -> np.ndarray:
    height = image.shape[0]
    return np.concatenate([image.rows(a, min(a + step, height)) for a in range(0, height, step)])


SAMPLES = {
    "rgb": RGB,
    "gray": RGB[..., :1],
    "alpha": np.concatenate([RGB, ALPHA], axis=2),
    "gray with alpha": np.concatenate([RGB[..., :1], ALPHA], axis=2),
    "16 bits": DEEP,
    "12 of 16 bits": DEEP >> 4,
    "gray of 16 bits": DEEP[..., :1],
}
LAYOUTS = {
    "tiles": {},
    "strips": {"tiled": False, "blockysize": 1},
    "one strip": {"tiled": False, "blockysize": HEIGHT},
    "deflate": {"compress": "deflate", "predictor": 2},
    "BigTIFF": {"BIGTIFF": "YES"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", SAMPLES)
def test_pixels_are_those_of_the_decoded_image(tmp_path, kind, layout):
    path = write_tiff(tmp_path / "a.tif", SAMPLES[kind], **LAYOUTS[layout])
    if SAMPLES[kind].shape[2] == 2 and "strip" not in layout:
        with pytest.raises(ImageError, match="two bands in tiles"):
            open_image(path)
        return
    image, decoded = open_image(path), read_image(path)
    assert isinstance(image, WindowedImage) and image.shape == decoded.shape
    np.testing.assert_array_equal(by_rows(image), decoded)


@pytest.mark.parametrize(
    ("kind", "photometric"),
    [(k, p) for k in SAMPLES for p in (0, 1, 2) if p < 2 or "gray" not in k],
)
def test_bands_are_read_as_when_decoded(tmp_path, kind, photometric):
    path, extra = tmp_path / "a.tif", [2] if "alpha" in kind else None
    path.write_bytes(tiff(SAMPLES[kind], photometric, extra=extra))
    image = open_image(path)
    assert isinstance(image, WindowedImage)
    np.testing.assert_array_equal(by_rows(image), read_image(path))


@pytest.mark.parametrize("mode", ["P", "CMYK", "LAB", "YCbCr"])
def test_colors_are_converted_as_when_decoded(tmp_path, mode):
    picture = Image.fromarray(RGB)
    picture = picture.quantize(64) if mode == "P" else picture.convert(mode)
    picture.save(tmp_path / "a.tif", compression="jpeg" if mode == "YCbCr" else None)
    image = open_image(tmp_path / "a.tif")
    assert isinstance(image, WindowedImage)
    np.testing.assert_allclose(by_rows(image), read_image(tmp_path / "a.tif"), atol=1)


def test_several_tiles_of_jpeg(tmp_path):
    options = {"compress": "jpeg", "photometric": "ycbcr", "jpeg_quality": 95}
    path = write_tiff(tmp_path / "a.tif", RGB, **options)
    np.testing.assert_allclose(by_rows(open_image(path)), read_image(path), atol=2)


@pytest.mark.parametrize("scale", [0.4, 0.5, 1, 1.01, 1.4])
def test_sizes_of_all_kinds(tmp_path, scale):
    """Those of the mask networks, of the detector, and of the released code."""
    path = write_tiff(tmp_path / "a.tif", RGB)
    image, decoded = open_image(path), read_image(path)
    assert image.scaled(scale).shape == resize_image(decoded, scale).shape
    sides = {"short_side": round(scale * HEIGHT), "long_side": 1000}
    for resize, atol in (
        (lambda i: resize_image(i, scale), 1),
        (lambda i: resize_sides(i, **sides)[0], 1),
        (lambda i: resize_sides(i, **sides, align_corners=True)[0], 0.01),
        (lambda i: resize_align_corners(i, scale), 0.01),
    ):
        found, expected = resize(image), resize(decoded)
        assert found.shape == expected.shape and found.dtype == expected.dtype
        np.testing.assert_allclose(found.astype(float), expected, atol=atol)
    assert resize_sides(image, **sides)[1] == resize_sides(decoded, **sides)[1]


def test_what_is_not_read_by_windows_is_decoded(tmp_path, monkeypatch):
    """Turned images, other formats, fewer bits, small images; and all without rasterio."""
    turned = tmp_path / "turned.tif"
    turned.write_bytes(tiff(RGB, 2, orientation=6))
    assert open_image(turned).shape == (WIDTH, HEIGHT, 3)
    assert isinstance(open_image(turned, exif="ignore"), WindowedImage)
    Image.fromarray(RGB).save(tmp_path / "a.png")
    Image.fromarray(RGB).convert("1").save(tmp_path / "bits.tif")
    small = write_tiff(tmp_path / "small.tif", RGB)
    for name in ("a.png", "bits.tif"):
        np.testing.assert_array_equal(open_image(tmp_path / name), read_image(tmp_path / name))
    monkeypatch.setitem(sys.modules, "rasterio", None)
    assert isinstance(open_image(small), np.ndarray)
    monkeypatch.undo()
    assert isinstance(open_image(small), np.ndarray)


def test_too_many_pixels_to_decode_say_how_to_go_on(tmp_path, monkeypatch):
    path = write_tiff(tmp_path / "a.tif", RGB)
    turned = tmp_path / "turned.tif"
    turned.write_bytes(tiff(RGB, 2, orientation=6))
    Image.fromarray(RGB).save(tmp_path / "a.png")
    Image.fromarray(RGB).convert("1").save(tmp_path / "bits.tif")
    assert isinstance(open_image(path, max_pixels=99), WindowedImage)
    for name, hint in {
        "a.png": "save it as a tiled TIFF, which is read by windows",
        "turned.tif": "remove its orientation 6 or ignore it",
        "bits.tif": "save it in tiles, of 8 or 16 bits",
    }.items():
        with pytest.raises(ImageError, match=f"pixels are more than 99; cut it into .*, or {hint}"):
            open_image(tmp_path / name, max_pixels=99)
    monkeypatch.setitem(sys.modules, "rasterio", None)
    with pytest.raises(ImageError, match=r'install rasterio \(pip install "\.\[large\]"\)'):
        open_image(path, max_pixels=99)


def test_more_pixels_than_masks_can_have_are_refused(tmp_path):
    """pycocotools has memory for six characters of each number, which hold runs below 2^29."""
    path = tmp_path / "a.tif"
    options = {
        "height": 2**15,
        "width": 2**14 + 16,
        "count": 1,
        "dtype": "uint8",
        "SPARSE_OK": True,
    }
    rasterio.open(path, "w", driver="GTiff", tiled=True, **options).close()
    assert path.stat().st_size < 10**6
    with pytest.raises(ImageError, match="16400 x 32768 pixels are more than masks .* 536,870,912"):
        open_image(path)


def test_a_truncated_file_is_named_when_it_is_read(tmp_path):
    path = write_tiff(tmp_path / "a.tif", RGB, compress="deflate")
    path.write_bytes(path.read_bytes()[:-2000])
    image = open_image(path)
    with pytest.raises(ImageError, match="a.tif: broken or truncated") as raised:
        by_rows(image)
    assert len(str(raised.value).splitlines()) == 1


@st.composite
def broken_tiffs(draw) -> bytes:
    """A TIFF with some bytes changed, cut out or doubled."""
    samples = draw(st.sampled_from(list(SAMPLES.values())))[:9, :11]
    data = bytearray(tiff(samples, draw(st.integers(0, 3))))
    near = min(len(data) - 1, draw(st.sampled_from([16, 300, 10**6])))  # headers more often
    for _ in range(draw(st.integers(0, 6))):
        at = draw(st.integers(4, near))
        data[at : at + 1] = draw(st.binary(min_size=0, max_size=4))
        near = min(near, len(data) - 1)
    return bytes(data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzzed")


@fuzzed(data=broken_tiffs())
@example(data=b"II*\0" + bytes(100))
def test_any_file_is_an_image_or_one_line(folder, data):
    (folder / "a.tif").write_bytes(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(large_images, "LARGE_PIXELS", 0)
        try:
            image = open_image(folder / "a.tif", max_pixels=2**22)
            if isinstance(image, WindowedImage) and image.shape[0] * image.shape[1] < 2**22:
                image = by_rows(image, 64)
                assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
        except ImageError as error:
            assert len(str(error).splitlines()) == 1 and str(error).isprintable()


def test_a_georeference_is_read(tmp_path):
    place = {"crs": "EPSG:32633", "transform": from_origin(500_000, 5_000_000, 0.5, 0.25)}
    path = write_tiff(tmp_path / "a.tif", RGB, **place)
    expected = {"crs": "EPSG:32633", "transform": [0.5, 0, 500_000, 0, -0.25, 5_000_000]}
    assert read_georeference(path) == expected
    local = 'LOCAL_CS["a field",UNIT["metre",1]]'
    found = read_georeference(write_tiff(tmp_path / "b.tif", RGB, **place | {"crs": local}))
    assert "a field" in found["crs"]
    assert read_georeference(write_tiff(tmp_path / "c.tif", RGB)) is None
    Image.fromarray(RGB).save(tmp_path / "a.png")
    assert read_georeference(tmp_path / "a.png") is None
    (tmp_path / "turned.tif").write_bytes(tiff(RGB, 2, orientation=6))
    assert read_georeference(tmp_path / "turned.tif") is None


PEAK = """
import resource, sys
import numpy as np
from datasets.images import open_image
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
image = open_image(sys.argv[1])
assert image.shape == (10_001, 10_000, 3)
scaled = image.scaled(0.125)
rows = np.concatenate([scaled[a : a + 50] for a in range(0, scaled.shape[0], 50)])
np.save(sys.argv[2], rows)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_hundred_megapixels_take_little_memory(tmp_path):
    """10,000 x 10,000: a row of tiles is decoded at once, at a scale all rows once."""
    path = tmp_path / "a.tif"
    options = {"height": 10_001, "width": 10_000, "count": 3, "dtype": "uint8"}
    layout = {"tiled": True, "blockxsize": 512, "blockysize": 256, "SPARSE_OK": True}
    with rasterio.open(path, "w", driver="GTiff", **options, **layout) as file:
        file.write(np.full((3, 256, 512), 200, np.uint8), window=((5120, 5376), (5120, 5632)))
    command = [sys.executable, "-c", PEAK, path, tmp_path / "rows.npy"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert int(done.stdout) < 200_000, done.stderr  # kB; all pixels alone are 300,000
    rows = np.load(tmp_path / "rows.npy")
    bright = np.zeros((1250, 1250, 3), np.uint8)
    bright[640:672, 640:704] = 200
    np.testing.assert_allclose(rows.astype(int), bright, atol=25)  # 10,001 rows: borders are mixed
