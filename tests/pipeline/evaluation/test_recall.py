"""Average recall of proposals: against pycocotools, and against what can be worked out by hand."""

import copy
import json
import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from pipeline.evaluation import recall as coco_eval
from pipeline.evaluation.recall import AREAS, evaluate_proposals, load_ground_truth, rank_by_overlap
from tests.real_data import COCO_MINI_VAL

HEIGHT, WIDTH = 200, 260
CATEGORY_IDS = (1, 3, 90)
IOU_TYPES = {"box": "bbox", "mask": "segm"}


def write_dataset(path, annotations, *, num_images=1, category_ids=CATEGORY_IDS):
    images = [
        {"id": i, "file_name": f"{i}.jpg", "height": HEIGHT, "width": WIDTH}
        for i in range(1, num_images + 1)
    ]
    categories = [{"id": c, "name": str(c)} for c in category_ids]
    dataset = {"images": images, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps(dataset))
    return path


def rectangle(x, y, w, h):
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def triangle(x, y, w, h):
    return [[x, y, x + w, y, x, y + h]]


def annotation(number, box, *, image_id=1, category_id=3, **other):
    x, y, w, h = box
    given = {"area": w * h, "bbox": list(box), "iscrowd": 0, "segmentation": rectangle(*box)}
    return {"id": number, "image_id": image_id, "category_id": category_id} | given | other


def result(box, score, *, image_id=1, outline=rectangle):
    [rle] = mask_utils.frPyObjects(outline(*box), HEIGHT, WIDTH)
    rle["counts"] = rle["counts"].decode()
    box = [float(v) for v in box]
    return dict(image_id=image_id, category_id=1, score=score, bbox=box, segmentation=rle)


def as_results(ground_truth):
    keys = ("image_id", "bbox", "segmentation")
    annotations = ground_truth.dataset["annotations"]
    return [{k: a[k] for k in keys} | {"category_id": 1, "score": 0.5} for a in annotations]


def random_box(rng):
    """From a few pixels to most of the image, so that every area range is met; whole pixels."""
    w, h = np.exp(rng.uniform(np.log(6), np.log([WIDTH - 20, HEIGHT - 20])))
    x, y = rng.uniform(0, WIDTH - w), rng.uniform(0, HEIGHT - h)
    return [int(v) for v in (x, y, w, h)]


def random_objects(rng, num_images):
    """Overlapping triangles of all areas, two equal, crowds as RLE; the last image has none.

    The first is of 32² px, small and medium to COCO, the third of 96² px, medium and large.
    """
    annotations = []
    for image_id in range(1, num_images):
        boxes = [[20, 30, 64, 32], [90, 60, 50, 40], [100, 40, 144, 128]]
        boxes += [random_box(rng) for _ in range(rng.integers(1, 6))]
        for index, box in enumerate(boxes + boxes[:1]):
            crowd = index > 2 and rng.random() < 0.2
            other = {"iscrowd": int(crowd), "category_id": int(rng.choice(CATEGORY_IDS))}
            other["segmentation"] = uncompressed(box) if crowd else triangle(*box)
            other["area"] = box[2] * box[3] / 2
            annotations.append(annotation(len(annotations) + 1, box, image_id=image_id, **other))
    return annotations


def uncompressed(box):
    x, y, w, h = box
    mask = np.zeros((HEIGHT, WIDTH), int)
    mask[y : y + h, x : x + w] = 1
    flat = np.concatenate([[0], mask.ravel(order="F"), [2]])
    starts = np.flatnonzero(np.diff(flat, prepend=0))
    return {"size": [HEIGHT, WIDTH], "counts": np.diff(starts, prepend=1).tolist()}


