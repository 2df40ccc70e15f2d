"""Average recall of proposals: against pycocotools, and against values worked out by hand."""

import copy
import json
import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pycocotools.coco import COCO

from pipeline.evaluation.ground_truth import AREAS, IOU_THRESHOLDS, IOU_TYPES, load_ground_truth
from pipeline.evaluation.recall import (
    NUM_PROPOSALS,
    evaluate_proposals,
    find_hits,
    rank_by_overlap,
)
from tests.pipeline.evaluation import scenes
from tests.pipeline.evaluation.scenes import annotation, make_truth, random_scene, result, without
from tools.benchmarks.scoring import run_pycocotools

seeds = st.integers(0, 2**32 - 1)


def metrics_of(ground_truth, results):
    return evaluate_proposals(ground_truth, results).metrics()


def recall_of(ground_truth, results, iou_type):
    return evaluate_proposals(ground_truth, results, iou_types=(iou_type,)).recall[iou_type]


# Matching


def match_one_by_one(overlaps, countable, threshold):
    """The rule in words: each proposal takes the free countable object that it overlaps most."""
    free, hits = set(np.flatnonzero(countable)), []
    for row in overlaps:
        _, best = max(((row[g], g) for g in free if row[g] >= threshold), default=(None, None))
        free -= {best}
        hits.append(best is not None)
    return hits


@st.composite
def overlaps_of_few_values(draw):
    shape = draw(st.integers(0, 12)), draw(st.integers(1, 6))
    values = st.sampled_from([0, 0.3, 0.5, 0.55, 0.7, 0.72, 0.95, 1])  # with many equal ones
    countable = draw(arrays(bool, (draw(st.integers(1, 4)), shape[1])))
    return draw(arrays(float, shape, elements=values)), countable


@given(overlaps_of_few_values())
def test_matching_all_at_once_equals_one_by_one(scene):
    overlaps, countable = scene
    hits = find_hits(overlaps, countable)
    assert hits.shape == (len(IOU_THRESHOLDS), len(overlaps), len(countable))
    for t, threshold in enumerate(IOU_THRESHOLDS):
        for a, row in enumerate(countable):
            assert hits[t, :, a].tolist() == match_one_by_one(overlaps, row, threshold)


# Beside pycocotools


def pycocotools_recall(path, results, iou_type, max_dets):
    """COCOeval without categories. It would sort equal scores by them, were there several."""
    results = [r | {"category_id": 1} for r in results]
    return run_pycocotools(COCO(path), results, iou_type, useCats=0, maxDets=list(max_dets))


def assert_equals_pycocotools(path, results, iou_type, max_dets):
    """Recall (T, areas, numbers of proposals), to the last bit; returns it."""
    expected = pycocotools_recall(path, results, iou_type, max_dets).eval["recall"][:, 0]
    recall = recall_of(load_ground_truth(path), results, iou_type)[:, np.array(max_dets) - 1]
    assert np.array_equal(recall.filled(-1).transpose(0, 2, 1), expected)
    return expected


@pytest.mark.parametrize("iou_type", IOU_TYPES)
@settings(max_examples=4, deadline=None)
@given(seed=seeds)
def test_recall_equals_one_pass_of_pycocotools(tmp_path_factory, iou_type, seed):
    path, results = random_scene(tmp_path_factory.mktemp("scene"), seed, per_image=130)
    max_dets = np.unique(np.geomspace(1, 1000, 20).round().astype(int)).tolist()
    recall = assert_equals_pycocotools(path, results, iou_type, max_dets)
    assert len(np.unique(recall)) > 5  # tells numbers, thresholds and areas apart


@pytest.mark.parametrize("iou_type", IOU_TYPES)
def test_equal_overlaps_are_decided_as_by_pycocotools(tmp_path, iou_type):
    """The first proposal lies half-way between two objects and may take either."""
    boxes = [(0, 0, 100, 100), (40, 0, 100, 100)]
    objects = [annotation(1, boxes[0], category_id=90), annotation(2, boxes[1], category_id=3)]
    results = [result((20, 0, 100, 100), 0.9), result(boxes[0], 0.8)]
    assert_equals_pycocotools(
        scenes.write_dataset(tmp_path, objects), results, iou_type, NUM_PROPOSALS
    )


