"""Scores of proposals, detections and patches as files: json for programs, tables for people."""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from datasets.coco import CocoInstances
from datasets.files import write_atomically, write_json
from pipeline import distributed
from pipeline.data import patch_dataset
from pipeline.evaluation.ground_truth import IOU_THRESHOLDS, IOU_TYPES, load_ground_truth
from pipeline.evaluation.patches import VALIDATION_SEED, evaluate_patches, validation_heads
from pipeline.evaluation.precision import (
    METRICS,
    RECALL_POINTS,
    DetectionScores,
    evaluate_detections,
)
from pipeline.evaluation.recall import (
    MAX_PROPOSALS,
    NUM_PROPOSALS,
    ProposalScores,
    evaluate_proposals,
    rank_by_overlap,
)
from pipeline.inference.coco_json import load_results, read_results
from pipeline.networks import load_network


def score_proposals(
    annotations: str | Path,
    results: str | Path,
    output: Path,
    *,
    perfect_ranking: bool = True,
) -> dict:
    """AR of a proposal store or results file.

    Writes metrics.json, curves.json (AR by number of proposals, recall by IoU threshold),
    scores.txt and, if asked for, perfect_ranking.json: the AR that the same masks would have in
    the best possible order.

    Returns:
        The metrics, {"box": {"AR@10", "AR@100", "AR@1000", "AUC", "AR@1000/small", ...}, "mask":
        the same}, each in [0, 1] or None.

    Raises:
        FileNotFoundError, ValueError: files that do not exist or do not fit each other.
    """
    ground_truth = load_ground_truth(annotations)
    proposals = read_results(results)
    try:
        scores = evaluate_proposals(ground_truth, proposals)
        rankings = {"as ranked": scores.metrics()}
        if perfect_ranking:
            perfect: dict = {}
            for iou_type in IOU_TYPES:
                ranked = rank_by_overlap(ground_truth, proposals, iou_type)
                perfect |= evaluate_proposals(ground_truth, ranked, iou_types=(iou_type,)).metrics()
            rankings["perfect ranking"] = perfect
            write_json(output / "perfect_ranking.json", perfect)
    except ValueError as error:
        raise ValueError(f"{results}: {error}") from None
    names = [name.removeprefix("AR@1000/") for name in rankings["as ranked"]["box"]]
    rows = [
        [f"{iou_type:4}  {ranking}", *metrics[iou_type].values()]
        for iou_type in IOU_TYPES
        for ranking, metrics in rankings.items()
    ]
    write_json(output / "metrics.json", scores.metrics())
    write_json(output / "curves.json", _proposal_curves(scores))
    _write_table(output, _table(["average recall, percent", *names], rows))
    return scores.metrics()


def _proposal_curves(scores: ProposalScores) -> dict:
    """AR by number of proposals and recall by IoU threshold, for plots."""
    num_proposals = np.unique(np.geomspace(1, MAX_PROPOSALS, 40).round().astype(int))
    content: dict = {
        "iou_thresholds": np.round(IOU_THRESHOLDS, 2).tolist(),
        "counts": num_proposals.tolist(),
    }
    for iou_type, recall in scores.recall.items():
        content[iou_type] = {
            "recall_by_iou": {str(k): _no_nan(recall[:, k - 1, 0]) for k in NUM_PROPOSALS},
            "ar_by_count": _no_nan(scores.average_recall(iou_type)[num_proposals - 1]),
        }
    return content


def score_detections(annotations: str | Path, results: str | Path, output: Path) -> dict:
    """AP and AR of a COCO results file of detections, of boxes and, if there are any, of masks.

    Writes metrics.json, curves.json (AP by IoU threshold, precision by recall, VOC's AP50),
    categories.json, the same as categories.csv, and scores.txt.

    Returns:
        The metrics, {"box": {"AP", "AP50", "AP75", "APs", "APm", "APl", "AR@1", "AR@10",
        "AR@100"}, "mask": the same}, each in [0, 1] or None.

    Raises:
        FileNotFoundError, ValueError: files that do not exist or do not fit each other.
    """
    detections = load_results(results)
    ground_truth = load_ground_truth(annotations)
    try:
        scores = evaluate_detections(ground_truth, detections)
    except ValueError as error:
        raise ValueError(f"{results}: {error}") from None
    columns = _category_columns(scores)
    rows = list(zip(*columns.values(), strict=True))
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([list(columns), *rows])
    write_json(output / "metrics.json", scores.metrics())
    write_json(output / "curves.json", _detection_curves(scores))
    write_json(output / "categories.json", [dict(zip(columns, row, strict=True)) for row in rows])
    write_atomically(output / "categories.csv", text.getvalue().encode())
    _write_table(output, _detection_tables(scores, list(columns), rows))
    return scores.metrics()


