"""Results of any of our tools, with what other programs want to know of them."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from datasets.coco_file import read_json
from datasets.remote import AnyPath, to_path
from datasets.segmentations import encode_counts
from pipeline.inference.coco_json import (
    box_of,
    check_results,
    images_file,
    load_results,
    read_result_categories,
)
from pipeline.inference.mask_crops import crop_mask
from pipeline.inference.proposal_store import ProposalStore
from pipeline.inference.proposals import results_of

PROPOSAL = {1: "object"}  # the category of proposals


@dataclass
class Results:
    """Proposals or detections, by image.

    Attributes:
        path: where they were read.
        images: COCO's, by id.
        categories: names by id; a number is the name of one that has none.
        image_folder: what the images' names are relative to, if that is known.
        image_prefix: what stands before the names in addresses of images, if it was given.
        top: so many of an image's results, the best, count; None for all.
    """

    path: AnyPath
    images: dict[int, dict]
    categories: dict[int, str]
    image_folder: AnyPath | None = field(default=None, kw_only=True)
    image_prefix: str | None = field(default=None, kw_only=True)
    top: int | None = field(default=None, kw_only=True)

    def __iter__(self) -> Iterator[tuple[dict, list[dict]]]:
        """Images that have results, and these: checked COCO results."""
        for image, found in self._read():
            if self.top is not None:
                found = sorted(found, key=lambda result: -result["score"])[: self.top]
            yield image, found

    def _read(self) -> Iterator[tuple[dict, list[dict]]]:
        raise NotImplementedError

    def every_image(self) -> Iterator[tuple[dict, list[dict]]]:
        """The same, and at the end the images that have no results."""
        found = set()
        for image, results in self:
            found.add(image["id"])
            yield image, results
        for image_id, image in self.images.items():
            if image_id not in found:
                yield image, []

    def category(self, result: dict) -> str:
        """The name of a result's category."""
        return self.categories[result["category_id"]]


@dataclass
class StoredResults(Results):
    """Those of a proposal store, one shard in memory at a time."""

    store: ProposalStore

    def _read(self) -> Iterator[tuple[dict, list[dict]]]:
        for proposals in self.store:
            yield self.images[proposals.image_id], results_of(proposals)


@dataclass
class ListedResults(Results):
    """Those of a json."""

    results: list[dict]

    def _read(self) -> Iterator[tuple[dict, list[dict]]]:
        by_image = defaultdict(list)
        for result in self.results:
            by_image[result["image_id"]].append(result)
        for image_id, results in by_image.items():
            yield self.images[image_id], results


@dataclass(frozen=True)
class Region:
    """What a result covers of its image, as label tools draw it.

    Attributes:
        result: COCO's.
        mask: its pixels (h, w) uint8 within its box; None if it has only a box.
        box: its integer x0, y0, x1, y1 of the mask; else those of the box, within the image.
    """

    result: dict
    mask: np.ndarray | None
    box: tuple[float, float, float, float]


def regions(image: dict, found: list[dict]) -> list[Region]:
    """The regions of an image's results, without those that are empty."""
    covered = (_region(image, result) for result in found)
    return [region for region in covered if region is not None]


def _region(image: dict, result: dict) -> Region | None:
    if (rle := mask_of(result)) is not None:
        mask, (left, top) = crop_mask(rle)
        box = left, top, left + mask.shape[1], top + mask.shape[0]
        return Region(result, mask, box) if mask.size else None
    x, y, w, h = box_of(result)
    x0, x1 = (min(max(side, 0), image["width"]) for side in (x, x + w))
    y0, y1 = (min(max(side, 0), image["height"]) for side in (y, y + h))
    return Region(result, None, (x0, y0, x1, y1)) if x0 < x1 and y0 < y1 else None


def mask_of(result: dict) -> dict | None:
    """The mask of a checked result, as COCO's RLE with counts in bytes; None if it has a box only.

    Where a tool writes [] for no mask, there is none.
    """
    mask = result.get("segmentation")
    return {**mask, "counts": encode_counts(mask["counts"])} if mask else None


