"""AP and AR of detections: against pycocotools, and against values worked out by hand."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as mask_utils

from pipeline.evaluation.ground_truth import IOU_TYPES, load_ground_truth
from pipeline.evaluation.precision import METRICS, evaluate_detections, voc_ap
from tests.pipeline.evaluation.scenes import (
    CATEGORIES,
    HEIGHT,
    WIDTH,
    perfect_results,
    pycocotools_evaluation,
    random_scene,
    result,
    separate_objects,
    without,
    write_dataset,
)
from tests.real_data import COCO_MINI_VAL

needs_real_data = pytest.mark.skipif(not COCO_MINI_VAL.exists(), reason="data/coco-mini not there")


@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), per_image=st.sampled_from([3, 40, 150]))
def test_arrays_equal_pycocotools_to_the_bit(tmp_path_factory, seed, per_image):
    path, results = random_scene(tmp_path_factory.mktemp("scene"), seed, per_image=per_image)
    scores = evaluate_detections(load_ground_truth(path), results)
    for iou_type in IOU_TYPES:
        expected = pycocotools_evaluation(path, results, iou_type).eval
        assert np.array_equal(scores.precision[iou_type], expected["precision"])
        assert np.array_equal(scores.recall[iou_type], expected["recall"])


@pytest.mark.parametrize("seed", range(3))
def test_metrics_equal_what_summarize_prints(tmp_path, seed):
    path, results = random_scene(tmp_path, seed, num_images=6)
    for iou_type, values in evaluate_detections(load_ground_truth(path), results).metrics().items():
        evaluation = pycocotools_evaluation(path, results, iou_type)
        evaluation.summarize()
        assert list(values) == list(METRICS)
        assert list(values.values()) == evaluation.stats[:9].tolist()
        assert len(set(values.values())) == 9  # the scene tells the metrics apart


@needs_real_data
def test_real_images_equal_pycocotools():
    """Polygons, crowds and boxes with decimals; a third is of a wrong category, boxes are moved."""
    rng = np.random.default_rng(0)
    ground_truth = load_ground_truth(COCO_MINI_VAL)
    results = perfect_results(ground_truth)
    for found in results:
        found["score"] = round(float(rng.random()), 2)
        found["bbox"] = (np.array(found["bbox"]) * rng.uniform(0.8, 1.2, 4)).round(1).tolist()
        if rng.random() < 1 / 3:
            found["category_id"] = int(rng.choice([*ground_truth.cats]))
    for iou_type, values in evaluate_detections(ground_truth, results).metrics().items():
        evaluation = pycocotools_evaluation(COCO_MINI_VAL, results, iou_type)
        evaluation.summarize()
        assert list(values.values()) == evaluation.stats[:9].tolist()


@pytest.mark.parametrize("seed", [0, 1, pytest.param(None, marks=needs_real_data)])
def test_the_ground_truth_scores_one(tmp_path, seed):
    path = COCO_MINI_VAL if seed is None else random_scene(tmp_path, seed, per_image=0)[0]
    ground_truth = load_ground_truth(path)
    scores = evaluate_detections(ground_truth, perfect_results(ground_truth))
    for values in scores.metrics().values():
        assert [values[name] for name in METRICS[:6]] == pytest.approx([1.0] * 6, abs=1e-12)
        assert values["AR@100"] == 1


@pytest.mark.parametrize("seed", [4, 5])
def test_categories_and_thresholds_average_to_the_metrics(tmp_path, seed):
    path, results = random_scene(tmp_path, seed, num_images=6)
    scores = evaluate_detections(load_ground_truth(path), results)
    assert scores.category_names == list(CATEGORIES.values())
    for iou_type, values in scores.metrics().items():
        by_category = scores.ap_by_category(iou_type)
        assert np.isnan(by_category).tolist() == [False, False, False, True]
        assert np.nanmean(by_category) == pytest.approx(values["AP"], abs=1e-12)
        assert np.nanmean(scores.ap50_by_category(iou_type)) == pytest.approx(values["AP50"])
        by_iou = scores.ap_by_iou(iou_type)
        assert by_iou.mean() == pytest.approx(values["AP"], abs=1e-12)
        assert (by_iou[0], by_iou[5]) == pytest.approx((values["AP50"], values["AP75"]))
        assert np.allclose(scores.precision_by_recall(iou_type).mean(axis=1), by_iou)


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_the_file_changes_nothing(tmp_path, seed):
    """Unless scores of one image and category are equal: made different here."""
    path, results = random_scene(tmp_path, 6, per_image=40)
    results = [r | {"score": (i % 50 + i / 1000) / 60} for i, r in enumerate(results)]
    shuffled = [results[i] for i in np.random.default_rng(seed).permutation(len(results))]
    ground_truth = load_ground_truth(path)
    before, after = (evaluate_detections(ground_truth, r) for r in (results, shuffled))
    assert before.metrics() == after.metrics()
    assert np.array_equal(before.voc_ap50, after.voc_ap50, equal_nan=True)
    assert before.num_detections == after.num_detections


def test_masks_or_boxes_alone(tmp_path):
    """Without masks there is box AP only; without boxes the masks' boxes are taken."""
    path, results = random_scene(tmp_path, 0, per_image=40)
    ground_truth = load_ground_truth(path)
    both, boxes, masks = (
        evaluate_detections(ground_truth, r).metrics()
        for r in (results, without("segmentation", results), without("bbox", results))
    )
    assert boxes == {"box": both["box"]} and masks["mask"] == both["mask"]
    for found in results:
        found["bbox"] = mask_utils.toBbox(found["segmentation"]).tolist()
    assert masks["box"] == evaluate_detections(ground_truth, results).metrics()["box"]


