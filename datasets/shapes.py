"""A synthetic COCO-format dataset of textured shapes, drawn from a seed: the embedded default.

Objects are painted one over the other on a cluttered background. Each of them stays recognizable,
so everything that can be seen is annotated.

Letters: H, W: size of the image; K: points of an outline, (x, y) each.
"""

import json
import math
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.random import Generator

from datasets.files import write_atomically
from datasets.progress import progress_bar
from datasets.shape_textures import blend, draw_background, random_colors, shading, texture

DESCRIPTION = "synthetic shapes"
VERSION = "4"  # raise it when a seed draws something else: then old directories are rewritten
FILE_NAME = "{:06d}.jpg"  # of an image id
JPEG_QUALITY = 92
# An annotation with a larger hole, as a fraction of the object's area, is RLE: polygons have none.
MAX_HOLE_FRACTION = 0.02
# px. From .5 on, a speck may shrink to two points, which pycocotools takes for a box; at .55 the
# worst IoU with the mask is .89 (thin slivers), at .4 it is .98.
POLYGON_TOLERANCE = 0.4

PORTRAIT_PROB, EMPTY_PROB, CROWD_PROB = 0.3, 0.08, 0.04  # of an image
CUT_PROB = 0.5  # that an object may leave the image; those too large for it do as well
PLACEMENT_TRIES = 8
MIN_VISIBLE_FRACTION = 0.6  # of the whole outline
MIN_VISIBLE_SQUARE = 60 / 16**2  # px, for each px of the square of the least longest side
MIN_COLOR_DISTANCE = 90.0  # RGB, of an object's mean color to the mean of its ground
SUPERSAMPLING = 4


@dataclass(frozen=True)
class SceneConfig:
    """What is drawn in an image."""

    long_side: tuple[int, int] = (320, 448)  # pixels of an image, lowest and highest
    short_side: tuple[int, int] = (240, 384)  # the same
    objects: tuple[int, int] = (3, 9)  # of an image, lowest and highest; some find no place
    # Pixels of an object's longest side: least, most frequent, largest, on a log scale.
    object_sides: tuple[float, float, float] = (16.0, 90.0, 300.0)

    def __post_init__(self) -> None:
        for name in ("long_side", "short_side", "objects", "object_sides"):
            value = getattr(self, name)
            if value[0] < 1 or list(value) != sorted(value):
                raise ValueError(f"{name} must be ascending and at least 1, got {value}")
        if self.object_sides[0] == self.object_sides[-1]:
            raise ValueError(f"object_sides must be a range, got {self.object_sides}")


def write_shapes(
    directory: str | Path,
    *,
    num_images: int,
    seed: int,
    split: str = "train",
    scene: SceneConfig | None = None,
) -> Path:
    """Writes `images/{split}/000001.jpg ...` and `annotations/instances_{split}.json`, its result.

    Image i depends on (seed, split, i) and the scene alone. The json is written last and names the
    parameters: a finished dataset of the same parameters is kept, one of other parameters is
    replaced.

    Raises:
        ValueError: there is a json of that name which this function did not write.
    """
    folder = Path(directory) / "images" / split
    path = Path(directory) / "annotations" / f"instances_{split}.json"
    info: dict = {"description": DESCRIPTION, "version": VERSION}
    info |= {"num_images": num_images, "seed": seed, "split": split}
    scene = scene or SceneConfig()
    for name, usual in asdict(SceneConfig()).items():
        if getattr(scene, name) != usual:
            info[name] = list(getattr(scene, name))
    if path.exists():
        try:
            old = json.loads(path.read_bytes())["info"]
            is_ours = old["description"] == DESCRIPTION
        except (ValueError, LookupError, TypeError):
            is_ours = False
        if not is_ours:
            raise ValueError(f"{path}: not made by write_shapes; choose another directory")
        if old == info:
            return path
        path.unlink()  # first, for it must never describe images of another dataset
        for image_id in range(1, old["num_images"] + 1):
            (folder / FILE_NAME.format(image_id)).unlink(missing_ok=True)
    content: dict = {"info": info, "images": [], "annotations": [], "categories": []}
    for image_id in progress_bar(range(1, num_images + 1), f"drawing {split}", unit="image"):
        rng = np.random.default_rng([seed, zlib.crc32(split.encode()), image_id])
        image, objects = render(rng, scene)
        bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
        _, jpeg = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
        name, (height, width) = FILE_NAME.format(image_id), image.shape[:2]
        write_atomically(folder / name, jpeg.tobytes())
        ids = {"id": image_id, "file_name": name}
        content["images"].append(ids | {"height": height, "width": width})
        for shape in objects:
            ids = {"id": len(content["annotations"]) + 1, "image_id": image_id}
            content["annotations"].append(ids | annotate(*shape))
    for name, category_id in CATEGORY_IDS.items():
        category = {"id": category_id, "name": name, "supercategory": "shape"}
        content["categories"].append(category)
    write_atomically(path, json.dumps(content).encode())
    return path


