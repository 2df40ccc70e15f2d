"""Timing alternatives fairly on a machine whose speed drifts: in turn, in one process, medians."""

import statistics
import time
from collections.abc import Callable, Mapping


def interleave(
    alternatives: Mapping[str, Callable[[], object]], *, rounds: int
) -> dict[str, list[float]]:
    """Seconds of each call, one of every alternative a round; one more round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in alternatives}
    for number in range(rounds + 1):
        for name, function in alternatives.items():
            start = time.perf_counter()
            function()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    """The median of each."""
    return {name: statistics.median(values) for name, values in seconds.items()}


def median_ratio(above: list[float], below: list[float]) -> float:
    """The median over the rounds of what one took in the time of the other."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))
