"""NMS of masks equals the loop over all pairs, whatever the sizes and wherever they lie.

So does Soft-NMS, which lowers scores instead.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.inference import nms
from pipeline.inference.nms import mask_nms, soft_mask_nms
from pipeline.inference.proposals import Proposals
from tests.pipeline.inference.builders import proposals_of

LIMITS = st.sampled_from([0.01, 0.1, 0.3, 0.5, 0.7, 1.0])


def check(masks: np.ndarray, limit: float) -> None:
    kept = []
    for n, mask in enumerate(masks):
        unions = [(mask & masks[k]).sum() / max(1, (mask | masks[k]).sum()) for k in kept]
        if all(iou < limit for iou in unions):
            kept.append(n)
    proposals = proposals_of(masks)
    result = mask_nms(proposals, limit)
    assert result.rles == [proposals.rles[n] for n in kept]
    np.testing.assert_array_equal(result.boxes, proposals.boxes[kept])
    np.testing.assert_array_equal(result.logits, proposals.logits[kept])
    check_soft(masks, limit)


def check_soft(masks: np.ndarray, limit: float) -> None:
    proposals = proposals_of(masks, scores=np.linspace(0.9, 0.1, len(masks)))
    scores = dict(enumerate(proposals.scores))
    expected = []
    while scores:
        best = max(scores, key=lambda n: (scores[n], -n))
        expected.append((proposals.rles[best], scores.pop(best)))
        for n in list(scores):
            union = (masks[n] | masks[best]).sum()
            iou = (masks[n] & masks[best]).sum() / union if union else 0
            if iou == 1:
                del scores[n]
            elif iou >= limit:
                scores[n] *= 1 - iou
    result = soft_mask_nms(proposals, limit)
    assert (np.diff(result.logits) <= 0).all()
    found = sorted(zip(result.rles, result.scores, strict=True))
    assert [rle for rle, _ in found] == [rle for rle, _ in sorted(expected)]
    np.testing.assert_allclose([s for _, s in found], [s for _, s in sorted(expected)], 1e-5)


@given(st.integers(0, 2**31), st.integers(0, 12), LIMITS)
@settings(max_examples=80, deadline=None)
def test_ragged_masks(seed, count, limit):
    rng = np.random.default_rng(seed)
    masks = np.zeros((count, 12, 14), bool)
    for mask in masks:
        y, x, h, w = rng.integers(0, 8, 4)
        mask[y : y + h + 1, x : x + w + 1] = rng.random((h + 1, w + 1))[: 12 - y, : 14 - x] < 0.9
        mask[y, x] = True
    check(masks, limit)


@given(st.integers(0, 2**31), st.integers(0, 40), LIMITS, st.sampled_from([1, 7, 1 << 21]))
@settings(max_examples=80, deadline=None)
def test_rectangles_of_all_sizes(seed, count, limit, max_pairs):
    """Sides from 1 to 64, on and beside the lines of the grids; some twice, some empty."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((count, 64, 64), bool)
    for n, mask in enumerate(masks):
        w, h = 2 ** rng.integers(0, 7, 2) - rng.integers(0, 2, 2)
        x, y = (int(rng.integers(0, 65 - side)) for side in (w, h))
        mask[y : y + h, x : x + w] = True
        if n and rng.random() < 0.3:
            mask[:] = masks[rng.integers(n)]
            mask[rng.integers(64), rng.integers(64)] ^= True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nms, "MAX_PAIRS", max_pairs)
        check(masks, limit)


def test_an_iou_at_the_limit_is_reached():
    """.55 times 20 pixels is more than 11 in floats."""
    masks = np.zeros((2, 1, 20), bool)
    masks[0], masks[1, :, :11] = True, True
    check(masks, 0.55)


def test_each_mask_meets_only_its_neighbors():
    """Four times as many in four times the area: four times the pairs, not sixteen times."""
    pairs = []
    for side in (20, 40):
        x, y = np.meshgrid(*[12.0 * np.arange(side)] * 2)
        corner = np.stack([x.ravel(), y.ravel()], axis=1)
        boxes, areas = np.concatenate([corner, corner + 20], axis=1), np.full(side**2, 400)
        found = list(nms._sharing_cells(boxes, areas, 0.1))
        pairs.append(sum(len(i) for i, _ in found))
        first, second = nms._neighbors(boxes, areas, 0.1)
        assert len(first) == 2 * side * (side - 1)  # beside and below, 8 px in common
        assert (first < second).all() and set((second - first).tolist()) == {1, side}
    assert pairs[1] < 5 * pairs[0]  # at the edges they have fewer neighbors


def test_no_proposals():
    none = Proposals(1, "x", 9, 9, np.empty(0, np.float32), np.empty((0, 4), np.float32), [])
    assert len(mask_nms(none, 0.5)) == 0
    assert len(soft_mask_nms(none, 0.5)) == 0


def test_soft_nms_keeps_sure_and_hopeless_scores_finite():
    """Scores of 1 and 0 have infinite logits; a copy goes, and nothing becomes NaN."""
    masks = np.zeros((4, 1, 20), bool)
    masks[0, :, :10], masks[1, :, :9], masks[2, :, :10], masks[3, :, 15:] = True, True, True, True
    proposals = proposals_of(masks)
    proposals.logits = np.array([np.inf, np.inf, np.inf, -np.inf], np.float32)
    result = soft_mask_nms(proposals, 0.8)
    assert result.rles == [proposals.rles[n] for n in (0, 1, 3)]
    np.testing.assert_allclose(result.scores, [1, 0.1, 0], atol=1e-7)
