#!/usr/bin/env python
r"""Seconds of detection in one image by part, whole and truncated fully connected layers beside.

    python tools/benchmarks/detections.py --trunk vgg16 --num-proposals 400 1000

MultiPathNet at its published size with random weights, an image of 800 x 1000 pixels that is not
resized, and random proposals. "truncated" has fc6 and fc7 of the shapes that --compress-fc gives
them. Rounds of all variants are interleaved in one process; the table has medians, and the peak
memory after the first call with each number of proposals. (detection.py is another benchmark: what
the parts of the network add to the scores.)
"""

import argparse
import copy
import resource
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from datasets.files import write_json
from models.multipathnet import MultiPathNet
from pipeline.command import run_tool
from pipeline.config import Config, DetectConfig
from pipeline.inference import detect
from pipeline.inference.detect import Detector
from pipeline.inference.proposals import Proposals
from pipeline.networks import build_multipathnet

CLASSES = 80
HEIGHT, WIDTH = 800, 1000
PARTS = ("trunk", "pooling", "heads", "NMS", "rest")

seconds: dict[str, float] = defaultdict(float)  # of the call at hand, by part


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trunk", default="vgg16")
    parser.add_argument("--features", type=int, default=4096, help="width of fc6 and fc7")
    parser.add_argument("--num-proposals", type=int, nargs="+", default=[400, 1000])
    parser.add_argument("--rank", type=int, default=1024, help="of the truncated layers")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--output", type=Path, help="write the figures as json")
    args = parser.parse_args()
    noise = np.random.default_rng(0).integers(0, 256, (HEIGHT // 8, WIDTH // 8, 3), np.uint8)
    image = cv2.resize(noise, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
    detect.select_boxes = timed(detect.select_boxes, "NMS")
    models = build_models(args.trunk, args.features, args.rank)
    rounds: dict[str, list[dict[str, float]]] = defaultdict(list)
    peaks = {}
    for number in range(args.rounds + 1):
        for count in sorted(args.num_proposals):
            for name, model in models.items():
                parts = measure(model, image, count)
                if number:  # the first round warms up
                    rounds[f"{name}, N = {count}"].append(parts)
            kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            peaks.setdefault(f"peak MB, N = {count}", kilobytes / 1024)
    figures = {
        name: {
            part: statistics.median(run.get(part, 0.0) for run in runs) for part in (*PARTS, "all")
        }
        for name, runs in rounds.items()
    }
    print_table(args.trunk, figures, peaks)
    if args.output:
        write_json(args.output, {**figures, **peaks})


def build_models(trunk: str, features: int, rank: int) -> dict[str, MultiPathNet]:
    """The published detector, and the same (not copied) with truncated layers."""
    torch.manual_seed(0)
    config = Config()
    config.multipathnet.trunk.name, config.multipathnet.features = trunk, features
    whole = build_multipathnet(config, num_classes=CLASSES, pretrained=False).eval()
    leaves = {id(layer): layer for layer in whole.modules() if not list(layer.children())}
    truncated = copy.deepcopy(whole, leaves)
    for tower in towers_of(truncated):
        for name in ("fc6", "fc7"):
            layer = getattr(tower.head, name)
            first = nn.Linear(layer.in_features, rank, bias=False)
            setattr(tower.head, name, nn.Sequential(first, nn.Linear(rank, layer.out_features)))
    models = {"whole": whole, "truncated": truncated}
    for model in models.values():
        watch_parts(model)
    return models


def towers_of(model: MultiPathNet) -> list[nn.Module]:
    """All towers, the box regressor's too."""
    return [*model.towers, *([model.box_tower] if model.box_tower is not None else [])]


def watch_parts(model: MultiPathNet) -> None:
    """Has the parts of a network add their time to `seconds` from now on."""
    model.trunk.forward = timed(model.trunk.forward, "trunk")
    model.pool = timed(model.pool, "pooling")
    for tower in towers_of(model):
        tower.pooling.forward = timed(tower.pooling.forward, "pooling")
        tower.head.forward = timed(tower.head.forward, "heads")


def timed(function: Callable, part: str) -> Callable:
    """The function, adding what it takes to `seconds`."""

    def call(*args, **options):
        start = time.perf_counter()
        result = function(*args, **options)
        seconds[part] += time.perf_counter() - start
        return result

    return call


def measure(model: MultiPathNet, image: np.ndarray, count: int) -> dict[str, float]:
    """Seconds of each part of the detection in one image."""
    categories = [{"id": n + 1, "name": str(n)} for n in range(CLASSES)]
    detector = Detector(
        model,
        categories,
        device=torch.device("cpu"),
        short_sides=[HEIGHT],
        long_side=WIDTH,
        options=DetectConfig(num_proposals=count),
    )
    proposals = draw_proposals(count)
    seconds.clear()
    start = time.perf_counter()
    detector(image, proposals)
    total = time.perf_counter() - start
    return {**seconds, "rest": total - sum(seconds.values()), "all": total}


def draw_proposals(count: int) -> Proposals:
    """Boxes of all sizes; detection only hands the masks on."""
    rng = np.random.default_rng(0)
    sizes = np.exp(rng.uniform(np.log(16), np.log([WIDTH, HEIGHT]), (count, 2)))
    corners = rng.uniform(0, [WIDTH, HEIGHT] - sizes)
    boxes = np.concatenate([corners, corners + sizes], axis=1).astype(np.float32)
    scores = np.linspace(1, 0, count, dtype=np.float32)
    return Proposals(1, "noise.jpg", HEIGHT, WIDTH, scores, boxes, [b""] * count)


def print_table(trunk: str, figures: dict[str, dict[str, float]], peaks: dict) -> None:
    print(f"seconds for {WIDTH}x{HEIGHT}, {trunk}, {torch.get_num_threads()} threads")
    print(" " * 22 + "".join(part.rjust(12) for part in (*PARTS, "all")))
    for name, parts in figures.items():
        print(name.ljust(22) + "".join(f"{parts[part]:12.3f}" for part in (*PARTS, "all")))
    for name, megabytes in peaks.items():
        print(f"{name}: {megabytes:.0f}")


if __name__ == "__main__":
    run_tool(main)
