#!/usr/bin/env python
r"""Ablation of SharpMask's refinement: width, number of modules, horizontal and vertical nets.

    python tools/benchmarks/refinement.py --config configs/shapes.yaml \
        --deepmask runs/demo/deepmask/checkpoints/best.pt --output runs/refinement

Every variant is trained on the same patches for the same number of minibatches, from the same
seed, on the same frozen DeepMask, and measured on the same validation patches.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from datasets.files import write_atomically, write_json
from models.sharpmask import SharpMask
from models.trunk import TrunkConv2d
from pipeline.command import add_device, run_tool
from pipeline.config import Config, load_config
from pipeline.training.engine import TrainingRun
from pipeline.training.patch_stages import SharpMaskStage, evaluate_patches, validation_kinds


class NoHorizontal(nn.Module):
    """In place of a horizontal net: no skip features."""

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, h, w) to zeros that add nothing: (B, 1, h, w)."""
        return torch.zeros_like(features[:, :1])


class IndependentPredictions(SharpMask):
    """No vertical path: every level predicts a mask of its own, and the sum counts.

    The skip architecture that the paper compares with (ECCV 2016, figure 1b).
    """

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        widths = [module.horizontal[-1].out_channels for module in self.refinements]
        self.predictions = nn.ModuleList(TrunkConv2d(width, 1, 3) for width in [self.km, *widths])
        for module in self.refinements:
            module.vertical = None
        self.predict = None

    def refine(self, embeddings: Tensor, windows: list[Tensor]) -> Tensor:
        """As `SharpMask.refine`."""
        mask = self.encode(embeddings).view(-1, self.km, self.cells, self.cells)
        size = (self.patch_size, self.patch_size)
        logits = [
            F.interpolate(predict(F.relu(x)), size=size, mode="bilinear", align_corners=False)
            for predict, x in zip(self.predictions, [mask, *windows], strict=True)
        ]
        return sum(logits)[:, 0]


def without_horizontal(model: SharpMask) -> SharpMask:
    """The same network without skip features."""
    for module in model.refinements:
        module.horizontal = NoHorizontal()
    return model


def variants() -> dict[str, tuple[dict, Callable[[SharpMask], SharpMask]]]:
    """By name: settings of the config, and what is done to the network."""
    same = lambda model: model  # noqa: E731
    return {
        "k = 32, 4 modules": ({}, same),
        "k = 16": ({"km": 16, "ks": 16}, same),
        "k = 64": ({"km": 64, "ks": 64}, same),
        "1 module": ({"num_modules": 1}, same),
        "2 modules": ({"num_modules": 2}, same),
        "3 modules": ({"num_modules": 3}, same),
        "no horizontal nets": ({}, without_horizontal),
        "no vertical nets": ({}, without_vertical),
    }


def without_vertical(model: SharpMask) -> SharpMask:
    """The horizontal nets of the same network, each with a prediction of its own."""
    return IndependentPredictions(model.deepmask, km=model.km, ks=model.km)


def train(stage: SharpMaskStage, config: Config, output: Path, device: torch.device) -> dict:
    """Trains a variant without intermediate validation; returns its patch metrics."""
    run = TrainingRun(stage, config, output, device)
    run.model = stage.model
    stage.train_mode()
    start = time.monotonic()
    for batch in stage.training_batches(range(run.total), device):
        run.train_step(batch)
    seconds = time.monotonic() - start
    return {**validate(stage, stage.model, device), "seconds": round(seconds, 1)}


def validate(stage: SharpMaskStage, model: nn.Module, device: torch.device) -> dict[str, float]:
    """Patch metrics, at the resolution of the patch."""
    return evaluate_patches(
        model,
        stage.val_data,
        device,
        kinds=validation_kinds(stage.optim.validation_batches, mask_share=1.0),
        batch_size=stage.optim.batch_size,
        workers=stage.config.data.workers,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/shapes.yaml")
    parser.add_argument("--deepmask", required=True, type=Path, help="checkpoint")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--batches", type=int, default=300, help="minibatches for each variant")
    parser.add_argument("--only", nargs="+", help="names of variants")
    add_device(parser)
    args = parser.parse_args()

    device, rows = torch.device(args.device), {}
    for name, (settings, change) in variants().items():
        if args.only and name not in args.only:
            continue
        config = load_config(args.config)
        config.sharpmask.optim.epochs = 1
        config.sharpmask.optim.batches_per_epoch = args.batches
        for key, value in settings.items():
            setattr(config.sharpmask, key, value)
        stage = SharpMaskStage(config, args.deepmask)
        if not rows:
            rows["DeepMask"] = {**validate(stage, stage.model.deepmask, device), "seconds": 0.0}
        stage.model = change(stage.model)
        rows[name] = train(stage, config, args.output, device)
        write_json(args.output / "refinement.json", rows)
    table = to_table(rows)
    write_atomically(args.output / "refinement.txt", (table + "\n").encode())
    print(table)


def to_table(rows: dict[str, dict]) -> str:
    """One line for each variant."""
    names = ("mean_iou", "median_iou", "iou_above_0.5", "iou_above_0.7", "seconds")
    lines = ["".ljust(22) + "".join(name.rjust(15) for name in names)]
    for variant, row in rows.items():
        lines.append(variant.ljust(22) + "".join(f"{row[name]:15.3f}" for name in names))
    return "\n".join(lines)


if __name__ == "__main__":
    run_tool(main)
