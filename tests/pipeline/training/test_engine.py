"""The training loop: schedules, resuming, several processes, signals, non-finite losses."""

import copy
import json
import os
import signal
import time

import pytest
import torch
import yaml

from pipeline import distributed
from pipeline.config import OptimConfig
from pipeline.data import BrokenFiles
from pipeline.recipe import config_from_dict, load_config
from pipeline.training.engine import TrainingRun, fit
from pipeline.training.optimizer import learning_rate
from pipeline.training.run_log import RunLog, read_metrics
from tests.pipeline.training.runs import (
    CPU,
    interrupt,
    last_checkpoint,
    make_stage,
    start_tool,
    train,
)


def make_config(recipe, **optim):
    values = copy.deepcopy(recipe)
    values["deepmask"]["optim"] |= optim
    return config_from_dict(values, source="test")


def validations(run):
    return [line for line in read_metrics(run / "metrics.jsonl") if line["split"] == "val"]


def assert_same_run(a, b):
    """Weights, optimizer state and metrics, to the bit."""
    first, second = last_checkpoint(a), last_checkpoint(b)
    assert first["step"] == second["step"] and first["best"] == second["best"]
    for name, value in first["model"].items():
        assert torch.equal(value, second["model"][name]), name
    for index, slots in first["optimizer"]["state"].items():
        for name, value in slots.items():
            other = second["optimizer"]["state"][index][name]
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other)), name
    times = ("time", "patches_per_second", "images_per_second", "minutes_left")
    lines = [
        [{k: v for k, v in line.items() if k not in times} for line in read_metrics(path)]
        for path in (a / "metrics.jsonl", b / "metrics.jsonl")
    ]
    assert lines[0] == lines[1]


