#!/usr/bin/env python
r"""Seconds of proposal inference by part, DeepMask beside SharpMask on the same image.

    python benchmarks/proposals.py --trunk resnet50 --num-proposals 10 100 1000

Weights are random: they change which masks come out, not how long the network takes; masks get the
area of a typical object by shifting the logits. Rounds of all variants are interleaved in one
process; the table has medians. The paper's GPU times are .46 s (DeepMask) and .76 s (SharpMask).
"""

import argparse
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path

import cv2
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets.files import write_json
from models.deepmask import DeepMask
from models.sharpmask import SharpMask
from models.trunk import build_trunk
from pipeline import propose
from pipeline.command import run_tool
from pipeline.propose import Proposer

PARTS = ("pyramid", "trunk", "tail", "score", "horizontal nets", "masks", "paste and RLE", "rest")


class Stopwatch:
    """Adds up the seconds spent in functions that it has been put around."""

    def __init__(self):
        self.seconds: dict[str, float] = defaultdict(float)

    def around(self, owner: object, name: str, part: str) -> None:
        """Times every call of `owner.name` as `part`."""
        function = getattr(owner, name)

        def timed(*args, **options):
            start = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                self.seconds[part] += time.perf_counter() - start

        # Not by plain assignment: a module refuses attributes that are modules' names.
        owner.__dict__[name] = timed


def build_networks(trunk: str) -> tuple[DeepMask, SharpMask]:
    """The published sizes with random weights, masks of a plausible area."""
    torch.manual_seed(0)
    deepmask = DeepMask(build_trunk(trunk)).eval()
    sharpmask = SharpMask(deepmask).eval()
    sharpmask.start_from_deepmask()
    pixels = torch.linspace(-1, 1, deepmask.mask_size)
    radius = (pixels[:, None] ** 2 + pixels[None] ** 2).sqrt()
    with torch.no_grad():  # a disk of half the patch, whose edge the embedding moves
        deepmask.mask_head.bias.copy_((4 * (0.6 - radius)).flatten())
    sharpmask.start_from_deepmask()
    return deepmask, sharpmask


def watched(model: DeepMask | SharpMask, count: int) -> tuple[Proposer, Stopwatch]:
    """A proposer whose parts are timed."""
    proposer, watch = Proposer(model, device=torch.device("cpu"), num_proposals=count), Stopwatch()
    watch.around(proposer, "decode", "masks")
    return proposer, watch


def measure(proposer: Proposer, watch: Stopwatch, image: np.ndarray) -> dict[str, float]:
    """Seconds of each part of one call."""
    deepmask, refinement = proposer.deepmask, proposer.refinement
    saved = {}
    for owner, name, part in (
        (propose, "resize_image", "pyramid"),
        (propose, "pad_and_normalise", "pyramid"),
        (propose, "paste", "paste and RLE"),
        (deepmask.trunk, "forward", "trunk"),
        (deepmask, "embed", "tail"),
        (deepmask, "score", "score"),
        *([(refinement, "horizontal_maps", "horizontal nets")] if refinement else []),
    ):
        saved[owner, name] = owner.__dict__.get(name)
        watch.around(owner, name, part)
    watch.seconds.clear()
    start = time.perf_counter()
    proposer(image)
    total = time.perf_counter() - start
    for (owner, name), original in saved.items():
        if original is None:
            del owner.__dict__[name]
        else:
            owner.__dict__[name] = original
    parts = dict(watch.seconds)
    return {**parts, "rest": total - sum(parts.values()), "all": total}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trunk", default="resnet50")
    parser.add_argument("--size", type=int, nargs=2, default=(640, 480), metavar=("W", "H"))
    parser.add_argument("--num-proposals", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="write the medians as json")
    args = parser.parse_args()
    width, height = args.size
    noise = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    image = cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
    networks = dict(zip(("DeepMask", "SharpMask"), build_networks(args.trunk), strict=True))
    rounds: dict[str, list[dict[str, float]]] = defaultdict(list)
    for number in range(args.rounds + 1):
        for count in args.num_proposals:
            for name, model in networks.items():
                parts = measure(*watched(model, count), image)
                if number:  # the first round warms up
                    rounds[f"{name}, N = {count}"].append(parts)
    medians = {
        name: {p: statistics.median(r.get(p, 0.0) for r in runs) for p in (*PARTS, "all")}
        for name, runs in rounds.items()
    }
    print(f"seconds for {width}x{height}, {args.trunk}, {torch.get_num_threads()} threads")
    print(" " * 22 + "".join(part.rjust(16) for part in (*PARTS, "all")))
    for name, parts in medians.items():
        print(name.ljust(22) + "".join(f"{parts[part]:16.3f}" for part in (*PARTS, "all")))
    for count in args.num_proposals:
        ratio = medians[f"SharpMask, N = {count}"]["all"] / medians[f"DeepMask, N = {count}"]["all"]
        print(f"N = {count}: SharpMask takes {ratio:.2f} times as long (paper: 1.65)")
    if args.output:
        write_json(args.output, medians)


if __name__ == "__main__":
    run_tool(main)
