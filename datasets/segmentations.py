"""COCO `segmentation` values: what is a usable one, and many of them as flat arrays.

N: annotations, R: rings of their polygons, P: points of these rings.
"""

from __future__ import annotations

import math
import struct
from enum import StrEnum
from itertools import chain
from typing import Annotated, Any

import msgspec
import numpy as np
from pycocotools import mask as coco_mask

MIN_AREA = 1e-6  # square pixels; points on one line give some 1e-10 by rounding

# With a seventh digit pycocotools shifts a negative number by more than its 32 bits, and decodes
# another one, to beyond the end of the mask. When it writes, it has memory for six of each number.
# Six digits are enough for any run in 2^29 pixels.
MAX_DIGITS = 6
MAX_PIXELS = 2**29
MAX_SIDE = 2**20  # of an image: OpenCV reads none longer
RELATIVE = -0.02, 1.02  # range of relative coordinates: tools round, and draw over the edge
CHUNK = 40  # run-length strings checked at once: arrays small enough for the cache and the heap

USABLE = ""


class Reason(StrEnum):
    """Why an annotation cannot be used."""

    UNKNOWN_IMAGE = "unknown image"
    UNKNOWN_CATEGORY = "unknown category"
    NO_SEGMENTATION = "no segmentation"
    MALFORMED = "malformed segmentation"
    ODD_COORDINATES = "odd number of coordinates"
    NOT_FINITE = "NaN or infinite number"
    FEW_POINTS = "fewer than three points"
    BROKEN_RLE = "broken RLE"
    RLE_SIZE = "RLE size differs from the image"
    MALFORMED_BOX = "box is not four finite numbers"
    ZERO_AREA = "zero area"
    OUTSIDE = "outside the image"
    RELATIVE = "relative coordinates (0 to 1, not pixels)"
    FLAG = "iscrowd or ignore is neither 0 nor 1"


Side = Annotated[int, msgspec.Meta(ge=1, le=MAX_SIDE)]
Ring = Annotated[list[float], msgspec.Meta(min_length=6)]  # x, y, x, y, ...


class Rle(msgspec.Struct, gc=False):
    """A mask; its runs, a list or compressed, are not yet checked."""

    size: tuple[Side, Side]  # height and width
    counts: str | list[Annotated[int, msgspec.Meta(ge=0, le=MAX_PIXELS)]]


Segmentation = list[Ring] | Rle | Reason | None
Number = float | None
Point = tuple[Number, Number]


def repair_segmentation(value: Any) -> Segmentation:
    """The usable part of any JSON value, or the reason why there is none."""
    if not value:
        return None
    if isinstance(value, dict):
        integral = {name: _as_integers(value.get(name)) for name in ("size", "counts")}
        return convert_or(Reason.BROKEN_RLE, integral, Rle)
    rings = _read_rings(value)
    if rings is None:
        return Reason.MALFORMED
    if any(len(ring) % 2 for ring in rings):
        return Reason.ODD_COORDINATES
    finite = [[x for x in ring if x is not None and math.isfinite(x)] for ring in rings]
    if finite != rings:
        return Reason.NOT_FINITE
    # A ring of one or two points beside good ones encloses nothing: it goes, the annotation stays.
    return [ring for ring in finite if len(ring) >= 6] or Reason.FEW_POINTS


