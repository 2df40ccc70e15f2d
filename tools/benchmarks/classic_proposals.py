#!/usr/bin/env python
r"""Average recall of the methods before networks, on any images: Selective Search and EdgeBoxes.

    python tools/benchmarks/classic_proposals.py \
        --annotations data/coco-mini/annotations/instances_val.json \
        --images data/coco-mini/images/val

Both are of opencv-contrib, which is installed into an environment of its own below --work-dir: its
cv2 would replace that of opencv-python. The scores are those of tools/score_coco.py; seconds are
of the CPU, an image.
"""

import importlib.metadata
import json
import subprocess
import sys
import venv
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from datasets.files import write_json
from pipeline.command import run_tool
from pipeline.evaluation.scores import score_proposals
from tools.benchmarks.timing import Rows, make_parser, report

WORKER = Path(__file__).with_name("classic_worker.py")
METHODS = {
    "selective_search": "Selective Search",
    "opencv_selective_search": "Selective Search, OpenCV's ranking",
    "edge_boxes": "EdgeBoxes on color gradients",
}


def main() -> None:
    """Proposes with each method and scores the proposals."""
    parser = make_parser(__doc__, work_dir=Path("runs/classic"))
    parser.add_argument("--annotations", required=True, help="COCO instances json")
    parser.add_argument("--images", required=True, help="the folder of its images")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    args = parser.parse_args()
    python = make_environment(args.work_dir / "environment")
    num_images = len(json.loads(Path(args.annotations).read_text())["images"])
    rows: Rows = {}
    for method in args.methods:
        output = args.work_dir / method
        output.mkdir(parents=True, exist_ok=True)
        command = [python, WORKER, method, "--output", output / "worker.json"]
        inputs = ["--annotations", args.annotations, "--images", args.images]
        subprocess.run([*command, *inputs], check=True)
        found = json.loads((output / "worker.json").read_text())
        write_json(output / "proposals.json", found["results"])
        metrics = score_proposals(
            args.annotations, output / "proposals.json", output, perfect_ranking=False
        )
        row = rows[METHODS[method]] = {
            f"{iou_type} AR@{k}": metrics[iou_type][f"AR@{k}"]
            for iou_type in metrics
            for k in (10, 100, 1000)
        }
        row["seconds"] = found["seconds"] / num_images
    report({"average recall": rows}, args.output)


def make_environment(directory: Path) -> Path:
    """The Python of an environment with opencv-contrib; made if it is not there."""
    python, complete = directory / "bin" / "python", directory / "complete"
    if not complete.exists():
        venv.create(directory, with_pip=True, clear=True)
        packages = {
            "opencv-contrib-python-headless": "opencv-python",
            "pycocotools": "pycocotools",
            "numpy": "numpy",
        }
        pins = [f"{name}=={importlib.metadata.version(of)}" for name, of in packages.items()]
        subprocess.run([python, "-m", "pip", "install", "--quiet", *pins], check=True)
        complete.touch()
    return python


if __name__ == "__main__":
    run_tool(main)
