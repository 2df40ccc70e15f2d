"""COCO evaluation: the average recall (AR) of class-agnostic proposals, by boxes and by masks.

Overlaps are pycocotools', matching is COCOeval's in numpy; one image at a time, and only the counts
are kept. (faster-coco-eval matches in C++ but wants all results in memory as dicts, and recall for
every number of proposals only by evaluating each anew.)
Letters: T IoU thresholds (.50:.05:.95), K numbers of proposals (1, 2, 3, ...), A area ranges
(all, small, medium, large), D proposals and G annotated objects of one image.
"""

import contextlib
import io
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import Params
from tqdm import tqdm

from datasets.coco import CocoInstances
from pipeline.evaluation.greedy_matching import find_hits
from pipeline.inference.coco_json import results_by_image

IOU_TYPES = {"box": "bbox", "mask": "segm"}
IOU_THRESHOLDS = Params(iouType="bbox").iouThrs  # (T,)
AREA_RANGES = np.array(Params(iouType="bbox").areaRng)  # (A, 2) px², both ends included
AREAS = tuple(Params(iouType="bbox").areaRngLbl)
AUC_PROPOSALS = 1000  # AUC is the mean AR over 1..1000 proposals, whatever else is evaluated

logger = logging.getLogger(__name__)


def load_ground_truth(annotations: str | Path) -> COCO:
    """Read a COCO instances json for evaluation, without pycocotools' chatter.

    Read and checked as for training: what `CocoInstances` cannot use is left out, and named in one
    logged warning; missing `area`, `bbox` and `iscrowd` are filled in. Segmentations are compressed
    RLE and annotation ids are new, from 1 (COCOeval takes a match with id 0 for none).

    Raises:
        ValueError: the file is missing or is not COCO instances json.
    """
    try:
        instances = CocoInstances.load(annotations)
    except OSError as error:
        raise ValueError(f"{annotations}: cannot be read: {error.strerror}") from None
    if instances.left_out:
        logger.warning(instances.summary())
    images = [
        {"id": image_id, "file_name": instances.file_name(i), "height": size[0], "width": size[1]}
        for i, (image_id, size) in enumerate(
            zip(instances.image_ids.tolist(), instances.image_sizes.tolist(), strict=True)
        )
    ]
    names = zip(instances.category_ids.tolist(), instances.category_names, strict=True)
    categories = [{"id": category_id, "name": name} for category_id, name in names]
    return _indexed(
        {"images": images, "categories": categories, "annotations": _annotations(instances)}
    )


def _annotations(instances: CocoInstances) -> list[dict]:
    columns = {
        "image_id": instances.image_ids[instances.image_index],
        "category_id": instances.category_ids[instances.category_index],
        "iscrowd": instances.is_crowd.astype(int),
        "ignore": instances.is_difficult.astype(int),  # VOC's AP asks for it, COCOeval does not
        "area": instances.areas,
        "bbox": _as_xywh(instances.boxes),
    }
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    return [
        {"id": a + 1, "segmentation": instances.rle(a)} | dict(zip(columns, row, strict=True))
        for a, row in enumerate(rows)
    ]


def _as_xywh(boxes: np.ndarray) -> np.ndarray:
    """float32 xyxy -> float64 xywh with the json's decimals (up to three) to the last bit.

    The last bit decides whether an IoU that lies on a threshold, as of whole numbers, passes it.
    """
    corners = boxes.astype(np.float64)
    xywh = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
    is_decimal = (corners.round(3).astype(np.float32) == boxes).all(axis=1, keepdims=True)
    return np.where(is_decimal, xywh.round(3), xywh)


def _indexed(dataset: dict) -> COCO:
    coco = COCO()
    coco.dataset = dataset
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


