"""Progress of long work: a bar on a terminal, a line now and then in a log."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

SECONDS = 30  # between two lines of a log; work that takes less has none


class _LinesBar(tqdm):
    """Writes each state as a line of its own."""

    @staticmethod
    def status_printer(file: Any) -> Any:
        """What writes a state: over the last one, in tqdm's own."""

        def write(state: str) -> None:
            if state.strip():
                file.write(state.strip() + "\n")
                file.flush()

        return write


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
    if sys.stderr is not None and sys.stderr.isatty():
        return tqdm(items, description, **options)
    lines = {"mininterval": SECONDS, "maxinterval": SECONDS, "delay": SECONDS, "miniters": 1}
    shape = "{desc}{percentage:3.0f}% {n_fmt} of {total_fmt} {unit}, {rate_fmt}, {remaining} left"
    return _LinesBar(items, description, **options, **lines, bar_format=shape)
