"""COCO evaluation: the average recall (AR) of class-agnostic proposals, by boxes and by masks.

Overlaps are pycocotools'; matching is COCOeval's, in numpy, one image at a time, so that proposals
can stream from disk. COCOeval and faster-coco-eval give the same recall for a list of numbers of
proposals in one pass (`params.maxDets`), but hold all results in memory and accumulate for each
number separately. AUC needs all numbers from 1 to 1000; here one cumulative sum gives them.

Letters: D proposals and G objects of one image, T IoU thresholds (.50:.05:.95), K numbers of
proposals (1..1000), A area ranges (all, small, medium, large).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO

from datasets.progress import progress_bar
from pipeline.evaluation.ground_truth import AREA_RANGES, AREAS, IOU_THRESHOLDS, objects_for
from pipeline.inference.coco_json import box_of, results_by_image

NUM_PROPOSALS = (10, 100, 1000)  # per image, for which AR is reported
MAX_PROPOSALS = NUM_PROPOSALS[-1]
ALMOST_ONE = 1 - 1e-10  # COCOeval's highest threshold: an IoU of 1 may come out slightly smaller


@dataclass(frozen=True)
class ProposalScores:
    """Recall by IoU type ("box" and/or "mask"): (T, K, A) in [0, 1].

    Row k - 1 of K is the recall of the k best proposals of each image. Masked where no object is in
    the area range.
    """

    recall: dict[str, np.ma.MaskedArray]

    def average_recall(self, iou_type: str) -> np.ma.MaskedArray:
        """AR for each number of proposals, (K, A): recall averaged over the IoU thresholds."""
        return self.recall[iou_type].mean(axis=0)

    def metrics(self) -> dict[str, dict[str, float | None]]:
        """AR@k, AUC and AR by area for each IoU type; None where there is no ground truth.

        AUC is AR averaged over log10 k, k = 1..1000 (trapezoidal rule).
        """
        widths = np.diff(np.log10(np.arange(1, MAX_PROPOSALS + 1)))
        metrics = {}
        for iou_type in self.recall:
            average = self.average_recall(iou_type)
            middles = (average[1:, 0] + average[:-1, 0]) / 2
            values = {f"AR@{k}": average[k - 1, 0] for k in NUM_PROPOSALS}
            values["AUC"] = (widths * middles).sum() / widths.sum()
            for area, value in zip(AREAS[1:], average[-1, 1:], strict=True):
                values[f"AR@{MAX_PROPOSALS}/{area}"] = value
            metrics[iou_type] = {name: value.tolist() for name, value in values.items()}
        return metrics


def evaluate_proposals(
    ground_truth: COCO, results: Iterable[dict], *, iou_types: tuple[str, ...] = ("box", "mask")
) -> ProposalScores:
    """AR of class-agnostic proposals: COCO's evaluation with useCats = 0, crowds ignored.

    Every image of the ground truth counts, with or without proposals. Objects with a box only do
    not count for masks.

    Args:
        results: COCO results, {"image_id", "score", "bbox" xywh, "segmentation" RLE}. Without a
            box, the mask's is taken; masks are needed for "mask" only. Categories are ignored;
            equal scores keep their order. A list may be in any order; any other iterable must give
            one image after the other, and one image is held at a time.

    Raises:
        ValueError: a result names an image that the annotations do not list, or cannot be scored.
    """
    shape = (len(IOU_THRESHOLDS), MAX_PROPOSALS, len(AREAS))
    num_hits = {iou_type: np.zeros(shape, np.int64) for iou_type in iou_types}
    by_image = results_by_image(ground_truth, results, masks="mask" in iou_types)
    total, annotated = len(ground_truth.imgs), ground_truth.dataset["annotations"]
    for image, proposals in progress_bar(by_image, "AR", total=total, unit="image"):
        if not (annotations := ground_truth.imgToAnns.get(image["id"])):
            continue
        # COCOeval goes through the objects by category; the order decides between equal overlaps.
        annotations = sorted(annotations, key=lambda annotation: annotation["category_id"])
        scores = np.array([proposal["score"] for proposal in proposals], float)
        best = [proposals[i] for i in np.argsort(-scores, kind="stable")[:MAX_PROPOSALS]]
        for iou_type in iou_types:
            if objects := objects_for(iou_type, annotations):
                overlaps = _overlaps(ground_truth, best, objects, iou_type)
                num_hits[iou_type][:, : len(best)] += find_hits(overlaps, _countable(objects))
    recall = {}
    for iou_type, hits in num_hits.items():
        num_objects = _countable(objects_for(iou_type, annotated)).sum(axis=1)  # (A,)
        recall[iou_type] = hits.cumsum(axis=1) / np.ma.masked_equal(num_objects, 0)
    return ProposalScores(recall)


def _overlaps(ground_truth: COCO, proposals: list, objects: list, iou_type: str) -> np.ndarray:
    """IoU of each proposal with each object, (D, G)."""
    if iou_type == "box":
        regions = [[box_of(item) for item in items] for items in (proposals, objects)]
    else:
        masks = [proposal["segmentation"] for proposal in proposals]
        regions = [masks, [ground_truth.annToRLE(annotation) for annotation in objects]]
    return mask_utils.iou(*regions, [0] * len(objects))


def _countable(objects: list[dict]) -> np.ndarray:
    """Which objects count in each of COCO's area ranges, (A, G) bool: all there but crowds."""
    areas = np.array([annotation["area"] for annotation in objects], float)
    is_crowd = np.array([annotation["iscrowd"] for annotation in objects], bool)
    return (areas >= AREA_RANGES[:, :1]) & (areas <= AREA_RANGES[:, 1:]) & ~is_crowd


