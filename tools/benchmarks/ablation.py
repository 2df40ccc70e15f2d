#!/usr/bin/env python
r"""What each part of the refinement or of the detector adds, over several seeds.

    python tools/benchmarks/ablation.py refinement --run runs/demo
    python tools/benchmarks/ablation.py detector --run runs/demo --batches 250
    python tools/benchmarks/ablation.py detector --run runs/demo --batches 3000 \
        --variants "Fast R-CNN" "+ integral loss"

Every variant is trained for the same number of minibatches on what a finished run of
tools/run_pipeline.py has left: refinements on its DeepMask, detectors on its proposals. The table
has mean and standard deviation. Started again with the same --work-dir, it continues.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from datasets.images import read_image
from models.deepmask import DeepMask
from models.sharpmask import SharpMask, SharpMaskConfig
from pipeline.command import add_device, run_tool
from pipeline.config import Config
from pipeline.data import split_files
from pipeline.evaluation.ground_truth import load_ground_truth
from pipeline.evaluation.precision import evaluate_detections
from pipeline.inference.detect import load_detector
from pipeline.inference.proposal_store import ProposalStore
from pipeline.inference.proposals import results_of
from pipeline.recipe import load_config, settings_of
from pipeline.training.engine import fit
from pipeline.training.prepare import build_stage, choose_sizes, prepare_stage
from tools.benchmarks.timing import Rows, make_parser, report


class WithoutVertical(SharpMask):
    """Every level predicts a mask of its own, and the sum counts (ECCV 2016, figure 1b)."""

    def __init__(self, deepmask: DeepMask, **settings: Any):
        super().__init__(deepmask, **settings)
        modules: list[Any] = list(self.refinements)
        widths = [self.km, *(module.horizontal[-1].out_channels for module in modules)]
        self.predictions = nn.ModuleList(nn.Conv2d(width, 1, 3, padding=1) for width in widths)
        for unused in (self.predict, *(module.vertical for module in modules)):
            unused.requires_grad_(False)

    def refine(self, embeddings: Tensor, windows: list[Tensor]) -> Tensor:
        """As `SharpMask.refine`."""
        mask = self.encode(embeddings).view(-1, self.km, self.cells, self.cells)
        size = (self.patch_size, self.patch_size)
        logits = [
            F.interpolate(predict(F.relu(x)), size=size, mode="bilinear", align_corners=False)
            for predict, x in zip(self.predictions, [mask, *windows], strict=True)
        ]
        return torch.stack(logits).sum(dim=0)[:, 0]


def without_vertical(model: SharpMask, config: Config) -> SharpMask:
    """The skip architecture that the paper compares with."""
    return WithoutVertical(model.deepmask, **settings_of(SharpMaskConfig, config.sharpmask))


def without_horizontal(model: SharpMask, config: Config) -> SharpMask:
    """The same network without skip features: its horizontal nets give zeros for good."""
    for name, parameter in model.named_parameters():
        if ".horizontal." in name:
            parameter.requires_grad_(False).zero_()
    return model


IOUS = [0.5, 0.55, 0.6, 0.65, 0.7, 0.75]
FAST_RCNN = {"foveal": False, "skip": False, "iou_thresholds": [0.5], "use_box_tower": False}
ALL = {"foveal": True, "skip": True, "iou_thresholds": IOUS, "use_box_tower": True}
# By stage: settings of the recipe that make each variant.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "refinement": {
        "as configured": {},
        "k = 16": {"km": 16, "ks": 16},
        "k = 32": {"km": 32, "ks": 32},
        "1 module": {"num_modules": 1},
        "2 modules": {"num_modules": 2},
        "3 modules": {"num_modules": 3},
        "no horizontal nets": {},
        "no vertical nets": {},
    },
    "detector": {
        "Fast R-CNN": FAST_RCNN,
        "+ foveal": FAST_RCNN | {"foveal": True},
        "+ skip": FAST_RCNN | {"skip": True},
        "+ integral loss": FAST_RCNN | {"iou_thresholds": IOUS},
        "+ box tower": FAST_RCNN | {"use_box_tower": True},
        "all": ALL,
        "all but integral loss": ALL | {"iou_thresholds": [0.5]},
    },
}
# What the recipe has no setting for is done to the network.
CHANGES: dict[str, Callable[[SharpMask, Config], SharpMask]] = {
    "no horizontal nets": without_horizontal,
    "no vertical nets": without_vertical,
}


def main() -> None:
    """Trains and scores all variants."""
    parser = make_parser(
        __doc__,
        config="configs/shapes.yaml",
        run=Path("runs/demo"),
        batches=300,
        seeds=3,
        work_dir=Path("runs/ablation"),
    )
    parser.add_argument("part", choices=VARIANTS)
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="of the part (default: all)")
    add_device(parser)
    args = parser.parse_args()
    names = args.variants or list(VARIANTS[args.part])
    if unknown := [name for name in names if name not in VARIANTS[args.part]]:
        raise ValueError(f"--variants {unknown[0]}: {args.part} has {[*VARIANTS[args.part]]}")
    rows: Rows = {}
    for name in names:
        rows[name] = {}
        runs = [measure(name, seed, args) for seed in range(args.seeds)]
        for column, *values in zip(runs[0], *(run.values() for run in runs), strict=True):
            rows[name][column] = statistics.mean(values)
            rows[name]["±" + column] = statistics.stdev(values) if len(values) > 1 else 0.0
    report({args.part: rows}, args.output)


def measure(variant: str, seed: int, args: argparse.Namespace) -> dict[str, float]:
    """Trains a variant; the patch metrics of a refinement, the AP of a detector in percent."""
    print(f"\n{variant}, seed {seed}", flush=True)
    name = {"refinement": "sharpmask", "detector": "multipathnet"}[args.part]
    length = {"optim.epochs": 1, "optim.batches_per_epoch": args.batches}
    settings = {
        **{f"{name}.{k}": v for k, v in (VARIANTS[args.part][variant] | length).items()},
        "seed": seed,
        "init.deepmask": args.run / "deepmask" / "checkpoints" / "best.pt",
        "init.proposer": args.run / "sharpmask" / "checkpoints" / "best.pt",
        "init.train_proposals": args.run / "multipathnet" / "proposals" / "train",
        "init.val_proposals": args.run / "sharpmask" / "proposals",
    }
    config = load_config(args.config, [f"{key}={value}" for key, value in settings.items()])
    output = args.work_dir / args.part / f"{variant.replace(' ', '_')}_seed{seed}"
    device = torch.device(args.device)
    config = choose_sizes(name, config, output)
    stage = build_stage(name, config, prepare_stage(name, config, output, device))
    if variant in CHANGES and isinstance(stage.model, SharpMask):
        with torch.no_grad():
            stage.model = CHANGES[variant](stage.model, config)
    best = fit(stage, config, output, device=device, resume=True)
    if args.part == "refinement":
        return stage.validate(stage.model, device)
    annotations, images = split_files(config, "val")
    (detector, _), results = load_detector(best, device), []
    for proposals in ProposalStore(str(config.init.val_proposals)):
        results += results_of(detector(read_image(images / proposals.file_name), proposals))
    scores = evaluate_detections(load_ground_truth(annotations), results)
    row = {}
    for iou_type, metrics in scores.metrics().items():
        row[f"{iou_type} AP"] = 100 * (metrics["AP"] or 0.0)
        for i, iou in enumerate(range(50, 100, 5)):
            row[f"{iou_type} AP{iou}"] = 100 * float(scores.precision(iou_type)[i].mean())
    return row


if __name__ == "__main__":
    run_tool(main)