def _category_columns(scores: DetectionScores) -> dict[str, list]:
    """A column for each key of categories.json; APs are fractions, None without an object."""
    columns: dict[str, list] = {
        "category_id": scores.category_ids,
        "category": scores.category_names,
        "annotations": scores.num_objects,
        "detections": scores.num_detections,
    }
    for iou_type in scores.precision:
        columns[f"{iou_type}_AP"] = _no_nan(scores.ap_by_category(iou_type))
        columns[f"{iou_type}_AP50"] = _no_nan(scores.ap50_by_category(iou_type))
    return columns | {"box_VOC_AP50": _no_nan(scores.voc_ap50)}


def _detection_curves(scores: DetectionScores) -> dict:
    """AP by IoU, and precision by recall at IoU .5 and .75, for plots; VOC's AP50 of boxes."""
    thresholds = np.round(IOU_THRESHOLDS, 2).tolist()
    content: dict = {
        "iou_thresholds": thresholds,
        "recall_points": np.round(RECALL_POINTS, 2).tolist(),
    }
    for iou_type in scores.precision:
        by_recall = scores.precision_by_recall(iou_type)
        content[iou_type] = {
            "ap_by_iou": _no_nan(scores.ap_by_iou(iou_type)),
            "precision_by_recall": {
                str(iou): _no_nan(by_recall[thresholds.index(iou)]) for iou in (0.5, 0.75)
            },
        }
    return content | {"voc_ap50": scores.mean_voc_ap50()}


def _detection_tables(scores: DetectionScores, names: list[str], rows: list[tuple]) -> str:
    """The metrics, AP by IoU threshold, and the columns of categories.json as text."""
    metrics = scores.metrics()
    by_iou = {iou_type: _no_nan(scores.ap_by_iou(iou_type)) for iou_type in metrics}
    tables = [
        _table(
            ["average precision and recall, percent", *METRICS],
            [[iou_type, *values.values()] for iou_type, values in metrics.items()],
        ),
        _table(
            ["by IoU threshold", *(f"AP{100 * iou:.0f}" for iou in IOU_THRESHOLDS)],
            [[iou_type, *values] for iou_type, values in by_iou.items()],
        ),
        f"VOC AP50 of boxes (all-point): {_cell(scores.mean_voc_ap50())}",
        _table([name.replace("_", " ") for name in names[1:]], [row[1:] for row in rows]),
    ]
    return "\n\n".join(tables)


def score_patches(
    annotations: str | Path,
    images: str | Path,
    checkpoint: str | Path,
    output: Path,
    *,
    batches: int = 64,
    workers: int = 2,
    device: torch.device,
) -> dict:
    """Patch metrics of a checkpoint on patches drawn from a dataset as in training.

    The patches are the same in every call, and for DeepMask and SharpMask; masks are compared at
    the full resolution of the patch. Writes metrics.json and scores.txt; returns the metrics.

    Raises:
        FileNotFoundError, ValueError: an input that does not exist or cannot be used.
    """
    if batches < 2:
        raise ValueError(f"--batches must be at least 2, one of each head, got {batches}")
    if not Path(images).is_dir():
        raise FileNotFoundError(f"image folder {images} does not exist")
    model, config, _ = load_network(checkpoint, stage=("deepmask", "sharpmask"))
    c, coco = config.deepmask, CocoInstances.load(annotations)
    data = patch_dataset(
        c, coco, images, sampling=c.sampling, target_size=c.patch_size, seed=VALIDATION_SEED
    )
    metrics = evaluate_patches(
        model.to(device).to(memory_format=torch.channels_last),
        data,
        device,
        heads=validation_heads(batches),
        batch_size=c.optim.batch_size,
        workers=workers,
    )
    if distributed.is_main():
        write_json(output / "metrics.json", metrics)
        _write_table(output, "\n".join(f"{name:16} {v:.4f}" for name, v in metrics.items()))
    return metrics


def _no_nan(values: np.ndarray) -> list[float | None]:
    return [None if np.isnan(value) else value for value in values.tolist()]


def _table(headings: list[str], rows: Iterable[Sequence]) -> str:
    """Lines of columns: the first aligned left, the others right; fractions in percent."""
    cells = [headings, *([_cell(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for first, *others in cells:
        padded = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        lines.append("  ".join([first.ljust(widths[0]), *padded]))
    return "\n".join(lines)


def _cell(value: str | int | float | None) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.1f}" if isinstance(value, float) else str(value)


def _write_table(output: Path, table: str) -> None:
    """Print a table and write it to scores.txt."""
    print(table)
    write_atomically(output / "scores.txt", (table + "\n").encode())
