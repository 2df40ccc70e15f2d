"""A small COCO-format dataset cut out of a large one."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from datasets.coco import CocoInstances
from datasets.files import write_atomically
from datasets.images import ImageError, read_image

GIVE_UP_AFTER = 200  # unreadable images in a row: this is not the folder of these annotations


def cut_subset(
    annotations: str | Path,
    images: str | Path,
    output: str | Path,
    *,
    num_images: int,
    split: str = "train",
    seed: int = 0,
) -> tuple[Path, list[str]]:
    """Copies `num_images` images and their annotations.

    Writes `images/{split}/...` and, last, `annotations/instances_{split}.json`: the large json's
    content, unusable annotations too, but for the images that were not chosen and what is on them.

    Returns:
        The new json's path, and a message for each drawn image that could not be read; another
        one was drawn in its place.

    Raises:
        FileNotFoundError: no such annotations or image folder.
        ValueError: not COCO, a json of that name is there already, or too few images can be read.
    """
    images, folder = Path(images), Path(output) / "images" / split
    path = Path(output) / "annotations" / f"instances_{split}.json"
    if path.exists():
        raise ValueError(f"{path} is there already; delete it or choose another output or split")
    if not images.is_dir():
        raise FileNotFoundError(f"image folder {images} does not exist")
    coco = CocoInstances.load(annotations)
    _check_request(coco, num_images, seed)
    content = json.loads(Path(annotations).read_bytes())  # as it is; CocoInstances keeps less
    broken: list[str] = []

    def copy(row: int) -> bool:
        try:
            _copy_image(images, folder, coco.file_name(row))
        except ImageError as error:
            broken.append(str(error))
            return False
        return True

    rows = choose_images(coco, num_images, seed=seed, accept=copy)
    if len(rows) < num_images:
        raise ValueError(
            f"{images}: only {len(rows)} of the {num_images} images asked for can be read; "
            f"the first of {len(broken)} that cannot: {broken[0]}"
        )
    write_atomically(path, json.dumps(_restrict(content, coco.image_ids[rows].tolist())).encode())
    return path, broken


def _check_request(coco: CocoInstances, num_images: int, seed: int) -> None:
    if not 1 <= num_images <= len(coco):
        raise ValueError(f"{num_images} images were asked for; {coco.path} lists {len(coco)}")
    if seed < 0:
        raise ValueError(f"the seed must not be negative, got {seed}")


def choose_images(
    coco: CocoInstances, num_images: int, *, seed: int, accept: Callable[[int], bool]
) -> list[int]:
    """Rows of images that cover the categories better than chance does, in the order of the json.

    The first half is drawn uniformly from all images, so that the subset looks like the dataset.
    Then, image by image, one is drawn from those that show the category of which fewest have been
    chosen (as long as there is one), so that rare categories are there as well.

    Args:
        accept: asked once for every image that is drawn; one that is refused is replaced.

    Returns:
        At most `num_images` rows; fewer when no image is left or `GIVE_UP_AFTER` in a row were
        refused.
    """
    rng = np.random.default_rng(seed)
    shows = _images_of_categories(coco)  # (C, I)
    left, chosen_of = shows.sum(axis=1), np.zeros(len(shows), np.int64)  # images of each category
    free, chosen, refused = np.ones(len(coco), bool), [], 0
    progress = tqdm(total=num_images, desc="copying", unit="image", disable=None)
    while len(chosen) < num_images and free.any() and refused < GIVE_UP_AFTER:
        candidates = free
        if len(chosen) >= num_images // 2 and left.any():
            candidates = free & shows[np.where(left > 0, chosen_of, np.inf).argmin()]
        row = int(rng.choice(np.flatnonzero(candidates)))
        free[row] = False
        left -= shows[:, row]
        refused += 1
        if accept(row):
            refused = 0
            chosen.append(row)
            chosen_of += shows[:, row]
            progress.update()
    progress.close()
    return sorted(chosen)


def _images_of_categories(coco: CocoInstances) -> np.ndarray:
    """(C, I) bool: whether an image shows a category, by a usable annotation that is no crowd."""
    shows = np.zeros((len(coco.category_ids), len(coco)), bool)
    usable = ~coco.is_crowd
    shows[coco.category_index[usable], coco.image_index[usable]] = True
    return shows


def _copy_image(images: Path, folder: Path, file_name: str) -> None:
    target = folder / file_name
    if not target.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f'"file_name": "{file_name}" leads out of the image folder')
    read_image(images / file_name)  # a broken file is not worth copying
    write_atomically(target, (images / file_name).read_bytes())


def _restrict(content: dict, image_ids: list[int]) -> dict:
    """The json's content with the given images and their annotations only."""
    kept = set(image_ids)
    return content | {
        "images": [image for image in content["images"] if image["id"] in kept],
        "annotations": [a for a in content["annotations"] if a["image_id"] in kept],
    }
