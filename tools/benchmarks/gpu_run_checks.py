"""Whether runs work on the GPU: phases, resuming, loading processes, signals, lack of memory."""

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import cv2
import numpy as np
import torch
from torch import Tensor

from pipeline.checkpoint import LAST, load_checkpoint
from pipeline.config import ROOT, STAGES, Config
from pipeline.data import device_batches
from pipeline.inference.folders import propose_images
from pipeline.inference.propose import Proposer
from pipeline.recipe import save_config
from pipeline.training.engine import fit
from tools.benchmarks.gpu_checks import relative_difference
from tools.benchmarks.gpu_setup import (
    CPU,
    NO_DROPOUT,
    Setup,
    at_least,
    at_most,
    full_precision,
    make_stage,
)
from tools.benchmarks.synthetic import draw_image
from tools.benchmarks.timing import Rows

EXIT_ON_SIGNAL = 130
PATIENCE = 120  # seconds, for a tool to start
SMALL, LARGE = (192, 256), (1536, 2048)  # of images, of which the large one does not fit
DIVISOR = 8  # of their sides, if it has to be quick


def train(config: Config, name: str, output: Path, device: torch.device, *, epochs: int) -> dict:
    """Trains or resumes a stage up to an epoch; returns its last checkpoint."""
    section = getattr(config, name)
    section = replace(section, optim=replace(section.optim, epochs=epochs))
    config = replace(config, **{name: section})
    fit(make_stage(name, config), config, output, device=device, resume=True)
    return load_checkpoint(output / "checkpoints" / LAST)


def check_phases(setup: Setup) -> Rows:
    """The detector's trunk stays as it is for `frozen_epochs`, and learns afterwards."""
    config = setup.tiny("multipathnet.frozen_epochs=1")
    trunks = [_trunk(make_stage("multipathnet", config).model.state_dict())]
    output = setup.directory / "phases"
    for epochs in (1, 2):
        checkpoint = train(config, "multipathnet", output, setup.device, epochs=epochs)
        trunks.append(_trunk(checkpoint["model"]))
    moved = [float((b - a).abs().max()) for a, b in zip(trunks[:-1], trunks[1:], strict=True)]
    return {
        "the trunk moves in phase 1": at_most(moved[0], 0),
        "the trunk moves in phase 2": at_least(moved[1], 1e-8),
    }


def _trunk(state: dict[str, Tensor]) -> Tensor:
    values = [v.flatten().cpu() for k, v in state.items() if k.startswith("trunk.")]
    return torch.cat(values)


def check_resume(setup: Setup) -> Rows:
    """An epoch on one device, the next on the other, and back, against the CPU alone."""
    rows: Rows = {}
    for name in STAGES[:1] if setup.quick else STAGES:
        for optimizer in ("adamw",) if setup.quick else ("sgd", "adamw"):
            optim = f"{name}.optim"
            config = setup.tiny(f"{optim}.optimizer={optimizer}", f"{optim}.amp=false", *NO_DROPOUT)
            start = make_stage(name, config).model.state_dict()
            runs: list[dict] = []
            for there in (setup.device, CPU):
                output = setup.directory / f"{name}_{optimizer}_{len(runs)}"
                for epochs, device in enumerate((there, CPU, there), start=1):
                    with full_precision():
                        last = train(config, name, output, device, epochs=epochs)
                runs.append(last)
            mixed, alone = (_moved(run["model"], start) for run in runs)
            rows[f"{name}, {optimizer}: steps"] = at_least(runs[0]["step"], runs[1]["step"])
            # Where a gradient is almost 0, AdamW's step may go either way.
            limit = 0.1 if optimizer == "adamw" else 0.01
            rows[f"{name}, {optimizer}: how the weights moved"] = at_most(
                relative_difference(mixed, alone), limit
            )
    return rows


def _moved(state: dict[str, Tensor], start: dict[str, Tensor]) -> Tensor:
    return torch.cat([(value - start[name]).flatten() for name, value in state.items()])


