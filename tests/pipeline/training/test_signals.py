"""Stop signals to all processes of a run, as terminals, torchrun, Slurm and Docker send them."""

import os
import signal
import time
from itertools import product

import psutil
import pytest

from tests.pipeline.training.runs import last_checkpoint, start_tool

LIMIT = 25  # seconds from the signal to the end, some of it the interpreter's; torchrun waits 30
TERM, INT = signal.SIGTERM, signal.SIGINT
# Start method, workers, processes, signal, moment.
FAST = [("spawn", 2, 1, INT, "start"), ("fork", 2, 2, TERM, "validation")]
SLOW = [
    *product(["fork", "spawn", "forkserver"], [0, 2], [1, 2], [TERM], ["training"]),
    *product(["fork", "spawn", "forkserver"], [2], [1, 2], [TERM], ["validation"]),
    *product(["fork", "spawn", "forkserver"], [2], [1, 2], [INT], ["start", "training"]),
]
START = """
import multiprocessing
multiprocessing.set_start_method({!r}, force=True)
"""


@pytest.mark.parametrize(
    ("method", "workers", "processes", "signum", "moment"),
    FAST + [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW if case not in FAST],
)
def test_it_ends_in_time_with_a_checkpoint_and_the_signals_status(
    method, workers, processes, signum, moment, tiny_config, tmp_path, monkeypatch
):
    (tmp_path / "sitecustomize.py").write_text(START.format(method))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    in_validation = moment == "validation"
    optim = {
        "batches_per_epoch": 2 if in_validation else 100_000,
        "validation_batches": 100_000,
        "validate_every": 1,
    }
    settings = [f"deepmask.optim.{key}={value}" for key, value in optim.items()]
    run = start_tool(
        ["--config", tiny_config, "--output", tmp_path / "run", "--set", *settings,
         f"data.workers={workers}"],
        processes=processes,
    )  # fmt: skip
    output = read_until(run, {"start": "step 0 of"}.get(moment, "train step 2 "))
    time.sleep(1 if in_validation else 0.2)
    started = psutil.Process(run.pid).children(recursive=True)
    asked = time.monotonic()
    os.killpg(run.pid, signum)
    if processes == 1:
        output += run.communicate(timeout=60)[0]
        assert time.monotonic() - asked < LIMIT, output
    while (late := list(map(str, filter(lives, started)))) and time.monotonic() - asked < LIMIT:
        time.sleep(0.1)
    if processes > 1 or late:
        os.killpg(run.pid, signal.SIGKILL)  # torchrun takes several seconds more, alone
        output += run.communicate()[0]
    assert not late, (late, output)
    if processes == 1:  # torchrun has statuses and tracebacks of its own
        assert run.returncode == 128 + signum and "Traceback" not in output, output
    assert 'train_stage.py", line' not in output and "FileNotFoundError" not in output, output
    assert "continue with --resume" in output, output
    assert last_checkpoint(tmp_path / "run")["step"] >= {"start": 0}.get(moment, 2)


def lives(process: psutil.Process) -> bool:
    """Torchrun takes its time to look for those that have ended."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def read_until(run, words) -> str:
    lines = []
    for line in run.stdout:
        lines.append(line)
        if words in line:
            return "".join(lines)
    raise AssertionError("".join(lines))
