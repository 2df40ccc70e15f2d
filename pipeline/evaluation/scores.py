"""Scores of proposals, detections and patches as files: json for programs, tables for people."""

import csv
import io
from collections.abc import Container, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from pycocotools.coco import COCO

from datasets.category_names import listed, short
from datasets.coco import CocoInstances
from datasets.coco_file import read_categories
from datasets.files import write_atomically, write_json
from pipeline import distributed
from pipeline.data import find_files, patch_dataset, survey_split
from pipeline.evaluation.ground_truth import (
    AREAS,
    IOU_THRESHOLDS,
    IOU_TYPES,
    load_ground_truth,
    scorable,
)
from pipeline.evaluation.patches import VALIDATION_SEED, evaluate_patches, validation_heads
from pipeline.evaluation.precision import METRICS, RECALL_POINTS, evaluate_detections
from pipeline.evaluation.recall import (
    MAX_PROPOSALS,
    NUM_PROPOSALS,
    evaluate_proposals,
    rank_by_overlap,
)
from pipeline.inference.coco_json import (
    load_results,
    read_result_categories,
    read_results,
    scored_types,
)
from pipeline.inference.propose import auto_scales
from pipeline.networks import load_network

THRESHOLDS = IOU_THRESHOLDS.round(2).tolist()


def score_proposals(
    annotations: str | Path,
    results: str | Path,
    output: Path,
    *,
    chosen: Sequence[str] | None = None,
    perfect_ranking: bool = True,
) -> dict:
    """AR of a proposal store or results file, by boxes and, if there are any, by masks.

    Writes metrics.json, curves.json (AR by number of proposals, of all objects and by their area;
    recall by IoU threshold), scores.txt and, if asked for, perfect_ranking.json: the AR that the
    same masks would have in the best possible order.

    Args:
        chosen: the categories whose objects are to be found, see `CocoInstances.load`.

    Returns:
        The metrics, {"box": {"AR@10", "AR@100", "AR@1000", "AUC", "AR@1000/small", ...}, "mask":
        the same if there are masks}, each in [0, 1] or None.

    Raises:
        FileNotFoundError, ValueError: files that do not exist or do not fit each other.
    """
    ground_truth = load_ground_truth(annotations, chosen=chosen, needs_object=True)
    proposals = read_results(results)
    try:
        given = scored_types(proposals) if isinstance(proposals, list) else tuple(IOU_TYPES)
        iou_types = scorable(ground_truth, given)
        scores = evaluate_proposals(ground_truth, proposals, iou_types=iou_types)
        rankings = {"as ranked": scores.metrics()}
        if perfect_ranking:
            perfect: dict = {}
            for iou_type in iou_types:
                ranked = rank_by_overlap(ground_truth, proposals, iou_type)
                perfect |= evaluate_proposals(ground_truth, ranked, iou_types=(iou_type,)).metrics()
            rankings["perfect ranking"] = perfect
    except ValueError as error:
        raise ValueError(f"{results}: {error}") from None
    num_proposals = np.unique(np.geomspace(1, MAX_PROPOSALS, 40).round().astype(int))
    curves = {"iou_thresholds": THRESHOLDS, "counts": num_proposals.tolist()}
    for iou_type, recall in scores.recall.items():
        by_count = scores.average_recall(iou_type)[num_proposals - 1]
        curves[iou_type] = {
            "recall_by_iou": {str(k): recall[:, k - 1, 0].tolist() for k in NUM_PROPOSALS},
            "ar_by_count": by_count[:, 0].tolist(),
            "ar_by_area": dict(zip(AREAS[1:], by_count[:, 1:].T.tolist(), strict=True)),
        }
    names = [name.removeprefix("AR@1000/") for name in rankings["as ranked"]["box"]]
    rows = [
        [f"{iou_type:4}  {ranking}", *values[iou_type].values()]
        for iou_type in iou_types
        for ranking, values in rankings.items()
    ]
    table = _name_chosen(ground_truth, chosen)
    table += _table(["average recall, percent", *names], rows)
    if perfect_ranking:
        write_json(output / "perfect_ranking.json", rankings["perfect ranking"])
    return _write(output, table, metrics=rankings["as ranked"], curves=curves)


