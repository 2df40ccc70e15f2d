"""Which images the report shows, and with which proposals and detections."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from datasets.coco import CocoInstances
from pipeline.inference.coco_json import results_of, write_results
from pipeline.report import pictures
from pipeline.report.pictures import (
    FAINT,
    FULL,
    MIN_SCORE,
    NUM_EXAMPLES,
    choose_examples,
    detection_gallery,
    draw_detections,
    first,
    overlaps,
    proposal_gallery,
    read_proposals,
    scenes_of,
)
from tests.pipeline.report.small_run import (
    ELSEWHERE,
    EVERYTHING,
    FOUND,
    NUM_WITH_OBJECTS,
    SQUARE,
    STORE,
    detections_of,
    object_of,
    proposals_of,
    write_dataset,
    write_store,
)

UPPER_HALF = (8, 8, 24, 16)  # of SQUARE


def qualities(examples):
    return [example.ious.mean() for example in examples]


# Proposals.


def proposal_examples(tmp_path, dataset, proposals):
    """The best images, the worst, and how many there are."""
    write_store(tmp_path / "store", proposals)
    coco = CocoInstances.load(dataset[0])
    scenes = read_proposals(tmp_path / "store", coco=coco)
    gallery = proposal_gallery(scenes, coco, dataset[1])
    headings = "The best images", "The worst images"
    return *(gallery.examples.get(h, []) for h in headings), gallery.totals["images"]


def test_found_is_best_and_missed_is_worst(tmp_path, dataset):
    best, worst, num_images = proposal_examples(tmp_path, dataset, STORE)
    assert [e.file_name for e in best] == ["found.png", "half.png"]
    assert [e.file_name for e in worst] == ["missed.png"]
    assert qualities(best + worst) == [1, 0.5, 0]
    assert num_images == NUM_WITH_OBJECTS


def test_only_the_proposals_with_the_highest_scores_count(tmp_path, dataset):
    late = [ELSEWHERE] * 100 + [SQUARE]
    in_time = late[1:]
    proposals = [proposals_of(1, "found.png", in_time), proposals_of(2, "missed.png", late)]
    best, worst, num_images = proposal_examples(tmp_path, dataset, proposals)
    assert qualities(best + worst) == [1, 0]
    assert num_images == 2, "an image that is not in the store was not looked at"


def test_image_without_a_proposal_is_missed(tmp_path, dataset):
    proposals = [proposals_of(1, "found.png", [SQUARE]), proposals_of(2, "missed.png", [])]
    _, [worst], _ = proposal_examples(tmp_path, dataset, proposals)
    assert worst.file_name == "missed.png" and qualities([worst]) == [0]
    assert len(worst.pictures) == 3


def test_crowd_is_no_object_and_the_mean_is_over_objects(tmp_path):
    objects = [object_of(1, SQUARE), object_of(1, ELSEWHERE), object_of(1, EVERYTHING, iscrowd=1)]
    dataset = write_dataset(tmp_path / "data", ["two.png"], objects)
    [example], _, _ = proposal_examples(tmp_path, dataset, [proposals_of(1, "two.png", [SQUARE])])
    [detected] = detection_examples(
        tmp_path, dataset, [detections_of(1, "two.png", [(SQUARE, 1, 0.9)])]
    )
    assert sorted(example.ious) == sorted(detected.ious) == [0, 1]


@given(st.lists(st.floats(0, 1), max_size=40))
def test_choice_is_ordered_and_nothing_is_chosen_twice(values):
    ranked = sorted(enumerate(values), key=lambda item: -item[1])
    best, worst = choose_examples(ranked)
    assert len(best) + len(worst) == min(len(ranked), 2 * NUM_EXAMPLES)
    assert 0 <= len(best) - len(worst) <= 1
    assert best == ranked[: len(best)]
    assert worst[::-1] == ranked[len(ranked) - len(worst) :]


# Detections.


def detection_examples(tmp_path, dataset, detections):
    results = (result for found in detections for result in results_of(found))
    write_results(tmp_path / "detections.json", results)
    coco = CocoInstances.load(dataset[0])
    gallery = detection_gallery(tmp_path / "detections.json", coco=coco, images=dataset[1])
    return gallery.examples[""]


def test_images_with_objects_are_shown_from_the_best_to_the_worst(tmp_path, dataset):
    examples = detection_examples(tmp_path, dataset, FOUND)
    assert [e.file_name for e in examples] == ["found.png", "half.png", "missed.png"]
    assert qualities(examples) == [1, 0.5, 0], "0.2 is too low a score to count"
    assert [e.num_detections for e in examples] == [1, 2, 1]


def test_images_stand_for_equal_parts(tmp_path, monkeypatch):
    """Image i is found with an IoU of i / 12, so the order is known."""
    monkeypatch.setattr(pictures, "draw_detections", lambda scene, *_: scene)
    names = [f"{i:02d}.png" for i in range(1, 13)]
    objects = [object_of(i, (0, 0, 24, 24)) for i in range(1, 13)]
    dataset = write_dataset(tmp_path / "data", names, objects)
    found = [
        detections_of(i, name, [((0, 0, 24, 2 * i), 1, 0.5)])
        for i, name in enumerate(names, start=1)
    ]
    examples = detection_examples(tmp_path, dataset, found)
    assert [scene.found.image_id for scene in examples] == [11, 9, 7, 5, 3, 1]


def test_image_in_which_nothing_was_found_is_the_worst(tmp_path, dataset):
    examples = detection_examples(tmp_path, dataset, FOUND[:1])
    assert qualities(examples) == [1, 0, 0]
    assert all(len(e.pictures) == 2 and not e.error for e in examples)


def test_detections_of_other_images_are_refused(tmp_path, dataset):
    with pytest.raises(ValueError, match="image_id 77"):
        detection_examples(tmp_path, dataset, [detections_of(77, "x.png", [(SQUARE, 1, 0.9)])])


def test_file_without_masks_is_shown(tmp_path, dataset):
    found = [detections_of(1, "found.png", [(SQUARE, 1, MIN_SCORE)], masks=False)]
    examples = detection_examples(tmp_path, dataset, found)
    assert "segmentation" not in json.loads((tmp_path / "detections.json").read_text())[0]
    assert qualities(examples) == [1, 0, 0]


@pytest.mark.parametrize("masks", [True, False])
def test_only_detections_of_the_right_category_fit(tmp_path, masks):
    objects = [object_of(1, SQUARE), object_of(1, ELSEWHERE, category=3)]
    coco = CocoInstances.load(write_dataset(tmp_path / "one", ["a.png"], objects)[0])
    found = [(SQUARE, 3, 0.9), (UPPER_HALF, 1, 0.8), (ELSEWHERE, 3, 0.7), (ELSEWHERE, 7, 0.6)]
    ious = overlaps(detections_of(1, "a.png", found, masks=masks), coco, [0, 1])
    assert ious == pytest.approx(np.array([[0, 0], [0.5, 0], [0, 1], [0, 0]]))
    nothing = detections_of(1, "a.png", [], masks=masks)
    assert overlaps(nothing, coco, [0, 1]).shape == (0, 2)


@given(st.lists(st.floats(0, 1, width=32)), st.integers(0, 9), st.booleans())
def test_first_keeps_the_highest_scores_of_every_column(scores, count, masks):
    found = [(SQUARE, i, score) for i, score in enumerate(sorted(scores, reverse=True))]
    kept = first(detections_of(1, "a.png", found, masks=masks), count)
    assert kept.labels.tolist() == list(range(min(count, len(scores)))) and len(kept.boxes) == len(
        kept
    )
    assert kept.rles is None if not masks else len(kept.rles) == len(kept)


# What is drawn.


@pytest.fixture
def marks_of(tmp_path, monkeypatch):
    """What is drawn for the detections of an image with a ring and, elsewhere, a bar."""
    objects = [object_of(1, SQUARE), object_of(1, ELSEWHERE, category=3)]
    path, images = write_dataset(tmp_path / "data", ["a.png"], objects)
    coco, drawn = CocoInstances.load(path), []
    monkeypatch.setattr(pictures, "draw_marks", lambda image, marks: drawn.append(marks) or image)

    def draw(found, **options):
        [scene] = scenes_of([detections_of(1, "a.png", found, **options)], coco)
        assert not draw_detections(scene, coco, images).error
        return drawn

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


def test_box_stands_for_a_mask_that_is_not_there(marks_of):
    _, [mark] = marks_of([(UPPER_HALF, 1, 0.9)], masks=False)
    assert coco_mask.toBbox(mark.rle).tolist() == [8, 8, 16, 8]
    assert mark.tint == FULL, "an IoU of 0.5 of the boxes"


def test_unreadable_image_says_why_and_keeps_its_numbers(tmp_path, dataset):
    (dataset[1] / "found.png").write_bytes(b"")
    [example, *_] = detection_examples(tmp_path, dataset, FOUND)
    assert "found.png: the file is empty" in example.error and example.pictures == ()
    assert (qualities([example]), example.num_detections) == ([1], 1)
