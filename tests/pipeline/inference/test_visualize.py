"""Pictures of proposals and detections."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.inference import visualize
from pipeline.inference.patch_sheet import GREEN, RED, patch_sheet
from pipeline.inference.visualize import (
    LABEL_HEIGHT,
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
    assert [label.corner for label in labels] == [(10, 10), (60, 60), (100, 100)]
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
    assert [(label.text, label.corner[1]) for label in drawn] == [("bar 0.81", 41)]
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
texts = st.sampled_from(["0.12", "traffic light 0.12"])


@settings(deadline=None)
@given(st.lists(st.tuples(texts, corners), max_size=40))
@example([("0.12", (5, 60.48))] * 2)  # 60.48 + 17 - 60.48 is a little less than 17
def test_labels_do_not_cover_each_other(labels):
    together = GRAY.copy()
    seen = []
    original = visualize.put_label

    def note(picture, text, origin, rgb, scale):
        seen.append((*origin, label_width(text)))
        original(picture, text, origin, rgb, scale)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(visualize, "put_label", note)
        put_labels(together, [Label(text, place, (9, 9, 9)) for text, place in labels])
    assert len(set(seen)) == len(seen) <= len(labels)
    assert bool(seen) == any(max(round(y), LABEL_HEIGHT) < 200 for _, (_, y) in labels)
    for n, (x, y, width) in enumerate(seen):
        assert 0 <= x <= 300 - width and LABEL_HEIGHT <= y < 200
        for u, v, its_width in seen[:n]:
            beside = x >= u + its_width or u >= x + width
            assert beside or abs(y - v) >= LABEL_HEIGHT


def test_a_sheet_has_mask_patches_with_yellow_and_score_patches_with_other_frames(tmp_path):
    """Eight tiles of 96 pixels in a row, the first three of each head in use, on white."""
    sheet = patch_sheet(painted_patches(tmp_path), count=3)
    assert sheet.shape == (2 * 100 + 4, 8 * 100 + 4, 3) and sheet.dtype == np.uint8
    corners = sheet[4::100, 4::100].tolist()
    assert corners[0] == [[255, 230, 0]] * 3 + [[255, 255, 255]] * 5
    assert all(tuple(corner) in (GREEN, RED) for corner in corners[1][:3])
    assert corners[1][3:] == [[255, 255, 255]] * 5
