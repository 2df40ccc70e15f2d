"""Scores as files and tables: metrics.json for programs, scores.txt for people."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from pycocotools.coco import COCO

from datasets.coco import CocoInstances
from datasets.files import write_atomically, write_json
from pipeline import distributed
from pipeline.data import patch_dataset
from pipeline.evaluation.patches import VALIDATION_SEED, evaluate_patches, validation_heads
from pipeline.evaluation.recall import (
    ProposalScores,
    evaluate_proposals,
    load_ground_truth,
    rank_by_overlap,
)
from pipeline.inference.coco_json import read_results
from pipeline.networks import load_network

KINDS = ("box", "mask")


def score_proposals(
    annotations: str | Path,
    results: str | Path,
    output: str | Path,
    *,
    perfect_ranking: bool = True,
) -> dict:
    """AR of a proposal store or results file.

    Writes metrics.json, curves.json, scores.txt and, if asked for, perfect_ranking.json: the AR
    that the same masks would have in the best possible order.

    Returns:
        The metrics.

    Raises:
        ValueError: files that do not exist or do not fit each other.
    """
    ground_truth = load_ground_truth(annotations)
    proposals = read_results(results)
    output = Path(output)
    try:
        scores = evaluate_proposals(ground_truth, proposals)
        rows = {"as ranked": scores.metrics()}
        if perfect_ranking:
            rows["perfect ranking"] = perfect_metrics(ground_truth, proposals)
            write_json(output / "perfect_ranking.json", rows["perfect ranking"])
    except ValueError as error:
        raise ValueError(f"{results}: {error}") from error
    write_json(output / "metrics.json", scores.metrics())
    write_json(output / "curves.json", curves(scores))
    _write_table(output / "scores.txt", ar_table(rows))
    return scores.metrics()


def perfect_metrics(ground_truth: COCO, proposals: Iterable[dict]) -> dict:
    """The metrics of the same proposals when the ranking is perfect for each kind of overlap."""
    metrics = {}
    for kind in KINDS:
        ranked = rank_by_overlap(ground_truth, proposals, kind)
        metrics |= evaluate_proposals(ground_truth, ranked, kinds=(kind,)).metrics()
    return metrics


def curves(scores: ProposalScores) -> dict:
    """AR by number of proposals and recall by IoU, for plots."""
    last = scores.counts[-1]
    counts = np.unique(np.geomspace(1, last, 40).round().astype(int))
    content = {
        "iou_thresholds": np.round(scores.iou_thresholds, 2).tolist(),
        "counts": counts.tolist(),
    }
    for kind, recall in scores.recall.items():
        content[kind] = {
            "recall_by_iou": {str(k): _no_nan(recall[:, k - 1, 0]) for k in scores.max_proposals},
            "ar_by_count": _no_nan(scores.average_recall(kind)[counts - 1]),
        }
    return content


def _no_nan(values: np.ndarray) -> list[float | None]:
    return [None if np.isnan(v) else float(v) for v in values]


def ar_table(rows: dict[str, dict]) -> str:
    """Metrics of one or more sets of proposals as text, in percent."""
    names = list(next(iter(rows.values()))["mask"])
    width = max(map(len, rows)) + 2
    lines = [
        "average recall, percent".ljust(width + 7)
        + "  ".join(name.rjust(8) for name in map(_short, names))
    ]
    for kind in KINDS:
        for label, metrics in rows.items():
            values = (metrics[kind][name] for name in names)
            cells = ("-" if value is None else f"{100 * value:.1f}" for value in values)
            lines.append(
                f"{kind:5s}  {label.ljust(width + 16)}" + "  ".join(cell.rjust(8) for cell in cells)
            )
    return "\n".join(lines)


def _short(name: str) -> str:
    return name.replace("AR@1000/", "")


def score_patches(
    annotations: str | Path,
    images: str | Path,
    checkpoint: str | Path,
    output: str | Path,
    *,
    batches: int = 64,
    workers: int = 2,
    device: torch.device,
) -> dict:
    """Patch metrics of a checkpoint on patches drawn from a dataset as in training.

    The patches are the same ones every time, and for DeepMask and SharpMask; masks are compared at
    the full resolution of the patch. Writes metrics.json and scores.txt; returns the metrics.
    """
    if batches < 2:
        raise ValueError(f"--batches must be at least 2, one of each kind, got {batches}")
    if not Path(images).is_dir():
        raise FileNotFoundError(f"image folder {images} does not exist")
    model, config, _ = load_network(checkpoint, stage=("deepmask", "sharpmask"))
    c = config.deepmask
    coco = CocoInstances.load(annotations)
    data = patch_dataset(
        c,
        coco,
        images,
        sampling=c.sampling,
        target_size=c.patch_size,
        seed=VALIDATION_SEED,
    )
    model.to(device, memory_format=torch.channels_last)
    metrics = evaluate_patches(
        model,
        data,
        device,
        heads=validation_heads(batches),
        batch_size=c.optim.batch_size,
        workers=workers,
    )
    if distributed.is_main():
        write_json(Path(output) / "metrics.json", metrics)
        table = "\n".join(f"{name:16s} {value:.4f}" for name, value in metrics.items())
        _write_table(Path(output) / "scores.txt", table)
    return metrics


def _write_table(path: Path, table: str) -> None:
    print(table)
    write_atomically(path, (table + "\n").encode())
