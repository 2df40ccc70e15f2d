"""Timing on a GPU: it works on after a call has returned, and a share of the time it may idle."""

import math
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from tools.benchmarks.gpu_setup import Setup
from tools.benchmarks.timing import Calls, interleave

ROUNDS, SECONDS = 3, 0.25  # of a call, which repeats as often as fits in so many seconds
MAX_REPEATS = 50


def median_seconds(setup: Setup, calls: Calls) -> dict[str, float]:
    """Seconds of each alternative, called in turn and each repeated without a wait between."""
    if setup.quick:
        repeats, rounds = dict.fromkeys(calls, 1), 1
    else:
        for call in calls.values():
            run_repeatedly(setup, call, 3)  # warm-up: memory, plans of cuDNN
        once = interleave(
            {name: partial(run_repeatedly, setup, call, 1) for name, call in calls.items()},
            rounds=1,
        )
        repeats = {
            name: max(1, min(MAX_REPEATS, round(SECONDS / seconds[0])))
            for name, seconds in once.items()
        }
        rounds = ROUNDS
    repeated: Calls = {
        name: partial(run_repeatedly, setup, call, repeats[name]) for name, call in calls.items()
    }
    seconds = interleave(repeated, rounds=rounds)
    return {name: statistics.median(times) / repeats[name] for name, times in seconds.items()}


def run_repeatedly(setup: Setup, call: Callable[[], object], repeats: int) -> None:
    """Calls it so often, and waits for the device at the end."""
    for _ in range(repeats):
        call()
    setup.synchronize()


def measure(setup: Setup, call: Callable[[], object], *, samples: int = 1) -> dict[str, float]:
    """A row: how many samples a second, the share of the time that the GPU idles, its peak memory.

    `samples` are those of one call.
    """
    if setup.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(setup.device)
    (seconds,) = median_seconds(setup, {"call": call}).values()
    row = {"measured": samples / seconds}
    if setup.device.type == "cuda":
        row["peak GB"] = torch.cuda.max_memory_allocated(setup.device) / 1e9
    if busy := busy_seconds(setup, call):  # the profiler may not be allowed to see the GPU
        row["idle"] = max(0.0, 1 - busy / seconds)
    return row


def busy_seconds(setup: Setup, call: Callable[[], object]) -> float:
    """Seconds of a call in which at least one kernel ran.

    From the profiler, which slows down what launches the kernels, but not the kernels.
    """
    cuda = setup.device.type == "cuda"
    repeats = 1 if setup.quick else 3
    activity = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        run_repeatedly(setup, call, repeats)
    wanted = DeviceType.CUDA if cuda else DeviceType.CPU
    events: list[Any] = [e for e in profiler.events() or () if e.device_type == wanted]
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in events
        if not getattr(event, "is_user_annotation", False)
    )
    busy, end = 0.0, -math.inf
    for start, stop in spans:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return busy / 1e6 / repeats


def capture(setup: Setup, call: Callable[[], object]) -> Callable[[], object]:
    """A CUDA graph of a call, to be replayed; where there is no CUDA, the call."""
    if setup.device.type != "cuda":
        return call
    aside = torch.cuda.Stream(setup.device)
    aside.wait_stream(torch.cuda.current_stream(setup.device))
    with torch.cuda.stream(aside):
        for _ in range(3):  # what is made once must not be part of the graph
            call()
    torch.cuda.current_stream(setup.device).wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def seconds_within(setup: Setup, items: Iterator[object], budget: float) -> float:
    """Seconds between two items, over at least so many seconds and from the first item on."""
    next(items)
    setup.synchronize()
    start, count = time.monotonic(), 0
    while count == 0 or time.monotonic() - start < budget:
        next(items)
        count += 1
    setup.synchronize()
    return (time.monotonic() - start) / count
