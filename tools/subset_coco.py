#!/usr/bin/env python
r"""Cuts a small COCO-format dataset out of a full download: some images and their annotations.

    python tools/subset_coco.py --annotations annotations/instances_train2017.json \
        --images train2017 --num-images 340 --output data/my-mini
    python tools/subset_coco.py --annotations annotations/instances_val2017.json \
        --images val2017 --num-images 80 --split val --output data/my-mini

Half of the images are drawn from all, the others so that rare categories are there as well. Those
that the weights in the box were trained and scored on are named in models/pretrained: --image-ids.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets.coco import CocoInstances
from datasets.subset import cut_subset, read_ids
from pipeline.command import local_path, make_parser, run_tool


def main() -> None:
    """Cuts the dataset and sums it up."""
    parser = make_parser(__doc__)
    parser.add_argument("--annotations", required=True, help="COCO instances json")
    parser.add_argument("--images", required=True, help="the folder of its images")
    parser.add_argument(
        "--output", required=True, type=local_path, help="gets annotations/ and images/"
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--num-images", type=int, help="so many, with rare categories more often")
    which.add_argument("--image-ids", metavar="TXT", help="those of the ids in this file")
    parser.add_argument(
        "--split", default="train", help="name in the new json and image folder (default: train)"
    )
    parser.add_argument("--seed", type=int, default=0, help="other images (default: 0)")
    args = parser.parse_args()

    options = vars(args)
    if args.image_ids is not None:
        options["image_ids"] = read_ids(args.image_ids)
    path, broken = cut_subset(**options)
    for message in broken:
        print(f"left out: {message}")
    print(CocoInstances.load(path).summary())


if __name__ == "__main__":
    run_tool(main)
