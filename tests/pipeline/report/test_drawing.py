"""What the report draws on images, and where."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datasets import large_images
from datasets.images import open_image
from pipeline.report import drawing
from pipeline.report.drawing import (
    MASK_RGB,
    TRUTH_RGB,
    Mark,
    draw_marks,
    draw_tiles,
    fit_picture,
)
from pipeline.report.pictures import FULL
from tests.datasets.test_large_images import write_tiff
from tests.pipeline.report.report_page import decode_uri
from tests.pipeline.report.small_run import EVERYTHING, SIDE, SQUARE, UPPER_HALF, rle_of

GRAY = (40, 40, 40)


def gray(height, width, value=200):
    return np.full((height, width, 3), value, np.uint8)


# Masks on images.


@pytest.mark.parametrize("large", [10**8, 0])
def test_marks_are_drawn_where_their_masks_are_on_a_smaller_picture(large, monkeypatch):
    monkeypatch.setattr(drawing, "LARGE_PIXELS", large)
    image, box = gray(100, 150), (60, 40, 200, 120)  # the box on 300 x 200
    picture = draw_marks(image, [Mark(rle_of(box, 200, 300), (255, 0, 0), FULL)])
    outside = picture.copy()
    outside[18:62, 28:102] = 200
    assert (outside == 200).all(), "something is drawn beside the mask and its outline"
    inside = picture[23:57, 33:97]
    assert (inside[..., 0] > 200).all() and (inside[..., 1:] < 200).all()
    assert (image == 200).all(), "the image itself was changed"


def test_large_images_are_drawn_as_others(tmp_path, monkeypatch):
    monkeypatch.setattr(large_images, "LARGE_PIXELS", 0)
    pixels = np.random.default_rng(0).integers(0, 256, (600, 700, 3), np.uint8)
    image = open_image(write_tiff(tmp_path / "a.tif", pixels))
    assert np.abs(fit_picture(image).astype(int) - fit_picture(pixels)).max() <= 1
    box = np.array([300, 200, 400, 350])
    rle = rle_of(box, 600, 700)
    [tile], [expected] = (draw_tiles(box, rle, [rle], i) for i in (image, pixels))
    assert np.array_equal(tile, expected)


def test_box_and_mask_are_where_they_are_in_the_image():
    """Mask and box differ: on a picture of half the size, each is where it belongs."""
    mark = Mark(rle_of(SQUARE), (255, 0, 0), FULL, box=np.float32([8, 8, 56, 40]))
    picture = draw_marks(gray(SIDE // 2, SIDE // 2), [mark])
    changed = (picture != 200).any(axis=-1)
    assert changed[19, 10:28].all() and changed[10:20, 27].all(), "the box's lower right sides"
    assert not changed[14:18, 16:26].any(), "inside of the box, beside the mask"
    assert not changed[:, 28:].any() and not changed[20:].any()
    assert (picture[6:10, 6:10, 1] < 200).all(), "the mask"


def test_label_stands_at_the_top_left_of_its_mask():
    mark = Mark(rle_of((160, 80, 400, 400), 400, 400), (9, 9, 9), 0, "0.12")
    labeled, plain = (draw_marks(gray(200, 200), [m]) for m in (mark, replace(mark, label="")))
    rows, columns = np.nonzero((labeled != plain).any(axis=-1))
    assert (rows.max(), columns.min()) == pytest.approx((40, 80), abs=6)


@pytest.mark.parametrize(
    ("size", "max_scale", "expected"),
    [((1000, 700), 1, (480, 336)), ((64, 32), 1, (64, 32)), ((64, 32), 2, (128, 64)),
     ((300, 400), 2, (360, 480)), ((1000, 1), 1, (480, 1))],
)  # fmt: skip
def test_pictures_fit_the_page(size, max_scale, expected):
    picture = drawing.fit_picture(gray(*size), side=480, max_scale=max_scale)
    assert picture.shape == (*expected, 3)


def test_a_picture_is_a_data_uri():
    picture = gray(8, 16) * np.uint8([1, 0, 0])
    decoded = decode_uri(drawing.picture_uri(picture))
    assert np.abs(decoded.astype(int) - picture).max() < 5


# Enlarged objects.


@given(st.integers(1, 200), st.integers(1, 200), st.tuples(*[st.floats(0, 0.99)] * 4))
def test_window_holds_the_object_and_lies_in_the_image(height, width, fractions):
    (x1, x2), (y1, y2) = sorted(fractions[:2]), sorted(fractions[2:])
    box = np.float32([x1 * width, y1 * height, (x2 + 0.01) * width, (y2 + 0.01) * height])
    box = box.clip(max=[width, height] * 2)
    rows, columns = drawing.crop_window(box, (height, width))
    assert 0 <= rows.start <= box[1] and box[3] <= rows.stop <= height
    assert 0 <= columns.start <= box[0] and box[2] <= columns.stop <= width


def test_window_is_tight_and_square():
    rows, columns = drawing.crop_window(np.float32([100, 200, 140, 220]), (480, 640))
    assert (columns.start, columns.stop, rows.start, rows.stop) == (94, 146, 184, 236)


def test_outlines_of_object_and_mask_are_where_they_are_in_the_image():
    """The object is 16 px wide in a crop of 22 px, from 5 to 27; the first mask is its upper half.

    Where an outline runs along the edge of the picture, as in the last tile, none is drawn.
    """
    image, masks = gray(SIDE, SIDE, 40), [rle_of(UPPER_HALF), rle_of(SQUARE)]
    coarse, exact = drawing.draw_tiles(np.float32(SQUARE), rle_of(SQUARE), masks, image)
    assert coarse.shape == exact.shape == (drawing.TILE_SIDE, drawing.TILE_SIDE, 3)
    top, middle, bottom = (round((y - 5) * drawing.TILE_SIDE / 22) for y in (8, 16, 24))
    center = drawing.TILE_SIDE // 2
    colors = {top: MASK_RGB, middle - 2: MASK_RGB, bottom - 2: TRUTH_RGB}
    assert {y: tuple(coarse[y, center]) for y in colors} == colors
    colors = {top - 1: GRAY, top: MASK_RGB, top + 2: TRUTH_RGB, bottom - 1: MASK_RGB, middle: GRAY}
    assert {y: tuple(exact[y, center]) for y in colors} == colors
    [whole] = drawing.draw_tiles(
        np.float32(EVERYTHING), rle_of(EVERYTHING), [rle_of(EVERYTHING)], image
    )
    assert (whole == 40).all()
