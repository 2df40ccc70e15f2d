#!/usr/bin/env python
r"""AR of proposals and AP of detections beside pycocotools: seconds of the CPU, and differences.

    python tools/benchmarks/scoring.py --images 50 --num-proposals 1000

Synthetic objects, and results of which half are shifted copies of objects. Both go from a list of
results to the metrics of boxes and masks. (A val2017 has 5000 images; both grow in proportion.)
"""

import contextlib
import io
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from datasets.files import write_json
from pipeline.command import run_tool
from pipeline.evaluation.ground_truth import load_ground_truth
from pipeline.evaluation.precision import METRICS, evaluate_detections
from pipeline.evaluation.recall import evaluate_proposals
from tools.benchmarks.synthetic import draw_boxes, draw_dataset, draw_polygon
from tools.benchmarks.timing import interleave, make_parser, median_ratio, report

CATEGORIES = 10
MAX_PROPOSALS = (10, 100, 1000)
IOU_TYPES = {"box": "bbox", "mask": "segm"}  # ours and pycocotools'
Metrics = Mapping[str, Mapping[str, float | None]]


def main() -> None:
    """Scores synthetic results by both."""
    parser = make_parser(__doc__, rounds=2)
    parser.add_argument("--images", type=int, default=50)
    parser.add_argument("--num-proposals", type=int, default=1000, help="of an image, for AR")
    parser.add_argument("--num-detections", type=int, default=100, help="of an image, for AP")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    dataset = draw_dataset(rng, args.images, categories=CATEGORIES)
    proposals = draw_results(rng, dataset, args.num_proposals)
    detections = draw_results(rng, dataset, args.num_detections)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "instances.json"
        write_json(path, dataset)
        truth = load_ground_truth(path)
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
            their_truth = COCO(path)
        rows = {
            "AR": compare(
                lambda: evaluate_proposals(truth, proposals).metrics(),
                partial(run_pycocotools, their_truth, proposals, average_recall),
                rounds=args.rounds,
            ),
            "AP": compare(
                lambda: evaluate_detections(truth, detections).metrics(),
                partial(run_pycocotools, their_truth, detections, coco_summary),
                rounds=args.rounds,
            ),
        }
    report({f"{args.images} images": rows}, args.output)


def compare(
    ours: Callable[[], Metrics], theirs: Callable[[], Metrics], *, rounds: int
) -> dict[str, float]:
    """Seconds of both, and the largest difference between their metrics."""
    expected, values = theirs(), ours()
    seconds = interleave({"ours": ours, "theirs": theirs}, rounds=rounds, clock=time.process_time)
    return {
        "pycocotools, s": statistics.median(seconds["theirs"]),
        "ours, s": statistics.median(seconds["ours"]),
        "times as fast": median_ratio(seconds["theirs"], seconds["ours"]),
        "largest difference": max(
            abs((values[iou_type][name] or 0.0) - max(value or 0.0, 0.0))  # theirs is -1 for None
            for iou_type, metrics in expected.items()
            for name, value in metrics.items()
        ),
    }


def run_pycocotools(
    truth: COCO, results: list[dict], evaluate: Callable[[COCOeval], dict[str, float]]
) -> Metrics:
    """Metrics by IoU type, as `evaluate` has COCOeval compute them."""
    metrics = {}
    for iou_type, name in IOU_TYPES.items():
        # Given boxes, it takes the box's area for the mask's.
        dropped = "bbox" if iou_type == "mask" else "segmentation"
        copies = [{k: v for k, v in result.items() if k != dropped} for result in results]
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation = COCOeval(truth, truth.loadRes(copies), name)
            metrics[iou_type] = evaluate(evaluation)
    return metrics


def average_recall(evaluation: COCOeval) -> dict[str, float]:
    """AR by number of proposals, without categories."""
    evaluation.params.useCats, evaluation.params.maxDets = 0, list(MAX_PROPOSALS)
    evaluation.evaluate()
    evaluation.accumulate()
    average = evaluation.eval["recall"][:, 0, 0].mean(axis=0)  # over the IoU thresholds
    return {f"AR@{k}": v for k, v in zip(MAX_PROPOSALS, average, strict=True)}


def coco_summary(evaluation: COCOeval) -> dict[str, float]:
    """COCO's AP and AR."""
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return dict(zip(METRICS, evaluation.stats, strict=False))


def draw_results(rng: np.random.Generator, dataset: dict, count: int) -> list[dict]:
    """`count` results an image, with boxes and masks.

    Half are shifted and resized copies of objects, half are anywhere.
    """
    objects = defaultdict(list)
    for annotation in dataset["annotations"]:
        objects[annotation["image_id"]].append(annotation)
    results = []
    for image in dataset["images"]:
        height, width = image["height"], image["width"]
        drawn = [
            objects[image["id"]][i] for i in rng.integers(len(objects[image["id"]]), size=count)
        ]
        boxes = np.array([annotation["bbox"] for annotation in drawn])
        boxes[:, :2] += rng.normal(0, 0.1, (count, 2)) * boxes[:, 2:]
        boxes[:, 2:] *= np.exp(rng.normal(0, 0.15, (count, 2)))
        elsewhere = draw_boxes(rng, count, height, width)
        boxes = np.where(rng.random((count, 1)) < 0.5, boxes, elsewhere)
        outlines = [draw_polygon(rng, box, height, width) for box in boxes]
        rles = coco_mask.frPyObjects(outlines, height, width)
        for annotation, rle in zip(drawn, rles, strict=True):
            results.append({
                "image_id": image["id"], "category_id": annotation["category_id"],
                "score": round(rng.random(), 6), "bbox": list(coco_mask.toBbox(rle)),
                "segmentation": rle | {"counts": rle["counts"].decode()},
            })  # fmt: skip
    return results


if __name__ == "__main__":
    run_tool(main)
