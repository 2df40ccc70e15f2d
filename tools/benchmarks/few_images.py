#!/usr/bin/env python
r"""What each part of the recipe for few images adds: recall without it, by seed.

    python tools/benchmarks/few_images.py --config configs/coco_mini.yaml --seeds 2

Every variant trains DeepMask and SharpMask, which takes an hour or two on two cores; with --coarse
DeepMask alone. Started again with the same --work-dir, it continues.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pipeline.command import add_config, add_device, run_tool
from pipeline.recipe import config_to_dict, flatten, load_config
from tools.benchmarks.mask_stages import (
    MASK_STAGES,
    add_coarse,
    markdown,
    over_seeds,
    recall_of_changed,
    recall_of_recipe,
    trained_stages,
)
from tools.benchmarks.timing import Rows, make_parser, report


def of_both(setting: str, value: str) -> dict[str, str]:
    """The same setting of both mask stages."""
    return {f"{stage}.{setting}": value for stage in MASK_STAGES}


def as_trained(content: dict[str, Any]) -> None:
    """Weights of the last minibatch instead of their average."""
    content["model"] = content["trained_model"]


def proposing(**options: Any) -> Callable[[dict[str, Any]], None]:
    """Other options of proposals."""
    return lambda content: content["config"]["propose"].update(options)


THE_RECIPE = "the recipe"
# Changes to a checkpoint of the recipe, which need no training of their own.
CHANGES: dict[str, Callable[[dict[str, Any]], None]] = {
    "weights as trained, not averaged": as_trained,
    "published scales": proposing(log2_scales=[-2.5, 0.5, 0.5]),
    "near duplicates kept": proposing(nms=None, soft_nms=False),
    "near duplicates dropped": proposing(soft_nms=False),
}
# What the recipe must have set for a change to change something.
NEEDED = {
    "weights as trained, not averaged": "deepmask.optim.ema_decay",
    "near duplicates kept": "propose.nms",
    "near duplicates dropped": "propose.nms",
}
VARIANTS: dict[str, dict[str, str]] = {
    THE_RECIPE: {},
    "no color augmentation": of_both("sampling.jitter_color", "0"),
    "twice the jitter of scale": of_both("sampling.jitter_scale", "0.5"),
    "categories balanced": of_both("sampling.balance_categories", "true"),
    "scores of five by five cells": {"deepmask.sampling.score_cells": "5"},
    "scores learn IoUs": {"deepmask.sampling.score_targets": "iou"},
    "trunk frozen": {"trunk.frozen_levels": "4"},
    "whole trunk trained": {"trunk.frozen_levels": "0"},
    "narrow heads": {
        "deepmask.reduction": "48",
        "deepmask.embedding": "128",
        "deepmask.score_hidden": "256",
    },
    "half the minibatches": of_both("optim.batches_per_epoch", "150"),
}


def main() -> None:
    """Trains the variants and prints their recall."""
    parser = make_parser(__doc__, seeds=1, work_dir=Path("runs/few_images"))
    add_config(parser)
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=[*VARIANTS, *CHANGES],
        help="default: all that differ from the recipe",
    )
    add_coarse(parser)
    add_device(parser)
    args = parser.parse_args()

    settings = flatten(config_to_dict(load_config(args.config, args.set)))
    without = {name for name, key in NEEDED.items() if settings[key] is None}
    if args.variants and (same := without & set(args.variants)):
        name = same.pop()
        raise ValueError(f"--variants {name!r} is the recipe itself: {NEEDED[name]} is null")
    rows: Rows = {}
    for name in args.variants or [*VARIANTS, *(each for each in CHANGES if each not in without)]:
        rows[name] = over_seeds([measure(name, seed, args) for seed in range(args.seeds)])
        print(f"\n{markdown(rows, 'variant')}", flush=True)
        report({"variants": rows}, args.output)  # each takes long


def measure(name: str, seed: int, args: argparse.Namespace) -> dict[str, float]:
    """Recall of a variant, with one seed."""
    print(f"\n{name}, seed {seed}", flush=True)
    stages = trained_stages(args)
    options = {"overrides": args.set, "device": args.device}
    settings = VARIANTS.get(name, {}) | {"seed": str(seed)}
    trained = folder(args.work_dir, name if name in VARIANTS else THE_RECIPE, seed)
    recall = recall_of_recipe(args.config, trained, settings, stages=stages, **options)
    if name not in CHANGES:
        return recall
    output = folder(args.work_dir, name, seed)
    run = trained / stages[-1]
    return recall_of_changed(args.config, run, output, CHANGES[name], **options)


def folder(work_dir: Path, name: str, seed: int) -> Path:
    """Of a variant's results."""
    return work_dir / name.replace(" ", "_").replace(",", "") / f"seed{seed}"


if __name__ == "__main__":
    run_tool(main)
