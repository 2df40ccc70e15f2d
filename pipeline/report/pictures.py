"""The pictures of the report: the images that came out best and worst.

Letters: D proposals and G annotated objects (crowds are none) of one image.
"""

import base64
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from datasets.coco import CocoInstances
from datasets.images import ImageError, read_image
from pipeline.inference.proposals import Proposals, ProposalStore
from pipeline.inference.visualize import Label, color, draw_mask, put_labels

TOP = 100  # proposals of an image that are looked at
SHOWN = 5  # of them, in the picture of the proposals with the highest scores
FOUND_IOU = 0.5
NUM_EXAMPLES = 6  # the best, and as many of the worst
PICTURE_SIDE = 480  # px, the longer one at most
JPEG_QUALITY = 85
SCORE_COLOR = 32  # of the palette, the first for the highest scores: apart from the objects'
FULL, FAINT = 0.35, 0.15  # tints


@dataclass(frozen=True)
class Example:
    """An image with its objects and proposals drawn.

    Attributes:
        ious: (G,) IoU of each object with the best of the first `TOP` proposals.
        pictures: data URIs of the objects, the best proposal for each, the highest scores.
        error: why there are no pictures.
    """

    file_name: str
    ious: np.ndarray
    pictures: tuple[str, ...] = ()
    error: str = ""

    @property
    def quality(self) -> float:
        """The mean IoU of the objects: what images are ordered by."""
        return float(self.ious.mean())

    @property
    def num_found(self) -> int:
        """Objects with a proposal of IoU 0.5 or more."""
        return int((self.ious >= FOUND_IOU).sum())


@dataclass(frozen=True)
class Examples:
    """The best images, best first, and the worst, worst first, of `num_images` with objects."""

    best: list[Example]
    worst: list[Example]
    num_images: int


def read_examples(directory: Path, *, coco: CocoInstances, images: Path) -> Examples:
    """Draw the images of a proposal store that came out best and worst.

    Goes through the store twice, so that only a number for each image is kept.

    Raises:
        FileNotFoundError: there is no store. ValueError: a shard of it is broken.
    """
    store = ProposalStore(directory)
    if not store.shards():
        raise FileNotFoundError(directory)
    qualities = {
        image: float(best_matches(proposals, coco, objects)[0].mean())
        for image, proposals, objects in images_with_objects(store, coco)
    }
    best, worst = choose_examples(qualities)
    drawn = {
        image: draw_example(images / coco.file_name(image), proposals, coco, objects)
        for image, proposals, objects in images_with_objects(store, coco)
        if image in {*best, *worst}
    }
    return Examples([drawn[i] for i in best], [drawn[i] for i in worst], len(qualities))


def images_with_objects(
    store: ProposalStore, coco: CocoInstances
) -> Iterator[tuple[int, Proposals, list[int]]]:
    """The index, the proposals and the objects, largest first, of each image that has objects.

    An image for which the network proposed nothing comes too.
    """
    index = {image_id: i for i, image_id in enumerate(coco.image_ids.tolist())}
    for proposals in _also_empty(store):
        image = index.get(proposals.image_id)
        if image is None:
            continue
        if objects := objects_of(coco, image):
            yield image, proposals, objects


def objects_of(coco: CocoInstances, image: int) -> list[int]:
    """The annotations of an image that are not crowds, largest first."""
    annotations = range(coco.image_starts[image], coco.image_starts[image + 1])
    return sorted((a for a in annotations if not coco.is_crowd[a]), key=lambda a: -coco.areas[a])


def _also_empty(store: ProposalStore) -> Iterator[Proposals]:
    left = {image["id"]: image for image in store.images().values()}
    for proposals in store:
        left.pop(proposals.image_id, None)
        yield proposals
    for image in left.values():
        none = np.empty(0, np.float32)
        size = (image["height"], image["width"])
        yield Proposals(image["id"], image["file_name"], *size, none, none.reshape(0, 4), [])


