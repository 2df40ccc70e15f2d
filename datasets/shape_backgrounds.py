"""Backgrounds for synthetic images, and clutter that is no object although it has sharp edges.

Legend: H, W: size of the image; h, w: of the crop that is painted. Colors are RGB in [0, 255].
"""

import math

import cv2
import numpy as np
from numpy.random import Generator

from datasets.shape_textures import blend, noise, random_colors, shading, texture


def draw_background(rng: Generator, height: int, width: int) -> np.ndarray:
    """Textured regions with sharp, wavy borders, soft patches and thin lines; (H, W, 3) float32."""
    canvas = texture(rng, height, width)
    for _ in range(rng.integers(0, 3)):
        blend(canvas, texture(rng, height, width), _region(rng, height, width))
    for _ in range(rng.integers(3, 8)):
        _paint_soft_patch(rng, canvas)
    canvas = canvas.clip(0, 255).astype(np.uint8)  # cv2 draws smooth lines on 8 bits only
    for _ in range(rng.integers(2, 12)):
        _draw_line(rng, canvas)
    return canvas * shading(rng, height, width)


def _region(rng: Generator, height: int, width: int) -> np.ndarray:
    """One side of a wavy line across the image: opacity (H, W) float32, about 1 px of ramp.

    The line runs near the middle: a small corner cut off would look like an object that leaves the
    image.
    """
    angle = rng.uniform(0, 2 * np.pi)
    x = np.arange(width, dtype=np.float32) - np.float32(width * rng.uniform(0.35, 0.65))
    y = np.arange(height, dtype=np.float32)[:, None] - np.float32(height * rng.uniform(0.35, 0.65))
    distance = np.float32(math.cos(angle)) * x + np.float32(math.sin(angle)) * y
    wave = noise(rng, height, width, 120, octaves=2) * np.float32(rng.uniform(0, 120))
    return (distance + wave - wave.mean() + 0.5).clip(0, 1)


def _paint_soft_patch(rng: Generator, canvas: np.ndarray) -> None:
    """A patch of texture, or a plain spot, that fades out without an outline."""
    height, width = canvas.shape[:2]
    h, w = (int(side) for side in rng.integers(24, 140, 2))
    top, left = int(rng.integers(0, height - h)), int(rng.integers(0, width - w))
    x, y = np.linspace(-1, 1, w, dtype=np.float32), np.linspace(-1, 1, h, dtype=np.float32)
    radius = np.sqrt(x[None, :] ** 2 + y[:, None] ** 2) + noise(rng, h, w, 40, 2) * 0.4
    softness = rng.uniform(0.4, 0.9)
    alpha = ((1.1 - radius) / np.float32(softness)).clip(0, 1) * np.float32(rng.uniform(0.4, 1))
    border = np.minimum(1 - np.abs(x)[None, :], 1 - np.abs(y)[:, None]) * 4
    blend(
        canvas[top : top + h, left : left + w],
        texture(rng, h, w),
        alpha * border.clip(0, 1),
    )


def _draw_line(rng: Generator, canvas: np.ndarray) -> None:
    """A thin, smooth, open curve, on a (H, W, 3) uint8 canvas."""
    height, width = canvas.shape[:2]
    ends = rng.uniform(-0.1, 1.1, (3, 2)) * [width, height]
    t = np.linspace(0, 1, 24)[:, None]
    curve = (1 - t) ** 2 * ends[0] + 2 * t * (1 - t) * ends[1] + t**2 * ends[2]
    points = np.round(curve * 16).astype(np.int32)
    color, thickness = random_colors(rng, 1)[0].tolist(), int(rng.integers(1, 4))
    cv2.polylines(canvas, [points], False, color, thickness, cv2.LINE_AA, shift=4)
