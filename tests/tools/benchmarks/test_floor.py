"""The floor counts a call's convolutions and matrix products, and a line is fitted as it is."""

import pytest
import torch
from torch import nn

from tools.benchmarks.floor import count_work, floor_seconds, time_calls
from tools.benchmarks.proposals import fit_line, fit_lines


def test_work_of_a_small_network_is_counted_and_timed():
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    linear = nn.Linear(8, 4)
    with torch.inference_mode():
        calls, flops = count_work(lambda: linear(network(torch.zeros(1, 3, 10, 10)).mean((2, 3))))
    convolutions = {call: n for call, n in calls.items() if call[0] == "convolution"}
    assert sorted(call[1] for call in convolutions) == [
        ((1, 3, 10, 10), (8, 3, 3, 3)),
        ((1, 8, 6, 6), (8, 8, 3, 3)),
        ((1, 8, 8, 8), (8, 8, 3, 3)),
    ]
    assert sum(n for call, n in calls.items() if call[0] == "product") == 1
    assert flops == 2 * (64 * 27 * 8 + (36 + 16) * 72 * 8 + 8 * 4)
    alone = time_calls(calls)
    assert all(seconds > 0 for seconds in alone.values())
    assert floor_seconds(calls + calls, alone) == pytest.approx(2 * floor_seconds(calls, alone))


def test_a_line_and_how_well_it_fits():
    line = fit_line([1, 2, 4], [3, 5, 9])
    assert line == pytest.approx({"slope": 2, "intercept": 1, "R^2": 1})
    assert fit_line([1, 2, 3], [1, 3, 1])["R^2"] == pytest.approx(0)


def test_lines_go_along_one_axis_each():
    rows = {
        ("DeepMask", n, pixels): {"all": n + pixels / 100}
        for n in (10, 100, 1000)
        for pixels in (300, 1000)
    }
    lines = fit_lines(rows)
    assert list(lines) == ["DeepMask, N"]  # two sizes make no line
    assert lines["DeepMask, N"]["seconds"] == [13, 103, 1003]
