#!/usr/bin/env python
r"""AR of proposals and AP of detections beside pycocotools, in seconds of the CPU.

    python tools/benchmarks/scoring.py --images 50 --num-proposals 1000

Synthetic objects, and results of which half are shifted copies of objects. Both go from a list of
results to all metrics. (A val2017 has 5000 images; both grow in proportion.)
"""

import contextlib
import io
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from datasets.files import write_json
from pipeline.command import run_tool
from pipeline.evaluation.ground_truth import IOU_TYPES, load_ground_truth
from pipeline.evaluation.precision import evaluate_detections
from pipeline.evaluation.recall import NUM_PROPOSALS, evaluate_proposals
from tools.benchmarks.synthetic import HEIGHT, WIDTH, draw_boxes, draw_dataset, draw_polygon
from tools.benchmarks.timing import Calls, compare, make_parser, report

RECALL: dict = {"useCats": 0, "maxDets": list(NUM_PROPOSALS)}


def main() -> None:
    """Scores synthetic results by both."""
    parser = make_parser(__doc__, rounds=2, images=50, num_proposals=1000, num_detections=100)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    dataset = draw_dataset(rng, args.images)
    proposals = draw_results(rng, dataset, args.num_proposals)
    detections = draw_results(rng, dataset, args.num_detections)
    with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stdout(io.StringIO()):
        path = Path(directory) / "instances.json"
        write_json(path, dataset)
        truth, their_truth = load_ground_truth(path), COCO(path)
    calls: dict[str, Calls] = {}
    for iou_type in IOU_TYPES:
        calls[f"AR, {iou_type}"] = {
            "pycocotools": partial(run_pycocotools, their_truth, proposals, iou_type, **RECALL),
            "ours": partial(evaluate_proposals, truth, proposals, iou_types=(iou_type,)),
        }
    calls["AP, box and mask"] = {
        "pycocotools": lambda: [run_pycocotools(their_truth, detections, t) for t in IOU_TYPES],
        "ours": partial(evaluate_detections, truth, detections),
    }
    report({name: compare(each, rounds=args.rounds) for name, each in calls.items()}, args.output)


def run_pycocotools(
    truth: COCO, results: list[dict], iou_type: str, **params: int | list[int]
) -> COCOeval:
    """Evaluates boxes or masks, the latter by their own area; with `RECALL` as proposals."""
    # Given boxes, it takes the box's area for the mask's.
    dropped = "bbox" if iou_type == "mask" else "segmentation"
    copies = [{k: v for k, v in result.items() if k != dropped} for result in results]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, truth.loadRes(copies), IOU_TYPES[iou_type])
        vars(evaluation.params).update(params)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def draw_results(rng: np.random.Generator, dataset: dict, count: int) -> list[dict]:
    """`count` results an image, with boxes and masks: half near objects, half anywhere."""
    results = []
    for image in dataset["images"]:
        objects = [a for a in dataset["annotations"] if a["image_id"] == image["id"]]
        drawn = rng.choice(np.array(objects), count)
        boxes = np.array([annotation["bbox"] for annotation in drawn])
        boxes[:, :2] += rng.normal(0, 0.1, (count, 2)) * boxes[:, 2:]
        boxes[:, 2:] *= np.exp(rng.normal(0, 0.15, (count, 2)))
        boxes[::2] = draw_boxes(rng, len(boxes[::2]), HEIGHT, WIDTH)
        outlines = [draw_polygon(rng, box) for box in boxes]
        rles = coco_mask.frPyObjects(outlines, HEIGHT, WIDTH)
        for annotation, rle in zip(drawn, rles, strict=True):
            results.append({
                "image_id": image["id"], "category_id": annotation["category_id"],
                "score": round(rng.random(), 6), "bbox": list(coco_mask.toBbox(rle)),
                "segmentation": rle | {"counts": rle["counts"].decode()},
            })  # fmt: skip
    return results


if __name__ == "__main__":
    run_tool(main)
