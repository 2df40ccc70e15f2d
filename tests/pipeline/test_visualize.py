"""Pictures of proposals."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_run import proposals_of, rle_of

from pipeline import visualize
from pipeline.visualize import LABEL_SIZE, Label, colour, draw_proposals, put_labels

GREY = np.full((200, 300, 3), 128, np.uint8)


def changed(first, second):
    return (first != second).any(axis=-1)


@pytest.fixture
def stack():
    """Three masks, each within the next: the score of the second is within the first's mask."""
    boxes = [(10, 10, 190, 190), (60, 60, 180, 180), (100, 100, 170, 170)]
    proposals = proposals_of(1, "a.png", boxes)
    proposals.height, proposals.width = GREY.shape[:2]
    proposals.counts = [rle_of(box, 200, 300)["counts"] for box in boxes]
    return proposals


def test_scores_are_on_top_of_all_masks(stack, monkeypatch):
    """What the labels change is the same whether the masks are drawn below them or not at all."""
    whole = draw_proposals(GREY, stack, 3)
    monkeypatch.setattr(visualize, "put_labels", lambda picture, labels: drawn.append(labels))
    drawn = []
    masks = draw_proposals(GREY, stack, 3)
    [labels] = drawn
    assert [label.text for label in labels] == ["0.90", "0.70", "0.50"]
    assert [label.corner for label in labels] == [(10, 10), (60, 60), (100, 100)]
    put_labels(masks, labels)
    assert np.array_equal(whole, masks)


def test_the_best_mask_is_on_top_and_no_more_than_asked_for_are_drawn(stack):
    picture = draw_proposals(GREY, stack, 1)
    inside = picture[120, 120].astype(int) - 128
    assert (np.sign(inside) == np.sign(np.array(colour(0)) - 128)).all()
    assert not changed(picture, GREY)[:, 200:].any()
    three = draw_proposals(GREY, stack, 3)
    assert tuple(three[10, 150]) == tuple(picture[10, 150]) == colour(0)
    assert np.array_equal(draw_proposals(GREY, stack, 0), GREY)


corners = st.tuples(st.floats(-5, 310), st.floats(-5, 210))


@settings(deadline=None)
@given(st.lists(corners, max_size=40))
def test_labels_do_not_cover_each_other(places):
    together = GREY.copy()
    seen = []
    original = visualize.put_label

    def note(picture, text, origin, rgb, scale):
        seen.append(origin)
        original(picture, text, origin, rgb, scale)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(visualize, "put_label", note)
        put_labels(together, [Label("0.12", place, (9, 9, 9)) for place in places])
    assert len(set(seen)) == len(seen) <= len(places)
    assert bool(seen) == any(max(y, LABEL_SIZE[1]) < 200 for _, y in places)
    for n, (x, y) in enumerate(seen):
        assert 0 <= x <= 300 - LABEL_SIZE[0] and LABEL_SIZE[1] <= y < 200
        for u, v in seen[:n]:
            # Whole pixels: a fraction is lost of either.
            assert abs(x - u) > LABEL_SIZE[0] - 2 or abs(y - v) > LABEL_SIZE[1] - 2
