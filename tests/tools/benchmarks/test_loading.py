"""The simulated workers and GPU, on loading times whose waits can be worked out by hand."""

import pytest

from tools.benchmarks.loading import STEP, simulate


def test_workers_that_are_fast_enough_never_stall():
    assert max(simulate([7.9 * STEP] * 100, workers=8, prefetch=1)) == pytest.approx(0, abs=1e-9)


def test_one_slow_worker_stalls_every_step():
    waits = simulate([3 * STEP] * 20, workers=1, prefetch=4)
    assert waits == pytest.approx([2 * STEP] * 19)


def test_a_slow_minibatch_is_bridged_by_what_is_ready():
    seconds = [STEP / 2] * 20 + [3 * STEP] + [STEP / 2] * 20
    assert max(simulate(seconds, workers=1, prefetch=4)) == pytest.approx(0, abs=1e-9)
    assert max(simulate(seconds, workers=1, prefetch=1)) == pytest.approx(2 * STEP)
