"""Boxes without masks, of objects and of results, score as by pycocotools; masks leave them out."""

import json

import numpy as np
import pytest
from pycocotools.coco import COCO

from pipeline.evaluation.ground_truth import IOU_TYPES, load_ground_truth
from pipeline.evaluation.precision import METRICS, evaluate_detections
from pipeline.evaluation.recall import NUM_PROPOSALS, evaluate_proposals
from pipeline.evaluation.scores import score_detections, score_proposals
from tests.pipeline.evaluation.scenes import random_scene, without
from tools.benchmarks.scoring import run_pycocotools

BOTH, BOXES = tuple(IOU_TYPES), ("box",)


def spoil(path, chosen, segmentation):
    """Takes the segmentations of some annotations away, or replaces them."""
    content = json.loads(path.read_bytes())
    for i, annotation in enumerate(content["annotations"]):
        if chosen(i):
            annotation["segmentation"] = segmentation
            if segmentation is None:
                del annotation["segmentation"]
    path.write_text(json.dumps(content))
    return content


def their_stats(path, results, iou_type, **params):
    stats = run_pycocotools(COCO(path), results, iou_type, **params).stats
    return [None if value < 0 else value for value in stats.tolist()]


MASKS_OF_RESULTS = {
    "masks": lambda results: results,
    "none": lambda results: without("segmentation", results),
    "empty": lambda results: [r | {"segmentation": []} for r in results],
    "null": lambda results: [r | {"segmentation": None} for r in results],
    "no object": lambda results: [r | {"segmentation": {}} for r in results],
}


@pytest.mark.parametrize("masks", MASKS_OF_RESULTS)
@pytest.mark.parametrize("segmentation", [None, [], {}, [[1, 2, 3, 4]]], ids=str)
@pytest.mark.parametrize("chosen", [lambda i: False, lambda i: i % 2, lambda i: True])
def test_boxes_score_as_by_pycocotools(tmp_path, chosen, segmentation, masks):
    path, results = random_scene(tmp_path, 4, per_image=40)
    spoil(path, chosen, segmentation)
    results = MASKS_OF_RESULTS[masks](results)
    ground_truth = load_ground_truth(path)
    expected = BOTH if masks == "masks" and not chosen(0) else BOXES
    metrics = evaluate_detections(ground_truth, results).metrics()
    assert tuple(metrics) == expected
    stats = their_stats(path, results, "box")
    assert metrics["box"] == dict(zip(METRICS, stats[: len(METRICS)], strict=True))

    proposals = [r | {"category_id": 1} for r in results]
    recall = evaluate_proposals(ground_truth, proposals, iou_types=BOXES).metrics()["box"]
    del recall["AUC"]
    theirs = their_stats(path, proposals, "box", useCats=0, maxDets=list(NUM_PROPOSALS))
    assert list(recall.values()) == pytest.approx(theirs[6:], abs=1e-12)


def test_masks_are_scored_over_the_objects_that_have_one(tmp_path):
    """As if the others were not there."""
    path, results = random_scene(tmp_path, 4, per_image=40)
    content = spoil(path, lambda i: i % 2, [])
    mixed = load_ground_truth(path)
    content["annotations"] = content["annotations"][::2]
    path.write_text(json.dumps(content))
    fewer = load_ground_truth(path)
    ours, theirs = (evaluate_detections(truth, results).metrics() for truth in (mixed, fewer))
    assert ours["mask"] == theirs["mask"] and ours["box"] != theirs["box"]
    ours, theirs = (evaluate_proposals(truth, results).metrics() for truth in (mixed, fewer))
    assert ours["mask"] == theirs["mask"] and ours["box"] != theirs["box"]


@pytest.mark.parametrize("has_masks", [True, False])
@pytest.mark.parametrize("have_masks", [True, False])
def test_files_and_tables_have_what_can_be_scored(tmp_path, capsys, has_masks, have_masks):
    path, results = random_scene(tmp_path, 4, per_image=40)
    content = spoil(path, lambda i: not has_masks, [])
    if not have_masks:
        results = [r | {"segmentation": []} for r in results]
    (tmp_path / "results.json").write_text(json.dumps(results))
    printed = ""
    for score in (score_detections, score_proposals):
        metrics = score(path, tmp_path / "results.json", tmp_path / score.__name__)
        assert tuple(metrics) == (BOTH if has_masks and have_masks else BOXES)
        assert all(value is not None for value in metrics["box"].values())
        lines = capsys.readouterr().out
        assert ("\nmask" in lines) == (len(metrics) == 2)
        printed += lines
    if not has_masks:
        count = len(content["annotations"])
        assert printed.count(f"without a mask {count}: no segmentation {count}") == 1


@pytest.mark.parametrize("score", [score_detections, score_proposals])
@pytest.mark.parametrize(("of_most", "message"), [(True, "has no"), (False, "has a")])
def test_either_all_results_have_masks_or_none(tmp_path, score, of_most, message):
    path, with_masks = random_scene(tmp_path, 4, per_image=40)
    boxes = [r | {"segmentation": []} for r in with_masks]
    mixed = with_masks if of_most else boxes
    mixed[3] = boxes[3] if of_most else with_masks[3]
    with pytest.raises(ValueError, match=rf"results\[3\].*{message} segmentation"):
        score(path, write(tmp_path, mixed), tmp_path / "scores")


def test_boxes_of_repaired_results_equal_the_plain_ones(tmp_path):
    """Ids as 1.0, counts as the text of bytes, a BOM, UTF-16."""
    path, results = random_scene(tmp_path, 4, per_image=40)
    plain = score_detections(path, write(tmp_path, results), tmp_path / "scores")
    floats = [
        r | {"image_id": float(r["image_id"]), "category_id": float(r["category_id"])}
        for r in results
    ]
    texts = []
    for r in results:
        mask = r["segmentation"]
        text = str(mask["counts"].encode())
        texts.append(r | {"segmentation": {"size": [200.0, 260.0], "counts": text}})
    assert any("\\\\" in r["segmentation"]["counts"] for r in texts)
    for given, encoding in (
        *((floats, "utf-8"), (texts, "utf-8")),
        *((results, "utf-8-sig"), (results, "utf-16")),
    ):
        file = write(tmp_path, given, encoding)
        assert score_detections(path, file, tmp_path / "scores") == plain
        assert score_proposals(path, file, tmp_path / "scores")["mask"]["AR@100"] > 0


def write(folder, results, encoding="utf-8"):
    path = folder / "results.json"
    path.write_text(json.dumps(results), encoding=encoding)
    return path


def test_contradicting_boxes_score_by_the_segmentation(tmp_path):
    """Detections that are the objects find them all, whatever the boxes of the json say."""
    path, _ = random_scene(tmp_path, 4, per_image=0)
    good = load_ground_truth(path).dataset["annotations"]
    keys = ("image_id", "category_id", "bbox", "segmentation")
    found = [{k: a[k] for k in keys} | {"score": 0.5} for a in good if not a["iscrowd"]]
    content = json.loads(path.read_bytes())
    for annotation in content["annotations"]:
        annotation["bbox"] = [0, 0, 0, 0]
    path.write_text(json.dumps(content))
    metrics = evaluate_detections(load_ground_truth(path), found).metrics()
    assert np.isclose([metrics["box"]["AP"], metrics["mask"]["AP"]], 1).all()
