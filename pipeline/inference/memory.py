"""Keeps host memory flat over many images, and reports images that do not fit in memory."""

import ctypes
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import TypeVar

import cv2
import numpy as np
import torch

M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1  # of glibc's malloc.h
NEVER = 1 << 30  # bytes
MAX_KEPT = 8  # images of one size between which freed memory is kept
NUM_PRIMITIVES = 64  # what the repeated layers of one scale of ResNet-50 need, and some more
# What a network raises on an image that is too large: PyTorch on a CPU and OpenCV have no special
# exception for it.
NETWORK_ERRORS = (RuntimeError, MemoryError, cv2.error)
NO_MEMORY = re.compile("(can't allocate|not enough|insufficient|out of) memory", re.IGNORECASE)
T = TypeVar("T")
E = TypeVar("E", bound=Exception)


def keep_freed_blocks() -> None:
    """Has glibc keep the memory of freed blocks, however large, for the next ones.

    By default it returns large blocks to the system, which clears every page of them at the next
    allocation: up to half of the time of a network's layers. The settings hold for the process;
    call this before a network runs, since oneDNN reads its setting only once. Does nothing on other
    systems than Linux.
    """
    # Primitives, one for each layer and size, outlive images. By the thousand (the default) they
    # lie all over the heap, which then grows with every new size. The first cache is PyTorch's.
    for cache in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(cache, str(NUM_PRIMITIVES))
    _call_libc("mallopt", M_MMAP_THRESHOLD, NEVER)
    _call_libc("mallopt", M_TRIM_THRESHOLD, NEVER)


def release_between_sizes(
    images: Iterable[tuple[T, np.ndarray | E]],
) -> Iterator[tuple[T, np.ndarray | E]]:
    """The same images; before one of another size, freed memory goes back to the system.

    Blocks of ever other sizes leave gaps that no later one fits, so a process that keeps them grows
    from image to image. Images of one size reuse the same blocks, and are interrupted only now and
    then, for what is left between these. An error may take the place of an image.
    """
    size, kept = None, 0
    for item, image in images:
        if isinstance(image, np.ndarray):
            if kept == MAX_KEPT or size not in (None, image.shape):
                _call_libc("malloc_trim", 0)
                kept = 0
            size, kept = image.shape, kept + 1
        yield item, image


def _call_libc(name: str, *arguments: int) -> None:
    if sys.platform.startswith("linux"):
        with suppress(OSError, AttributeError):  # another C library
            getattr(ctypes.CDLL(None), name)(*arguments)


def describe_failure(error: Exception, shape: tuple[int, ...], *, advice: str) -> str:
    """Why a network failed on an image, in one line; `advice` helps if memory ran out."""
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or NO_MEMORY.search(text):
        return f"out of memory at {shape[1]} x {shape[0]} px; {advice}"
    return f"{type(error).__name__}: {text}"
