"""Drawing for the report: masks and boxes on images, and objects enlarged with their outlines."""

import base64
import math
from dataclasses import dataclass

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from datasets.images import Image
from datasets.large_images import LARGE_PIXELS
from pipeline.inference.mask_crops import shrink_mask
from pipeline.inference.visualize import Label, draw_mask, put_labels

# px of the longer side, as the page shows them: of three pictures and of two in a row at most, and
# of enlarged objects.
PICTURE_SIDE, LARGE_SIDE, TILE_SIDE = 384, 480, 288
MARGIN = 0.15  # around an enlarged object, as a fraction of its longer side
TRUTH_RGB, MASK_RGB = (0, 220, 255), (255, 90, 0)
TRUTH_WIDTH, MASK_WIDTH = 3, 2  # px of a tile: where both outlines run, both are seen
WEBP = (cv2.IMWRITE_WEBP_QUALITY, 65)  # half the bytes of a JPEG whose outlines look as sharp


@dataclass(frozen=True)
class Mark:
    """A mask to be drawn; `box`: xyxy in its pixels, drawn as a thin line."""

    rle: dict
    rgb: tuple[int, int, int]
    tint: float
    label: str = ""
    box: np.ndarray | None = None


def draw_marks(image: np.ndarray, marks: list[Mark]) -> np.ndarray:
    """Marks on a copy of an image, (H, W, 3) uint8, the last on top.

    Their masks may be larger or smaller than the image, in the same proportions.
    """
    picture, labels = image.copy(), []
    height, width = picture.shape[:2]
    for mark in marks:
        scale = width / mark.rle["size"][1]
        if math.prod(mark.rle["size"]) > LARGE_PIXELS:
            mask = coco_mask.decode(shrink_mask(mark.rle, (height, width)))
        else:
            whole = coco_mask.decode(mark.rle)
            mask = cv2.resize(whole, (width, height), interpolation=cv2.INTER_AREA)
        draw_mask(picture, mask, mark.rgb, tint=mark.tint)
        if mark.box is not None:
            x1, y1, x2, y2 = np.rint(mark.box * scale).astype(int).tolist()
            cv2.rectangle(picture, (x1, y1), (x2 - 1, y2 - 1), mark.rgb, 1)
        x, y, w, h = (coco_mask.toBbox(mark.rle) * scale).tolist()
        labels.append(Label(mark.label, (x, y, x + w, y + h), mark.rgb))
    put_labels(picture, labels[::-1])
    return picture


def fit_picture(image: Image, *, side: int = PICTURE_SIDE, max_scale: float = 1) -> np.ndarray:
    """(H, W, 3) uint8 whose longer side is `side` px, but enlarged at most `max_scale`."""
    scale = min(max_scale, side / max(image.shape[:2]))
    return scale_image(image, scale) if isinstance(image, np.ndarray) else image.scaled(scale)[:]


def scale_image(image: np.ndarray, scale: float) -> np.ndarray:
    """(H, W, 3) smoothly, or a mask (H, W) with the pixels that it has; uint8."""
    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    smooth = cv2.INTER_CUBIC if scale > 1 else cv2.INTER_AREA
    interpolation = smooth if image.ndim == 3 else cv2.INTER_NEAREST_EXACT
    return cv2.resize(image, (width, height), interpolation=interpolation)


def draw_tiles(box: np.ndarray, truth: dict, masks: list[dict], image: Image) -> list[np.ndarray]:
    """An object (its box, (4,) xyxy, and RLE) enlarged, with its outline and that of each mask."""
    window = rows, columns = crop_window(box, image.shape[:2])
    if isinstance(image, np.ndarray):
        pixels = image[window]
    else:
        pixels = image.rows(rows.start, rows.stop)[:, columns]
    scale, tiles = TILE_SIDE / max(pixels.shape[:2]), []
    for mask in masks:
        tile = scale_image(pixels, scale)
        for rle, rgb, width in ((truth, TRUTH_RGB, TRUTH_WIDTH), (mask, MASK_RGB, MASK_WIDTH)):
            inside = scale_image(coco_mask.decode(rle)[window], scale)
            # The inner edge; none where the mask goes on past the tile.
            kernel = np.ones((2 * width + 1, 2 * width + 1), np.uint8)
            tile[(inside > 0) & (cv2.erode(inside, kernel) == 0)] = rgb
        tiles.append(tile)
    return tiles


def crop_window(box: np.ndarray, image_size: tuple[int, ...]) -> tuple[slice, slice]:
    """Rows and columns of a square around a box (xyxy), cut off at the edges of the image."""
    center, half = (box[:2] + box[2:]) / 2, (0.5 + MARGIN) * max(box[2:] - box[:2])
    left, top = np.floor(center - half).astype(int).clip(min=0).tolist()
    right, bottom = np.ceil(center + half).astype(int).tolist()
    return slice(top, min(bottom, image_size[0])), slice(left, min(right, image_size[1]))


def picture_uri(picture: np.ndarray) -> str:
    """(H, W, 3) uint8 RGB as a data URI."""
    ok, data = cv2.imencode(".webp", picture[..., ::-1], WEBP)
    assert ok
    return "data:image/webp;base64," + base64.b64encode(data.tobytes()).decode()
