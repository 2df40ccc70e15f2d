"""COCO evaluation of detections: average precision (AP) and recall (AR), by boxes and by masks.

pycocotools' COCOeval does the matching and makes the summary. It is run one category at a time, to
show progress and to bound memory.

Letters: T IoU thresholds (.50:.05:.95), P recall points (0:.01:1), C categories, A area ranges
(all, small, medium, large), M maximum numbers of detections per image (1, 10, 100).
"""

import contextlib
import io
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval, Params
from tqdm import tqdm

from pipeline.evaluation.ground_truth import AREAS, IOU_THRESHOLDS, IOU_TYPES, make_coco
from pipeline.inference.detection_results import box_of, check_results

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR@1", "AR@10", "AR@100")
RECALL_POINTS = Params(iouType="bbox").recThrs  # (P,)
MAX_DETECTIONS = Params(iouType="bbox").maxDets  # (M,)
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
    categories = sorted(ground_truth.cats)
    objects_of = _group_by(ground_truth.dataset["annotations"], "category_id")
    results_of = _group_by(results, "category_id")
    shape = (len(categories), len(AREAS), len(MAX_DETECTIONS))
    recall = {t: np.empty((len(IOU_THRESHOLDS), *shape)) for t in iou_types}
    shape_by_recall = (len(IOU_THRESHOLDS), len(RECALL_POINTS), *shape)
    precision = {t: np.empty(shape_by_recall) for t in iou_types}
    voc_ap50 = np.full(len(categories), np.nan)
    progress = tqdm(categories, " and ".join(iou_types) + " AP", unit="category", disable=None)
    for c, category_id in enumerate(progress):
        objects = objects_of[category_id]
        for iou_type in iou_types:
            detections = _as_annotations(results_of[category_id], iou_type)
            evaluation = _evaluate(ground_truth, category_id, objects, detections, iou_type)
            precision[iou_type][:, :, c] = evaluation["precision"][:, :, 0]
            recall[iou_type][:, c] = evaluation["recall"][:, 0]
            if iou_type == "box":
                voc_ap50[c] = voc_ap(objects, detections)
    return DetectionScores(
        categories,
        [ground_truth.cats[category_id]["name"] for category_id in categories],
        [sum(not o["iscrowd"] for o in objects_of[category_id]) for category_id in categories],
        [len(results_of[category_id]) for category_id in categories],
        precision,
        recall,
        voc_ap50,
    )


def _group_by(items: list[dict], key: str) -> defaultdict[int, list[dict]]:
    groups = defaultdict(list)
    for item in items:
        groups[item[key]].append(item)
    return groups


def _as_annotations(results: list[dict], iou_type: str) -> list[dict]:
    """Results with the keys that COCOeval reads.

    By "area" it leaves unmatched detections of other area ranges out of the false positives.
    """
    annotations = []
    for i, result in enumerate(results, start=1):
        if iou_type == "box":
            box = box_of(result)
            region = {"bbox": box, "area": box[2] * box[3]}
        else:
            rle = result["segmentation"]
            region = {"segmentation": rle, "area": float(mask_utils.area(rle))}
        keys = {key: result[key] for key in ("image_id", "category_id", "score")}
        annotations.append({"id": i, "iscrowd": 0, **keys, **region})
    return annotations


def _evaluate(
    ground_truth: COCO, category_id: int, objects: list[dict], detections: list[dict], iou_type: str
) -> dict[str, np.ndarray]:
    """COCOeval's precision and recall of one category; images without it change nothing."""
    image_ids = sorted({item["image_id"] for item in (*objects, *detections)})
    images = [ground_truth.imgs[image_id] for image_id in image_ids]
    copies = [dict(item) for item in objects]  # COCOeval writes to them
    truth, found = (make_coco(images, items, []) for items in (copies, detections))
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, found, IOU_TYPES[iou_type])
        evaluation.params.catIds = [category_id]
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation.eval


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
