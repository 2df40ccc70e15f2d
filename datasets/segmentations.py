"""COCO `segmentation` values of a chunk of annotations -> flat arrays, the unusable marked.

N: annotations of the chunk, R: usable rings of polygons, P: their points.
"""

from __future__ import annotations

from itertools import chain

import numpy as np
from pycocotools import mask as coco_mask

from datasets.rle import MAX_PIXELS, check_counts

REASONS = (
    "",
    "outside the image",
    "zero area",
    "RLE size differs from the image",
    "broken RLE",
    "NaN or infinite number",
    "fewer than three points",
    "odd number of coordinates",
    "box is not four finite numbers",
    "malformed segmentation",
    "no segmentation",
    "unknown category",
    "unknown image",
)
(
    USABLE,
    OUTSIDE,
    ZERO_AREA,
    RLE_SIZE,
    BROKEN_RLE,
    NOT_FINITE,
    FEW_POINTS,
    ODD_COORDINATES,
    MALFORMED_BOX,
    MALFORMED,
    NO_SEGMENTATION,
    UNKNOWN_CATEGORY,
    UNKNOWN_IMAGE,
) = range(len(REASONS))

MIN_AREA = 1e-6  # square pixels; points on one line give some 1e-10 by rounding


def flatten_segmentations(values: list) -> dict[str, np.ndarray]:
    """Check and flatten the segmentations of N annotations.

    Returns:
        reason (N,) int8: index into REASONS, 0 for a usable one;
        bounds (N, 4) float64: xyxy of the polygons or of the mask;
        area (N,) float64: of the polygons, or of the mask, in pixels;
        ring_count (N,) int64, ring_size (R,) int64 in points, points (P, 2) float32;
        rle_size (N, 2) int32: height and width, 0 for polygons; rle_length (N,) int64 in bytes;
        rle_bytes (B,) uint8: compressed counts.
    """
    n = len(values)
    reason = np.full(n, MALFORMED, np.int8)
    reason[[not value for value in values]] = NO_SEGMENTATION
    columns = {
        "reason": reason,
        "bounds": np.zeros((n, 4)),
        "area": np.zeros(n),
        "ring_count": np.zeros(n, np.int64),
        "rle_size": np.zeros((n, 2), np.int32),
        "rle_length": np.zeros(n, np.int64),
    }
    for kind, flatten in ((list, _flatten_polygons), (dict, _flatten_rles)):
        rows = [row for row, value in enumerate(values) if type(value) is kind and value]
        per_annotation, blobs = flatten([values[row] for row in rows])
        for name, column in per_annotation.items():
            columns[name][rows] = column
        columns |= blobs
    return columns


def _flatten_polygons(values: list[list]) -> tuple[dict, dict]:
    try:
        return _flatten_wellformed_polygons(values)
    except (TypeError, ValueError, OverflowError):
        wellformed = [_is_wellformed(value) for value in values]
    columns, blobs = _flatten_wellformed_polygons(
        [value if good else [[]] for value, good in zip(values, wellformed, strict=True)]
    )
    columns["reason"][~np.array(wellformed)] = MALFORMED
    return columns, blobs


def _is_wellformed(value: list) -> bool:
    try:
        _flatten_wellformed_polygons([value])
    except (TypeError, ValueError, OverflowError):
        return False
    return True


def _flatten_wellformed_polygons(values: list[list]) -> tuple[dict, dict]:
    n = len(values)
    rings = list(chain.from_iterable(values))
    if not {*map(type, rings)} <= {list}:
        raise TypeError("a ring that is no list")
    lengths = np.fromiter(map(len, rings), np.int64, len(rings))
    numbers = np.fromiter(chain.from_iterable(rings), np.float64, lengths.sum())
    owner = np.repeat(np.arange(n), np.fromiter(map(len, values), np.int64, n))

    # A ring of one or two points beside good ones encloses nothing: it goes, the annotation stays.
    reason = np.full(n, FEW_POINTS, np.int8)
    reason[owner[lengths >= 6]] = USABLE
    if not np.isfinite(numbers).all():
        number_owner = np.repeat(owner, lengths)
        reason[number_owner[~np.isfinite(numbers)]] = NOT_FINITE
    reason[owner[lengths % 2 == 1]] = ODD_COORDINATES

    keep = (lengths >= 6) & (reason[owner] == USABLE)
    if not keep.all():
        numbers, owner, lengths = numbers[np.repeat(keep, lengths)], owner[keep], lengths[keep]
    sizes = lengths // 2
    with np.errstate(over="ignore", invalid="ignore"):  # of 1e300, which is outside of any image
        bounds, area = _measure_polygons(numbers.reshape(-1, 2), sizes, owner, n)
        points = numbers.reshape(-1, 2).astype(np.float32)
    reason[(reason == USABLE) & (area < MIN_AREA)] = ZERO_AREA
    per_annotation = {
        "reason": reason,
        "bounds": bounds,
        "area": area,
        "ring_count": np.bincount(owner, minlength=n),
    }
    return per_annotation, {"ring_size": sizes, "points": points}


