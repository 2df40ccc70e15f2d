#!/usr/bin/env python
r"""Runs the benchmarks, each in a process of its own, and gathers their figures.

    python tools/benchmarks/run_all.py
    python tools/benchmarks/run_all.py --quick --only scoring loading
    python tools/benchmarks/run_all.py --compare earlier.json

Writes what each measured, its seconds and peak memory, and the machine. With --compare each figure
is printed beside that of an earlier run. Machines drift: what counts are the ratios within a run.
The ablations run on request only: they need the demo's run and take half an hour each. Linux only.

PyTorch is not imported here: a process's peak memory starts with that of its parent.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from datasets.files import write_json
from tools.benchmarks.timing import Rows, format_table, make_parser

SCRIPTS = Path(__file__).parent
TINY = "--config configs/shapes.yaml --num-proposals 10 --rois 20 --batch 4 --rounds 1"
# Of each benchmark: its command, and options for whether it works, not how fast it is.
BENCHMARKS = {
    "speed": ("speed.py", TINY),
    "loading": ("loading.py", "--patches 16 --rounds 1"),
    "memory": ("memory.py", "--images 12 --num-proposals 10"),
    "large images": (
        "large_images.py",
        "--config configs/shapes.yaml --megapixels .1 --num-proposals 10 --rounds 1",
    ),  # fmt: skip
    "scoring": ("scoring.py", "--images 2 --rounds 1"),
    "nms": ("nms.py", "--num-proposals 100 200 --rounds 1"),
    "refinement": ("ablation.py refinement", "--batches 2 --work-dir runs/quick"),
    "detector": ("ablation.py detector", "--batches 2 --work-dir runs/quick"),
}


def main() -> int:
    """Runs benchmarks and gathers what they measured."""
    parser = make_parser(__doc__)
    default = [name for name, (command, _) in BENCHMARKS.items() if "ablation" not in command]
    parser.set_defaults(output=Path("runs/benchmarks.json"))
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=default)
    parser.add_argument("--quick", action="store_true", help="whether they work, not how fast")
    parser.add_argument("--compare", type=Path, help="the output of an earlier run")
    args = parser.parse_args()
    earlier = json.loads(args.compare.read_text()) if args.compare else None
    cpu = re.search("model name.*: (.*)", Path("/proc/cpuinfo").read_text())
    machine = {
        "cpu": cpu[1] if cpu else platform.machine(),
        "cores": os.cpu_count(),
        "torch": importlib.metadata.version("torch"),
        "date": datetime.date.today().isoformat(),
    }
    results: dict = {"machine": machine, "quick": args.quick, "benchmarks": {}}
    failed = []
    for name in args.only:
        command, quick = BENCHMARKS[name]
        result = run_script(f"{command} {quick}" if args.quick else command)
        if result is None:
            failed.append(name)
            continue
        results["benchmarks"][name] = result
        write_json(args.output, results)  # after each, so that nothing is lost
    if earlier:
        print(f"\n{format_table('figure', compare(results['benchmarks'], earlier['benchmarks']))}")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def run_script(command: str) -> dict | None:
    """Figures, seconds and peak memory of a script in this folder; None if it failed."""
    print(f"\n== {command}", flush=True)
    script, *options = command.split()
    with tempfile.TemporaryDirectory() as directory:
        output, start = Path(directory) / "figures.json", time.monotonic()
        process = subprocess.Popen([sys.executable, SCRIPTS / script, *options, "--output", output])
        _, process.returncode, usage = os.wait4(process.pid, 0)  # `wait` does not tell the memory
        if process.returncode or not output.exists():
            return None
        return {
            "seconds": round(time.monotonic() - start, 1),
            "peak_mb": round(usage.ru_maxrss / 1024),
            "figures": json.loads(output.read_text()),
        }


def compare(benchmarks: dict, earlier: dict) -> Rows:
    """Each figure, that of the earlier run and their ratio, as far as there are such."""
    before = flatten(earlier)
    rows = {name: {"now": value} for name, value in flatten(benchmarks).items()}
    for name in rows.keys() & before:
        rows[name]["earlier"] = before[name]
        if before[name]:
            rows[name]["ratio"] = rows[name]["now"] / before[name]
    return rows


def flatten(figures: dict, prefix: str = "") -> dict[str, float]:
    """The numbers of nested dicts, by their keys joined."""
    numbers: dict[str, float] = {}
    for key, value in figures.items():
        is_dict = isinstance(value, dict)
        numbers |= flatten(value, f"{prefix}{key}: ") if is_dict else {prefix + key: value}
    return numbers


if __name__ == "__main__":
    sys.exit(main())
