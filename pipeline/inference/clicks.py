"""Clicks on an image: the masks of the objects centered at a point, from one pass of the network.

A patch asks whether an object is centered in it, and what its outline is. The network answers for
the patches around every 16th pixel of every scale at once; the maps are kept, so a click only
decodes the cells that lie nearest to it, one of each scale.

Letters: N masks, best first.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from datasets.images import Image
from models.deepmask import STRIDE
from pipeline.inference.cells import PyramidScale
from pipeline.inference.mask_crops import contains
from pipeline.inference.nms import kept_by_nms
from pipeline.inference.paste import Pasted
from pipeline.inference.proposals import Proposals
from pipeline.inference.propose import Proposer

NEAR_DUPLICATE = 0.9  # mask IoU from which on the lower-scored of two masks at a point is left out


@dataclass
class MasksAtPoint(Proposals):
    """Masks of the patches around a point; those that contain it come first.

    Attributes:
        contain: (N,) bool, whether the point lies in the mask.
        patch_sides: (N,) float64, pixels of the image: the side of the patch of each.
    """

    contain: np.ndarray
    patch_sides: np.ndarray


class ClickableImage:
    """The maps that the network gave of an image, which answer any number of clicks.

    With the networks in the box they take about 90 bytes for each pixel of the image.

    Attributes:
        bands: of all scales, by scale and row, when `run` has ended.
    """

    def __init__(self, proposer: Proposer, image: Image):
        """Runs nothing yet, see `run`; the image is (H, W, 3) uint8 RGB."""
        self.proposer, self.image = proposer, image
        self.size = (image.shape[0], image.shape[1])
        self.bands: list[PyramidScale] = []

    def run(self, report: Callable[[float], None] | None = None) -> Iterator[None]:
        """Runs the network, the largest scale first, and yields after each scale.

        Only then may the proposer run on another image, see `BandedNetwork`.

        Args:
            report: is told after each band how much is done, up to 1.
        """
        self.bands = []
        scales = self.proposer.log2_scales
        expected, done = sum(self._num_cells(2.0**scale) for scale in scales), 0.0
        for index in reversed(range(len(scales))):
            for band in self.proposer.run_bands(self.image, scales[index]):
                band.index = index
                self.bands.append(band)
                done += band.score_logits.numel()
                if report is not None:
                    report(min(done / expected, 1.0))
            yield
        self.bands.sort(key=lambda band: (band.index, band.first_row))

    def _num_cells(self, scale: float) -> float:
        """Of a scale, about."""
        height, width = (side * scale / STRIDE + 1 for side in self.size)
        return height * width

    @property
    def nbytes(self) -> int:
        """Of the maps."""
        return sum(band.nbytes + band.score_logits.nbytes for band in self.bands)

    def proposals(self, num: int | None = None) -> Proposals:
        """What the proposer gives of the image, or its best `num`, before near duplicates go."""
        limit = self.proposer.options.limit(*self.size) if num is None else num
        return self.proposer.rank(self.bands, self.size, limit)

    def masks_at(self, x: float, y: float) -> MasksAtPoint:
        """The masks of the patches centered nearest to a point, at most one of each scale.

        Masks that contain the point come before those that do not, and the best-scoring first
        among each; of near duplicates the first stays. There is none for a point outside.

        Args:
            x, y: pixels of the image from its corner: its first pixel reaches from 0 to 1.
        """
        cells = self.cells_at(x, y)
        if not cells:
            pasted = Pasted(np.zeros(0, np.int64), np.zeros((0, 4), np.float32), [])
        else:
            pasted = self.proposer.paste_cells(self.bands, torch.tensor(cells), self.size)
        logits = [self.bands[i].score_logits[j, k].item() for i, j, k in cells]
        scales = [max(self.bands[i].scale_xy) for i, _, _ in cells]
        masks = MasksAtPoint(
            *(0, "", *self.size),
            logits=np.array(logits, np.float32)[pasted.indices],
            boxes=pasted.boxes,
            rles=pasted.rles,
            contain=np.array([contains(rle, self.size[0], x, y) for rle in pasted.rles], bool),
            patch_sides=self.proposer.deepmask.patch_size / np.array(scales)[pasted.indices],
        )
        masks = masks.take(np.lexsort([-masks.logits, ~masks.contain]))
        return masks.take(kept_by_nms(masks, NEAR_DUPLICATE))

    def cells_at(self, x: float, y: float) -> list[tuple[int, int, int]]:
        """The cells nearest to a point, as band, row and column in it; one for each scale.

        Cell (i, j) of a scale has its patch's center at the pixel (16 j, 16 i) of the scaled image.
        Scales in which the point lies beyond all cells are left out.
        """
        height, width = self.size
        if not (0 <= x < width and 0 <= y < height):
            return []
        found = []
        for index, band in enumerate(self.bands):
            column, row = (
                math.floor(at * scale / STRIDE + 0.5)
                for at, scale in zip((x, y), band.scale_xy, strict=True)
            )
            row -= band.first_row
            rows, columns = band.score_logits.shape
            if 0 <= row < rows and 0 <= column < columns:
                found.append((index, row, column))
        return found