def score_detections(
    annotations: str | Path,
    results: str | Path,
    output: Path,
    *,
    chosen: Sequence[str] | None = None,
) -> dict:
    """AP and AR of a COCO results file of detections, of boxes and, if there are any, of masks.

    Writes metrics.json, curves.json (AP by IoU threshold, precision by recall, VOC's AP50),
    categories.json, the same as categories.csv, and scores.txt.

    Args:
        chosen: the categories to score, see `CocoInstances.load`; detections of others do not
            count.

    Returns:
        The metrics, {"box": {"AP", "AP50", "AP75", "APs", "APm", "APl", "AR@1", "AR@10",
        "AR@100"}, "mask": the same}, each in [0, 1] or None.

    Raises:
        FileNotFoundError, ValueError: files that do not exist or do not fit each other.
    """
    detections, known = load_results(results), read_result_categories(results)
    ground_truth = load_ground_truth(
        annotations,
        chosen=chosen,
        categories=known,
        needs_object=True,
        needs_all_objects=True,
    )
    listed_ids = None if chosen is None else known or read_categories(annotations)
    try:
        scores = evaluate_detections(ground_truth, detections, known=listed_ids)
    except ValueError as error:
        raise ValueError(f"{results}: {error}") from None
    metrics, columns = scores.metrics(), dict(scores.categories)
    curves = {"iou_thresholds": THRESHOLDS, "recall_points": RECALL_POINTS.round(2).tolist()}
    for iou_type in metrics:
        precision = scores.precision(iou_type)
        columns[f"{iou_type}_AP"] = precision.mean(axis=(0, 1)).tolist()
        columns[f"{iou_type}_AP50"] = precision[0].mean(axis=0).tolist()
        by_recall = dict(zip(map(str, THRESHOLDS), precision.mean(axis=2).tolist(), strict=True))
        curves[iou_type] = {
            "ap_by_iou": precision.mean(axis=(1, 2)).tolist(),
            "precision_by_recall": {iou: by_recall[iou] for iou in ("0.5", "0.75")},
        }
    columns["box_VOC_AP50"] = scores.voc_ap50.tolist()
    curves["voc_ap50"] = scores.voc_ap50.mean().tolist()
    rows = list(zip(*columns.values(), strict=True))
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([list(columns), *rows])
    categories = [dict(zip(columns, row, strict=True)) for row in rows]
    write_atomically(output / "categories.csv", file.getvalue().encode())
    tables = [
        _table(
            ["average precision and recall, percent", *METRICS],
            [[iou_type, *values.values()] for iou_type, values in metrics.items()],
        ),
        _table(
            ["by IoU threshold", *(f"AP{100 * iou:.0f}" for iou in THRESHOLDS)],
            [[iou_type, *curves[iou_type]["ap_by_iou"]] for iou_type in metrics],
        ),
        f"VOC AP50 of boxes (all-point): {_cell(curves['voc_ap50'])}",
        _table([name.replace("_", " ") for name in columns][1:], [row[1:] for row in rows]),
    ]
    text = _name_chosen(ground_truth, chosen) + "\n\n".join(tables)
    text = _name_lacking(ground_truth, known or {d["category_id"] for d in detections}) + text
    return _write(output, text, metrics=metrics, curves=curves, categories=categories)


def score_patches(
    annotations: str | Path,
    images: str | Path,
    checkpoint: str | Path,
    output: Path,
    *,
    chosen: Sequence[str] | None = None,
    batches: int = 64,
    workers: int = 2,
    device: torch.device,
) -> dict:
    """Metrics of a checkpoint on patches drawn as in validation, the same ones in every call.

    Of objects of the chosen categories, see `CocoInstances.load`. Masks are compared at the full
    resolution of the patch, of SharpMask as of DeepMask. Writes metrics.json and scores.txt;
    returns the metrics.

    Raises:
        FileNotFoundError, ValueError: an input that does not exist or cannot be used.
    """
    if batches < 2:
        raise ValueError(f"--batches must be at least 2, one of each head, got {batches}")
    if not Path(images).is_dir():
        raise FileNotFoundError(f"image folder {images} does not exist")
    model, config, content = load_network(checkpoint, stage=("deepmask", "sharpmask"))
    c, coco = config.deepmask, CocoInstances.load(annotations, chosen)
    if coco.federated:  # some of the negatives show objects
        distributed.say(coco.summary())
    find_files(coco, images)
    folder = survey_split(coco, images, config.data, "patches")
    data = patch_dataset(
        c,
        coco,
        folder,
        sampling=c.sampling.for_validation(),
        target_size=c.patch_size,
        seed=VALIDATION_SEED,
    )
    low, high, _ = (
        config.propose.log2_scales or auto_scales(content, c.patch_size, source=str(checkpoint))[0]
    )
    data.sampler.draw_negatives_at(low, high)
    metrics = evaluate_patches(
        model.to(device).to(memory_format=torch.channels_last),
        data,
        device,
        heads=validation_heads(batches),
        batch_size=c.optim.batch_size,
        workers=workers,
    )
    if distributed.is_main():
        text = "\n".join(f"{name:16} {v:.4f}" for name, v in metrics.items())
        _write(output, text, metrics=metrics)
    return metrics


def _name_chosen(ground_truth: COCO, chosen: Sequence[str] | None) -> str:
    """A line that says which categories are scored, where they were chosen."""
    if chosen is None:
        return ""
    names = [short(category["name"]) for category in ground_truth.cats.values()]
    return f"scored on {len(names)} of the annotated categories: {listed(names)}\n\n"


def _name_lacking(ground_truth: COCO, known: Container[int]) -> str:
    """A line on categories of the objects that results cannot be of, whose AP is 0."""
    ids = {o["category_id"] for o in ground_truth.dataset["annotations"] if not o["iscrowd"]}
    lacking = [short(ground_truth.cats[i]["name"]) for i in sorted(ids) if i not in known]
    if not lacking:
        return ""
    return (
        f"the results have {len(ids) - len(lacking)} of the {len(ids)} categories that objects are "
        f"of; the AP of the others ({listed(lacking)}) counts as 0; to score on some: "
        "--categories NAME ...\n\n"
    )


def _table(headings: list[str], rows: Iterable[Sequence]) -> str:
    """Lines of columns: the first aligned left, the others right; fractions in percent."""
    cells = [headings, *([_cell(value) for value in row] for row in rows)]
    first, *others = (max(map(len, column)) for column in zip(*cells, strict=True))
    line = "  ".join([f"{{:{first}}}", *(f"{{:>{width}}}" for width in others)])
    return "\n".join(line.format(*row) for row in cells)


def _cell(value: str | int | float | None) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.1f}" if isinstance(value, float) else str(value)


def _write(output: Path, text: str, *, metrics: dict, **files: object) -> dict:
    """Prints and writes scores.txt, writes json files by their names; returns the metrics."""
    for name, content in {"metrics": metrics, **files}.items():
        write_json(output / f"{name}.json", content)
    print(text)
    write_atomically(output / "scores.txt", (text + "\n").encode())
    return metrics
