"""Which patches to train on: DeepMask's mask and score minibatches, before any pixel is read.

A minibatch is all mask patches or all score patches (NIPS 2015, section 3.3; numbers of the
released code). Every draw comes from a generator seeded by (seed, epoch, index), so a patch does
not depend on workers or processes.

Several patches may share one decoded image, a *group*. The image of a group is drawn with the
probability that the published procedure gives it, and then each patch of the group from the
published distribution within that image: every single patch is distributed as published, only
patches of one group are not independent.

Frames: centers are pixels of the original image; `scale` is the factor by which the image is
resized so that the patch has its nominal size, so a patch of S pixels covers S / scale pixels of
the original.
"""

import math
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from datasets.coco import CocoInstances
from datasets.colors import ColorFactors

MASK, SCORE = "mask", "score"
LABEL, IOU = "label", "iou"
STRIDE = 16  # pixels between the cells that a network scores
MAX_NEGATIVE_DRAWS = 100  # then the farthest of them is taken


@dataclass(frozen=True)
class Patch:
    """One drawn patch."""

    image: int  # row
    annotation: int  # row of the one that the patch shows, -1 for a negative patch
    label: int  # 1 or -1
    x: float  # of the center, in the original image
    y: float
    scale: float  # see the module
    flip: bool  # mirror left-right
    colors: ColorFactors = ColorFactors()


@dataclass(frozen=True)
class ScoredCells:
    """What the n x n cells of a score patch are to learn, 16 pixels of the patch apart.

    A cell is on an object if it is the nearest to its center, and at most a quarter of an octave
    off its canonical scale. Of those that are near one but not on it nothing is said.
    """

    labels: np.ndarray  # (n, n): -1 no object, 1 on one, 0 nothing is said
    on: np.ndarray  # (k, 2) of the cells on an object: index of n * n, row of the annotation


