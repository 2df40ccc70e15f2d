"""Crops of the report: what is in them, and where the outlines run."""

import base64

import cv2
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.report.crops import (
    MASK_RGB,
    TILE_SIDE,
    TRUTH_RGB,
    crop_window,
    draw_crops,
    draw_outline,
    enlarge,
)
from tests.pipeline.report.small_run import SQUARE, make_dataset, rle_of

sides = st.integers(1, 200)


@given(sides, sides, st.tuples(*[st.floats(0, 0.99)] * 4))
def test_window_holds_the_object_and_lies_in_the_image(height, width, shares):
    (x1, x2), (y1, y2) = sorted(shares[:2]), sorted(shares[2:])
    box = np.float32([x1 * width, y1 * height, (x2 + 0.01) * width, (y2 + 0.01) * height])
    box = box.clip(max=[width, height] * 2)
    rows, columns = crop_window(box, (height, width))
    assert 0 <= rows.start <= box[1] and box[3] <= rows.stop <= height
    assert 0 <= columns.start <= box[0] and box[2] <= columns.stop <= width


def test_window_is_tight_and_square():
    rows, columns = crop_window(np.float32([100, 200, 140, 220]), (480, 640))
    assert (columns.start, columns.stop, rows.start, rows.stop) == (94, 146, 184, 236)


@given(sides, sides)
def test_crops_are_enlarged_to_one_size(height, width):
    for crop in (np.ones((height, width), np.uint8), np.ones((height, width, 3), np.uint8)):
        assert max(enlarge(crop).shape[:2]) == TILE_SIDE and enlarge(crop).all()


def test_outline_runs_inside_of_the_mask_and_not_along_the_edge_of_the_picture():
    mask = np.zeros((20, 20), np.uint8)
    mask[5:, 5:12] = 1  # goes on below the picture
    picture = np.zeros((20, 20, 3), np.uint8)
    draw_outline(picture, mask, (255, 0, 0), 2)
    expected = mask.copy()
    expected[7:, 7:10] = 0
    assert np.array_equal(picture[..., 0] > 0, expected > 0)


def decoded(uri):
    data = np.frombuffer(base64.b64decode(uri.split(",")[1]), np.uint8)
    return cv2.imdecode(data, cv2.IMREAD_COLOR_RGB)


def test_outlines_of_object_and_mask_are_where_they_are_in_the_image(tmp_path):
    """The object is 16 px wide in a crop of 22 px; the first mask is its upper half."""
    _, images = make_dataset(tmp_path / "data")
    masks = [rle_of((8, 8, 24, 16)), rle_of(SQUARE)]
    uris = draw_crops(images / "found.png", np.float32(SQUARE), rle_of(SQUARE), masks)
    coarse, exact = map(decoded, uris)
    scale = TILE_SIDE / 22  # of the crop from 5 to 27
    top, middle, bottom = (round((y - 5) * scale) for y in (8, 16, 24))
    for picture, y, rgb in (
        (coarse, top, MASK_RGB),
        (coarse, middle - 2, MASK_RGB),
        (coarse, bottom - 2, TRUTH_RGB),
        (exact, top, MASK_RGB),
        (exact, top + 2, TRUTH_RGB),
        (exact, bottom - 1, MASK_RGB),
        (exact, middle, (40, 40, 40)),
    ):
        found = picture[y, TILE_SIDE // 2].astype(int)
        colors = np.array([MASK_RGB, TRUTH_RGB, (40, 40, 40)])
        nearest = colors[np.abs(colors - found).sum(axis=1).argmin()]
        assert tuple(nearest) == rgb, (y, found)
