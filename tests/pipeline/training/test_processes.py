"""Minibatches in parts: of several processes, one after another, or both; and lost processes."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest
import torch
import torch.distributed as dist

from pipeline.recipe import config_from_dict, load_config
from pipeline.training.engine import fit
from pipeline.training.run_directory import resumes_run
from pipeline.training.run_log import read_metrics
from tests.pipeline.training.runs import (
    CPU,
    ROOT,
    last_checkpoint,
    make_stage,
    start_tool,
    train,
)

TRAINED = {
    "deepmask": ("mask_head", "score_head", "trunk"),
    "sharpmask": ("encode", "refinements", "predict"),
    "multipathnet": ("cls_score", "bbox_pred", "trunk"),
    "pretrain": ("trunk", "fc"),
}
IN_PARTS = [stage for stage in TRAINED if stage != "pretrain"]
LARGER = ["multipathnet.optim.batch_size=4"]  # has enough images for two parts of two processes
# Name, stage, environment, options.
JOBS = [
    *((stage, stage, {}, []) for stage in TRAINED),
    *(
        (f"{stage}_in_parts", stage, {}, [f"{stage}.optim.accumulate=2", *LARGER])
        for stage in IN_PARTS
    ),
    ("restarted", "deepmask", {"KILL_AT": "7"}, []),
    ("restarted", "deepmask", {"TORCHELASTIC_RESTART_COUNT": "1"}, []),
]
ALL_JOBS = """
import json, os, runpy, signal, sys
root, folder, jobs, ports, *arguments = sys.argv[1:]
sys.path.insert(0, root)
import pipeline.training.engine, pipeline.training.prepare, torch.nn.parallel  # once for all
train_step = pipeline.training.engine.TrainingRun.train_step

def train_or_die(run, parts):
    if [run.step, os.environ["RANK"]] == [int(os.environ["KILL_AT"]), "1"]:
        os.kill(os.getpid(), signal.SIGKILL)
    return train_step(run, parts)

