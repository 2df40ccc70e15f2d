"""The detector in the report: its training, AP in several views, and drawn detections."""

import csv
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from markupsafe import Markup

from datasets.coco import CocoInstances
from pipeline.report.detection_pictures import DetectionExamples, read_detection_examples
from pipeline.report.plots import KINDS, plot_ap_by_iou, plot_ap_by_proposals, plot_metrics
from pipeline.report.run_files import RunFiles, read_json, training_facts
from pipeline.training.run_log import read_metrics

DETECTOR = "multipathnet"
LOSSES = {"class_loss": "class loss", "box_loss": "box loss"}
ACCURACIES = {
    "roi_accuracy": "mean of the two",
    "foreground_accuracy": "foreground",
    "background_accuracy": "background",
}
BEST_METRIC = "roi_accuracy"  # of the validation that chooses the best checkpoint
COLUMNS = ("category_id", "category", "annotations", "detections")  # of categories.csv, then APs
PUBLISHED_COUNT = 400  # proposals, from where on AP hardly grows (BMVC 2016)
FEW_OBJECTS = 10  # of a category: fewer give no AP to rely on


@dataclass(frozen=True)
class ApCurve:
    """AP at IoU thresholds or numbers of proposals.

    Attributes:
        at: the thresholds or numbers. values: AP at each of them, by kind.
    """

    at: list[float]
    values: dict[str, list[float | None]]


@dataclass(frozen=True)
class Categories:
    """The lines of categories.csv: (name, annotations, detections, the values of `measures`)."""

    measures: list[str]
    rows: list[tuple[str, int, int, list[float | None]]]

    def means(self) -> list[float | None]:
        """Each measure over the categories that have it; None if none has."""
        columns = zip(*(values for *_, values in self.rows), strict=True)
        known = [[value for value in column if value is not None] for column in columns]
        return [statistics.fmean(column) if column else None for column in known]


@dataclass(frozen=True)
class DetectionStage:
    """What the page shows of the detector; None for what the run does not have.

    Attributes:
        metrics: AP and AR by kind. by_iou, by_proposals: AP. training: see `training_facts`.
        plots: SVG by name. settings: texts of the files that say how it was made, by their names.
    """

    name: str
    metrics: dict[str, dict[str, float | None]] | None
    by_iou: ApCurve | None
    by_proposals: ApCurve | None
    categories: Categories | None
    training: dict[str, float | None]
    plots: dict[str, Markup | None]
    examples: DetectionExamples | None
    settings: dict[str, str]


def read_detection_stage(
    files: RunFiles, summary: dict, coco: CocoInstances | None, images: Path
) -> DetectionStage:
    """Read what the run has of the detector.

    Args:
        summary: its part of summary.json.
        coco: the annotated objects; None if they could not be read.
    """
    records = files.read(f"{DETECTOR}/metrics.jsonl", read_metrics, "training curves") or []
    scores = f"{DETECTOR}/scores"
    metrics = files.read(f"{scores}/metrics.json", read_json, "average precision")
    by_iou = files.read(f"{scores}/curves.json", read_ap_by_iou, "AP by IoU threshold")
    what = "AP by number of proposals"
    by_proposals = files.read(f"{scores}/by_proposals.json", read_ap_by_proposals, what)
    examples = None
    if coco is not None:
        reader = partial(read_detection_examples, coco=coco, images=images)
        examples = files.read(f"{DETECTOR}/detections.json", reader, "pictures")
    categories = files.read(f"{scores}/categories.csv", read_categories, "AP by category")
    config = f"{DETECTOR}/config.yaml"
    settings = files.read(config, Path.read_text, "settings of the training")
    return DetectionStage(
        name=DETECTOR,
        metrics=metrics or summary.get("detections"),
        by_iou=by_iou,
        by_proposals=by_proposals,
        categories=categories,
        training=training_facts(records, samples="images", losses=LOSSES, best_metric=BEST_METRIC),
        plots={
            "losses": plot_metrics(records, "train", LOSSES, "loss"),
            "validation": plot_metrics(records, "val", ACCURACIES, "share", top=1),
            "by_iou": by_iou and plot_ap_by_iou(by_iou.at, by_iou.values),
            "by_proposals": by_proposals
            and plot_ap_by_proposals(by_proposals.at, by_proposals.values, PUBLISHED_COUNT),
        },
        examples=examples,
        settings={config: settings} if settings else {},
    )


# Tables.


def read_ap_by_iou(path: Path) -> ApCurve:
    """From the curves.json of `score_detections`; ValueError if it is none."""
    return _read_curve(path, "iou_thresholds", lambda values: values["ap_by_iou"])


def read_ap_by_proposals(path: Path) -> ApCurve:
    """From by_proposals.json, {"counts", "box", "mask"}; ValueError if it is none."""
    return _read_curve(path, "counts", list)


def _read_curve(path: Path, key: str, values_of: Callable[[Any], list]) -> ApCurve:
    """The kinds that have been measured; a kind may be missing, or None throughout."""
    content = read_json(path)
    try:
        curves = {kind: values_of(content[kind]) for kind in reversed(KINDS) if kind in content}
        measured = {kind: ap for kind, ap in curves.items() if any(v is not None for v in ap)}
        at = list(content[key])
    except (KeyError, TypeError) as error:
        raise ValueError(f"is not what it should be: {error!r}") from None
    if not measured or {len(ap) for ap in measured.values()} != {len(at)}:
        raise ValueError(f"does not have an AP for each of {key}")
    return ApCurve(at, measured)


def read_categories(path: Path) -> Categories:
    """From the categories.csv of `score_detections`; ValueError if it is none."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            header, *lines = list(csv.reader(file)) or [[]]
        if tuple(header[: len(COLUMNS)]) != COLUMNS:
            raise ValueError(f"does not begin with the columns {', '.join(COLUMNS)}")
        rows = [
            (name, int(annotations), int(found), [float(ap) if ap else None for ap in aps])
            for _, name, annotations, found, *aps in lines
        ]
    except csv.Error as error:
        raise ValueError(f"is not CSV: {error}") from None
    return Categories([name.replace("_", " ") for name in header[len(COLUMNS) :]], rows)
