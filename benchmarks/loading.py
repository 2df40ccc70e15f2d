#!/usr/bin/env python
r"""Does loading ever stall training? A simulation: a "GPU" that sleeps, fed by this machine.

    python benchmarks/loading.py --config configs/coco_mini.yaml

The question is a GPU that takes 100 ms for a minibatch of 32 patches, and 8 loading workers on
cores of their own. A machine of fewer cores runs as many workers as it can spare a core for (of two
one: the other starts the steps), and a step is made longer in proportion, 100 ms times 8 over that
number, so that each worker has the time for a minibatch that it would have. A step is stalled when
its minibatch is not there 5 ms after the one before it was done. Not simulated: eight processes
that read from one disk and share one memory bus.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets.files import write_json
from datasets.patches import BatchKeys, PatchDataset, patch_loader
from pipeline.command import run_tool
from pipeline.config import load_config
from pipeline.patch_stages import patch_dataset
from pipeline.splits import load_split, prepare_data

GPU_STEP, GPU_WORKERS, BATCH = 0.1, 8, 32  # seconds, of the question
LATE = 0.005  # seconds that handing over a minibatch may take
SHARED, PREFETCH = (1, 8), (1, 2, 4)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/coco_mini.yaml")
    parser.add_argument("--steps", type=int, default=25, help="of each setting")
    parser.add_argument("--workers", type=int, default=1, help="of this machine, a core each")
    parser.add_argument("--output", type=Path, help="write the figures as json")
    args = parser.parse_args()
    config = load_config(args.config)
    prepare_data(config)
    c = config.deepmask
    data = patch_dataset(
        c, *load_split(config, "train"), sampling=c.sampling, target_size=c.target_size, seed=0
    )
    step = GPU_STEP * GPU_WORKERS / args.workers
    print(f"{args.workers} workers, a step of {BATCH} patches takes {step * 1000:.0f} ms")
    figures = {}
    for shared in SHARED:
        data.patches_per_image = shared
        for prefetch in PREFETCH:
            name = f"{shared} patches an image, prefetch {prefetch}"
            figures[name] = simulate(data, args.steps, step, args.workers, prefetch)
            print(name + ": " + ", ".join(f"{k} {v:.4g}" for k, v in figures[name].items()))
    if args.output:
        write_json(args.output, figures)


def simulate(
    data: PatchDataset, steps: int, step: float, workers: int, prefetch: int
) -> dict[str, float]:
    """How long the steps waited for their minibatches, and how fast workers load without a wait."""
    loader = patch_loader(data, batch_keys(data, 2 * steps), workers=workers, prefetch=prefetch)
    batches = iter(loader)
    next(batches)  # the workers have started
    waits = []
    for _ in range(steps):
        time.sleep(step)
        start = time.perf_counter()
        next(batches)
        waits.append(time.perf_counter() - start)
    for _ in range(workers * prefetch):
        next(batches, None)  # what they have ready
    start, rest = time.perf_counter(), sum(1 for _ in batches)
    seconds = time.perf_counter() - start
    return {
        "stalled steps": sum(wait > LATE for wait in waits),
        "steps": steps,
        "longest wait, ms": max(waits) * 1000,
        "median wait, ms": statistics.median(waits) * 1000,
        "patches a second of a worker": rest * BATCH / seconds / workers if rest else 0.0,
    }


def batch_keys(data: PatchDataset, steps: int) -> BatchKeys:
    """Minibatches of both kinds, as DeepMask's training draws them."""
    groups = BATCH // data.patches_per_image
    return BatchKeys(range(steps), batches_per_epoch=steps, groups_per_batch=groups)


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_tool(main)
