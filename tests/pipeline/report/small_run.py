"""A run of a few small images and rectangles, for the tests of the report."""

import json

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from pipeline.evaluation.precision import METRICS
from pipeline.inference.proposals import Detections, Proposals, ProposalStore, results_of

SIDE = 64  # px, of the images
SQUARE, ELSEWHERE, EVERYTHING = (8, 8, 24, 24), (40, 40, 56, 56), (0, 0, SIDE, SIDE)  # xyxy
UPPER_HALF = (8, 8, 24, 16)  # of SQUARE
NUM_WITH_OBJECTS = 3  # of the images of `dataset`


def rle_of(box, height=SIDE, width=SIDE):
    mask = np.zeros((height, width), np.uint8, order="F")
    mask[box[1] : box[3], box[0] : box[2]] = 1
    return coco_mask.encode(mask)


def proposals_of(image_id, name, boxes):
    """Proposals of rectangles, with falling scores."""
    counts = [rle_of(box)["counts"] for box in boxes]
    scores = np.linspace(0.9, 0.5, len(boxes), dtype=np.float32)
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    return Proposals(image_id, name, SIDE, SIDE, scores, boxes, counts)


def detections_of(image_id, name, found, *, masks=True):
    """Detections of rectangles: (box, category id, score) each, best first."""
    boxes, labels, scores = zip(*found, strict=True) if found else ([], [], [])
    counts = [rle_of(box)["counts"] for box in boxes] if masks else []
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    scores, labels = np.array(scores, np.float32), np.array(labels, np.int64)
    return Detections(image_id, name, SIDE, SIDE, scores, boxes, counts, labels)


def object_of(image_id, box, *, iscrowd=0, category=1):
    x1, y1, x2, y2 = box
    return {
        "image_id": image_id,
        "category_id": category,
        "iscrowd": iscrowd,
        "area": (x2 - x1) * (y2 - y1),
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "segmentation": [[x1, y1, x2, y1, x2, y2, x1, y2]],
    }


def write_dataset(directory, names, objects):
    """Images with ids from 1 on and their annotations; returns the json and the images' folder."""
    images = [
        {"id": i, "file_name": name, "height": SIDE, "width": SIDE}
        for i, name in enumerate(names, start=1)
    ]
    annotations = [{"id": i} | annotation for i, annotation in enumerate(objects, start=1)]
    categories = [{"id": 1, "name": "ring"}, {"id": 3, "name": "bar"}]
    path = directory / "instances.json"
    write_json(path, {"images": images, "annotations": annotations, "categories": categories})
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
CURVES = {
    "iou_thresholds": [0.5, 0.75, 0.95], "counts": [1, 10, 100, 1000],
    **{iou_type: {"recall_by_iou": {k: [0.5, 0.3, None] for k in ("10", "100", "1000")},
                  "ar_by_count": [0.1, 0.2, 0.3, None]} for iou_type in ("box", "mask")},
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


def _write_training(directory, seed, records, **scores):
    for name, content in scores.items():
        write_json(directory / "scores" / f"{name}.json", content)
    (directory / "config.yaml").write_text(f"seed: {seed}\n")
    (directory / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


def write_stage(directory, proposals, *, start=0.1):
    metrics, perfect = metrics_of(start), metrics_of(start + 0.1)
    _write_training(directory, 7, RECORDS, metrics=metrics, perfect_ranking=perfect, curves=CURVES)
    write_store(directory / "proposals", proposals)


def write_summary(run, *stages):
    summary = {name: {"patches": PATCHES} for name in stages}
    write_json(run / "summary.json", summary | {"seconds": {"deepmask": 251.3}})


def write_run(directory):
    """A complete run of DeepMask and the detector."""
    write_stage(directory / "deepmask", STORE)
    detector = directory / "multipathnet"
    scores = {"by_proposals": AP_BY_PROPOSALS, "categories": CATEGORIES}
    _write_training(
        detector, 9, DETECTOR_RECORDS, metrics=DETECTION_METRICS, curves=AP_BY_IOU, **scores
    )
    write_json(detector / "detections.json", [r for found in FOUND for r in results_of(found)])
    write_summary(directory, "deepmask")
    return directory


def make_dataset(directory):
    """One object found exactly, one missed, one half found; a crowd alone; nothing at all."""
    names = ["found.png", "missed.png", "half.png", "crowd.png", "empty.png"]
    objects = [object_of(image_id, SQUARE) for image_id in (1, 2, 3)]
    return write_dataset(directory, names, [*objects, object_of(4, SQUARE, iscrowd=1)])


STORE = [
    proposals_of(1, "found.png", [EVERYTHING, SQUARE]),
    proposals_of(2, "missed.png", [ELSEWHERE]),
    proposals_of(3, "half.png", [UPPER_HALF, ELSEWHERE]),
    proposals_of(4, "crowd.png", [SQUARE]),
    proposals_of(5, "empty.png", [SQUARE]),
]

# In the dataset's images: found; of the wrong category; half found, and what is not there.
FOUND = [
    detections_of(1, "found.png", [(SQUARE, 1, 0.9)]),
    detections_of(2, "missed.png", [(SQUARE, 3, 0.8), (SQUARE, 1, 0.2)]),
    detections_of(3, "half.png", [(UPPER_HALF, 1, 0.7), (ELSEWHERE, 1, 0.4)]),
    detections_of(5, "empty.png", [(SQUARE, 1, 0.1)]),
]
