"""The pictures of the report: which images are shown, and with which proposals or detections.

Letters: D proposals or detections and G annotated objects (crowds are none) of one image.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torchvision.ops import box_convert, box_iou

from datasets.coco import CocoInstances
from datasets.images import ImageError, read_image
from pipeline.inference.coco_json import read_detections
from pipeline.inference.detections import Detections
from pipeline.inference.proposals import Proposals, ProposalStore
from pipeline.inference.visualize import color
from pipeline.report.drawing import Mark, draw_marks, fit_picture, jpeg_uri

TOP = 100  # proposals of an image that are looked at
SHOWN = 5  # of them, in the picture of the proposals with the highest scores
MIN_SCORE = 0.3  # of the detections that are looked at
FOUND_IOU = 0.5
NUM_EXAMPLES = 6  # of the best images, of the worst, and of those with detections
MAX_SCALE = 2  # small images with detections are enlarged, so that names do not cover them
SCORE_COLOR = 32  # of the palette, the first for the highest scores: apart from the objects'
FULL, FAINT = 0.35, 0.15  # tints
Found = TypeVar("Found", Proposals, Detections)


@dataclass(frozen=True)
class Scene(Generic[Found]):
    """An image that has objects, and what was found in it.

    Attributes:
        objects: G annotations, the largest object first.
        overlaps: IoU of proposals or detections and objects, (D, G).
    """

    found: Found
    objects: list[int]
    overlaps: np.ndarray

    @property
    def ious(self) -> np.ndarray:
        """(G,) IoU of each object with the best of what was found; 0 where there is none."""
        return self.overlaps.max(axis=0, initial=0)


@dataclass(frozen=True)
class Example:
    """An image, or one object of it, as the page shows it.

    Attributes:
        ious: of the image's objects; or of one object with each of the masks that are compared.
        pictures: data URIs. error: why there are none.
    """

    file_name: str
    ious: np.ndarray
    pictures: tuple[str, ...] = ()
    error: str = ""
    num_detections: int | None = None


@dataclass(frozen=True)
class Gallery:
    """Examples by heading, and how many images, objects, ... they stand for."""

    examples: dict[str, list[Example]]
    totals: dict[str, int]


# Which images are shown.


def read_proposals(directory: Path, *, coco: CocoInstances) -> list[Scene[Proposals]]:
    """The images with objects of a proposal store, with the first `TOP` proposals of each.

    Raises:
        FileNotFoundError: there is no store. ValueError: a shard of it is broken.
    """
    store = ProposalStore(directory)
    if not store.shards():
        raise FileNotFoundError(directory)
    found = [first(proposals, TOP) for proposals in store]
    proposed, none = {proposals.image_id for proposals in found}, np.empty(0, np.float32)
    for name, image in store.images().items():
        if image["id"] not in proposed:
            size = image["height"], image["width"]
            found.append(Proposals(image["id"], name, *size, none, none.reshape(0, 4), []))
    return scenes_of(found, coco)


def proposal_gallery(scenes: list[Scene[Proposals]], coco: CocoInstances, images: Path) -> Gallery:
    """The images that came out best and worst by the mean IoU of their objects."""
    best, worst = choose_examples(sorted(scenes, key=lambda scene: -scene.ious.mean()))
    examples = {
        heading: [draw_proposals(scene, coco, images) for scene in chosen]
        for heading, chosen in (("The best images", best), ("The worst images", worst))
        if chosen
    }
    return Gallery(examples, {"images": len(scenes)})


def detection_gallery(path: Path, *, coco: CocoInstances, images: Path) -> Gallery:
    """Images that stand for all that have objects, from the best to the worst.

    Images are ordered by the mean over their objects of the IoU with the best detection of the
    object's category, and cut into equal parts; the middle one of each is drawn.

    Raises:
        FileNotFoundError, ValueError: no detections of these images.
    """
    columns = zip(coco.image_ids.tolist(), coco.image_sizes.tolist(), strict=True)
    records = [
        {"id": image_id, "file_name": coco.file_name(i), "height": height, "width": width}
        for i, (image_id, (height, width)) in enumerate(columns)
    ]
    found = read_detections(path, records)
    confident = [first(f, int((f.scores >= MIN_SCORE).sum())) for f in found]
    scenes = sorted(scenes_of(confident, coco), key=lambda scene: -scene.ious.mean())
    examples = [draw_detections(scene, coco, images) for scene in spread(scenes, NUM_EXAMPLES)]
    totals = {
        "images": len(scenes),
        "detections": sum(map(len, found)),
        "confident": sum(map(len, confident)),
    }
    return Gallery({"": examples}, totals)


def first(found: Found, count: int) -> Found:
    """The `count` proposals or detections with the highest scores, as copies."""
    best: dict[str, Any] = {
        name: column[:count].copy()
        for name, column in vars(found).items()
        if isinstance(column, np.ndarray | list)
    }
    return replace(found, **best)


def scenes_of(found: Iterable[Found], coco: CocoInstances) -> list[Scene[Found]]:
    """Those of the images that have objects."""
    index = {image_id: i for i, image_id in enumerate(coco.image_ids.tolist())}
    known = [(f, objects_of(coco, index[f.image_id])) for f in found if f.image_id in index]
    return [Scene(f, objects, overlaps(f, coco, objects)) for f, objects in known if objects]


def objects_of(coco: CocoInstances, i: int) -> list[int]:
    """The annotations of image i that are not crowds, largest first."""
    annotations = range(coco.image_starts[i], coco.image_starts[i + 1])
    return sorted((a for a in annotations if not coco.is_crowd[a]), key=lambda a: -coco.areas[a])


def overlaps(found: Proposals | Detections, coco: CocoInstances, objects: list[int]) -> np.ndarray:
    """IoU with objects, (D, G): of masks, or of boxes if there are no masks.

    0 where a detection is of another category than the object.
    """
    if found.rles is None:
        ious = box_ious(found.boxes, coco.boxes[objects])
    else:
        masks = [found.rle(d) for d in range(len(found))]
        ious = mask_ious(masks, [coco.rle(a) for a in objects])
    if isinstance(found, Detections):
        ious[found.labels[:, None] != coco.category_ids[coco.category_index[objects]]] = 0
    return ious


def mask_ious(masks: list[dict], objects: list[dict]) -> np.ndarray:
    """IoU of masks and objects, as RLE: (D, G)."""
    if not masks:
        return np.zeros((0, len(objects)))
    return coco_mask.iou(masks, objects, [0] * len(objects))


def box_ious(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """IoU of boxes (D, 4) and (G, 4), xyxy: (D, G)."""
    return box_iou(*(torch.from_numpy(b.astype(float)) for b in (boxes, others))).numpy()


def choose_examples(ranked: list) -> tuple[list, list]:
    """The best, best first, and the worst, worst first, of a ranking; none is in both."""
    best = ranked[: min(NUM_EXAMPLES, math.ceil(len(ranked) / 2))]
    return best, ranked[len(best) :][: -NUM_EXAMPLES - 1 : -1]


def spread(ranked: list, count: int) -> list:
    """Items that stand for all: the middle one of each of `count` equal parts of a ranking."""
    parts = min(count, len(ranked))
    return [ranked[math.floor((i + 0.5) * len(ranked) / parts)] for i in range(parts)]


# What is drawn.


def draw_proposals(scene: Scene[Proposals], coco: CocoInstances, images: Path) -> Example:
    """Three pictures of an image: objects, the best proposal for each, the highest scores."""
    found = scene.found
    truth = [Mark(coco.rle(a), color(g), 0) for g, a in enumerate(scene.objects)]
    best = [
        Mark(found.rle(int(scene.overlaps[:, g].argmax())), color(g), _tint(iou), f"{iou:.2f}")
        for g, iou in enumerate(scene.ious)
        if iou > 0
    ]
    highest = [
        Mark(found.rle(d), color(SCORE_COLOR + d), FAINT, f"{found.scores[d]:.2f}")
        for d in reversed(range(min(SHOWN, len(found))))
    ]

    def draw(image: np.ndarray) -> list[np.ndarray]:
        return [draw_marks(fit_picture(image), marks) for marks in (truth, best, highest)]

    return make_example(images, found.file_name, scene.ious, draw)


def draw_detections(scene: Scene[Detections], coco: CocoInstances, images: Path) -> Example:
    """Two pictures of an image: its objects with their names, and its detections."""
    names = dict(zip(coco.category_ids.tolist(), coco.category_names, strict=True))
    truth = []
    for a in scene.objects:
        category = int(coco.category_ids[coco.category_index[a]])
        truth.append(Mark(coco.rle(a), color(category), 0, names[category]))
    marks = [
        detection_mark(scene.found, d, names, _tint(scene.overlaps[d].max()))
        for d in reversed(range(len(scene.found)))
    ]

    def draw(image: np.ndarray) -> list[np.ndarray]:
        image = fit_picture(image, max_scale=MAX_SCALE)
        return [draw_marks(image, truth), draw_marks(image, marks)]

    example = make_example(images, scene.found.file_name, scene.ious, draw)
    return replace(example, num_detections=len(scene.found))


def _tint(iou: float) -> float:
    return FULL if iou >= FOUND_IOU else FAINT


def detection_mark(found: Detections, d: int, names: dict[int, str], tint: float) -> Mark:
    """Detection d in the color of its category; its box stands for a mask that it does not have.

    Args:
        names: of the categories, by id.
    """
    box, label = found.boxes[d], int(found.labels[d])
    if found.rles is None:
        xywh = box_convert(torch.from_numpy(box[None].astype(float)), "xyxy", "xywh").numpy()
        [rle] = coco_mask.frPyObjects(xywh, found.height, found.width)
    else:
        rle = found.rle(d)
    # Detections of a category that the annotations do not know go by its id.
    return Mark(rle, color(label), tint, f"{names.get(label, label)} {found.scores[d]:.2f}", box)


def make_example(
    images: Path, name: str, ious: np.ndarray, draw: Callable[[np.ndarray], list[np.ndarray]]
) -> Example:
    """An example with the pictures that `draw` makes of the image, or why it cannot be read."""
    try:
        image = read_image(images / name)
    except ImageError as error:
        return Example(name, ious, error=str(error))
    return Example(name, ious, tuple(map(jpeg_uri, draw(image))))
