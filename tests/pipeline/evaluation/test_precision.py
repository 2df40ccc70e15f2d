"""AP and AR of detections: against pycocotools, and against values worked out by hand."""

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO

from pipeline.evaluation.ground_truth import IOU_TYPES, load_ground_truth
from pipeline.evaluation.precision import METRICS, evaluate_detections, voc_ap
from pipeline.inference.coco_json import load_results
from tests.pipeline.evaluation import scenes
from tests.pipeline.evaluation.scenes import make_truth, random_scene, result, without
from tests.real_data import COCO_MINI_VAL
from tools.benchmarks.scoring import run_pycocotools


def assert_equals_pycocotools(path, results):
    """Arrays and metrics, to the last bit; returns the metrics."""
    scores = evaluate_detections(load_ground_truth(path), results)
    for iou_type in IOU_TYPES:
        expected = run_pycocotools(COCO(path), results, iou_type)
        for name, array in scores.evaluations[iou_type].items():
            assert np.array_equal(array, expected.eval[name])
        stats = [None if value < 0 else value for value in expected.stats[:9].tolist()]
        assert scores.metrics()[iou_type] == dict(zip(METRICS, stats, strict=True))
    return scores.metrics()


@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), per_image=st.sampled_from([3, 40, 150]))
def test_random_scenes_equal_pycocotools(tmp_path_factory, seed, per_image):
    folder = tmp_path_factory.mktemp("scene")
    assert_equals_pycocotools(*random_scene(folder, seed, per_image=per_image))


def test_the_metrics_are_told_apart_and_finding_nothing_scores_zero(tmp_path):
    path, results = random_scene(tmp_path, 0, num_images=6)
    for values in assert_equals_pycocotools(path, results).values():
        assert len(set(values.values())) == len(METRICS)
    nothing = evaluate_detections(load_ground_truth(path), []).metrics()
    assert nothing == {iou_type: dict.fromkeys(METRICS, 0) for iou_type in IOU_TYPES}


@scenes.needs_real_data
def test_real_images_equal_pycocotools():
    """Polygons, crowds and boxes with decimals; a third is of a wrong category, boxes are moved."""
    rng = np.random.default_rng(0)
    ground_truth = load_ground_truth(COCO_MINI_VAL)
    results = scenes.perfect_results(ground_truth)
    for found in results:
        found["score"] = round(float(rng.random()), 2)
        found["bbox"] = (np.array(found["bbox"]) * rng.uniform(0.8, 1.2, 4)).round(1).tolist()
        if rng.random() < 1 / 3:
            found["category_id"] = int(rng.choice([*ground_truth.cats]))
    assert_equals_pycocotools(COCO_MINI_VAL, results)


def test_the_order_of_the_file_changes_nothing(tmp_path):
    """Unless scores of one image and category are equal: made different here."""
    path, results = random_scene(tmp_path, 6, per_image=40)
    results = [r | {"score": (i % 50 + i / 1000) / 60} for i, r in enumerate(results)]
    shuffled = [results[i] for i in np.random.default_rng(0).permutation(len(results))]
    ground_truth = load_ground_truth(path)
    before, after = (evaluate_detections(ground_truth, r) for r in (results, shuffled))
    assert before.metrics() == after.metrics() and before.categories == after.categories
    assert before.voc_ap50.tolist() == after.voc_ap50.tolist()


def test_masks_or_boxes_alone(tmp_path):
    """Without masks there is box AP only; without boxes the masks' boxes are taken."""
    path, results = random_scene(tmp_path, 0, per_image=40)
    ground_truth = load_ground_truth(path)
    of_masks = [r | {"bbox": mask_utils.toBbox(r["segmentation"]).tolist()} for r in results]
    both, both_of_masks, boxes, masks = (
        evaluate_detections(ground_truth, r).metrics()
        for r in (results, of_masks, without("segmentation", results), without("bbox", results))
    )
    assert boxes == {"box": both["box"]}
    assert masks == both_of_masks and masks["mask"] == both["mask"]


GOOD = result([10, 10, 40, 40], 0.5)
[WITHOUT_MASK] = without("segmentation", [GOOD])
MASK_OF_SIZE = {"size": [scenes.HEIGHT, scenes.WIDTH]}
MISTAKES = {
    "no image": (*without("image_id", [GOOD]), "has no image_id"),
    "no result": ("a detection", "has no image_id"),
    "other image": (GOOD | {"image_id": 4711}, "not in the annotations"),
    "image name": (GOOD | {"image_id": "1.jpg"}, "not in the annotations"),
    "image list": (GOOD | {"image_id": [1]}, "not in the annotations"),
    "no category": (*without("category_id", [GOOD]), "has no category_id"),
    "other category": (GOOD | {"category_id": 2}, "category_id 2 is not among"),
    "category name": (GOOD | {"category_id": "car"}, "'car'"),
    "category list": (GOOD | {"category_id": [1]}, "[1]"),
    "no score": (*without("score", [GOOD]), "score must be"),
    "nan score": (GOOD | {"score": math.nan}, "not nan"),
    "long score": (GOOD | {"score": 10**400}, "score must be"),
    "short box": (GOOD | {"bbox": [1, 2, 3]}, "[1, 2, 3]"),
    "negative box": (GOOD | {"bbox": [1, 2, -3, 4]}, "not negative"),
    "infinite box": (GOOD | {"bbox": [1, 2, math.inf, 4]}, "four finite numbers"),
    "lost mask": (WITHOUT_MASK, "has no segmentation, while results[0] has"),
    "polygon": (GOOD | {"segmentation": [[1, 2, 3, 4, 5, 6]]}, "must be an RLE"),
    "runs": (GOOD | {"segmentation": MASK_OF_SIZE | {"counts": [1, 2]}}, "runs fill the image"),
    "mask size": (GOOD | {"segmentation": {"size": 5, "counts": "I0"}}, "of size 5"),
    "short mask": (GOOD | {"segmentation": MASK_OF_SIZE | {"counts": "I0"}}, "do not fill"),
    "odd mask": (GOOD | {"segmentation": MASK_OF_SIZE | {"counts": "\ud800~"}}, "do not fill"),
    "new mask": (GOOD, "has a segmentation, while results[0] has none"),
    "neither": (WITHOUT_MASK | {"bbox": None}, "has neither a bbox nor a segmentation"),
}


