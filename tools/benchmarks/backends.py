#!/usr/bin/env python
r"""Seconds of a call with the network in PyTorch and in OpenVINO's 8 bits, both mask networks.

    python tools/benchmarks/backends.py --trunk resnet50 --num-proposals 1000

Random weights and one image of 640 x 480: the time does not depend on them. What 8 bits do to the
proposals depends on trained weights: README.md has average recall with both.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from datasets.files import write_json
from pipeline.command import run_tool
from pipeline.inference.memory import keep_freed_blocks
from pipeline.inference.openvino import QuantizedNetwork, quantize
from pipeline.inference.propose import Proposer
from tools.benchmarks.proposals import build_networks, make_image
from tools.benchmarks.timing import interleave, median_ratio, medians


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trunk", default="resnet50")
    parser.add_argument("--num-proposals", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="write the figures as json")
    args = parser.parse_args()
    keep_freed_blocks()  # as the tools do
    image, figures = make_image(0.3), {}
    networks = zip(("DeepMask", "SharpMask"), build_networks(args.trunk), strict=True)
    for name, model in networks:
        options = {"device": torch.device("cpu"), "num_proposals": args.num_proposals}
        whole, eight = Proposer(model, **options), Proposer(model, **options)
        samples = [whole.scale(image, octave)[0] for octave in whole.octaves]
        with tempfile.TemporaryDirectory() as directory:
            quantize(whole.dense, samples, Path(directory) / "dense.xml")
            eight.dense = QuantizedNetwork(Path(directory) / "dense.xml")
        calls = {"PyTorch": lambda p=whole: p(image), "8 bits": lambda p=eight: p(image)}
        seconds = interleave(calls, rounds=args.rounds)
        figures[name] = medians(seconds) | {
            "ratio": median_ratio(seconds["PyTorch"], seconds["8 bits"])
        }
        print(f"{name}: " + ", ".join(f"{k} {v:.3g}" for k, v in figures[name].items()))
    if args.output:
        write_json(args.output, figures)


if __name__ == "__main__":
    run_tool(main)
