"""Tasks take turns, and one that fails or that nobody waits for holds up no other."""

import threading
import time

import pytest

from pipeline.serve import worker as module
from pipeline.serve.worker import Worker


@pytest.fixture
def worker():
    worker = Worker()
    yield worker
    worker.close()


def wait(*tasks) -> None:
    for _ in range(500):
        if not any(task.ask()["state"] == "running" for task in tasks):
            return
        time.sleep(0.01)
    pytest.fail("a task does not end")


def steps(log: list, name: str, count: int):
    def work(task):
        for step in range(count):
            log.append(name)
            task.progress = (step + 1) / count
            yield

    return work


def test_tasks_take_turns(worker):
    log, begin = [], threading.Event()

    def hold(task):
        begin.wait()
        yield

    first = worker.add(hold)
    tasks = [worker.add(steps(log, name, count)) for name, count in (("a", 5), ("b", 2), ("c", 3))]
    begin.set()
    wait(first, *tasks)
    assert "".join(log) == "abcabcacaa"  # a task that has ended needs one more turn to say so
    assert [task.ask() for task in tasks] == [{"state": "done", "progress": 1.0, "error": ""}] * 3


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("too\n dark"), "too dark"),
        (RuntimeError("strange"), "RuntimeError: strange"),
        (MemoryError(), "out of memory; open a smaller image"),
        (AssertionError("never"), "AssertionError: never"),
    ],
)
def test_a_failure_is_one_line_and_the_next_task_runs(worker, error, line):
    def fail(task):
        yield
        raise error

    failing, good = worker.add(fail), worker.add(steps([], "a", 2))
    wait(failing, good)
    assert failing.ask()["state"] == "failed" and failing.ask()["error"] == line
    assert good.ask()["state"] == "done"


def test_a_task_that_nobody_asks_for_waits_until_somebody_does(worker, monkeypatch):
    monkeypatch.setattr(module, "PATIENCE", 0.1)
    monkeypatch.setattr(module, "IDLE", 0.01)

    def endless(task):
        while True:
            task.progress += 1
            time.sleep(0.001)
            yield

    abandoned = worker.add(endless)
    time.sleep(0.3)
    stopped_at = abandoned.progress
    time.sleep(0.1)
    assert abandoned.progress == stopped_at > 0
    abandoned.ask()
    time.sleep(0.08)
    assert abandoned.progress > stopped_at
    abandoned.cancel()
    assert abandoned.ask()["state"] == "failed"
