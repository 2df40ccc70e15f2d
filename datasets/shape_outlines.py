"""The outlines of the synthetic shapes: closed polygons that differ in kind, not in color.

Legend: K: points of an outline, (x, y) each, around the origin; of any size until posed.
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.random import Generator


def _arc(start: float, stop: float, num: int = 48) -> np.ndarray:
    angle = np.linspace(start, stop, num, endpoint=False)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _cross(rng: Generator) -> np.ndarray:
    a = rng.uniform(0.28, 0.4)
    quarter = np.array([[1, -a], [1, a], [a, a]])
    turns = [np.array([[0, 1], [-1, 0]]), -np.eye(2), np.array([[0, -1], [1, 0]])]
    return np.concatenate([quarter] + [quarter @ turn for turn in turns])


def _crescent(rng: Generator) -> np.ndarray:
    """The unit disk without the disk of radius .8 around (d, 0)."""
    d, r = rng.uniform(0.5, 0.65), 0.8
    x = (1 + d * d - r * r) / (2 * d)  # where the two circles meet
    y = math.sqrt(1 - x * x)
    outer, inner = math.atan2(y, x), math.atan2(y, x - d)
    bite = _arc(2 * np.pi - inner, inner) * r + [d, 0]
    return np.concatenate([_arc(outer, 2 * np.pi - outer), bite])


def _heart(_: Generator) -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([16 * np.sin(t) ** 3, -y], axis=1)


def _leaf(rng: Generator) -> np.ndarray:
    x = np.linspace(-1, 1, 24)
    half = rng.uniform(0.4, 0.55) * (1 - x**2) * (1 + 0.4 * x)
    upper, lower = np.stack([x, half], axis=1), np.stack([x, -half], axis=1)
    return np.concatenate([upper[:-1], lower[:0:-1]])


OUTLINES: dict[str, Callable[[Generator], np.ndarray]] = {
    "disk": lambda _: _arc(0, 2 * np.pi),
    "triangle": lambda _: _arc(0, 2 * np.pi, 3),
    "square": lambda _: _arc(0, 2 * np.pi, 4),
    "cross": _cross,
    "crescent": _crescent,
    "heart": _heart,
    "leaf": _leaf,
}


def posed_outline(rng: Generator, category: str, side: float) -> np.ndarray:
    """A random outline of the category: squeezed, rotated, in mild perspective.

    Returns:
        (K, 2) float64 x, y in pixels; its box is centered on the origin, its longer side is `side`.
    """
    points = OUTLINES[category](rng)
    points = points / np.abs(points).max() * [1, rng.uniform(0.7, 1)]
    angle = rng.uniform(0, 2 * np.pi)
    cos, sin = math.cos(angle), math.sin(angle)
    points = points @ np.array([[cos, sin], [-sin, cos]])
    points = points / (1 + points @ rng.uniform(-0.15, 0.15, (2, 1)))
    low, high = points.min(axis=0), points.max(axis=0)
    return (points - (low + high) / 2) * (side / (high - low).max())
