"""AP and AR of detections: against pycocotools, and against what can be worked out by hand."""

import copy
import csv
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from pipeline.evaluation.detection_scores import score_detections
from pipeline.evaluation.precision import METRICS, evaluate_detections
from pipeline.evaluation.recall import load_ground_truth
from pipeline.evaluation.voc import all_point_ap
from tests.real_data import COCO_MINI_VAL

HEIGHT, WIDTH = 200, 260
CATEGORIES = {1: "person", 3: "car", 5: 'a "plane", large', 90: "nowhere"}
IOU_TYPES = {"box": "bbox", "mask": "segm"}


def triangle(x, y, w, h):
    return [[x, y, x + w, y, x, y + h]]


def rle(box):
    [mask] = mask_utils.frPyObjects(triangle(*box), HEIGHT, WIDTH)
    return mask | {"counts": mask["counts"].decode()}


def random_box(rng):
    """From a few pixels to most of the image, so that every area range is met; whole pixels."""
    w, h = np.exp(rng.uniform(np.log(8), np.log([WIDTH - 20, HEIGHT - 20])))
    x, y = rng.uniform(0, WIDTH - w), rng.uniform(0, HEIGHT - h)
    return [int(v) for v in (x, y, w, h)]


def write_scene(path, rng, *, num_images=6):
    """Triangles of three of the four categories, some of them crowds; the last image has none."""
    annotations = []
    for image_id in range(1, num_images):
        for index in range(rng.integers(3, 9)):
            box = random_box(rng) if index else [20 * image_id, 20, 150, 140]  # one large
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": int(rng.choice([1, 3, 5])),
                    "bbox": box,
                    "area": box[2] * box[3] / 2,
                    "iscrowd": int(index > 0 and rng.random() < 0.15),
                    "segmentation": rle(box),
                }
            )
    images = [
        {"id": i, "file_name": f"{i}.jpg", "height": HEIGHT, "width": WIDTH}
        for i in range(1, num_images + 1)
    ]
    categories = [{"id": i, "name": name} for i, name in CATEGORIES.items()]
    truth = {"images": images, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps(truth))
    return truth


def result(box, score, *, image_id=1, category_id=1, masks=True):
    found = {"image_id": image_id, "category_id": category_id, "score": score, "bbox": list(box)}
    return found | ({"segmentation": rle(box)} if masks else {})


def random_results(rng, truth, *, count=260):
    """Shifted copies of the objects, some of the wrong category, and noise; many equal scores."""
    results = []
    for _ in range(count):
        origin = truth["annotations"][rng.integers(len(truth["annotations"]))]
        box = np.array(origin["bbox"]) + rng.integers(-5, 6, 4)
        if rng.random() < 0.3:
            box = np.array(random_box(rng))
        image_id = origin["image_id"] if rng.random() < 0.9 else int(rng.integers(1, 7))
        category_id = origin["category_id"] if rng.random() < 0.8 else int(rng.choice([1, 3, 90]))
        box = np.maximum(box, [0, 0, 3, 3]).tolist()
        score = round(float(rng.random()), 2)
        results.append(result(box, score, image_id=image_id, category_id=category_id))
    return results


@pytest.fixture
def scene(tmp_path, request):
    """(path of the annotations, results) of a random data set."""
    rng = np.random.default_rng(request.param)
    truth = write_scene(tmp_path / "truth.json", rng)
    return tmp_path / "truth.json", random_results(rng, truth)


def pycocotools_evaluation(path, results, kind):
    truth, results = COCO(path), copy.deepcopy(results)
    if kind == "mask":  # without boxes, or loadRes takes their areas for those of the masks
        results = [{k: v for k, v in r.items() if k != "bbox"} for r in results]
    evaluation = COCOeval(truth, truth.loadRes(results), IOU_TYPES[kind])
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation


@pytest.mark.parametrize("scene", range(4), indirect=True)
def test_everything_equals_pycocotools_to_the_bit(scene):
    path, results = scene
    scores = evaluate_detections(load_ground_truth(path), results)
    for kind, values in scores.metrics().items():
        expected = pycocotools_evaluation(path, results, kind)
        assert np.array_equal(scores.precision[kind], expected.eval["precision"])
        assert np.array_equal(scores.recall[kind], expected.eval["recall"])
        assert list(values) == list(METRICS)
        assert list(values.values()) == expected.stats[:9].tolist()
        assert len(set(values.values())) == 9  # the scene tells the metrics apart


