"""Textures and cluttered backgrounds for the synthetic images of `datasets/shapes.py`.

Objects and background take their textures from here alike, so that neither texture nor color tells
them apart. Colors are RGB in [0, 255]; h, w: size of what is drawn, in pixels.
"""

import math

import cv2
import numpy as np
from numpy.random import Generator


def random_colors(rng: Generator, num: int) -> np.ndarray:
    """(num, 3) colors, not at the ends of the range: a texture needs room on both sides."""
    return rng.uniform(30, 225, (num, 3))


def texture(rng: Generator, h: int, w: int, base: np.ndarray | None = None) -> np.ndarray:
    """A random texture around the color `base` (3,), or a random one: (h, w, 3) float32."""
    base = random_colors(rng, 1)[0] if base is None else base
    field = _pattern(rng, h, w, period=math.exp(rng.uniform(math.log(6), math.log(48))))
    field += (_noise(rng, h, w, 4, octaves=2) - 0.5) * np.float32(rng.uniform(0.1, 0.5))  # grain
    index = (field * 255).clip(0, 255).astype(np.uint8)
    # 256 colors around the base, from dark to light or from light to dark.
    contrast = rng.uniform(7, 35) * rng.choice([-1, 1])
    stops = base + contrast * np.array([[-1], [0], [1]]) + rng.uniform(-1, 1, (3, 3)) * contrast
    colors = [np.interp(np.linspace(0, 2, 256), [0, 1, 2], channel) for channel in stops.T]
    palette = np.stack(colors, axis=1)[:, None].clip(0, 255).astype(np.uint8)
    return cv2.applyColorMap(index, palette).astype(np.float32)


def _pattern(rng: Generator, h: int, w: int, period: float) -> np.ndarray:
    """(h, w) float32, mostly in [0, 1]; `period` in pixels."""
    name = rng.choice(["stripes", "checks", "dots", "noise", "gradient", "plain"])
    if name == "plain":
        return np.full((h, w), 0.5, np.float32)
    if name == "noise":
        return _noise(rng, h, w, period) * 2 - 0.5
    if name == "gradient":
        return _waves(rng, h, w, 4 * max(h, w))[0] * 0.5 + 0.5
    u, v = _waves(rng, h, w, period)
    wave = {"stripes": u, "checks": u * v, "dots": u + v - 0.8}[name]
    return (wave * np.float32(rng.uniform(0.7, 4))).clip(-1, 1) * 0.5 + 0.5


def _noise(rng: Generator, h: int, w: int, period: float, octaves: int = 3) -> np.ndarray:
    """Value noise, (h, w) float32 in [0, 1]; `period`: pixels of the coarsest octave."""
    field = np.zeros((h, w), np.float32)
    for octave in range(octaves):
        cell = max(period / 2**octave, 1.0)
        grid = rng.random((math.ceil(h / cell) + 1, math.ceil(w / cell) + 1), dtype=np.float32)
        weight = 0.5 ** (octave + 1) / (1 - 0.5**octaves)
        field += cv2.resize(grid * np.float32(weight), (w, h), interpolation=cv2.INTER_LINEAR)
    return field


def _waves(rng: Generator, h: int, w: int, period: float) -> tuple[np.ndarray, np.ndarray]:
    """Two orthogonal sine waves in a random direction, bent by noise; (h, w) float32 in [-1, 1]."""
    angle = rng.uniform(0, np.pi)
    frequency = 2 * np.pi / period
    x = np.arange(w, dtype=np.float32) * frequency
    y = np.arange(h, dtype=np.float32)[:, None] * frequency
    bend = _noise(rng, h, w, 3 * period, octaves=1) * np.float32(rng.uniform(0, 4))
    phase = rng.uniform(0, 2 * np.pi, 2).astype(np.float32)
    cos, sin = np.float32(math.cos(angle)), np.float32(math.sin(angle))
    return np.sin(cos * x + sin * y + bend + phase[0]), np.sin(cos * y - sin * x + bend + phase[1])


