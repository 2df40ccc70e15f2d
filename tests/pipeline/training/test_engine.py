"""The training loop.

Schedules, resuming to the bit, several processes, bad losses and broken files.
"""

import contextlib
import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from pipeline.training.patch_stages import DeepMaskStage

from pipeline.config import OptimConfig
from pipeline.recipe import config_from_dict, load_config
from pipeline.training import engine
from pipeline.training.engine import Interrupted, fit, learning_rate
from pipeline.training.run_log import RunLog, read_metrics

ROOT = Path(__file__).resolve().parents[3]
CPU = torch.device("cpu")


def make_config(recipe, **optim):
    values = copy.deepcopy(recipe)
    values["deepmask"]["optim"] |= optim
    return config_from_dict(values, source="test")


def last_state(output):
    return torch.load(output / "checkpoints" / "last.pt", weights_only=True)


def assert_same_state(a, b):
    assert a["step"] == b["step"] and a["best"] == b["best"]
    assert a["model"].keys() == b["model"].keys()
    for name, value in a["model"].items():
        assert torch.equal(value, b["model"][name]), name
    for index, slots in a["optimizer"]["state"].items():
        for name, value in slots.items():
            assert torch.equal(
                torch.as_tensor(value), torch.as_tensor(b["optimizer"]["state"][index][name])
            ), name


class StopAt(dict):
    """Asks the loop to stop when it has looked `count` times."""

    def __init__(self, count):
        super().__init__(now=False)
        self.left = count

    def __getitem__(self, key):
        self.left -= 1
        return self.left <= 0


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(
    tiny_recipe, tmp_path, monkeypatch, optimizer
):
    options = {
        "optimizer": optimizer,
        "batches_per_epoch": 3,
        "epochs": 3,
        "validate_every": 1,
        "warmup_batches": 2,
    }
    config = make_config(tiny_recipe, **options)
    fit(DeepMaskStage(config), config, tmp_path / "whole", device=CPU)

    # In the middle of the first epoch, then at the end of the second, before its validation.
    for stop_after in (2, 3):
        with monkeypatch.context() as patched, pytest.raises(Interrupted):
            stop = contextlib.nullcontext(StopAt(stop_after))
            patched.setattr(engine, "_stop_signals", lambda stop=stop: stop)
            fit(DeepMaskStage(config), config, tmp_path / "parts", device=CPU, resume=True)
    assert last_state(tmp_path / "parts")["step"] == 5
    fit(DeepMaskStage(config), config, tmp_path / "parts", device=CPU, resume=True)

    assert_same_state(last_state(tmp_path / "whole"), last_state(tmp_path / "parts"))
    lines = [
        [
            {
                k: v
                for k, v in line.items()
                if k not in ("time", "patches_per_second", "minutes_left")
            }
            for line in read_metrics(p / "metrics.jsonl")
        ]
        for p in (tmp_path / "whole", tmp_path / "parts")
    ]
    assert lines[0] == lines[1]


def test_a_run_stopped_between_its_last_step_and_validation_validates_first(
    tiny_recipe, tmp_path, monkeypatch
):
    config = make_config(tiny_recipe, batches_per_epoch=2, epochs=2, validate_every=1)
    monkeypatch.setattr(engine, "_stop_signals", lambda: contextlib.nullcontext(StopAt(2)))
    with pytest.raises(Interrupted):
        fit(DeepMaskStage(config), config, tmp_path / "run", device=CPU)
    assert not [
        line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["split"] == "val"
    ]
    monkeypatch.undo()
    fit(DeepMaskStage(config), config, tmp_path / "run", device=CPU, resume=True)
    assert [
        line["step"]
        for line in read_metrics(tmp_path / "run" / "metrics.jsonl")
        if line["split"] == "val"
    ] == [2, 4]


