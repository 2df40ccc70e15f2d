"""Optimizer, learning rates and averaged weights of a stage."""

import math
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pipeline.config import OptimConfig


def learning_rate(optim: OptimConfig, step: int) -> float:
    """Of a step, from 0 on: warm-up times drops at epochs, or times a half cosine to zero."""
    warmup = min(1.0, (step + 1) / optim.warmup_batches) if optim.warmup_batches else 1.0
    if optim.schedule == "cosine":
        progress = step / (optim.epochs * optim.batches_per_epoch)
        return optim.lr * warmup * 0.5 * (1 + math.cos(math.pi * progress))
    epoch = step // optim.batches_per_epoch
    passed = [start for start in optim.lr_drops if start <= epoch]
    return optim.lr * warmup * (optim.lr_drops[max(passed)] if passed else 1.0)


def build_optimizer(optim: OptimConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """SGD or AdamW over the groups; the loop sets the learning rates."""
    if optim.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=optim.lr, weight_decay=optim.weight_decay, fused=True)
    return torch.optim.SGD(
        groups, lr=optim.lr, momentum=optim.momentum, weight_decay=optim.weight_decay
    )


def average_weights(model: nn.Module, decay: float | None) -> AveragedModel | None:
    """A moving average of a model's weights, updated after each step; None without a decay.

    Live batch norm's statistics are averaged, too: those of other weights do not fit the average.
    """
    if decay is None:
        return None
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
