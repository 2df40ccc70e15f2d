"""From mask logits in patches to RLE masks in the image, without an array of its pixels.

A mask's logits are interpolated across, to the columns of pixels that its foreground can reach.
Down a column they are then straight lines from cell to cell, so where the column passes the
threshold is computed rather than looked for: those edges are the run lengths.

Letters: n masks, M their cells, T columns of pixels of all masks, e edges.
"""

import math
from collections.abc import Iterator
from dataclasses import astuple, dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.inference.rle import boxes_of_runs, cancel_pairs, compress, run_lengths

BLOCK = 1 << 18  # interpolated logits at once: 1 MiB, which stays in a core's cache


@dataclass(frozen=True)
class Placement:
    """Where the patches of masks lie in the original image.

    Top-left corners and sizes, in pixels, each (n,) float64.

    Attributes:
        corners: how the cells of a mask lie over its patch. False: they share its area evenly.
            True: the first and last cell are its first and last pixel (whole numbers then), as in
            the released code.
    """

    left: np.ndarray
    top: np.ndarray
    width: np.ndarray
    height: np.ndarray
    corners: bool = False

    def part(self, chosen: np.ndarray) -> "Placement":
        """The places of some of the masks."""
        *arrays, corners = astuple(self)
        return Placement(*(array[chosen] for array in arrays), corners)


@dataclass(frozen=True)
class Pasted:
    """Masks as objects of the image.

    Attributes:
        numbers: (m,) int64, which of the masks have a pixel in the image; ascending.
        boxes: (m, 4) float32 xyxy. counts: m compressed RLE strings.
    """

    numbers: np.ndarray
    boxes: np.ndarray
    counts: list[bytes]


NOTHING = Pasted(np.zeros(0, np.int64), np.zeros((0, 4), np.float32), [])


def paste(
    logits: Tensor, places: Placement, *, image_size: tuple[int, int], threshold: float
) -> Pasted:
    """Masks of patches as objects of the image.

    Args:
        logits: (n, M, M) float32, over the patches.
        places: the patches in the image.
        image_size: height and width.
        threshold: probability from which on a pixel belongs to a mask, in (0, 1).
    """
    limit = math.log(threshold / (1 - threshold))
    owners, edges = [], []
    for chosen, same in _shrink(logits, places) if places.corners else [(None, logits)]:
        part = places if chosen is None else places.part(chosen)
        owner, edge = _edges(same, part, image_size, limit)
        owners.append(owner if chosen is None else chosen[owner])
        edges.append(edge)
    owner, edge = np.concatenate(owners), np.concatenate(edges)
    order = np.argsort(owner, kind="stable")
    return encode_edges(owner[order], edge[order], image_size)


