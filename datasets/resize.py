"""Images at another size, in this project's way and in the released code's."""

import math

import cv2
import numpy as np
import torch
import torch.nn.functional as F

# "area": pixels have an area. "corners" (released code): an image is enlarged so that its corner
# pixels stay in the corners.
RESAMPLINGS = ("area", "corners")


def resize_sides(
    image: np.ndarray, *, short_side: int, long_side: int, resampling: str = "area"
) -> tuple[np.ndarray, tuple[float, float]]:
    """The image with its short side as given, or smaller if its long side would be too long.

    Args:
        image: (H, W, 3) uint8.
        resampling: one of `RESAMPLINGS`.

    Returns:
        (h, w, 3), uint8 or for "corners" float32 of values that were not rounded; and the (x, y)
        factors by which boxes follow. Sides are whole pixels, so they are w / W and h / H, where
        the released code takes one factor for both.
    """
    height, width = image.shape[:2]
    scale = min(short_side / min(height, width), long_side / max(height, width))
    if resampling == "corners":
        size = (max(1, math.floor(height * scale)), max(1, math.floor(width * scale)))
        return _as_image_scale(image, size), (scale, scale)
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    pixels = cv2.resize(image, size[::-1], interpolation=method)
    return pixels, (size[1] / width, size[0] / height)


def _as_image_scale(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """As image.scale of Lua Torch: averages areas where it shrinks."""
    if size[0] * size[1] < image.shape[0] * image.shape[1]:
        return cv2.resize(image.astype(np.float32), size[::-1], interpolation=cv2.INTER_AREA)
    return resize_between_corners(image, size)


def resize_between_corners(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear, the corner pixels' centers on the corner pixels' centers, without any average.

    Args:
        image: (H, W, 3), uint8 or float32. size: height and width.

    Returns:
        (h, w, 3) float32, not rounded to integers.
    """
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    resized = F.interpolate(pixels, size=size, mode="bilinear", align_corners=True)
    return resized[0].permute(1, 2, 0).numpy()
