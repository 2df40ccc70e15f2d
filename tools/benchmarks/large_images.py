#!/usr/bin/env python
r"""Proposals for large images: peak memory and seconds, and bands of rows against the whole.

    python tools/benchmarks/large_images.py --megapixels 1.5 24 100

Every size is measured in a process of its own, from the PNG file to the RLEs. For the smallest one
the same network runs over whole scales and over bands, in turn.
"""

import multiprocessing
import resource
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from datasets.images import read_image
from pipeline.command import run_tool
from pipeline.inference.memory import keep_freed_blocks
from pipeline.inference.propose import load_proposer
from tools.benchmarks.synthetic import draw_image, load_recipe, write_sharpmask
from tools.benchmarks.timing import Calls, Rows, compare, make_parser, report

ENOUGH = 64.0  # GB for maps: whole scales


def main() -> None:
    """Measures every size."""
    options = {"megapixels": [1.5, 24.0, 100.0], "num_proposals": 1000, "rounds": 5, "memory": 0.16}
    parser = make_parser(__doc__, config="configs/coco_mini.yaml", **options)
    args = parser.parse_args()
    rows: Rows = {}
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = Path(directory) / "sharpmask.pt"
        write_sharpmask(load_recipe(args.config, ["trunk.weights=null"]), checkpoint)
        for megapixels in sorted(args.megapixels):
            image = Path(directory) / f"{megapixels:g}.png"
            side = round((megapixels * 1e6) ** 0.5)
            cv2.imwrite(str(image), draw_image(np.random.default_rng(0), side, side))
            # Spawned: the peak of a process begins with its parent's.
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                arguments = checkpoint, image, args.num_proposals, args.memory
                rows[f"{side}x{side}"] = pool.apply(measure, arguments)
        smallest = Path(directory) / f"{min(args.megapixels):g}.png"
        arguments = checkpoint, smallest, args.num_proposals, args.memory
        ratios = against_whole(*arguments, args.rounds)
    report({"one image": rows, f"{smallest.stem} megapixels": ratios}, args.output)


def measure(checkpoint: Path, path: Path, num_proposals: int, memory: float) -> dict[str, float]:
    """Seconds of the CPU and peak memory of this process, from the file to proposals."""
    keep_freed_blocks()
    proposer, _ = load_proposer(
        checkpoint, torch.device("cpu"), num_proposals=num_proposals, memory=memory
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    start, cpu = time.perf_counter(), time.process_time()
    proposer(read_image(path))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    seconds = {"seconds": time.perf_counter() - start, "of the CPU": time.process_time() - cpu}
    return seconds | {"peak MB": peak, "before the image": before}


def against_whole(
    checkpoint: Path, path: Path, num_proposals: int, memory: float, rounds: int
) -> Rows:
    """Whole scales and bands of rows, in turn."""
    keep_freed_blocks()
    image = read_image(path)
    proposers = {
        name: load_proposer(
            checkpoint, torch.device("cpu"), num_proposals=num_proposals, memory=memory
        )[0]
        for name, memory in (("whole", ENOUGH), ("bands", memory))
    }
    calls: Calls = {name: partial(proposer, image) for name, proposer in proposers.items()}
    return compare(calls, rounds=rounds)


if __name__ == "__main__":
    run_tool(main)
