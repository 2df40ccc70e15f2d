"""Loading a train2017-sized COCO json: seconds and memory of `CocoInstances.load` and pycocotools.

Writes a synthetic json (118,287 images, 860,001 annotations, some 450 MB, kept in --work-dir), then
measures in fresh processes, in turn, and prints medians. Memory is what the process has grown by
since its modules were imported. Then four data-loader workers, forked or spawned, touch every
annotation; what they add is the proportional memory (PSS) of all processes, less the same for a
tiny json, less what the annotations take in one process. Only anonymous and shared memory counts:
pages of libraries come and go with what else runs. Linux only; some ten minutes.

    python tools/benchmarks/annotations.py --work-dir annotations --output annotations.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import psutil
from pycocotools.coco import COCO
from torch.utils.data import DataLoader, Dataset

from datasets.coco import CocoInstances

IMAGES, ANNOTATIONS = 118_287, 860_001  # instances_train2017.json
CATEGORY_IDS = [i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]
CROWD_SHARE = 0.012
WORKERS = 4


def write_synthetic_json(path: Path, *, images: int, annotations: int, seed: int = 0) -> None:
    """Write a json with the keys, and about the numbers and the order, of COCO's."""
    rng = np.random.default_rng(seed)
    sizes = rng.choice([[480, 640], [640, 480], [427, 640], [375, 500]], images)
    partial = path.with_suffix(".partial")
    with partial.open("w") as file:
        file.write('{"info": {"description": "synthetic"}, "licenses": [], "images": [')
        _write_elements(file, (_image(i, size) for i, size in enumerate(sizes.tolist())))
        file.write('], "annotations": [')
        _write_elements(file, (_annotation(rng, i, sizes) for i in range(annotations)))
        file.write('], "categories": ')
        json.dump([{"supercategory": "thing", "id": i, "name": f"thing {i}"}
                   for i in CATEGORY_IDS], file)  # fmt: skip
        file.write("}")
    partial.replace(path)


def _write_elements(file, elements: Iterator[dict]) -> None:
    for i, element in enumerate(elements):
        file.write((", " if i else "") + json.dumps(element))


def _image(index: int, size: list[int]) -> dict:
    name = f"{index + 1:012d}.jpg"
    return {
        "license": 1,
        "file_name": name,
        "coco_url": f"http://images.cocodataset.org/train2017/{name}",
        "height": size[0],
        "width": size[1],
        "date_captured": "2013-11-14 16:28:13",
        "flickr_url": f"http://farm4.staticflickr.com/3153/{index:010d}_cbcb5cbc56_z.jpg",
        "id": index + 1,
    }


def _annotation(rng: np.random.Generator, index: int, sizes: np.ndarray) -> dict:
    image = int(rng.integers(len(sizes)))
    height, width = sizes[image].tolist()
    is_crowd = rng.random() < CROWD_SHARE
    if is_crowd:
        count = 2 * int(rng.integers(20, 400))
        runs = 1 + rng.multinomial(height * width - count, rng.dirichlet(np.ones(count)))
        segmentation = {"counts": runs.tolist(), "size": [height, width]}
        box, area = [0, 0, width, height], int(runs[1::2].sum())
    else:
        rings = [_ring(rng, height, width) for _ in range(1 + rng.poisson(0.18))]
        segmentation = [ring.ravel().tolist() for ring in rings]
        points = np.concatenate(rings)
        low, high = points.min(axis=0), points.max(axis=0)
        box = [*low.tolist(), *(high - low).round(2).tolist()]
        area = float(np.prod(high - low) * 0.6)
    return {
        "segmentation": segmentation,
        "area": area,
        "iscrowd": int(is_crowd),
        "image_id": image + 1,
        "bbox": box,
        "category_id": CATEGORY_IDS[rng.integers(len(CATEGORY_IDS))],
        "id": index + 1,
    }


def _ring(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A star-shaped polygon with coordinates in hundredths of a pixel, as COCO's."""
    count = int(np.clip(rng.lognormal(2.75, 0.65), 4, 300))
    angles = np.sort(rng.random(count)) * 2 * np.pi
    radius = min(height, width) * rng.uniform(0.02, 0.45) * rng.uniform(0.6, 1, count)
    x = rng.uniform(0, width) + radius * np.cos(angles)
    y = rng.uniform(0, height) + radius * np.sin(angles)
    return np.stack([x.clip(0, width), y.clip(0, height)], axis=1).round(2)


def measure_load(loader: str, path: str) -> dict[str, float]:
    """Seconds of a load; megabytes that it leaves resident, and that it needs at its peak."""
    before, rss_before = resident_megabytes(), psutil.Process().memory_info().rss
    begin, cpu_begin = time.perf_counter(), time.process_time()
    with contextlib.redirect_stdout(None):  # pycocotools prints
        loaded = CocoInstances.load(path) if loader == "ours" else COCO(path)
    seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu_begin
    resident = resident_megabytes() - before
    del loaded
    peak = _kilobytes("/proc/self/status", "VmHWM") / 1024 - rss_before / 2**20
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "resident_mb": resident,
        "peak_mb": peak,
    }


