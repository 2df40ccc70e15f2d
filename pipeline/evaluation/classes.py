"""Validation of a classifier."""

import torch
import torch.nn.functional as F

from datasets.crops import CropDataset
from models.classifier import Classifier
from pipeline import distributed
from pipeline.data import device_batches

CROP_VALIDATION_SEED = 20151210  # validation crops are the same in every run


@torch.inference_mode()
def evaluate_classes(
    model: Classifier,
    data: CropDataset,
    device: torch.device,
    *,
    limit: int,
    batch_size: int,
    workers: int,
) -> dict[str, float]:
    """Mean loss, top-1 error and accuracy over all crops of a data set, or over `limit` of them.

    The processes share the minibatches; each gets the result of all.
    """
    model.eval()
    count = min(limit, len(data.crops))
    batches = [
        [(None, 0, i) for i in range(start, min(start + batch_size, count))]
        for start in range(0, count, batch_size)
    ]
    batches_of_rank = batches[distributed.rank() :: distributed.world_size()]
    loss = torch.zeros((), dtype=torch.float64)
    wrong = 0
    for batch in device_batches(data, batches_of_rank, device, workers=workers):
        logits = model(batch["images"])
        loss += F.cross_entropy(logits, batch["labels"], reduction="sum").cpu()
        wrong += int((logits.argmax(1) != batch["labels"]).sum())
    sums = torch.tensor(distributed.gather((float(loss), wrong))).sum(0) / count
    return {"loss": float(sums[0]), "error": float(sums[1]), "accuracy": 1 - float(sums[1])}
