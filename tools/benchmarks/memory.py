#!/usr/bin/env python
r"""Resident memory while proposals are made for a folder of images: flat after the tenth?

    python tools/benchmarks/memory.py --images 200

One folder of images of one size and one of ever other sizes, each in a process of its own, as
tools/propose.py goes through them. A small network by default, since the question is growth.
"""

import multiprocessing
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import cv2
import numpy as np
import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pipeline.command import run_tool
from pipeline.inference.memory import keep_freed_blocks
from pipeline.inference.propose import Proposer, load_proposer
from pipeline.inference.propose_folders import propose_images
from tools.benchmarks.synthetic import HEIGHT, WIDTH, draw_image, load_recipe, write_sharpmask
from tools.benchmarks.timing import make_parser, report

SETTLED = 10  # images


def main() -> None:
    """Watches two runs over a folder."""
    parser = make_parser(__doc__, config="configs/shapes.yaml", images=200, num_proposals=100)
    args = parser.parse_args()
    if args.images < SETTLED:
        raise ValueError(f"--images must be at least {SETTLED}, got {args.images}")
    rng, rows = np.random.default_rng(0), {}
    folders = {"one size": [(HEIGHT, WIDTH)] * args.images, "ever other sizes": []}
    for short_side in rng.integers(300, WIDTH + 1, args.images).tolist():  # as of COCO's images
        size = (short_side, WIDTH) if rng.random() > 0.3 else (WIDTH, short_side)
        folders["ever other sizes"].append(size)
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = Path(directory) / "sharpmask.pt"
        write_sharpmask(load_recipe(args.config), checkpoint)
        for name, sizes in folders.items():
            folder = Path(directory) / name
            folder.mkdir()
            for i, size in enumerate(sizes):
                cv2.imwrite(str(folder / f"{i:06d}.jpg"), draw_image(rng, *size))
            # Spawned: what an earlier measurement has left would count.
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                megabytes = pool.apply(watch, (checkpoint, folder, args.num_proposals))
            settled = megabytes[SETTLED - 1]
            last = statistics.median(megabytes[-max(1, len(megabytes) // 10) :])
            growth = [value / settled - 1 for value in (last, *megabytes[SETTLED - 1 :])]
            rows[name] = {f"MB after {SETTLED}": settled, "MB at the end": last}
            rows[name] |= {"growth": growth[0], "lowest": min(growth), "highest": max(growth)}
    report({"resident memory": rows}, args.output)


def watch(checkpoint: Path, images: Path, num_proposals: int) -> list[float]:
    """Resident megabytes of this process after each image that it makes proposals for."""
    keep_freed_blocks()
    proposer, settings = load_proposer(checkpoint, torch.device("cpu"), num_proposals=num_proposals)
    propose, megabytes = Proposer.__call__, []

    def watched(*args: Any, **options: Any) -> Any:
        proposals = propose(*args, **options)
        megabytes.append(psutil.Process().memory_info().rss / 2**20)
        return proposals

    with mock.patch.object(Proposer, "__call__", watched):
        propose_images(proposer, images, images.with_suffix(".proposals"), settings=settings)
    return megabytes


if __name__ == "__main__":
    run_tool(main)
