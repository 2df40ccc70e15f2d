"""Which RoIs to train on: draws of MultiPathNet's minibatches, before any pixel is read.

An image's RoIs come from its best proposals and its ground-truth boxes. A classifier of the
integral loss (BMVC 2016) with the IoU threshold u takes a RoI for foreground if its IoU with an
object is at least u, and for background otherwise.

Images are drawn independently of each other, all with the same probability, as the released code
does it, so a sample depends on (seed, epoch, index) alone. Those that are known to show no object
are among them, as half of the samples at most: their proposals are true negatives. An image is left
out if nothing in it may be taken for foreground or background.

Letters: n candidates of an image, R RoIs drawn from them, K IoU thresholds.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np
import pycocotools.mask as coco_mask
import torch
from torchvision.ops import box_convert

from datasets.coco import CocoInstances
from datasets.colors import ColorFactors
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
    # How proposals are made where no store of them is given; null or auto: as the mask network's
    # `propose.log2_scales` say.
    proposal_log2_scales: tuple[float, float, float] | None = None
    refine_proposals: bool = True  # with SharpMask, where the proposer is one
    # Only the first so many training images: making proposals takes longer than training on them.
    max_images: int | None = None
    short_side: int = 800  # pixels of the resized image
    long_side: int = 1000  # at most; then the short side is shorter
    flip: bool = True  # mirror half of the images
    jitter_scale: float = 0.0  # log2, of the resized image
    jitter_color: float = 0.0  # brightness, contrast and saturation change by this fraction at most

    def __post_init__(self) -> None:
        for name in ("rois_per_image", "max_proposals", "max_images", "short_side", "long_side"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be greater than 0, got {value}")
        if not 0 <= self.jitter_scale < math.inf:
            raise ValueError(f"jitter_scale must be at least 0, got {self.jitter_scale}")
        for name in ("fg_fraction", "bg_iou_low", "crowd_overlap", "jitter_color"):
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

    Labels are the category's row + 1 for foreground, 0 for background, and -1 for no sample:
    another threshold was drawn, or the RoI only repeats one to make up R.
    """

    image: int  # row
    flip: bool  # whether the image is mirrored; the RoIs and boxes are already
    rois: np.ndarray  # (R, 4) float32 xyxy in pixels of the original image
    labels: np.ndarray  # (K, R) int64
    boxes: np.ndarray  # (R, 4) float32, the objects' of what is foreground, else the RoIs
    scale: float = 1.0  # factor on the sides that images are resized to
    colors: ColorFactors = ColorFactors()


