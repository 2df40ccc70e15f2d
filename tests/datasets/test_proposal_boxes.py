"""Boxes of a split's proposals: sorted, looked up by image, shared with workers."""

import pickle
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from tempfile import TemporaryDirectory

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


@given(st.integers(0, 10_000), st.integers(0, 40), st.sampled_from([None, 1, 3]))
def test_an_image_has_its_proposals_best_first(seed, count, limit):
    ids, boxes, scores = random_rows(seed, count)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "boxes.f32"
        odd = ids % (2 * 10**12) > 0  # parts have whole images
        parts = ((ids[rows], boxes[rows], scores[rows]) for rows in (odd, ~odd))
        ProposalBoxes.write(parts, path, limit=limit)
        in_memory = ProposalBoxes.from_rows((ids, boxes, scores), limit=limit)
        for proposals in (in_memory, ProposalBoxes.load(path)):
            assert proposals.boxes.dtype == np.float32
            for image_id in [*np.unique(ids).tolist(), -1, 7, 10**15]:
                rows = [row for row in range(count) if ids[row] == image_id]
                best = sorted(rows, key=lambda row: -scores[row])[:limit]
                found = proposals.of(image_id)
                assert found.shape == (len(best), 4) and found[:, 0].tolist() == best


def test_spawned_workers_share_the_arrays(tmp_path):
    rows = random_rows(0, 40)
    in_memory = ProposalBoxes.from_rows(rows)
    ProposalBoxes.write([rows], tmp_path / "boxes.f32")
    mapped = ProposalBoxes.load(tmp_path / "boxes.f32")
    before = [in_memory.of(image_id).tolist() for image_id in in_memory.image_ids]
    for proposals in (in_memory, mapped):
        copies = [pickle.loads(ForkingPickler.dumps(proposals)) for _ in range(2)]
        for one in (proposals, *copies):
            assert [one.of(image_id).tolist() for image_id in one.image_ids] == before
        if proposals is mapped:
            assert all(isinstance(one.boxes, np.memmap) for one in copies)
        else:
            proposals.boxes[0] = 77  # the same memory in all of them
            assert all((one.boxes[0] == 77).all() for one in copies)
