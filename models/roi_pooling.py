"""RoI max pooling: Fast R-CNN's, and the released detectors' (imagine-nn, version 2).

Fast R-CNN's rounds the bins outwards: neighbors overlap, and the cell of the RoI's last corner is
inside. The released detectors round every edge to the nearest cell, so the bins part the RoI, one
may be empty, and the last corner's cell is outside.

Letters: B images, C channels, (H, W) their features, R RoIs, s bins on a side.
"""

import torch
import torch.nn.functional as F
import torchvision  # noqa: F401  its import registers the operators
from torch import Tensor

LARGE = 1 << 19  # values of an image's features from which on `_pool_by_axes` is the faster one


class _OverlappingPool(torch.autograd.Function):
    """torchvision's operators, with no gradient made up for the places of the maxima.

    `torchvision.ops.roi_pool` fills one of the size of the output at every step, for nothing.
    """

    @staticmethod
    def forward(ctx, features: Tensor, rois: Tensor, size: int, scale: float) -> Tensor:
        pooled, places = torch.ops.torchvision.roi_pool(features, rois, scale, size, size)
        ctx.save_for_backward(rois, places)
        ctx.features_shape, ctx.size, ctx.scale = features.shape, size, scale
        return pooled

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        rois, places = ctx.saved_tensors
        return (
            torch.ops.torchvision._roi_pool_backward(
                gradient, rois, places, ctx.scale, ctx.size, ctx.size, *ctx.features_shape
            ),
            None,
            None,
            None,
        )


def roi_pool_caffe(features: Tensor, rois: Tensor, size: int, scale: float) -> Tensor:
    """The largest value of each bin; arguments and result as `roi_pool_lua`."""
    features = features.to(rois.dtype)  # for AMP
    differentiable = torch.is_grad_enabled() and features.requires_grad
    if features.is_cpu and not differentiable and features[0].numel() >= LARGE:
        return _pool_by_axes(features, rois, size, scale)
    return _OverlappingPool.apply(features, rois, size, scale)


def _pool_by_axes(features: Tensor, rois: Tensor, size: int, scale: float) -> Tensor:
    """`roi_pool_caffe` without a gradient: maxima down the rows of bins, then across.

    torchvision's operator goes through one channel after the other. Many at once, as the memory has
    them, are a third of the time on a CPU for the detector of published size; on small features the
    calls would take longer than the work.
    """
    channels, height, width = features.shape[1:]
    tops, bottoms = _overlapping_bins(rois[:, 2], rois[:, 4], size, scale, height)
    lefts, rights = _overlapping_bins(rois[:, 1], rois[:, 3], size, scale, width)
    pixels = features.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
    pooled = features.new_zeros(len(rois), size, size, channels)
    bins = (each.tolist() for each in (rois[:, 0].long(), tops, bottoms, lefts, rights))
    for roi, (image, top, bottom, left, right) in enumerate(zip(*bins, strict=True)):
        first = min(left)
        strip = pixels[image, :, first : max(right)]
        maxima = features.new_zeros(size, *strip.shape[1:])  # empty bins stay 0
        for row, (start, end) in enumerate(zip(top, bottom, strict=True)):
            if start < end:
                torch.amax(strip[start:end], 0, out=maxima[row])
        for column, (start, end) in enumerate(zip(left, right, strict=True)):
            if start < end:
                part = maxima[:, start - first : end - first]
                torch.amax(part, 1, out=pooled[roi, :, column])
    return pooled.permute(0, 3, 1, 2)


