"""The training loop: schedules, resuming, several processes, signals, non-finite losses."""

import copy
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress

import pytest
import torch
import yaml

from pipeline.config import OptimConfig
from pipeline.data import BrokenFiles
from pipeline.recipe import config_from_dict, load_config
from pipeline.training.engine import fit
from pipeline.training.optimizer import learning_rate
from pipeline.training.run_log import RunLog, read_metrics
from tests.pipeline.training.runs import (
    CPU,
    ROOT,
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
    if ema_decay:  # and with all that a mask network may learn from
        scores = {"score_targets": "iou", "score_cells": 3, "jitter_color": 0.3}
        tiny_recipe = copy.deepcopy(tiny_recipe)
        tiny_recipe["deepmask"].setdefault("sampling", {}).update(scores)
    config = make_config(
        tiny_recipe,
        optimizer=optimizer,
        ema_decay=ema_decay,
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


TRAINED = {
    "deepmask": ("mask_head", "score_head", "trunk"),
    "sharpmask": ("encode", "refinements", "predict"),
    "multipathnet": ("cls_score", "bbox_pred", "trunk"),
}


ALL_STAGES = """
import os, runpy, sys
root, folder, ports, *arguments = sys.argv[1:]
sys.path.insert(0, root)
import pipeline.training.engine, pipeline.training.prepare, torch.nn.parallel  # once for all
for stage, port in zip(("deepmask", "sharpmask", "multipathnet"), ports.split(",")):
    if os.environ["RANK"] == "0":
        print(f"\\n== {stage} ==", flush=True)
    if os.fork() == 0:
        os.environ["MASTER_PORT"] = port
        sys.argv = ["train_stage.py", "--stage", stage, "--output", f"{folder}/{stage}", *arguments]
        runpy.run_path(f"{root}/tools/train_stage.py", run_name="__main__")
    if os.wait()[1]:
        sys.exit(1)
"""


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="module")
def twins(tiny_config, tiny_checkpoint, stores, tmp_path_factory):
    """The folders of all stages' runs by one and by two processes, and what the two printed.

    Two processes train one stage after the other: starting takes longer than all of the training.
    """
    overrides = [
        *(f"{stage}.optim.batches_per_epoch=20" for stage in TRAINED),
        f"init.deepmask={tiny_checkpoint}",
        "deepmask.sampling.patches_per_image=2",
        "deepmask.dropout=0",
        "multipathnet.dropout=0",
        "multipathnet.optim.weight_decay=0.01",
        "multipathnet.optim.decay_biases=false",
        *stores,
    ]
    folder = tmp_path_factory.mktemp("twins")
    ports = ",".join(map(str, free_ports(len(TRAINED))))
    arguments = [ROOT, folder / "two", ports, "--config", tiny_config, "--device", "cpu"]
    command = [sys.executable, "-c", ALL_STAGES, *map(str, arguments), "--set", *overrides]
    job = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            command,
            env=os.environ | job | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for rank in range(2)
    ]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as each of the two has: sums in the same order
    try:
        for stage in TRAINED:
            train(stage, load_config(tiny_config, overrides), folder / "one" / stage)
        outputs = [process.communicate(timeout=240)[0] for process in started]
    finally:
        torch.set_num_threads(threads)
        for process in started:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # where one has failed, the other waits
    assert [process.returncode for process in started] == [0, 0], outputs
    return folder / "one", folder / "two", "".join(outputs)


@pytest.mark.parametrize("stage", TRAINED)
def test_two_processes_equal_one_after_twenty_steps(stage, twins, tmp_path):
    """Momentum, weight decay and heads that are idle in a minibatch included.

    Dropout is off: every process draws its own. Rounding may hand the gradient of a RoI cell to
    another of two features that tie; in this run it does not.
    """
    folders = [folder / stage for folder in twins[:2]]
    one, two = map(last_checkpoint, folders)
    assert one["step"] == two["step"] == 20
    config = config_from_dict(one["config"], source="test")
    start = make_stage(stage, config, tmp_path / "new").model.state_dict()
    for name, value in one["model"].items():
        torch.testing.assert_close(two["model"][name], value, rtol=0, atol=1e-6)
    moved = " ".join(name for name in start if not torch.equal(start[name], one["model"][name]))
    for part in TRAINED[stage]:
        assert part in moved
    assert two["best"] == pytest.approx(one["best"], abs=1e-6)
    for was, now in zip(*(read_metrics(run / "metrics.jsonl") for run in folders), strict=True):
        for key in (key for key in was if "loss" in key):
            assert now[key] == pytest.approx(was[key], rel=1e-6)


def test_two_processes_print_each_line_once(twins):
    """And no warnings."""
    parts = twins[2].split("\n== ")
    assert [part.split(" ")[0] for part in parts[1:]] == list(TRAINED)
    for part in parts:
        lines = [line for line in part.splitlines() if line.strip()]
        assert not [line for line in lines if "warn" in line.lower()]
        assert len(set(lines)) == len(lines)


def test_every_step_draws_its_own_dropout(tiny_recipe, tmp_path):
    """By (seed, step, rank): a step's draws differ from the next one's, and repeat in a new run."""
    config = make_config(tiny_recipe, batches_per_epoch=3, epochs=1)
    states = []
    for seen in ([], []):
        stage = make_stage("deepmask", config, tmp_path / "new")
        losses = stage.losses

        def spy(model, batch, losses=losses, seen=seen):
            seen.append(torch.random.get_rng_state())
            return losses(model, batch)

        stage.losses = spy
        fit(stage, config, tmp_path / str(len(states)), device=CPU)
        states.append(seen)
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))
    assert not torch.equal(states[0][0], states[0][1])


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