@pytest.mark.parametrize("scene", range(4, 6), indirect=True)
def test_categories_and_thresholds_average_to_the_metrics(scene):
    path, results = scene
    scores = evaluate_detections(load_ground_truth(path), results)
    assert scores.category_names == list(CATEGORIES.values())
    for kind, values in scores.metrics().items():
        by_category = scores.ap_by_category(kind)
        assert np.isnan(by_category).tolist() == [False, False, False, True]
        assert np.nanmean(by_category) == pytest.approx(values["AP"], abs=1e-12)
        assert np.nanmean(scores.ap50_by_category(kind)) == pytest.approx(values["AP50"])
        by_iou = scores.ap_by_iou(kind)
        assert by_iou.mean() == pytest.approx(values["AP"], abs=1e-12)
        assert (by_iou[0], by_iou[5]) == pytest.approx((values["AP50"], values["AP75"]))
        assert np.allclose(scores.precision_by_recall(kind).mean(axis=1), by_iou)


@pytest.mark.parametrize("scene", [6], indirect=True)
@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_the_file_changes_nothing(scene, seed):
    """Unless scores of one image and category are equal: made different here."""
    path, results = scene
    results = [r | {"score": (i % 50 + i / 1000) / 60} for i, r in enumerate(results[:150])]
    shuffled = [results[i] for i in np.random.default_rng(seed).permutation(len(results))]
    ground_truth = load_ground_truth(path)
    before, after = (evaluate_detections(ground_truth, r) for r in (results, shuffled))
    assert before.metrics() == after.metrics()
    assert np.array_equal(before.voc_ap50, after.voc_ap50, equal_nan=True)
    assert before.num_detections.tolist() == after.num_detections.tolist()


def perfect_results(ground_truth):
    keys = ("image_id", "category_id", "bbox", "segmentation")
    annotations = [a for a in ground_truth.dataset["annotations"] if not a["iscrowd"]]
    return [{k: a[k] for k in keys} | {"score": 0.5} for a in annotations]


@pytest.mark.parametrize("scene", range(2), indirect=True)
def test_the_ground_truth_scores_one(scene):
    ground_truth = load_ground_truth(scene[0])
    scores = evaluate_detections(ground_truth, perfect_results(ground_truth))
    for values in scores.metrics().values():
        aps = [values[name] for name in METRICS if name.startswith("AP")]
        assert aps == pytest.approx([1.0] * 6, abs=1e-12) and values["AR@100"] == 1
    assert np.nanmin(scores.voc_ap50) == 1


def test_the_ground_truth_of_real_images_scores_one():
    if not COCO_MINI_VAL.exists():
        pytest.skip("coco-mini is not in data/")
    ground_truth = load_ground_truth(COCO_MINI_VAL)
    scores = evaluate_detections(ground_truth, perfect_results(ground_truth))
    for values in scores.metrics().values():
        assert [values[name] for name in ("AP", "APs", "APm", "APl")] == pytest.approx([1.0] * 4)


def test_real_images_equal_pycocotools():
    """Polygons, crowds and boxes with decimals; a third is of a wrong category, boxes are moved."""
    if not COCO_MINI_VAL.exists():
        pytest.skip("coco-mini is not in data/")
    rng = np.random.default_rng(0)
    ground_truth = load_ground_truth(COCO_MINI_VAL)
    results = perfect_results(ground_truth)
    for found in results:
        found["score"] = round(float(rng.random()), 2)
        found["bbox"] = (np.array(found["bbox"]) * rng.uniform(0.8, 1.2, 4)).round(1).tolist()
        if rng.random() < 1 / 3:
            found["category_id"] = int(rng.choice([*ground_truth.cats]))
    for kind, values in evaluate_detections(ground_truth, results).metrics().items():
        expected = pycocotools_evaluation(COCO_MINI_VAL, results, kind)
        assert list(values.values()) == expected.stats[:9].tolist()


@pytest.mark.parametrize("scene", [0], indirect=True)
def test_without_masks_there_is_box_ap_only(scene):
    path, results = scene
    ground_truth = load_ground_truth(path)
    boxes = [{k: v for k, v in r.items() if k != "segmentation"} for r in results]
    scores = evaluate_detections(ground_truth, boxes)
    assert scores.metrics() == {"box": evaluate_detections(ground_truth, results).metrics()["box"]}