@pytest.mark.parametrize(("optimizer", "ema_decay"), [("sgd", None), ("adamw", 0.9)])
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(
    tiny_recipe, tmp_path, optimizer, ema_decay
):
    parts = 1
    if ema_decay:  # and with all that a mask network may learn from
        parts = 2
        scores = {"score_targets": "iou", "score_cells": 3, "jitter_color": 0.3}
        tiny_recipe = copy.deepcopy(tiny_recipe)
        tiny_recipe["deepmask"].setdefault("sampling", {}).update(scores)
    config = make_config(
        tiny_recipe,
        optimizer=optimizer,
        ema_decay=ema_decay,
        accumulate=parts,
        batches_per_epoch=3,
        epochs=3,
        validate_every=1,
        warmup_batches=2,
    )
    train("deepmask", config, tmp_path / "whole")
    # In the middle of the first epoch, then at the end of the second, before its validation.
    for steps in (2, 3):
        interrupt("deepmask", config, tmp_path / "parts", steps=steps, resume=True)
    assert last_checkpoint(tmp_path / "parts")["step"] == 5
    train("deepmask", config, tmp_path / "parts", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize(
    ("stage", "steps", "overrides"),
    [
        ("sharpmask", 2, ["sharpmask.optim.batches_per_epoch=3"]),
        # Stopped before and after the trunk thaws.
        ("multipathnet", 1, ["multipathnet.frozen_epochs=1"]),
        ("multipathnet", 3, ["multipathnet.frozen_epochs=1"]),
    ],
)
def test_later_stages_resume_from_their_own_checkpoint(
    stage, steps, overrides, tiny_config, tiny_checkpoint, stores, tmp_path
):
    """To the bit; what the run started from may be gone by then."""
    overrides += [*stores, f"{stage}.optim.epochs=2", "multipathnet.sampling.draw_threshold=true"]
    start = tmp_path / "deepmask.pt"
    start.write_bytes(tiny_checkpoint.read_bytes())
    config = load_config(tiny_config, [*overrides, f"init.deepmask={start}"])
    train(stage, config, tmp_path / "whole")
    interrupt(stage, config, tmp_path / "parts", steps=steps)
    start.unlink()
    train(stage, config, tmp_path / "parts", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_run_stopped_between_its_last_step_and_validation_validates_first(tiny_recipe, tmp_path):
    config = make_config(tiny_recipe, batches_per_epoch=2, epochs=2, validate_every=1)
    interrupt("deepmask", config, tmp_path, steps=2)
    assert validations(tmp_path) == []
    train("deepmask", config, tmp_path, resume=True)
    assert [line["step"] for line in validations(tmp_path)] == [2, 4]


def test_every_part_of_every_step_draws_its_own_dropout(tiny_recipe, tmp_path, monkeypatch):
    """By (seed, step, part): the same in a new run and whichever process the part falls to."""

    def drawn(accumulate, rank=0):
        optim = {"batch_size": 8 * accumulate // 2, "accumulate": accumulate}
        config = make_config(tiny_recipe, batches_per_epoch=3, epochs=1, **optim)
        stage, states = make_stage("deepmask", config, tmp_path / "new"), []
        losses = stage.losses

        def spy(model, part):
            states.append(torch.random.get_rng_state().tolist())
            return losses(model, part)

        stage.losses = spy
        run = TrainingRun(stage, config, tmp_path / "run", CPU)
        run.precision, run.model = "fp32", stage.model
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        for parts in stage.training_batches(range(3), CPU):
            run.train_step(parts)
        return states

    states = drawn(2)
    assert len({str(state) for state in states}) == 6 and drawn(2) == states
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    assert [drawn(1, rank=0), drawn(1, rank=1)] == [states[::2], states[1::2]]


def test_a_terminated_run_saves_and_a_killed_one_loses_little(tiny_config, tmp_path):
    overrides = ["deepmask.optim.batches_per_epoch=100000", "deepmask.optim.save_every_minutes=0"]
    overrides += ["data.workers=1"]
    arguments = ["--config", tiny_config, "--output", tmp_path / "run", "--set", *overrides]
    run = start_tool(arguments)
    _wait_for(tmp_path / "run" / "checkpoints" / "last.pt", run)
    os.killpg(run.pid, signal.SIGTERM)  # workers, too, as schedulers send it
    output, _ = run.communicate(timeout=60)
    assert run.returncode == 143
    assert "continue with --resume" in output and "Traceback" not in output
    step = last_checkpoint(tmp_path / "run")["step"]
    assert step > 0
    run = start_tool([*arguments, "--resume"])
    while last_checkpoint(tmp_path / "run")["step"] <= step:
        assert run.poll() is None, run.stdout.read()
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGKILL)
    run.communicate()
    assert last_checkpoint(tmp_path / "run")["step"] > step  # whole and readable


def _wait_for(path, run):
    for _ in range(600):
        if path.exists():
            return
        assert run.poll() is None, run.stdout.read()
        time.sleep(0.1)
    raise AssertionError(f"{path} was not written")


def test_a_loss_that_is_not_finite_stops_with_the_minibatch_saved(tiny_recipe, tmp_path):
    config = make_config(tiny_recipe)
    stage = make_stage("deepmask", config, tmp_path / "run")
    losses = stage.losses
    stage.losses = lambda model, batch: {
        name: value * float("nan") for name, value in losses(model, batch).items()
    }
    before = {k: v.clone() for k, v in stage.model.state_dict().items()}
    with pytest.raises(FloatingPointError, match="not finite at step 0") as error:
        fit(stage, config, tmp_path / "run", device=CPU)
    (path,) = (tmp_path / "run").glob("non_finite_batch_*.pt")
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    [part] = torch.load(path, weights_only=True)["parts"]
    assert part["patches"].shape == (8, 3, 128, 128)
    assert all(torch.equal(v, before[k]) for k, v in stage.model.state_dict().items())


class FiniteWithoutGradient(torch.autograd.Function):
    """A loss as it is, whose gradient is NaN."""

    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("nan")


@pytest.mark.parametrize("clip", [None, 1.0])
def test_weights_that_are_not_finite_are_not_saved_over_those_that_were(
    tiny_recipe, tmp_path, clip
):
    optim = {"clip_gradient": clip, "batches_per_epoch": 1}  # validated and saved at every step
    train("deepmask", make_config(tiny_recipe, **optim), tmp_path / "run")
    config = make_config(tiny_recipe, **optim, epochs=2)
    before = (tmp_path / "run" / "checkpoints" / "last.pt").read_bytes()
    stage = make_stage("deepmask", config, tmp_path / "run")
    losses = stage.losses

    def without_gradient(model, batch):
        values = losses(model, batch)
        return values | {"loss": FiniteWithoutGradient.apply(values["loss"])}

    stage.losses = without_gradient
    with pytest.raises(FloatingPointError, match="not finite at step"):
        fit(stage, config, tmp_path / "run", device=CPU, resume=True)
    assert (tmp_path / "run" / "checkpoints" / "last.pt").read_bytes() == before


def test_some_broken_images_do_not_stop_a_run_and_too_many_do(capsys):
    files = BrokenFiles(40, 0.05)
    for _ in range(2):
        files.note(["1.jpg", "2.jpg"])
        files.report()
    assert not files.note(["1.jpg"])
    assert capsys.readouterr().out == (
        "skipped (1 so far): 1.jpg\nskipped (2 so far): 2.jpg\n"  # each once
    )
    with pytest.raises(ValueError, match=r"3 of 40 images cannot be read.*0.05: 1.jpg; 2.jpg; 3"):
        assert files.note(["3.jpg"])
        files.report()


def test_a_run_leaves_config_checkpoints_metrics_and_curves(tiny_run):
    assert {p.name for p in tiny_run.iterdir()} >= {
        "config.yaml", "checkpoints", "metrics.jsonl", "tensorboard"
    }  # fmt: skip
    state = torch.load(tiny_run / "checkpoints" / "best.pt", weights_only=True)
    assert state.keys() == {
        "stage", "config", "model", "optimizer", "precision", "best_metric", "step", "validated",
        "best", "object_sides"
    }  # fmt: skip
    assert validations(tiny_run)[-1].keys() >= {
        "mean_iou", "median_iou", "iou_above_0.5", "iou_above_0.7", "score_accuracy"
    }  # fmt: skip
    assert any(p.name.startswith("events") for p in (tiny_run / "tensorboard").iterdir())


@pytest.mark.parametrize(
    ("keep_best", "metrics", "kept"),
    [(True, [0.1, 0.3, 0.2], 4), (False, [0.1, 0.3, 0.2], 6), (True, [0, 0, 0], 6)],
)
def test_the_result_has_the_best_metric_or_the_last_weights(
    tiny_recipe, tmp_path, keep_best, metrics, kept
):
    """Of equal metrics, too, such as none above an IoU, the later one's."""
    optim = {"epochs": 3, "batches_per_epoch": 2, "validate_every": 1, "keep_best": keep_best}
    config = make_config(tiny_recipe, **optim)
    stage, values = make_stage("deepmask", config, tmp_path), iter(metrics)
    stage.validate = lambda model, device: {stage.best_metric: next(values)}
    path = fit(stage, config, tmp_path, device=CPU)
    assert torch.load(path, weights_only=True)["step"] == kept


def test_a_resumed_run_keeps_its_precision_unless_amp_is_changed(tiny_recipe, tmp_path):
    def train_on(epochs, amp, **options):
        optim = {"epochs": epochs, "batches_per_epoch": 2, "amp": amp}
        train("deepmask", make_config(tiny_recipe, **optim), tmp_path, **options)
        return last_checkpoint(tmp_path)["precision"]

    assert train_on(1, False, precision="bf16") == "bf16"
    assert train_on(2, False, resume=True) == "bf16"
    assert train_on(3, True, resume=True) == "fp32"  # on a CPU, where none is named


def test_the_published_learning_rates():
    """1e-3 up to epoch 50, 5e-4 up to 120, 1e-4 after."""
    optim = OptimConfig(lr_drops={50: 0.5, 120: 0.1})
    rates = {epoch: learning_rate(optim, epoch * 4000) for epoch in (0, 49, 50, 119, 120, 299)}
    assert rates == pytest.approx({0: 1e-3, 49: 1e-3, 50: 5e-4, 119: 5e-4, 120: 1e-4, 299: 1e-4})


def test_warm_up_and_cosine():
    optim = OptimConfig(
        schedule="cosine", warmup_batches=10, epochs=2, batches_per_epoch=50, lr=1.0
    )
    rates = [learning_rate(optim, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == max(rates[9:11])
    assert rates[50] == pytest.approx(0.5) and rates[99] < 0.001
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))


def test_a_metrics_file_cut_short_by_a_kill_is_read_and_continued(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"split": "train", "step": step}) for step in (1, 2)]
    path.write_text("\n".join(lines) + '\n{"split": "tr')
    assert [line["step"] for line in read_metrics(path)] == [1, 2]
    log = RunLog(tmp_path, start_step=1)
    log.write("train", step=2, epoch=0.5, loss=1.0)
    log.close()
    assert [line["step"] for line in read_metrics(path)] == [1, 2]


def test_config_of_a_run_can_be_trained_again(tiny_run, tiny_checkpoint, tmp_path):
    """The config in a checkpoint is a recipe, and so is the file beside it."""
    values = torch.load(tiny_checkpoint, weights_only=True)["config"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    config = config_from_dict(values, source="test")
    assert load_config(tmp_path / "config.yaml") == load_config(tiny_run / "config.yaml") == config
