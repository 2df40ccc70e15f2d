"""Non-maximum suppression of masks."""

from dataclasses import replace

import numpy as np
import pycocotools.mask as coco_mask

from pipeline.inference.proposals import Proposals


def mask_nms(proposals: Proposals, iou: float) -> Proposals:
    """Of two proposals whose masks have at least this IoU, in (0, 1], the second is dropped."""
    boxes = proposals.boxes.astype(np.float64)
    areas = np.array([coco_mask.area(proposals.rle(i)) for i in range(len(proposals))], np.float64)
    waiting = np.arange(len(proposals))
    kept = []
    while len(waiting):
        best, waiting = waiting[0], waiting[1:]
        kept.append(int(best))
        # Masks overlap no more than their boxes, nor more than the area of the smaller one: only
        # for the masks that may reach the limit the true overlap is computed.
        sides = np.minimum(boxes[best, 2:], boxes[waiting, 2:])
        sides -= np.maximum(boxes[best, :2], boxes[waiting, :2])
        overlap = np.minimum(sides.clip(min=0).prod(axis=1), areas[waiting]).clip(max=areas[best])
        near = waiting[overlap >= iou * (areas[best] + areas[waiting] - overlap)]
        if len(near):
            ious = coco_mask.iou([proposals.rle(i) for i in near], [proposals.rle(best)], [0])
            waiting = np.setdiff1d(waiting, near[ious[:, 0] >= iou], assume_unique=True)
    return replace(
        proposals,
        logits=proposals.logits[kept],
        boxes=proposals.boxes[kept],
        rles=[proposals.rles[i] for i in kept],
    )
