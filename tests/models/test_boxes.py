"""Foveal regions, encoded and decoded boxes against loops, and each other's inverse."""

import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.boxes import decode_boxes, encode_boxes, foveal_regions

SIGNS = torch.tensor([-1, 1, -1, 1])  # x to -x


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


def test_foveal_regions_of_the_paper():
    rois = torch.tensor([[1.0, 10, 20, 30, 60]])
    assert foveal_regions(rois, 1.0).tolist() == rois.tolist()
    assert foveal_regions(rois, 1.5).tolist() == [[1, 5, 10, 35, 70]]
    assert foveal_regions(rois, 2.0).tolist() == [[1, 0, 0, 40, 80]]
    assert foveal_regions(rois, 4.0).tolist() == [[1, -20, -40, 60, 120]]  # not clipped
    assert foveal_regions(torch.zeros(0, 5), 1.5).shape == (0, 5)


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


@given(boxes(4), boxes(4))
@settings(max_examples=50, deadline=None)
def test_encoding_is_its_formula_and_mirroring_changes_the_sign_of_dx_alone(rois, objects):
    deltas = encode_boxes(torch.tensor(rois), torch.tensor(objects))
    assert deltas.dtype == torch.float32
    for row, (x1, y1, x2, y2), (u1, v1, u2, v2) in zip(deltas.tolist(), rois, objects, strict=True):
        w, h = x2 - x1, y2 - y1
        shift = [((u1 + u2) - (x1 + x2)) / 2 / w, ((v1 + v2) - (y1 + y2)) / 2 / h]
        scale = [math.log((u2 - u1) / w), math.log((v2 - v1) / h)]
        # Rounding to float32 of the corners counts for most where a side is small.
        np.testing.assert_allclose(row, shift + scale, rtol=1e-5, atol=1e-4)
    mirrored = encode_boxes(*(torch.tensor(b)[:, [2, 1, 0, 3]] * SIGNS for b in (rois, objects)))
    torch.testing.assert_close(mirrored, deltas * torch.tensor([-1, 1, 1, 1]), rtol=0, atol=1e-4)


@given(boxes(4), boxes(4), st.lists(st.floats(-3, 3, width=32), min_size=16, max_size=16))
@settings(max_examples=100, deadline=None)
def test_encoding_and_decoding_are_each_others_inverse(rois, objects, values):
    rois, objects, deltas = map(torch.tensor, (rois, objects, values))
    decoded = decode_boxes(rois, encode_boxes(rois, objects)[:, None])[:, 0]
    torch.testing.assert_close(decoded, objects, rtol=0, atol=2e-3)
    deltas = deltas.view(4, 4)
    moved = decode_boxes(rois.double(), deltas[:, None].double())[:, 0]
    torch.testing.assert_close(encode_boxes(rois.double(), moved), deltas, rtol=1e-5, atol=1e-5)


def test_encoded_boxes_of_the_paper():
    roi = torch.tensor([[10.0, 20, 30, 60]])
    deltas = encode_boxes(roi, torch.tensor([[20.0, 20, 60, 40]]))
    torch.testing.assert_close(deltas, torch.tensor([[1, -0.25, math.log(2), -math.log(2)]]))
    assert encode_boxes(roi, roi).tolist() == [[0, 0, 0, 0]]


def test_a_wild_delta_gives_a_finite_box():
    """The sides grow 1000 / 16 times at most; how far they shrink is not bounded."""
    box = torch.tensor([[0.0, 0, 16, 32]])
    wild = decode_boxes(box, torch.tensor([[[0.0, 0, 1e4, 1e4]]]))[0, 0]
    torch.testing.assert_close(wild[2:] - wild[:2], torch.tensor([1000.0, 2000]))
    shrunk = decode_boxes(box, torch.tensor([[[0.0, 0, -1e4, -1e4]]]))[0, 0]
    assert shrunk.tolist() == [8, 16, 8, 16]
