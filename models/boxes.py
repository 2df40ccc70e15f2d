"""Geometry of boxes: foveal regions, and the regressor's deltas to and from boxes.

Boxes are xyxy, RoIs (N, 5) have the row of their image before it, as torchvision's RoI pooling
takes them. dx = (xt - xc) / w, dw = log(wt / w), y and h likewise (Girshick, Fast R-CNN, ICCV
2015, and R-CNN, CVPR 2014, appendix C).
"""

import math

import torch
from torch import Tensor

MAX_LOG_SCALE = math.log(1000 / 16)  # no box grows by more: keeps exp() finite, as in detectron


def foveal_regions(rois: Tensor, factor: float) -> Tensor:
    """RoIs (N, 5) enlarged about their centers, not clipped (BMVC 2016, section 3.2)."""
    if factor == 1:
        return rois
    centers = (rois[:, 1:3] + rois[:, 3:5]) / 2
    halves = (rois[:, 3:5] - rois[:, 1:3]) * (factor / 2)
    return torch.cat([rois[:, :1], centers - halves, centers + halves], dim=1)


def encode_boxes(rois: Tensor, boxes: Tensor) -> Tensor:
    """The deltas (N, 4) float32 that move RoIs (N, 4) xyxy onto boxes (N, 4), not normalized."""
    rois, boxes = rois.double(), boxes.double()
    sides, new_sides = rois[:, 2:] - rois[:, :2], boxes[:, 2:] - boxes[:, :2]
    shifts = (boxes[:, :2] + boxes[:, 2:] - rois[:, :2] - rois[:, 2:]) / 2
    return torch.cat([shifts / sides, (new_sides / sides).log()], dim=1).float()


def decode_boxes(boxes: Tensor, deltas: Tensor) -> Tensor:
    """Boxes (N, 4) xyxy moved by the deltas (N, C, 4) of each class, not normalized: (N, C, 4)."""
    sides = (boxes[:, 2:] - boxes[:, :2])[:, None]  # (N, 1, 2)
    centers = (boxes[:, 2:] + boxes[:, :2])[:, None] / 2 + deltas[..., :2] * sides
    halves = sides * deltas[..., 2:].clamp(max=MAX_LOG_SCALE).exp() / 2
    return torch.cat([centers - halves, centers + halves], dim=-1)
