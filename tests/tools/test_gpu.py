"""The GPU kit: on a CPU whether every part of it works, on a GPU its checks at tiny sizes."""

import json
import signal
import sys
from pathlib import Path

import pytest
import torch

from tools.benchmarks import gpu
from tools.benchmarks.gpu_setup import Setup, at_least, at_most, failed

CUDA = torch.device("cuda")


def run_kit(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["gpu.py", *map(str, arguments)])
    return gpu.main()


def test_every_part_works_at_a_tiny_size_without_a_gpu(monkeypatch, tmp_path, capsys):
    names = [name for name in gpu.PARTS if name != "tests"]  # which are these
    options = ("--device", "cpu", "--quick", "--output", tmp_path, "--only", *names)
    assert run_kit(monkeypatch, *options) == 0, (tmp_path / "gpu.log").read_text()[-5000:]
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert list(parts) == names
    errors = {name: part["error"] for name, part in parts.items() if "error" in part}
    assert not errors and all(part["rows"] for part in parts.values())
    for name, part in parts.items():
        checked = [row for row in part["rows"].values() if "ok" in row]
        assert bool(checked) == (name in gpu.CHECKS)
        assert all(row["ok"] == 1 for row in checked)
    printed = capsys.readouterr().out
    assert "training: deepmask, batch 8, patches" in printed and "resume: deepmask" in printed


def test_a_part_that_fails_is_a_row_and_the_others_go_on(monkeypatch, tmp_path, capsys):
    def fail(_: Setup) -> dict:
        raise RuntimeError("no such kernel")

    checks = {"broken": fail, "wrong": lambda _: {"n": at_least(float("nan"), 1)}}
    parts = checks | {"slow": lambda _: {"n": {"measured": 2.0}}}
    monkeypatch.setattr(gpu, "CHECKS", checks)
    monkeypatch.setattr(gpu, "PARTS", parts)
    assert run_kit(monkeypatch, "--device", "cpu", "--output", tmp_path) == 1
    found = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert found["wrong"]["rows"] == {"n": {"limit": 1.0, "ok": 0.0}}
    assert found["slow"]["rows"] == {"n": {"measured": 2.0}}
    printed = capsys.readouterr()
    assert "broken: failed" in printed.out and "slow: n" in printed.out
    assert "no such kernel" in printed.err and "checks that failed: broken, wrong" in printed.err
    assert run_kit(monkeypatch, "--device", "cpu", "--output", tmp_path, "--only", "slow") == 0


def test_parts_that_there_is_no_time_for_are_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "PARTS", {"forever": lambda _: signal.pause()})
    options = ("--device", "cpu", "--output", tmp_path)
    assert run_kit(monkeypatch, *options, "--minutes", 0.002) == 0  # it is no check
    assert run_kit(monkeypatch, *options, "--minutes", 0) == 0
    assert capsys.readouterr().err.count("forever: TimeoutError: the time is up") == 2


def test_limits():
    rows = {"more": at_least(2, 1), "as much": at_most(1, 1), "less": at_least(0, 1)}
    assert failed(rows | {"nan": at_most(float("nan"), 1), "figure": {"measured": 0}}) == [
        "less", "nan",
    ]  # fmt: skip


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", [name for name in gpu.CHECKS if name != "tests"])
def test_the_gpu_computes_what_the_cpu_does(name, tmp_path: Path):
    rows = gpu.CHECKS[name](Setup(CUDA, True, tmp_path))
    assert rows and not failed(rows), rows
