"""Detections of an image."""

from dataclasses import dataclass

import numpy as np


@dataclass
class Detections:
    """Boxes of one image with a category and a score each, and maybe masks; best first.

    Attributes:
        image_id, file_name, height, width: the image.
        scores: (N,) float32 in [0, 1].
        boxes: (N, 4) float32 xyxy in pixels of the image.
        labels: (N,) int64 category ids as the annotations have them.
        rles: N compressed RLE strings of the masks; None if there are no masks.
    """

    image_id: int
    file_name: str
    height: int
    width: int
    scores: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    rles: list[bytes] | None = None

    def __len__(self) -> int:
        return len(self.scores)

    def rle(self, index: int) -> dict:
        """A mask as COCO's {"size", "counts"}."""
        assert self.rles is not None
        return {"size": [self.height, self.width], "counts": self.rles[index]}
