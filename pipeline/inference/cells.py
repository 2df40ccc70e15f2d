"""Cells of a pyramid: their scores, and what their masks are decoded from.

Letters: (h, w) cells of a map, E embedding width, F cells on a side of a patch, n chosen cells.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.deepmask import STRIDE


@dataclass
class PyramidScale:
    """One scale of the pyramid after the network, or a band of its rows.

    Masks are placed by the scales in x and y that rounding the size to pixels really gave; with
    `align_corners`, by the exact scale.
    """

    scale_xy: tuple[float, float]
    embeddings: Tensor  # (E, h, w)
    score_logits: Tensor  # (h, w)
    horizontal: list[Tensor]  # (c, h', w') for each refinement module, at its stride
    index: int = 0  # of the scale
    first_row: int = 0  # of a band, in its scale

    @staticmethod
    def of(maps: Sequence[Tensor], scale_xy: tuple[float, float], **place: int) -> "PyramidScale":
        """From the outputs of `DenseNetwork`."""
        embeddings, scores, *horizontal = (each[0] for each in maps)
        return PyramidScale(scale_xy, embeddings, scores, horizontal, **place)

    @property
    def nbytes(self) -> int:
        """Of what masks are decoded from."""
        return sum(each.nbytes for each in (self.embeddings, *self.horizontal))


@dataclass
class FoundMasks:
    """Masks of cells of an image; those that lie outside of it have an empty RLE string."""

    logits: np.ndarray  # (n,) float32
    cells: np.ndarray  # (n, 3) int64 of scale, row, column
    boxes: np.ndarray  # (n, 4) float32 xyxy
    rles: list[bytes]

    @staticmethod
    def none() -> "FoundMasks":
        """Those of no cell."""
        return FoundMasks.waiting(np.zeros(0, np.float32), np.zeros((0, 3), np.int64))

    @staticmethod
    def waiting(logits: np.ndarray, cells: np.ndarray) -> "FoundMasks":
        """Cells whose masks are not there yet."""
        count = len(logits)
        return FoundMasks(logits, cells, np.zeros((count, 4), np.float32), [b""] * count)

    @staticmethod
    def join(a: "FoundMasks", b: "FoundMasks") -> "FoundMasks":
        """Those of both."""
        logits, cells, boxes = (
            np.concatenate([getattr(a, name), getattr(b, name)])
            for name in ("logits", "cells", "boxes")
        )
        return FoundMasks(logits, cells, boxes, a.rles + b.rles)

    def order(self) -> np.ndarray:
        """The best first; of equal ones, in the order of scales, rows and columns."""
        scale, row, column = self.cells.T
        return np.lexsort([column, row, scale, -self.logits])

    def take(self, indices: np.ndarray) -> "FoundMasks":
        """Some of them."""
        rles = [self.rles[i] for i in indices.tolist()]
        return FoundMasks(self.logits[indices], self.cells[indices], self.boxes[indices], rles)


def best_cells(score_logits: list[Tensor], count: int) -> tuple[Tensor, Tensor]:
    """The highest-scoring cells of several maps together, given the scores (h, w) of each.

    Returns:
        Logits (N,), descending, and (N, 3) int64 of map, row, column; equal scores stay in this
        order.
    """
    flat = torch.cat([scores.flatten() for scores in score_logits]).float()
    order = torch.sort(flat, descending=True, stable=True).indices[:count]
    sizes = torch.tensor([scores.numel() for scores in score_logits], device=flat.device)
    widths = torch.tensor([scores.shape[1] for scores in score_logits], device=flat.device)
    ends = sizes.cumsum(0)
    index = torch.searchsorted(ends, order, right=True)
    within = order - (ends - sizes)[index]
    cells = torch.stack([index, within // widths[index], within % widths[index]], dim=1)
    return flat[order], cells


def join_cells(
    outputs: Iterable[list[Tensor | None]], patch_cells: int
) -> Iterator[tuple[int, list[Tensor]]]:
    """Bands of whole cells, from the rows that a banded `DenseNetwork` gives band by band.

    Yields the first row of cells, and their embeddings, scores and horizontal maps. Patches
    overlap: the last rows of a horizontal map are also the first ones of the next band's.
    """
    waiting: dict[int, Tensor] = {}
    first = 0

    def advance(count: int) -> tuple[int, list[Tensor]]:
        nonlocal first
        band = []
        for i, rows in waiting.items():
            span, step = _span_of_cell(i, patch_cells)
            band.append(rows[..., : (count - 1) * step + span, :])
            waiting[i] = rows[..., count * step :, :].clone()
        first += count
        return first - count, band

    for new in outputs:
        for i, rows in enumerate(new):
            if rows is not None:
                waiting[i] = torch.cat([waiting[i], rows], -2) if i in waiting else rows
        if len(waiting) == len(new):
            waiting = {i: waiting[i] for i in range(len(new))}
            spans = [(waiting[i].shape[-2], *_span_of_cell(i, patch_cells)) for i in waiting]
            count = min((length - span) // step + 1 for length, span, step in spans)
            if count > 0:
                yield advance(count)
    if waiting[0].shape[-2]:  # the coarser maps are rounded up: the finer ones may lack rows
        yield advance(waiting[0].shape[-2])


def _span_of_cell(output: int, patch_cells: int) -> tuple[int, int]:
    """How many rows of an output of `DenseNetwork` belong to a cell, and to the way to the next."""
    return (1, 1) if output < 2 else (patch_cells << output - 2, 1 << output - 2)


def gather_windows(features: Tensor, cells: Tensor, size: int, step: int) -> Tensor:
    """Windows (n, c, size, size), channels last, of a map (c, h, w) with `step` positions per cell.

    The window of cell (i, j) begins at (i step, j step); cells are (n, 2) int64.
    """
    # Layers round sizes up, so 16 ceil(s / 16) may exceed the finer maps by part of a cell.
    missing = [
        max(0, last * step + size - side)
        for last, side in zip(cells.amax(0).tolist(), features.shape[1:], strict=True)
    ]
    if any(missing):
        features = F.pad(features[None], (0, missing[1], 0, missing[0]), mode="replicate")[0]
    windows = features.permute(1, 2, 0).unfold(0, size, step).unfold(1, size, step)  # a view
    windows = windows.permute(0, 1, 3, 4, 2)  # (rows, columns, size, size, c)
    return windows[cells[:, 0], cells[:, 1]].permute(0, 3, 1, 2)


def place_patches(
    cells: np.ndarray, scale_xy: np.ndarray, patch_size: int, *, align_corners: bool = False
) -> np.ndarray:
    """Where the patches of cells (n, 2) lie in the image: (n, 4) left, top, width and height.

    The patch of a cell has its center at (16 column, 16 row) of the scaled image, whose scales in x
    and y are `scale_xy` (n, 2). With `align_corners`, places are whole pixels, as in the released
    code.
    """
    corner = (STRIDE * cells[:, ::-1] - patch_size / 2) / scale_xy
    size = patch_size / scale_xy
    if align_corners:
        corner, size = np.floor(corner), np.floor(size)
    return np.concatenate([corner, size], axis=1)
