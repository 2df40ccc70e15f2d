"""Non-maximum suppression of masks, in a time that grows with their number, not its square.

N: masks of an image, best first.
"""

import heapq
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import numpy as np
import pycocotools.mask as coco_mask

from pipeline.inference.proposals import Proposals

ROUNDING = 1e-6  # pixels: a product of floats may lie just above an IoU that is reached
AREA_BITS = 36  # of a key: areas of up to 6e10 pixels, in 1e8 cells
MAX_PAIRS = 1 << 21  # looked at together: bounds memory


def mask_nms(proposals: Proposals, iou: float) -> Proposals:
    """Of two proposals whose masks have at least this IoU, in (0, 1], the second is dropped."""
    return proposals.take(kept_by_nms(proposals, iou))


def kept_by_nms(proposals: Proposals, iou: float) -> np.ndarray:
    """The indices (n,) int64 of those that `mask_nms` does not drop, ascending."""
    rles, first, second = _pairs(proposals, iou)
    ends = np.searchsorted(first, np.arange(len(rles) + 1)).tolist()
    alive = np.ones(len(rles), bool)
    for i, rle in enumerate(rles):
        if ends[i] < ends[i + 1] and alive[i]:
            near = second[ends[i] : ends[i + 1]]
            near = near[alive[near]]
            if len(near):
                ious = coco_mask.iou([rles[j] for j in near.tolist()], [rle], [0])
                alive[near[ious[:, 0] >= iou]] = False
    return np.flatnonzero(alive)


def soft_mask_nms(proposals: Proposals, iou: float) -> Proposals:
    """Near duplicates score lower, so that they come later (linear Soft-NMS, Bodla et al., 2017).

    The best proposal multiplies the scores of the others whose masks have at least this IoU with
    its own, in (0, 1], by 1 - IoU; then the best of the others does, and so on. A copy, whose IoU
    is 1, is dropped.
    """
    ends, near, ious = _near_duplicates(proposals, iou)
    before = -np.logaddexp(0, -proposals.logits.astype(np.float64))
    log_scores, waiting, kept = before.copy(), np.ones(len(before), bool), list[int]()
    heap = list(zip((-before).tolist(), range(len(before)), strict=True))
    heapq.heapify(heap)
    while heap:
        cost, best = heapq.heappop(heap)
        if not waiting[best] or cost != -log_scores[best]:
            continue  # a copy, or its score was lowered since this entry was made
        waiting[best] = False
        kept.append(best)
        pairs = np.arange(ends[best], ends[best + 1])
        waiting[near[pairs[ious[pairs] == 1]]] = False
        pairs = pairs[waiting[near[pairs]]]
        later = near[pairs]
        log_scores[later] += np.log1p(-ious[pairs])
        for row in later.tolist():
            heapq.heappush(heap, (-log_scores[row], row))
    logits, lowered = proposals.logits.copy(), log_scores < before
    logits[lowered] = log_scores[lowered] - np.log(-np.expm1(log_scores[lowered]))
    rows = np.array(sorted(kept), np.int64)
    rows = rows[np.argsort(-logits[rows], kind="stable")]
    return replace(proposals, logits=logits).take(rows)


def _near_duplicates(proposals: Proposals, iou: float) -> tuple[list[int], np.ndarray, np.ndarray]:
    """For each mask those with at least this IoU with it, better or worse, and their IoUs.

    Those of mask i are at ends[i] to ends[i + 1] of the two arrays, after `ends` itself.
    """
    rles, first, second = _pairs(proposals, iou)
    starts = np.searchsorted(first, np.arange(len(rles) + 1)).tolist()
    ious = np.zeros(len(first))
    for i, rle in enumerate(rles):
        if starts[i] < starts[i + 1]:
            pairs = slice(starts[i], starts[i + 1])
            ious[pairs] = coco_mask.iou([rles[j] for j in second[pairs]], [rle], [0])[:, 0]
    reached = np.flatnonzero(ious >= iou)
    masks = np.concatenate([first[reached], second[reached]])
    order = np.argsort(masks, kind="stable")
    near = np.concatenate([second[reached], first[reached]])[order]
    ends = np.searchsorted(masks[order], np.arange(len(rles) + 1)).tolist()
    return ends, near, np.tile(ious[reached], 2)[order]


