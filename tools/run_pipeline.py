#!/usr/bin/env python
"""Runs the whole pipeline: all stages in a row, proposals, scores, report.

    python tools/run_pipeline.py --config configs/shapes.yaml --output runs/demo

Started again after an interruption it continues where it stopped.
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
from pipeline.full_run import run_pipeline


def main() -> None:
    """Runs the pipeline."""
    parser = make_parser(__doc__)
    add_config(parser)
    parser.add_argument("--output", required=True, type=local_path, help="folder of the results")
    add_precision(parser, default=None)
    add_device(parser)
    args = parser.parse_args()
    with distributed.process_group(args.device) as device:
        run_pipeline(
            args.config,
            args.output,
            overrides=args.set,
            device=device,
            precision=args.precision,
        )


if __name__ == "__main__":
    run_tool(main)
