"""Proposal files of MultiPathNet ({images, boxes, scores}) as proposal stores.

A file has no masks, and a store has a mask for each proposal: here it is the box, filled.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as coco_mask
from torch import Tensor

from datasets.coco_file import read_image_list
from datasets.images import read_image
from pipeline.inference.image_files import find_images
from pipeline.inference.proposal_store import ProposalStore, ShardWriter
from pipeline.inference.proposals import Proposals, logits_of

FIELDS = ("images", "boxes", "scores")


def convert_proposals(
    value: dict,
    output: str | Path,
    *,
    source: str,
    annotations: str | Path | None,
    images: str | Path | None,
) -> list[str]:
    """Writes the store; see `pipeline.torch7.convert.convert_file`.

    Returns:
        Lines that say what was done, and what was left out.

    Raises:
        ValueError: the tables do not fit each other, or an image's size is not known.
    """
    names, boxes, scores = columns = [_entries(value[field], field) for field in FIELDS]
    if len(set(map(len, columns))) > 1:
        raise ValueError(
            f"{len(names)} images, {len(boxes)} tables of boxes and {len(scores)} of scores"
        )
    sizes = _sizes(names, annotations, images)
    store = ProposalStore(output)
    if store.shards():
        raise ValueError(f"{output} holds proposals already; choose another --output")
    store.open_for({"converted_from": source, "masks": "filled boxes"})
    total = sum(len(table) for table in boxes if isinstance(table, Tensor))
    rows = list(zip(names, boxes, scores, strict=True))
    with ShardWriter(store) as shards:
        for row in rows:
            shards.add(_proposals(*row, *sizes[row[0]]))
    store.write_json()
    lines = [
        f"proposals: {total} boxes of {len(names)} images (y1, x1, y2, x2, counted from 1)",
        "there are no masks in such a file: the masks in the store are the filled boxes",
    ]
    if left_out := total - (written := store.count()):
        lines.append(f"left out: {left_out} boxes without a pixel in their image")
    return [*lines, f"{written} written to {output}"]


def _entries(table: Any, field: str) -> list:
    """The entries of a table or the rows of a tensor; an empty table is read as a dict."""
    if isinstance(table, list) or (isinstance(table, Tensor) and table.dim() >= 2):
        return list(table)
    if table == {}:
        return []
    raise ValueError(f"{field}: expected a table with an entry for each image")


def _sizes(
    names: list, annotations: str | Path | None, images: str | Path | None
) -> dict[str, tuple[int, int, int]]:
    """Each image's id, height and width, by file name."""
    for i, name in enumerate(names, 1):
        if not isinstance(name, str):
            raise ValueError(f"images[{i}]: expected a file name, got {name!r}")
    sizes, wanted = {}, set(names)
    if annotations is not None:
        for image in read_image_list(Path(annotations)):
            if image.height is None or image.width is None:
                raise ValueError(f'{annotations}: {image.file_name} has no "height" and "width"')
            sizes[image.file_name] = image.id, image.height, image.width
    elif images is not None:
        for file in find_images(images, None):
            if file.file_name in wanted:
                height, width, _ = read_image(file.path).shape
                sizes[file.file_name] = file.image_id, height, width
    else:
        raise ValueError(
            "proposals without the sizes of their images; give --annotations (a COCO json) or "
            "--images (their folder)"
        )
    if missing := [name for name in names if name not in sizes]:
        raise ValueError(
            f"{len(missing)} of its {len(names)} images are not in {annotations or images}, "
            f"such as {missing[0]}"
        )
    return sizes


def _proposals(
    name: str, table: Any, scores: Any, image_id: int, height: int, width: int
) -> Proposals:
    boxes = np.asarray(table if isinstance(table, Tensor) else [], np.float64)
    if boxes.size == 0:
        boxes = np.empty((0, 4))
    if boxes.ndim != 2 or boxes.shape[1] != 4 or not np.isfinite(boxes).all():
        raise ValueError(f"{name}: expected boxes of four finite numbers each")
    scores = np.asarray(scores if isinstance(scores, Tensor) else [], np.float32).ravel()
    if len(scores) != len(boxes):
        raise ValueError(f"{name}: {len(boxes)} boxes and {len(scores)} scores")
    if not np.isfinite(scores).all():
        raise ValueError(f"{name}: a score that is not finite")
    # xyxy from 0 on: Lua counts from 1, and the last pixel is in the box.
    boxes = boxes[:, [1, 0, 3, 2]] - [1, 1, 0, 0]
    limits = np.array([width, height, width, height])
    pixels = np.ceil(boxes - 0.5).clip(0, limits)  # those whose centers lie in the box
    order = np.argsort(-scores, kind="stable")
    order = order[(pixels[order, 2:] > pixels[order, :2]).all(1)]
    corner, end = np.split(pixels[order], 2, axis=1)
    filled = coco_mask.frPyObjects(np.hstack([corner, end - corner]), height, width)
    boxes = boxes[order].clip(0, limits).astype(np.float32)
    rles = [rle["counts"] for rle in filled]
    logits = logits_of(scores[order]).astype(np.float32)
    return Proposals(image_id, name, height, width, logits, boxes, rles)
