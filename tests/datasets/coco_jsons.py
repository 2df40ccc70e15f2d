"""Small COCO jsons to test with."""

import json
from pathlib import Path

from pycocotools import mask as coco_mask

from datasets.coco import CocoInstances

HEIGHT, WIDTH = 40, 60
SQUARE = [10, 10, 30, 10, 30, 25, 10, 25]
RUNS = [5, 10, HEIGHT * WIDTH - 15]


def minimal(**annotation) -> dict:
    """One image and one annotation, the square unless the arguments change it."""
    annotation = {"id": 7, "image_id": 3, "category_id": 5, "segmentation": [SQUARE]} | annotation
    return {
        "images": [{"id": 3, "file_name": "a.jpg", "height": HEIGHT, "width": WIDTH}],
        "annotations": [annotation],
        "categories": [{"id": 5, "name": "cat"}],
    }


def load_json(path: Path, content) -> CocoInstances:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return CocoInstances.load(path)


def rle(counts, size=(HEIGHT, WIDTH)) -> dict:
    return {"size": list(size), "counts": counts}


def compress(runs: list[int]) -> str:
    return coco_mask.frPyObjects(rle(runs), HEIGHT, WIDTH)["counts"].decode()


def various() -> dict:
    """Two kinds of RLE, several rings, a crowd, gaps in the ids, an image without annotations."""
    content = minimal()
    content["images"] = [
        {"id": 30, "file_name": "train/ü 1.jpg", "height": HEIGHT, "width": WIDTH},
        {"id": 4, "file_name": "empty.jpg", "height": 1, "width": 2},
        {"id": 3, "file_name": "a.jpg", "height": HEIGHT, "width": WIDTH},
    ]
    content["categories"] = [{"id": 90, "name": "zebra"}, {"id": 5, "name": "cat"}]
    triangle = [40.5, 5.25, 50.13, 5, 45, 20.7]
    content["annotations"] = [
        {"id": 1, "image_id": 3, "category_id": 90, "segmentation": [SQUARE, triangle]},
        {"id": 2, "image_id": 30, "category_id": 5, "segmentation": rle(RUNS), "iscrowd": 1},
        {"id": 3, "image_id": 3, "category_id": 5, "segmentation": rle(compress(RUNS))},
        {"id": 4, "image_id": 30, "category_id": 5, "segmentation": [triangle], "iscrowd": 0},
    ]
    content["annotations"][2]["ignore"] = 1
    content["annotations"][0] |= {"area": 123.5, "bbox": [8.5, 3, 43, 24]}
    content["annotations"][1] |= {"area": 99.5, "bbox": [0.5, 4, 2, 12]}
    return content
