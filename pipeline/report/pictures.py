"""The pictures of the report: which images are shown, and with which proposals or detections.

Letters: D proposals or detections and G annotated objects (crowds are none) of one image.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torchvision.ops import box_convert, box_iou

from datasets.coco import CocoInstances
from datasets.images import Image, ImageError, ImageFolder
from pipeline.inference.proposal_store import ProposalStore
from pipeline.inference.proposals import Detections, Proposals
from pipeline.inference.visualize import color, score_texts
from pipeline.report.drawing import LARGE_SIDE, Mark, draw_marks, fit_picture, picture_uri

TOP = 100  # proposals of an image that are looked at
SHOWN = 5  # of them, in the picture of the proposals with the highest scores
MIN_SCORE = 0.3  # of the detections that are looked at
FOUND_IOU = 0.5
NUM_EXAMPLES = 5  # of the best images, and of the worst
NUM_DETECTED = 6  # of the images with detections
MAX_SCALE = 2  # small images with detections are enlarged, so that names do not cover them
SCORE_COLOR = 32  # of the palette, the first for the highest scores: apart from the objects'
FULL, FAINT = 0.35, 0.15  # tints
Found = TypeVar("Found", Proposals, Detections)


@dataclass(frozen=True)
class Scene(Generic[Found]):
    """An image: what was found, its G annotations, largest first, and their IoU, (D, G)."""

    found: Found
    objects: list[int]
    overlaps: np.ndarray

    @property
    def ious(self) -> np.ndarray:
        """(G,) IoU of each object with the best of what was found; 0 where there is none."""
        return self.overlaps.max(axis=0, initial=0)


# Which images are shown.


def read_proposals(directory: Path) -> list[Proposals]:
    """The first `TOP` proposals of each image of a store, also of images without any."""
    store = ProposalStore(directory)
    none = np.empty(0, np.float32)
    found = {proposals.image_id: first(proposals, TOP) for proposals in store}
    for image in store.images().values():
        size = image["height"], image["width"]
        empty = Proposals(image["id"], image["file_name"], *size, none, none.reshape(0, 4), [])
        found.setdefault(image["id"], empty)
    return list(found.values())


def proposal_gallery(
    scenes: list[Scene[Proposals]], coco: CocoInstances, images: ImageFolder
) -> dict[str, Any]:
    """The images that came out best and worst by the mean IoU of their objects."""
    best, worst = (
        [
            make_example(images, s.found.file_name, s.ious, partial(draw_proposals, s, coco))
            for s in chosen
        ]
        for chosen in choose_examples(sorted(scenes, key=lambda scene: -scene.ious.mean()))
    )
    return {"best": best, "worst": worst, "images": len(scenes)}


def detection_gallery(
    found: list[Detections], coco: CocoInstances, images: ImageFolder
) -> dict[str, Any]:
    """Images that stand for all that have objects, from the best to the worst.

    Images are ordered by the mean over their objects of the IoU with the best detection of the
    object's category, and cut into equal parts; the middle one of each is drawn.
    """
    sure = [confident(f) for f in found]
    scenes = sorted(scenes_of(sure, coco), key=lambda scene: -scene.ious.mean())
    examples = [
        make_example(images, s.found.file_name, s.ious, partial(draw_detections, s, coco))
        | {"num_detections": len(s.found)}
        for s in spread(scenes, NUM_DETECTED)
    ]
    totals = {"detections": sum(map(len, found)), "confident": sum(map(len, sure))}
    return {"examples": examples, "images": len(scenes)} | totals


def first(found: Found, count: int) -> Found:
    """The `count` proposals or detections with the highest scores, as copies."""
    return found.take(np.arange(len(found))[:count])


def confident(found: Detections) -> Detections:
    """Those with a score of at least `MIN_SCORE`."""
    return first(found, int((found.scores >= MIN_SCORE).sum()))


def scenes_of(found: Iterable[Found], coco: CocoInstances) -> list[Scene[Found]]:
    """Those of the images that have objects."""
    index, scenes = {image_id: i for i, image_id in enumerate(coco.image_ids.tolist())}, []
    for f in found:
        if (i := index.get(f.image_id)) is not None:
            annotations = range(coco.image_starts[i], coco.image_starts[i + 1])
            objects = [a for a in annotations if not coco.is_crowd[a]]
            if objects:
                objects.sort(key=lambda a: -coco.areas[a])
                scenes.append(Scene(f, objects, overlaps(f, coco, objects)))
    return scenes


def overlaps(found: Proposals | Detections, coco: CocoInstances, objects: list[int]) -> np.ndarray:
    """IoU with objects, (D, G): of masks, or of boxes where there are none.

    0 where a detection is of another category than the object.
    """
    ious, has_mask = box_ious(found.boxes, coco.boxes[objects]), coco.has_mask[objects]
    if found.rles and has_mask.any():
        masks = [found.rle(d) for d in range(len(found))]
        truth = [coco.rle(a) for a in objects if coco.has_mask[a]]
        ious[:, has_mask] = np.reshape(
            coco_mask.iou(masks, truth, [0] * len(truth)), (-1, len(truth))
        )
    if isinstance(found, Detections):
        ious[found.labels[:, None] != coco.category_ids[coco.category_index[objects]]] = 0
    return ious


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


def make_example(
    images: ImageFolder, name: str, ious: np.ndarray, draw: Callable[[Image], list[np.ndarray]]
) -> dict[str, Any]:
    """What the page shows of an image: the pictures that `draw` makes of it, or why there are none.

    Args:
        ious: of its objects; or of one object with each of the masks that are compared.
    """
    shown: dict[str, Any] = {"file_name": name, "ious": ious, "pictures": [], "error": ""}
    try:
        image = images.open(name)
    except ImageError as error:
        return shown | {"error": str(error)}
    return shown | {"pictures": [picture_uri(picture) for picture in draw(image)]}


def draw_proposals(scene: Scene[Proposals], coco: CocoInstances, image: Image) -> list[np.ndarray]:
    """Three pictures of an image: objects, the best proposal for each, the highest scores."""
    found = scene.found
    truth = [Mark(coco.rle(a), color(g), 0) for g, a in enumerate(scene.objects)]
    best = [
        Mark(found.rle(int(scene.overlaps[:, g].argmax())), color(g), _tint(iou), f"{iou:.2f}")
        for g, iou in enumerate(scene.ious)
        if iou > 0
    ]
    texts = score_texts(found.scores[:SHOWN])
    highest = [
        Mark(found.rle(d), color(SCORE_COLOR + d), FAINT, texts[d])
        for d in reversed(range(len(texts)))
    ]
    return [draw_marks(fit_picture(image), marks) for marks in (truth, best, highest)]


def draw_detections(
    scene: Scene[Detections], coco: CocoInstances, image: Image
) -> list[np.ndarray]:
    """Two pictures of an image: its objects with their names, and its detections.

    Detections have the colors of their categories; the box of one without a mask stands for it.
    """
    names = dict(zip(coco.category_ids.tolist(), coco.category_names, strict=True))
    truth, marks, found = [], [], scene.found
    scores = score_texts(found.scores)
    for a in scene.objects:
        category = int(coco.category_ids[coco.category_index[a]])
        truth.append(Mark(coco.rle(a), color(category), 0, names[category]))
    for d in reversed(range(len(found))):
        box, label = found.boxes[d], int(found.labels[d])
        if not found.rles:
            xywh = box_convert(torch.tensor(box[None]).double(), "xyxy", "xywh").numpy()
            [rle] = coco_mask.frPyObjects(xywh, found.height, found.width)
        else:
            rle = found.rle(d)
        # Detections of a category that the annotations do not know go by its id.
        text = f"{names.get(label, label)} {scores[d]}".rstrip()
        marks.append(Mark(rle, color(label), _tint(scene.overlaps[d].max()), text, box))
    picture = fit_picture(image, side=LARGE_SIDE, max_scale=MAX_SCALE)
    return [draw_marks(picture, truth), draw_marks(picture, marks)]


def _tint(iou: float) -> float:
    return FULL if iou >= FOUND_IOU else FAINT
