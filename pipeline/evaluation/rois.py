"""Validation of a detector: the classes of sampled RoIs, and AP on a sample of the images."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from datasets.remote import is_uri
from datasets.rois import RoiDataset
from models.multipathnet import MultiPathNet
from pipeline import distributed
from pipeline.data import device_batches
from pipeline.evaluation.ground_truth import load_ground_truth
from pipeline.evaluation.precision import evaluate_detections
from pipeline.inference.detect import Detector
from pipeline.inference.detect_folders import detect_in_part
from pipeline.inference.proposal_store import Part, ProposalStore
from pipeline.inference.proposals import results_of

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


def sample_ap(
    detector: Detector,
    store: ProposalStore,
    annotations: Path,
    images: Path,
    *,
    image_ids: set[int],
    num_images: int,
    chosen: Iterable[str] | None = None,
) -> float | None:
    """COCO's AP of boxes in the first images of a store; None without an object in them.

    The processes share the images; each gets the result of all.

    Args:
        images: the folder of the store's file names, where the store does not know a folder that
            is there.
        image_ids: those of the annotations; others in the store do not count.
        num_images: at least; whole parts of shards are taken.
        chosen: the categories that the detector was trained on, see `CocoInstances.load`.
    """
    store.require_shards()
    folder = store.settings().get("image_folder")
    if folder is None or not (is_uri(folder) or Path(folder).is_dir()):
        folder = images
    parts: list[Part] = []
    ids: set[int] = set()
    for part in store.parts():
        in_part = image_ids & {image["id"] for image in store.images_of(part)}
        if in_part and len(ids) < num_images:
            parts.append(part)
            ids |= in_part
    found: list[dict] = []
    broken: list[str] = []
    for part in parts[distributed.rank() :: distributed.world_size()]:
        for _, detections in detect_in_part(detector, store, part, folder, broken=broken):
            if detections.image_id in ids:
                found += results_of(replace(detections, rles=[]))  # boxes will do
    results = [result for of_rank in distributed.gather(found) for result in of_rank]
    messages = [message for of_rank in distributed.gather(broken) for message in of_rank]
    if len(messages) >= len(ids):
        raise ValueError(f"no image of {store.directory} can be used; the first: {messages[0]}")
    ground_truth = load_ground_truth(
        annotations, ids, chosen=chosen, categories=detector.category_names
    )
    scores = evaluate_detections(ground_truth, results)
    return scores.metrics().get("box", {}).get("AP")
