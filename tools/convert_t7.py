#!/usr/bin/env python
r"""Converts the released Lua models and proposals (Torch7 files, .t7) for use here.

    python tools/convert_t7.py model.t7 --output deepmask.pt
    python tools/propose.py --checkpoint deepmask.pt --images photos --output runs/photos
    python tools/convert_t7.py resnet18_integral_coco.t7 --output detector.pt
    python tools/detect.py --checkpoint detector.pt --proposals runs/photos --output runs/detections

DeepMask, SharpMask and the detectors (integral loss, Fast R-CNN) become checkpoints, each with a
recipe beside it, FILE.pt.yaml, to fine-tune it by; an ImageNet network (ResNet, VGG, CaffeNet)
becomes weights for trunk.weights; proposals become a proposal store, --output its folder. The
content of a file says which of them it is.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.command import local_path, make_parser, run_tool
from pipeline.torch7.convert import convert_file
from pipeline.torch7.describe import describe
from pipeline.torch7.reader import read_torch7


def main() -> None:
    """Converts a file, or describes it."""
    parser = make_parser(__doc__)
    parser.add_argument("file", metavar="FILE.t7", type=Path)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--output", metavar="FILE.pt", type=local_path, help="what to write")
    action.add_argument("--describe", action="store_true", help="print the modules in the file")
    parser.add_argument(
        "--annotations", metavar="COCO.json", help="for proposals: sizes and ids of the images"
    )
    parser.add_argument(
        "--images", metavar="DIR", help="for proposals, without --annotations: the images"
    )
    args = parser.parse_args()
    if args.describe:
        print(describe(read_torch7(args.file)))
        return
    lines = convert_file(args.file, args.output, annotations=args.annotations, images=args.images)
    print(f"{args.file}: " + "\n  ".join(lines))


if __name__ == "__main__":
    run_tool(main)
