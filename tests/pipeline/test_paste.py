"""Pasting in the window equals pasting on a full canvas."""

import math

import numpy as np
import pycocotools.mask as coco_mask
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.paste import Placement, encode_window, paste


def paste_slowly(logits, place, image_size, threshold):
    """Pixel by pixel.

    Bilinear interpolation of the four nearest cells at every pixel centre of the image.
    """
    height, width = image_size
    cells = len(logits)
    mask = np.zeros((height, width), np.uint8)
    limit = math.log(threshold / (1 - threshold))
    for y in range(height):
        for x in range(width):
            u, v = (x + 0.5 - place.left) / place.width, (y + 0.5 - place.top) / place.height
            if not (0 <= u < 1 and 0 <= v < 1):
                continue
            column, row = (
                min(max(u * cells - 0.5, 0), cells - 1),
                min(max(v * cells - 0.5, 0), cells - 1),
            )
            c0, r0 = int(column), int(row)
            c1, r1 = min(c0 + 1, cells - 1), min(r0 + 1, cells - 1)
            a, b = column - c0, row - r0
            value = (
                (1 - a) * (1 - b) * logits[r0, c0]
                + a * (1 - b) * logits[r0, c1]
                + (1 - a) * b * logits[r1, c0]
                + a * b * logits[r1, c1]
            )
            mask[y, x] = value > limit
    return mask


@given(
    seed=st.integers(0, 10_000),
    cells=st.integers(2, 12),
    left=st.floats(-30, 40),
    top=st.floats(-30, 30),
    width=st.floats(3, 80),
    height=st.floats(3, 80),
    threshold=st.sampled_from([0.2, 0.5, 0.8]),
    bias=st.floats(-2, 2),
)
@settings(max_examples=150, deadline=None)
def test_paste_equals_the_slow_reference(seed, cells, left, top, width, height, threshold, bias):
    logits = np.random.default_rng(seed).normal(bias, 2, (cells, cells)).astype(np.float32)
    place, size = Placement(left, top, width, height), (37, 45)
    expected = paste_slowly(logits, place, size, threshold)
    result = paste(logits, place, image_size=size, threshold=threshold)
    found = np.zeros(size, np.uint8) if result is None else coco_mask.decode(result[0])
    assert (found != expected).sum() <= 1  # a pixel on the very threshold may fall to either side
    if result is not None:
        assert_tight(result[1], found)


def scale_slowly(row, size):
    """A row of cells as image.scale of Lua Torch gives it, one pixel at a time."""
    cells = len(row)
    if size < cells:  # the mean over a pixel's share of the row
        fine = np.repeat(row.astype(float), size)
        return [fine[n * cells : (n + 1) * cells].mean() for n in range(size)]
    if size == 1:
        return row[:1]
    return np.interp(np.arange(size) * (cells - 1) / (size - 1), np.arange(cells), row)


@given(
    seed=st.integers(0, 10_000),
    cells=st.integers(1, 12),
    left=st.integers(-30, 40),
    top=st.integers(-30, 30),
    size=st.integers(1, 60),
    bias=st.floats(-2, 2),
)
@settings(max_examples=150, deadline=None)
def test_corners_on_corners_as_the_released_code(seed, cells, left, top, size, bias):
    logits = np.random.default_rng(seed).normal(bias, 2, (cells, cells)).astype(np.float32)
    rows = np.array([scale_slowly(row, size) for row in logits])
    scaled = np.array([scale_slowly(column, size) for column in rows.T]).T
    expected = np.zeros((37 + 200, 45 + 200), np.uint8)
    expected[100 + top : 100 + top + size, 100 + left : 100 + left + size] = scaled > math.log(0.25)
    expected = expected[100:137, 100:145]
    place = Placement(left, top, size, size, corners=True)
    result = paste(logits, place, image_size=(37, 45), threshold=0.2)
    found = np.zeros((37, 45), np.uint8) if result is None else coco_mask.decode(result[0])
    assert (found != expected).sum() <= 1  # a pixel on the very threshold may fall to either side


def assert_tight(box, mask):
    x, y, w, h = coco_mask.toBbox(coco_mask.encode(np.asfortranarray(mask)))
    assert box.tolist() == [x, y, x + w, y + h] and box.dtype == np.float32


@given(
    seed=st.integers(0, 10_000),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    above=st.integers(0, 3),
    below=st.integers(0, 3),
    left=st.integers(0, 3),
    right=st.integers(0, 3),
    density=st.floats(0, 1),
)
@settings(max_examples=300, deadline=None)
def test_window_encoding_equals_pycocotools_on_the_full_canvas(
    seed, height, width, above, below, left, right, density
):
    window = np.random.default_rng(seed).random((height, width)) < density
    canvas = np.zeros((above + height + below, left + width + right), np.uint8)
    canvas[above : above + height, left : left + width] = window
    result = encode_window(window, left, above, canvas.shape)
    if not window.any():
        assert result is None
        return
    rle, box = result
    assert rle == coco_mask.encode(np.asfortranarray(canvas))
    assert_tight(box, canvas)


def test_a_mask_outside_the_image_or_empty_is_none():
    inside = np.full((4, 4), 5, np.float32)
    assert paste(inside, Placement(100, 10, 20, 20), image_size=(50, 50), threshold=0.2) is None
    assert paste(-inside, Placement(10, 10, 20, 20), image_size=(50, 50), threshold=0.2) is None
    assert (
        paste(inside, Placement(10.2, 10.2, 0.2, 0.2), image_size=(50, 50), threshold=0.2) is None
    )


def test_a_full_patch_covers_its_square_to_the_pixel():
    rle, box = paste(
        np.full((4, 4), 5, np.float32), Placement(3, 5, 10, 20), image_size=(60, 50), threshold=0.2
    )
    assert box.tolist() == [3, 5, 13, 25] and coco_mask.area(rle) == 200