for (name, stage, environment, options), port in zip(json.loads(jobs), ports.split(",")):
    if os.environ["RANK"] == "0":
        print(f"\\n== {name} ==", flush=True)
    if os.fork() == 0:
        os.environ |= environment | {"MASTER_PORT": port}
        if "KILL_AT" in environment:
            pipeline.training.engine.TrainingRun.train_step = train_or_die
        output = ["--stage", stage, "--output", f"{folder}/{name}"]
        sys.argv = ["train_stage.py", *output, *arguments, *options]
        runpy.run_path(f"{root}/tools/train_stage.py", run_name="__main__")
    if os.wait()[1] and "KILL_AT" not in environment:
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

    Two processes do one job after the other: starting takes longer than all of the training.
    """
    overrides = [
        f"init.deepmask={tiny_checkpoint}",
        "deepmask.sampling.patches_per_image=2",
        "deepmask.dropout=0",
        "multipathnet.dropout=0",
        "multipathnet.optim.weight_decay=0.01",
        "multipathnet.optim.decay_biases=false",
        "pretrain.trunk={name: resnet18, width: 8}",
        "pretrain.crops.size=32",
        "pretrain.optim={batch_size: 8, epochs: 1, lr: 1.0e-4, log_every: 1}",
        *(f"{stage}.optim.batches_per_epoch=20" for stage in TRAINED),
        *stores,
    ]
    folder = tmp_path_factory.mktemp("twins")
    ports = ",".join(map(str, free_ports(len(JOBS))))
    arguments = [folder / "two", json.dumps(JOBS), ports]
    arguments += ["--config", tiny_config, "--device", "cpu", "--set", *overrides]
    command = [sys.executable, "-c", ALL_JOBS, *map(str, [ROOT, *arguments])]
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
        config = load_config(tiny_config, [*overrides, *LARGER])
        train("multipathnet", config, folder / "one" / "multipathnet_in_parts")
        outputs = [process.communicate(timeout=480)[0] for process in started]
    finally:
        torch.set_num_threads(threads)
        for process in started:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # where one has failed, the other waits
    assert [process.returncode for process in started] == [0, 0], outputs
    return folder / "one", folder / "two", "".join(outputs)


def assert_near(one, two):
    """The same weights and losses but for rounding."""
    first, second = map(last_checkpoint, (one, two))
    assert first["step"] == second["step"]
    for name, value in first["model"].items():
        torch.testing.assert_close(second["model"][name], value, rtol=1e-6, atol=1e-6)
    assert second["best"] == pytest.approx(first["best"], abs=1e-6)
    for was, now in zip(*(read_metrics(run / "metrics.jsonl") for run in (one, two)), strict=True):
        for key in (key for key in was if "loss" in key):
            assert now[key] == pytest.approx(was[key], rel=1e-6)


@pytest.mark.parametrize("job", [*TRAINED, *(f"{stage}_in_parts" for stage in IN_PARTS)])
def test_two_processes_equal_one_after_twenty_steps(job, twins, tmp_path):
    """Momentum, weight decay and heads that are idle in a minibatch included.

    Dropout is off: every part draws its own. Rounding may hand the gradient of a RoI cell to
    another of two features that tie; in this run it does not.
    """
    stage = job.removesuffix("_in_parts")
    one, two = twins[0] / job, twins[1] / job
    if not one.exists():
        one = twins[0] / stage
    assert_near(one, two)
    state = last_checkpoint(one)
    assert state["step"] == 20
    config = config_from_dict(state["config"], source="test")
    start = make_stage(stage, config, tmp_path / "new").model.state_dict()
    moved = " ".join(name for name in start if not torch.equal(start[name], state["model"][name]))
    for part in TRAINED[stage]:
        assert part in moved


def test_two_processes_print_each_line_once(twins):
    """And no warnings."""
    parts = twins[2].split("\n== ")
    assert [part.split(" ")[0] for part in parts[1:]] == [job[0] for job in JOBS]
    for part in parts[:-2]:  # of the jobs that no process was killed in
        lines = [line for line in part.splitlines() if line.strip()]
        assert not [line for line in lines if "warn" in line.lower()]
        assert len(set(lines)) == len(lines)


def assert_same_weights(one, two):
    """To the bit."""
    first, second = (last_checkpoint(run)["model"] for run in (one, two))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_a_run_that_lost_a_process_goes_on_where_it_was_when_restarted(twins):
    """Without --resume; the result is that of the run that lost none, to the bit."""
    killed, restarted = twins[2].split("\n== restarted ==\n")[1:]
    assert "saved step 7; continue with --resume" in killed
    assert "step 7 of 20" in restarted
    assert_same_weights(twins[1] / "deepmask", twins[1] / "restarted")
    lines = [read_metrics(twins[1] / run / "metrics.jsonl") for run in ("deepmask", "restarted")]
    assert [[line.get("loss") for line in of_run] for of_run in lines][0] == [
        line.get("loss") for line in lines[1]
    ]


@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.slow
def test_torchrun_restarts_a_run_that_lost_a_process(lost, tiny_config, tmp_path):
    """The main one among them, in which case another one saves."""
    options = ["--config", tiny_config, "--set", "deepmask.optim.batches_per_epoch=100"]
    options += ["data.workers=1"]
    launch = ["--max-restarts", "3"]
    outputs = []
    for name in ("whole", "lost"):
        arguments = ["--output", tmp_path / name, *options]
        run = start_tool(arguments, processes=2, launch=launch)
        if name == "lost":
            metrics = tmp_path / name / "metrics.jsonl"
            while not metrics.exists() or read_metrics(metrics)[-1]["step"] < 20:
                assert run.poll() is None, run.stdout.read()
                time.sleep(0.05)
            children = psutil.Process(run.pid).children()
            [process] = [p for p in children if p.environ().get("RANK") == str(lost)]
            process.kill()
        outputs.append(run.communicate(timeout=480)[0])
        assert run.returncode == 0, outputs[-1]
    assert "of 100" in outputs[1].split("continue with --resume")[1]
    assert_same_weights(tmp_path / "whole", tmp_path / "lost")
    assert last_checkpoint(tmp_path / "lost")["step"] == 100


def test_restarted_processes_may_not_do_what_was_refused_to_the_first(tmp_path, monkeypatch):
    """They continue a run that those began, and no older one; by torchrun's store."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir(), new.mkdir()
    (old / "config.yaml").touch()
    for attempt in range(2):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
        with pytest.raises(ValueError, match="already holds a run"):
            resumes_run(old, resume=False)
    store.delete_key("maskpath/start")
    # A process that joins makes torchrun restart all, without counting it.
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert not resumes_run(new, resume=False)
    (new / "config.yaml").touch()
    assert resumes_run(new, resume=False)


CELLS = {"score_cells": 3, "score_targets": "iou", "patches_per_image": 2, "mask_batch_prob": 0.3}


@pytest.mark.parametrize(
    ("stage", "sampling"), [("deepmask", {}), ("deepmask", CELLS), *((s, {}) for s in IN_PARTS[1:])]
)
def test_parts_one_after_another_equal_the_whole_minibatch(
    stage, sampling, tiny_config, tiny_checkpoint, stores, tmp_path
):
    """Also where they hold different numbers of samples, and few or no objects."""
    optim = {"batch_size": 8, "batches_per_epoch": 4, "clip_gradient": 0.5, "ema_decay": 0.9}
    overrides = [f"init.deepmask={tiny_checkpoint}", *stores, "deepmask.dropout=0"]
    overrides += ["multipathnet.dropout=0", f"{stage}.optim.warmup_batches=3"]
    overrides += [f"{stage}.optim.{key}={value}" for key, value in optim.items()]
    overrides += [f"{stage}.sampling.{key}={value}" for key, value in sampling.items()]
    for parts in (1, 4):
        config = load_config(tiny_config, [*overrides, f"{stage}.optim.accumulate={parts}"])
        made = make_stage(stage, config, tmp_path / "new")
        seen, losses = [], made.losses

        def spy(model, part, losses=losses, seen=seen):
            seen.append(len(next(iter(part.values()))))
            return losses(model, part)

        made.losses = spy
        fit(made, config, tmp_path / str(parts), device=CPU)
        assert seen == [8 // parts] * 4 * parts
    assert_near(tmp_path / "1", tmp_path / "4")
