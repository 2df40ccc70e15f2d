"""Which RoIs to train on: draws of MultiPathNet's minibatches, before any pixel is read.

An image's RoIs come from its best proposals and its ground-truth boxes. A classifier of the
integral loss (BMVC 2016) with the IoU threshold u takes a RoI for foreground if its IoU with an
object is at least u, and for background otherwise.

Images are drawn independently of each other, all with the same probability, as the released code
does it, so a sample depends on (seed, epoch, index) alone. Those that are known to show no object
are among them: their proposals are true negatives. An image is left out if nothing in it may be
taken for foreground or background.

Letters: n candidates of an image, R RoIs drawn from them, K IoU thresholds.
"""

import math
from dataclasses import dataclass

import numpy as np
import pycocotools.mask as coco_mask
import torch
from torchvision.ops import box_convert

from datasets.coco import CocoInstances
from datasets.proposal_boxes import ProposalBoxes

IOU_THRESHOLDS = (0.50, 0.55, 0.60, 0.65, 0.70, 0.75)  # of the integral loss


@dataclass(frozen=True)
class RoiSamplingConfig:
    """How RoIs are drawn (BMVC 2016, section 4; Fast R-CNN, section 2.3; the released code)."""

    rois_per_image: int = 64  # R
    fg_fraction: float = 0.25  # at most
    bg_iou_low: float = 0.1  # what lies below is background of second choice
    crowd_overlap: float = 0.7  # of a proposal's own area; one deeper in a crowd is ignored
    draw_threshold: bool = False  # one IoU threshold a minibatch (released code), not all
    max_proposals: int = 1000  # the best of each image
    # How proposals are made where no store of them is given; null: the scales of `propose`.
    proposal_log2_scales: tuple[float, float, float] | None = None
    refine_proposals: bool = True  # with SharpMask, where the proposer is one
    # Only the first so many training images: making proposals takes longer than training on them.
    max_images: int | None = None
    short_side: int = 800  # pixels of the resized image
    long_side: int = 1000  # at most; then the short side is shorter
    flip: bool = True  # mirror half of the images

    def __post_init__(self) -> None:
        for name in ("rois_per_image", "max_proposals", "max_images", "short_side", "long_side"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be greater than 0, got {value}")
        for name in ("fg_fraction", "bg_iou_low", "crowd_overlap"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {getattr(self, name)}")
        if self.proposal_log2_scales is not None:
            low, high, step = self.proposal_log2_scales
            if not (-math.inf < low <= high < math.inf and step > 0):
                raise ValueError(
                    "proposal_log2_scales must be MIN MAX STEP with MIN <= MAX and STEP > 0, "
                    f"got {self.proposal_log2_scales}"
                )


@dataclass(frozen=True)
class RoiSample:
    """The RoIs drawn from one image.

    Attributes:
        image: row of the image.
        flip: whether the image is mirrored; the RoIs and boxes are already.
        rois: (R, 4) float32 xyxy in pixels of the original image.
        labels: (K, R) int64: category row + 1 for foreground, 0 for background, -1 for no sample:
            another threshold was drawn, or the RoI only repeats one to make up R.
        boxes: (R, 4) float32 xyxy, the object's box for what is foreground in a row of `labels`;
            the RoI itself for the others.
    """

    image: int
    flip: bool
    rois: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray


@dataclass(frozen=True)
class Candidates:
    """The boxes of an image that may be drawn.

    Attributes:
        boxes: (n, 4) float32 xyxy, proposals and then ground-truth boxes.
        overlaps: (n,) float64, the highest IoU with an object.
        matches: (n,) int64, the annotation that it is with; any if the IoU is 0.
    """

    boxes: np.ndarray
    overlaps: np.ndarray
    matches: np.ndarray


class RoiSampler:
    """Draws RoIs of a dataset (Fast R-CNN section 2.3, with the integral loss's thresholds)."""

    def __init__(
        self,
        coco: CocoInstances,
        proposals: ProposalBoxes,
        *,
        config: RoiSamplingConfig | None = None,
        iou_thresholds: tuple[float, ...] = IOU_THRESHOLDS,
        seed: int = 0,
    ):
        """
        Args:
            iou_thresholds: of the classifiers; (.5,) is Fast R-CNN.

        Raises:
            ValueError: the dataset has no image that could be drawn.
        """
        self.coco, self.proposals, self.seed = coco, proposals, seed
        self.config, self.iou_thresholds = config or RoiSamplingConfig(), iou_thresholds
        # VOC's difficult objects teach nothing, as in Fast R-CNN; what lies in one is no negative.
        self.not_objects = coco.is_crowd | coco.is_difficult
        assert self.config.bg_iou_low < min(iou_thresholds), iou_thresholds
        self._index_images()

    def _index_images(self) -> None:
        """The images that may be drawn, and those among them that show an object."""
        has_object = np.zeros(len(self.coco), bool)
        has_object[self.coco.image_index[~self.not_objects]] = True
        # Only images without an object need a look: the others have a ground-truth box at least.
        empty = [
            image
            for image in np.flatnonzero(~has_object & ~self.coco.has_left_out).tolist()
            if len(self.candidates(image).boxes)
        ]
        self.object_images = np.flatnonzero(has_object)
        drawable = np.sort(np.concatenate([self.object_images, empty]).astype(np.int64))
        limit = len(self.coco) if self.config.max_images is None else self.config.max_images
        self.drawable = drawable[drawable < limit]
        self.object_images = self.object_images[self.object_images < limit]
        if len(self.drawable) == 0:
            raise ValueError(
                f"{self.coco.path}: no image to train on: none has an object (not a crowd) "
                "or a proposal that is background; check that the proposals are of these images"
            )

    def draw(self, epoch: int, index: int, threshold: int = -1, *, attempt: int = 0) -> RoiSample:
        """Sample `index` of an epoch.

        Args:
            threshold: see `sample`.
            attempt: counts up when the drawn image turned out to be unreadable.
        """
        rng = np.random.default_rng([self.seed, epoch, index, attempt])
        image = int(self.drawable[rng.integers(len(self.drawable))])
        return self.sample(image, rng, threshold)

    def sample(self, image: int, rng: np.random.Generator, threshold: int = -1) -> RoiSample:
        """RoIs of one image.

        Args:
            threshold: index of the one IoU threshold to sample for; the labels of the others are
                all -1. With -1 the RoIs are for all of them: foreground for the lowest, whose
                background is background for every other.
        """
        rows = slice(None) if threshold < 0 else slice(threshold, threshold + 1)
        thresholds, count = np.array(self.iou_thresholds)[rows], self.config.rois_per_image
        flip = bool(rng.random() < 0.5) and self.config.flip
        candidates = self.candidates(image)
        foreground, background = self._choose(
            rng, candidates.overlaps, thresholds.min(), not self.coco.has_left_out[image]
        )
        matches = candidates.matches[foreground]
        classes = self.coco.category_index[matches] + 1
        reached = candidates.overlaps[foreground] >= thresholds[:, None]
        labels = np.full((len(self.iou_thresholds), count), -1, np.int64)
        labels[rows, : len(foreground) + len(background)] = 0
        labels[rows, : len(foreground)] = np.where(reached, classes, 0)
        # Where there are fewer than R they are repeated, so that every sample has one shape.
        rois = np.resize(candidates.boxes[np.concatenate([foreground, background])], (count, 4))
        boxes = rois.copy()
        boxes[: len(foreground)] = self.coco.boxes[matches]
        if flip:
            width = self.coco.image_sizes[image, 1]
            rois, boxes = mirror(rois, width), mirror(boxes, width)
        return RoiSample(image, flip, rois, labels, boxes)

    def candidates(self, image: int) -> Candidates:
        """The best proposals of an image, less those in a crowd, and its ground-truth boxes."""
        coco, config = self.coco, self.config
        rows = np.arange(coco.image_starts[image], coco.image_starts[image + 1])
        crowd = self.not_objects[rows]
        proposals = self.proposals.of(int(coco.image_ids[image]))[0][: config.max_proposals]
        boxes = np.concatenate([proposals, coco.boxes[rows[~crowd]]])
        overlaps = box_overlaps(boxes, coco.boxes[rows], crowd)
        # What lies in a crowd may show an object that has no box of its own. An annotated one does
        # have it, in a crowd or not.
        usable = np.ones(len(boxes), bool)
        usable[: len(proposals)] = (overlaps[: len(proposals), crowd] <= config.crowd_overlap).all(
            1
        )
        boxes, overlaps = boxes[usable], overlaps[usable][:, ~crowd]
        if crowd.all():  # or no annotation at all
            return Candidates(boxes, np.zeros(len(boxes)), np.zeros(len(boxes), np.int64))
        return Candidates(boxes, overlaps.max(axis=1), rows[~crowd][overlaps.argmax(axis=1)])

    def _choose(
        self, rng: np.random.Generator, overlaps: np.ndarray, lowest: float, complete: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the candidates for the sample, none twice: foreground and background.

        Args:
            complete: all objects of the image are annotated.
        """
        config = self.config
        # At least one: an image may have nothing but its objects.
        at_most = max(1, round(config.fg_fraction * config.rois_per_image))
        touching = (overlaps >= config.bg_iou_low) & (overlaps < lowest)
        # Background that touches an object teaches most. But an image with few proposals of it,
        # or without an object, would give little or none: the rest is taken from what is clear of
        # objects, unless that might show one whose annotation was left out.
        clear = (overlaps < config.bg_iou_low) & complete
        foreground = _draw(rng, np.flatnonzero(overlaps >= lowest), at_most)
        near = _draw(rng, np.flatnonzero(touching), config.rois_per_image - len(foreground))
        left = config.rois_per_image - len(foreground) - len(near)
        return foreground, np.concatenate([near, _draw(rng, np.flatnonzero(clear), left)])


def _draw(rng: np.random.Generator, pool: np.ndarray, at_most: int) -> np.ndarray:
    return rng.choice(pool, min(at_most, len(pool)), replace=False)


def box_overlaps(boxes: np.ndarray, annotated: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """COCO's overlap: IoU, but with a crowd the intersection's share of the box's own area.

    Args:
        boxes: (n, 4) xyxy. annotated: (m, 4) xyxy. crowd: (m,) bool.

    Returns:
        (n, m) float64 in [0, 1].
    """
    if not len(boxes) or not len(annotated):
        return np.zeros((len(boxes), len(annotated)))
    xywh = [
        box_convert(torch.from_numpy(b).double(), "xyxy", "xywh").numpy()
        for b in (boxes, annotated)
    ]
    return coco_mask.iou(*xywh, crowd)


def mirror(boxes: np.ndarray, width: float) -> np.ndarray:
    """Boxes (n, 4) xyxy in the left-right mirrored image."""
    return np.stack(
        [width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], axis=1
    ).astype(np.float32)
