"""The training loop of all stages: step, validate, keep the best, resume bit-exactly.

A run is a function of its config and data: samples are drawn by (seed, epoch, index), dropout by
(seed, step, part), and the learning rate follows from the step. So a checkpoint's weights,
optimizer state and step are all that a resumed run needs.
"""

import math
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from datasets.categories import check_same_outputs
from datasets.files import atomic_path
from pipeline import distributed
from pipeline.checkpoint import BEST, LAST, load_checkpoint, load_weights, save_checkpoint
from pipeline.command import Interrupted
from pipeline.config import Config
from pipeline.data import BrokenFiles
from pipeline.precision import choose_precision, precision_name
from pipeline.recipe import changed_settings, config_from_dict, config_to_dict, save_config
from pipeline.run_lock import locks_output
from pipeline.training.optimizer import average_weights, build_optimizer, learning_rate
from pipeline.training.run_directory import find_begun, resumes_run
from pipeline.training.run_log import Meter, RunLog
from pipeline.training.stages import Stage
from pipeline.training.stopping import StopSignals

FIXED = ("optimizer", "batch_size", "batches_per_epoch")  # of a run that is resumed
PROGRESS = ("step", "validated", "best")  # of a run, in its checkpoints
# Seconds that other processes give the main one to save a run that one of them has left.
MAIN_SAVES_WITHIN = 3


