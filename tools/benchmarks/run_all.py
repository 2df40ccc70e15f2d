#!/usr/bin/env python
r"""Runs the benchmarks, each in a process of its own, and gathers their figures.

    python tools/benchmarks/run_all.py                      # all, some 20 minutes on two cores
    python tools/benchmarks/run_all.py --quick --only scoring patches
    python tools/benchmarks/run_all.py --compare earlier.json

Writes results.json (what each measured, how long it took, its peak memory, and the machine),
results.md, a table of it, and results.png, the time of proposals against their number and against
pixels; with --compare each figure also as a ratio to that of an earlier run.
Machines drift: what counts are the ratios within a run.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from datasets.files import write_atomically, write_json


@dataclass(frozen=True)
class Benchmark:
    """A script, its options, and those that make it a smoke run."""

    script: str
    options: tuple[str, ...] = ()
    quick: tuple[str, ...] = ()


HAS_COCO = (ROOT / "data/coco-mini").is_dir()
RECIPE = ("--config", "configs/coco_mini.yaml" if HAS_COCO else "configs/shapes.yaml")
BENCHMARKS = {
    "proposals": Benchmark(
        "proposals.py",
        quick=("--trunk=resnet18", "--num-proposals=10", "--megapixels=.3", "--rounds=1"),
    ),
    "backends": Benchmark(
        "backends.py", quick=("--trunk=resnet18", "--num-proposals=10", "--rounds=1")
    ),
    "patches": Benchmark("patches.py", RECIPE, ("--rounds", "1", "--patches", "40")),
    "loading": Benchmark("loading.py", RECIPE, ("--steps", "3")),
    "training": Benchmark(
        "training.py", quick=("--trunk", "resnet18", "--batch", "2", "--rounds", "1")
    ),
    "detections": Benchmark(
        "detections.py", quick=("--features", "64", "--num-proposals", "20", "--rounds", "1")
    ),
    "scoring": Benchmark("scoring.py", quick=("--box-images", "2", "--mask-images", "2")),
    "annotations": Benchmark(
        "annotations.py", ("--images", "20000", "--runs", "1"), ("--images", "200")
    ),
    "memory": Benchmark("memory.py", ("--trunk", "tiny"), ("--images", "14")),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS))
    parser.add_argument("--quick", action="store_true", help="whether they work, not how fast")
    parser.add_argument("--output", type=Path, default=ROOT / "tools/benchmarks/results.json")
    parser.add_argument("--compare", type=Path, help="results.json of an earlier run")
    args = parser.parse_args()
    earlier = json.loads(args.compare.read_text()) if args.compare else None
    results = {"machine": describe_machine(), "quick": args.quick, "benchmarks": {}}
    failed = []
    for name in args.only:
        result = run(BENCHMARKS[name], quick=args.quick)
        if result is None:
            failed.append(name)
            continue
        results["benchmarks"][name] = result
        write_json(args.output, results)  # what took time is not lost by what comes after it
    table = to_table(results, earlier)
    write_atomically(args.output.with_suffix(".md"), table.encode())
    if lines := results["benchmarks"].get("proposals", {}).get("figures", {}).get("lines"):
        # Only here: it imports PyTorch, and a child's peak memory begins with its parent's.
        from tools.benchmarks.proposals import plot_lines

        plot_lines(lines, args.output.with_suffix(".png"))
    print(f"\n{table}")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def run(benchmark: Benchmark, *, quick: bool) -> dict | None:
    """Figures, seconds and peak memory of a benchmark; None if it failed."""
    options = (*benchmark.options, *(benchmark.quick if quick else ()))
    print(f"\n== {benchmark.script} {' '.join(options)} ==", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "figures.json"
        script = str(ROOT / "benchmarks" / benchmark.script)
        command = [sys.executable, script, *options, "--output", str(output)]
        start = time.monotonic()
        process = subprocess.Popen(command, cwd=ROOT)
        # Not `process.wait`: it does not tell what the process used.
        _, process.returncode, usage = os.wait4(process.pid, 0)
        if process.returncode or not output.exists():
            return None
        return {
            "seconds": round(time.monotonic() - start, 1),
            "peak_mb": round(usage.ru_maxrss / 1024),
            "figures": json.loads(output.read_text()),
        }


def describe_machine() -> dict[str, str | int]:
    """What the figures depend on."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [
        line.partition(":")[2].strip()
        for line in (cpuinfo.read_text().splitlines() if cpuinfo.exists() else ())
        if line.startswith("model name")
    ]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count() or 1,
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def flatten(value: object, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], float]:
    """The numbers of nested dicts and lists by their path."""
    if isinstance(value, int | float):
        return {path: float(value)}
    if isinstance(value, list):
        value = dict(enumerate(value))
    numbers = {}
    for key, each in value.items() if isinstance(value, dict) else ():
        numbers |= flatten(each, (*path, str(key)))
    return numbers


def to_table(results: dict, earlier: dict | None = None) -> str:
    """All figures as markdown, one line each, beside those of an earlier run and their ratio."""
    machine = results["machine"]
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}, {machine['date']}"
        + (" (a smoke run: no figures to quote)" if results["quick"] else ""),
        "",
        "| benchmark | figure | value |" + (" earlier | ratio |" if earlier else ""),
        "|---|---|---|" + ("---|---|" if earlier else ""),
    ]
    before = flatten(earlier["benchmarks"]) if earlier else {}
    for path, value in flatten(results["benchmarks"]).items():
        name = ", ".join(part for part in path[1:] if part != "figures")
        line = f"| {path[0]} | {name} | {value:.4g} |"
        if earlier:
            line += _compared(value, before.get(path))
        lines.append(line)
    return "\n".join(lines) + "\n"


def _compared(value: float, before: float | None) -> str:
    if before is None:
        return " | |"
    return f" {before:.4g} | {value / before:.2f} |" if before else f" {before:.4g} | |"


if __name__ == "__main__":
    sys.exit(main())