@dataclass(frozen=True)
class ProposalScores:
    """Recall of proposals by IoU threshold, number of proposals and area range.

    Attributes:
        iou_thresholds: (T,) .50, .55, ... .95.
        counts: (K,) numbers of proposals an image, 1, 2, 3, ... K; K is at least 1000.
        recall: for "box" and/or "mask" a (T, K, A) array in [0, 1], A in the order of `AREAS`;
            nan where the ground truth has no object in the area range.
        max_proposals: the numbers of proposals that `metrics` reports.
    """

    iou_thresholds: np.ndarray
    counts: np.ndarray
    recall: dict[str, np.ndarray]
    max_proposals: tuple[int, ...]

    def average_recall(self, kind: str, area: str = "all") -> np.ndarray:
        """AR for each number of proposals, (K,): recall averaged over the IoU thresholds."""
        return self.recall[kind][:, :, AREAS.index(area)].mean(axis=0)

    def metrics(self) -> dict[str, dict[str, float | None]]:
        """AR@k, AUC and AR by area for each kind; None where there is no ground truth.

        AUC is AR averaged over log10 k, k = 1..1000: the trapezoids between all whole k.
        """
        return {kind: self._metrics_of(kind) for kind in self.recall}

    def _metrics_of(self, kind: str) -> dict[str, float | None]:
        average = self.average_recall(kind)
        values = {f"AR@{k}": average[k - 1] for k in self.max_proposals}
        values["AUC"] = _log_average(self.counts[:AUC_PROPOSALS], average[:AUC_PROPOSALS])
        most = max(self.max_proposals)
        for area in AREAS[1:]:
            values[f"AR@{most}/{area}"] = self.average_recall(kind, area)[most - 1]
        return {name: None if np.isnan(value) else float(value) for name, value in values.items()}


def _log_average(counts: np.ndarray, values: np.ndarray) -> float:
    widths = np.diff(np.log10(counts))
    return np.sum(widths * (values[1:] + values[:-1]) / 2) / np.sum(widths)


def evaluate_proposals(
    ground_truth: COCO,
    results: Iterable[dict],
    *,
    kinds: tuple[str, ...] = ("box", "mask"),
    max_proposals: tuple[int, ...] = (10, 100, 1000),
) -> ProposalScores:
    """AR of class-agnostic proposals: COCO's evaluation with useCats = 0, crowds ignored.

    Every image of the ground truth counts, with or without proposals.

    Args:
        ground_truth: from `load_ground_truth`.
        results: COCO results, {"image_id", "score", "bbox" xywh, "segmentation" RLE}, of which
            boxes may be left out (then the mask's is taken) and masks if `kinds` has none.
            Categories are ignored; equal scores keep their order. A list may be in any order; any
            other iterable must give one image after the other, and one image is held at a time.
        kinds: what to match by, "box" and/or "mask".
        max_proposals: the numbers of best proposals an image to report AR for.

    Raises:
        ValueError: a result names an image that the annotations do not list, or cannot be scored.
    """
    assert set(kinds) <= set(IOU_TYPES) and min(max_proposals) >= 1
    most = max(AUC_PROPOSALS, *max_proposals)
    shape = (len(IOU_THRESHOLDS), most, len(AREAS))
    found = {kind: np.zeros(shape, np.int64) for kind in kinds}
    progress = tqdm(desc="AR", total=len(ground_truth.imgs), unit="image", disable=None)
    for image, proposals in results_by_image(ground_truth, results, masks="mask" in kinds):
        if ground_truth.imgToAnns.get(image["id"]):
            for kind in kinds:
                hits = _match(image, ground_truth, proposals, kind, most)
                found[kind][:, : hits.shape[1]] += hits
        progress.update()
    progress.close()
    num_objects = _count_objects(ground_truth)  # (A,)
    with np.errstate(invalid="ignore"):  # 0 / 0 = nan: no object in this area range
        recall = {kind: np.cumsum(hits, axis=1) / num_objects for kind, hits in found.items()}
    return ProposalScores(IOU_THRESHOLDS, np.arange(1, most + 1), recall, tuple(max_proposals))


def _count_objects(ground_truth: COCO) -> np.ndarray:
    """How many objects that are not crowds there are in each area range, (A,)."""
    annotations = ground_truth.dataset["annotations"]
    areas = np.array([a["area"] for a in annotations if not a["iscrowd"]], float)
    return _in_ranges(areas).sum(axis=1)


