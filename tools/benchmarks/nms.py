#!/usr/bin/env python
r"""NMS and Soft-NMS of the masks of ever larger images, in seconds of the CPU.

    python tools/benchmarks/nms.py --num-proposals 1000 2500 5000 10000 20000

The density is constant, 1000 proposals on 640x480 pixels; half are shifted copies of objects. So
the time for a mask should be, too.
"""

import statistics
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pycocotools.mask as coco_mask

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pipeline.command import run_tool
from pipeline.inference.nms import mask_nms, soft_mask_nms
from pipeline.inference.proposals import Proposals
from tools.benchmarks.synthetic import HEIGHT, OBJECTS, WIDTH, draw_boxes, draw_polygon
from tools.benchmarks.timing import Calls, Rows, interleave, make_parser, report

DENSITY = 1000  # proposals on an image of COCO's size


def main() -> None:
    """Measures NMS for several numbers of proposals."""
    parser = make_parser(
        __doc__, rounds=5, num_proposals=[1000, 2500, 5000, 10_000, 20_000], nms=[0.5, 0.7]
    )
    args = parser.parse_args()
    tables: dict[str, Rows] = {}
    for iou in args.nms:
        rows: Rows = {}
        tables[f"mask IoU {iou:g}"] = rows
        for count in args.num_proposals:
            found = draw_proposals(np.random.default_rng(0), count)
            kept = len(mask_nms(found, iou))
            calls: Calls = {
                "NMS": partial(mask_nms, found, iou),
                "Soft-NMS": partial(soft_mask_nms, found, iou),
            }
            rounds = interleave(calls, rounds=args.rounds, clock=time.process_time)
            row = rows[f"{count} on {found.width}x{found.height}"] = {"kept by NMS": kept}
            for name, seconds in rounds.items():
                median = statistics.median(seconds)
                row |= {f"{name}: seconds": median, f"{name}: us a mask": 1e6 * median / count}
    report(tables, args.output)


def draw_proposals(rng: np.random.Generator, count: int) -> Proposals:
    """Proposals of an image that is as large as makes the density constant."""
    side = max(1, count / DENSITY) ** 0.5
    size = height, width = round(side * HEIGHT), round(side * WIDTH)

    def draw(count: int) -> np.ndarray:
        boxes = draw_boxes(rng, count, HEIGHT, WIDTH)
        boxes[:, :2] += rng.uniform(0, [width - WIDTH, height - HEIGHT], (count, 2))
        return boxes

    boxes = rng.choice(draw(round(OBJECTS * side**2)), count)
    boxes[:, :2] += rng.normal(0, 0.1, (count, 2)) * boxes[:, 2:]
    boxes[:, 2:] *= np.exp(rng.normal(0, 0.15, (count, 2)))
    boxes[::2] = draw(len(boxes[::2]))
    outlines = [draw_polygon(rng, box, size) for box in boxes]
    rles = coco_mask.frPyObjects(outlines, height, width)
    corners = np.array(coco_mask.toBbox(rles))
    corners[:, 2:] += corners[:, :2]
    logits = np.linspace(5, -5, count, dtype=np.float32)
    strings = [rle["counts"] for rle in rles]
    return Proposals(1, "polygons", height, width, logits, corners.astype(np.float32), strings)


if __name__ == "__main__":
    run_tool(main)
