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


def check_counts(strings: list[bytes], pixels: np.ndarray) -> tuple[np.ndarray, ...]:
    """Check N strings of compressed counts at once.

    Args:
        strings: N byte strings.
        pixels: (N,) int64, height times width of each mask.

    Returns:
        valid (N,) bool: well-formed, no negative run, the runs cover exactly the mask;
        areas (N,) int64 in pixels; has_empty_run (N,) bool: there is an empty run after the first.
    """
    lengths = np.fromiter(map(len, strings), np.int64, len(strings))
    digits = np.frombuffer(b"".join(strings), np.uint8).astype(np.int64) - 48
    valid = lengths > 0
    owner = np.repeat(np.arange(len(strings)), lengths)
    valid[owner[(digits < 0) | (digits > 63)]] = False
    ends = np.cumsum(lengths)
    valid[valid] = (digits[ends[valid] - 1] & 32) == 0  # the last digit ends its number

    chosen = valid[owner]
    values, value_owner = _join_digits(digits[chosen], owner[chosen])
    valid[value_owner[values == _TOO_LONG]] = False
    chosen = valid[value_owner]
    runs, run_owner, place = _undo_differences(values[chosen], value_owner[chosen])

    n = len(strings)
    valid[run_owner[runs < 0]] = False
    valid &= np.bincount(run_owner, runs, n).astype(np.int64) == pixels
    areas = np.bincount(run_owner, runs * (place % 2), n).astype(np.int64)
    has_empty_run = np.bincount(run_owner, (runs == 0) & (place > 0), n) > 0
    return valid, np.where(valid, areas, 0), has_empty_run


_TOO_LONG = np.iinfo(np.int64).min


def _join_digits(digits: np.ndarray, owner: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Digits of well-ended strings -> the numbers (M,) and the string that each belongs to (M,)."""
    if not digits.size:
        return digits, owner
    last = np.flatnonzero((digits & 32) == 0)
    first = np.concatenate([[0], last[:-1] + 1])
    length = last - first + 1
    power = np.minimum(np.arange(len(digits)) - np.repeat(first, length), MAX_DIGITS)
    values = np.add.reduceat((digits & 31) << (5 * power), first)
    negative = (digits[last] & 16) > 0
    values -= negative * (np.int64(1) << (5 * np.minimum(length, MAX_DIGITS)))
    values[length > MAX_DIGITS] = _TOO_LONG
    return values, owner[first]


def _undo_differences(values: np.ndarray, owner: np.ndarray) -> tuple[np.ndarray, ...]:
    """Numbers -> runs (M,), their string (M,) and their place in it (M,)."""
    if not values.size:
        return values, owner, values
    starts = np.flatnonzero(np.diff(owner, prepend=-1))
    counts = np.diff(starts, append=len(owner))
    place = np.arange(len(owner)) - np.repeat(starts, counts)
    # Even and odd places are two chains; the very first number stands outside of both.
    runs = values.copy()
    for parity in (0, 1):
        rows = np.flatnonzero((place % 2 == parity) & (place > 0))
        sums = np.cumsum(values[rows])
        begins = np.flatnonzero(np.diff(owner[rows], prepend=-1))
        base = np.concatenate([[0], sums])[begins]
        runs[rows] = sums - np.repeat(base, np.diff(begins, append=len(rows)))
    return runs, owner, place
