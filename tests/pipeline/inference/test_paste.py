"""Pasting many masks by their edges equals pasting each on a full canvas."""

import math

import numpy as np
import pycocotools.mask as coco_mask
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.inference import paste as paste_module
from pipeline.inference.paste import Pasted, encode_edges, paste


def decode(pasted: Pasted, count: int, size: tuple[int, int]) -> np.ndarray:
    """(count, H, W) of the masks, none where there is none; boxes are checked on the way."""
    masks = np.zeros((count, *size), np.uint8)
    assert (np.diff(pasted.indices) > 0).all()
    for i, box, rle in zip(pasted.indices, pasted.boxes, pasted.rles, strict=True):
        masks[i] = coco_mask.decode({"size": list(size), "counts": rle})
        x, y, w, h = coco_mask.toBbox(coco_mask.encode(np.asfortranarray(masks[i])))
        assert box.tolist() == [x, y, x + w, y + h] and box.dtype == np.float32
    return masks


def paste_slowly(logits, left, top, width, height, image_size, threshold):
    """Bilinear interpolation at every pixel's center, on a canvas of the whole image."""
    y = (torch.arange(image_size[0], dtype=torch.float64) + 0.5 - top) / height * 2 - 1
    x = (torch.arange(image_size[1], dtype=torch.float64) + 0.5 - left) / width * 2 - 1
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)[None]
    cells = torch.from_numpy(logits)[None, None].double()
    pixels = F.grid_sample(cells, grid, padding_mode="border", align_corners=False)[0, 0]
    within = ((y >= -1) & (y < 1))[:, None] & ((x >= -1) & (x < 1))
    return ((pixels > math.log(threshold / (1 - threshold))) & within).numpy()


patches = st.lists(
    st.tuples(st.floats(-30, 40), st.floats(-30, 30), st.floats(3, 80), st.floats(3, 80)),
    min_size=1,
    max_size=4,
)


@given(
    seed=st.integers(0, 10_000),
    cells=st.integers(2, 12),
    boxes=patches,
    threshold=st.sampled_from([0.2, 0.5, 0.8]),
    bias=st.floats(-2, 2),
    block=st.sampled_from([1, 100, 1 << 18]),
)
@settings(max_examples=100, deadline=None)
def test_paste_equals_the_slow_reference(seed, cells, boxes, threshold, bias, block):
    """Over the image's border, with several runs in a column and runs over columns' ends."""
    rng, size = np.random.default_rng(seed), (37, 45)
    logits = rng.normal(bias, 2, (len(boxes), cells, cells)).astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paste_module, "BLOCK", block)
        result = paste(
            torch.from_numpy(logits),
            np.array(boxes),
            image_size=size,
            threshold=threshold,
        )
    for mask, box, found in zip(logits, boxes, decode(result, len(boxes), size), strict=True):
        expected = paste_slowly(mask, *box, size, threshold)
        # A pixel on the very threshold may fall to either side.
        assert (found != expected).sum() <= 1


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
    boxes=st.lists(
        st.tuples(st.integers(-30, 40), st.integers(-30, 30), st.integers(1, 60)),
        min_size=1,
        max_size=4,
    ),
    bias=st.floats(-2, 2),
)
@settings(max_examples=150, deadline=None)
def test_corners_on_corners_as_the_released_code(seed, cells, boxes, bias):
    size = (37, 45)
    logits = np.random.default_rng(seed).normal(bias, 2, (len(boxes), cells, cells))
    logits = logits.astype(np.float32)
    places = np.array(boxes, float)[:, [0, 1, 2, 2]]
    options = {"image_size": size, "threshold": 0.2, "align_corners": True}
    result = paste(torch.from_numpy(logits), places, **options)
    masks = decode(result, len(boxes), size)
    for mask, (x, y, length), found in zip(logits, boxes, masks, strict=True):
        rows = np.array([scale_slowly(row, length) for row in mask])
        scaled = np.array([scale_slowly(column, length) for column in rows.T]).T
        canvas = np.zeros((37 + 200, 45 + 200), np.uint8)
        inside = scaled > math.log(0.25)
        canvas[100 + y : 100 + y + length, 100 + x : 100 + x + length] = inside
        # A pixel on the very threshold may fall to either side.
        assert (found != canvas[100:137, 100:145]).sum() <= 1


@given(
    seed=st.integers(0, 10_000),
    count=st.integers(1, 4),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    density=st.floats(0, 1),
    empty_runs=st.integers(0, 5),
)
@settings(max_examples=300, deadline=None)
def test_edges_encode_to_what_pycocotools_makes_of_the_pixels(
    seed, count, height, width, density, empty_runs
):
    rng = np.random.default_rng(seed)
    masks = (rng.random((count, height, width)) < density).astype(np.uint8)
    owner, edges = [], []
    for n, mask in enumerate(masks):
        column, row = np.nonzero(np.diff(np.pad(mask.T, ((0, 0), (1, 1))).astype(np.int8), axis=1))
        extra = np.repeat(rng.integers(0, height * width + 1, empty_runs), 2)
        edges.append(np.sort(np.concatenate([column * height + row, extra])))
        owner.append(np.full(len(edges[-1]), n))
    result = encode_edges(np.concatenate(owner), np.concatenate(edges), (height, width))
    assert np.array_equal(decode(result, count, (height, width)), masks)
    for n, rle in zip(result.indices, result.rles, strict=True):
        assert rle == coco_mask.encode(np.asfortranarray(masks[n]))["counts"]
    assert result.indices.tolist() == np.flatnonzero(masks.any(axis=(1, 2))).tolist()


@given(st.lists(st.integers(0, 4000), min_size=1, max_size=12))
@settings(max_examples=100, deadline=None)
def test_long_runs_are_written_as_pycocotools_does(lengths):
    """Differences of either sign over several characters."""
    size = [9000, 12]
    edges = np.cumsum(lengths)[: len(lengths) // 2 * 2] * 2
    result = encode_edges(np.zeros(len(edges), int), edges, tuple(size))
    area = int((edges[1::2] - edges[::2]).sum())
    assert len(result.rles) == (area > 0)
    for string in result.rles:
        rle = {"size": size, "counts": string}
        assert coco_mask.area(rle) == area
        assert coco_mask.encode(np.asfortranarray(coco_mask.decode(rle))) == rle


def test_a_mask_outside_the_image_or_empty_is_left_out():
    inside = torch.full((1, 4, 4), 5.0)
    logits = torch.cat([inside, -inside, inside, inside])
    places = np.array([[100, 10, 20, 20], [10, 10, 20, 20], [10.2, 10.2, 0.2, 0.2], [3, 5, 9, 9]])
    result = paste(logits, places, image_size=(50, 50), threshold=0.2)
    assert result.indices.tolist() == [3] and len(result.boxes) == len(result.rles) == 1
    nothing = paste(logits[:3], places[:3], image_size=(50, 50), threshold=0.2)
    assert nothing.indices.shape == (0,) and nothing.boxes.shape == (0, 4) and not nothing.rles
