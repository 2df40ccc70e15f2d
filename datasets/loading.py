"""Serving training samples by index: unreadable images, minibatches, worker processes.

A sample is a draw seeded by (seed, epoch, index, attempt) and the pixels of the drawn image. An
image that cannot be read is named and the sample drawn again, the same way in any process.
"""

import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from datasets.coco import CocoInstances
from datasets.images import ImageError, read_image

MAX_ATTEMPTS = 50  # unreadable images in a row before the folder is given up
PREFETCH = 4  # minibatches that each worker holds ready

Drawn = TypeVar("Drawn")


def draw_until_readable(
    draw: Callable[[int], Drawn], read: Callable[[Drawn], np.ndarray]
) -> tuple[Drawn, np.ndarray, list[str]]:
    """The first draw (of attempt 0, 1, ...) whose image can be read.

    Returns:
        The draw, its image, and the messages on those that could not be read.

    Raises:
        ImageError: too many in a row cannot be read.
    """
    broken: list[str] = []
    for attempt in range(MAX_ATTEMPTS):
        drawn = draw(attempt)
        try:
            return drawn, read(drawn), broken
        except ImageError as error:
            broken.append(str(error))
    raise ImageError(f"{MAX_ATTEMPTS} images in a row could not be read, the first: {broken[0]}")


def read_annotated_image(coco: CocoInstances, images: Path, row: int) -> np.ndarray:
    """Image `row` of a dataset whose files are in the folder `images`, (H, W, 3) uint8.

    Raises:
        ImageError: the file cannot be read, or its size is not the annotations'.
    """
    path = images / coco.file_name(row)
    image = read_image(path)
    if image.shape[:2] != tuple(coco.image_sizes[row]):
        height, width = coco.image_sizes[row]
        raise ImageError(
            f"{path}: is {image.shape[1]}x{image.shape[0]} pixels, "
            f"the annotations say {width}x{height}"
        )
    return image


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
