"""COCO evaluation of detections: average precision (AP) and recall (AR), by boxes and by masks.

hotcoco, which gives pycocotools' numbers to the last bit in a fraction of the time, does the
matching; pycocotools makes the summary.

Letters: T IoU thresholds (.50:.05:.95), P recall points (0:.01:1), C categories, A area ranges
(all, small, medium, large), M maximum numbers of detections per image (1, 10, 100).
"""

import contextlib
import io
from collections import defaultdict
from dataclasses import dataclass

import hotcoco
import numpy as np
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval, Params

from pipeline.evaluation.ground_truth import AREAS, IOU_TYPES
from pipeline.inference.coco_json import box_of, check_results

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR@1", "AR@10", "AR@100")
RECALL_POINTS = Params(iouType="bbox").recThrs  # (P,)
VOC_MIN_IOU = 0.5


@dataclass(frozen=True)
class DetectionScores:
    """Precision and recall by IoU threshold, category, area range and number of detections.

    Attributes:
        category_ids, category_names: as in the annotations.
        num_objects, num_detections: of each category; crowds are not objects.
        precision: for "box" and, if there are masks, "mask" a (T, P, C, A, M) array;
            recall: likewise (T, C, A, M); -1 where there is no object.
        voc_ap50: (C,) VOC's AP of boxes at IoU .5; nan where there is no object.
    """

    category_ids: list[int]
    category_names: list[str]
    num_objects: list[int]
    num_detections: list[int]
    precision: dict[str, np.ndarray]
    recall: dict[str, np.ndarray]
    voc_ap50: np.ndarray

    def metrics(self) -> dict[str, dict[str, float | None]]:
        """Pycocotools' summary for each IoU type, named as in `METRICS`; None if undefined."""
        return {iou_type: self._metrics_of(iou_type) for iou_type in self.precision}

    def _metrics_of(self, iou_type: str) -> dict[str, float | None]:
        evaluation = COCOeval(iouType=IOU_TYPES[iou_type])
        evaluation.eval = {"precision": self.precision[iou_type], "recall": self.recall[iou_type]}
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation.summarize()
        values = evaluation.stats[: len(METRICS)].tolist()
        return {n: None if v < 0 else v for n, v in zip(METRICS, values, strict=True)}

    def ap_by_iou(self, iou_type: str) -> np.ndarray:
        """AP over all categories at each IoU threshold, (T,); nan if there is no object."""
        return _mean(self._standard_precision(iou_type), axis=(1, 2))

    def ap_by_category(self, iou_type: str) -> np.ndarray:
        """AP of each category, (C,); nan where there is no object. Their mean is AP."""
        return _mean(self._standard_precision(iou_type), axis=(0, 1))

    def ap50_by_category(self, iou_type: str) -> np.ndarray:
        """AP at IoU .5 of each category, (C,); nan where there is no object."""
        return _mean(self._standard_precision(iou_type)[0], axis=0)

    def precision_by_recall(self, iou_type: str) -> np.ndarray:
        """Mean precision over the categories at each recall point, (T, P); nan if no object."""
        return _mean(self._standard_precision(iou_type), axis=2)

    def mean_voc_ap50(self) -> float | None:
        """VOC's mean AP50 over the categories that have objects; None if none has."""
        defined = self.voc_ap50[~np.isnan(self.voc_ap50)]
        return float(defined.mean()) if defined.size else None

    def _standard_precision(self, iou_type: str) -> np.ndarray:
        """All areas, 100 detections per image: (T, P, C)."""
        return self.precision[iou_type][..., AREAS.index("all"), -1]


