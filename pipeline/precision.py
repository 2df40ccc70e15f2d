"""Full or half precision: what --precision asks for, and networks whose weights are bfloat16."""

import copy
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from models.trunk import Trunk
from pipeline import distributed

PRECISIONS = ("auto", "fp32", "bf16")
# Layers that give scores and box deltas; their inputs are cast (models/).
FULL_PRECISION = ("score_tail", "score_head", "cls_score", "bbox_pred")
UNITS = ("amx_bf16", "avx512_bf16")  # of a CPU: products of bfloat16 in hardware
WORTH_IT = 1.2  # times as fast: less is not worth other results
SECONDS, SIDE = 1.0, 320  # of the measurement, and the side of its image in pixels


def choose_precision(
    precision: str | None, trunk: Trunk, device: torch.device, *, amp: bool, train: bool = False
) -> torch.dtype:
    """The type that a network computes in.

    Args:
        precision: one of `PRECISIONS`, or None for bf16 on CUDA and fp32 on a CPU. "auto" is bf16
            on a CPU with units for it, if the trunk is faster in it, measured for a second.
        amp: the config's; False keeps fp32 on CUDA where the precision is not named.
        train: measure forward and backward.
    """
    if precision in ("fp32", "bf16"):
        return torch.float32 if precision == "fp32" else torch.bfloat16
    if device.type == "cuda":
        return torch.bfloat16 if amp else torch.float32
    if precision is None or not has_units():
        return torch.float32
    speedup = distributed.gather(_speedup(trunk, train))[0]  # all processes do as the first
    chosen = torch.bfloat16 if speedup >= WORTH_IT else torch.float32
    distributed.say(
        f"precision: {'bf16' if chosen == torch.bfloat16 else 'fp32'} "
        f"(the trunk in bf16 is {speedup:.1f} times as fast as in fp32)"
    )
    return chosen


def has_units() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware."""
    capabilities: dict = getattr(torch.cpu, "get_capabilities", dict)()  # since PyTorch 2.12
    return any(capabilities.get(unit) for unit in UNITS)


def _speedup(trunk: Trunk, train: bool) -> float:
    """Seconds of a trunk in fp32 by those in bf16, the median of rounds that time both."""
    images = torch.zeros(1, 3, SIDE, SIDE).contiguous(memory_format=torch.channels_last)
    trunks = [copy.deepcopy(trunk).cpu() for _ in range(2)]
    calls: list[Callable[[], object]]
    if train:
        calls = [partial(_train_once, trunks[0], images, amp) for amp in (False, True)]
    else:
        to_bfloat16(trunks[1])
        calls = [partial(_run_once, one, images) for one in trunks]
    ratios: list[float] = []
    end = time.perf_counter() + SECONDS
    while len(ratios) < 2 or time.perf_counter() < end:  # the first round warms up
        times = [time.perf_counter()]
        for call in calls:
            call()
            times.append(time.perf_counter())
        ratios.append((times[1] - times[0]) / (times[2] - times[1]))
    return statistics.median(ratios[1:])


@torch.inference_mode()
def _run_once(trunk: Trunk, images: torch.Tensor) -> None:
    trunk(images.to(next(trunk.parameters()).dtype))


def _train_once(trunk: Trunk, images: torch.Tensor, amp: bool) -> None:
    with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16, enabled=amp):
        features = trunk(images.clone().requires_grad_())[-1]
    features.float().sum().backward()


def to_bfloat16(network: nn.Module) -> None:
    """Converts the layers of a network for inference, once; scores stay in full precision."""
    for name, module in network.named_modules():
        kept = any(part in FULL_PRECISION for part in name.split("."))
        if isinstance(module, nn.Conv2d | nn.Linear | FrozenBatchNorm2d) and not kept:
            module.bfloat16()
