"""Boxes of a split's proposals in flat arrays that all processes share.

I: images with a proposal, N: proposals of all of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datasets.files import atomic_path
from datasets.sharing import SharedArrays

Rows = tuple[np.ndarray, np.ndarray, np.ndarray]  # image ids (N,), boxes (N, 4), scores (N,)


@dataclass(frozen=True, eq=False)
class ProposalBoxes(SharedArrays):
    """Proposals without scores and masks, best first within an image.

    Attributes:
        image_ids: (I,) int64, ascending.
        starts, counts: (I,) int64; image i has `counts[i]` proposals from row `starts[i]` on.
        boxes: (N, 4) float32 xyxy in pixels of the original image, perhaps mapped from a file.
    """

    image_ids: np.ndarray
    starts: np.ndarray
    counts: np.ndarray
    boxes: np.ndarray

    @classmethod
    def from_rows(cls, rows: Rows, *, limit: int | None = None) -> ProposalBoxes:
        """Sorts proposals that come in any order; equal scores keep theirs.

        `limit`: the best of each image.
        """
        image_ids, boxes, scores = rows
        order = np.lexsort((-scores, image_ids))
        ids, starts, counts = np.unique(image_ids[order], return_index=True, return_counts=True)
        rank = np.arange(len(order)) - starts.repeat(counts)
        kept = order if limit is None else order[rank < limit]
        counts = counts if limit is None else counts.clip(max=limit)
        sorted_boxes = boxes[kept].astype(np.float32, copy=False)
        return cls(ids.astype(np.int64), counts.cumsum() - counts, counts, sorted_boxes)

    @classmethod
    def write(cls, parts: Iterable[Rows], path: Path, *, limit: int | None = None) -> None:
        """Writes files that `load` maps: the boxes to `path`, the rest beside it.

        Each part has whole images; no more than one is in memory.
        """
        ids, counts = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            for part in parts:
                proposals = cls.from_rows(part, limit=limit)
                file.write(proposals.boxes.tobytes())
                ids.append(proposals.image_ids)
                counts.append(proposals.counts)
        all_ids, all_counts = np.concatenate(ids), np.concatenate(counts)
        order = np.argsort(all_ids, kind="stable")
        starts = (all_counts.cumsum() - all_counts)[order]
        with atomic_path(_index(path)) as temporary, temporary.open("wb") as file:
            np.savez(file, image_ids=all_ids[order], starts=starts, counts=all_counts[order])

    @classmethod
    def load(cls, path: Path) -> ProposalBoxes:
        """Maps the files that `write` wrote: processes on a machine share their pages."""
        index = np.load(_index(path))
        shape = (int(index["counts"].sum()), 4)
        # An empty file cannot be mapped.
        boxes = np.memmap(path, np.float32, "r", shape=shape) if shape[0] else np.empty(shape, "f4")
        return cls(index["image_ids"], index["starts"], index["counts"], boxes)

    def of(self, image_id: int) -> np.ndarray:
        """Boxes (n, 4) of an image, best first; empty if it has no proposal."""
        i = int(np.searchsorted(self.image_ids, image_id))
        if i == len(self.image_ids) or self.image_ids[i] != image_id:
            return self.boxes[:0]
        return self.boxes[self.starts[i] : self.starts[i] + self.counts[i]]


def _index(path: Path) -> Path:
    return path.with_suffix(".npz")
