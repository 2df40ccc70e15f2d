"""What the benchmarks share: options, timing alternatives in turn, tables of the figures."""

import argparse
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import TypeVar

from datasets.files import write_json

Key = TypeVar("Key", bound=Hashable)
Rows = dict[str, dict[str, float]]  # the figures of a table, by row and column


def make_parser(description: str | None, *, rounds: int | None = None) -> argparse.ArgumentParser:
    """A benchmark's parser with the options of all: --output, and --rounds if it has some."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="write the figures as json")
    if rounds is not None:
        parser.add_argument("--rounds", type=int, default=rounds, help=f"default {rounds}")
    return parser


def interleave(
    alternatives: Mapping[Key, Callable[[], object]],
    *,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Key, list[float]]:
    """Seconds of every call: each round calls every alternative once; one more round warms up.

    Args:
        alternatives: what to call, by name.
        rounds: that are timed.
        clock: `time.process_time` for seconds of the CPU, which other processes do not disturb.
    """
    seconds: dict[Key, list[float]] = {name: [] for name in alternatives}
    for index in range(rounds + 1):
        for name, function in alternatives.items():
            start = clock()
            function()
            if index > 0:
                seconds[name].append(clock() - start)
    return seconds


def median_ratio(numerators: list[float], denominators: list[float]) -> float:
    """The median over the rounds of the ratio within each: a slow minute hits both sides."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def report(tables: Mapping[str, Rows], output: Path | None) -> None:
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
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in lines
    )