def annotate(category: str, mask: np.ndarray, iscrowd: bool = False) -> dict:
    """An object as COCO has it, without ids, from its visible pixels, (H, W) bool.

    The segmentation is polygons, or uncompressed RLE for a crowd and for an object with a hole,
    where a smaller object lies before it.
    """
    area, borders = int(np.count_nonzero(mask)), _outer_borders(mask)
    segmentation: dict | list
    if iscrowd or sum(map(cv2.contourArea, borders)) - area > MAX_HOLE_FRACTION * area:
        # Runs go down the columns and begin with the background.
        changes = np.flatnonzero(np.diff(mask.ravel(order="F"), prepend=False))
        runs = np.diff(changes, prepend=0, append=mask.size)
        segmentation = {"counts": runs.tolist(), "size": list(mask.shape)}
    else:
        # Through the middles of the borders' steps: a slanted line passes through those.
        middles = [(c + np.roll(c, -1, axis=0)).astype(np.float32) / 2 for c in borders]
        polygons = [cv2.approxPolyDP(points, POLYGON_TOLERANCE, True) for points in middles]
        segmentation = [polygon.ravel().tolist() for polygon in polygons]
    return {
        "category_id": CATEGORY_IDS[category],
        "iscrowd": int(iscrowd),
        "segmentation": segmentation,
        "area": area,
        "bbox": list(cv2.boundingRect(mask.astype(np.uint8))),
    }


