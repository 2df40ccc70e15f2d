"""Patch metrics: how good masks and scores are on single patches.

NIPS 2015, section 5; the released code.
"""

import torch
from torch import Tensor

from models.deepmask import resize_mask_logits


def mask_ious(mask_logits: Tensor, targets: Tensor) -> Tensor:
    """IoU of each predicted mask, binarized at probability .5, with its target.

    Args:
        mask_logits: (B, M, M). targets: (B, G, G) in {-1, 1}.

    Returns:
        (B,); 1 where both are empty.
    """
    predicted = resize_mask_logits(mask_logits, targets.shape[-1]) > 0
    truth = targets > 0
    intersection = (predicted & truth).flatten(1).sum(1)
    union = (predicted | truth).flatten(1).sum(1)
    return torch.where(union > 0, intersection / union.clamp(min=1), 1.0)


def score_hits(score_logits: Tensor, labels: Tensor) -> Tensor:
    """Whether the sign of each score is right: (B,) bool."""
    return (score_logits > 0) == (labels > 0)


def summarize(ious: Tensor, hits: Tensor) -> dict[str, float]:
    """The table's row; a metric without a patch to measure it on is left out."""
    row = {}
    if len(ious):
        row = {
            "mean_iou": ious.mean(),
            "median_iou": ious.median(),
            "iou_above_0.5": (ious > 0.5).float().mean(),
            "iou_above_0.7": (ious > 0.7).float().mean(),
        }
    if len(hits):
        row["score_accuracy"] = hits.float().mean()
    return {name: float(value) for name, value in row.items()}
