#!/usr/bin/env python
r"""Scores results against COCO annotations.

    python tools/score_coco.py proposals --annotations instances_val.json \
        --results runs/photos --output runs/photos/scores
    python tools/score_coco.py detections --annotations instances_val.json \
        --results runs/photos/detections.json --output runs/photos/scores
    python tools/score_coco.py patches --annotations instances_val.json \
        --images val --checkpoint best.pt --output runs/patches

Each writes metrics.json and tables into --output, and proposals also plots, recall.png. With
--categories person car only these count.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.command import add_device, local_path, make_parser, run_tool
from pipeline.evaluation.scores import score_detections, score_patches, score_proposals
from pipeline.report.plots import save_recall_plots


def main() -> None:
    """Scores the results."""
    parser = make_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    proposals = commands.add_parser(
        "proposals", help="average recall (AR) of class-agnostic proposals, by box and by mask"
    )
    proposals.add_argument("--results", required=True, help="proposal store or COCO results json")
    proposals.add_argument(
        "--no-perfect-ranking",
        dest="perfect_ranking",
        action="store_false",
        help="skip the second score, of the same masks in the best possible order",
    )

    detections = commands.add_parser(
        "detections",
        help="average precision (AP) by category, by box and, if given, by mask",
        description="Writes COCO's AP and AR (metrics.json), the same by category "
        "(categories.json and .csv) and tables of both (scores.txt), with PASCAL VOC's AP50 of "
        "boxes by the whole area under the curve: box_VOC_AP50 by category, their mean voc_ap50 in "
        'curves.json. Objects that the json marks "ignore": 1 are VOC\'s difficult ones, which '
        "count neither as missed nor as false in VOC's AP50; COCO's AP counts them like any other.",
    )
    detections.add_argument("--results", required=True, help="COCO results json")

    patches = commands.add_parser("patches", help="mask IoU and score accuracy on single patches")
    patches.add_argument("--images", required=True, help="the folder of the annotated images")
    patches.add_argument("--checkpoint", required=True)
    patches.add_argument(
        "--batches", type=int, default=64, help="minibatches, half mask and half score patches"
    )
    patches.add_argument("--workers", type=int, default=2)
    add_device(patches)

    for command in (proposals, detections, patches):
        command.add_argument("--annotations", required=True, help="COCO instances json")
        command.add_argument(
            "--output", required=True, type=local_path, help="folder of the tables"
        )
        command.add_argument(
            "--categories",
            nargs="+",
            metavar="NAME",
            help="only objects of these, names or ids as in the annotations (default: all)",
        )
    args = parser.parse_args()

    if args.command == "proposals":
        score_proposals(
            args.annotations,
            args.results,
            args.output,
            chosen=args.categories,
            perfect_ranking=args.perfect_ranking,
        )
        save_recall_plots(args.output, perfect_ranking=args.perfect_ranking)
    elif args.command == "detections":
        score_detections(args.annotations, args.results, args.output, chosen=args.categories)
    else:
        score_patches(
            args.annotations,
            args.images,
            args.checkpoint,
            args.output,
            chosen=args.categories,
            batches=args.batches,
            workers=args.workers,
            device=torch.device(args.device),
        )


if __name__ == "__main__":
    run_tool(main)
