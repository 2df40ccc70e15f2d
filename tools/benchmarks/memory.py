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
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import cv2
import numpy as np
import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pipeline.command import run_tool
from pipeline.inference.folders import propose_images
from pipeline.inference.image_files import keep_freed_blocks
from pipeline.inference.proposals import Proposals
from pipeline.inference.propose import Proposer, load_proposer
from pipeline.recipe import load_config
from tools.benchmarks.synthetic import draw_image, write_sharpmask
from tools.benchmarks.timing import make_parser, report

SETTLED = 10  # images


def main() -> None:
    """Watches two runs over a folder."""
    args = make_parser(
        __doc__, config="configs/shapes.yaml", images=200, num_proposals=100
    ).parse_args()
    if args.images < SETTLED:
        raise ValueError(f"--images must be at least {SETTLED}, got {args.images}")
    rows = {}
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = Path(directory) / "sharpmask.pt"
        write_sharpmask(load_config(args.config), checkpoint)
        for name in ("one size", "ever other sizes"):
            folder = Path(directory) / name
            write_images(folder, args.images, same_size=name == "one size")
            # Spawned: what an earlier measurement has left would count.
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, mp_context=context) as executor:
                run = executor.submit(watch, checkpoint, folder, args.num_proposals)
            megabytes = run.result()
            settled, rest = megabytes[SETTLED - 1], megabytes[SETTLED - 1 :]
            last = statistics.median(megabytes[-max(1, len(megabytes) // 10) :])
            rows[name] = {
                f"MB after {SETTLED}": settled,
                "MB at the end": last,
                "growth": last / settled - 1,
                "lowest": min(rest) / settled - 1,
                "highest": max(rest) / settled - 1,
            }
    report({"resident memory": rows}, args.output)


def watch(checkpoint: Path, images: Path, num_proposals: int) -> list[float]:
    """Resident megabytes of this process after each image that it makes proposals for."""
    keep_freed_blocks()
    proposer, settings = load_proposer(checkpoint, torch.device("cpu"), num_proposals=num_proposals)
    propose = Proposer.__call__
    megabytes: list[float] = []

    def watched(proposer: Proposer, image: np.ndarray, **options: Any) -> Proposals:
        proposals = propose(proposer, image, **options)
        megabytes.append(psutil.Process().memory_info().rss / 2**20)
        return proposals

    with mock.patch.object(Proposer, "__call__", watched):
        propose_images(proposer, images, images.with_suffix(".proposals"), settings=settings)
    return megabytes


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
