#!/usr/bin/env python
r"""What each part of the recipe for few images adds: recall without it, by seed.

    python tools/benchmarks/few_images.py --config configs/coco_mini.yaml --seeds 2

Every variant trains DeepMask and SharpMask, which takes an hour or two on two cores; with --coarse
DeepMask alone. Started again with the same --work-dir, it continues.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pipeline.command import add_config, add_device, run_tool
from tools.benchmarks.mask_stages import MASK_STAGES, markdown, over_seeds, recall_of_recipe
from tools.benchmarks.timing import Rows, make_parser, report


def of_both(setting: str, value: str) -> dict[str, str]:
    """The same setting of both mask stages."""
    return {f"{stage}.{setting}": value for stage in MASK_STAGES}


VARIANTS: dict[str, dict[str, str]] = {
    "the recipe": {},
    "weights as trained, not averaged": of_both("optim.ema_decay", "null"),
    "no color augmentation": of_both("sampling.jitter_color", "0"),
    "twice the jitter of scale": of_both("sampling.jitter_scale", "0.5"),
    "categories balanced": of_both("sampling.balance_categories", "true"),
    "one score a patch, as published": {"deepmask.sampling.score_cells": "1"},
    "scores learn IoUs": {"deepmask.sampling.score_targets": "iou"},
    "trunk frozen": {"trunk.frozen_levels": "4"},
    "whole trunk trained": {"trunk.frozen_levels": "0"},
    "half the minibatches": of_both("optim.batches_per_epoch", "150"),
    "published scales": {"propose.log2_scales": "[-2.5,0.5,0.5]"},
    "near duplicates kept": {"propose.nms": "null"},
}


def main() -> None:
    """Trains the variants and prints their recall."""
    parser = make_parser(__doc__, seeds=1, work_dir=Path("runs/few_images"))
    add_config(parser)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--coarse", action="store_true", help="DeepMask alone, its coarse masks")
    add_device(parser)
    args = parser.parse_args()

    rows: Rows = {}
    for name in args.variants:
        scores = []
        for seed in range(args.seeds):
            print(f"\n{name}, seed {seed}", flush=True)
            output = args.work_dir / name.replace(" ", "_").replace(",", "") / f"seed{seed}"
            settings = VARIANTS[name] | {"seed": str(seed)}
            scores.append(
                recall_of_recipe(
                    args.config,
                    output,
                    settings,
                    overrides=args.set,
                    device=args.device,
                    stages=MASK_STAGES[:1] if args.coarse else MASK_STAGES,
                )
            )
        rows[name] = over_seeds(scores)
        print(f"\n{markdown(rows, 'variant')}", flush=True)
    report({"variants": rows}, args.output)


if __name__ == "__main__":
    run_tool(main)
