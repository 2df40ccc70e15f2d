#!/usr/bin/env python
r"""Seconds of proposal inference by part, DeepMask beside SharpMask, and how near the floor it is.

    python tools/benchmarks/proposals.py --trunk resnet50 --num-proposals 10 100 1000 \
        --megapixels .3 1 4 --output proposals.json --plot proposals.png

The floor of a call is the time of its bare convolutions and matrix products, measured in the same
run (`floor.py`), as is the machine's peak. Weights are random: they change which masks come out,
not how long the network takes; masks get the area of a typical object by shifting the logits.
Rounds of all variants are interleaved in one process; figures are medians. The paper's GPU times
are .46 s (DeepMask) and .76 s (SharpMask).
"""

import argparse
import math
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from datasets.files import atomic_path, write_json
from models.deepmask import DeepMask
from models.sharpmask import SharpMask
from models.trunk import build_trunk, fold_norms
from pipeline.command import run_tool
from pipeline.inference import propose
from pipeline.inference.memory import keep_freed_blocks
from pipeline.inference.propose import Proposer
from tools.benchmarks.floor import count_work, floor_seconds, gemm_peak, time_calls

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
    size = deepmask.mask_size
    pixels = torch.linspace(-1, 1, size)
    radius = (pixels[:, None] ** 2 + pixels[None] ** 2).sqrt()
    # A disk of half the patch, whose edge the embedding moves, smoothly: masks with about as many
    # runs as trained ones have.
    bumps = torch.randn(deepmask.mask_head.in_channels, 1, 5, 5)
    bumps = F.interpolate(bumps, size=(size, size), mode="bicubic").flatten(1).T
    with torch.no_grad():
        deepmask.mask_head.bias.copy_((4 * (0.6 - radius)).flatten())
        deepmask.mask_head.weight.copy_(0.05 * bumps[:, :, None, None])
    sharpmask.start_from_deepmask()
    fold_norms(sharpmask)  # as `load_proposer` does; the two share DeepMask
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
        (propose, "pad_and_normalize", "pyramid"),
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


def make_image(megapixels: float) -> np.ndarray:
    """Smooth noise, 4 to 3: (H, W, 3) uint8; .3 megapixels are 640 x 480."""
    width = 64 * round(math.sqrt(megapixels * 1e6 * 4 / 3) / 64)
    height = width * 3 // 4
    noise = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    return cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)


def measure_rounds(
    networks: dict[str, DeepMask | SharpMask],
    counts: list[int],
    images: list[np.ndarray],
    rounds: int,
) -> dict[tuple[str, int, int], list[dict[str, float]]]:
    """Seconds by part, floor and peak in every round, by network, N and pixels."""
    work = {}
    for image in images:
        for name, model in networks.items():
            for count in counts:
                proposer = Proposer(model, device=torch.device("cpu"), num_proposals=count)
                key = name, count, image.shape[0] * image.shape[1]
                work[key] = count_work(lambda proposer=proposer, image=image: proposer(image))
    measured = defaultdict(list)
    smallest = min(image.size for image in images)
    for number in range(rounds):
        peak = gemm_peak()
        for image in images:
            if number and number >= rounds * smallest / image.size:
                continue  # a long call has less noise
            pixels = image.shape[0] * image.shape[1]
            own = {key: each for key, each in work.items() if key[2] == pixels}
            # A dict keeps the order, which a set does not.
            alone = time_calls(dict.fromkeys(call for calls, _ in own.values() for call in calls))
            for (name, count, _), (calls, flops) in own.items():
                parts = measure(*watched(networks[name], count), image)
                parts |= {"floor": floor_seconds(calls, alone), "flops": flops, "peak": peak}
                measured[name, count, pixels].append(parts)
    return measured


def summarize(runs: list[dict[str, float]]) -> dict[str, float]:
    """Medians of the rounds, and of the ratios within each."""
    row = {part: statistics.median(r.get(part, 0.0) for r in runs) for part in (*PARTS, "all")}
    ratios = {
        "floor": lambda r: r["floor"],
        "all / floor": lambda r: r["all"] / r["floor"],
        "GFLOP": lambda r: r["flops"] / 1e9,
        "GFLOP/s": lambda r: r["flops"] / r["all"] / 1e9,
        "of GEMM peak": lambda r: r["flops"] / r["all"] / r["peak"],
        "paste and RLE of all": lambda r: r["paste and RLE"] / r["all"],
    }
    return row | {name: statistics.median(map(of, runs)) for name, of in ratios.items()}


