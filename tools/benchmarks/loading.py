#!/usr/bin/env python
"""Training patches beside a straightforward loader, in seconds of the CPU.

    python tools/benchmarks/loading.py --config configs/coco_mini.yaml

One thread, by how many patches share a decoded image. The straightforward loader makes one patch
from an image, converting all of it to float and decoding the object's mask at full size.
"""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import cv2
import pycocotools.mask as coco_mask
import torch
from torch import Tensor
from torchvision.transforms.functional import normalize, resized_crop

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from datasets.patch_sampler import MASK, Patch
from datasets.patches import PatchDataset
from datasets.resize import MEAN, STD
from pipeline.command import run_tool
from pipeline.data import load_split, patch_dataset, prepare_data
from pipeline.recipe import load_config
from pipeline.sizes import choose_by_data
from tools.benchmarks.timing import Calls, compare, make_parser, report


def main() -> None:
    """Measures both ways to load mask patches of DeepMask's training data."""
    args = make_parser(__doc__, rounds=3, config="configs/shapes.yaml", patches=160).parse_args()
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    config = choose_by_data(load_config(args.config))
    prepare_data(config)
    c, (coco, images) = config.deepmask, load_split(config, "train")
    loaders: Calls = {}
    for shared in (1, 8):
        sampling = replace(c.sampling, patches_per_image=shared)
        data = patch_dataset(c, coco, images, sampling=sampling, target_size=c.target_size, seed=0)
        if shared == 1:
            loaders["straightforward"] = partial(load_straightforwardly, data, args.patches)
        loaders[f"{shared} from an image"] = partial(load_groups, data, args.patches // shared)
    rows = compare(loaders, rounds=args.rounds)
    for row in rows.values():
        row["patches a second"] = args.patches / row["seconds"]
    report({"patches": rows}, args.output)


def load_groups(data: PatchDataset, groups: int) -> None:
    """The first groups of mask patches."""
    for group in range(groups):
        data[MASK, 0, group]


def load_straightforwardly(data: PatchDataset, count: int) -> None:
    """The same patches the obvious way: everything at full size, then crop, resize, normalize."""
    for group in range(count):
        (patch,) = data.sampler.draw(MASK, 0, group)
        pixels = torch.from_numpy(data.images.read(data.coco.file_name(patch.image)))
        mask = torch.from_numpy(coco_mask.decode(data.coco.rle(patch.annotation)))
        image = crop(pixels.permute(2, 0, 1).float() / 255, patch, data.input_size, data.input_size)
        target = crop(mask[None].float(), patch, data.patch_size, data.target_size)
        normalize(image, MEAN, STD)
        torch.where(target > 0.5, 1.0, -1.0)


def crop(image: Tensor, patch: Patch, nominal: int, size: int) -> Tensor:
    """The square that a patch of `nominal` pixels covers of (C, H, W), as (C, size, size)."""
    side = max(1, round(nominal / patch.scale))
    top, left = round(patch.y - side / 2), round(patch.x - side / 2)
    square = resized_crop(image, top, left, side, side, [size, size], antialias=True)
    return square.flip(-1) if patch.flip else square


if __name__ == "__main__":
    run_tool(main)
