#!/usr/bin/env python
"""Proposals of the time before networks, as COCO results: Selective Search and EdgeBoxes.

Runs in an environment with opencv-contrib-python-headless, which `classic_proposals.py` makes;
nothing of the project can be imported there.
"""

import argparse
import heapq
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as coco_mask

XIMGPROC: Any = getattr(cv2, "ximgproc", None)
MAX_PROPOSALS = 1000
SIGMA, SEGMENTATIONS = 0.8, (150, 300, 450)  # smoothing and k of OpenCV's "fast" mode
EDGE_SIGMA, STRONG_EDGES = 1.5, 99  # px; the percentile of gradients that counts as 1
Results = Iterator[dict[str, Any]]


def main() -> None:
    """Proposes with one method for the images of a COCO json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("--annotations", required=True, type=Path, help="COCO json")
    parser.add_argument("--images", required=True, type=Path, help="the folder of its images")
    parser.add_argument("--output", required=True, type=Path, help="the json to write")
    args = parser.parse_args()
    cv2.setNumThreads(1)
    results, seconds = [], 0.0
    for record in json.loads(args.annotations.read_text())["images"]:
        path = args.images / record["file_name"]
        if (image := cv2.imread(str(path))) is None:
            raise SystemExit(f"{path} cannot be read")
        start = time.process_time()
        found = list(METHODS[args.method](image))
        seconds += time.process_time() - start
        results += [{"image_id": record["id"], "category_id": 1} | proposal for proposal in found]
        print(f"{record['file_name']}: {len(found)} proposals", flush=True)
    args.output.write_text(json.dumps({"seconds": seconds, "results": results}))


# Selective Search.


def opencv_selective_search(image: np.ndarray) -> Results:
    """OpenCV's "fast" mode as it comes: boxes only, small regions first."""
    search = XIMGPROC.segmentation.createSelectiveSearchSegmentation()
    search.setBaseImage(image)
    search.switchToSelectiveSearchFast()
    for rank, box in enumerate(search.process()[:MAX_PROPOSALS].tolist()):
        yield {"score": -rank, "bbox": box}


def selective_search(image: np.ndarray) -> Results:
    """The same with masks, and ranked as in the paper (Uijlings et al., IJCV 2013, section 4.3).

    OpenCV's segmentations and similarities; it does not give the regions that it merges, so the
    merging is repeated here. A region's rank is a random number times its place in its hierarchy,
    the whole image first; of regions with the same box the first one stays.
    """
    rng = np.random.default_rng(0)
    ranked, image_id = [], 0
    for space in (cv2.COLOR_BGR2HSV, cv2.COLOR_BGR2Lab):
        converted = cv2.cvtColor(image, space)
        for k in SEGMENTATIONS:
            segment = XIMGPROC.segmentation.createGraphSegmentation(sigma=SIGMA, k=k)
            labels = segment.processImage(converted)
            for strategy in strategies():
                regions = group(strategy, converted, labels, image_id)
                for place, region in enumerate(reversed(regions), start=1):
                    ranked.append((place * rng.random(), labels, region))
            image_id += 1
    ranked.sort(key=lambda item: item[0])
    boxes: set[tuple] = set()
    for rank, labels, region in ranked:
        is_member = np.zeros(labels.max() + 1, np.uint8)
        is_member[region] = 1
        mask = is_member[labels]
        box = tuple(cv2.boundingRect(mask))
        if box not in boxes:
            boxes.add(box)
            rle = coco_mask.encode(np.asfortranarray(mask))
            rle["counts"] = rle["counts"].decode()
            yield {"score": -rank, "bbox": list(box), "segmentation": rle}
        if len(boxes) == MAX_PROPOSALS:
            return


def strategies() -> list:
    """Similarities of the "fast" mode: with and without color."""
    new = XIMGPROC.segmentation
    color, fill, texture, size = (
        getattr(new, f"createSelectiveSearchSegmentationStrategy{name}")
        for name in ("Color", "Fill", "Texture", "Size")
    )
    combine = new.createSelectiveSearchSegmentationStrategyMultiple
    return [combine(color(), fill(), texture(), size()), combine(fill(), texture(), size())]


