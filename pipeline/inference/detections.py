"""Detections of an image, and their file: one COCO results JSON for boxes and masks."""

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datasets.files import atomic_path
from pipeline.inference.detection_results import box_of, check_results, load_results

BOX_DECIMALS = 3  # COCO's own boxes have two
SCORE_DECIMALS = 8  # float32 has steps of 6e-8 below 1: different scores stay different


@dataclass
class Detections:
    """Boxes of one image with a category and a score each, and masks if there are any; best first.

    Attributes:
        image_id, file_name, height, width: the image.
        scores: (N,) float32 in [0, 1].
        boxes: (N, 4) float32 xyxy in pixels of the original image.
        labels: (N,) int64 category ids as the annotations have them.
        counts: N compressed RLE strings of the masks; None if there are no masks.
    """

    image_id: int
    file_name: str
    height: int
    width: int
    scores: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    counts: list[bytes] | None = None

    def __post_init__(self) -> None:
        assert self.boxes.shape == (len(self), 4) and self.labels.shape == self.scores.shape
        assert self.counts is None or len(self.counts) == len(self)

    def __len__(self) -> int:
        return len(self.scores)

    def rle(self, n: int) -> dict:
        """Mask n as COCO's {"size", "counts"}."""
        return {"size": [self.height, self.width], "counts": self.counts[n]}

    def results(self) -> list[dict]:
        """COCO results: boxes as xywh, to a thousandth of a pixel; RLE counts as text."""
        corners = self.boxes.astype(np.float64)
        xywh = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
        columns = (self.labels.tolist(), self.scores.tolist(), xywh.round(BOX_DECIMALS).tolist())
        results = [
            {
                "image_id": self.image_id,
                "category_id": label,
                "score": round(score, SCORE_DECIMALS),
                "bbox": box,
            }
            for label, score, box in zip(*columns, strict=True)
        ]
        if self.counts is not None:
            size = [self.height, self.width]
            for result, counts in zip(results, self.counts, strict=True):
                result["segmentation"] = {"size": size, "counts": counts.decode("ascii")}
        return results


def write_detections(path: str | Path, detections: Iterable[Detections]) -> int:
    """Writes one COCO results file; images are taken one at a time.

    Returns:
        How many detections it holds.
    """
    return write_results(path, (result for image in detections for result in image.results()))


def write_results(path: str | Path, results: Iterable[dict]) -> int:
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


def read_detections(path: str | Path, images: Iterable[dict]) -> list[Detections]:
    """The detections of images, in the order of `images`, also of those in which nothing was found.

    Args:
        images: as in COCO annotations, {"id", "file_name", "height", "width"}.

    Raises:
        FileNotFoundError, ValueError: no detections of these images; one line with file and place.
    """
    images_by_id = {image["id"]: image for image in images}
    results = load_results(path)
    try:
        kinds = check_results(results, images_by_id)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    results_of = defaultdict(list)
    for result in results:
        results_of[result["image_id"]].append(result)
    has_masks = "mask" in kinds
    return [_from_results(image, results_of[i], has_masks) for i, image in images_by_id.items()]


def _from_results(image: dict, results: list[dict], has_masks: bool) -> Detections:
    results = sorted(results, key=lambda result: -result["score"])
    corners = np.array([box_of(result) for result in results], np.float64).reshape(-1, 4)
    corners[:, 2:] += corners[:, :2]
    counts = [result["segmentation"]["counts"] for result in results] if has_masks else None
    return Detections(
        image["id"],
        image["file_name"],
        image["height"],
        image["width"],
        scores=np.array([result["score"] for result in results], np.float32),
        boxes=corners.astype(np.float32),
        labels=np.array([result["category_id"] for result in results], np.int64),
        counts=counts and [c if isinstance(c, bytes) else c.encode("ascii") for c in counts],
    )