def fit_line(x: list[float], y: list[float]) -> dict[str, float]:
    """Least squares y = slope x + intercept, and R^2."""
    slope, intercept = np.polyfit(x, y, 1)
    rest = np.asarray(y) - (slope * np.asarray(x) + intercept)
    spread = np.asarray(y) - np.mean(y)
    r2 = 1 - (rest @ rest) / (spread @ spread)
    return {"slope": float(slope), "intercept": float(intercept), "R^2": float(r2)}


def fit_lines(rows: dict[tuple[str, int, int], dict[str, float]]) -> dict[str, dict]:
    """Seconds against N on the smallest image, and against pixels at the largest N.

    Only where there are three points or more: a line through two fits always.
    """
    most, smallest = max(key[1] for key in rows), min(key[2] for key in rows)
    lines = {}
    for name in dict.fromkeys(key[0] for key in rows):
        for label, axis, other, fixed in (("N", 1, 2, smallest), ("pixels", 2, 1, most)):
            own = sorted(key for key in rows if key[0] == name and key[other] == fixed)
            x, y = [key[axis] for key in own], [rows[key]["all"] for key in own]
            if len(x) >= 3:
                lines[f"{name}, {label}"] = {"x": x, "seconds": y, **fit_line(x, y)}
    return lines


def plot_lines(lines: dict[str, dict], path: Path) -> None:
    """The measured times and their lines, against N and against pixels."""
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    for axes, label in zip(figure.subplots(1, 2), ("N", "pixels"), strict=True):
        for name, line in lines.items():
            if name.endswith(f", {label}"):
                x = np.asarray(line["x"])
                text = f"{name.split(',')[0]}, R² {line['R^2']:.3f}"
                (points,) = axes.plot(x, line["seconds"], "o", label=text)
                axes.plot(x, line["slope"] * x + line["intercept"], color=points.get_color())
        axes.set(xlabel="proposals" if label == "N" else "pixels", ylabel="seconds", ylim=(0, None))
        axes.set_visible(bool(axes.lines))
        if axes.lines:
            axes.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def to_table(rows: dict[tuple[str, int, int], dict[str, float]]) -> str:
    """One column for each network, N and image."""
    names = next(iter(rows.values())).keys()
    lines = ["".ljust(22) + "".join(f"{key[0]:>12}" for key in rows)]
    lines.append("N".ljust(22) + "".join(f"{key[1]:12d}" for key in rows))
    lines.append("megapixels".ljust(22) + "".join(f"{key[2] / 1e6:12.2f}" for key in rows))
    for name in names:
        lines.append(name.ljust(22) + "".join(f"{row[name]:12.3f}" for row in rows.values()))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trunk", default="resnet50")
    parser.add_argument("--megapixels", type=float, nargs="+", default=[0.3, 1, 4])
    parser.add_argument("--num-proposals", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument(
        "--rounds",
        type=int,
        default=5,
        help="of the smallest image; in proportion, larger have fewer",
    )
    parser.add_argument("--output", type=Path, help="write the figures as json")
    parser.add_argument("--plot", type=Path, help="png of time against N and against pixels")
    args = parser.parse_args()
    keep_freed_blocks()  # as the tools do
    networks = dict(zip(("DeepMask", "SharpMask"), build_networks(args.trunk), strict=True))
    images = [make_image(size) for size in args.megapixels]
    measured = measure_rounds(networks, args.num_proposals, images, args.rounds)
    rows = {key: summarize(runs) for key, runs in measured.items()}
    lines = fit_lines(rows)
    peak = statistics.median(runs[0]["peak"] for runs in measured.values()) / 1e9
    print(f"seconds, {args.trunk}, {torch.get_num_threads()} threads, GEMM {peak:.0f} GFLOP/s")
    print(to_table(rows))
    for name, line in lines.items():
        print(f"{name}: {line['slope']:.3g} s each, R^2 {line['R^2']:.4f}")
    if args.output:
        named = {
            f"{name}, N = {count}, {pixels / 1e6:.2f} Mpx": row
            for (name, count, pixels), row in rows.items()
        }
        write_json(args.output, {"GEMM GFLOP/s": peak, "calls": named, "lines": lines})
    if args.plot:
        plot_lines(lines, args.plot)


if __name__ == "__main__":
    run_tool(main)
