#!/usr/bin/env python
r"""Does loading ever stall a GPU that takes 100 ms for 32 patches, with 8 workers? A simulation.

    python tools/benchmarks/loading.py --config configs/coco_mini.yaml

Measured: the CPU seconds that one core of this machine needs for each of a row of minibatches, of
both kinds, decoding to collating. Simulated with them: workers on a core each, which load the
minibatches in turn and hold up to `prefetch` of them, as PyTorch's DataLoader has it, and a GPU
that takes one whenever it is done with the one before. A step is stalled when it has to wait for
its minibatch. Not in it: workers that wait for a disk, and the copy to the GPU.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.benchmarks.patches import training_patches

from datasets.files import write_json
from datasets.patches import BatchKeys, PatchDataset, collate_groups
from pipeline.command import run_tool

STEP, BATCH = 0.1, 32  # seconds and patches
SHARED, WORKERS, PREFETCH = (1, 2, 8), (1, 2, 4, 8), (1, 2, 4)
ROUNDS = 10  # how often the measured minibatches are gone through


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/coco_mini.yaml")
    parser.add_argument("--steps", type=int, default=40, help="minibatches to measure")
    parser.add_argument("--output", type=Path, help="write the figures as json")
    args = parser.parse_args()
    data = training_patches(args.config)
    figures = {}
    for shared in SHARED:
        data.patches_per_image = shared
        seconds = load_seconds(data, args.steps)
        own = figures[f"{shared} patches an image"] = {
            "ms a minibatch": statistics.mean(seconds) * 1000,
            "longest, ms": max(seconds) * 1000,
        }
        for workers in WORKERS:
            for prefetch in PREFETCH:
                waits = simulate(seconds * ROUNDS, workers=workers, prefetch=prefetch)
                stalled = sum(wait > 0 for wait in waits) / len(waits)
                own[f"stalled, {workers} workers, prefetch {prefetch}"] = stalled
    for name, own in figures.items():
        print(name + ": " + ", ".join(f"{key} {value:.3g}" for key, value in own.items()))
    if args.output:
        write_json(args.output, figures)


def load_seconds(data: PatchDataset, steps: int) -> list[float]:
    """CPU seconds of each minibatch, in the order that DeepMask's training draws them."""
    groups = BATCH // data.patches_per_image
    keys = BatchKeys(range(steps), batches_per_epoch=steps, groups_per_batch=groups)
    seconds = []
    for own in keys:
        start = time.process_time()
        collate_groups([data[key] for key in own])
        seconds.append(time.process_time() - start)
    return seconds


def simulate(seconds: list[float], *, workers: int, prefetch: int) -> list[float]:
    """How long each step but the first waits for its minibatch.

    Args:
        seconds: that loading each minibatch takes.
    """
    free = [0.0] * workers  # when each worker is done with what it has
    taken: list[float] = []
    waits, gpu_free = [], 0.0
    for number, load in enumerate(seconds):
        # A place is free for it once the minibatch that many before it has been taken.
        asked_for = number - workers * prefetch
        start = max(free[number % workers], taken[asked_for] if asked_for >= 0 else 0.0)
        free[number % workers] = start + load
        taken.append(max(gpu_free, start + load))
        waits.append(taken[-1] - gpu_free)
        gpu_free = taken[-1] + STEP
    return waits[1:]


if __name__ == "__main__":
    run_tool(main)
