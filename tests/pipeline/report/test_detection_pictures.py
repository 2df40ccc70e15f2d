"""Detections in the report: which images are shown, and how they are drawn."""

import base64
import json
from dataclasses import replace

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from datasets.coco import CocoInstances
from pipeline.inference.coco_json import results_of, write_results
from pipeline.report import detection_pictures as report_detection_pictures
from pipeline.report import pictures as report_pictures
from pipeline.report.detection_pictures import (
    MIN_SCORE,
    above,
    best_ious,
    detection_mark,
    draw_example,
    read_detection_examples,
    right_overlaps,
)
from pipeline.report.pictures import FAINT, FULL
from tests.pipeline.report.small_run import (
    ELSEWHERE,
    EVERYTHING,
    FOUND,
    NUM_WITH_OBJECTS,
    SIDE,
    SQUARE,
    detections_of,
    make_dataset,
    object_of,
    write_dataset,
)

UPPER_HALF = (8, 8, 24, 16)  # of SQUARE


@pytest.fixture
def dataset(tmp_path):
    return make_dataset(tmp_path / "data")


def examples_of(tmp_path, dataset, detections):
    results = (result for found in detections for result in results_of(found))
    write_results(tmp_path / "detections.json", results)
    coco = CocoInstances.load(dataset[0])
    return read_detection_examples(tmp_path / "detections.json", coco=coco, images=dataset[1])


def coco_of(tmp_path, objects):
    return CocoInstances.load(write_dataset(tmp_path / "one", ["a.png"], objects)[0])


# Which detections fit which objects.


@pytest.mark.parametrize("masks", [True, False])
def test_only_detections_of_the_right_category_fit(tmp_path, masks):
    coco = coco_of(tmp_path, [object_of(1, SQUARE), object_of(1, ELSEWHERE, category=3)])
    found = [(SQUARE, 3, 0.9), (UPPER_HALF, 1, 0.8), (ELSEWHERE, 3, 0.7), (ELSEWHERE, 7, 0.6)]
    overlaps = right_overlaps(detections_of(1, "a.png", found, masks=masks), coco, [0, 1])
    assert overlaps == pytest.approx(np.array([[0, 0], [0.5, 0], [0, 1], [0, 0]]))
    assert best_ious(overlaps).tolist() == [0.5, 1]


def test_nothing_detected_fits_nothing(tmp_path):
    coco = coco_of(tmp_path, [object_of(1, SQUARE)])
    assert best_ious(right_overlaps(detections_of(1, "a.png", []), coco, [0])).tolist() == [0]


@given(st.lists(st.floats(0, 1, width=32)), st.floats(0, 1, width=32), st.booleans())
def test_above_keeps_what_has_the_score(scores, limit, masks):
    found = [(SQUARE, n, score) for n, score in enumerate(sorted(scores, reverse=True))]
    kept = above(detections_of(1, "a.png", found, masks=masks), limit)
    assert len(kept) == sum(score >= limit for score in scores)
    assert kept.labels.tolist() == list(range(len(kept)))
    assert kept.rles is None if not masks else len(kept.rles) == len(kept)


# Which images are shown.


def test_images_with_objects_are_shown_from_the_best_to_the_worst(tmp_path, dataset):
    examples = examples_of(tmp_path, dataset, FOUND)
    assert [e.file_name for e in examples.shown] == ["found.png", "half.png", "missed.png"]
    assert [e.quality for e in examples.shown] == [1, 0.5, 0], "0.2 is too low a score to count"
    assert [e.num_found for e in examples.shown] == [1, 1, 0]
    assert [e.num_detections for e in examples.shown] == [1, 2, 1]
    assert examples.num_images == NUM_WITH_OBJECTS
    assert (examples.num_detections, examples.num_confident) == (6, 4)


def test_images_stand_for_equal_parts(tmp_path, monkeypatch):
    """Image n is found with an IoU of n / 12, so the order is known."""
    monkeypatch.setattr(report_detection_pictures, "draw_example", lambda _, found, *__: found)
    names = [f"{n:02d}.png" for n in range(1, 13)]
    boxes = [(0, 0, 24, 2 * n) for n in range(1, 13)]
    objects = [object_of(n, (0, 0, 24, 24)) for n in range(1, 13)]
    dataset = write_dataset(tmp_path / "data", names, objects)
    found = [
        detections_of(n, name, [(box, 1, 0.5)])
        for n, (name, box) in enumerate(zip(names, boxes, strict=True), start=1)
    ]
    examples = examples_of(tmp_path, dataset, found)
    assert [d.image_id for d in examples.shown] == [11, 9, 7, 5, 3, 1]
    assert examples.num_images == 12


