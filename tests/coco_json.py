"""Small COCO annotations for tests."""

import json
from collections.abc import Iterable
from pathlib import Path

from datasets.coco import CocoInstances


def rectangle(
    annotation_id: int, image: int, category: int, x: float, y: float, w: float, h: float, **more
) -> dict:
    """An annotation; `more` replaces parts of it."""
    ids = {"id": annotation_id, "image_id": image, "category_id": category}
    polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
    shape = {"bbox": [x, y, w, h], "area": w * h, "segmentation": [polygon], "iscrowd": 0}
    return ids | shape | more


def write_coco(
    path: Path,
    sizes: dict[int, tuple[int, int]],
    annotations: list[dict],
    categories: Iterable[int],
) -> CocoInstances:
    """Writes and loads annotations of images {id: (height, width)}, whose files are `{id}.png`."""
    content = {
        "images": [
            {"id": i, "file_name": f"{i}.png", "height": height, "width": width}
            for i, (height, width) in sizes.items()
        ],
        "categories": [{"id": c, "name": f"c{c}"} for c in categories],
        "annotations": annotations,
    }
    path.write_text(json.dumps(content))
    return CocoInstances.load(path)
