"""COCO evaluation of detections: average precision (AP) and recall (AR), by boxes and by masks.

hotcoco, which gives pycocotools' numbers to the last bit in a fraction of the time, does the
matching; pycocotools makes the summary.

Letters: T IoU thresholds (.50:.05:.95), P recall points (0:.01:1), C categories.
"""

import contextlib
import io
from collections import defaultdict
from collections.abc import Container
from dataclasses import dataclass

import hotcoco
import numpy as np
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval, Params

from pipeline.evaluation.ground_truth import IOU_TYPES, objects_for, scorable
from pipeline.inference.coco_json import box_of, check_results

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR@1", "AR@10", "AR@100")
RECALL_POINTS = Params(iouType="bbox").recThrs  # (P,)
VOC_MIN_IOU = 0.5


@dataclass(frozen=True)
class DetectionScores:
    """What COCOeval accumulates, by IoU type ("mask" if there are masks), and VOC's AP50 of boxes.

    Attributes:
        categories: their columns "category_id" and "category", as in the annotations,
            "annotations" (without crowds) and "detections", C values each.
        evaluations: by IoU type the "precision" (T, P, C, 4 area ranges, 3 numbers of detections)
            and "recall" (T, C, 4, 3); -1 where there is no object.
        voc_ap50: (C,), masked where there is no object.
    """

    categories: dict[str, list]
    evaluations: dict[str, dict[str, np.ndarray]]
    voc_ap50: np.ma.MaskedArray

    def metrics(self) -> dict[str, dict[str, float | None]]:
        """Pycocotools' summary for each IoU type, named as in `METRICS`; None if undefined."""
        metrics = {}
        for iou_type, arrays in self.evaluations.items():
            evaluation = COCOeval(iouType=IOU_TYPES[iou_type])
            evaluation.eval = arrays
            with contextlib.redirect_stdout(io.StringIO()):
                evaluation.summarize()
            values = [None if v < 0 else v for v in evaluation.stats.tolist()]
            metrics[iou_type] = dict(zip(METRICS, values[: len(METRICS)], strict=True))
        return metrics

    def precision(self, iou_type: str) -> np.ma.MaskedArray:
        """Precision (T, P, C) over all areas, with 100 detections per image.

        Masked where there is no object. AP is the mean.
        """
        return np.ma.masked_less(self.evaluations[iou_type]["precision"][..., 0, -1], 0)


def evaluate_detections(
    ground_truth: COCO, results: list[dict], *, known: Container[int] | None = None
) -> DetectionScores:
    """COCO's AP and AR of detections (useCats = 1), and VOC's AP50 of their boxes.

    Every image of the ground truth counts, with or without detections. The numbers equal
    pycocotools' for the same results to the last bit. Small, medium and large *masks* are told
    apart by the mask's area, as on COCO's server and in pycocotools for results without boxes
    (given both, `loadRes` takes the box's area).

    Equal scores keep the order of the list within an image; images follow each other by id. Objects
    with a box only do not count for masks; if all are such, masks are not scored.

    Args:
        known: ids of categories that results may be of, if there are more than the ground truth
            has: such results do not count.

    Raises:
        ValueError: a result that cannot be scored (`check_results`); one line with its index.
    """
    given = check_results(results, ground_truth.imgs, known or ground_truth.cats)
    results = [result for result in results if result["category_id"] in ground_truth.cats]
    iou_types = scorable(ground_truth, given)
    dataset = ground_truth.dataset
    regions = {iou_type: [_with_region(r, iou_type) for r in results] for iou_type in iou_types}
    evaluations = {}
    for iou_type, found in regions.items():
        objects = objects_for(iou_type, dataset["annotations"])
        truth = hotcoco.COCO(dataset | {"annotations": objects})
        evaluation = hotcoco.COCOeval(truth, truth.load_res(found), IOU_TYPES[iou_type])
        evaluation.evaluate()
        evaluation.accumulate()
        assert evaluation.eval is not None
        evaluations[iou_type] = {k: np.asarray(evaluation.eval[k]) for k in ("precision", "recall")}
    ids = sorted(ground_truth.cats)
    objects_of = _group_by(dataset["annotations"], "category_id")
    boxes_of = _group_by(regions["box"], "category_id")
    categories = {
        "category_id": ids,
        "category": [ground_truth.cats[i]["name"] for i in ids],
        "annotations": [sum(not o["iscrowd"] for o in objects_of[i]) for i in ids],
        "detections": [len(boxes_of[i]) for i in ids],
    }
    voc_ap50 = np.ma.masked_invalid([voc_ap(objects_of[i], boxes_of[i]) for i in ids])
    return DetectionScores(categories, evaluations, voc_ap50)


def _with_region(result: dict, iou_type: str) -> dict:
    """A result with its box or its mask, not both, so that its area is of the one asked for."""
    keys = {key: result[key] for key in ("image_id", "category_id", "score")}
    if iou_type == "box":
        return keys | {"bbox": box_of(result)}
    return keys | {"segmentation": result["segmentation"]}


def _group_by(items: list[dict], key: str) -> defaultdict[int, list[dict]]:
    groups = defaultdict(list)
    for item in items:
        groups[item[key]].append(item)
    return groups


def voc_ap(objects: list[dict], detections: list[dict]) -> float:
    """AP of one category's boxes, as PASCAL VOC's development kit computes it since 2010.

    Takes objects {"image_id", "bbox" xywh, "iscrowd", "ignore"} and detections {"image_id", "bbox"
    xywh, "score"}; nan if all objects are difficult.

    A detection belongs to the object that it overlaps most, even if that one has been found
    already; COCO would give it the second best. A second detection of an object is false. Difficult
    objects ("ignore" in VOC jsons of COCO's format; crowds as well) may be missed, and their
    detections do not count. AP is the whole area under the precision envelope, not a mean over 101
    recall points.
    """
    num_objects = sum(not _is_difficult(item) for item in objects)
    if not num_objects:
        return float("nan")
    ranked = sorted(detections, key=lambda item: (-item["score"], item["image_id"]))
    indices_of = defaultdict(list)
    for i, detection in enumerate(ranked):
        indices_of[detection["image_id"]].append(i)
    is_true, counts = np.zeros(len(ranked), bool), np.ones(len(ranked), bool)
    for image_id, candidates in _group_by(objects, "image_id").items():
        boxes = [ranked[i]["bbox"] for i in indices_of[image_id]]
        # No crowd rule: VOC's difficult objects are single ones.
        overlaps = mask_utils.iou(boxes, [o["bbox"] for o in candidates], [0] * len(candidates))
        found = set()
        for i, row in zip(indices_of[image_id], overlaps, strict=True):
            best = int(np.argmax(row))
            if row[best] >= VOC_MIN_IOU:
                counts[i] = not _is_difficult(candidates[best])
                is_true[i] = best not in found
                found.add(best)
    true = np.cumsum(is_true[counts])
    precision = true / np.arange(1, len(true) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(true / num_objects, prepend=0) * envelope))


def _is_difficult(item: dict) -> bool:
    return bool(item["iscrowd"] or item["ignore"])
