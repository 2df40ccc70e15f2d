"""Memory: how much is free, how much maps may take, what a detector needs, what glibc keeps."""

import ctypes
import os
import re
import sys
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from models.trunk import Trunk

# Beside the features, for each pixel: bytes as they are read, and floats as they are prepared.
INPUT_BYTES = 3 * (1 + 3 * 4)
WORKING_COPIES = 2  # of the largest layer's output: a layer's input and its output
PROBE_SIDE = 64  # px of the image on which layers are measured
ON_CPU, FRACTION = 400_000_000, 1 / 4  # bytes for maps; of what is free
M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1  # of glibc's malloc.h
NEVER = 1 << 30  # bytes
NUM_PRIMITIVES = 640  # for images of one size: 70 layers at nine scales


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on a device, within the limits of a container; None if not known."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    free = []
    with suppress(OSError, ValueError):
        free.append(_number(r"^MemAvailable:\s+(\d+)", Path("/proc/meminfo")) * 1024)
    group = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):  # "max" is no number: there is no limit
        used = _number(r"(\d+)", group / "memory.current")
        used -= _number(r"^inactive_file (\d+)", group / "memory.stat")  # freed when needed
        free.append(_number(r"(\d+)", group / "memory.max") - used)
    return min(free, default=None)


def memory_limit(device: torch.device, gigabytes: float | None) -> int:
    """Bytes for maps of a network: as given, or a quarter of what is free.

    On a CPU .4 GB at most, since more makes hardly anything faster.
    """
    if gigabytes is not None:
        return int(gigabytes * 1e9)
    share = int((free_memory(device) or ON_CPU / FRACTION) * FRACTION)
    return share if device.type == "cuda" else min(ON_CPU, share)


def _number(pattern: str, file: Path) -> int:
    match = re.search(pattern, file.read_text(), re.MULTILINE)
    if match is None:
        raise ValueError
    return int(match[1])


@torch.inference_mode()
def trunk_bytes(trunk: Trunk, dtype: torch.dtype) -> tuple[float, float]:
    """Bytes for each pixel of an image: of the features that stay, and while they are computed.

    The features of a level with C channels at a stride s are C / s^2 numbers for each pixel. Beside
    them the largest layer within a level counts, `WORKING_COPIES` times; a small image shows it.
    """
    numbers = sum(c / s**2 for c, s in zip(trunk.channels, trunk.strides, strict=True))
    largest = 0

    def measure(_layer: nn.Module, _inputs: tuple, output: Tensor) -> None:
        nonlocal largest
        largest = max(largest, output.numel())

    layers = [module for module in trunk.modules() if not list(module.children())]
    hooks = [layer.register_forward_hook(measure) for layer in layers]
    weight = next(trunk.parameters())
    trunk(torch.zeros(1, 3, PROBE_SIDE, PROBE_SIDE, dtype=weight.dtype, device=weight.device))
    for hook in hooks:
        hook.remove()
    return numbers * dtype.itemsize, WORKING_COPIES * largest / PROBE_SIDE**2 * dtype.itemsize


def keep_freed_blocks() -> None:
    """Has glibc keep the memory of freed blocks, however large, for the next ones.

    By default it returns large blocks to the system, which clears every page of them at the next
    allocation: up to half of the time of a network's layers. The settings hold for the process;
    call this before a network runs, since oneDNN reads its setting only once. Does nothing on other
    systems than Linux.
    """
    # Primitives, one for each layer and size, outlive images. To make them anew takes up to a third
    # of a small network's time; but by the thousand (the default) they lie all over the heap, which
    # then grows with every new size. The first cache is PyTorch's.
    for cache in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(cache, str(NUM_PRIMITIVES))
    _call_libc("mallopt", M_MMAP_THRESHOLD, NEVER)
    _call_libc("mallopt", M_TRIM_THRESHOLD, NEVER)


def return_freed_blocks() -> None:
    """Gives the memory of freed blocks back to the system, also that between blocks in use."""
    _call_libc("malloc_trim", 0)


def _call_libc(name: str, *arguments: int) -> None:
    if sys.platform.startswith("linux"):
        with suppress(OSError, AttributeError):  # another C library
            getattr(ctypes.CDLL(None), name)(*arguments)