@pytest.mark.parametrize("scene", [0], indirect=True)
def test_masks_alone_stand_for_their_boxes(scene):
    path, results = scene
    ground_truth = load_ground_truth(path)
    masks = [{k: v for k, v in r.items() if k != "bbox"} for r in results]
    boxes = [
        m | {"bbox": mask_utils.toBbox(m["segmentation"]).tolist(), "segmentation": None}
        for m in masks
    ]
    expected = evaluate_detections(ground_truth, boxes).metrics()["box"]
    assert evaluate_detections(ground_truth, masks).metrics()["box"] == expected


@pytest.mark.parametrize("scene", [0], indirect=True)
def test_finding_nothing_scores_zero_and_no_objects_score_none(scene, tmp_path):
    metrics = evaluate_detections(load_ground_truth(scene[0]), []).metrics()
    assert metrics["box"]["AP"] == metrics["mask"]["AP"] == metrics["box"]["AR@100"] == 0
    truth = json.loads(scene[0].read_text()) | {"annotations": []}
    path = tmp_path / "no_objects.json"
    path.write_text(json.dumps(truth))
    metrics = score_detections(path, results_file(tmp_path, scene[1]), tmp_path / "scores")
    for kind in IOU_TYPES:
        assert set(metrics[kind].values()) == {None}


def results_file(folder, results):
    path = folder / "detections.json"
    path.write_text(json.dumps(results))
    return path


def voc_box(box, score=None, *, image_id=1, crowd=0, ignore=0):
    flags = {"iscrowd": crowd, "ignore": ignore}
    return {"image_id": image_id, "bbox": box, "score": score} | flags


@pytest.mark.parametrize("flag", ["ignore", "crowd"])
def test_voc_ap_by_hand(flag):
    """Four objects, one difficult. By score: true; false (found already); difficult, not counted;
    true; false (the wrong place); the third object is missed.

    Recall 1/3 at precision 1/1, then 2/3 at 2/3: AP = 1/3 · 1 + 1/3 · 2/3.
    """
    square, far = [0, 0, 10, 10], [50, 50, 10, 10]
    objects = [
        voc_box(square),
        voc_box(far, **{flag: 1}),
        voc_box(square, image_id=2),
        voc_box(far, image_id=2),
    ]
    detections = [
        voc_box([30, 30, 10, 10], 0.1, image_id=2),
        voc_box(square, 0.9),
        voc_box(square, 0.3, image_id=2),
        voc_box([0, 0, 10, 9], 0.8),
        voc_box(far, 0.7),
    ]
    assert all_point_ap(objects, detections) == pytest.approx(1 / 3 + 2 / 9)


def test_voc_takes_the_best_object_even_if_found_already():
    """COCO would give the second detection to the second object, which it overlaps by .6."""
    objects = [voc_box([0, 0, 10, 10]), voc_box([2.5, 0, 10, 10])]
    detections = [voc_box([0, 0, 10, 10], 0.9), voc_box([0, 0, 10, 10], 0.8)]
    assert all_point_ap(objects, detections) == 0.5
    assert all_point_ap(objects, []) == 0
    assert math.isnan(all_point_ap([voc_box([0, 0, 10, 10], ignore=1)], detections))


def slow_voc_ap(true, num_objects):
    """The area under the highest precision at a recall of at least r, a step at a time."""
    points = []
    for n in range(1, len(true) + 1):
        found = sum(true[:n])
        points.append((found / num_objects, found / n))
    total, last = 0.0, 0.0
    for recall in sorted({recall for recall, _ in points}):
        total += (recall - last) * max(p for r, p in points if r >= recall)
        last = recall
    return total


@given(st.lists(st.booleans(), max_size=12), st.integers(0, 3))
def test_voc_area_equals_a_slow_sum(true, missed):
    """Objects in a row of their own places; a false detection lies beside them all."""
    objects = [voc_box([20 * i, 0, 10, 10]) for i in range(sum(true) + missed)]
    places = iter([item["bbox"] for item in objects])
    detections = [
        voc_box(next(places) if is_true else [0, 100, 5, 5], 1 - rank / 100)
        for rank, is_true in enumerate(true)
    ]
    if objects:
        expected = slow_voc_ap(true, len(objects))
        assert all_point_ap(objects, detections) == pytest.approx(expected)


def slow_voc_verdicts(objects, detections):
    """VOCdevkit's VOCevaldet.m, written again: true (1) or false (0) by score, and what counts."""
    taken, verdicts = set(), []
    for found in sorted(detections, key=lambda item: -item["score"]):
        best, best_iou = None, -1.0
        for number, item in enumerate(objects):
            if item["image_id"] == found["image_id"] and slow_iou(item, found) > best_iou:
                best, best_iou = number, slow_iou(item, found)
        if best_iou < 0.5:
            verdicts.append(0)
        elif not objects[best]["ignore"]:
            verdicts.append(int(best not in taken))
            taken.add(best)
    return verdicts, sum(not item["ignore"] for item in objects)


