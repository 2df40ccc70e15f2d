"""Progress of long work: a bar on a terminal, a line now and then in a log."""

import sys
from collections.abc import Iterable
from typing import Any, TextIO

from tqdm import tqdm

SECONDS = 30  # between two lines of a log; work that takes less has none


class _Lines:
    """A stream on which each state is a line of its own, instead of over the last one."""

    def __init__(self, stream: TextIO):
        self.stream = stream
        self.flush = stream.flush

    def write(self, text: str) -> None:
        """Writes a state; tqdm's carriage returns and blanks around it are left out."""
        if text.strip():
            self.stream.write(text.strip() + "\n")


def progress_bar(
    items: Iterable | None = None,
    description: str | None = None,
    *,
    unit: str,
    total: int | None = None,
    enabled: bool = True,
) -> tqdm:
    """The items, with progress on stderr. Without items, call its `update()`."""
    options: dict[str, Any] = {"unit": unit, "total": total, "disable": not enabled}
    if not enabled or sys.stderr.isatty():
        return tqdm(items, description, **options)
    lines = {"mininterval": SECONDS, "maxinterval": SECONDS, "delay": SECONDS, "miniters": 1}
    shape = "{desc}: {percentage:.0f}% {n_fmt} of {total_fmt} {unit}, {rate_fmt}, {remaining} left"
    stream: Any = _Lines(sys.stderr)
    return tqdm(items, description, file=stream, **options, **lines, bar_format=shape)