def resident_megabytes(pid: int | str = "self") -> float:
    """A process's anonymous and shared memory; of what n processes map, an n-th."""
    rollup = f"/proc/{pid}/smaps_rollup"
    return (_kilobytes(rollup, "Pss_Anon") + _kilobytes(rollup, "Pss_Shmem")) / 1024


def _kilobytes(file: str, name: str) -> int:
    lines = Path(file).read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


class TouchEverything(Dataset):
    """Each item reads every box and every polygon, so that a worker maps every page."""

    def __init__(self, path: str):
        self.coco = CocoInstances.load(path)

    def __len__(self) -> int:
        return WORKERS

    def __getitem__(self, _: int) -> float:
        total = float(self.coco.boxes.sum())
        for a in range(len(self.coco.annotation_ids)):
            polygons = self.coco.polygons(a)
            total += len(self.coco.rle(a)["counts"]) if polygons is None else polygons[0][0, 0]
        for i in range(len(self.coco)):
            total += len(self.coco.file_name(i))
        return total


def measure_workers(start: str, path: str) -> dict[str, float]:
    """Megabytes of this process alone, and together with four workers that have read everything."""
    warnings.filterwarnings("ignore", message="This DataLoader will create")  # more than CPUs
    dataset = TouchEverything(path)
    alone = resident_megabytes()
    loader = DataLoader(dataset, batch_size=1, num_workers=WORKERS, persistent_workers=True,
                        multiprocessing_context=start)  # fmt: skip
    assert len(list(loader)) == WORKERS
    # Spawned workers have a helper process of multiprocessing beside them, in both measurements.
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    together = sum(resident_megabytes(process.pid) for process in processes)
    return {"alone_mb": alone, "together_mb": together}


def in_fresh_process(function: Callable[..., dict], *arguments: str) -> dict[str, float]:
    """Call a function of this module in a new interpreter."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as executor:
        return executor.submit(function, *arguments).result()


def median_load(path: Path, runs: int) -> dict[str, dict[str, float]]:
    """Both loaders in turn, so that a slow minute of the machine hits both."""
    results = {"pycocotools": [], "ours": []}
    for run in range(runs):
        for loader, measured in results.items():
            measured.append(in_fresh_process(measure_load, loader, str(path)))
            print(f"run {run + 1} {loader}: {_figures(measured[-1])}", flush=True)
    return {loader: _medians(measured) for loader, measured in results.items()}


def median_workers(path: Path, tiny: Path, start: str, runs: int) -> dict[str, float]:
    """What one process holds, and what four workers add to it, in MB."""
    measured = []
    for run in range(runs):
        big, small = (in_fresh_process(measure_workers, start, str(p)) for p in (path, tiny))
        held = big["alone_mb"] - small["alone_mb"]
        added = big["together_mb"] - small["together_mb"] - held
        measured.append({"held_mb": held, "added_mb": added, "added_share": added / held})
        print(f"run {run + 1} workers by {start}: {_figures(measured[-1])}", flush=True)
    return _medians(measured)


def _medians(measured: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(one[key] for one in measured) for key in measured[0]}


def _figures(measured: dict[str, float]) -> str:
    return ", ".join(f"{key} {value:.3g}" for key, value in measured.items())


def print_table(results: dict) -> None:
    """The medians, and ours as a share of pycocotools'."""
    theirs, ours = results["load"]["pycocotools"], results["load"]["ours"]
    print(f"\n{'':14}{'pycocotools':>14}{'ours':>14}{'ratio':>10}")
    for key in theirs:
        print(f"{key:14}{theirs[key]:14.1f}{ours[key]:14.1f}{ours[key] / theirs[key]:10.3f}")
    for start, workers in results["workers"].items():
        print(
            f"{WORKERS} workers by {start} add {workers['added_mb']:.1f} MB "
            f"to {workers['held_mb']:.1f} MB: {workers['added_share']:.1%}"
        )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=IMAGES, help="scales the json down")
    parser.add_argument("--runs", type=int, default=3, help="of each measurement (default 3)")
    parser.add_argument("--work-dir", type=Path, help="where to keep the json (default: nowhere)")
    parser.add_argument("--output", type=Path, help="write the figures to this json")
    return parser.parse_args()


def run(work_dir: Path, images: int, runs: int) -> dict:
    annotations = round(ANNOTATIONS * images / IMAGES)
    path = work_dir / f"instances_{images}.json"
    tiny = work_dir / "instances_tiny.json"
    for file, counts in ((path, (images, annotations)), (tiny, (10, 70))):
        if not file.exists():
            print(f"writing {file}", flush=True)
            write_synthetic_json(file, images=counts[0], annotations=counts[1])
    return {
        "benchmark": "annotations",
        "machine": {"cpus": os.cpu_count(), "python": platform.python_version()},
        "json": {
            "images": images,
            "annotations": annotations,
            "megabytes": round(path.stat().st_size / 2**20),
        },
        "runs": runs,
        "load": median_load(path, runs),
        "workers": {start: median_workers(path, tiny, start, runs) for start in ("fork", "spawn")},
    }


def main() -> None:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as temporary:
        work_dir = arguments.work_dir or Path(temporary)
        work_dir.mkdir(parents=True, exist_ok=True)
        results = run(work_dir, arguments.images, arguments.runs)
    print_table(results)
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
