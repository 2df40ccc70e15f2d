"""Small COCO datasets: annotations, and images that show what is annotated."""

import json
from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np
import pycocotools.mask as coco_mask

from datasets.coco import CocoInstances
from datasets.patch_sampler import PatchSampler, PatchSamplingConfig
from datasets.patches import PatchDataset
from datasets.proposal_boxes import ProposalBoxes
from datasets.roi_sampler import RoiSampler, RoiSamplingConfig
from datasets.rois import RoiDataset


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


def write_painted(
    folder: Path, corners: np.ndarray, sizes=((120, 160),), *, rle=False
) -> CocoInstances:
    """Images 1 ... 6 with a polygon each, painted (250, 20 n, 5) on gray noise.

    `corners` (n, 2) are those of image 0; it moves by (5, 3) from image to image. `sizes` (height,
    width) are taken in turn.
    """
    folder.mkdir(exist_ok=True)
    rng, annotations = np.random.default_rng(0), []
    size_of = {n: sizes[n % len(sizes)] for n in range(1, 7)}
    for n, size in size_of.items():
        ring = corners + np.array([5, 3]) * n
        polygon = [ring.ravel().tolist()]
        (mask,) = coco_mask.frPyObjects(polygon, *size)
        pixels = rng.integers(100, 140, (*size, 3), np.uint8)
        pixels[coco_mask.decode(mask) > 0] = (250, 20 * n, 5)
        cv2.imwrite(str(folder / f"{n}.png"), pixels[..., ::-1])
        segmentation = mask | {"counts": mask["counts"].decode()} if rle else polygon
        bbox = [*ring.min(0).tolist(), *np.ptp(ring, 0).tolist()]
        annotations.append(rectangle(n, n, n % 2 + 1, *bbox, segmentation=segmentation))
    return write_coco(folder / "instances.json", size_of, annotations, categories=[1, 2])


def painted_patches(folder: Path, *, rle=False, seed=0, **sampling) -> PatchDataset:
    """Patches of 64 + 32 pixels of slanted polygons."""
    corners = np.array([[25.5, 10.25], [105, 15], [95, 70.75], [35, 80]])
    coco = write_painted(folder, corners, rle=rle)
    sampler = PatchSampler(coco, patch_size=64, config=PatchSamplingConfig(**sampling), seed=seed)
    return PatchDataset(coco, folder, sampler, patch_size=64, context=32, target_size=48)


def painted_rois(
    folder: Path, *, sizes=((120, 160),), sampling=None, seed=0, **options
) -> RoiDataset:
    """RoIs of rectangles, with 40 proposals around each."""
    corners = np.array([[20, 10], [80, 10], [80, 60], [20, 60]])
    coco, rng = write_painted(folder, corners, sizes), np.random.default_rng(0)
    proposals = ProposalBoxes.from_rows(
        (
            coco.image_ids.repeat(40),
            coco.boxes.repeat(40, axis=0) + rng.normal(0, 12, (240, 4)),
            rng.random(240),
        )
    )
    small = {"rois_per_image": 16, "short_side": 100, "long_side": 160}
    config = RoiSamplingConfig(**small | (sampling or {}))
    return RoiDataset(
        coco, folder, RoiSampler(coco, proposals, config=config, seed=seed), **options
    )


def assert_frequency(found: float, expected: float, draws: float) -> None:
    """Within 4.5 standard deviations."""
    deviation = (expected * (1 - expected) / draws) ** 0.5
    assert abs(found - expected) <= 4.5 * deviation + 1e-9, (found, expected)
