"""Ranks: the one place that knows that a run may have several processes (started by torchrun)."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


@contextmanager
def process_group(device: str) -> Iterator[torch.device]:
    """Joins torchrun's processes, if there are any; yields this process's device."""
    if "RANK" not in os.environ:
        yield torch.device(device)
        return
    local = torch.device(device)
    if local.type == "cuda":
        local = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if local.type == "cuda" else "gloo")
    try:
        yield local
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """Index of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes files and prints."""
    return rank() == 0


def say(message: str) -> None:
    """A line on stdout, from the main process."""
    if is_main():
        print(message, flush=True)


def wrap(model: nn.Module, device: torch.device) -> nn.Module:
    """The model, its gradients averaged over the processes if there are several."""
    if not dist.is_initialized():
        return model
    # Either head is idle in a minibatch of the other kind; its gradients must stay None, so that
    # neither momentum nor weight decay moves it.
    return DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        find_unused_parameters=True,
        broadcast_buffers=False,
    )


def any_process(*flags: bool | torch.Tensor, device: torch.device) -> list[bool]:
    """For each flag, whether it is set in any process."""
    if not dist.is_initialized():
        return [bool(flag) for flag in flags]
    values = torch.stack([torch.as_tensor(flag, device=device).float() for flag in flags])
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values.bool().tolist()


def gather(value: object) -> list:
    """`value` of every process, in order of rank."""
    if not dist.is_initialized():
        return [value]
    values: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Waits for every process."""
    if dist.is_initialized():
        dist.barrier()