@dataclass(frozen=True)
class PatchSamplingConfig:
    """How patches are drawn; the defaults are the released code's (DataSampler)."""

    patches_per_image: int = 1  # patches of a minibatch that share one decoded image
    mask_batch_prob: float = 0.5  # probability that a minibatch is of mask patches
    # Mask patches show all categories equally often (released code), or all objects.
    balance_categories: bool = True
    # Largest jitter of mask patches, and with `jitter_positives` of positive score patches.
    jitter_shift: float = 16.0  # pixels of the patch
    jitter_scale: float = 0.25  # log2
    min_area: float = 100.0  # pixels of the original; smaller objects give no mask patch
    min_side: float = 5.0  # pixels of the original, of the shorter side
    # Positive score patches: exactly on the object (released code), or jittered as mask patches are
    # (NIPS 2015, section 3.2).
    jitter_positives: bool = False
    # Lowest and highest, in steps of a quarter. By default also those of proposals.
    negative_log2_scales: tuple[float, float] = (-3.0, 2.0)
    # What a score is to be: label, of an object or of none (published); or iou, of the network's
    # mask with the object.
    score_targets: str = "label"
    score_cells: int = 1  # side of the grid of cells that a score patch has; 1: one score
    # Where score patches have cells: those this near to an object are no negatives.
    near_shift: float = 32.0  # pixels of the patch
    near_scale: float = 0.75  # octaves
    negative_distance: float = 48.0  # pixels of the resized image
    negative_scale_distance: float = 2.5  # octaves; objects further off do not reject a negative
    flip: bool = True  # mirror half of the patches
    jitter_color: float = 0.0  # brightness, contrast and saturation change by this fraction at most

    def __post_init__(self) -> None:
        low, high = self.negative_log2_scales
        if self.patches_per_image < 1:
            raise ValueError(
                f"patches_per_image must be greater than 0, got {self.patches_per_image}"
            )
        for name in ("mask_batch_prob", "jitter_color"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {getattr(self, name)}")
        if self.score_targets not in (LABEL, IOU):
            raise ValueError(f"score_targets must be label or iou, got {self.score_targets!r}")
        if self.score_cells < 1:
            raise ValueError(f"score_cells must be greater than 0, got {self.score_cells}")
        for name in ("jitter_shift", "jitter_scale", "min_area", "min_side", "negative_distance",
                     "negative_scale_distance", "near_shift", "near_scale"):  # fmt: skip
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not -math.inf < low <= high < math.inf:
            raise ValueError(
                "negative_log2_scales must be MIN MAX with MIN <= MAX, "
                f"got {self.negative_log2_scales}"
            )

    @property
    def scores_cells(self) -> bool:
        """Whether score patches are of cells; the published ones have a label each."""
        return self.score_cells > 1 or self.score_targets == IOU

    def for_validation(self) -> Self:
        """As published: a label each, and colors as they are. Patches are jittered as ever."""
        return replace(self, jitter_color=0.0, score_targets=LABEL, score_cells=1)


class PatchSampler:
    """Draws groups of patches from a dataset (ECCV 2016, section 3.3, and the released code)."""

    def __init__(
        self,
        coco: CocoInstances,
        *,
        patch_size: int = 160,
        config: PatchSamplingConfig | None = None,
        seed: int = 0,
    ):
        """
        Raises:
            ValueError: the dataset has no object that a patch could show.
        """
        self.coco, self.config, self.seed = coco, config or PatchSamplingConfig(), seed
        self.canonical = canonical_side(patch_size)
        self._index_mask_objects()
        self._index_score_objects()

    def draw_negatives_at(self, low: float, high: float) -> None:
        """Draws negatives also at these scales (log2), those of proposals.

        Else the network would not learn there what no object is. A config that names scales for
        negatives keeps them.
        """
        default = PatchSamplingConfig.negative_log2_scales
        if self.config.negative_log2_scales == default:
            scales = min(low, default[0]), max(high, default[1])
            self.config = replace(self.config, negative_log2_scales=scales)

    def draw(self, head: str, epoch: int, group: int, *, attempt: int = 0) -> list[Patch]:
        """The patches of one group: `patches_per_image` patches of one image.

        `head` is what they train, "mask" or "score"; `attempt` counts up when the group's image
        turned out to be unreadable.
        """
        rng = np.random.default_rng([self.seed, epoch, group, attempt])
        patches = self._draw_mask_group(rng) if head == MASK else self._draw_score_group(rng)
        jitter = self.config.jitter_color
        return [replace(patch, colors=ColorFactors.draw(rng, jitter)) for patch in patches]

    # Mask patches ---------------------------------------------------------------------------------

    def _index_mask_objects(self) -> None:
        coco, config = self.coco, self.config
        sides = coco.boxes[:, 2:] - coco.boxes[:, :2]
        objects = ~coco.is_crowd & coco.has_mask
        is_small = coco.areas < config.min_area
        is_thin = (sides < config.min_side).any(axis=1)
        rows = np.flatnonzero(objects & ~is_small & ~is_thin)
        if len(rows) == 0:
            unfit = dict(coco.without_mask)
            unfit[f"area below {config.min_area:g} px"] = int((objects & is_small).sum())
            unfit[f"side below {config.min_side:g} px"] = int((objects & is_thin & ~is_small).sum())
            raise ValueError(
                f"{coco.path}: no annotation to train masks on: {coco.why_none(unfit)}"
            )
        # Usable annotations by category. Only categories that have one are drawn: an empty one
        # would be searched for ever.
        categories = coco.category_index[rows] if config.balance_categories else rows * 0
        order = np.argsort(categories, kind="stable")
        self.mask_rows = rows[order]
        _, self.category_starts, self.category_counts = np.unique(
            categories[order], return_index=True, return_counts=True
        )
        # Weight of an annotation within its image: P(category) x P(annotation | category), up to a
        # constant.
        self.mask_weight = np.zeros(len(coco.image_index), np.float32)
        self.mask_weight[self.mask_rows] = np.repeat(
            1.0 / self.category_counts, self.category_counts
        )

    def _draw_mask_group(self, rng: np.random.Generator) -> list[Patch]:
        category = rng.integers(len(self.category_starts))
        in_category = rng.integers(self.category_counts[category])
        anchor = self.mask_rows[self.category_starts[category] + in_category]
        image = int(self.coco.image_index[anchor])
        start, stop = self.coco.image_starts[image : image + 2].tolist()
        cumulative = np.cumsum(self.mask_weight[start:stop])

        def draw_one() -> Patch:
            # As a float of 64 bits the product is below the sum: it cannot round up to it.
            i = np.searchsorted(cumulative, rng.random() * float(cumulative[-1]), side="right")
            return self._mask_patch(rng, image, start + int(i))

        return [draw_one() for _ in range(self.config.patches_per_image)]

    def _mask_patch(self, rng: np.random.Generator, image: int, row: int) -> Patch:
        x1, y1, x2, y2 = self.coco.boxes[row].tolist()
        x, y, scale = self._jitter(
            rng, (x1 + x2) / 2, (y1 + y2) / 2, self.canonical / max(x2 - x1, y2 - y1)
        )
        return Patch(image, row, 1, x, y, scale, self._flip(rng))

    def _jitter(
        self, rng: np.random.Generator, x: float, y: float, scale: float
    ) -> tuple[float, float, float]:
        config = self.config
        scale /= 2.0 ** rng.uniform(-config.jitter_scale, config.jitter_scale)
        dx, dy = rng.uniform(-config.jitter_shift, config.jitter_shift, size=2) / scale
        return x + dx, y + dy, scale

    # Score patches --------------------------------------------------------------------------------

    def _index_score_objects(self) -> None:
        coco = self.coco
        self.centers = (coco.boxes[:, :2] + coco.boxes[:, 2:]) / 2
        longest = (coco.boxes[:, 2:] - coco.boxes[:, :2]).max(axis=1, initial=0)
        self.object_quarter = canonical_quarter(longest, self.canonical)
        self.object_quarter[coco.is_crowd] = NO_SCALE
        with np.errstate(divide="ignore"):
            exact = 4 * np.log2(self.canonical / longest)
        self.exact_quarter = np.where(self.object_quarter == NO_SCALE, NO_SCALE, exact)
        self.positive_images = np.unique(coco.image_index[self.object_quarter != NO_SCALE])
        # An image known to show no object gives negatives. One whose annotations were left out
        # proves nothing.
        annotated = np.diff(coco.image_starts) > 0
        self.empty_images = np.flatnonzero(~annotated & ~coco.has_left_out)

    def _draw_score_group(self, rng: np.random.Generator) -> list[Patch]:
        """Half of all patches are positive; negatives come from all images alike."""
        empty = len(self.empty_images)
        empty_fraction = empty / (empty + len(self.positive_images))
        group = range(self.config.patches_per_image)
        if empty and rng.random() < empty_fraction / 2:
            image = int(rng.choice(self.empty_images))
            return [self._negative_patch(rng, image) for _ in group]
        image = int(self.positive_images[rng.integers(len(self.positive_images))])
        positive_probability = 0.5 / (1 - empty_fraction / 2)
        return [
            self._positive_patch(rng, image)
            if rng.random() < positive_probability
            else self._negative_patch(rng, image)
            for _ in group
        ]

    def _positive_patch(self, rng: np.random.Generator, image: int) -> Patch:
        start, stop = self.coco.image_starts[image : image + 2]
        quarters = self.object_quarter[start:stop]
        quarter = rng.choice(np.unique(quarters[quarters != NO_SCALE]))
        row = int(start + rng.choice(np.flatnonzero(quarters == quarter)))
        (x, y), scale = self.centers[row].tolist(), 2.0 ** (quarter / 4)
        if self.config.scores_cells:
            # Any cell may be on the object. A quarter are of other scales, at which it is none.
            on_it = rng.random() < 0.75
            scale = 2.0 ** (
                self.exact_quarter[row] / 4 + rng.uniform(-1, 1) * (0.25 if on_it else 2)
            )
            reach = STRIDE * (self.config.score_cells - 1) / 2
            x, y = (x, y) + rng.uniform(-reach, reach, size=2) / scale
        elif self.config.jitter_positives:
            x1, y1, x2, y2 = self.coco.boxes[row].tolist()
            x, y, scale = self._jitter(rng, x, y, self.canonical / max(x2 - x1, y2 - y1))
        height, width = self.coco.image_sizes[image].tolist()
        x, y = min(max(x, 0.0), width), min(max(y, 0.0), height)
        return Patch(image, row, 1, x, y, scale, self._flip(rng))

    def _negative_patch(self, rng: np.random.Generator, image: int) -> Patch:
        low, high = self.config.negative_log2_scales
        height, width = self.coco.image_sizes[image].tolist()
        farthest, best = -1.0, (0.0, 0.0, 0)
        for _ in range(MAX_NEGATIVE_DRAWS):
            quarter = int(rng.integers(round(low * 4), round(high * 4) + 1))
            x, y = rng.random() * width, rng.random() * height
            distance = self._distance_to_objects(image, x, y, quarter)
            if distance > farthest:
                farthest, best = distance, (x, y, quarter)
            if distance >= self.config.negative_distance:
                break
        x, y, quarter = best
        return Patch(image, -1, -1, x, y, 2.0 ** (quarter / 4), self._flip(rng))

    def score_cells(self, patch: Patch) -> ScoredCells:
        """What the cells of a score patch are to learn."""
        config, coco, image = self.config, self.coco, patch.image
        count, rows = config.score_cells, np.arange(*coco.image_starts[image : image + 2])
        offsets = STRIDE * (np.arange(count) - (count - 1) / 2) / patch.scale
        x = patch.x + (offsets[::-1] if patch.flip else offsets)
        y = patch.y + offsets
        centers = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 1, 2)  # (n * n, 1, 2)
        outside = (centers < 0) | (centers > coco.image_sizes[image, ::-1])
        corners = coco.boxes[rows]  # (a, 4)
        inside = ((corners[:, :2] <= centers) & (corners[:, 2:] > centers)).all(-1)  # (n * n, a)
        nothing = outside.any((1, 2)) | (inside & coco.is_crowd[rows]).any(1)
        shifts = np.abs(centers - self.centers[rows]).max(-1) * patch.scale
        octaves = np.abs(4 * np.log2(patch.scale) - self.exact_quarter[rows]) / 4
        near = (shifts <= config.near_shift) & (octaves <= config.near_scale)
        on = near & (shifts <= STRIDE / 2) & (octaves <= 0.25)
        nothing |= near.any(1) & ~on.any(1)
        labels = np.where(on.any(1), 1, -1) * ~nothing
        cells = np.flatnonzero(labels == 1)
        if not len(cells):
            return ScoredCells(labels.reshape(count, count), np.zeros((0, 2), np.int64))
        # Of several objects, the nearest is the cell's.
        nearest = rows[np.where(on, shifts, np.inf)[cells].argmin(1)]
        if config.score_targets == IOU:
            has_mask = coco.has_mask[nearest]
            labels[cells[~has_mask]] = 0
            cells, nearest = cells[has_mask], nearest[has_mask]
        return ScoredCells(labels.reshape(count, count), np.stack([cells, nearest], axis=1))

    def _distance_to_objects(self, image: int, x: float, y: float, quarter: int) -> float:
        """Pixels of the resized image to the nearest object of similar scale; 0 in a crowd."""
        start, stop = self.coco.image_starts[image : image + 2]
        crowds = self.coco.boxes[start:stop][self.coco.is_crowd[start:stop]]
        if ((crowds[:, :2] <= (x, y)) & (crowds[:, 2:] > (x, y))).all(axis=1).any():
            return 0.0  # what is centered there may well be an object
        similar = np.abs(self.object_quarter[start:stop] - quarter)
        similar = similar <= self.config.negative_scale_distance * 4
        offsets = self.centers[start:stop][similar] - (x, y)
        return float(np.hypot(*offsets.T).min(initial=np.inf)) * 2.0 ** (quarter / 4)

    def _flip(self, rng: np.random.Generator) -> bool:
        return bool(rng.random() < 0.5) and self.config.flip


def canonical_side(patch_size: int) -> int:
    """The longest side in pixels of a canonical object: it fills 128 / 224 of the patch."""
    return math.ceil(patch_size * 128 / 224)


NO_SCALE = -1000  # quarters; far enough from any scale to be near none
MAX_QUARTERS = 32  # released code: objects up to 8 octaves from canonical


def canonical_quarter(longest: np.ndarray, canonical: int) -> np.ndarray:
    """The scale at which each object is canonical, as log2 in quarters, (A,) int32.

    It is the largest scale at which the longest side (A,) is at most 2^(1/4) canonical; `NO_SCALE`
    where that is further off than `MAX_QUARTERS`.
    """
    with np.errstate(divide="ignore"):
        quarters = np.floor(1 + 4 * np.log2(canonical / np.asarray(longest, np.float64)) + 1e-9)
    return np.where(np.abs(quarters) > MAX_QUARTERS, NO_SCALE, quarters).astype(np.int32)
