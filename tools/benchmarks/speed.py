#!/usr/bin/env python
r"""Seconds of proposals, detection and training steps on the CPU, and how near the floor they are.

    python tools/benchmarks/speed.py --config configs/coco.yaml --num-proposals 10 100 1000
    python tools/benchmarks/speed.py --config configs/shapes.yaml --only training --batch 32
    python tools/benchmarks/speed.py --precision fp32 bf16

The floor of a call is its convolutions and matrix products at the machine's peak, the speed of a
large matrix product in the same round. Weights are random: they change which masks come out, not
how long the network takes. Every round calls everything once, and the table has medians.
"""

import argparse
import itertools
import math
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from models.losses import mask_loss
from pipeline.command import run_tool
from pipeline.config import Config
from pipeline.inference.memory import keep_freed_blocks
from pipeline.inference.propose import load_proposer
from pipeline.networks import make_deepmask, make_multipathnet, make_sharpmask
from pipeline.training.engine import build_optimizer
from tools.benchmarks.synthetic import (
    draw_image,
    draw_rois,
    load_recipe,
    make_detector,
    write_sharpmask,
)
from tools.benchmarks.timing import Calls, Rows, interleave, make_parser, median_ratio, report

CPU = torch.device("cpu")
PRODUCT_SIDE = 1024  # of the matrices whose product gives the peak


def main() -> None:
    """Times the calls of each section."""
    parser = make_parser(
        __doc__,
        rounds=5,
        config="configs/coco.yaml",
        num_proposals=[10, 1000],
        megapixels=[0.3],
        rois=[400],
        batch=8,
        precision=["fp32"],
    )
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    args = parser.parse_args()
    keep_freed_blocks()  # as the tools do
    torch.manual_seed(0)
    config = load_recipe(args.config, args.set)
    tables = {name: measure(SECTIONS[name](config, args), args.rounds) for name in args.only}
    print(f"{torch.get_num_threads()} threads")
    report(tables, args.output)


def measure(calls: Calls, rounds: int) -> Rows:
    """Seconds, operations and floor of each call."""
    operations = {name: count_operations(call) for name, call in calls.items()}
    square = torch.rand(PRODUCT_SIDE, PRODUCT_SIDE)
    image = square[None, None].permute(0, 3, 1, 2)  # (1, side, 1, side), channels last
    # Which library multiplies faster depends on the processor: up to a factor of two.
    products: Calls = {
        "matrix product": lambda: [square @ square for _ in range(5)],
        "convolution": lambda: [F.conv2d(image, square[:, :, None, None]) for _ in range(5)],
    }
    seconds = interleave(calls | products, rounds=rounds)
    fastest = list(map(min, *(seconds.pop(name) for name in products)))
    rows = {}
    for name, times in seconds.items():
        # In each round, at that round's peak.
        floors = [operations[name] * each / (5 * 2 * PRODUCT_SIDE**3) for each in fastest]
        rows[name] = {
            "seconds": statistics.median(times),
            "GFLOP": operations[name] / 1e9,
            "floor": statistics.median(floors),
            "times the floor": median_ratio(times, floors),
        }
    return rows


def count_operations(call: Callable[[], object]) -> int:
    """Multiplications and additions in the convolutions and matrix products of a call."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def proposal_calls(config: Config, args: argparse.Namespace) -> Calls:
    """Whole calls of DeepMask and SharpMask, by number of proposals and size of the image."""
    calls: Calls = {}
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = Path(directory) / "sharpmask.pt"
        write_sharpmask(config, checkpoint)
        for name, count, precision in itertools.product(
            ("DeepMask", "SharpMask"), args.num_proposals, args.precision
        ):
            proposer, _ = load_proposer(
                checkpoint,
                CPU,
                num_proposals=count,
                refine=name == "SharpMask",
                precision=precision,
            )
            for size in args.megapixels:
                width = 64 * round(math.sqrt(size * 1e6 * 4 / 3) / 64)  # .3: 640 x 480
                image = draw_image(np.random.default_rng(0), width * 3 // 4, width)
                calls[f"{name}, {count} proposals, {size:g} Mpx, {precision}"] = partial(
                    proposer, image
                )
    return calls


def detection_calls(config: Config, args: argparse.Namespace) -> Calls:
    """Detection in an image that has the network's size already, by number of RoIs."""
    calls: Calls = {}
    model = make_multipathnet(config, num_classes=80)
    for count, precision in itertools.product(args.rois, args.precision):
        image, proposals = draw_rois(np.random.default_rng(0), config, count)
        detector = make_detector(config, model, CPU, precision, num_proposals=count)
        calls[f"MultiPathNet, {count} RoIs, {precision}"] = partial(detector, image, proposals)
    return calls


def training_calls(config: Config, args: argparse.Namespace) -> Calls:
    """Training steps, always on the same random mask patches: forward, backward, optimizer."""
    calls: Calls = {}
    c, sharpmask, side = config.deepmask, config.sharpmask, config.deepmask.patch_size
    patches = torch.randn(args.batch, 3, side + c.context, side + c.context)
    patches = patches.contiguous(memory_format=torch.channels_last)
    for name, model, optim, target_size in (
        ("DeepMask", make_deepmask(config), c.optim, c.target_size),
        ("SharpMask", make_sharpmask(config), sharpmask.optim, side),
    ):
        targets = torch.randn(args.batch, target_size, target_size).sign()
        model.train().to(memory_format=torch.channels_last)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = build_optimizer(optim, [{"params": trained}])
        for precision in args.precision:
            call = partial(train_step, model, optimizer, patches, targets, precision)
            calls[f"{name}, {args.batch} patches, {precision}"] = call
    return calls


def train_step(
    model: nn.Module, optimizer: Optimizer, patches: Tensor, targets: Tensor, precision: str
) -> None:
    """One step of the training loop."""
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        loss = mask_loss(model(patches, head="mask")["mask_logits"], targets)
    loss.backward()
    optimizer.step()


SECTIONS: dict[str, Callable[[Config, argparse.Namespace], Calls]] = {
    "proposals": proposal_calls,
    "detection": detection_calls,
    "training": training_calls,
}


if __name__ == "__main__":
    run_tool(main)