def row_runs(
    mask: np.ndarray, corner: tuple[int, int] = (0, 0), size: tuple[int, int] | None = None
) -> np.ndarray:
    """Runs of a mask row by row, as CVAT and Label Studio have them; COCO's go by columns.

    Args:
        mask: (h, w) uint8 pixels, at a corner x, y of an image of a height and width; without
            these, the image is the mask.

    Returns:
        (r,) int64 lengths, of the background first, which is 0 where a mask begins at once. Their
        sum is height times width.
    """
    height, width = size or mask.shape
    padded = np.pad(mask, ((0, 0), (1, 1))).astype(np.int8)
    y, x = np.nonzero(np.diff(padded, axis=1))  # where runs start and end, in turn
    edges = (y + corner[1]) * width + x + corner[0]
    # A run that reaches the end of a row and the one at the start of the next are one.
    places, counts = np.unique(edges, return_counts=True)
    runs = np.diff(places[counts == 1], prepend=0, append=height * width)
    return runs if runs[-1] else runs[:-1]


def describe(count: int, empty: int) -> str:
    """How many results were written, and how many of them were left out as empty."""
    return f"{count:,} results" + (f"; {empty:,} empty ones left out" if empty else "")


def open_results(
    path: str | AnyPath,
    images_json: str | Path | None = None,
    *,
    image_folder: str | Path | None = None,
    image_prefix: str | None = None,
    top: int | None = None,
) -> Results:
    """The results of a proposal store, of its proposals.json, or of a detections.json.

    Args:
        images_json: a COCO file that lists the images. By default the one beside a json:
            `NAME.images.json` or images.json. A store knows its images.
        image_folder, image_prefix, top: see `Results`. A store knows the folder, and so do results
            in or above its folder.

    Raises:
        FileNotFoundError, ValueError: no results, or none of these files; one line.
    """
    if top is not None and top < 1:
        raise ValueError(f"--top must be at least 1, got {top}")
    path = to_path(path)
    results = _open_store(path) if path.is_dir() else _open_json(path, images_json)
    results.image_folder = _folder(path if path.is_dir() else path.parent, image_folder)
    results.image_prefix, results.top = image_prefix, top
    return results


def _open_store(path: AnyPath) -> StoredResults:
    store = ProposalStore(path)
    store.require_shards()
    return StoredResults(path, store.images(), PROPOSAL, store)


def _open_json(path: AnyPath, images_json: str | Path | None) -> ListedResults:
    results = load_results(path)
    images, categories = _read_images(path, images_json)
    try:
        check_results(results, images)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    names = read_result_categories(path) or categories
    used = {int(result["category_id"]) for result in results}
    names = names | {i: str(i) for i in sorted(used - names.keys())}
    return ListedResults(path, images, names, results)


def _folder(results: AnyPath, given: str | Path | None) -> AnyPath | None:
    """The folder of the images: as given, or as the store in or below a folder knows it."""
    if given is not None and not to_path(given).is_dir():
        raise ValueError(f"--images {given} is no folder")
    stores = (ProposalStore(results), ProposalStore(results / "proposals"))
    known = [folder for s in stores if s.shards() and (folder := s.settings().get("image_folder"))]
    folder = given or next(iter(known), None)
    return None if folder is None else to_path(folder)


def _read_images(
    results: AnyPath, given: str | Path | None
) -> tuple[dict[int, dict], dict[int, str]]:
    """The images by id, and the categories' names, of a COCO file."""
    beside = [images_file(results), results.with_name("images.json")]
    found = [file for file in ([to_path(given)] if given else beside) if given or file.is_file()]
    if not found:
        raise ValueError(f"{results}: no images.json beside it; give --images-json")
    content = read_json(found[0])
    try:
        images = {image["id"]: image for image in content["images"]}
        for image in images.values():
            sizes = image["height"], image["width"]
            if not all(isinstance(side, int) and side > 0 for side in sizes):
                raise ValueError
            if not isinstance(image["file_name"], str):
                raise ValueError
        return images, {c["id"]: str(c["name"]) for c in content.get("categories", [])}
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError(
            f'{found[0]} is not COCO: images need "id", "file_name", "height" and "width"'
        ) from None


def write_lines(file: Any, items: Iterator[str]) -> int:
    """Writes the elements of a JSON array, one a line; returns how many there are."""
    count = 0
    for item in items:
        file.write((",\n" if count else "\n") + item)
        count += 1
    return count
