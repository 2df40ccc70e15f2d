"""Which images the report shows, and with which proposals and detections."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from datasets.coco import CocoInstances
from datasets.images import ImageFolder
from pipeline.report import pictures
from pipeline.report.pictures import FAINT, FULL
from tests.pipeline.report.small_run import (
    ELSEWHERE,
    EVERYTHING,
    FOUND,
    HALF,
    SQUARE,
    STORE,
    UPPER_HALF,
    detections_of,
    make_dataset,
    object_of,
    proposals_of,
    write_dataset,
    write_store,
)

# Which images are shown.


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"))


def proposal_examples(folder, dataset, proposals):
    """The best images, the worst, and how many there are."""
    write_store(folder / "store", proposals)
    coco = CocoInstances.load(dataset[0])
    scenes = pictures.scenes_of(pictures.read_proposals(folder / "store"), coco)
    gallery = pictures.proposal_gallery(scenes, coco, ImageFolder(dataset[1]))
    return gallery["best"], gallery["worst"], gallery["images"]


def detection_examples(dataset, found):
    return pictures.detection_gallery(
        found, CocoInstances.load(dataset[0]), ImageFolder(dataset[1])
    )["examples"]


def ious_of(examples):
    return [(example["file_name"], example["ious"].mean()) for example in examples]


LATE = [ELSEWHERE] * 100 + [SQUARE]
SHOWN_PROPOSALS = {
    "in order": (STORE, [("found.png", 1), (HALF, 0.5)], [("missed.png", 0)]),
    "too late": ([proposals_of(1, "found.png", LATE[1:]), proposals_of(2, "missed.png", LATE),
                  proposals_of(77, "other.png", [SQUARE])],
                 [("found.png", 1)], [("missed.png", 0)]),
    "none": ([STORE[0], proposals_of(2, "missed.png", [])],
             [("found.png", 1)], [("missed.png", 0)]),
}  # fmt: skip


@pytest.mark.parametrize(("store", "best", "worst"), SHOWN_PROPOSALS.values(), ids=SHOWN_PROPOSALS)
def test_images_of_proposals(tmp_path, dataset, store, best, worst):
    """Only the first 100 proposals count, and only images that were looked at and have objects."""
    found, missed, num_images = proposal_examples(tmp_path, dataset, store)
    assert (ious_of(found), ious_of(missed)) == (best, worst)
    assert num_images == len(best) + len(worst)
    assert all(len(example["pictures"]) == 3 for example in found + missed)


JUST = detections_of(1, "found.png", [(SQUARE, 1, pictures.MIN_SCORE + 1e-9)])
JUST_BOX = detections_of(1, "found.png", [(SQUARE, 1, pictures.MIN_SCORE + 1e-9)], masks=False)
SHOWN_DETECTIONS = {
    "in order": (FOUND, [("found.png", 1), (HALF, 0.5), ("missed.png", 0)], [1, 2, 1]),
    "none": ([JUST, detections_of(2, "missed.png", [])],
             [("found.png", 1), ("missed.png", 0)], [1, 0]),
    "no masks": ([JUST_BOX, detections_of(2, "missed.png", [], masks=False)],
                 [("found.png", 1), ("missed.png", 0)], [1, 0]),
}  # fmt: skip


@pytest.mark.parametrize(
    ("found", "shown", "nums"), SHOWN_DETECTIONS.values(), ids=SHOWN_DETECTIONS
)
def test_images_of_detections_from_the_best_to_the_worst(dataset, found, shown, nums):
    """Scores below `MIN_SCORE` do not count."""
    examples = detection_examples(dataset, found)
    assert ious_of(examples) == shown and [e["num_detections"] for e in examples] == nums
    assert all(len(e["pictures"]) == 2 and not e["error"] for e in examples)


def test_crowd_is_no_object_and_every_object_has_its_iou(tmp_path):
    objects = [object_of(1, SQUARE), object_of(1, ELSEWHERE), object_of(1, EVERYTHING, iscrowd=1)]
    dataset = write_dataset(tmp_path / "data", ["two.png"], objects)
    [example], _, _ = proposal_examples(tmp_path, dataset, [proposals_of(1, "two.png", [SQUARE])])
    [detected] = detection_examples(dataset, [detections_of(1, "two.png", [(SQUARE, 1, 0.9)])])
    assert sorted(example["ious"]) == sorted(detected["ious"]) == [0, 1]


@given(st.lists(st.floats(0, 1), max_size=40))
def test_choice_is_ordered_and_nothing_is_chosen_twice(values):
    ranked = sorted(enumerate(values), key=lambda item: -item[1])
    best, worst = pictures.choose_examples(ranked)
    assert len(best) + len(worst) == min(len(ranked), 2 * pictures.NUM_EXAMPLES)
    assert 0 <= len(best) - len(worst) <= 1
    assert best + worst[::-1] == ranked[: len(best)] + ranked[len(ranked) - len(worst) :]


@given(st.integers(0, 40), st.integers(1, 9))
def test_items_stand_for_equal_parts_and_none_is_shown_twice(total, count):
    assert pictures.spread(list(range(80)), 8) == [5, 15, 25, 35, 45, 55, 65, 75]
    chosen = pictures.spread(list(range(total)), count)
    assert chosen == sorted(set(chosen)) and len(chosen) == min(count, total)


# How well they fit, and what is drawn.


@pytest.fixture
def two_objects(tmp_path):
    """An image with a person and, elsewhere, a car."""
    objects = [object_of(1, SQUARE), object_of(1, ELSEWHERE, category=3)]
    return CocoInstances.load(write_dataset(tmp_path / "one", ["a.png"], objects)[0])


@pytest.mark.parametrize("masks", [True, False])
def test_only_detections_of_the_right_category_fit(two_objects, masks):
    found = [(SQUARE, 3, 0.9), (UPPER_HALF, 1, 0.8), (ELSEWHERE, 3, 0.7), (ELSEWHERE, 7, 0.6)]
    ious = pictures.overlaps(detections_of(1, "a.png", found, masks=masks), two_objects, [0, 1])
    assert ious == pytest.approx(np.array([[0, 0], [0.5, 0], [0, 1], [0, 0]]))


@given(st.lists(st.floats(0, 1, width=32)), st.integers(0, 9), st.booleans())
def test_first_keeps_the_highest_scores_of_every_column(scores, count, masks):
    found = [(SQUARE, i, score) for i, score in enumerate(sorted(scores, reverse=True))]
    kept = pictures.first(detections_of(1, "a.png", found, masks=masks), count)
    assert kept.labels.tolist() == list(range(min(count, len(scores))))
    assert len(kept.boxes) == len(kept) == len(kept.rles if masks else kept)


@pytest.fixture
def marks_of(two_objects, monkeypatch):
    """What is drawn for objects and for detections."""
    monkeypatch.setattr(pictures, "draw_marks", lambda image, marks: marks)

    def draw(found, **options):
        [scene] = pictures.scenes_of([detections_of(1, "a.png", found, **options)], two_objects)
        return pictures.draw_detections(scene, two_objects, np.zeros((64, 64, 3), np.uint8))

    return draw


def test_names_scores_colors_and_tints(marks_of):
    """The best is drawn last; a category that the annotations do not have goes by its id."""
    truth, marks = marks_of([(SQUARE, 1, 0.987), (UPPER_HALF, 3, 0.75), (SQUARE, 8, 0.5)])
    assert [(mark.label, mark.tint) for mark in truth] == [("person", 0), ("car", 0)]
    texts = [("8 0.50", FAINT), ("car 0.75", FAINT), ("person 0.99", FULL)]
    assert [(mark.label, mark.tint) for mark in marks] == texts
    assert truth[0].rgb == marks[2].rgb and truth[1].rgb == marks[1].rgb != truth[0].rgb
    assert marks[2].box.tolist() == list(SQUARE)


def test_box_stands_for_a_mask_that_is_not_there(marks_of):
    _, [mark] = marks_of([(UPPER_HALF, 1, 0.9)], masks=False)
    assert coco_mask.toBbox(mark.rle).tolist() == [8, 8, 16, 8]
    assert mark.tint == FULL, "an IoU of 0.5 of the boxes"