def test_masks_may_be_run_lengths(tmp_path):
    """As pycocotools takes them, too."""
    path, results = random_scene(tmp_path, 0, per_image=40)
    file = tmp_path / "results.json"
    file.write_text(json.dumps([r | {"segmentation": run_lengths_of(r)} for r in results]))
    strings, lengths = (
        evaluate_detections(load_ground_truth(path), r) for r in (results, load_results(file))
    )
    assert strings.metrics() == lengths.metrics()


def run_lengths_of(found: dict) -> dict:
    mask = mask_utils.decode(found["segmentation"])
    pixels = mask.flatten(order="F")
    edges = np.flatnonzero(np.diff(pixels, prepend=0))
    return {"size": list(mask.shape), "counts": np.diff([0, *edges, pixels.size]).tolist()}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_result_is_named_in_one_line(mistake, tmp_path):
    wrong, message = MISTAKES[mistake]
    first = WITHOUT_MASK if mistake in ("new mask", "neither") else GOOD
    with pytest.raises(ValueError) as error:
        evaluate_detections(make_truth(tmp_path, []), [first, wrong])
    line = str(error.value)
    assert line.startswith("results[1]") and message in line
    assert len(line) < 300 and "\n" not in line


# PASCAL VOC


def slow_voc_ap(objects, detections):
    """VOCdevkit's VOCevaldet.m, written again, with the area added up a step at a time."""
    num_objects = sum(not o["iscrowd"] | o["ignore"] for o in objects)
    taken, points, num_true, num_false = set(), [(0, 0)], 0, 0
    for found in sorted(detections, key=lambda item: -item["score"]):
        near = [i for i, o in enumerate(objects) if o["image_id"] == found["image_id"]]
        ious = [mask_utils.iou([objects[i]["bbox"]], [found["bbox"]], [0]).item() for i in near]
        best = near[int(np.argmax(ious))] if max(ious, default=0) >= 0.5 else None
        if best is not None and objects[best]["iscrowd"] | objects[best]["ignore"]:
            continue
        is_true = best is not None and best not in taken
        num_true, num_false = num_true + is_true, num_false + (not is_true)
        taken.add(best)
        points.append((num_true / max(num_objects, 1), num_true / (num_true + num_false)))
    recalls = sorted({recall for recall, _ in points})
    steps = [
        (recall - last) * max(p for r, p in points if r >= recall)
        for last, recall in itertools.pairwise(recalls)
    ]
    return sum(steps) if num_objects else math.nan


voc_boxes = st.tuples(*[st.integers(0, 4)] * 2, *[st.integers(3, 6)] * 2, st.integers(1, 2))
difficulties = st.sampled_from([(0, 0), (0, 0), (1, 0), (0, 1)])


@given(st.lists(st.tuples(voc_boxes, difficulties), max_size=6), st.lists(voc_boxes, max_size=12))
def test_voc_ap_equals_the_development_kits_loops(placed, found):
    """Objects and detections in two images, close together, any of the objects difficult."""
    objects = [
        {"image_id": image_id, "bbox": box, "iscrowd": iscrowd, "ignore": ignore}
        for (*box, image_id), (iscrowd, ignore) in placed
    ]
    detections = [
        {"image_id": image_id, "bbox": box, "score": 1 - rank / 100}
        for rank, (*box, image_id) in enumerate(found)
    ]
    expected = slow_voc_ap(objects, detections)
    assert voc_ap(objects, detections) == pytest.approx(expected, nan_ok=True)


def test_voc_ap_by_hand():
    """By score: true, false (found already), true; the third object is missed.

    Recall 1/3 at precision 1/1, then 2/3 at 2/3: AP = 1/3 · 1 + 1/3 · 2/3.
    """
    objects = [
        {"image_id": 1, "bbox": [x, 0, 10, 10], "iscrowd": 0, "ignore": 0} for x in (0, 50, 100)
    ]
    found = {0.9: [0, 0, 10, 10], 0.8: [0, 0, 10, 9], 0.7: [50, 0, 10, 10]}
    detections = [{"image_id": 1, "bbox": box, "score": score} for score, box in found.items()]
    assert voc_ap(objects, detections) == pytest.approx(1 / 3 + 2 / 9)


def test_the_json_says_what_is_difficult_and_only_voc_asks(tmp_path):
    """Every second object is found; the others, marked difficult, are no longer missed."""
    plain = make_truth(tmp_path, scenes.separate_objects())
    marked = [a | {"ignore": 1 - a["id"] % 2} for a in scenes.separate_objects()]
    results = scenes.perfect_results(plain)[::2]
    before, after = (
        evaluate_detections(truth, results) for truth in (plain, make_truth(tmp_path, marked))
    )
    assert [scores.voc_ap50.mean() for scores in (before, after)] == pytest.approx([0.5, 1])
    assert after.metrics() == before.metrics()
