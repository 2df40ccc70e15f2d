#!/usr/bin/env python
"""Draws a contact sheet of training patches, to see at a glance whether the data is right.

    python tools/show_patches.py --config configs/coco_mini.yaml --output sheet.png

Mask patches come first, with their target's outline; then score patches, framed green (positive)
or red (negative). The number is the scale by which the image was resized. The thin square is the
patch, without the context around it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets.object_sizes import ObjectSides
from pipeline.command import add_config, local_path, make_parser, run_tool
from pipeline.data import load_split, patch_dataset, prepare_data
from pipeline.inference.patch_sheet import patch_sheet
from pipeline.inference.visualize import save_picture
from pipeline.recipe import load_config
from pipeline.sizes import choose_by_data, say_sizes


def main() -> None:
    """Draws the sheet."""
    parser = make_parser(__doc__)
    add_config(parser)
    parser.add_argument("--output", required=True, type=local_path, help="the PNG to write")
    parser.add_argument("--split", choices=("train", "val"), default="train")
    parser.add_argument(
        "--count", type=int, default=24, help="mask patches, and as many score patches"
    )
    parser.add_argument("--seed", type=int, help="other patches (default: the recipe's seed)")
    args = parser.parse_args()

    seed = [] if args.seed is None else [f"seed={args.seed}"]
    config = choose_by_data(load_config(args.config, args.set + seed))
    prepare_data(config)
    splits = {
        split: patch_dataset(
            config.deepmask,
            *load_split(config, split),
            sampling=config.deepmask.sampling,
            target_size=config.deepmask.target_size,
            seed=config.seed,
        )
        for split in dict.fromkeys(("train", args.split))
    }
    # Training objects decide the scales, also those of negatives.
    sampler = splits["train"].sampler
    low, high, _ = say_sizes(ObjectSides.measure(sampler), config, sampler.canonical)
    data = splits[args.split]
    data.sampler.draw_negatives_at(low, high)
    save_picture(patch_sheet(data, count=args.count), args.output)
    print(f"{2 * args.count} patches drawn in {args.output}")


if __name__ == "__main__":
    run_tool(main)
