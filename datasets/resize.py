"""Images at another size, and pixel values as the networks take them.

The released code enlarges an image so that its corner pixels stay in the corners
(`align_corners`); otherwise pixels have an area, and a smaller image averages them.
"""

import math
from dataclasses import dataclass

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from datasets.images import Image
from datasets.large_images import WindowedImage
from datasets.scaled_rows import AREA, CORNERS

# ImageNet statistics of RGB in [0, 1], the normalization of every torchvision trunk.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
GRAY = 0.5  # what lies outside an image, before normalization


@dataclass(frozen=True)
class PixelConfig:
    """How images come to a network: RGB in [0, 1] less the mean, divided by the deviation."""

    mean: tuple[float, float, float] = MEAN  # of each channel, ImageNet's
    std: tuple[float, float, float] = STD  # of each channel
    bgr: bool = False  # the channels are then reversed, as Caffe's networks take them

    def __post_init__(self) -> None:
        if min(self.std) <= 0:
            raise ValueError(f"std must be deviations > 0, got {self.std}")


IMAGENET = PixelConfig()


def resize_image(image: Image, scale: float) -> np.ndarray:
    """(H, W, 3) uint8 resized by a scale, averaging areas when it shrinks; at least one pixel."""
    if isinstance(image, WindowedImage):
        return image.scaled(scale)[:]
    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    if (height, width) == image.shape[:2]:
        return image
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    return cv2.resize(image, (width, height), interpolation=method)


def resize_align_corners(image: Image, scale: float) -> np.ndarray:
    """As SpatialReSamplingEx of the released code: bilinear, no average; (h, w, 3) float32."""
    if isinstance(image, WindowedImage):
        return image.scaled(scale, align_corners=True)[:]
    height, width = (max(1, math.floor(side * scale + 0.5)) for side in image.shape[:2])
    return _interpolate(image, height, width)


def resize_sides(
    image: Image, *, short_side: int, long_side: int, align_corners: bool = False
) -> tuple[np.ndarray, tuple[float, float]]:
    """The image (H, W, 3) uint8 with a short side as given; smaller if the long side is too long.

    Returns:
        (h, w, 3) uint8, or with `align_corners` float32 of values that were not rounded; and the
        (x, y) scales of boxes. Sides are whole pixels, so these are w / W and h / H, where the
        released code takes one scale for both.
    """
    height, width = image.shape[:2]
    scale = _scale_of_sides(height, width, short_side, long_side)
    h, w = resized_sides(
        height, width, short_side=short_side, long_side=long_side, align_corners=align_corners
    )
    if not align_corners:
        return resize_image(image, scale), (w / width, h / height)
    # As image.scale of Lua Torch, which averages areas where it shrinks.
    if isinstance(image, WindowedImage):
        method = AREA if h * w < height * width else CORNERS
        pixels = image.resized((h, w), method, rounded=False)[:]
    elif h * w < height * width:
        pixels = cv2.resize(image.astype(np.float32), (w, h), interpolation=cv2.INTER_AREA)
    else:
        pixels = _interpolate(image, h, w)
    return pixels, (scale, scale)


def resized_sides(
    height: int, width: int, *, short_side: int, long_side: int, align_corners: bool = False
) -> tuple[int, int]:
    """Height and width that `resize_sides` gives an image of these sides."""
    scale = _scale_of_sides(height, width, short_side, long_side)
    whole = math.floor if align_corners else round
    return max(1, whole(height * scale)), max(1, whole(width * scale))


def _scale_of_sides(height: int, width: int, short_side: int, long_side: int) -> float:
    return min(short_side / min(height, width), long_side / max(height, width))


def _interpolate(image: np.ndarray, height: int, width: int) -> np.ndarray:
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    resized = F.interpolate(pixels, size=(height, width), mode="bilinear", align_corners=True)
    return resized[0].permute(1, 2, 0).numpy()


def normalize(pixels: np.ndarray, config: PixelConfig = IMAGENET) -> np.ndarray:
    """(H, W, 3) float32 RGB in [0, 1] to (3, H, W) float32 with mean 0 and deviation 1."""
    # Planes first: arithmetic on them is several times as fast as on triples.
    planes = np.array(pixels.transpose(2, 0, 1), np.float32, order="C")
    planes -= np.array(config.mean, np.float32)[:, None, None]
    planes /= np.array(config.std, np.float32)[:, None, None]
    return np.ascontiguousarray(planes[::-1]) if config.bgr else planes


def denormalize(pixels: np.ndarray) -> np.ndarray:
    """The inverse of `normalize`, as uint8: (3, H, W) float32 to (H, W, 3) uint8."""
    values = pixels.transpose(1, 2, 0) * np.array(STD, np.float32) + np.array(MEAN, np.float32)
    return (values * 255).round().clip(0, 255).astype(np.uint8)


def pad_and_normalize(
    pixels: Tensor, border: int, above: int | None = None, below: int | None = None
) -> Tensor:
    """A network's input from a whole image: normalized, with a gray border on all sides.

    (H, W, 3) of values 0 to 255 to (1, 3, H + 2 border, W + 2 border) float32, channels last. With
    `above` and `below` the border has other numbers of rows there.
    """
    above, below = (border if rows is None else rows for rows in (above, below))
    # Not with `device=`, which would wait for what a GPU is still computing.
    mean, std = (torch.tensor(v).to(pixels.device, non_blocking=True) for v in (MEAN, STD))
    height, width = pixels.shape[:2]
    gray = (GRAY - mean) / std
    canvas = gray.expand(above + height + below, width + 2 * border, 3).contiguous()
    canvas[above : above + height, border : border + width] = (pixels.float() / 255 - mean) / std
    return canvas.permute(2, 0, 1)[None]
