"""Annotated boxes: which can be used, and which contradict the segmentation beside them.

n: annotations. Boxes are float64 xyxy in pixels, (n, 4).
"""

import numpy as np

from datasets.segmentations import USABLE, Reason, are_relative

FAR = 20  # times the image's longer side: what reaches so far out is a mistake
NEAR = 2  # pixels: boxes are rounded outwards, or end with the last pixel
MIN_IOU = 0.5  # of a box and the bounds of its segmentation, unless the box contains them
MIN_CONTAINING_IOU = 0.1  # then most of the object may well be hidden


def as_corners(xywh: np.ndarray) -> np.ndarray:
    """Boxes (n, 4) xywh as xyxy."""
    boxes = xywh.copy()
    with np.errstate(over="ignore", invalid="ignore"):  # of 1e300
        boxes[:, 2:] += boxes[:, :2]
    return boxes


def are_good(boxes: np.ndarray, image_sizes: np.ndarray) -> np.ndarray:
    """Which boxes are in the image and not empty: (n,) bool."""
    return ~are_outside(boxes, image_sizes) & ~_are_empty(boxes)


def are_near(boxes: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Which boxes are the bounds of their segmentations, rounded: (n,) bool."""
    return (np.abs(boxes - bounds) <= NEAR).all(axis=1)


def _are_empty(boxes: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        rounded = boxes.astype(np.float32)
    return (rounded[:, 2] <= rounded[:, 0]) | (rounded[:, 3] <= rounded[:, 1])


def find_problems(xywh: np.ndarray, image_sizes: np.ndarray) -> np.ndarray:
    """Why each of the boxes (n, 4) xywh cannot be used: a `Reason` or USABLE, (n,).

    `image_sizes` (n, 2) are the height and width of each one's image.
    """
    boxes, problem = as_corners(xywh), np.full(len(xywh), USABLE, object)
    for reason, is_so in (
        (Reason.OUTSIDE, are_outside(boxes, image_sizes)),
        (Reason.RELATIVE, are_relative(xywh, image_sizes)),
        (Reason.ZERO_AREA, _are_empty(boxes)),
        (Reason.MALFORMED_BOX, ~np.isfinite(boxes).all(axis=1)),
    ):
        problem[is_so] = reason
    return problem


def are_outside(boxes: np.ndarray, image_sizes: np.ndarray) -> np.ndarray:
    """Which boxes show nothing of their image, reach far out of it, or are NaN: (n,) bool."""
    # pycocotools draws a polygon's edges all the way, in memory too.
    x1, y1, x2, y2 = boxes.T
    height, width = image_sizes.T
    reach = np.abs(boxes).max(axis=1)
    is_within = reach <= FAR * np.maximum(height, width)
    return ~(is_within & (x1 < width) & (y1 < height) & (x2 > 0) & (y2 > 0))


def contradict(xywh: np.ndarray, bounds: np.ndarray, image_sizes: np.ndarray) -> np.ndarray:
    """Which boxes (n, 4) xywh cannot be meant for an object with these bounds (xyxy): (n,) bool.

    A box may be larger than what is visible of its object, or be drawn by somebody else. But if it
    fits as corners, with y counted from below, or with x and y exchanged, and not as it should be,
    that is what it is.
    """
    boxes, height = as_corners(xywh), image_sizes[:, 0]
    from_below = boxes.copy()
    from_below[:, 1::2] = height[:, None] - boxes[:, 3::-2]
    readings = np.stack([boxes, xywh, from_below, boxes[:, [1, 0, 3, 2]]])
    as_is, *others = np.abs(readings - bounds).max(axis=2)
    other = np.min(others, axis=0)
    inner = np.hstack([np.maximum(boxes, bounds)[:, :2], np.minimum(boxes, bounds)[:, 2:]])
    common, area, visible = (
        (corners[:, 2:] - corners[:, :2]).clip(min=0).prod(axis=1)
        for corners in (inner, boxes, bounds)
    )
    contains = (boxes[:, :2] <= bounds[:, :2] + NEAR) & (boxes[:, 2:] >= bounds[:, 2:] - NEAR)
    lowest = np.where(contains.all(axis=1), MIN_CONTAINING_IOU, MIN_IOU)
    is_other = (as_is > NEAR) & (other <= NEAR) & (other < as_is / 2)
    return (common < lowest * (area + visible - common)) | is_other