def random_proposals(rng, annotations, *, num_images, per_image, outline):
    """Shifted copies of the objects, noise, exact duplicates, and scores with many ties."""
    results = []
    for image_id in range(1, num_images + 1):
        objects = [a["bbox"] for a in annotations if a["image_id"] == image_id]
        for _ in range(per_image):
            box = random_box(rng)
            if objects and rng.random() < 0.7:
                box = np.array(objects[rng.integers(len(objects))])
                box = np.maximum(box + rng.integers(-6, 7, 4), [0, 0, 2, 2]).tolist()
            score = round(float(rng.random()), 1)
            results.append(result(box, score, image_id=image_id, outline=outline))
    return results + copy.deepcopy(results[: per_image // 4])


def pycocotools_evaluation(path, results, kind, max_dets):
    truth = COCO(path)
    evaluation = COCOeval(truth, truth.loadRes(copy.deepcopy(results)), IOU_TYPES[kind])
    evaluation.params.useCats = 0
    evaluation.params.maxDets = list(max_dets)
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation


@pytest.fixture
def scene(tmp_path, request):
    """(path, results) of a random data set; 300 proposals an image, so chunk limits are passed."""
    rng = np.random.default_rng(request.param)
    annotations = random_objects(rng, num_images=4)
    path = write_dataset(tmp_path / "truth.json", annotations, num_images=4)
    return path, random_proposals(rng, annotations, num_images=4, per_image=300, outline=triangle)


@pytest.mark.parametrize("scene", range(3), indirect=True)
@pytest.mark.parametrize("kind", ["box", "mask"])
def test_recall_equals_pycocotools(scene, kind):
    path, results = scene
    scores = evaluate_proposals(load_ground_truth(path), results, kinds=(kind,))
    max_dets = (1, 2, 5, 10, 100, 1000)
    expected = pycocotools_evaluation(path, results, kind, max_dets).eval["recall"][:, 0]  # (T,A,M)
    columns = scores.recall[kind][:, [k - 1 for k in max_dets]]  # (T, M, A)
    assert np.allclose(columns.transpose(0, 2, 1), expected, atol=1e-9)
    assert len(np.unique(expected)) > 10  # the scene tells numbers, thresholds and areas apart


@pytest.mark.parametrize("scene", [3], indirect=True)
@pytest.mark.parametrize("kind", ["box", "mask"])
def test_metrics_equal_what_summarize_prints(scene, kind):
    path, results = scene
    evaluation = pycocotools_evaluation(path, results, kind, (1, 10, 100))
    evaluation.summarize()
    scores = evaluate_proposals(load_ground_truth(path), results, max_proposals=(1, 10, 100))
    names = ["AR@1", "AR@10", "AR@100", "AR@100/small", "AR@100/medium", "AR@100/large"]
    values = [scores.metrics()[kind][name] for name in names]
    assert values == pytest.approx(evaluation.stats[6:], abs=1e-6)


def test_equal_overlaps_are_decided_as_by_pycocotools(tmp_path):
    """The first proposal lies half-way between two objects and may take either."""
    boxes = [(0, 0, 100, 100), (40, 0, 100, 100)]
    objects = [
        annotation(1, boxes[0], category_id=90),
        annotation(2, boxes[1], category_id=3),
    ]
    path = write_dataset(tmp_path / "truth.json", objects)
    results = [result((20, 0, 100, 100), 0.9), result(boxes[0], 0.8)]
    scores = evaluate_proposals(load_ground_truth(path), results)
    for kind in IOU_TYPES:
        expected = pycocotools_evaluation(path, results, kind, (10,)).eval["recall"][:, 0, 0, 0]
        assert scores.recall[kind][:, 9, 0].tolist() == expected.tolist()


def test_boxes_keep_the_decimals_of_the_file(tmp_path):
    """Whether an IoU on a threshold counts hangs on the last bit; float32 boxes would lose it."""
    rng = np.random.default_rng(0)
    boxes = [(10.1, 10.2, 100.3, 100.4), (120.17, 10.23, 131.71, 99.93)]
    objects = [annotation(i, box) for i, box in enumerate(boxes, start=1)]
    path = write_dataset(tmp_path / "truth.json", objects)
    shares = np.arange(0.5, 1, 0.05)
    results = [result((x, y, w, h * s), rng.random()) for x, y, w, h in boxes for s in shares]
    scores = evaluate_proposals(load_ground_truth(path), results, kinds=("box",))
    counts = list(range(1, 21))
    expected = pycocotools_evaluation(path, results, "box", counts).eval["recall"][:, 0, 0]
    assert np.array_equal(scores.recall["box"][:, :20, 0], expected)


@pytest.mark.parametrize("scene", [4], indirect=True)
def test_more_proposals_never_find_less(scene):
    path, results = scene
    scores = evaluate_proposals(load_ground_truth(path), results)
    for recall in scores.recall.values():
        assert np.all(np.diff(recall, axis=1) >= 0)  # in the number of proposals
        assert np.all(np.diff(recall, axis=0)[..., 0] <= 0)  # in the IoU asked for


def assert_perfect(metrics):
    for values in metrics.values():
        assert [v for name, v in values.items() if name.startswith("AR@1000")] == [1.0] * 4


@pytest.mark.parametrize("scene", range(3), indirect=True)
def test_ground_truth_as_proposals_scores_exactly_one(scene):
    ground_truth = load_ground_truth(scene[0])
    assert_perfect(evaluate_proposals(ground_truth, as_results(ground_truth)).metrics())


def test_ground_truth_of_real_images_scores_exactly_one():
    if not COCO_MINI_VAL.exists():
        pytest.skip("data/coco-mini is not there")
    ground_truth = load_ground_truth(COCO_MINI_VAL)
    assert_perfect(evaluate_proposals(ground_truth, as_results(ground_truth)).metrics())


def test_values_worked_out_by_hand(tmp_path):
    """One object; the third proposal has IoU .72, which passes 5 of the 10 thresholds."""
    path = write_dataset(tmp_path / "truth.json", [annotation(1, (0, 0, 100, 100))])
    boxes = [(150, 0, 50, 50), (150, 100, 50, 50), (0, 0, 72, 100), (0, 0, 60, 100)]
    results = [result(box, 1 - i / 10) for i, box in enumerate(boxes)]
    scores = evaluate_proposals(load_ground_truth(path), results, max_proposals=(2, 3, 1000))
    auc = (0.25 * np.log10(3 / 2) + 0.5 * np.log10(1000 / 3)) / 3
    for kind in ("box", "mask"):
        assert scores.average_recall(kind)[[0, 1, 2, 999]].tolist() == [0, 0, 0.5, 0.5]
        metrics = scores.metrics()[kind]
        assert [metrics[f"AR@{k}"] for k in (2, 3, 1000)] == [0, 0.5, 0.5]
        assert metrics["AUC"] == pytest.approx(auc)
        assert metrics["AR@1000/large"] == 0.5


def test_auc_of_perfect_proposals_of_one_object_is_exactly_one(tmp_path):
    path = write_dataset(tmp_path / "truth.json", [annotation(1, (10, 10, 100, 100))])
    scores = evaluate_proposals(load_ground_truth(path), [result((10, 10, 100, 100), 0.5)])
    assert scores.metrics()["mask"]["AUC"] == scores.metrics()["box"]["AUC"] == 1.0


def test_no_proposals_score_zero_and_no_objects_score_none(tmp_path):
    path = write_dataset(tmp_path / "truth.json", [annotation(1, (10, 10, 20, 20))], num_images=2)
    metrics = evaluate_proposals(load_ground_truth(path), []).metrics()
    for values in metrics.values():
        assert values.pop("AR@1000/medium") is values.pop("AR@1000/large") is None
        assert set(values.values()) == {0.0}
    json.dumps(metrics, allow_nan=False)


def test_images_without_proposals_count_as_missed(tmp_path):
    objects = [annotation(i, (10, 10, 100, 100), image_id=i) for i in (1, 2, 3, 4)]
    path = write_dataset(tmp_path / "truth.json", objects, num_images=5)
    results = [result((10, 10, 100, 100), 0.5, image_id=i) for i in (2, 5)]
    assert evaluate_proposals(load_ground_truth(path), results).metrics()["box"]["AR@10"] == 0.25


def test_neither_category_nor_id_decides_whether_an_object_is_found(tmp_path):
    """Pycocotools drops results of an unlisted category and takes a match with id 0 for none."""
    objects = [annotation(0, (10, 10, 50, 50), category_id=90)]
    path = write_dataset(tmp_path / "truth.json", objects, category_ids=(90,))
    results = [result((10, 10, 50, 50), 0.5)]
    for ground_truth in (load_ground_truth(path), COCO(path)):
        assert evaluate_proposals(ground_truth, results).metrics()["mask"]["AR@10"] == 1.0


def test_crowds_are_neither_objects_nor_hits(tmp_path):
    crowd = annotation(1, (0, 0, 100, 100), iscrowd=1, segmentation=uncompressed((0, 0, 100, 100)))
    path = write_dataset(tmp_path / "t.json", [crowd, annotation(2, (120, 100, 50, 50))])
    results = [result((0, 0, 100, 100), 0.9)]
    assert evaluate_proposals(load_ground_truth(path), results).metrics()["mask"]["AR@10"] == 0
    results.append(result((120, 100, 50, 50), 0.1))
    assert evaluate_proposals(load_ground_truth(path), results).metrics()["mask"]["AR@10"] == 1


def test_a_missing_box_is_that_of_the_mask(tmp_path):
    path = write_dataset(tmp_path / "truth.json", [annotation(1, (10, 10, 50, 50))])
    results = [result((10, 10, 50, 40), 0.5)]
    without = [{k: v for k, v in r.items() if k != "bbox"} for r in results]
    ground_truth = load_ground_truth(path)
    given = evaluate_proposals(ground_truth, results).metrics()
    assert evaluate_proposals(ground_truth, without).metrics() == given
    assert given["box"]["AR@10"] == pytest.approx(0.7)


@pytest.mark.parametrize("scene", [5], indirect=True)
def test_nothing_is_printed_and_nothing_given_is_changed(scene, capfd):
    path, results = scene
    results = results[::10]
    before = copy.deepcopy(results)
    ground_truth = load_ground_truth(path)
    truth_before = copy.deepcopy(ground_truth.dataset)
    evaluate_proposals(ground_truth, results)
    list(rank_by_overlap(ground_truth, results, "mask"))
    assert capfd.readouterr() == ("", "")
    assert results == before and ground_truth.dataset == truth_before


def test_results_that_stream_score_as_those_of_a_list(tmp_path):
    """A generator is gone through once, and never more than one image ahead."""
    rng = np.random.default_rng(6)
    objects = random_objects(rng, num_images=4)
    path = write_dataset(tmp_path / "truth.json", objects, num_images=4)
    results = random_proposals(rng, objects, num_images=4, per_image=30, outline=triangle)
    by_image = sorted(results, key=lambda r: [3, 1, 2, 4].index(r["image_id"]))
    ground_truth, matched = load_ground_truth(path), []

    def stream():
        for n, found in enumerate(by_image):
            assert len(matched) >= len({r["image_id"] for r in by_image[:n]}) - 1
            yield found

    def match(image, *others):
        matched.append(image["id"])
        return original(image, *others)

    original = coco_eval._match
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coco_eval, "_match", match)
        streamed = evaluate_proposals(ground_truth, stream(), kinds=("mask",))
    assert matched == [3, 1, 2], "image 4 has no objects"
    given = evaluate_proposals(ground_truth, results, kinds=("mask",))
    assert np.array_equal(streamed.recall["mask"], given.recall["mask"], equal_nan=True)
    ranked = rank_by_overlap(ground_truth, iter(by_image), "box")
    assert sum(r["score"] for r in ranked) == pytest.approx(
        sum(r["score"] for r in rank_by_overlap(ground_truth, results, "box"))
    )


def test_an_image_that_comes_twice_in_a_stream_is_refused(tmp_path):
    path = write_dataset(tmp_path / "truth.json", [], num_images=2)
    results = [result((10, 10, 50, 50), 0.5, image_id=i) for i in (1, 2, 1)]
    with pytest.raises(ValueError, match=r"results\[2\]: image_id 1 comes a second time"):
        evaluate_proposals(load_ground_truth(path), iter(results))


# Perfect ranking


def separate_objects():
    """Six objects of 50 x 60 px, 20 px apart: no proposal has IoU .5 with two of them."""
    corners = [(x, y) for y in (20, 110) for x in (20, 90, 160)]
    return [annotation(i, (x, y, 50, 60)) for i, (x, y) in enumerate(corners, start=1)]


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
@pytest.mark.parametrize("kind", ["box", "mask"])
def test_no_ranking_is_better_than_the_perfect_one(tmp_path_factory, kind, seed):
    rng = np.random.default_rng(seed)
    objects = separate_objects()
    path = write_dataset(tmp_path_factory.mktemp("t") / "truth.json", objects)
    results = random_proposals(rng, objects, num_images=1, per_image=24, outline=rectangle)
    ground_truth = load_ground_truth(path)
    perfect = rank_by_overlap(ground_truth, results, kind)
    best = evaluate_proposals(ground_truth, perfect, kinds=(kind,)).recall[kind]
    given = evaluate_proposals(ground_truth, results, kinds=(kind,)).recall[kind]
    assert np.all(best[..., 0] >= given[..., 0])
    assert np.array_equal(best[:, -1, 0], given[:, -1, 0])  # the same masks find the same objects


def test_copies_of_one_object_do_not_outrank_another_object(tmp_path):
    path = write_dataset(tmp_path / "truth.json", separate_objects()[:2])
    copies = [result((20, 20, 50, 60 - i), 0.9) for i in range(5)]
    ground_truth = load_ground_truth(path)
    results = copies + [result((90, 20, 50, 40), 0.1)]
    ranked = list(rank_by_overlap(ground_truth, results, "mask"))
    order = np.argsort([-r["score"] for r in ranked])
    assert order[:2].tolist() == [0, 5]
    overlaps = [r["score"] for r in ranked]
    assert overlaps == pytest.approx([2, 59 / 60, 58 / 60, 57 / 60, 56 / 60, 1 + 2 / 3])


def test_ranking_ignores_crowds_and_images_without_objects(tmp_path):
    crowd = annotation(1, (0, 0, 100, 100), iscrowd=1, segmentation=uncompressed((0, 0, 100, 100)))
    path = write_dataset(tmp_path / "truth.json", [crowd], num_images=2)
    results = [result((0, 0, 100, 100), 0.5, image_id=i) for i in (1, 2)]
    ranked = rank_by_overlap(load_ground_truth(path), results, "box")
    assert [r["score"] for r in ranked] == [0, 0]


# Annotation files


def test_missing_keys_are_filled_in(tmp_path):
    objects = [annotation(1, (10, 20, 30, 40))]
    for key in ("area", "iscrowd", "bbox"):
        del objects[0][key]
    ground_truth = load_ground_truth(write_dataset(tmp_path / "truth.json", objects))
    [filled] = ground_truth.dataset["annotations"]
    assert (filled["area"], filled["bbox"], filled["iscrowd"]) == (1200, [10, 20, 30, 40], 0)
    assert evaluate_proposals(ground_truth, as_results(ground_truth)).metrics()["box"]["AR@10"] == 1


def test_every_form_of_segmentation_is_read(tmp_path):
    box = (10, 20, 30, 40)
    forms = [rectangle(*box), uncompressed(box), result(box, 0.5)["segmentation"]]
    objects = [annotation(i, box, segmentation=form) for i, form in enumerate(forms, start=1)]
    ground_truth = load_ground_truth(write_dataset(tmp_path / "truth.json", objects))
    masks = [ground_truth.annToMask(a) for a in ground_truth.dataset["annotations"]]
    expected = np.zeros((HEIGHT, WIDTH), np.uint8)
    expected[20:60, 10:40] = 1
    assert len(masks) == 3 and all(np.array_equal(mask, expected) for mask in masks)


UNUSABLE = {
    "no segmentation": {"segmentation": None},
    "no polygon": {"segmentation": []},
    "two points": {"segmentation": [[1, 2, 30, 40]]},
    "odd number of coordinates": {"segmentation": [[1, 2, 30, 40, 50, 60, 7]]},
    "NaN": {"segmentation": [[1, 2, 30, float("nan"), 50, 60]]},
    "endless polygon": {"segmentation": [[0, 0, 1e12, 0, 1e12, 1e12]]},
    "no pixel": {"segmentation": rectangle(10, 10, 0, 0)},
    "outside the image": {"segmentation": rectangle(500, 500, 20, 20)},
    "RLE of another size": {"segmentation": {"size": [5, 5], "counts": [3, 22]}},
    "RLE too short": {"segmentation": {"size": [HEIGHT, WIDTH], "counts": [3, 22]}},
    "RLE string too short": {"segmentation": {"size": [HEIGHT, WIDTH], "counts": "52203"}},
    "RLE garbled": {"segmentation": {"size": [HEIGHT, WIDTH], "counts": "zzzz"}},
    "RLE empty": {"segmentation": {"size": [HEIGHT, WIDTH], "counts": ""}},
    "unknown image": {"image_id": 77},
    "unknown category": {"category_id": 2},
}


@pytest.mark.parametrize("change", UNUSABLE.values(), ids=UNUSABLE)
def test_unusable_annotations_are_left_out_and_counted(tmp_path, caplog, change):
    objects = [annotation(1, (10, 20, 30, 40)), annotation(2, (90, 20, 30, 40), **change)]
    path = write_dataset(tmp_path / "truth.json", objects)
    with caplog.at_level(logging.WARNING):
        ground_truth = load_ground_truth(path)
    assert [a["bbox"] for a in ground_truth.dataset["annotations"]] == [[10, 20, 30, 40]]
    [warning] = caplog.messages
    assert warning.startswith(str(path)) and "left out 1" in warning
    assert (
        evaluate_proposals(ground_truth, as_results(ground_truth)).metrics()["mask"]["AR@10"] == 1
    )


BAD_FILES = {
    "missing": None,
    "not json": "{",
    "not text": b"\xff\xd8\xff\xe0",
    "a list": "[]",
    "no annotations": '{"images": [], "categories": []}',
    "image without size": '{"images": [{"id": 1}], "annotations": [], "categories": []}',
}


@pytest.mark.parametrize("content", BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_annotation_file_is_named_in_one_line(tmp_path, content):
    path = tmp_path / "truth.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError) as error:
        load_ground_truth(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


BAD_RESULTS = {
    "unknown image": ({"image_id": 42}, r"results\[1\]: image_id 42 is not in the annotations"),
    "NaN score": ({"score": float("nan")}, r"results\[1\] \(image_id 1\): score must be a finite"),
    "short box": ({"bbox": [1, 2, 3]}, r"bbox must be four finite numbers .* not \[1, 2, 3\]"),
    "no mask": ({"segmentation": None}, "has no segmentation"),
    "neither": ({"segmentation": None, "bbox": None}, "neither a bbox nor a segmentation"),
    "other size": ({"segmentation": {"size": [9, 9], "counts": "a"}}, r"\[9, 9\].*\[200, 260\]"),
    "polygon": ({"segmentation": rectangle(1, 1, 5, 5)}, "must be a compressed RLE"),
    "broken RLE": ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": "52203"}}, "not fill"),
}


@pytest.mark.parametrize(("change", "message"), BAD_RESULTS.values(), ids=BAD_RESULTS)
def test_a_bad_result_is_named_in_one_line(tmp_path, change, message):
    path = write_dataset(tmp_path / "truth.json", [annotation(1, (10, 10, 50, 50))])
    results = [result((10, 10, 50, 50), 0.5), result((10, 10, 50, 50), 0.5) | change]
    for form in (results, iter(results)):
        with pytest.raises(ValueError, match=message) as error:
            evaluate_proposals(load_ground_truth(path), form)
        assert "\n" not in str(error.value)


def test_the_recall_array_is_laid_out_as_documented(tmp_path):
    path = write_dataset(tmp_path / "truth.json", [annotation(1, (10, 10, 50, 50))])
    scores = evaluate_proposals(load_ground_truth(path), [], kinds=("mask",), max_proposals=(2000,))
    assert list(scores.recall) == ["mask"]
    assert scores.recall["mask"].shape == (10, 2000, len(AREAS))
    assert scores.counts.tolist() == list(range(1, 2001))
    assert scores.iou_thresholds == pytest.approx(np.arange(0.5, 1, 0.05))
