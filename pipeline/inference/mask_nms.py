"""Non-maximum suppression of proposals by the IoU of their masks, computed on RLE."""

from dataclasses import replace

import numpy as np
import pycocotools.mask as coco_mask

from pipeline.inference.proposals import Proposals


def suppress_duplicates(proposals: Proposals, iou: float) -> Proposals:
    """The proposals without those that overlap a better one.

    Args:
        iou: mask IoU from which on the one with the lower score is dropped, in (0, 1].
    """
    boxes = proposals.boxes.astype(np.float64)
    areas = np.array([coco_mask.area(proposals.rle(n)) for n in range(len(proposals))], np.float64)
    left = np.arange(len(proposals))
    kept = []
    while len(left):
        best, left = left[0], left[1:]
        kept.append(int(best))
        # Masks overlap no more than their boxes do, nor more than the smaller of them holds.
        shared = np.minimum(
            _shared_area(boxes[best], boxes[left]), np.minimum(areas[best], areas[left])
        )
        near = left[shared >= iou * (areas[best] + areas[left] - shared)]
        if len(near):
            overlaps = coco_mask.iou([proposals.rle(n) for n in near], [proposals.rle(best)], [0])[
                :, 0
            ]
            left = np.setdiff1d(left, near[overlaps >= iou], assume_unique=True)
    return replace(
        proposals,
        scores=proposals.scores[kept],
        boxes=proposals.boxes[kept],
        counts=[proposals.counts[n] for n in kept],
    )


def _shared_area(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Area that a box (4,) has in common with boxes (n, 4): (n,) px."""
    sides = np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])
    return sides.clip(min=0).prod(axis=1)
