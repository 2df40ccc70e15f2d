"""What a training run reports: a line on stdout, a line in metrics.jsonl, TensorBoard curves."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from datasets.files import naming_file, write_atomically
from pipeline import distributed

METRICS = "metrics.jsonl"


class RunLog:
    """Writes the metrics of one run directory; silent in all processes but the main one."""

    def __init__(self, directory: str | Path, *, enabled: bool = True, start_step: int = 0):
        """Lines and curves after `start_step`, left by an interrupted run, are dropped."""
        self.path, self.enabled = Path(directory) / METRICS, enabled
        self.curves, self.start_step = Path(directory) / "tensorboard", start_step
        self.board: SummaryWriter | None = None
        if enabled and self.path.exists():
            kept = [line for line in read_metrics(self.path) if line["step"] <= start_step]
            lines = "".join(json.dumps(line) + "\n" for line in kept)
            write_atomically(self.path, lines.encode())

    def write(self, split: str, *, step: int, epoch: float, **values: float) -> None:
        """One line of metrics of a split ("train", "val").

        Raises:
            OSError: a file cannot be written, or nobody reads stdout any more.
        """
        if not self.enabled:
            return
        record = {"split": split, "step": step, "epoch": round(epoch, 4)}
        record |= {"time": round(time.time(), 2), **values}
        with naming_file(self.path), self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        with naming_file(self.curves):
            if self.board is None:
                purge = self.start_step + 1 if self.curves.exists() else None
                self.board = SummaryWriter(str(self.curves), purge_step=purge)
            for name, value in values.items():
                self.board.add_scalar(f"{split}/{name}", value, step)
        words = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        print(f"{split:5s} step {step}  {words}", flush=True)

    def close(self) -> None:
        """Flushes the curves."""
        if self.board is not None:
            with naming_file(self.curves):
                self.board.close()


def read_metrics(path: str | Path) -> list[dict]:
    """The lines of a metrics.jsonl; a line that a kill cut short is left out."""
    records = []
    for line in Path(path).read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


class Meter:
    """Means since the last flush; a loss counts the minibatches that had it."""

    def __init__(self, batch_size: int, samples: str):
        self.batch_size, self.samples = batch_size, samples
        self.restart()

    def add(self, losses: dict[str, Tensor]) -> None:
        """Adds a minibatch without waiting for the device."""
        for name, value in losses.items():
            total, count = self.sums.get(name, (0.0, 0))
            self.sums[name] = (total + value, count + 1)
        self.steps += 1

    def flush(self, steps_left: int) -> dict[str, float]:
        """Means of the losses over all processes, samples a second, and minutes left."""
        seconds = (time.monotonic() - self.start) / max(self.steps, 1)
        totals = [torch.as_tensor(total / count) for total, count in self.sums.values()]
        means = distributed.mean(torch.stack(totals)).tolist() if totals else []
        values: dict[str, float] = dict(zip(self.sums, means, strict=True))
        values[f"{self.samples}_per_second"] = self.batch_size / seconds
        values["minutes_left"] = seconds * steps_left / 60
        self.restart()
        return values

    def restart(self) -> None:
        """Forgets what was added and restarts the clock."""
        self.sums: dict[str, tuple[Any, int]] = {}
        self.steps, self.start = 0, time.monotonic()
