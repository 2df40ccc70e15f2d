#!/usr/bin/env python
r"""Recall against seconds of pyramids: fewer scales find fewer objects in less time.

    python tools/benchmarks/pyramids.py --annotations instances_val.json --images val

Average recall is that of the first precision. Seconds are medians over images of the most frequent
size.
"""

import argparse
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from datasets.coco import CocoInstances
from datasets.images import read_image
from pipeline.command import run_tool
from pipeline.evaluation.ground_truth import load_ground_truth
from pipeline.evaluation.recall import evaluate_proposals
from pipeline.inference.memory import keep_freed_blocks
from pipeline.inference.openvino import run_in_8_bits
from pipeline.inference.proposals import results_of
from pipeline.inference.propose import Proposer, load_proposer
from pipeline.pretrained import pretrained_checkpoint
from tools.benchmarks.timing import Rows, make_parser, report

PYRAMIDS = ["-2.5 1 .5", "-2.5 .5 .5", "-2 1 1", "-2.5 .5 1", "-1.5 .5 1"]
INT8 = "int8"


def main() -> None:
    """Measures every pyramid."""
    parser = make_parser(
        __doc__,
        pyramids=PYRAMIDS,
        precisions=["fp32", "bf16", INT8],
        work_dir=Path("runs/pyramids"),
    )
    parser.add_argument("--checkpoint", help="default: the one in models/pretrained")
    parser.add_argument("--annotations", required=True, metavar="COCO.json")
    parser.add_argument("--images", required=True, type=Path)
    parser.add_argument("--num-timed", type=int, default=8, help="images (default: 8)")
    args = parser.parse_args()
    keep_freed_blocks()
    rows: Rows = {pyramid: measure(pyramid, args) for pyramid in args.pyramids}
    report({"log2 scales: low high step": rows}, args.output)


def measure(pyramid: str, args: argparse.Namespace) -> dict[str, float]:
    """Recall of one pyramid, in percent, and its seconds by precision."""
    coco = CocoInstances.load(args.annotations)
    files = [args.images / coco.file_name(row) for row in range(len(coco))]
    sizes = list(map(tuple, coco.image_sizes.tolist()))
    ((usual, _),) = Counter(sizes).most_common(1)
    timed = [file for file, size in zip(files, sizes, strict=True) if size == usual]
    low, high, step = map(float, pyramid.split())
    row: dict[str, float] = {}
    for precision in args.precisions:
        proposer, _ = load_proposer(
            args.checkpoint or pretrained_checkpoint("sharpmask"),
            torch.device("cpu"),
            log2_scales=(low, high, step),
            precision="auto" if precision == INT8 else precision,  # masks are decoded in it
        )
        if precision == INT8:
            name = pyramid.replace(" ", "_")
            run_in_8_bits(proposer, files, args.work_dir / name / "dense.xml")
        if not row:
            truth = load_ground_truth(args.annotations, needs_object=True)
            metrics = evaluate_proposals(truth, proposed(proposer, coco, files)).metrics()
            for iou_type in ("mask", "box"):
                for k in (10, 100, 1000):
                    value = metrics[iou_type][f"AR@{k}"]
                    assert value is not None  # there is an object
                    row[f"{iou_type} AR@{k}"] = 100 * value
        row[f"{precision}, s"] = seconds(proposer, timed[: args.num_timed])
    return row


def proposed(proposer: Proposer, coco: CocoInstances, files: list[Path]) -> Iterator[dict]:
    """Results for all images, one after the other."""
    for image_id, file in zip(coco.image_ids.tolist(), files, strict=True):
        yield from results_of(proposer(read_image(file), image_id=image_id))


def seconds(proposer: Proposer, files: list[Path]) -> float:
    """Of an image, the median; one more warms up."""
    times = []
    for file in [files[0], *files]:
        image = read_image(file)
        start = time.perf_counter()
        proposer(image)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


if __name__ == "__main__":
    run_tool(main)
