"""Pictures of proposals and detections."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.inference import visualize
from pipeline.inference.patch_sheet import GREEN, RED, patch_sheet
from pipeline.inference.visualize import (
    BELOW,
    LABEL_HEIGHT,
    MAX_COVERED,
    Label,
    color,
    draw_detections,
    draw_proposals,
    label_width,
    put_labels,
    save_in_folder,
)
from tests.coco_json import painted_patches
from tests.pipeline.inference.builders import proposals_of
from tests.pipeline.report.small_run import detections_of

GRAY = np.full((200, 300, 3), 128, np.uint8)


def changed(first, second):
    return (first != second).any(axis=-1)


@pytest.fixture
def stack():
    """Three masks, each within the next: the score of the second is within the first's mask."""
    masks = np.zeros((3, *GRAY.shape[:2]), bool)
    for mask, first, last in zip(masks, (10, 60, 100), (190, 180, 170), strict=True):
        mask[first:last, first:last] = True
    return proposals_of(masks, scores=np.float32([0.9, 0.7, 0.5]))


def test_scores_are_on_top_of_all_masks(stack, monkeypatch):
    """What the labels change is the same whether the masks are drawn below them or not at all."""
    whole = draw_proposals(GRAY, stack, 3)
    monkeypatch.setattr(visualize, "put_labels", lambda picture, labels: drawn.append(labels))
    drawn = []
    masks = draw_proposals(GRAY, stack, 3)
    [labels] = drawn
    assert [label.text for label in labels] == ["0.90", "0.70", "0.50"]
    assert [label.box[:2] for label in labels] == [(10, 10), (60, 60), (100, 100)]
    put_labels(masks, labels)
    assert np.array_equal(whole, masks)


def test_the_best_mask_is_on_top_and_no_more_than_asked_for_are_drawn(stack):
    picture = draw_proposals(GRAY, stack, 1)
    inside = picture[120, 120].astype(int) - 128
    assert (np.sign(inside) == np.sign(np.array(color(0)) - 128)).all()
    assert not changed(picture, GRAY)[:, 200:].any()
    three = draw_proposals(GRAY, stack, 3)
    assert tuple(three[10, 150]) == tuple(picture[10, 150]) == color(0)
    assert np.array_equal(draw_proposals(GRAY, stack, 0), GRAY)


def test_detections_have_names_and_their_own_boxes(monkeypatch):
    """The box is the detector's, the mask the proposal's: here they lie apart."""
    found = detections_of(1, "a.png", [((8, 8, 24, 24), 3, 0.81), ((1, 40, 9, 60), 1, 0.7)])
    found.boxes[0] = [40.2, 41, 60, 58]
    gray, drawn = GRAY[:64, :64], []
    monkeypatch.setattr(visualize, "put_labels", lambda picture, labels: drawn.extend(labels))
    picture = draw_detections(gray, found, {1: "ring", 3: "bar"}, 1)
    assert [(label.text, label.box[1]) for label in drawn] == [("bar 0.81", 41)]
    line = np.zeros((64, 64), bool)
    line[41:58, 40:60] = True
    line[42:57, 41:59] = False
    assert (picture[line] == color(0)).all()
    assert not changed(picture, gray)[~line & (np.arange(64) >= 32)].any()
    assert not changed(picture, gray)[40:, :32].any()  # of the second one, nothing


@pytest.mark.parametrize("name", ["val/1.png", "../../val/1.png", "/val/1.png"])
def test_pictures_stay_below_their_folder(tmp_path, name):
    folder = tmp_path / "one" / "two" / "drawn"
    save_in_folder(GRAY, folder, name)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [folder / "val" / "1.png.jpg"]


corners = st.tuples(st.floats(-5, 310), st.floats(-5, 210))
sides = st.tuples(st.floats(1, 300), st.floats(1, 200))
texts = st.sampled_from(["0.12", "traffic light 0.12"])


