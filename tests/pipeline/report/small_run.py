"""A run of a few small images and rectangles, for the tests of the report."""

import json

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from pipeline.evaluation.precision import METRICS
from pipeline.inference.proposal_store import ProposalStore
from pipeline.inference.proposals import Detections, Proposals, logits_of, results_of
from tests.pipeline.evaluation import scenes
from tests.pipeline.evaluation.scenes import annotation

SIDE = 64  # px, of the images
SQUARE, ELSEWHERE, EVERYTHING = (8, 8, 24, 24), (40, 40, 56, 56), (0, 0, SIDE, SIDE)  # xyxy
UPPER_HALF = (8, 8, 24, 16)  # of SQUARE
HALF = "half <i>&amp;.png"  # a name that a page must escape


def rle_of(box, height=SIDE, width=SIDE):
    mask = np.zeros((height, width), np.uint8, order="F")
    mask[box[1] : box[3], box[0] : box[2]] = 1
    return coco_mask.encode(mask)


def proposals_of(image_id, name, boxes, scores=None):
    """Proposals of rectangles, with falling scores unless given."""
    scores = np.linspace(0.9, 0.5, len(boxes)) if scores is None else np.array(scores)
    rles = [rle_of(box)["counts"] for box in boxes]
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    return Proposals(image_id, name, SIDE, SIDE, logits_of(scores), boxes, rles)


def detections_of(image_id, name, found, *, masks=True):
    """Detections of rectangles: (box, category id, score) each, best first."""
    boxes, labels, scores = zip(*found, strict=True) if found else ([], [], [])
    counts = [rle_of(box)["counts"] for box in boxes] if masks else []
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    logits, labels = logits_of(np.array(scores)), np.array(labels, np.int64)
    return Detections(image_id, name, SIDE, SIDE, logits, boxes, counts, labels)


def object_of(image_id, box, *, iscrowd=0, category=1):
    x1, y1, x2, y2 = box
    ids = {"image_id": image_id, "category_id": category}
    return annotation(0, (x1, y1, x2 - x1, y2 - y1), iscrowd=iscrowd, **ids)


def write_dataset(directory, names, objects):
    """Images with ids from 1 on and their annotations; returns the json and the images' folder."""
    directory.mkdir(exist_ok=True)
    annotations = [o | {"id": i} for i, o in enumerate(objects, start=1)]
    path = scenes.write_dataset(directory, annotations, names=names, size=(SIDE, SIDE))
    for i, name in enumerate(names, start=1):
        cv2.imwrite(str(directory / name), np.full((SIDE, SIDE, 3), 40 * i % 256, np.uint8))
    return path, directory


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_store(directory, proposals):
    store = ProposalStore(directory)
    store.open_for({"num_proposals": 1000, "scales": [-2.5, 0.5, 0.5]})
    store.write_shard(proposals)


def metrics_of(start):
    """Different values for all metrics, so that each can be told apart on the page."""
    names = ("AR@10", "AR@100", "AR@1000", "AUC", "AR@1000/medium", "AR@1000/large")
    return {
        iou_type: {name: first + i / 1000 for i, name in enumerate(names)} | {"AR@1000/small": None}
        for iou_type, first in (("box", start), ("mask", start + 0.01))
    }


PATCHES = {"mean_iou": 0.761, "median_iou": 0.792, "iou_above_0.5": 0.873, "iou_above_0.7": 0.664,
           "score_accuracy": 0.915}  # fmt: skip
