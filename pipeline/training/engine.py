"""The training loop of all stages: step, validate, keep the best, resume bit-exactly.

A run is a function of its config and data: samples are drawn by (seed, epoch, index), dropout by
(seed, step, rank), and the learning rate follows from the step. So a checkpoint's weights,
optimizer state and step are all that a resumed run needs.
"""

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from datasets.files import atomic_path
from pipeline import distributed
from pipeline.checkpoint import BEST, LAST, load_checkpoint, load_weights, save_checkpoint
from pipeline.config import Config, OptimConfig
from pipeline.precision import choose_precision
from pipeline.recipe import config_from_dict, config_to_dict, save_config
from pipeline.training.run_log import RunLog
from pipeline.training.stages import Stage

FIXED = ("optimizer", "batch_size", "batches_per_epoch")  # of a run that is resumed
PROGRESS = ("step", "validated", "best")  # of a run, in its checkpoints


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop; its state has been saved."""


def fit(
    stage: Stage,
    config: Config,
    output: Path,
    *,
    device: torch.device,
    resume: bool = False,
    precision: str | None = None,
) -> Path:
    """Trains a stage; returns the best checkpoint's path.

    Args:
        output: the run directory; gets `config.yaml`, `checkpoints/`, `metrics.jsonl` and
            TensorBoard events.
        resume: continue from `checkpoints/last.pt` if there is one.
        precision: as in `choose_precision`; bf16 is autocast. Without one, and with "auto", a
            resumed run keeps what it was trained in.

    Raises:
        ValueError: the directory holds a run and `resume` is not set, or that run is of another
            model.
        FloatingPointError: a loss was not finite; the minibatch is saved beside the checkpoints.
        Interrupted: SIGINT or SIGTERM came; the state is in `checkpoints/last.pt`.
    """
    run = TrainingRun(stage, config, output, device)
    run.prepare(resume, precision)
    with _stop_signals() as stop:
        run.train(stop)
    return output / "checkpoints" / BEST


class TrainingRun:
    """State of a run: model, optimizer, step, best value so far."""

    def __init__(self, stage: Stage, config: Config, output: Path, device: torch.device):
        self.stage, self.config, self.device = stage, config, device
        self.optim, self.checkpoints, self.output = stage.optim, output / "checkpoints", output
        stage.model.to(device).to(memory_format=torch.channels_last)
        self.optimizer = build_optimizer(self.optim, stage.parameter_groups())
        self.total = self.optim.epochs * self.optim.batches_per_epoch
        self.step, self.validated, self.best = 0, 0, -math.inf

    def prepare(self, resume: bool, precision: str | None = None) -> None:
        """Starts a run, or continues the one that the directory holds."""
        last = self.checkpoints / LAST
        if last.exists() and not resume:
            raise ValueError(
                f"{self.output} already holds a run; add --resume to continue it, "
                "or choose another --output"
            )
        if last.exists():
            state = load_checkpoint(last, stage=self.stage.name)
            self._restore(state, str(last))
            if precision in (None, "auto"):
                precision = state.get("precision")
        dtype = choose_precision(
            precision, self.stage.trunk, self.device, amp=self.optim.amp, train=True
        )
        self.precision = "bf16" if dtype == torch.bfloat16 else "fp32"
        if distributed.is_main():  # from here on the directory is this run's
            save_config(self.config, self.output / "config.yaml")
        resume_step = self.step if last.exists() else None
        self.log = RunLog(self.output, enabled=distributed.is_main(), resume_step=resume_step)
        counts = [(p.numel(), p.requires_grad) for p in self.stage.model.parameters()]
        trained, count = sum(n for n, grad in counts if grad), sum(n for n, _ in counts)
        distributed.say(
            f"{self.stage.name}: step {self.step} of {self.total}, {trained / 1e6:.2f} M of "
            f"{count / 1e6:.2f} M parameters trained, on {self.device}"
        )

    def train(self, stop: dict[str, bool]) -> None:
        """Runs to the last step; `stop["now"]` ends it after the step at hand."""
        self._start_phase()
        meter, saved = Meter(self.optim.batch_size, self.stage.samples), time.monotonic()
        self._validate_if_due()  # a run that was stopped between its last step and its validation
        self.stage.model.train()  # batch norm is frozen by construction
        for batch in self.stage.training_batches(range(self.step, self.total), self.device):
            losses = self.train_step(batch)
            meter.add(losses)
            if self.step % self.optim.log_every == 0:
                rate = learning_rate(self.optim, self.step - 1)
                self._write("train", lr=rate, **meter.flush(self.total - self.step))
            save_due = time.monotonic() - saved > 60 * self.optim.save_every_minutes
            halt, save = distributed.any_process(stop["now"], save_due, device=self.device)
            if halt or save:
                self._save(LAST)
                saved = time.monotonic()
            if halt:
                distributed.say(f"stopped at step {self.step}; continue with --resume")
                raise Interrupted
            if self._validate_if_due():
                meter.restart()
            if self.step in self.stage.phase_starts:
                self._start_phase()
        self.log.close()

    def _start_phase(self) -> None:
        self.stage.start_phase(self.step)
        # DistributedDataParallel looks at what is trained when it wraps.
        self.model = distributed.wrap(
            self.stage.model, self.device, idle_parameters=self.stage.idle_parameters
        )

    def train_step(self, batch: dict) -> dict[str, Tensor]:
        """Learns from one minibatch; returns its losses."""
        # For dropout: a resumed run draws what an uninterrupted one does.
        seeds = np.random.SeedSequence([self.config.seed, self.step, distributed.rank()])
        torch.manual_seed(int(seeds.generate_state(1, np.uint64)[0]))
        rate = learning_rate(self.optim, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_factor"]
        in_bfloat16 = self.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=in_bfloat16):
            losses = self.stage.losses(self.model, batch)
        (broken,) = distributed.any_process(~torch.isfinite(losses["loss"]), device=self.device)
        if broken:
            self._stop_on_non_finite(batch, losses)
        self.optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        if self.optim.clip_gradient:
            nn.utils.clip_grad_norm_(self.stage.model.parameters(), self.optim.clip_gradient)
        self.optimizer.step()
        self.step += 1
        return {name: value.detach() for name, value in losses.items()}

    def _stop_on_non_finite(self, batch: dict, losses: dict[str, Tensor]) -> None:
        values = {name: float(loss.detach()) for name, loss in losses.items()}
        path = self.output / f"non_finite_batch_{self.step}_rank{distributed.rank()}.pt"
        with atomic_path(path) as temporary:
            torch.save({"step": self.step, "batch": batch, "losses": values}, temporary)
        words = ", ".join(f"{name} {value:g}" for name, value in values.items())
        raise FloatingPointError(
            f"loss is not finite at step {self.step} ({words}); the minibatch is in {path}; "
            f"the weights before it are in {self.checkpoints / LAST} if one was saved; "
            f"a lower {self.stage.name}.optim.lr usually helps"
        )

    def _validate_if_due(self) -> bool:
        """Validates at the end of every `validate_every`-th epoch; returns whether it did."""
        epoch, rest = divmod(self.step, self.optim.batches_per_epoch)
        due = epoch % self.optim.validate_every == 0 or self.step == self.total
        if rest or not due or self.validated == self.step:  # at first, both are 0
            return False
        metrics = self.stage.validate(self.device)
        self.stage.model.train()
        self._write("val", **metrics)
        self.validated = self.step
        # A metric that does not exist (no mask patch in the validation set) must not lose the run.
        value = metrics.get(self.stage.best_metric, 0.0)
        if value > self.best:
            self.best = value
            self._save(BEST)
        self._save(LAST)
        return True

    def _write(self, split: str, **values: float) -> None:
        epoch = self.step / self.optim.batches_per_epoch
        self.log.write(split, step=self.step, epoch=epoch, **values)

    def _save(self, name: str) -> None:
        if distributed.is_main():
            state = {
                "stage": self.stage.name,
                "config": config_to_dict(self.config),
                "model": self.stage.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "precision": self.precision,
                **{key: getattr(self, key) for key in PROGRESS},
                **self.stage.metadata,
            }
            save_checkpoint(self.checkpoints / name, state)
        distributed.barrier()

    def _restore(self, state: dict[str, Any], source: str) -> None:
        self._check_same_run(state["config"], source)
        load_weights(self.stage.model, state["model"], source=source)
        # The state is the old run's; rates, decay and momentum are what the config says now.
        groups = self.optimizer.state_dict()["param_groups"]
        try:
            self.optimizer.load_state_dict(state["optimizer"])
        except ValueError as error:
            raise ValueError(f"{source}: optimizer state of other frozen layers") from error
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"param_groups": groups})
        for key in PROGRESS:
            setattr(self, key, state[key])

    def _check_same_run(self, values: dict[str, Any], source: str) -> None:
        """What decides which samples a step sees, and what the optimizer's state means."""
        old = config_from_dict(values, source=source)
        pairs = {"seed": (old.seed, self.config.seed)}
        for name in FIXED:
            optims = (getattr(config, self.stage.name).optim for config in (old, self.config))
            was, now = (getattr(optim, name) for optim in optims)
            pairs[f"{self.stage.name}.optim.{name}"] = was, now
        for key, (was, now) in pairs.items():
            if was != now:
                raise ValueError(
                    f"{source} was trained with {key} {was}, not {now}; a run is resumed with the "
                    "same value: restore it, or choose another --output"
                )


