"""A synthetic COCO-format dataset of textured shapes, drawn from a seed: the embedded default.

`shape_scenes.render` draws an image and its objects' masks; here they become COCO's annotations
and files.
"""

import json
import zlib
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from datasets.files import write_atomically
from datasets.shape_scenes import ShapeObject, render

# With gaps, as COCO's are: whoever takes an id for an index fails here first.
CATEGORY_IDS = {
    "disk": 1,
    "triangle": 2,
    "square": 3,
    "cross": 8,
    "crescent": 9,
    "heart": 11,
    "leaf": 13,
}
DESCRIPTION = "synthetic shapes"
VERSION = "4"  # raise it when a seed draws something else: then old directories are written anew
JPEG_QUALITY = 92
MIN_HOLE_SHARE = 0.02  # of an object's area: from here on a polygon would be wrong
# px. From .5 on, a speck may shrink to two points, which pycocotools takes for a box; at .55 the
# worst IoU with the mask is .89 (thin slivers), at .4 it is .98.
POLYGON_TOLERANCE = 0.4


def write_shapes(
    directory: str | Path, *, num_images: int, seed: int, split: str = "train"
) -> Path:
    """Writes `images/{split}/000001.jpg ...` and `annotations/instances_{split}.json`.

    Image i depends on (seed, split, i) alone. The json says what it was made from and is written
    last: a finished dataset of the same parameters is left as it is, any other is written anew.

    Returns:
        the json's path.

    Raises:
        ValueError: there is a json of that name which this function did not write.
    """
    directory = Path(directory)
    images = directory / "images" / split
    path = directory / "annotations" / f"instances_{split}.json"
    info = {
        "description": DESCRIPTION,
        "version": VERSION,
        "num_images": num_images,
        "seed": seed,
        "split": split,
    }
    if path.exists():
        old = _read_info(path)
        if old == info:
            return path
        path.unlink()  # first, for it must never describe images of another dataset
        for image_id in range(1, old["num_images"] + 1):
            (images / _file_name(image_id)).unlink(missing_ok=True)
    images.mkdir(parents=True, exist_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset = {"info": info, **_write_images(images, num_images=num_images, seed=seed, split=split)}
    write_atomically(path, json.dumps(dataset).encode())
    return path


def _read_info(path: Path) -> dict:
    try:
        info = json.loads(path.read_bytes())["info"]
        if info["description"] == DESCRIPTION:
            return info
    except (ValueError, LookupError, TypeError):
        pass  # broken or foreign
    raise ValueError(f"{path}: not made by write_shapes, so it is kept; choose another directory")


def _file_name(image_id: int) -> str:
    return f"{image_id:06d}.jpg"


def _write_images(directory: Path, *, num_images: int, seed: int, split: str) -> dict:
    """Writes the images; returns COCO's `images`, `annotations` and `categories`."""
    images, annotations = [], []
    numbers = range(1, num_images + 1)
    for image_id in tqdm(numbers, desc=f"drawing {split}", unit="image", disable=None):
        image, objects = render(np.random.default_rng([seed, zlib.crc32(split.encode()), image_id]))
        height, width = image.shape[:2]
        file_name = _file_name(image_id)
        _write_jpeg(directory / file_name, image)
        images.append({"id": image_id, "file_name": file_name, "height": height, "width": width})
        for shape in objects:
            ids = {"id": len(annotations) + 1, "image_id": image_id}
            annotations.append({**ids, **annotate(shape)})
    categories = [
        {"id": category_id, "name": name, "supercategory": "shape"}
        for name, category_id in CATEGORY_IDS.items()
    ]
    return {"images": images, "annotations": annotations, "categories": categories}


def annotate(shape: ShapeObject) -> dict:
    """COCO's `category_id`, `iscrowd`, `segmentation`, `area` (px) and `bbox` (xywh, px).

    The segmentation is polygons, or uncompressed RLE for a crowd and for an object in which what
    lies before it leaves a hole.
    """
    left, top, w, h = cv2.boundingRect(shape.mask.astype(np.uint8))
    area = int(np.count_nonzero(shape.mask))
    borders = _outer_borders(shape.mask[top : top + h, left : left + w])
    hole_area = sum(cv2.contourArea(border) for border in borders) - area
    if shape.iscrowd or hole_area > MIN_HOLE_SHARE * area:
        segmentation = _uncompressed_rle(shape.mask)
    else:
        segmentation = [(_smooth(border) + [left, top]).ravel().tolist() for border in borders]
    return {
        "category_id": CATEGORY_IDS[shape.category],
        "iscrowd": int(shape.iscrowd),
        "segmentation": segmentation,
        "area": area,
        "bbox": [left, top, w, h],
    }


def _outer_borders(mask: np.ndarray) -> list[np.ndarray]:
    """The borders of a mask along its pixels' edges, (K, 2) int32 each, in unit steps.

    `cv2.findContours` joins pixel centers, so that a polygon of them lacks half a pixel all round.
    On the doubled mask, the border of the pixels a to b runs from 2a to 2b + 1; their edges are a
    and b + 1. For both, and at inner corners too, the edge is (c + 1) // 2.
    """
    doubled = cv2.resize(mask.astype(np.uint8), None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST)
    contours, _ = cv2.findContours(doubled, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    corners = [(contour[:, 0] + 1) // 2 for contour in contours]
    return [c[(c != np.roll(c, 1, axis=0)).any(axis=1)] for c in corners]


def _smooth(border: np.ndarray) -> np.ndarray:
    """A polygon through the middles of the border's steps, which lie on a slanted line's middle."""
    middles = (border + np.roll(border, -1, axis=0)).astype(np.float32) / 2
    return cv2.approxPolyDP(middles[:, None], POLYGON_TOLERANCE, True)[:, 0]


def _uncompressed_rle(mask: np.ndarray) -> dict:
    """COCO's RLE as its json has it for crowds: run lengths down the columns, background first."""
    pixels = mask.ravel(order="F").astype(np.int8)
    changes = np.flatnonzero(np.diff(pixels, prepend=0))
    counts = np.diff(changes, prepend=0, append=mask.size)
    return {"counts": counts.tolist(), "size": list(mask.shape)}


def _write_jpeg(path: Path, image: np.ndarray) -> None:
    bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    encoded, data = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    assert encoded
    write_atomically(path, data.tobytes())