RECORDS = [
    {"split": "train", "step": 20, "epoch": 0.2, "loss": 0.7, "mask_loss": 0.711, "lr": 1e-3,
     "patches_per_second": 10.0},
    {"split": "val", "step": 100, "epoch": 1.0, **PATCHES},
    {"split": "train", "step": 110, "epoch": 1.1, "loss": 0.5, "score_loss": 0.402,
     "patches_per_second": 30.0},
    {"split": "train", "step": 1200, "epoch": 2.0, "mask_loss": 0.213, "patches_per_second": 40.0},
    {"split": "val", "step": 1200, "epoch": 2.0, **PATCHES, "iou_above_0.7": 0.6},
]  # fmt: skip
SUMMARY = {
    **{name: {"patches": PATCHES} for name in ("deepmask", "sharpmask")},
    "seconds": {"deepmask": 251.3, "multipathnet": 62.1},
}
CURVES = {
    "iou_thresholds": [0.5, 0.75, 0.95], "counts": [1, 10, 100, 1000],
    **{iou_type: {"recall_by_iou": {k: [0.5, 0.3, None] for k in ("10", "100", "1000")},
                  "ar_by_count": [0.1, 0.2, 0.3, None],
                  "ar_by_area": {"small": [None] * 4, "medium": [0.1, 0.2, 0.3, None],
                                 "large": [0.2, 0.3, 0.4, 0.4]}} for iou_type in ("box", "mask")},
}  # fmt: skip
DETECTOR_RECORDS = [
    {"split": "train", "step": 20, "epoch": 0.2, "class_loss": 1.51, "box_loss": 0.41,
     "images_per_second": 8.0},
    {"split": "val", "step": 100, "epoch": 1.0, "roi_accuracy": 0.75, "foreground_accuracy": 0.6,
     "background_accuracy": 0.9},
    {"split": "train", "step": 200, "epoch": 2.0, "class_loss": 0.52, "box_loss": 0.22,
     "images_per_second": 8.0},
    {"split": "val", "step": 200, "epoch": 2.0, "roi_accuracy": 0.7},
]  # fmt: skip
DETECTION_METRICS = {
    iou_type: {name: start + i / 1000 for i, name in enumerate(METRICS)}
    for iou_type, start in (("box", 0.3), ("mask", 0.2))
}
AP_BY_IOU = {
    "iou_thresholds": [0.5, 0.75, 0.95],
    "box": {"ap_by_iou": [0.61, 0.31, 0.01]},
    "mask": {"ap_by_iou": [0.52, 0.22, None]},
}
AP_BY_PROPOSALS = {"counts": [10, 400], "box": [0.151, 0.3], "mask": [0.142, 0.2]}
CATEGORIES = [
    {"category_id": 1, "category": "<i>ring", "annotations": 12, "detections": 1234,
     "box_AP": 0.41, "mask_AP": 0.32},
    {"category_id": 3, "category": "bar", "annotations": 3, "detections": 5,
     "box_AP": 0.23, "mask_AP": 0.11},
    {"category_id": 7, "category": "none", "annotations": 0, "detections": 1,
     "box_AP": None, "mask_AP": None},
]  # fmt: skip


def write_stage(directory, records, **scores):
    for name, content in scores.items():
        write_json(directory / "scores" / f"{name}.json", content)
    (directory / "config.yaml").write_text(f"name: <script>{directory.name}</script>\n")
    (directory / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


def write_run(directory):
    """A complete run."""
    for name, start, proposals in (("deepmask", 0.1, STORE), ("sharpmask", 0.16, REFINED)):
        scores = {"metrics": metrics_of(start), "perfect_ranking": metrics_of(start + 0.1)}
        write_stage(directory / name, RECORDS, curves=CURVES, **scores)
        write_store(directory / name / "proposals", proposals)
    detector = directory / "multipathnet"
    scores = {"by_proposals": AP_BY_PROPOSALS, "categories": CATEGORIES, "curves": AP_BY_IOU}
    write_stage(detector, DETECTOR_RECORDS, metrics=DETECTION_METRICS, **scores)
    write_json(detector / "detections.json", [r for found in FOUND for r in results_of(found)])
    write_json(directory / "summary.json", SUMMARY)
    return directory


def make_dataset(directory):
    """One object found exactly, one missed, one half found; a crowd alone; nothing at all."""
    names = ["found.png", "missed.png", HALF, "crowd.png", "empty.png"]
    objects = [object_of(image_id, SQUARE) for image_id in (1, 2, 3)]
    return write_dataset(directory, names, [*objects, object_of(4, SQUARE, iscrowd=1)])


STORE = [
    proposals_of(1, "found.png", [EVERYTHING, SQUARE]),
    proposals_of(2, "missed.png", [ELSEWHERE]),
    proposals_of(3, HALF, [UPPER_HALF, ELSEWHERE]),
    proposals_of(4, "crowd.png", [SQUARE]),
    proposals_of(5, "empty.png", [SQUARE]),
]
# The same after a refinement that is right on the half-found object.
REFINED = [*STORE[:2], proposals_of(3, HALF, [SQUARE, ELSEWHERE])]

# In the dataset's images: found; of the wrong category; half found, and what is not there.
FOUND = [
    detections_of(1, "found.png", [(SQUARE, 1, 0.9)]),
    detections_of(2, "missed.png", [(SQUARE, 3, 0.8), (SQUARE, 1, 0.2)]),
    detections_of(3, HALF, [(UPPER_HALF, 1, 0.7), (ELSEWHERE, 1, 0.4)]),
    detections_of(5, "empty.png", [(SQUARE, 1, 0.1)]),
]