def _overlapping_bins(
    first: Tensor, last: Tensor, size: int, scale: float, limit: int
) -> tuple[Tensor, Tensor]:
    """As `_bins`, of Fast R-CNN: in float32, as torchvision computes them."""
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
        rois: (R, 5), the row of the image and xyxy.
        size: s. scale: cells of the features for a pixel of the RoIs.

    Returns:
        (R, C, s, s).
    """
    channels, height, width = features.shape[1:]
    x0, x1 = _bins(rois[:, 1], rois[:, 3], size, scale, width)
    y0, y1 = _bins(rois[:, 2], rois[:, 4], size, scale, height)
    rows, columns = (y1 - y0)[:, :, None], (x1 - x0)[:, None]  # (R, s, 1), (R, 1, s)
    filled = (rows > 0) & (columns > 0)
    roi, y, x = filled.nonzero(as_tuple=True)  # (n,) each: the bins that are not empty
    origin = rois[roi, 0].long() * (height * width)
    values = _window_max(features, origin, (y0[roi, y], y1[roi, y]), (x0[roi, x], x1[roi, x]))
    pooled = features.new_zeros(len(rois), size, size, channels)
    return pooled.index_put((roi, y, x), values).permute(0, 3, 1, 2)


def _bins(
    first: Tensor, last: Tensor, size: int, scale: float, limit: int
) -> tuple[Tensor, Tensor]:
    """First cells of the bins on one axis and the ends behind their last, (R, s) each.

    In float32 step by step, as the original computes them: an edge may lie at a half.
    """
    start = _round(first.float() * scale)
    length = (_round(last.float() * scale) - start).clamp(min=1)
    steps = torch.arange(size + 1, device=first.device, dtype=torch.float32)
    edges = _round(steps * (length.float() / size)[:, None]) + start[:, None]  # (R, s + 1)
    edges = edges.clamp(0, limit)
    return edges[:, :-1], edges[:, 1:]


def _round(values: Tensor) -> Tensor:
    """C's `round`: halves away from zero, where torch takes them to the even number."""
    return (values.sign() * (values.abs().double() + 0.5).floor()).long()


def _window_max(
    features: Tensor, origin: Tensor, y: tuple[Tensor, Tensor], x: tuple[Tensor, Tensor]
) -> Tensor:
    """Maxima (n, C) of windows of many sizes.

    A window is the union of four whose sides are powers of two. The maxima of those are computed
    once for all places; windows of one such size are then looked up together.

    Args:
        origin: (n,) the first cell of the image, counted over all images. y, x: (n,) first cells
            and ends.
    """
    width, values = features.shape[3], features.new_empty(len(origin), features.shape[1])
    if len(origin) == 0:
        return values
    heights, widths = _power_of_two(y[1] - y[0]), _power_of_two(x[1] - x[0])
    tall = features
    for h in range(int(heights.max()) + 1):
        tall = _double(tall, h, axis=2)
        maxima = tall
        for w in range(int(widths[heights >= h].max()) + 1):
            maxima = _double(maxima, w, axis=3)
            rows = ((heights == h) & (widths == w)).nonzero().squeeze(1)
            cells = maxima.permute(0, 2, 3, 1).reshape(-1, maxima.shape[1])
            corners = [
                cells[origin[rows] + top * width + left]
                for top in (y[0][rows], y[1][rows] - (1 << h))
                for left in (x[0][rows], x[1][rows] - (1 << w))
            ]
            best = torch.stack(corners).amax(dim=0)
            values = values.index_put((rows,), best)
    return values


def _power_of_two(lengths: Tensor) -> Tensor:
    """The exponent of the largest power of two that is not larger."""
    return torch.frexp(lengths.float())[1].long() - 1


def _double(maxima: Tensor, exponent: int, *, axis: int) -> Tensor:
    """Maxima of windows of side 2^exponent from those of half the side; the same for exponent 0.

    The shape stays: windows that stick out are cut off at the border.
    """
    if exponent == 0:
        return maxima
    step = min(1 << (exponent - 1), maxima.shape[axis])
    ahead = maxima.narrow(axis, step, maxima.shape[axis] - step)
    pad = (0, 0, 0, step) if axis == 2 else (0, step)
    return torch.maximum(maxima, F.pad(ahead, pad, value=float("-inf")))