def test_boxes_keep_the_decimals_of_the_file(tmp_path):
    """Whether an IoU on a threshold counts hangs on the last bit; float32 boxes would lose it."""
    rng, parts = np.random.default_rng(0), np.arange(0.5, 1, 0.05)
    boxes = [(10.1, 10.2, 100.3, 100.4), (120.17, 10.23, 131.71, 99.93)]
    objects = [annotation(i, box) for i, box in enumerate(boxes, start=1)]
    results = [result((x, y, w, h * p), rng.random()) for x, y, w, h in boxes for p in parts]
    path = scenes.write_dataset(tmp_path, objects)
    assert_equals_pycocotools(path, results, "box", [*range(1, 21)])


@pytest.mark.parametrize("iou_type", IOU_TYPES)
def test_metrics_equal_what_summarize_prints(tmp_path, iou_type):
    path, results = random_scene(tmp_path, 3, per_image=300)
    evaluation = pycocotools_recall(path, results, iou_type, NUM_PROPOSALS)
    metrics = metrics_of(load_ground_truth(path), results)[iou_type]
    names = ["AR@10", "AR@100", "AR@1000", "AUC", *(f"AR@1000/{area}" for area in AREAS[1:])]
    assert list(metrics) == names
    del metrics["AUC"]
    assert list(metrics.values()) == pytest.approx(evaluation.stats[6:], abs=1e-12)


# Values worked out by hand


def test_the_curve_and_the_area_below_it(tmp_path):
    """One object; the third proposal has IoU .72, which passes 5 of the 10 thresholds."""
    boxes = [(150, 0, 50, 50), (150, 100, 50, 50), (0, 0, 72, 100), (0, 0, 60, 100)]
    results = [result(box, 1 - i / 10) for i, box in enumerate(boxes)]
    scores = evaluate_proposals(make_truth(tmp_path, [annotation(1, (0, 0, 100, 100))]), results)
    # AR is 0 for 1 and 2 proposals and .5 from 3 on; the axis goes from log 1 to log 1000.
    auc = (0.5 * 0.5 * np.log(3 / 2) + 0.5 * np.log(1000 / 3)) / np.log(1000)
    for iou_type, metrics in scores.metrics().items():
        assert scores.average_recall(iou_type)[[0, 1, 2, 999], 0].tolist() == [0, 0, 0.5, 0.5]
        assert metrics["AUC"] == pytest.approx(auc)
        assert metrics["AR@1000/large"] == 0.5


BOX, OTHER = (10, 10, 100, 100), (120, 120, 50, 50)
CROWD = annotation(1, BOX, iscrowd=1, segmentation=scenes.uncompressed(BOX))
OBJECTS = [CROWD, annotation(2, OTHER)]
# Objects, results and AR.
RECALLS = {
    "no proposals": ([annotation(1, BOX)], [], 0),
    "images without proposals": (
        [annotation(i, BOX, image_id=i) for i in (1, 2, 3, 4)],
        [result(BOX, 0.5, image_id=i) for i in (2, 5)], 0.25),
    # pycocotools drops results of an unlisted category and takes a match with id 0 for none.
    "any category and id": ([annotation(0, BOX, category_id=90)],
                            [result(BOX, 0.5, category_id=2)], 1),
    "a crowd is no object": (OBJECTS, [result(OTHER, 0.5)], 1),
    "a crowd is no hit": (OBJECTS, [result(BOX, 0.5)], 0),
    "the box of a mask": ([annotation(1, BOX)],
                          without("bbox", [result((10, 10, 100, 80), 0.5)]), 0.7),
}  # fmt: skip


@pytest.mark.parametrize(("objects", "results", "recall"), RECALLS.values(), ids=RECALLS)
def test_objects_that_are_found(tmp_path, objects, results, recall):
    """Those of areas without an object have no recall."""
    path = scenes.write_dataset(tmp_path, objects, num_images=5)
    for ground_truth in (load_ground_truth(path), COCO(path)):
        metrics = metrics_of(ground_truth, results)
        for values in metrics.values():
            assert [values[name] for name in ("AR@10", "AUC")] == pytest.approx([recall] * 2)
            assert values["AR@1000/small"] is None
        json.dumps(metrics, allow_nan=False)


def test_nothing_is_printed_and_nothing_given_is_changed(tmp_path, capfd):
    path, results = random_scene(tmp_path, 5, per_image=30)
    ground_truth = load_ground_truth(path)
    before = copy.deepcopy((results, ground_truth.dataset))
    evaluate_proposals(ground_truth, results)
    list(rank_by_overlap(ground_truth, results, "mask"))
    assert capfd.readouterr() == ("", "")
    assert (results, ground_truth.dataset) == before


