"""TIFFs and GeoTIFFs that are too large to be decoded: read by windows, with rasterio.

rasterio is optional (`pip install ".[large]"`). Without it, and in other formats, images are
decoded as a whole (`datasets.images`).
"""

from __future__ import annotations

import logging
import math
import os
import threading
import warnings
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from datasets.image_headers import (
    GRAY,
    GRAY_INVERTED,
    PALETTE,
    RGB,
    Header,
    ImageError,
    read_header,
)
from datasets.scaled_rows import CORNERS, ScaledRows, scale_rows
from datasets.segmentations import MAX_PIXELS, MAX_SIDE

LARGE_PIXELS = 100_000_000  # images that have more are read by windows where that can be done
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
MAX_BLOCK_PIXELS = 2**26  # in a strip, or in a row of tiles, which is decoded at once: 200 MB
MIN_ROWS = 64  # read at once from strips of fewer
CACHE = "64"  # MB that GDAL may keep of decoded tiles, by default a twentieth of the memory


class WindowedImage:
    """An image file (H, W, 3) that is read by rows, treated as `datasets.images.read_image` does.

    Attributes:
        shape: (H, W, 3).
        block_rows: rows that are decoded together.
    """

    def __init__(self, path: str | Path, header: Header, dataset: Any):
        self.path, self.header, self._dataset = path, header, dataset
        self.shape = (header.height, header.width, 3)
        self.block_rows = max(rows for rows, _ in dataset.block_shapes)
        if self.block_rows < MIN_ROWS:
            self.block_rows *= -(-MIN_ROWS // self.block_rows)
        self._bands = [1, 2, 3] if dataset.count >= 3 else [1]
        self._palette: np.ndarray | None = None  # (256, 3) uint8 RGB
        if header.photometric == PALETTE and dataset.count == 1:
            colors = dataset.colormap(1)
            self._palette = np.array([colors.get(i, (0, 0, 0))[:3] for i in range(256)], np.uint8)
        self._lock = threading.Lock()  # the file has one position

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Decodes rows (stop - start, W, 3), uint8 RGB.

        Raises:
            ImageError: the file is broken or truncated.
        """
        samples = self._read(start, stop)
        if samples.dtype == np.uint16:
            samples = (samples >> (self.used_bits - 8)).astype(np.uint8)
        if self._palette is not None:
            return self._palette[samples[0]]
        if len(samples) == 1:
            gray = 255 - samples if self.header.photometric == GRAY_INVERTED else samples
            samples = gray.repeat(3, axis=0)
        return np.ascontiguousarray(samples.transpose(1, 2, 0))

    def scaled(self, scale: float, *, align_corners: bool = False) -> ScaledRows:
        """The image as `datasets.resize` resizes it by a scale, row by row."""
        if align_corners:
            height, width = (max(1, math.floor(side * scale + 0.5)) for side in self.shape[:2])
            return self.resized((height, width), CORNERS)
        return scale_rows(self, scale)

    def resized(self, size: tuple[int, int], method: str, *, rounded: bool = True) -> ScaledRows:
        """The image at a height and width, row by row; see `ScaledRows`."""
        return ScaledRows(self, size, method, rounded=rounded)

    @cached_property
    def used_bits(self) -> int:
        """How many bits of 16 count, see `read_image`; for this the whole file is read once."""
        if self.header.bits < 16:
            return self.header.bits
        largest = 0
        for start in range(0, self.shape[0], self.block_rows):
            rows = self._read(start, min(start + self.block_rows, self.shape[0]))
            largest = max(largest, int(rows.max()))
        return used_bits(largest)

    def _read(self, start: int, stop: int) -> np.ndarray:
        """Samples (bands, stop - start, W) as stored."""
        try:
            with self._lock:
                window = ((start, stop), (0, self.shape[1]))
                return self._dataset.read(self._bands, window=window)
        except Exception as error:  # whatever GDAL says of a broken file
            reason = " ".join(str(error.__cause__ or error).split())
            raise ImageError(f"{self.path}: broken or truncated: {reason}") from None


def used_bits(largest: int) -> int:
    """The even number of bits, as sensors have, that an image's largest sample needs."""
    used = largest.bit_length()
    return max(8, used + used % 2)


def open_by_windows(path: str | Path, *, turned: bool = True) -> WindowedImage | None:
    """A file of more than `LARGE_PIXELS`; None if it is smaller or has to be decoded as a whole.

    Args:
        turned: whether an orientation is to be applied, which only decoded images can be.

    Raises:
        ImageError: more pixels than the masks of results can have.
    """
    header = _tiff_header(path)
    if header is None or header.width * header.height <= LARGE_PIXELS:
        return None
    if turned and header.orientation != 1:
        return None
    if (dataset := _open(path)) is None:
        return None
    depth = dataset.tags(1, ns="IMAGE_STRUCTURE").get("NBITS", "8")
    block = max(rows for rows, _ in dataset.block_shapes) * header.width
    supported = set(dataset.dtypes) <= {"uint8", "uint16"} and int(depth) >= 8
    if "uint16" in dataset.dtypes:  # other color spaces are converted in 8 bits only
        supported &= header.photometric in (GRAY_INVERTED, GRAY, RGB)
    if not supported or block > MAX_BLOCK_PIXELS or dataset.shape != (header.height, header.width):
        return None
    if header.width * header.height > MAX_PIXELS or max(dataset.shape) > MAX_SIDE:
        raise ImageError(
            f"{path}: {header.width} x {header.height} pixels are more than masks in COCO's format "
            f"can have, {MAX_PIXELS:,}, and {MAX_SIDE:,} on a side; cut it into tiles"
        )
    try:
        return WindowedImage(path, header, dataset)
    except ValueError:  # a palette without colors
        return None


def windows_hint(path: str | Path, *, turned: bool = True) -> str:
    """For a message on an image that is too large to be decoded: how it can be read by windows."""
    header = _tiff_header(path)
    if header is None:
        return "save it as a tiled TIFF, which is read by windows"
    if _rasterio() is None:
        return 'install rasterio (pip install ".[large]"), which reads it by windows'
    if turned and header.orientation != 1:
        return f"remove its orientation {header.orientation} or ignore it (--exif ignore)"
    return "save it in tiles, of 8 or 16 bits, to have it read by windows"


def read_georeference(path: str | Path, *, turned: bool = True) -> dict | None:
    """Where a GeoTIFF lies; None if it does not say so, is turned, or without rasterio.

    Returns:
        "crs": "EPSG:..." or WKT; "transform": the numbers a to f of x = a column + b row + c and
        y = d column + e row + f, for corners of pixels.
    """
    header = _tiff_header(path)
    if header is None or (turned and header.orientation != 1) or (dataset := _open(path)) is None:
        return None
    with dataset:
        if not dataset.crs or dataset.transform.is_identity:
            return None
        authority = dataset.crs.to_authority()
        crs = ":".join(authority) if authority else dataset.crs.to_wkt()
        return {"crs": crs, "transform": list(dataset.transform[:6])}


def _tiff_header(path: str | Path) -> Header | None:
    try:
        with Path(path).open("rb") as file:
            if file.read(4) not in TIFF_STARTS:
                return None
            file.seek(0)
            return read_header(file)
    except (OSError, ValueError):
        return None  # whoever decodes it says why


def _open(path: str | Path) -> Any:
    """rasterio's dataset; None without rasterio, or where it cannot read the file."""
    if (rasterio := _rasterio()) is None:
        return None
    try:
        # With its whole path no name is taken for an address of GDAL's.
        return rasterio.open(os.path.abspath(path), driver="GTiff")
    except Exception:
        return None


def _rasterio() -> Any:
    os.environ.setdefault("GDAL_CACHEMAX", CACHE)
    try:
        import rasterio
        from rasterio.errors import NotGeoreferencedWarning
    except ImportError:
        return None
    warnings.filterwarnings("ignore", category=NotGeoreferencedWarning)
    logging.getLogger("rasterio").setLevel(logging.CRITICAL)  # the caller says what is broken
    return rasterio
