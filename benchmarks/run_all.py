#!/usr/bin/env python
"""Runs the benchmarks one after the other; each prints its table.

python benchmarks/run_all.py
"""

import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parent
COMMANDS = (
    ["annotations.py"],
    ["patches.py", "--config", "configs/shapes.yaml"],
)


def main() -> int:
    status = 0
    for name, *options in COMMANDS:
        print(f"\n== {name} {' '.join(options)} ==", flush=True)
        command = [sys.executable, str(BENCHMARKS / name), *options]
        status |= subprocess.run(command, cwd=BENCHMARKS.parent).returncode
    return status


if __name__ == "__main__":
    sys.exit(main())
