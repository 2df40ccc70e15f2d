"""COCO evaluation of detections: average precision (AP) and recall (AR), by boxes and by masks.

pycocotools' COCOeval does the matching and makes the summary, a category at a time, so that there
is a progress bar and not everything is held twice. Letters: T IoU thresholds (.50:.05:.95),
P recall points (0:.01:1), C categories, A area ranges (all, small, medium, large), M numbers of
detections an image (1, 10, 100).
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

from pipeline.evaluation.recall import AREAS, IOU_THRESHOLDS, IOU_TYPES
from pipeline.evaluation.voc import all_point_ap
from pipeline.inference.coco_json import box_of, check_results

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR@1", "AR@10", "AR@100")
RECALL_POINTS = Params(iouType="bbox").recThrs  # (P,)
MAX_DETECTIONS = Params(iouType="bbox").maxDets  # (M,)


@dataclass(frozen=True)
class DetectionScores:
    """Precision and recall by IoU threshold, category, area range and number of detections.

    Attributes:
        category_ids: (C,) as in the annotations; category_names: C strings.
        num_objects: (C,) annotations that are not crowds. num_detections: (C,).
        precision: for "box" and, if there are masks, "mask" a (T, P, C, A, M) array;
            recall: likewise (T, C, A, M); -1 where there is no object.
        voc_ap50: (C,) VOC's all-point AP of boxes at IoU .5; nan where there is no object.
    """

    category_ids: np.ndarray
    category_names: list[str]
    num_objects: np.ndarray
    num_detections: np.ndarray
    precision: dict[str, np.ndarray]
    recall: dict[str, np.ndarray]
    voc_ap50: np.ndarray

    def metrics(self) -> dict[str, dict[str, float | None]]:
        """Pycocotools' summary of each kind, by the names in `METRICS`; None if undefined."""
        return {kind: self._metrics_of(kind) for kind in self.precision}

    def _metrics_of(self, kind: str) -> dict[str, float | None]:
        evaluation = COCOeval(iouType=IOU_TYPES[kind])
        evaluation.eval = {"precision": self.precision[kind], "recall": self.recall[kind]}
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation.summarize()
        values = evaluation.stats[: len(METRICS)].tolist()
        return {n: None if v < 0 else v for n, v in zip(METRICS, values, strict=True)}

    def ap_by_iou(self, kind: str) -> np.ndarray:
        """AP over all categories at each IoU threshold, (T,); nan if there is no object."""
        return _mean(self._standard_precision(kind), axis=(1, 2))

    def ap_by_category(self, kind: str) -> np.ndarray:
        """AP of each category, (C,); nan where there is no object. Their mean is AP."""
        return _mean(self._standard_precision(kind), axis=(0, 1))

    def ap50_by_category(self, kind: str) -> np.ndarray:
        """AP at IoU .5 of each category, (C,); nan where there is no object."""
        return _mean(self._standard_precision(kind)[0], axis=0)

    def precision_by_recall(self, kind: str) -> np.ndarray:
        """Mean precision over the categories at each recall point, (T, P); nan if no object."""
        return _mean(self._standard_precision(kind), axis=2)

    def _standard_precision(self, kind: str) -> np.ndarray:
        """All areas, 100 detections an image: (T, P, C)."""
        return self.precision[kind][..., AREAS.index("all"), -1]


def _mean(precision: np.ndarray, axis: int | tuple[int, ...]) -> np.ndarray:
    """The mean of what is defined, i.e. not -1; nan if nothing is."""
    defined = precision > -1
    sums, counts = np.where(defined, precision, 0).sum(axis), defined.sum(axis)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def evaluate_detections(ground_truth: COCO, results: list[dict]) -> DetectionScores:
    """COCO's AP and AR of detections (useCats = 1), and VOC's AP50 of their boxes.

    Every image of the ground truth counts, with or without detections. What pycocotools computes
    for the same results is matched to the last bit; the small, medium and large of *masks* are by
    the mask's area, as on COCO's server and in pycocotools for results without boxes (given both,
    `loadRes` takes the box's area).

    Args:
        ground_truth: from `pipeline.evaluation.recall.load_ground_truth`.
        results: COCO results, see `check_results`. Equal scores keep the order of the list within
            an image; images follow each other by id.

    Raises:
        ValueError: a result that cannot be scored; one line with its place in the list.
    """
    kinds = check_results(results, ground_truth.imgs, ground_truth.cats)
    categories = sorted(ground_truth.cats)
    objects_of = _by_category(ground_truth.dataset["annotations"])
    results_of = _by_category(results)
    shape = (len(IOU_THRESHOLDS), len(categories), len(AREAS), len(MAX_DETECTIONS))
    recall = {kind: np.full(shape, -1.0) for kind in kinds}
    shape = (shape[0], len(RECALL_POINTS), *shape[1:])
    precision = {kind: np.full(shape, -1.0) for kind in kinds}
    voc_ap50 = np.full(len(categories), np.nan)
    progress = tqdm(categories, desc=" and ".join(kinds) + " AP", unit="category", disable=None)
    for c, category_id in enumerate(progress):
        objects = objects_of[category_id]
        for kind in kinds:
            found = _as_annotations(results_of[category_id], ground_truth, kind)
            evaluation = _evaluate(ground_truth, category_id, objects, found, kind)
            precision[kind][:, :, c] = evaluation["precision"][:, :, 0]
            recall[kind][:, c] = evaluation["recall"][:, 0]
            if kind == "box":
                voc_ap50[c] = all_point_ap(objects, found)
    return DetectionScores(
        np.array(categories, np.int64),
        [ground_truth.cats[category_id]["name"] for category_id in categories],
        np.array([sum(not o["iscrowd"] for o in objects_of[c]) for c in categories], np.int64),
        np.array([len(results_of[c]) for c in categories], np.int64),
        precision,
        recall,
        voc_ap50,
    )


def _by_category(items: list[dict]) -> dict[int, list[dict]]:
    groups = defaultdict(list)
    for item in items:
        groups[item["category_id"]].append(item)
    return groups


def _as_annotations(results: list[dict], ground_truth: COCO, kind: str) -> list[dict]:
    """What COCOeval reads of results; `area` says which unmatched ones are not false in a range."""
    annotations = []
    for number, result in enumerate(results, start=1):
        keys = ("image_id", "category_id", "score")
        annotation = {"id": number, "iscrowd": 0} | {key: result[key] for key in keys}
        if kind == "box":
            box = box_of(result)
            annotation |= {"bbox": box, "area": box[2] * box[3]}
        else:
            image = ground_truth.imgs[result["image_id"]]
            rle = {
                "size": [image["height"], image["width"]],
                "counts": result["segmentation"]["counts"],
            }
            annotation |= {"segmentation": rle, "area": float(mask_utils.area(rle))}
        annotations.append(annotation)
    return annotations


def _evaluate(
    ground_truth: COCO, category_id: int, objects: list[dict], found: list[dict], kind: str
) -> dict[str, np.ndarray]:
    """COCOeval's precision and recall of one category; images without it change nothing."""
    image_ids = {item["image_id"] for item in (*objects, *found)}
    images = [ground_truth.imgs[image_id] for image_id in sorted(image_ids)]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(_coco(images, objects), _coco(images, found), IOU_TYPES[kind])
        evaluation.params.catIds = [category_id]
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation.eval


def _coco(images: list[dict], annotations: list[dict]) -> COCO:
    coco = COCO()
    own = [dict(annotation) for annotation in annotations]  # COCOeval writes to them
    coco.dataset = {"images": images, "annotations": own, "categories": []}
    coco.createIndex()
    return coco
