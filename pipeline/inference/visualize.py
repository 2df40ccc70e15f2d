"""Pictures of proposals and detections: outlines and tints on the image."""

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import cv2
import numpy as np
import pycocotools.mask as coco_mask

from datasets.files import write_atomically
from datasets.images import Image
from pipeline.inference.mask_crops import fit_for_drawing
from pipeline.inference.proposals import Detections, Proposals
from pipeline.inference.propose import mask_nms

LABEL_HEIGHT, LABEL_SCALE = 17, 0.5  # px that a line takes; of the font
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
    return _draw_masks(image, distinct, [f"{score:.2f}" for score in distinct.scores[:count]])


def draw_detections(
    image: Image, detections: Detections, names: dict[int, str], count: int
) -> np.ndarray:
    """The best `count` with names (by category id) and scores on a copy of the image.

    Large images are reduced.

    Thin lines are the boxes: they are moved by the detector, the masks are as proposed.
    """
    best = zip(detections.labels[:count].tolist(), detections.scores[:count], strict=True)
    texts = [f"{names[label]} {score:.2f}" for label, score in best]
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
    corners = map(tuple, found.boxes[: len(texts), :2].tolist())
    labels = zip(texts, corners, map(color, range(len(texts))), strict=True)
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
    """A text whose baseline starts at a corner (x, y) of what it names, in that one's color."""

    text: str
    corner: tuple[float, float]
    rgb: tuple[int, int, int]


def put_labels(picture: np.ndarray, labels: list[Label]) -> None:
    """Labels, the first one where it belongs, others below those that are in their way, in place.

    Those for which there is no place left above the lower edge are not drawn.
    """
    taken: list[tuple[int, int, int]] = []  # x, y, width
    for label in labels:
        width = label_width(label.text)
        # Whole pixels: a sum of fractions may round to where the label is still in the way.
        x = max(min(round(label.corner[0]), picture.shape[1] - width), 0)
        y = max(round(label.corner[1]), LABEL_HEIGHT)
        while in_the_way := [
            v
            for u, v, its_width in taken
            if x < u + its_width and u < x + width and abs(y - v) < LABEL_HEIGHT
        ]:
            y = max(in_the_way) + LABEL_HEIGHT
        if y < picture.shape[0]:
            taken.append((x, y, width))
            red, green, blue = ((channel + 255) // 2 for channel in label.rgb)
            put_label(picture, label.text, (x, y), (red, green, blue), scale=LABEL_SCALE)


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
