#!/usr/bin/env python
r"""Deeper plain networks train worse, residual ones do not (He et al., CVPR 2016, figure 6).

    python tools/benchmarks/depth.py
    python tools/benchmarks/depth.py --depths 20 56 110 --plot runs/depth.png \
        --work-dir runs/depth110

Trains networks of each depth by `--stage pretrain` on crops of synthetic shapes: plain ones,
residual ones (v1), and those with pre-activation (v2). The table has the errors in percent of the
last weights, on the training crops as they are and on the validation crops. Started again with the
same --work-dir, it continues.
"""

import argparse
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from datasets.crops import CropDataset
from pipeline.command import add_device, run_tool
from pipeline.evaluation.classes import evaluate_classes
from pipeline.recipe import load_config
from pipeline.training.engine import fit
from pipeline.training.prepare import build_stage, prepare_stage
from pipeline.training.pretrain import PretrainStage
from pipeline.training.run_log import METRICS, read_metrics
from tools.benchmarks.timing import Rows, make_parser, report

KINDS = {"plain": "cifar_plain{}", "residual": "cifar_resnet{}", "v2": "cifar_resnet{}_v2"}


def main() -> None:
    """Trains and compares the networks."""
    parser = make_parser(
        __doc__,
        config="configs/depth.yaml",
        depths=[20, 56],
        work_dir=Path("runs/depth"),
    )
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument("--plot", type=Path, help="draw the errors over the minibatches")
    add_device(parser)
    args = parser.parse_args()
    networks = [KINDS[kind].format(depth) for kind in args.kinds for depth in args.depths]
    rows: Rows = {name: measure(name, args) for name in networks}
    report({"top-1 error, %": rows}, args.output)
    if args.plot:
        draw(networks, args.work_dir).savefig(args.plot, dpi=100)


def measure(name: str, args: argparse.Namespace) -> dict[str, float]:
    """Trains a network; its errors in percent."""
    print(f"\n{name}", flush=True)
    config = load_config(args.config, [*args.set, f"pretrain.trunk.name={name}"])
    output, device = args.work_dir / name, torch.device(args.device)
    stage = build_stage("pretrain", config, prepare_stage("pretrain", config, output, device))
    assert isinstance(stage, PretrainStage)
    fit(stage, config, output, device=device, resume=True)
    data = stage.train_data
    unvaried = CropDataset(
        data.crops, data.images, data.sampler, config=config.pretrain.crops, training=False
    )
    training = evaluate_classes(
        stage.model,
        unvaried,
        device,
        limit=len(data.crops),
        batch_size=stage.optim.batch_size,
        workers=config.data.workers,
    )
    errors = {"training": training, "validation": stage.validate(stage.model, device)}
    print({split: round(100 * metrics["error"], 1) for split, metrics in errors.items()})
    return {split: 100 * metrics["error"] for split, metrics in errors.items()}


def draw(networks: list[str], work_dir: Path) -> Figure:
    """The errors during training: of the training minibatches (thin) and in validation."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for i, name in enumerate(networks):
        lines = read_metrics(work_dir / name / METRICS)
        for split, style in (("train", {"lw": 0.7, "ls": ":"}), ("val", {"label": name})):
            points = [(x["step"], 100 * x["error"]) for x in lines if x["split"] == split]
            axes.plot(*zip(*points, strict=True), color=f"C{i}", **style)
    axes.set(xlabel="minibatches", ylabel="top-1 error, %", ylim=(0, None))
    axes.legend()
    return figure


if __name__ == "__main__":
    run_tool(main)
