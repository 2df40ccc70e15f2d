"""Boxes of a split's proposals: sorted, looked up by image, shared with workers."""

import pickle
from multiprocessing.reduction import ForkingPickler

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from datasets.proposal_boxes import ProposalBoxes


def random_rows(seed, count, images=5):
    """Rows in any order; box n is (n, n, n + 1, n + 1), and some scores are equal."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, images, count) * 10**12  # ids need 64 bits
    boxes = np.arange(count)[:, None] + np.array([0, 0, 1, 1])
    return ids, boxes, rng.integers(0, 4, count) / np.float32(4)


@given(st.integers(0, 10_000), st.integers(0, 40))
def test_an_image_has_its_proposals_best_first(seed, count):
    ids, boxes, scores = random_rows(seed, count)
    proposals = ProposalBoxes.from_rows(ids, boxes, scores)
    assert proposals.boxes.dtype == proposals.scores.dtype == np.float32
    for image_id in [*np.unique(ids).tolist(), -1, 7, 10**15]:
        rows = sorted(
            (row for row in range(count) if ids[row] == image_id), key=lambda row: -scores[row]
        )
        found_boxes, found_scores = proposals.of(image_id)
        assert found_boxes.shape == (len(rows), 4)
        assert found_boxes[:, 0].tolist() == rows
        assert found_scores.tolist() == scores[rows].tolist()


def test_spawned_workers_share_the_arrays():
    proposals = ProposalBoxes.from_rows(*random_rows(0, 40))
    before = [proposals.of(image_id)[0].tolist() for image_id in proposals.image_ids]
    copies = [pickle.loads(ForkingPickler.dumps(proposals)) for _ in range(2)]
    for one in (proposals, *copies):
        assert [one.of(image_id)[0].tolist() for image_id in one.image_ids] == before
    proposals.boxes[0] = 77  # the same memory in all of them
    assert all((one.boxes[0] == 77).all() for one in copies)
