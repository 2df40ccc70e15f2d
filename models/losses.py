"""Losses as pure functions of logits and targets; every one is a mean over the batch.

Means make the loss of a batch the mean of the losses of its equal parts, which is what
DistributedDataParallel averages. The papers' sums are weights on these means
(`pipeline/config.py`).
"""

import torch.nn.functional as F
from torch import Tensor

from models.deepmask import resize_mask_logits


def soft_margin(logits: Tensor, targets: Tensor) -> Tensor:
    """log(1 + exp(-y f)) for targets y in {-1, 1}.

    Same shape as the logits, finite for any finite logit.
    """
    return F.softplus(-targets * logits)


def mask_loss(mask_logits: Tensor, targets: Tensor) -> Tensor:
    """Mean soft margin over patches and pixels (NIPS 2015, equation 1, first term).

    Args:
        mask_logits: (B, M, M), resized bilinearly to the targets.
        targets: (B, G, G) in {-1, 1}.
    """
    return soft_margin(resize_mask_logits(mask_logits, targets.shape[-1]), targets).mean()


def score_loss(score_logits: Tensor, labels: Tensor) -> Tensor:
    """Mean soft margin over patches (NIPS 2015, equation 1, second term).

    Args:
        score_logits: (B,).
        labels: (B,) in {-1, 1}.
    """
    return soft_margin(score_logits, labels).mean()