def check_workers(setup: Setup) -> Rows:
    """Processes that load, started after CUDA, against loading in the training process."""
    torch.ones(1, device=setup.device)
    stage = make_stage("deepmask", setup.tiny())
    batches = []
    for workers in (0, 2):
        indices = stage.batch_indices(range(3), seed=0)
        loaded = device_batches(stage.train_data, indices, setup.device, workers=workers)
        batches.append([batch["patches"] for batch in loaded])
    same = [torch.equal(a, b) for a, b in zip(*batches, strict=True)]
    return {"minibatches that are the same": at_least(sum(same), 3)}


def check_signal(setup: Setup) -> Rows:
    """SIGTERM during training: the checkpoint is saved, the exit status is 130."""
    optim = ("batches_per_epoch=100000", "save_every_minutes=0")
    config = setup.tiny(*(f"deepmask.optim.{setting}" for setting in optim), "data.workers=2")
    recipe, output = setup.directory / "signal.yaml", setup.directory / "signal"
    save_config(config, recipe)
    command = [sys.executable, str(ROOT / "tools" / "train_stage.py"), "--stage", "deepmask"]
    command += ["--config", str(recipe), "--output", str(output), "--device", str(setup.device)]
    with subprocess.Popen(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as run:
        try:
            last = output / "checkpoints" / LAST
            _wait_for(last, run)
            run.send_signal(signal.SIGTERM)
            printed, _ = run.communicate(timeout=PATIENCE)
        finally:
            run.kill()
    if run.returncode != EXIT_ON_SIGNAL:
        print(printed)
    return {
        "exit status": {
            "measured": run.returncode,
            "limit": EXIT_ON_SIGNAL,
            "ok": float(run.returncode == EXIT_ON_SIGNAL and "--resume" in printed),
        },
        "step of the checkpoint": at_least(load_checkpoint(last)["step"], 1),
    }


def _wait_for(path: Path, run: subprocess.Popen) -> None:
    end = time.monotonic() + PATIENCE
    while not path.exists():
        if run.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"{path.name} was not written: {run.stdout and run.stdout.read()}")
        time.sleep(0.1)


def check_memory(setup: Setup) -> Rows:
    """An image that does not fit into memory is named, and the next one works."""
    images, output = setup.directory / "images", setup.directory / "proposals"
    images.mkdir()
    shrink = DIVISOR if setup.quick else 1
    for name, size in {"a": SMALL, "b": LARGE, "c": SMALL}.items():
        image = draw_image(np.random.default_rng(0), *(side // shrink for side in size))
        cv2.imwrite(str(images / f"{name}.jpg"), image)
    proposer = setup.proposer(setup.device, amp=True)
    small = draw_image(np.random.default_rng(0), *(side // shrink for side in SMALL))
    with _little_memory(setup, proposer, small):
        summary = propose_images(proposer, images, output, settings={}, write_json=False)
    named = [m for m in summary.broken if re.search(r"b\.jpg.*out of memory at", m)]
    return {
        "images that are left out": at_most(len(summary.broken), 1),
        "images named for lack of memory": at_least(len(named), 1),
        "images that are done": at_least(summary.done, 2),
    }


@contextmanager
def _little_memory(setup: Setup, proposer: Proposer, small: np.ndarray) -> Iterator[None]:
    """So little that twice a small image fits, but not a large one; on a CPU by pretense."""
    if setup.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        proposer(small)
        needed = torch.cuda.max_memory_reserved()
        total = torch.cuda.get_device_properties(setup.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, 2 * needed / total))
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        return
    pixels, _ = proposer.scale(small, max(proposer.log2_scales))
    dense, fits = proposer.dense, 4 * pixels.numel()

    def run(pixels: Tensor) -> tuple[Tensor, ...]:
        if pixels.numel() > fits:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return dense(pixels)

    with mock.patch.object(proposer, "dense", run):
        yield


def check_tests(setup: Setup) -> Rows:
    """The project's tests that need CUDA; where there is none they are skipped."""
    files = [p for p in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.cuda" in p.read_text()]
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "-p", "no:cacheprovider", "-rs"]
    done = subprocess.run([*command, *map(str, files)], cwd=ROOT, capture_output=True, text=True)
    print(done.stdout + done.stderr)
    return {"exit status of pytest": at_most(done.returncode, 0)}


CHECKS: dict[str, Callable[[Setup], Rows]] = {
    "phases": check_phases,
    "resume": check_resume,
    "workers": check_workers,
    "signal": check_signal,
    "memory": check_memory,
    "tests": check_tests,
}
