"""COCO instances json: what label tools and `pycocotools.COCO` read, with the scores kept."""

import json
from collections.abc import Iterator
from pathlib import Path

from pycocotools import mask as coco_mask

from datasets.files import atomic_path
from datasets.segmentations import encode_counts
from pipeline.inference.coco_json import box_of
from pipeline.inference.export.results import Results, write_lines


def write_coco(results: Results, path: Path, crs: str) -> str:
    """Writes results as annotations; masks stay RLE. Coordinates are pixels, whatever `crs`."""
    used: set[int] = set()

    def annotations() -> Iterator[str]:
        annotation_id = 0
        for _, found in results:
            for result in found:
                annotation_id += 1
                used.add(result["category_id"])
                annotation = {"id": annotation_id, **result, "iscrowd": 0}
                annotation["bbox"] = box_of(result)
                annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
                if mask := result.get("segmentation"):
                    counts = encode_counts(mask["counts"])
                    annotation["area"] = int(coco_mask.area({**mask, "counts": counts}))
                    annotation["segmentation"] = {**mask, "counts": counts.decode("ascii")}
                yield json.dumps(annotation, separators=(",", ":"), allow_nan=False)

    with atomic_path(path) as temporary, temporary.open("w") as file:
        images = json.dumps(list(results.images.values()))
        file.write(f'{{"images": {images},\n"annotations": [')
        count = write_lines(file, annotations())
        names = results.categories | {i: str(i) for i in sorted(used - results.categories.keys())}
        categories = json.dumps([{"id": i, "name": name} for i, name in names.items()])
        file.write(f'\n],\n"categories": {categories}}}\n')
    return f"{path}: {len(results.images):,} images, {count:,} annotations"
