"""COCO's compressed run-length strings, checked before pycocotools' C code sees them.

A string is a row of numbers, base 32 with a continuation bit, lowest digit first, each character
offset by 48; from the fourth on a number is the difference to the one two places before. The runs
alternate between background and object and cover the mask column by column.
"""

from __future__ import annotations

import numpy as np

# With a seventh digit pycocotools shifts a negative number by more than its 32 bits, and decodes
# another one, to beyond the end of the mask. Six digits are enough for any run in 2^29 pixels.
MAX_DIGITS = 6
MAX_PIXELS = 2**29
CHUNK = 128  # strings at once: numbers that stay in the cache


def check_counts(strings: list[bytes], pixels: np.ndarray) -> tuple[np.ndarray, ...]:
    """Check N strings of compressed counts at once.

    Args:
        strings: N byte strings.
        pixels: (N,) int64, height times width of each mask.

    Returns:
        valid (N,) bool: well-formed, no negative run, the runs cover exactly the mask;
        areas (N,) int64 in pixels; has_empty_run (N,) bool: there is an empty run after the first.
    """
    chunks = [
        _check_chunk(strings[start : start + CHUNK], pixels[start : start + CHUNK])
        for start in range(0, max(len(strings), 1), CHUNK)
    ]
    return tuple(np.concatenate(parts) for parts in zip(*chunks, strict=True))


def _check_chunk(strings: list[bytes], pixels: np.ndarray) -> tuple[np.ndarray, ...]:
    n = len(strings)
    lengths = np.fromiter(map(len, strings), np.int64, n)
    digits = np.frombuffer(b"".join(strings), np.uint8) - np.uint8(48)  # below 48: wraps to > 63
    ends = np.cumsum(lengths)
    valid = lengths > 0
    valid[_owners(digits > 63, ends)] = False
    valid[valid] = digits[ends[valid] - 1] < 32  # the last digit ends its number

    rows = np.flatnonzero(valid)
    if len(rows) < n:
        digits, ends = digits[np.repeat(valid, lengths)], np.cumsum(lengths[rows])
    areas, has_empty_run = np.zeros(n, np.int64), np.zeros(n, bool)
    if len(rows):
        values, stops, has_too_long = _join_digits(digits, ends)
        totals, areas[rows], has_negative, has_empty_run[rows] = _sum_runs(values, stops)
        valid[rows] = ~has_too_long & ~has_negative & (totals == pixels[rows])
    return valid, np.where(valid, areas, 0), has_empty_run


def _owners(chosen: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """Which string each chosen element belongs to, when string n ends before `stops[n]`."""
    return np.searchsorted(stops, np.flatnonzero(chosen), side="right")


def _join_digits(digits: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, ...]:
    """Digits of well-ended strings -> the numbers (M,).

    With them (N,) where the numbers of each string end, and whether one of them is too long.
    """
    last = np.flatnonzero(digits < 32)
    length = np.diff(last, prepend=-1)
    stops = np.searchsorted(last, ends)
    values = ((digits[last] & 31) ^ 16).astype(np.int64) - 16  # the last digit has the sign
    longer = np.flatnonzero(length > 1)  # few
    values[longer] <<= 5 * (np.minimum(length[longer], MAX_DIGITS) - 1)
    for place in range(MAX_DIGITS - 1):
        digit = digits[last[longer] - length[longer] + 1 + place] & 31
        values[longer] += digit.astype(np.int64) << (5 * place)
        longer = longer[length[longer] > place + 2]
    has_too_long = np.zeros(len(ends), bool)
    has_too_long[_owners(length > MAX_DIGITS, stops)] = True
    return values, stops, has_too_long


def _sum_runs(values: np.ndarray, stops: np.ndarray) -> tuple[np.ndarray, ...]:
    """Numbers -> for each string its pixels, the object's, any negative run, any empty run but one.

    A string's runs make a table of two columns, object and background: below its first run each
    column is a chain of differences. Its last object may have no background beside it.
    """
    counts = np.diff(stops, prepend=0)
    starts, heights = stops - counts, counts // 2 + 1
    bottoms = np.cumsum(heights)
    tops = bottoms - heights
    table = np.zeros(2 * bottoms[-1], np.int64)
    table[np.arange(len(values)) + np.repeat(2 * tops + 1 - starts, counts)] = values
    runs = np.cumsum(table.reshape(-1, 2), axis=0)
    runs -= np.repeat(runs[tops], heights, axis=0)
    runs[tops] = [1, 1]  # not empty, and not counted below
    missing = bottoms[counts % 2 == 0] - 1
    runs[missing, 1] = 1

    has_empty, has_negative = np.zeros((2, len(stops)), bool)
    has_empty[_owners(runs.ravel() == 0, 2 * bottoms)] = True
    has_negative[_owners(runs.ravel() < 0, 2 * bottoms)] = True
    runs[missing, 1] = 0
    sums = np.cumsum(runs, axis=0)
    objects, backgrounds = (sums[bottoms - 1] - sums[tops]).T
    first = values[starts]
    return first + objects + backgrounds, objects, has_negative | (first < 0), has_empty
