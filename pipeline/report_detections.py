"""The detector in the report: its training, AP in several views, and drawn detections.

Letters: D detections and G annotated objects (crowds are none) of one image.
"""

import csv
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from pycocotools import mask as coco_mask

from datasets.coco import CocoInstances
from datasets.images import ImageError, read_image
from pipeline.detections import Detections, read_detections
from pipeline.report_pictures import (
    FAINT,
    FOUND_IOU,
    FULL,
    Example,
    Mark,
    draw_marks,
    jpeg_uri,
    objects_of,
    scaled_down,
    spread,
)
from pipeline.report_plots import KINDS, plot_ap_by_iou, plot_ap_by_proposals, plot_metrics
from pipeline.report_run import RunFiles, read_json, training_facts
from pipeline.run_log import read_metrics
from pipeline.visualize import colour

NAME = "multipathnet"
LOSSES = {"class_loss": "class loss", "box_loss": "box loss"}
ACCURACIES = {
    "roi_accuracy": "mean of the two",
    "foreground_accuracy": "foreground",
    "background_accuracy": "background",
}
BEST_METRIC = "roi_accuracy"  # of the validation that chooses the best checkpoint
COLUMNS = ("category_id", "category", "annotations", "detections")  # of categories.csv, then APs
PUBLISHED_COUNT = 400  # proposals, from where on AP hardly grows (BMVC 2016, section 5)
MIN_SCORE = 0.3  # of the detections that are drawn, and that the choice of images looks at
NUM_SHOWN = 6


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


@dataclass(frozen=True)
class DetectionExample(Example):
    """An image with its objects and detections drawn.

    `ious` are those of each object with the best detection of its class; `pictures` show the
    objects, and the detections.
    """

    num_detections: int = 0


@dataclass(frozen=True)
class DetectionExamples:
    """Some of `num_images` images with objects, best first.

    Attributes:
        num_detections: of all images. num_confident: of them, with a score that is drawn.
    """

    shown: list[DetectionExample]
    num_images: int
    num_detections: int
    num_confident: int


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
    records = files.read(f"{NAME}/metrics.jsonl", read_metrics, "training curves") or []
    scores = f"{NAME}/scores"
    metrics = files.read(f"{scores}/metrics.json", read_json, "average precision")
    by_iou = files.read(f"{scores}/curves.json", read_ap_by_iou, "AP by IoU threshold")
    what = "AP by number of proposals"
    by_proposals = files.read(f"{scores}/by_proposals.json", read_ap_by_proposals, what)
    examples = None
    if coco is not None:
        reader = partial(read_detection_examples, coco=coco, images=images)
        examples = files.read(f"{NAME}/detections.json", reader, "pictures")
    categories = files.read(f"{scores}/categories.csv", read_categories, "AP by category")
    config = f"{NAME}/config.yaml"
    settings = files.read(config, Path.read_text, "settings of the training")
    return DetectionStage(
        name=NAME,
        metrics=metrics or summary.get("detections"),
        by_iou=by_iou,
        by_proposals=by_proposals,
        categories=categories,
        training=training_facts(records, losses=LOSSES, best_metric=BEST_METRIC),
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
        curves = {kind: values_of(content[kind]) for kind in KINDS if kind in content}
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


# Pictures.


def read_detection_examples(
    path: Path, *, coco: CocoInstances, images: Path
) -> DetectionExamples:
    """Draw images that stand for all that have objects, from the best to the worst.

    Images are ordered by the mean over their objects of the IoU with the best detection of the
    object's class, and cut into equal parts; the middle one of each is drawn.

    Raises:
        FileNotFoundError, ValueError: no detections of these images.
    """
    sizes = coco.image_sizes.tolist()
    records = [
        {"id": image_id, "file_name": coco.file_name(i), "height": sizes[i][0], "width": sizes[i][1]}
        for i, image_id in enumerate(coco.image_ids.tolist())
    ]
    found = read_detections(path, records)
    confident = [above(detections, MIN_SCORE) for detections in found]
    objects = {i: own for i in range(len(coco)) if (own := objects_of(coco, i))}
    qualities = {
        i: float(best_ious(right_overlaps(confident[i], coco, own)).mean())
        for i, own in objects.items()
    }
    ranked = sorted(qualities, key=lambda i: -qualities[i])
    return DetectionExamples(
        [draw_example(images, confident[i], coco, objects[i]) for i in spread(ranked, NUM_SHOWN)],
        num_images=len(objects),
        num_detections=sum(map(len, found)),
        num_confident=sum(map(len, confident)),
    )


def above(found: Detections, score: float) -> Detections:
    """The detections with at least a score."""
    count = int((found.scores >= score).sum())  # the best come first
    return replace(
        found,
        scores=found.scores[:count],
        boxes=found.boxes[:count],
        labels=found.labels[:count],
        counts=found.counts and found.counts[:count],
    )


def right_overlaps(found: Detections, coco: CocoInstances, objects: list[int]) -> np.ndarray:
    """IoU of detections and objects, (D, G): of masks, or of boxes if there are no masks.

    0 where the detection is of another class than the object.
    """
    if not len(found):
        return np.zeros((0, len(objects)))
    if found.counts is None:
        sides = _xywh(found.boxes), _xywh(coco.boxes[objects])
    else:
        sides = [found.rle(n) for n in range(len(found))], [coco.rle(a) for a in objects]
    ious = coco_mask.iou(*sides, [0] * len(objects))
    is_right = found.labels[:, None] == coco.category_ids[coco.category_index[objects]]
    return np.where(is_right, ious, 0)


def best_ious(overlaps: np.ndarray) -> np.ndarray:
    """(D, G) IoU -> (G,) of each object with its best detection; 0 where there is none."""
    return overlaps.max(axis=0, initial=0)


def _xywh(boxes: np.ndarray) -> np.ndarray:
    boxes = boxes.astype(float)
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)


def draw_example(
    images: Path, found: Detections, coco: CocoInstances, objects: list[int]
) -> DetectionExample:
    """Two pictures of an image: its objects with their names, and its detections."""
    overlaps = right_overlaps(found, coco, objects)
    example = DetectionExample(found.file_name, best_ious(overlaps), num_detections=len(found))
    try:
        image = scaled_down(read_image(images / found.file_name))
    except ImageError as error:
        return replace(example, error=str(error))
    names = dict(zip(coco.category_ids.tolist(), coco.category_names, strict=True))
    labels = coco.category_ids[coco.category_index[objects]].tolist()
    truth = [
        Mark(coco.rle(a), colour(label), 0, names[label])
        for a, label in zip(objects, labels, strict=True)
    ]
    is_right = (overlaps >= FOUND_IOU).any(axis=1)
    marks = [detection_mark(found, n, names, FULL if is_right[n] else FAINT)
             for n in reversed(range(len(found)))]  # fmt: skip
    drawings = tuple(jpeg_uri(draw_marks(image, marks)) for marks in (truth, marks))
    return replace(example, pictures=drawings)


def detection_mark(found: Detections, n: int, names: dict[int, str], tint: float) -> Mark:
    """Detection n in the colour of its category; its box stands for a mask that it does not have.

    Args:
        names: of the categories, by id.
    """
    box, label = found.boxes[n], int(found.labels[n])
    if found.counts is None:
        [rle] = coco_mask.frPyObjects(_xywh(box[None]), found.height, found.width)
    else:
        rle = found.rle(n)
    # Detections of a category that the annotations do not know go by its number.
    text = f"{names.get(label, label)} {found.scores[n]:.2f}"
    return Mark(rle, colour(label), tint, text, box)
