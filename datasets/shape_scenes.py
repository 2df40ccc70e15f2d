"""Draws synthetic images: objects over a cluttered background, in painter's order.

Every painted object stays recognizable to the end, so that all that can be seen is annotated.
Legend: H, W: size of the image; h, w: of a stencil; K: points of an outline, (x, y) each.
"""

from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
from numpy.random import Generator

from datasets.shape_backgrounds import draw_background
from datasets.shape_outlines import OUTLINES, posed_outline
from datasets.shape_textures import blend, random_colors, shading, texture

IMAGE_SIDES = (320, 448), (240, 384)  # px, longer and shorter side
PORTRAIT_SHARE = 0.3
OBJECT_SIDE = (16.0, 90.0, 300.0)  # px, longest side: least, most frequent, largest; log scale
OBJECTS_PER_IMAGE = (3, 9)
EMPTY_SHARE, CROWD_SHARE = 0.08, 0.04
CUT_SHARE = 0.5  # of the objects may leave the image; those too large for it do as well
PLACEMENT_TRIES = 8
MIN_VISIBLE_SHARE, MIN_VISIBLE_AREA = 0.6, 60  # of the whole outline; px
MIN_COLOR_DISTANCE = 90.0  # RGB, of an object's mean color to the mean of its ground
SUPERSAMPLING = 4


@dataclass(frozen=True)
class ShapeObject:
    """One painted object, or one crowd of them. `mask`: its visible pixels, (H, W) bool."""

    category: str
    mask: np.ndarray
    iscrowd: bool = False


class _Stencil(NamedTuple):
    """What an outline covers. `coverage`: (h, w) float32 share of each pixel; `crop`: its place."""

    coverage: np.ndarray
    crop: tuple[slice, slice]


def render(rng: Generator) -> tuple[np.ndarray, list[ShapeObject]]:
    """Draws one image.

    Returns:
        the image, (H, W, 3) uint8 RGB, and its objects. Their masks do not overlap, and no object
        that can be seen is missing.
    """
    longer, shorter = (int(rng.integers(low, high + 1)) for low, high in IMAGE_SIDES)
    height, width = (longer, shorter) if rng.random() < PORTRAIT_SHARE else (shorter, longer)
    scene = _Scene(rng, height, width)
    if rng.random() >= EMPTY_SHARE:
        for side in _object_sides(rng):
            scene.paint_object(_category(rng), side)
        if rng.random() < CROWD_SHARE / (1 - EMPTY_SHARE):
            scene.paint_crowd(_category(rng))
    return _expose(rng, scene.canvas), scene.objects()


def _category(rng: Generator) -> str:
    return str(rng.choice(list(OUTLINES)))


def _object_sides(rng: Generator) -> np.ndarray:
    """Longest sides in px, in painter's order: large ones are mostly behind, or they hide all."""
    num = rng.integers(OBJECTS_PER_IMAGE[0], OBJECTS_PER_IMAGE[1] + 1)
    sides = np.exp(rng.triangular(*np.log(OBJECT_SIDE), size=num))
    return sides[np.argsort(-sides * rng.uniform(0.5, 2, num))]


