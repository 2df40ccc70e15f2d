"""RoI max pooling: Fast R-CNN's ("caffe"), and the released detectors' ("lua": imagine-nn 2).

Fast R-CNN rounds bins outwards: neighbors overlap, and the RoI contains the cell of its last
corner. The released detectors round each edge to the nearest cell: bins do not overlap, some may be
empty, and the cell of the last corner is outside.

Letters: B images, C channels, (H, W) their features, R RoIs, s bins on a side.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.ops import roi_pool

LARGE = 1 << 19  # values of an image's features; from here on `_pool_by_axes` is faster


def roi_pool_caffe(features: Tensor, rois: Tensor, size: int, scale: float) -> Tensor:
    """The largest value of each bin; arguments and result as `roi_pool_lua`."""
    features = features.to(rois.dtype)  # under autocast they may be bfloat16
    if _by_axes(features):
        return _pool_by_axes(features, rois, _bins(_caffe_edges, features, rois, size, scale))
    return roi_pool(features, rois, size, scale)


def roi_pool_lua(features: Tensor, rois: Tensor, size: int, scale: float) -> Tensor:
    """The largest value of each bin, 0 for an empty one.

    Args:
        features: (B, C, H, W).
        rois: (R, 5), the index of the image and xyxy.
        size: s. scale: cells of the features per pixel of the RoIs.

    Returns:
        (R, C, s, s).
    """
    features = features.to(rois.dtype)
    top, bottom, left, right = bins = _bins(_lua_edges, features, rois, size, scale)
    if _by_axes(features):
        return _pool_by_axes(features, rois, bins)
    # torchvision's operator on bins as RoIs of one bin each; it includes the last corner's cell.
    shape = (len(rois), size, size)
    corners = (left[:, None], top[:, :, None], right[:, None] - 1, bottom[:, :, None] - 1)
    windows = [edge.expand(shape) for edge in (rois[:, :1, None], *corners)]
    pooled = roi_pool(features, torch.stack(windows, dim=-1).view(-1, 5).to(rois.dtype), 1, 1.0)
    filled = (bottom > top)[:, :, None] & (right > left)[:, None]  # (R, s, s)
    pooled = pooled.view(*shape, features.shape[1]).where(filled[..., None], 0)
    return pooled.permute(0, 3, 1, 2)


def _by_axes(features: Tensor) -> bool:
    differentiable = torch.is_grad_enabled() and features.requires_grad
    return features.is_cpu and not differentiable and features[0].numel() >= LARGE


def _pool_by_axes(features: Tensor, rois: Tensor, bins: list[Tensor]) -> Tensor:
    """Pooling without a gradient: maxima over the rows of a bin, then over its columns.

    torchvision's operator goes through one channel after the other. All channels at once take a
    third of the time on a CPU for the detector of published size; on small features the calls would
    take longer than the work.
    """
    size, channels = bins[0].shape[1], features.shape[1]
    pixels = features.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
    pooled = features.new_zeros(len(rois), size, size, channels)  # empty bins stay 0
    edges = (edge.tolist() for edge in (rois[:, 0].long(), *bins))
    for roi, (image, top, bottom, left, right) in enumerate(zip(*edges, strict=True)):
        first = min(left)
        strip = pixels[image, :, first : max(right)]  # (H, w, C)
        maxima = features.new_zeros(size, *strip.shape[1:])  # (s, w, C)
        for row, (start, end) in enumerate(zip(top, bottom, strict=True)):
            if start < end:
                torch.amax(strip[start:end], 0, out=maxima[row])
        for column, (start, end) in enumerate(zip(left, right, strict=True)):
            if start < end:
                part = maxima[:, start - first : end - first]
                torch.amax(part, 1, out=pooled[roi, :, column])
    return pooled.permute(0, 3, 1, 2)


def _bins(edges: Callable, features: Tensor, rois: Tensor, size: int, scale: float) -> list[Tensor]:
    """First cells (R, s) of the bins and the ends after their last cells: rows, then columns.

    In float32, step by step like the originals: an edge may fall on a half. So the side of a bin is
    divided by a tensor: by a number, a GPU would multiply with its rounded inverse.
    """
    bins = []
    for axis, limit in ((2, features.shape[2]), (1, features.shape[3])):
        start = _round(rois[:, axis].float() * scale)[:, None]
        end = _round(rois[:, axis + 2].float() * scale)[:, None]
        steps = torch.arange(size + 1, device=rois.device, dtype=torch.float32)
        bins += [(start + edge).clamp(0, limit) for edge in edges(end - start, steps)]
    return bins


def _caffe_edges(last: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """Starts and ends of bins, counted from the RoI's first cell to its `last` (R, 1).

    `steps` are 0 to s, float32.
    """
    edges = steps * ((last + 1).clamp(min=1).float() / steps[-1])
    return edges[:, :-1].floor().long(), edges[:, 1:].ceil().long()


def _lua_edges(last: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    edges = _round(steps * (last.clamp(min=1).float() / steps[-1]))
    return edges[:, :-1], edges[:, 1:]


def _round(values: Tensor) -> Tensor:
    """C's `round`: halves go away from zero; torch takes them to the even number."""
    return (values.sign() * (values.abs().double() + 0.5).floor()).long()
