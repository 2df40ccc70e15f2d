"""From class probabilities and boxes of every RoI to an image's detections.

R: RoIs, C: classes without background, N: candidates (an RoI for a class), D: detections.
"""

import torch
from torch import Tensor
from torchvision.ops import box_iou, nms

Selection = tuple[Tensor, Tensor, Tensor, Tensor]  # what `select_boxes` returns


def select_boxes(
    probabilities: Tensor,
    boxes: Tensor,
    *,
    score_threshold: float,
    nms_iou: float = 0.3,
    max_detections: int = 100,
    vote_iou: float | None = None,
) -> Selection:
    """Greedy NMS within each class, the best over all classes, box voting.

    Boxes without an area (they lay outside of the image and were clipped) are no candidates. Equal
    scores are ordered by class, then by RoI.

    Args:
        probabilities: (R, C + 1) class probabilities; column 0 is the background.
        boxes: (R, C, 4) each RoI's box for each class: decoded, clipped, xyxy in pixels.
        score_threshold: candidates have a higher probability; at least 0.
        nms_iou: a box goes if a better one of its class overlaps it by more.
        max_detections: how many to return at most.
        vote_iou: a detection's box becomes the mean, weighted by score, of its class's candidates
            (those that NMS removed, too) that overlap it by more, itself among them; None for none.

    Returns:
        scores (D,), best first; labels (D,) int64, 0 for column 1; boxes (D, 4);
        roi_index (D,) int64: the row of the RoI, whose proposal's mask is the detection's.
    """
    assert probabilities.shape[1] == boxes.shape[1] + 1 and score_threshold >= 0
    class_scores = probabilities[:, 1:]
    areas = (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(dim=-1)  # (R, C)
    is_candidate = (class_scores > score_threshold) & (areas > 0)
    labels, roi_index = is_candidate.T.nonzero(as_tuple=True)  # (N,) by class, then by RoI
    scores, candidates = class_scores[roi_index, labels], boxes[roi_index, labels]

    kept = _nms_by_class(candidates, scores, labels, nms_iou)
    kept = kept[scores[kept].argsort(descending=True, stable=True)[:max_detections]]  # (D,)
    selected = candidates[kept]
    if vote_iou is not None:
        selected = _vote(selected, labels[kept], candidates, scores, labels, vote_iou)
    return scores[kept], labels[kept], selected, roi_index[kept]


def _nms_by_class(boxes: Tensor, scores: Tensor, labels: Tensor, max_iou: float) -> Tensor:
    """Rows of the boxes that stay: by class, best first.

    Not torchvision's `batched_nms`: up to 1000 boxes it moves the classes apart by a multiple of
    the image's size, where float32 has steps of .01 pixels, and overlaps at the limit change
    sides; above that it does the same loop.
    """
    kept = [labels.new_empty(0)]
    for label in labels.unique().tolist():
        rows = (labels == label).nonzero().squeeze(1)
        rows = rows[scores[rows].argsort(descending=True, stable=True)]
        kept.append(rows[nms(boxes[rows], scores[rows], max_iou)])
    return torch.cat(kept)


def _vote(
    boxes: Tensor,
    box_labels: Tensor,
    candidates: Tensor,
    scores: Tensor,
    labels: Tensor,
    min_iou: float,
) -> Tensor:
    """Weighted means of the candidates that overlap each box, (D, 4)."""
    voted = boxes.clone()
    for label in box_labels.unique().tolist():
        own, voters = box_labels == label, labels == label
        overlaps = box_iou(boxes[own], candidates[voters]) > min_iou
        # In float64: the mean of equal corners is that corner to the bit, within the image.
        weights = overlaps * scores[voters].double()
        means = weights @ candidates[voters].double() / weights.sum(dim=1, keepdim=True)
        voted[own] = means.to(boxes.dtype)
    return voted