def _outer_borders(mask: np.ndarray) -> list[np.ndarray]:
    """The borders of a mask along its pixels' edges, (K, 2) int32 each, in unit steps.

    `cv2.findContours` joins pixel centers, so that a polygon of them lacks half a pixel all round.
    On the doubled mask, the border of the pixels a to b runs from 2a to 2b + 1; their edges are a
    and b + 1. For both, and at inner corners too, the edge is (c + 1) // 2.
    """
    doubled = cv2.resize(mask.astype(np.uint8), None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST)
    contours, _ = cv2.findContours(doubled, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    corners = [(contour[:, 0] + 1) // 2 for contour in contours]
    return [c[(c != np.roll(c, 1, axis=0)).any(axis=1)] for c in corners]


# Scenes -------------------------------------------------------------------------------------------


def render(
    rng: Generator, config: SceneConfig | None = None
) -> tuple[np.ndarray, list[tuple[str, np.ndarray, bool]]]:
    """Draws an image, (H, W, 3) uint8 RGB, and the objects seen in it.

    Of each its category, its visible pixels, (H, W) bool, and whether it is a crowd.
    """
    config = config or SceneConfig()
    sides = config.long_side, config.short_side
    width, height = (int(rng.integers(low, high + 1)) for low, high in sides)
    if rng.random() < PORTRAIT_PROB:
        width, height = height, width
    scene = _Scene(rng, height, width, MIN_VISIBLE_SQUARE * config.object_sides[0] ** 2)
    if rng.random() >= EMPTY_PROB:
        num = rng.integers(config.objects[0], config.objects[1] + 1)
        least, most_frequent, largest = np.log(config.object_sides).tolist()
        longest = np.exp(rng.triangular(least, most_frequent, largest, size=int(num)))
        # Large objects mostly come first, or they would hide all the others.
        for side in longest[np.argsort(-longest * rng.uniform(0.5, 2, num))]:
            scene.paint_object(side)
        if rng.random() < CROWD_PROB / (1 - EMPTY_PROB):
            scene.paint_crowd()
    objects = [
        (category, scene.shown == i, iscrowd)
        for i, (category, iscrowd) in enumerate(scene.labels, 1)
    ]
    return _expose(rng, scene.canvas), objects


def _expose(rng: Generator, canvas: np.ndarray) -> np.ndarray:
    """Blur, contrast, brightness and noise of the whole image; (H, W, 3) uint8."""
    if rng.random() < 0.6:
        canvas = cv2.GaussianBlur(canvas, (0, 0), rng.uniform(0.3, 1.0))
    gain, offset = rng.uniform(0.75, 1.1), rng.uniform(-25, 25)
    canvas = (canvas - 127) * np.float32(gain) + np.float32(127 + offset)
    grain = np.frombuffer(rng.bytes(canvas.size), np.uint8).reshape(canvas.shape)
    canvas += (grain - np.float32(127.5)) * np.float32(rng.uniform(0.01, 0.12))
    return canvas.clip(0, 255).astype(np.uint8)


class _Scene:
    """A canvas, and the object that shows at each pixel: 0 is the background."""

    def __init__(self, rng: Generator, height: int, width: int, min_visible_area: float) -> None:
        self.rng, self.min_visible_area = rng, min_visible_area  # px, of an object
        self.canvas = draw_background(rng, height, width)  # (H, W, 3) float32
        self.shown = np.zeros((height, width), np.uint16)
        self.labels: list[tuple[str, bool]] = []  # category and iscrowd of each object
        self.least_visible = [0.0]  # px of the background and of each object

    def paint_object(self, side: float) -> None:
        """Paints an object, if a place is found where it and those before it stay visible."""
        category = str(self.rng.choice(list(OUTLINES)))
        middle = np.array(self.shown.shape[::-1]) / 2
        for _ in range(PLACEMENT_TRIES):
            outline = posed_outline(self.rng, category, side)
            margin = 0 if self.rng.random() < CUT_PROB else side / 2
            outline += middle + self.rng.uniform(-1, 1, 2) * np.maximum(middle - margin, 0)
            if self._paint(category, [outline]):
                return

    def paint_crowd(self) -> None:
        """Paints a dense swarm of small shapes of similar colors, which counts as one object."""
        category = str(self.rng.choice(list(OUTLINES)))
        radius = self.rng.uniform(30, 60)
        center = self.rng.uniform(0.2, 0.8, 2) * self.shown.shape[::-1]
        side = self.rng.uniform(12, 20)
        outlines = [
            posed_outline(self.rng, category, side * self.rng.uniform(0.8, 1.25)) + position
            for position in self.rng.standard_normal((int(radius), 2)) * radius * 0.5 + center
        ]
        self._paint(category, outlines)

    def _paint(self, category: str, outlines: list[np.ndarray]) -> bool:
        """Paints an object, or a crowd, unless it or one it covers would be hidden too much."""
        iscrowd = len(outlines) > 1
        stencils = [_cut_stencil(outline, *self.shown.shape) for outline in outlines]
        coverage = np.zeros(self.shown.shape, np.float32)
        for stencil, crop in stencils:
            np.maximum(coverage[crop], stencil, out=coverage[crop])
        solid = coverage >= 0.5
        # An object's area includes what is outside the image.
        area = coverage.sum() if iscrowd else cv2.contourArea(outlines[0].astype(np.float32))
        least_visible = max(self.min_visible_area, MIN_VISIBLE_FRACTION * float(area))
        visible = np.bincount(self.shown[~solid], minlength=len(self.least_visible))
        if np.count_nonzero(solid) < least_visible or (visible < self.least_visible).any():
            return False
        self.labels.append((category, iscrowd))
        self.least_visible.append(least_visible)

        candidates = random_colors(self.rng, 16)
        ground = self.canvas[solid].mean(axis=0, dtype=np.float64)
        distance = np.linalg.norm(candidates - ground, axis=1)
        # The first that is far enough, or the farthest.
        base = candidates[np.minimum(distance, MIN_COLOR_DISTANCE).argmax()]
        for stencil, crop in stencils:
            color = base + self.rng.uniform(-25, 25, 3) if iscrowd else base
            if stencil.size:
                h, w = stencil.shape
                paint = texture(self.rng, h, w, color) * shading(self.rng, h, w)
                blend(self.canvas[crop], paint, stencil)
        self.shown[solid] = len(self.labels)
        return True


def _cut_stencil(
    outline: np.ndarray, height: int, width: int
) -> tuple[np.ndarray, tuple[slice, slice]]:
    """How much an outline covers of each pixel in its box, float32, and where the box is.

    The box ends with the image; it is empty if there is nothing of the outline in it.
    """
    box = [np.floor(outline.min(axis=0)), np.ceil(outline.max(axis=0))]
    low, high = np.clip(box, 0, [width, height]).astype(int)
    crop, (w, h) = (slice(low[1], high[1]), slice(low[0], high[0])), (high - low).tolist()
    if h == 0 or w == 0:
        return np.zeros((h, w), np.float32), crop
    fine = np.zeros((h * SUPERSAMPLING, w * SUPERSAMPLING), np.uint8)
    # cv2's whole numbers are pixel centers: -.5 brings the outline's 0 to the first pixel's edge.
    points = np.round(((outline - low) * SUPERSAMPLING - 0.5) * 16).astype(np.int32)
    cv2.fillPoly(fine, [points], 255, cv2.LINE_8, shift=4)
    coverage = cv2.resize(fine, (w, h), interpolation=cv2.INTER_AREA)
    return coverage.astype(np.float32) / 255, crop


# Outlines: closed polygons around the origin, of any size until posed -----------------------------


def posed_outline(rng: Generator, category: str, side: float) -> np.ndarray:
    """A random outline of the category, (K, 2) in px: squeezed, rotated, in mild perspective.

    Its box is centered on the origin, and the longer side of the box is `side`.
    """
    points = OUTLINES[category](rng)
    points = points / np.abs(points).max() * [1, rng.uniform(0.7, 1)]
    angle = rng.uniform(0, 2 * np.pi)
    cos, sin = math.cos(angle), math.sin(angle)
    points = points @ np.array([[cos, sin], [-sin, cos]])
    points = points / (1 + points @ rng.uniform(-0.15, 0.15, (2, 1)))
    low, high = points.min(axis=0), points.max(axis=0)
    return (points - (low + high) / 2) * (side / (high - low).max())


def _arc(start: float, stop: float, num: int = 48) -> np.ndarray:
    angle = np.linspace(start, stop, num, endpoint=False)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _cross(rng: Generator) -> np.ndarray:
    a = rng.uniform(0.28, 0.4)
    arm, turn = np.array([[1, -a], [1, a], [a, a]]), np.array([[0, 1], [-1, 0]])
    return np.concatenate([arm @ np.linalg.matrix_power(turn, i) for i in range(4)])


def _crescent(rng: Generator) -> np.ndarray:
    """The unit disk without the disk of radius .8 around (d, 0)."""
    d, r = rng.uniform(0.5, 0.65), 0.8
    x = (1 + d * d - r * r) / (2 * d)  # where the two circles meet
    outer, inner = math.acos(x), math.acos((x - d) / r)
    bite = _arc(2 * np.pi - inner, inner) * r + [d, 0]
    return np.concatenate([_arc(outer, 2 * np.pi - outer), bite])


def _heart(_: Generator) -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([16 * np.sin(t) ** 3, -y], axis=1)


def _leaf(rng: Generator) -> np.ndarray:
    x = np.linspace(-1, 1, 24)
    half = rng.uniform(0.4, 0.55) * (1 - x**2) * (1 + 0.4 * x)
    upper = np.stack([x, half], axis=1)
    return np.concatenate([upper[:-1], upper[:0:-1] * [1, -1]])


OUTLINES: dict[str, Callable[[Generator], np.ndarray]] = {
    "disk": lambda _: _arc(0, 2 * np.pi),
    "triangle": lambda _: _arc(0, 2 * np.pi, 3),
    "square": lambda _: _arc(0, 2 * np.pi, 4),
    "cross": _cross,
    "crescent": _crescent,
    "heart": _heart,
    "leaf": _leaf,
}
# With gaps, as COCO's have: code that takes an id for an index fails here first.
CATEGORY_IDS = dict(zip(OUTLINES, (1, 2, 3, 8, 9, 11, 13), strict=True))
