"""Serving training samples by index: unreadable images, minibatches, worker processes.

A sample is a draw seeded by (seed, epoch, index, attempt) and the pixels of the drawn image. An
image that cannot be read is named and the sample drawn again, the same way in any process.
"""

import signal
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from datasets.coco import CocoInstances
from datasets.images import ImageError, ImageFolder, orientation_hint

MAX_ATTEMPTS = 50  # unreadable images in a row before the folder is given up
PREFETCH = 4  # minibatches that each worker holds ready

Drawn = TypeVar("Drawn")


class TrainingDataset(Dataset):
    """Samples drawn from annotated images, by index (choice, epoch, group).

    A group is the samples that share a decoded image; the choice is what its minibatch trains.
    """

    load: Callable[..., tuple[dict, Any]]  # a group's item by its index, and what was drawn
    choose: Callable[[np.random.Generator], Any]  # what a minibatch trains
    group_size = 1

    def __init__(self, coco: CocoInstances, images: str | Path | ImageFolder, sampler: Any):
        """Files are in the folder `images`."""
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
    ) -> Iterator[list[tuple[Any, int, int]]]:
        """Indices of one process's part of the minibatches of a range of training steps.

        What a minibatch trains depends on (seed, epoch, batch) and is the same in every process;
        its `batch_size` samples, over all processes, are dealt out in order. Steps count over all
        epochs: a resumed run starts in the middle of one.
        """
        for step in steps:
            epoch, batch = divmod(step, batches_per_epoch)
            choice = self.choose(np.random.default_rng([self.sampler.seed, epoch, batch, 1 << 30]))
            groups = rank_samples(batch, batch_size // self.group_size, rank, world_size)
            yield [(choice, epoch, group) for group in groups]

    def draw_readable(
        self, draw: Callable[[int], Drawn], row_of: Callable[[Drawn], int]
    ) -> tuple[Drawn, np.ndarray, list[str]]:
        """The first draw (of attempt 0, 1, ...) whose image can be read and has the annotated size.

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
            height, width = self.coco.image_sizes[row_of(drawn)]
            try:
                image = self.images.read(name)
                if image.shape[:2] == (height, width):
                    return drawn, image, broken
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
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        prefetch_factor=PREFETCH if workers else None,
    )


def _start_worker(_: int) -> None:
    # Workers are the parallelism: threads of theirs would only compete with each other and with
    # training.
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    # Ctrl-C goes to the whole process group; the training process decides what to finish first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
