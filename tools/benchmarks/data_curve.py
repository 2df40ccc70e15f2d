#!/usr/bin/env python
r"""Average recall by the number of training images: whether more images would help.

    python tools/benchmarks/data_curve.py --config configs/coco_mini.yaml \
        --images 40 85 170 340 --seeds 2 --plot curve.svg

DeepMask and SharpMask are trained by the same recipe, for as many minibatches, on nested subsets of
the recipe's training images and scored on all of its validation images. A seed is that of the
subsets and of the training. Every subset takes an hour or so on two cores; with --coarse, DeepMask
alone is trained. Started again with the same --work-dir, it continues.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from datasets.coco_file import read_json
from datasets.files import write_atomically
from pipeline.command import add_config, add_device, run_tool
from pipeline.data import prepare_data, split_files
from pipeline.recipe import load_config
from tools.benchmarks.mask_stages import (
    add_coarse,
    markdown,
    over_seeds,
    recall_of_recipe,
    trained_stages,
)
from tools.benchmarks.timing import Rows, make_parser, report


def main() -> None:
    """Trains on every subset and prints the curve."""
    parser = make_parser(
        __doc__, images=[40, 85, 170, 340], seeds=1, work_dir=Path("runs/data_curve")
    )
    add_config(parser)
    parser.add_argument("--plot", type=Path, help="picture to write, .svg or .png")
    add_coarse(parser)
    add_device(parser)
    args = parser.parse_args()

    config = load_config(args.config, args.set)
    prepare_data(config)
    annotations, images = split_files(config, "train")
    content = read_json(annotations)
    rows: Rows = {}
    for count in sorted(args.images):
        scores: list[dict[str, float]] = []
        for seed in range(args.seeds):
            output = args.work_dir / f"seed{seed}" / f"{count}_images"
            subset = output / "instances_train.json"
            write_atomically(subset, json.dumps(cut(content, count, seed=seed)).encode())
            val_annotations, val_images = split_files(config, "val")
            settings = {
                "seed": seed,
                "data.shapes": "null",
                "data.train.annotations": subset,
                "data.train.images": images,
                "data.val.annotations": val_annotations,
                "data.val.images": val_images,
            }
            print(f"\n{count} images, seed {seed}", flush=True)
            scores.append(
                recall_of_recipe(
                    args.config,
                    output,
                    settings,
                    overrides=args.set,
                    device=args.device,
                    stages=trained_stages(args),
                )
            )
        rows[str(count)] = over_seeds(scores)
    report({"images": rows}, args.output)
    print(f"\n{markdown(rows, 'training images')}")
    if args.plot:
        plot(rows, args.plot)


def cut(content: dict[str, Any], count: int, *, seed: int) -> dict[str, Any]:
    """A COCO json with `count` of its images; those of a smaller count are among them.

    Raises:
        ValueError: it has fewer.
    """
    ids = sorted(image["id"] for image in content["images"])
    if not 1 <= count <= len(ids):
        raise ValueError(f"--images {count}: the training split has {len(ids)}")
    chosen = {ids[i] for i in np.random.default_rng(seed).permutation(len(ids))[:count]}
    return content | {
        "images": [image for image in content["images"] if image["id"] in chosen],
        "annotations": [a for a in content["annotations"] if a["image_id"] in chosen],
    }


def plot(rows: Rows, path: Path) -> None:
    """Mask AR by the number of training images, which doubles from tick to tick."""
    figure = Figure(figsize=(4.6, 3.3), layout="constrained")
    axes, counts = figure.add_subplot(), [int(count) for count in rows]
    for k in (1000, 100, 10):
        values = [row[f"mask AR@{k}"] for row in rows.values()]
        spread = [row.get(f"±mask AR@{k}", 0) for row in rows.values()]
        axes.errorbar(counts, values, yerr=spread, fmt="o-", capsize=3, label=f"AR@{k}")
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set(xlabel="training images", ylabel="mask average recall", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    run_tool(main)