@locks_output
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
        resume: continue from `checkpoints/last.pt`; without one from `best.pt`, or from the start.
            Processes that torchrun restarts do so, see `resumes_run`.
        precision: as in `choose_precision`; bf16 is autocast. Without one, and with "auto", a
            resumed run keeps what it was trained in.

    Raises:
        ValueError: the directory holds a run and `resume` is not set, or that run is of another
            model.
        FloatingPointError: a loss was not finite; the minibatch is saved beside the checkpoints.
        Interrupted: a stop signal came.
        ConnectionError: another process of the run has ended.

    Whatever it raises, the state after the last whole step is in `checkpoints/last.pt`.
    """
    run = TrainingRun(stage, config, output, device)
    run.prepare(resume, precision)
    with run.stop.listening():
        run.train()
    return output / "checkpoints" / BEST


class TrainingRun:
    """State of a run: model, optimizer, step, best value so far."""

    def __init__(self, stage: Stage, config: Config, output: Path, device: torch.device):
        self.stage, self.config, self.device = stage, config, device
        self.optim, self.checkpoints, self.output = stage.optim, output / "checkpoints", output
        stage.model.to(device).to(memory_format=torch.channels_last)
        self.optimizer = build_optimizer(self.optim, stage.parameter_groups())
        self.average = average_weights(stage.model, self.optim.ema_decay)
        # Its weights are validated, and what the run gives.
        self.result = stage.model if self.average is None else self.average.module
        self.total = self.optim.epochs * self.optim.batches_per_epoch
        self.step, self.validated, self.best = 0, 0, -math.inf
        self.start, self.saved = 0, -1  # steps: of this session, and of what is in last.pt
        self.changing = threading.RLock()  # held while the weights change or are saved
        self.half_step = self.ending = False
        self.stop = StopSignals(self._rescue)

    def prepare(self, resume: bool, precision: str | None = None) -> None:
        """Starts a run, or continues the one that the directory holds."""
        resume = resumes_run(self.output, resume)
        last, changes = find_begun(self.output), []
        if last is not None:
            state = load_checkpoint(last, stage=self.stage.name)
            changes = self._restore(state, str(last))
            amp = f"{self.stage.name}.optim.amp "
            if precision in (None, "auto") and not any(c.startswith(amp) for c in changes):
                precision = state.get("precision")
            self.saved = self.step if last.name == LAST else -1
        dtype = choose_precision(
            precision, self.stage.trunk, self.device, amp=self.optim.amp, train=True
        )
        self.precision = precision_name(dtype)
        distributed.barrier()  # every process has seen the directory as it was
        if resume and last is None:
            distributed.say(f"nothing to resume in {self.output}: it starts at step 0")
        if changes:
            distributed.say("changed since the last session: " + ", ".join(changes))
        if last is not None:
            self._write_config()  # from here on the directory is this run's
        self.log = RunLog(self.output, enabled=distributed.is_main(), start_step=self.step)
        self.start = self.step
        counts = [(p.numel(), p.requires_grad) for p in self.stage.model.parameters()]
        trained, count = sum(n for n, grad in counts if grad), sum(n for n, _ in counts)
        distributed.say(
            f"{self.stage.name}: step {self.step} of {self.total}, {trained / 1e6:.2f} M of "
            f"{count / 1e6:.2f} M parameters trained, on {self.device}"
        )

    def train(self) -> None:
        """Runs to the last step, or until a stop signal ends it after the step at hand.

        However it ends, the state after the last whole step is saved before.
        """
        batches = self.stage.training_batches(range(self.step, self.total), self.device)
        try:
            self._run_steps(batches)
            self.log.close()
        except BaseException as error:
            reason = self._explain(error)
            self._keep(reason, lost=distributed.is_lost_connection(error))
            if reason is error:
                raise
            raise reason from error
        finally:
            batches.close()  # ends its workers

    def _run_steps(self, batches: Generator[list[dict]]) -> None:
        if self.step >= self.total:
            distributed.say(f"nothing is left to train: step {self.step} of {self.total}")
        self._start_phase()
        meter, saved = Meter(self.optim.batch_size, self.stage.samples), time.monotonic()
        broken = BrokenFiles(len(self.stage.train_data.coco), self.config.data.max_broken_fraction)
        self._validate_if_due()  # a run that was stopped between its last step and its validation
        self.stage.model.train()  # where batch norm is frozen, it is so by construction
        while (parts := self._next(batches)) is not None:
            meter.add(self.train_step(parts))
            if self.step == 1:
                self._write_config()
            if self.step % self.optim.log_every == 0:
                rate = learning_rate(self.optim, self.step - 1)
                self._write("train", lr=rate, **meter.flush(self.total - self.step))
            halt, save, news = distributed.any_process(
                self.stop.signum is not None,
                time.monotonic() - saved > 60 * self.optim.save_every_minutes,
                broken.note([message for part in parts for message in part["broken"]]),
                device=self.device,
            )
            if halt or save:
                self._save(LAST)
                saved = time.monotonic()
            if halt:
                raise Interrupted(next(filter(None, distributed.gather(self.stop.signum))))
            if news:
                broken.report()
            if self._validate_if_due():
                meter.restart()
            if self.step in self.stage.phase_starts:
                self._start_phase()

    def _next(self, batches: Iterator[list[dict]]) -> list[dict] | None:
        """A minibatch, however long it takes: a stop signal need not wait for it.

        Several processes stop together, after a step.
        """
        if distributed.world_size() > 1:
            return next(batches, None)
        with self.stop.at_once():
            return next(batches, None)

    def _explain(self, error: BaseException) -> BaseException:
        """The reason for an error: a stop signal, or that another process has ended."""
        if isinstance(error, Exception) and self.stop.signum is not None:
            return Interrupted(self.stop.signum)
        if distributed.is_lost_connection(error):
            words = " ".join(str(error).split())
            return ConnectionError(f"another process of this run has ended ({words})")
        return error

    def _keep(self, reason: BaseException, *, lost: bool) -> None:
        """Saves the state after the last whole step, whatever the other processes do.

        `lost`: one of them has ended, perhaps the main one.
        """
        self.ending = True
        is_stop = isinstance(reason, Interrupted)
        if self.step == self.start and not is_stop:
            return  # nothing was learned, and a mistake to mend must not leave half a run
        if not distributed.is_main():
            if not lost or self._main_saves():
                return
        elif isinstance(reason, FloatingPointError) and not self._is_finite():
            return
        self._write_last("stopped at" if is_stop else "saved")

    def _rescue(self) -> bool:
        """Saves the run while the main thread hangs somewhere; False if that is ending already."""
        if self.ending:
            return False
        self.changing.acquire()  # for good: no step begins any more
        # Where the main process was killed, its workers may keep its connections open for a while.
        if distributed.is_main() or not self._main_saves():
            self._write_last("stopped at")
        return True

    def _write_last(self, words: str) -> None:
        try:
            with self.changing:
                if self.half_step:
                    raise RuntimeError("an error in the middle of changing the weights")
                if self.saved != self.step:
                    self._write_checkpoint(LAST)
        except (OSError, RuntimeError) as problem:
            with suppress(OSError):
                print(f"step {self.step} could not be saved: {problem}", flush=True)
            return
        with suppress(OSError):
            print(f"{words} step {self.step}; continue with --resume", flush=True)

    def _main_saves(self) -> bool:
        """Whether the main process, which may be the one that ended, saves this run."""
        path, start = self.checkpoints / LAST, time.time()
        while time.time() < start + MAIN_SAVES_WITHIN:
            if path.exists() and path.stat().st_mtime > start - 6:
                return True
            time.sleep(0.1)
        return not self.output.is_dir()  # on a machine that does not share the directory

    def _is_finite(self) -> bool:
        return all(bool(torch.isfinite(p).all()) for p in self.stage.model.parameters())

    def _start_phase(self) -> None:
        self.stage.start_phase(self.step)
        # DistributedDataParallel looks at what is trained when it wraps.
        self.model = distributed.wrap(
            self.stage.model, self.device, idle_parameters=self.stage.idle_parameters
        )

    def train_step(self, parts: list[dict]) -> dict[str, Tensor]:
        """Learns from this process's parts of one minibatch; returns the means of their losses."""
        rate = learning_rate(self.optim, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_factor"]
        self.optimizer.zero_grad(set_to_none=True)
        of_parts = [self._add_gradients(parts, index) for index in range(len(parts))]
        losses = {name: torch.stack([each[name] for each in of_parts]).mean(0)
                  for name in of_parts[0]}  # fmt: skip
        finite = torch.isfinite(losses["loss"])
        if limit := self.optim.clip_gradient:
            norm = nn.utils.clip_grad_norm_(self.stage.model.parameters(), limit)
            finite &= torch.isfinite(norm)
        (broken,) = distributed.any_process(~finite, device=self.device)
        if broken:
            self._stop_on_non_finite(parts, losses)
        with self.changing:
            self.half_step = True
            self.optimizer.step()
            if self.average is not None:
                self.average.update_parameters(self.stage.model)
            self.step += 1
            self.half_step = False
        return losses

    def _add_gradients(self, parts: list[dict], index: int) -> dict[str, Tensor]:
        """Adds a part's share of the minibatch's gradient; returns the part's losses."""
        # For dropout: a resumed run draws what an uninterrupted one does, and so does a run by
        # another number of processes, if there are as many parts in all.
        part = distributed.rank() * len(parts) + index
        seeds = np.random.SeedSequence([self.config.seed, self.step, part])
        torch.manual_seed(int(seeds.generate_state(1, np.uint64)[0]))
        in_bfloat16 = self.precision == "bf16"
        with distributed.averaging(self.model, enabled=index == len(parts) - 1):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=in_bfloat16):
                losses = self.stage.losses(self.model, parts[index])
            (losses["loss"] / len(parts)).backward()
        return {name: value.detach() for name, value in losses.items()}

    def _stop_on_non_finite(self, parts: list[dict], losses: dict[str, Tensor]) -> None:
        values = {name: float(loss) for name, loss in losses.items()}
        path = self.output / f"non_finite_batch_{self.step}_rank{distributed.rank()}.pt"
        with atomic_path(path) as temporary:
            torch.save({"step": self.step, "parts": parts, "losses": values}, temporary)
        words = ", ".join(f"{name} {value:g}" for name, value in values.items())
        raise FloatingPointError(
            f"loss or gradient is not finite at step {self.step} ({words}); the minibatch: {path}; "
            f"the last finite weights that were saved are in {self.checkpoints}; "
            f"a lower {self.stage.name}.optim.lr usually helps"
        )

    def _validate_if_due(self) -> bool:
        """Validates at the end of every `validate_every`-th epoch; returns whether it did."""
        epoch, rest = divmod(self.step, self.optim.batches_per_epoch)
        due = epoch % self.optim.validate_every == 0 or self.step == self.total
        if rest or not due or self.validated == self.step:  # at first, both are 0
            return False
        with self.stop.at_once():
            metrics = self.stage.validate(self.result, self.device)
        self.stage.model.train()
        self._write("val", **metrics)
        self.validated = self.step
        # A metric that does not exist (no mask patch in the validation set) must not lose the run.
        value = metrics.get(self.stage.best_metric, 0.0)
        if value >= self.best or not self.optim.keep_best:  # of equal ones, the one trained longest
            self.best = value
            self._save(BEST)
        self._save(LAST)
        return True

    def _write(self, split: str, **values: float) -> None:
        epoch = self.step / self.optim.batches_per_epoch
        self.log.write(split, step=self.step, epoch=epoch, **values)

    def _write_config(self) -> None:
        if distributed.is_main():
            save_config(self.config, self.output / "config.yaml")

    def _save(self, name: str) -> None:
        if not self._is_finite():  # a loss can be finite where its gradient is not
            raise FloatingPointError(
                f"weights are not finite at step {self.step}; those that were saved before are in "
                f"{self.checkpoints}; a lower {self.stage.name}.optim.lr usually helps"
            )
        if distributed.is_main():
            self._write_checkpoint(name)
        distributed.barrier()
        if name == LAST:
            self.saved = self.step

    def _write_checkpoint(self, name: str) -> None:
        with self.changing:
            state = {
                "stage": self.stage.name,
                "config": config_to_dict(self.config),
                "model": self.result.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "precision": self.precision,
                "best_metric": self.stage.best_metric,
                **{key: getattr(self, key) for key in PROGRESS},
                **self.stage.metadata,
            }
            if self.average is not None:
                state["trained_model"] = self.stage.model.state_dict()
            save_checkpoint(self.checkpoints / name, state)
            if name == LAST:
                self.saved = self.step

    def _restore(self, state: dict[str, Any], source: str) -> list[str]:
        """Continues from a checkpoint; returns the settings that have changed since, in words."""
        old = config_from_dict(state["config"], source=source)
        self._check_same_run(old, source)
        metadata = (each.get("categories", []) for each in (state, self.stage.metadata))
        check_same_outputs(*metadata, source=source)
        trained = state.get("trained_model", state["model"])
        load_weights(self.stage.model, trained, source=source)
        if self.average is not None:
            load_weights(self.average.module, state["model"], source=source)
            self.average.n_averaged.fill_(state["step"])
        # The state is the old run's; rates, decay and momentum are what the config says now.
        groups = self.optimizer.state_dict()["param_groups"]
        try:
            self.optimizer.load_state_dict(state["optimizer"])
        except ValueError as error:
            raise ValueError(f"{source}: optimizer state of other frozen layers") from error
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"param_groups": groups})
        for key in PROGRESS:
            setattr(self, key, state[key])
        if state.get("best_metric", self.stage.best_metric) != self.stage.best_metric:
            self.best = -math.inf  # of another metric
        return changed_settings(old, self.config)

    def _check_same_run(self, old: Config, source: str) -> None:
        """What decides which samples a step sees, and what the optimizer's state means."""
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
