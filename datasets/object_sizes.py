"""How large a dataset's objects are, and which scales and which patch reach them.

A network sees an object at its best where the object's longest side is canonical: 128 of the 224
pixels of a patch. So a side of s pixels needs the scale canonical / s.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from datasets.patch_sampler import PatchSampler, canonical_side

LogScales = tuple[float, float, float]  # log2 of the smallest and the largest scale, and the step

PUBLISHED_LOG2_SCALES: LogScales = (-2.5, 0.5, 0.5)
STEP = 0.5  # of scales that are chosen
# Octaves to either side of a scale at which objects are still found: half a step, which is as much
# as training jitters objects.
REACH = 0.25
RARE = 2  # per cent of the objects, at either end, that scales need not reach
PATCH_SIZES = (64, 80, 96, 112, 128, 160)  # to choose from; the last is the published one
# A chosen patch needs no higher scale: at 2^2 an image has 16 times its pixels.
MAX_LOG2_SCALE = 2.0
HIGHEST = 4.0  # of log2 scales: 256 times the pixels of an image
WORTH_A_LINE = 0.1  # fraction of the objects that scales do not reach


@dataclass(frozen=True)
class ObjectSides:
    """The longest sides of a dataset's objects, in pixels of the original images."""

    count: int  # objects
    pixels: tuple[float, ...]  # 101 percentiles: [0] is the shortest, [50] the median

    @classmethod
    def measure(cls, sampler: PatchSampler) -> "ObjectSides":
        """The sides of the objects that mask patches are drawn from."""
        boxes = sampler.coco.boxes[sampler.mask_rows]
        return cls.of((boxes[:, 2:] - boxes[:, :2]).max(axis=1))

    @classmethod
    def of(cls, sides: np.ndarray) -> "ObjectSides":
        """Of sides (n,) in pixels, at least one."""
        pixels = np.percentile(np.asarray(sides, np.float64), range(101))
        return cls(len(sides), tuple(pixels.round(2).clip(min=0.01).tolist()))

    @classmethod
    def from_plain(cls, values: Any, *, source: str) -> "ObjectSides":
        """What `to_plain` gave, from a checkpoint.

        Raises:
            ValueError: it is something else.
        """
        try:
            if not isinstance(values, Mapping):
                raise TypeError
            count, pixels = int(values["count"]), tuple(float(v) for v in values["percentiles"])
            array = np.array(pixels)
            good = count > 0 and len(pixels) == 101 and array[0] > 0 and array[-1] < math.inf
            if not good or not (np.diff(array) >= 0).all():
                raise ValueError
        except (KeyError, TypeError, ValueError, OverflowError):
            raise ValueError(
                f"{source}: object_sides must be a count and 101 ascending percentiles in pixels"
            ) from None
        return cls(count, pixels)

    def to_plain(self) -> Mapping[str, Any]:
        """For checkpoints."""
        return {"count": self.count, "percentiles": list(self.pixels)}

    def outside(self, low: float, high: float) -> tuple[float, float]:
        """The fractions of the objects that are smaller than `low` and larger than `high` px."""
        pixels = np.array(self.pixels)
        return float(np.mean(pixels < low)), float(np.mean(pixels > high))

    def summary(self) -> str:
        """One line of quantiles."""
        ends = (f"{p}% {self.pixels[p]:.0f} px" for p in (2, 25, 75, 98))
        first, second, third, last = ends
        return (
            f"longest sides of {self.count:,} objects: {first}, {second}, "
            f"median {self.pixels[50]:.0f} px, {third}, {last}"
        )


def reached_sides(log2_scales: LogScales, canonical: int) -> tuple[float, float]:
    """The smallest and the largest side in pixels that scales reach."""
    low, high, _ = log2_scales
    return canonical / 2 ** (high + REACH), canonical / 2 ** (low - REACH)


def choose_log2_scales(sides: ObjectSides, canonical: int) -> LogScales:
    """The scales that reach the objects, all but the rarest sizes, in steps of half an octave.

    At most `HIGHEST`: specks, which a recipe may train on, would cost hours. The published ones
    stay where they reach at least half of the objects: they do not reach all of COCO's, and every
    octave more costs four times the time. They belong to the published patch: who takes a smaller
    one wants small objects.
    """
    is_published = canonical >= canonical_side(PATCH_SIZES[-1])
    unreached = sum(sides.outside(*reached_sides(PUBLISHED_LOG2_SCALES, canonical)))
    if is_published and unreached <= 0.5:
        return PUBLISHED_LOG2_SCALES
    largest, smallest = sides.pixels[100 - RARE], sides.pixels[RARE]
    low = math.floor(math.log2(canonical / largest) / STEP) * STEP
    high = math.ceil(math.log2(canonical / smallest) / STEP) * STEP
    return min(low, HIGHEST), min(high, HIGHEST), STEP


def describe_scales(log2_scales: LogScales) -> str:
    """The scales in words."""
    low, high, step = log2_scales
    return f"scales {low:g} to {high:g} (log2, in steps of {step:g})"


def explain_scales(sides: ObjectSides, canonical: int) -> str:
    """Why `choose_log2_scales` chose what it did."""
    chosen = choose_log2_scales(sides, canonical)
    if chosen != PUBLISHED_LOG2_SCALES:
        return (
            f"the longest sides of {100 - 2 * RARE}% of {sides.count:,} training objects are "
            f"{sides.pixels[RARE]:.0f} to {sides.pixels[100 - RARE]:.0f} px"
        )
    smaller, larger = sides.outside(*reached_sides(chosen, canonical))
    return f"published: they reach {1 - smaller - larger:.0%} of {sides.count:,} training objects"


def compare_scales(sides: ObjectSides, log2_scales: LogScales, canonical: int) -> str:
    """One line where scales do not reach many of the objects, else nothing."""
    low, high = reached_sides(log2_scales, canonical)
    smaller, larger = sides.outside(low, high)
    if smaller + larger <= WORTH_A_LINE:
        return ""
    line = (
        f"{smaller:.0%} of the objects are smaller than the smallest size proposed ({low:.0f} px), "
        f"{larger:.0%} larger than the largest ({high:.0f} px): {describe_scales(log2_scales)}"
    )
    chosen = choose_log2_scales(sides, canonical)
    if chosen == log2_scales:
        return line
    low, high = reached_sides(chosen, canonical)
    return f"{line}; --scales auto takes {describe_scales(chosen)}, of {low:.0f} to {high:.0f} px"


def choose_patch_size(sides: ObjectSides, *, multiple: int = 16) -> int:
    """The side of the largest patch that needs no scale above `MAX_LOG2_SCALE`.

    At a scale of 2^3 an image has 64 times its pixels, and a smaller patch finds more in less time.
    The published patch stays where its scales do; the smallest is taken where none is small enough.
    """
    sizes = [size for size in PATCH_SIZES if size % multiple == 0]
    for size in reversed(sizes):
        if choose_log2_scales(sides, canonical_side(size))[1] <= MAX_LOG2_SCALE:
            return size
    return sizes[0]


def explain_patch_size(sides: ObjectSides, patch_size: int) -> str:
    """Why `choose_patch_size` chose it."""
    published = PATCH_SIZES[-1]
    highest, of_published = (
        choose_log2_scales(sides, canonical_side(size))[1] for size in (patch_size, published)
    )
    line = f"its objects need scales up to {highest:g} (log2)"
    if patch_size != published:
        line += f", with a patch of {published} up to {of_published:g}"
    return line