def run_tool(arguments, processes=1):
    launcher = [sys.executable]
    if processes > 1:
        launcher += [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(processes),
        ]
    return subprocess.Popen(
        [
            *launcher,
            str(ROOT / "tools" / "train_stage.py"),
            "--stage",
            "deepmask",
            "--device",
            "cpu",
            *map(str, arguments),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def test_two_processes_equal_one_after_twenty_steps(tiny_config, tmp_path):
    """Dropout, momentum, weight decay and heads that are idle in a minibatch included."""
    overrides = [
        "--set",
        "deepmask.optim.batches_per_epoch=20",
        "deepmask.sampling.patches_per_image=2",
    ]
    runs = [
        run_tool(
            ["--config", tiny_config, "--output", tmp_path / str(count), *overrides],
            processes=count,
        )
        for count in (1, 2)
    ]
    for run in runs:
        output, _ = run.communicate(timeout=240)
        assert run.returncode == 0, output
    one, two = (last_state(tmp_path / str(count)) for count in (1, 2))
    assert one["step"] == two["step"] == 20
    start = DeepMaskStage(config_from_dict(one["config"], source="test")).model.state_dict()
    for name, value in one["model"].items():
        torch.testing.assert_close(two["model"][name], value, rtol=0, atol=1e-6)
    moved = [name for name in start if not torch.equal(start[name], one["model"][name])]
    assert any("score_head" in name for name in moved) and any(
        "mask_head" in name for name in moved
    )
    assert two["best"] == pytest.approx(one["best"], abs=1e-6)


def test_a_terminated_run_saves_and_a_killed_one_loses_little(tiny_config, tmp_path):
    overrides = [
        "--set",
        "deepmask.optim.batches_per_epoch=100000",
        "deepmask.optim.save_every_minutes=0",
    ]
    arguments = ["--config", tiny_config, "--output", tmp_path / "run", *overrides]
    run = run_tool(arguments)
    _wait_for(tmp_path / "run" / "checkpoints" / "last.pt", run)
    run.send_signal(signal.SIGTERM)
    output, _ = run.communicate(timeout=60)
    assert (
        run.returncode == 130 and "continue with --resume" in output and "Traceback" not in output
    )
    step = last_state(tmp_path / "run")["step"]
    assert step > 0
    run = run_tool([*arguments, "--resume"])
    while last_state(tmp_path / "run")["step"] <= step:
        assert run.poll() is None, run.stdout.read()
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGKILL)
    run.communicate()
    assert last_state(tmp_path / "run")["step"] > step  # whole and readable


def _wait_for(path, run):
    for _ in range(600):
        if path.exists():
            return
        assert run.poll() is None, run.stdout.read()
        time.sleep(0.1)
    raise AssertionError(f"{path} was not written")


def test_a_loss_that_is_not_finite_stops_with_the_minibatch_saved(tiny_recipe, tmp_path):
    config = make_config(tiny_recipe)
    stage = DeepMaskStage(config)
    losses = stage.losses
    stage.losses = lambda model, batch: {
        k: v * float("nan") for k, v in losses(model, batch).items()
    }
    before = {k: v.clone() for k, v in stage.model.state_dict().items()}
    with pytest.raises(FloatingPointError, match="not finite at step 0") as error:
        fit(stage, config, tmp_path / "run", device=CPU)
    (path,) = (tmp_path / "run").glob("non_finite_batch_*.pt")
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert torch.load(path, weights_only=True)["batch"]["patches"].shape == (8, 3, 128, 128)
    assert all(torch.equal(v, before[k]) for k, v in stage.model.state_dict().items())


def test_too_many_broken_images_stop_the_run_with_the_list(tiny_recipe, tmp_path, shapes_directory):
    values = copy.deepcopy(tiny_recipe)
    (tmp_path / "images").mkdir()
    for file in sorted((shapes_directory / "images" / "train").iterdir())[:20]:
        (tmp_path / "images" / file.name).write_bytes(file.read_bytes())
    values["data"]["train"]["images"] = str(tmp_path / "images")
    values["data"]["max_broken_share"] = 0.05
    values["deepmask"]["optim"] |= {"batches_per_epoch": 20}
    config = config_from_dict(values, source="test")
    with pytest.raises(
        ValueError,
        match=r"of 24 images cannot be read.*00002\d\.jpg",
    ):
        fit(DeepMaskStage(config), config, tmp_path / "run", device=CPU)
    values["data"]["max_broken_share"] = 0.5
    config = config_from_dict(values, source="test")
    fit(DeepMaskStage(config), config, tmp_path / "tolerant", device=CPU)


def test_a_run_leaves_what_the_design_says(tiny_run):
    names = {path.name for path in tiny_run.iterdir()}
    assert {"checkpoints", "metrics.jsonl", "tensorboard"} <= names
    state = torch.load(tiny_run / "checkpoints" / "best.pt", weights_only=True)
    assert {
        "stage",
        "config",
        "model",
        "optimizer",
        "scheduler",
        "rng",
        "sampler",
        "step",
    } <= state.keys()
    lines = read_metrics(tiny_run / "metrics.jsonl")
    validation = [line for line in lines if line["split"] == "val"]
    assert {
        "mean_iou",
        "median_iou",
        "iou_above_0.5",
        "iou_above_0.7",
        "score_accuracy",
    } <= validation[-1].keys()
    assert any(p.name.startswith("events") for p in (tiny_run / "tensorboard").iterdir())


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


def test_frozen_levels_stay_as_they_are_and_the_trunk_has_its_own_rate(tiny_recipe, tmp_path):
    values = copy.deepcopy(tiny_recipe)
    values["trunk"]["frozen_levels"] = 2
    values["deepmask"]["optim"] |= {"trunk_lr_factor": 0.1}
    config = config_from_dict(values, source="test")
    stage = DeepMaskStage(config)
    assert [group["lr_factor"] for group in stage.parameter_groups()] == [1.0, 0.1]
    before = {k: v.clone() for k, v in stage.model.state_dict().items()}
    fit(stage, config, tmp_path / "run", device=CPU)
    after = stage.model.state_dict()
    frozen = [k for k in before if k.startswith(("trunk.levels.0.", "trunk.levels.1."))]
    assert frozen and all(torch.equal(before[k], after[k]) for k in frozen)
    assert not torch.equal(before["trunk.levels.3.0.weight"], after["trunk.levels.3.0.weight"])


def test_a_metrics_file_cut_short_by_a_kill_is_read_and_continued(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        json.dumps({"split": "train", "step": 1})
        + "\n"
        + json.dumps({"split": "train", "step": 2})
        + '\n{"split": "tr'
    )
    assert [line["step"] for line in read_metrics(path)] == [1, 2]
    log = RunLog(tmp_path, resume_step=1)
    log.write("train", step=2, epoch=0.5, loss=1.0)
    log.close()
    assert [line["step"] for line in read_metrics(path)] == [1, 2]


def test_config_of_a_run_can_be_trained_again(tiny_checkpoint, tmp_path):
    """The config in a checkpoint is a recipe."""
    values = torch.load(tiny_checkpoint, weights_only=True)["config"]
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    assert load_config(path) == config_from_dict(values, source="test")
