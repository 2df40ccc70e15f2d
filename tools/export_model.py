#!/usr/bin/env python
r"""Writes a trained network for programs without this project.

    python tools/export_model.py --format onnx
    python tools/export_model.py runs/coco/sharpmask --format onnx --output sharpmask.onnx

One graph holds all from an image of any size to the masks of its best proposals; docs/deploy.md
says what it takes and gives, and docs/examples/propose_with_onnx.py uses it without PyTorch.
Safetensors are weights of any stage in a folder as the Hugging Face hub has them.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.command import local_path, make_parser, parse_scales, run_tool
from pipeline.inference.model_export import MODEL_FORMATS
from pipeline.pretrained import pretrained_checkpoint


def main() -> None:
    """Exports the network."""
    parser = make_parser(__doc__)
    parser.add_argument(
        "checkpoint",
        nargs="?",
        metavar="CHECKPOINT",
        help="a trained DeepMask or SharpMask, for safetensors any network (default: the one in "
        "models/pretrained)",
    )
    parser.add_argument("--format", required=True, choices=sorted(MODEL_FORMATS))
    parser.add_argument(
        "--output",
        type=local_path,
        help="what to write (default: runs/models/NAME, by the checkpoint)",
    )
    parser.add_argument("--num-proposals", type=int, help="of an image (default: the checkpoint's)")
    parser.add_argument(
        "--scales",
        nargs="+",
        metavar="auto|MIN MAX STEP",
        help="log2 of the image scales (default: as tools/propose.py)",
    )
    parser.add_argument(
        "--no-refine", dest="refine", action="store_false", help="coarse masks of a SharpMask"
    )
    args = parser.parse_args()
    checkpoint = args.checkpoint or pretrained_checkpoint("sharpmask")
    suffix, write = MODEL_FORMATS[args.format]
    output = args.output or Path("runs", "models", f"{Path(checkpoint).resolve().stem}{suffix}")
    options = {
        "num_proposals": args.num_proposals,
        "log2_scales": parse_scales(args.scales),
        "refine": args.refine,
    }
    print(write(checkpoint, output, options))


if __name__ == "__main__":
    run_tool(main)