def slow_iou(one, other):
    (x, y, w, h), (u, v, s, t) = one["bbox"], other["bbox"]
    width, height = min(x + w, u + s) - max(x, u), min(y + h, v + t) - max(y, v)
    shared = max(width, 0) * max(height, 0)
    return shared / (w * h + s * t - shared)


voc_places = st.tuples(*[st.integers(0, 4)] * 2, *[st.integers(3, 6)] * 2, st.integers(1, 2))


@given(st.lists(st.tuples(voc_places, st.booleans()), max_size=6), st.lists(voc_places, max_size=8))
def test_voc_ap_equals_the_development_kits_loops(placed, found):
    """Objects and detections in two images, close together, any of the objects difficult."""
    objects = [
        voc_box(list(box), image_id=image_id, ignore=int(ignore))
        for (*box, image_id), ignore in placed
    ]
    detections = [
        voc_box(list(box), 1 - rank / 100, image_id=image_id)
        for rank, (*box, image_id) in enumerate(found)
    ]
    verdicts, num_objects = slow_voc_verdicts(objects, detections)
    ap = all_point_ap(objects, detections)
    if num_objects:
        assert ap == pytest.approx(slow_voc_ap(verdicts, num_objects))
    else:
        assert math.isnan(ap)


@pytest.mark.parametrize("scene", [2], indirect=True)
def test_the_json_says_what_is_difficult_and_only_voc_asks(scene, tmp_path):
    """Unfound objects, marked difficult, are no longer missed; COCO's AP stays as it was."""
    path, _ = scene
    truth = json.loads(path.read_text())
    objects = [a for a in truth["annotations"] if not a["iscrowd"]]
    results = [
        {k: a[k] for k in ("image_id", "category_id", "bbox", "segmentation")} | {"score": 0.5}
        for a in objects[::2]
    ]
    before = evaluate_detections(load_ground_truth(path), results)
    for missed in objects[1::2]:
        missed["ignore"] = 1
    path.write_text(json.dumps(truth))
    after = evaluate_detections(load_ground_truth(path), results)
    assert np.nanmax(before.voc_ap50) < 1 and np.nanmin(after.voc_ap50) == 1
    assert after.metrics() == before.metrics()
    expected = pycocotools_evaluation(path, results, "box").stats[:9].tolist()
    assert list(after.metrics()["box"].values()) == expected