def encode_edges(owner: np.ndarray, edges: np.ndarray, image_size: tuple[int, int]) -> Pasted:
    """Masks from the edges of their runs.

    Args:
        owner: (e,) int64, the mask of each edge, ascending.
        edges: (e,) int64 pixels down the columns, ascending within a mask, alternately the first of
            a run of foreground and the first behind it; empty runs may be among them.
        image_size: height and width.
    """
    height, width = image_size
    owner, edges = cancel_pairs(owner, edges)
    if len(edges) == 0:
        return NOTHING
    starts = np.flatnonzero(np.diff(owner, prepend=-1))
    boxes = boxes_of_runs(starts // 2, edges.reshape(-1, 2), height)
    return Pasted(owner[starts], boxes, compress(*run_lengths(starts, edges, height * width)))


def _shrink(logits: Tensor, places: Placement) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Masks without more cells than pixels: image.scale of Lua Torch averages areas there.

    Yields:
        The numbers of masks that have one size then, and their logits.
    """
    cells = logits.shape[-1]
    sizes = np.stack([places.height, places.width], axis=1).clip(1, cells).astype(int)
    for height, width in np.unique(sizes, axis=0).tolist():
        chosen = np.flatnonzero((sizes == (height, width)).all(axis=1))
        part = logits[torch.from_numpy(chosen).to(logits.device)]
        if height < cells:
            part = _shares(height, cells).to(part) @ part
        if width < cells:
            part = part @ _shares(width, cells).to(part).T
        yield chosen, part


def _shares(pixels: int, cells: int) -> Tensor:
    """What each of `cells` counts in the average over each of fewer pixels: (pixels, cells)."""
    low, high = np.arange(cells), np.arange(pixels)[:, None] * (cells / pixels)
    shared = np.minimum(low + 1, high + cells / pixels) - np.maximum(low, high)
    return torch.from_numpy(np.maximum(0, shared) * (pixels / cells))


def _edges(
    logits: Tensor, places: Placement, image_size: tuple[int, int], limit: float
) -> tuple[np.ndarray, np.ndarray]:
    """The edges of the runs of masks: owner and edges as `encode_edges` takes them.

    Args:
        logits: (n, Mv, Mh). limit: the logit that foreground exceeds.
    """
    cells = logits.shape[1]
    low, high = _pixels(places.top, places.height, image_size[0])
    origin, spacing = _centers(places.top, places.height, cells, places.corners)
    used = (logits.amax(dim=1) > limit).cpu().numpy() & (low < high)[:, None]
    owner, x, position = _columns(used, places, image_size[1])
    column, cell, before, after = _crossings(logits, owner, position, limit)
    owner, x = owner[column], x[column]
    # What a column begins or ends with lies at the patch's edge.
    with np.errstate(invalid="ignore", divide="ignore"):
        y = origin[owner] + (cell - 1 + (limit - before) / (after - before)) * spacing[owner]
    # Foreground is strictly above the limit.
    y = np.where(after > limit, np.floor(y) + 1, np.ceil(y))
    y[cell == 0], y[cell == cells] = -np.inf, np.inf
    y = y.clip(low[owner], high[owner]).astype(np.int64)
    return owner, x * image_size[0] + y


def _pixels(start: np.ndarray, length: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """First pixel of patches in the image, and the first behind them.

    A pixel belongs to a patch when its center does.
    """
    low, high = (np.ceil(side - 0.5).astype(np.int64) for side in (start, start + length))
    return low.clip(min=0), high.clip(max=limit)


def _centers(
    start: np.ndarray, length: np.ndarray, cells: int, corners: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Where the first cell's center lies and how far apart cells are; 0 is pixel 0's center."""
    if corners:
        return start, (length - 1) / max(cells - 1, 1)
    return start + length / cells / 2 - 0.5, length / cells


def _columns(
    used: np.ndarray, places: Placement, width: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The columns of pixels that the foreground of masks can reach by interpolation.

    Args:
        used: (n, Mh) bool, whether a column of cells has foreground. width: of the image.

    Returns:
        (T,) int64 masks and x, (T,) float64 positions in cells.
    """
    cells = used.shape[1]
    low, high = _pixels(places.left, places.width, width)
    origin, spacing = _centers(places.left, places.width, cells, places.corners)
    # From the neighbor before the first to the one behind the last; beyond the outermost centers
    # the outermost cell's value goes on.
    first, last = used.argmax(axis=1), cells - 1 - used[:, ::-1].argmax(axis=1)
    reach = np.where(first > 0, origin + (first - 1) * spacing, low)
    low = np.maximum(low, np.ceil(reach).astype(np.int64))
    reach = np.where(last < cells - 1, origin + (last + 1) * spacing, high)
    high = np.minimum(high, np.floor(reach).astype(np.int64) + 1)
    counts = np.where(used.any(axis=1), (high - low).clip(min=0), 0)
    owner = np.repeat(np.arange(len(used)), counts)
    x = np.arange(len(owner)) + np.repeat(low - (np.cumsum(counts) - counts), counts)
    position = (x - origin[owner]) / np.maximum(spacing, 1e-9)[owner]  # 0 where a pixel is all
    return owner, x, position.clip(0, cells - 1)


def _crossings(
    logits: Tensor, owner: np.ndarray, position: np.ndarray, limit: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Where columns of pixels switch between background and foreground.

    Returns:
        In order: (e,) column, (e,) the cell in front of which it switches, 0 to Mv, and (e,)
        float64 the interpolated logits before and after it.
    """
    cells, across = logits.shape[1:]
    rows = logits.transpose(1, 2).reshape(-1, cells)  # (n Mh, Mv)
    left = position.astype(np.int64)
    share = torch.from_numpy((position - left).astype(np.float32)).to(rows.device)
    right = torch.from_numpy(owner * across + np.minimum(left + 1, across - 1)).to(rows.device)
    left = torch.from_numpy(owner * across + left).to(rows.device)
    found = []
    for first in range(0, len(owner), step := max(1, BLOCK // cells)):
        part = slice(first, first + step)
        sides = (rows.index_select(0, each[part]) for each in (left, right))
        column, *rest = _switches(torch.lerp(*sides, share[part, None]), limit)
        found.append((column + first, *rest))
    if not found:
        return np.zeros(0, int), np.zeros(0, int), np.zeros(0), np.zeros(0)
    return tuple(map(np.concatenate, zip(*found, strict=True)))


def _switches(values: Tensor, limit: float) -> tuple[np.ndarray, ...]:
    """As `_crossings`, of interpolated logits (T, Mv)."""
    cells = values.shape[1]
    # Background before and between the columns closes every run within its own.
    flags = torch.zeros(1 + len(values) * (cells + 1), dtype=torch.bool, device=values.device)
    above = flags[1:].view(-1, cells + 1)[:, :cells]
    if values.is_cpu:  # where NumPy compares and searches in a fifth of PyTorch's time
        np.greater(values.numpy(), limit, out=above.numpy())
        place = torch.from_numpy(np.flatnonzero(flags.numpy()[1:] != flags.numpy()[:-1]))
    else:
        torch.gt(values, limit, out=above)
        place = torch.nonzero(flags[1:] ^ flags[:-1]).flatten()
    column, cell = place // (cells + 1), place % (cells + 1)
    flat, place = values.flatten(), column * cells + cell
    before, after = flat[(place - 1).clamp(min=0)], flat[place.clamp(max=len(flat) - 1)]
    return tuple(each.cpu().numpy() for each in (column, cell, before.double(), after.double()))
