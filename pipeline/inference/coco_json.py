"""COCO results, read from files and checked; `pipeline.inference.proposals` says what they are.

pycocotools crashes, loops forever or scores wrongly without a word on results that are malformed:
so they are checked before it sees them.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from datasets.coco_file import read_json, whole
from datasets.remote import AnyPath, to_path
from datasets.segmentations import check_counts, encode_counts
from pipeline.inference.proposal_store import ProposalStore
from pipeline.inference.proposals import Detections, logits_of, results_of

LIMIT = 1e100  # of scores and coordinates: its square is finite, so that no overlap is nan


def load_results(path: str | AnyPath) -> list:
    """The list of results in a JSON file: repaired (`_repair`), unchecked.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a folder, no JSON, or no list.
    """
    path = to_path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the detections.json in it")
    if not path.is_file():
        raise FileNotFoundError(f"results {path} do not exist")
    results = read_json(path)
    if not isinstance(results, list):
        raise ValueError(
            f"{path} is not COCO results: it must be a list, not {type(results).__name__}"
        )
    for result in results:
        _repair(result)
    return results


def _repair(result: Any) -> None:
    """Makes ids that are 3.0 whole, in place, and counts strings of RLE.

    Counts may be the text of Python's bytes, or run lengths.
    """
    if not isinstance(result, dict):
        return
    for key in ("image_id", "category_id"):
        if key in result:
            result[key] = whole(result[key])
    mask = result.get("segmentation")
    if isinstance(mask, dict):
        if isinstance(counts := mask.get("counts"), str) and counts.startswith("b"):
            mask["counts"] = encode_counts(counts)
        if isinstance(size := mask.get("size"), list):
            mask["size"] = list(map(whole, size))
        if _are_run_lengths(mask.get("counts"), mask.get("size")):
            mask["counts"] = coco_mask.frPyObjects(mask, *mask["size"])["counts"]


def _are_run_lengths(counts: Any, size: Any) -> bool:
    """Whether runs, background first, fill an image of this size."""
    if not isinstance(counts, list) or not isinstance(size, list) or len(size) != 2:
        return False
    if not all(_is_whole(each) and each >= 0 for each in (*counts, *size)):
        return False
    return sum(counts) == size[0] * size[1]


def categories_file(results: str | AnyPath) -> AnyPath:
    """Where the names of the categories in a results file are: results have ids only."""
    return to_path(results).with_suffix(".categories.json")


def images_file(results: str | AnyPath) -> AnyPath:
    """Where the images of a results file are listed, as COCO does."""
    return to_path(results).with_suffix(".images.json")


def read_result_categories(results: str | AnyPath) -> dict[int, str] | None:
    """The names of a results file's categories by id; None without a file of them beside it.

    Raises:
        ValueError: a file that is no list of categories.
    """
    path = categories_file(results)
    if not path.is_file():
        return None
    try:
        categories = read_json(path)
        return {int(category["id"]): str(category["name"]) for category in categories}
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ValueError(f'{path} is not a list of categories with "id" and "name"') from None


def read_results(path: str | AnyPath) -> Iterable[dict]:
    """COCO results of a JSON file, as a list, or of a proposal store, which is never held whole.

    Raises:
        FileNotFoundError, ValueError: nothing there, or neither of the two.
    """
    if not to_path(path).is_dir():
        return load_results(path)
    store = ProposalStore(path)
    store.require_shards()
    return StoredResults(store)


@dataclass(frozen=True)
class StoredResults:
    """The results of a store, one shard in memory at a time; can be iterated several times."""

    store: ProposalStore

    def __iter__(self) -> Iterator[dict]:
        for proposals in self.store:
            yield from results_of(proposals)


def read_detections(path: str | Path, images: Iterable[dict]) -> list[Detections]:
    """The detections of COCO's images, in their order, also where nothing was found.

    Raises:
        FileNotFoundError, ValueError: no detections of these images; one line with file and place.
    """
    by_id = {image["id"]: image for image in images}
    results = load_results(path)
    try:
        has_masks = "mask" in check_results(results, by_id)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    results_by_id = defaultdict(list)
    for result in sorted(results, key=lambda result: -result["score"]):
        results_by_id[result["image_id"]].append(result)
    return [_detections(image, results_by_id[i], has_masks) for i, image in by_id.items()]


def _detections(image: dict, results: list[dict], has_masks: bool) -> Detections:
    boxes = np.array([box_of(result) for result in results], np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return Detections(
        image["id"],
        image["file_name"],
        image["height"],
        image["width"],
        logits=logits_of(np.array([result["score"] for result in results], np.float64)),
        boxes=boxes.astype(np.float32),
        labels=np.array([result["category_id"] for result in results], np.int64),
        rles=[_rle_string(result) for result in results] if has_masks else [],
    )


def box_of(result: dict) -> list[float]:
    """A checked result's box, xywh; that of its mask if it has none."""
    if _lacks(result, "bbox"):
        return coco_mask.toBbox(result["segmentation"]).tolist()
    return list(result["bbox"])


