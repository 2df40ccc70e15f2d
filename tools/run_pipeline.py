#!/usr/bin/env python
"""Runs the whole pipeline: all stages in a row, proposals, scores, report.

    python tools/run_pipeline.py --config configs/shapes.yaml --output runs/demo

Started again after an interruption it continues where it stopped.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline import distributed
from pipeline.command import add_device, run_tool
from pipeline.full_run import run_pipeline


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="a recipe, see configs/")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument(
        "--set", nargs="+", default=[], action="extend", metavar="KEY=VALUE", help="overrides"
    )
    add_device(parser)
    args = parser.parse_args()
    with distributed.process_group(args.device) as device:
        run_pipeline(args.config, args.output, overrides=args.set, device=device)


if __name__ == "__main__":
    run_tool(main)