def learning_rate(optim: OptimConfig, step: int) -> float:
    """Of a step, from 0 on: warm-up times drops at epochs, or times a half cosine to zero."""
    warmup = min(1.0, (step + 1) / optim.warmup_batches) if optim.warmup_batches else 1.0
    if optim.schedule == "cosine":
        progress = step / (optim.epochs * optim.batches_per_epoch)
        return optim.lr * warmup * 0.5 * (1 + math.cos(math.pi * progress))
    epoch = step // optim.batches_per_epoch
    passed = [start for start in optim.lr_drops if start <= epoch]
    return optim.lr * warmup * (optim.lr_drops[max(passed)] if passed else 1.0)


def build_optimizer(optim: OptimConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """SGD or AdamW over the groups; the loop sets the learning rates."""
    if optim.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=optim.lr, weight_decay=optim.weight_decay, fused=True)
    return torch.optim.SGD(
        groups, lr=optim.lr, momentum=optim.momentum, weight_decay=optim.weight_decay
    )


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


@contextmanager
def _stop_signals() -> Iterator[dict[str, bool]]:
    """SIGINT and SIGTERM set a flag; a second one ends the process as usual."""
    stop = {"now": False}
    previous: dict[int, Any] = {}

    def handle(signum: int, _: Any) -> None:
        stop["now"] = True
        signal.signal(signum, previous[signum])

    for signum in (signal.SIGINT, signal.SIGTERM):
        previous[signum] = signal.signal(signum, handle)
    try:
        yield stop
    finally:
        for caught, handler in previous.items():
            signal.signal(caught, handler)
