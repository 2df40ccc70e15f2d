"""Color augmentation: an image darker or brighter, of other contrast and saturation."""

from typing import NamedTuple

import numpy as np
import torch
from torchvision.transforms import functional


class ColorFactors(NamedTuple):
    """By how much brightness, contrast and saturation are multiplied."""

    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0

    @classmethod
    def draw(cls, rng: np.random.Generator, jitter: float) -> "ColorFactors":
        """Each between 1 - jitter and 1 + jitter; nothing is drawn for a jitter of 0."""
        return cls(*rng.uniform(1 - jitter, 1 + jitter, size=3).tolist()) if jitter else cls()


def change_colors(pixels: np.ndarray, factors: ColorFactors) -> np.ndarray:
    """An image (H, W, 3) float32 RGB in [0, 1] with its colors changed, of the same range."""
    if factors == ColorFactors():
        return pixels
    planes = torch.from_numpy(np.array(pixels.transpose(2, 0, 1), order="C"))
    planes = functional.adjust_brightness(planes, factors.brightness)
    planes = functional.adjust_contrast(planes, factors.contrast)
    planes = functional.adjust_saturation(planes, factors.saturation)
    return planes.numpy().transpose(1, 2, 0)
