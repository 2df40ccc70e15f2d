"""What all tools do: the locale's names of files, one line for a mistake."""

import argparse
import errno
import os
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from pipeline import run_lock
from pipeline.command import choose_results, run_tool


def test_in_the_c_locale_a_tool_starts_again_with_names_in_utf8(monkeypatch):
    """There with PYTHONUTF8=0, file names in annotations could not be opened."""
    started = []

    def execv(path, arguments):
        started.append(arguments)
        raise SystemExit

    def main():
        raise AssertionError("with names in ASCII")

    main.__module__ = "__main__"
    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "ascii")
    monkeypatch.setattr(sys, "orig_argv", ["python", "-u", "tools/propose.py", "--images", "x"])
    with pytest.raises(SystemExit):
        run_tool(main)
    assert started == [[sys.executable, "-X", "utf8", "-u", *sys.orig_argv[2:]]]


def tell(error: Exception) -> None:
    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        run_tool(main)
    assert end.value.code == 2


@pytest.mark.parametrize(
    ("images", "name"),
    [
        ("photos", "photos"),
        ("a/photo.jpg", "photo"),
        ("photos/*.jpg", "photos"),
        ("photos/*/*.jpg", "photos"),
        ("photos/**/[ab]/?.jpg", "photos"),
    ],
)
def test_results_are_named_by_what_is_no_pattern(images, name):
    args = argparse.Namespace(images=[images], proposals=None, output=None, draw=None)
    choose_results(args, "proposals")
    assert args.output == Path("runs", "proposals", name)


@pytest.mark.parametrize("has_store", [True, False])
def test_a_mistake_of_all_processes_is_one_line(has_store, monkeypatch, capsys):
    """By torchrun's store; each says it where there is none."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", str(has_store))
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    for _ in range(2):
        tell(ValueError("all: a mistake"))
    tell(ValueError("one: another"))
    lines = ["error: all: a mistake"] * (1 if has_store else 2)
    assert capsys.readouterr().err.splitlines() == [*lines, "error: one: another"]


def test_a_read_only_folder_is_named(call_tool, tiny_config, tmp_path, monkeypatch, capsys):
    def open_lock(path, *_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(run_lock, "_lock", open_lock)
    options = ["--config", tiny_config, "--output", tmp_path / "run", "--device", "cpu"]
    assert call_tool("train_stage", "--stage", "deepmask", *options) == 2
    lock = Path(tmp_path, "run", ".lock")
    assert capsys.readouterr().err == f"error: {lock}: Read-only file system\n"
