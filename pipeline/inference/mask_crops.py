"""Masks of images of any size: their pixels within their box, and masks at other sizes.

The pixels of the whole image are never made; there may be billions of them.
"""

import math
from typing import TypeVar

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from datasets.images import Image
from datasets.resize import resize_image
from pipeline.inference.paste import encode_edges
from pipeline.inference.proposals import Detections, Proposals

DRAWN_SIDE = 2000  # px of the longer side: larger images are drawn reduced
HALF = 127  # of a pixel of 0 or 255 that is covered in part
Found = TypeVar("Found", Proposals, Detections)


def run_lengths(counts: bytes) -> np.ndarray:
    """The runs (r,) int64 of a valid compressed RLE string, background first."""
    digits = np.frombuffer(counts, np.uint8) - np.uint8(48)
    last = np.flatnonzero(digits < 32)  # of each number: it has the sign
    length = np.diff(last, prepend=-1)
    runs = (digits[last].astype(np.int64) ^ 16) - 16
    for back in range(1, int(length.max(initial=0))):
        rows = np.flatnonzero(length > back)
        runs[rows] = (runs[rows] << 5) + (digits[last[rows] - back] & 31)
    for first in (1, 2):  # from the fourth on, differences to the run two before
        runs[first::2] = np.cumsum(runs[first::2])
    return runs


def contains(counts: bytes, height: int, x: float, y: float) -> bool:
    """Whether a mask of an image of this height has the pixel in which a point lies."""
    pixel = int(x) * height + int(y)  # counted down the columns
    return bool(np.searchsorted(np.cumsum(run_lengths(counts)), pixel, side="right") % 2)


def crop_mask(rle: dict) -> tuple[np.ndarray, tuple[int, int]]:
    """A mask's pixels (h, w) uint8 within its box, and the box's corner x, y in the image.

    An empty mask is (0, 0).
    """
    height = rle["size"][0]
    counts = rle["counts"]
    ends = np.cumsum(run_lengths(counts.encode() if isinstance(counts, str) else counts))
    runs = ends[: len(ends) // 2 * 2].reshape(-1, 2)  # of the foreground: first, and one after
    runs = runs[runs[:, 0] < runs[:, 1]]
    if not len(runs):
        return np.zeros((0, 0), np.uint8), (0, 0)
    column, row = np.divmod(runs - [0, 1], height)  # of a run's first and last pixel
    within = column[:, 0] == column[:, 1]
    # A run over several columns touches the bottom row and the top row.
    x, y = int(column[0, 0]), int(np.where(within, row[:, 0], 0).min())
    bottom = int(np.where(within, row[:, 1], height - 1).max()) + 1
    h, w = bottom - y, int(column[-1, 1]) + 1 - x
    edges = (column - x) * h + (row - y) + [0, 1]
    steps = np.zeros(h * w + 1, np.int8)
    steps[edges[:, 0]] += 1
    steps[edges[:, 1]] -= 1  # a run may end where another begins, in the next column
    return np.cumsum(steps[:-1], dtype=np.int8).view(np.uint8).reshape(w, h).T, (x, y)


def shrink_mask(rle: dict, size: tuple[int, int]) -> dict:
    """A mask at a smaller height and width, as RLE: the pixels below the centers of the new ones.

    One that none of these hits keeps one pixel.
    """
    mask, (x, y) = crop_mask(rle)
    small = np.zeros(size, np.uint8, order="F")
    if mask.size:
        (rows, ys), (columns, xs) = (
            _below_centers(new, old, start, length)
            for new, old, start, length in zip(size, rle["size"], (y, x), mask.shape, strict=True)
        )
        small[np.ix_(rows, columns)] = mask[np.ix_(ys, xs)]
        if not small.any():
            center = (y + mask.shape[0] / 2, x + mask.shape[1] / 2)
            row, column = (
                int(c * n / o) for c, n, o in zip(center, size, rle["size"], strict=True)
            )
            small[min(row, size[0] - 1), min(column, size[1] - 1)] = 1
    return coco_mask.encode(small)


def enlarge_mask(rle: dict, size: tuple[int, int]) -> dict:
    """A mask that is not empty at a larger height and width, as RLE, its edges interpolated."""
    mask, (x, y) = crop_mask(rle)
    (height, width), (old_height, old_width) = size, rle["size"]
    step_x, step_y = old_width / width, old_height / height
    # The part of the new image that the crop and a pixel around it cover.
    left, top = max(0, math.floor((x - 1) / step_x)), max(0, math.floor((y - 1) / step_y))
    right = min(width, math.ceil((x + mask.shape[1] + 1) / step_x))
    bottom = min(height, math.ceil((y + mask.shape[0] + 1) / step_y))
    # Where the centers of its pixels lie in the crop.
    place = np.array(
        [
            [step_x, 0, (left + 0.5) * step_x - 0.5 - x],
            [0, step_y, (top + 0.5) * step_y - 0.5 - y],
        ]
    )
    for method in (cv2.INTER_LINEAR, cv2.INTER_NEAREST):  # a speck may vanish between the centers
        large = cv2.warpAffine(
            np.ascontiguousarray(mask) * np.uint8(255),
            place,
            (right - left, bottom - top),
            flags=method | cv2.WARP_INVERSE_MAP,
        )
        if large.max() > HALF:
            break
    columns = np.pad(large.T > HALF, ((0, 0), (1, 1)))  # a run ends with its column
    column, row = np.nonzero(columns[:, 1:] != columns[:, :-1])
    edges = (column + left) * height + row + top
    [counts] = encode_edges(np.zeros(len(edges), np.int64), edges, size).rles
    return {"size": list(size), "counts": counts}


def _below_centers(new: int, old: int, start: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of `new` pixels whose centers lie in a part of `old` ones, and where in the part."""
    at = ((np.arange(new) + 0.5) * (old / new)).astype(np.int64) - start
    inside = np.flatnonzero((at >= 0) & (at < length))
    return inside, at[inside]


def fit_for_drawing(image: Image, found: Found, count: int) -> tuple[np.ndarray, Found]:
    """A copy of an image with the first `count` of what was found in it, both reduced if large."""
    longest = max(image.shape[:2])
    columns = {k: v[:count] for k, v in vars(found).items() if isinstance(v, np.ndarray | list)}
    best = type(found)(**(vars(found) | columns))
    if longest <= DRAWN_SIDE and isinstance(image, np.ndarray):
        return image.copy(), best
    picture = resize_image(image, DRAWN_SIDE / longest)
    height, width = picture.shape[:2]
    scale = np.array([width / image.shape[1], height / image.shape[0]] * 2, np.float32)
    best.rles = [shrink_mask(best.rle(i), (height, width))["counts"] for i in range(len(best.rles))]
    best.boxes, best.height, best.width = best.boxes * scale, height, width
    return picture, best
