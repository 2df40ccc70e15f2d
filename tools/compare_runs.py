#!/usr/bin/env python
r"""Sets runs beside each other on a page: settings, scores, curves, speed, pictures.

    python tools/compare_runs.py runs/first runs/second --output comparison.html

Takes run folders of tools/run_pipeline.py, those of tools/train_stage.py, or folders of scores of
tools/score_coco.py. The first is what the others are compared with. Pictures are shown of whole
runs with the same validation images.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.command import local_path, make_parser, run_tool
from pipeline.report.run_comparison import write_comparison


def main() -> None:
    """Writes the comparison."""
    parser = make_parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders, two or more")
    parser.add_argument(
        "--output", default="comparison.html", type=local_path, help="the page to write"
    )
    args = parser.parse_args()
    print(write_comparison(args.runs, args.output))


if __name__ == "__main__":
    run_tool(main)
