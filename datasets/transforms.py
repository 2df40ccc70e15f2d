"""Pixel values as the networks take them."""

import numpy as np

# ImageNet statistics of RGB in [0, 1], the normalisation of every torchvision trunk.
MEAN = np.array([0.485, 0.456, 0.406], np.float32)
STD = np.array([0.229, 0.224, 0.225], np.float32)
GREY = np.float32(0.5)  # what lies outside an image, before normalisation


def normalise(pixels: np.ndarray) -> np.ndarray:
    """(H, W, 3) float32 RGB in [0, 1] to (3, H, W) float32 with ImageNet mean 0 and deviation 1."""
    return np.ascontiguousarray(((pixels - MEAN) / STD).transpose(2, 0, 1))


def denormalise(pixels: np.ndarray) -> np.ndarray:
    """The inverse of `normalise`, as uint8: (3, H, W) float32 to (H, W, 3) uint8."""
    return ((pixels.transpose(1, 2, 0) * STD + MEAN) * 255).round().clip(0, 255).astype(np.uint8)