def best_matches(
    proposals: Proposals, coco: CocoInstances, objects: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """The best mask IoU of each object with the first `TOP` proposals, and whose it is.

    Returns:
        (G,) IoU and (G,) number of the proposal; IoU 0 where no proposal overlaps.
    """
    masks = [proposals.rle(n) for n in range(min(TOP, len(proposals)))]
    if not masks:
        return np.zeros(len(objects)), np.zeros(len(objects), int)
    ious = coco_mask.iou(masks, [coco.rle(a) for a in objects], [0] * len(objects))  # (D, G)
    return ious.max(axis=0).clip(min=0), ious.argmax(axis=0)


def choose_examples(qualities: dict[int, float]) -> tuple[list[int], list[int]]:
    """The best images, best first, and the worst, worst first; no image is in both."""
    ranked = sorted(qualities, key=lambda image: -qualities[image])
    best = ranked[: min(NUM_EXAMPLES, math.ceil(len(ranked) / 2))]
    return best, ranked[len(best) :][: -NUM_EXAMPLES - 1 : -1]


def draw_example(
    path: Path, proposals: Proposals, coco: CocoInstances, objects: list[int]
) -> Example:
    """Three pictures of an image: objects, the best proposal for each, the highest scores."""
    ious, numbers = best_matches(proposals, coco, objects)
    name = proposals.file_name
    try:
        image = scaled(read_image(path))
    except ImageError as error:
        return Example(name, ious, error=str(error))
    truth = [Mark(coco.rle(a), color(n), tint=0) for n, a in enumerate(objects)]
    matches = [
        Mark(proposals.rle(numbers[n]), color(n), FULL if iou >= FOUND_IOU else FAINT, f"{iou:.2f}")
        for n, iou in enumerate(ious)
        if iou > 0
    ]
    scored = [
        Mark(proposals.rle(n), color(SCORE_COLOR + n), FAINT, f"{proposals.scores[n]:.2f}")
        for n in reversed(range(min(SHOWN, len(proposals))))
    ]
    drawings = (jpeg_uri(draw_marks(image, marks)) for marks in (truth, matches, scored))
    return Example(name, ious, tuple(drawings))


def spread(ranked: list, count: int) -> list:
    """Items that stand for all: the middle one of each of `count` equal parts of a ranking."""
    parts = min(count, len(ranked))
    return [ranked[math.floor((n + 0.5) * len(ranked) / parts)] for n in range(parts)]


def scaled(image: np.ndarray, *, max_factor: float = 1) -> np.ndarray:
    """(H, W, 3) uint8 with a longer side of `PICTURE_SIDE`, but no further enlarged than that."""
    factor = min(max_factor, PICTURE_SIDE / max(image.shape))
    interpolation = cv2.INTER_CUBIC if factor > 1 else cv2.INTER_AREA
    return cv2.resize(image, None, fx=factor, fy=factor, interpolation=interpolation)


@dataclass(frozen=True)
class Mark:
    """A mask to be drawn; `box`: xyxy in its pixels, drawn as a thin line."""

    rle: dict
    rgb: tuple[int, int, int]
    tint: float
    label: str = ""
    box: np.ndarray | None = None


def draw_marks(image: np.ndarray, marks: list[Mark]) -> np.ndarray:
    """Marks on a copy of an image, (H, W, 3) uint8, the last on top; their masks may be larger."""
    picture = image.copy()
    height, width = picture.shape[:2]
    for mark in marks:
        mask = cv2.resize(coco_mask.decode(mark.rle), (width, height), interpolation=cv2.INTER_AREA)
        draw_mask(picture, mask, mark.rgb, tint=mark.tint)
        if mark.box is not None:
            x1, y1, x2, y2 = np.rint(mark.box * width / mark.rle["size"][1]).astype(int).tolist()
            cv2.rectangle(picture, (x1, y1), (x2 - 1, y2 - 1), mark.rgb, 1)
    put_labels(picture, [_label(mark, width) for mark in marks[::-1] if mark.label])
    return picture


def _label(mark: Mark, width: int) -> Label:
    """At the top left of the mask, in a picture of a width."""
    corner = coco_mask.toBbox(mark.rle)[:2] * width / mark.rle["size"][1]
    x, y = np.rint(corner).astype(int).tolist()
    return Label(mark.label, (x, y), mark.rgb)


def jpeg_uri(picture: np.ndarray) -> str:
    """(H, W, 3) uint8 RGB as a data URI."""
    # 4:4:4: with colors at half the resolution, thin outlines would be smeared.
    options = {
        cv2.IMWRITE_JPEG_QUALITY: JPEG_QUALITY,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR: cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
    }
    ok, data = cv2.imencode(".jpg", picture[..., ::-1], [n for o in options.items() for n in o])
    assert ok
    return "data:image/jpeg;base64," + base64.b64encode(data).decode()
