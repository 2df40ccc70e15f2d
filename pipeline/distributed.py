"""Ranks: the one place that knows that a run may have several processes (started by torchrun)."""

import hashlib
import inspect
import os
import re
import sys
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

# Objects and barriers: one process may work for longer than the gradients' group would wait.
PATIENCE = timedelta(days=7)
STORE_TIMEOUT = timedelta(seconds=5)  # torchrun's, which answers at once
PATIENCE_TO_MEET = timedelta(minutes=10)
# What Gloo and NCCL say of a process that has gone.
LOST = re.compile("connection (was )?(closed|reset|refused)|broken pipe|gloo|nccl", re.IGNORECASE)
_patient_group: Any = None


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
        dist.init_process_group("nccl", device_id=local, **_meeting_place())
    else:
        dist.init_process_group("gloo", **_meeting_place())
    global _patient_group
    _patient_group = dist.new_group(backend="gloo", timeout=PATIENCE)
    try:
        yield local
    finally:
        dist.destroy_process_group()


def _meeting_place() -> dict[str, Any]:
    """Where torchrun's processes meet; by default, where the environment says.

    torchrun may keep its store when it restarts them. PyTorch would find in it the addresses of
    those that have gone, and wait for them.
    """
    store = _torchrun_store(PATIENCE_TO_MEET)
    if store is None:
        return {}
    return {
        "store": dist.PrefixStore(f"maskpath/{_attempt()}", store),
        "rank": int(os.environ["RANK"]),
        "world_size": int(os.environ["WORLD_SIZE"]),
    }


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


def wrap(model: nn.Module, device: torch.device, *, idle_parameters: bool) -> nn.Module:
    """The model, its gradients averaged over the processes if there are several.

    `idle_parameters`: a minibatch may use only some of those that are trained. The gradients of the
    others must stay None, so that neither momentum nor weight decay moves them.
    """
    if not dist.is_initialized():
        return model
    _synchronize_norms(model, device)
    # A doubled convolution's gradient has another order than its channels-last weight: it is small,
    # and copied.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    # Buffers are the same in all processes. PyTorch 2.14 gave the option another name.
    options = inspect.signature(DistributedDataParallel.__init__).parameters
    sync = "forward_sync_buffers" if "forward_sync_buffers" in options else "broadcast_buffers"
    settings: dict[str, Any] = {"find_unused_parameters": idle_parameters, sync: False}
    device_ids = [device] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=device_ids, **settings)


def averaging(model: nn.Module, *, enabled: bool) -> AbstractContextManager:
    """A block in which gradients are averaged over the processes, or not yet, see `wrap`."""
    if enabled or not isinstance(model, DistributedDataParallel):
        return nullcontext()
    return model.no_sync()


def _synchronize_norms(model: nn.Module, device: torch.device) -> None:
    """Has live batch norm, where there is any, count the minibatches of all processes."""
    if device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.__class__ = SyncNorm  # the same numbers


class _Sum(torch.autograd.Function):
    """The sum over the processes; so is its gradient."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        values = values.clone()
        dist.all_reduce(values)
        return values

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _Sum.forward(ctx, gradient)


sum_over_processes: Callable[[Tensor], Tensor] = _Sum.apply


class SyncNorm(nn.BatchNorm2d):
    """As SyncBatchNorm, which PyTorch does not have on a CPU; processes have equal parts."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape."""
        if not self.training:
            return super().forward(x)
        values = x.float()
        # One after the other: a difference of squares would lose a small variance.
        mean = sum_over_processes(values.mean((0, 2, 3)) / world_size())
        deviations = values - mean[:, None, None]
        var = sum_over_processes(deviations.square().mean((0, 2, 3)) / world_size())
        with torch.no_grad():
            count = x.numel() / len(mean) * world_size()
            self.get_buffer("running_mean").lerp_(mean, self.momentum or 0.0)
            self.get_buffer("running_var").lerp_(var * count / (count - 1), self.momentum or 0.0)
            self.get_buffer("num_batches_tracked").add_(1)
        scale = self.weight * (var + self.eps).rsqrt()
        return (deviations * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


def is_first_to_say(message: str) -> bool:
    """Whether no other process of the run has said this: a mistake that all make is one line."""
    key = f"said/{_attempt()}/{hashlib.sha256(message.encode(errors='replace')).hexdigest()}"
    own = uuid.uuid4().hex
    return _first_value(key, own) == own


def allowed_at_first(output: Path, allowed: bool) -> bool:
    """What the main process was allowed to do in a folder when torchrun started it first.

    Those that it has started again, since one was lost or has joined, go on with what the first
    ones did; they may not do what was refused to those. All processes call it.
    """
    words = "allowed", "refused"
    first = words[0]
    if is_main():
        first = _first_value(f"start/{output.absolute()}", words[0 if allowed or _attempt() else 1])
    return gather(first)[0] == words[0]


def _attempt() -> int:
    """How often torchrun has restarted the processes."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def _first_value(key: str, value: str) -> str:
    """The first value that any process, also one before a restart, has given to a key.

    The processes may not have joined yet, or have parted; torchrun's store is there all the time.
    """
    try:
        store = _torchrun_store(STORE_TIMEOUT)
        return value if store is None else store.compare_set(f"maskpath/{key}", "", value).decode()
    except (KeyError, ValueError, RuntimeError):
        return value


def _torchrun_store(timeout: timedelta) -> dist.TCPStore | None:
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False)


def mean(values: Tensor) -> Tensor:
    """The mean over the processes, float, of a tensor of one shape in all of them."""
    values = values.float()
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values


def any_process(*flags: bool | Tensor, device: torch.device) -> list[bool]:
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
    dist.all_gather_object(values, value, group=_patient_group)
    return values


@contextmanager
def telling_errors() -> Iterator[None]:
    """In the main process: a user's mistake in the block ends all, see `stop_with_main`."""
    try:
        yield
    except (ValueError, OSError):
        gather(True)
        raise
    gather(False)


def stop_with_main() -> None:
    """Ends this process, without a line, if the main one has met an error in its block."""
    if any(gather(False)):
        sys.exit(2)


def is_lost_connection(error: BaseException) -> bool:
    """Whether a collective call failed because another process has ended."""
    is_runtime_error = isinstance(error, RuntimeError) and dist.is_initialized()
    return is_runtime_error and bool(LOST.search(str(error)))


def barrier() -> None:
    """Waits for every process."""
    if dist.is_initialized():
        dist.barrier(group=_patient_group)