def _pairs(proposals: Proposals, iou: float) -> tuple[list[dict], np.ndarray, np.ndarray]:
    """The masks, and both indices of the pairs that may reach an IoU, see `_neighbors`."""
    rles = [proposals.rle(i) for i in range(len(proposals))]
    areas = np.array([coco_mask.area(rle) for rle in rles], np.int64)  # of a list, it fails
    return rles, *_neighbors(proposals.boxes, areas, iou)


def _neighbors(boxes: np.ndarray, areas: np.ndarray, iou: float) -> tuple[np.ndarray, np.ndarray]:
    """The pairs of masks that may reach an IoU: both indices, the lower first, in order.

    Masks overlap no more than their boxes (N, 4), nor more than the area of the smaller one.
    """
    boxes = boxes.astype(np.float64)
    found = [np.empty((2, 0), np.int64)]
    for i, j in _sharing_cells(boxes, areas, iou):
        sides = np.minimum(boxes[i, 2:], boxes[j, 2:]) - np.maximum(boxes[i, :2], boxes[j, :2])
        overlap = np.minimum(sides.clip(min=0).prod(axis=1), np.minimum(areas[i], areas[j]))
        near = (overlap > 0) & (overlap >= iou * (areas[i] + areas[j] - overlap) - ROUNDING)
        found.append(np.sort([i[near], j[near]], axis=0))
    pairs = np.concatenate(found, axis=1)
    first, second = pairs[:, np.lexsort(pairs[::-1])]
    return first, second


def _sharing_cells(
    boxes: np.ndarray, areas: np.ndarray, iou: float
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of masks with about the same area whose boxes meet, each pair once.

    Cells of a grid are larger than a box, which so lies in at most four. Boxes of all sizes have
    grids of all sizes, each twice as coarse as the one before: a box meets its like and smaller
    ones in its own grid.
    """
    levels = np.frexp((boxes[:, 2:] - boxes[:, :2]).max(axis=1, initial=1))[1]
    for level in np.unique(levels).tolist():
        cells = np.floor(boxes / 2.0**level).astype(np.int64)  # of the corners
        large = np.flatnonzero(levels == level)
        small = np.flatnonzero((levels <= level) & (areas >= iou * areas[large].min() - ROUNDING))
        columns = int(cells[:, 2].max()) + 1
        # The smaller ones by cell, and within a cell by area.
        places, rows = _entries(cells, small, columns)
        keys = places << AREA_BITS | areas[rows]
        order = np.argsort(keys)
        keys, rows = keys[order], rows[order]
        # Each larger one meets a run of them, in each of its cells.
        places, others = _entries(cells, large, columns)
        run = places << AREA_BITS
        least, most = iou * areas[others] - 1, areas[others] / iou + 1  # rounded outwards
        starts = np.searchsorted(keys, run + least.clip(min=0).astype(np.int64))
        ends = np.searchsorted(keys, run + most.clip(max=2**AREA_BITS - 1).astype(np.int64))
        counts = ends - starts
        parts = np.flatnonzero(np.diff(counts.cumsum() // MAX_PAIRS)) + 1
        for part in np.split(np.arange(len(others)), parts):
            count = counts[part]
            entry = np.repeat(part, count)
            within = np.arange(len(entry)) - np.repeat(count.cumsum() - count, count)
            i, j = rows[starts[entry] + within], others[entry]
            # Of the cells in which they meet, the one with the corner of what they share counts.
            corner = np.maximum(cells[i, :2], cells[j, :2])
            once = corner[:, 1] * columns + corner[:, 0] == places[entry]
            once &= (levels[i] < level) | (i < j)
            yield i[once], j[once]


def _entries(cells: np.ndarray, rows: np.ndarray, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """The one to four cells of each row, as one number a cell, and the rows."""
    (left, top, right, bottom), found = cells[rows].T, []
    for x, y in product((left, right), (top, bottom)):
        new = ((x is left) | (left < right)) & ((y is top) | (top < bottom))
        found.append(np.stack([(y * columns + x)[new], rows[new]]))
    places, entries = np.concatenate(found, axis=1)
    return places, entries
