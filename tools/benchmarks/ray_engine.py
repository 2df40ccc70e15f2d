#!/usr/bin/env python
r"""--engine ray: images a second against one process, and each image once whatever is killed.

    python tools/benchmarks/ray_engine.py --images 24 --rounds 3
    python tools/benchmarks/ray_engine.py --chaos 20000

The first compares workers of one thread with one process that has as many threads, from the first
result to the last one; what comes before, loading the network in all workers, is told apart. The
second runs tools/propose.py with a tiny network on so many tiny images. Every --period seconds a
worker is killed, and the whole run after 1.5 and 4.5 of them; then it is started again. Linux only.
"""

import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from datasets.images import open_image
from pipeline.command import run_tool
from pipeline.inference.engines import Engine, in_this_process, open_engines
from pipeline.inference.image_files import find_images
from pipeline.inference.memory import keep_freed_blocks
from pipeline.inference.proposal_store import ProposalStore
from pipeline.inference.propose import load_proposer
from pipeline.inference.propose_folders import propose_each
from pipeline.pretrained import pretrained_checkpoint
from tools.benchmarks.synthetic import HEIGHT, WIDTH, draw_image, load_recipe, write_sharpmask
from tools.benchmarks.timing import Rows, make_parser, median_ratio, report

TOOL = Path(__file__).resolve().parents[1] / "propose.py"
TINY = 64  # pixels
DRIVER_KILLS = (1.5, 4.5)  # periods


def main() -> int:
    """Measures speed, or what kills leave."""
    parser = make_parser(
        __doc__, images=24, rounds=3, workers=2, precision="fp32", checkpoint="", chaos=0, period=60
    )
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        (folder / "images").mkdir()
        size = (TINY, TINY) if args.chaos else (HEIGHT, WIDTH)
        for n in range(args.chaos or args.images):
            picture = draw_image(rng, *size)
            cv2.imwrite(str(folder / "images" / f"{n}.jpg"), picture)
        if args.chaos:
            rows = chaos(folder, args.chaos, args.workers, args.period)
        else:
            checkpoint = args.checkpoint or pretrained_checkpoint("sharpmask")
            loader = partial(load_proposer, checkpoint, torch.device("cpu"))
            loader = partial(loader, precision=args.precision)
            rows = speed(folder / "images", loader, args.workers, args.rounds)
    rows["the machine"] = {"load before": load, "load after": os.getloadavg()[0]}
    report({"ray": rows}, args.output)
    return 1 if any(row.get("wrong") for row in rows.values()) else 0


# Speed.


def speed(images: Path, load: Callable, workers: int, rounds: int) -> Rows:
    """Images a second of both, in turn."""
    keep_freed_blocks()
    torch.set_num_threads(workers)
    proposer, _ = load()
    begun = time.perf_counter()
    with open_engines("ray", workers=workers, address=None, device="cpu") as engines:
        cluster = time.perf_counter() - begun
        rates: dict[str, list[float]] = {"one process": [], "ray": []}
        starts: dict[str, list[float]] = {name: [] for name in rates}
        for _ in range(rounds):
            for name, engine in (("one process", in_this_process), ("ray", engines(load))):
                start, rate = measure(engine, proposer, images)
                starts[name].append(start)
                rates[name].append(rate)
    rows: Rows = {
        name: {
            "images a second": statistics.median(rates[name]),
            "seconds to the first": statistics.median(starts[name]),
        }
        for name in rates
    }
    rows["ray"]["times as fast"] = median_ratio(rates["ray"], rates["one process"])
    rows["ray"]["seconds to start"] = cluster
    return rows


def measure(engine: Engine, proposer: Callable, images: Path) -> tuple[float, float]:
    """Seconds until the first result, and images a second from there on."""
    files = find_images(images, None)
    read = partial(open_image, exif="apply")
    work = partial(propose_each, read=read, turned=True, quantized=None)
    counts, times = [], [time.perf_counter()]
    for rows in engine(work, proposer, files, [], largest=1):
        counts.append(len(rows))
        times.append(time.perf_counter())
    return times[1] - times[0], sum(counts[1:]) / (times[-1] - times[1])


# Kills.


def chaos(folder: Path, count: int, workers: int, period: int) -> Rows:
    """What was killed, and how many images were lost or done twice, or what was left over."""
    checkpoint, output = folder / "sharpmask.pt", folder / "output"
    write_sharpmask(load_recipe("configs/shapes.yaml"), checkpoint)
    options = f"--engine ray --workers {workers} --device cpu --precision fp32 --no-json"
    options += " --scales 0 0 1 --num-proposals 3"
    command: list[str | Path] = [sys.executable, TOOL, *options.split()]
    command += ["--checkpoint", checkpoint, "--images", folder / "images", "--output", output]
    seen: dict[int, psutil.Process] = {}
    killed, begun = Counter[str](), time.monotonic()
    while True:
        run = subprocess.Popen(command)
        if not watch(run, begun, period, killed, seen):
            break
    time.sleep(5)
    ids = ProposalStore(output).read(columns=["image_id"])["image_id"].to_pylist()
    left = [*output.rglob(".*"), *Path("/tmp").glob("maskpath-ray-*")]
    alive = [process for process in seen.values() if process.is_running()]
    for thing in (*left, *alive):
        print(f"left over: {thing}")
    lost, twice = count - len(set(ids)), len(ids) - len(set(ids))
    wrong = bool(lost or twice or left or alive or run.returncode)
    return {
        "killed": {name: float(number) for name, number in killed.items()},
        "images": {
            "number": count,
            "seconds": time.monotonic() - begun,
            "lost": lost,
            "twice": twice,
        },
        "left over": {"files": len(left), "processes": len(alive)},
        "in all": {"wrong": float(wrong)},
    }


def watch(run: subprocess.Popen, begun: float, period: int, killed: Counter, seen: dict) -> bool:
    """Kills workers of a run, or the run; whether it has to be started again."""
    me = psutil.Process(run.pid)
    while run.poll() is None:
        time.sleep(0.5)
        try:
            children = me.children(recursive=True)
            seen |= {child.pid: child for child in children}
            periods = (time.monotonic() - begun) / period
            if killed["runs"] < len(DRIVER_KILLS) and periods > DRIVER_KILLS[killed["runs"]]:
                killed["runs"] += 1
                run.send_signal(signal.SIGKILL)
                run.wait()
                return True
            workers = [child for child in children if child.name().startswith("ray::MapWorker")]
            if workers and periods > killed["workers"] + 1:
                random.choice(workers).kill()
                killed["workers"] += 1
        except psutil.NoSuchProcess:
            continue
    return False


if __name__ == "__main__":
    run_tool(main)
