"""Annotation files as evaluation reads them."""

import logging

import numpy as np
import pytest

from pipeline.evaluation.ground_truth import load_ground_truth
from pipeline.evaluation.precision import METRICS, evaluate_detections
from pipeline.evaluation.recall import evaluate_proposals
from tests.pipeline.evaluation.scenes import (
    HEIGHT,
    WIDTH,
    annotation,
    compressed,
    make_truth,
    needs_real_data,
    perfect_results,
    random_scene,
    rectangle,
    uncompressed,
    write_dataset,
)
from tests.real_data import COCO_MINI_VAL

BOX = (10, 20, 30, 40)


@pytest.mark.parametrize("seed", [0, 1, pytest.param(None, marks=needs_real_data)])
def test_the_ground_truth_scores_one(tmp_path, seed):
    path = COCO_MINI_VAL if seed is None else random_scene(tmp_path, seed, per_image=0)[0]
    ground_truth = load_ground_truth(path)
    results = perfect_results(ground_truth)
    for values in evaluate_detections(ground_truth, results).metrics().values():
        assert [values[name] for name in METRICS[:6]] == pytest.approx([1.0] * 6, abs=1e-12)
        assert values["AR@100"] == 1
    for values in evaluate_proposals(ground_truth, results).metrics().values():
        assert [v for name, v in values.items() if name.startswith("AR@1000")] == [1.0] * 4


def test_missing_keys_are_filled_in(tmp_path):
    objects = [annotation(1, BOX)]
    for key in ("area", "iscrowd", "bbox"):
        del objects[0][key]
    [filled] = make_truth(tmp_path, objects).dataset["annotations"]
    assert (filled["area"], filled["bbox"], filled["iscrowd"]) == (1200, list(BOX), 0)


def test_every_form_of_segmentation_is_read(tmp_path):
    forms = [rectangle(*BOX), uncompressed(BOX), compressed(rectangle(*BOX))]
    objects = [annotation(i, BOX, segmentation=form) for i, form in enumerate(forms, start=1)]
    ground_truth = make_truth(tmp_path, objects)
    masks = [ground_truth.annToMask(a) for a in ground_truth.dataset["annotations"]]
    expected = np.zeros((HEIGHT, WIDTH), np.uint8)
    expected[20:60, 10:40] = 1
    assert len(masks) == 3 and all(np.array_equal(mask, expected) for mask in masks)


def test_unusable_annotations_are_left_out_and_counted(tmp_path, caplog):
    path = write_dataset(tmp_path, [annotation(1, BOX), annotation(2, BOX, category_id=2)])
    with caplog.at_level(logging.WARNING):
        ground_truth = load_ground_truth(path)
    assert [a["bbox"] for a in ground_truth.dataset["annotations"]] == [list(BOX)]
    [warning] = caplog.messages
    assert warning.startswith(str(path)) and "left out 1" in warning
    metrics = evaluate_proposals(ground_truth, perfect_results(ground_truth)).metrics()
    assert metrics["mask"]["AR@10"] == metrics["box"]["AR@10"] == 1


@pytest.mark.parametrize("content", [None, b"{", b"\xff\xd8", b"[]"])
def test_a_bad_annotation_file_is_named_in_one_line(tmp_path, content):
    path = tmp_path / "truth.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        load_ground_truth(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)