def find_hits(overlaps: np.ndarray, countable: np.ndarray) -> np.ndarray:
    """Which proposals find an object when each, best first, takes the free one it overlaps most.

    From IoUs (D, G), the best proposal first, and the objects that count (A, G), to (T, D, A) bool.

    This is COCOeval.evaluateImg for all IoU thresholds and area ranges at once. Objects that do not
    count can be left out: COCOeval gives them only to proposals that no countable object is left
    for, and does not count these as hits. Between equal overlaps the last object wins. Since
    matching is greedy, the first k columns are the matching of the k best proposals alone.
    """
    thresholds = np.minimum(IOU_THRESHOLDS, ALMOST_ONE)[:, None, None]
    num_proposals, num_objects = overlaps.shape
    hits = np.zeros((len(thresholds), num_proposals + 1, len(countable)), bool)
    # Only proposals that may find an object are looked at. A row of zeros marks their end.
    rows = np.flatnonzero((overlaps >= thresholds.min()).any(axis=1))
    overlaps = np.concatenate([overlaps[rows], np.zeros((1, num_objects))])
    rows, end = np.append(rows, num_proposals), len(rows)
    # The next row, itself included, that may take each object: (T, D + 1, G), `end` if none may.
    indices = np.arange(end + 1, dtype=np.int32)[:, None]
    passing = np.where(overlaps >= thresholds, indices, np.int32(end))
    following = np.minimum.accumulate(passing[:, ::-1], axis=1)[:, ::-1]

    # Go from match to match, at most G of them, for all thresholds and areas in step.
    t, a = np.ogrid[: len(thresholds), : len(countable)]
    free = np.repeat(countable[None], len(thresholds), axis=0)  # (T, A, G)
    current = np.zeros(free.shape[:2], int)  # (T, A), the row that each walk has reached
    while True:
        candidates = np.where(free, following[t, current], end)  # (T, A, G)
        current = candidates.min(axis=-1)
        if (current == end).all():
            return hits[:, :num_proposals]
        reachable = np.where(candidates == current[..., None], overlaps[current], -1)
        taken = num_objects - 1 - reachable[..., ::-1].argmax(axis=-1)  # the last of equal ones
        hits[t, rows[current], a] = True
        free[t, a, taken] = False
        current = np.minimum(current + 1, end)


def rank_by_overlap(ground_truth: COCO, results: Iterable[dict], iou_type: str) -> Iterator[dict]:
    """The same proposals with the scores that a perfect ranking would give them.

    A proposal's score becomes its best IoU with an object of the image (crowds excepted). The one
    that stands for an object gets 1 more: the best-overlapping pairs are taken one after the other,
    each proposal and each object once. Otherwise, near copies of one easy object would outrank all
    other objects. No ranking has a higher recall (all areas) at any IoU threshold and number of
    proposals, as long as no proposal reaches IoU .5 with two objects: true of the masks of disjoint
    objects, nearly true of boxes.

    Takes results and raises errors as `evaluate_proposals`. Yields copies (the masks shared), one
    image after the other.
    """
    for image, proposals in results_by_image(ground_truth, results, masks=iou_type == "mask"):
        annotations = objects_for(iou_type, ground_truth.imgToAnns.get(image["id"], []))
        objects = [annotation for annotation in annotations if not annotation["iscrowd"]]
        if objects:
            free = _overlaps(ground_truth, proposals, objects, iou_type)
            scores = free.max(axis=1)
            while free.max() > 0:
                i, taken = np.unravel_index(np.argmax(free), free.shape)
                scores[i] = 1 + free[i, taken]
                free[i, :] = free[:, taken] = 0
        else:
            scores = np.zeros(len(proposals))
        for proposal, score in zip(proposals, scores.tolist(), strict=True):
            yield proposal | {"score": score}