def _as_integers(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    return [int(x) if isinstance(x, float) and x.is_integer() else x for x in value]


def _read_rings(value: Any) -> list[list[Number]] | None:
    """Rings x, y, x, y, ..., given so or as pairs of points; a single ring may be given bare."""
    is_bare = convert_or(None, value, list[Number]) or len(convert_or((), value, list[Point])) > 2
    if not isinstance(value, list):
        return None
    rings = []
    for ring in [value] if is_bare else value:
        points = convert_or(None, ring, list[Point])
        ring = list(chain(*points)) if points else convert_or(None, ring, list[Number])
        if ring is None:
            return None
        rings.append(ring)
    return rings


def convert_or(otherwise: Any, value: Any, type_: Any) -> Any:
    """A JSON value as the type, or `otherwise` if it is not of the type."""
    try:
        return msgspec.convert(value, type_)
    except ValueError:
        return otherwise


def flatten_segmentations(
    segmentations: list[Segmentation], image_sizes: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Check, measure and flatten the segmentations of N annotations.

    `image_sizes` (N, 2) are the height and width of each one's image.

    Returns:
        reasons (N,), each a `Reason` or USABLE; bounds (N, 4) float64, xyxy; areas (N,) float64 in
        pixels; and columns: ring_count (N,), ring_size (R,) in points, points (P, 2) float32,
        rle_length (N,) in bytes, and rle_bytes, the compressed counts.
    """
    n = len(segmentations)
    reason, bounds = np.full(n, USABLE, object), np.zeros((n, 4))
    polygons = [s if isinstance(s, list) else [] for s in segmentations]
    rings = list(chain.from_iterable(polygons))
    ring_count = np.fromiter(map(len, polygons), np.int64, n)
    owner = np.repeat(np.arange(n), ring_count)
    lengths = np.fromiter(map(len, rings), np.int64, len(rings))
    odd = np.flatnonzero(lengths % 2)
    for i in odd:
        rings[i] = rings[i][:-1]
    sizes = lengths // 2
    numbers = struct.pack(f"{2 * sizes.sum()}d", *chain.from_iterable(rings))  # faster than numpy
    points = np.frombuffer(numbers).reshape(-1, 2)
    ends = np.cumsum(sizes)
    starts = ends - sizes
    is_first = np.diff(owner, prepend=-1) > 0  # ring of its annotation
    bounds[owner[is_first], :2] = np.minimum.reduceat(points, starts[is_first])
    bounds[owner[is_first], 2:] = np.maximum.reduceat(points, starts[is_first])
    with np.errstate(over="ignore", invalid="ignore"):  # of 1e300, which is outside of any image
        # The shoelace formula, about each ring's first point to keep the products small.
        x, y = (points - np.repeat(points[starts], sizes, axis=0)).T
        cross = np.append(x[:-1] * y[1:] - x[1:] * y[:-1], 0)
        cross[ends - 1] = 0  # from the last point to the first, the origin
        area = np.bincount(owner, np.abs(np.add.reduceat(cross, starts)) / 2, n)
        area = area.astype(np.float64, copy=False)  # of no ring at all they are integers
        points = points.astype(np.float32)

    rles = {row: s for row, s in enumerate(segmentations) if isinstance(s, Rle)}
    rows, counts = np.array(list(rles), np.int64), list(map(_compress, rles.values()))
    rle_sizes = np.array([rle.size for rle in rles.values()], np.int64).reshape(-1, 2)
    valid, area[rows], has_empty_run = check_counts(counts, rle_sizes.prod(axis=1))
    fits = (rle_sizes == image_sizes[rows]).all(axis=1)
    for i in np.flatnonzero(valid & fits):
        mask = {"size": rle_sizes[i].tolist(), "counts": counts[i]}
        if has_empty_run[i]:  # pycocotools' merge and toBbox go wrong on these
            mask = coco_mask.encode(coco_mask.decode(mask))
            counts[i] = mask["counts"]
        bounds[rows[i]] = coco_mask.toBbox(mask)
    bounds[rows, 2:] += bounds[rows, :2]
    rle_length = np.zeros(n, np.int64)
    rle_length[rows] = [len(string) for string in counts]

    reason[area < MIN_AREA] = Reason.ZERO_AREA
    tiny = np.flatnonzero((bounds[:, 2] <= RELATIVE[1]) & (ring_count > 0))
    if len(tiny):
        is_line = (bounds[tiny, 2:] <= bounds[tiny, :2]).any(axis=1)
        is_relative = are_relative(bounds[tiny], image_sizes[tiny]) & ~is_line
        reason[tiny[is_relative]] = Reason.RELATIVE
    reason[owner[odd]] = Reason.ODD_COORDINATES
    reason[rows[~fits]] = Reason.RLE_SIZE
    reason[rows[~valid]] = Reason.BROKEN_RLE
    for row, s in enumerate(segmentations):
        if not s or isinstance(s, Reason):
            reason[row] = s or Reason.NO_SEGMENTATION
    columns = {"ring_count": ring_count, "ring_size": sizes, "points": points}
    rle_bytes = np.frombuffer(b"".join(counts), np.uint8)
    return reason, bounds, area, columns | {"rle_length": rle_length, "rle_bytes": rle_bytes}


def are_relative(boxes: np.ndarray, image_sizes: np.ndarray) -> np.ndarray:
    """Which boxes (n, 4) of images (n, 2) are in parts of the image's sides, not in pixels."""
    low, high = RELATIVE
    return ((boxes >= low) & (boxes <= high)).all(axis=1) & (image_sizes.min(axis=1) > 1)


def encode_counts(counts: str | bytes) -> bytes:
    """Compressed counts as bytes, also of the text that Python prints for bytes: "b'...'"."""
    if isinstance(counts, bytes):
        return counts
    if counts.startswith(("b'", 'b"')):  # no counts of masks begin like this
        counts = counts[2:-1].replace("\\\\", "\\")
    return counts.encode("utf-8", "surrogatepass")


def _compress(rle: Rle) -> bytes:
    if isinstance(rle.counts, str):
        return encode_counts(rle.counts)
    return coco_mask.frPyObjects({"size": rle.size, "counts": rle.counts}, *rle.size)["counts"]


def check_counts(
    strings: list[bytes], pixels: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Check N run-length strings at once, before pycocotools' C code sees them.

    A string is a row of numbers, base 32 with a continuation bit, lowest digit first, each
    character offset by 48; from the fourth on a number is the difference to the one two before.
    The runs alternate between background and object and cover the mask column by column.

    `pixels` (N,) int64 are height times width of each mask.

    Returns:
        valid (N,) bool: well-formed, no negative run, the runs cover exactly the mask;
        areas (N,) int64 in pixels; has_empty_run (N,) bool: there is an empty run after the first.
        Of an invalid string they mean nothing.
    """
    n = len(strings)
    if n > CHUNK:
        chunks = (slice(start, start + CHUNK) for start in range(0, n, CHUNK))
        parts = zip(*(check_counts(strings[c], pixels[c]) for c in chunks), strict=True)
        valid, areas, has_empty_run = map(np.concatenate, parts)
        return valid, areas, has_empty_run

    valid = np.array([len(string) > 0 for string in strings], bool)
    ends = np.cumsum([len(string) or 1 for string in strings], dtype=np.int64)
    digits = np.frombuffer(b"".join(string or b"0" for string in strings), np.uint8)
    digits = digits - np.uint8(48)  # below 48: wraps to > 63
    valid[_owners(digits > 63, ends)] = False
    # The last digit of a string must end its last number; a broken one would run on into the next.
    valid &= digits[ends - 1] < 32
    digits[ends - 1] &= 31

    # Digits -> numbers, from the last digit, which has the sign, to the first.
    last = np.flatnonzero(digits < 32)
    length = np.diff(last, prepend=-1)
    numbers = ((digits[last] & 31) ^ 16).astype(np.int64) - 16
    longer = np.flatnonzero(length > 1)  # few
    for back in range(1, MAX_DIGITS):
        numbers[longer] = (numbers[longer] << 5) + (digits[last[longer] - back] & 31)
        longer = longer[length[longer] > back + 1]

    # Differences -> runs: the sum of every other number up to there, less that sum at its string's
    # first number (for the background) or at the one before (for the object).
    stops = np.searchsorted(last, ends)
    lengths = np.diff(stops, prepend=0)
    starts = stops - lengths
    start = np.repeat(starts, lengths)
    is_object = (np.arange(len(numbers)) ^ start) & 1
    padded = np.zeros(len(numbers) + len(numbers) % 2 + 2, np.int64)  # one is before the first
    padded[2 : 2 + len(numbers)] = numbers
    sums = np.cumsum(padded.reshape(-1, 2), axis=0).ravel()
    runs = sums[2 : 2 + len(numbers)] - sums[2 + start - is_object]
    runs[starts] = numbers[starts]

    has_empty_run, is_empty = np.zeros(n, bool), runs == 0
    is_empty[starts] = False
    has_empty_run[_owners(is_empty, stops)] = True
    valid[_owners((runs < 0) | (length > MAX_DIGITS), stops)] = False
    valid &= np.add.reduceat(runs, starts) == pixels
    return valid, np.add.reduceat(runs * is_object, starts), has_empty_run


def _owners(chosen: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """The string of each chosen element, when string i ends before `stops[i]`."""
    return np.searchsorted(stops, np.flatnonzero(chosen), side="right")
