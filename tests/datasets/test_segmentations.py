"""Compressed counts: what is accepted decodes in pycocotools, the rest never gets there."""

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from datasets.segmentations import check_counts


def decode_one(counts: bytes) -> list[int] | None:
    """The runs of a string, number by number as the format's description has it; None if broken."""
    runs: list[int] = []
    value = digits = 0
    for character in counts:
        digit = character - 48
        if not 0 <= digit <= 63 or digits == 6:
            return None
        value |= (digit & 31) << (5 * digits)
        digits += 1
        if not digit & 32:
            if digit & 16:
                value -= 1 << (5 * digits)
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = digits = 0
    return runs if runs and not digits and min(runs) >= 0 else None


NEAR_VALID = st.lists(st.integers(46, 113), max_size=8).map(bytes) | st.binary(max_size=8)


@given(st.lists(st.tuples(NEAR_VALID, st.integers(0, 40)), max_size=6))
@example([(b"", 0), (b"4", 4), (b"\x80", 1), (b"P", 0), (b"oooooooo", 1), (b"34", 7)])
def test_judges_any_bytes_as_the_format_does(cases):
    strings = [counts for counts, _ in cases]
    pixels = np.array([n for _, n in cases], np.int64)
    valid, areas, has_empty_run = check_counts(strings, pixels)
    for i, counts in enumerate(strings):
        runs = decode_one(counts)
        assert valid[i] == (runs is not None and sum(runs) == pixels[i])
        if valid[i]:
            assert areas[i] == sum(runs[1::2])
            assert has_empty_run[i] == (0 in runs[1:])


def test_many_strings_as_pycocotools_encodes_them():
    """More than are looked at in one go, every seventh broken."""
    rng = np.random.default_rng(0)
    masks = (rng.random((300, 9, 11)) < rng.random((300, 1, 1))).astype(np.uint8)
    strings = [coco_mask.encode(np.asfortranarray(mask))["counts"] for mask in masks]
    strings[::7] = [counts[:-1] + b"~" for counts in strings[::7]]
    valid, areas, has_empty_run = check_counts(strings, np.full(300, 99))
    assert valid.tolist() == [i % 7 > 0 for i in range(300)]
    assert np.array_equal(areas[valid], masks.sum(axis=(1, 2))[valid])
    assert not has_empty_run[valid].any()


def test_a_difference_too_long_for_pycocotools():
    """-1024 in seven digits, of which its C code makes -8: a mask longer than its memory."""
    runs = [1, 2000, 5, 2000 - 1024]
    start = coco_mask.frPyObjects({"size": [2006, 1], "counts": runs[:3]}, 2006, 1)["counts"]
    strings = [start + number for number in (b"PPO", b"PPooO", b"PPoooO", b"PPooooO")]
    valid, areas, _ = check_counts(strings, np.full(4, sum(runs)))
    assert valid.tolist() == [True, True, True, False]
    for counts, area in zip(strings[:3], areas[:3], strict=True):
        assert coco_mask.area({"size": [sum(runs), 1], "counts": counts}) == area


@given(st.lists(st.integers(0, 2**24), min_size=1, max_size=12))
def test_long_runs(runs):
    size = [1, max(sum(runs), 1)]
    counts = coco_mask.frPyObjects({"size": size, "counts": runs}, *size)["counts"]
    valid, areas, _ = check_counts([counts], np.array([sum(runs)]))
    assert valid[0] and areas[0] == sum(runs[1::2])
    assert not check_counts([counts], np.array([sum(runs) + 1]))[0][0]