@settings(deadline=None)
@given(st.lists(st.tuples(texts, corners, sides), max_size=40))
@example([("0.12", (5, 60.48), (90, 90))] * 2)  # 60.48 + 17 - 60.48 is a little less than 17
def test_labels_cover_neither_each_other_nor_small_objects(labels):
    together = GRAY.copy()
    seen = []
    original = visualize.put_label

    def note(picture, text, origin, rgb, scale):
        seen.append((*origin, label_width(text)))
        original(picture, text, origin, rgb, scale)

    named = [Label(t, (x, y, x + w, y + h), (9, 9, 9)) for t, (x, y), (w, h) in labels]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(visualize, "put_label", note)
        put_labels(together, named)
    assert len(set(seen)) == len(seen) <= len(labels)
    for n, (x, y, width) in enumerate(seen):
        top, bottom = y + BELOW - LABEL_HEIGHT, y + BELOW
        assert 0 <= x <= 300 - width and top >= 0 and bottom <= 200
        for u, v, its_width in seen[:n]:
            beside = x >= u + its_width or u >= x + width
            assert beside or abs(y - v) >= LABEL_HEIGHT
        for left, upper, right, lower in (label.box for label in named):
            shared = max(0, min(right, x + width) - max(left, x))
            shared *= max(0, min(lower, bottom) - max(upper, top))
            assert shared <= MAX_COVERED * (right - left) * (lower - upper) + 1e-6
    changed_rows = changed(together, GRAY).any(axis=1)
    assert changed_rows.any() == bool(seen)


def test_a_label_is_above_its_object_then_within_a_large_one_or_below_a_small_one(monkeypatch):
    seen = []
    monkeypatch.setattr(visualize, "put_label", lambda *args, **_: seen.append(args[1:3]))

    def draw(*labels):
        seen.clear()
        put_labels(GRAY.copy(), [Label(text, box, (9, 9, 9)) for text, box in labels])
        return {text: y + BELOW for text, (_, y) in seen}  # the lower edges

    small, large = (50, 60, 70, 80), (20, 60, 190, 190)
    assert draw(("a", small)) == {"a": 60}
    assert draw(("a", small), ("b", small)) == {"a": 60, "b": 80 + LABEL_HEIGHT}
    assert draw(("a", small), ("b", small), ("c", small)).keys() == {"a", "b"}
    assert draw(("a", large), ("b", large)) == {"a": 60, "b": 60 + LABEL_HEIGHT}
    above = (50, 45, 70, 58)  # an object without a label, where the label would be
    assert draw(("a", small), ("", above)) == {"a": 80 + LABEL_HEIGHT}
    assert draw(("a", (5, 2, 15, 12))) == {"a": 12 + LABEL_HEIGHT}  # at the upper edge
    corner = (285, 186, 297, 198)  # at the lower edge
    assert draw(("a", corner), ("b", corner)) == {"a": 186}


@pytest.mark.parametrize(
    ("scores", "texts"),
    [
        ([0.9999999, 0.9996, 0.9951], ["", "", ""]),
        ([0.9999999, 0.994, 0.5], ["", "0.99", "0.50"]),
        ([0.6, 0.004], ["0.60", "<0.01"]),
        ([], []),
    ],
)
def test_scores_are_written_where_they_tell_something(scores, texts):
    assert visualize.score_texts(np.array(scores)) == texts


def test_a_sheet_has_mask_patches_with_yellow_and_score_patches_with_other_frames(tmp_path):
    """Eight tiles of 96 pixels in a row, the first three of each head in use, on white."""
    sheet = patch_sheet(painted_patches(tmp_path), count=3)
    assert sheet.shape == (2 * 100 + 4, 8 * 100 + 4, 3) and sheet.dtype == np.uint8
    corners = sheet[4::100, 4::100].tolist()
    assert corners[0] == [[255, 230, 0]] * 3 + [[255, 255, 255]] * 5
    assert all(tuple(corner) in (GREEN, RED) for corner in corners[1][:3])
    assert corners[1][3:] == [[255, 255, 255]] * 5
