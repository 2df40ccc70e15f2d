"""From mask logits in a patch to an RLE mask in the image, working in the mask's own window only.

A proposal's mask covers the square of its patch in the image. Only the window around its foreground
is resampled, thresholded and run-length encoded; the runs are then shifted to where the window
lies. No full-image array exists.
"""

import math
from dataclasses import dataclass

import numpy as np
import pycocotools.mask as coco_mask


@dataclass(frozen=True)
class Placement:
    """Where a patch lies in the original image.

    Its top-left corner and its size, in pixels, each (x, y).

    Attributes:
        corners: how the cells of a mask lie over it. False: they share its area evenly. True: the
            first and last cell are its first and last pixel (whole numbers then), as in the
            released code.
    """

    left: float
    top: float
    width: float
    height: float
    corners: bool = False


def paste(
    logits: np.ndarray, place: Placement, *, image_size: tuple[int, int], threshold: float
) -> tuple[dict, np.ndarray] | None:
    """The mask of a patch as an object of the image.

    Args:
        logits: (M, M) float32, over the patch.
        place: the patch in the image.
        image_size: height and width.
        threshold: probability from which on a pixel belongs to the mask, in (0, 1).

    Returns:
        The compressed RLE and its box (4,) float32 xyxy; None when no pixel of the image belongs to
        the mask.
    """
    limit = math.log(threshold / (1 - threshold))
    above = logits > limit
    rows, columns = above.any(1), above.any(0)
    if not rows.any():
        return None
    # How many cells on a cell counts: from its centre to its neighbours', or from corner to corner
    # a little more.
    reach = 2 if place.corners else 1
    y0, y1 = _window(rows, place.top, place.height, image_size[0], reach)
    x0, x1 = _window(columns, place.left, place.width, image_size[1], reach)
    if y1 <= y0 or x1 <= x0:
        return None
    vertical = _weights(y0, y1, place.top, place.height, len(rows), place.corners)
    horizontal = _weights(x0, x1, place.left, place.width, len(columns), place.corners)
    window = vertical @ logits @ horizontal.T > limit
    return encode_window(window, x0, y0, image_size)


def _window(
    above: np.ndarray, start: float, length: float, limit: int, reach: int
) -> tuple[int, int]:
    """Pixels, within the patch and the image, that the marked cells can reach by interpolation."""
    cells = np.flatnonzero(above)
    cell = length / len(above)
    low = max(start + (cells[0] + 0.5 - reach) * cell, start)
    high = min(start + (cells[-1] + 0.5 + reach) * cell, start + length)
    # A pixel belongs to the patch when its centre does.
    return max(math.ceil(low - 0.5), 0), min(math.ceil(high - 0.5), limit)


def _weights(
    first: int, last: int, start: float, length: float, cells: int, corners: bool
) -> np.ndarray:
    """What each cell counts for each pixel: (last - first, cells) float32."""
    if not corners:
        return _interpolation(first, last, start, length, cells)
    pixels = np.arange(first, last) - start
    if length < cells:  # where it shrinks, image.scale of Lua Torch averages areas
        low, high = np.arange(cells), pixels[:, None] * (cells / length)
        shared = np.minimum(low + 1, high + cells / length) - np.maximum(low, high)
        return (np.maximum(0, shared) * (length / cells)).astype(np.float32)
    position = pixels * ((cells - 1) / max(length - 1, 1))
    return np.maximum(0, 1 - np.abs(position[:, None] - np.arange(cells))).astype(np.float32)


def _interpolation(first: int, last: int, start: float, length: float, cells: int) -> np.ndarray:
    """Bilinear weights of the cells' centres at the pixels' centres.

    Returns:
        (last - first, cells) float32.
    """
    position = (np.arange(first, last) + 0.5 - start) * (cells / length) - 0.5
    position = position.clip(0, cells - 1)
    return np.maximum(0, 1 - np.abs(position[:, None] - np.arange(cells))).astype(np.float32)


def encode_window(
    window: np.ndarray, x0: int, y0: int, image_size: tuple[int, int]
) -> tuple[dict, np.ndarray] | None:
    """RLE and box of a mask that is known within a window of the image.

    Args:
        window: (h, w) bool. x0, y0: the window's top-left pixel. image_size: height and width.
    """
    height, width = image_size
    rows, columns = np.flatnonzero(window.any(1)), np.flatnonzero(window.any(0))
    if len(rows) == 0:
        return None
    box = np.array(
        [x0 + columns[0], y0 + rows[0], x0 + columns[-1] + 1, y0 + rows[-1] + 1], np.float32
    )
    # COCO runs go down the columns. A border of background closes every run within its column.
    padded = np.zeros((window.shape[1], window.shape[0] + 2), np.int8)
    padded[:, 1:-1] = window.T
    column, row = np.nonzero(np.diff(padded, axis=1))
    edges = (x0 + column) * height + y0 + row  # alternately the start and the end of a run
    starts, ends = edges[::2], edges[1::2]
    apart = np.ones(len(starts) + 1, bool)
    # A run to the bottom of a column may go on at the top of the next.
    apart[1:-1] = starts[1:] != ends[:-1]
    edges = np.stack([starts[apart[:-1]], ends[apart[1:]]], axis=1).ravel()
    counts = np.diff(edges, prepend=0, append=height * width)
    if counts[-1] == 0:
        counts = counts[:-1]
    rle = coco_mask.frPyObjects({"size": [height, width], "counts": counts.tolist()}, height, width)
    return rle, box
