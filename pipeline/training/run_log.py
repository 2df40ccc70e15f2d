"""What a training run reports: a line on stdout, a line in metrics.jsonl, TensorBoard curves."""

import json
import time
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from datasets.files import write_atomically


class RunLog:
    """Writes the metrics of one run directory; silent in all processes but the main one."""

    def __init__(
        self, directory: str | Path, *, enabled: bool = True, resume_step: int | None = None
    ):
        """Lines after `resume_step`, left by an interrupted run, are dropped."""
        self.path, self.enabled = Path(directory) / "metrics.jsonl", enabled
        if not enabled:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if resume_step is not None and self.path.exists():
            kept = [line for line in read_metrics(self.path) if line["step"] <= resume_step]
            lines = "".join(json.dumps(line) + "\n" for line in kept)
            write_atomically(self.path, lines.encode())
        purge = None if resume_step is None else resume_step + 1
        self.board = SummaryWriter(str(Path(directory) / "tensorboard"), purge_step=purge)

    def write(self, split: str, *, step: int, epoch: float, **values: float) -> None:
        """One line of metrics of a split ("train", "val")."""
        if not self.enabled:
            return
        record = {"split": split, "step": step, "epoch": round(epoch, 4)}
        record |= {"time": round(time.time(), 2), **values}
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        for name, value in values.items():
            self.board.add_scalar(f"{split}/{name}", value, step)
        words = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        print(f"{split:5s} step {step}  {words}", flush=True)

    def close(self) -> None:
        """Flushes the curves."""
        if self.enabled:
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
