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
from tests.pipeline.evaluation.scenes import (
    HEIGHT,
    WIDTH,
    annotation,
    make_truth,
    pycocotools_evaluation,
    random_box,
    random_scene,
    result,
    separate_objects,
    uncompressed,
    without,
    write_dataset,
)

seeds = st.integers(0, 2**32 - 1)

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


# Recall


def recall_evaluation(path, results, iou_type, max_dets):
    """COCOeval without categories. It would sort equal scores by them, were there several."""
    results = [r | {"category_id": 1} for r in results]
    return pycocotools_evaluation(path, results, iou_type, useCats=0, maxDets=max_dets)


def metrics_of(ground_truth, results):
    return evaluate_proposals(ground_truth, results).metrics()


@pytest.mark.parametrize("iou_type", IOU_TYPES)
@settings(max_examples=4, deadline=None)
@given(seed=seeds)
def test_recall_equals_one_pass_of_pycocotools(tmp_path_factory, iou_type, seed):
    path, results = random_scene(tmp_path_factory.mktemp("scene"), seed, per_image=130)
    max_dets = np.unique(np.geomspace(1, 1000, 20).round().astype(int)).tolist()
    evaluation = recall_evaluation(path, results, iou_type, max_dets)
    expected = evaluation.eval["recall"][:, 0]  # (T, A, M)
    scores = evaluate_proposals(load_ground_truth(path), results, iou_types=(iou_type,))
    columns = scores.recall[iou_type][:, [k - 1 for k in max_dets]]  # (T, M, A)
    assert np.array_equal(columns.transpose(0, 2, 1), expected)
    assert len(np.unique(expected)) > 5  # tells numbers, thresholds and areas apart


@pytest.mark.parametrize("iou_type", IOU_TYPES)
def test_metrics_equal_what_summarize_prints(tmp_path, iou_type):
    path, results = random_scene(tmp_path, 3, per_image=300)
    evaluation = recall_evaluation(path, results, iou_type, list(NUM_PROPOSALS))
    evaluation.summarize()
    metrics = metrics_of(load_ground_truth(path), results)[iou_type]
    names = ["AR@10", "AR@100", "AR@1000", "AUC", *(f"AR@1000/{area}" for area in AREAS[1:])]
    assert list(metrics) == names
    del metrics["AUC"]
    assert list(metrics.values()) == pytest.approx(evaluation.stats[6:], abs=1e-12)


def test_equal_overlaps_are_decided_as_by_pycocotools(tmp_path):
    """The first proposal lies half-way between two objects and may take either."""
    boxes = [(0, 0, 100, 100), (40, 0, 100, 100)]
    objects = [annotation(1, boxes[0], category_id=90), annotation(2, boxes[1], category_id=3)]
    path = write_dataset(tmp_path, objects)
    results = [result((20, 0, 100, 100), 0.9), result(boxes[0], 0.8)]
    scores = evaluate_proposals(load_ground_truth(path), results)
    for iou_type, recall in scores.recall.items():
        expected = recall_evaluation(path, results, iou_type, [10]).eval["recall"]
        assert recall[:, 9, 0].tolist() == expected[:, 0, 0, 0].tolist()


def test_boxes_keep_the_decimals_of_the_file(tmp_path):
    """Whether an IoU on a threshold counts hangs on the last bit; float32 boxes would lose it."""
    rng = np.random.default_rng(0)
    boxes = [(10.1, 10.2, 100.3, 100.4), (120.17, 10.23, 131.71, 99.93)]
    path = write_dataset(tmp_path, [annotation(i, box) for i, box in enumerate(boxes, start=1)])
    parts = np.arange(0.5, 1, 0.05)
    results = [result((x, y, w, h * p), rng.random()) for x, y, w, h in boxes for p in parts]
    scores = evaluate_proposals(load_ground_truth(path), results, iou_types=("box",))
    expected = recall_evaluation(path, results, "box", [*range(1, 21)]).eval["recall"][:, 0, 0]
    assert np.array_equal(scores.recall["box"][:, :20, 0], expected)


def test_values_worked_out_by_hand(tmp_path):
    """One object; the third proposal has IoU .72, which passes 5 of the 10 thresholds."""
    boxes = [(150, 0, 50, 50), (150, 100, 50, 50), (0, 0, 72, 100), (0, 0, 60, 100)]
    results = [result(box, 1 - i / 10) for i, box in enumerate(boxes)]
    ground_truth = make_truth(tmp_path, [annotation(1, (0, 0, 100, 100))])
    scores = evaluate_proposals(ground_truth, results)
    # AR is 0 for 1 and 2 proposals and .5 from 3 on; the axis goes from log 1 to log 1000.
    auc = (0.5 * 0.5 * np.log(3 / 2) + 0.5 * np.log(1000 / 3)) / np.log(1000)
    for iou_type, metrics in scores.metrics().items():
        assert scores.average_recall(iou_type)[[0, 1, 2, 999], 0].tolist() == [0, 0, 0.5, 0.5]
        assert metrics["AUC"] == pytest.approx(auc)
        assert metrics["AR@1000/large"] == 0.5


def test_no_proposals_score_zero_and_no_objects_score_none(tmp_path):
    metrics = metrics_of(make_truth(tmp_path, [annotation(1, (10, 10, 20, 20))], num_images=2), [])
    for values in metrics.values():
        assert values.pop("AR@1000/medium") is values.pop("AR@1000/large") is None
        assert set(values.values()) == {0.0}
    json.dumps(metrics, allow_nan=False)