def test_crowd_is_no_object_and_the_mean_is_over_objects(tmp_path):
    objects = [object_of(1, SQUARE), object_of(1, ELSEWHERE), object_of(1, EVERYTHING, iscrowd=1)]
    dataset = write_dataset(tmp_path / "data", ["a.png"], objects)
    [example] = examples_of(
        tmp_path, dataset, [detections_of(1, "a.png", [(SQUARE, 1, 0.9)])]
    ).shown
    assert sorted(example.ious) == [0, 1] and example.quality == 0.5


def test_image_in_which_nothing_was_found_is_the_worst(tmp_path, dataset):
    examples = examples_of(tmp_path, dataset, FOUND[:1])
    assert [e.quality for e in examples.shown] == [1, 0, 0]
    assert all(len(e.pictures) == 2 and not e.error for e in examples.shown)


def test_detections_of_other_images_are_refused(tmp_path, dataset):
    with pytest.raises(ValueError, match="image_id 77"):
        examples_of(tmp_path, dataset, [detections_of(77, "x.png", [(SQUARE, 1, 0.9)])])


# Drawing.


@pytest.fixture
def marks_of(tmp_path, monkeypatch):
    """What is drawn for the detections of an image with a ring and, elsewhere, a bar."""
    objects = [object_of(1, SQUARE), object_of(1, ELSEWHERE, category=3)]
    path, images = write_dataset(tmp_path / "data", ["a.png"], objects)
    coco, drawn = CocoInstances.load(path), []
    original = report_pictures.draw_marks

    def note(image, marks):
        drawn.append(marks)
        return original(image, marks)

    monkeypatch.setattr(report_detection_pictures, "draw_marks", note)

    def draw(found, **options):
        example = draw_example(images, detections_of(1, "a.png", found, **options), coco, [0, 1])
        assert len(example.pictures) == 2 and not example.error
        return drawn

    return draw


def test_names_scores_colors_and_tints(marks_of):
    truth, marks = marks_of([(SQUARE, 1, 0.987), (UPPER_HALF, 3, 0.75), (SQUARE, 8, 0.5)])
    assert [(mark.label, mark.tint) for mark in truth] == [("ring", 0), ("bar", 0)]
    assert [(mark.label, mark.tint) for mark in marks[::-1]] == [
        ("ring 0.99", FULL),
        ("bar 0.75", FAINT),
        ("8 0.50", FAINT),
    ], "the best is drawn last; a category that the annotations do not have goes by its number"
    assert truth[0].rgb == marks[2].rgb and truth[1].rgb == marks[1].rgb != truth[0].rgb


def test_box_and_mask_are_where_they_are_in_the_image():
    """Mask and box differ: on a picture of half the size, each is where it belongs."""
    found = detections_of(1, "a.png", [(SQUARE, 1, 0.9)])
    found.boxes[0] = (8, 8, 56, 40)
    image = np.full((SIDE // 2, SIDE // 2, 3), 200, np.uint8)
    mark = replace(detection_mark(found, 0, {1: "ring"}, FULL), label="")
    picture = report_pictures.draw_marks(image, [mark])
    changed = (picture != 200).any(axis=-1)
    assert changed[19, 10:28].all() and changed[10:20, 27].all(), "the box's lower right sides"
    assert not changed[14:18, 16:26].any(), "inside of the box, beside the mask"
    assert not changed[:, 28:].any() and not changed[20:].any()
    assert (picture[6:10, 6:10, 1] < 200).all(), "the mask"


def test_box_stands_for_a_mask_that_is_not_there(marks_of):
    _, [mark] = marks_of([(UPPER_HALF, 1, 0.9)], masks=False)
    assert coco_mask.toBbox(mark.rle).tolist() == [8, 8, 16, 8]
    assert mark.tint == FULL, "an IoU of 0.5 of the boxes"


def test_small_images_are_enlarged_twice_and_no_more(tmp_path, dataset):
    [example, *_] = examples_of(tmp_path, dataset, FOUND).shown
    data = np.frombuffer(base64.b64decode(example.pictures[1].split(",")[1]), "u1")
    assert cv2.imdecode(data, cv2.IMREAD_COLOR).shape == (2 * SIDE, 2 * SIDE, 3)


def test_unreadable_image_says_why_and_keeps_its_numbers(tmp_path, dataset):
    (dataset[1] / "found.png").write_bytes(b"")
    [example, *_] = examples_of(tmp_path, dataset, FOUND).shown
    assert "found.png: the file is empty" in example.error and example.pictures == ()
    assert (example.quality, example.num_detections) == (1, 1)


def test_file_without_masks_is_shown(tmp_path, dataset):
    found = [detections_of(1, "found.png", [(SQUARE, 1, MIN_SCORE)], masks=False)]
    examples = examples_of(tmp_path, dataset, found)
    assert "segmentation" not in json.loads((tmp_path / "detections.json").read_text())[0]
    assert [e.quality for e in examples.shown] == [1, 0, 0]