class _Scene:
    """A canvas, and the owner of each pixel: 0 is the background, i + 1 is object i."""

    def __init__(self, rng: Generator, height: int, width: int) -> None:
        self.rng = rng
        self.canvas = draw_background(rng, height, width)  # (H, W, 3) float32
        self.owner = np.zeros((height, width), np.uint8)
        self.full_areas: list[float] = []  # px per object, hidden and outside parts included
        self.labels: list[tuple[str, bool]] = []  # category, iscrowd

    def objects(self) -> list[ShapeObject]:
        return [
            ShapeObject(category, self.owner == index + 1, iscrowd)
            for index, (category, iscrowd) in enumerate(self.labels)
        ]

    def paint_object(self, category: str, side: float) -> None:
        """Paints one object where it and those before it stay visible, if it finds such a place."""
        height, width = self.owner.shape
        for _ in range(PLACEMENT_TRIES):
            outline = posed_outline(self.rng, category, side)
            outline += self._place(side)
            full_area = float(cv2.contourArea(outline.astype(np.float32)))
            stencil = _cut_stencil(outline, height, width)
            if self._leaves_all_visible(stencil, full_area):
                self._register(category, full_area, iscrowd=False)
                self._paint(stencil, self._contrasting_color(stencil))
                return

    def paint_crowd(self, category: str) -> None:
        """Paints a dense swarm of small shapes of like color, which counts as one object."""
        height, width = self.owner.shape
        radius = self.rng.uniform(30, 60)
        center = self.rng.uniform(0.2, 0.8, 2) * [width, height]
        side = self.rng.uniform(12, 20)
        stencils = []
        for place in self.rng.standard_normal((int(radius), 2)) * radius * 0.5 + center:
            outline = posed_outline(self.rng, category, side * self.rng.uniform(0.8, 1.25))
            stencils.append(_cut_stencil(outline + place, height, width))
        swarm = _Stencil(np.zeros((height, width), np.float32), (slice(None), slice(None)))
        for coverage, crop in stencils:
            np.maximum(swarm.coverage[crop], coverage, out=swarm.coverage[crop])
        full_area = float(swarm.coverage.sum())
        if not self._leaves_all_visible(swarm, full_area):
            return
        self._register(category, full_area, iscrowd=True)
        base = self._contrasting_color(swarm)
        for stencil in stencils:
            self._paint(stencil, base + self.rng.uniform(-25, 25, 3))

    def _place(self, side: float) -> np.ndarray:
        """A random center (x, y): mostly where `side` px fit in, else anywhere in the image."""
        height, width = self.owner.shape
        margin = 0 if self.rng.random() < CUT_SHARE else side / 2
        middle = np.array([width, height]) / 2
        return middle + self.rng.uniform(-1, 1, 2) * np.maximum(middle - margin, 0)

    def _leaves_all_visible(self, stencil: _Stencil, full_area: float) -> bool:
        """Whether a new object would be seen well enough, and those it hides in part still are."""
        solid = stencil.coverage >= 0.5
        if np.count_nonzero(solid) < _least_visible(full_area):
            return False
        hidden = np.bincount(self.owner[stencil.crop][solid], minlength=1)
        for index in np.flatnonzero(hidden[1:]):
            visible = np.count_nonzero(self.owner == index + 1) - hidden[index + 1]
            if visible < _least_visible(self.full_areas[index]):
                return False
        return True

    def _contrasting_color(self, stencil: _Stencil) -> np.ndarray:
        """A random color that differs from the mean of what it will be painted on."""
        solid = (stencil.coverage >= 0.5).astype(np.uint8)
        ground = cv2.mean(self.canvas[stencil.crop], solid)[:3]
        candidates = random_colors(self.rng, 16)
        distance = np.linalg.norm(candidates - ground, axis=1)
        far_enough = np.flatnonzero(distance >= MIN_COLOR_DISTANCE)
        return candidates[far_enough[0] if len(far_enough) else distance.argmax()]

    def _register(self, category: str, full_area: float, *, iscrowd: bool) -> None:
        self.full_areas.append(full_area)
        self.labels.append((category, iscrowd))

    def _paint(self, stencil: _Stencil, base: np.ndarray) -> None:
        """Paints a texture through the stencil, for the object that was registered last."""
        coverage, crop = stencil
        if coverage.size:
            h, w = coverage.shape
            paint = texture(self.rng, h, w, base) * shading(self.rng, h, w)
            blend(self.canvas[crop], paint, coverage)
            self.owner[crop][coverage >= 0.5] = len(self.labels)


def _least_visible(full_area: float) -> float:
    return max(MIN_VISIBLE_AREA, MIN_VISIBLE_SHARE * full_area)


def _cut_stencil(outline: np.ndarray, height: int, width: int) -> _Stencil:
    """The part of a (K, 2) outline within the image; empty if there is none."""
    low = np.clip(np.floor(outline.min(axis=0)), 0, [width, height]).astype(int)
    high = np.clip(np.ceil(outline.max(axis=0)), 0, [width, height]).astype(int)
    crop = slice(low[1], high[1]), slice(low[0], high[0])
    w, h = (high - low).tolist()
    if h == 0 or w == 0:
        return _Stencil(np.zeros((h, w), np.float32), crop)
    fine = np.zeros((h * SUPERSAMPLING, w * SUPERSAMPLING), np.uint8)
    # cv2's whole numbers are pixel centers: -.5 brings the outline's 0 to the first pixel's edge.
    points = np.round(((outline - low) * SUPERSAMPLING - 0.5) * 16).astype(np.int32)
    cv2.fillPoly(fine, [points], 255, cv2.LINE_8, shift=4)
    coverage = cv2.resize(fine, (w, h), interpolation=cv2.INTER_AREA)
    return _Stencil(coverage.astype(np.float32) / 255, crop)


def _expose(rng: Generator, canvas: np.ndarray) -> np.ndarray:
    """Blur, contrast, brightness and noise of the whole image; (H, W, 3) uint8."""
    if rng.random() < 0.6:
        canvas = cv2.GaussianBlur(canvas, (0, 0), rng.uniform(0.3, 1.0))
    gain, offset = rng.uniform(0.75, 1.1), rng.uniform(-25, 25)
    canvas = (canvas - 127) * np.float32(gain) + np.float32(127 + offset)
    grain = np.frombuffer(rng.bytes(canvas.size), np.uint8).reshape(canvas.shape)
    canvas += (grain - np.float32(127.5)) * np.float32(rng.uniform(0.01, 0.12))
    return canvas.clip(0, 255).astype(np.uint8)