def shading(rng: Generator, h: int, w: int) -> np.ndarray:
    """A soft light from a random side, to multiply colors with; (h, w, 1) float32."""
    slope = rng.uniform(-0.25, 0.25, 2).astype(np.float32)
    x, y = _axes(h, w)
    return (1 + slope[0] * x + slope[1] * y)[:, :, None]


def _axes(h: int, w: int) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates from -1 to 1: x (w,) and y (h, 1), float32."""
    return np.linspace(-1, 1, w, dtype=np.float32), np.linspace(-1, 1, h, dtype=np.float32)[:, None]


def blend(canvas: np.ndarray, paint: np.ndarray, opacity: np.ndarray) -> None:
    """Paints (h, w, 3) `paint` with an (h, w) `opacity` over `canvas`, a view, in place."""
    canvas[:] = cv2.blendLinear(paint, canvas, opacity, 1 - opacity)


def draw_background(rng: Generator, height: int, width: int) -> np.ndarray:
    """Textured regions with sharp, wavy borders, soft patches and thin lines; (H, W, 3) float32."""
    canvas = texture(rng, height, width)
    for _ in range(rng.integers(0, 3)):
        blend(canvas, texture(rng, height, width), _region(rng, height, width))
    for _ in range(rng.integers(3, 8)):
        h, w = np.minimum(rng.integers(24, 140, 2), [height - 1, width - 1]).tolist()
        top, left = rng.integers(0, height - h), rng.integers(0, width - w)
        crop = canvas[top : top + h, left : left + w]
        opacity = _spot(rng, h, w)
        blend(crop, texture(rng, h, w), opacity)
    canvas = canvas.clip(0, 255).astype(np.uint8)  # cv2 draws smooth lines on 8 bits only
    t = np.linspace(0, 1, 24)[:, None]
    for _ in range(rng.integers(2, 12)):  # open curves
        a, b, c = rng.uniform(-0.1, 1.1, (3, 2)) * [width, height]
        points = np.round(((1 - t) ** 2 * a + 2 * t * (1 - t) * b + t**2 * c) * 16)
        color, thickness = random_colors(rng, 1)[0].tolist(), int(rng.integers(1, 4))
        lines = [points.astype(np.int32)]
        cv2.polylines(canvas, lines, False, color, thickness, cv2.LINE_AA, shift=4)
    return canvas * shading(rng, height, width)


def _region(rng: Generator, height: int, width: int) -> np.ndarray:
    """One side of a wavy line across the image: opacity (H, W) float32, with a ramp of about 1 px.

    The line runs near the middle: a cut-off corner would look like an object at the border.
    """
    angle = rng.uniform(0, 2 * np.pi)
    x = np.arange(width, dtype=np.float32) - np.float32(width * rng.uniform(0.35, 0.65))
    y = np.arange(height, dtype=np.float32)[:, None] - np.float32(height * rng.uniform(0.35, 0.65))
    distance = np.float32(math.cos(angle)) * x + np.float32(math.sin(angle)) * y
    wave = _noise(rng, height, width, 120, octaves=2) * np.float32(rng.uniform(0, 120))
    return (distance + wave - wave.mean() + 0.5).clip(0, 1)


def _spot(rng: Generator, h: int, w: int) -> np.ndarray:
    """A spot that fades out without an outline: opacity (h, w) float32."""
    x, y = _axes(h, w)
    radius = np.sqrt(x**2 + y**2) + _noise(rng, h, w, 40, octaves=2) * 0.4
    softness = rng.uniform(0.4, 0.9)
    opacity = ((1.1 - radius) / np.float32(softness)).clip(0, 1) * np.float32(rng.uniform(0.4, 1))
    return opacity * (np.minimum(1 - np.abs(x), 1 - np.abs(y)) * 4).clip(0, 1)  # none at the edge
