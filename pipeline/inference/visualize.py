"""Pictures of proposals and detections: outlines and tints on the image."""

import math
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import cv2
import numpy as np
import pycocotools.mask as coco_mask

from datasets.files import write_atomically
from datasets.images import Image
from pipeline.inference.mask_crops import fit_for_drawing
from pipeline.inference.nms import mask_nms
from pipeline.inference.proposals import Detections, Proposals

LABEL_HEIGHT, BELOW, LABEL_SCALE = 18, 5, 0.5  # px of a line, below its baseline; of the font
MAX_COVERED = 0.1  # of a box, by a label
SURE = 0.995  # scores from here on read as 1.00, which tells nothing
DUPLICATE_IOU = 0.7  # of masks: more of the same hides what else was found
# Distinct hues, by steps of the golden ratio around the color circle.
PALETTE = cv2.cvtColor(
    np.array([[(int(180 * (n * 0.618034 % 1)), 200, 255) for n in range(64)]], np.uint8),
    cv2.COLOR_HSV2RGB,
)[0]


def draw_proposals(image: Image, proposals: Proposals, count: int) -> np.ndarray:
    """The best `count` that do not repeat each other, on a copy of the image (H, W, 3) uint8.

    The best is on top, and the scores are on top of all. Large images are reduced.
    """
    distinct = mask_nms(proposals, DUPLICATE_IOU)
    return _draw_masks(image, distinct, score_texts(distinct.scores[:count]))


def score_texts(scores: np.ndarray) -> list[str]:
    """Scores as written on a picture; none where they would read as 1.00."""
    return [
        "" if score >= SURE else f"{score:.2f}" if score > 1 - SURE else "<0.01"
        for score in scores.tolist()
    ]


def draw_detections(
    image: Image, detections: Detections, names: dict[int, str], count: int
) -> np.ndarray:
    """The best `count` with names (by category id) and scores on a copy of the image.

    Large images are reduced.

    Thin lines are the boxes: they are moved by the detector, the masks are as proposed.
    """
    scores = score_texts(detections.scores[:count])
    best = zip(detections.labels[:count].tolist(), scores, strict=True)
    texts = [f"{names[label]} {score}".rstrip() for label, score in best]
    return _draw_masks(image, detections, texts, boxes=True)


def _draw_masks(
    image: Image, found: Proposals, texts: list[str], *, boxes: bool = False
) -> np.ndarray:
    """The first masks, as many as there are texts, and their boxes."""
    picture, found = fit_for_drawing(image, found, len(texts))
    for n in reversed(range(len(texts))):
        draw_mask(picture, coco_mask.decode(found.rle(n)), color(n))
        if boxes:
            x0, y0, x1, y1 = found.boxes[n].round().astype(int).tolist()
            cv2.rectangle(picture, (x0, y0), (x1 - 1, y1 - 1), color(n), 1)
    boxes_xyxy = map(tuple, found.boxes[: len(texts)].tolist())
    labels = zip(texts, boxes_xyxy, map(color, range(len(texts))), strict=True)
    put_labels(picture, [Label(*label) for label in labels])
    return picture


def color(n: int) -> tuple[int, int, int]:
    """The n-th of a row of colors that are easy to tell apart."""
    return tuple(PALETTE[n % len(PALETTE)].tolist())


def draw_mask(
    picture: np.ndarray, mask: np.ndarray, rgb: tuple[int, int, int], *, tint: float = 0.35
) -> None:
    """Tints a mask (H, W) and draws its outline, in place."""
    inside = mask.astype(bool)
    picture[inside] = (picture[inside] * (1 - tint) + np.array(rgb) * tint).astype(np.uint8)
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(picture, contours, -1, rgb, 2)


@dataclass(frozen=True)
class Label:
    """A text, which may be empty, for what has this box (xyxy in pixels), in that one's color."""

    text: str
    box: tuple[float, float, float, float]
    rgb: tuple[int, int, int]


def put_labels(picture: np.ndarray, labels: list[Label]) -> None:
    """Labels above the upper left corners of their boxes, in place.

    No label covers another one, or more than `MAX_COVERED` of a box, its own included: it moves
    down until it doesn't, at most to the line below its box, or is left out.
    """
    boxes = np.array([label.box for label in labels], float).reshape(-1, 4)
    allowed = MAX_COVERED * (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    taken = np.empty((0, 4))
    for label in labels:
        if not label.text:
            continue
        width = label_width(label.text)
        # Whole pixels: a sum of fractions may round to where the label is still in the way.
        x = max(min(round(label.box[0]), picture.shape[1] - width), 0)
        bottom = max(round(label.box[1]), LABEL_HEIGHT)
        last = min(math.ceil(label.box[3]) + LABEL_HEIGHT, picture.shape[0])
        while bottom <= last:
            area = np.array([x, bottom - LABEL_HEIGHT, x + width, bottom])
            covered = boxes[_common_area(boxes, area) > allowed]
            in_the_way = [*covered, *taken[_common_area(taken, area) > 0]]
            if not in_the_way:
                taken = np.concatenate([taken, area[None]])
                red, green, blue = ((channel + 255) // 2 for channel in label.rgb)
                origin = (x, bottom - BELOW)
                put_label(picture, label.text, origin, (red, green, blue), scale=LABEL_SCALE)
                break
            bottom = math.ceil(min(box[3] for box in in_the_way)) + LABEL_HEIGHT


def _common_area(boxes: np.ndarray, box: np.ndarray) -> np.ndarray:
    """What boxes (N, 4) have in common with another one, (N,) square pixels."""
    sides = np.minimum(boxes[:, 2:], box[2:]) - np.maximum(boxes[:, :2], box[:2])
    return sides.clip(min=0).prod(axis=1)


def label_width(text: str) -> int:
    """Pixels that a label takes, its dark ground included."""
    return cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, LABEL_SCALE, 1)[0][0] + 3


def put_label(
    picture: np.ndarray,
    text: str,
    origin: tuple[int, int],
    rgb: tuple[int, int, int],
    scale: float = 0.42,
) -> None:
    """Text on a dark ground, readable on any picture, in place; its baseline begins at origin."""
    (width, height), base = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, 1)
    x, y = origin
    ground = picture[max(y - height - 2, 0) : y + base, max(x - 1, 0) : x + width + 1]
    ground[:] = ground // 4
    cv2.putText(picture, text, origin, cv2.FONT_HERSHEY_SIMPLEX, scale, rgb, 1, cv2.LINE_AA)


def save_in_folder(picture: np.ndarray, folder: Path, file_name: str) -> None:
    """Writes the picture of an image as JPEG, below the folder whatever the image's name says."""
    inner = [part for part in PurePosixPath(file_name).parts if part not in ("/", "..")]
    save_picture(picture, folder.joinpath(*inner[:-1], f"{inner[-1]}.jpg"))


def save_picture(picture: np.ndarray, path: Path) -> None:
    """Writes (H, W, 3) uint8 RGB as PNG, or as JPEG if the path ends in .jpg."""
    ok, data = cv2.imencode(".jpg" if path.suffix == ".jpg" else ".png", picture[..., ::-1])
    assert ok
    write_atomically(path, data.tobytes())
