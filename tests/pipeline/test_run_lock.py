"""One run writes into a directory; files are whole, named in errors, and removed after a kill."""

import io
import multiprocessing
import os
import resource
import signal
import sys
import time
from contextlib import contextmanager

import pytest
import torch

from datasets import progress
from datasets.files import HOST, atomic_path, remove_temporaries, write_atomically
from datasets.progress import progress_bar
from pipeline.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from pipeline.run_lock import locked_directory

FORK = multiprocessing.get_context("fork")


def run_apart(function, *arguments):
    """Calls a function in a process of its own; returns that process when it has ended."""
    process = FORK.Process(target=function, args=arguments)
    process.start()
    process.join(30)
    return process


def lock(directory, answer):
    try:
        with locked_directory(directory):
            answer.put("")
    except ValueError as error:
        answer.put(str(error))


def test_a_second_run_is_refused_and_told_of_the_first(tmp_path):
    answer = FORK.SimpleQueue()
    run = tmp_path / "run"
    with locked_directory(run), locked_directory(run):  # the same process may, twice
        run_apart(lock, run, answer)
        message = answer.get()
    assert str(tmp_path / "run") in message and f"process {os.getpid()} on {HOST}" in message
    assert not (tmp_path / "run").exists()  # nothing was written
    run_apart(lock, tmp_path / "run", answer)
    assert answer.get() == ""


def die_with_lock(directory):
    with locked_directory(directory):
        (directory / f".last.pt.{HOST}.{os.getpid()}.tmp").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)


def test_lock_and_half_a_file_go_with_a_killed_process(tmp_path):
    died = run_apart(die_with_lock, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2 and died.exitcode == -signal.SIGKILL
    with locked_directory(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    assert not list(tmp_path.iterdir())


def test_only_files_of_dead_processes_are_removed(tmp_path):
    living = f".x.{HOST}.{os.getppid()}.tmp"
    names = [living, ".x.elsewhere.1.tmp", ".x.old.2.tmp", ".mine.tmp", "x.tmp"]
    for name in names:
        (tmp_path / name).touch()
    os.utime(tmp_path / ".x.old.2.tmp", (0, time.time() - 4000))
    remove_temporaries(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(names) - {".x.old.2.tmp"}


@contextmanager
def full_disk(size):
    """No file may grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_told_with_the_file_and_the_last_checkpoint_stays(tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"step": 1})
    with full_disk(10_000), pytest.raises(OSError) as error:
        save_checkpoint(path, {"step": 2, "model": torch.zeros(100_000)})
    assert error.value.filename == str(path) and error.value.strerror == "File too large"
    assert torch.load(path) == {"step": 1}
    with full_disk(10_000), pytest.raises(OSError) as error:
        write_atomically(tmp_path / "all.json", b" " * 100_000)
    assert error.value.filename == str(tmp_path / "all.json")
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


def test_names_as_long_as_the_system_has_them_are_written_and_longer_ones_told(tmp_path):
    write_atomically(tmp_path / ("ä" * 120 + ".json"), b"{}")
    with pytest.raises(OSError, match="name too long"), atomic_path(tmp_path / ("x" * 256)) as path:
        path.touch()
    assert len(list(tmp_path.iterdir())) == 1


def test_a_runs_folder_means_its_best_checkpoint(tiny_run, tiny_checkpoint, tmp_path):
    for folder in (tiny_run, str(tiny_run / "checkpoints")):
        assert find_checkpoint(folder) == tiny_checkpoint
        assert load_checkpoint(folder)["stage"] == "deepmask"
    with pytest.raises(FileNotFoundError, match="is a folder without.*; give one of .*deepmask"):
        load_checkpoint(tiny_run.parent)
    with pytest.raises(FileNotFoundError, match="is a folder without checkpoints/best.pt$"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_on_a_terminal_and_lines_in_a_log(terminal, monkeypatch):
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", stream)
    for _ in progress_bar(range(3), "work", unit="image"):
        pass
    text = stream.getvalue()
    assert "\r" in text if terminal else text == ""  # too short for a line
    monkeypatch.setattr(progress, "SECONDS", 0.001)
    for _ in progress_bar(range(3), "work", unit="image"):
        time.sleep(0.01)
    lines = stream.getvalue()[len(text) :].splitlines()
    if not terminal:
        assert [line.split(",")[0] for line in lines][-1] == "work: 100% 3 of 3 image"
        assert len(lines) >= 3 and not any("\r" in line for line in lines)