# Streams


class Result(dict):
    """A dict that weak references can watch."""


@pytest.mark.parametrize("iou_type", IOU_TYPES)
def test_results_that_stream_score_as_those_of_a_list(tmp_path, iou_type):
    """A generator is gone through once, and no more than two images are in memory."""
    path, results = random_scene(tmp_path, 6, per_image=30)
    by_image = sorted(results, key=lambda r: [3, 1, 2, 4].index(r["image_id"]))
    ground_truth, watched = load_ground_truth(path), []

    def stream():
        for found in map(Result, by_image):
            watched.append(weakref.ref(found))
            yield found
            alive = {r["image_id"] for ref in watched if (r := ref()) is not None}
            assert len(alive) <= 2

    streamed = recall_of(ground_truth, stream(), iou_type)
    assert np.array_equal(streamed, recall_of(ground_truth, results, iou_type))
    assert len(watched) == len(results)
    ranked = rank_by_overlap(ground_truth, stream(), iou_type)
    given = list(rank_by_overlap(ground_truth, results, iou_type))
    streamed = recall_of(ground_truth, ranked, iou_type)
    assert np.array_equal(streamed, recall_of(ground_truth, given, iou_type))


def test_an_image_that_comes_twice_in_a_stream_is_refused(tmp_path):
    results = [result(BOX, 0.5, image_id=i) for i in (1, 2, 1)]
    with pytest.raises(ValueError, match=r"results\[2\]: image_id 1 comes a second time"):
        evaluate_proposals(make_truth(tmp_path, [], num_images=2), iter(results))


BROKEN_RLE = {"size": [scenes.HEIGHT, scenes.WIDTH], "counts": "52203"}
BAD_RESULTS = {  # more of them in test_precision.py
    "unknown image": ({"image_id": 42}, r"results\[1\]: image_id 42 is not in the annotations"),
    "NaN score": ({"score": float("nan")}, r"results\[1\] \(image_id 1\): score must be a finite"),
    "no mask": ({"segmentation": None}, "has no segmentation"),
    "broken RLE": ({"segmentation": BROKEN_RLE}, "not fill"),
}


@pytest.mark.parametrize(("change", "message"), BAD_RESULTS.values(), ids=BAD_RESULTS)
def test_a_bad_result_is_named_in_one_line(tmp_path, change, message):
    results = [result(BOX, 0.5), result(BOX, 0.5) | change]
    for form in (results, iter(results)):
        with pytest.raises(ValueError, match=message) as error:
            evaluate_proposals(make_truth(tmp_path, []), form)
        assert "\n" not in str(error.value)


# Perfect ranking


@settings(max_examples=10, deadline=None)
@given(seed=seeds)
@pytest.mark.parametrize("iou_type", IOU_TYPES)
def test_no_ranking_is_better_than_the_perfect_one(tmp_path_factory, iou_type, seed):
    rng, objects, results = np.random.default_rng(seed), scenes.separate_objects(), []
    ground_truth = make_truth(tmp_path_factory.mktemp("truth"), objects)
    for _ in range(24):
        near = np.array(objects[rng.integers(6)]["bbox"]) + rng.integers(-6, 7, 4)
        box = near.tolist() if rng.random() < 0.7 else scenes.random_box(rng)
        results.append(result(box, round(float(rng.random()), 1)))
    perfect = rank_by_overlap(ground_truth, results, iou_type)
    best, given = (recall_of(ground_truth, r, iou_type)[..., 0] for r in (perfect, results))
    assert np.all(best >= given)
    assert np.array_equal(best[:, -1], given[:, -1])  # the same masks find the same objects


def test_copies_of_one_object_do_not_outrank_another_object(tmp_path):
    """Nor does a result where no object is, or where a crowd is."""
    crowd = annotation(3, BOX, image_id=2, iscrowd=1, segmentation=scenes.uncompressed(BOX))
    objects = [*scenes.separate_objects()[:2], crowd]
    ground_truth = make_truth(tmp_path, objects, num_images=2)
    results = [result((20, 20, 50, 60 - i), 0.9) for i in range(5)]
    results += [result((90, 20, 50, 40), 0.1), result(BOX, 1, image_id=2)]
    scores = [r["score"] for r in rank_by_overlap(ground_truth, results, "mask")]
    assert scores == pytest.approx([2, 59 / 60, 58 / 60, 57 / 60, 56 / 60, 1 + 2 / 3, 0])