def test_finding_nothing_scores_zero_and_no_objects_score_none(tmp_path):
    path, results = random_scene(tmp_path, 0, per_image=40)
    metrics = evaluate_detections(load_ground_truth(path), []).metrics()
    assert metrics["box"]["AP"] == metrics["mask"]["AP"] == metrics["box"]["AR@100"] == 0
    path = write_dataset(tmp_path / "no_objects.json", [], num_images=4)
    scores = evaluate_detections(load_ground_truth(path), results)
    assert all(set(values.values()) == {None} for values in scores.metrics().values())
    assert len(scores.metrics()) == 2 and scores.mean_voc_ap50() is None


GOOD = result([10, 10, 40, 40], 0.5)
[WITHOUT_MASK] = without("segmentation", [GOOD])
MASK_OF_SIZE = {"size": [HEIGHT, WIDTH]}
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
    "polygon": (GOOD | {"segmentation": [[1, 2, 3, 4, 5, 6]]}, "compressed RLE"),
    "mask size": (GOOD | {"segmentation": {"size": 5, "counts": "I0"}}, "of size 5"),
    "short mask": (GOOD | {"segmentation": MASK_OF_SIZE | {"counts": "I0"}}, "do not fill"),
    "odd mask": (GOOD | {"segmentation": MASK_OF_SIZE | {"counts": "\ud800~"}}, "do not fill"),
}


@pytest.mark.parametrize(("wrong", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_wrong_result_is_named_in_one_line(wrong, message, tmp_path):
    ground_truth = load_ground_truth(write_dataset(tmp_path / "truth.json", []))
    with pytest.raises(ValueError) as error:
        evaluate_detections(ground_truth, [GOOD, wrong])
    line = str(error.value)
    assert line.startswith("results[1]") and message in line
    assert len(line) < 300 and "\n" not in line


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ([WITHOUT_MASK, GOOD], "results[1] (image_id 1): has a segmentation, while results[0]"),
        ([WITHOUT_MASK | {"bbox": None}, WITHOUT_MASK], "results[0] (image_id 1): has neither"),
    ],
)
def test_all_results_have_masks_or_none(results, message, tmp_path):
    ground_truth = load_ground_truth(write_dataset(tmp_path / "truth.json", []))
    with pytest.raises(ValueError) as error:
        evaluate_detections(ground_truth, results)
    assert message in str(error.value)


# PASCAL VOC


def voc_box(box, score=None, *, image_id=1, crowd=0, ignore=0):
    flags = {"iscrowd": crowd, "ignore": ignore}
    return {"image_id": image_id, "bbox": list(box), "score": score} | flags


