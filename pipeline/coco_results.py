"""COCO results of a file or of a proposal store: read, checked, and given image by image."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from numbers import Real
from pathlib import Path

import numpy as np
from pycocotools.coco import COCO

from datasets.rle import check_counts
from pipeline.detection_results import load_results
from pipeline.proposals import ProposalStore


def read_results(path: str | Path) -> Iterable[dict]:
    """COCO results of a json file, as a list, or of a proposal store, which is never held whole.

    Raises:
        FileNotFoundError: nothing there. ValueError: neither of the two.
    """
    path = Path(path)
    if path.is_dir():
        store = ProposalStore(path)
        store.require_shards()
        return StoredResults(store)
    return load_results(path, of="results")


@dataclass(frozen=True)
class StoredResults:
    """The results of a store, one shard in memory at a time; may be gone through several times."""

    store: ProposalStore

    def __iter__(self) -> Iterator[dict]:
        for proposals in self.store:
            yield from proposals.results()


def results_by_image(
    ground_truth: COCO, results: Iterable[dict], *, masks: bool
) -> Iterator[tuple[dict, list[dict]]]:
    """The images that have results, each with all of its own, checked.

    Args:
        results: a list in any order; of anything else, which is read as it comes, the results of an
            image must follow each other. They are not copied.
        masks: whether every result must have one.

    Raises:
        ValueError: a result names an image that the annotations do not list, or cannot be scored.
    """
    checked = _check(ground_truth, results, masks)
    if isinstance(results, list):
        grouped = {}
        for numbered in checked:
            grouped.setdefault(numbered[1]["image_id"], []).append(numbered)
        groups = grouped.values()
    else:
        groups = (list(group) for _, group in groupby(checked, key=lambda n: n[1]["image_id"]))
    seen = set()
    for group in groups:
        first, image_id = group[0][0], group[0][1]["image_id"]
        if image_id in seen:
            raise ValueError(
                f"results[{first}]: image_id {image_id!r} comes a second time, after other images; "
                "the image was done twice: delete its shards, or all, and make them anew"
            )
        seen.add(image_id)
        if (broken := _first_broken_rle(group)) is not None:
            problem = "the runs of its segmentation do not fill the image"
            raise ValueError(f"results[{broken}] (image_id {image_id!r}): {problem}")
        yield ground_truth.imgs[image_id], [result for _, result in group]


def _check(ground_truth: COCO, results: Iterable[dict], masks: bool) -> Iterator[tuple[int, dict]]:
    """The results numbered from 0; all is checked but the runs of the RLE."""
    for index, result in enumerate(results):
        if not isinstance(result, dict) or "image_id" not in result:
            raise ValueError(f"results[{index}] has no image_id: {result!r:.60}")
        image = ground_truth.imgs.get(result["image_id"])
        if image is None:
            hint = "is not in the annotations; score against the file that lists these images"
            raise ValueError(f"results[{index}]: image_id {result['image_id']!r} {hint}")
        if problem := _problem(result, image, masks):
            raise ValueError(f"results[{index}] (image_id {image['id']!r}): {problem}")
        yield index, result


def _problem(result: dict, image: dict, masks: bool) -> str | None:
    """Why COCOeval would fail on a result, or score it wrongly without a word."""
    score, mask, box = (result.get(key) for key in ("score", "segmentation", "bbox"))
    size = [image["height"], image["width"]]
    if not _is_finite(score):
        return f"score must be a finite number, not {score!r}"
    if box is None and mask is None:
        return "has neither a bbox nor a segmentation"
    if box is not None and not _is_box(box):
        return f"bbox must be four finite numbers (x, y, width, height), not {box!r}"
    if mask is None and masks:
        return "has no segmentation, so its mask cannot be scored"
    if mask is None:
        return None
    if not isinstance(mask, dict) or not isinstance(mask.get("counts"), str | bytes):
        return "segmentation must be a compressed RLE (size, counts)"
    if list(mask.get("size", ())) != size:
        return f"segmentation is of size {mask.get('size')}, the image of {size}"
    return None


def _first_broken_rle(group: list[tuple[int, dict]]) -> int | None:
    """The number of an image's first result whose RLE would send pycocotools' iou round for ever.

    All of an image are looked at in one go, for speed.
    """
    rles = [(index, rle) for index, result in group if (rle := result.get("segmentation"))]
    strings = [c if isinstance(c, bytes) else c.encode() for c in (r["counts"] for _, r in rles)]
    pixels = np.array([math.prod(rle["size"]) for _, rle in rles], np.int64)
    valid, *_ = check_counts(strings, pixels)
    return None if valid.all() else rles[int(np.argmin(valid))][0]


def _is_finite(value: object) -> bool:
    return isinstance(value, Real) and math.isfinite(value)


def _is_box(box: object) -> bool:
    is_sequence = isinstance(box, list | tuple | np.ndarray)
    return is_sequence and len(box) == 4 and all(map(_is_finite, box))
