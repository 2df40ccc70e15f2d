#!/usr/bin/env python
"""Patches a second of one core, by how many share a decoded image, beside a straightforward loader.

    python tools/benchmarks/patches.py --config configs/coco_mini.yaml

The straightforward loader decodes the image for every patch, converts all of it to float, and makes
the target by decoding the object's mask at the image's full size. All variants are measured in
turn, several rounds in one run; the table has medians.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import cv2
import pycocotools.mask as coco_mask
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from datasets.files import write_json
from datasets.patch_sampler import MASK
from datasets.patches import PatchDataset
from datasets.transforms import MEAN, STD
from pipeline.command import run_tool
from pipeline.config import load_config
from pipeline.data import load_split, prepare_data
from pipeline.training.patch_stages import patch_dataset

SHARED = (1, 2, 4, 8)


def training_patches(recipe: str) -> PatchDataset:
    """DeepMask's training patches by a recipe, loaded on one thread from here on."""
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    config = load_config(recipe)
    prepare_data(config)
    c = config.deepmask
    return patch_dataset(
        c, *load_split(config, "train"), sampling=c.sampling, target_size=c.target_size, seed=0
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/coco_mini.yaml")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--patches", type=int, default=160, help="per variant and round")
    parser.add_argument("--output", type=Path, help="write the medians as json")
    args = parser.parse_args()
    data = training_patches(args.config)
    rates: dict[str, list[float]] = {}
    for round_number in range(args.rounds):
        for name, rate in measure(data, args.patches, epoch=round_number):
            rates.setdefault(name, []).append(rate)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    base = medians["straightforward"]
    for name, median in medians.items():
        print(f"{name:24s} {median:7.0f} patches/s of one core   {median / base:5.2f} x")
    if args.output:
        write_json(args.output, medians)
    print(json.dumps({name: round(median, 1) for name, median in medians.items()}))


def measure(data: PatchDataset, count: int, *, epoch: int):
    """(name, patches per CPU second) of each variant, mask patches."""
    for shared in SHARED:
        data.patches_per_image = shared
        start = time.process_time()
        for group in range(count // shared):
            data.load(MASK, epoch, group)
        yield f"{shared} per decoded image", count / (time.process_time() - start)
    start = time.process_time()
    for group in range(count // 4):
        straightforward(data, epoch, group)
    yield "straightforward", count / 4 / (time.process_time() - start)


def straightforward(data: PatchDataset, epoch: int, group: int) -> tuple[torch.Tensor, ...]:
    """One mask patch the obvious way: everything at full size, then crop and resize."""
    (patch,) = data.sampler.draw(MASK, epoch, group, 1)
    image = torch.from_numpy(data.read_image(patch.image)).permute(2, 0, 1).float() / 255
    mask = torch.from_numpy(coco_mask.decode(data.coco.rle(patch.annotation))).float()[None]
    pixels = _crop(image, patch, data.input_size, data.input_size, fill=0.5)
    target = _crop(mask, patch, data.patch_size, data.target_size, fill=0.0)
    if patch.flip:
        pixels, target = pixels.flip(-1), target.flip(-1)
    pixels = (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    return pixels.float(), torch.where(target[0] > 0.5, 1.0, -1.0)


def _crop(image: torch.Tensor, patch, nominal: int, size: int, *, fill: float) -> torch.Tensor:
    half = nominal / (2 * patch.scale)
    x0, y0 = round(patch.x - half), round(patch.y - half)
    side = max(1, round(2 * half))
    height, width = image.shape[1:]
    pad = [max(0, -x0), max(0, x0 + side - width), max(0, -y0), max(0, y0 + side - height)]
    padded = F.pad(image, pad, value=fill)
    crop = padded[:, y0 + pad[2] : y0 + pad[2] + side, x0 + pad[0] : x0 + pad[0] + side]
    resized = F.interpolate(crop[None], size=(size, size), mode="bilinear", antialias=True)
    return resized[0]


if __name__ == "__main__":
    run_tool(main)
