"""Training a stage in a test, whole or interrupted."""

import contextlib
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from pipeline.config import Config
from pipeline.training import engine
from pipeline.training.engine import Interrupted, fit
from pipeline.training.prepare import build_stage, prepare_stage
from pipeline.training.stages import Stage

CPU = torch.device("cpu")


def make_stage(name: str, config: Config, output: Path, *, device: torch.device = CPU) -> Stage:
    return build_stage(name, config, prepare_stage(name, config, output, device))


def train(
    name: str, config: Config, output: Path, *, device: torch.device = CPU, **options: Any
) -> Path:
    """Trains a stage; options are `fit`'s. Returns its best checkpoint."""
    stage = make_stage(name, config, output, device=device)
    return fit(stage, config, output, device=device, **options)


def interrupt(name: str, config: Config, output: Path, *, steps: int, **options: Any) -> None:
    """Trains a stage and stops it after some steps, as a signal does; options are `train`'s."""
    stop = _StopAfter(steps)
    with (
        mock.patch.object(engine, "_stop_signals", lambda: contextlib.nullcontext(stop)),
        pytest.raises(Interrupted),
    ):
        train(name, config, output, **options)


def last_checkpoint(output: Path) -> dict:
    path = output / "checkpoints" / "last.pt"
    return torch.load(path, map_location="cpu", weights_only=True)


class _StopAfter(dict):
    def __init__(self, steps: int):
        super().__init__()
        self.steps = steps

    def __getitem__(self, key):
        self.steps -= 1
        return self.steps <= 0
