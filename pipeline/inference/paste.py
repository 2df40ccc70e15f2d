"""From mask logits of patches to RLE masks in the image, without ever making its pixels.

A mask's logits are interpolated across, to the columns of pixels that its foreground can reach.
Down a column they are then straight lines from cell to cell, so where the column crosses the
threshold is computed, not searched for. These edges give the run lengths of COCO's encoding, which
goes down the columns of the image, its runs alternately background and foreground.

Letters: H, W the image, n masks, M cells on a side, T columns of pixels of all masks, e edges.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# Logits interpolated at once: on a CPU 1 MiB, which stays in a core's cache; on a GPU all those of
# a chunk of masks, since every block waits for it.
BLOCK, BLOCK_ON_GPU = 1 << 18, 1 << 25

# COCO writes a number as characters of five bits, each with a flag that more follow.
BITS = 5
MORE = 1 << BITS
FIRST_CHARACTER = np.uint8(ord("0"))


class Pasted(NamedTuple):
    """Masks in the image.

    Attributes:
        indices: (m,) int64, which of the n masks have a pixel in the image; ascending.
        boxes: (m, 4) float32 xyxy.
        rles: m compressed RLE strings.
    """

    indices: np.ndarray
    boxes: np.ndarray
    rles: list[bytes]


def paste(
    logits: Tensor,
    places: np.ndarray,
    *,
    image_size: tuple[int, int],
    threshold: float,
    align_corners: bool = False,
) -> Pasted:
    """Pastes masks into the image (height, width), given their logits (n, M, M) over the patches.

    Args:
        places: (n, 4) float64 left, top, width and height of the patches in pixels of the image.
        threshold: pixels with a higher probability belong to the mask; in (0, 1).
        align_corners: how the cells of a mask lie over its patch. False: they divide its area
            evenly. True: the first and last cell are its first and last pixel, as in the released
            code; places are then whole numbers.
    """
    limit = math.log(threshold / (1 - threshold))
    groups = _shrink(logits, places) if align_corners else [(np.arange(len(logits)), logits)]
    owners, edges = [], []
    for indices, group in groups:
        owner, edge = _edges(group, places[indices], image_size, limit, align_corners)
        owners.append(indices[owner])
        edges.append(edge)
    owner, edge = np.concatenate(owners), np.concatenate(edges)
    order = np.argsort(owner, kind="stable")
    return encode_edges(owner[order], edge[order], image_size)


def encode_edges(owner: np.ndarray, edges: np.ndarray, image_size: tuple[int, int]) -> Pasted:
    """Encodes masks from the edges of their runs.

    Args:
        owner: (e,) int64, the mask of each edge, ascending.
        edges: (e,) int64, pixels counted down the columns, ascending within a mask; alternately the
            first pixel of a run of foreground and the first one after it. Runs may be empty.
    """
    height, width = image_size
    owner, edges = _cancel_pairs(owner, edges)
    if len(edges) == 0:
        return Pasted(owner, np.zeros((0, 4), np.float32), [])
    starts = np.flatnonzero(np.diff(owner, prepend=-1))  # the first edge of each mask
    boxes = _boxes_of_runs(starts // 2, edges.reshape(-1, 2), height)
    return Pasted(owner[starts], boxes, _compress(*_run_lengths(starts, edges, height * width)))


def _shrink(logits: Tensor, places: np.ndarray) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Masks with no more cells than pixels, since image.scale of Lua Torch averages areas there.

    Yields indices of the masks that have one size then, and their logits.
    """
    cells = logits.shape[-1]
    sizes = places[:, [3, 2]].clip(1, cells).astype(int)
    for height, width in np.unique(sizes, axis=0).tolist():
        indices = np.flatnonzero((sizes == (height, width)).all(axis=1))
        group = logits[torch.from_numpy(indices).to(logits.device)]
        if height < cells:
            group = _averages(height, cells).to(group) @ group
        if width < cells:
            group = group @ _averages(width, cells).to(group).T
        yield indices, group


def _averages(pixels: int, cells: int) -> Tensor:
    """Weights (pixels, cells) of the cells in the average over each of fewer pixels."""
    low, high = np.arange(cells), np.arange(pixels)[:, None] * (cells / pixels)
    overlap = np.minimum(low + 1, high + cells / pixels) - np.maximum(low, high)
    return torch.from_numpy(np.maximum(0, overlap) * (pixels / cells))


