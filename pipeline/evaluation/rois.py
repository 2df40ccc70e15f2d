"""RoI metrics: how many sampled proposals get the right class."""

import torch
from torch import Tensor

from datasets.rois import RoiDataset
from models.multipathnet import MultiPathNet
from pipeline import distributed
from pipeline.data import device_batches

ROI_VALIDATION_SEED = 20160914  # validation RoIs are the same in every run


@torch.inference_mode()
def evaluate_rois(
    model: MultiPathNet,
    data: RoiDataset,
    device: torch.device,
    *,
    batches: int,
    batch_size: int,
    workers: int,
) -> dict[str, float]:
    """RoI metrics over the first `batches` minibatches, of `batch_size` images, of a dataset.

    The processes share the minibatches; each gets the result of all. "roi_accuracy" is the mean of
    the accuracies on foreground (IoU >= the lowest threshold) and background: guessing background
    for all RoIs gives 0.5.
    """
    model.eval()
    indices = data.batches(range(batches), batches_per_epoch=batches, batch_size=batch_size)
    indices_of_rank = list(indices)[distributed.rank() :: distributed.world_size()]
    hits = [torch.empty(0, 2, dtype=torch.bool)]
    for batch in device_batches(data, indices_of_rank, device, workers=workers):
        logits = model(batch["images"], batch["rois"])["class_logits"]
        predicted = logits.softmax(-1).mean(1).argmax(-1)
        labels = batch["labels"].amax(0)
        known = labels >= 0
        hits.append(torch.stack([predicted == labels, labels > 0], 1)[known].cpu())
    return roi_metrics(torch.cat([h for part in distributed.gather(hits) for h in part]))


def roi_metrics(hits: Tensor) -> dict[str, float]:
    """From (N, 2) bool: is correct, is foreground. Accuracies without any RoI are left out."""
    is_correct, is_foreground = hits.unbind(1)
    groups = {"foreground_accuracy": is_foreground, "background_accuracy": ~is_foreground}
    accuracies = {
        name: float(is_correct[rows].float().mean()) for name, rows in groups.items() if rows.any()
    }
    if not accuracies:
        return {}
    return {"roi_accuracy": sum(accuracies.values()) / len(accuracies), **accuracies}
