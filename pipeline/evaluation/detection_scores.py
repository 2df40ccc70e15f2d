"""Scores of detections as files: json for programs, csv by category, a table for people."""

import csv
import io
from pathlib import Path

import numpy as np

from datasets.files import write_atomically, write_json
from pipeline.evaluation.precision import (
    METRICS,
    RECALL_POINTS,
    DetectionScores,
    evaluate_detections,
)
from pipeline.evaluation.recall import IOU_THRESHOLDS, load_ground_truth
from pipeline.inference.coco_json import load_results


def score_detections(annotations: str | Path, results: str | Path, output: str | Path) -> dict:
    """AP and AR of a COCO results file of detections, of boxes and, if there are any, of masks.

    Writes metrics.json, curves.json (AP by IoU threshold, precision by recall, VOC's AP50),
    categories.json, the same as categories.csv, and scores.txt (tables, printed as well).

    Returns:
        The metrics, {"box": {"AP", "AP50", "AP75", "APs", "APm", "APl", "AR@1", "AR@10",
        "AR@100"}, "mask": the same}, each in [0, 1] or None.

    Raises:
        FileNotFoundError, ValueError: files that do not exist or do not fit each other.
    """
    found = load_results(results)
    ground_truth = load_ground_truth(annotations)
    try:
        scores = evaluate_detections(ground_truth, found)
    except ValueError as error:
        raise ValueError(f"{results}: {error}") from None
    output, table = Path(output), score_table(scores)
    write_json(output / "metrics.json", scores.metrics())
    write_json(output / "curves.json", curves(scores))
    write_json(output / "categories.json", category_rows(scores))
    write_atomically(output / "categories.csv", category_csv(scores).encode())
    write_atomically(output / "scores.txt", (table + "\n").encode())
    print(table)
    return scores.metrics()


def curves(scores: DetectionScores) -> dict:
    """AP by IoU, and precision by recall at IoU .5 and .75, for plots; VOC's AP50 of boxes."""
    thresholds = np.round(IOU_THRESHOLDS, 2).tolist()
    content = {"iou_thresholds": thresholds, "recall_points": np.round(RECALL_POINTS, 2).tolist()}
    for kind in scores.precision:
        by_recall = scores.precision_by_recall(kind)
        content[kind] = {
            "ap_by_iou": _no_nan(scores.ap_by_iou(kind)),
            "precision_by_recall": {
                str(iou): _no_nan(by_recall[thresholds.index(iou)]) for iou in (0.5, 0.75)
            },
        }
    return content | {"voc_ap50": voc_mean(scores)}


def voc_mean(scores: DetectionScores) -> float | None:
    """VOC's mean AP50 of boxes over the categories that occur; None if there is no object."""
    defined = scores.voc_ap50[~np.isnan(scores.voc_ap50)]
    return float(defined.mean()) if defined.size else None


def category_csv(scores: DetectionScores) -> str:
    """A line for each category; APs are fractions, empty where there is no object."""
    rows, text = category_rows(scores), io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["category_id", *_category_columns(scores)])
    writer.writerows(row.values() for row in rows)
    return text.getvalue()


def category_rows(scores: DetectionScores) -> list[dict]:
    """Each category by the names of the columns; APs are fractions, None where no object is."""
    columns = {"category_id": scores.category_ids.tolist()} | _category_columns(scores)
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _category_columns(scores: DetectionScores) -> dict[str, list]:
    columns = {
        "category": scores.category_names,
        "annotations": scores.num_objects.tolist(),
        "detections": scores.num_detections.tolist(),
    }
    for kind in scores.precision:
        columns[f"{kind}_AP"] = _no_nan(scores.ap_by_category(kind))
        columns[f"{kind}_AP50"] = _no_nan(scores.ap50_by_category(kind))
    return columns | {"box_VOC_AP50": _no_nan(scores.voc_ap50)}


def _no_nan(values: np.ndarray) -> list[float | None]:
    return [None if np.isnan(v) else v for v in values.tolist()]


def score_table(scores: DetectionScores) -> str:
    """The metrics, AP by IoU threshold, and AP by category as text, in percent."""
    metrics = scores.metrics()
    summary = [[kind, *map(_percent, values.values())] for kind, values in metrics.items()]
    by_iou = [[kind, *map(_percent, _no_nan(scores.ap_by_iou(kind)))] for kind in metrics]
    columns = _category_columns(scores)
    by_category = [
        [name, str(annotations), str(detections), *map(_percent, aps)]
        for name, annotations, detections, *aps in zip(*columns.values(), strict=True)
    ]
    parts = [
        _table(["average precision and recall, percent", *METRICS], summary),
        _table(["by IoU threshold", *(f"AP{100 * iou:.0f}" for iou in IOU_THRESHOLDS)], by_iou),
        f"VOC AP50 of boxes (all-point): {_percent(voc_mean(scores))}",
        _table([name.replace("_", " ") for name in columns], by_category),
    ]
    return "\n\n".join(parts)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _table(headings: list[str], rows: list[list[str]]) -> str:
    """Lines of columns: the first to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    lines = []
    for first, *others in (headings, *rows):
        cells = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return "\n".join(lines)
