#!/usr/bin/env python
r"""Ablation of MultiPathNet: what each part adds to Fast R-CNN, over several seeds.

    python tools/benchmarks/detection.py --run runs/demo --output runs/detection

Every variant is trained for the same number of minibatches on the proposals of a finished run of
tools/run_pipeline.py, from the same trunk, and scored on the validation images. All normalize their
pooled blocks and mix them by a 1x1 convolution, so that a variant differs by its part alone. The
table has mean and spread (standard deviation) over the seeds.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from datasets.files import write_atomically, write_json
from datasets.images import read_image
from pipeline.command import add_device, run_tool
from pipeline.config import Config, load_config
from pipeline.data import prepare_data, split_files
from pipeline.evaluation.precision import evaluate_detections
from pipeline.evaluation.recall import load_ground_truth
from pipeline.inference.detect import Detector
from pipeline.inference.proposals import ProposalStore
from pipeline.training.engine import TrainingRun
from pipeline.training.roi_stage import MultiPathNetStage

BASE = {"foveal": False, "skip": False, "thresholds": [0.5], "box_tower": False}
THRESHOLDS = [0.5, 0.55, 0.6, 0.65, 0.7, 0.75]
VARIANTS = {
    "Fast R-CNN": {},
    "+ foveal": {"foveal": True},
    "+ skip": {"skip": True},
    "+ integral": {"thresholds": THRESHOLDS},
    "+ box tower": {"box_tower": True},
    "all": {"foveal": True, "skip": True, "thresholds": THRESHOLDS, "box_tower": True},
}
COLUMNS = ("AP", "AP50", "AP75")


def train(
    config: Config, stores: dict[str, Path], trunk: Path, output: Path, device: torch.device
) -> MultiPathNetStage:
    """A stage trained for all its minibatches, without validation in between."""
    boxes = {split: ProposalStore(path).boxes() for split, path in stores.items()}
    stage = MultiPathNetStage(config, boxes, trunk_checkpoint=trunk)
    run = TrainingRun(stage, config, output, device)
    run.model = stage.model
    stage.start_phase(0)
    stage.train_mode()
    for batch in stage.training_batches(range(run.total), run.device):
        run.train_step(batch)
    return stage


def score(
    stage: MultiPathNetStage, config: Config, store: Path, device: torch.device
) -> dict[str, dict[str, float]]:
    """AP of a trained stage on the validation images."""
    annotations, images = split_files(config, "val")
    sampling = config.multipathnet.sampling
    detector = Detector(
        stage.model,
        stage.facts["categories"],
        device=device,
        short_sides=[sampling.short_side],
        long_side=sampling.long_side,
        options=config.detect,
    )
    results = []
    for proposals in ProposalStore(store):
        image = read_image(images / proposals.file_name)
        results += detector(image, proposals).results()
    scores = evaluate_detections(load_ground_truth(annotations), results)
    return scores.metrics() | {"box_ap_by_iou": [float(v) for v in scores.ap_by_iou("box")]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/shapes.yaml")
    parser.add_argument("--run", required=True, type=Path, help="of tools/run_pipeline.py")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--batches", type=int, default=400, help="minibatches for each variant")
    parser.add_argument("--seeds", type=int, default=3)
    add_device(parser)
    args = parser.parse_args()
    stores = {
        "train": args.run / "multipathnet" / "proposals" / "train",
        "val": args.run / "sharpmask" / "proposals",
    }
    device = torch.device(args.device)
    trunk = args.run / "sharpmask" / "checkpoints" / "best.pt"
    rows: dict[str, list[dict]] = {}
    for seed in range(args.seeds):
        for name, parts in VARIANTS.items():
            config = load_config(args.config, [f"seed={seed}"])
            prepare_data(config)
            for key, value in (BASE | parts).items():
                setattr(config.multipathnet, key, value)
            config.multipathnet.optim.epochs = 1
            config.multipathnet.optim.batches_per_epoch = args.batches
            start = time.monotonic()
            stage = train(config, stores, trunk, args.output, device)
            metrics = score(stage, config, stores["val"], device)
            metrics["seconds"] = round(time.monotonic() - start, 1)
            rows.setdefault(name, []).append(metrics)
            write_json(args.output / "detection.json", rows)
            print(name, seed, {k: round(metrics["box"][k], 3) for k in COLUMNS}, flush=True)
    table = to_table(rows)
    write_atomically(args.output / "detection.txt", (table + "\n").encode())
    print(table)


def to_table(rows: dict[str, list[dict]]) -> str:
    """One line for each variant: mean and spread of every column, in percent."""
    columns = [(kind, name) for kind in ("box", "mask") for name in COLUMNS]
    lines = [" " * 14 + "".join(f"{kind} {name}".rjust(15) for kind, name in columns)]
    for variant, runs in rows.items():
        cells = []
        for kind, name in columns:
            values = [100 * run[kind][name] for run in runs]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.1f} ± {spread:.1f}".rjust(15))
        lines.append(variant.ljust(14) + "".join(cells))
    return "\n".join(lines)


if __name__ == "__main__":
    run_tool(main)
