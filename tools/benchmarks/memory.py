#!/usr/bin/env python
r"""Resident memory while proposals are made for a folder of images: flat after the tenth?

    python tools/benchmarks/memory.py --images 200

One folder of images of one size and one of ever other sizes, each in a process of its own, through
what tools/propose.py calls; a small network, since the question is growth. Also what 10, 100 and
1000 proposals need.
"""

import argparse
import multiprocessing
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from datasets.files import write_json
from models.deepmask import DeepMask
from models.sharpmask import SharpMask
from models.trunk import build_trunk
from pipeline.command import run_tool
from pipeline.inference.memory import keep_freed_blocks
from pipeline.inference.propose import Proposer
from pipeline.inference.propose_run import propose_images

SETTLED = 10  # images


class WatchedProposer(Proposer):
    """Notes the resident memory after every image."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.megabytes: list[float] = []

    def __call__(self, *args, **options):
        proposals = super().__call__(*args, **options)
        self.megabytes.append(psutil.Process().memory_info().rss / 2**20)
        return proposals


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--trunk", default="resnet18")
    parser.add_argument("--num-proposals", type=int, default=100)
    parser.add_argument("--output", type=Path, help="write the figures as json")
    args = parser.parse_args()
    figures = {}
    for sizes in ("one size", "ever other sizes"):
        arguments = args.images, sizes == "one size", args.trunk, args.num_proposals
        # Spawned: what an earlier measurement has left behind would count.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
            megabytes = executor.submit(measure, *arguments).result()
        figures[sizes] = summarize(megabytes)
        print(sizes + ": " + ", ".join(f"{k} {v:.4g}" for k, v in figures[sizes].items()))
    if args.output:
        write_json(args.output, figures)


def summarize(megabytes: list[float]) -> dict[str, float]:
    """What a process held after the tenth image and later; growth is the last tenth's median."""
    settled, rest = megabytes[SETTLED - 1], megabytes[SETTLED - 1 :]
    last = float(np.median(megabytes[-max(1, len(megabytes) // 10) :]))
    return {
        f"MB after {SETTLED} images": settled,
        f"MB after {len(megabytes)}": last,
        "growth": last / settled - 1,
        "least": min(rest) / settled - 1,
        "most": max(rest) / settled - 1,
    }


def measure(images: int, same_size: bool, trunk: str, num_proposals: int) -> list[float]:
    """Resident megabytes after each image of a folder that is made up for it."""
    keep_freed_blocks()
    torch.manual_seed(0)
    model = SharpMask(DeepMask(build_trunk(trunk)))
    model.start_from_deepmask()
    proposer = WatchedProposer(model, device=torch.device("cpu"), num_proposals=num_proposals)
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory) / "images"
        folder.mkdir()
        write_images(folder, images, same_size=same_size)
        propose_images(proposer, folder, Path(directory) / "out", settings={})
    return proposer.megabytes


def write_images(folder: Path, count: int, *, same_size: bool) -> None:
    """JPEGs of smooth noise, of 480 x 640 or of sizes like COCO's: long side 640, the other any."""
    rng = np.random.default_rng(0)
    for number in range(count):
        height, width = (480, 640) if same_size else (int(rng.integers(300, 641)), 640)
        if not same_size and rng.random() < 0.3:
            height, width = width, height
        noise = rng.integers(0, 256, (height // 16, width // 16, 3), np.uint8)
        image = cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(folder / f"{number:06d}.jpg"), image)


if __name__ == "__main__":
    run_tool(main)