@pytest.mark.parametrize("scene", [1], indirect=True)
def test_the_tool_writes_json_csv_and_text(scene, tmp_path, call_tool, capsys):
    path, results = scene
    results_path, output = results_file(tmp_path, results), tmp_path / "scores"
    arguments = ("--annotations", path, "--results", results_path, "--output", output)
    assert call_tool("score_coco", "detections", *arguments) == 0
    table = capsys.readouterr().out
    scores = evaluate_detections(load_ground_truth(path), results)
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics == scores.metrics()
    assert (output / "scores.txt").read_text() == table
    for kind in IOU_TYPES:
        assert f"{100 * metrics[kind]['AP']:.1f}" in table
    assert all(f"AP{iou}" in table for iou in range(50, 100, 5))

    curves = json.loads((output / "curves.json").read_text())
    assert curves["mask"]["ap_by_iou"] == scores.ap_by_iou("mask").tolist()
    assert len(curves["recall_points"]) == len(curves["box"]["precision_by_recall"]["0.5"]) == 101
    assert curves["voc_ap50"] == pytest.approx(np.nanmean(scores.voc_ap50))

    with (output / "categories.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    as_json = json.loads((output / "categories.json").read_text())
    texts = [{k: "" if v is None else str(v) for k, v in row.items()} for row in as_json]
    assert texts == rows and as_json[-1]["box_AP"] is None
    assert [row["category"] for row in rows] == list(CATEGORIES.values())
    objects = [a for a in json.loads(path.read_text())["annotations"] if not a["iscrowd"]]
    for row in rows:
        category_id = int(row["category_id"])
        same = [[r for r in rs if r["category_id"] == category_id] for rs in (objects, results)]
        assert [int(row["annotations"]), int(row["detections"])] == [len(rs) for rs in same]
    assert rows[-1]["box_AP"] == rows[-1]["mask_AP50"] == ""
    mean = np.mean([float(row["mask_AP"]) for row in rows[:-1]])
    assert mean == pytest.approx(metrics["mask"]["AP"])


GOOD = result([10, 10, 40, 40], 0.5)
WITHOUT_MASK = {k: v for k, v in GOOD.items() if k != "segmentation"}
MISTAKES = {
    "no_image": ({k: v for k, v in GOOD.items() if k != "image_id"}, "has no image_id"),
    "no_result": ("a detection", "has no image_id"),
    "other_image": (GOOD | {"image_id": 4711}, "not in the annotations"),
    "image_name": (GOOD | {"image_id": "1.jpg"}, "not in the annotations"),
    "image_list": (GOOD | {"image_id": [1]}, "not in the annotations"),
    "no_category": ({k: v for k, v in GOOD.items() if k != "category_id"}, "has no category_id"),
    "other_category": (GOOD | {"category_id": 2}, "category_id 2 is not among"),
    "category_name": (GOOD | {"category_id": "car"}, "'car'"),
    "category_list": (GOOD | {"category_id": [1]}, "[1]"),
    "no_score": ({k: v for k, v in GOOD.items() if k != "score"}, "score must be"),
    "nan_score": (GOOD | {"score": math.nan}, "not nan"),
    "long_score": (GOOD | {"score": 10**400}, "score must be"),
    "short_box": (GOOD | {"bbox": [1, 2, 3]}, "[1, 2, 3]"),
    "negative_box": (GOOD | {"bbox": [1, 2, -3, 4]}, "not negative"),
    "infinite_box": (GOOD | {"bbox": [1, 2, math.inf, 4]}, "four finite numbers"),
    "lost_mask": (WITHOUT_MASK, "has no segmentation, while results[0] has"),
    "polygon": (GOOD | {"segmentation": [[1, 2, 3, 4, 5, 6]]}, "compressed RLE"),
    "mask_size": (GOOD | {"segmentation": {"size": 5, "counts": "I0"}}, "of size 5"),
    "short_mask": (
        GOOD | {"segmentation": {"size": [HEIGHT, WIDTH], "counts": "I0"}},
        "do not fill the image",
    ),
    "odd_mask": (
        GOOD | {"segmentation": {"size": [HEIGHT, WIDTH], "counts": "\ud800~"}},
        "do not fill the image",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_wrong_result_is_one_line_with_its_place(name, tmp_path, call_tool, capsys):
    wrong, message = MISTAKES[name]
    write_scene(tmp_path / "truth.json", np.random.default_rng(0))
    line = error_line(tmp_path, results_file(tmp_path, [GOOD, wrong]), call_tool, capsys)
    assert "detections.json: results[1]" in line and message in line and len(line) < 400


def error_line(folder, results, call_tool, capsys):
    arguments = ("--annotations", folder / "truth.json", "--results", results)
    status = call_tool("score_coco", "detections", *arguments, "--output", folder / "out")
    assert status == 2 and not (folder / "out").exists()
    [line] = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    "first, second, message",
    [
        (WITHOUT_MASK, GOOD, "results[1] (image_id 1): has a segmentation, while results[0]"),
        (WITHOUT_MASK | {"bbox": None}, WITHOUT_MASK, "results[0] (image_id 1): has neither"),
    ],
)
def test_masks_are_of_all_or_of_none(first, second, message, tmp_path, call_tool, capsys):
    write_scene(tmp_path / "truth.json", np.random.default_rng(0))
    line = error_line(tmp_path, results_file(tmp_path, [first, second]), call_tool, capsys)
    assert message in line


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"annotations": []}', "must be a list of detections, not dict"),
        ("[{", "is not JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("\xff", "is not JSON"),
        (None, "do not exist"),
    ],
)
def test_a_file_that_holds_no_results(text, message, tmp_path, call_tool, capsys):
    write_scene(tmp_path / "truth.json", np.random.default_rng(0))
    path = tmp_path / "detections.json"
    if text is not None:
        path.write_bytes(text.encode("latin-1"))
    line = error_line(tmp_path, path, call_tool, capsys)
    assert "detections.json" in line and message in line


def test_the_folder_of_the_results_is_told_from_the_file(tmp_path, call_tool, capsys):
    write_scene(tmp_path / "truth.json", np.random.default_rng(0))
    line = error_line(tmp_path, tmp_path, call_tool, capsys)
    assert "is a folder; give the detections.json in it" in line