class RoiSampler:
    """Draws RoIs of a dataset (Fast R-CNN section 2.3, with the integral loss's thresholds)."""

    def __init__(
        self,
        coco: CocoInstances,
        proposals: ProposalBoxes,
        *,
        config: RoiSamplingConfig | None = None,
        iou_thresholds: tuple[float, ...] = IOU_THRESHOLDS,
        image_ids: Collection[int] | None = None,
        seed: int = 0,
    ):
        """`iou_thresholds` are the classifiers'; (.5,) is Fast R-CNN.

        `image_ids`: the images that were searched for proposals. Others are not drawn: they would
        have foreground alone. By default all are.

        Raises:
            ValueError: the dataset has no image that could be drawn.
        """
        self.coco, self.proposals, self.seed = coco, proposals, seed
        self.config, self.iou_thresholds = config or RoiSamplingConfig(), iou_thresholds
        # VOC's difficult objects teach nothing, as in Fast R-CNN; what lies in one is no negative.
        self.not_objects = coco.is_crowd | coco.is_difficult
        has_object = np.zeros(len(coco), bool)
        has_object[coco.image_index[~self.not_objects]] = True
        searched = np.ones(len(coco), bool)
        if image_ids is not None:
            searched = np.isin(coco.image_ids, np.fromiter(image_ids, np.int64))
        chosen = slice(self.config.max_images)
        self.num_not_searched = int((has_object & ~searched)[chosen].sum())  # with an object
        has_object &= searched
        drawable = has_object.copy()
        # Only images without an object need a look: the others have a ground-truth box at least.
        for image in np.flatnonzero(searched & ~has_object & ~coco.has_left_out).tolist():
            drawable[image] = len(self.candidates(image)[0]) > 0
        self.object_images = np.flatnonzero(has_object[chosen])
        self.drawable = np.flatnonzero(drawable[chosen])
        self.empty_images = np.setdiff1d(self.drawable, self.object_images)
        if len(self.drawable) == 0:
            raise ValueError(
                f"{coco.path}: no image to train on: no object ({coco.why_none()}), and no "
                "proposal that is background; check that the proposals are of these images"
            )

    def draw(self, epoch: int, index: int, threshold: int = -1, *, attempt: int = 0) -> RoiSample:
        """Sample `index` of an epoch; `attempt` counts up when its image was unreadable."""
        image, scale, rng = self.draw_image(epoch, index, attempt=attempt)
        sample = self.sample(image, rng, threshold)
        return replace(sample, scale=scale, colors=ColorFactors.draw(rng, self.config.jitter_color))

    def draw_image(
        self, epoch: int, index: int, *, attempt: int = 0
    ) -> tuple[int, float, np.random.Generator]:
        """The image (row) of a sample, its scale, and the generator of its RoIs."""
        rng = np.random.default_rng([self.seed, epoch, index, attempt])
        images, jitter = self.drawable, self.config.jitter_scale
        # Few images may show one of a few categories.
        if 0 < len(self.object_images) < len(self.empty_images):
            images = self.object_images if rng.random() < 0.5 else self.empty_images
        image = int(images[rng.integers(len(images))])
        return image, 2.0 ** rng.uniform(-jitter, jitter) if jitter else 1.0, rng

    def sample(self, image: int, rng: np.random.Generator, threshold: int = -1) -> RoiSample:
        """RoIs of one image, for the IoU threshold of the given index or, with -1, for all.

        For all, foreground is that of the lowest, whose background is background for every other.
        """
        rows = slice(None) if threshold < 0 else slice(threshold, threshold + 1)
        thresholds, count = np.array(self.iou_thresholds)[rows], self.config.rois_per_image
        flip = bool(rng.random() < 0.5) and self.config.flip
        candidates, overlaps, matches = self.candidates(image)
        complete = not self.coco.has_left_out[image]
        foreground, background = self._choose(rng, overlaps, thresholds.min(), complete)
        matches = matches[foreground]
        classes = self.coco.category_index[matches] + 1
        labels = np.full((len(self.iou_thresholds), count), -1, np.int64)
        labels[rows, : len(foreground) + len(background)] = 0
        labels[rows, : len(foreground)] = np.where(
            overlaps[foreground] >= thresholds[:, None], classes, 0
        )
        # Where there are fewer than R they are repeated, so that every sample has one shape.
        rois = np.resize(candidates[np.concatenate([foreground, background])], (count, 4))
        boxes = rois.copy()
        boxes[: len(foreground)] = self.coco.boxes[matches]
        if flip:
            width = self.coco.image_sizes[image, 1]
            rois, boxes = mirror(rois, width), mirror(boxes, width)
        return RoiSample(image, flip, rois, labels, boxes)

    def candidates(self, image: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The best proposals of an image, less those in a crowd, and its ground-truth boxes.

        Returns:
            Boxes (n, 4) float32 xyxy; the highest IoU of each with an object, (n,) float64; and the
            annotation that it is with, (n,) int64, any if the IoU is 0.
        """
        coco, config = self.coco, self.config
        rows = np.arange(*coco.image_starts[image : image + 2])
        crowd = self.not_objects[rows]
        proposals = self.proposals.of(int(coco.image_ids[image]))[: config.max_proposals]
        boxes = np.concatenate([proposals, coco.boxes[rows[~crowd]]])
        overlaps = _overlaps(boxes, coco.boxes[rows], crowd)
        # What lies in a crowd may show an object that has no box of its own. An annotated one does
        # have it, in a crowd or not.
        in_crowd = (overlaps[:, crowd] > config.crowd_overlap).any(axis=1)
        usable = ~in_crowd | (np.arange(len(boxes)) >= len(proposals))
        boxes, overlaps = boxes[usable], overlaps[usable][:, ~crowd]
        if crowd.all():  # or no annotation at all
            return boxes, np.zeros(len(boxes)), np.zeros(len(boxes), np.int64)
        return boxes, overlaps.max(axis=1), rows[~crowd][overlaps.argmax(axis=1)]

    def _choose(
        self, rng: np.random.Generator, overlaps: np.ndarray, lowest: float, complete: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the candidates for the sample, none twice: foreground and background.

        `complete`: all objects of the image are annotated.
        """
        config = self.config

        def choose(pool: np.ndarray, at_most: int) -> np.ndarray:
            rows = np.flatnonzero(pool)
            return rng.choice(rows, min(at_most, len(rows)), replace=False)

        # At least one: an image may have nothing but its objects.
        foreground = choose(
            overlaps >= lowest, max(1, round(config.fg_fraction * config.rois_per_image))
        )
        left = config.rois_per_image - len(foreground)
        # Background that touches an object teaches most. But an image with few proposals of it,
        # or without an object, would give little or none: the rest is taken from what is clear of
        # objects, unless that might show one whose annotation was left out.
        touching = choose((overlaps >= config.bg_iou_low) & (overlaps < lowest), left)
        clear = choose((overlaps < config.bg_iou_low) & complete, left - len(touching))
        return foreground, np.concatenate([touching, clear])


def _overlaps(boxes: np.ndarray, annotated: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """COCO's overlap of boxes (n, 4) and (m, 4) xyxy, (n, m) float64.

    IoU, but with a crowd the intersection's share of the box's own area.
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
    x1, y1, x2, y2 = boxes.T
    return np.stack([width - x2, y1, width - x1, y2], axis=1).astype(np.float32)
