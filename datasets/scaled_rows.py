"""An image at another size, made row by row: only the rows of the original that are needed.

The pixels are those that OpenCV gives for the whole image (`datasets.resize`): areas are averaged
exactly, and interpolation is in OpenCV's whole numbers, so that nearly all pixels are equal.
"""

from typing import Protocol

import cv2
import numpy as np

AREA, LINEAR, CORNERS = "area", "linear", "corners"
PIECE = 64  # rows of the original at once: bounds memory, and fits in the cache
COEFFICIENT = 2048  # of OpenCV's interpolation: 11 bits


class RowSource(Protocol):
    """An image (H, W, 3) uint8 that is read by rows.

    `block_rows` rows, from a multiple of it on, are stored together.
    """

    shape: tuple[int, int, int]
    block_rows: int

    def rows(self, start: int, stop: int) -> np.ndarray:
        """(stop - start, W, 3) uint8 RGB."""


class ArrayRows:
    """An image in memory as a `RowSource`."""

    block_rows = 1

    def __init__(self, image: np.ndarray):
        height, width, bands = image.shape
        self.image, self.shape = image, (height, width, bands)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """As `RowSource.rows`."""
        return self.image[start:stop]


class ScaledRows:
    """An image (h, w, 3) of another size; `scaled[a:b]` are some of its rows.

    Rows that are asked for in ascending order are made from rows of the original that are read
    once; a step back reads again.

    Attributes:
        shape: (h, w, 3).
        dtype: uint8, or float32 where values are not rounded.
    """

    def __init__(
        self, source: RowSource, size: tuple[int, int], method: str, *, rounded: bool = True
    ):
        """
        Args:
            size: height and width.
            method: "area" averages areas, for sizes that are not larger; "linear" interpolates
                between centers of pixels; "corners" does so with corner pixels in the corners, and
                does not round.
        """
        self.source, self.method = source, method
        self.shape = (*size, 3)
        self.rounded = rounded and method != CORNERS
        self.dtype = np.dtype(np.uint8 if self.rounded else np.float32)
        height, width = source.shape[:2]
        self._down = _positions(height, size[0], method)
        self._right = _positions(width, size[1], method)
        # OpenCV rounds means of two by two pixels up, all others to the even number.
        self._halves_up = method == AREA and (height, width) == (2 * size[0], 2 * size[1])
        self._start, self._rows = 0, np.empty((0, width, 3), np.uint8)

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Rows (b - a, w, 3) from a slice a:b."""
        start, stop, step = rows.indices(self.shape[0])
        if step != 1:
            raise ValueError(f"rows must follow each other, got a step of {step}")
        if self.shape == self.source.shape:
            return self._read(start, stop).astype(self.dtype)
        out = np.empty((max(0, stop - start), *self.shape[1:]), self.dtype)
        make = self._average if self.method == AREA else self._interpolate
        height = max(1, PIECE * self.shape[0] // self.source.shape[0])
        for first in range(start, stop, height):
            last = min(first + height, stop)
            out[first - start : last - start] = make(first, last)
        return out

    def _average(self, first: int, last: int) -> np.ndarray:
        step = self.source.shape[0] / self.shape[0]
        edges = np.arange(first, last + 1) * step  # in rows of the original
        low, high = int(edges[0]), min(int(np.ceil(edges[-1] - 1e-9)), self.source.shape[0])
        total: np.ndarray = np.zeros((last - first, self.shape[1] * 3), np.float32)
        for start in range(low, high, PIECE):
            stop = min(start + PIECE, high)
            rows = np.arange(start, stop)
            overlaps = np.minimum(rows + 1, edges[1:, None]) - np.maximum(rows, edges[:-1, None])
            weights = (overlaps.clip(min=0) / step).astype(np.float32)
            pixels: np.ndarray = self._read(start, stop).astype(np.float32)
            if self.shape[1] != pixels.shape[1]:
                size = (self.shape[1], stop - start)
                pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
            total += weights @ pixels.reshape(stop - start, -1)
        if self.rounded:
            if self._halves_up:
                np.floor(total + 0.5, out=total)
            else:
                np.rint(total, out=total)
        return total.reshape(-1, *self.shape[1:])

    def _interpolate(self, first: int, last: int) -> np.ndarray:
        before, after, fraction = (values[first:last] for values in self._down)
        low, high = int(before[0]), int(after[-1]) + 1
        pixels = self._read(low, high).reshape(high - low, -1)
        left, right, across = self._right
        columns = [(side[:, None] * 3 + np.arange(3)).ravel() for side in (left, right)]
        sides = [np.take(pixels, c, axis=1) for c in columns]
        weights = np.repeat(across, 3)
        above, below = before - low, after - low
        if not self.rounded:
            mixed = _mix(sides[0].astype(np.float32), sides[1].astype(np.float32), weights)
            down = fraction[:, None]
            return _mix(mixed[above], mixed[below], down).reshape(-1, *self.shape[1:])
        # As OpenCV does it on bytes.
        weights = np.rint(weights * COEFFICIENT).astype(np.int32)
        mixed = sides[0] * (COEFFICIENT - weights)
        mixed += sides[1] * weights
        mixed >>= 4
        down = np.rint(fraction * COEFFICIENT).astype(np.int32)[:, None]
        pixels = mixed[above] * (COEFFICIENT - down)
        pixels >>= 16
        lower = mixed[below] * down
        lower >>= 16
        pixels += lower
        pixels += 2
        pixels >>= 2
        return pixels.reshape(-1, *self.shape[1:])

    def _read(self, start: int, stop: int) -> np.ndarray:
        """Rows of the original; those that the next call may need again are kept."""
        end = self._start + len(self._rows)
        if not self._start <= start <= end:
            self._rows, self._start = self._rows[:0], start - start % self.source.block_rows
            end = self._start
        if stop > end:
            block = self.source.block_rows
            until = min(-(-stop // block) * block, self.source.shape[0])
            kept = self._rows[max(0, start - 2 - self._start) :]
            new = self.source.rows(end, until)
            self._rows = np.concatenate([kept, new]) if len(kept) else new
            self._start = until - len(self._rows)
        return self._rows[start - self._start : stop - self._start]


def _mix(first: np.ndarray, second: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return first + (second - first) * weight


def _positions(old: int, new: int, method: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Between which of `old` pixels each of the `new` ones lies, and how far, as float32."""
    if method == CORNERS:
        at = np.arange(new, dtype=np.float32) * np.float32((old - 1) / max(new - 1, 1))
    else:
        at = ((np.arange(new) + 0.5) / (new / old) - 0.5).astype(np.float32)
    floor = np.floor(at)
    before = floor.astype(np.int64)  # beyond the edge, both are the pixel there
    return before.clip(min=0), (before + 1).clip(max=old - 1), at - floor


def scale_rows(source: RowSource, scale: float) -> ScaledRows:
    """The image as `datasets.resize.resize_image` resizes it by a scale, row by row."""
    height, width = (max(1, round(side * scale)) for side in source.shape[:2])
    return ScaledRows(source, (height, width), AREA if scale < 1 else LINEAR)
