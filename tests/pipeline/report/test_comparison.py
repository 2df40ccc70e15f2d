"""DeepMask and SharpMask compared: which masks belong together, and which objects are shown."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets.coco import CocoInstances
from datasets.images import ImageFolder
from pipeline.report.comparison import object_gallery, refined_objects, same_proposals
from pipeline.report.pictures import scenes_of
from tests.pipeline.report.small_run import (
    ELSEWHERE,
    SQUARE,
    UPPER_HALF,
    object_of,
    proposals_of,
    write_dataset,
)


def scored(boxes, scores):
    return proposals_of(1, "a.png", boxes, scores)


@settings(deadline=None)
@given(
    st.lists(st.tuples(*[st.integers(0, 30)] * 2), min_size=1, max_size=12, unique=True),
    st.integers(0, 2**32 - 1),
)
def test_masks_of_a_cell_find_each_other(corners, seed):
    """Scores differ in the last bits, boxes by a pixel or two, and some masks have been left out.

    Pairs of cells have equal scores, so that only the boxes tell them apart.
    """
    rng = np.random.default_rng(seed)
    scores = 0.9 - np.arange(len(corners)) // 2 / 100
    boxes = [(16 * x, 16 * y, 16 * x + 14, 16 * y + 14) for x, y in corners]
    refined = np.array(boxes) + rng.integers(0, 3, (len(boxes), 4))
    cells = [np.flatnonzero(rng.random(len(boxes)) < 0.8) for _ in range(2)]
    pairs = same_proposals(
        scored([boxes[i] for i in cells[0]], scores[cells[0]]),
        scored(refined[cells[1]].tolist(), scores[cells[1]] + rng.uniform(-2e-6, 2e-6)),
    )
    found = {(cells[0][i], cells[1][j]) for i, j in pairs}
    assert found == {(i, i) for i in set(cells[0]) & set(cells[1])}


@pytest.mark.parametrize(("boxes", "scores"), [([SQUARE], [0.89]), ([ELSEWHERE], [0.9]), ([], [])])
def test_other_scores_or_other_boxes_are_no_pair(boxes, scores):
    assert not len(same_proposals(scored([SQUARE], [0.9]), scored(boxes, scores)))
    assert not len(same_proposals(scored(boxes, scores), scored([SQUARE], [0.9])))


def objects_found(tmp_path, *stores):
    """The objects, the second of them elsewhere, that the same proposal of both stores fits."""
    objects = [object_of(1, SQUARE), object_of(1, ELSEWHERE)]
    coco = CocoInstances.load(write_dataset(tmp_path / "data", ["a.png"], objects)[0])
    return refined_objects(*scenes_of(stores, coco), same_proposals(*stores))


def test_an_object_is_shown_with_the_pair_that_fits_best_on_average(tmp_path):
    """Neither the best coarse mask (16 x 15 px, then 16 x 8) nor the best refined one wins."""
    boxes, scores = [(8, 8, 24, 23), (8, 8, 24, 22), UPPER_HALF], [0.9, 0.8, 0.7]
    coarse, refined = scored(boxes, scores), scored(boxes[::-1], scores)
    for stores in ((coarse, refined), (refined, coarse)):
        [(name, annotation, masks, ious)] = objects_found(tmp_path, *stores)
        assert (name, annotation, ious.tolist()) == ("a.png", 0, [14 / 16, 14 / 16])
        assert masks == [store.rle(1) for store in stores]


def test_an_object_that_only_one_stage_proposes_is_not_found(tmp_path):
    coarse, refined = scored([SQUARE, ELSEWHERE], [0.9, 0.8]), scored([SQUARE], [0.9])
    assert [annotation for _, annotation, *_ in objects_found(tmp_path, coarse, refined)] == [0]
    assert objects_found(tmp_path, coarse, scored([], [])) == []


def test_images_of_two_stores_meet_in_any_order(tmp_path):
    """Images 3 to 6 are in both."""
    names = [f"{i}.png" for i in range(1, 9)]
    objects = [object_of(i, SQUARE) for i in range(1, 9)]
    path, images = write_dataset(tmp_path / "data", names, objects)
    coco = CocoInstances.load(path)
    stores = (
        scenes_of([proposals_of(i, f"{i}.png", [SQUARE]) for i in ids], coco)
        for ids in ((5, 3, 1, 6, 2, 4), (8, 4, 3, 7, 6, 5))
    )
    gallery = object_gallery(*stores, coco, ImageFolder(images))
    assert {e["file_name"] for e in gallery.pop("examples")} == set(names[2:6])
    assert gallery == {"proposals": 4, "pairs": 4, "objects": 4, "better": 0}
