#!/usr/bin/env python
r"""Truncated SVD of a detector's fully connected layers: seconds for an image, and AP, by rank.

    python tools/benchmarks/compression.py --checkpoint runs/demo/multipathnet/checkpoints/best.pt \
        --proposals runs/demo/sharpmask/proposals --output runs/compression \
        --annotations runs/shapes/annotations/instances_val.json --ranks 16 32 64

The networks take turns on every image, in one process; seconds are of the whole detection, trunk
and selection included, and the ratio to the uncompressed network is the median over the images.
"""

import argparse
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from datasets.files import write_atomically, write_json
from models.svd import compress_towers
from pipeline.command import add_device, run_tool
from pipeline.evaluation.precision import evaluate_detections
from pipeline.evaluation.recall import load_ground_truth
from pipeline.inference.detect import Detector
from pipeline.inference.detect_run import image_folder, with_images
from pipeline.inference.detections import Detections
from pipeline.inference.proposals import ProposalStore
from pipeline.load import load_detector

COLUMNS = [(kind, name) for kind in ("box", "mask") for name in ("AP", "AP50", "AP75")]


@dataclass
class Variant:
    """A network, and what it has found in how many seconds, image by image."""

    name: str
    detector: Detector
    seconds: list[float] = field(default_factory=list)
    found: list[Detections] = field(default_factory=list)


def variants(checkpoint: str, ranks: list[int], device: torch.device) -> list[Variant]:
    """The network as it is, and compressed to each rank."""
    made = [Variant("whole", load_detector(checkpoint, device)[0])]
    for rank in ranks:
        if rank < 1:
            raise ValueError(f"--ranks must be at least 1, got {rank}")
        detector, _ = load_detector(checkpoint, torch.device("cpu"))
        compress_towers(detector.model, rank)
        detector.model.to(device)
        made.append(Variant(f"K = {rank}", detector))
    return made


def measure(networks: list[Variant], store: ProposalStore, images: Path, device: torch.device):
    """Runs all networks on every image of the store; the first image warms up."""
    broken: list[str] = []
    pairs = with_images(store, store.require_shards(), images, broken)
    for number, (image, proposals) in enumerate(tqdm(pairs, unit="image", disable=None)):
        if number == 0:
            for variant in networks:
                variant.detector(image, proposals)
        for variant in networks:
            start = time.perf_counter()
            found = variant.detector(image, proposals)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            variant.seconds.append(time.perf_counter() - start)
            variant.found.append(found)
    for message in broken:
        print(f"left out: {message}")


def report(variant: Variant, whole: Variant, annotations: Path) -> dict:
    """Parameters in millions, seconds, share of the whole network's seconds, AP."""
    results = [result for found in variant.found for result in found.results()]
    metrics = evaluate_detections(load_ground_truth(annotations), results).metrics()
    ratios = [own / other for own, other in zip(variant.seconds, whole.seconds, strict=True)]
    return {
        "parameters": sum(p.numel() for p in variant.detector.model.parameters()) / 1e6,
        "seconds": statistics.median(variant.seconds),
        "ratio": statistics.median(ratios),
        **{kind: metrics[kind] for kind in ("box", "mask")},
    }


def to_table(rows: dict[str, dict]) -> str:
    """A line for each network; AP in percent."""
    headings = ["M parameters", "s/image", "ratio", *(f"{kind} {name}" for kind, name in COLUMNS)]
    lines = [" " * 10 + "".join(heading.rjust(14) for heading in headings)]
    for name, row in rows.items():
        cells = [f"{row['parameters']:.2f}", f"{row['seconds']:.3f}", f"{row['ratio']:.2f}"]
        cells += [f"{100 * row[kind][metric]:.1f}" for kind, metric in COLUMNS]
        lines.append(name.ljust(10) + "".join(cell.rjust(14) for cell in cells))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, help="a MultiPathNet with head fc")
    parser.add_argument("--proposals", required=True, type=Path, help="proposal store")
    parser.add_argument("--images", type=Path, help="their folder, if the store does not say")
    parser.add_argument("--annotations", required=True, type=Path)
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--output", required=True, type=Path)
    add_device(parser)
    args = parser.parse_args()
    device = torch.device(args.device)
    store = ProposalStore(args.proposals)
    networks = variants(args.checkpoint, args.ranks, device)
    measure(networks, store, image_folder(store, args.images), device)
    rows = {v.name: report(v, networks[0], args.annotations) for v in networks}
    table = to_table(rows)
    write_json(args.output / "compression.json", rows)
    write_atomically(args.output / "compression.txt", (table + "\n").encode())
    print(f"{len(networks[0].seconds)} images, {torch.get_num_threads()} threads\n{table}")


if __name__ == "__main__":
    run_tool(main)
