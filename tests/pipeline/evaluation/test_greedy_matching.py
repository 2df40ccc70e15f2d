"""Greedy matching for all thresholds and sets of objects at once, against one at a time."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pipeline.evaluation.greedy_matching import find_hits

THRESHOLDS = np.arange(0.5, 1, 0.05)


def match_one_by_one(overlaps, wanted, threshold):
    """The rule as it is told: each proposal takes the free wanted object it overlaps most."""
    free, hits = set(np.flatnonzero(wanted)), []
    for row in overlaps:
        _, best = max(((row[g], g) for g in free if row[g] >= threshold), default=(None, None))
        free -= {best}
        hits.append(best is not None)
    return hits


@st.composite
def scenes(draw):
    shape = draw(st.integers(0, 12)), draw(st.integers(1, 6))
    values = st.sampled_from([0, 0.3, 0.5, 0.55, 0.7, 0.72, 0.95, 1])  # with many equal ones
    wanted = draw(arrays(bool, (draw(st.integers(1, 4)), shape[1])))
    return draw(arrays(float, shape, elements=values)), wanted


@given(scenes())
def test_all_at_once_as_one_by_one(scene):
    overlaps, wanted = scene
    hits = find_hits(overlaps, wanted, THRESHOLDS)
    assert hits.shape == (len(THRESHOLDS), len(overlaps), len(wanted))
    for t, threshold in enumerate(THRESHOLDS):
        for a, own in enumerate(wanted):
            assert hits[t, :, a].tolist() == match_one_by_one(overlaps, own, threshold)


def test_a_proposal_that_found_nothing_leaves_the_object_to_the_next():
    overlaps = np.array([[0.4, 0.6], [0.9, 0.8], [0.7, 0.9]])
    hits = find_hits(overlaps, np.array([[True, True], [True, False]]), np.array([0.5, 0.75]))
    assert hits[:, :, 0].tolist() == [[True, True, False], [False, True, True]]
    assert hits[:, :, 1].tolist() == [[False, True, False], [False, True, False]]
