"""Polygons of masks along the edges of pixels: exactly the mask's area, with its holes.

Pixels that touch at a corner only are apart, so that every polygon is valid: its rings touch
themselves nowhere, and each other in single points at most.
"""

from collections import defaultdict

import cv2
import numpy as np

from pipeline.inference.mask_crops import crop_mask

Ring = np.ndarray  # (n, 2) x, y of corners, not closed
NEAREST_CHUNK = 2**18  # distances at once


def trace_rle(rle: dict) -> list[list[Ring]]:
    """The polygons of a compressed RLE, see `trace_mask`, in the image's coordinates."""
    mask, corner = crop_mask(rle)
    return [[ring + corner for ring in polygon] for polygon in trace_mask(mask)]


def trace_mask(mask: np.ndarray) -> list[list[Ring]]:
    """The polygons of a mask (h, w) uint8: each an outer ring and its holes, (n, 2) int64.

    The corner of the first pixel is (0, 0), y goes down. Outer rings have a positive area by the
    shoelace formula, holes a negative one.
    """
    padded = np.pad(mask.astype(np.uint8), 1)
    above_left, above_right = padded[:-1, :-1], padded[:-1, 1:]
    below_left, below_right = padded[1:, :-1], padded[1:, 1:]
    odd = (above_left ^ above_right ^ below_left ^ below_right).astype(bool)
    diagonal = (above_left == below_right) & (above_right == below_left)
    diagonal &= above_left != above_right
    # Corners, row by row; where two pixels touch at a corner it is there twice.
    y, x = np.nonzero(odd | diagonal)
    y, x = (np.repeat(values, 1 + diagonal[y, x]) for values in (y, x))
    twice = diagonal[y, x]
    second = np.zeros(len(y), bool)
    second[1:] = twice[1:] & (y[1:] == y[:-1]) & (x[1:] == x[:-1])
    # In a row, each corner of an odd index ends the edge that the one before begins. The first of
    # two copies ends the edge from the left; its pixel's other edge goes up, or down.
    swapped = twice & (above_right[y, x] == 1)
    down_columns = np.lexsort((second ^ swapped, y, x))
    beside = np.arange(len(y)) ^ 1
    along = np.empty(len(y), np.int64)
    along[down_columns] = down_columns[np.arange(len(y)) ^ 1]
    # Edges go right above a pixel, and left below one: outer rings then have a positive area.
    to_right = below_right[y[::2], x[::2]] == 1
    starts = np.arange(0, len(y), 2) + ~to_right
    _, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=4, ltype=cv2.CV_32S)
    pixel_y = y[::2] - ~to_right
    owners = labels[pixel_y, x[::2]] if len(y) else np.zeros(0, int)
    return _join(np.stack([x, y], axis=1), beside, along, starts, owners, twice)


def join_rings(polygons: list[list[Ring]]) -> Ring:
    """One ring (n, 2) of a mask's polygons, for formats that know neither holes nor parts.

    A line that goes there and back leads to each hole and each part, between the nearest corners.
    It has no area, and whoever fills the ring, by winding numbers or by crossings, gets the mask.
    """
    return _bridge([_bridge(polygon) for polygon in polygons])


def _bridge(rings: list[Ring]) -> Ring:
    joined = rings[0]
    for ring in rings[1:]:
        here, there = _nearest(joined, ring)
        detour = [np.roll(ring, -there, axis=0), ring[[there]]]
        joined = np.concatenate([joined[: here + 1], *detour, joined[here:]])
    return joined


def _nearest(a: Ring, b: Ring) -> tuple[int, int]:
    """The indices of two corners of rings (n, 2) and (m, 2) with the least distance."""
    best, indices = np.inf, (0, 0)
    step = max(1, NEAREST_CHUNK // len(a))
    for start in range(0, len(b), step):
        distances = ((a[:, None] - b[None, start : start + step]) ** 2).sum(axis=2)
        i, j = np.unravel_index(distances.argmin(), distances.shape)
        if distances[i, j] < best:
            best, indices = distances[i, j], (int(i), start + int(j))
    return indices


def _join(
    corners: np.ndarray,
    beside: np.ndarray,
    along: np.ndarray,
    starts: np.ndarray,
    owners: np.ndarray,
    twice: np.ndarray,
) -> list[list[Ring]]:
    """Polygons of corners (n, 2), whose edges lead to `beside` in the row, `along` the column.

    `starts` (n / 2,) are the corners at which edges in rows begin, `owners` the components that
    they belong to; corners that are `twice` there are where rings may touch themselves.
    """
    next_start = along[beside[starts]].tolist()  # the corner at which the next one begins
    beside_list, seen = beside.tolist(), [False] * len(corners)
    outer: dict[int, Ring] = {}
    holes: dict[int, list[Ring]] = defaultdict(list)
    for start, owner in zip(starts.tolist(), owners.tolist(), strict=True):
        indices = []
        while not seen[start]:
            seen[start] = True
            indices += [start, beside_list[start]]
            start = next_start[start >> 1]
        if not indices:
            continue
        ring = corners[indices]
        for part in _split(ring) if twice[indices].any() else [ring]:
            if signed_area(part) > 0:
                outer[owner] = part
            else:
                holes[owner].append(part)
    return [[ring, *holes[owner]] for owner, ring in outer.items()]


def _split(ring: Ring) -> list[Ring]:
    """A ring that meets itself in single points, cut there."""
    parts: list[Ring] = []
    path: list[tuple[int, int]] = []
    at: dict[tuple[int, int], int] = {}
    for point in map(tuple, ring.tolist()):
        if point in at:
            first = at[point]
            parts.append(np.array(path[first:]))
            for passed in path[first + 1 :]:
                del at[passed]
            del path[first + 1 :]
        else:
            at[point] = len(path)
            path.append(point)
    return [*parts, np.array(path)]


def signed_area(ring: np.ndarray) -> float:
    """By the shoelace formula: positive where x turns to y, of a ring (n, 2)."""
    x, y = (ring - ring[0]).T
    return float(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2
