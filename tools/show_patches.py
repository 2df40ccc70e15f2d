#!/usr/bin/env python
"""Draws a contact sheet of training patches: see in five seconds whether the data is right.

    python tools/show_patches.py --config configs/coco_mini.yaml --output sheet.png

Mask patches come first, with their target's outline; then score patches, framed green (positive)
or red (negative). The number is the scale: the factor by which the image was resized. The thin
square is the patch that the mask covers.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.command import run_tool
from pipeline.data import load_split, patch_dataset, prepare_data
from pipeline.inference.patch_sheet import patch_sheet
from pipeline.inference.visualize import save_picture
from pipeline.recipe import load_config


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="a recipe, see configs/")
    parser.add_argument("--output", required=True, type=Path, help="the PNG to write")
    parser.add_argument(
        "--set", nargs="+", default=[], action="extend", metavar="KEY=VALUE", help="overrides"
    )
    parser.add_argument("--split", choices=("train", "val"), default="train")
    parser.add_argument("--count", type=int, default=24, help="patches of each kind")
    parser.add_argument("--seed", type=int, help="other patches (default: the config's seed)")
    args = parser.parse_args()

    seed = [] if args.seed is None else [f"seed={args.seed}"]
    config = load_config(args.config, args.set + seed)
    prepare_data(config)
    c = config.deepmask
    data = patch_dataset(
        c,
        *load_split(config, args.split),
        sampling=c.sampling,
        target_size=c.target_size,
        seed=config.seed,
    )
    save_picture(patch_sheet(data, count=args.count), args.output)
    print(f"{2 * args.count} patches drawn in {args.output}")


if __name__ == "__main__":
    run_tool(main)
