#!/usr/bin/env python
r"""Average recall of 1000 proposals an image: `evaluate_proposals` beside pycocotools' COCOeval.

    python tools/benchmarks/scoring.py --box-images 5000 --mask-images 500

Synthetic objects and proposals, half of them shifted copies of objects, in sets of 50 images
(pycocotools holds all results as dicts). Each set is scored by both, one after the other, and the
recalls are compared. Seconds are of the CPU, which both use one of; pycocotools' are evaluate and
accumulate alone, without its loadRes, ours are everything, checks of the results too. Both grow
linearly with the images, so the seconds for 5000 are the mean times 5000.
"""

import argparse
import contextlib
import io
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from datasets.files import write_json
from pipeline.command import run_tool
from pipeline.evaluation.recall import IOU_TYPES, evaluate_proposals, load_ground_truth

HEIGHT, WIDTH = 480, 640
OBJECTS = 7.3  # of an image, the mean of COCO
CROWD_SHARE = 0.012
POINTS = 24  # of an outline
COUNTS = [10, 100, 1000]
SET = 50  # images scored at once
WHOLE = 5000  # images of val2017


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--box-images", type=int, default=200)
    parser.add_argument("--mask-images", type=int, default=200)
    parser.add_argument("--num-proposals", type=int, default=1000)
    parser.add_argument("--output", type=Path, help="write the figures as json")
    args = parser.parse_args()
    figures = {}
    for kind, images in (("box", args.box_images), ("mask", args.mask_images)):
        figures[kind] = measure(kind, images, args.num_proposals)
        words = ", ".join(f"{name} {value:.4g}" for name, value in figures[kind].items())
        print(f"{kind}: {words}", flush=True)
    if args.output:
        write_json(args.output, figures)


def measure(kind: str, images: int, num_proposals: int) -> dict[str, float]:
    """CPU seconds of both, and the largest difference between their recalls."""
    rng = np.random.default_rng(0)
    theirs = ours = difference = 0.0
    for start in range(0, images, SET):
        dataset, results = draw_set(rng, kind, min(SET, images - start), num_proposals)
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "instances.json"
            write_json(path, dataset)
            ground_truth = load_ground_truth(path)
            begin = time.process_time()
            scores = evaluate_proposals(ground_truth, results, kinds=(kind,))
            ours += time.process_time() - begin
            seconds, expected = score_by_pycocotools(path, results, kind)
            theirs += seconds
        recall = scores.recall[kind][:, [count - 1 for count in COUNTS]]  # (T, M, A)
        difference = max(difference, float(np.abs(recall - expected).max()))
    return {
        "images": images,
        "pycocotools, seconds for 5000 images": theirs / images * WHOLE,
        "ours, seconds for 5000 images": ours / images * WHOLE,
        "times as fast": theirs / ours,
        "largest difference in recall": difference,
    }


def score_by_pycocotools(path: Path, results: list[dict], kind: str) -> tuple[float, np.ndarray]:
    """CPU seconds of COCOeval and the recalls that it gives, (T, M, A)."""
    with contextlib.redirect_stdout(io.StringIO()):
        ground_truth = COCO(path)
        evaluation = COCOeval(ground_truth, ground_truth.loadRes(results), IOU_TYPES[kind])
        evaluation.params.useCats = 0
        evaluation.params.maxDets = COUNTS
        begin = time.process_time()
        evaluation.evaluate()
        evaluation.accumulate()
    seconds = time.process_time() - begin
    return seconds, evaluation.eval["recall"][:, 0].transpose(0, 2, 1)


def draw_set(
    rng: np.random.Generator, kind: str, images: int, num_proposals: int
) -> tuple[dict, list[dict]]:
    """A COCO data set and results for it, with boxes or with masks."""
    annotations, results = [], []
    for image_id in range(1, images + 1):
        objects = draw_boxes(rng, max(1, rng.poisson(OBJECTS)))
        for box, rle in zip(objects.tolist(), draw_masks(rng, objects), strict=True):
            annotations.append({
                "id": len(annotations) + 1, "image_id": image_id, "bbox": box, "segmentation": rle,
                "area": float(coco_mask.area(rle)), "category_id": int(rng.integers(1, 4)),
                "iscrowd": int(rng.random() < CROWD_SHARE),
            })  # fmt: skip
        proposals = draw_proposals(rng, objects, num_proposals)
        if kind == "box":
            regions = [{"bbox": box} for box in proposals.tolist()]
        else:
            rles = draw_masks(rng, proposals)
            boxes = [coco_mask.toBbox(rle).tolist() for rle in rles]
            regions = [
                {"segmentation": rle, "bbox": box} for rle, box in zip(rles, boxes, strict=True)
            ]
        scores = rng.random(num_proposals).round(6).tolist()
        results += [
            {"image_id": image_id, "category_id": 1, "score": score, **region}
            for score, region in zip(scores, regions, strict=True)
        ]
    return {
        "images": [
            {"id": n, "file_name": f"{n}.jpg", "height": HEIGHT, "width": WIDTH}
            for n in range(1, images + 1)
        ],
        "categories": [{"id": n, "name": str(n)} for n in range(1, 4)],
        "annotations": annotations,
    }, results


def draw_boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    """Boxes of all sizes in the image, (count, 4) xywh."""
    sizes = np.exp(rng.uniform(np.log(12), np.log([WIDTH * 0.8, HEIGHT * 0.8]), (count, 2)))
    corners = rng.uniform(0, [WIDTH, HEIGHT] - sizes)
    return np.concatenate([corners, sizes], axis=1).round(2)


def draw_proposals(rng: np.random.Generator, objects: np.ndarray, count: int) -> np.ndarray:
    """Half shifted and resized copies of objects, half anywhere, (count, 4) xywh."""
    copies = objects[rng.integers(len(objects), size=count)]
    copies[:, :2] += rng.normal(0, 0.1, (count, 2)) * copies[:, 2:]
    copies[:, 2:] *= np.exp(rng.normal(0, 0.15, (count, 2)))
    is_copy = rng.random(count) < 0.5
    return np.where(is_copy[:, None], copies, draw_boxes(rng, count)).round(2)


def draw_masks(rng: np.random.Generator, boxes: np.ndarray) -> list[dict]:
    """A star-shaped mask in each box, as RLE with counts as text, as results files have them."""
    angles = np.linspace(0, 2 * np.pi, POINTS, endpoint=False)
    half = boxes[:, None, 2:] / 2 * rng.uniform(0.8, 1, (len(boxes), POINTS, 1))
    points = boxes[:, None, :2] + boxes[:, None, 2:] / 2
    points = points + half * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    outlines = points.clip(0, [WIDTH - 1, HEIGHT - 1]).reshape(len(boxes), -1).tolist()
    rles = coco_mask.frPyObjects(outlines, HEIGHT, WIDTH)
    return [rle | {"counts": rle["counts"].decode()} for rle in rles]


if __name__ == "__main__":
    run_tool(main)
