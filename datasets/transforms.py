"""Pixel values as the networks take them."""

from dataclasses import dataclass

import numpy as np

# ImageNet statistics of RGB in [0, 1], the normalization of every torchvision trunk.
MEAN = np.array([0.485, 0.456, 0.406], np.float32)
STD = np.array([0.229, 0.224, 0.225], np.float32)
GRAY = np.float32(0.5)  # what lies outside an image, before normalization


@dataclass(frozen=True)
class PixelRules:
    """What a network takes: RGB in [0, 1] less `mean`, by `std`, turned around for `bgr`."""

    mean: tuple[float, float, float] = tuple(MEAN.tolist())
    std: tuple[float, float, float] = tuple(STD.tolist())
    bgr: bool = False


IMAGENET = PixelRules()


def normalize(pixels: np.ndarray, rules: PixelRules = IMAGENET) -> np.ndarray:
    """(H, W, 3) float32 RGB in [0, 1] to (3, H, W) float32 with mean 0 and deviation 1."""
    # Planes first: arithmetic on them is several times as fast as on triples.
    planes = np.array(pixels.transpose(2, 0, 1), np.float32, order="C")
    planes -= np.float32(rules.mean)[:, None, None]
    planes /= np.float32(rules.std)[:, None, None]
    return np.ascontiguousarray(planes[::-1]) if rules.bgr else planes


def denormalize(pixels: np.ndarray) -> np.ndarray:
    """The inverse of `normalize`, as uint8: (3, H, W) float32 to (H, W, 3) uint8."""
    return ((pixels.transpose(1, 2, 0) * STD + MEAN) * 255).round().clip(0, 255).astype(np.uint8)
