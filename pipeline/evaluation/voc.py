"""Average precision as PASCAL VOC has it since 2010: the whole area under the curve."""

from collections import defaultdict

import numpy as np
from pycocotools import mask as mask_utils

MIN_IOU = 0.5
FALSE, TRUE, NOT_COUNTED = range(3)


def all_point_ap(objects: list[dict], detections: list[dict], *, min_iou: float = MIN_IOU) -> float:
    """AP of one category's boxes, as VOC's development kit computes it.

    A detection belongs to the object that it overlaps most, found already or not, unlike COCO's,
    which may take the second best. A second detection of an object is false. Difficult objects
    ("ignore" in VOC jsons of COCO's format; crowds as well) are not missed, and to detect one is
    neither true nor false. Precision is made to fall with recall and is added up at every step of
    recall, not at 101 points.

    Args:
        objects: {"image_id", "bbox" xywh, "iscrowd", "ignore"}.
        detections: {"image_id", "bbox" xywh, "score"}.

    Returns:
        AP in [0, 1]; nan if there is no object but difficult ones.
    """
    num_objects = sum(not _is_difficult(item) for item in objects)
    if not num_objects:
        return float("nan")
    ranked = sorted(detections, key=lambda item: (-item["score"], item["image_id"]))
    verdicts = _verdicts(objects, ranked, min_iou)
    verdicts = verdicts[verdicts != NOT_COUNTED]
    true = np.cumsum(verdicts == TRUE)
    precision = true / np.arange(1, len(true) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(true / num_objects, prepend=0) * envelope))


def _is_difficult(item: dict) -> bool:
    return bool(item["iscrowd"] or item["ignore"])


def _verdicts(objects: list[dict], ranked: list[dict], min_iou: float) -> np.ndarray:
    """FALSE, TRUE or NOT_COUNTED for each detection, (D,)."""
    objects_of, rows_of = defaultdict(list), defaultdict(list)
    for item in objects:
        objects_of[item["image_id"]].append(item)
    for row, item in enumerate(ranked):
        rows_of[item["image_id"]].append(row)
    verdicts = np.full(len(ranked), FALSE)
    for image_id, own in objects_of.items():
        rows = rows_of[image_id]
        boxes = [ranked[row]["bbox"] for row in rows]
        verdicts[rows] = _verdicts_of_image(own, boxes, min_iou)
    return verdicts


def _verdicts_of_image(objects: list[dict], boxes: list, min_iou: float) -> list[int]:
    if not boxes:
        return []
    # Crowds, too, by plain IoU: VOC's difficult objects are single ones.
    overlaps = mask_utils.iou(boxes, [item["bbox"] for item in objects], [0] * len(objects))
    verdicts, found = [], set()
    for overlap in overlaps:
        best = int(np.argmax(overlap))
        if overlap[best] < min_iou:
            verdicts.append(FALSE)
        elif _is_difficult(objects[best]):
            verdicts.append(NOT_COUNTED)
        else:
            verdicts.append(FALSE if best in found else TRUE)
            found.add(best)
    return verdicts
