#!/usr/bin/env python
r"""Patches a second beside a straightforward loader; loading annotations beside pycocotools.

    python tools/benchmarks/loading.py --config configs/coco_mini.yaml --images 20000

Patches: one thread, in seconds of the CPU, by how many patches share a decoded image. The
straightforward loader makes one patch from an image, converting all of it to float and decoding
the object's mask at full size. Annotations: a synthetic json like COCO's (a train2017 has 118,287
images), or --annotations; every load has a process of its own. Linux only.
"""

import contextlib
import io
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import psutil
import pycocotools.mask as coco_mask
import torch
from pycocotools.coco import COCO
from torch import Tensor
from torchvision.transforms.functional import normalize, resized_crop

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from datasets.coco import CocoInstances
from datasets.images import read_image
from datasets.patch_sampler import MASK, Patch
from datasets.patches import PatchDataset
from datasets.resize import MEAN, STD
from pipeline.command import run_tool
from pipeline.data import load_split, patch_dataset, prepare_data
from pipeline.recipe import load_config
from tools.benchmarks.synthetic import draw_dataset
from tools.benchmarks.timing import Rows, interleave, make_parser, median_ratio, report

SHARED = (1, 2, 4, 8)  # patches that share a decoded image


def main() -> None:
    """Measures both ways to load patches and annotations."""
    parser = make_parser(__doc__, rounds=3)
    parser.add_argument("--config", default="configs/shapes.yaml", help="a recipe: the patches")
    parser.add_argument("--patches", type=int, default=160, help="of each way and round")
    parser.add_argument("--images", type=int, default=20_000, help="of the synthetic json")
    parser.add_argument("--annotations", type=Path, help="a COCO json to load instead of it")
    args = parser.parse_args()
    tables = {"patches": measure_patches(args.config, args.patches, args.rounds)}
    with tempfile.TemporaryDirectory() as directory:
        path = args.annotations or Path(directory) / "instances.json"
        if args.annotations is None:
            path.write_text(json.dumps(draw_dataset(np.random.default_rng(0), args.images)))
        tables["annotations"] = measure_annotations(path, args.rounds)
    report(tables, args.output)


def measure_patches(recipe: str, count: int, rounds: int) -> Rows:
    """Mask patches per CPU second of DeepMask's training data, and of the straightforward way."""
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    config = load_config(recipe)
    prepare_data(config)
    c, (coco, images) = config.deepmask, load_split(config, "train")
    loaders: dict[str, Callable[[], None]] = {}
    for shared in SHARED:
        sampling = replace(c.sampling, patches_per_image=shared)
        data = patch_dataset(c, coco, images, sampling=sampling, target_size=c.target_size, seed=0)
        if shared == 1:
            loaders["straightforward"] = partial(load_straightforwardly, data, count)
        loaders[f"{shared} from an image"] = partial(load_groups, data, count // shared)
    seconds = interleave(loaders, rounds=rounds, clock=time.process_time)
    return {
        name: {
            "patches a second": count / statistics.median(values),
            "times straightforward": median_ratio(seconds["straightforward"], values),
        }
        for name, values in seconds.items()
    }


def load_groups(data: PatchDataset, groups: int) -> None:
    """The first groups of mask patches."""
    for group in range(groups):
        data[MASK, 0, group]


def load_straightforwardly(data: PatchDataset, count: int) -> None:
    """The same patches the obvious way: everything at full size, then crop, resize, normalize."""
    for group in range(count):
        (patch,) = data.sampler.draw(MASK, 0, group)
        pixels = torch.from_numpy(read_image(data.images / data.coco.file_name(patch.image)))
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


def measure_annotations(path: Path, rounds: int) -> Rows:
    """Medians of what a load takes; both loaders in turn."""
    runs: dict[str, list[dict[str, float]]] = {"pycocotools": [], "ours": []}
    for loader in [*runs] * rounds:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
            runs[loader].append(executor.submit(measure_load, loader, str(path)).result())
    rows = {
        loader: {name: statistics.median(run[name] for run in values) for name in values[0]}
        for loader, values in runs.items()
    }
    rows["ratio"] = {
        name: median_ratio(*([run[name] for run in runs[key]] for key in ("ours", "pycocotools")))
        for name in rows["ours"]
    }
    return rows


def measure_load(loader: str, path: str) -> dict[str, float]:
    """Seconds of a load; megabytes that it leaves resident, and that it needs at its peak."""
    before, start = psutil.Process().memory_info().rss, time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
        loaded = CocoInstances.load(path) if loader == "ours" else COCO(path)
    seconds, after = time.perf_counter() - start, psutil.Process().memory_info().rss
    del loaded
    status = Path("/proc/self/status").read_text()
    peak = 1024 * int(status.partition("VmHWM:")[2].split()[0])
    megabytes = {"resident MB": (after - before) / 2**20, "peak MB": (peak - before) / 2**20}
    return {"seconds": seconds, **megabytes}


if __name__ == "__main__":
    run_tool(main)
