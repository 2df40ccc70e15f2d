"""Crops for the report: an object enlarged, with its outline and that of a mask."""

from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from datasets.images import read_image
from pipeline.report.pictures import jpeg_uri

TILE_SIDE = 288  # px, the longer one
MARGIN = 0.15  # of the object's longer side, around it
TRUTH_RGB, MASK_RGB = (0, 220, 255), (255, 90, 0)
TRUTH_WIDTH, MASK_WIDTH = 3, 2  # px of the tile; where both run, both are seen


def draw_crops(path: Path, box: np.ndarray, truth: dict, masks: Iterable[dict]) -> tuple[str, ...]:
    """A tile for each mask: the object's surroundings, its outline and that of the mask.

    Args:
        box: (4,) xyxy of the object. truth, masks: RLE.

    Returns:
        Data URIs.

    Raises:
        ImageError: the image cannot be read.
    """
    image = read_image(path)
    window = crop_window(box, image.shape[:2])
    truth_tile = enlarge(coco_mask.decode(truth)[window])
    tiles = []
    for mask in masks:
        tile = enlarge(image[window], smooth=True)
        draw_outline(tile, truth_tile, TRUTH_RGB, TRUTH_WIDTH)
        draw_outline(tile, enlarge(coco_mask.decode(mask)[window]), MASK_RGB, MASK_WIDTH)
        tiles.append(jpeg_uri(tile))
    return tuple(tiles)


def crop_window(box: np.ndarray, image_size: tuple[int, int]) -> tuple[slice, slice]:
    """Rows and columns of a square around a box (xyxy), less what is outside of the image."""
    center, sides = (box[:2] + box[2:]) / 2, box[2:] - box[:2]
    half = (0.5 + MARGIN) * max(sides)
    low = np.floor(center - half).astype(int).clip(min=0).tolist()
    high = np.ceil(center + half).astype(int).tolist()  # x, y
    height, width = image_size
    return slice(low[1], min(high[1], height)), slice(low[0], min(high[0], width))


def enlarge(crop: np.ndarray, *, smooth: bool = False) -> np.ndarray:
    """A crop (h, w) or (h, w, 3) uint8 at the size of a tile; masks with the pixels they have."""
    factor = TILE_SIDE / max(crop.shape[:2])
    size = tuple(max(1, round(side * factor)) for side in (crop.shape[1], crop.shape[0]))
    if not smooth:
        return cv2.resize(crop, size, interpolation=cv2.INTER_NEAREST_EXACT)
    return cv2.resize(crop, size, interpolation=cv2.INTER_CUBIC if factor > 1 else cv2.INTER_AREA)


def draw_outline(picture: np.ndarray, mask: np.ndarray, rgb: tuple, width: int) -> None:
    """The inner edge of a mask (H, W), in place; none where the mask goes on past the picture."""
    kernel = np.ones((2 * width + 1, 2 * width + 1), np.uint8)
    picture[(mask > 0) & (cv2.erode(mask, kernel) == 0)] = rgb
