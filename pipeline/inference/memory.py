"""Memory that does not grow with the number of images, and images that it does not suffice for."""

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

# Of glibc's malloc.h: from which size on a block is a mapping of its own, and how much free memory
# the heap's end may hold.
M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1
NEVER = 1 << 30  # bytes
MOST_KEPT = 8  # images of one size between which freed memory stays
NUM_PRIMITIVES = 64  # what the repeated layers of one scale of ResNet-50 need, and some more
# What a network raises on an image that is too large. PyTorch on a CPU and OpenCV have no exception
# of their own for it.
NETWORK_ERRORS = (RuntimeError, MemoryError, cv2.error)
T = TypeVar("T")
NO_MEMORY = re.compile("(can't allocate|not enough|insufficient|out of) memory", re.IGNORECASE)


def keep_freed_blocks() -> None:
    """Has glibc keep the memory of freed blocks, however large, for the next ones.

    By itself it maps large blocks anew each time, and the system clears every page of them: up to
    half of the time of a network's layers. Elsewhere than on Linux nothing is done.

    To be called before a network runs: oneDNN, too, reads its setting only once.
    """
    # Primitives, one for each layer and size, outlive images. By the thousand (the default) they
    # lie all over the heap, which then grows with every new size. The first cache is PyTorch's.
    for cache in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(cache, str(NUM_PRIMITIVES))
    _call_libc("mallopt", M_MMAP_THRESHOLD, NEVER)
    _call_libc("mallopt", M_TRIM_THRESHOLD, NEVER)


def release_between_sizes(
    images: Iterable[tuple[T, np.ndarray | Exception]],
) -> Iterator[tuple[T, np.ndarray | Exception]]:
    """The same images; before one of another size, freed memory goes back to the system.

    Blocks of ever other sizes leave gaps that no later one fits, so a process that keeps them grows
    from image to image. Images of one size need the same blocks again, and what is left to lie
    between them goes after a while.

    Args:
        images: with something of their own; an image that could not be read is an exception.
    """
    size, kept = None, 0
    for item, image in images:
        if isinstance(image, np.ndarray):
            if kept == MOST_KEPT or size not in (None, image.shape):
                _call_libc("malloc_trim", 0)
                kept = 0
            size, kept = image.shape, kept + 1
        yield item, image


def _call_libc(name: str, *arguments: int) -> None:
    if sys.platform.startswith("linux"):
        with suppress(OSError, AttributeError):  # another C library
            getattr(ctypes.CDLL(None), name)(*arguments)


def describe_failure(error: Exception, image: np.ndarray, *, advice: str) -> str:
    """Why a network failed on an image (H, W, 3), in one line.

    Args:
        error: one of `NETWORK_ERRORS`.
        advice: what helps if memory ran out.
    """
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or NO_MEMORY.search(text):
        height, width = image.shape[:2]
        return f"out of memory at {width} x {height} px; {advice}"
    return f"{type(error).__name__}: {text}"
