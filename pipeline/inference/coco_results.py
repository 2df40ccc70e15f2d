"""COCO results of a file or of a proposal store: read, checked, and given image by image."""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path

import numpy as np
from pycocotools.coco import COCO

from datasets.segmentations import check_counts
from pipeline.inference.detection_results import load_results
from pipeline.inference.proposals import ProposalStore


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
    seen = set()
    for numbers, group in _groups(results):
        image_id = group[0]["image_id"]
        if image_id in seen:
            raise ValueError(
                f"results[{numbers[0]}]: image_id {image_id!r} comes a second time, after other "
                "images; the image was done twice: delete its shards, or all, and make them anew"
            )
        seen.add(image_id)
        image = ground_truth.imgs.get(image_id)
        if image is None:
            hint = "is not in the annotations; score against the file that lists these images"
            raise ValueError(f"results[{numbers[0]}]: image_id {image_id!r} {hint}")
        if (first := _first_problem(group, image, masks)) is not None:
            place, problem = first
            raise ValueError(f"results[{numbers[place]}] (image_id {image_id!r}): {problem}")
        yield image, group


def _groups(results: Iterable[dict]) -> Iterator[tuple[Sequence[int], list[dict]]]:
    """The results of each image and their numbers, from 0; of a list also if they are scattered."""
    runs = _runs(results)
    if not isinstance(results, list):
        yield from runs
        return
    grouped: dict = {}
    for numbers, group in runs:
        own_numbers, own = grouped.setdefault(group[0]["image_id"], ([], []))
        own_numbers += numbers
        own += group
    yield from grouped.values()


def _runs(results: Iterable[dict]) -> Iterator[tuple[range, list[dict]]]:
    """Results of one image that follow each other."""
    number = itertools.count()

    def image_of(result: dict) -> object:
        index = next(number)
        if not isinstance(result, dict) or "image_id" not in result:
            raise ValueError(f"results[{index}] has no image_id: {result!r:.60}")
        return result["image_id"]

    start = 0
    for _, run in itertools.groupby(results, key=image_of):
        group = list(run)
        yield range(start, start + len(group)), group
        start += len(group)


def _first_problem(results: list[dict], image: dict, masks: bool) -> tuple[int, str] | None:
    """Place and reason of the first of an image's results that cannot be scored."""
    if not _are_plain(results, image, masks):
        for place, result in enumerate(results):
            if problem := _problem(result, image, masks):
                return place, problem
    # pycocotools sees the masks only if they are wanted, or stand in for a box.
    seen = [place for place, r in enumerate(results) if masks or r.get("bbox") is None]
    broken = _first_broken_rle([results[place]["segmentation"] for place in seen])
    problem = "the runs of its segmentation do not fill the image"
    return None if broken is None else (seen[broken], problem)


def _are_plain(results: list[dict], image: dict, masks: bool) -> bool:
    """Whether all have a score, a box and, if wanted, a mask in order: the usual case, quickly."""
    try:
        scores, boxes = ([result[key] for result in results] for key in ("score", "bbox"))
        regions = [result["segmentation"] for result in results] if masks else []
        sizes, counts = ([region[key] for region in regions] for key in ("size", "counts"))
    except (KeyError, TypeError):
        return False
    return (
        _are_finite(scores, ())
        and _are_finite(boxes, (4,))
        and sizes.count([image["height"], image["width"]]) == len(sizes)
        and set(map(type, counts)) <= {str, bytes}
    )


def _are_finite(values: list, shape: tuple[int, ...]) -> bool:
    """Whether each value consists of finite numbers, in an array of a shape."""
    try:
        numbers = np.array(values)
    except ValueError:  # not of one shape
        return False
    return (
        numbers.shape[1:] == shape
        and numbers.dtype.kind in "iuf"
        and bool(np.isfinite(numbers).all())
    )


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
    if box is not None and not masks:
        return None  # nobody looks at the mask
    if not isinstance(mask, dict) or not isinstance(mask.get("counts"), str | bytes):
        return "segmentation must be a compressed RLE (size, counts)"
    if list(mask.get("size", ())) != size:
        return f"segmentation is of size {mask.get('size')}, the image of {size}"
    return None


def _first_broken_rle(rles: list[dict]) -> int | None:
    """Place of the first RLE that would send pycocotools' iou round for ever.

    All of an image are looked at in one go, for speed.
    """
    strings = [c if isinstance(c, bytes) else c.encode() for c in (rle["counts"] for rle in rles)]
    pixels = np.array([math.prod(rle["size"]) for rle in rles], np.int64)
    valid, *_ = check_counts(strings, pixels)
    return None if valid.all() else int(np.argmin(valid))


def _is_finite(value: object) -> bool:
    return isinstance(value, Real) and math.isfinite(value)


def _is_box(box: object) -> bool:
    is_sequence = isinstance(box, list | tuple | np.ndarray)
    return is_sequence and len(box) == 4 and all(map(_is_finite, box))
