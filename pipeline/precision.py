"""Full or half precision: what --precision asks for, and networks whose weights are bfloat16."""

import copy
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from models.inference import use_bit_relus
from pipeline import distributed

PRECISIONS = ("auto", "fp32", "bf16")
# Layers that give scores and box deltas; their inputs are cast (models/).
FULL_PRECISION = ("score_tail", "score_head", "cls_score", "bbox_pred")
UNITS = ("amx_bf16", "avx512_bf16")  # of a CPU: products of bfloat16 in hardware
WORTH_IT = 1.2  # times as fast: less is not worth other results
SECONDS, SIDE = 1.0, 320  # of the measurement


def choose_precision(
    precision: str | None,
    network: nn.Module,
    device: torch.device,
    *,
    amp: bool,
    train: bool = False,
    side: int = SIDE,
) -> torch.dtype:
    """The type that a network computes in.

    Args:
        precision: one of `PRECISIONS`, or None for bf16 on CUDA and fp32 on a CPU. "auto" is bf16
            on a CPU with units for it, if the network is faster in it, measured for a second.
        network: what takes most of the time, of one argument, images; it is left as it is.
        amp: the config's; False keeps fp32 on CUDA where the precision is not named.
        train: measure forward and backward, of a trunk.
        side: of the image that is measured, in pixels.
    """
    if precision in ("fp32", "bf16"):
        return torch.float32 if precision == "fp32" else torch.bfloat16
    if device.type == "cuda":
        return torch.bfloat16 if amp else torch.float32
    if precision is None or not has_units():
        return torch.float32
    speedup = distributed.gather(_speedup(network, train, side))[0]  # all processes do as the first
    chosen = torch.bfloat16 if speedup >= WORTH_IT else torch.float32
    distributed.say(
        f"precision: {precision_name(chosen)} (bf16 is {speedup:.1f} times as fast as fp32)"
    )
    return chosen


def precision_name(dtype: torch.dtype) -> str:
    """The type as one of `PRECISIONS`."""
    return "bf16" if dtype == torch.bfloat16 else "fp32"


def has_units() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware."""
    if hasattr(torch.cpu, "get_capabilities"):  # since PyTorch 2.12
        return any(torch.cpu.get_capabilities().get(unit) for unit in UNITS)
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def _speedup(network: nn.Module, train: bool, side: int) -> float:
    """Seconds of a network in fp32 by those in bf16, the median of rounds that time both."""
    images = torch.zeros(1, 3, side, side).contiguous(memory_format=torch.channels_last)
    full, half = (
        copy.deepcopy(network).cpu().to(memory_format=torch.channels_last) for _ in range(2)
    )
    calls: list[Callable[[], object]]
    if train:
        calls = [partial(_train_once, full, images, amp) for amp in (False, True)]
    else:
        to_bfloat16(half)
        calls = [partial(full, images), partial(half, images.bfloat16())]
    ratios: list[float] = []
    end = time.perf_counter() + SECONDS
    while len(ratios) < 2 or time.perf_counter() < end:  # the first round warms up
        times = [time.perf_counter()]
        for call in calls:
            with torch.inference_mode(not train):
                call()
            times.append(time.perf_counter())
        ratios.append((times[1] - times[0]) / (times[2] - times[1]))
    return statistics.median(ratios[1:])


def _train_once(trunk: nn.Module, images: torch.Tensor, amp: bool) -> None:
    with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16, enabled=amp):
        features = trunk(images.clone().requires_grad_())[-1]
    features.float().sum().backward()


def to_bfloat16(network: nn.Module) -> None:
    """Converts the layers of a network for inference, once; scores stay in full precision."""
    for name, module in network.named_modules():
        kept = any(part in FULL_PRECISION for part in name.split("."))
        if isinstance(module, nn.Conv2d | nn.Linear) and not kept:
            module.bfloat16()
    use_bit_relus(network)
