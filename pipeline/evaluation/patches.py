"""Patch metrics: how good masks and scores are on single patches (NIPS 2015, section 5)."""

import torch
from torch import Tensor, nn

from datasets.loading import rank_samples
from datasets.patch_sampler import MASK, SCORE
from datasets.patches import PatchDataset
from models.losses import mask_ious
from pipeline import distributed
from pipeline.data import device_batches

VALIDATION_SEED = 20151207  # validation patches are the same in every run


@torch.inference_mode()
def evaluate_patches(
    model: nn.Module,
    data: PatchDataset,
    device: torch.device,
    *,
    heads: list[str],
    batch_size: int,
    workers: int,
) -> dict[str, float]:
    """Metrics of a DeepMask or SharpMask over the first minibatches of `batch_size` patches.

    `heads` has "mask" or "score" for each of them, see `validation_heads`. The processes share
    them; each gets the result of all.
    """
    model.eval()
    groups = max(1, batch_size // data.group_size)
    batches = range(distributed.rank(), len(heads), distributed.world_size())
    indices = [[(heads[b], 0, group) for group in rank_samples(b, groups)] for b in batches]
    ious, hits = [torch.empty(0)], [torch.empty(0, dtype=torch.bool)]
    for batch in device_batches(data, indices, device, workers=workers):
        if "targets" in batch:
            logits = model(batch["patches"], head=MASK)["mask_logits"]
            ious.append(mask_ious(logits, batch["targets"]).cpu())
        else:
            logits = model(batch["patches"], head=SCORE)["score_logits"]
            hits.append(((logits > 0) == (batch["labels"] > 0)).cpu())
    parts = distributed.gather((torch.cat(ious), torch.cat(hits)))
    return patch_metrics(*map(torch.cat, zip(*parts, strict=True)))


def validation_heads(batches: int, mask_batch_prob: float = 0.5) -> list[str]:
    """Heads of the validation minibatches: in turn, or all "mask" if no scores are trained."""
    return [MASK if mask_batch_prob == 1 or b % 2 == 0 else SCORE for b in range(batches)]


def patch_metrics(ious: Tensor, hits: Tensor) -> dict[str, float]:
    """Metrics by name, from IoUs of masks and which scores have the sign of their label.

    Those without any patch are left out.
    """
    metrics = {}
    if len(ious):
        metrics = {
            "mean_iou": ious.mean(),
            "median_iou": ious.median(),
            "iou_above_0.5": (ious > 0.5).float().mean(),
            "iou_above_0.7": (ious > 0.7).float().mean(),
        }
    if len(hits):
        metrics["score_accuracy"] = hits.float().mean()
    return {name: float(value) for name, value in metrics.items()}
