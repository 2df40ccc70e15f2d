"""Proposals made of masks, and annotations that list images."""

import json
from pathlib import Path

import numpy as np
from pycocotools import mask as coco_mask

from pipeline.inference.proposals import Proposals, logits_of


def proposals_of(
    masks: np.ndarray,
    *,
    image_id: int = 1,
    file_name: str = "x.jpg",
    scores: np.ndarray | None = None,
) -> Proposals:
    """Proposals of masks (N, H, W); without scores, they fall from 1 to 0."""
    rles = [coco_mask.encode(np.asfortranarray(mask.astype(np.uint8))) for mask in masks]
    boxes = np.array([coco_mask.toBbox(rle) for rle in rles], np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    if scores is None:
        scores = np.linspace(1, 0, len(masks), dtype=np.float32)
    counts = [rle["counts"] for rle in rles]
    logits = logits_of(scores).astype(np.float32)
    return Proposals(image_id, file_name, *masks.shape[1:], logits, boxes, counts)


def listing(path: Path, **ids: int) -> Path:
    """Writes a COCO file of images `NAME.jpg`."""
    images = [{"id": n, "file_name": f"{name}.jpg"} for name, n in ids.items()]
    path.write_text(json.dumps({"images": images}))
    return path
