"""What the report draws on images, and where."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.report import drawing
from pipeline.report.drawing import Mark, draw_marks
from pipeline.report.pictures import FULL
from tests.pipeline.report.report_page import decode_uri
from tests.pipeline.report.small_run import SIDE, SQUARE, UPPER_HALF, rle_of

# Masks on images.


def test_marks_are_drawn_where_their_masks_are_on_a_smaller_picture():
    image = np.full((100, 150, 3), 200, np.uint8)
    box = (60, 40, 200, 120)  # on 300 x 200
    picture = draw_marks(image, [Mark(rle_of(box, 200, 300), (255, 0, 0), FULL)])
    outside = picture.copy()
    outside[18:62, 28:102] = 200
    assert (outside == 200).all(), "something is drawn beside the mask and its outline"
    inside = picture[23:57, 33:97]
    assert (inside[..., 0] > 200).all() and (inside[..., 1:] < 200).all()
    assert (image == 200).all(), "the image itself was changed"


def test_box_and_mask_are_where_they_are_in_the_image():
    """Mask and box differ: on a picture of half the size, each is where it belongs."""
    image = np.full((SIDE // 2, SIDE // 2, 3), 200, np.uint8)
    mark = Mark(rle_of(SQUARE), (255, 0, 0), FULL, box=np.float32([8, 8, 56, 40]))
    picture = draw_marks(image, [mark])
    changed = (picture != 200).any(axis=-1)
    assert changed[19, 10:28].all() and changed[10:20, 27].all(), "the box's lower right sides"
    assert not changed[14:18, 16:26].any(), "inside of the box, beside the mask"
    assert not changed[:, 28:].any() and not changed[20:].any()
    assert (picture[6:10, 6:10, 1] < 200).all(), "the mask"


def test_label_stands_at_the_top_left_of_its_mask():
    image = np.full((200, 200, 3), 255, np.uint8)
    marks = [Mark(rle_of((160, 80, 400, 400), 400, 400), (9, 9, 9), 0, "0.12")]
    unlabeled = draw_marks(image, [replace(marks[0], label="")])
    rows, columns = np.nonzero((draw_marks(image, marks) != unlabeled).any(axis=-1))
    assert (rows.max(), columns.min()) == pytest.approx((40, 80), abs=6)


def test_pictures_fit_the_page():
    for size, max_scale, expected in (
        ((1000, 700), 1, (480, 336)),
        ((64, 32), 1, (64, 32)),
        ((64, 32), 2, (128, 64)),
        ((300, 400), 2, (360, 480)),
        ((1000, 1), 1, (480, 1)),
    ):
        picture = drawing.fit_picture(np.zeros((*size, 3), np.uint8), max_scale=max_scale)
        assert picture.shape == (*expected, 3)


def test_a_mask_keeps_its_values_when_it_is_enlarged():
    mask = np.eye(5, dtype=np.uint8)
    assert np.array_equal(drawing.scale_image(mask, 3), mask.repeat(3, axis=0).repeat(3, axis=1))


def test_a_picture_is_a_data_uri():
    picture = np.full((8, 16, 3), (200, 0, 0), np.uint8)
    decoded = decode_uri(drawing.jpeg_uri(picture))
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
    """The object is 16 px wide in a crop of 22 px; the first mask is its upper half."""
    image = np.full((SIDE, SIDE, 3), 40, np.uint8)
    masks = [rle_of(UPPER_HALF), rle_of(SQUARE)]
    coarse, exact = drawing.draw_tiles(np.float32(SQUARE), rle_of(SQUARE), masks, image)
    assert coarse.shape == exact.shape == (drawing.TILE_SIDE, drawing.TILE_SIDE, 3)
    scale = drawing.TILE_SIDE / 22  # of the crop from 5 to 27
    top, middle, bottom = (round((y - 5) * scale) for y in (8, 16, 24))
    for picture, y, rgb in (
        (coarse, top, drawing.MASK_RGB),
        (coarse, middle - 2, drawing.MASK_RGB),
        (coarse, bottom - 2, drawing.TRUTH_RGB),
        (exact, top - 1, (40, 40, 40)),
        (exact, top, drawing.MASK_RGB),
        (exact, top + 2, drawing.TRUTH_RGB),
        (exact, bottom - 1, drawing.MASK_RGB),
        (exact, middle, (40, 40, 40)),
    ):
        assert tuple(picture[y, drawing.TILE_SIDE // 2]) == rgb, y


def test_no_outline_runs_along_the_edge_of_the_picture():
    whole = rle_of((0, 0, SIDE, SIDE))
    image = np.full((SIDE, SIDE, 3), 40, np.uint8)
    [tile] = drawing.draw_tiles(np.float32([0, 0, SIDE, SIDE]), whole, [whole], image)
    assert (tile == 40).all()
