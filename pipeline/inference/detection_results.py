"""COCO results of detections from JSON, checked before pycocotools sees them."""

import json
from collections.abc import Container, Mapping
from numbers import Integral, Real
from pathlib import Path

import numpy as np
from pycocotools import mask as mask_utils

from datasets.segmentations import check_counts

LIMIT = 1e100  # of scores and coordinates: its square is finite, so that no overlap is nan
CHUNK = 10_000  # masks checked at once


def load_results(path: str | Path, *, of: str = "detections") -> list:
    """The list of results in a JSON file; what is in it is for `check_results`.

    Args:
        of: what the results are, for the error.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a folder, no JSON, or no list.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the detections.json in it")
    if not path.is_file():
        raise FileNotFoundError(f"results {path} do not exist")
    try:
        results = json.loads(path.read_bytes().decode("utf-8-sig"))
    except RecursionError:
        raise ValueError(f"{path} is not JSON: nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(results, list):
        raise ValueError(
            f"{path} is not COCO results: it must be a list of {of}, not {type(results).__name__}"
        )
    return results


def check_results(
    results: list, images: Mapping[int, dict], categories: Container[int] | None = None
) -> tuple[str, ...]:
    """Finds out what can be scored: ("box", "mask"), or ("box",) if no result has a mask.

    Without any result both can: nothing was found.

    Args:
        results: {"image_id", "category_id", "score", "bbox" xywh, "segmentation" compressed RLE};
            either all or none have masks, and a mask without a box stands for its box as well.
        images: COCO's images by id; of each the "height" and "width" are read.
        categories: the ids that may occur; None for any.

    Raises:
        ValueError: the first result that cannot be scored, and why, in one line.
    """
    has_masks = not results or (
        isinstance(results[0], dict) and results[0].get("segmentation") is not None
    )
    for index, result in enumerate(results):
        if problem := _problem(result, images, categories, has_masks):
            raise ValueError(f"results[{index}]{_place(result)} {problem}")
    if has_masks:
        _check_runs(results, images)
    return ("box", "mask") if has_masks else ("box",)


def box_of(result: dict) -> list[float]:
    """A checked result's box, xywh; that of its mask if it has none."""
    box = result.get("bbox")
    return mask_utils.toBbox(result["segmentation"]).tolist() if box is None else list(box)


def _place(result: object) -> str:
    has_image = isinstance(result, dict) and "image_id" in result
    return f" (image_id {result['image_id']!r:.20}):" if has_image else ""


def _problem(
    result: object, images: Mapping[int, dict], categories: Container[int] | None, has_masks: bool
) -> str | None:
    """Why COCOeval would fail on a result, or score it wrongly without a word."""
    if not isinstance(result, dict) or "image_id" not in result:
        return f"has no image_id: {result!r:.60}"
    image_id, score, box = (result.get(key) for key in ("image_id", "score", "bbox"))
    if not isinstance(image_id, Integral) or image_id not in images:
        return "the image is not in the annotations; score against the file that lists these images"
    if problem := _category_problem(result, categories):
        return problem
    if not _is_number(score):
        return f"score must be a finite number, not {score!r:.40}"
    if box is not None and not _is_box(box):
        return (
            "bbox must be four finite numbers (x, y, width, height), the sizes not negative, "
            f"not {box!r:.80}"
        )
    return _mask_problem(result, images[image_id], has_masks)


def _category_problem(result: dict, categories: Container[int] | None) -> str | None:
    if "category_id" not in result:
        return "has no category_id; class-agnostic proposals are scored as `proposals`"
    category_id = result["category_id"]
    if not isinstance(category_id, Integral):
        return f"category_id must be a whole number, not {category_id!r:.40}"
    if categories is not None and category_id not in categories:
        return f"category_id {category_id} is not among the annotations' categories"
    return None


def _mask_problem(result: dict, image: dict, has_masks: bool) -> str | None:
    mask, size = result.get("segmentation"), [image["height"], image["width"]]
    if mask is None and has_masks:
        return "has no segmentation, while results[0] has: give all detections masks, or none"
    if mask is None:
        return "has neither a bbox nor a segmentation" if result.get("bbox") is None else None
    if not has_masks:
        return "has a segmentation, while results[0] has none: give all detections masks, or none"
    if not isinstance(mask, dict) or not isinstance(mask.get("counts"), str | bytes):
        return "segmentation must be a compressed RLE (size, counts)"
    if mask.get("size") not in (size, tuple(size)):
        return f"segmentation is of size {mask.get('size')!r:.40}, the image of {size}"
    return None


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and abs(value) < LIMIT  # nan is not less


def _is_box(box: object) -> bool:
    is_sequence = isinstance(box, list | tuple | np.ndarray)
    return is_sequence and len(box) == 4 and all(map(_is_number, box)) and min(box[2:]) >= 0


def _check_runs(results: list[dict], images: Mapping[int, dict]) -> None:
    """Refuse RLEs that would send pycocotools' iou round for ever, or out of its memory."""
    for start in range(0, len(results), CHUNK):
        chunk = results[start : start + CHUNK]
        strings = [_as_bytes(result["segmentation"]["counts"]) for result in chunk]
        owners = [images[result["image_id"]] for result in chunk]
        pixels = np.array([image["height"] * image["width"] for image in owners], np.int64)
        valid, *_ = check_counts(strings, pixels)
        if not valid.all():
            first = int(np.argmin(valid))
            raise ValueError(
                f"results[{start + first}]{_place(chunk[first])} "
                "the runs of its segmentation do not fill the image"
            )


def _as_bytes(counts: str | bytes) -> bytes:
    return counts if isinstance(counts, bytes) else counts.encode("utf-8", "surrogatepass")
