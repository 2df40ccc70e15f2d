"""Training a stage in a test, whole or interrupted."""

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.command import Interrupted
from pipeline.config import Config
from pipeline.training.engine import fit
from pipeline.training.prepare import build_stage, choose_sizes, prepare_stage
from pipeline.training.stages import Stage

ROOT = Path(__file__).resolve().parents[3]
CPU = torch.device("cpu")


def make_stage(name: str, config: Config, output: Path, *, device: torch.device = CPU) -> Stage:
    config = choose_sizes(name, config, output)
    return build_stage(name, config, prepare_stage(name, config, output, device))


def train(
    name: str, config: Config, output: Path, *, device: torch.device = CPU, **options: Any
) -> Path:
    """Trains a stage; options are `fit`'s. Returns its best checkpoint."""
    config = choose_sizes(name, config, output)
    stage = make_stage(name, config, output, device=device)
    return fit(stage, config, output, device=device, **options)


def interrupt(name: str, config: Config, output: Path, *, steps: int, **options: Any) -> None:
    """Trains a stage and stops it in one of its steps by a signal; options are `train`'s."""
    stage = make_stage(name, config, output, device=options.get("device", CPU))
    call_in_step(stage, steps, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Interrupted):
        fit(stage, config, output, **{"device": CPU, **options})


def call_in_step(stage: Stage, step: int, action: Callable[[], None]) -> None:
    """Has a stage call something in the middle of a step, counted from 1."""
    losses, parts = stage.losses, itertools.count(1)

    def spy(model: nn.Module, part: dict) -> dict:
        if next(parts) == step * stage.optim.accumulate:
            action()
        return losses(model, part)

    stage.losses = spy


def last_checkpoint(output: Path) -> dict:
    path = output / "checkpoints" / "last.pt"
    return torch.load(path, map_location="cpu", weights_only=True)


def start_tool(
    arguments: list, *, processes: int = 1, launch: Sequence[str] = ()
) -> subprocess.Popen[str]:
    """Starts a DeepMask's training in a session of its own, by torchrun for several processes.

    `launch`: torchrun's options.
    """
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone"]
        launcher += ["--nproc-per-node", str(processes), *launch]
    tool = [str(ROOT / "tools" / "train_stage.py"), "--stage", "deepmask", "--device", "cpu"]
    return subprocess.Popen(
        [*launcher, *tool, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
