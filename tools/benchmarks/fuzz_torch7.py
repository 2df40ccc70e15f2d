#!/usr/bin/env python
"""Damages small Torch7 files in many ways and counts what their reader makes of them.

    python tools/benchmarks/fuzz_torch7.py data/torch7 --cases 20000

Each case is one of the files with a few bytes changed, cut out, inserted, exchanged with those of
another file, or the end missing. The reader may give an object, all of whose tensors are then
touched and which is described, or say in one line what is wrong. Anything else is a failure, as
are more than a second of processor time or more address space than --memory-limit: the case is
kept and the exit code is 1. A crash ends the run with its signal, and leaves the case at work in
the folder of the kept ones, which is printed first.
"""

import argparse
import collections
import json
import random
import re
import resource
import struct
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from datasets.files import write_json
from pipeline.command import run_tool
from pipeline.torch7.objects import Torch7Object
from pipeline.torch7.reader import read_torch7
from pipeline.torch7.tree import describe

HOSTILE = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, -1, 255, 65536, 2**31 - 1, -(2**31))
MAX_SECONDS = 1.0  # of processor time; an undamaged file takes some hundredths


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="the .t7 files in it are damaged")
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-file", type=int, default=100_000, help="bytes; larger: left out")
    parser.add_argument("--memory-limit", type=int, default=512, help="MB above the start's")
    parser.add_argument("--keep", type=Path, help="folder for failing cases (default: a new one)")
    parser.add_argument("--output", type=Path, help="write the counts as json")
    args = parser.parse_args()
    files = [path.read_bytes() for path in sorted(args.folder.rglob("*.t7"))]
    files = [content for content in files if 0 < len(content) <= args.max_file]
    if not files:
        raise ValueError(f"{args.folder}: has no .t7 file of up to {args.max_file} bytes")
    keep = args.keep or Path(tempfile.mkdtemp(prefix="fuzz_torch7_"))
    keep.mkdir(parents=True, exist_ok=True)
    print(f"failing cases are kept in {keep}", flush=True)
    limit_memory(args.memory_limit << 20)
    result = fuzz(files, args.cases, random.Random(args.seed), keep)
    for reason, count in result["outcomes"].items():
        print(f"{count:8d}  {reason}")
    print(json.dumps({name: value for name, value in result.items() if name != "outcomes"}))
    if args.output:
        write_json(args.output, result)
    return 1 if result["failures"] else 0


def limit_memory(room: int) -> None:
    """Makes an allocation of more than `room` bytes above what is used now an error."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + room,) * 2)


def fuzz(files: list[bytes], cases: int, rng: random.Random, keep: Path) -> dict:
    """Reads damaged files; failing ones are kept in `keep`."""
    outcomes, failures, worst = collections.Counter(), 0, 0.0
    path = keep / "at_work.t7"
    before, started = peak_memory(), time.perf_counter()
    for case in range(cases):
        content = damage(files, rng)
        path.write_bytes(content)
        case_started = time.process_time()
        outcome, failed = attempt(path)
        seconds = time.process_time() - case_started
        worst = max(worst, seconds)
        if seconds > MAX_SECONDS:
            outcome, failed = "FAILED: slow", True
        if failed:
            failures += 1
            (keep / f"case_{case}.t7").write_bytes(content)
        outcomes[outcome] += 1
    path.unlink(missing_ok=True)
    return {
        "cases": cases,
        "failures": failures,
        "seconds": round(time.perf_counter() - started, 1),
        "worst_cpu_seconds": round(worst, 4),
        "memory_growth_mb": round((peak_memory() - before) / 2**20, 1),
        "outcomes": dict(outcomes.most_common()),
    }


def damage(files: list[bytes], rng: random.Random) -> bytes:
    """One of the files after one to four changes."""
    content = bytearray(rng.choice(files))
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(content) + 1)
        kind = rng.randrange(6)
        if kind == 0 and at < len(content):
            content[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            content[at : at + 4] = struct.pack("<i", rng.choice(HOSTILE))
        elif kind == 2:
            content[at : at + 8] = struct.pack("<q", rng.choice((*HOSTILE, 2**62, -(2**63))))
        elif kind == 3:
            del content[at : at + rng.randint(1, 32)]
        elif kind == 4:
            content[at:at] = (
                b"%d\n" % rng.choice(HOSTILE) if rng.random() < 0.5 else rng.randbytes(4)
            )
        else:
            other = rng.choice(files)
            start = rng.randrange(len(other))
            content[at : at + 24] = other[start : start + rng.randint(1, 64)]
    if rng.random() < 0.2:
        del content[rng.randrange(len(content) + 1) :]
    return bytes(content)


def attempt(path: Path) -> tuple[str, bool]:
    """What became of one file, and whether that is a failure."""
    try:
        value = read_torch7(path)
        touch(value)
        describe(value).encode()
    except ValueError as error:
        message = str(error)
        if not re.match(rf"{re.escape(str(path))}: [^\n]*byte \d+: [^\n]+\Z", message):
            return f"FAILED: the message {message[:80]!r}", True
        reason = message.rsplit("byte ", 1)[1].split(": ", 1)[1]
        reason = re.sub(r"^.* (is no name|is not stored)", r"* \1", reason)
        return "refused: " + re.sub(r"'.*'|\".*\"|-?\d+|\[.*?\]", "*", reason)[:70], False
    except Exception as error:
        return f"FAILED: {type(error).__name__}: {str(error)[:60]}", True
    return "read", False


def touch(value: object) -> None:
    """Reads the first and the last element of every tensor."""
    seen, pending = set(), [value]
    while pending:
        item = pending.pop()
        if isinstance(item, torch.Tensor) and item.numel():
            item[(0,) * item.ndim].item(), item[(-1,) * item.ndim].item()
        elif isinstance(item, Torch7Object | dict | list) and id(item) not in seen:
            seen.add(id(item))
            item = item.fields if isinstance(item, Torch7Object) else item
            pending.extend(item.values() if isinstance(item, dict) else item)


def peak_memory() -> int:
    """Bytes resident at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    run_tool(main)
