"""Foveal regions, encoded and decoded boxes against loops, and each other's inverse."""

import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.boxes import decode_boxes, encode_boxes, foveal_regions


@st.composite
def boxes(draw, count: int) -> list[list[float]]:
    """xyxy, in the image and beyond its border; the sides differ by a factor of 50 at most."""
    corner, side = st.floats(-100, 1000, width=32), st.floats(4, 200, width=32)
    drawn = [[draw(s) for s in (corner, corner, side, side)] for _ in range(count)]
    return [[x, y, x + w, y + h] for x, y, w, h in drawn]


@given(boxes(3), st.floats(0.5, 4))
@settings(max_examples=50, deadline=None)
def test_foveal_regions_are_larger_about_the_same_center(xyxy, factor):
    rois = torch.tensor([[image, *box] for image, box in enumerate(xyxy)])
    regions = foveal_regions(rois, factor)
    for (image, *box), (x1, y1, x2, y2) in zip(regions.tolist(), xyxy, strict=True):
        x, y = (x1 + x2) / 2, (y1 + y2) / 2
        w, h = factor * (x2 - x1), factor * (y2 - y1)
        np.testing.assert_allclose(
            box, [x - w / 2, y - h / 2, x + w / 2, y + h / 2], rtol=1e-6, atol=1e-3
        )
        assert xyxy[int(image)] == [x1, y1, x2, y2]  # the row of its image is kept


@given(boxes(3), st.lists(st.floats(-3, 3, width=32), min_size=24, max_size=24))
@settings(max_examples=50, deadline=None)
def test_decoding_is_its_formula_for_every_roi_and_class(xyxy, values):
    deltas = torch.tensor(values).view(3, 2, 4)
    decoded = decode_boxes(torch.tensor(xyxy), deltas)
    assert decoded.shape == (3, 2, 4)
    for n, (x1, y1, x2, y2) in enumerate(xyxy):
        for c in range(2):
            dx, dy, dw, dh = deltas[n, c].tolist()
            x = (x1 + x2) / 2 + dx * (x2 - x1)
            y = (y1 + y2) / 2 + dy * (y2 - y1)
            w, h = (x2 - x1) * math.exp(dw), (y2 - y1) * math.exp(dh)
            np.testing.assert_allclose(
                decoded[n, c].tolist(),
                [x - w / 2, y - h / 2, x + w / 2, y + h / 2],
                rtol=1e-5,
                atol=5e-3,
            )


@given(boxes(4), boxes(4), st.lists(st.floats(-3, 3, width=32), min_size=16, max_size=16))
@settings(max_examples=100, deadline=None)
def test_encoding_and_decoding_are_each_others_inverse(rois, objects, values):
    rois, objects, deltas = map(torch.tensor, (rois, objects, values))
    encoded = encode_boxes(rois, objects)
    assert encoded.dtype == torch.float32
    decoded = decode_boxes(rois, encoded[:, None])[:, 0]
    torch.testing.assert_close(decoded, objects, rtol=0, atol=2e-3)
    deltas = deltas.view(4, 4)
    moved = decode_boxes(rois.double(), deltas[:, None].double())[:, 0]
    torch.testing.assert_close(encode_boxes(rois.double(), moved), deltas, rtol=1e-5, atol=1e-5)


def test_a_wild_delta_gives_a_finite_box():
    """The sides grow 1000 / 16 times at most; how far they shrink is not bounded."""
    box = torch.tensor([[0.0, 0, 16, 32]])
    wild = decode_boxes(box, torch.tensor([[[0.0, 0, 1e4, 1e4]]]))[0, 0]
    torch.testing.assert_close(wild[2:] - wild[:2], torch.tensor([1000.0, 2000]))
    shrunk = decode_boxes(box, torch.tensor([[[0.0, 0, -1e4, -1e4]]]))[0, 0]
    assert shrunk.tolist() == [8, 16, 8, 16]