def _measure_polygons(
    points: np.ndarray, sizes: np.ndarray, owner: np.ndarray, n: int
) -> tuple[np.ndarray, np.ndarray]:
    """Bounds (n, 4) xyxy and areas (n,) of annotations, from rings (R,) of points (P, 2).

    Args:
        sizes: (R,) points of each ring. owner: (R,) its annotation, ascending; who has no ring
            gets zeros.
    """
    bounds, area = np.zeros((n, 4)), np.zeros(n)
    if not len(sizes):
        return bounds, area
    ends = np.cumsum(sizes)
    starts = ends - sizes
    first_ring = np.flatnonzero(np.diff(owner, prepend=-1))
    rows, row_starts = owner[first_ring], starts[first_ring]
    x, y = np.ascontiguousarray(points.T)
    for side, (values, extreme) in enumerate(
        ((x, np.minimum), (y, np.minimum), (x, np.maximum), (y, np.maximum))
    ):
        bounds[rows, side] = extreme.reduceat(values, row_starts)

    # The shoelace formula, about each ring's first point to keep the products small.
    x, y = (values - np.repeat(values[starts], sizes) for values in (x, y))
    cross = np.empty_like(x)
    cross[:-1] = x[:-1] * y[1:] - x[1:] * y[:-1]
    cross[ends - 1] = 0  # from the last point to the first, the origin
    area[:] = np.bincount(owner, np.abs(np.add.reduceat(cross, starts)) / 2, n)
    return bounds, area


def _flatten_rles(values: list[dict]) -> tuple[dict, dict]:
    n = len(values)
    sizes = np.array([_rle_size(value) for value in values], np.int64).reshape(n, 2)
    counts = [_compress(value, size) for value, size in zip(values, sizes.tolist(), strict=True)]
    valid, area, has_empty_run = check_counts(counts, sizes.prod(axis=1))

    good = np.flatnonzero(valid)
    masks = [{"size": sizes[row].tolist(), "counts": counts[row]} for row in good]
    for at, row in enumerate(good):
        if has_empty_run[row]:  # pycocotools' merge and toBbox go wrong on these
            masks[at] = coco_mask.encode(coco_mask.decode(masks[at]))
    kept = [b""] * n
    for row, rle in zip(good, masks, strict=True):
        kept[row] = rle["counts"]

    bounds = np.zeros((n, 4))
    if masks:
        bounds[good] = coco_mask.toBbox(masks)
    bounds[:, 2:] += bounds[:, :2]
    reason = np.where(valid, np.where(area > 0, USABLE, ZERO_AREA), BROKEN_RLE)
    per_annotation = {
        "reason": reason,
        "bounds": bounds,
        "area": area,
        "rle_size": sizes,
        "rle_length": [len(string) for string in kept],
    }
    return per_annotation, {"rle_bytes": np.frombuffer(b"".join(kept), np.uint8)}


def _rle_size(rle: dict) -> tuple[int, int]:
    """(height, width), or zeros, which no counts fit."""
    size = rle.get("size")
    if type(size) is not list or len(size) != 2 or {*map(type, size)} != {int}:
        return 0, 0
    height, width = size
    return (height, width) if min(size) > 0 and height * width <= MAX_PIXELS else (0, 0)


def _compress(rle: dict, size: list[int]) -> bytes:
    """The compressed counts of either kind of RLE, b"" where there are none."""
    counts = rle.get("counts")
    if type(counts) is str:
        return counts.encode("utf-8", "surrogatepass")
    if type(counts) is not list or {*map(type, counts)} != {int}:
        return b""
    if min(counts) < 0 or sum(counts) != size[0] * size[1]:
        return b""
    return coco_mask.frPyObjects({"size": size, "counts": counts}, *size)["counts"]
