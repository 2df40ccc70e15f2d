"""What the benchmarks share: options, timing alternatives in turn, tables of the figures."""

import argparse
import statistics
import time
from collections.abc import Callable
from operator import truediv
from pathlib import Path
from typing import Any

from datasets.files import write_json

Calls = dict[str, Callable[[], object]]  # what is timed, by name
Rows = dict[str, dict[str, float]]  # the figures of a table, by row and column


def make_parser(description: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """A benchmark's parser: an option for each default, of its type, and --output."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="write the figures as json")
    for name, default in defaults.items():
        first, nargs = (default[0], "+") if isinstance(default, list) else (default, None)
        option = {"type": type(first), "nargs": nargs, "default": default}
        parser.add_argument(f"--{name.replace('_', '-')}", help="default: %(default)s", **option)
    return parser


def interleave(
    calls: Calls, *, rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of every call: each round calls every alternative once; one more round warms up.

    With `time.process_time` they are seconds of the CPU, which other processes do not disturb.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(rounds + 1):
        for name, function in calls.items():
            start = clock()
            function()
            if index > 0:
                seconds[name].append(clock() - start)
    return seconds


def median_ratio(numerators: list[float], denominators: list[float]) -> float:
    """The median over the rounds of the ratio within each: a slow minute hits both sides."""
    return statistics.median(map(truediv, numerators, denominators))


def compare(calls: Calls, *, rounds: int) -> Rows:
    """Seconds of the CPU of each alternative, and how many times as fast as the first it is."""
    seconds = interleave(calls, rounds=rounds, clock=time.process_time)
    first, *_ = seconds.values()
    return {
        name: {"seconds": statistics.median(each), "times as fast": median_ratio(first, each)}
        for name, each in seconds.items()
    }


def report(tables: dict[str, Rows], output: Path | None) -> None:
    """Prints the tables, and writes them as json if there is an output."""
    for title, rows in tables.items():
        print(f"\n{format_table(title, rows)}", flush=True)
    if output is not None:
        write_json(output, tables)


def format_table(title: str, rows: Rows) -> str:
    """One line for each row; what a row does not have stays empty."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [[title, *columns]]
    for name, row in rows.items():
        lines.append([name, *(f"{row[c]:.4g}" if c in row else "" for c in columns)])
    first, *others = (max(map(len, cells)) for cells in zip(*lines, strict=True))
    line = "  ".join([f"{{:{first}}}", *(f"{{:>{width}}}" for width in others)])
    return "\n".join(line.format(*cells) for cells in lines)
