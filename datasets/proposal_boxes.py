"""Boxes and scores of a split's proposals in flat arrays that data-loader workers share.

I: images with a proposal, N: proposals of all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from datasets.sharing import SharedArrays


@dataclass(frozen=True, eq=False)
class ProposalBoxes(SharedArrays):
    """Proposals without their masks, best first within an image.

    Attributes:
        image_ids: (I,) int64, ascending.
        starts: (I + 1,) int64; image i has the proposals starts[i]:starts[i + 1].
        boxes: (N, 4) float32 xyxy in pixels of the original image.
        scores: (N,) float32.
    """

    image_ids: np.ndarray
    starts: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray

    @classmethod
    def from_rows(
        cls, image_ids: np.ndarray, boxes: np.ndarray, scores: np.ndarray
    ) -> ProposalBoxes:
        """Sorts proposals that come in any order; equal scores keep theirs.

        Args:
            image_ids: (N,) of each proposal. boxes: (N, 4). scores: (N,).
        """
        order = np.lexsort((-scores, image_ids))
        ids, starts = np.unique(image_ids[order], return_index=True)
        return cls(
            ids.astype(np.int64),
            np.append(starts, len(order)).astype(np.int64),
            boxes[order].astype(np.float32, copy=False),
            scores[order].astype(np.float32, copy=False),
        )

    def of(self, image_id: int) -> tuple[np.ndarray, np.ndarray]:
        """Boxes (n, 4) and scores (n,) of an image, best first; empty if it has no proposal."""
        i = int(np.searchsorted(self.image_ids, image_id))
        if i == len(self.image_ids) or self.image_ids[i] != image_id:
            return self.boxes[:0], self.scores[:0]
        rows = slice(self.starts[i], self.starts[i + 1])
        return self.boxes[rows], self.scores[rows]
