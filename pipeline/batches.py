"""Minibatches of a data loader, moved to the device."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from datasets.images import ImageError


def device_batches(loader: Iterable[dict], device: torch.device, *, pixels: str) -> Iterator[dict]:
    """The loader's minibatches, their tensors on the device and their pixels channels-last.

    Args:
        pixels: the key of the images.

    Raises:
        ImageError: too many images in a row cannot be read.
    """
    cuda = device.type == "cuda"
    try:
        for batch in loader:
            for name, value in batch.items():
                if isinstance(value, Tensor):
                    batch[name] = value.to(device, non_blocking=cuda)
            batch[pixels] = batch[pixels].contiguous(memory_format=torch.channels_last)
            yield batch
    except ImageError as error:
        # From a worker process it comes with that process's traceback before it.
        raise ImageError(str(error).rpartition(f"{ImageError.__name__}: ")[2]) from None
