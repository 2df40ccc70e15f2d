"""Which images the report shows, and with which proposals and detections."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from datasets.coco import CocoInstances
from pipeline.report import pictures
from pipeline.report.pictures import FAINT, FULL
from tests.pipeline.report.small_run import (
    ELSEWHERE,
    EVERYTHING,
    FOUND,
    NUM_WITH_OBJECTS,
    SQUARE,
    STORE,
    UPPER_HALF,
    detections_of,
    object_of,
    proposals_of,
    write_dataset,
    write_store,
)


def qualities(examples):
    return {example["file_name"]: example["ious"].mean() for example in examples}


# Which images are shown.


def proposal_examples(tmp_path, dataset, proposals):
    """The best images, the worst, and how many there are."""
    write_store(tmp_path / "store", proposals)
    coco = CocoInstances.load(dataset[0])
    scenes = pictures.scenes_of(pictures.read_proposals(tmp_path / "store"), coco)
    gallery = pictures.proposal_gallery(scenes, coco, dataset[1])
    return gallery["best"], gallery["worst"], gallery["images"]


def test_found_is_best_and_missed_is_worst(tmp_path, dataset):
    best, worst, num_images = proposal_examples(tmp_path, dataset, STORE)
    assert list(qualities(best).items()) == [("found.png", 1), ("half.png", 0.5)]
    assert qualities(worst) == {"missed.png": 0}
    assert num_images == NUM_WITH_OBJECTS


@pytest.mark.parametrize("missed", [[ELSEWHERE] * 100 + [SQUARE], []])
def test_what_is_not_among_the_first_proposals_is_missed(tmp_path, dataset, missed):
    in_time = [ELSEWHERE] * 99 + [SQUARE]
    proposals = [proposals_of(1, "found.png", in_time), proposals_of(2, "missed.png", missed)]
    proposals.append(proposals_of(77, "other.png", [SQUARE]))
    best, worst, num_images = proposal_examples(tmp_path, dataset, proposals)
    assert qualities(best) == {"found.png": 1} and qualities(worst) == {"missed.png": 0}
    assert len(worst[0]["pictures"]) == 3
    assert num_images == 2, "an image that is not in the store was not looked at"


def detection_examples(dataset, found):
    return pictures.detection_gallery(found, CocoInstances.load(dataset[0]), dataset[1])["examples"]


def test_crowd_is_no_object_and_the_mean_is_over_objects(tmp_path):
    objects = [object_of(1, SQUARE), object_of(1, ELSEWHERE), object_of(1, EVERYTHING, iscrowd=1)]
    dataset = write_dataset(tmp_path / "data", ["two.png"], objects)
    [example], _, _ = proposal_examples(tmp_path, dataset, [proposals_of(1, "two.png", [SQUARE])])
    [detected] = detection_examples(dataset, [detections_of(1, "two.png", [(SQUARE, 1, 0.9)])])
    assert sorted(example["ious"]) == sorted(detected["ious"]) == [0, 1]


def test_images_with_objects_are_shown_from_the_best_to_the_worst(dataset):
    examples = detection_examples(dataset, FOUND)
    shown = [("found.png", 1), ("half.png", 0.5), ("missed.png", 0)]
    assert list(qualities(examples).items()) == shown, "0.2 is too low a score to count"
    assert [e["num_detections"] for e in examples] == [1, 2, 1]


@pytest.mark.parametrize("masks", [True, False])
def test_image_in_which_nothing_was_found_is_the_worst(dataset, masks):
    found = [detections_of(1, "found.png", [(SQUARE, 1, pictures.MIN_SCORE)], masks=masks)]
    found.append(detections_of(2, "missed.png", [], masks=masks))
    examples = detection_examples(dataset, found)
    assert list(qualities(examples).items()) == [("found.png", 1), ("missed.png", 0)]
    assert all(len(e["pictures"]) == 2 and not e["error"] for e in examples)


@given(st.lists(st.floats(0, 1), max_size=40))
def test_choice_is_ordered_and_nothing_is_chosen_twice(values):
    ranked = sorted(enumerate(values), key=lambda item: -item[1])
    best, worst = pictures.choose_examples(ranked)
    assert len(best) + len(worst) == min(len(ranked), 2 * pictures.NUM_EXAMPLES)
    assert 0 <= len(best) - len(worst) <= 1
    assert best + worst[::-1] == ranked[: len(best)] + ranked[len(ranked) - len(worst) :]


def test_items_stand_for_equal_parts():
    assert pictures.spread(list(range(80)), 8) == [5, 15, 25, 35, 45, 55, 65, 75]


@given(st.lists(st.integers(), max_size=40), st.integers(1, 9))
def test_items_keep_their_order_and_none_is_shown_twice(values, count):
    chosen = [i for i, _ in pictures.spread(list(enumerate(values)), count)]
    assert chosen == sorted(set(chosen)) and len(chosen) == min(count, len(values))


# How well they fit, and what is drawn.


@pytest.fixture
def ring_and_bar(tmp_path):
    """An image with a ring and, elsewhere, a bar."""
    objects = [object_of(1, SQUARE), object_of(1, ELSEWHERE, category=3)]
    return CocoInstances.load(write_dataset(tmp_path / "one", ["a.png"], objects)[0])


@pytest.mark.parametrize("masks", [True, False])
def test_only_detections_of_the_right_category_fit(ring_and_bar, masks):
    found = [(SQUARE, 3, 0.9), (UPPER_HALF, 1, 0.8), (ELSEWHERE, 3, 0.7), (ELSEWHERE, 7, 0.6)]
    ious = pictures.overlaps(detections_of(1, "a.png", found, masks=masks), ring_and_bar, [0, 1])
    assert ious == pytest.approx(np.array([[0, 0], [0.5, 0], [0, 1], [0, 0]]))
    nothing = detections_of(1, "a.png", [], masks=masks)
    assert pictures.overlaps(nothing, ring_and_bar, [0, 1]).shape == (0, 2)


@given(st.lists(st.floats(0, 1, width=32)), st.integers(0, 9), st.booleans())
def test_first_keeps_the_highest_scores_of_every_column(scores, count, masks):
    found = [(SQUARE, i, score) for i, score in enumerate(sorted(scores, reverse=True))]
    kept = pictures.first(detections_of(1, "a.png", found, masks=masks), count)
    assert kept.labels.tolist() == list(range(min(count, len(scores))))
    assert len(kept.boxes) == len(kept) == len(kept.rles if masks else kept)


@pytest.fixture
def marks_of(ring_and_bar, monkeypatch):
    """What is drawn for detections."""
    monkeypatch.setattr(pictures, "draw_marks", lambda image, marks: marks)

    def draw(found, **options):
        [scene] = pictures.scenes_of([detections_of(1, "a.png", found, **options)], ring_and_bar)
        return pictures.draw_detections(scene, ring_and_bar, np.zeros((64, 64, 3), np.uint8))

    return draw


def test_names_scores_colors_and_tints(marks_of):
    truth, marks = marks_of([(SQUARE, 1, 0.987), (UPPER_HALF, 3, 0.75), (SQUARE, 8, 0.5)])
    assert [(mark.label, mark.tint) for mark in truth] == [("ring", 0), ("bar", 0)]
    assert [(mark.label, mark.tint) for mark in marks[::-1]] == [
        ("ring 0.99", FULL),
        ("bar 0.75", FAINT),
        ("8 0.50", FAINT),
    ], "the best is drawn last; a category that the annotations do not have goes by its id"
    assert truth[0].rgb == marks[2].rgb and truth[1].rgb == marks[1].rgb != truth[0].rgb
    assert marks[2].box.tolist() == list(SQUARE)


def test_box_stands_for_a_mask_that_is_not_there(marks_of):
    _, [mark] = marks_of([(UPPER_HALF, 1, 0.9)], masks=False)
    assert coco_mask.toBbox(mark.rle).tolist() == [8, 8, 16, 8]
    assert mark.tint == FULL, "an IoU of 0.5 of the boxes"
