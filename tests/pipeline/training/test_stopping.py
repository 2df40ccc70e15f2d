"""Whatever ends a run, the state after its last whole step is saved, and it ends in seconds."""

import copy
import multiprocessing
import os
import signal
import time

import pytest
import torch
from torch.utils.data import DataLoader

from datasets import loading
from datasets.images import ImageError
from pipeline.command import Interrupted
from pipeline.recipe import config_from_dict
from pipeline.training import stopping
from pipeline.training.engine import fit
from pipeline.training.run_directory import holds_run
from pipeline.training.run_log import read_metrics
from pipeline.training.stopping import StopSignals
from tests.pipeline.training.runs import CPU, call_in_step, last_checkpoint, make_stage, train


@pytest.fixture
def config(tiny_recipe):
    values = copy.deepcopy(tiny_recipe)
    values["deepmask"]["optim"] |= {"batches_per_epoch": 4, "epochs": 1}
    return config_from_dict(values, source="test")


def fail(error):
    def action():
        raise error

    return action


ERRORS = [BrokenPipeError(), ImageError("gone"), MemoryError(), RuntimeError("a bug"), SystemExit()]


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_an_error_between_two_saves_loses_no_step(error, config, tmp_path):
    stage = make_stage("deepmask", config, tmp_path)
    call_in_step(stage, 3, fail(error))
    with pytest.raises(type(error)):
        fit(stage, config, tmp_path, device=CPU)
    assert last_checkpoint(tmp_path)["step"] == 2
    train("deepmask", config, tmp_path, resume=True)
    steps = [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")]
    assert steps == [1, 2, 3, 4, 4]


def test_an_error_before_the_first_step_leaves_no_run(config, tmp_path):
    stage = make_stage("deepmask", config, tmp_path)
    call_in_step(stage, 1, fail(ImageError("no such folder")))
    with pytest.raises(ImageError):
        fit(stage, config, tmp_path, device=CPU)
    assert not holds_run(tmp_path)
    train("deepmask", config, tmp_path)


def test_half_a_step_is_never_saved(config, tmp_path, monkeypatch):
    stage = make_stage("deepmask", config, tmp_path)
    call_in_step(stage, 2, lambda: monkeypatch.setattr(torch.optim.SGD, "step", fail_late))
    with pytest.raises(MemoryError):
        fit(stage, config, tmp_path, device=CPU)
    assert not (tmp_path / "checkpoints" / "last.pt").exists()


def fail_late(optimizer):
    with torch.no_grad():
        optimizer.param_groups[0]["params"][0].zero_()
    raise MemoryError


def test_a_killed_worker_is_named_and_the_run_saved(tiny_recipe, tmp_path):
    values = copy.deepcopy(tiny_recipe)
    values["data"]["workers"] = 1
    values["deepmask"]["optim"] |= {"batches_per_epoch": 100}
    config = config_from_dict(values, source="test")
    stage = make_stage("deepmask", config, tmp_path)
    call_in_step(stage, 2, lambda: [child.kill() for child in multiprocessing.active_children()])
    with pytest.raises(ChildProcessError, match="worker .* ended by SIGKILL"):
        fit(stage, config, tmp_path, device=CPU)
    assert last_checkpoint(tmp_path)["step"] >= 2


def test_workers_outlive_a_signal_to_all_processes(tiny_recipe, tmp_path):
    values = copy.deepcopy(tiny_recipe)
    values["data"]["workers"] = 1
    config = config_from_dict(values, source="test")
    stage = make_stage("deepmask", config, tmp_path)

    def terminate():
        for child in multiprocessing.active_children():
            for signum in (signal.SIGTERM, signal.SIGINT):
                # From another process: the training process ends its workers by SIGTERM.
                os.system(f"kill -{int(signum)} {child.pid}")
        signal.raise_signal(signal.SIGTERM)

    call_in_step(stage, 1, terminate)
    with pytest.raises(Interrupted) as stop:
        fit(stage, config, tmp_path, device=CPU)
    assert stop.value.signum == signal.SIGTERM
    assert last_checkpoint(tmp_path)["step"] == 1
    assert not multiprocessing.active_children()


def test_a_signal_while_workers_start_saves_the_run(tiny_recipe, tmp_path, monkeypatch, capsys):
    """They are killed, which must not end the saving, and say nothing."""
    values = copy.deepcopy(tiny_recipe)
    values["data"]["workers"] = 2
    config = config_from_dict(values, source="test")
    stage = make_stage("deepmask", config, tmp_path)
    start = DataLoader._get_iterator

    def start_and_stop(loader):
        iterator = start(loader)
        signal.raise_signal(signal.SIGINT)
        return iterator

    monkeypatch.setattr(loading, "_start_worker", lambda *_: time.sleep(60))
    monkeypatch.setattr(DataLoader, "_get_iterator", start_and_stop)
    with pytest.raises(Interrupted):
        fit(stage, config, tmp_path, device=CPU)
    assert last_checkpoint(tmp_path)["step"] == 0
    assert "stopped at step 0; continue with --resume" in capsys.readouterr().out
    deadline = time.monotonic() + 10  # a killed process may take its time to go
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not multiprocessing.active_children()


def test_a_signal_ends_a_validation_at_once(config, tmp_path):
    stage = make_stage("deepmask", config, tmp_path)

    def validate(model, device):
        signal.raise_signal(signal.SIGINT)
        time.sleep(60)

    stage.validate = validate
    with pytest.raises(Interrupted):
        fit(stage, config, tmp_path, device=CPU)
    state = last_checkpoint(tmp_path)
    assert state["step"] == 4 and state["validated"] == 0


@pytest.mark.parametrize("is_ending", [False, True])
def test_a_process_that_hangs_after_a_signal_is_ended(is_ending, monkeypatch):
    ended = []
    monkeypatch.setattr(stopping, "PATIENCE", 0.1)
    monkeypatch.setattr(stopping, "_end_process", ended.append)
    stop = StopSignals(rescue=lambda: not is_ending)
    with stop.listening():
        for _ in range(2):  # torchrun passes on what its processes have received themselves
            signal.raise_signal(signal.SIGTERM)
        time.sleep(0.5)
    assert ended == [signal.SIGTERM] and stop.signum == signal.SIGTERM


def test_a_run_says_what_it_resumes(tiny_recipe, config, tmp_path, capsys):
    train("deepmask", config, tmp_path / "run", resume=True)
    assert f"nothing to resume in {tmp_path / 'run'}" in capsys.readouterr().out
    values = copy.deepcopy(tiny_recipe)
    values["deepmask"] |= {"dropout": 0.25}
    values["deepmask"]["optim"] |= {"batches_per_epoch": 4, "lr": 0.125}
    train("deepmask", config_from_dict(values, source="test"), tmp_path / "run", resume=True)
    out = capsys.readouterr().out
    assert (
        "changed since the last session: deepmask.dropout 0.5 -> 0.25, "
        "deepmask.optim.lr 0.001 -> 0.125\n" in out
    )
    assert "nothing is left to train: step 4 of 4" in out


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "checkpoints/best.pt"])
def test_any_file_of_a_run_refuses_another(name, config, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match="already holds a run"):
        train("deepmask", config, tmp_path)


def test_metrics_of_a_run_that_was_never_saved_are_dropped(config, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"split": "train", "step": 1, "old": 1}\n')
    train("deepmask", config, tmp_path, resume=True)
    assert not any("old" in line for line in read_metrics(tmp_path / "metrics.jsonl"))


def test_the_best_checkpoint_is_resumed_without_a_last_one(config, tmp_path, capsys):
    train("deepmask", config, tmp_path)
    (tmp_path / "checkpoints" / "last.pt").unlink()
    train("deepmask", config, tmp_path, resume=True)
    assert "deepmask: step 4 of 4" in capsys.readouterr().out
