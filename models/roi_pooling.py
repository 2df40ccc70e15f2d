"""RoI max pooling: Fast R-CNN's ("caffe"), and the released detectors' ("lua": imagine-nn 2).

Fast R-CNN rounds bins outwards: neighbors overlap, and the RoI contains the cell of its last
corner. The released detectors round each edge to the nearest cell: bins do not overlap, some may be
empty, and the cell of the last corner is outside.

Letters: B images, C channels, (H, W) their features, R RoIs, s bins on a side.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_pool

LARGE = 1 << 19  # values of an image's features; from here on `_pool_by_axes` is faster


def roi_pool_caffe(features: Tensor, rois: Tensor, size: int, scale: float) -> Tensor:
    """The largest value of each bin; arguments and result as `roi_pool_lua`."""
    features = features.to(rois.dtype)  # under autocast they may be bfloat16
    differentiable = torch.is_grad_enabled() and features.requires_grad
    if features.is_cpu and not differentiable and features[0].numel() >= LARGE:
        return _pool_by_axes(features, rois, size, scale)
    return roi_pool(features, rois, size, scale)


def _pool_by_axes(features: Tensor, rois: Tensor, size: int, scale: float) -> Tensor:
    """`roi_pool_caffe` without a gradient: maxima over the rows of a bin, then over its columns.

    torchvision's operator goes through one channel after the other. All channels at once take a
    third of the time on a CPU for the detector of published size; on small features the calls would
    take longer than the work.
    """
    channels, height, width = features.shape[1:]
    tops, bottoms = _caffe_bins(rois[:, 2], rois[:, 4], size, scale, height)
    lefts, rights = _caffe_bins(rois[:, 1], rois[:, 3], size, scale, width)
    pixels = features.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
    pooled = features.new_zeros(len(rois), size, size, channels)  # empty bins stay 0
    bins = (edges.tolist() for edges in (rois[:, 0].long(), tops, bottoms, lefts, rights))
    for roi, (image, top, bottom, left, right) in enumerate(zip(*bins, strict=True)):
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


def _caffe_bins(
    first: Tensor, last: Tensor, size: int, scale: float, limit: int
) -> tuple[Tensor, Tensor]:
    """First cells (R, s) of the bins on one axis, and the ends after their last cells.

    In float32 like torchvision's operator: an edge may fall on a half.

    Args:
        first, last: (R,) the RoIs' corners. limit: H or W.
    """
    start = _round(first.float() * scale)
    length = (_round(last.float() * scale) - start + 1).clamp(min=1)
    edges = torch.arange(size + 1, dtype=torch.float32) * (length.float() / size)[:, None]
    low = (edges[:, :-1].floor().long() + start[:, None]).clamp(0, limit)
    high = (edges[:, 1:].ceil().long() + start[:, None]).clamp(0, limit)
    return low, high


def roi_pool_lua(features: Tensor, rois: Tensor, size: int, scale: float) -> Tensor:
    """The largest value of each bin, 0 for an empty one.

    Args:
        features: (B, C, H, W).
        rois: (R, 5), the index of the image and xyxy.
        size: s. scale: cells of the features per pixel of the RoIs.

    Returns:
        (R, C, s, s).
    """
    channels, height, width = features.shape[1:]
    x0, x1 = _lua_bins(rois[:, 1], rois[:, 3], size, scale, width)
    y0, y1 = _lua_bins(rois[:, 2], rois[:, 4], size, scale, height)
    filled = (y1 > y0)[:, :, None] & (x1 > x0)[:, None]  # (R, s, s)
    roi, y, x = filled.nonzero(as_tuple=True)  # (n,) each
    origin = rois[roi, 0].long() * (height * width)
    values = _window_max(features, origin, (y0[roi, y], y1[roi, y]), (x0[roi, x], x1[roi, x]))
    pooled = features.new_zeros(len(rois), size, size, channels)
    return pooled.index_put((roi, y, x), values).permute(0, 3, 1, 2)


def _lua_bins(
    first: Tensor, last: Tensor, size: int, scale: float, limit: int
) -> tuple[Tensor, Tensor]:
    """As `_caffe_bins`, for the released detectors; in float32 step by step like the original."""
    start = _round(first.float() * scale)
    length = (_round(last.float() * scale) - start).clamp(min=1)
    steps = torch.arange(size + 1, device=first.device, dtype=torch.float32)
    edges = _round(steps * (length.float() / size)[:, None]) + start[:, None]  # (R, s + 1)
    edges = edges.clamp(0, limit)
    return edges[:, :-1], edges[:, 1:]


def _round(values: Tensor) -> Tensor:
    """C's `round`: halves go away from zero; torch takes them to the even number."""
    return (values.sign() * (values.abs().double() + 0.5).floor()).long()


def _window_max(
    features: Tensor, origin: Tensor, y: tuple[Tensor, Tensor], x: tuple[Tensor, Tensor]
) -> Tensor:
    """Maxima (n, C) of windows of many sizes.

    A window is the union of four windows whose sides are powers of two. For each such size the
    maxima are computed once at all positions, and looked up for all windows that need them.

    Args:
        origin: (n,) the first cell of the window's image, counted over all images.
        y, x: (n,) first cells and ends.
    """
    width, values = features.shape[3], features.new_empty(len(origin), features.shape[1])
    if len(origin) == 0:
        return values
    heights, widths = _log2_floor(y[1] - y[0]), _log2_floor(x[1] - x[0])
    tall = features
    for h in range(int(heights.max()) + 1):
        tall = _double(tall, h, axis=2)
        maxima = tall
        for w in range(int(widths[heights >= h].max()) + 1):
            maxima = _double(maxima, w, axis=3)
            rows = ((heights == h) & (widths == w)).nonzero().squeeze(1)
            cells = maxima.permute(0, 2, 3, 1).flatten(0, 2)  # (B H W, C)
            corners = [
                cells[origin[rows] + top * width + left]
                for top in (y[0][rows], y[1][rows] - (1 << h))
                for left in (x[0][rows], x[1][rows] - (1 << w))
            ]
            values = values.index_put((rows,), torch.stack(corners).amax(dim=0))
    return values


def _log2_floor(lengths: Tensor) -> Tensor:
    return torch.frexp(lengths.float())[1].long() - 1


def _double(maxima: Tensor, exponent: int, *, axis: int) -> Tensor:
    """Maxima of windows of side 2^exponent, from those of half the side; unchanged for exponent 0.

    The shape stays: windows are cut off at the border.
    """
    if exponent == 0:
        return maxima
    step = min(1 << (exponent - 1), maxima.shape[axis])
    ahead = maxima.narrow(axis, step, maxima.shape[axis] - step)
    pad = (0, 0, 0, step) if axis == 2 else (0, step)
    return torch.maximum(maxima, F.pad(ahead, pad, value=float("-inf")))
