#!/usr/bin/env python
r"""Cuts a small COCO-format dataset out of a full download: some images and their annotations.

    python tools/subset_coco.py --annotations annotations/instances_train2017.json \
        --images train2017 --num-images 340 --output data/my-mini
    python tools/subset_coco.py --annotations annotations/instances_val2017.json \
        --images val2017 --num-images 80 --split val --output data/my-mini

Half of the images are drawn from all, the others so that rare categories are there as well.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets.coco import CocoInstances
from datasets.subset import cut_subset
from pipeline.command import local_path, make_parser, run_tool


def main() -> None:
    """Cuts the dataset and sums it up."""
    parser = make_parser(__doc__)
    parser.add_argument("--annotations", required=True, help="COCO instances json")
    parser.add_argument("--images", required=True, help="the folder of its images")
    parser.add_argument(
        "--output", required=True, type=local_path, help="gets annotations/ and images/"
    )
    parser.add_argument("--num-images", required=True, type=int)
    parser.add_argument("--split", default="train", help="name in the new json and image folder")
    parser.add_argument("--seed", type=int, default=0, help="other images")
    args = parser.parse_args()

    path, broken = cut_subset(**vars(args))
    for message in broken:
        print(f"left out: {message}")
    print(CocoInstances.load(path).summary())


if __name__ == "__main__":
    run_tool(main)