def test_images_without_proposals_count_as_missed(tmp_path):
    objects = [annotation(i, (10, 10, 100, 100), image_id=i) for i in (1, 2, 3, 4)]
    results = [result((10, 10, 100, 100), 0.5, image_id=i) for i in (2, 5)]
    metrics = metrics_of(make_truth(tmp_path, objects, num_images=5), results)
    assert metrics["box"]["AR@10"] == 0.25


def test_neither_category_nor_id_decides_whether_an_object_is_found(tmp_path):
    """Pycocotools drops results of an unlisted category and takes a match with id 0 for none."""
    path = write_dataset(tmp_path, [annotation(0, (10, 10, 50, 50), category_id=90)])
    results = [result((10, 10, 50, 50), 0.5, category_id=2)]
    for ground_truth in (load_ground_truth(path), COCO(path)):
        metrics = metrics_of(ground_truth, results)
        assert metrics["mask"]["AR@10"] == metrics["mask"]["AUC"] == metrics["box"]["AUC"] == 1


def test_crowds_are_neither_objects_nor_hits(tmp_path):
    box, other = (0, 0, 100, 100), (120, 100, 50, 50)
    crowd = annotation(1, box, iscrowd=1, segmentation=uncompressed(box))
    ground_truth = make_truth(tmp_path, [crowd, annotation(2, other)])
    results = [result(box, 0.9), result(other, 0.1)]
    assert metrics_of(ground_truth, results[:1])["mask"]["AR@10"] == 0
    assert metrics_of(ground_truth, results)["mask"]["AR@10"] == 1
    ranked = rank_by_overlap(ground_truth, results, "mask")
    assert [r["score"] for r in ranked] == [0, 2]


def test_a_missing_box_is_that_of_the_mask(tmp_path):
    ground_truth = make_truth(tmp_path, [annotation(1, (10, 10, 50, 50))])
    results = [result((10, 10, 50, 40), 0.5)]
    given = metrics_of(ground_truth, results)
    assert metrics_of(ground_truth, without("bbox", results)) == given
    assert given["box"]["AR@10"] == pytest.approx(0.7)


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

    def recall_of(results):
        return evaluate_proposals(ground_truth, results, iou_types=(iou_type,)).recall[iou_type]

    assert np.array_equal(recall_of(stream()), recall_of(results))
    assert len(watched) == len(results)
    ranked = rank_by_overlap(ground_truth, stream(), iou_type)
    given = list(rank_by_overlap(ground_truth, results, iou_type))
    assert np.array_equal(recall_of(ranked), recall_of(given))


def test_an_image_that_comes_twice_in_a_stream_is_refused(tmp_path):
    results = [result((10, 10, 50, 50), 0.5, image_id=i) for i in (1, 2, 1)]
    with pytest.raises(ValueError, match=r"results\[2\]: image_id 1 comes a second time"):
        evaluate_proposals(make_truth(tmp_path, [], num_images=2), iter(results))


BAD_RESULTS = {  # more of them in test_precision.py
    "unknown image": ({"image_id": 42}, r"results\[1\]: image_id 42 is not in the annotations"),
    "NaN score": ({"score": float("nan")}, r"results\[1\] \(image_id 1\): score must be a finite"),
    "no mask": ({"segmentation": None}, "has no segmentation"),
    "broken RLE": ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": "52203"}}, "not fill"),
}


@pytest.mark.parametrize(("change", "message"), BAD_RESULTS.values(), ids=BAD_RESULTS)
def test_a_bad_result_is_named_in_one_line(tmp_path, change, message):
    results = [result((10, 10, 50, 50), 0.5), result((10, 10, 50, 50), 0.5) | change]
    for form in (results, iter(results)):
        with pytest.raises(ValueError, match=message) as error:
            evaluate_proposals(make_truth(tmp_path, []), form)
        assert "\n" not in str(error.value)


# Perfect ranking


@settings(max_examples=10, deadline=None)
@given(seed=seeds)
@pytest.mark.parametrize("iou_type", IOU_TYPES)
def test_no_ranking_is_better_than_the_perfect_one(tmp_path_factory, iou_type, seed):
    rng = np.random.default_rng(seed)
    objects = separate_objects()
    ground_truth = make_truth(tmp_path_factory.mktemp("truth"), objects)
    results = []
    for _ in range(24):
        near = np.array(objects[rng.integers(6)]["bbox"]) + rng.integers(-6, 7, 4)
        box = near.tolist() if rng.random() < 0.7 else random_box(rng)
        results.append(result(box, round(float(rng.random()), 1)))
    perfect = rank_by_overlap(ground_truth, results, iou_type)
    best, given = (
        evaluate_proposals(ground_truth, r, iou_types=(iou_type,)).recall[iou_type][..., 0]
        for r in (perfect, results)
    )
    assert np.all(best >= given)
    assert np.array_equal(best[:, -1], given[:, -1])  # the same masks find the same objects


def test_copies_of_one_object_do_not_outrank_another_object(tmp_path):
    """Nor does a result where no object is."""
    ground_truth = make_truth(tmp_path, separate_objects()[:2], num_images=2)
    results = [result((20, 20, 50, 60 - i), 0.9) for i in range(5)]
    results += [result((90, 20, 50, 40), 0.1), result((90, 20, 50, 40), 1, image_id=2)]
    scores = [r["score"] for r in rank_by_overlap(ground_truth, results, "mask")]
    assert scores == pytest.approx([2, 59 / 60, 58 / 60, 57 / 60, 56 / 60, 1 + 2 / 3, 0])
