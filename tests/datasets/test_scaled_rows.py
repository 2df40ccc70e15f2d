"""Rows of an image at another size: OpenCV's pixels, from rows that are read once."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from datasets.resize import resize_align_corners, resize_image
from datasets.scaled_rows import AREA, CORNERS, LINEAR, ArrayRows, ScaledRows

SIDES = st.integers(1, 160)


class Counted(ArrayRows):
    """Notes which rows are read."""

    def __init__(self, image: np.ndarray, block_rows: int):
        super().__init__(image)
        self.block_rows, self.read = block_rows, []

    def rows(self, start: int, stop: int) -> np.ndarray:
        self.read += range(start, stop)
        return super().rows(start, stop)


def pixels(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * 997 + width).integers(
        0, 256, (height, width, 3), np.uint8
    )


@given(SIDES, SIDES, st.floats(-4, 2), st.integers(1, 70), st.integers(1, 90))
@example(120, 80, -1, 64, 7)
@example(150, 150, 0.5, 256, 150)
@example(1, 40, 1, 1, 1)
@settings(max_examples=150, deadline=None)
def test_rows_are_those_of_the_resized_image(height, width, log2_scale, block_rows, step):
    """Within one gray level, in at least 99 of 100 pixels exactly; no row is read twice."""
    image, scale = pixels(height, width), 2.0**log2_scale
    expected = resize_image(image, scale)
    source = Counted(image, block_rows)
    scaled = ScaledRows(source, expected.shape[:2], AREA if scale < 1 else LINEAR)
    parts = [scaled[a : a + step] for a in range(0, scaled.shape[0], step)]
    found = np.concatenate(parts)
    assert scaled.shape == found.shape == expected.shape
    assert found.dtype == scaled.dtype == np.uint8
    differences = np.abs(found.astype(int) - expected)
    assert differences.max() <= 1
    assert (differences > 0).sum() <= max(0.01 * expected.size, 3)
    assert source.read == sorted(set(source.read))


@given(SIDES, SIDES, st.floats(-1, 2), st.integers(1, 90))
@settings(max_examples=50, deadline=None)
def test_corners_stay_in_the_corners_as_in_the_released_code(height, width, log2_scale, step):
    image = pixels(height, width)
    expected = resize_align_corners(image, 2.0**log2_scale)
    scaled = ScaledRows(ArrayRows(image), expected.shape[:2], CORNERS)
    found = np.concatenate([scaled[a : a + step] for a in range(0, len(expected), step)])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=0.01)


@pytest.mark.parametrize("method", [AREA, LINEAR])
def test_any_rows_can_be_asked_for_again(method):
    size = (30, 20) if method == AREA else (200, 190)
    scaled = ScaledRows(Counted(pixels(100, 90), 16), size, method)
    whole = scaled[:]
    for start, stop in ((5, 9), (0, 30), (17, 18), (3, 3), (-4, None)):
        assert np.array_equal(scaled[start:stop], whole[start:stop])
    with pytest.raises(ValueError, match="a step of 2"):
        scaled[::2]


def test_few_rows_are_kept():
    """Of a high image, with one row of the result from hundreds of its own."""
    scaled = ScaledRows(Counted(pixels(5000, 8), 64), (10, 3), AREA)
    for row in range(10):
        scaled[row : row + 1]
        assert len(scaled._rows) <= 2 * 64 + 2