def _edges(
    logits: Tensor,
    places: np.ndarray,
    image_size: tuple[int, int],
    limit: float,
    align_corners: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Owner and edges, as `encode_edges` takes them, of masks (n, rows, columns) of cells.

    Foreground has a logit above the limit.
    """
    left, top, width, height = places.T
    rows, columns = logits.shape[1:]
    low, high, origin, spacing = _along_side(
        top, height, limit=image_size[0], cells=rows, align_corners=align_corners
    )
    across = _along_side(
        left, width, limit=image_size[1], cells=columns, align_corners=align_corners
    )
    used = (logits.amax(dim=1) > limit).cpu().numpy() & (low < high)[:, None]
    owner, x, position = _columns(used, *across)
    column, cell, before, after = _crossings(logits, owner, position, limit)
    owner, x = owner[column], x[column]
    with np.errstate(invalid="ignore", divide="ignore"):  # next to a cell outside of the patch
        y = origin[owner] + (cell - 1 + (limit - before) / (after - before)) * spacing[owner]
    # Foreground is strictly above the limit.
    y = np.where(after > limit, np.floor(y) + 1, np.ceil(y))
    y[cell == 0], y[cell == rows] = -np.inf, np.inf  # such runs begin or end at the patch's border
    y = y.clip(low[owner], high[owner]).astype(np.int64)
    return owner, x * image_size[0] + y


def _along_side(
    start: np.ndarray, length: np.ndarray, *, limit: int, cells: int, align_corners: bool
) -> tuple[np.ndarray, ...]:
    """How patches lie along a side of the image that is `limit` pixels long.

    Returns:
        First pixel of each patch within the image, and the first one after it: a pixel belongs to a
        patch if its center does. Center of the first cell and distance between cells, where pixel 0
        has its center at 0.
    """
    low, high = (np.ceil(side - 0.5).astype(np.int64) for side in (start, start + length))
    low, high = low.clip(min=0), high.clip(max=limit)
    if align_corners:
        return low, high, start, (length - 1) / max(cells - 1, 1)
    return low, high, start + length / cells / 2 - 0.5, length / cells


def _columns(
    used: np.ndarray, low: np.ndarray, high: np.ndarray, origin: np.ndarray, spacing: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The columns of pixels that foreground reaches by interpolation from `used` columns of cells.

    The other arguments are what `_along_side` returns.

    Returns:
        (T,) int64 masks, (T,) int64 x in the image, (T,) float64 positions in cells.
    """
    cells = used.shape[1]
    # From the cell before the first used one to the cell after the last. Beyond the outermost
    # centers, the outermost cell's value continues.
    first, last = used.argmax(axis=1), cells - 1 - used[:, ::-1].argmax(axis=1)
    reach = np.where(first > 0, origin + (first - 1) * spacing, low)
    low = np.maximum(low, np.ceil(reach).astype(np.int64))
    reach = np.where(last < cells - 1, origin + (last + 1) * spacing, high)
    high = np.minimum(high, np.floor(reach).astype(np.int64) + 1)
    counts = np.where(used.any(axis=1), (high - low).clip(min=0), 0)
    owner = np.repeat(np.arange(len(used)), counts)
    x = np.arange(len(owner)) + np.repeat(low - (np.cumsum(counts) - counts), counts)
    position = (x - origin[owner]) / np.maximum(spacing, 1e-9)[owner]  # 0 if a patch is one pixel
    return owner, x, position.clip(0, cells - 1)


def _crossings(
    logits: Tensor, owner: np.ndarray, position: np.ndarray, limit: float
) -> tuple[np.ndarray, ...]:
    """Where columns of pixels switch between background and foreground.

    Returns:
        In order: (e,) column; (e,) the cell before which it switches, 0 to the number of rows; and
        (e,) float64 the interpolated logits before and after the switch.
    """
    cells, across = logits.shape[1:]
    rows = logits.transpose(1, 2).reshape(-1, cells)  # (n columns, rows)
    floor = position.astype(np.int64)
    left = torch.from_numpy(owner * across + floor).to(rows.device)
    right = torch.from_numpy(owner * across + np.minimum(floor + 1, across - 1)).to(rows.device)
    weight = torch.from_numpy((position - floor).astype(np.float32)).to(rows.device)
    found = []
    step = max(1, (BLOCK if rows.is_cpu else BLOCK_ON_GPU) // cells)
    for first in range(0, max(1, len(owner)), step):
        part = slice(first, first + step)
        sides = rows.index_select(0, left[part]), rows.index_select(0, right[part])
        column, *rest = _switches(torch.lerp(*sides, weight[part, None]), limit)
        found.append((column + first, *rest))
    return tuple(map(np.concatenate, zip(*found, strict=True)))


def _switches(values: Tensor, limit: float) -> tuple[np.ndarray, ...]:
    """As `_crossings`, of interpolated logits (T, rows)."""
    cells = values.shape[1]
    # Background before and between the columns closes every run within its column.
    flags = torch.zeros(1 + len(values) * (cells + 1), dtype=torch.bool, device=values.device)
    above = flags[1:].view(-1, cells + 1)[:, :cells]
    if values.is_cpu:  # where NumPy compares and searches in a fifth of PyTorch's time
        np.greater(values.numpy(), limit, out=above.numpy())
        switch = torch.from_numpy(np.flatnonzero(flags.numpy()[1:] != flags.numpy()[:-1]))
    else:
        torch.gt(values, limit, out=above)
        switch = torch.nonzero(flags[1:] ^ flags[:-1]).flatten()
    column, cell = switch // (cells + 1), switch % (cells + 1)
    flat, index = values.flatten(), column * cells + cell
    before, after = flat[(index - 1).clamp(min=0)], flat[index.clamp(max=len(flat) - 1)]
    return tuple(v.cpu().numpy() for v in (column, cell, before.double(), after.double()))


def _cancel_pairs(owner: np.ndarray, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Owner and edges without those that undo each other.

    An edge switches between background and foreground, so two at one pixel switch nothing: an empty
    run, or one that ends with a column and continues at the top of the next.
    """
    is_new = np.ones(len(edges), bool)
    is_new[1:] = (edges[1:] != edges[:-1]) | (owner[1:] != owner[:-1])
    first = np.flatnonzero(is_new)
    odd = first[np.diff(first, append=len(edges)) % 2 == 1]
    return owner[odd], edges[odd]


def _boxes_of_runs(starts: np.ndarray, runs: np.ndarray, height: int) -> np.ndarray:
    """The boxes (n, 4) float32 xyxy of masks, whose first runs are `starts` (n,).

    Runs (r, 2) of foreground have a begin and an end.
    """
    column, row = np.divmod(runs - [0, 1], height)  # of a run's first and last pixel
    # A run over several columns touches the bottom row and the top row.
    within = column[:, 0] == column[:, 1]
    top = np.minimum.reduceat(np.where(within, row[:, 0], 0), starts)
    bottom = np.maximum.reduceat(np.where(within, row[:, 1], height - 1), starts)
    last = np.append(starts[1:], len(runs)) - 1
    boxes = np.stack([column[starts, 0], top, column[last, 1] + 1, bottom + 1], axis=1)
    return boxes.astype(np.float32)


def _run_lengths(
    starts: np.ndarray, edges: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lengths of the runs of masks, background first, given each mask's first edge (n,).

    Returns:
        Lengths (c,) int64, the first one of each mask (n,), and their indices within a mask (c,).
    """
    firsts = starts + np.arange(len(starts))  # every mask has one run more than edges
    ends = np.insert(edges, np.append(starts[1:], len(edges)), size)
    lengths = np.diff(ends, prepend=0)
    lengths[firsts] = ends[firsts]
    index = np.arange(len(lengths)) - np.repeat(firsts, np.diff(firsts, append=len(lengths)))
    kept = (lengths > 0) | (index == 0)  # no empty run at the end
    firsts = firsts - np.cumsum(~kept)[firsts]
    return lengths[kept], firsts, index[kept]


def _compress(lengths: np.ndarray, firsts: np.ndarray, index: np.ndarray) -> list[bytes]:
    """COCO's strings of what `_run_lengths` returns (rleToString of maskApi.c).

    From a mask's fourth length on, the difference to the length two before is written: five bits a
    character, the lowest first, the sign in the last.
    """
    values = lengths.copy()
    values[2:] -= np.where(index[2:] > 2, lengths[:-2], 0)
    magnitude = np.where(values < 0, ~values, values)
    groups = 1 + int(magnitude.max(initial=0)).bit_length() // BITS  # one more bit for the sign
    used = np.ones((len(lengths), groups), bool)
    characters = np.empty((len(lengths), groups), np.uint8)
    for group in range(groups):
        follows = magnitude >= 1 << (BITS * group + BITS - 1)
        characters[:, group] = (values >> (BITS * group) & (MORE - 1)) + MORE * follows
        used[:, group + 1 : group + 2] = follows[:, None]
    text = (characters[used] + FIRST_CHARACTER).tobytes()
    ends = np.cumsum(used.sum(axis=1))
    stops = ends[np.append(firsts[1:], len(lengths)) - 1].tolist()
    return [text[a:b] for a, b in zip([0, *stops[:-1]], stops, strict=True)]
