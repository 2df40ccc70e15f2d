"""NMS within classes and box voting, against slow loops over pairs of boxes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pipeline.inference.box_selection import select_boxes


def iou(a, b):
    """In float32, step by step as torchvision computes it: overlaps may lie on the limit."""
    a, b = np.float32(a), np.float32(b)
    width = max(min(a[2], b[2]) - max(a[0], b[0]), np.float32(0))
    height = max(min(a[3], b[3]) - max(a[1], b[1]), np.float32(0))
    inter = width * height
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return float(inter / (areas[0] + areas[1] - inter))


def slow_selection(probabilities, boxes, *, score_threshold, nms_iou, max_detections, vote_iou):
    """[(score, label, box, roi)] by the definition: one box and one class after another."""
    found = []
    for label in range(boxes.shape[1]):
        rows = [
            roi
            for roi, (x1, y1, x2, y2) in enumerate(boxes[:, label])
            if probabilities[roi, label + 1] > score_threshold and x2 > x1 and y2 > y1
        ]
        waiting = sorted(rows, key=lambda roi: (-probabilities[roi, label + 1], roi))
        while waiting:
            best, *others = waiting
            waiting = [r for r in others if iou(boxes[best, label], boxes[r, label]) <= nms_iou]
            found.append((probabilities[best, label + 1], label, rows, best))
    found = sorted(found, key=lambda item: -item[0])[:max_detections]  # stable: class, then RoI
    return [
        (score, label, slow_vote(probabilities, boxes, label, rows, roi, vote_iou), roi)
        for score, label, rows, roi in found
    ]


def slow_vote(probabilities, boxes, label, rows, roi, vote_iou):
    if vote_iou is None:
        return boxes[roi, label]
    total, weight = np.zeros(4), 0.0
    for voter in rows:
        if iou(boxes[roi, label], boxes[voter, label]) > vote_iou:
            total += float(probabilities[voter, label + 1]) * boxes[voter, label].astype(float)
            weight += float(probabilities[voter, label + 1])
    return total / weight


def arrays(shape, elements):
    """Each element drawn, not most of them the same."""
    return hnp.arrays(np.float32, shape, elements=elements, fill=st.nothing())


@st.composite
def scenes(draw):
    """Few places, sizes and scores, so that equal scores and overlaps on the limit occur.

    Some boxes are empty, as after clipping.
    """
    rois, classes = draw(st.integers(0, 10)), draw(st.integers(1, 3))
    shape = (rois, classes, 2)
    corners = draw(arrays(shape, st.sampled_from([0, 1, 2, 20])))
    sides = draw(arrays(shape, st.sampled_from([0, 2, 4, 5, 6, 8, 10])))
    boxes = np.concatenate([corners, corners + sides], axis=2)
    scores = st.sampled_from(np.float32([0, 0.05, 0.1, 0.25, 0.5, 0.9]).tolist())
    pixel = np.float32(draw(st.sampled_from([1, 0.1, 97.3])))
    return draw(arrays((rois, classes + 1), scores)), boxes * pixel


@settings(max_examples=150, deadline=None)
@given(
    scenes(),
    st.sampled_from([0.0, 0.05, 0.2]),
    st.sampled_from([0.0, 0.3, 0.5, 0.7]),
    st.sampled_from([None, 0.3, 0.5]),
    st.sampled_from([1, 5, 100]),
)
def test_equals_slow_loops(scene, score_threshold, nms_iou, vote_iou, max_detections):
    settings = dict(
        score_threshold=score_threshold,
        nms_iou=nms_iou,
        max_detections=max_detections,
        vote_iou=vote_iou,
    )
    expected = slow_selection(*scene, **settings)
    scores, labels, boxes, rois = select_boxes(*map(torch.tensor, scene), **settings)
    assert scores.tolist() == [item[0] for item in expected]
    assert labels.tolist() == [item[1] for item in expected]
    assert rois.tolist() == [item[3] for item in expected]
    expected_boxes = np.array([item[2] for item in expected], np.float32).reshape(-1, 4)
    np.testing.assert_allclose(boxes.numpy(), expected_boxes, rtol=1e-6)


def many_rois(*, rois=120, classes=80, seed=0):
    rng = np.random.default_rng(seed)
    centers = rng.uniform(100, 900, (12, 1, 2))[rng.integers(12, size=rois)]
    centers = centers + rng.normal(0, 8, (rois, classes, 2))
    sides = rng.uniform(60, 90, (rois, classes, 2))
    boxes = np.concatenate([centers - sides / 2, centers + sides / 2], axis=2).astype(np.float32)
    probabilities = rng.dirichlet(np.full(classes + 1, 0.05), size=rois).astype(np.float32)
    return probabilities, boxes


@pytest.mark.parametrize("vote_iou", [None, 0.5])
def test_eighty_classes_equal_slow_loops(vote_iou):
    scene = many_rois()
    settings = dict(score_threshold=0.02, nms_iou=0.3, max_detections=100, vote_iou=vote_iou)
    expected = slow_selection(*scene, **settings)
    scores, labels, boxes, rois = select_boxes(*map(torch.tensor, scene), **settings)
    assert len(expected) == 100
    assert [*zip(labels.tolist(), rois.tolist(), strict=True)] == [(e[1], e[3]) for e in expected]
    np.testing.assert_allclose(boxes.numpy(), np.float32([e[2] for e in expected]), rtol=1e-6)


def test_the_class_does_not_blur_the_boxes():
    """Moved by 79 times 1001 pixels, in float32, these two would overlap by .3004, not .2999."""
    probabilities, boxes = torch.zeros(3, 81), torch.zeros(3, 80, 4)
    boxes[:, 79] = torch.tensor([[0, 0, 10, 10], [5.386, 0, 15.386, 10], [900, 900, 1000, 1000]])
    probabilities[:, 80] = torch.tensor([0.9, 0.8, 0.7])
    _, labels, _, rois = select_boxes(probabilities, boxes, score_threshold=0.05, nms_iou=0.3)
    assert rois.tolist() == [0, 1, 2] and labels.tolist() == [79] * 3


def test_the_order_of_rois_matters_only_between_equal_scores():
    probabilities, boxes = map(torch.tensor, many_rois(rois=60, classes=7))
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    settings = dict(score_threshold=0.01, vote_iou=0.5)
    scores, labels, selected, rois = select_boxes(probabilities, boxes, **settings)
    shuffled = select_boxes(probabilities[order], boxes[order], **settings)
    assert torch.equal(scores, shuffled[0]) and torch.equal(labels, shuffled[1])
    torch.testing.assert_close(selected, shuffled[2])
    assert torch.equal(rois, order[shuffled[3]])


def test_voting_by_hand():
    """Boxes of scores .6 and .3, IoU 80/120: the better one moves a third of the way."""
    boxes = torch.tensor([[[0.0, 0, 10, 10]], [[2.0, 0, 12, 10]], [[50.0, 50, 60, 60]]])
    probabilities = torch.tensor([[0.4, 0.6], [0.7, 0.3], [0.9, 0.1]])
    _, _, selected, rois = select_boxes(probabilities, boxes, score_threshold=0.05, vote_iou=0.5)
    assert rois.tolist() == [0, 2]
    torch.testing.assert_close(
        selected, torch.tensor([[2 / 3, 0, 10 + 2 / 3, 10], [50, 50, 60, 60]])
    )


def test_voting_never_leaves_the_image():
    """Clipped boxes share a border; their mean, rounded, must not lie beyond it."""
    rng = np.random.default_rng(0)
    boxes = np.zeros((50, 1, 4), np.float32)
    boxes[:, 0, :2], boxes[:, 0, 2:] = rng.uniform(0, 20, (50, 2)), (333.1, 499.7)
    scores = rng.uniform(0.1, 1, (50, 1)).astype(np.float32)
    probabilities = torch.tensor(np.concatenate([1 - scores, scores], axis=1))
    _, _, selected, _ = select_boxes(
        probabilities, torch.tensor(boxes), score_threshold=0.05, vote_iou=0.5
    )
    assert len(selected) == 1
    assert torch.equal(selected[0, 2:], torch.tensor([333.1, 499.7]))


def test_nothing_is_found():
    empty = select_boxes(torch.zeros(0, 4), torch.zeros(0, 3, 4), score_threshold=0.05)
    below = select_boxes(
        torch.full((5, 4), 0.01), torch.ones(5, 3, 4), score_threshold=0.05, vote_iou=0.5
    )
    for scores, labels, boxes, rois in (empty, below):
        assert scores.shape == labels.shape == rois.shape == (0,) and boxes.shape == (0, 4)
        assert labels.dtype == rois.dtype == torch.int64
