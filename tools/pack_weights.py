#!/usr/bin/env python
r"""Packs a trained network into a small file for inference: float16, without optimizer state.

    python tools/pack_weights.py --checkpoint runs/small/sharpmask \
        --output models/pretrained/sharpmask.pt

tools/propose.py and tools/detect.py use the files in models/pretrained/ where no --checkpoint is
named.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.checkpoint import load_checkpoint, save_checkpoint
from pipeline.command import local_path, make_parser, run_tool
from pipeline.pretrained import pack_checkpoint


def main() -> None:
    """Packs a checkpoint."""
    parser = make_parser(__doc__)
    parser.add_argument("--checkpoint", required=True, help="of any stage, or its run's folder")
    parser.add_argument("--output", required=True, type=local_path, help="the file to write")
    args = parser.parse_args()
    checkpoint = load_checkpoint(args.checkpoint)
    save_checkpoint(args.output, pack_checkpoint(checkpoint, source=args.checkpoint))
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_tool(main)
