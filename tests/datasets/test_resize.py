"""Images at another size: sides, pixels by a slow formula, boxes; pixels for a network and back."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets.resize import (
    denormalize,
    normalize,
    pad_and_normalize,
    resize_align_corners,
    resize_image,
    resize_sides,
)

SIZES = st.integers(1, 40)


@given(st.integers(1, 700), st.integers(1, 700), st.integers(20, 300), st.integers(0, 200))
@settings(max_examples=60, deadline=None)
def test_the_short_side_is_as_asked_unless_the_long_side_would_be_too_long(height, width, s, more):
    image = np.zeros((height, width, 3), np.uint8)
    resized, scales = resize_sides(image, short_side=s, long_side=s + more)
    short, long = sorted(resized.shape[:2])
    fits = s * max(height, width) / min(height, width) <= s + more
    assert short == s if fits else long == s + more
    # The shape is the image's, up to whole pixels, and so are the boxes.
    y_scale, x_scale = np.divide(resized.shape[:2], (height, width))
    assert abs(y_scale - x_scale) <= 0.5 / height + 0.5 / width or short == 1
    assert scales == (x_scale, y_scale)


def slow(line: np.ndarray, count: int) -> np.ndarray:
    """What image.scale of Lua Torch makes of a row or column: (n,) to (count,)."""
    if count > len(line):
        at = np.arange(count) * ((len(line) - 1) / (count - 1))
        return np.interp(at, np.arange(len(line)), line)
    step, sums = len(line) / count, np.concatenate([[0], np.cumsum(line)])
    borders = np.interp(np.arange(count + 1) * step, np.arange(len(line) + 1), sums)
    return np.diff(borders) / step


@given(SIZES, SIZES, st.integers(1, 90), st.integers(0, 50), st.integers(0, 2**32 - 1))
@settings(max_examples=100, deadline=None)
def test_released_pixels_are_those_of_lines_one_by_one(height, width, short, more, seed):
    """Their sides are rounded down, the scales of boxes are not."""
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    sides = {"short_side": short, "long_side": short + more}
    resized, scales = resize_sides(image, **sides, align_corners=True)
    scale = min(short / min(height, width), (short + more) / max(height, width))
    assert scales == (scale, scale) and resized.dtype == np.float32
    for side, old in zip(resized.shape[:2], (height, width), strict=True):
        assert side == 1 or 0 <= old * scale - side < 1
    rows = np.apply_along_axis(slow, 1, image.astype(float), resized.shape[1])
    expected = np.apply_along_axis(slow, 0, rows, resized.shape[0])
    np.testing.assert_allclose(resized, expected, atol=0.01)


@pytest.mark.parametrize("scale", [0.3, 1, 4.3])
def test_corners_stay_in_the_corners(scale):
    image = np.random.default_rng(0).integers(0, 256, (11, 21, 3), np.uint8)
    resized = resize_align_corners(image, scale)
    assert resized.shape == (int(11 * scale + 0.5), int(21 * scale + 0.5), 3)
    corners = np.ix_([0, -1], [0, -1])
    np.testing.assert_allclose(resized[corners], image[corners], atol=1e-3)


def test_a_scale_averages_areas_when_it_shrinks_and_leaves_at_least_a_pixel():
    image = np.random.default_rng(0).integers(0, 256, (12, 20, 3), np.uint8)
    blocks = image.reshape(6, 2, 10, 2, 3).mean((1, 3))
    assert np.abs(resize_image(image, 0.5) - blocks).max() <= 0.5
    assert resize_image(image, 3).shape == (36, 60, 3)
    assert resize_image(image, 0.01).shape == (1, 1, 3)
    assert np.array_equal(resize_image(image, 1.01), image)


@given(SIZES, SIZES, st.integers(0, 9))
@settings(max_examples=20, deadline=None)
def test_normalized_pixels_can_be_had_back_with_and_without_a_gray_border(height, width, border):
    pixels = np.random.default_rng(height * 41 + width).integers(0, 256, (height, width, 3))
    image = pixels.astype(np.uint8)
    normalized = normalize(image.astype(np.float32) / 255)
    assert np.array_equal(denormalize(normalized), image)
    padded = pad_and_normalize(torch.from_numpy(image), border)[0].numpy()
    inner = padded[:, border : border + height, border : border + width]
    np.testing.assert_allclose(inner, normalized, atol=1e-5)
    expected = np.pad(image, [(border, border), (border, border), (0, 0)], constant_values=128)
    assert np.array_equal(denormalize(padded), expected)
