"""The resizing of `datasets.resize` as operations that a graph with dynamic sizes can hold.

A smaller image averages areas, a larger one is interpolated, and both are rounded to whole values
as OpenCV rounds them, which works on bytes. Averages here are exact, OpenCV's are in float32: one
value in some 10,000 lies between two whole numbers and is rounded otherwise.

Letters: (H, W) the image, (h, w) the scaled image; both are ints, or symbols while it is exported.
"""

from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor

from datasets.resize import GRAY
from datasets.scaled_rows import COEFFICIENT

MAX_SIDE = 1 << 17  # pixels, of the scaled image
BITS = 40  # of a scale: with it, such sides are rounded as those in float64


def scaled_side(side: int, scale: float) -> int:
    """max(1, round(side * scale)) in whole numbers: half a pixel is rounded to the even number."""
    ratio = Fraction(round(scale * 2**BITS), 2**BITS)
    scaled, unit = side * ratio.numerator, ratio.denominator
    rounded = (2 * scaled + unit - 1 + scaled // unit % 2) // (2 * unit)
    if isinstance(rounded, int):
        return max(1, rounded)
    # A graph is traced. With a name of its own, else all shapes from here on would be formulas of
    # the image's size, which take minutes to trace.
    symbol = torch.full((), rounded).clamp(min=1).item()
    assert isinstance(symbol, torch.SymInt)
    torch._check(symbol >= 1)
    torch._check(symbol <= MAX_SIDE)
    return symbol


def resize_with_border(image: Tensor, scale: float, border: int) -> tuple[Tensor, int, int]:
    """An image resized by a scale, with a gray border on all sides.

    Args:
        image: (H, W, 3) uint8.

    Returns:
        (h + 2 border, w + 2 border, 3) float32 in [0, 1], h and w.
    """
    height, width = image.shape[:2]
    h, w = scaled_side(height, scale), scaled_side(width, scale)
    y, x = torch.arange(-border, h + border), torch.arange(-border, w + border)
    pixels = image.double()
    if scale < 1:
        pixels = _sum_areas(_sum_areas(pixels, 0, h, y), 1, w, x)
        if scale == 0.5:  # OpenCV rounds means of two by two pixels up, all others to even numbers
            pixels = pixels + (1 - height % 2) * (1 - width % 2) / 4
        pixels = (pixels / (height * width)).round()
    elif scale > 1:
        pixels = _interpolate(pixels, (h, w), y, x)
    else:
        pixels = pixels[y.clamp(0, h - 1)][:, x.clamp(0, w - 1)]
    inside = ((y >= 0) & (y < h))[:, None, None] & ((x >= 0) & (x < w))[:, None]
    return torch.where(inside, pixels.float() / 255, GRAY), h, w


def _sum_areas(pixels: Tensor, dim: int, size: int, at: Tensor) -> Tensor:
    """The means over the parts `at` (n,) of a side divided into `size`, times the side's length.

    They are whole numbers, so that no order of summation changes them. Parts outside are 0.
    """
    side = pixels.shape[dim]
    edges = torch.cat([at, at[-1:] + 1]).clamp(0, size) * side  # in pixels / size
    whole = edges // size
    part = (edges - whole * size).view([-1, 1, 1] if dim == 0 else [-1, 1])
    sums = F.pad(pixels.cumsum(dim), [0, 0] * (2 - dim) + [1, 0])
    last = pixels.index_select(dim, whole.clamp(max=side - 1))
    totals = sums.index_select(dim, whole) * size + last * part
    return totals.narrow(dim, 1, at.shape[0]) - totals.narrow(dim, 0, at.shape[0])


def _interpolate(pixels: Tensor, size: tuple[int, int], y: Tensor, x: Tensor) -> Tensor:
    """Bilinear in OpenCV's whole numbers, as `datasets.scaled_rows` has it."""
    left, right, across = _between(pixels.shape[1], size[1], x)
    across = across[:, None]
    pixels = pixels[:, left] * (COEFFICIENT - across) + pixels[:, right] * across
    pixels = (pixels / 16).floor()
    above, below, down = _between(pixels.shape[0], size[0], y)
    down = down[:, None, None]
    upper = (pixels[above] * (COEFFICIENT - down) / 65536).floor()
    lower = (pixels[below] * down / 65536).floor()
    return ((upper + lower + 2) / 4).floor()


def _between(old: int, new: int, at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Between which of `old` pixels those of `new` lie, and how far, in parts of `COEFFICIENT`."""
    position = ((at.double() + 0.5) * old / new - 0.5).float()
    floor = position.floor()
    before = floor.long()  # beyond the edge, both are the pixel there
    fraction = ((position - floor) * COEFFICIENT).round().double()
    return before.clamp(0, old - 1), (before + 1).clamp(0, old - 1), fraction
