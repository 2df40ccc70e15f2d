"""A small COCO-format dataset cut out of a large one."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from datasets.coco import CocoInstances
from datasets.coco_file import read_json
from datasets.files import write_atomically
from datasets.images import ImageError, read_image
from datasets.progress import progress_bar

GIVE_UP_AFTER = 200  # unreadable images in a row: this is not the folder of these annotations


def cut_subset(
    annotations: str | Path,
    images: str | Path,
    output: str | Path,
    *,
    num_images: int | None = None,
    image_ids: Sequence[int] | None = None,
    split: str = "train",
    seed: int = 0,
) -> tuple[Path, list[str]]:
    """Copies `num_images` images, or those of some ids, and their annotations.

    Writes `images/{split}/...` and, last, `annotations/instances_{split}.json`: the large json
    without the other images and their annotations, with the names of the files as they are.
    Annotations that are not usable are kept.

    Returns:
        The new json's path, and a message for each unreadable image; another took its place.

    Raises:
        FileNotFoundError: no such annotations or image folder.
        ValueError: not COCO, a json of that name is there already, an id that is not in it, or too
            few images can be read.
    """
    images, folder = Path(images), Path(output) / "images" / split
    path = Path(output) / "annotations" / f"instances_{split}.json"
    if path.exists():
        raise ValueError(f"{path} is there already; delete it or choose another output or split")
    if not images.is_dir():
        raise FileNotFoundError(f"image folder {images} does not exist")
    coco = CocoInstances.load(annotations)
    if message := coco.find_files(images):
        print(message)
    if image_ids is not None:
        if unknown := sorted(set(image_ids) - set(coco.image_ids.tolist())):
            raise ValueError(f"{coco.path} has no image of the id {unknown[0]}")
        num_images = len(set(image_ids))
    if num_images is None or not 1 <= num_images <= len(coco):
        raise ValueError(f"{num_images} images were asked for; {coco.path} lists {len(coco)}")
    if seed < 0:
        raise ValueError(f"the seed must not be negative, got {seed}")
    broken: list[str] = []

    def copy(row: int) -> bool:
        source, target = images / coco.file_name(row), folder / coco.file_name(row)
        try:
            read_image(source)  # a broken file is not worth copying
        except ImageError as error:
            broken.append(str(error))
            return False
        write_atomically(target, source.read_bytes())
        return True

    if image_ids is None:
        rows = choose_images(coco, num_images, seed=seed, accept=copy)
    else:
        rows = list(filter(copy, np.flatnonzero(np.isin(coco.image_ids, image_ids)).tolist()))
    if len(rows) < num_images:
        raise ValueError(
            f"{images}: only {len(rows)} of the {num_images} images asked for can be read; "
            f"the first of {len(broken)} that cannot: {broken[0]}"
        )
    content = read_json(annotations)  # CocoInstances does not keep all of it
    chosen = set(coco.image_ids[rows].tolist())
    for array, key in (("images", "id"), ("annotations", "image_id")):
        content[array] = [element for element in content[array] if element[key] in chosen]
    names = {int(coco.image_ids[row]): coco.file_name(row) for row in rows}
    for image in content["images"]:
        image["file_name"] = names[image["id"]]
    write_atomically(path, json.dumps(content).encode())
    return path, broken


def choose_images(
    coco: CocoInstances, num_images: int, *, seed: int, accept: Callable[[int], bool]
) -> list[int]:
    """Rows of images in the order of the json, with rare categories more often than by chance.

    The first half is drawn uniformly, so that the subset looks like the dataset. Then each image is
    drawn from those that show the category with the fewest chosen images, among the categories
    that have any image left. `accept` is called once for every drawn image; a refused one is
    replaced. There are fewer rows when no image is left or `GIVE_UP_AFTER` in a row were refused.
    """
    rng = np.random.default_rng(seed)
    shows = np.zeros((len(coco.category_ids), len(coco)), bool)  # (C, I), crowds do not count
    shows[coco.category_index[~coco.is_crowd], coco.image_index[~coco.is_crowd]] = True
    num_left, num_chosen = shows.sum(axis=1), np.zeros(len(shows), np.int64)  # images by category
    free, refused = np.ones(len(coco), bool), 0
    chosen: list[int] = []
    with progress_bar(None, "copying", total=num_images, unit="image") as progress:
        while len(chosen) < num_images and free.any() and refused < GIVE_UP_AFTER:
            candidates = free
            if len(chosen) >= num_images // 2 and num_left.any():
                candidates = free & shows[np.where(num_left > 0, num_chosen, np.inf).argmin()]
            row = int(rng.choice(np.flatnonzero(candidates)))
            free[row] = False
            num_left -= shows[:, row]
            refused += 1
            if accept(row):
                refused = 0
                chosen.append(row)
                num_chosen += shows[:, row]
                progress.update()
    return sorted(chosen)


def read_ids(path: str | Path) -> list[int]:
    """The whole numbers of a text file, between spaces or line feeds.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it holds something else, or nothing.
    """
    words = Path(path).read_text(errors="replace").split()
    try:
        ids = [int(word) for word in words]
    except ValueError as error:
        raise ValueError(f"{path} must hold image ids, whole numbers: {error}") from None
    if not ids:
        raise ValueError(f"{path} holds no image id")
    return ids
