#!/usr/bin/env python
r"""Resident memory while proposals are made for a folder of images: flat after the tenth?

    python tools/benchmarks/memory.py --images 200

One folder of images of one size and one of ever other sizes, each through tools/propose.py in a
process of its own. A small network by default, since the question is growth.
"""

import contextlib
import multiprocessing
import runpy
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import cv2
import numpy as np
import psutil

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from pipeline.command import run_tool
from pipeline.inference.proposals import Proposals
from pipeline.inference.propose import Proposer
from pipeline.recipe import load_config
from tools.benchmarks.synthetic import draw_image, write_sharpmask
from tools.benchmarks.timing import make_parser, report

SETTLED = 10  # images


def main() -> None:
    """Watches two runs of tools/propose.py."""
    parser = make_parser(__doc__)
    parser.add_argument("--config", default="configs/shapes.yaml", help="a recipe: the network")
    parser.add_argument("--images", type=int, default=200, help=f"at least {SETTLED}")
    parser.add_argument("--num-proposals", type=int, default=100)
    args = parser.parse_args()
    if args.images < SETTLED:
        raise ValueError(f"--images must be at least {SETTLED}, got {args.images}")
    rows = {}
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = Path(directory) / "sharpmask.pt"
        write_sharpmask(load_config(args.config), checkpoint)
        for name, same_size in (("one size", True), ("ever other sizes", False)):
            folder = Path(directory) / name.replace(" ", "_")
            write_images(folder, args.images, same_size=same_size)
            command = ["propose.py", "--checkpoint", str(checkpoint), "--images", str(folder)]
            command += ["--output", f"{folder}_proposals", "--device", "cpu"]
            command += ["--num-proposals", str(args.num_proposals)]
            # Spawned: what an earlier measurement has left would count.
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, mp_context=context) as executor:
                rows[name] = summarize(executor.submit(watch_propose, command).result())
    report({"resident memory": rows}, args.output)


def watch_propose(command: list[str]) -> list[float]:
    """Resident megabytes after each image of a run of tools/propose.py in this process."""
    megabytes = []
    propose = Proposer.__call__

    def watched(proposer: Proposer, image: np.ndarray, **options: Any) -> Proposals:
        proposals = propose(proposer, image, **options)
        megabytes.append(psutil.Process().memory_info().rss / 2**20)
        return proposals

    with (
        mock.patch.object(Proposer, "__call__", watched),
        mock.patch.object(sys, "argv", command),
        contextlib.suppress(SystemExit),
    ):
        runpy.run_path(str(ROOT / "tools" / "propose.py"), run_name="__main__")
    return megabytes


def summarize(megabytes: list[float]) -> dict[str, float]:
    """Memory once it has settled, and how far it goes from there; growth is the last tenth's."""
    settled, rest = megabytes[SETTLED - 1], megabytes[SETTLED - 1 :]
    last = statistics.median(megabytes[-max(1, len(megabytes) // 10) :])
    return {
        f"MB after {SETTLED}": settled,
        "MB at the end": last,
        "growth": last / settled - 1,
        "lowest": min(rest) / settled - 1,
        "highest": max(rest) / settled - 1,
    }


def write_images(folder: Path, count: int, *, same_size: bool) -> None:
    """JPEGs of smooth noise, of 480 x 640 or like COCO's: the long side 640, the other any."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        height, width = (480, 640) if same_size else (int(rng.integers(300, 641)), 640)
        if not same_size and rng.random() < 0.3:
            height, width = width, height
        cv2.imwrite(str(folder / f"{i:06d}.jpg"), draw_image(rng, height, width))


if __name__ == "__main__":
    run_tool(main)