def _mean(precision: np.ndarray, axis: int | tuple[int, ...]) -> np.ndarray:
    """The mean of the defined values, those that are not -1; nan if none is."""
    defined = precision > -1
    sums, counts = np.where(defined, precision, 0).sum(axis), defined.sum(axis)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def evaluate_detections(ground_truth: COCO, results: list[dict]) -> DetectionScores:
    """COCO's AP and AR of detections (useCats = 1), and VOC's AP50 of their boxes.

    Every image of the ground truth counts, with or without detections. The numbers equal
    pycocotools' for the same results to the last bit. Small, medium and large *masks* are told
    apart by the mask's area, as on COCO's server and in pycocotools for results without boxes
    (given both, `loadRes` takes the box's area).

    Args:
        ground_truth: from `load_ground_truth`.
        results: COCO results, see `check_results`. Equal scores keep the order of the list within
            an image; images follow each other by id.

    Raises:
        ValueError: a result that cannot be scored; one line with its index in the list.
    """
    iou_types = check_results(results, ground_truth.imgs, ground_truth.cats)
    truth = hotcoco.COCO(ground_truth.dataset)
    precision, recall = {}, {}
    for iou_type in iou_types:
        # With one kind of region, so that areas are of boxes or of masks as asked for.
        found = truth.load_res([_with_region(result, iou_type) for result in results])
        evaluation = hotcoco.COCOeval(truth, found, IOU_TYPES[iou_type])
        evaluation.evaluate()
        evaluation.accumulate()
        precision[iou_type] = np.asarray(evaluation.eval["precision"])
        recall[iou_type] = np.asarray(evaluation.eval["recall"])
    categories = sorted(ground_truth.cats)
    objects_of = _group_by(ground_truth.dataset["annotations"], "category_id")
    boxes_of = _group_by([_with_region(result, "box") for result in results], "category_id")
    return DetectionScores(
        categories,
        [ground_truth.cats[category_id]["name"] for category_id in categories],
        [sum(not o["iscrowd"] for o in objects_of[category_id]) for category_id in categories],
        [len(boxes_of[category_id]) for category_id in categories],
        precision,
        recall,
        np.array([voc_ap(objects_of[c], boxes_of[c]) for c in categories]),
    )


def _with_region(result: dict, iou_type: str) -> dict:
    """A result with its box or its mask, not both."""
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

    A detection belongs to the object that it overlaps most, even if that one has been found
    already; COCO would give it the second best. A second detection of an object is false. Difficult
    objects ("ignore" in VOC jsons of COCO's format; crowds as well) may be missed, and their
    detections do not count. AP is the whole area under the precision envelope, not a mean over 101
    recall points.

    Args:
        objects: {"image_id", "bbox" xywh, "iscrowd", "ignore"}.
        detections: {"image_id", "bbox" xywh, "score"}.

    Returns:
        AP in [0, 1]; nan if all objects are difficult.
    """
    num_objects = sum(not _is_difficult(item) for item in objects)
    if not num_objects:
        return float("nan")
    ranked = sorted(detections, key=lambda item: (-item["score"], item["image_id"]))
    verdicts = _voc_verdicts(objects, ranked)
    true = np.cumsum(verdicts[verdicts >= 0])
    precision = true / np.arange(1, len(true) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(true / num_objects, prepend=0) * envelope))


def _is_difficult(item: dict) -> bool:
    return bool(item["iscrowd"] or item["ignore"])


def _voc_verdicts(objects: list[dict], ranked: list[dict]) -> np.ndarray:
    """For each detection 1 if it is true, 0 if it is false, -1 if it does not count, (D,)."""
    indices_of = defaultdict(list)
    for i, detection in enumerate(ranked):
        indices_of[detection["image_id"]].append(i)
    verdicts = np.zeros(len(ranked), int)
    for image_id, candidates in _group_by(objects, "image_id").items():
        boxes = [ranked[i]["bbox"] for i in indices_of[image_id]]
        # No crowd rule: VOC's difficult objects are single ones.
        overlaps = mask_utils.iou(boxes, [o["bbox"] for o in candidates], [0] * len(candidates))
        found = set()
        for i, row in zip(indices_of[image_id], overlaps, strict=True):
            best = int(np.argmax(row))
            if row[best] < VOC_MIN_IOU:
                continue
            if _is_difficult(candidates[best]):
                verdicts[i] = -1
            elif best not in found:
                verdicts[i] = 1
                found.add(best)
    return verdicts
