"""Proposals and detections of an image, and as COCO results.

A COCO result is {"image_id", "category_id", "score", "bbox" xywh, "segmentation" compressed RLE}.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np
import pycocotools.mask as coco_mask

from datasets.files import atomic_path
from datasets.remote import AnyPath

BOX_DECIMALS = 3  # of detections; COCO's own boxes have two
# Digits of a written score, after its zeros or nines. Detections are ranked over all images.
SCORE_DIGITS, DETECTION_SCORE_DIGITS, MAX_SCORE_DIGITS = 4, 8, 10


@dataclass
class Proposals:
    """Class-agnostic masks of one image, best first.

    Attributes:
        image_id, file_name, height, width: the image.
        logits: (N,) float of the scores. Whoever ranks takes these: scores of surely known objects
            are equal (1 in float32 from 17 on, in float64 from 37 on), their logits are not.
        boxes: (N, 4) float32 xyxy in pixels of the image.
        rles: N compressed RLE strings of the masks.
        num_cut_off: cells that score above .5 and that the limit of proposals left out.
        georeference: where the image lies, see `datasets.large_images.read_georeference`. Stores
            keep it with the image; what is read from them is without.
    """

    image_id: int
    file_name: str
    height: int
    width: int
    logits: np.ndarray
    boxes: np.ndarray
    rles: list[bytes]
    num_cut_off: int = field(default=0, kw_only=True)
    georeference: dict | None = field(default=None, kw_only=True)

    def __len__(self) -> int:
        return len(self.logits)

    @property
    def scores(self) -> np.ndarray:
        """(N,) float64 in [0, 1], the sigmoid of the logits."""
        return np.exp(-np.logaddexp(0, -self.logits.astype(np.float64)))

    def rle(self, index: int) -> dict:
        """A mask as COCO's {"size", "counts"}."""
        return {"size": [self.height, self.width], "counts": self.rles[index]}

    def mask(self, index: int) -> np.ndarray:
        """A mask (height, width) bool."""
        return coco_mask.decode(self.rle(index)).astype(bool)

    def take(self, rows: np.ndarray) -> Self:
        """Those at some rows (n,) int64, copied."""
        arrays = {k: v[rows] for k, v in vars(self).items() if isinstance(v, np.ndarray)}
        rles = [self.rles[row] for row in rows.tolist()] if self.rles else []
        return replace(self, **arrays, rles=rles)


@dataclass
class Detections(Proposals):
    """The same with a category each; `rles` is empty if they have no masks.

    Attributes:
        labels: (N,) int64 category ids as the annotations have them.
    """

    labels: np.ndarray


def logits_of(scores: np.ndarray) -> np.ndarray:
    """(N,) float64 logits of scores in [0, 1]; if one lies outside, they are taken for logits."""
    scores = scores.astype(np.float64)
    if ((scores < 0) | (scores > 1)).any():
        return scores
    with np.errstate(divide="ignore"):  # of 0 and 1
        return np.log(scores) - np.log1p(-scores)


def results_of(found: Proposals) -> list[dict]:
    """COCO results of an image; the category of proposals is 1."""
    labels, digits, xywh = [1] * len(found), SCORE_DIGITS, found.boxes.copy()
    if isinstance(found, Detections):
        labels, digits = found.labels.tolist(), DETECTION_SCORE_DIGITS
        xywh = xywh.astype(np.float64)
    xywh[:, 2:] -= xywh[:, :2]
    if isinstance(found, Detections):
        xywh = xywh.round(BOX_DECIMALS)
    scores = round_scores(found, digits)
    results: list[dict] = [
        {"image_id": found.image_id, "category_id": label, "score": score, "bbox": box}
        for label, score, box in zip(labels, scores, xywh.tolist(), strict=True)
    ]
    size = [found.height, found.width]
    for result, rle in zip(results, found.rles, strict=bool(found.rles)):
        result["segmentation"] = {"size": size, "counts": rle.decode("ascii")}
    return results


def round_scores(found: Proposals, digits: int) -> list[float]:
    """The scores with as few digits, but at least these, as keep different logits different.

    Digits are counted after leading zeros, or nines: with 3 of them, 0.0001234 and 0.9998766 are
    0.000123 and 0.999877.
    """
    logits, first = np.unique(found.logits, return_index=True)  # ascending
    scores = found.scores[first].tolist()
    zeros = (np.abs(logits).clip(max=700) / math.log(10)).astype(int).tolist()
    for count in range(digits, MAX_SCORE_DIGITS + 1):
        rounded = np.array([round(s, count + z) for s, z in zip(scores, zeros, strict=True)])
        if (np.diff(rounded) > 0).all():
            break
    else:
        # Too close, or too near 1, for a float64: each becomes the next one below. As integers,
        # the bits of positive numbers are in the same order, one apart.
        falling = rounded.astype(np.float64).view(np.int64)[::-1]
        steps = np.arange(len(falling))
        falling = np.minimum.accumulate(falling + steps) - steps
        rounded = falling[::-1].clip(min=0).view(np.float64)
    return rounded[np.searchsorted(logits, found.logits)].tolist()


def write_results(path: str | AnyPath, results: Iterable[dict]) -> int:
    """Writes a COCO results file, one result a line, and returns how many there are."""
    count = 0
    with atomic_path(path) as temporary, temporary.open("w") as file:
        file.write("[")
        for result in results:
            text = json.dumps(result, separators=(",", ":"), allow_nan=False)
            file.write((",\n" if count else "\n") + text)
            count += 1
        file.write("\n]\n")
    return count