@pytest.mark.parametrize("flag", ["ignore", "crowd"])
def test_voc_ap_by_hand(flag):
    """Four objects, one difficult. By score: true; false (found already); difficult, not counted;
    true; false (the wrong place); the third object is missed.

    Recall 1/3 at precision 1/1, then 2/3 at 2/3: AP = 1/3 · 1 + 1/3 · 2/3.
    """
    square, far = [0, 0, 10, 10], [50, 50, 10, 10]
    objects = [voc_box(square), voc_box(far, **{flag: 1})]
    objects += [voc_box(box, image_id=2) for box in (square, far)]
    detections = [
        voc_box([30, 30, 10, 10], 0.1, image_id=2),
        voc_box(square, 0.9),
        voc_box(square, 0.3, image_id=2),
        voc_box([0, 0, 10, 9], 0.8),
        voc_box(far, 0.7),
    ]
    assert voc_ap(objects, detections) == pytest.approx(1 / 3 + 2 / 9)


def test_voc_takes_the_best_object_even_if_found_already():
    """COCO would give the second detection to the second object, which it overlaps by .6."""
    objects = [voc_box([0, 0, 10, 10]), voc_box([2.5, 0, 10, 10])]
    detections = [voc_box([0, 0, 10, 10], 0.9), voc_box([0, 0, 10, 10], 0.8)]
    assert voc_ap(objects, detections) == 0.5
    assert voc_ap(objects, []) == 0
    assert math.isnan(voc_ap([voc_box([0, 0, 10, 10], ignore=1)], detections))


def slow_voc_ap(objects, detections):
    """VOCdevkit's VOCevaldet.m, written again, with the area added up a step at a time."""
    taken, verdicts = set(), []
    for found in sorted(detections, key=lambda item: -item["score"]):
        best, best_iou = None, -1.0
        for i, item in enumerate(objects):
            if item["image_id"] == found["image_id"] and slow_iou(item, found) > best_iou:
                best, best_iou = i, slow_iou(item, found)
        if best_iou < 0.5:
            verdicts.append(0)
        elif not objects[best]["ignore"]:
            verdicts.append(int(best not in taken))
            taken.add(best)
    num_objects = sum(not item["ignore"] for item in objects)
    if not num_objects:
        return math.nan
    sums = [sum(verdicts[:n]) for n in range(1, len(verdicts) + 1)]
    points = [(true / num_objects, true / n) for n, true in enumerate(sums, start=1)]
    total, last = 0.0, 0.0
    for recall in sorted({recall for recall, _ in points}):
        total += (recall - last) * max(p for r, p in points if r >= recall)
        last = recall
    return total


def slow_iou(one, other):
    (x, y, w, h), (u, v, s, t) = one["bbox"], other["bbox"]
    width, height = min(x + w, u + s) - max(x, u), min(y + h, v + t) - max(y, v)
    shared = max(width, 0) * max(height, 0)
    return shared / (w * h + s * t - shared)


voc_boxes = st.tuples(*[st.integers(0, 4)] * 2, *[st.integers(3, 6)] * 2, st.integers(1, 2))


@given(st.lists(st.tuples(voc_boxes, st.booleans()), max_size=6), st.lists(voc_boxes, max_size=12))
def test_voc_ap_equals_the_development_kits_loops(placed, found):
    """Objects and detections in two images, close together, any of the objects difficult."""
    objects = [
        voc_box(box, image_id=image_id, ignore=int(ignore)) for (*box, image_id), ignore in placed
    ]
    detections = [
        voc_box(box, 1 - rank / 100, image_id=image_id)
        for rank, (*box, image_id) in enumerate(found)
    ]
    expected = slow_voc_ap(objects, detections)
    assert voc_ap(objects, detections) == pytest.approx(expected, nan_ok=True)


def test_the_json_says_what_is_difficult_and_only_voc_asks(tmp_path):
    """Every second object is found; the others, marked difficult, are no longer missed."""
    path = write_dataset(tmp_path / "truth.json", separate_objects())
    results = perfect_results(load_ground_truth(path))
    before, perfect = (
        evaluate_detections(load_ground_truth(path), r) for r in (results[::2], results)
    )
    write_dataset(path, [a | {"ignore": 1 - a["id"] % 2} for a in separate_objects()])
    after = evaluate_detections(load_ground_truth(path), results[::2])
    aps = [scores.mean_voc_ap50() for scores in (before, perfect, after)]
    assert aps == pytest.approx([0.5, 1, 1])
    assert after.metrics() == before.metrics() != perfect.metrics()
