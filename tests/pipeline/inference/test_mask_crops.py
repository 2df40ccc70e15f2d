"""Masks within their box, and pictures of large images."""

import math

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pycocotools import mask as coco_mask

from datasets import large_images
from datasets.images import open_image, read_image
from pipeline.inference import mask_crops
from pipeline.inference.mask_crops import crop_mask, enlarge_mask, run_lengths, shrink_mask
from pipeline.inference.paste import encode_edges
from pipeline.inference.proposals import Detections
from pipeline.inference.visualize import draw_detections, draw_proposals
from tests.datasets.test_large_images import write_tiff
from tests.pipeline.inference.builders import proposals_of

SHAPES = hnp.array_shapes(min_dims=2, max_dims=2, max_side=12)
MASKS = hnp.arrays(np.uint8, SHAPES, elements=st.integers(0, 1))


def encode(mask: np.ndarray) -> dict:
    return coco_mask.encode(np.asfortranarray(mask))


@given(MASKS, st.integers(0, 3), st.integers(0, 3))
def test_a_crop_has_the_pixels_of_the_box(mask, above, left):
    mask = np.pad(mask, ((above, 1), (left, 2)))
    crop, (x, y) = crop_mask(encode(mask))
    if mask.any():
        left, top, width, height = map(int, coco_mask.toBbox(encode(mask)))
        assert (x, y, *crop.shape[::-1]) == (left, top, width, height)
        assert np.array_equal(crop, mask[y : y + height, x : x + width])
    else:
        assert crop.shape == (0, 0)


@given(MASKS.filter(np.any), st.floats(1, 4), st.floats(1, 4))
def test_an_enlarged_mask_is_the_whole_one_interpolated(mask, scale_y, scale_x):
    height, width = round(mask.shape[0] * scale_y), round(mask.shape[1] * scale_x)
    found = coco_mask.decode(enlarge_mask(encode(mask), (height, width)))
    assert found.shape == (height, width) and found.any()
    # OpenCV repeats the image's border where ours ends there: at half of it, so does this.
    gray = cv2.resize(mask * np.float32(255), (width, height), interpolation=cv2.INTER_LINEAR)
    is_clear = np.abs(gray - 127.5) > 16  # OpenCV's weights are rounded
    inner = np.zeros_like(is_clear)
    my, mx = math.ceil(scale_y / 2), math.ceil(scale_x / 2)
    inner[my : height - my, mx : width - mx] = True
    if (gray > 127).any():
        assert np.array_equal(found[is_clear & inner], (gray > 127)[is_clear & inner])


@given(st.lists(st.integers(1, 2**23), min_size=1, max_size=40))
def test_runs_are_those_that_were_encoded(runs):
    counts = coco_mask.frPyObjects({"size": [1, sum(runs)], "counts": runs}, 1, sum(runs))["counts"]
    assert run_lengths(counts).tolist() == runs


@given(MASKS, st.integers(1, 12), st.integers(1, 12))
def test_a_small_mask_has_the_pixels_at_the_centers(mask, height, width):
    small = coco_mask.decode(shrink_mask(encode(mask), (height, width)))
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(int)
        for new, old in zip((height, width), mask.shape, strict=True)
    )
    sampled = mask[np.ix_(rows, columns)]
    if sampled.any() or not mask.any():
        assert np.array_equal(small, sampled)
    else:
        assert small.sum() == 1  # something of every object is seen


def test_masks_of_ten_thousand_by_ten_thousand_keep_to_cocos_conventions():
    """From edges to RLE, as results have it: pycocotools' area, box and pixels."""
    size = (10_000, 10_000)
    runs = [(9_000 * 10_000 + 9_900 + i * 10_000, 50) for i in range(40)]  # 40 columns of 50 pixels
    edges = np.array([edge for start, length in runs for edge in (start, start + length)])
    found = encode_edges(np.zeros(len(edges), np.int64), edges, size)
    rle = {"size": list(size), "counts": found.rles[0]}
    assert int(coco_mask.area(rle)) == 2000
    assert coco_mask.toBbox(rle).tolist() == [9000, 9900, 40, 50]
    assert found.boxes.tolist() == [[9000, 9900, 9040, 9950]]
    decoded = coco_mask.decode(rle)
    assert decoded.shape == size and decoded.sum() == 2000
    assert decoded[9900:9950, 9000:9040].all()
    assert coco_mask.encode(decoded)["counts"] == rle["counts"]
    crop, corner = crop_mask(rle)
    assert crop.shape == (50, 40) and crop.all() and corner == (9000, 9900)


@pytest.fixture
def photo(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (160, 240, 3), np.uint8)
    return write_tiff(tmp_path / "a.tif", image)


def test_pictures_of_large_images_are_reduced(photo, monkeypatch):
    """To the side that pictures have at most, with masks and boxes in their places."""
    image = read_image(photo)
    masks = np.zeros((2, 160, 240), bool)
    masks[0, 40:120, 20:60] = masks[1, 100:140, 160:220] = True
    proposals = proposals_of(masks)
    found = Detections(**vars(proposals), labels=np.ones(2, np.int64))
    whole = draw_proposals(image, proposals, 2), draw_detections(image, found, {1: "bar"}, 1)
    assert [picture.shape for picture in whole] == [image.shape] * 2
    monkeypatch.setattr(mask_crops, "DRAWN_SIDE", 120)
    monkeypatch.setattr(large_images, "LARGE_PIXELS", 0)
    opened = open_image(photo)
    for draw in (
        lambda i: draw_proposals(i, proposals, 2),
        lambda i: draw_detections(i, found, {1: "bar"}, 1),
    ):
        picture = draw(image)
        assert picture.shape == (80, 120, 3)
        assert np.abs(draw(opened).astype(int) - picture).max() <= 1
    picture = draw_proposals(image, proposals, 2)
    colored = np.ptp(picture.astype(int).reshape(-1, 3)[[30 * 120 + 20, 60 * 120 + 95]], axis=1)
    assert (colored > 20).all()  # within the masks, at half the coordinates
    assert proposals.height == 160 and len(proposals) == 2  # as before
