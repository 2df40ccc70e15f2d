"""Serving training samples by index: unreadable images, minibatches, worker processes.

A sample is a draw seeded by (seed, epoch, index, attempt) and the pixels of the drawn image. An
image that cannot be read is named and the sample drawn again, the same way in any process.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, MutableSequence
from contextlib import contextmanager
from functools import partial
from multiprocessing import RawArray, active_children, parent_process, resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from datasets.images import ImageError, ImageFolder, orientation_hint

MAX_ATTEMPTS = 50  # unreadable images in a row before the folder is given up
PREFETCH = 4  # minibatches that each worker holds ready
WORKER_HINTS = {
    "SIGKILL": "if memory ran out, a smaller data.workers needs less",
    "SIGBUS": "if /dev/shm is full, give it more space or take a smaller data.workers",
}
# What ends a run: Ctrl-C, a scheduler, a terminal that closes. They may go to every process of it.
STOP_SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]

Drawn = TypeVar("Drawn")


def catch_stop_signals(handler: Callable[[int, Any], Any]) -> dict[int, Any]:
    """Sets the handler of all stop signals; returns the handlers before, by signal.

    SIGHUP stays ignored where it is, as by nohup.
    """
    previous = {}
    for signum in STOP_SIGNALS:
        before = signal.getsignal(signum)
        if before != signal.SIG_IGN or signum in (signal.SIGINT, signal.SIGTERM):
            previous[signum] = signal.signal(signum, handler)
    return previous


class TrainingDataset(Dataset):
    """Samples drawn from annotated images, by index (choice, epoch, group).

    A group is the samples that share a decoded image; the choice is what its minibatch trains.
    """

    load: Callable[..., tuple[dict, Any]]  # a group's item by its index, and what was drawn
    choose: Callable[[np.random.Generator], Any]  # what a minibatch trains
    collate: Callable[[list[dict]], dict]  # items to one minibatch
    group_size = 1

    def __init__(self, coco: Any, images: str | Path | ImageFolder, sampler: Any):
        """Files are in the folder `images`; `coco` may be a `ClassFolder`, too."""
        self.coco, self.images, self.sampler = coco, ImageFolder.of(images), sampler

    def __getitem__(self, index: tuple[Any, int, int]) -> dict:
        return self.load(*index)[0]

    def batches(
        self,
        steps: range,
        *,
        batches_per_epoch: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        parts: int = 1,
    ) -> Iterator[list[tuple[Any, int, int]]]:
        """Indices of one process's parts of the minibatches of a range of training steps.

        What a minibatch trains depends on (seed, epoch, batch) and is the same in every part;
        its `batch_size` samples, over the `parts` of all processes, are dealt out in order. Steps
        count over all epochs: a resumed run starts in the middle of one.
        """
        for step in steps:
            epoch, batch = divmod(step, batches_per_epoch)
            choice = self.choose(np.random.default_rng([self.sampler.seed, epoch, batch, 1 << 30]))
            for part in range(rank * parts, (rank + 1) * parts):
                size, count = batch_size // self.group_size, world_size * parts
                groups = rank_samples(batch, size, part, count)
                yield [(choice, epoch, group) for group in groups]

    def draw_readable(
        self, draw: Callable[[int], Drawn], row_of: Callable[[Drawn], int]
    ) -> tuple[Drawn, np.ndarray, list[str]]:
        """The first draw (of attempt 0, 1, ...) whose image can be read and has the annotated size.

        Images of class folders have none.

        Returns:
            The draw, its image (H, W, 3) uint8, and messages on those that could not be used.

        Raises:
            ImageError: too many in a row cannot be used.
        """
        broken: list[str] = []
        for attempt in range(MAX_ATTEMPTS):
            drawn = draw(attempt)
            name = self.coco.file_name(row_of(drawn))
            path = self.images.path / name
            sizes = self.coco.image_sizes
            try:
                image = self.images.read(name)
                if sizes is None or image.shape[:2] == tuple(sizes[row_of(drawn)]):
                    return drawn, image, broken
                height, width = sizes[row_of(drawn)]
                found = f"{image.shape[1]}x{image.shape[0]}"
                hint = orientation_hint(path, self.images.exif)
                broken.append(
                    f"{path}: is {found} pixels, the annotations say {width}x{height}{hint}"
                )
            except ImageError as error:
                broken.append(str(error))
        raise ImageError(
            f"{MAX_ATTEMPTS} images in a row could not be read, the first: {broken[0]}"
        )


def rank_samples(batch: int, size: int, rank: int = 0, world_size: int = 1) -> range:
    """The samples of an epoch that one process loads for its minibatch of index `batch`.

    `size` is of the whole minibatch, over all processes; a multiple of `world_size`.
    """
    assert size % world_size == 0, (size, world_size)
    first = batch * size + rank * size // world_size
    return range(first, first + size // world_size)


def batch_loader(
    dataset: Dataset,
    batches: Iterable[list],
    collate: Callable[[list[dict]], dict],
    *,
    workers: int,
    pin_memory: bool = False,
) -> DataLoader:
    """Serves the minibatches whose indices are given, in order."""
    started = RawArray("q", workers)
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        worker_init_fn=partial(_start_worker, started),
        prefetch_factor=PREFETCH if workers else None,
    )


def serve(loader: DataLoader) -> Iterator[dict]:
    """The minibatches of a loader whose workers outlive the signals that stop a run.

    Raises:
        ChildProcessError: a worker was killed.
    """
    before = set(active_children())
    try:
        with _unstopped_start():
            batches = iter(loader)
    except BaseException:
        _end_unstarted(_new_workers(before), loader)
        raise
    workers = _new_workers(before)
    try:
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except Exception as error:
                _check_workers(workers, error)
                raise
            yield batch
    finally:
        _end_unstarted(workers, loader)
        del batches  # ends the workers


def _new_workers(before: set[BaseProcess]) -> set[BaseProcess]:
    """Workers that have been started since; their deaths raise nothing.

    PyTorch's handler would at any line as soon as a worker dies, as in the middle of a step or a
    save. Without it, a dead worker shows at the next minibatch.
    """
    workers = set(active_children()) - before
    if workers and hasattr(signal, "SIGCHLD") and _in_main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    return workers


def _end_unstarted(workers: set[BaseProcess], loader: DataLoader) -> None:
    """Kills workers that would start for nothing, and complain of a loader that has gone."""
    assert isinstance(loader.worker_init_fn, partial)
    [started] = loader.worker_init_fn.args
    for worker in workers:
        if worker.pid not in started:
            worker.kill()


def _check_workers(workers: set[BaseProcess], error: Exception) -> None:
    """Raises a ChildProcessError if one was killed: it explains the error."""
    for worker in workers:
        worker.join(timeout=0.1)
        if worker.exitcode:
            code = worker.exitcode
            name = signal.Signals(-code).name if code < 0 else f"status {code}"
            hint = WORKER_HINTS.get(name)
            raise ChildProcessError(
                f"a data-loading worker (process {worker.pid}) was ended by {name}"
                + (f"; {hint}" if hint else "")
            ) from error


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextmanager
def _unstopped_start() -> Iterator[None]:
    """Stop signals come after the block; processes that it starts are born with them blocked."""
    if not hasattr(signal, "pthread_sigmask") or not _in_main_thread():
        yield
        return
    resource_tracker.ensure_running()  # its start would unblock them
    caught: list[int] = []
    previous = catch_stop_signals(lambda signum, _: caught.append(signum))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for n, handler in previous.items():
            signal.signal(n, handler)
        for signum in caught:
            signal.raise_signal(signum)


def _start_worker(started: MutableSequence[int], index: int) -> None:
    # Workers are the parallelism: threads of theirs would only compete with each other and with
    # training.
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    # Ctrl-C and the like go to all processes; the training process decides what to finish first.
    signal.set_wakeup_fd(-1)  # a fork has the training process's
    for signum in STOP_SIGNALS:
        if signum != signal.SIGTERM:
            signal.signal(signum, signal.SIG_IGN)
    started[index] = os.getpid()
    if hasattr(signal, "sigwaitinfo"):  # SIGTERM stays blocked, see `_unstopped_start`
        threading.Thread(target=_end_when_told, daemon=True).start()
    elif hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def _end_when_told() -> None:
    """Ends a worker at the training process's SIGTERM; another sender means all processes."""
    parent = parent_process()
    while True:
        sender = signal.sigwaitinfo([signal.SIGTERM]).si_pid
        if parent is None or sender == parent.pid:
            os._exit(0)
