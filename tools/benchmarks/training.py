#!/usr/bin/env python
r"""Patches a second of the training steps: DeepMask's two kinds of minibatch, and SharpMask's.

    python tools/benchmarks/training.py --trunk resnet50 --batch 8

Published sizes with random weights, everything of DeepMask trained, and random patches that are
already there: forward, backward and the optimizer. SharpMask's DeepMask is frozen, so its share of
a step is one forward pass without autograd and without its heads. The operations (convolutions and
matrix products, counted as they run) say what ratio the arithmetic alone would give.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from datasets.files import write_json
from models.deepmask import DeepMask
from models.losses import mask_loss, score_loss
from models.sharpmask import SharpMask
from models.trunk import build_trunk
from pipeline.command import run_tool
from pipeline.config import Config
from pipeline.training.engine import build_optimizer
from tools.benchmarks.timing import interleave, median_ratio, medians


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trunk", default="resnet50")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="write the figures as json")
    args = parser.parse_args()
    steps = build_steps(args.trunk, args.batch)
    gigaflops = {name: count_operations(step) / args.batch / 1e9 for name, step in steps.items()}
    seconds = interleave(steps, rounds=args.rounds)
    figures = {
        "GFLOP a patch": gigaflops,
        "patches a second": {name: args.batch / s for name, s in medians(seconds).items()},
        "SharpMask against DeepMask": {
            name: median_ratio(seconds[name], seconds["SharpMask"])
            for name in ("DeepMask, mask", "DeepMask, score")
        },
        "ratio of the operations": gigaflops["DeepMask, mask"] / gigaflops["SharpMask"],
    }
    print(f"{args.trunk}, batch {args.batch}, {torch.get_num_threads()} threads")
    for name, rate in figures["patches a second"].items():
        print(f"{name:16s} {rate:7.2f} patches/s {gigaflops[name]:7.2f} GFLOP a patch")
    for name, ratio in figures["SharpMask against DeepMask"].items():
        print(f"SharpMask: {ratio:.2f} times the patches of {name}")
    print(f"by operations alone: {figures['ratio of the operations']:.2f}")
    if args.output:
        write_json(args.output, figures)


def count_operations(step: Callable[[], None]) -> int:
    """Multiplications and additions of convolutions and matrix products, backward too."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def build_steps(trunk: str, batch: int) -> dict[str, Callable[[], None]]:
    """The three kinds of step, each of which trains its network when called."""
    torch.manual_seed(0)
    c = Config()
    deepmask = DeepMask(build_trunk(trunk))
    size = c.deepmask.patch_size + c.deepmask.context
    patches = torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
    labels, keys = torch.randn(batch).sign(), torch.arange(batch)
    coarse = torch.randn(batch, c.deepmask.target_size, c.deepmask.target_size).sign()
    fine = torch.randn(batch, c.deepmask.patch_size, c.deepmask.patch_size).sign()

    def mask_step() -> Tensor:
        return mask_loss(deepmask(patches, head="mask")["mask_logits"], coarse)

    def score_step() -> Tensor:
        return score_loss(deepmask(patches, head="score", keys=keys)["score_logits"], labels)

    frozen = DeepMask(build_trunk(trunk))
    sharpmask = SharpMask(frozen)
    sharpmask.start_from_deepmask()

    def refinement_step() -> Tensor:
        return mask_loss(sharpmask(patches, head="mask")["mask_logits"], fine)

    return {
        "DeepMask, mask": training_step(deepmask, mask_step, c.deepmask.optim),
        "DeepMask, score": training_step(deepmask, score_step, c.deepmask.optim),
        "SharpMask": training_step(sharpmask, refinement_step, c.sharpmask.optim),
    }


def training_step(model: nn.Module, loss: Callable[[], Tensor], optim) -> Callable[[], None]:
    """One step of the training loop on the same minibatch."""
    model.train().to(memory_format=torch.channels_last)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = build_optimizer(optim, [{"params": trained}])

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        optimizer.step()

    return step


if __name__ == "__main__":
    run_tool(main)
