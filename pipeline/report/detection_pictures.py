"""The pictures of the report: detections beside the objects, in images that stand for all.

Letters: D detections and G annotated objects (crowds are none) of one image.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from pycocotools import mask as coco_mask

from datasets.coco import CocoInstances
from datasets.images import ImageError, read_image
from pipeline.inference.coco_json import read_detections
from pipeline.inference.detections import Detections
from pipeline.inference.visualize import color
from pipeline.report.pictures import (
    FAINT,
    FOUND_IOU,
    FULL,
    Example,
    Mark,
    draw_marks,
    jpeg_uri,
    objects_of,
    scaled,
    spread,
)

MIN_SCORE = 0.3  # of the detections that are drawn, and that the choice of images looks at
NUM_SHOWN = 6
MAX_FACTOR = 2  # small images are enlarged, so that names do not cover them


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


def read_detection_examples(path: Path, *, coco: CocoInstances, images: Path) -> DetectionExamples:
    """Draw images that stand for all that have objects, from the best to the worst.

    Images are ordered by the mean over their objects of the IoU with the best detection of the
    object's class, and cut into equal parts; the middle one of each is drawn.

    Raises:
        FileNotFoundError, ValueError: no detections of these images.
    """
    found = read_detections(path, image_records(coco))
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


def image_records(coco: CocoInstances) -> list[dict]:
    """The images as a COCO json has them, in their order."""
    columns = zip(coco.image_ids.tolist(), coco.image_sizes.tolist(), strict=True)
    return [
        {"id": image_id, "file_name": coco.file_name(i), "height": height, "width": width}
        for i, (image_id, (height, width)) in enumerate(columns)
    ]


def above(found: Detections, score: float) -> Detections:
    """The detections with at least a score."""
    count = int((found.scores >= score).sum())  # the best come first
    return replace(
        found,
        scores=found.scores[:count],
        boxes=found.boxes[:count],
        labels=found.labels[:count],
        rles=found.rles and found.rles[:count],
    )


def right_overlaps(found: Detections, coco: CocoInstances, objects: list[int]) -> np.ndarray:
    """IoU of detections and objects, (D, G): of masks, or of boxes if there are no masks.

    0 where the detection is of another class than the object.
    """
    if not len(found):
        return np.zeros((0, len(objects)))
    if found.rles is None:
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
        image = scaled(read_image(images / found.file_name), max_factor=MAX_FACTOR)
    except ImageError as error:
        return replace(example, error=str(error))
    names = dict(zip(coco.category_ids.tolist(), coco.category_names, strict=True))
    labels = coco.category_ids[coco.category_index[objects]].tolist()
    truth = [
        Mark(coco.rle(a), color(label), 0, names[label])
        for a, label in zip(objects, labels, strict=True)
    ]
    is_right = (overlaps >= FOUND_IOU).any(axis=1)
    marks = [detection_mark(found, n, names, FULL if is_right[n] else FAINT)
             for n in reversed(range(len(found)))]  # fmt: skip
    drawings = tuple(jpeg_uri(draw_marks(image, marks)) for marks in (truth, marks))
    return replace(example, pictures=drawings)


def detection_mark(found: Detections, n: int, names: dict[int, str], tint: float) -> Mark:
    """Detection n in the color of its category; its box stands for a mask that it does not have.

    Args:
        names: of the categories, by id.
    """
    box, label = found.boxes[n], int(found.labels[n])
    if found.rles is None:
        [rle] = coco_mask.frPyObjects(_xywh(box[None]), found.height, found.width)
    else:
        rle = found.rle(n)
    # Detections of a category that the annotations do not know go by its number.
    text = f"{names.get(label, label)} {found.scores[n]:.2f}"
    return Mark(rle, color(label), tint, text, box)