def _lacks(result: dict, region: str) -> bool:
    """Whether a result has no box, or no mask: none, null or, as some tools write it, []."""
    value = result.get(region)
    return value is None or (isinstance(value, list | dict | str) and not value)


def scored_types(results: list) -> tuple[str, ...]:
    """What results can be scored by: ("box", "mask"), or ("box",) if the first has no mask."""
    first = results[0] if results else {"segmentation": "of any"}
    has_masks = isinstance(first, dict) and not _lacks(first, "segmentation")
    for index, result in enumerate(results):
        if isinstance(result, dict) and _lacks(result, "segmentation") == has_masks:
            has, other = ("no", "one") if has_masks else ("a", "none")
            raise ValueError(
                f"results[{index}] (image_id {result.get('image_id')!r:.20}): has {has} "
                f"segmentation, while results[0] has {other}: give all one, or none"
            )
    return ("box", "mask") if has_masks else ("box",)


def check_results(
    results: list, images: Mapping[int, dict], categories: Container[int] | None = None
) -> tuple[str, ...]:
    """Checks detections; returns what they can be scored by, see `scored_types`.

    Without any result both can: nothing was found. Either all or none have masks; a mask without a
    box gives its box as well. Images are COCO's by id, categories the ids that may occur.

    Raises:
        ValueError: the first result that cannot be scored, and why, in one line.
    """
    iou_types = scored_types(results)

    def problem(result: dict) -> str | None:
        if "category_id" not in result:
            return "has no category_id; class-agnostic proposals are scored as `proposals`"
        category_id = result["category_id"]
        if not _is_whole(category_id):
            return f"category_id must be a whole number, not {category_id!r:.40}"
        if categories is not None and category_id not in categories:
            return f"category_id {category_id} is not among the annotations' categories"
        return None

    _check(range(len(results)), results, images, needs_mask="mask" in iou_types, problem=problem)
    return iou_types


def results_by_image(
    ground_truth: COCO, results: Iterable[dict], *, masks: bool
) -> Iterator[tuple[dict, list[dict]]]:
    """The images that have results, each with all its results, checked.

    Args:
        results: a list in any order; any other iterable must give the results of an image one
            after the other, and one image is held at a time. They are not copied.
        masks: whether every result must have one.

    Raises:
        ValueError: a result names an image that the annotations do not list, or cannot be scored.
    """
    images, seen = ground_truth.imgs, set()
    for image_id, indices, group in _runs(results, images):
        if image_id in seen:
            raise ValueError(
                f"results[{indices[0]}]: image_id {image_id} comes a second time, after other "
                "images; the image was done twice: delete its shards, or all, and propose again"
            )
        seen.add(image_id)
        check = _check_masks if _are_usual(group, images[image_id], masks) else _check
        check(indices, group, images, needs_mask=masks)
        yield images[image_id], group


def _runs(
    results: Iterable[dict], images: Mapping[int, dict]
) -> Iterator[tuple[int, list[int], list[dict]]]:
    """Image id, indices and results of one image after the other."""
    if isinstance(results, list):  # without a tuple for each, which would keep the collector busy
        image_ids = [_image_id(i, result, images) for i, result in enumerate(results)]
        order = sorted(range(len(results)), key=image_ids.__getitem__)
        for image_id, rows in itertools.groupby(order, key=image_ids.__getitem__):
            indices = list(rows)
            yield image_id, indices, [results[i] for i in indices]
    else:
        numbered = ((_image_id(i, result, images), i, result) for i, result in enumerate(results))
        for image_id, run in itertools.groupby(numbered, key=itemgetter(0)):
            _, indices, group = map(list, zip(*run, strict=True))
            yield image_id, indices, group


