"""Textures for synthetic images: a scalar field, colored through a palette.

Objects and background take theirs from here alike, so that neither texture nor color tells them
apart. Legend: h, w: size of what is drawn, in pixels. Colors are RGB in [0, 255].
"""

import math

import cv2
import numpy as np
from numpy.random import Generator


def random_colors(rng: Generator, num: int) -> np.ndarray:
    """(num, 3) colors, none at the ends of the range: there textures would have no room."""
    return rng.uniform(30, 225, (num, 3))


def noise(rng: Generator, h: int, w: int, period: float, octaves: int = 3) -> np.ndarray:
    """Multi-octave value noise, (h, w) float32 in [0, 1]; `period`: px of the coarsest octave."""
    field = np.zeros((h, w), np.float32)
    for octave in range(octaves):
        cell = max(period / 2**octave, 1.0)
        grid = rng.random((math.ceil(h / cell) + 1, math.ceil(w / cell) + 1), dtype=np.float32)
        weight = 0.5 ** (octave + 1) / (1 - 0.5**octaves)
        field += cv2.resize(grid * np.float32(weight), (w, h), interpolation=cv2.INTER_LINEAR)
    return field


def _waves(rng: Generator, h: int, w: int, period: float) -> tuple[np.ndarray, np.ndarray]:
    """Two orthogonal sine waves of a random direction, bent by noise; (h, w) float32 in [-1, 1]."""
    angle = rng.uniform(0, np.pi)
    frequency = 2 * np.pi / period
    x = np.arange(w, dtype=np.float32) * frequency
    y = np.arange(h, dtype=np.float32)[:, None] * frequency
    bend = noise(rng, h, w, 3 * period, octaves=1) * np.float32(rng.uniform(0, 4))
    phase = rng.uniform(0, 2 * np.pi, 2).astype(np.float32)
    cos, sin = np.float32(math.cos(angle)), np.float32(math.sin(angle))
    return np.sin(cos * x + sin * y + bend + phase[0]), np.sin(cos * y - sin * x + bend + phase[1])


def _palette(rng: Generator, base: np.ndarray) -> np.ndarray:
    """256 colors from dark to light, or light to dark, around `base`; (256, 1, 3) uint8."""
    contrast = rng.uniform(7, 35) * rng.choice([-1, 1])
    stops = base + contrast * np.array([[-1], [0], [1]]) + rng.uniform(-1, 1, (3, 3)) * contrast
    level = np.linspace(0, 2, 256)
    colors = [np.interp(level, [0, 1, 2], stops[:, channel]) for channel in range(3)]
    return np.stack(colors, axis=1)[:, None].clip(0, 255).astype(np.uint8)


def texture(rng: Generator, h: int, w: int, base: np.ndarray | None = None) -> np.ndarray:
    """A random texture whose colors lie around `base`, or around a random one.

    Returns:
        (h, w, 3) float32 in [0, 255].
    """
    base = random_colors(rng, 1)[0] if base is None else base
    period = math.exp(rng.uniform(math.log(6), math.log(48)))
    field = _pattern(rng, h, w, period)
    field += (noise(rng, h, w, 4, octaves=2) - 0.5) * np.float32(rng.uniform(0.1, 0.5))  # grain
    index = (field * 255).clip(0, 255).astype(np.uint8)
    return cv2.applyColorMap(index, _palette(rng, base)).astype(np.float32)


def _pattern(rng: Generator, h: int, w: int, period: float) -> np.ndarray:
    kind = rng.choice(["stripes", "checks", "dots", "noise", "gradient", "plain"])
    if kind == "plain":
        return np.full((h, w), 0.5, np.float32)
    if kind == "noise":
        return noise(rng, h, w, period) * 2 - 0.5
    if kind == "gradient":
        return _waves(rng, h, w, 4 * max(h, w))[0] * 0.5 + 0.5
    u, v = _waves(rng, h, w, period)
    wave = {"stripes": u, "checks": u * v, "dots": u + v - 0.8}[kind]
    return (wave * np.float32(rng.uniform(0.7, 4))).clip(-1, 1) * 0.5 + 0.5


def shading(rng: Generator, h: int, w: int) -> np.ndarray:
    """A soft light from a random side, as a factor; (h, w, 1) float32."""
    slope = rng.uniform(-0.25, 0.25, 2).astype(np.float32)
    x, y = np.linspace(-1, 1, w, dtype=np.float32), np.linspace(-1, 1, h, dtype=np.float32)
    return (1 + slope[0] * x[None, :] + slope[1] * y[:, None])[:, :, None]


def blend(canvas: np.ndarray, paint: np.ndarray, alpha: np.ndarray) -> None:
    """Paints (h, w, 3) `paint` over the view `canvas` with opacity `alpha` (h, w), in place."""
    canvas[:] = cv2.blendLinear(paint, canvas, alpha, 1 - alpha)
