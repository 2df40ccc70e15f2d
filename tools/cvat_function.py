#!/usr/bin/env python
r"""An auto-annotation function for CVAT: it proposes or detects in the images of a task.

    pip install cvat-cli
    cvat-cli --server-host SERVER --auth USER task auto-annotate TASK \
        --function-file tools/cvat_function.py --allow-unmatched-labels \
        -p checkpoint=str:runs/coco/multipathnet -p proposer=str:runs/coco/sharpmask

The task needs labels of the same names, for masks: "object" for proposals, which the weights in the
box make if no checkpoint is given; the categories of a MultiPathNet. Other parameters, with -p:
device=str:cuda, max_shapes=int:100, nms=float:0.7. --conf-threshold of cvat-cli is the least score
(default: .5); --conv-mask-to-poly gives polygons.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.command import make_parser, run_tool
from pipeline.inference.cvat_function import create

__all__ = ["create"]  # what cvat-cli calls


def main() -> None:
    """Says how it is used; cvat-cli does not come here."""
    parser = make_parser(__doc__)
    parser.parse_args()
    parser.print_help()


if __name__ == "__main__":
    run_tool(main)
