#!/usr/bin/env python
r"""Checks a GPU against the CPU and measures it: one table, in at most eight minutes.

    python tools/benchmarks/gpu.py --output runs/gpu
    python tools/benchmarks/gpu.py --output runs/gpu --only training proposing
    python tools/benchmarks/gpu.py --output runs/gpu --device cpu --quick

Data are drawn and weights are random, so it needs no files (docs/gpu.md: what it needs). Figures go
to gpu.json after every part, and what the parts print to gpu.log. The exit status is 1 if a check
failed; "ok" is 0 there. A part that fails is a row; the others go on.
"""

import contextlib
import gc
import os
import platform
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from math import isfinite
from pathlib import Path
from typing import Any, TextIO

import torch
import torchvision

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from datasets.files import write_json
from pipeline.command import add_device, make_parser, run_tool
from tools.benchmarks.gpu_checks import CHECKS
from tools.benchmarks.gpu_setup import Setup, failed
from tools.benchmarks.gpu_speed import TIMINGS
from tools.benchmarks.timing import Rows, format_table

# What matters most comes first: time may run out.
PARTS: dict[str, Callable[[Setup], Rows]] = CHECKS | TIMINGS


def main() -> int:
    """Runs the parts; 1 if a check failed."""
    parser = make_parser(__doc__)
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="of gpu.json")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART",
                        help=f"default: all of {', '.join(PARTS)}")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="tiny sizes: whether it works")
    parser.add_argument("--minutes", type=float, default=8, help="for all parts (default: 8)")
    add_device(parser)
    args = parser.parse_args()

    device, end = torch.device(args.device), time.monotonic() + 60 * args.minutes
    parts: dict[str, dict[str, Any]] = {}
    results = {"machine": describe(device), "quick": args.quick, "parts": parts}
    args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory, (args.output / "gpu.log").open("w") as log:
        setup = Setup(device, args.quick, Path(directory))
        for name in args.only:
            print(f"{name} ... ", end="", flush=True)
            part = parts[name] = run_part(PARTS[name], setup, end - time.monotonic(), log)
            print(f"{part['seconds']:.0f} s{', failed' if 'error' in part else ''}", flush=True)
            write_json(args.output / "gpu.json", results)
    rows = {f"{part}: {k}": row for part in parts for k, row in parts[part]["rows"].items()}
    print(f"\n{format_table('GPU', rows)}")
    for name, part in parts.items():
        if "error" in part:
            print(f"{name}: {part['error'].strip().splitlines()[-1]}", file=sys.stderr)
    broken = [name for name in parts if name in CHECKS and failed(parts[name]["rows"])]
    if broken:
        print(f"checks that failed: {', '.join(broken)}", file=sys.stderr)
    return 1 if broken else 0


def describe(device: torch.device) -> dict[str, Any]:
    """The machine: its versions, cores and GPU."""
    machine = {"torch": torch.__version__, "torchvision": torchvision.__version__}
    machine |= {"python": platform.python_version(), "cores": os.cpu_count(), "device": device.type}
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        machine |= {"device": gpu.name, "GB": round(gpu.total_memory / 1e9, 1)}
        machine |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return machine


def run_part(
    part: Callable[[Setup], Rows], setup: Setup, seconds: float, log: TextIO
) -> dict[str, Any]:
    """The rows of a part and its seconds; "error" and a row if it failed or ran out of time.

    Figures that are not numbers are left out.
    """
    start = time.monotonic()
    result: dict[str, Any] = {}
    with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        try:
            with time_limit(seconds):
                rows = part(setup)
        except Exception:
            rows, result["error"] = {"failed": {"ok": 0.0}}, traceback.format_exc()
            traceback.print_exc()
        log.flush()
    for name, row in rows.items():
        rows[name] = {column: float(value) for column, value in row.items() if isfinite(value)}
    gc.collect()  # the next part may need all of the memory
    torch.cuda.empty_cache()
    return {"seconds": round(time.monotonic() - start, 1), "rows": rows, **result}


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises a TimeoutError in the block after so many seconds; at once if there are none."""

    def stop(*_: object) -> None:
        raise TimeoutError("the time is up")

    before = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-6))
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


if __name__ == "__main__":
    run_tool(main)
