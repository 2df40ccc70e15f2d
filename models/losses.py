"""Losses as pure functions of logits and targets; every one is a mean over the batch.

Means make the loss of a batch the mean of the losses of its equal parts, over which training
averages gradients. RoIs and cells that are no samples make parts unequal: their losses take the
numbers to divide by. The papers' sums are weights on these means (`pipeline/config.py`).

All are computed in float32, whatever the type of the logits. Autocast does not see to that: the
cross entropy takes the log of the softmax in the type of its input.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from models.deepmask import resize_mask_logits


def soft_margin(logits: Tensor, targets: Tensor) -> Tensor:
    """log(1 + exp(-y f)) for each logit f and target y in {-1, 1}; finite for any finite f."""
    return F.softplus(-targets * logits.float())


def mask_loss(mask_logits: Tensor, targets: Tensor) -> Tensor:
    """Mean soft margin of logits (B, M, M), resized bilinearly to targets (B, G, G) in {-1, 1}.

    NIPS 2015, equation 1, first term.
    """
    return soft_margin(resize_mask_logits(mask_logits.float(), targets.shape[-1]), targets).mean()


def score_loss(score_logits: Tensor, labels: Tensor) -> Tensor:
    """Mean soft margin of logits (B,), labels in {-1, 1} (NIPS 2015, equation 1, second term)."""
    return soft_margin(score_logits, labels).mean()


def count_cells(labels: Tensor) -> Tensor:
    """Of the labels of cells, see `cell_score_loss`: how many are of an object, how many of none.

    In training, that loss divides by the mean of these over all parts of the minibatch.
    """
    return torch.stack([(labels > 0).sum(), (labels < 0).sum()]).float()


def cell_score_loss(
    logits: Tensor, labels: Tensor, counts: Tensor, ious: Tensor | None = None
) -> Tensor:
    """Cross entropy of cells: the mean of those at objects and the mean of the others, halved.

    Args:
        logits: (B, n, n).
        labels: (B, n, n): 1 at an object, -1 at none, 0 does not count.
        counts: (2,), see `count_cells`.
        ious: (k,), what the cells labeled 1 are to learn, in their order; 1 by default.
    """
    targets = (labels > 0).float()
    if ious is not None:
        targets[labels > 0] = ious
    losses = F.binary_cross_entropy_with_logits(logits.float(), targets, reduction="none")
    means = [
        (losses * chosen).sum() / count.where(count > 0, 1)
        for chosen, count in zip((labels > 0, labels < 0), counts, strict=True)
    ]
    return 0.5 * (means[0] + means[1])


def mask_ious(
    mask_logits: Tensor, targets: Tensor, *, threshold: float = 0.5, areas: Tensor | None = None
) -> Tensor:
    """IoU (B,) of masks, probabilities above a threshold, with targets; 1 where both are empty.

    Args:
        mask_logits: (B, M, M), resized to the targets.
        targets: (B, G, G), above 0 where the object is.
        areas: (B,) of the objects with what reaches beyond the patch, in pixels of the targets.
    """
    logit, truth = math.log(threshold / (1 - threshold)), targets > 0
    masks = resize_mask_logits(mask_logits.float(), targets.shape[-1]) > logit
    intersections = (masks & truth).sum((1, 2))
    inside = truth.sum((1, 2))
    whole = inside if areas is None else torch.maximum(areas, inside)
    unions = masks.sum((1, 2)) + whole - intersections
    return torch.where(unions > 0, intersections / unions.clamp(min=1), 1.0)


def count_samples(labels: Tensor) -> Tensor:
    """Of labels (K, R): how many samples each classifier has, and how many RoIs are any's (K + 1).

    In training, the losses below divide by the mean of these over all parts of the minibatch.
    """
    samples = labels >= 0
    return torch.cat([samples.sum(1), samples.any(0).sum(0, keepdim=True)]).float()


def integral_loss(class_logits: Tensor, labels: Tensor, samples: Tensor) -> Tensor:
    """Mean of the cross entropies of the K classifiers, each over its own samples (BMVC 2016, 3.3).

    With one threshold drawn for the minibatch, the classifiers without samples do not count, which
    is an unbiased estimate of the mean over all. K = 1 is the usual softmax loss.

    Args:
        class_logits: (R, K, C + 1).
        labels: (K, R) int64: 0 background, c + 1 class c, -1 no sample.
        samples: (K,) of each classifier, see `count_samples`.
    """
    losses = F.cross_entropy(
        class_logits.float().permute(1, 2, 0), labels, ignore_index=-1, reduction="none"
    )  # (K, R)
    counted = samples > 0
    means = losses.sum(1) / samples.where(counted, 1)
    return means.sum() / counted.sum().clamp(min=1)


def box_loss(deltas: Tensor, targets: Tensor, labels: Tensor, rois: Tensor) -> Tensor:
    """Smooth L1 of the labeled class's deltas: sum over foreground RoIs / number of RoIs.

    Args:
        deltas: (R, C + 1, 4) and targets: (R, 4), both normalized.
        labels: (K, R), see `integral_loss`; a RoI is foreground if it is for any threshold.
        rois: scalar, how many there are, see `count_samples`.
    """
    classes = labels.amax(0)
    foreground = torch.nonzero(classes > 0).flatten()
    errors = F.smooth_l1_loss(
        deltas[foreground, classes[foreground]].float(), targets[foreground], reduction="sum"
    )
    return errors / rois.where(rois > 0, 1)
