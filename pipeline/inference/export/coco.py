"""COCO instances json: what label tools and `pycocotools.COCO` read, with the scores kept."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from pycocotools import mask as coco_mask

from datasets.files import atomic_path
from pipeline.inference.coco_json import box_of
from pipeline.inference.export.results import Results, mask_of, write_lines
from pipeline.inference.mask_crops import run_lengths


def write_coco(results: Results, path: Path, crs: str) -> str:
    """Writes results as annotations; masks stay RLE. Coordinates are pixels, whatever `crs`."""
    return _write(results, path, results.categories, plain=False)


def write_supervision(results: Results, path: Path, crs: str) -> str:
    """The same for `supervision.DetectionDataset.from_coco`, which gives equal masks.

    It reads RLE of crowds, whose runs are numbers, in all of its versions, and finds categories by
    names, which have to differ.
    """
    times = Counter(results.categories.values())
    names = {i: n if times[n] == 1 else f"{n} ({i})" for i, n in results.categories.items()}
    return _write(results, path, names, plain=True)


def _write(results: Results, path: Path, names: dict[int, str], *, plain: bool) -> str:
    def annotations() -> Iterator[str]:
        annotation_id = 0
        for _, found in results:
            for result in found:
                annotation_id += 1
                annotation = {"id": annotation_id, **result, "iscrowd": 0}
                annotation["bbox"] = box_of(result)
                annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
                if (mask := mask_of(result)) is not None:
                    annotation["area"] = int(coco_mask.area(mask))
                    counts = mask["counts"]
                    annotation["segmentation"] = mask | {
                        "counts": run_lengths(counts).tolist() if plain else counts.decode("ascii")
                    }
                    annotation["iscrowd"] = int(plain)
                yield json.dumps(annotation, separators=(",", ":"), allow_nan=False)

    with atomic_path(path) as temporary, temporary.open("w") as file:
        images = json.dumps(list(results.images.values()))
        file.write(f'{{"images": {images},\n"annotations": [')
        count = write_lines(file, annotations())
        categories = json.dumps([{"id": i, "name": name} for i, name in names.items()])
        file.write(f'\n],\n"categories": {categories}}}\n')
    return f"{path}: {len(results.images):,} images, {count:,} annotations"
