"""Results of any of our tools, with what other programs want to know of them."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets.coco_file import read_json
from pipeline.inference.coco_json import (
    check_results,
    images_file,
    load_results,
    read_result_categories,
)
from pipeline.inference.proposals import ProposalStore, results_of

PROPOSAL = {1: "object"}  # the category of proposals


@dataclass
class Results:
    """Proposals or detections, by image.

    Attributes:
        path: where they were read.
        images: COCO's, by id.
        categories: names by id.
    """

    path: Path
    images: dict[int, dict]
    categories: dict[int, str]

    def __iter__(self) -> Iterator[tuple[dict, list[dict]]]:
        """Images that have results, and these: checked COCO results."""
        raise NotImplementedError

    def category(self, result: dict) -> str:
        """The name of a result's category; its number where there is none."""
        return self.categories.get(result["category_id"], str(result["category_id"]))


@dataclass
class StoredResults(Results):
    """Those of a proposal store, one shard in memory at a time."""

    store: ProposalStore

    def __iter__(self) -> Iterator[tuple[dict, list[dict]]]:
        for proposals in self.store:
            yield self.images[proposals.image_id], results_of(proposals)


@dataclass
class ListedResults(Results):
    """Those of a json."""

    results: list[dict]

    def __iter__(self) -> Iterator[tuple[dict, list[dict]]]:
        by_image = defaultdict(list)
        for result in self.results:
            by_image[result["image_id"]].append(result)
        for image_id, results in by_image.items():
            yield self.images[image_id], results


def open_results(path: str | Path, images_json: str | Path | None = None) -> Results:
    """The results of a proposal store, of its proposals.json, or of a detections.json.

    Args:
        images_json: a COCO file that lists the images. By default the one beside a json:
            `NAME.images.json` or images.json. A store knows its images.

    Raises:
        FileNotFoundError, ValueError: no results, or none of these files; one line.
    """
    path = Path(path)
    if path.is_dir():
        store = ProposalStore(path)
        store.require_shards()
        return StoredResults(path, store.images(), PROPOSAL, store)
    results = load_results(path)
    images, categories = _read_images(path, images_json)
    try:
        check_results(results, images)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return ListedResults(path, images, read_result_categories(path) or categories, results)


def _read_images(results: Path, given: str | Path | None) -> tuple[dict[int, dict], dict[int, str]]:
    """The images by id, and the categories' names, of a COCO file."""
    beside = [images_file(results), results.with_name("images.json")]
    found = [file for file in ([Path(given)] if given else beside) if given or file.is_file()]
    if not found:
        raise ValueError(f"{results}: no images.json beside it; give --images-json")
    content = read_json(found[0])
    try:
        images = {image["id"]: image for image in content["images"]}
        for image in images.values():
            sizes = image["height"], image["width"]
            if not all(isinstance(side, int) and side > 0 for side in sizes):
                raise ValueError
            str(image["file_name"])
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