def _match(image: dict, ground_truth: COCO, proposals: list, kind: str, most: int) -> np.ndarray:
    """Which proposals of one image find an object: (T, min(D, most), A) bool, best score first.

    Matching is greedy in the order of scores, so the first k columns are the matching of the k
    best proposals alone: one pass gives the recall for every k.
    """
    # COCOeval walks through the objects by category; the order decides between equal overlaps.
    annotations = ground_truth.imgToAnns[image["id"]]
    objects = sorted(annotations, key=lambda annotation: annotation["category_id"])
    scores = np.array([proposal["score"] for proposal in proposals], float)
    best = np.argsort(-scores, kind="stable")[:most]
    overlaps = _overlaps(ground_truth, [proposals[rank] for rank in best], objects, kind)
    areas = np.array([annotation["area"] for annotation in objects], float)
    is_crowd = np.array([annotation["iscrowd"] for annotation in objects], bool)
    return find_hits(overlaps, _in_ranges(areas) & ~is_crowd, IOU_THRESHOLDS)


def _in_ranges(areas: np.ndarray) -> np.ndarray:
    """Which of G areas lie in each of COCO's ranges, (A, G) bool."""
    return (areas >= AREA_RANGES[:, :1]) & (areas <= AREA_RANGES[:, 1:])


def _box(result: dict) -> list[float]:
    """A result's box, xywh; that of its mask if it has none."""
    box = result.get("bbox")
    return list(mask_utils.toBbox(result["segmentation"]) if box is None else box)


def rank_by_overlap(ground_truth: COCO, results: Iterable[dict], kind: str) -> Iterator[dict]:
    """The same proposals with the scores that a perfect ranking would give them.

    A proposal's new score is its best IoU, by `kind`, with the image's objects (crowds excepted),
    plus 1 for the one proposal that stands for an object: the best-overlapping pairs are taken one
    after the other, each proposal and each object once. Without the 1, ten near copies of one easy
    object would outrank all other objects. With it, no ranking has a higher recall (all areas) at
    any IoU threshold and number of proposals, so long as no proposal reaches IoU .5 with two
    objects: true of the masks of disjoint objects, nearly true of boxes.

    Args:
        results: as for `evaluate_proposals`.

    Yields:
        Copies of the results (the masks shared), one image after the other.

    Raises:
        ValueError: as `evaluate_proposals`.
    """
    for image, proposals in results_by_image(ground_truth, results, masks=kind == "mask"):
        annotations = ground_truth.imgToAnns.get(image["id"], [])
        objects = [annotation for annotation in annotations if not annotation["iscrowd"]]
        scores = np.zeros(len(proposals))
        if objects:
            scores = _perfect_scores(_overlaps(ground_truth, proposals, objects, kind))
        for proposal, score in zip(proposals, scores.tolist(), strict=True):
            yield proposal | {"score": score}


def _overlaps(ground_truth: COCO, proposals: list, objects: list, kind: str) -> np.ndarray:
    """IoU of each proposal with each object, (D, G)."""
    if kind == "box":
        regions = [[_box(item) for item in items] for items in (proposals, objects)]
    else:
        own = [proposal["segmentation"] for proposal in proposals]
        regions = own, [ground_truth.annToRLE(annotation) for annotation in objects]
    return mask_utils.iou(*regions, [0] * len(objects))


def _perfect_scores(overlaps: np.ndarray) -> np.ndarray:
    """Best IoU of each proposal, plus 1 for those that stand for an object: (D, G) -> (D,)."""
    scores = overlaps.max(axis=1)
    free = overlaps.copy()
    for _ in range(min(free.shape)):
        proposal, taken = np.unravel_index(np.argmax(free), free.shape)
        if free[proposal, taken] <= 0:
            break
        scores[proposal] = 1 + free[proposal, taken]
        free[proposal, :] = free[:, taken] = 0
    return scores
