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

from dataclasses import dataclass

import numpy as np
import pycocotools.mask as coco_mask

from datasets.coco import CocoInstances
from datasets.proposal_boxes import ProposalBoxes


@dataclass(frozen=True)
class RoiRules:
    """The numbers of the sampling; defaults are the paper's and the released code's."""

    thresholds: tuple[float, ...] = (0.50, 0.55, 0.60, 0.65, 0.70, 0.75)  # IoU; (.5,) is Fast R-CNN
    draw_threshold: bool = False  # one threshold a minibatch, not all: the released code
    rois_per_image: int = 64
    foreground_share: float = 0.25  # at most
    background_low: float = 0.1  # IoU; what lies below is background of second choice
    crowd_overlap: float = 0.7  # of a proposal's own area; one deeper in a crowd is ignored
    max_proposals: int = 1000  # the best of each image
    max_images: int | None = None  # only the first so many of the dataset
    short_side: int = 800  # pixels of the resized image
    long_side: int = 1000  # at most; then the short side is shorter
    resampling: str = "area"  # see `resize_sides`
    flip: bool = True
    inclusive_boxes: bool = False  # see `box_corners`


@dataclass(frozen=True)
class RoiSample:
    """The RoIs drawn from one image.

    Attributes:
        image: row of the image.
        flip: whether the image is mirrored; the RoIs are already.
        rois: (R, 4) float32 xyxy in pixels of the original image.
        labels: (K, R) int64: category row + 1 for foreground, 0 for background, -1 for no sample:
            another threshold was drawn, or the RoI only repeats one to make up R.
        targets: (R, 4) float32, `box_targets` of what is foreground in a row of `labels`, else 0.
    """

    image: int
    flip: bool
    rois: np.ndarray
    labels: np.ndarray
    targets: np.ndarray


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
        rules: RoiRules | None = None,
        seed: int = 0,
    ):
        """
        Raises:
            ValueError: the dataset has no image that could be drawn.
        """
        self.coco, self.proposals, self.seed = coco, proposals, seed
        self.rules = rules or RoiRules()
        # VOC's difficult objects teach nothing, as in Fast R-CNN; what lies in one is no negative.
        self.not_objects = coco.is_crowd | coco.is_difficult
        assert self.rules.background_low < min(self.rules.thresholds), self.rules
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
        most = len(self.coco) if self.rules.max_images is None else self.rules.max_images
        self.drawable = drawable[drawable < most]
        self.object_images = self.object_images[self.object_images < most]
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
        thresholds, count = np.array(self.rules.thresholds)[rows], self.rules.rois_per_image
        flip = bool(rng.random() < 0.5) and self.rules.flip
        candidates = self.candidates(image)
        foreground, background = self._choose(
            rng, candidates.overlaps, thresholds.min(), not self.coco.has_left_out[image]
        )
        matches = candidates.matches[foreground]
        classes = self.coco.category_index[matches] + 1
        reached = candidates.overlaps[foreground] >= thresholds[:, None]
        labels = np.full((len(self.rules.thresholds), count), -1, np.int64)
        labels[rows, : len(foreground) + len(background)] = 0
        labels[rows, : len(foreground)] = np.where(reached, classes, 0)
        # Where there are fewer than R they are repeated, so that every sample has one shape.
        rois = np.resize(candidates.boxes[np.concatenate([foreground, background])], (count, 4))
        boxes = self.coco.boxes[matches]
        if flip:
            width = self.coco.image_sizes[image, 1]
            rois, boxes = mirror(rois, width), mirror(boxes, width)
        targets = np.zeros((count, 4), np.float32)
        inclusive = self.rules.inclusive_boxes
        targets[: len(foreground)] = box_targets(
            box_corners(rois[: len(foreground)], inclusive), box_corners(boxes, inclusive)
        )
        return RoiSample(image, flip, rois, labels, targets)

    def candidates(self, image: int) -> Candidates:
        """The best proposals of an image, less those in a crowd, and its ground-truth boxes."""
        coco, rules = self.coco, self.rules
        rows = np.arange(coco.image_starts[image], coco.image_starts[image + 1])
        crowd = self.not_objects[rows]
        proposals = self.proposals.of(int(coco.image_ids[image]))[0][: rules.max_proposals]
        boxes = np.concatenate([proposals, coco.boxes[rows[~crowd]]])
        overlaps = box_overlaps(boxes, coco.boxes[rows], crowd)
        # What lies in a crowd may show an object that has no box of its own. An annotated one does
        # have it, in a crowd or not.
        usable = (overlaps[:, crowd] <= rules.crowd_overlap).all(axis=1)
        usable[len(proposals) :] = True
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
        rules = self.rules
        # At least one: an image may have nothing but its objects.
        at_most = max(1, round(rules.foreground_share * rules.rois_per_image))
        touching = (overlaps >= rules.background_low) & (overlaps < lowest)
        # Background that touches an object teaches most. But an image with few proposals of it,
        # or without an object, would give little or none: the rest is taken from what is clear of
        # objects, unless that might show one whose annotation was left out.
        clear = (overlaps < rules.background_low) & complete
        foreground = _draw(rng, np.flatnonzero(overlaps >= lowest), at_most)
        near = _draw(rng, np.flatnonzero(touching), rules.rois_per_image - len(foreground))
        left = rules.rois_per_image - len(foreground) - len(near)
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
        np.concatenate([b[:, :2], b[:, 2:] - b[:, :2]], axis=1)
        for b in (boxes.astype(np.float64), annotated.astype(np.float64))
    ]
    return coco_mask.iou(*xywh, crowd)


def mirror(boxes: np.ndarray, width: float) -> np.ndarray:
    """Boxes (n, 4) xyxy in the left-right mirrored image."""
    return np.stack(
        [width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], axis=1
    ).astype(np.float32)


def box_corners(boxes: np.ndarray, inclusive: bool) -> np.ndarray:
    """The corners of boxes as a network is given them.

    Args:
        boxes: (n, 4) xyxy, edges. inclusive: the first and the last pixel instead (released code),
            for whose distance at least 1 is taken.

    Returns:
        (n, 4) xyxy.
    """
    if not inclusive:
        return boxes
    return np.concatenate([boxes[:, :2], np.maximum(boxes[:, 2:] - 1, boxes[:, :2] + 1)], axis=1)


def box_targets(rois: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """What moves each RoI onto its box (R-CNN's parameterization), not normalized.

    Args:
        rois, boxes: (n, 4) xyxy, in the same pixels; the targets are the same in any.

    Returns:
        (n, 4) float32: shift of the center in widths and heights of the RoI, and the logarithms of
        the factors on its width and height.
    """
    rois, boxes = rois.astype(np.float64), boxes.astype(np.float64)
    size, new_size = rois[:, 2:] - rois[:, :2], boxes[:, 2:] - boxes[:, :2]
    shift = (boxes[:, :2] + boxes[:, 2:] - rois[:, :2] - rois[:, 2:]) / 2
    return np.concatenate([shift / size, np.log(new_size / size)], axis=1).astype(np.float32)