def group(strategy: Any, image: np.ndarray, labels: np.ndarray, image_id: int) -> list[list[int]]:
    """Merges the two most similar neighbors until all are one.

    Returns:
        The labels that each region is made of: first the segments, then one region a merge.
    """
    sizes = np.bincount(labels.ravel()).astype(np.int32)[:, None]
    strategy.setImage(image, labels, sizes, image_id)
    regions = [[label] for label in range(len(sizes))]
    names = list(range(len(sizes)))  # what the strategy calls a region: one of its labels
    neighbors: dict[int, set[int]] = {i: set() for i in names}
    queue: list[tuple[float, int, int]] = []

    def join(i: int, j: int) -> None:
        neighbors[i].add(j)
        neighbors[j].add(i)
        heapq.heappush(queue, (-strategy.get(names[i], names[j]), i, j))

    for i, j in adjacent(labels):
        join(i, j)
    while queue:
        _, i, j = heapq.heappop(queue)
        if i not in neighbors or j not in neighbors:
            continue  # one of them has been merged since
        strategy.merge(names[i], names[j])
        sizes[[names[i], names[j]]] = sizes[names[i]] + sizes[names[j]]  # the strategy reads it
        new = len(regions)
        regions.append(regions[i] + regions[j])
        names.append(min(names[i], names[j]))
        around = (neighbors.pop(i) | neighbors.pop(j)) - {i, j}
        neighbors[new] = set()
        for n in sorted(around):
            neighbors[n] -= {i, j}
            join(new, n)
    return regions


def adjacent(labels: np.ndarray) -> list[list[int]]:
    """Pairs of labels (smaller, larger) that touch sideways, above, or above to the left."""
    pairs = [
        (labels[:, 1:], labels[:, :-1]),
        (labels[1:], labels[:-1]),
        (labels[1:, 1:], labels[:-1, :-1]),
    ]
    touching = np.concatenate([np.stack(pair, axis=-1).reshape(-1, 2) for pair in pairs])
    touching = touching[touching[:, 0] != touching[:, 1]]
    return np.unique(np.sort(touching, axis=1), axis=0).tolist()


# EdgeBoxes.


def edge_boxes(image: np.ndarray) -> Results:
    """OpenCV's EdgeBoxes (Zitnick and Dollár, ECCV 2014) on thinned color gradients: boxes only.

    The paper's edges are those of a structured forest, for which no package with weights was found.
    """
    boxes, scores = XIMGPROC.createEdgeBoxes(maxBoxes=MAX_PROPOSALS).getBoundingBoxes(
        *find_edges(image)
    )
    for box, score in zip(boxes.tolist(), scores.ravel().tolist(), strict=True):
        yield {"score": score, "bbox": box}


def find_edges(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Edges (H, W) in [0, 1], a pixel thin, and the direction across them in [0, pi)."""
    lab = cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_BGR2Lab)
    smooth = cv2.GaussianBlur(lab, (0, 0), EDGE_SIGMA)
    dx, dy = cv2.Sobel(smooth, -1, 1, 0), cv2.Sobel(smooth, -1, 0, 1)
    strongest = np.hypot(dx, dy).argmax(axis=2)[..., None]  # of the three channels
    dx, dy = (np.take_along_axis(d, strongest, axis=2)[..., 0] for d in (dx, dy))
    strength = np.hypot(dx, dy)
    y, x = np.indices(strength.shape, np.float32)
    unit = np.maximum(strength, 1e-6)
    sides = [
        cv2.remap(strength, x + s * dx / unit, y + s * dy / unit, cv2.INTER_LINEAR) for s in (-1, 1)
    ]
    thin = np.where(strength >= np.maximum(*sides), strength, 0)
    edges = np.minimum(thin / max(float(np.percentile(strength, STRONG_EDGES)), 1e-6), 1)
    return edges, np.arctan2(dy, dx) % np.pi


METHODS = {
    "selective_search": selective_search,
    "opencv_selective_search": opencv_selective_search,
    "edge_boxes": edge_boxes,
}

if __name__ == "__main__":
    main()
