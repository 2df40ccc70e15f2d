"""YOLO segmentation labels, as Ultralytics trains on: `yolo segment train data=FOLDER/data.yaml`.

Ultralytics takes the last `/images/` in an image's path for `/labels/` and its ending for `.txt`.
So that no image has to be copied, images/ holds links to them, and images.txt lists these: the
names of a folder would be resolved to where the images are, and their labels looked for there.
"""

import os
from contextlib import suppress
from itertools import count
from pathlib import Path

import numpy as np
import yaml

from datasets.file_names import leads_out
from datasets.files import atomic_folder
from datasets.remote import AnyPath
from pipeline.inference.export.polygons import join_rings, trace_mask
from pipeline.inference.export.results import Region, Results, describe, regions

DIGITS = 9  # of coordinates: as many as a float32 has
SPLITS = """\
# The same images in both: write lists of your own to train on some and validate on others.
train: images.txt
val: images.txt
"""


def write_yolo(results: Results, path: Path, crs: str) -> str:
    """Writes a folder: data.yaml, images.txt, images/ (links) and labels/, with a polygon a line.

    A box without a mask is a polygon of four corners, since boxes among polygons are misread.
    Coordinates are parts of the image's sides, whatever `crs`. An image whose label file would be
    that of another one (a.jpg and a.png) has a number behind its name.

    Raises:
        ValueError: the folder holds something.
    """
    places = _places(results.images)
    classes = {category_id: index for index, category_id in enumerate(results.categories)}
    written = empty = linked = 0
    with atomic_folder(path) as folder:
        (folder / "images").mkdir()
        (folder / "labels").mkdir()
        for image, found in results:
            covered = regions(image, found)
            lines = [
                f"{classes[r.result['category_id']]} {_coordinates(image, r)}" for r in covered
            ]
            written, empty = written + len(covered), empty + len(found) - len(covered)
            label = folder / "labels" / (os.path.splitext(places[image["id"]])[0] + ".txt")
            label.parent.mkdir(parents=True, exist_ok=True)
            label.write_text("".join(f"{line}\n" for line in lines))
        for image_id, place in places.items():
            name = results.images[image_id]["file_name"]
            linked += _link(folder / "images" / place, results.image_folder, name)
        listed = "".join(f"./images/{place}\n" for place in places.values())
        (folder / "images.txt").write_text(listed, encoding="utf-8")
        names = {"names": dict(enumerate(results.categories.values()))}
        text = SPLITS + yaml.safe_dump(names, allow_unicode=True, sort_keys=False)
        (folder / "data.yaml").write_text(text, encoding="utf-8")
    line = f"{path}: {len(places):,} images, {describe(written, empty)}"
    if missing := len(places) - linked:
        line += f"; {missing:,} images were not found: put them into images/ as images.txt says"
    return line


def _places(images: dict[int, dict]) -> dict[int, str]:
    """Where the images are below images/, by id: in one line, with label files that differ."""
    places: dict[int, str] = {}
    taken = set()
    for image_id, image in images.items():
        text = "_".join(str(image["file_name"]).splitlines()).replace("\\", "/")
        parts = [part for part in text.split("/") if part.strip(" .")] or [str(image_id)]
        # Not a second /images/; no "./", which Ultralytics replaces wherever it is.
        folders = ["images_" if part == "images" else part.rstrip(" .") for part in parts[:-1]]
        stem, suffix = os.path.splitext("/".join([*folders, parts[-1].strip()]))
        endings = (f"-{number}" for number in count(2))
        unique = stem
        while unique in taken:
            unique = stem + next(endings)
        taken.add(unique)
        places[image_id] = unique + suffix
    return places


def _link(link: Path, folder: AnyPath | None, name: str) -> bool:
    """Makes a link to an image; False if it is not there, or where there are no links."""
    link.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(folder, Path) or leads_out(name):
        return False
    with suppress(OSError, ValueError):
        image = (folder / name).resolve()
        if image.is_file():
            link.symlink_to(image)
            return True
    return False


def _coordinates(image: dict, region: Region) -> str:
    """The corners of a region, x and y in turn, in parts of the image's width and height."""
    x0, y0, x1, y1 = region.box
    if region.mask is None:
        ring = np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]])
    else:
        ring = join_rings(trace_mask(region.mask)) + (x0, y0)
    relative = ring / (image["width"], image["height"])
    return " ".join(f"{value:.{DIGITS}g}" for value in relative.ravel().tolist())