def _check(
    indices: Sequence[int],
    results: list,
    images: Mapping[int, dict],
    *,
    needs_mask: bool,
    problem: Callable[[dict], str | None] = lambda result: None,
) -> None:
    """Refuses results, with their indices, that cannot be scored, or that `problem` refuses."""
    for index, result in zip(indices, results, strict=True):
        image_id = _image_id(index, result, images)
        text = problem(result) or _problem(result, images[image_id], needs_mask=needs_mask)
        if text:
            raise ValueError(f"results[{index}] (image_id {image_id}): {text}")
    _check_masks(indices, results, images, needs_mask=needs_mask)


def _check_masks(
    indices: Sequence[int], results: list[dict], images: Mapping[int, dict], *, needs_mask: bool
) -> None:
    """Refuses masks on whose runs pycocotools.iou would loop forever, or leave its memory."""
    # pycocotools sees the masks only if they are scored, or stand in for a box.
    rows = [i for i, r in enumerate(results) if needs_mask or _lacks(r, "bbox")]
    strings = [_rle_string(results[i]) for i in rows]
    pixels = [math.prod(results[i]["segmentation"]["size"]) for i in rows]
    valid, *_ = check_counts(strings, np.array(pixels, np.int64))
    if not valid.all():
        first = rows[np.argmin(valid)]
        raise ValueError(
            f"results[{indices[first]}] (image_id {results[first]['image_id']}): the runs of its "
            "segmentation do not fill the image"
        )


def _are_usual(results: list[dict], image: dict, needs_mask: bool) -> bool:
    """Whether `_problem` certainly finds none in an image's results: looks at all at once."""
    try:
        scores = np.array([result["score"] for result in results])
        boxes = np.array([result["bbox"] for result in results])
        masks = [result["segmentation"] for result in results] if needs_mask else []
        sizes, counts = ([mask[key] for mask in masks] for key in ("size", "counts"))
    except (KeyError, TypeError, ValueError):
        return False
    if boxes.shape != (len(results), 4) or scores.shape != (len(results),):
        return False
    return (
        scores.dtype.kind in "iuf"
        and boxes.dtype.kind in "iuf"
        and bool((np.abs(scores) < LIMIT).all() and (np.abs(boxes) < LIMIT).all())
        and bool((boxes[:, 2:] >= 0).all())
        and sizes.count([image["height"], image["width"]]) == len(sizes)
        and set(map(type, counts)) <= {str, bytes}
    )


def _image_id(index: int, result: Any, images: Mapping[int, dict]) -> int:
    if not isinstance(result, dict) or "image_id" not in result:
        raise ValueError(f"results[{index}] has no image_id: {result!r:.60}")
    image_id: Any = result["image_id"]
    if not _is_whole(image_id) or image_id not in images:
        raise ValueError(
            f"results[{index}]: image_id {image_id!r:.20} is not in the annotations; "
            "score against the file that lists these images"
        )
    return int(image_id)


def _problem(result: dict, image: dict, *, needs_mask: bool) -> str | None:
    """Why a result cannot be scored; a mask that nobody needs is not looked at."""
    score, box, mask = result.get("score"), result.get("bbox"), result.get("segmentation")
    has_box, has_mask = (not _lacks(result, region) for region in ("bbox", "segmentation"))
    if not _is_number(score):
        return f"score must be a finite number, not {score!r:.40}"
    if has_box and not _is_box(box):
        return (
            "bbox must be four finite numbers (x, y, width, height), the sizes not negative, "
            f"not {box!r:.80}"
        )
    if not has_mask and not has_box:
        return "has neither a bbox nor a segmentation"
    if not has_mask and needs_mask:
        return "has no segmentation, so its mask cannot be scored"
    if has_box and not needs_mask:
        return None
    if not isinstance(mask, dict) or not isinstance(mask.get("counts"), str | bytes):
        return "segmentation must be an RLE (size, counts) whose runs fill the image"
    height, width = image["height"], image["width"]
    if mask.get("size") not in ([height, width], (height, width)):
        return f"segmentation is of size {mask.get('size')!r:.40}, the image of {[height, width]}"
    return None


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    is_real = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    return is_real and bool(abs(value) < LIMIT)  # nan is not less


def _is_box(box: Any) -> bool:
    is_sequence = isinstance(box, list | tuple | np.ndarray)
    return is_sequence and len(box) == 4 and all(map(_is_number, box)) and min(box[2:]) >= 0


def _rle_string(result: dict) -> bytes:
    return encode_counts(result["segmentation"]["counts"])
