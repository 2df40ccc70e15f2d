#!/usr/bin/env python
r"""Trains one stage of the pipeline.

    python tools/train_stage.py --stage deepmask --config configs/coco.yaml \
        --output runs/coco/deepmask
    python tools/train_stage.py --stage sharpmask --config configs/coco.yaml \
        --output runs/coco/sharpmask
    torchrun --nproc-per-node 8 tools/train_stage.py --stage deepmask \
        --config configs/coco.yaml --output runs/coco/deepmask

A stage looks for the runs of the stages before it beside --output; with --resume it continues an
interrupted run.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline import distributed
from pipeline.command import (
    add_config,
    add_device,
    add_precision,
    local_path,
    make_parser,
    run_tool,
)
from pipeline.config import PRETRAIN, STAGES
from pipeline.recipe import load_config
from pipeline.run_lock import locked_directory
from pipeline.training.engine import fit
from pipeline.training.prepare import build_stage, choose_sizes, prepare_stage
from pipeline.training.run_directory import resumes_run


def main() -> None:
    """Trains a stage."""
    parser = make_parser(__doc__)
    parser.add_argument("--stage", required=True, choices=(PRETRAIN, *STAGES))
    add_config(parser)
    parser.add_argument("--output", required=True, type=local_path, help="run directory")
    parser.add_argument("--resume", action="store_true", help="continue the run in --output")
    add_precision(parser, default=None)
    add_device(parser)
    args = parser.parse_args()

    config = load_config(args.config, args.set)
    with distributed.process_group(args.device) as device, locked_directory(args.output):
        resume = resumes_run(args.output, args.resume)  # before what may take hours
        config = choose_sizes(args.stage, config, args.output)
        inputs = prepare_stage(args.stage, config, args.output, device)
        stage = build_stage(args.stage, config, inputs)
        best = fit(
            stage,
            config,
            args.output,
            device=device,
            resume=resume,
            precision=args.precision,
        )
        if distributed.is_main():
            print(f"best checkpoint: {best}")


if __name__ == "__main__":
    run_tool(main)
